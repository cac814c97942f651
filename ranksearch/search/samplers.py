"""Samplers by name, seeded so that a resumed study does not repeat its draws.

They are Optuna's own, except for `tpe` around an allocation with at most one cost: between two costs there is no widest gap to look for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from ranksearch.search.local_tpe import LocalTPE
from ranksearch.space.space import Space
from ranksearch.trial.metric import Metric


def make_sampler(
    space: Space, distributions: Mapping[str, BaseDistribution], *, opened_with: int, metric: Metric
) -> BaseSampler:
    """The space's sampler for a study that holds `opened_with` trials already.

    A seeded sampler made anew at each resume would repeat its draws, so the number of trials is part of its seed.
    """
    search = space.search
    objectives = list(search.objectives)
    costs = [i for i, name in enumerate(objectives) if name != "accuracy"]
    if search.sampler == "tpe" and search.parametrization == "allocated" and len(costs) < 2:
        return LocalTPE(
            distributions, accuracy_at=objectives.index("accuracy"), cost_at=costs[0] if costs else None,
            share=metric.share, dense=metric.dense, seed=search.seed, least=metric.least_share(space.quality),
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return plain_sampler(search.sampler, trials=search.trials, seed=(search.seed + 1_000_003 * opened_with) % 2**32)


def plain_sampler(name: str, *, trials: int, seed: int) -> BaseSampler:
    """Optuna's sampler `name`; a generation of a genetic one is a quarter of the study, 4 to 50 trials."""
    generation = max(4, min(50, trials // 4))
    match name:
        case "tpe":
            # `group`: trials that were given a plan have no parameters, and must not take these out of the joint model
            return TPESampler(multivariate=True, group=True, seed=seed)
        case "nsga2":
            return NSGAIISampler(population_size=generation, seed=seed)
        case "nsga3":
            return NSGAIIISampler(population_size=generation, seed=seed)
        case "gp":
            return GPSampler(seed=seed)
        case "qmc":
            return QMCSampler(seed=seed, warn_independent_sampling=False)
        case "random":
            return RandomSampler(seed=seed)
    raise ValueError(f"there is no sampler {name!r}")
