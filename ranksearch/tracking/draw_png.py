"""Charts as PNG, by matplotlib, without its global state: a notebook's own figures and backend stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranksearch.tracking.chart import (
    ANNOTATED,
    BLACK,
    LABELLED,
    LINE_SHADES,
    PALETTE,
    Bars,
    Chart,
    HeatMap,
    Parallel,
    Plot,
    Series,
    axis_ticks,
    decade_ticks,
    ink_on,
)

MARKERS = {
    "circle": "o", "diamond": "D", "star": "*", "square": "s", "triangle": "^", "inverted": "v", "plus": "P", "cross": "x",
}  # fmt: skip
LINES = {
    "straight": ("-", "default"),
    "steps": ("-", "steps-post"),
    "dotted": (":", "default"),
    "": ("none", "default"),
}
WIDTH = 6.8
"""Width of a chart, in inches."""
SIZES = {"star": 13, "cross": 6, "circle": 5}


def save_png(charts: Sequence[Chart], path: Path, *, title: str | None = None, stacked: bool = False) -> None:
    """Draws the charts side by side, or beneath each other if `stacked`."""
    from matplotlib.figure import Figure

    heights = [_height(chart) for chart in charts]
    rows, columns = (len(charts), 1) if stacked else (1, len(charts))
    size = (WIDTH * columns, sum(heights) if stacked else max(heights))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, height_ratios=heights if stacked else None)
    for axes, chart in zip(places.flat, charts, strict=True):
        {Plot: _plot, HeatMap: _heat_map, Bars: _bars, Parallel: _parallel}[type(chart)](figure, axes, chart)  # type: ignore[operator]
        axes.set_title(chart.title, fontsize=10)
    if title is not None:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def save_thumbnail(chart: Plot, path: Path) -> None:
    """Draws a plot's points and lines without axes, 400 by 56 pixels, for places with room for nothing but its shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0, 0.56), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    for order, series in enumerate(chart.series):
        _draw_series(axes, replace(series, labels=()), order)
    for limit in chart.limits:
        axes.axvline(limit.x, color=BLACK, linestyle="--", linewidth=1)
    axes.margins(0.03, 0.25)  # so that markers are not cut off
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    axes.set_axis_off()
    figure.savefig(path)


def _height(chart: Chart) -> float:
    """Height of a chart, in inches."""
    if isinstance(chart, HeatMap):
        return max(4.4, 0.19 * len(chart.rows) + 1.3)
    return max(4.4, 0.24 * len(chart.names) + 1.2) if isinstance(chart, Bars) else 4.6


def _plot(figure: Any, axes: Any, chart: Plot) -> None:
    for order, series in enumerate(chart.series):
        _draw_series(axes, series, order)
    for limit in chart.limits:
        axes.axvline(limit.x, color=BLACK, linestyle="--", linewidth=1, label=limit.label)
    axes.set(xlabel=chart.x, ylabel=chart.y)
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    axes.grid(alpha=0.25)
    if chart.log_x:
        ticks = decade_ticks([x for series in chart.series for x in series.x])
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    if chart.counted:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if any(series.name for series in chart.series) or chart.limits:
        axes.legend(fontsize=8)


def _draw_series(axes: Any, series: Series, order: int) -> None:
    style, steps = LINES[series.line]
    axes.plot(
        series.x, series.y, color=series.colour, marker=MARKERS.get(series.marker, ""), linestyle=style, drawstyle=steps,
        markersize=4 if series.faint else SIZES.get(series.marker, 6), alpha=0.8 if series.faint else 1.0,
        label=series.name, zorder=2 + order, linewidth=1.6,
    )  # fmt: skip
    if len(series.labels) <= LABELLED:
        for x, y, text in zip(series.x, series.y, series.labels or [""] * len(series.x), strict=True):
            axes.annotate(text, (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7, color=series.colour)


def _heat_map(figure: Any, axes: Any, chart: HeatMap) -> None:
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    names: list[Any] = list(chart.colours)
    shades: Any
    values: list[list[Any]]
    if names:
        shades, norm = ListedColormap(list(chart.colours.values())), Normalize(-0.5, len(names) - 0.5)
        values = [[names.index(v) if v is not None else float("nan") for v in row] for row in chart.values]
    else:
        shades, norm = "cividis", (LogNorm if chart.log else Normalize)(chart.low, chart.high)
        values = [[v if v is not None else float("nan") for v in row] for row in chart.values]
    image = axes.imshow(values, aspect="auto", cmap=shades, norm=norm, interpolation="nearest")
    axes.set_xticks(range(len(chart.columns)), chart.columns, fontsize=7, rotation=90 if len(chart.columns) > 14 else 0)
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=7)
    axes.set(xlabel=chart.x)
    if len(chart.rows) <= ANNOTATED and len(chart.columns) <= LABELLED:
        for i, row in enumerate(chart.texts):
            for j, text in enumerate(row):
                red, green, blue, _ = image.to_rgba(values[i][j])
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color=ink_on(red, green, blue))
    bar = figure.colorbar(image, ax=axes, label=chart.scale)
    if names:
        bar.set_ticks(range(len(names)), labels=names, fontsize=8)


def _bars(figure: Any, axes: Any, chart: Bars) -> None:
    thick = 0.8 / len(chart.groups)
    for i, (group, values) in enumerate(chart.groups.items()):
        places = [place + (i - (len(chart.groups) - 1) / 2) * thick for place in range(len(chart.names))]
        axes.barh(
            places, values, height=thick, color=PALETTE[i], label=group, hatch="//" if i % 2 else None, edgecolor="white"
        )  # fmt: skip
    axes.set_yticks(range(len(chart.names)), chart.names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=chart.x)
    axes.grid(alpha=0.25, axis="x")
    axes.legend(fontsize=8)


def _parallel(figure: Any, axes: Any, chart: Parallel) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from numpy import linspace

    norm, shades = (
        Normalize(chart.low, chart.high, clip=True),
        ListedColormap(colormaps["cividis"](linspace(*LINE_SHADES["light"], 256))),
    )
    spans = [(min(axis.values), max(axis.values)) for axis in chart.axes]

    def place(value: float, span: tuple[float, float]) -> float:
        return 0.5 if span[1] == span[0] else (value - span[0]) / (span[1] - span[0])

    for i, shade in enumerate(chart.shade):
        heights = [place(axis.values[i], span) for axis, span in zip(chart.axes, spans, strict=True)]
        axes.plot(range(len(heights)), heights, color=shades(norm(shade)), alpha=0.75, linewidth=1.2)
    for x, (axis, span) in enumerate(zip(chart.axes, spans, strict=True)):
        axes.axvline(x, color="#999999", linewidth=0.8)
        for value, text in axis_ticks(axis):
            axes.annotate(
                text, (x, place(value, span)), fontsize=7, xytext=(3, 0), textcoords="offset points", va="center"
            )
    axes.set_xticks(range(len(chart.axes)), [axis.name for axis in chart.axes], rotation=20, ha="right", fontsize=8)
    axes.set_yticks([])
    figure.colorbar(ScalarMappable(norm, shades), ax=axes, label=chart.scale)
