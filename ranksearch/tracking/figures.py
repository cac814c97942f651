"""The figures of a study, as charts, whatever draws them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from ranksearch.compress import RankPlan
from ranksearch.front.front_shape import FrontRecord
from ranksearch.front.row import Row
from ranksearch.lowering.contract import sides
from ranksearch.tracking.chart import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LOWERING_COLOURS,
    ORANGE,
    PALETTE,
    Chart,
    HeatMap,
    Limit,
    Plot,
    Series,
    counted,
    range_around,
)
from ranksearch.tracking.learnt_figures import learnt_charts
from ranksearch.tracking.view import View, cost_percent
from ranksearch.words import COST_NAMES, describe_budgets

SHORT = {"im2col": "i", "channel": "c", "spatial": "s", "tucker2": "t", "cp": "cp", "svd": "v", "dense": ""}
SHORT |= {f"{name}_pivoted": f"{SHORT[name]}*" for name in ("im2col", "channel", "spatial", "tucker2", "svd")}
"""Lowering -> its short name in a cell of a heat-map."""
LEGEND_WIDTH = 46
"""Characters of a line below an axis: a screen of 390 pixels has room for no more."""
CLOSE = 0.04
"""Two labels closer than this share of a front's width and height would cover each other."""


def study_charts(view: View, importances: Mapping[str, Mapping[str, float]]) -> dict[str, Chart]:
    """Name -> chart of a study, for those that its trials suffice for."""
    charts: dict[str, Chart] = {}
    for cost in view.costs if view.complete else []:
        charts["front" if cost == view.costs[0] else f"front_{cost}"] = front_chart(view, cost)
    if view.complete:
        charts |= dict(progress_charts(view))
    if view.front["trials"] and view.info.get("layers"):
        charts["kept_rank"], charts["lowerings"] = kept_rank_chart(view), lowering_chart(view)
    return charts | learnt_charts(view, importances)


# The front ---------------------------------------------------------------------------------------------------------


def front_chart(view: View, cost: str) -> Plot:
    """Validation accuracy against a cost: front, other trials faint, dense net, budget."""
    rows = [row for row in view.complete if cost_percent(row, cost) is not None]
    front = sorted((r for r in rows if r["trial"] in view.on_front), key=lambda r: cost_percent(r, cost) or 0.0)
    others = [row for row in rows if row["trial"] not in view.on_front]
    several = len(view.costs) > 1  # nets that are nondominated in three objectives form no stairs in two of them
    main = [
        _points(
            view, cost, front, "front, validation", BLUE, "diamond", line="" if several else "steps",
            labels=_labels(view, front, cost),
        ),
        Series("dense net, validation", [100.0], [view.dense["val_accuracy"]], BLACK, "star", hover=[_dense_hover(view)]),
    ]  # fmt: skip
    tested = [row for row in front if row["test_accuracy"] is not None]
    if tested:
        x = [cost_percent(row, cost) or 0.0 for row in tested]
        hover = [_hover(view, row) for row in tested]
        main.append(Series("front, test", x, [r["test_accuracy"] for r in tested], ORANGE, "cross", hover=hover))
    if (test := view.dense["test_accuracy"]) is not None:
        main.append(Series("dense net, test", [100.0], [test], ORANGE, "star", hover=[_dense_hover(view)]))
    beyond = view.previewed if cost == view.costs[0] else []
    values, previewed = [row.value for row in others], [point["val_accuracy"] for point in beyond]
    y_range = range_around(main, [*values, *previewed])
    series = [
        _points(view, cost, others, counted("other trials", values, y_range), GREY, "circle", faint=True),
        Series(
            counted("preview, not trained", previewed, y_range), [p["percent"] for p in beyond], previewed,
            GREEN, "square", "dotted", faint=True,
            hover=[f"preview, not trained<br>{view.metric.text(p['val_accuracy'])} at {p['percent']:.1f} %" for p in beyond],
        ),
        *main,
    ]  # fmt: skip
    limit = view.budget_ratio(cost)
    name = COST_NAMES[cost]
    return Plot(
        f"{view.name}: front of {len(view.trials)} trials", f"{name} (% of dense)", view.metric.heading,
        [s for s in series if len(s.x)], limits=[] if limit is None else [Limit(100 * limit, f"budget {describe_budgets(view.front)}")],
        y_range=y_range,
    )  # fmt: skip


