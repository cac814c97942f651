"""`Scorer`: what a net under a plan scores without any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ranksearch.compress import LayerPlan, RankPlan, reestimate_bn_
from ranksearch.compress.projection import iterated
from ranksearch.compress.surgery import compress
from ranksearch.data.source import Source, calibration_batches
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.slots import slots_of
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
        self._results: dict[tuple[str, LayerPlan], tuple[Tensor, Any]] = {}

    def __call__(self, plan: RankPlan) -> Evaluation:
        """Metric and loss; every plan sees the same samples."""
        if next(plan.lowered(), None) is None:
            return evaluate(self.model, self.split, self.task)
        with self._iterated(plan) as warm:
            small = compress(self.model, plan, warm=warm, weightings=self._weightings)
        return self.score(small)

    def score(self, small: torch.nn.Module) -> Evaluation:
        """Metric and loss of a net that is decomposed already, with BN statistics of the same batches."""
        generator = torch.Generator(self.device).manual_seed(0)
        reestimate_bn_(small, calibration_batches(self.task.train, self._bn_batches, self._batch_size, generator))
        return evaluate(small, self.split, self.task)

    @contextmanager
    @torch.no_grad()
    def _iterated(self, plan: RankPlan) -> Iterator[dict[str, Any]]:
        """Within, layers whose decomposition is an iteration (`cp`) hold its result; yields the terms that it is made of.

        Many plans share a layer's choice: each choice is iterated once.
        """
        new = {name: choice for name, choice in plan.lowered() if (name, choice) not in self._results}
        self._results |= {(name, new[name]): found for name, found in iterated(self.model, RankPlan(new)).items()}
        results = {name: self._results[name, c] for name, c in plan.lowered() if (name, c) in self._results}
        before = []
        try:
            for name, (slot, _) in slots_of(self.model, RankPlan({name: plan[name] for name in results})).items():
                if not slot.is_made:  # else the decomposition goes on from the terms
                    before.append((slot, slot.weight.detach().clone()))
                    slot.write_(results[name][0])
            yield {name: terms for name, (_, terms) in results.items()}
        finally:
            for slot, weight in before:
                slot.write_(weight)
