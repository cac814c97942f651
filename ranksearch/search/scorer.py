"""`Scorer`: what a net under a plan scores without any training."""

from __future__ import annotations

import torch

from ranksearch.compress import RankPlan, reestimate_bn_
from ranksearch.compress.surgery import compress
from ranksearch.tasks.batches import calibration_batches
from ranksearch.tasks.device import pick_device
from ranksearch.tasks.evaluate import Evaluation, evaluate
from ranksearch.tasks.task import Split, Task


class Scorer:
    """Scores a net under plans: decomposition, BN re-estimation on augmented training images, evaluation; no training."""

    def __init__(self, task: Task, model: torch.nn.Module, split: Split, *, bn_batches: int, batch_size: int) -> None:
        device = pick_device()
        self.task, self.split, self.device = task.without_test().to(device), split.to(device), device
        self.model = model.to(device).eval()
        self._bn_batches, self._batch_size = bn_batches, batch_size

    def __call__(self, plan: RankPlan) -> Evaluation:
        """Accuracy in percent and loss; every plan sees the same images."""
        small = compress(self.model, plan)
        if next(plan.lowered(), None) is not None:
            generator = torch.Generator(self.device).manual_seed(0)
            reestimate_bn_(small, calibration_batches(self.task, self._bn_batches, self._batch_size, generator))
        return evaluate(small, self.split, self.task)