def _labels(view: View, front: Sequence[Row], cost: str) -> list[str]:
    """A label per point of the front; empty if it would cover that of a better point close by."""
    points = [(cost_percent(row, cost) or 0.0, row.value) for row in front]
    wide, high = (
        CLOSE * (max(axis) - min(axis)) for axis in zip(*points, (100.0, view.dense["val_accuracy"]), strict=True)
    )
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: -view.metric.share(point[1])):
        if not any(abs(x - a) < wide and abs(y - b) < high for a, b in kept):
            kept.append((x, y))
    return [f"t{row['trial']}" if point in kept else "" for row, point in zip(front, points, strict=True)]


def _points(
    view: View, cost: str, rows: Sequence[Row], name: str, colour: str, marker: str, *, line: str = "", labels: Sequence[str] = (),
    faint: bool = False,
) -> Series:  # fmt: skip
    x, y = [cost_percent(row, cost) or 0.0 for row in rows], [row["val_accuracy"] for row in rows]
    return Series(name, x, y, colour, marker, line, [_hover(view, row) for row in rows], labels, faint)


def _hover(view: View, row: Row) -> str:
    """The text that the pointer shows over a trial."""
    test = f"<br>test {view.metric.text(row['test_accuracy'])}" if row["test_accuracy"] is not None else ""
    ratios = [
        f"{COST_NAMES[c]} {found:.1f} %" for c in ("macs", "params", "latency") if (found := cost_percent(row, c))
    ]
    mix = RankPlan.from_dict(row["plan"]).summary()
    head = f"trial {row['trial']} ({row['allocator']})<br>validation {view.metric.text(row['val_accuracy'])}{test}"
    return f"{head}<br>{', '.join(ratios)}<br>{mix}"


def _dense_hover(view: View) -> str:
    test = view.dense["test_accuracy"]
    return f"dense net<br>validation {view.metric.text(view.dense['val_accuracy'])}" + (
        f"<br>test {view.metric.text(test)}" if test is not None else ""
    )


# Progress ----------------------------------------------------------------------------------------------------------


def progress_charts(view: View) -> Iterator[tuple[str, Chart]]:
    """Hypervolume, and the best accuracy within the budgets, over finished trials."""
    entries = list(enumerate(view.progress(), start=1))
    if len(view.objectives) > 1:
        axes = ", ".join(view.metric.name if name == "accuracy" else COST_NAMES[name] for name in view.objectives)
        worth = [found["hypervolume"] for _, (_, found) in entries]
        yield (
            "hypervolume",
            Plot(
                f"{view.name}: hypervolume of the front", "finished trials",
                counted(f"hypervolume in ({axes}), as shares", worth, _late_range(worth)),
                [Series("hypervolume", [n for n, _ in entries], worth, BLUE, "circle", "steps")], counted=True,
                y_range=_late_range(worth),
            ),
        )  # fmt: skip
    own = [(n, row) for n, (row, _) in entries if row.complete]
    best = [(n, found["best_within_budget"]) for n, (_, found) in entries if "best_within_budget" in found]
    dense = view.dense["val_accuracy"]
    main = [
        Series("best so far", [n for n, _ in best], [value for _, value in best], BLUE, "", "steps"),
        Series("dense net", [1, len(entries)], [dense, dense], BLACK, "", "dotted"),
    ]
    values = [row.value for _, row in own]
    y_range = range_around(main, values)
    each = Series(
        counted("each trial", values, y_range), [n for n, _ in own], values, GREY, "circle", faint=True,
        hover=[_hover(view, row) for _, row in own],
    )  # fmt: skip
    yield (
        "best_accuracy",
        Plot(
            f"{view.name}: best within {describe_budgets(view.front)}", "finished trials", f"validation {view.metric.heading}",
            [each, *main], y_range=y_range, counted=True,
        ),
    )  # fmt: skip


