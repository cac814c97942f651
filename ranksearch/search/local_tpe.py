"""`LocalTPE`: where on the front there is most room, and there the corrections that did better than their neighbours.

TPE over all parameters and objectives at once has to learn first that a larger net is better. Here that is known: the cost at which
a trial is proposed is set where a new net could add most hypervolume, and only how far a net lies above what others reach at about its
cost is modelled: candidates are drawn about the best trials, as TPE draws them, and a Gaussian process picks one (`surrogate.py`). It sees
the trials nearest in cost, so its time does not grow with the study.

ResNet-20 and ResNet-32 on CIFAR-10 against Optuna's own TPE on the same parameters: `scripts/bench_search.py` (rows `allocated_motpe`).

Reference: Bergstra et al. 2011 (TPE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log, nan
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from ranksearch.search.optuna_private import trials_of
from ranksearch.search.parametrize import LEVEL
from ranksearch.search.seen import NEIGHBOURS, Seen, indices_of_least, nearest, newest_and_best
from ranksearch.search.surrogate import Params, above_parabola, propose

INTERRUPTED = "interrupted"
"""Outcome of a trial whose driver or worker was lost."""
MIDDLE = (0.3, 0.7)
"""Where a proposal falls between its neighbours on the front."""
GAINED = 0.25
"""Share of a gap's area that a net in its middle gains, half-way in accuracy too."""
NEAR_THE_TOP = 0.95
BESIDE = 0.1
"""Where accuracy has a limit: the share of proposals that fill the front above it, rather than look for the cheapest net there."""
LINE, NEXT = 0.4, 0.97
"""With such a limit: the width, in logarithms of the cost, of the neighbourhood that a line is laid through, and the largest share of the
cheapest cost that is worth a trial."""
LEAST_SCATTER, CLEARLY = 0.004, 2.0
"""What accuracies scatter about the line at least, and how many times that below the limit is a clear failure."""
WIDTH = 0.2
"""Least width, in logarithms of the cost, of the neighbourhood that residuals are taken in."""


