"""What is measured on a few batches of any task: the metrics of its layers, and what decomposed layers are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ranksearch.calibration.calibrate import fitted, take_over_
from ranksearch.calibration.drawn import Drawn, drawn_for, predicted
from ranksearch.calibration.weightings import measure_weightings
from ranksearch.compress import Net, RankPlan
from ranksearch.compress.surgery import compress
from ranksearch.data.source import Batch
from ranksearch.lowering import lowering_named
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.inputs import batch_size as size_of
from ranksearch.model.inputs import joined, tensors
from ranksearch.tasks.task import Task
from ranksearch.trial.recipe import Recipe

SAMPLES = 256
"""Training samples that decomposed layers are fitted on, or where batches are small, `BATCHES` of them: these run forward as one, in the
memory that training takes for one."""
BATCHES = 4


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


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the layers that a trial begins with are fitted to its dense net's, as the recipe's `calibration` says; task and models lie on one
    device.

    `weightings` of a method: layer -> the metric in which it is cut.
    """

    task: Task
    net: Net
    recipe: Recipe
    seed: int

    @property
    def is_on(self) -> bool:
        """Whether anything is fitted."""
        return self.recipe.calibration != "none"

    def decomposed(self, model: nn.Module, plan: RankPlan, weightings: Mapping[str, Weighting]) -> nn.Module:
        """`model` decomposed by `plan`, and fitted to what it computes."""
        example = self.task.example_input
        if not self._fits(plan):
            return compress(model, plan, weightings=weightings, example_input=example)
        work, warm = self._fitted(model, plan, weightings)
        return compress(work, plan, example_input=example, warm=warm)

    def start_at_(self, model: nn.Module, plan: RankPlan, weightings: Mapping[str, Weighting]) -> dict[str, Any]:
        """Fits the layers of the dense `model` at the ranks of `plan`: training begins there.

        Returns:
            Layer -> what its next decomposition starts from, where that is an iteration (`cp`).
        """
        if not self._fits(plan):
            return {}
        work, warm = self._fitted(model, plan, weightings)
        take_over_(model, work, plan)
        return {name: start for name, start in warm.items() if not lowering_named(plan[name].lowering).is_projection}

    def _fits(self, plan: RankPlan) -> bool:
        return self.is_on and next(plan.lowered(), None) is not None

    def _fitted(
        self, model: nn.Module, plan: RankPlan, weightings: Mapping[str, Weighting]
    ) -> tuple[nn.Module, dict[str, Any]]:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(self.seed)
        stream = self.task.train.stream(self.recipe.batch_size, generator)
        batches = [next(stream)[0]]
        while len(batches) < BATCHES and len(batches) * size_of(batches[0]) < SAMPLES:
            batches.append(next(stream)[0])
        return fitted(
            model, self.net, plan, in_one(batches), self.recipe.calibration, weightings=weightings, seed=self.seed
        )


def in_one(batches: list[Any]) -> list[Any]:
    """The batches as a single one, which takes less time; as they are where their samples have several shapes."""
    first = batches[0]
    parts = first.values() if isinstance(first, Mapping) else first if isinstance(first, tuple | list) else [first]
    if len(batches) == 1 or not all(isinstance(part, torch.Tensor) for part in parts):
        return batches
    whole = joined(batches)
    count, found = sum(map(size_of, batches)), tensors(whole)
    return [whole] if len(found) == len(tensors(first)) and all(len(it) == count for it in found) else batches
