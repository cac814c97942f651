"""What a search learnt, as charts: importances with their direction, slices, parallel coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from ranksearch.study.importance import BEST, accuracy_at_cost
from ranksearch.study.row import Row
from ranksearch.tracking.chart import BLUE, GREY, Axis, Bars, Chart, Parallel, Plot, Series
from ranksearch.tracking.learnt import FEWEST_DIRECTED, by_weight, clear, directions, in_words
from ranksearch.tracking.view import View, cost_percent
from ranksearch.words import COST_NAMES

SHOWN_IMPORTANCES, SLICES, AXES = 15, 4, 8
DECADE = 10.0
"""A parameter whose values span this factor is shown in logarithms."""

Importances = Mapping[str, Mapping[str, float]]


def learnt_charts(view: View, importances: Importances) -> dict[str, Chart]:
    """Name -> chart; none before trials tell anything."""
    charts: dict[str, Chart] = {}
    found = directions(view) if len(view.complete) >= FEWEST_DIRECTED else {}
    if importances:
        charts["importances"] = importance_chart(view, importances, found)
    names = by_weight(found, importances)
    for i, name in enumerate(names[:SLICES], start=1):
        charts[f"slice_{i}"] = slice_chart(view, name)
    if len(names) > 1:
        charts["parallel"] = parallel_chart(view, names[:AXES])
    return charts


def importance_chart(view: View, importances: Importances, found: Mapping[str, float]) -> Bars:
    """Which searched parameters distinguish the best quarter of the trials, and which way."""
    names = by_weight(dict.fromkeys((n for shares in importances.values() for n in shares), 0.0), importances)
    shown, trials = names[:SHOWN_IMPORTANCES], len(view.complete)
    groups = {target: [shares.get(name, 0.0) for name in shown] for target, shares in importances.items()}
    x = f"share of what tells the best {BEST:.0%} of {trials} trials from the rest (▲ more was better, ▼ less)"
    return Bars(
        f"{view.name}: importance of what is searched", x.replace("%", " %"),
        [f"{name}{_arrow(found.get(name, 0.0), trials)}" for name in shown], groups,
    )  # fmt: skip


def _arrow(direction: float, trials: int) -> str:
    return "" if abs(direction) < clear(trials) else " ▲" if direction > 0 else " ▼"


def slice_chart(view: View, name: str) -> Plot:
    """How far trials lie above what is usual at their cost (a parabola through all of them), over one searched number."""
    complete = view.complete
    above = accuracy_at_cost(complete, view.objectives).tolist()
    points = [
        (row, row["params_searched"][name], y)
        for row, y in zip(complete, above, strict=True)
        if name in row["params_searched"]
    ]
    series = []
    for label, colour, marker, wanted in (("other trials", GREY, "circle", False), ("front", BLUE, "diamond", True)):
        mine = [(row, x, y) for row, x, y in points if (row["trial"] in view.on_front) is wanted]
        hover = [f"trial {row['trial']}<br>{name} {x:.4g}<br>{_score(view, row)}" for row, x, _ in mine]
        series.append(Series(label, [x for _, x, _ in mine], [y for *_, y in mine], colour, marker, hover=hover))
    return Plot(
        f"{view.name}: {in_words(name)}", name, "points above usual", [s for s in series if len(s.x)],
        log_x=_wide([x for _, x, _ in points]), small=True,
    )  # fmt: skip


def _score(view: View, row: Row) -> str:
    cost = view.costs[0]
    return f"{view.metric.text(row['val_accuracy'])} at {cost_percent(row, cost) or 0.0:.0f} % of {COST_NAMES[cost]}"


def parallel_chart(view: View, names: Sequence[str]) -> Parallel:
    """Every complete trial as a line through what was searched, its cost and its metric, shaded by the metric."""
    rows = [row for row in view.complete if all(name in row["params_searched"] for name in names)] or view.complete
    axes = [_axis(name, [row["params_searched"].get(name, 0.0) for row in rows]) for name in names]
    cost = view.costs[0]
    axes.append(Axis(f"{COST_NAMES[cost]} %", [cost_percent(row, cost) or 0.0 for row in rows]))
    values = [row.value for row in rows]
    axes.append(Axis(f"validation {view.metric.column}", values))
    return Parallel(
        f"{view.name}: every complete trial across what was searched", axes, values, f"validation {view.metric.column}"
    )


def _axis(name: str, values: Sequence[Any]) -> Axis:
    numbers = [float(value) for value in values]
    return Axis(name, [log10(x) for x in numbers], log=True) if _wide(numbers) else Axis(name, numbers)


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= DECADE * min(values)