def _late_range(worth: Sequence[float]) -> tuple[float, float] | None:
    """The range that shows what the last three quarters of the trials gained; None if there are few, or they gained nothing."""
    low, high = worth[len(worth) // 4], worth[-1]
    room = 0.1 * (high - low)
    return (low - room, high + room) if len(worth) >= 8 and high > low else None


# Layers along the front --------------------------------------------------------------------------------------------


def _columns(view: View, rows: Sequence[Row]) -> list[str]:
    return [f"t{row['trial']}\n{cost_percent(row, view.costs[0]):.0f}" for row in rows]


def _along_the_front(view: View) -> str:
    return f"nets of the front: trial, {COST_NAMES[view.costs[0]]} (% of dense)"


def kept_rank_chart(view: View) -> HeatMap:
    """Kept rank per layer along the front."""
    rows = view.front_rows
    return kept_rank_map(
        f"{view.name}: rank kept along the front (empty: dense)", _along_the_front(view), view.info["layers"],
        _columns(view, rows), [row["plan"] for row in rows],
    )  # fmt: skip


def kept_rank_map(
    title: str, x: str, layers: Sequence[FrontRecord], columns: Sequence[str], plans: Sequence[FrontRecord]
) -> HeatMap:
    """A cell per layer and plan: its rank as a share of the lowering's largest useful one; 1 is dense."""
    cells = [[_cell(layer, plan) for plan in plans] for layer in layers]
    used = {lowering for row in cells for _, _, lowering in row}
    legend = ", ".join(f"{short} {name}" for name, short in SHORT.items() if short not in ("", name) and name in used)
    lines = [x, *wrap(legend, LEGEND_WIDTH)]
    names = [layer["name"] for layer in layers]
    return HeatMap(
        title, "\n".join(lines), names, list(columns),
        values=[[share for share, _, _ in row] for row in cells],
        texts=[[text for _, text, _ in row] for row in cells],
        hover=[
            [f"{name}, {_first(at)}: {lowering} {text.split(' ')[-1]}" for at, (_, text, lowering) in zip(columns, row, strict=True)]
            for name, row in zip(names, cells, strict=True)
        ],
        scale="share of the lowering's largest useful rank",
    )  # fmt: skip


def _first(column: str) -> str:
    return column.splitlines()[0]


def _cell(layer: FrontRecord, plan: FrontRecord) -> tuple[float, str, str]:
    """Returns a cell as (share kept, its text, the lowering)."""
    choice = plan["layers"].get(layer["name"], {"lowering": "dense"})
    lowering = choice["lowering"]
    if lowering == "dense" or lowering not in layer["largest_rank"]:
        return 1.0, "" if lowering == "dense" else lowering, lowering
    rank, largest = _sides(choice["rank"]), _sides(layer["largest_rank"][lowering])
    share = sum(r / most for r, most in zip(rank, largest, strict=True)) / len(rank)
    return min(1.0, share), f"{SHORT.get(lowering, lowering)} {'·'.join(map(str, rank))}", lowering


def _sides(rank: Any) -> Sequence[int]:
    return rank if isinstance(rank, list) else sides(rank)


def lowering_chart(view: View) -> HeatMap:
    """The lowering that each layer takes, along the front."""
    rows, layers = view.front_rows, [layer["name"] for layer in view.info["layers"]]
    chosen = [[row["plan"]["layers"].get(n, {"lowering": "dense"})["lowering"] for row in rows] for n in layers]
    used = sorted({lowering for row in chosen for lowering in row} - {"dense"})
    spare = [colour for colour in PALETTE if colour not in LOWERING_COLOURS.values()]
    strange = [name for name in used if name not in LOWERING_COLOURS]
    taken = LOWERING_COLOURS | {name: spare[i % len(spare)] for i, name in enumerate(strange)}
    colours = {name: taken[name] for name in ("dense", *used)}
    columns = _columns(view, rows)
    return HeatMap(
        f"{view.name}: lowering chosen per layer along the front", _along_the_front(view), layers, columns, chosen,
        texts=[[SHORT.get(lowering, lowering) for lowering in row] for row in chosen],
        hover=[
            [f"{name}, {_first(column)}: {lowering}" for column, lowering in zip(columns, row, strict=True)]
            for name, row in zip(layers, chosen, strict=True)
        ],
        scale="lowering", colours=colours,
    )  # fmt: skip
