"""Charts as values: what a figure shows, before anything draws it. `draw_png.py` and `draw_html.py` draw the same chart.

Colours are Okabe & Ito's, which colour-blind readers tell apart; series differ in marker or line too, categories in their text.
Shades are cividis, read alike by everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BLACK, GREY = "#000000", "#999999"
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, "#8C6D00", "#F0E442")
LOWERING_COLOURS = {
    "dense": "#E5E5E5", "im2col": BLUE, "channel": ORANGE, "spatial": GREEN, "tucker2": PINK, "svd": YELLOW, "cp": SKY,
}  # fmt: skip
"""Lowering -> colour, the same in every figure; others take what is left of the palette."""
LABELLED = 25
"""Points of a series up to which each is labelled."""
ANNOTATED = 45
"""Rows of a heat-map up to which every cell says what it is."""


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name; `hover` and `labels` are empty or one text per point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = ""
    """circle, diamond, star, square, triangle, inverted, plus, cross, or none."""
    line: str = ""
    """straight, steps (a value holds until the next), dotted, or none."""
    hover: Sequence[str] = ()
    labels: Sequence[str] = ()
    faint: bool = False


@dataclass(frozen=True)
class Limit:
    """A vertical line at `x`, such as a budget."""

    x: float
    label: str


@dataclass(frozen=True)
class Plot:
    """Series in a plane."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    limits: Sequence[Limit] = ()
    y_range: tuple[float, float] | None = None
    counted: bool = False
    """Whether x counts something, so that only whole numbers are marked."""
    log_x: bool = False
    small: bool = False
    """Whether it stands beside others of its kind."""


@dataclass(frozen=True)
class HeatMap:
    """Values[row][column] as shades between `low` and `high`, or as categories where `colours` names them; None stays empty."""

    title: str
    x: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | str | None]]
    texts: Sequence[Sequence[str]]
    hover: Sequence[Sequence[str]]
    scale: str = ""
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bars:
    """Horizontal bars of several groups, name by name."""

    title: str
    x: str
    names: Sequence[str]
    groups: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates; `values` are one per line, names of `ticks` by their place where it has any."""

    name: str
    values: Sequence[float]
    ticks: Sequence[str] = ()
    log: bool = False
    """Whether the values are logarithms to base 10."""


@dataclass(frozen=True)
class Parallel:
    """Lines across axes, shaded by `shade` (one per line) from low to high."""

    title: str
    axes: Sequence[Axis]
    shade: Sequence[float]
    scale: str


Chart = Plot | HeatMap | Bars | Parallel


def log_ticks(values: Sequence[float]) -> list[float]:
    """Where an axis of logarithms is marked: its ends and the middle."""
    low, high = min(values), max(values)
    return [low] if low == high else [low, (low + high) / 2, high]


def axis_ticks(axis: Axis) -> list[tuple[float, str]]:
    """(value, text) of the marks of an axis."""
    if axis.ticks:
        return list(enumerate(axis.ticks))
    return [(tick, f"{10**tick if axis.log else tick:.3g}") for tick in log_ticks(axis.values)]
