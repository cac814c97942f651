"""The trial: the method from beginning to end. It knows neither Ray nor MLflow; it takes `report`, a plain function.

The same trial runs in-process and on Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ranksearch.compress import Net, RankPlan, plan_cost, project_, reestimate_bn_, save_net
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
    """Low-rank-aware training under `plan`, decomposition, fine-tuning of the factors, and the validation score.

    `report` is called with the metrics of each phase; the compressed net is written to `save_to`. A loss that is not finite
    ends the trial with status "diverged" and the metrics so far: divergence is a result, not an error.

    Reference: Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145 (projection training); the fine-tuning of the factors is ours.
    """
    started, history = time.perf_counter(), []
    device, cost = pick_device(), plan_cost(net, plan)
    task, generator = task.to(device), torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    projected_steps = recipe.steps - round(recipe.factor_share * recipe.steps)
    settings = Optimisation(
        recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size, recipe.steps,
        use_bf16(recipe.precision, device, cost.macs),
    )  # fmt: skip

    def build_dense() -> torch.nn.Module:
        model = task.build_model(task.model)
        model.load_state_dict(dense)
        return model.to(device)

    def score(phase: str, step: int, **metrics: float) -> None:
        evaluation = evaluate(model, task.val, task)
        entry = {
            "phase": phase,
            "step": step,
            "val_accuracy": evaluation.accuracy,
            "val_loss": evaluation.loss,
            **metrics,
        }
        history.append(entry)
        report(entry)

    def reestimate() -> None:
        reestimate_bn_(model, calibration_batches(task, recipe.bn_batches, recipe.batch_size, generator))

    def project_every_period(done: int) -> None:
        if done % recipe.period == 0 and done < projected_steps:
            project_(model, plan)

    teacher = build_dense().eval().requires_grad_(False) if recipe.distillation_weight > 0 else None
    distillation = (
        Distillation(teacher, recipe.distillation_weight, recipe.distillation_temperature) if teacher else None
    )
    result = {"seed": seed, "epochs": recipe.steps * recipe.batch_size / len(task.train), "history": history}
    costs = {"macs": cost.macs, "params": cost.params, "size_bytes": cost.size_bytes, "latency_ms": cost.latency_ms}
    model = build_dense()
    try:
        # the method ------------------------------------------------------------------------------------------------
        projection = train_(
            model, task, settings, range(projected_steps),
            generator=generator, distillation=distillation, after_step=project_every_period,
        )  # fmt: skip
        removed = project_(model, plan)
        score(
            "projected",
            projected_steps,
            train_loss=projection.loss,
            removed_energy_max=max(removed.values(), default=0.0),
        )
        model = compress(model, plan)
        reestimate()
        score("decomposed", projected_steps)
        tuning = train_(
            model, task, settings, range(projected_steps, recipe.steps), generator=generator, distillation=distillation
        )
        if projected_steps < recipe.steps:
            reestimate()
            score("factors", recipe.steps, train_loss=tuning.loss)
    except (Diverged, NonFiniteError) as error:
        last = history[-1] if history else {}
        return TrialResult(
            "diverged", val_accuracy=last.get("val_accuracy"), val_loss=last.get("val_loss"), reason=str(error),
            seconds=time.perf_counter() - started, **costs, **result,
        )  # fmt: skip
    if save_to is not None:
        save_net(model, plan, save_to)
    training_seconds = projection.seconds + tuning.seconds
    return TrialResult(
        "complete", val_accuracy=history[-1]["val_accuracy"], val_loss=history[-1]["val_loss"],
        images_per_second=(projection.images + tuning.images) / training_seconds if training_seconds else None,
        seconds=time.perf_counter() - started, **costs, **result,
    )  # fmt: skip
