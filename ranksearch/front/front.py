"""Comparing rows of trials, the front's hypervolume, and the record that `front.json` and `ranksearch front --json` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ranksearch.costs import NS_PER_MS
from ranksearch.front.row import Row
from ranksearch.front.verdict import SCHEMA, verdict_of
from ranksearch.pareto import hypervolume
from ranksearch.space.quality import Quality
from ranksearch.space.space import Space
from ranksearch.trial.metric import Direction, Metric
from ranksearch.words import COST_RATIOS


def objective_values(row: Row, objectives: Sequence[str]) -> list[float]:
    """A complete row's values as Optuna gets them: the metric in its own unit, costs as ratios of dense."""
    return [row.value if name == "accuracy" else row[COST_RATIOS[name]] for name in objectives]


def _points(rows: Sequence[Row], objectives: Sequence[str]) -> list[list[float]]:
    """Rows in minimisation form: 1 - share, costs as ratios of dense."""
    return [[1 - row.worth if name == "accuracy" else row[COST_RATIOS[name]] for name in objectives] for row in rows]


def dominates(row: Row, other: Row, objectives: Sequence[str]) -> bool:
    """Whether a complete `row` is nowhere worse than the complete `other` and somewhere better."""
    a, b = _points([row, other], objectives)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def same_net(row: Row, other: Row, objectives: Sequence[str]) -> bool:
    """Whether two complete rows are one net found twice: the same layers, and the same values."""
    a, b = _points([row, other], objectives)
    return a == b and (row.plan or {}).get("layers") == (other.plan or {}).get("layers")


def merit(row: Row) -> tuple[float, int]:
    """The key by which a complete row is the best of several: its metric, then fewer MACs."""
    return row.worth, -(row.macs or 0)


def in_order(front: Sequence[Row], cost: str | None = None) -> list[Row]:
    """The rows of a front, the best metric first; with `cost`, the cheapest first."""
    if cost is not None:
        return sorted(front, key=lambda row: (row[COST_RATIOS[cost]] or 0.0, -row.worth, row.trial))
    return sorted(front, key=lambda row: (-row.worth, row.macs or 0, row.trial))


def reference_of(objectives: Sequence[str], least: float | None) -> list[float]:
    """The reference point of a hypervolume: share 0, or that of a limit on the metric, and the dense costs."""
    return [(0.0 if least is None else round(least, 8)) if name == "accuracy" else 1.0 for name in objectives]


def front_hypervolume(front: Sequence[Row], objectives: Sequence[str], least: float | None = None) -> float:
    """Hypervolume of a front in (share, costs as ratios), against `reference_of`."""
    if not front:
        return 0.0
    reference = reference_of(objectives, least)
    at = [1 - value if name == "accuracy" else value for name, value in zip(objectives, reference, strict=True)]
    return hypervolume(_points(front, objectives), at)


def directions_of(objectives: Sequence[str], metric: Metric) -> list[Direction]:
    """Returns "maximize" or "minimize" for each objective."""
    return [metric.direction if name == "accuracy" else "minimize" for name in objectives]


def limit_record(quality: Quality | None, metric: Metric) -> dict[str, Any] | None:
    """The limit on the metric for a front's record: as it was given, and in the metric's own unit; None without one."""
    return None if quality is None else {"text": quality.text, "value": metric.limit(quality)}


def _latency_limits(space: Space) -> dict[str, float]:
    """The key of a row that a budget on latency bounds -> its limit: a share of the dense net's time, or milliseconds."""
    budgets = [budget for budget in space.parsed_budgets() if budget.cost == "latency"]
    return {
        "latency_ratio" if b.relative else "latency_ms": float(b.value) / (100 if b.relative else NS_PER_MS)
        for b in budgets
    }


def front_record(
    space: Space, dense: Mapping[str, Any], metric: Metric, front: Sequence[Row], hypervolume: float, facts: Mapping[str, Any],
    quality: Quality | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The study's name, metric, objectives, budgets, reference point, hypervolume, dense net and front, for JSON.

    Args:
        facts: how far the study is (`Study.facts`); the record holds them beside the rest.
        quality: the limit on the metric at which the front begins.
    """
    objectives = space.search.objectives
    record = {
        "schema": SCHEMA,
        "study": space.name,
        "metric": metric.to_dict(),
        "objectives": [
            {"name": name, "direction": direction}
            for name, direction in zip(objectives, directions_of(objectives, metric), strict=True)
        ],
        "budgets": {budget.cost: budget.text for budget in space.parsed_budgets()},
        "at_least": limit_record(quality, metric),
        "reference_point": reference_of(objectives, metric.least_share(space.quality)),
        "hypervolume": hypervolume,
        **facts,
        "latency": space.latency.model_dump() if space.has_latency else None,
        "latency_limits": _latency_limits(space),
        "dense": dict(dense),
        "trials": [row.record() for row in front],
    }
    return record | {"verdict": verdict_of(record).to_dict()}
