"""How a training updates its weights: the optimizers, and every number of them settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import nn

from ranksearch.tasks.schedule import OPTIMIZER_NAMES, Updates, learning_rate


def _sgd(model: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
        fused=True,
    )


def _adamw(model: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    betas = (settings.momentum, 0.999)
    return torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, fused=True
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, Optimisation], torch.optim.Optimizer]] = dict(
    zip(OPTIMIZER_NAMES, (_sgd, _adamw), strict=True)
)
"""SGD with Nesterov momentum; AdamW, whose first beta is the momentum."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(Updates):
    """How a training updates its weights. `total_steps` is the schedule's length, over all phases of a trial."""

    total_steps: int
    bf16: bool

    @classmethod
    def of(cls, updates: Updates, *, total_steps: int, bf16: bool) -> Optimisation:
        """What a recipe says, for a training of `total_steps`."""
        said = {field.name: getattr(updates, field.name) for field in fields(Updates)}
        return cls(**said, total_steps=total_steps, bf16=bf16)

    def lr_at(self, step: int) -> float:
        return learning_rate(self.schedule, step, self.total_steps, peak=self.lr, warmup=self.warmup)
