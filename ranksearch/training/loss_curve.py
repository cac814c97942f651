"""The losses of a training: its curve, and their mean over the last steps. What is collected stays on the device until it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

POINTS = 50
"""About how many points the curve of a whole schedule has."""


class LossCurve:
    """Collects the loss of every step; `settle` reads what was collected since it was last called."""

    def __init__(self, total_steps: int, steps: int) -> None:
        """
        Args:
            total_steps: the length of the schedule.
            steps: how many of them are trained here; their last tenth (at least one) is the tail.
        """
        self.points: list[dict[str, float]] = []
        """`step` of the schedule and `train_loss`, the mean since the point before; a mean that is not finite is left out."""
        self._interval, self._tail_steps = max(1, total_steps // POINTS), max(1, steps // 10)
        self._tail: list[float] = []
        self._recent: list[Tensor] = []  # losses of the tail that have not been read
        self._sum: Tensor | float = 0.0  # of the losses since the last point
        self._summed = 0
        self._means: list[tuple[int, Tensor]] = []  # points that have not been read

    def add(self, loss: Tensor, step: int, left: int) -> None:
        """Adds the loss of a `step` of the schedule, counted from 1, after which `left` are to come; nothing waits for a GPU here."""
        if left < self._tail_steps:
            self._recent.append(loss)
        self._sum, self._summed = loss + self._sum, self._summed + 1
        if self._summed == self._interval or left == 0:
            self._means.append((step, self._sum / self._summed))
            self._sum, self._summed = 0.0, 0

    def settle(self) -> None:
        """Reads the collected losses from the device, which a GPU has to finish its work for."""
        self._tail += _numbers(self._recent)
        self._recent.clear()
        read = zip([step for step, _ in self._means], _numbers([mean for _, mean in self._means]), strict=True)
        self.points += [{"step": step, "train_loss": mean} for step, mean in read if isfinite(mean)]
        self._means.clear()

    @property
    def mean_of_tail(self) -> float | None:
        """Mean loss over the tail, as far as it was read; None without steps."""
        return sum(self._tail) / len(self._tail) if self._tail else None

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {"tail": self._tail, "losses": self.points, "sum": float(self._sum), "summed": self._summed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tail, self.points = list(state["tail"]), list(state["losses"])
        self._sum, self._summed = state["sum"], state["summed"]


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """All of them by one copy from the device."""
    return torch.stack(list(scalars)).tolist() if scalars else []
