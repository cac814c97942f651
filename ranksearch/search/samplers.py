"""Optuna's samplers by name, seeded so that a resumed study does not repeat its draws."""

from __future__ import annotations

import warnings

import optuna

from ranksearch.search.space import Space

STARTUP_TRIALS = 3
"""TPE models from here on: the first points are good ones already, so that random draws would only waste trials."""


def make_sampler(space: Space, opened_with: int) -> optuna.samplers.BaseSampler:
    """The space's sampler for a study that holds `opened_with` trials already.

    A seeded sampler made anew at each resume would repeat its draws, so the number of trials is part of its seed.
    """
    seed = space.search.seed + 1_000_003 * opened_with
    if space.search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if space.search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, space.search.trials // 4)), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # `group`: the classic plans have no corrections, and must not take these out of the joint model
        return optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=STARTUP_TRIALS, seed=seed)
