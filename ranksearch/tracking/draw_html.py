"""Charts as interactive HTML, by plotly. Pages are self-contained and fetch nothing: each holds the script that draws, packed from 5 MB to
about 2; the browser unpacks it (`draw.js`)."""

from __future__ import annotations

import gzip
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ranksearch.tracking.chart import (
    BLACK,
    DARK_TWINS,
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
    "circle": "circle", "diamond": "diamond", "star": "star", "square": "square", "triangle": "triangle-up",
    "inverted": "triangle-down", "plus": "cross", "cross": "x",
}  # fmt: skip
SIZES = {"star": 13}
BELOW: dict[str, Any] = {
    "orientation": "h",
    "y": 0,
    "yref": "container",
    "yanchor": "bottom",
    "thickness": 12,
    "len": 0.9,
}
"""The place of a heat-map's scale: below, since a narrow screen has no room beside the map."""
PAPER_HEIGHTS = 300, 660
"""Least and largest height of a figure on paper, in pixels: two rows of figures, or a tall one, fill a page."""
SCHEMES = ":root { color-scheme: light dark; } :root.printed { color-scheme: light; } body { background: Canvas; color: CanvasText; }"
"""The style of a page that holds only figures: the browser's own colours, light on paper."""
NARROW = 10
"""A heat-map of at most this many columns may stand beside another figure."""
LINES: dict[str, dict[str, Any]] = {
    "straight": {"dash": "solid"}, "steps": {"shape": "hv"}, "dotted": {"dash": "dot"}, "": {"width": 0},
}  # fmt: skip


def save_html(charts: Sequence[Chart], path: Path, *, title: str) -> None:
    """Writes one page with the charts beneath each other."""
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n<style>{SCHEMES}</style></head>\n'
        f"<body>{''.join(map(fragment, charts))}{script()}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def fragment(chart: Chart) -> str:
    """A chart as a part of a page that ends with `script`: an empty place, and the figure for it as JSON without any `<`."""
    figure = _figure(chart)
    height, (least, most) = figure.layout.height, PAPER_HEIGHTS
    paper = least if isinstance(chart, Plot) else min(max(height - 120, least), most)
    whole = len(chart.columns) > NARROW if isinstance(chart, HeatMap) else not isinstance(chart, Plot)
    return (
        f'<div class="figure{" whole" if whole else ""}">'
        f'<div class="plotly-graph-div" style="min-height: {height}px" data-paper="{paper}"></div>'
        f'<script type="application/json">{figure.to_json()}</script></div>\n'
    )


@cache
def script() -> str:
    """The script that draws a page's fragments, once per page and after them; `draw.js` names the event that reports each."""
    from plotly.colors import make_colorscale, sample_colorscale
    from plotly.io import templates
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs

    packed = b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    looks: dict[str, Any] = {"twins": DARK_TWINS, "light": templates["plotly_white"], "dark": templates["plotly_dark"]}
    looks["shades"] = {
        look: make_colorscale(sample_colorscale("Cividis", 9, *ends)) for look, ends in LINE_SHADES.items()
    }
    draw = files(__package__).joinpath("draw.js").read_text(encoding="utf-8")
    return (
        f'<script type="application/gzip" id="packed">{packed}</script>\n'
        f'<script type="application/json" id="looks">{to_json_plotly(looks)}</script>\n<script>\n{draw}</script>\n'
    )


def _figure(chart: Chart) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        title={"text": chart.title, "font": {"size": 14}},
        template=None,  # the page holds one template for all, see `script`
        margin={"t": 60, "b": 60, "l": 60, "r": 20},
    )
    {Plot: _plot, HeatMap: _heat_map, Bars: _bars, Parallel: _parallel}[type(chart)](figure, chart)  # type: ignore[operator]
    return figure


def _plot(figure: Any, chart: Plot) -> None:
    for series in chart.series:
        _draw_series(figure, series)
    for limit in chart.limits:
        figure.add_vline(
            x=limit.x, line_dash="dash", line_color=BLACK, annotation_text=limit.label, annotation_xshift=4
        )
    figure.update_xaxes(title_text=chart.x)
    figure.update_yaxes(title_text=chart.y)
    if chart.y_range is not None:
        figure.update_yaxes(range=chart.y_range)
    figure.update_layout(
        height=360 if chart.small else 520,
        legend={"orientation": "h", "y": -0.3 if chart.small else -0.16, "yanchor": "top", "x": 0},
    )
    if chart.log_x:
        ticks = decade_ticks([x for series in chart.series for x in series.x])
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    if chart.counted:
        figure.update_xaxes(
            tickformat="d", dtick=max(1, round(max((x for s in chart.series for x in s.x), default=1) / 10))
        )


