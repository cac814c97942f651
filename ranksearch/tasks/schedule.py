"""How weights are updated, and learning-rate schedules: the share of the peak at a step of a run, after a linear warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

STEP_FACTOR = 0.1
OPTIMIZER_NAMES = ("sgd", "adamw")
"""The optimizers of `training/optimisation.py`, which imports their names from here."""


def _cosine(progress: float) -> float:
    return 0.5 * (1 + cos(pi * progress))


def _step(progress: float) -> float:
    """A tenth after half of the steps, a hundredth after three quarters: the CIFAR schedule of He et al. 2016, arXiv 1512.03385."""
    return STEP_FACTOR ** ((progress >= 0.5) + (progress >= 0.75))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda progress: 1 - progress,
    "step": _step,
    "constant": lambda progress: 1.0,
}
"""Name -> share of the peak at a share 0..1 of the steps that follow the warm-up."""


def learning_rate(name: str, step: int, total: int, *, peak: float, warmup: float) -> float:
    """Learning rate at `step` of `total`: up to `peak` over the first share `warmup` of the steps, then as the schedule `name` says."""
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * SCHEDULES[name]((step - rising) / max(1, total - rising))


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What a recipe says of the steps of a training; meanings and defaults are stated in `space/recipe.py`."""

    batch_size: int
    optimizer: str
    schedule: str
    warmup: float
    lr: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    clip_norm: float
    ema: float
    compile: bool
