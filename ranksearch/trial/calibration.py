"""Batches to calibrate on, and the loss whose gradients they are differentiated by, of any task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ranksearch.allocate.drawn import Drawn, drawn_for, predicted
from ranksearch.allocate.weightings import measure_weightings
from ranksearch.compress import Net
from ranksearch.compress.inputs import batch_size as size_of
from ranksearch.lowering.weighting import Weighting
from ranksearch.tasks.source import Batch
from ranksearch.tasks.task import Task


class PairedBatches:
    """Calibration batches of a task: inputs to run, and the loss of what comes out against targets that are `drawn` or, where that is None,
    against their own.

    The loss is asked for after each batch, before the next is drawn.
    """

    def __init__(
        self, task: Task, count: int, batch_size: int, generator: torch.Generator, drawn: Drawn | None
    ) -> None:
        self._task, self._count, self._drawn = task, count, drawn
        self._stream = task.train.stream(batch_size, generator)
        self._batch: Batch | None = None

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            self._batch = next(self._stream)
            yield self._batch[0]

    def loss(self, outputs: Any) -> torch.Tensor:
        """The sum of the last batch's losses."""
        assert self._batch is not None
        assert self._task.loss is not None
        inputs, targets = self._batch
        found = predicted(outputs)
        if self._drawn is not None and found is not None:
            return self._drawn(found, targets)
        return self._task.loss(outputs, targets) * size_of(inputs)


def paired_batches(
    task: Task,
    count: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    generator: torch.Generator,
    *,
    balanced: bool = False,
) -> PairedBatches:
    """`count` batches of augmented training inputs, always the same ones of a seed, with the loss that suits the task.

    Args:
        task: its data on `device`.
        generator: of the targets that are drawn.
        balanced: every class counts alike.
    """
    drawn = drawn_for(None if task.cross_entropy else task.loss, generator, balanced=balanced)
    return PairedBatches(task, count, batch_size, torch.Generator(device).manual_seed(seed), drawn)


def metric_of(
    task: Task, model: nn.Module, net: Net, metric: str, *, count: int, batch_size: int, seed: int, device: torch.device
) -> dict[str, Weighting]:
    """Layer of `net` -> its weighting in a metric of the data, from `count` batches; task and model on `device`."""
    paired = paired_batches(task, count, batch_size, seed, device, torch.Generator().manual_seed(seed))
    return measure_weightings(model, net, paired, metric, seed=seed, loss=paired.loss)
