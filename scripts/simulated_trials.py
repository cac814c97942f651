"""What the scripts that drive studies without training share: a workbench without data, results as real trials return them, trials' fates.

The sizes of a result are those of a real one: `ranksearch search search_spaces/cifar10_resnet20.yaml --trials 1 --inline` returns 50
losses, the scores of the phases, about ten recorded projections with a value per lowered layer.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass

import torch

from ranksearch.allocate import MEASURES, Damage, rank_curves
from ranksearch.compress import dense_cost, plan_cost
from ranksearch.search.proposals import Candidate
from ranksearch.search.space import Space
from ranksearch.search.trial import TrialResult
from ranksearch.search.workbench import Workbench, open_net

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
    damage = Damage(MEASURES[space.search.measure], scales=scales)
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
