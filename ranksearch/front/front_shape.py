"""The shape of a front in words: where it bends, and what more budget would give. Only a front's record is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ranksearch.trial.metric import PERCENT, metric_text
from ranksearch.words import COST_NAMES, percent_of_dense, shown_costs

FrontRecord = Mapping[str, Any]
"""What `front.json` holds."""
Point = tuple[float, float, int]
"""Cost in percent of dense, validation metric (turned so that more is better), trial."""

MORE_BUDGET = 0.1
"""The share of itself by which a budget is imagined to be raised."""


def shape_in_words(record: FrontRecord) -> str:
    """Says where the knee is, with the slopes beside it, what a tenth more budget would give, and what a preview knows beyond. The first
    two need two nets or more."""
    cost, points = shown_costs(record)[0], points_of(record)
    name, said = COST_NAMES[cost], []
    if len(points) < 2:
        pass
    elif (at := knee(points)) is not None:
        low, here, high = points[0], points[at], points[-1]
        said.append(
            f"it bends at trial {here[2]} ({here[0]:.0f} % of dense {name}): above it 10 points of {name} bring "
            f"{_worth(record, _slope(here, high))}, below it they cost {_worth(record, _slope(low, here))}"
        )
    else:
        said.append(f"10 points of {name} bring about {_worth(record, _slope(points[0], points[-1]))} along it")
    found = filter(None, (*said, _more(record, points, name), _previewed(record, name)))
    return f"{text}." if (text := "; ".join(found)) else ""


def points_of(record: FrontRecord) -> list[Point]:
    """The front over its first cost, by rising cost: the best net of each cost, and none that a cheaper one equals."""
    cost, sign = shown_costs(record)[0], -1.0 if record["metric"]["direction"] == "minimize" else 1.0
    known = [
        (percent, sign * row["val_accuracy"], row["trial"])
        for row in record["trials"]
        if (percent := percent_of_dense(row, cost)) is not None
    ]
    rising: list[Point] = []
    for x, y, trial in sorted(known, key=lambda p: (p[0], -p[1])):
        if not rising or y > rising[-1][1]:
            rising.append((float(x), y, trial))
    return rising


def knee(points: Sequence[Point]) -> int | None:
    """Index of the point farthest above the line between the front's ends, both axes scaled to it; None if there is none.

    Reference: Das 1999 (normal-boundary intersection's knee).
    """
    (x0, y0, _), (x1, y1, _) = points[0], points[-1]
    above = [(y - y0) / (y1 - y0) - (x - x0) / (x1 - x0) for x, y, _ in points[1:-1]]
    best = max(range(len(above)), key=above.__getitem__, default=None)
    return None if best is None or above[best] <= 0 else best + 1


def _slope(low: Point, high: Point) -> float:
    """What ten points of the cost bring."""
    return 10 * (high[1] - low[1]) / (high[0] - low[0])


def _worth(record: FrontRecord, amount: float) -> str:
    """An amount of the metric in words, such as `0.54 points` or `0.024 of rmse`."""
    metric = record["metric"]
    unit = "points" if metric["unit"] == PERCENT else metric["unit"] or f"of {metric['name']}"
    return f"{_amount(record, amount)} {unit}"


def _amount(record: FrontRecord, amount: float) -> str:
    return metric_text(record["metric"], amount) if record["metric"]["unit"] == PERCENT else f"{amount:.2g}"


def _more(record: FrontRecord, points: Sequence[Point], name: str) -> str:
    """Says what a tenth more budget would bring. Two slopes bound it: that of the line to the dense net, above which a bent front lies, and
    the front's own over at least a last step of this length, since nets closer to each other differ by chance."""
    if not record["budgets"] or len(points) < 2:
        return ""
    (x, y, _), sign = points[-1], -1.0 if record["metric"]["direction"] == "minimize" else 1.0
    dense = sign * record["dense"]["val_accuracy"]
    if dense <= y:
        return "more budget has nothing to give: the best net is no worse than the dense one on validation"
    before = next((point for point in reversed(points) if point[0] <= (1 - MORE_BUDGET) * x), points[0])
    to_dense, along = _slope(points[-1], (100.0, dense, -1)) if x < 100 else 0.0, _slope(before, points[-1])
    least, most = sorted(MORE_BUDGET * x / 10 * slope for slope in (to_dense, along))
    span = f"{_amount(record, least)} to {_worth(record, most)}"
    return f"a tenth more budget would bring {span} (not tried: the slopes to the dense net and along the front)"


def _previewed(record: FrontRecord, name: str) -> str:
    """Says what a preview found beyond the budget and at it, both without training."""
    points = record.get("preview") or []
    if len(points) < 2:
        return ""
    (_, *beyond), metric = points, record["metric"]
    at = [f"{metric_text(metric, point['val_accuracy'])} at {point['percent']:.0f} %" for point in points]
    return (
        f"the preview knows {len(beyond)} beyond the budget, not trained: {at[0]} of {name}, then {', '.join(at[1:])}"
    )
