"""Measures how fast trials are that share a GPU, so that no more are packed onto it than help.

Processes train a real net at the same time for some seconds, twice as many each time, as long as all of them together get faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import torch

from ranksearch.cluster import mps
from ranksearch.cluster.shared import Shared, take
from ranksearch.compress import Net, Projector, RankPlan
from ranksearch.data.parallel import ALONE
from ranksearch.errors import StudyError
from ranksearch.tasks.task import Task
from ranksearch.training.dense import State
from ranksearch.training.device import clock
from ranksearch.training.train import Training
from ranksearch.trial.checkpoint import CheckpointFile
from ranksearch.trial.recipe import Recipe
from ranksearch.trial.reporting import unwatched
from ranksearch.trial.session import Session

SECONDS = 5.0
"""Seconds that each number of processes trains while its pace is measured."""
GAIN = 1.1
"""Twice as many trials must be this much faster together."""
PLACE_SECONDS = 60.0
"""A GPU that is not free within this time belongs to somebody else's trials."""
WARM, EVERY, ENDLESS = 20, 10, 10**6
"""Steps before anything is measured; steps between two looks at the clock; the schedule's length."""


class _Over(Exception):
    """The time is over."""


class Pace:
    """One process that trains, under projections, and counts its steps."""

    def __init__(self, task: Task, dense: State, net: Net, plan: RankPlan, recipe: Recipe) -> None:
        endless = replace(recipe, steps=ENDLESS, factor_share=0.0)
        session = Session(
            task, dense, net, endless, seed=0, report=lambda entry: None, checkpoint=CheckpointFile(None, 1e9), rungs=(),
            group=ALONE, watch=unwatched,
        )  # fmt: skip
        self._training, self._projector = session.training_(session.dense_net(), range(ENDLESS)), Projector(plan)
        self._period = recipe.projection.period
        self.steps(lambda: self._training.done >= WARM)

    def steps(self, over: Callable[[], bool]) -> int:
        """Trains until `over`, which is called every few steps; returns the number of steps."""
        before, device = self._training.done, next(self._training.model.parameters()).device

        def after(training: Training) -> None:
            if training.done % self._period == 0:
                self._projector.later(training.model, training.replay)
            if training.done % EVERY == 0:
                clock(device)
                if over():
                    raise _Over

        with suppress(_Over):
            self._training.run(after)
        return self._training.done - before

    def rate(self, seconds: float) -> float:
        """Trains for `seconds`; returns steps per second."""
        started = time.perf_counter()
        steps = self.steps(lambda: time.perf_counter() >= started + seconds)
        return steps / (time.perf_counter() - started)


class _Remote:
    """`Pace` in a worker of Ray's."""

    def __init__(self, shared: Shared, plan: RankPlan, recipe: Recipe, pipes: str | None) -> None:
        mps.use(pipes)
        torch.set_num_threads(1)
        work, _ = take(shared)
        self._pace = Pace(work.task, work.dense, work.net, plan, recipe)

    def ready(self) -> None: ...

    def rate(self, seconds: float) -> float:
        return self._pace.rate(seconds)


def useful(most: int, rate_of: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """Returns how many trials to pack onto a GPU, and what was measured: the number doubles, up to `most`, while more are faster together.

    Args:
        rate_of: number of trials -> steps per second of all of them.
    """
    rates = {1: rate_of(1)}
    best = 1
    while best < most:
        more = min(2 * best, most)
        rates[more] = rate_of(more)
        if rates[more] < rates[best] * GAIN ** ((more - best) / best):
            break
        best = more
    return best, rates


def together(count: int, shared: Shared, plan: RankPlan, recipe: Recipe, pipes: str | None, share: float) -> float:
    """Steps per second of `count` processes at once on one GPU.

    Raises:
        StudyError: one of them failed, as a trial would.
    """
    place = ray.util.placement_group([{"CPU": count, "GPU": 1}], strategy="STRICT_PACK")
    make: Any = ray.remote(num_cpus=1, num_gpus=share)(_Remote)
    workers: list[Any] = []
    try:
        ray.get(place.ready(), timeout=PLACE_SECONDS)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(place)
        workers = [make.options(scheduling_strategy=strategy).remote(shared, plan, recipe, pipes) for _ in range(count)]
        ray.get([worker.ready.remote() for worker in workers])
        return sum(ray.get([worker.rate.remote(SECONDS) for worker in workers]))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise StudyError(f"{count} trials at once failed on a GPU ({type(cause).__name__})") from error
    finally:
        for worker in workers:
            ray.kill(worker)
        ray.util.remove_placement_group(place)


def told(rates: Mapping[int, float]) -> str:
    """What was measured, for the log."""
    return ", ".join(f"{count}: {rate:,.0f} steps/s" for count, rate in sorted(rates.items()))


def read(known: Mapping[str, Any]) -> dict[int, float]:
    """The rates of a study's record, whose keys are texts."""
    return {int(count): rate for count, rate in known.get("rates", {}).items()}
