"""Greedy by measured score, as AIMET does: every layer alone at a few costs, scored on data; then one level of the score for all layers.

It sees what no prediction sees and pays for it in evaluations of the net, nine a layer, counted in `Scores`. A layer's score says
nothing about what two layers lose together, and it is noisy: it is taken to rise with the cost, which a score on few samples need not do.

Reference: the greedy selection of AIMET (Qualcomm Innovation Center; SVD and spatial SVD there, any lowering here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ranksearch.allocate.baselines import cheapest, largest_within
from ranksearch.allocate.budget import Budget
from ranksearch.allocate.curves import Curves, LayerOptions
from ranksearch.compress import RankPlan

RATIOS = tuple(i / 10 for i in range(1, 10))
"""MACs of a candidate as a share of the dense layer's."""


@dataclass(frozen=True)
class Scores:
    """Layer -> (its candidates, their scores); the dense net's score; how often the net was evaluated."""

    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]
    dense: float
    evaluations: int


def candidates(options: LayerOptions) -> np.ndarray:
    """The option that removes least within each ratio, by rising MACs; [at most 9]."""
    found = []
    for ratio in RATIOS:
        fine = np.flatnonzero(options.macs <= ratio * options.macs[0])
        if len(fine):
            found.append(int(fine[np.lexsort((options.macs[fine], options.removed[fine]))[0]]))
    return np.array(sorted(set(found), key=lambda i: (options.macs[i], -options.removed[i])), dtype=np.int64)


def measure_scores(
    curves: Curves, score: Callable[[RankPlan], float], tell: Callable[[int, int], None] = lambda done, total: None
) -> Scores:
    """Scores every candidate of every layer by itself; `score(plan)` is higher for a better net, `tell(done, total)` is called at each."""
    chosen = {o.layer.name: candidates(o) for o in curves.layers}
    total, done = 1 + sum(map(len, chosen.values())), 1
    dense, layers = score(RankPlan()), {}
    for options in curves.layers:
        name, scores = options.layer.name, []
        for i in chosen[name]:
            scores.append(score(RankPlan({name: options.choices[i]})))
            done += 1
            tell(done, total)
        layers[name] = chosen[name], np.maximum.accumulate(np.array(scores, dtype=float))
    return Scores(layers, dense, total)


def greedy(curves: Curves, budgets: Sequence[Budget], model: str | None = None, *, scores: Scores) -> RankPlan:
    """Every layer takes its cheapest candidate that scores at least a level; the level is the highest that meets the budgets.

    Raises:
        UsageError: the budgets cannot be met, or not by any of the candidates.
    """
    worst = min((float(found[1].min()) for found in scores.layers.values() if len(found[1])), default=scores.dense)
    best = max([scores.dense, *(float(found[1].max()) for found in scores.layers.values() if len(found[1]))])

    def pick(options: LayerOptions, knob: float) -> int:
        index, values = scores.layers[options.layer.name]
        fine = np.zeros(len(options.choices), dtype=bool)
        fine[index[values >= worst + knob * (best - worst)]] = True
        return cheapest(options, fine) if fine.any() else 0

    return largest_within(curves, budgets, pick, model)
