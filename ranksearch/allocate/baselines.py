"""The classic ways to choose ranks, under one interface: (curves, budgets) -> plan. The search's first points, and its controls.

Each has one knob; the knob is set by bisection to the largest plan within every budget. `greedy.py` holds the one that needs scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

import numpy as np

from ranksearch.allocate.budget import Budget
from ranksearch.allocate.curves import Curves, LayerOptions, limits_of
from ranksearch.allocate.rank_rules import evbmf_rank, stable_rank
from ranksearch.compress import RankPlan
from ranksearch.errors import UsageError
from ranksearch.lowering.contract import Spectrum, sides

STEPS = 40

Pick = Callable[[LayerOptions, float], int]
"""(a layer's options, knob 0..1) -> the option; a larger knob never costs less."""


def cheapest(options: LayerOptions, fine: np.ndarray) -> int:
    """Returns the option with the fewest MACs among those that are `fine` [n options], then params, then the smallest error."""
    index = np.flatnonzero(fine)
    order = np.lexsort((options.removed[index], options.params[index], options.macs[index]))
    return int(index[order[0]])


def largest_within(curves: Curves, budgets: Sequence[Budget], pick: Pick, model: str | None) -> RankPlan:
    """The plan of the largest knob in 0..1 whose costs stay within the budgets; layers that share a ratio are tied.

    Raises:
        UsageError: the budgets cannot be met, or not by this baseline; the text says which.
    """
    limits = limits_of(curves, budgets)

    def totals(picks: Mapping[str, int]) -> np.ndarray:
        chosen = [(o, picks[o.layer.name]) for o in curves.layers]
        spent = [(o.macs[i], o.params[i], 0 if o.latency is None else o.latency[i]) for o, i in chosen]
        return np.sum(spent, axis=0)

    def picks_at(knob: float) -> dict[str, int] | None:
        picks = curves.tied({o.layer.name: pick(o, knob) for o in curves.layers})
        return picks if (totals(picks) <= limits).all() else None

    best = picks_at(0.0)
    if best is None:
        raise UsageError(
            "This baseline has no plan within the budgets: even its smallest one is too large. Take the solver, or raise the budgets."
        )
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        picks = picks_at(middle)
        if picks is None:
            high = middle
        else:
            low, best = middle, picks
    return curves.plan(best, model)


def _best_lowering(
    curves: Curves, budgets: Sequence[Budget], pick_of: Callable[[str], Pick], names: Sequence[str], model: str | None
) -> RankPlan:
    """Returns the plan that keeps most energy among those with one lowering each, `pick_of(name)` by the knob."""
    limits_of(curves, budgets)  # a budget that no plan can meet has an error of its own
    plans = []
    for name in names:
        try:
            plans.append(largest_within(curves, budgets, pick_of(name), model))
        except UsageError:
            continue  # this lowering alone is too large at rank 1; another may fit
    if not plans:
        raise UsageError(
            "This baseline takes one lowering for the net, and none lies within the budgets. Take the solver, or raise the budgets."
        )
    return min(plans, key=lambda plan: _total_removed(curves, plan))


def _total_removed(curves: Curves, plan: RankPlan) -> float:
    return sum(float(o.removed[o.choices.index(plan[o.layer.name])]) for o in curves.layers)


def uniform(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """One lowering and one rank ratio for every layer: the rank is that fraction of the lowering's largest useful rank.

    The lowering whose plan keeps most energy is taken. A layer that it refuses takes its own first lowering.
    """

    def pick_of(name: str) -> Pick:
        ladders = {o.layer.name: o.ladder(name) for o in curves.layers}

        def pick(options: LayerOptions, ratio: float) -> int:
            mine = ladders[options.layer.name]
            return mine[int(ratio * (len(mine) - 1))]

        return pick

    return _best_lowering(curves, budgets, pick_of, _lowerings(curves), model)


def energy(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """One share of kept energy for every layer, each by its cheapest lowering.

    Reference: the threshold of TRP, Xu et al. 2020, arXiv 2004.14566.
    """
    return largest_within(curves, budgets, lambda o, kept: cheapest(o, o.removed <= 1 - kept), model)


def minimax(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """The smallest common bound on the relative operator-norm error sigma_{r+1} / sigma_1, each layer by its cheapest lowering.

    Reference: ALDS, Liebenwein et al. 2021, arXiv 2107.11442 (data-free, without its channel groups).
    """
    return largest_within(curves, budgets, lambda o, knob: cheapest(o, o.residual <= 1 - knob), model)


def evbmf(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """Every layer's rank by variational Bayes, all weakened or strengthened by one factor until the budgets are met.

    One lowering for the net, as in `uniform`. Where a layer has several matrices (groups), the largest rank counts.

    Reference: Nakajima et al. 2013, JMLR 14; the common factor: MUSCO, Gusak et al. 2019, arXiv 1903.09973.
    """
    return _scaled_rule(curves, budgets, lambda s: max(evbmf_rank(row, s.shape) for row in s.squared), model)


def stable(curves: Curves, budgets: Sequence[Budget], model: str | None = None) -> RankPlan:
    """Every layer's rank is its stable rank ||W||²_F / ||W||²_2 times one factor, the same for all layers.

    Reference: Cuttlefish, Wang et al. 2023, arXiv 2305.02538 (its rule for the ranks; when to switch to factors is not taken over).
    """
    return _scaled_rule(curves, budgets, lambda s: max(stable_rank(row) for row in s.squared), model)


def _scaled_rule(
    curves: Curves, budgets: Sequence[Budget], rule: Callable[[Spectrum], float], model: str | None
) -> RankPlan:
    """Ranks factor · rule(spectrum), at least 1, every side of a rank by its own spectrum; dense where that costs no less."""
    names = list(dict.fromkeys(name for o in curves.layers for name in o.spectra))
    if not names:
        raise UsageError(
            "This baseline reads ranks off spectra, and none of the allowed lowerings cuts a matrix: allow im2col."
        )
    ruled = {(o.layer.name, name): tuple(map(rule, s)) for o in curves.layers for name, s in o.spectra.items()}

    def pick_of(name: str) -> Pick:
        def pick(options: LayerOptions, knob: float) -> int:
            own = name if name in options.spectra else next(iter(options.spectra), None)
            if own is None or knob >= 1:
                return 0
            factor = knob / (1 - knob)
            targets = [max(1, ceil(factor * max(1, rank))) for rank in ruled[options.layer.name, own]]
            wide_enough = np.zeros(len(options.choices), dtype=bool)
            for i in options.of_lowering(own):
                rank = sides(options.choices[i].rank)
                wide_enough[i] = all(side >= target for side, target in zip(rank, targets, strict=True))
            return cheapest(options, wide_enough) if wide_enough.any() else 0

        return pick

    return _best_lowering(curves, budgets, pick_of, names, model)


def random(curves: Curves, budgets: Sequence[Budget], model: str | None = None, *, seed: int = 0) -> RankPlan:
    """A random lowering and rank ratio per layer, all ratios raised to one power so that the plan just fits the budgets."""
    generator = np.random.default_rng(seed)
    drawn = {}
    for options in curves.layers:
        names = options.lowerings
        ladder = options.ladder(names[int(generator.integers(len(names)))]) if names else []
        drawn[options.layer.name] = [*ladder, 0], float(generator.random())

    def pick(options: LayerOptions, knob: float) -> int:
        ladder, ratio = drawn[options.layer.name]
        power = (1 - knob) / max(knob, 1e-9)
        return ladder[min(int(ratio**power * len(ladder)), len(ladder) - 1)]

    return largest_within(curves, budgets, pick, model)


def _lowerings(curves: Curves) -> list[str]:
    return sorted({name for o in curves.layers for name in o.lowerings})


BASELINES: dict[str, Callable[..., RankPlan]] = {
    "uniform": uniform,
    "energy": energy,
    "minimax": minimax,
    "evbmf": evbmf,
    "stable_rank": stable,
    "random": random,
}
