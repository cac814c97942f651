"""What behaves differently on CUDA: recorded steps and projections against the same on the same card, one by one. Skipped without one."""

import copy

import pytest
import torch

from ranksearch.compress import Projector
from ranksearch.tasks.capture import CudaGraphs
from ranksearch.tasks.train import Optimisation, Training
from tests.test_capture import CASES, Net, Refuses, task
from tests.test_program import CERTIFIED, drift_, excess, plan_of
from tests.test_program import Net as Convs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


def trained(*, recorded: bool, steps: int = 40, reset=(), **changes):
    torch.manual_seed(0)
    settings = {
        "optimizer": "sgd", "schedule": "cosine", "lr": 0.05, "warmup": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "batch_size": 16,
        "total_steps": steps, "label_smoothing": 0.1, "clip_norm": 0.5, "ema": 0.0, "bf16": False, "compile": False,
    } | changes  # fmt: skip
    generator = torch.Generator(CUDA).manual_seed(1)
    recorder = CudaGraphs(CUDA, [generator]) if recorded else Refuses()
    training = Training(
        Net().to(CUDA), task().to(CUDA), Optimisation(**settings), range(steps), generator=generator, recorder=recorder
    )
    training.run(lambda training: training.forget_momentum_() if training.done in reset else None)
    return training, generator


@pytest.mark.parametrize("case", [c for c in CASES if not c.keys() & {"loader", "distilled"}], ids=str)
def test_replayed_steps_train_as_steps_made_one_by_one(case):
    ours, generator = trained(recorded=True, **case)
    ever, other = trained(recorded=False, **case)
    assert ours.eager is None
    for mine, theirs in zip(ours.model.parameters(), ever.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert torch.equal(generator.get_state(), other.get_state())  # the same numbers have been drawn


def test_a_net_that_waits_for_the_gpu_falls_back_and_says_where(monkeypatch):
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda net, x: forward(net, x * (1 if float(x.sum()) > -1e30 else 0)))
    ours, _ = trained(recorded=True)
    assert ours.eager is not None
    assert "waits for the GPU" in ours.eager
    assert all(bool(torch.isfinite(p).all()) for p in ours.model.parameters())


@pytest.mark.parametrize("lowering", ["im2col", "spatial", "tucker2"])
def test_a_recorded_projection_is_the_exact_one(lowering):
    training, _ = trained(recorded=True, steps=5)
    plan, net = plan_of(lowering), Convs()
    projector, ways = Projector(plan), []
    for step in range(8):
        net = net.cpu()
        drift_(net, 0.01, seed=step)
        before, exact = copy.deepcopy(net), copy.deepcopy(net)
        Projector(plan, batched=False)(exact)
        # the same weights in the same places, as in training
        ways = ways or [copy.deepcopy(net).to(CUDA)]
        ways[0].load_state_dict(net.state_dict())
        projector.later(ways[0], training.replay)
        net.load_state_dict(ways[0].state_dict())
        assert excess(before, net, exact, plan) < 2 * CERTIFIED
    assert all(replayed.is_recorded for _, replayed in training._others.values())
