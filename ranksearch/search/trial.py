"""The trial: the method from beginning to end. It knows neither Ray nor MLflow; it takes `report`, a plain function.

The same trial runs in-process and on Ray.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any

import torch
from torch import nn

from ranksearch.compress import Net, RankPlan, dense_cost, plan_cost, project_, reestimate_bn_, save_net
from ranksearch.compress.stopwatch import LatencySetting, Stopwatch
from ranksearch.compress.surgery import compress, restructure_
from ranksearch.errors import NonFiniteError
from ranksearch.search.checkpoint import CheckpointFile
from ranksearch.search.place import Place, filling
from ranksearch.search.projecting import Projecting
from ranksearch.search.recipe import Recipe
from ranksearch.tasks.batches import calibration_batches
from ranksearch.tasks.dense import State
from ranksearch.tasks.device import pick_device, use_bf16
from ranksearch.tasks.evaluate import Evaluation, evaluate
from ranksearch.tasks.parallel import ALONE, Group, synchronised
from ranksearch.tasks.task import Task
from ranksearch.tasks.train import Distillation, Diverged, Optimisation, Training, TrainStats

Report = Callable[[dict[str, Any]], None]
RUNG = "rung"
"""The phase of a score that early stopping compares."""
RUNG_BN_BATCHES = 3


class Stopped(Exception):
    """Raised by `report`: the trial has fallen behind at a rung and is to end here."""


@dataclass(frozen=True)
class TrialResult:
    """What a trial found. `val_accuracy` is the task's metric, in percent where that is accuracy; what was not measured is None."""

    status: str  # "complete", "diverged", "stopped", "failed", or "no space": that one is to be run again
    seed: int
    epochs: float
    val_accuracy: float | None = None
    val_loss: float | None = None
    macs: int | None = None
    params: int | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    """Of the dense net's latency, measured in turn with it."""
    images_per_second: float | None = None
    seconds: float | None = None
    projection_share: float | None = None
    """Share of the training time that projections took."""
    reason: str | None = None
    placement: dict[str, Any] | None = None
    """Where it ran (`placement.py`); None of a trial in the driver's own process."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per phase: its name, the step, validation accuracy and loss, what else was found."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """The training curve: step and mean training loss since the point before."""
    projections: list[dict[str, Any]] = field(default_factory=list)
    """Recorded projections: step, loss on one training batch before and after, removed energy (share of ||W||²) per layer."""

    def to_dict(self) -> dict[str, Any]:
        """By name; the lists are the result's own: copies of every point of its curves would take longer than writing them."""
        return {found.name: getattr(self, found.name) for found in fields(self)}