class LocalTPE(BaseSampler):
    """Proposes the level by the room on the front, and everything else by what its neighbours tell; without a level by all that ended."""

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        *,
        accuracy_at: int,
        cost_at: int | None,
        share: Callable[[float], float],
        dense: float,
        seed: int,
        least: float | None = None,
    ) -> None:
        """
        Args:
            distributions: every parameter that is searched.
            accuracy_at, cost_at: which of the study's values is the metric, and which the cost as a ratio of dense.
            share: the share in [0, 1] of a metric's value, which is called accuracy here.
            dense: the dense net's metric: what is hoped for above the largest net of the front.
            least: a limit on what is called accuracy here: the cheapest net above it is looked for.
        """
        self._least = least
        self._share, self._ceiling = share, share(dense)
        self._distributions, self._seed = dict(distributions), seed
        self._accuracy_at, self._cost_at = accuracy_at, cost_at
        self._seen = Seen()
        self._looked_at = 0
        self._open: list[int] = []
        """Trials that had not ended when they were last looked at."""
        self._independent = RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        """Does nothing, since draws depend on the seed, the trial's number (interrupted ones not counted) and the results."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # a trial that was enqueued draws what it does not bring along independently
        return {} if "fixed_params" in trial.system_attrs else dict(self._distributions)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        running = self._observe(study, trial.number)
        rng = np.random.default_rng([self._seed, trial.number - self._seen.interrupted])
        table = self._seen.table
        if LEVEL not in search_space:
            return self._others(newest_and_best(table), None, running[-NEIGHBOURS:], search_space, rng)
        bounds = search_space[LEVEL]
        level = self._level(running, bounds.low, bounds.high, rng)  # type: ignore[attr-defined]
        others = {name: found for name, found in search_space.items() if name != LEVEL}
        if not others:
            return {LEVEL: level}
        return {LEVEL: level} | self._others(nearest(table, level), level, _beside(running, level), others, rng)

    def _observe(self, study: optuna.Study, own: int) -> list[Params]:
        """Takes up trials that ended since the last look; returns the parameters of those that run beside this one."""
        trials = trials_of(study)
        looked_at, self._looked_at = self._looked_at, len(trials)
        self._open = [n for n in (*self._open, *range(looked_at, len(trials))) if not self._ended(trials[n])]
        running: list[Params] = []
        for number in self._open:
            if number != own and trials[number].state == TrialState.RUNNING:
                running.append(trials[number].params)
        return running

    def _ended(self, trial: FrozenTrial) -> bool:
        """Whether a trial has ended; one that has is taken up."""
        if trial.state == TrialState.COMPLETE and trial.values is not None:
            cost = trial.values[self._cost_at] if self._cost_at is not None else nan
            self._seen.add(trial.params, cost, self._share(trial.values[self._accuracy_at]))
        elif trial.state.is_finished() and trial.user_attrs.get("outcome") == INTERRUPTED:
            self._seen.interrupted += 1
        elif trial.state.is_finished():
            self._seen.add(trial.params)
        return trial.state.is_finished()

    # The level ---------------------------------------------------------------------------------------------------

    def _level(self, running: Sequence[Params], low: float, high: float, rng: np.random.Generator) -> float:
        """The level at which the cost falls into the widest gap of the front: Δcost · Δaccuracy over the tries there so far."""
        levels, costs = _cost_of_level(self._seen.by_level, low, high)
        if len(levels) == 0:
            return float(rng.uniform(low, high))
        least, most = np.interp([low, high], levels, costs)
        if self._least is not None and self._seen.costs.size:
            wanted, cheapest = cost_at_limit(self._seen.table[:, 1:], self._least, float(least), float(most), rng)
            if wanted is not None:
                return float(np.clip(np.interp(wanted, *_rising(costs, levels)), low, high))
            least = cheapest
        others = [*self._seen.in_vain, *(params[LEVEL] for params in running if LEVEL in params)]
        tried = (self._seen.costs, np.sort(np.interp(others, levels, costs)))
        stairs = self._seen.stairs
        start = stairs[stairs[:, 0] <= least, 1].max(initial=0.0)
        inside = stairs[(stairs[:, 0] > least) & (stairs[:, 0] < most)]
        ceiling = max(self._ceiling, float(stairs[-1, 1]))
        corners = np.vstack([[least, start], inside, [most, ceiling]])
        width, height = np.diff(corners, axis=0).T
        tries = sum(
            np.searchsorted(part, corners[1:, 0], "left") - np.searchsorted(part, corners[:-1, 0], "right")
            for part in tried
        )
        tries = np.maximum(tries, 0)  # of a gap without width the difference is negative
        room = np.where(width > 1e-6, width * np.maximum(height, 0), -1.0) / (1 + tries)
        gap = int(np.argmax(room))
        beyond = sum(len(part) - int(np.searchsorted(part, NEAR_THE_TOP * most)) for part in tried)
        if _room_at_the_top(self._seen.table, beyond, corners[-2], high) > GAINED * room[gap]:
            return high
        cost = corners[gap, 0] + rng.uniform(*MIDDLE) * width[gap]
        return float(np.clip(np.interp(cost, *_rising(costs, levels)), low, high))

    # The rest ----------------------------------------------------------------------------------------------------

    def _others(
        self,
        chosen: np.ndarray,
        level: float | None,
        running: Sequence[Params],
        space: Mapping[str, BaseDistribution],
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """Values of `space` by what the `chosen` trials tell of them."""

        def offset(params: Params) -> float:
            return 0.0 if level is None else log(params[LEVEL] / level)

        table, params = self._seen.table, self._seen.params
        told = [int(i) for i in chosen if space.keys() <= params[i].keys()]
        beside = [(p, offset(p)) for p in running if space.keys() <= p.keys() and (level is None or LEVEL in p)]
        offsets = np.array([offset(params[i]) for i in told])
        return propose([params[i] for i in told], offsets, table[told, 2], beside, space, rng, self._seen.in_vain_last)


def _beside(running: Sequence[Params], level: float) -> list[Params]:
    """The parameters of the running trials, beside which there is little to learn: where hundreds run, those nearest in level."""
    if len(running) <= NEIGHBOURS:
        return list(running)
    distances = [abs(np.log(params[LEVEL] / level)) if LEVEL in params else np.inf for params in running]
    return [running[i] for i in sorted(indices_of_least(np.array(distances), NEIGHBOURS))]


def _residuals(near: np.ndarray, level: float) -> np.ndarray:
    """How far accuracies of rows [n, (level, cost, accuracy)] lie above a parabola in log level through them; the nearest weigh most."""
    accuracy = near[:, 2]
    if len(near) < 3:
        return accuracy
    x = np.log(near[:, 0] / level)
    weight = np.exp(-0.25 * (x / max(WIDTH, float(np.std(x)))) ** 2)
    return weight * above_parabola(x, accuracy, weight)


def cost_at_limit(
    known: np.ndarray, limit: float, low: float, high: float, rng: np.random.Generator
) -> tuple[float | None, float]:
    """(cost to try next for the cheapest net with at least `limit`, the cheapest known one's cost); `known` [n, (cost, accuracy)].

    None for one proposal in ten: the front above the limit is filled, too. Else the cost of the largest expected gain: log(cheapest /
    cost) times the chance that a net there meets the limit, by a line through the neighbours' accuracy over log(cost) and their scatter
    about it. So a failure by less than the scatter does not close what lies below it, as halving would. It goes down to half the cheapest
    cost, and not below a net that clearly failed.
    """
    known = known[~np.isnan(known).any(axis=1)]
    met = known[:, 1] >= limit
    if not met.any():
        last = float(known[:, 0].max(initial=low))
        return min(high, last + rng.uniform(0.5, 1.0) * max(0.0, high - last)) if last < 0.97 * high else high, high
    cheapest = float(known[met, 0].min())
    if rng.random() < BESIDE:
        return None, cheapest
    x, accuracy = np.log(known[:, 0] / cheapest), known[:, 1]
    weight = np.exp(-0.5 * (x / LINE) ** 2) + 1e-3
    count, middle, level = weight.sum(), np.average(x, weights=weight), np.average(accuracy, weights=weight)
    spread = np.average((x - middle) ** 2, weights=weight)
    slope = max(0.0, np.average((x - middle) * (accuracy - level), weights=weight) / max(spread, 1e-6))
    off = accuracy - level - slope * (x - middle)
    scatter = max(LEAST_SCATTER, float(np.sqrt((weight * off**2).sum() / max(1.0, count - 1))))
    failed = known[(known[:, 0] < cheapest) & (known[:, 1] < limit - CLEARLY * scatter), 0].max(initial=low)
    tried = np.linspace(log(min(max(failed, cheapest / 2) / cheapest, NEXT)), log(NEXT), 40)
    error = scatter * np.sqrt(1 + 1 / count + (tried - middle) ** 2 / (count * max(spread, 0.05)))
    gain = -tried * ndtr((level + slope * (tried - middle) - limit) / error)
    if failed > low:
        gain *= 1 - tried / log(failed / cheapest)
    return max(low, float(cheapest * np.exp(tried[np.argmax(gain)]) * rng.uniform(0.98, 1.02))), cheapest


def _room_at_the_top(table: np.ndarray, tries: int, last: np.ndarray, high: float) -> float:
    """What a net as large as the budget allows may gain: all costs from the `last` corner (cost, accuracy) to dense, times the rise.

    There is no gap to fill at the front's end, but a better net there counts most, less for each of the `tries` near it. The rise to be
    hoped for is what a normal deviation of the neighbours' spread gives on average, 0.4 of it.
    """
    near = nearest(table, high, NEIGHBOURS // 2)
    spread = float(np.std(_residuals(table[near], high))) if len(near) >= 4 else 0.01
    return max(0.0, 1 - last[0]) * min(0.4 * spread, 1 - last[1]) / (1 + tries)


def _cost_of_level(known: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Rising (levels, costs) from `low` to `high` as trials had them, `known` [n, (level, cost)] in order; beyond those the cost is
    proportional to the level."""
    if len(known) == 0:
        return np.empty(0), np.empty(0)
    (first, first_cost), (last, last_cost) = known[0], known[-1]
    below = [[low, first_cost * low / first]] if first > low else np.empty((0, 2))
    above = [[high, last_cost * high / last]] if last < high else np.empty((0, 2))
    levels, costs = np.vstack([below, known, above]).T
    return levels, np.maximum.accumulate(costs)


def _rising(costs: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(costs, levels) with every cost once, as an interpolation from cost to level wants them."""
    unique, first = np.unique(costs, return_index=True)
    return unique, levels[first]
