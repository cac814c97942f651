"""The group `recipe` of a search space: how a trial trains, with every default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ranksearch.calibration.calibrate import FITS
from ranksearch.compress.factor_steps import MATCHED, STEPS
from ranksearch.space.settings import Choice, Number, Strict, Switch, numbers_of, one_of, within
from ranksearch.tasks.schedule import SCHEDULES
from ranksearch.training.optimisation import OPTIMIZERS


def _to_the_end(value: Any) -> Any:
    return 1.0 if value is True else value


class ProjectionSpace(Strict):
    """When the dense weights are projected, and how. The last step before the decomposition is always followed by a projection."""

    period: Annotated[Number, within(1, 1_000_000, whole=True)] = 20
    """Optimizer steps between projections. At least ten projections per trial pay off; in a long run, thirty or more."""
    start: Annotated[Number, within(0, 1)] = 0.0
    """Share of the steps before the decomposition that pass until the first period begins."""
    until_end: Annotated[Number, within(0, 1), BeforeValidator(_to_the_end)] = 1.0
    """Share of the steps before the decomposition after which periodic projections cease; 1 (or true): never."""
    schedule: Annotated[Choice, one_of("constant", "learning_rate", "removed_energy")] = "constant"
    """How long periods are: all alike (`constant`); by steps weighted with their learning rate (`learning_rate`: as many projections, but
    fewer where steps are small); or, within a factor of four, shorter after a projection that removed more than the key `removed_energy`
    and longer after less (`removed_energy`)."""
    removed_energy: Annotated[Number, within(1e-9, 1)] = 1e-3
    """Mean share of the layers' ||W||² that a projection should remove, for the schedule `removed_energy`."""
    rank_annealing: Annotated[Number, within(0, 1)] = 0.0
    """Share of the steps (from `start` on) over which ranks come down from full to the plan's, fast at first; 0: at once."""
    momentum: Annotated[Choice, one_of("keep", "reset")] = "keep"
    """Whether the optimizer keeps its moments at a projection or resets them."""
    energy_transfer: Switch = False
    """Scale what a projection keeps of a weight so that its energy stays (LRPET, Guo et al. 2024, arXiv 2204.05566)."""
    bn_rectification: Switch = False
    """Choose what a projection keeps by the weight as the BN layer behind it will scale it (LRPET)."""

    @model_validator(mode="after")
    def _in_order(self) -> ProjectionSpace:
        latest, earliest = max(numbers_of(self.start)), min(numbers_of(self.until_end))
        if latest > earliest:
            raise ValueError(f"start {latest:g} is after until_end {earliest:g}")
        return self


class DistillationSpace(Strict):
    """The dense net as the teacher."""

    weight: Annotated[Number, within(0, 1)] = 0.0
    """Share of the loss that comes from the dense net's outputs; 0 turns it off and saves a quarter of the time."""
    temperature: Annotated[Number, within(0.1, 100)] = 8.0
    """Softens both nets' outputs; on CIFAR-10 the gain levels off between 8 and 16."""


class RecipeSpace(Strict):
    """How a trial trains: dense with projections first, then the factors."""

    steps: int = Field(ge=0)
    """Optimizer steps of a trial, over both phases."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per step; the batch size of your own DataLoader overrides it."""
    optimizer: Annotated[Choice, one_of(*OPTIMIZERS)] = "sgd"
    """SGD with Nesterov momentum, or AdamW, which wants a learning rate of its own (about 0.001)."""
    schedule: Annotated[Choice, one_of(*SCHEDULES)] = "cosine"
    """Learning rate after the warm-up: a cosine or a line to 0, steps (a tenth at half, a hundredth at three quarters), or constant."""
    warmup: Annotated[Number, within(0, 1)] = 0.15
    """Share of the steps over which the learning rate rises to its peak; with the cosine this is the one-cycle schedule."""
    lr: Annotated[Number, within(1e-8, 100)] = 0.02
    """Peak of the learning rate."""
    momentum: Annotated[Number, within(0.01, 0.9999)] = 0.9
    """SGD's momentum, or AdamW's first beta."""
    weight_decay: Annotated[Number, within(0, 1)] = 5e-4
    """The optimizer's weight decay, on all weights."""
    label_smoothing: Annotated[Number, within(0, 0.9)] = 0.0
    """Share of the target that is spread over all classes."""
    clip_norm: Annotated[Number, within(0, 1e9)] = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: Annotated[Number, within(0, 0.999999)] = 0.0
    """Decay per step of a moving average of the weights, with which each phase ends; 0: no average."""
    factor_share: Annotated[Number, within(0, 1)] = 0.5
    """Share of the steps that trains the factors after decomposition; 0 is the pure form of Lee et al. 2019, 1 decomposes first."""
    calibration: Annotated[Choice, one_of("none", *FITS)] = "sequential"
    """How the layers that a trial begins with are fitted, at their ranks, to what they compute in the dense net, on some 256 samples: one
    after the other ("sequential"), by their biases alone ("bias"), or not at all ("none"), as in Lee et al. 2019."""
    factor_steps: Annotated[Choice, one_of(*STEPS)] = MATCHED
    """What a learning rate means for factors. "matched": steps on a factor move its layer's weight, on average over directions, as far as
    steps on the dense weight, by dividing its gradient, which AdamW does not notice; "plain": as far as they happen to."""
    factor_lr: Annotated[Number, within(1e-6, 1e6)] = 1.0
    """Learning rate of the factors as a multiple of the schedule's. Under plain steps `cp`, a product of four factors, wants about 0.1."""
    bn_batches: int = Field(default=20, ge=1)
    """Batches, augmented as in training, from which BN statistics are re-estimated."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the training; "auto" is bf16 where that is faster. Weights, projections and scores are fp32 (on a GPU, torch runs
    convs of fp32 in TF32 unless it is told otherwise)."""
    compile: bool = False
    """torch.compile the training step: pays in long trials on a GPU; a trial begins with a minute or more of compilation."""
    projection: ProjectionSpace = ProjectionSpace()
    distillation: DistillationSpace = DistillationSpace()
