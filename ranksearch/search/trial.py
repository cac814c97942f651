"""The trial: the method from beginning to end. It knows neither Ray nor MLflow; it takes `report`, a plain function.

The same trial runs in-process and on Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranksearch.compress import Net, Projector, RankPlan, dense_cost, plan_cost, reestimate_bn_, save_net
from ranksearch.compress.surgery import compress
from ranksearch.errors import NonFiniteError
from ranksearch.tasks.dense import State
from ranksearch.tasks.task import Task
from ranksearch.tasks.train import (
    Distillation,
    Diverged,
    Optimisation,
    calibration_batches,
    evaluate,
    pick_device,
    train_,
    use_bf16,
)

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How a trial trains, every value settled. Defaults are in the search-space schema."""

    steps: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    period: int
    energy_transfer: bool
    bn_rectification: bool
    factor_share: float
    bn_batches: int
    precision: str
    distillation_weight: float
    distillation_temperature: float


@dataclass(frozen=True)
class TrialResult:
    """What a trial found. Accuracies in percent; what was not measured is None."""

    status: str  # "complete", "diverged" or "failed"
    seed: int
    epochs: float
    val_accuracy: float | None = None
    val_loss: float | None = None
    macs: int | None = None
    params: int | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    reason: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Session:
    """One trial's data, randomness, settings and report: what the statements of the method are made of."""

    def __init__(self, task: Task, dense: State, net: Net, recipe: Recipe, *, seed: int, report: Report) -> None:
        device = pick_device()
        torch.manual_seed(seed)
        self.task, self.net, self.recipe, self.history = task.to(device), net, recipe, []
        self._device, self._dense, self._report = device, dense, report
        self._generator = torch.Generator(device).manual_seed(seed)
        self._settings = Optimisation(
            recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size, recipe.steps,
            use_bf16(recipe.precision, device, dense_cost(net).macs),
        )  # fmt: skip
        self._distillation = None
        if recipe.distillation_weight > 0:
            teacher = self.dense_net().eval().requires_grad_(False)
            self._distillation = Distillation(teacher, recipe.distillation_weight, recipe.distillation_temperature)
        self.images, self.seconds = 0, 0.0

    def dense_net(self) -> nn.Module:
        """The dense net with its trained weights, on the device."""
        model = self.task.build_model(self.task.model)
        model.load_state_dict(self._dense)
        return model.to(self._device)

    def train_(self, model: nn.Module, steps: range, after_step: Callable[[int], None] | None = None) -> float | None:
        """Trains `model` for `steps` of the schedule; returns the loss towards the end (None without steps)."""
        stats = train_(
            model, self.task, self._settings, steps,
            generator=self._generator, distillation=self._distillation, after_step=after_step,
        )  # fmt: skip
        self.images, self.seconds = self.images + stats.images, self.seconds + stats.seconds
        return stats.loss

    def reestimate_bn_(self, model: nn.Module) -> None:
        recipe = self.recipe
        reestimate_bn_(model, calibration_batches(self.task, recipe.bn_batches, recipe.batch_size, self._generator))

    def score(self, phase: str, model: nn.Module, step: int, **metrics: float | None) -> None:
        """Evaluates `model` on the validation set, adds it to the history and reports it."""
        found = evaluate(model, self.task.val, self.task)
        if not isfinite(found.loss):
            raise Diverged(f"the validation loss of the {phase} net is {found.loss}")
        known = {name: value for name, value in metrics.items() if value is not None}
        entry = {"phase": phase, "step": step, "val_accuracy": found.accuracy, "val_loss": found.loss, **known}
        self.history.append(entry)
        self._report(entry)


def learn_low_rank(session: Session, plan: RankPlan) -> nn.Module:
    """The method: from the dense net to the trained low-rank net of `plan`.

    Reference: Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145 (projection training); fine-tuning the factors after it is ours.
    """
    recipe, model = session.recipe, session.dense_net()
    norms = session.net.norms() if recipe.bn_rectification else None
    project_ = Projector(plan, energy_transfer=recipe.energy_transfer, norms=norms)
    dense_steps = recipe.steps - round(recipe.factor_share * recipe.steps)

    def project_every_period(done: int) -> None:
        if done % recipe.period == 0 and done < dense_steps:
            project_(model)

    loss = session.train_(model, range(dense_steps), project_every_period)
    removed = project_(model)  # the training ends on a projection, so that decomposing changes nothing
    session.score(
        "projected", model, dense_steps, train_loss=loss, removed_energy_max=max(removed.values(), default=0.0)
    )
    small = compress(model, plan, warm=project_.warm)
    session.reestimate_bn_(small)
    session.score("decomposed", small, dense_steps)
    if dense_steps < recipe.steps:
        loss = session.train_(small, range(dense_steps, recipe.steps))
        session.reestimate_bn_(small)
        session.score("factors", small, recipe.steps, train_loss=loss)
    return small


def run_trial(
    task: Task,
    dense: State,
    net: Net,
    plan: RankPlan,
    recipe: Recipe,
    *,
    seed: int,
    report: Report,
    save_to: Path | None,
) -> TrialResult:
    """Runs the method under `plan` and returns its validation score and costs; the compressed net is written to `save_to`.

    `report` is called with the metrics of each phase. Divergence is a result: a loss or weights that are not finite end the
    trial with status "diverged" and the metrics so far.
    """
    started, cost = time.perf_counter(), plan_cost(net, plan)
    session = Session(task, dense, net, recipe, seed=seed, report=report)
    status, reason = "complete", None
    try:
        small = learn_low_rank(session, plan)
    except (Diverged, NonFiniteError) as error:
        status, reason = "diverged", str(error)
    else:
        if save_to is not None:
            save_net(small, plan, save_to)
    last = session.history[-1] if session.history else {}
    return TrialResult(
        status, seed, session.images / len(task.train), reason=reason, history=session.history,
        val_accuracy=last.get("val_accuracy"), val_loss=last.get("val_loss"),
        macs=cost.macs, params=cost.params, size_bytes=cost.size_bytes, latency_ms=cost.latency_ms,
        images_per_second=session.images / session.seconds if session.seconds else None,
        seconds=time.perf_counter() - started,
    )  # fmt: skip