def _draw_series(figure: Any, series: Series) -> None:
    labelled = bool(series.labels) and len(series.labels) <= LABELLED
    line: dict[str, Any] = {"color": series.colour, **LINES[series.line]}
    shown = [("lines", series.line), ("markers", series.marker), ("text", labelled)]
    figure.add_scatter(
        x=list(series.x), y=list(series.y), name=series.name, mode="+".join(name for name, wanted in shown if wanted),
        line=line, opacity=0.8 if series.faint else 1.0,
        marker={"symbol": MARKERS.get(series.marker), "color": series.colour, "size": 6 if series.faint else SIZES.get(series.marker, 9)},
        text=list(series.labels) if labelled else None, textposition="bottom right", textfont={"size": 10},
        hovertext=list(series.hover) or None, hoverinfo="text" if series.hover else "x+y+name",
    )  # fmt: skip


def _heat_map(figure: Any, chart: HeatMap) -> None:
    from math import log10

    from plotly.colors import hex_to_rgb, sample_colorscale

    names: list[Any] = list(chart.colours)
    values: list[list[Any]]
    bar: dict[str, Any] = dict(BELOW)
    if names:
        values = [[names.index(v) if v is not None else None for v in row] for row in chart.values]
        low, high, n = -0.5, len(names) - 0.5, len(names)
        shades: Any = [[at, colour] for i, colour in enumerate(chart.colours.values()) for at in (i / n, (i + 1) / n)]
        bar |= {"tickvals": list(range(n)), "ticktext": names}
    else:
        scaled: Callable[[Any], float] = log10 if chart.log else float
        values = [[scaled(v) if v is not None else None for v in row] for row in chart.values]
        low, high, shades = scaled(chart.low), scaled(chart.high), "Cividis"
        if chart.log:
            powers = [power for power in range(-12, 1) if low <= power <= high]
            bar |= {"tickvals": powers, "ticktext": [f"1e{power}" for power in powers]}
    figure.add_heatmap(
        z=values, x=list(range(len(chart.columns))), y=list(chart.rows), colorscale=shades, zmin=low, zmax=high, xgap=1, ygap=1,
        hovertext=[list(row) for row in chart.hover], hoverinfo="text", colorbar=bar,
    )  # fmt: skip
    if len(chart.columns) <= LABELLED:
        cells = [
            (i, j)
            for i, row in enumerate(chart.texts)
            for j, text in enumerate(row)
            if text and values[i][j] is not None
        ]
        if names:
            under = [[part / 255 for part in hex_to_rgb(chart.colours[chart.values[i][j]])] for i, j in cells]  # type: ignore[index]
        else:
            under = sample_colorscale(
                shades, [(values[i][j] - low) / (high - low) for i, j in cells], colortype="tuple"
            )
        figure.add_scatter(
            x=[j for _, j in cells], y=[chart.rows[i] for i, _ in cells], text=[chart.texts[i][j] for i, j in cells], mode="text",
            textfont={"size": 10, "color": [ink_on(*colour) for colour in under]}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    figure.update_yaxes(range=[len(chart.rows) - 0.5, -0.5], tickfont={"size": 10})
    ticks = [column.replace("\n", "<br>") for column in chart.columns]
    below = chart.x.replace("\n", "<br>")
    figure.update_xaxes(
        title_text=below,
        tickvals=list(range(len(ticks))),
        ticktext=ticks,
        tickfont={"size": 10},
        range=[-0.5, len(ticks) - 0.5],
    )
    more = 18 * chart.x.count("\n")
    figure.update_layout(height=max(420, 17 * len(chart.rows) + 260) + more, margin={"b": 130 + more})
    if not names:  # there is no room beside the scale for what shades mean
        figure.update_layout(title={"text": f"{chart.title}<br><sup>shade: {chart.scale}</sup>"})


def _parallel(figure: Any, chart: Parallel) -> None:
    axes = []
    for axis in chart.axes:
        made: dict[str, Any] = {"label": axis.name, "values": list(axis.values)}
        if axis.ticks:
            made |= {"tickvals": list(range(len(axis.ticks))), "ticktext": list(axis.ticks)}
        elif axis.log:
            made |= dict(zip(("tickvals", "ticktext"), zip(*axis_ticks(axis), strict=True), strict=True))
        axes.append(made)
    figure.add_parcoords(
        dimensions=axes, labelangle=-20, labelfont={"size": 11},
        line={
            "color": list(chart.shade), "cmin": chart.low, "cmax": chart.high, "showscale": True,
            "colorbar": {"title": {"text": chart.scale}},
        },
    )  # fmt: skip
    figure.update_layout(height=440, margin={"t": 130, "b": 40, "l": 90, "r": 20}, title={"y": 0.98, "yanchor": "top"})


def _bars(figure: Any, chart: Bars) -> None:
    for i, (group, values) in enumerate(chart.groups.items()):
        figure.add_bar(
            y=list(chart.names), x=list(values), name=group, orientation="h",
            marker={"color": PALETTE[i], "pattern": {"shape": "/" if i % 2 else ""}},
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text=chart.x.replace("\n", "<br>"))
    figure.update_layout(
        barmode="group",
        legend={"orientation": "h", "y": -0.28, "yanchor": "top", "x": 0},
        height=max(420, 24 * len(chart.names) + 140),
    )
