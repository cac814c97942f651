"""`Scorer`: what a net under a plan scores without any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ranksearch.compress import LayerPlan, Projector, RankPlan, reestimate_bn_
from ranksearch.compress.surgery import compress
from ranksearch.data.source import Source, calibration_batches
from ranksearch.lowering import lowering_named
from ranksearch.lowering.weighting import Weighting
from ranksearch.tasks.task import Task
from ranksearch.training.device import pick_device
from ranksearch.training.evaluate import Evaluation, evaluate


class Scorer:
    """Scores a net under plans: decomposition, BN re-estimation on augmented training images, evaluation; no training."""

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        split: Source,
        *,
        bn_batches: int,
        batch_size: int,
        weightings: Mapping[str, Weighting] | None = None,
    ) -> None:
        """
        Args:
            weightings: layer -> the metric in which it is decomposed.
        """
        device = pick_device()
        self.task, self.split, self.device = task.without_test().to(device), split.to(device), device
        self.model = model.to(device).eval()
        self._bn_batches, self._batch_size, self._weightings = bn_batches, batch_size, weightings
        self._starts: dict[tuple[str, LayerPlan], Any] = {}

    def __call__(self, plan: RankPlan) -> Evaluation:
        """Metric and loss; every plan sees the same samples."""
        if next(plan.lowered(), None) is None:
            return evaluate(self.model, self.split, self.task)
        return self.score(compress(self.model, plan, warm=self._started(plan), weightings=self._weightings))

    def score(self, small: torch.nn.Module) -> Evaluation:
        """Metric and loss of a net that is decomposed already, with BN statistics of the same batches."""
        generator = torch.Generator(self.device).manual_seed(0)
        reestimate_bn_(small, calibration_batches(self.task.train, self._bn_batches, self._batch_size, generator))
        return evaluate(small, self.split, self.task)

    def _started(self, plan: RankPlan) -> dict[str, Any]:
        """Where decompositions that are iterations (`cp`) begin: many plans share a layer's choice, and each choice is iterated once."""
        iterated = {
            name: choice for name, choice in plan.lowered() if not lowering_named(choice.lowering).is_projection
        }
        if new := {name: choice for name, choice in iterated.items() if (name, choice) not in self._starts}:
            found = Projector(RankPlan(new)).starts(self.model)
            self._starts |= {(name, choice): found[name] for name, choice in new.items()}
        return {name: self._starts[name, choice] for name, choice in iterated.items()}
