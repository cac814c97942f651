"""`TrialResult`: what a trial found, as it travels from a worker to the study."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a trial ended."""

    COMPLETE = "complete"
    DIVERGED = "diverged"
    """A loss, a weight or the metric was not finite."""
    STOPPED = "stopped"
    """It fell behind at a rung."""
    FAILED = "failed"
    NO_SPACE = "no space"
    """Its net or state could not be written, since the disk is full; it is run again."""
    NO_PLACE = "no place"
    """The place of results refused them; it is run again."""


@dataclass(frozen=True)
class TrialResult:
    """What a trial found. `val_accuracy` is the task's metric, in percent where that is accuracy; what was not measured is None."""

    status: Status
    seed: int
    epochs: float
    val_accuracy: float | None = None
    val_loss: float | None = None
    kept: dict[str, Any] | None = None
    """Which net of a complete trial this is, the best on the validation set (`kept.py`): the `phase` and the `step` it was scored after."""
    macs: int | None = None
    params: int | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    """Latency as a ratio of the dense net's, measured in turn with it."""
    images_per_second: float | None = None
    seconds: float | None = None
    projection_share: float | None = None
    """Share of the training time that projections took."""
    eager: str | None = None
    """Why a GPU's training steps were not replayed from a recording; None where they were, and on a CPU."""
    reason: str | None = None
    placement: dict[str, Any] | None = None
    """Where it ran (`placement.py`); None for a trial in the driver's own process."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per phase: its name, the step, validation accuracy and loss, what else was found."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """The training curve: step and mean training loss since the point before."""
    projections: list[dict[str, Any]] = field(default_factory=list)
    """Recorded projections: step, loss on one training batch before and after, removed energy (share of ||W||²) per layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))  # a result that has travelled holds it as text

    def to_dict(self) -> dict[str, Any]:
        """Field -> value. The lists are the result's own: copying every point of its curves would take longer than writing them."""
        return {found.name: getattr(self, found.name) for found in fields(self)}
