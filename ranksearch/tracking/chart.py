"""Charts as values: what a figure shows, before anything draws it. `draw_png.py` and `draw_html.py` draw the same chart.

Colours are Okabe & Ito's, which colour-blind readers tell apart; series differ in marker or line too, categories in their text.
Shades are cividis, read alike by everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log10

BLACK, WHITE, GREY = "#000000", "#FFFFFF", "#767676"
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, "#8C6D00", "#F0E442")
DARK_TWINS = {BLACK: "#ECECEC", GREY: "#A6A6A6", BLUE: "#3D9BE0", ORANGE: "#E8751A", "#8C6D00": "#B8962E"}
"""Colour of a series -> what it is on a dark ground, where it would not stand out; shades and categories stay as they are."""
LOWERING_COLOURS = {
    "dense": "#E5E5E5", "im2col": BLUE, "channel": ORANGE, "spatial": GREEN, "tucker2": PINK, "svd": YELLOW, "cp": SKY,
}  # fmt: skip
"""Lowering -> colour, the same in every figure; others take what is left of the palette."""
LINE_SHADES = {"light": (0.0, 0.72), "dark": (0.45, 1.0)}
"""The part of cividis in which a line stands out from the page, by its scheme."""
LABELLED = 25
"""Points of a series up to which each is labelled."""
ANNOTATED = 45
"""Rows of a heat-map up to which every cell says what it is."""
EVEN = 0.179
"""The luminance from which black and white stand out alike: (1.05 · 0.05)^½ - 0.05."""
DECADES = 100.0
"""Up to such a factor a logarithmic axis is marked between its powers of ten, too."""
ROOM_BESIDE = 1.5
"""The factor beyond its values up to which a logarithmic axis is marked."""
ROOM_BELOW = 0.5
"""How far a figure goes down below a front, as a share of its height: one failed net must not flatten the front."""


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
    """Lines across axes, shaded by `shade` (one per line) between `low` and `high`."""

    title: str
    axes: Sequence[Axis]
    shade: Sequence[float]
    scale: str
    low: float
    high: float


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


def luminance(red: float, green: float, blue: float) -> float:
    """Relative luminance of a colour of shares 0..1, as the Web Content Accessibility Guidelines define it."""
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink_on(red: float, green: float, blue: float) -> str:
    """Black or white, whichever stands out more from a colour of shares 0..1: by 4.5 to 1 at least."""
    return BLACK if luminance(red, green, blue) > EVEN else WHITE


def decade_ticks(values: Sequence[float]) -> list[float]:
    """Where a logarithmic axis of positive values is marked: 1, 2 and 5 of each power of ten, the powers alone over two decades or more."""
    low, high = min(values), max(values)
    powers = [10.0**power for power in range(floor(log10(low)), floor(log10(high)) + 2)]
    marks = [mark * power for power in powers for mark in ((1,) if high / low >= DECADES else (1, 2, 5))]
    return [mark for mark in marks if low / ROOM_BESIDE <= mark <= high * ROOM_BESIDE]


def counted(name: str, values: Sequence[float], y_range: tuple[float, float] | None) -> str:
    """A series' name, with how many of its points lie below what is shown."""
    below = sum(value < y_range[0] for value in values) if y_range else 0
    return f"{name} ({below} below)" if below else name


def range_around(main: Sequence[Series], rest: Sequence[float]) -> tuple[float, float] | None:
    """Where trials lie far below the front: the range that shows the front well; else None, which shows everything."""
    values = [y for series in main for y in series.y]
    low, high = min(values), max(values)
    bottom = low - ROOM_BELOW * max(high - low, 1.0)
    if not rest or min(rest) >= bottom:
        return None
    return bottom, high + 0.08 * (high - bottom)
