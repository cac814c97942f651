"""Recorded steps on a CPU: by a recorder that replays by calling, and by one that refuses; both train as ever."""

import random

import pytest
import torch
from torch import nn

from ranksearch.data.resident import Augment, Normalise, Resident
from ranksearch.tasks.task import Task
from ranksearch.training.capture import WARM_STEPS
from ranksearch.training.distillation import Distillation
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Training


class Calls:
    """Replays by calling: the same statements on the same memory, of which recording runs none."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def warm(self, work):
        work()

    def record(self, work):
        self.recorded += 1

        def replay():
            self.replays += 1
            work()

        return replay


class Refuses(Calls):
    def record(self, work):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


class RefusesTheSecond(Calls):
    def record(self, work):
        replay = super().record(work)
        if self.recorded == 2:
            raise RuntimeError("no")
        return replay


class Nothing(Calls):
    """Replays nothing: a recording that missed what the step did."""

    def record(self, work):
        return lambda: None


class Waits(Calls):
    def warm(self, work):
        work()
        return "waits for the GPU at net.py:3"


class Net(nn.Module):
    def __init__(self, cpu_draw: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.cpu_draw = cpu_draw

    def forward(self, x):
        if self.cpu_draw and random.random() < 0:
            return None
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def task(loader: bool = False) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (70, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(4, (70,), generator=generator)
    if loader:  # of which every fourth batch is a smaller one
        batches = [(images[i : i + 20].float() / 255, labels[i : i + 20]) for i in range(0, 70, 20)]
        return Task(model=Net(), train=batches, val=batches)
    split = Resident(images, labels, Normalise((0.5,) * 3, (0.2,) * 3), Augment(1, True))
    return Task(model=Net(), train=split, val=split)


def trained(
    recorder,
    *,
    steps=12,
    loader=False,
    cpu_draw=False,
    distilled=False,
    reset=(),
    stop=None,
    state=None,
    between=None,
    **changes,
):
    torch.manual_seed(0)
    settings = {
        "optimizer": "sgd", "schedule": "cosine", "lr": 0.1, "warmup": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "batch_size": 16,
        "total_steps": steps, "label_smoothing": 0.1, "clip_norm": 0.5, "ema": 0.0, "bf16": False, "compile": False,
    } | changes  # fmt: skip
    model, generator = Net(cpu_draw), torch.Generator().manual_seed(1)
    teacher = Distillation(Net().eval().requires_grad_(False), 0.5, 2.0) if distilled else None
    training = Training(
        model,
        task(loader),
        Optimisation(**settings),
        range(steps),
        generator=generator,
        distillation=teacher,
        recorder=recorder,
    )
    if state is not None:
        training.load_state_dict(state[0])
        generator.set_state(state[1])

    def after(training):
        if training.done in reset:
            training.forget_momentum_()
        if between is not None:
            training.replay(between, lambda: None)
        if training.done == stop:
            raise InterruptedError

    if stop is not None:
        with pytest.raises(InterruptedError):
            training.run(after)
        return training, generator
    return training, training.run(after)


CASES = [
    {}, {"optimizer": "adamw", "lr": 0.01}, {"ema": 0.9}, {"distilled": True}, {"reset": (5, 8)}, {"loader": True},
    {"optimizer": "adamw", "lr": 0.01, "reset": (6,), "clip_norm": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", [Calls, Refuses, Waits])
def test_recorded_steps_train_as_steps_made_one_by_one(case, kind):
    recorder = kind()
    ours, stats = trained(recorder, **case)
    ever, expected = trained(None, **case)
    for mine, theirs in zip(ours.model.state_dict().values(), ever.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert stats.loss == pytest.approx(expected.loss, abs=1e-6)
    assert stats.images == expected.images
    assert [p["step"] for p in ours.curve.points] == [p["step"] for p in ever.curve.points]
    if kind is Calls:
        assert ours.eager is None
        assert (recorder.recorded, recorder.replays) == (1, 12 - WARM_STEPS - (3 if case.get("loader") else 0))
    else:
        refused = "RuntimeError: CUDA error: operation not permitted when stream is capturing"
        assert ours.eager == (refused if kind is Refuses else "waits for the GPU at net.py:3")


@pytest.mark.parametrize("case", [{}, {"ema": 0.9}, {"optimizer": "adamw", "lr": 0.01}], ids=str)
def test_a_replay_that_comes_out_otherwise_is_dropped_and_nothing_is_lost(case):
    ours, stats = trained(Nothing(), **case)
    ever, expected = trained(None, **case)
    assert ours.eager == "a replayed step ends 1 steps away from where the same step made by hand does"
    assert stats.loss == pytest.approx(expected.loss, abs=1e-6)
    for mine, theirs in zip(ours.model.state_dict().values(), ever.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_steps_are_recorded_anew_after_a_recording_between_them_has_failed():
    """It has replaced the states of the generators, from which the first recording draws."""
    recorder = RefusesTheSecond()
    ours, _ = trained(recorder, between=object())
    ever, _ = trained(None)
    assert (ours.eager, ours.between) == (None, "what is done between steps: RuntimeError: no")
    assert ours.is_replayed
    assert recorder.recorded == 3
    for mine, theirs in zip(ours.model.parameters(), ever.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_numbers_drawn_on_the_cpu_would_be_frozen_and_are_not_recorded():
    recorder = Calls()
    ours, _ = trained(recorder, cpu_draw=True)
    assert ours.eager == "draws random numbers on the CPU"
    assert recorder.recorded == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(optimizer):
    whole, _ = trained(Calls(), optimizer=optimizer, lr=0.01, ema=0.9)
    half, generator = trained(Calls(), optimizer=optimizer, lr=0.01, ema=0.9, stop=7)
    again, _ = trained(Calls(), optimizer=optimizer, lr=0.01, ema=0.9, state=(half.state_dict(), generator.get_state()))
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_statements_between_steps_are_recorded_for_their_owner_and_anew_for_another_one():
    recorder, counted = Calls(), []
    training, _ = trained(recorder)
    before, owner = recorder.recorded, object()
    for _ in range(WARM_STEPS + 2):
        training.replay(owner, lambda: counted.append(1))
    assert recorder.recorded == before + 1
    training.replay(object(), lambda: counted.append(1))
    assert len(counted) == WARM_STEPS + 3
