"""What a search learnt, in sentences: which of the searched numbers matter, and whether more or less of them is better."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ranksearch.front.importance import BEST, FEWEST, accuracy_at_cost
from ranksearch.tracking.view import View
from ranksearch.words import parameter_in_words

FEWEST_DIRECTED = 4
"""With fewer complete trials no direction is told."""
SAID = 5
"""The most parameters that get a sentence."""
CLEAR = 2.0
"""A rank correlation has a direction from this many standard errors, 1 / sqrt(n - 1), on."""


def learnt(view: View, importances: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence per parameter that matters, the most important first; or why there is none."""
    complete = view.complete
    if len(complete) < FEWEST_DIRECTED:
        return [
            f"Nothing yet: {len(complete)} complete trials tell no direction (from {FEWEST_DIRECTED} on), and importances come from "
            f"{FEWEST} on."
        ]
    found, shares = directions(view), _shares(importances)
    names = by_weight(found, importances)
    lines = [_sentence(name, found[name], shares.get(name), len(complete)) for name in names[:SAID]]
    if not importances:
        lines.append(
            f"Importances are estimated from {FEWEST} complete trials on; there are {len(complete)}, so these are only rank correlations."
        )
    return lines


def by_weight(found: Mapping[str, float], importances: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The parameters of `found` (name -> rank correlation), the most important first."""
    shares = _shares(importances)
    return sorted(found, key=lambda name: (-shares.get(name, 0.0), -abs(found[name]), name))


def _shares(importances: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Parameter -> its largest share for any target."""
    return {
        name: max(target.get(name, 0.0) for target in importances.values())
        for target in importances.values()
        for name in target
    }


def clear(trials: int) -> float:
    """The rank correlation from which on a direction is told."""
    return CLEAR / (trials - 1) ** 0.5


def directions(view: View) -> dict[str, float]:
    """Searched number -> its rank correlation, -1 to 1, with the metric at its cost (above a parabola through all trials).

    Reference: Spearman 1904. Parameters that are names, or are the same in all trials, are left out.
    """
    complete = view.complete
    above = _ranks(accuracy_at_cost(complete, view.objectives))
    found = {}
    for name in {name for row in complete for name in row["params_searched"]}:
        known = [(row["params_searched"].get(name), y) for row, y in zip(complete, above, strict=True)]
        pairs = [(x, y) for x, y in known if isinstance(x, int | float) and not isinstance(x, bool)]
        if len(pairs) >= FEWEST_DIRECTED and len({x for x, _ in pairs}) > 1:
            ranks = _ranks(np.array([float(x) for x, _ in pairs]))
            others = _ranks(np.array([y for _, y in pairs]))
            found[name] = float(np.corrcoef(ranks, others)[0, 1]) if np.ptp(others) else 0.0
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n], those of equal values averaged."""
    order = {value: np.flatnonzero(np.sort(values) == value).mean() for value in set(values.tolist())}
    return np.array([order[value] for value in values.tolist()])


def _sentence(name: str, direction: float, share: float | None, trials: int) -> str:
    which = (
        "no clear direction"
        if abs(direction) < clear(trials)
        else "more was better"
        if direction > 0
        else "less was better"
    )
    weight = (
        ""
        if share is None
        else f", {share:.0%} of what tells the best {BEST:.0%} of the trials from the others".replace("%", " %")
    )
    told = f"{direction:+.2f}".replace("-", "−")
    return f"{parameter_in_words(name)}: {which} (rank correlation {told} over {trials} trials{weight})"
