"""`LocalTPE`: where on the front there is most room, and there the corrections that did better than their neighbours.

TPE over all parameters and objectives at once has to learn first that a larger net is better. Here that is known: the cost at which
a trial is proposed is set where a new net could add most hypervolume, and Optuna's TPE, on one value, models only how far a net lies
above what others reach at about its cost. It sees the trials nearest in cost, so its time does not grow with the study.

ResNet-20 and ResNet-32 on CIFAR-10 against Optuna's own TPE on the same parameters: `scripts/bench_search.py` (rows `allocated_motpe`).

Reference: Bergstra et al. 2011 (TPE); multivariate: Falkner, Klein & Hutter 2018, arXiv 1807.01774.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import isnan, log, nan
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from ranksearch.search.optuna_private import study_of, trials_of
from ranksearch.search.parametrize import LEVEL

INTERRUPTED = "interrupted"
"""Outcome of a trial whose driver or worker was lost."""
NEIGHBOURS = 30
"""Trials that TPE models: the nearest in cost; in a search for one value the newest ones and the best."""
MIDDLE = (0.3, 0.7)
"""A proposal falls here between its neighbours on the front."""
GAINED = 0.25
"""Share of a gap's area that a net in its middle gains, half-way in accuracy too."""
NEAR_THE_TOP = 0.95
BESIDE = 0.25
"""Where accuracy has a limit: the share of proposals that fill the front above it, rather than look for the cheapest net there."""
LINE, NEXT = 0.4, 0.97
"""There, the width of the neighbourhood that a line is laid through, in logarithms of the cost, and the dearest share of the cheapest cost
that is worth a trial."""
LEAST_SCATTER, CLEARLY = 0.004, 2.0
"""What accuracies scatter about the line at least, and how many times that below the limit is a clear failure."""
WIDTH = 0.2
"""Least width, in logarithms of the cost, of the neighbourhood that residuals are taken in."""


class Seen:
    """Trials that ended: their parameters, and a table [n, (level, cost, accuracy)] of ratios and shares, NaN where there is none.

    A trial without accuracy was tried in vain: a duplicate, stopped, diverged, failed.
    """

    def __init__(self) -> None:
        self.params: list[Mapping[str, Any]] = []
        self.interrupted = 0
        """Trials that were cut off and are proposed again under another number: they count neither as tries nor as numbers."""
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
        self._rows[len(self.params)] = level, cost, accuracy
        self.params.append(params)
        if not isnan(level) and not isnan(cost):
            first, last = (int(np.searchsorted(self.by_level[:, 0], level, side)) for side in ("left", "right"))
            at = first + int(np.searchsorted(self.by_level[first:last, 1], cost))
            self.by_level = np.insert(self.by_level, at, (level, cost), axis=0)
        if not isnan(accuracy):
            self.costs = np.insert(self.costs, int(np.searchsorted(self.costs, cost)), cost)
            self.stairs = _staircase(np.vstack([self.stairs, [cost, accuracy]]))
        elif not isnan(level):
            self.in_vain.append(level)

    @property
    def table(self) -> np.ndarray:
        return self._rows[: len(self.params)]


