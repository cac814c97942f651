"""The figures of a preview, as charts: accuracy against cost for each allocator, and the rank that the solver keeps in each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ranksearch.compress import RankPlan
from ranksearch.tracking.chart import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    Chart,
    HeatMap,
    Limit,
    Plot,
    Series,
)
from ranksearch.tracking.figures import kept_rank_map
from ranksearch.words import COST_NAMES, describe_budgets

PreviewRecord = Mapping[str, Any]

STYLES = {
    "solver": (BLUE, "diamond"),
    "uniform": (ORANGE, "circle"),
    "energy": (GREEN, "square"),
    "minimax": (PINK, "triangle"),
    "evbmf": (YELLOW, "inverted"),
    "stable_rank": (SKY, "plus"),
    "random": (GREY, "cross"),
    "greedy": ("#8C6D00", "star"),
}
"""Allocator -> colour, marker."""


def preview_charts(record: PreviewRecord) -> list[Chart]:
    """Accuracy (%) against cost (% of dense) by allocator; kept rank by layer and budget."""
    return [accuracy_chart(record), kept_chart(record)]


def preview_title(record: PreviewRecord) -> str:
    return f"{record['space']}: {record['task']}/{record['model']}, decomposed without training"


def accuracy_chart(record: PreviewRecord) -> Plot:
    """Accuracy against cost: a line per allocator, the dense net, the space's own budget."""
    metric = record["metric"]
    heading = f"{metric['name']} ({metric['unit']})" if metric["unit"] else metric["name"]
    ratio, limit = record["cost_ratio"], record["own_level"]
    series = [
        Series(
            name, [100 * r[ratio] for r in rows], [r["val_accuracy"] for r in rows], *STYLES[name], line="straight",
            hover=[f"{name} at {r['level']:g} %<br>{RankPlan.from_dict(r['plan']).summary()}" for r in rows],
        )
        for name, rows in _lines(record).items()
    ]  # fmt: skip
    series.append(Series("dense net", [100], [record["dense"]["val_accuracy"]], BLACK, "star"))
    return Plot(
        "accuracy by allocator", f"{COST_NAMES[record['cost']]} (% of dense)", f"validation {heading}, BN re-estimated", series,
        limits=[] if limit is None else [Limit(limit, f"budget {describe_budgets(record)}")],
    )  # fmt: skip


def kept_chart(record: PreviewRecord) -> HeatMap:
    """The rank that the solver (or the first allocator) keeps in each layer, by budget."""
    shown = _shown(record)
    rows: Sequence[PreviewRecord] = sorted(
        (row for row in record["plans"] if row["allocator"] == shown), key=lambda row: row["level"]
    )
    return kept_rank_map(
        f"rank kept by {shown} (empty: dense)", f"budget: {COST_NAMES[record['cost']]} (% of dense)", record["layers"],
        [f"{row['level']:g}" for row in rows], [row["plan"] for row in rows],
    )  # fmt: skip


def _lines(record: PreviewRecord) -> dict[str, list[PreviewRecord]]:
    """Allocator -> its plans by rising cost."""
    found: dict[str, list[PreviewRecord]] = {}
    for row in sorted(record["plans"], key=lambda row: row[record["cost_ratio"]]):
        found.setdefault(row["allocator"], []).append(row)
    return {name: found[name] for name in STYLES if name in found}


def _shown(record: PreviewRecord) -> str:
    """The allocator that the heat-map shows: the solver, or else the first one."""
    names = list(_lines(record))
    return "solver" if "solver" in names else names[0]
