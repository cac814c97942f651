"""`Session`: one trial's data, randomness, settings, scores and checkpoint, of which the statements of the method are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ranksearch.compress import Net, RankPlan, dense_cost, reestimate_bn_
from ranksearch.compress.factor_steps import MATCHED, match_steps_, reaches
from ranksearch.data.parallel import Group, synchronised
from ranksearch.data.source import calibration_batches
from ranksearch.deploy.stopwatch import LatencySetting, Stopwatch
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.slots import settled_
from ranksearch.tasks.task import Task
from ranksearch.training.dense import State
from ranksearch.training.device import channels_last_, pick_device, use_bf16
from ranksearch.training.distillation import Distillation
from ranksearch.training.evaluate import Evaluation
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Diverged, Passes, Training, TrainStats, once
from ranksearch.trial.calibration import Calibration, metric_of
from ranksearch.trial.candidate import MetricSetting
from ranksearch.trial.checkpoint import CheckpointFile
from ranksearch.trial.levels import Levels
from ranksearch.trial.mixture import best_cut
from ranksearch.trial.projecting import Projecting
from ranksearch.trial.recipe import Recipe
from ranksearch.trial.reporting import LAST, RUNG, UNTRAINED, Report, Watch
from ranksearch.trial.scores import Scores

RUNG_BN_BATCHES = 3


@contextmanager
def _untimed(training: Training) -> Iterator[None]:
    """What is done within takes no training time."""
    started = time.perf_counter()
    try:
        yield
    finally:
        training.seconds -= time.perf_counter() - started


class Session:
    """One trial's data, randomness, settings, scores and checkpoint: what the statements of the method are made of."""

    def __init__(
        self,
        task: Task,
        dense: State,
        net: Net,
        recipe: Recipe,
        *,
        seed: int,
        report: Report,
        checkpoint: CheckpointFile,
        rungs: Sequence[float],
        group: Group,
        watch: Watch,
        metric: MetricSetting | None = None,
        drawn: int = 1,
        start: State | None = None,
        shares: Sequence[float] = (1.0,),
        last: bool = False,
    ) -> None:
        device = pick_device()
        torch.manual_seed(seed)  # on every rank: they draw the same batches
        if device.type == "cuda":
            torch.cuda.manual_seed(seed + group.rank)  # and drop out other units
        self.task, self.net, self.recipe = task.to(device), net, recipe
        self._device, self._dense, self._checkpoint = device, dense, checkpoint
        self._start, self._shares = start, shares
        self.group, self.seed, self.drawn = group, seed, drawn
        self._metric, self._calibration = metric, Calibration(self.task, net, recipe, seed)
        self._watch, self._last = watch, last
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rungs = {round(share * recipe.steps): number for number, share in enumerate(rungs)}
        bf16 = use_bf16(recipe.precision, device, dense_cost(net).macs)
        self.settings = Optimisation.of(recipe, total_steps=recipe.steps, bf16=bf16)
        self._distillation = None
        if recipe.distillation.weight > 0:
            teacher = self._net_of(dense).eval().requires_grad_(False)
            self._distillation = Distillation(
                channels_last_(teacher), recipe.distillation.weight, recipe.distillation.temperature
            )
        self._started = time.perf_counter()
        self.scores = Scores(self.task, recipe.batch_size, device, group, report, last=last)
        self.projections: list[dict[str, Any]] = []
        self.losses: list[dict[str, float]] = []
        self.images, self.seconds, self.projecting_seconds = 0, 0.0, 0.0
        self.eager: str | None = None
        self._reaches: dict[str, float] = {}
        self.starts: dict[str, Any] = {}
        """Layer -> where the first decomposition of what training begins with starts, if that is an iteration."""
        state = group.on_rank_0(checkpoint.load)
        # another kind of device has other random numbers: there the trial starts anew
        self._resumed = state if state is not None and state["device"] == device.type else None
        if self._resumed is not None:
            self._take_up(self._resumed["session"])

    def _take_up(self, known: dict[str, Any]) -> None:
        self.scores.take_up(known)
        self.projections, self.losses = list(known["projections"]), list(known["losses"])
        self.images, self.seconds, self.projecting_seconds = known["images"], known["seconds"], known["projecting"]
        self._started -= known["elapsed"]
        self._reaches = known.get("reaches", {})

    @property
    def elapsed(self) -> float:
        """Seconds that the trial has taken, in all processes that it was run by."""
        return time.perf_counter() - self._started

    def dense_net(self) -> nn.Module:
        """The dense net with the weights that the trial starts from, on the device."""
        return self._net_of(self._dense if self._start is None else self._start)

    def _net_of(self, weights: State) -> nn.Module:
        model = self.task.dense_model()
        model.load_state_dict(weights)
        return model.to(self._device)

    @property
    def metric_refresh(self) -> int | None:
        """How many projections pass until the metric is measured anew; None without one."""
        return self._metric.refresh if self._metric is not None else None

    def weightings(self, plan: RankPlan, model: nn.Module) -> dict[str, Weighting]:
        """The metric of the data as `model` sees them now, for the layers that `plan` lowers; empty in the metric of weights."""
        if self._metric is None:
            return {}
        lowered = {name for name, _ in plan.lowered()}
        net = replace(self.net, layers=tuple(layer for layer in self.net.layers if layer.name in lowered))
        return metric_of(
            self.task, model, net, self._metric.kind, count=self._metric.batches, batch_size=self.recipe.batch_size,
            seed=self.seed, device=self._device,
        )  # fmt: skip

    def resumes_at(self, phase: str) -> bool:
        """Whether a checkpoint says that the trial was stopped in `phase`, and has not been taken up yet."""
        return self._resumed is not None and self._resumed["phase"] == phase

    def train_(
        self,
        phase: str,
        model: nn.Module,
        steps: range,
        plan: RankPlan,
        projecting: Projecting | Levels | None = None,
        *,
        passes: Passes = once,
        look: Callable[[Training], None] | None = None,
    ) -> tuple[Training, TrainStats]:
        """Trains `model` for `steps` of the schedule, from the checkpoint where there is one of this phase.

        Args:
            projecting: what is done to the weights after a step, whose state goes into the checkpoint.
            passes: the forward and backward passes of a step.
            look: what else is done after a step, aside: it takes no training time.
        """
        if phase == "factors":
            self._match_steps_(model)
        training = self.training_(model, steps, lr=self.recipe.factor_lr if phase == "factors" else 1.0, passes=passes)
        if self._resumed is not None and self.resumes_at(phase):
            self._go_on(self._resumed, training, projecting)
            self._resumed = None

        def after_step(training: Training) -> None:
            self._watch(steps.start + training.done)
            if projecting is not None:
                projecting.after_step(training)
            with _untimed(training):
                if look is not None:
                    look(training)
                if (rung := self._rungs.get(steps[training.done - 1] + 1)) is not None:
                    self._score_at_rung(
                        rung, training, plan, projecting if isinstance(projecting, Projecting) else None
                    )
                if phase == "factors" and self.recipe.ema > 0 and training.done == len(steps):
                    self.scores.add_copy(LAST, training.model, steps.stop, None, {}, self.recipe.bn_batches)
            due = self.group.rank == 0 and self._checkpoint.due
            if due and training.done < len(steps):  # what follows a phase needs its last batch
                self._save(phase, training, projecting)

        try:
            with synchronised(model, self.group):
                return training, training.run(after_step)
        finally:  # where it diverged, what was seen until then counts too
            self.images, self.seconds = self.images + training.images, self.seconds + training.seconds
            self.losses += training.curve.points
            self.eager = self.eager or training.eager or training.between
            self._note(projecting)

    def _match_steps_(self, small: nn.Module) -> None:
        """Scales the factors' gradients by what their layers were when their training began."""
        if self.recipe.factor_steps == MATCHED:
            if not self.resumes_at("factors"):
                self._reaches = reaches(small)
            match_steps_(small, self._reaches)

    def training_(self, model: nn.Module, steps: range, *, lr: float = 1.0, passes: Passes = once) -> Training:
        """`model` in training, at the share `lr` of the learning rate."""
        settings = replace(self.settings, lr=lr * self.settings.lr)
        return Training(
            model, self.task, settings, steps, generator=self._generator, distillation=self._distillation, group=self.group,
            passes=passes,
        )  # fmt: skip

    def decomposed(self, plan: RankPlan) -> tuple[nn.Module, Evaluation | None, float | None]:
        """The net that the trial starts from, decomposed, with fresh BN statistics. Of a nested run's weights it is the best mixture with
        the dense net's: then its score and the run's share are given, too.
        """
        drawn = self._generator.get_state()

        def cut(weights: State) -> nn.Module:
            self._generator.set_state(drawn)
            model = settled_(self._net_of(weights), plan)
            small = self.group.same_(self._calibration.decomposed(model, plan, self.weightings(plan, model)))
            self.reestimate_bn_(small)
            return small

        if self._start is None:
            return cut(self._dense), None, None
        return best_cut(cut, self.scores.of, self._start, self._dense, self.task.direction, self._shares)

    def starting_net(self, plan: RankPlan) -> nn.Module:
        """The dense net that training begins with: as it is, or fitted at the ranks of `plan`, as the recipe's `calibration` says."""
        model = settled_(self.dense_net(), plan)
        if self._calibration.is_on and not self.resumes_at("dense"):
            with self.scores.aside():
                self.starts = self._calibration.start_at_(model, plan, self.weightings(plan, model))
        return self.group.same_(model)

    def score_untrained(self, model: nn.Module, plan: RankPlan) -> None:
        """Scores the net that training begins with, so that training never makes a trial worse than none; once, and aside as a rung is.

        A net whose outputs are not finite then is no candidate: training may mend it.
        """
        if not self._last and not any(entry["phase"] == UNTRAINED for entry in self.scores.history):
            # what is fitted has its ranks, and is the same product in every metric
            weightings = {} if self._calibration.is_on else self.weightings(plan, model)
            with suppress(Diverged):
                self.scores.add_copy(UNTRAINED, model, 0, plan, weightings, self.recipe.bn_batches, True, self.starts)

    def _score_at_rung(self, rung: int, training: Training, plan: RankPlan, projecting: Projecting | None) -> None:
        """Scores a copy of the model as it would be if the trial ended here; the training does not notice.

        Args:
            plan: what the copy is decomposed by, in the metric of `projecting`, which is None where the model is factored already.
        """
        step = training.steps[training.done - 1] + 1
        done = {"epochs": (self.images + training.images) / len(self.task.train), "seconds": self.elapsed}
        plan_of, weightings = (None, {}) if projecting is None else (plan, projecting.projector.weightings)
        self.scores.add_copy(RUNG, training.model, step, plan_of, weightings, RUNG_BN_BATCHES, rung=rung, **done)

    def look_at(self, phase: str, model: nn.Module, step: int, plan: RankPlan, **metrics: float) -> None:
        """Scores a net that would be cut from `model` as it is; it is not the trial's own."""
        self.scores.add_copy(phase, model, step, plan, {}, RUNG_BN_BATCHES, False, **metrics)

    def project_at_last_(self, projecting: Projecting, training: Training) -> None:
        """The projection that the dense training ends on; it counts as training time, like the others."""
        before = projecting.seconds
        projecting.finish(training)
        self.seconds += projecting.seconds - before
        self._note(projecting)

    def _note(self, projecting: Projecting | Levels | None) -> None:
        if projecting is not None:
            self.projections, self.projecting_seconds = projecting.records, projecting.seconds

    def _save(self, phase: str, training: Training, projecting: Projecting | Levels | None) -> None:
        self._checkpoint.save({
            "phase": phase,
            "training": training.state_dict(),
            "projector": projecting.state_dict() if projecting is not None else None,
            "generator": self._generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self._device.type == "cuda" else None,
            "device": self._device.type,
            "session": {
                **self.scores.to_state(), "projections": self.projections, "losses": self.losses, "images": self.images,
                "seconds": self.seconds, "projecting": self.projecting_seconds, "elapsed": self.elapsed,
                "reaches": self._reaches,
            },
        })  # fmt: skip

    def _go_on(self, state: dict[str, Any], training: Training, projecting: Projecting | Levels | None) -> None:
        training.load_state_dict(state["training"])
        if projecting is not None:
            projecting.load_state_dict(state["projector"])
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self.group.rank == 0:
            torch.cuda.set_rng_state(state["cuda_rng"])

    def reestimate_bn_(self, model: nn.Module) -> None:
        recipe = self.recipe
        reestimate_bn_(
            model, calibration_batches(self.task.train, recipe.bn_batches, recipe.batch_size, self._generator)
        )

    def time(self, model: nn.Module, latency: LatencySetting) -> tuple[float, float]:
        """(milliseconds, ratio of the dense net, timed in turn with it)."""
        assert self.task.example_input is not None
        own, of_dense = Stopwatch(latency).nets_ms([model, self.dense_net()], self.task.example_input)
        return own, own / of_dense