class LocalTPE(BaseSampler):
    """Proposes the level by the room on the front and everything else by TPE among its neighbours; without a level by TPE alone."""

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
            share: of a metric's value: what is called accuracy here, in [0, 1].
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
        """Nothing: draws depend on the seed, the trial's number (interrupted ones not counted) and the results."""

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
            chosen = _newest_and_best(table)
            return self._by_tpe(chosen, table[chosen, 2], running[-NEIGHBOURS:], search_space, rng)
        bounds = search_space[LEVEL]
        level = self._level(running, bounds.low, bounds.high, rng)  # type: ignore[attr-defined]
        others = {name: found for name, found in search_space.items() if name != LEVEL}
        if not others:
            return {LEVEL: level}
        near = _nearest(table, level)
        beside = _beside(running, level)
        return {LEVEL: level} | self._by_tpe(near, _residuals(table[near], level), beside, others, rng)

    def _observe(self, study: optuna.Study, own: int) -> list[Mapping[str, Any]]:
        """Takes up trials that ended since the last look; returns the parameters of those that run beside this one."""
        trials = trials_of(study)
        looked_at, self._looked_at = self._looked_at, len(trials)
        self._open = [n for n in (*self._open, *range(looked_at, len(trials))) if not self._ended(trials[n])]
        running: list[Mapping[str, Any]] = []
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

    def _level(self, running: Sequence[Mapping[str, Any]], low: float, high: float, rng: np.random.Generator) -> float:
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
        room = np.where(width > 1e-6, width * np.maximum(height, 0), -1.0) / (1 + tries)
        gap = int(np.argmax(room))
        beyond = sum(len(part) - int(np.searchsorted(part, NEAR_THE_TOP * most)) for part in tried)
        if _room_at_the_top(self._seen.table, beyond, corners[-2], high) > GAINED * room[gap]:
            return high
        cost = corners[gap, 0] + rng.uniform(*MIDDLE) * width[gap]
        return float(np.clip(np.interp(cost, *_rising(costs, levels)), low, high))

    # The rest ----------------------------------------------------------------------------------------------------

    def _by_tpe(
        self,
        chosen: np.ndarray,
        values: np.ndarray,
        running: Sequence[Mapping[str, Any]],
        space: Mapping[str, BaseDistribution],
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """Draws `space` by Optuna's multivariate TPE, which maximises the `values` of the `chosen` trials."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = TPESampler(multivariate=True, n_startup_trials=0, seed=int(rng.integers(2**31)))
        known = [(self._seen.params[i], value) for i, value in zip(chosen, values.tolist(), strict=True)]
        shown = [(params, value) for params, value in known if space.keys() <= params.keys()]
        shown += [(params, None) for params in running if space.keys() <= params.keys()]
        trials = [_inner(number, params, space, value) for number, (params, value) in enumerate(shown, 1)]
        return study_of(trials, sampler).ask(dict(space)).params


def _inner(
    number: int, params: Mapping[str, Any], space: Mapping[str, BaseDistribution], value: float | None
) -> FrozenTrial:
    """A trial of the inner study; without a value it is one that runs, which TPE keeps away from."""
    return FrozenTrial(
        number=number, trial_id=number, state=TrialState.RUNNING if value is None else TrialState.COMPLETE, value=value,
        params={name: params[name] for name in space}, distributions=dict(space), datetime_start=None, datetime_complete=None,
        user_attrs={}, system_attrs={}, intermediate_values={},
    )  # fmt: skip


def _newest_and_best(table: np.ndarray) -> np.ndarray:
    """Indices of the newest complete trials and of the most accurate ones."""
    done = np.flatnonzero(~np.isnan(table[:, 2]))
    best = done[np.argsort(-table[done, 2], kind="stable")[:NEIGHBOURS]]
    return np.unique(np.concatenate([best, done[-NEIGHBOURS:]]))


def _nearest(table: np.ndarray, level: float, count: int = NEIGHBOURS) -> np.ndarray:
    """Indices of the complete trials nearest in level, of those that have one (plans that were given do not).

    Of equally near ones (hundreds may lie at the budget itself) the newest: TPE learns nothing new from the same oldest ones.
    """
    done = np.flatnonzero(~np.isnan(table[:, 0] + table[:, 2]))[::-1]
    return done[_least(np.abs(np.log(table[done, 0] / level)), count)]


def _beside(running: Sequence[Mapping[str, Any]], level: float) -> list[Mapping[str, Any]]:
    """The parameters of the running trials that TPE keeps away from: where hundreds run, those nearest in level."""
    if len(running) <= NEIGHBOURS:
        return list(running)
    distances = [abs(np.log(params[LEVEL] / level)) if LEVEL in params else np.inf for params in running]
    return [running[i] for i in sorted(_least(np.array(distances), NEIGHBOURS))]


def _least(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the least values, in their order; of equal ones the first."""
    if len(values) <= count:
        return np.argsort(values, kind="stable")
    candidates = np.flatnonzero(values <= np.partition(values, count - 1)[count - 1])
    return candidates[np.argsort(values[candidates], kind="stable")[:count]]


def _residuals(near: np.ndarray, level: float) -> np.ndarray:
    """How far accuracies of rows [n, (level, cost, accuracy)] lie above a parabola in log level through them; the nearest weigh most."""
    accuracy = near[:, 2]
    if len(near) < 3:
        return accuracy
    x = np.log(near[:, 0] / level)
    weight = np.exp(-0.25 * (x / max(WIDTH, float(np.std(x)))) ** 2)
    degree = min(2, len(np.unique(x)) - 1, len(near) - 2)
    fitted = np.polynomial.polynomial.polyfit(x, accuracy, degree, w=weight)
    return weight * (accuracy - np.polynomial.polynomial.polyval(x, fitted))


def cost_at_limit(
    known: np.ndarray, limit: float, low: float, high: float, rng: np.random.Generator
) -> tuple[float | None, float]:
    """(cost to try next for the cheapest net with at least `limit`, the cheapest known one's cost); `known` [n, (cost, accuracy)].

    None for one proposal in four: the front above the limit is filled, too. Else the cost of the largest expected gain: log(cheapest /
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
    near = _nearest(table, high, NEIGHBOURS // 2)
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


def _staircase(points: np.ndarray) -> np.ndarray:
    """The nondominated of points [n, (cost, accuracy)], by rising cost and accuracy."""
    ordered = points[np.lexsort((-points[:, 1], points[:, 0]))]
    best = np.maximum.accumulate(ordered[:, 1])
    return ordered[np.concatenate([[True], ordered[1:, 1] > best[:-1]])]


def _rising(costs: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(costs, levels) with every cost once, as an interpolation from cost to level wants them."""
    unique, first = np.unique(costs, return_index=True)
    return unique, levels[first]
