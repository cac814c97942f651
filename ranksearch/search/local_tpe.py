"""`LocalTPE`: where on the front there is most room, and there the corrections that did better than their neighbours.

TPE over all parameters and objectives at once has to learn first that a larger net is better. Here that is known: the cost at which
a trial is proposed is set where a new net could add most hypervolume, and Optuna's TPE, on one value, models only how far a net lies
above what others reach at about its cost. It sees the trials nearest in cost, so its time does not grow with the study.

ResNet-20 and ResNet-32 on CIFAR-10 against Optuna's own TPE on the same parameters: `scripts/bench_search.py` (rows `allocated_motpe`).

Reference: Bergstra et al. 2011 (TPE); multivariate: Falkner, Klein & Hutter 2018, arXiv 1807.01774.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from ranksearch.search.parametrize import LEVEL

NEIGHBOURS = 30
"""Trials that TPE models: the nearest in cost; in a search for one value the newest ones and the best."""
MIDDLE = (0.3, 0.7)
"""A proposal falls here between its neighbours on the front."""
GAINED = 0.25
"""Share of a gap's area that a net in its middle gains, half-way in accuracy too."""
NEAR_THE_TOP = 0.95
WIDTH = 0.2
"""Least width, in logarithms of the cost, of the neighbourhood that residuals are taken in."""


@dataclass(frozen=True)
class Seen:
    """A trial: accuracy in 0..1 (None while it runs, or where it did not come to its end) and cost as a ratio of dense."""

    number: int
    params: Mapping[str, Any]
    accuracy: float | None
    cost: float | None


