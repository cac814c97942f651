"""The classic ways to choose ranks, under one interface: (curves, budgets) -> plan. The search's first points, and its controls.

Each has one knob; the knob is set by bisection to the largest plan within every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ranksearch.allocate.budget import Budget
from ranksearch.allocate.curves import Curves, LayerOptions, limits_of
from ranksearch.compress import RankPlan
from ranksearch.errors import UsageError
from ranksearch.lowering import lowering_named

STEPS = 40


def _cheapest(options: LayerOptions, fine: np.ndarray) -> int:
    """Of the options that are good enough, the one with the fewest MACs, then params, then the smallest error."""
    index = np.flatnonzero(fine)
    order = np.lexsort((options.removed[index], options.params[index], options.macs[index]))
    return int(index[order[0]])


def _largest_within(
    curves: Curves, budgets: Sequence[Budget], pick: Callable[[LayerOptions, float], int], model: str | None
) -> RankPlan:
    """The plan of the largest knob in 0..1 whose MACs and params stay within the budgets, `pick` being one layer's option."""
    limits = limits_of(curves, budgets)

    def picks_at(knob: float) -> dict[str, int] | None:
        picks = {o.layer.name: pick(o, knob) for o in curves.layers}
        macs = sum(int(o.macs[picks[o.layer.name]]) for o in curves.layers)
        params = sum(int(o.params[picks[o.layer.name]]) for o in curves.layers)
        return picks if macs <= limits[0] and params <= limits[1] else None

    best = picks_at(0.0)
    if best is None:
        raise UsageError("This baseline has no plan within the budgets: even its smallest one is too large.")
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        picks = picks_at(middle)
        if picks is None:
            high = middle
        else:
            low, best = middle, picks
    return curves.plan(best, model)


def _first(options: LayerOptions) -> str:
    """The first lowering a layer may take, `dense` where it may take none."""
    return options.choices[min(1, len(options.choices) - 1)].lowering


def _ladder(options: LayerOptions, name: str) -> list[int]:
    """The options of one lowering whose ranks are of a common ratio, smallest first."""
    mine = [i for i, choice in enumerate(options.choices) if choice.lowering == name]
    if not mine or not lowering_named(name).has_rank:
        return mine
    ladder = set(lowering_named(name).ladder(options.layer.spec))
    return [i for i in mine if options.choices[i].rank in ladder]


def uniform(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """One lowering and one rank ratio for every layer: the rank is that fraction of the lowering's largest useful rank.

    Of the lowerings, the one whose plan keeps most energy is taken. A layer that it refuses takes its own first lowering.
    """
    limits_of(curves, budgets)  # a budget that no plan can meet is told as such
    names = sorted({c.lowering for o in curves.layers for c in o.choices if c.rank})
    plans = []
    for name in names:
        ladders = {o.layer.name: _ladder(o, name) or _ladder(o, _first(o)) or [0] for o in curves.layers}

        def pick(options: LayerOptions, ratio: float, ladders: dict[str, list[int]] = ladders) -> int:
            mine = ladders[options.layer.name]
            return mine[int(ratio * (len(mine) - 1))]

        try:
            plans.append(_largest_within(curves, budgets, pick, model))
        except UsageError:
            continue  # this lowering alone is too large at rank 1; another may fit
    if not plans:
        raise UsageError("No uniform ratio of a single lowering lies within the budgets.")
    return min(plans, key=lambda plan: _total_removed(curves, plan))


def energy(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """One share of kept energy for every layer, each by its cheapest lowering.

    Reference: the threshold of TRP, Xu et al. 2020, arXiv 2004.14566.
    """
    return _largest_within(curves, budgets, lambda o, kept: _cheapest(o, o.removed <= 1 - kept), model)


def minimax(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """The smallest common bound on the relative operator-norm error sigma_{r+1} / sigma_1, each layer by its cheapest lowering.

    Reference: ALDS, Liebenwein et al. 2021, arXiv 2107.11442 (data-free, without its channel groups).
    """
    return _largest_within(curves, budgets, lambda o, knob: _cheapest(o, o.residual <= 1 - knob), model)


def _total_removed(curves: Curves, plan: RankPlan) -> float:
    return sum(float(o.removed[o.choices.index(plan[o.layer.name])]) for o in curves.layers)


BASELINES: dict[str, Callable[..., RankPlan]] = {"uniform": uniform, "energy": energy, "minimax": minimax}
