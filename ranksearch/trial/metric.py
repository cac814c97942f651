"""`Metric`: what trials are judged by, and the one place that says which of two values is better, and by how much.

Everything that compares trials (front, best, hypervolume, early stopping, samplers) uses the **share** of a value: a number in [0, 1],
the larger the better, 0 the reference point.

- A metric in percent has its own scale: share = v / 100, or 1 - v / 100 where it is minimised.
- Any other is measured against the dense net's value d: with r = (v - d) / |d|, its sign turned where v is minimised (r = 0 for the dense
  net itself), share = (1 + r / (1 + |r|)) / 2. It rises with r everywhere and never saturates: half for the dense net, a quarter for
  one that is worse by |d| (an RMSE twice as large), at most one. Where d is 0, r is the difference itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ranksearch.errors import UsageError
from ranksearch.space.quality import ACCURACY, Quality

if TYPE_CHECKING:
    from ranksearch.tasks.task import Task

PERCENT = "%"
ROUNDING = 1e-9
TOLD_WORST = 10.0
"""A plan that could not be tried is told to the sampler as so many |d| worse than dense."""


Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Metric:
    """A task's metric with the dense net's validation value."""

    name: str
    direction: Direction
    """"maximize" or "minimize"."""
    unit: str
    dense: float

    @classmethod
    def of(cls, task: Task, dense: float) -> Metric:
        assert task.metric_name is not None
        assert task.unit is not None
        return cls(task.metric_name, task.direction, task.unit, dense)

    @classmethod
    def of_study(cls, info: Mapping[str, Any]) -> Metric:
        """The metric that a study's `study.json` names; accuracy in percent where it names none."""
        known = info.get("metric") or {"name": "accuracy", "direction": "maximize", "unit": PERCENT}
        return cls(known["name"], known["direction"], known["unit"], info["dense"]["val_accuracy"])

    def to_dict(self) -> dict[str, str]:
        """What `front.json` says of it."""
        return {"name": self.name, "direction": self.direction, "unit": self.unit}

    def share(self, value: float) -> float:
        """A value as a share, the larger the better; see above."""
        if self.unit == PERCENT:
            return value / 100 if self.direction == "maximize" else 1 - value / 100
        r = (value - self.dense) / (abs(self.dense) or 1.0)
        r = r if self.direction == "maximize" else -r
        return (1 + r / (1 + abs(r))) / 2

    def limit(self, quality: Quality | None) -> float | None:
        """A limit on the metric in its own unit; None without one.

        Raises:
            UsageError: it is on another metric, or beyond what a metric in percent can be.
        """
        if quality is None:
            return None
        if quality.name not in (ACCURACY, self.name):
            raise UsageError(
                f"at least {quality}: the task's metric is {self.name!r}: write {self.name}={quality.text}."
            )
        value = quality.value(self.dense, self.direction)
        if self.unit == PERCENT and not 0 <= value <= 100:
            raise UsageError(
                f"at least {quality} is {value:g} % (dense {self.dense:.2f} %), which no net can have: expected 0 to 100."
            )
        return value

    def least_share(self, quality: Quality | None) -> float | None:
        """The share that a limit stands for; None without one. A rounding error below it is not held against a net."""
        value = self.limit(quality)
        return None if value is None else self.share(value) - ROUNDING

    @property
    def worst(self) -> float:
        """A value that a net of no use has: what a sampler is told of a plan that could not be tried."""
        if self.unit == PERCENT:
            return 0.0 if self.direction == "maximize" else 100.0
        far = TOLD_WORST * (abs(self.dense) or 1.0)
        return self.dense - far if self.direction == "maximize" else self.dense + far

    def text(self, value: float | None) -> str:
        """For a sentence, such as `98.21 %` or `0.03417 K`."""
        return metric_text(self.to_dict(), value, with_unit=True)

    @property
    def heading(self) -> str:
        """For an axis: `accuracy (%)`, `rmse (K, less is better)`."""
        less = "less is better" if self.direction == "minimize" else ""
        behind = ", ".join(filter(None, (self.unit, less)))
        return f"{self.name} ({behind})" if behind else self.name

    @property
    def column(self) -> str:
        """What follows `val` or `test` at the head of a column: `%` for accuracy, which needs no name, else name and unit."""
        return metric_column(self.to_dict())


def metric_column(metric: Mapping[str, str]) -> str:
    """See `Metric.column`."""
    return metric["unit"] if metric["name"] == "accuracy" else f"{metric['name']} {metric['unit']}".rstrip()


def metric_text(metric: Mapping[str, str], value: float | None, *, with_unit: bool = False) -> str:
    """A value for a table's cell: two decimals in percent, four figures otherwise; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:.2f}" if metric["unit"] == PERCENT else f"{value:.4g}"
    return f"{text} {metric['unit']}".rstrip() if with_unit else text


def metric_difference(metric: Mapping[str, str], value: float, other: float) -> str:
    """How far two values are apart, to the decimals that they are shown with, without a sign."""
    texts = [metric_text(metric, value), metric_text(metric, other)]
    if any("e" in text for text in texts):
        return metric_text(metric, abs(value - other))
    return f"{abs(value - other):.{max(len(text.partition('.')[2]) for text in texts)}f}"


def as_read(metric: Mapping[str, str], value: float) -> float:
    """A value of the metric rounded as it is shown."""
    return float(metric_text(metric, value))
