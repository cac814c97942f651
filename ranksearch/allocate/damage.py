"""Damage: what a layer's option is predicted to cost in accuracy; the sum over the layers is what an allocation minimises.

damage = scale · measure(share). Without data the share is that of ||W||² that is removed and the scale is 1; a sensitivity
(`sensitivity.py`) replaces the share by one that was weighed with data, and sets the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ranksearch.allocate.curves import LayerOptions

Measure = Callable[[np.ndarray], np.ndarray]


def relative_energy(removed: np.ndarray) -> np.ndarray:
    """Damage as the removed share itself."""
    return removed


def log_kept_energy(removed: np.ndarray) -> np.ndarray:
    """Damage as -log of the kept share: a layer that loses nearly everything costs more than its share.

    On ResNets without training it ranks plans better than the relative energy at small budgets.
    """
    return -np.log(np.clip(1 - removed, 1e-12, 1))


MEASURES: dict[str, Measure] = {"log_kept_energy": log_kept_energy, "relative_energy": relative_energy}
USUAL_MEASURE = "log_kept_energy"


@dataclass(frozen=True, eq=False)
class Damage:
    """The damage of every option of a layer; layers that are not named have their removed energy as share, and scale 1."""

    measure: Measure
    shares: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Layer -> removed share [n options] as data weighs it."""
    scales: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, options: LayerOptions) -> np.ndarray:
        name = options.layer.name
        return self.scales.get(name, 1.0) * self.measure(self.shares.get(name, options.removed))


WITHOUT_DATA = Damage(log_kept_energy)
