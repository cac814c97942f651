"""Scores of a net on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ranksearch.tasks.task import Split, Task

CPU_BATCH, GPU_BATCH = 125, 500
"""On a CPU small batches keep their maps in its caches: chains of small layers are twice as fast so as in batches of 500."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in percent and mean cross-entropy over a split."""

    accuracy: float
    loss: float


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, task: Task) -> Evaluation:
    """Scores `model` on `split` in fp32, whatever it was trained in: a reported figure does not depend on the hardware's bf16."""
    training = model.training
    model.eval()
    batch_size = CPU_BATCH if split.images.device.type == "cpu" else GPU_BATCH
    correct, total = 0, 0.0
    for start in range(0, len(split), batch_size):
        labels = split.labels[start : start + batch_size]
        logits = model(task.normalise(split.images[start : start + batch_size])).float()
        correct += int((logits.argmax(1) == labels).sum())
        total += F.cross_entropy(logits, labels, reduction="sum").item()
    model.train(training)
    return Evaluation(accuracy=100 * correct / len(split), loss=total / len(split))
