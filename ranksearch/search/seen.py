"""What an allocated study has seen, as its sampler looks at it: tables by level and cost kept in order."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan, nan
from typing import Any

import numpy as np

from ranksearch.search.parametrize import LEVEL

NEIGHBOURS = 30
"""Trials that are modelled: the nearest in cost; in a search for one value the newest ones and the best."""


class Seen:
    """Trials that ended: their parameters, and a table [n, (level, cost, accuracy)] of ratios and shares, NaN where there is none.

    A trial without accuracy was tried in vain: a duplicate, stopped, diverged, failed.
    """

    def __init__(self) -> None:
        self.params: list[Mapping[str, Any]] = []
        self.interrupted = 0
        """Trials that were cut off and are proposed again under another number: they count neither as tries nor as numbers."""
        self.in_vain_last = 0
        """How many trials without accuracy there were since the last one with it."""
        self._rows = np.empty((64, 3))
        # what a proposal of the level looks at, kept in order: sorting it anew would take time that grows with the study
        self.by_level = np.empty((0, 2))
        """(level, cost) [n] of the trials that have both, sorted."""
        self.costs = np.empty(0)
        """Costs [n] of the trials with an accuracy, sorted."""
        self.stairs = np.empty((0, 2))
        """(cost, accuracy) of the nondominated ones, by rising cost."""
        self.in_vain: list[float] = []
        """Levels of the trials without accuracy."""

    def add(self, params: Mapping[str, Any], cost: float = nan, accuracy: float = nan) -> None:
        if len(self.params) == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        level = params.get(LEVEL, nan)
        self.in_vain_last = self.in_vain_last + 1 if isnan(accuracy) else 0
        self._rows[len(self.params)] = level, cost, accuracy
        self.params.append(params)
        if not isnan(level) and not isnan(cost):
            first, last = (int(np.searchsorted(self.by_level[:, 0], level, side)) for side in ("left", "right"))
            at = first + int(np.searchsorted(self.by_level[first:last, 1], cost))
            self.by_level = np.insert(self.by_level, at, (level, cost), axis=0)
        if not isnan(accuracy):
            self.costs = np.insert(self.costs, int(np.searchsorted(self.costs, cost)), cost)
            self.stairs = staircase(np.vstack([self.stairs, [cost, accuracy]]))
        elif not isnan(level):
            self.in_vain.append(level)

    @property
    def table(self) -> np.ndarray:
        return self._rows[: len(self.params)]


def newest_and_best(table: np.ndarray) -> np.ndarray:
    """Indices of the newest complete trials and of the most accurate ones."""
    done = np.flatnonzero(~np.isnan(table[:, 2]))
    best = done[np.argsort(-table[done, 2], kind="stable")[:NEIGHBOURS]]
    return np.unique(np.concatenate([best, done[-NEIGHBOURS:]]))


def nearest(table: np.ndarray, level: float, count: int = NEIGHBOURS) -> np.ndarray:
    """Indices of the complete trials nearest in level, of those that have one (plans that were given do not).

    Among equally near ones (hundreds may lie at the budget itself) these are the newest: the same old ones would tell nothing new.
    """
    done = np.flatnonzero(~np.isnan(table[:, 0] + table[:, 2]))[::-1]
    return done[indices_of_least(np.abs(np.log(table[done, 0] / level)), count)]


def indices_of_least(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the least values, in their order; of equal ones the first."""
    if len(values) <= count:
        return np.argsort(values, kind="stable")
    candidates = np.flatnonzero(values <= np.partition(values, count - 1)[count - 1])
    return candidates[np.argsort(values[candidates], kind="stable")[:count]]


def staircase(points: np.ndarray) -> np.ndarray:
    """The nondominated of points [n, (cost, accuracy)], by rising cost and accuracy."""
    ordered = points[np.lexsort((-points[:, 1], points[:, 0]))]
    best = np.maximum.accumulate(ordered[:, 1])
    return ordered[np.concatenate([[True], ordered[1:, 1] > best[:-1]])]
