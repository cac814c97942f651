"""Scores of a net on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ranksearch.data.source import Source
from ranksearch.lowering.pivoted_layers import merged_pivots
from ranksearch.model.inputs import batch_size as samples_of
from ranksearch.model.inputs import call
from ranksearch.tasks.scores import accumulator, as_number, in_fp32
from ranksearch.tasks.task import Task

CPU_BATCH, GPU_BATCH = 125, 500
"""On a CPU, small batches keep their maps in its caches: chains of small layers are then twice as fast as in batches of 500."""


@dataclass(frozen=True)
class Evaluation:
    """The task's metric, in its own unit (of most tasks accuracy in percent), and the mean loss of a split's samples."""

    accuracy: float
    loss: float

    def is_above(self, other: Evaluation, direction: str) -> bool:
        """Whether it is better by the metric, whose `direction` it is, or between equals by the loss."""
        sign = 1 if direction == "maximize" else -1
        return (sign * self.accuracy, -self.loss) > (sign * other.accuracy, -other.loss)


@torch.inference_mode()
@merged_pivots(kept=True)
def evaluate(model: nn.Module, source: Source, task: Task) -> Evaluation:
    """Scores `model` on `source` in fp32, whatever it was trained in: a reported figure does not depend on the hardware's bf16.

    Raises:
        UsageError: the task's metric is no number.
    """
    assert task.metric is not None
    assert task.metric_name is not None
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch_size = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    loss = task.loss_on(device)
    metric, samples = accumulator(task.metric, reads_logits=task.reads_logits), 0
    total: torch.Tensor | float = 0.0  # looked at once: a look at every batch would make a GPU wait
    for inputs, targets in source.in_order(batch_size):
        outputs = in_fp32(call(model, inputs))
        metric.update(outputs, targets)
        count = samples_of(inputs)
        total = total + loss(outputs, targets).double() * count
        samples += count
    model.train(training)
    return Evaluation(accuracy=as_number(metric.compute(), task.metric_name), loss=float(total) / samples)
