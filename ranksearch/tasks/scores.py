"""Losses and metrics: what a batch's outputs are trained on, and what a whole split's outputs are worth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ranksearch.errors import UsageError, shortened
from ranksearch.model.inputs import LOGITS, class_logits, field_of, joined, mapped, moved, own_loss, shape_of

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) of a batch -> mean loss of its samples, a scalar with a gradient."""


class Accumulator(Protocol):
    """A metric fed batch by batch, as torchmetrics has them."""

    def reset(self) -> None: ...

    def update(self, outputs: Any, targets: Any) -> None: ...

    def compute(self) -> Any: ...


MetricFunction = Callable[[Any, Any], Any] | Accumulator
"""A function of the outputs and targets of a whole split, or an accumulator; both are given tensors on the CPU."""


IGNORED = -100
"""A target that counts for nothing, as torch's cross-entropy has it."""


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [N, classes, ...] against class numbers [N, ...]."""
    return F.cross_entropy(class_logits(outputs), targets)


def nets_loss(outputs: Any, targets: Any) -> Tensor:
    """The loss that the net has computed itself from the targets among its inputs.

    Raises:
        UsageError: it returns none.
    """
    if (found := own_loss(outputs)) is None:
        raise UsageError(
            f"The net takes targets but returns no loss ({shape_of(outputs)}): give the task a loss=, a function of (outputs, targets)."
        )
    return found


class Accuracy:
    """Percent of the targets [N, ...] that are the largest of outputs [N, classes, ...]; the metric of a task that names none.

    Targets of -100 are passed over, as by cross-entropy.
    """

    def reset(self) -> None:
        self._right: int | Tensor = 0
        self._total: int | Tensor = 0

    def update(self, outputs: Any, targets: Tensor) -> None:
        counted = targets != IGNORED
        self._right = self._right + ((class_logits(outputs).argmax(1) == targets) & counted).sum()
        self._total = self._total + counted.sum()

    def compute(self) -> float:
        right, total = int(self._right), int(self._total)  # looked at once: a look at every batch would make a GPU wait
        return 100 * right / total if total else float("nan")


class _OnCpu:
    """A user's metric: an accumulator, or a function that sees the whole split at once."""

    def __init__(self, metric: MetricFunction, reads_logits: bool) -> None:
        self._reads_logits = reads_logits
        self._metric: Any = copy.deepcopy(metric) if is_accumulator(metric) else metric
        self._batches: list[tuple[Any, Any]] = []

    def reset(self) -> None:
        self._batches = []
        if is_accumulator(self._metric):
            self._metric.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        if self._reads_logits and isinstance(found := field_of(outputs, LOGITS), Tensor):
            outputs = found
        outputs, targets = moved(outputs, torch.device("cpu")), moved(targets, torch.device("cpu"))
        if is_accumulator(self._metric):
            self._metric.update(outputs, targets)
        else:
            self._batches.append((outputs, targets))

    def compute(self) -> Any:
        if is_accumulator(self._metric):
            return self._metric.compute()
        outputs, targets = (joined(list(parts)) for parts in zip(*self._batches, strict=True))
        return self._metric(outputs, targets)


def is_accumulator(metric: object) -> bool:
    """Whether a metric has the three methods of an accumulator."""
    return all(callable(getattr(metric, name, None)) for name in ("reset", "update", "compute"))


def accumulator(metric: MetricFunction, *, reads_logits: bool) -> Accumulator:
    """A fresh accumulator of a metric.

    Args:
        reads_logits: whether a metric of the user's is given the `logits` of an output that has them, not the output.
    """
    made = copy.copy(metric) if isinstance(metric, Accuracy) else _OnCpu(metric, reads_logits)
    made.reset()
    return made


def as_number(value: Any, name: str) -> float:
    """A metric's value as a float; it may be NaN, which is for the caller to judge.

    Raises:
        UsageError: it is no number.
    """
    found = value.detach() if isinstance(value, Tensor) else value
    if getattr(found, "ndim", 0) == 0 and not isinstance(found, str | bytes):
        try:
            return float(found)
        except (TypeError, ValueError, OverflowError):  # a whole number may be too large
            pass
    shown = (
        f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{shortened(value)} ({type(value).__name__})"
    )
    raise UsageError(f"The metric {name!r} returned {shown}: expected one number for the whole split.")


def in_fp32(outputs: Any) -> Any:
    """A net's outputs in fp32, whatever autocast made of them."""
    return mapped(lambda x: x.float() if x.is_floating_point() else x, outputs)
