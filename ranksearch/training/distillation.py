"""The dense net as the teacher of a net in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.errors import UsageError
from ranksearch.model.inputs import call, class_logits, shape_of
from ranksearch.tasks.scores import IGNORED


@dataclass(frozen=True)
class Distillation:
    """Adds the divergence from a teacher's softened outputs to the loss. Reference: Hinton et al. 2015, arXiv 1503.02531."""

    teacher: nn.Module
    weight: float
    temperature: float

    def loss(self, outputs: Any, inputs: Any, targets: Any, hard: Tensor) -> Tensor:
        """(1 - weight) * hard + weight * T² * KL(teacher || student), a mean over samples and positions.

        Positions whose target is -100 are passed over, as by cross-entropy.

        Args:
            outputs: with logits [N, classes, ...], as `class_logits` reads them.

        Raises:
            UsageError: there is only one class, over which nothing can be softened.
        """
        logits = class_logits(outputs)
        if logits.shape[1] < 2:
            raise UsageError(
                f"recipe.distillation softens class probabilities; this net returns {shape_of(logits)}: leave recipe.distillation.weight "
                f"at 0."
            )
        with torch.no_grad():
            target = F.log_softmax(class_logits(call(self.teacher, inputs)).float() / self.temperature, dim=1)
        student = F.log_softmax(logits / self.temperature, dim=1)
        apart = F.kl_div(student, target, reduction="none", log_target=True).sum(1)
        count: Tensor | int = max(apart.numel(), 1)
        if isinstance(targets, Tensor) and targets.shape == apart.shape:
            counted = targets != IGNORED
            apart, count = torch.where(counted, apart, 0), counted.sum().clamp_min(1)
        soft = apart.sum() / count * self.temperature**2
        return (1 - self.weight) * hard + self.weight * soft
