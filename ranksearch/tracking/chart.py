"""Charts as values: what a figure shows, before anything draws it. `draw_png.py` and `draw_html.py` draw the same chart.

Colours are Okabe & Ito's, which colour-blind readers can tell apart; series also differ in marker or line, categories in their text.
Shades are cividis, which looks the same to everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log10

BLACK, WHITE, GREY = "#000000", "#FFFFFF", "#767676"
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, "#8C6D00", "#F0E442")
DARK_TWINS = {BLACK: "#ECECEC", GREY: "#A6A6A6", BLUE: "#3D9BE0", ORANGE: "#E8751A", "#8C6D00": "#B8962E"}
"""Colour of a series that would not stand out on a dark ground -> the one used there; shades and categories stay as they are."""
LOWERING_COLOURS = {
    "dense": "#E5E5E5", "im2col": BLUE, "channel": ORANGE, "spatial": GREEN, "tucker2": PINK, "svd": YELLOW, "cp": SKY,
}  # fmt: skip
"""Lowering -> colour, the same in every figure; others take what is left of the palette."""
LINE_SHADES = {"light": (0.0, 0.72), "dark": (0.45, 1.0)}
"""The page's scheme -> the part of cividis in which lines stand out from it."""
LABELLED = 25
"""Points are labelled in a series of at most this many."""
ANNOTATED = 45
"""Cells are labelled in a heat-map of at most this many rows."""
EVEN = 0.179
"""The luminance from which black and white stand out equally: (1.05 · 0.05)^½ - 0.05."""
DECADES = 100.0
"""A logarithmic axis that spans less than this factor has marks between its powers of ten, too."""
ROOM_BESIDE = 1.5
"""The factor beyond its values up to which a logarithmic axis has marks."""
ROOM_BELOW = 0.5
"""How far a figure extends below a front, as a share of the front's height: one failed net must not flatten the front."""


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
    """Whether x counts something, so that its marks are whole numbers."""
    log_x: bool = False
    small: bool = False
    """Whether the plot stands beside others of its kind."""


@dataclass(frozen=True)
class HeatMap:
    """Values[row][column] as shades between `low` and `high`, or as categories if `colours` names them; None stays empty."""

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
    """Horizontal bars: one per name and group."""

    title: str
    x: str
    names: Sequence[str]
    groups: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates, with a value per line; with `ticks`, the values are places among those names."""

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
    """The marks of an axis of logarithms: its ends and the middle."""
    low, high = min(values), max(values)
    return [low] if low == high else [low, (low + high) / 2, high]


def axis_ticks(axis: Axis) -> list[tuple[float, str]]:
    """The marks of an axis, as (value, text)."""
    if axis.ticks:
        return list(enumerate(axis.ticks))
    return [(tick, f"{10**tick if axis.log else tick:.3g}") for tick in log_ticks(axis.values)]


def luminance(red: float, green: float, blue: float) -> float:
    """Relative luminance of a colour (shares 0..1), as the Web Content Accessibility Guidelines define it."""
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink_on(red: float, green: float, blue: float) -> str:
    """Black or white, whichever stands out more from a colour (shares 0..1); the contrast is at least 4.5 to 1."""
    return BLACK if luminance(red, green, blue) > EVEN else WHITE


def decade_ticks(values: Sequence[float]) -> list[float]:
    """The marks of a logarithmic axis: 1, 2 and 5 times each power of ten, or only the powers over two decades or more."""
    low, high = min(values), max(values)
    powers = [10.0**power for power in range(floor(log10(low)), floor(log10(high)) + 2)]
    marks = [mark * power for power in powers for mark in ((1,) if high / low >= DECADES else (1, 2, 5))]
    return [mark for mark in marks if low / ROOM_BESIDE <= mark <= high * ROOM_BESIDE]


def counted(name: str, values: Sequence[float], y_range: tuple[float, float] | None) -> str:
    """A series' name, with the number of its points that lie below what is shown."""
    below = sum(value < y_range[0] for value in values) if y_range else 0
    return f"{name} ({below} below)" if below else name


def range_around(main: Sequence[Series], rest: Sequence[float]) -> tuple[float, float] | None:
    """The range that shows the front well, if trials lie far below it; else None, which shows everything."""
    values = [y for series in main for y in series.y]
    low, high = min(values), max(values)
    bottom = low - ROOM_BELOW * max(high - low, 1.0)
    if not rest or min(rest) >= bottom:
        return None
    return bottom, high + 0.08 * (high - bottom)
