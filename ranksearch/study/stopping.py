"""Early stopping that respects the front: asynchronous successive halving, by nondominated sorting if there are several objectives.

At a rung a trial is compared with all that have reached it: it goes on if it is among the best 1 / reduction. A small net is less accurate
than a large one but no worse for it, so with several objectives "best" is the order of nondominated sorting (MO-ASHA), and a trial that
no other at the rung beats always goes on: the published rule would stop part of a wide first front, which here is the result.

Reference: Li et al. 2020, arXiv 1810.05934 (ASHA); Schmucker, Donini, Zafar, Salinas & Archambeau 2021, arXiv 2106.12639 (MO-ASHA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import floor

import numpy as np

from ranksearch.compress import Cost
from ranksearch.costs import cost_ratio
from ranksearch.front.row import Row
from ranksearch.pareto import nondominated
from ranksearch.space.search import EarlyStoppingSpace
from ranksearch.trial.metric import Metric
from ranksearch.trial.reporting import RUNG

RungPoint = Sequence[float]
"""A trial at a rung in minimisation form: 1 - accuracy, then its costs as ratios of dense."""


def sorting_ranks(points: np.ndarray) -> np.ndarray:
    """Ranks [n] of nondominated sorting of points [n, objectives]: 0 for the first front, 1 for what is nondominated without it, …

    Reference: Goldberg 1989; Deb et al. 2002 (NSGA-II).
    """
    ranks, left = np.zeros(len(points), dtype=int), np.arange(len(points))
    level = 0
    while len(left):
        front = nondominated(points[left])
        ranks[left[front]] = level
        left, level = left[~front], level + 1
    return ranks


class Rungs:
    """What every trial reached at every rung, and which trials go on."""

    def __init__(self, count: int, reduction: float) -> None:
        self._reduction = reduction
        self._reached: list[dict[int, RungPoint]] = [{} for _ in range(count)]

    def record(self, trial: int, rung: int, point: RungPoint) -> None:
        self._reached[rung][trial] = tuple(point)

    def forget(self, trial: int) -> None:
        """Removes a trial that is run again under another number."""
        for reached in self._reached:
            reached.pop(trial, None)

    def goes_on(self, trial: int, rung: int, point: RungPoint) -> bool:
        """Records a trial at a rung; returns whether it is among the best 1 / reduction there, or no other beats it.

        Until `reduction` trials have come there is nothing to judge by, and every one goes on.
        """
        self.record(trial, rung, point)
        reached = self._reached[rung]
        if len(reached) < self._reduction:
            return True
        ranks = sorting_ranks(np.array(list(reached.values())))
        mine = ranks[list(reached).index(trial)]
        return bool(mine == 0 or (ranks < mine).sum() < floor(len(reached) / self._reduction))


def rung_point(val_accuracy: float, cost: Cost, dense: Cost, metric: Metric, objectives: Sequence[str]) -> list[float]:
    """A trial at a rung, from its metric there and its plan's cost.

    Its latency is as predicted; without a table, its MACs stand in for it.
    """
    unknown = "latency" if cost.latency_ms is None else ""
    costs = ["macs" if name == unknown else name for name in objectives if name != "accuracy"]
    return [1 - metric.share(val_accuracy), *(cost_ratio(name, cost, dense) for name in costs)]


def recorded_rungs(
    stopping: EarlyStoppingSpace | None, rows: Iterable[Row], point: Callable[[float, Cost], RungPoint]
) -> Rungs | None:
    """The rungs, with what the trials of `rows` reached; None without early stopping."""
    if stopping is None:
        return None
    rungs = Rungs(len(stopping.rungs), stopping.reduction)
    for row in rows:
        for entry in row.history:
            if entry["phase"] == RUNG:
                rungs.record(row.trial, entry["rung"], point(entry["val_accuracy"], row.cost))
    return rungs
