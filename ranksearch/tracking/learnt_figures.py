"""What a search learnt, as charts: importances with their direction, slices, parallel coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

import numpy as np

from ranksearch.front.importance import BEST, accuracy_at_cost
from ranksearch.front.row import Row
from ranksearch.tracking.chart import BLUE, GREY, Axis, Bars, Chart, Parallel, Plot, Series, counted, range_around
from ranksearch.tracking.learnt import FEWEST_DIRECTED, by_weight, clear, directions
from ranksearch.tracking.view import View, cost_percent
from ranksearch.words import COST_NAMES, parameter_label, parameter_meaning

SHOWN_IMPORTANCES, SLICES, AXES = 15, 4, 8
OUTER = 0.1
"""This share of the trials at either end of the metric is shaded like the next one: a failed trial must not make all others look alike."""
DECADE = 10.0
"""A parameter whose values span at least this factor has a logarithmic axis."""

Importances = Mapping[str, Mapping[str, float]]


def learnt_charts(view: View, importances: Importances) -> dict[str, Chart]:
    """Name -> chart; empty while there are too few trials."""
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
    x = f"share of what tells the best {BEST:.0%}\nof {trials} trials from the rest\n(▲ more was better, ▼ less)"
    return Bars(
        f"{view.name}: importance of what is searched", x.replace("%", " %"),
        [f"{parameter_label(name)}{_arrow(found.get(name, 0.0), trials)}" for name in shown], groups,
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
    others, front = (
        [point for point in points if (point[0]["trial"] in view.on_front) is wanted] for wanted in (False, True)
    )
    main = _over(view, name, "front", front, BLUE, "diamond")
    values = [y for *_, y in others]
    y_range = range_around([main], values) if front else None
    series = [_over(view, name, counted("other trials", values, y_range), others, GREY, "circle"), main]
    return Plot(
        f"{view.name}: {parameter_label(name)}", parameter_meaning(name), "points above usual", [s for s in series if len(s.x)],
        log_x=_wide([x for _, x, _ in points]), small=True, y_range=y_range,
    )  # fmt: skip


def _over(
    view: View, name: str, label: str, points: Sequence[tuple[Row, float, float]], colour: str, marker: str
) -> Series:
    """Trials (row, value, points above usual) over the values of a searched number."""
    hover = [f"trial {row['trial']}<br>{parameter_label(name)} {x:.4g}<br>{_score(view, row)}" for row, x, _ in points]
    return Series(label, [x for _, x, _ in points], [y for *_, y in points], colour, marker, hover=hover)


def _score(view: View, row: Row) -> str:
    cost = view.costs[0]
    return f"{view.metric.text(row['val_accuracy'])} at {cost_percent(row, cost) or 0.0:.0f} % of {COST_NAMES[cost]}"


def parallel_chart(view: View, names: Sequence[str]) -> Parallel:
    """Every complete trial as a line through what was searched, its cost and its metric, shaded by the metric."""
    rows = [row for row in view.complete if all(name in row["params_searched"] for name in names)] or view.complete
    axes = [_axis(parameter_label(name), [row["params_searched"].get(name, 0.0) for row in rows]) for name in names]
    cost = view.costs[0]
    axes.append(Axis(f"{COST_NAMES[cost]} %", [cost_percent(row, cost) or 0.0 for row in rows]))
    values = [row.value for row in rows]
    low, high = np.quantile(values, [OUTER, 1 - OUTER]).tolist()
    axes.append(Axis(f"validation {view.metric.column}", values))
    return Parallel(
        f"{view.name}: every complete trial across what was searched",
        axes,
        values,
        f"validation {view.metric.column}",
        low,
        high,
    )


def _axis(name: str, values: Sequence[Any]) -> Axis:
    numbers = [float(value) for value in values]
    return Axis(name, [log10(x) for x in numbers], log=True) if _wide(numbers) else Axis(name, numbers)


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= DECADE * min(values)
