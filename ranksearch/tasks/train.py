"""The training loop and the evaluation: data resident on the device, augmentation on tensors, no Python per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import cos, isfinite, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.errors import RanksearchError
from ranksearch.tasks.task import Split, Task

WARMUP_SHARE = 0.15
BF16_FROM_MACS = 5_000_000
"""Below about this many MACs per image a CPU loses more to autocast's casts than bf16 products gain."""


class Diverged(RanksearchError):
    """The loss is no longer finite. A trial turns this into a result."""


def pick_device() -> torch.device:
    """CUDA where there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_bf16(precision: str, device: torch.device, macs: int) -> bool:
    """Whether to train under bf16 autocast: as `precision` says ("bf16", "fp32"), or for "auto" where it is faster.

    "auto" asks for bf16 arithmetic in the hardware and, on a CPU, for a net large enough to gain.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() and macs >= BF16_FROM_MACS


def one_cycle(step: int, total: int, peak: float) -> float:
    """Learning rate at `step` of `total`: linear warm-up over 15 % of the steps, then a cosine to 0."""
    warmup = max(1, round(WARMUP_SHARE * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + cos(pi * (step - warmup) / max(1, total - warmup)))


@dataclass(frozen=True)
class Distillation:
    """Adds the divergence from a teacher's softened outputs to the loss. Reference: Hinton et al. 2015, arXiv 1503.02531."""

    teacher: nn.Module
    weight: float
    temperature: float

    def loss(self, logits: Tensor, x: Tensor, hard: Tensor) -> Tensor:
        """(1 - weight) * hard + weight * T² * KL(teacher || student), logits [N, classes]."""
        with torch.no_grad():
            target = F.log_softmax(self.teacher(x).float() / self.temperature, dim=1)
        student = F.log_softmax(logits / self.temperature, dim=1)
        soft = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.weight) * hard + self.weight * soft


@dataclass(frozen=True)
class Optimisation:
    """Settings of SGD (Nesterov) under `one_cycle`; `total_steps` is the schedule's length, over all phases of a trial."""

    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    total_steps: int
    bf16: bool


@dataclass(frozen=True)
class TrainStats:
    """Mean loss over the last tenth of the steps (at least one; None without steps), images seen, seconds taken."""

    loss: float | None
    images: int
    seconds: float


def index_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled index batches [batch_size]; every epoch is a new order, its ragged end is dropped."""
    batch_size = min(batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def train_(
    model: nn.Module,
    task: Task,
    settings: Optimisation,
    steps: range,
    *,
    generator: torch.Generator,
    distillation: Distillation | None = None,
    after_step: Callable[[int], None] | None = None,
) -> TrainStats:
    """Trains `model` in place for `steps` (positions within the schedule); `after_step(k)` is called with 1, 2, ...

    The model, the task's tensors and the generator lie on one device.

    Raises:
        Diverged: the loss is not finite.
    """
    if len(steps) == 0:
        return TrainStats(loss=None, images=0, seconds=0.0)
    device = task.train.labels.device
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    batches = index_batches(len(task.train), settings.batch_size, generator)
    tail, losses, images = max(1, len(steps) // 10), [], 0
    started = time.perf_counter()
    for done, step in enumerate(steps, start=1):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, settings.total_steps, settings.lr)
        index = next(batches)
        x = task.normalise(task.augment(task.train.images[index], generator))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
            logits = model(x)
            loss = F.cross_entropy(logits.float(), task.train.labels[index])
            if distillation is not None:
                loss = distillation.loss(logits.float(), x, loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        images += len(index)
        # a look at the loss makes a GPU wait: there, only now and then
        if (device.type == "cpu" or done % 50 == 0 or done == len(steps)) and not isfinite(loss.item()):
            raise Diverged(f"the loss is {loss.item()} at step {step + 1} of {settings.total_steps}")
        if len(steps) - done < tail:
            losses.append(loss.detach())
        if after_step is not None:
            after_step(done)
    return TrainStats(torch.stack(losses).mean().item(), images, time.perf_counter() - started)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in percent and mean cross-entropy over a split."""

    accuracy: float
    loss: float


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, task: Task, *, batch_size: int = 500) -> Evaluation:
    """Scores `model` on `split` in fp32, whatever it was trained in: a reported figure does not depend on the hardware's bf16."""
    training = model.training
    model.eval()
    correct, total = 0, 0.0
    for start in range(0, len(split), batch_size):
        labels = split.labels[start : start + batch_size]
        logits = model(task.normalise(split.images[start : start + batch_size])).float()
        correct += int((logits.argmax(1) == labels).sum())
        total += F.cross_entropy(logits, labels, reduction="sum").item()
    model.train(training)
    return Evaluation(accuracy=100 * correct / len(split), loss=total / len(split))


def calibration_batches(task: Task, count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`count` batches of training inputs, augmented as in training, as BN re-estimation wants them.

    The statistics must be those that the weights were trained under. Random crops fill with zeros, and without them the dense
    ResNet-20 itself falls from 99.8 to 95.9 % of 2,000 validation images (20 batches of 128, CPU), a plan at half the FLOPs from
    92.8 to 85.5 %.
    """
    batches = index_batches(len(task.train), batch_size, generator)
    return (task.normalise(task.augment(task.train.images[next(batches)], generator)) for _ in range(count))
