"""Closed-form fronts and hypervolumes."""

import numpy as np
import pytest

from ranksearch.pareto import hypervolume, nondominated


def test_nondominated_against_brute_force():
    points = np.random.default_rng(0).integers(0, 6, size=(60, 3)).astype(float)
    brute = [not any((q <= p).all() and (q < p).any() for q in points) for p in points]
    assert nondominated(points).tolist() == brute


def test_hypervolume_in_closed_form():
    assert hypervolume([[0.25, 0.5], [0.5, 0.25]], [1, 1]) == pytest.approx(0.75 * 0.5 + 0.5 * 0.25)
    assert hypervolume([[0.5, 1.5]], [1, 1]) == 0  # beyond the reference point
    assert hypervolume(np.zeros((0, 2)), [1, 1]) == 0


def test_non_finite_points_are_refused():
    with pytest.raises(ValueError, match="finite"):
        nondominated([[0.0, float("nan")]])
