"""The best of a study's rows, and what early stopping spared them. Values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ranksearch.allocate import Budget
from ranksearch.compress import Cost
from ranksearch.errors import UsageError
from ranksearch.front.front import in_order, merit
from ranksearch.front.row import Row
from ranksearch.space.quality import Quality
from ranksearch.space.space import Space
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import Status


@dataclass(frozen=True)
class Wanted:
    """Conditions by which a net is picked."""

    budgets: Sequence[Budget] = ()
    quality: Quality | None = None

    def __str__(self) -> str:
        texts = [*map(str, self.budgets), *([f"at least {self.quality}"] if self.quality is not None else [])]
        return " and ".join(texts) or "the budgets"

    def met_by(self, rows: Sequence[Row], dense: Cost, metric: Metric) -> list[Row]:
        """The complete rows that meet every condition."""
        least = metric.least_share(self.quality)
        found = [row for row in rows if row.complete and (least is None or row.worth >= least)]
        return [row for row in found if all(b.allows(_cost_of(row, b.cost), dense) for b in self.budgets)]


def best_row(rows: Sequence[Row], dense: Cost, metric: Metric, space: Space, wanted: Wanted) -> Row:
    """The best complete row that meets what is wanted: with a limit on the metric the cheapest one, else the one with the best metric.

    Raises:
        UsageError: no trial does; the message says how far the nearest one is.
    """
    met = wanted.met_by(rows, dense, metric)
    if not met:
        within = replace(wanted, quality=None).met_by(rows, dense, metric)
        most = (
            f" The best within them reaches {metric.text(max(within, key=merit).value)}."
            if within and wanted.quality
            else ""
        )
        raise UsageError(f"No finished trial of {space.name!r} lies within {wanted}.{most}")
    if wanted.quality is None:
        return max(met, key=merit)
    return in_order(met, next((name for name in space.search.objectives if name != "accuracy"), "macs"))[0]


def _cost_of(row: Row, budget: str) -> Cost:
    """A row's costs, with the latency that was measured, or predicted if it was not measured."""
    latency = row.latency_ms if row.latency_ms is not None else row.latency_predicted_ms
    if budget == "latency" and latency is None:
        raise UsageError("Latency is neither a budget nor an objective of this study: it was not measured.")
    return replace(row.cost, latency_ms=latency)


def steps_saved(rows: Sequence[Row]) -> float:
    """Share of the rows' training steps that early stopping spared."""
    steps = {row.trial: row.recipe["steps"] for row in rows if row.recipe is not None}
    planned = sum(steps.values())
    stopped = [row for row in rows if row.status is Status.STOPPED]
    spared = sum(steps[row.trial] - row.history[-1]["step"] for row in stopped)
    return spared / planned if planned else 0.0
