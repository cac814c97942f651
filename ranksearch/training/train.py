"""The training loop, over the batches of whatever source a task has.

A `Training` can be saved in the middle and taken up again as if it had not stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ranksearch.data.parallel import ALONE, Group
from ranksearch.data.resident import ResidentStream
from ranksearch.data.source import Batch
from ranksearch.errors import RanksearchError
from ranksearch.lowering.pivoted_layers import merged_pivots
from ranksearch.model.inputs import batch_size, call, class_logits, device_of, mapped, shape_of, tensors
from ranksearch.tasks.scores import in_fp32
from ranksearch.tasks.task import Task
from ranksearch.training.both_ways import difference
from ranksearch.training.capture import Recorder, Replayed, recorder_for
from ranksearch.training.device import channels_last_
from ranksearch.training.distillation import Distillation
from ranksearch.training.loss_curve import LossCurve
from ranksearch.training.optimisation import OPTIMIZERS, Optimisation


class Diverged(RanksearchError):
    """The loss is no longer finite. A trial turns this into a result."""


@dataclass(frozen=True)
class TrainStats:
    """Mean loss over the last tenth of the steps (at least one; None without steps), images (samples) seen, seconds taken."""

    loss: float | None
    images: int
    seconds: float


Passes = Callable[[int], Iterable[float]]
"""Step of the schedule -> the share in its loss of each of its passes; the weights may change between them (`compress/nesting.py`)."""


def once(step: int) -> Iterable[float]:
    """One pass, with the weights as they are."""
    return (1.0,)


class Training:
    """A model in training, for `steps` (positions within the schedule). The model, the task's tensors and the generator lie on one device.

    `state_dict` holds everything but the generators: weights, optimizer, data order, average, progress.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Optimisation,
        steps: range,
        *,
        generator: torch.Generator,
        distillation: Distillation | None = None,
        group: Group = ALONE,
        passes: Passes = once,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            passes: the forward and backward passes of a step.
            group: the processes that train together, each on its part of a batch, by the mean gradient; losses are the whole batch's.
            recorder: records steps and replays them; left out, the device's own; a CPU has none.
        """
        self.model = channels_last_(model).train()
        self.settings, self.steps, self.done = settings, steps, 0
        self._task, self._distillation, self.group, self._passes = task, distillation, group, passes
        self.optimizer = OPTIMIZERS[settings.optimizer](model, settings)
        self._stream = task.train.stream(settings.batch_size, generator, group)
        self._average = None
        if settings.ema > 0:
            self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self._forward: Callable[..., Any] = model
        if settings.compile:
            torch._dynamo.reset()  # after eight recompilations in one process it would fall back to eager in silence
            self._forward = torch.compile(model)
        self.curve = LossCurve(settings.total_steps, len(steps))
        self.images, self.seconds = 0, 0.0
        self._last: Batch | None = None
        device = next(model.parameters()).device
        self._recorder, self._generator = recorder or recorder_for(device, [generator]), generator
        self.eager: str | None = None
        """Why steps are not replayed as one graph; None where they are, or there is no GPU."""
        self.between: str | None = None
        """The same for what is done between steps, such as projections."""
        if self._recorder is not None and (group.world > 1 or settings.compile):
            self.eager = "several processes train it" if group.world > 1 else "torch.compile records by itself"
        if self._recorder is not None and passes is not once:
            self.eager = "a step has several passes, with other weights in each"
        self._replayed = Replayed(self._recorder) if self._recorder is not None and self.eager is None else None
        self._others: dict[int, tuple[object, Replayed]] = {}
        # where these are recorded they stay in place; a GPU's fused optimizers read fp32
        self._rate = torch.zeros((), device=device, dtype=torch.float32 if device.type == "cuda" else torch.float64)
        self._held: Any = None
        self._loss_of_step = torch.zeros((), device=device)

    @merged_pivots()
    def run(self, after_step: Callable[[Training], None] | None = None) -> TrainStats:
        """Trains until the steps are done; `after_step` may project the weights, or save the state.

        Raises:
            Diverged: the loss is not finite.
        """
        total = len(self.steps)
        while self.done < total:
            started = time.perf_counter()
            loss = self._step()
            self.done += 1
            at = self.steps[self.done - 1] + 1
            self.curve.add(loss.detach(), at, total - self.done)
            # a look at the loss makes a GPU wait: there, only now and then
            if loss.device.type == "cpu" or self.done % 50 == 0 or self.done == total:
                if not isfinite(loss.item()):
                    raise Diverged(f"the loss is {loss.item()} by step {at} of {self.settings.total_steps}")
                self.curve.settle()
            if after_step is not None:
                after_step(self)
            self.seconds += time.perf_counter() - started
        if self._average is not None and total:
            self._take_average_()
        return TrainStats(self.curve.mean_of_tail, self.images, self.seconds)

    def _step(self) -> Tensor:
        rate = self.settings.lr_at(self.steps[self.done])
        self._last = None
        if self._replayed is not None and (loss := self._replayed_step(self._replayed, rate)) is not None:
            return loss
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._last = self._last or next(self._stream)
        loss = self._descend(*self._last)
        if self._average is not None:
            self._average.update_parameters(self.model)
        self.images += batch_size(self._last[0]) * self.group.world
        return loss

    def _descend(self, inputs: Any, targets: Any) -> Tensor:
        """A step downhill on a batch; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for share in self._passes(self.steps[self.done]):
            loss = share * self._loss(self._forward, inputs, targets)
            loss.backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        self.group.average_([loss, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        if self.settings.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return loss

    def _replayed_step(self, replayed: Replayed, rate: float) -> Tensor | None:
        """A step on tensors that stay where they are: the batch (for data in memory, its index), the learning rate, the loss.

        None where this step has to be made the usual way: its batch, now `_last`, has another form, or there is no recording at all.
        """
        if replayed.reason is not None:
            self.eager, self._replayed = replayed.reason, None
            return None
        drawn: Any = self._stream.draw() if isinstance(self._stream, ResidentStream) else next(self._stream)
        if self._held is None and not _only_tensors(drawn):
            self.eager, self._replayed, self._last = "its batches hold more than tensors", None, drawn
            return None
        if self._held is None:
            self._held = mapped(torch.clone, drawn)
        elif not _takes(self._held, drawn):
            self._last = drawn
            return None
        else:
            for held, new in zip(tensors(self._held), tensors(drawn), strict=True):
                held.copy_(new, non_blocking=True)
        self._rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
            if "capturable" in group and self._rate.is_cuda:
                group["capturable"] = True
        if replayed.is_warm and not replayed.is_recorded:
            self._step_both_ways(replayed)
        else:
            replayed(self._recorded)
        self._last = self._batch_of_step
        self.images += batch_size(self._last[0])
        return self._loss_of_step.clone()

    def _recorded(self) -> None:
        """What is recorded of a step."""
        held = self._held
        self._batch_of_step: Batch = self._stream.made(held) if isinstance(self._stream, ResidentStream) else held
        self._loss_of_step = self._descend(*self._batch_of_step)
        if self._average is not None:
            _average_(self._average, self.model, self.settings.ema)

    def _step_both_ways(self, replayed: Replayed) -> None:
        """The step that is recorded: made step by step, undone, and replayed. Where the two differ, no other one is replayed."""
        recorder, losses = self._recorder, list[Tensor]()
        assert recorder is not None
        nets = [self.model] if self._average is None else [self.model, self._average.module]
        memory = [tensor for net in nets for tensor in (*net.parameters(), *net.buffers())]
        memory += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]

        def by_hand() -> None:
            recorder.warm(self._recorded)
            losses.append(self._loss_of_step.clone())

        def by_replay() -> bool:
            replayed(self._recorded)
            return replayed.is_recorded

        reason = difference(memory, self._generator, by_hand, by_replay)
        if reason is not None:
            self._loss_of_step = losses[0]
            replayed.refuse(reason)

    @property
    def is_replayed(self) -> bool:
        """Whether steps are replayed from a recording, as far as is known by now."""
        return self._replayed is not None and self._replayed.reason is None

    def replay(self, owner: object, work: Callable[[], None]) -> None:
        """Runs statements of `owner`'s between steps, the same ones every time, recorded and replayed as the steps are."""
        if self._recorder is None or self.eager is not None:
            work()
            return
        if id(owner) not in self._others:
            self._others = {id(owner): (owner, Replayed(self._recorder))}
        replayed = self._others[id(owner)][1]
        refused_before = replayed.reason is not None
        replayed(work)
        if replayed.reason is not None and not refused_before:
            self.between = f"what is done between steps: {replayed.reason}"
            if self._replayed is not None and self._replayed.is_recorded:
                # a recording that fails gives the generators new states, and what was recorded before draws from the old ones
                self._replayed = Replayed(self._recorder)

    def forget_momentum_(self) -> None:
        """The optimizer's state as at the start; where steps are recorded it stays in place."""
        if self._replayed is None:
            self.optimizer.state.clear()
            return
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _loss(self, forward: Callable[..., Any], inputs: Any, targets: Any) -> Tensor:
        with torch.autocast(device_of(inputs).type, dtype=torch.bfloat16, enabled=self.settings.bf16):
            outputs = in_fp32(call(forward, inputs))
            if self._task.cross_entropy:
                smoothing = self.settings.label_smoothing
                loss = F.cross_entropy(class_logits(outputs), targets, label_smoothing=smoothing)
            else:
                assert self._task.loss is not None
                loss = self._task.loss(outputs, targets)
            return loss if self._distillation is None else self._distillation.loss(outputs, inputs, targets, loss)

    @torch.no_grad()
    def probe(self) -> float | None:
        """Loss on the last step's batch with the weights as they are now; None before the first step, or where it is not finite.

        Batch statistics are used as in training; running statistics and random numbers stay as they were.
        """
        if self._last is None:
            return None
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        device = device_of(self._last[0])
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            loss = self._loss(self.model, *self._last)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        self.group.average_([loss])
        return loss.item() if isfinite(loss.item()) else None

    @torch.no_grad()
    def _take_average_(self) -> None:
        """The average's weights become the model's. BN statistics are not averaged: they are to be re-estimated."""
        assert self._average is not None
        for weight, average in zip(self.model.parameters(), self._average.module.parameters(), strict=True):
            weight.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self._average.state_dict() if self._average is not None else None,
            "batches": self._stream.state_dict(),
            "done": self.done, "images": self.images, "seconds": self.seconds,
            **self.curve.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._stream.load_state_dict(state["batches"])
        self.curve.load_state_dict(state)
        self.done, self.images, self.seconds = state["done"], state["images"], state["seconds"]


@torch.no_grad()
def _average_(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """`average.update_parameters(model)` of an exponential average without its copies from the CPU, which cannot be recorded."""
    if average.n_averaged == 0:  # it copies from the CPU; only later steps are recorded
        average.update_parameters(model)
        return
    torch._foreach_lerp_(list(average.module.parameters()), list(model.parameters()), 1 - decay)
    for mean, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        mean.copy_(buffer)


def _takes(held: Any, drawn: Any) -> bool:
    """Whether a batch has the form of the one that is held, so that it can be copied there."""
    there, new = tensors(held), tensors(drawn)
    alike = len(there) == len(new) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(there, new, strict=True)
    )
    return alike and shape_of(held) == shape_of(drawn)


def _only_tensors(value: Any) -> bool:
    """Whether nothing in a batch could change from step to step but the numbers in its tensors."""
    if isinstance(value, Mapping):
        return all(map(_only_tensors, value.values()))
    return all(map(_only_tensors, value)) if isinstance(value, tuple | list) else isinstance(value, Tensor)
