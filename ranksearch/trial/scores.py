"""`Scores`: what the nets of a trial score on validation images, told to whoever runs it; the best of them is kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from math import isfinite
from typing import Any

import torch
from torch import nn

from ranksearch.compress import RankPlan, reestimate_bn_
from ranksearch.compress.surgery import compress
from ranksearch.data.parallel import Group
from ranksearch.data.source import calibration_batches
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.copying import copied
from ranksearch.tasks.task import Task
from ranksearch.training.evaluate import Evaluation, evaluate
from ranksearch.training.train import Diverged
from ranksearch.trial.kept import Kept
from ranksearch.trial.reporting import RUNG, Report


class Scores:
    """The scores of one trial, in the order in which they were found."""

    def __init__(
        self, task: Task, batch_size: int, device: torch.device, group: Group, report: Report, *, last: bool
    ) -> None:
        """
        Args:
            task: its data on `device`.
            batch_size: samples per batch that BN statistics are re-estimated on.
            last: the trial's net is its last one: no candidate is kept.
        """
        self._task, self._batch_size, self._device = task, batch_size, device
        self._group, self._report, self._last = group, report, last
        self.history: list[dict[str, Any]] = []
        self.kept: Kept | None = None
        """The best low-rank net so far."""

    def of(self, model: nn.Module) -> Evaluation:
        """What `model` scores, on every rank alike; it is neither told nor kept."""
        return self._group.on_rank_0(lambda: self._evaluate(model))

    def _evaluate(self, model: nn.Module) -> Evaluation:
        """On rank 0 alone, since a metric may be any function of the whole split; its random numbers stay those of the others."""
        with torch.random.fork_rng(devices=[], enabled=self._group.world > 1):
            return evaluate(model, self._task.val, self._task)

    def add(
        self, phase: str, model: nn.Module, step: int, known: Evaluation | None = None, /, *, candidate: bool = False,
        **metrics: float | None,
    ) -> None:  # fmt: skip
        """Scores `model`, adds it to the history and reports it.

        Args:
            candidate: whether it is the trial's low-rank net as it would be if the trial ended here; the best of those is kept.
            known: its score, if it has one already.

        Raises:
            Diverged: a score is not finite.
        """
        found = self.of(model) if known is None else known
        for name, value in (("loss", found.loss), (self._task.metric_name, found.accuracy)):
            if not isfinite(value):
                raise Diverged(f"the validation {name} of the {phase} net is {value}")
        entry = {"phase": phase, "step": step, "val_accuracy": found.accuracy, "val_loss": found.loss}
        entry |= {name: value for name, value in metrics.items() if value is not None}
        self.history.append(entry)
        better = self.kept is None or self.kept.gives_way_to(found, self._task.direction)
        if candidate and better and not self._last:
            self.kept = Kept.of(phase, step, found, model)
        self._tell(entry)

    def add_copy(
        self, phase: str, model: nn.Module, step: int, plan: RankPlan | None, weightings: Mapping[str, Weighting],
        bn_batches: int, candidate: bool = True, starts: Mapping[str, Any] | None = None, /, **metrics: float,
    ) -> None:  # fmt: skip
        """Scores a copy of `model`, decomposed by `plan` where there is one; its draws disturb nothing else.

        Args:
            candidate: as in `add`.
            starts: as `warm` of `compress`.
        """
        with self.aside():
            net = (
                copied(model)
                if plan is None
                else self._group.same_(compress(model, plan, warm=starts, weightings=weightings))
            )
            generator = torch.Generator(self._device).manual_seed(step)
            reestimate_bn_(net, calibration_batches(self._task.train, bn_batches, self._batch_size, generator))
            self.add(phase, net, step, candidate=candidate, **metrics)

    def aside(self) -> AbstractContextManager[None]:
        """Draws within disturb nothing outside."""
        return torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else [])

    def best_of_trial_(self, small: nn.Module) -> nn.Module:
        """The trial's last net with the weights of the best candidate: one low-rank net has one structure throughout."""
        if self.kept is not None:
            small.load_state_dict(self.kept.weights)
        return small

    def report_rungs(self) -> None:
        """Reports again what a checkpoint knows of rungs: a new driver has not heard of it."""
        for entry in self.history:
            if entry["phase"] == RUNG:
                self._tell(entry)

    def _tell(self, entry: dict[str, Any]) -> None:
        """Reports on every rank; where rank 0 is to stop, all do."""
        self._group.agree(lambda: self._report(entry))

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"history": self.history, "kept": self.kept.to_state() if self.kept is not None else None}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `to_state` said."""
        self.history, self.kept = list(state["history"]), Kept.from_state(state.get("kept"))
