"""The group `recipe` of a search space: how a trial trains, with every default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ranksearch.space.settings import SWITCH, Strict, numbers_of, searchable, searchable_choice
from ranksearch.tasks.optimisation import OPTIMIZERS
from ranksearch.tasks.schedule import SCHEDULES


def _to_the_end(value: Any) -> Any:
    return 1.0 if value is True else value


class ProjectionSpace(Strict):
    """When the dense weights are projected, and how. The last step before the decomposition is always followed by a projection."""

    period: searchable(1, 1_000_000, whole=True) = 20  # type: ignore[valid-type]
    """Optimizer steps between projections. At least ten projections per trial pay; with a long run, thirty or more."""
    start: searchable(0, 1) = 0.0  # type: ignore[valid-type]
    """Share of the steps before the decomposition that pass until the first period begins."""
    until_end: Annotated[searchable(0, 1), BeforeValidator(_to_the_end)] = 1.0  # type: ignore[valid-type]
    """Share of those steps after which periodic projections cease; 1 (or true): they go on until the end."""
    schedule: searchable_choice("constant", "learning_rate", "removed_energy") = "constant"  # type: ignore[valid-type]
    """Length of a period: constant; the steps weighted by their learning rate (as many projections, but fewer where steps are small);
    or shorter where a projection removed more than `removed_energy`, longer where less, within a factor of four."""
    removed_energy: searchable(1e-9, 1) = 1e-3  # type: ignore[valid-type]
    """Mean share of the layers' ||W||² that a projection is to remove under the schedule `removed_energy`."""
    rank_annealing: searchable(0, 1) = 0.0  # type: ignore[valid-type]
    """Share of the steps (from `start` on) over which ranks come down from full to the plan's, fast at first; 0: at once."""
    momentum: searchable_choice("keep", "reset") = "keep"  # type: ignore[valid-type]
    """Whether the optimizer forgets its moments at a projection."""
    energy_transfer: SWITCH = False  # type: ignore[valid-type]
    """Scale what a projection keeps of a weight so that its energy stays (LRPET, Guo et al. 2024, arXiv 2204.05566)."""
    bn_rectification: SWITCH = False  # type: ignore[valid-type]
    """Choose what a projection keeps by the weight as the BN layer behind it will scale it (LRPET)."""

    @model_validator(mode="after")
    def _in_order(self) -> ProjectionSpace:
        latest, earliest = max(numbers_of(self.start)), min(numbers_of(self.until_end))
        if latest > earliest:
            raise ValueError(f"start {latest:g} is after until_end {earliest:g}")
        return self


class DistillationSpace(Strict):
    """The dense net as the teacher."""

    weight: searchable(0, 1) = 0.0  # type: ignore[valid-type]
    """Share of the loss that comes from the dense net's outputs; 0 does without, and saves a quarter of the time."""
    temperature: searchable(0.1, 100) = 8.0  # type: ignore[valid-type]
    """Softens both nets' outputs; on CIFAR-10 the gain levels off between 8 and 16."""


class RecipeSpace(Strict):
    """How a trial trains: dense with projections first, then the factors."""

    steps: int = Field(ge=0)
    """Optimizer steps of a trial, over both phases."""
    batch_size: int = Field(default=128, ge=1)
    """Samples of a step; a loader of your own goes before it."""
    optimizer: searchable_choice(*OPTIMIZERS) = "sgd"  # type: ignore[valid-type]
    """SGD with Nesterov momentum, or AdamW, which wants a learning rate of its own (about 0.001)."""
    schedule: searchable_choice(*SCHEDULES) = "cosine"  # type: ignore[valid-type]
    """Learning rate after the warm-up: a cosine or a line to 0, steps (a tenth at half, a hundredth at three quarters), or constant."""
    warmup: searchable(0, 1) = 0.15  # type: ignore[valid-type]
    """Share of the steps over which the learning rate rises to its peak; with the cosine this is the one-cycle schedule."""
    lr: searchable(1e-8, 100) = 0.02  # type: ignore[valid-type]
    """Peak of the learning rate."""
    momentum: searchable(0.01, 0.9999) = 0.9  # type: ignore[valid-type]
    """SGD's momentum, or AdamW's first beta."""
    weight_decay: searchable(0, 1) = 5e-4  # type: ignore[valid-type]
    """The optimizer's, on all weights."""
    label_smoothing: searchable(0, 0.9) = 0.0  # type: ignore[valid-type]
    """Share of the target that is spread over all classes."""
    clip_norm: searchable(0, 1e9) = 0.0  # type: ignore[valid-type]
    """Largest norm of the gradient; 0 does without clipping."""
    ema: searchable(0, 0.999999) = 0.0  # type: ignore[valid-type]
    """Decay per step of a moving average of the weights, which each phase ends with; 0 does without."""
    factor_share: searchable(0, 1) = 0.5  # type: ignore[valid-type]
    """Share of the steps that trains the factors after decomposition; 0 is the pure form of Lee et al. 2019, 1 decomposes first."""
    factor_lr: searchable(1e-6, 1e6) = 1.0  # type: ignore[valid-type]
    """Learning rate of the factors as a multiple of the schedule's. `cp`, a product of four factors, wants about 0.1."""
    bn_batches: int = Field(default=20, ge=1)
    """Batches, augmented as in training, that BN statistics are re-estimated from."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the training; "auto" is bf16 where that is faster. Weights, projections and scores are fp32 (on a GPU, torch runs
    convs of fp32 in TF32 unless it is told otherwise)."""
    compile: bool = False
    """torch.compile the training step: pays in long trials on a GPU; a trial begins with a minute or more of compilation."""
    projection: ProjectionSpace = ProjectionSpace()
    distillation: DistillationSpace = DistillationSpace()
