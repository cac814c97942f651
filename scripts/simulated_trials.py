"""What the scripts that drive studies without training share: a workbench without data, results as real trials return them, trials' fates.

The sizes of a result are those of a real one: `ranksearch search search_spaces/cifar10_resnet20.yaml --trials 1 --inline` returns 50
losses, the scores of the phases, about ten recorded projections with a value per lowered layer.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ranksearch.allocate import MEASURES, Damage, rank_curves
from ranksearch.compress import dense_cost, plan_cost
from ranksearch.console import Terminal
from ranksearch.search.predicting import usual
from ranksearch.search.workbench import Workbench, open_net
from ranksearch.space.reading import read_space
from ranksearch.space.space import Space
from ranksearch.study.driver import Driver
from ranksearch.study.study import Study
from ranksearch.tracking.background import BackgroundMirror
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.result import TrialResult

SPACE = Path(__file__).parent.parent / "search_spaces" / "cifar10_resnet20.yaml"

CURVE, PROJECTIONS = 50, 10
"""Points of a training curve, and recorded projections."""
SECONDS, SPREAD, SHORTEST = 60.0, 0.3, 5.0
"""A trial's time: mean, standard deviation as a share of it, least."""
LOST, DIVERGED, RESTART_SECONDS = 0.01, 0.01, 20.0
"""Shares of the trials whose worker dies at some point, and that diverge; how long a worker takes to come back.

Assumed, not measured: many times what clusters report (Kokolis et al. 2024, arXiv 2410.21680: 6.5 failures per 1,000 node-days).
"""


def workbench(space: Space) -> Workbench:
    """The space's net with weights as they are drawn, its curves, and sensitivities drawn at random: nothing is trained, so no
    data are needed, and proposals are the solver's as in a real study."""
    torch.manual_seed(space.search.seed)
    model, net = open_net(space)
    task = space.kind().make_task(space.model, data=None, validation=space.validation, split_seed=space.split_seed)
    curves = rank_curves(model, net, space.layers.as_rules(), None)
    rng = random.Random(space.search.seed)
    scales = {options.layer.name: math.exp(rng.gauss(0, 1)) for options in curves.layers}
    damage = Damage(MEASURES[usual(space).search.measure], scales=scales)
    return Workbench(task, model.state_dict(), net, curves, damage)


def simulated(
    bench: Workbench, candidate: Candidate, rng: random.Random, *, projections: int = PROJECTIONS
) -> TrialResult:
    """A result as a real trial's is made up: 50 losses, 3 phases, projections, final metrics; more accurate where it costs more."""
    cost, names = plan_cost(bench.net, candidate.plan), [name for name, _ in candidate.plan.lowered()]
    accuracy = min(99.9, 80 + 18 * (cost.macs / dense_cost(bench.net).macs) ** 0.3 + rng.gauss(0, 1))
    total = candidate.recipe.steps
    steps = [total * (i + 1) // CURVE for i in range(CURVE)]
    phases = (("trained", total // 2), ("projected", total // 2), ("factors", total))
    return TrialResult(
        "complete", candidate.seed, 4.0, val_accuracy=accuracy, val_loss=rng.random(), macs=cost.macs, params=cost.params,
        size_bytes=cost.size_bytes, images_per_second=rng.uniform(1e3, 2e3), seconds=rng.uniform(1, 2), projection_share=rng.random(),
        losses=[{"step": step, "train_loss": math.exp(-2 * step / total) + 0.1 * rng.random()} for step in steps],
        history=[{"phase": p, "step": s, "val_accuracy": accuracy - rng.random(), "val_loss": rng.random()} for p, s in phases],
        projections=[
            {
                "step": total * (i + 1) // projections, "loss_before": rng.random(), "loss_after": rng.random(),
                "removed_energy": {name: rng.random() for name in names},
            }
            for i in range(projections)
        ],
    )  # fmt: skip


def diverged(candidate: Candidate) -> TrialResult:
    return TrialResult("diverged", candidate.seed, 0.5, reason="the loss is nan", seconds=1.0)


def bytes_of(result: TrialResult) -> int:
    """What a result takes in the journal."""
    return len(json.dumps(result.to_dict(), separators=(",", ":")))


@dataclass(frozen=True)
class Fate:
    """How a trial goes: the seconds it takes its worker, and how it ends ("complete", "diverged", "lost")."""

    seconds: float
    end: str

    @classmethod
    def draw(cls, rng: random.Random) -> Fate:
        seconds, luck = max(SHORTEST, rng.gauss(SECONDS, SPREAD * SECONDS)), rng.random()
        if luck < LOST:
            return cls(rng.random() * seconds, "lost")
        if luck < LOST + DIVERGED:
            return cls(rng.random() * seconds, "diverged")
        return cls(seconds, "complete")


# Driving a study ---------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A study with its driver."""

    study: Study
    bench: Workbench
    driver: Driver
    make: Callable[[Candidate], TrialResult]
    rng: random.Random
    mirror: BackgroundMirror | None


def space_of(options: argparse.Namespace, trials: int, uri: str = "") -> Space:
    """ResNet-20 as in its search space, on images of 8 x 8 that need no download; every searched setting as there."""
    settings = [
        "task=digits", "validation=360", f"search.seed={options.seed}", "tracking.models=false",
        "resources.worker_losses=5", *([f"tracking.uri={uri}"] if uri else []),
        *(["model=resnet8", "layers.lowerings=[im2col, channel, spatial]"] if options.quick else []),
    ]  # fmt: skip
    return read_space(SPACE, trials=trials, name="simulated", settings=settings)


def new_study(options: argparse.Namespace, runs: Path, trials: int, *, mirrored: bool) -> Setting:
    space = space_of(options, trials, f"sqlite:///{runs / 'mlflow.db'}" if mirrored else "")
    bench = workbench(space)
    study = Study.create(runs, space, bench, 99.0)
    mirror = BackgroundMirror(study, runs, lambda text: print(text, file=sys.__stderr__)) if mirrored else None
    return follow(study, bench, random.Random(options.seed), mirror)


def follow(study: Study, bench: Workbench, rng: random.Random, mirror: BackgroundMirror | None = None) -> Setting:
    """A study that is driven as `ranksearch search` does it, with its line of progress per trial."""
    terminal = Terminal()

    def on_row(row: Any) -> None:
        terminal.row(study, row)
        if mirror is not None:
            mirror.log_trial(row)

    terminal.start(study)
    driver = Driver(study, bench, on_row, lambda text: None)
    return Setting(study, bench, driver, lambda candidate: simulated(bench, candidate, rng), rng, mirror)


class Clock:
    """What the driver takes for an action: CPU time of its thread, and its waiting for the disk; not what else the machine does."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self._profile, self._waited, sync = profile, 0.0, os.fsync
        self.waits: list[float] = []
        """Seconds of every wait for the disk."""

        def timed_sync(descriptor: int) -> None:
            started, cpu = time.perf_counter(), time.thread_time()
            sync(descriptor)
            waited = time.perf_counter() - started - (time.thread_time() - cpu)
            self._waited += waited
            self.waits.append(waited)

        os.fsync = timed_sync

    def __call__(self, action: Callable[..., Any], *given: Any) -> tuple[Any, float]:
        """(what the action returns, seconds)"""
        if self._profile is not None:
            self._profile.enable()
        cpu, waited = time.thread_time(), self._waited
        value = action(*given)
        seconds = time.thread_time() - cpu + self._waited - waited
        if self._profile is not None:
            self._profile.disable()
        return value, seconds


def rss_mib() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
