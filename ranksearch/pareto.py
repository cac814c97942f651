"""Nondominated sets and hypervolume, by moocore (the field's C implementation). Values only.

All points are in minimisation form: the caller negates what is to be maximised.
"""

from __future__ import annotations

import moocore
import numpy as np
import numpy.typing as npt


def _points(points: npt.ArrayLike) -> np.ndarray:
    array = np.asarray(points, dtype=float)
    if array.ndim != 2:
        raise ValueError(f"points must be a table of shape [n, objectives], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("points must be finite: a trial without a finite objective is not part of a front")
    return array


def nondominated(points: npt.ArrayLike) -> np.ndarray:
    """Mask [n] of the points [n, objectives] that no other point dominates; of equal points all are kept."""
    array = _points(points)
    if len(array) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(array, keep_weakly=True), dtype=bool)


def hypervolume(points: npt.ArrayLike, reference_point: npt.ArrayLike) -> float:
    """Volume that `points` [n, objectives] dominate below `reference_point` [objectives]; points beyond it add nothing.

    Reference: Zitzler & Thiele 1998; computed by moocore (Fonseca, López-Ibáñez & Paquete).
    """
    array = _points(points)
    reference = np.asarray(reference_point, dtype=float)
    inside = array[(array < reference).all(axis=1)] if len(array) else array
    return float(moocore.hypervolume(inside, ref=reference)) if len(inside) else 0.0