class Session:
    """One trial's data, randomness, settings, report and checkpoint: what the statements of the method are made of."""

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
    ) -> None:
        device = pick_device()
        torch.manual_seed(seed)  # on every rank: they draw the same batches
        if device.type == "cuda":
            torch.cuda.manual_seed(seed + group.rank)  # and drop out other units
        self.task, self.net, self.recipe = task.to(device), net, recipe
        self._device, self._dense, self._report, self._checkpoint = device, dense, report, checkpoint
        self.group = group
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rungs = {round(share * recipe.steps): number for number, share in enumerate(rungs)}
        self.settings = Optimisation(
            optimizer=recipe.optimizer, schedule=recipe.schedule, lr=recipe.lr, warmup=recipe.warmup,
            momentum=recipe.momentum, weight_decay=recipe.weight_decay, batch_size=recipe.batch_size,
            total_steps=recipe.steps, label_smoothing=recipe.label_smoothing, clip_norm=recipe.clip_norm, ema=recipe.ema,
            bf16=use_bf16(recipe.precision, device, dense_cost(net).macs), compile=recipe.compile,
        )  # fmt: skip
        self._distillation = None
        if recipe.distillation.weight > 0:
            teacher = self.dense_net().eval().requires_grad_(False)
            teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._distillation = Distillation(teacher, recipe.distillation.weight, recipe.distillation.temperature)
        self._started = time.perf_counter()
        self.history: list[dict[str, Any]] = []
        self.projections: list[dict[str, Any]] = []
        self.losses: list[dict[str, float]] = []
        self.images, self.seconds, self.projecting_seconds = 0, 0.0, 0.0
        state = group.together(checkpoint.load)
        # another kind of device has other random numbers: there the trial starts anew
        self._resumed = state if state is not None and state["device"] == device.type else None
        if self._resumed is not None:
            self._take_up(self._resumed["session"])

    def _take_up(self, known: dict[str, Any]) -> None:
        self.history, self.projections = list(known["history"]), list(known["projections"])
        self.losses = list(known["losses"])
        self.images, self.seconds, self.projecting_seconds = known["images"], known["seconds"], known["projecting"]
        self._started -= known["elapsed"]

    def report_rungs(self) -> None:
        """Reports again what a checkpoint knows of rungs: a driver that is another one now has not heard of it."""
        for entry in self.history:
            if entry["phase"] == RUNG:
                self._tell(entry)

    def _tell(self, entry: dict[str, Any]) -> None:
        """Reports on every rank; where rank 0 is to stop, all do."""
        self.group.decided(lambda: self._report(entry))

    @property
    def elapsed(self) -> float:
        """Seconds that the trial has taken, in all processes that it was run by."""
        return time.perf_counter() - self._started

    def dense_net(self) -> nn.Module:
        """The dense net with its trained weights, on the device."""
        model = self.task.dense_model()
        model.load_state_dict(self._dense)
        return model.to(self._device)

    def resumes_at(self, phase: str) -> bool:
        """Whether a checkpoint says that the trial was stopped in `phase`, and has not been taken up yet."""
        return self._resumed is not None and self._resumed["phase"] == phase

    def train_(
        self, phase: str, model: nn.Module, steps: range, plan: RankPlan, projecting: Projecting | None = None
    ) -> tuple[Training, TrainStats]:
        """Trains `model` for `steps` of the schedule, from the checkpoint where there is one of this phase."""
        share = self.recipe.factor_lr if phase == "factors" else 1.0
        settings = replace(self.settings, lr=share * self.settings.lr)
        training = Training(
            model, self.task, settings, steps, generator=self._generator, distillation=self._distillation, group=self.group
        )  # fmt: skip
        if self._resumed is not None and self.resumes_at(phase):
            self._go_on(self._resumed, training, projecting)
            self._resumed = None

        def after_step(training: Training) -> None:
            if projecting is not None:
                projecting.after_step(training)
            if (rung := self._rungs.get(steps[training.done - 1] + 1)) is not None:
                self._score_at_rung(rung, training, plan if projecting is not None else None)
            due = self.group.rank == 0 and self._checkpoint.due
            if due and training.done < len(steps):  # what follows a phase needs its last batch
                self._save(phase, training, projecting)

        try:
            with synchronised(model, self.group):
                return training, training.run(after_step)
        finally:  # where it diverged, what was seen until then counts too
            self.images, self.seconds = self.images + training.images, self.seconds + training.seconds
            self.losses += training.losses
            self._note(projecting)

    def _score_at_rung(self, rung: int, training: Training, plan: RankPlan | None) -> None:
        """Scores a copy of the model as it would be if the trial ended here; the training does not notice.

        Args:
            plan: what the copy is projected by; None where the model is factored already.
        """
        started = time.perf_counter()
        step, model = training.steps[training.done - 1] + 1, copy.deepcopy(training.model)
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            if plan is not None:
                project_(model, plan)
            generator = torch.Generator(self._device).manual_seed(step)
            reestimate_bn_(model, calibration_batches(self.task, RUNG_BN_BATCHES, self.recipe.batch_size, generator))
            done = {"epochs": (self.images + training.images) / len(self.task.train), "seconds": self.elapsed}
            training.seconds -= time.perf_counter() - started
            self.score(RUNG, model, step, rung=rung, **done)

    def project_at_last_(self, projecting: Projecting, training: Training) -> None:
        """The projection that the dense training ends on; it counts as training time, like the others."""
        before = projecting.seconds
        projecting.finish(training)
        self.seconds += projecting.seconds - before
        self._note(projecting)

    def _note(self, projecting: Projecting | None) -> None:
        if projecting is not None:
            self.projections, self.projecting_seconds = projecting.records, projecting.seconds

    def _save(self, phase: str, training: Training, projecting: Projecting | None) -> None:
        self._checkpoint.save({
            "phase": phase,
            "training": training.state_dict(),
            "projector": projecting.state_dict() if projecting is not None else None,
            "generator": self._generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self._device.type == "cuda" else None,
            "device": self._device.type,
            "session": {
                "history": self.history, "projections": self.projections, "losses": self.losses, "images": self.images,
                "seconds": self.seconds, "projecting": self.projecting_seconds, "elapsed": self.elapsed,
            },
        })  # fmt: skip

    def _go_on(self, state: dict[str, Any], training: Training, projecting: Projecting | None) -> None:
        training.load_state_dict(state["training"])
        if projecting is not None:
            projecting.load_state_dict(state["projector"])
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self.group.rank == 0:
            torch.cuda.set_rng_state(state["cuda_rng"])

    def reestimate_bn_(self, model: nn.Module) -> None:
        recipe = self.recipe
        reestimate_bn_(model, calibration_batches(self.task, recipe.bn_batches, recipe.batch_size, self._generator))

    def score(self, phase: str, model: nn.Module, step: int, **metrics: float | None) -> None:
        """Evaluates `model` on the validation set, adds it to the history and reports it."""
        found = self.group.together(lambda: self._evaluate(model))
        for name, value in (("loss", found.loss), (self.task.metric_name, found.accuracy)):
            if not isfinite(value):
                raise Diverged(f"the validation {name} of the {phase} net is {value}")
        known = {name: value for name, value in metrics.items() if value is not None}
        entry = {"phase": phase, "step": step, "val_accuracy": found.accuracy, "val_loss": found.loss, **known}
        self.history.append(entry)
        self._tell(entry)

    def _evaluate(self, model: nn.Module) -> Evaluation:
        """On rank 0 alone, since a metric may be any function of the whole split; its random numbers stay those of the others."""
        with torch.random.fork_rng(devices=[], enabled=self.group.world > 1):
            return evaluate(model, self.task.val, self.task)

    def time(self, model: nn.Module, latency: LatencySetting) -> tuple[float, float]:
        """(milliseconds, ratio of the dense net, timed in turn with it)."""
        own, of_dense = Stopwatch(latency).nets_ms([model, self.dense_net()], self.task.example_input)
        return own, own / of_dense

    def same_(self, model: nn.Module) -> nn.Module:
        """The model with rank 0's weights on every rank."""
        self.group.broadcast_([*model.parameters(), *model.buffers()])
        return model