class LocalTPE(BaseSampler):
    """Proposes the level by the room on the front and everything else by TPE among its neighbours; without a level by TPE alone."""

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        *,
        accuracy_at: int,
        cost_at: int | None,
        dense_accuracy: float,
        seed: int,
    ) -> None:
        """
        Args:
            distributions: every parameter that is searched.
            accuracy_at, cost_at: which of the study's values is the accuracy in percent, and which the cost as a ratio of dense.
            dense_accuracy: of the dense net, in percent: what is hoped for above the largest net of the front.
        """
        self._ceiling = dense_accuracy / 100
        self._distributions, self._seed = dict(distributions), seed
        self._accuracy_at, self._cost_at = accuracy_at, cost_at
        self._finished: dict[int, Seen] = {}
        self._independent = RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        """Nothing: draws depend on the seed and the trial's number alone, so a study that is opened again draws as it would have."""

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
        rng = np.random.default_rng([self._seed, trial.number])
        running = self._observe(study, trial.number)
        seen = [s for s in self._finished.values() if s.accuracy is not None]
        if LEVEL not in search_space:
            known = [s for s in seen if search_space.keys() <= s.params.keys()]
            return self._by_tpe(_values(_newest_and_best(known)), running, search_space, rng)
        bounds = search_space[LEVEL]
        in_vain = [s for s in self._finished.values() if s.accuracy is None]
        level = self._level(seen, [*running, *in_vain], bounds.low, bounds.high, rng)  # type: ignore[attr-defined]
        others = {name: found for name, found in search_space.items() if name != LEVEL}
        near = _nearest(seen, level)
        return {LEVEL: level} | (self._by_tpe(_residuals(near, level), running, others, rng) if others else {})

    # What was seen -----------------------------------------------------------------------------------------------

    def _observe(self, study: optuna.Study, own: int) -> list[Seen]:
        """Takes up trials that ended since the last look; returns those that run beside this one."""
        running = []
        for trial in study._get_trials(deepcopy=False, use_cache=True):
            if trial.number in self._finished or trial.number == own:
                continue
            if trial.state == TrialState.RUNNING and trial.params:
                running.append(Seen(trial.number, trial.params, None, None))
            elif trial.state == TrialState.COMPLETE and trial.values is not None:
                cost = trial.values[self._cost_at] if self._cost_at is not None else None
                found = Seen(trial.number, trial.params, trial.values[self._accuracy_at] / 100, cost)
                self._finished[trial.number] = found
            elif trial.state in (TrialState.FAIL, TrialState.PRUNED):  # a duplicate, stopped, diverged: tried in vain
                self._finished[trial.number] = Seen(trial.number, trial.params, None, None)
        return running

    # The level ---------------------------------------------------------------------------------------------------

    def _level(
        self, seen: Sequence[Seen], others: Sequence[Seen], low: float, high: float, rng: np.random.Generator
    ) -> float:
        """The level at which the cost falls into the widest gap of the front: Δcost · Δaccuracy over the tries there so far.

        `others` run still, or were tried in vain.
        """
        levels, costs = _cost_of_level(seen, low, high)
        if len(levels) == 0:
            return float(rng.uniform(low, high))
        least, most = np.interp([low, high], levels, costs)
        points = np.array([[s.cost, s.accuracy] for s in seen])
        tried = np.sort(
            np.concatenate(
                [points[:, 0], np.interp([s.params[LEVEL] for s in others if LEVEL in s.params], levels, costs)]
            )
        )
        stairs = _staircase(points)
        start = stairs[stairs[:, 0] <= least, 1].max(initial=0.0)
        inside = stairs[(stairs[:, 0] > least) & (stairs[:, 0] < most)]
        ceiling = max(self._ceiling, float(points[:, 1].max()))
        corners = np.vstack([[least, start], inside, [most, ceiling]])
        width, height = np.diff(corners, axis=0).T
        tries = np.searchsorted(tried, corners[1:, 0], "left") - np.searchsorted(tried, corners[:-1, 0], "right")
        room = np.where(width > 1e-6, width * np.maximum(height, 0), -1.0) / (1 + tries)
        gap = int(np.argmax(room))
        if self._room_at_the_top(seen, tried, corners[-2], most, high) > GAINED * room[gap]:
            return high
        cost = corners[gap, 0] + rng.uniform(*MIDDLE) * width[gap]
        return float(np.clip(np.interp(cost, *_rising(costs, levels)), low, high))

    @staticmethod
    def _room_at_the_top(seen: Sequence[Seen], tried: np.ndarray, last: np.ndarray, most: float, high: float) -> float:
        """What a net as large as the budget allows may gain: all costs from there to dense, times the rise to be hoped for.

        There is no gap to fill at the front's end, but a better net there counts most. The rise that a normal deviation of `spread` gives
        on average is 0.4 of it.
        """
        residuals = [value for _, value in _residuals(_nearest(seen, high)[: NEIGHBOURS // 2], high)]
        spread = float(np.std(residuals)) if len(residuals) >= 4 else 0.01
        tries = len(tried) - np.searchsorted(tried, NEAR_THE_TOP * most)
        return max(0.0, 1 - last[0]) * min(0.4 * spread, 1 - last[1]) / (1 + tries)

    # The rest ----------------------------------------------------------------------------------------------------

    def _by_tpe(
        self,
        seen: Sequence[tuple[Seen, float]],
        running: Sequence[Seen],
        space: Mapping[str, BaseDistribution],
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """Draws `space` by Optuna's multivariate TPE, which maximises the value beside each trial."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = TPESampler(multivariate=True, n_startup_trials=0, seed=int(rng.integers(2**31)))
        inner = optuna.create_study(direction="maximize", sampler=sampler)
        for trial, value in seen:
            inner.add_trial(_inner(trial, space, value))
        for trial in running:
            if space.keys() <= trial.params.keys():
                inner.add_trial(_inner(trial, space, None))
        return inner.ask(dict(space)).params


def _inner(seen: Seen, space: Mapping[str, BaseDistribution], value: float | None) -> FrozenTrial:
    """A trial of the inner study; without a value it is one that runs, which TPE keeps away from."""
    state = TrialState.RUNNING if value is None else TrialState.COMPLETE
    params = {name: seen.params[name] for name in space}
    return create_trial(state=state, params=params, distributions=dict(space), value=value)


def _newest_and_best(seen: Sequence[Seen]) -> list[Seen]:
    best = sorted(seen, key=lambda s: -(s.accuracy or 0.0))[:NEIGHBOURS]
    return list({s.number: s for s in [*best, *seen[-NEIGHBOURS:]]}.values())


def _values(seen: Sequence[Seen]) -> list[tuple[Seen, float]]:
    return [(s, s.accuracy or 0.0) for s in seen]


def _nearest(seen: Sequence[Seen], level: float) -> list[Seen]:
    """The trials nearest in level, of those that have one (plans that were given, such as the classic baselines, do not)."""
    at_level = [s for s in seen if LEVEL in s.params]
    return sorted(at_level, key=lambda s: abs(log(s.params[LEVEL] / level)))[:NEIGHBOURS]


def _residuals(near: Sequence[Seen], level: float) -> list[tuple[Seen, float]]:
    """How far each trial's accuracy lies above a parabola in log level through all of them, the nearest weighing most."""
    if len(near) < 3:
        return _values(near)
    x = np.log([s.params[LEVEL] / level for s in near])
    y = np.array([s.accuracy for s in near], dtype=float)
    weight = np.exp(-0.25 * (x / max(WIDTH, float(np.std(x)))) ** 2)
    degree = min(2, len(np.unique(x)) - 1, len(near) - 2)
    fitted = np.polynomial.polynomial.polyfit(x, y, degree, w=weight)
    return list(zip(near, (weight * (y - np.polynomial.polynomial.polyval(x, fitted))).tolist(), strict=True))


def _cost_of_level(seen: Sequence[Seen], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Rising (levels, costs) from `low` to `high` as the trials had them; beyond those the cost is proportional to the level."""
    known = sorted((s.params[LEVEL], s.cost) for s in seen if LEVEL in s.params and s.cost is not None)
    if not known:
        return np.empty(0), np.empty(0)
    (first, first_cost), (last, last_cost) = known[0], known[-1]
    below = [(low, first_cost * low / first)] if first > low else []
    above = [(high, last_cost * high / last)] if last < high else []
    levels, costs = np.array([*below, *known, *above]).T
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
