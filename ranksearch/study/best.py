"""The best of a study's rows, and what early stopping spared them. Values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ranksearch.allocate import parse_budget
from ranksearch.compress import Cost
from ranksearch.errors import UsageError
from ranksearch.study.front import merit
from ranksearch.study.row import Row
from ranksearch.trial.result import Status


def best_row(rows: Sequence[Row], dense: Cost, name: str, budget: str | None) -> Row:
    """The complete row with the best metric, within `budget` ("flops=30%") where one is given; `name` is the study's.

    Raises:
        UsageError: no trial lies within it.
    """
    rows = [row for row in rows if row.complete]
    if budget is not None:
        limit = parse_budget(*budget.partition("=")[::2])
        rows = [row for row in rows if limit.allows(_cost_of(row, limit.cost), dense)]
    if not rows:
        raise UsageError(f"No finished trial of {name!r} lies within {budget or 'the budgets'}.")
    return max(rows, key=merit)


def _cost_of(row: Row, budget: str) -> Cost:
    """A row's costs, its latency as measured; the prediction keeps the budget where it was not."""
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