def learn_low_rank(session: Session, plan: RankPlan) -> nn.Module:
    """The method: from the dense net to the trained low-rank net of `plan`.

    Reference: Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145 (projection training); fine-tuning the factors after it is ours.
    """
    recipe, goes_on = session.recipe, session.resumes_at("factors")  # the factors' weights are in the checkpoint then
    small = restructure_(session.dense_net(), plan) if goes_on else train_and_decompose(session, plan)
    if recipe.dense_steps < recipe.steps:
        _, stats = session.train_("factors", small, range(recipe.dense_steps, recipe.steps), plan)
        session.reestimate_bn_(small)
        session.score("factors", small, recipe.steps, train_loss=stats.loss)
    return small


def train_and_decompose(session: Session, plan: RankPlan) -> nn.Module:
    """Trains the dense net under projections, ends on one, so that decomposing changes nothing, and decomposes."""
    recipe, model, steps = session.recipe, session.dense_net(), range(session.recipe.dense_steps)
    if not steps:  # decomposed first: the dense net as it is has no score of its own
        small = session.same_(compress(model, plan))
        session.reestimate_bn_(small)
        session.score("decomposed", small, 0)
        return small
    projecting = Projecting(plan, session.net, recipe.projection, [session.settings.lr_at(step) for step in steps])
    training, stats = session.train_("dense", model, steps, plan, projecting)
    session.reestimate_bn_(model)
    session.score("trained", model, len(steps), train_loss=stats.loss)
    session.project_at_last_(projecting, training)
    session.reestimate_bn_(model)
    session.score("projected", model, len(steps), projections=projecting.count, **projecting.summary())
    # computes the same, so BN's fresh statistics fit
    small = session.same_(compress(model, plan, warm=projecting.projector.warm))
    session.score("decomposed", small, len(steps))
    return small


def run_trial(
    task: Task,
    dense: State,
    net: Net,
    plan: RankPlan,
    recipe: Recipe,
    *,
    seed: int,
    report: Report,
    save_to: Place | None,
    checkpoint: CheckpointFile,
    rungs: Sequence[float] = (),
    latency: LatencySetting | None = None,
    group: Group = ALONE,
) -> TrialResult:
    """Runs the method under `plan` and returns its validation score and costs; the compressed net is written to `save_to`.

    `report` is called with the metrics of each phase, and at `rungs` (shares of the steps) with those of a copy that is projected
    there; it may raise `Stopped`. With `latency` the net is timed so, in turn with the dense one. From `checkpoint`, which must be this
    trial's own, it goes on where it stopped; there it keeps its state, also once it has ended: whoever
    takes its result removes that, for a result that is lost on the way is found again from it. Divergence is a result: a loss or weights
    that are not finite end the trial with status "diverged" and the metrics so far.

    Of a `group` every process runs the trial, each on its part of every batch; rank 0 alone evaluates and writes, and all report alike.
    """
    cost = plan_cost(net, plan)
    status, reason, measured = "complete", None, (None, None)
    session = Session(
        task, dense, net, recipe, seed=seed, report=report, checkpoint=checkpoint, rungs=rungs, group=group
    )
    try:
        session.report_rungs()
        small = learn_low_rank(session, plan)
    except Stopped as stopped:
        status, reason = "stopped", str(stopped)
    except (Diverged, NonFiniteError) as error:
        status, reason = "diverged", str(error)
    else:
        if save_to is not None:
            group.together(lambda: _write_net(small, plan, save_to))
        if latency is not None:
            measured = group.together(lambda: session.time(small, latency))
    last, seconds = session.history[-1] if session.history else {}, session.seconds
    return TrialResult(
        status, seed, session.images / len(task.train), reason=reason,
        history=session.history, projections=session.projections, losses=session.losses,
        val_accuracy=last.get("val_accuracy"), val_loss=last.get("val_loss"),
        macs=cost.macs, params=cost.params, size_bytes=cost.size_bytes, latency_ms=measured[0], latency_ratio=measured[1],
        images_per_second=session.images / seconds if session.images else None,
        projection_share=session.projecting_seconds / seconds if session.images else None,
        seconds=session.elapsed,
    )  # fmt: skip


def _write_net(model: nn.Module, plan: RankPlan, save_to: Place) -> None:
    with filling(save_to) as folder:
        save_net(model, plan, folder)
