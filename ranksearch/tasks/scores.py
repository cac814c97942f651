"""Losses and metrics: what a batch's outputs are trained on, and what a whole split's outputs are worth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ranksearch.errors import UsageError

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) of a batch -> mean loss of its samples, a scalar with a gradient."""


class Accumulator(Protocol):
    """A metric fed batch by batch, as torchmetrics has them."""

    def reset(self) -> None: ...

    def update(self, outputs: Any, targets: Any) -> None: ...

    def compute(self) -> Any: ...


Metric = Callable[[Any, Any], Any] | Accumulator
"""A function of the outputs and targets of a whole split, or an accumulator; both are given tensors on the CPU."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [N, classes, ...] against class numbers [N, ...]."""
    return F.cross_entropy(outputs, targets)


class Accuracy:
    """Percent of the targets [N, ...] that are the largest of outputs [N, classes, ...]; the metric of a task that names none."""

    def reset(self) -> None:
        self._right, self._total = 0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._right += int((outputs.argmax(1) == targets).sum())
        self._total += targets.numel()

    def compute(self) -> float:
        return 100 * self._right / self._total


class _OnCpu:
    """A user's metric: an accumulator, or a function that sees the whole split at once."""

    def __init__(self, metric: Metric) -> None:
        self._metric = copy.deepcopy(metric) if is_accumulator(metric) else metric
        self._batches: list[tuple[Any, Any]] = []

    def reset(self) -> None:
        self._batches = []
        if is_accumulator(self._metric):
            self._metric.reset()  # type: ignore[union-attr]

    def update(self, outputs: Any, targets: Any) -> None:
        outputs, targets = moved(outputs, torch.device("cpu")), moved(targets, torch.device("cpu"))
        if is_accumulator(self._metric):
            self._metric.update(outputs, targets)  # type: ignore[union-attr]
        else:
            self._batches.append((outputs, targets))

    def compute(self) -> Any:
        if is_accumulator(self._metric):
            return self._metric.compute()  # type: ignore[union-attr]
        outputs, targets = (_joined(list(parts)) for parts in zip(*self._batches, strict=True))
        return self._metric(outputs, targets)  # type: ignore[operator]


def is_accumulator(metric: object) -> bool:
    """Whether a metric has the three methods of an accumulator."""
    return all(callable(getattr(metric, name, None)) for name in ("reset", "update", "compute"))


def accumulator(metric: Metric) -> Accumulator:
    """A fresh accumulator of a metric."""
    made = copy.copy(metric) if isinstance(metric, Accuracy) else _OnCpu(metric)
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
        except (TypeError, ValueError):
            pass
    shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r} ({type(value).__name__})"
    raise UsageError(f"The metric {name!r} returned {shown[:200]}: expected one number for the whole split.")


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, or tuples, lists and mappings of them, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True) if device.type != "cpu" else value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([moved(part, device) for part in value])
    return value


def in_fp32(outputs: Any) -> Any:
    """A net's outputs in fp32, whatever autocast made of them."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, Mapping):
        return {key: in_fp32(part) for key, part in outputs.items()}
    return type(outputs)(map(in_fp32, outputs)) if type(outputs) in (tuple, list) else outputs


def _joined(parts: list[Any]) -> Any:
    """Batches of one split, joined along their first dimension; what is no tensor stays a list of batches."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.dim() and all(part.shape[1:] == first.shape[1:] for part in parts) else parts
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)([_joined(list(part)) for part in zip(*parts, strict=True)])
    return parts
