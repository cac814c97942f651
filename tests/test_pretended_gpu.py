"""Everything of `test_gpu.py` on a GPU that is pretended: what mixes devices, waits in a recorded step, or is missed by a recording fails
on every machine. Numbers are a CPU's; that a card computes them is for `test_gpu.py` to say.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan
from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import sides
from ranksearch.search.workbench import prepare
from ranksearch.space.reading import read_space
from ranksearch.tasks.resnet import CifarResNet
from ranksearch.trial.candidate import MetricSetting
from ranksearch.trial.trial import run_trial
from scripts.pretended_gpu import PretendedGpu
from tests import test_gpu
from tests.conftest import REPOSITORY, Told
from tests.test_scripts import call

CUDA, small = test_gpu.CUDA, test_gpu.small
ELSEWHERE = {
    "test_mps_runs_for_a_block_where_it_is_available": "it needs NVIDIA's daemon",
    "test_a_study_of_this_process": "as the study below",
}
globals().update({n: it for n, it in vars(test_gpu).items() if n.startswith("test_") and n not in ELSEWHERE})


@pytest.fixture(autouse=True, scope="module")
def gpu(tmp_path_factory):
    dense_digits_net(tmp_path_factory.mktemp("dense"))  # trained in a tenth of the time by what is a CPU
    with PretendedGpu() as gpu:
        yield gpu


def dense_digits_net(folder):
    """Lets the data folder have it."""
    space = read_space(REPOSITORY / "search_spaces" / "digits_resnet8.yaml", settings=["search.sensitivity=none"])
    prepare(space, fallback=folder, log=print)


def captured(work, *generators):
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        work()
    return graph


# What is pretended -------------------------------------------------------------------------------------------------------


def test_tensors_say_where_they_are_and_do_not_mix():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(CUDA)
    there = net(torch.randn(5, 3, device=CUDA))
    there.sum().backward()
    assert {there.device, net[0].weight.grad.device, there.detach()[:2].T.device} == {torch.device("cuda", 0)}
    assert not there.cpu().is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        net(torch.randn(5, 3))
    with pytest.raises(TypeError, match="numpy"):
        there.detach().numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=CUDA).uniform_(generator=torch.Generator())


@pytest.mark.parametrize(
    "look",
    [float, bool, lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x.expand(3)[x.expand(3) > 0], lambda x: x.expand(3).nonzero()],
)  # fmt: skip
def test_what_waits_is_counted_and_cannot_be_captured(gpu, look):
    x, before = torch.ones((), device=CUDA), len(gpu.waits)
    look(x)
    assert len(gpu.waits) == before + 1
    assert __file__ in gpu.waits[-1]
    with pytest.raises(RuntimeError, match="capturing"):
        captured(lambda: look(x))


def test_capturing_computes_nothing_and_replays_what_was_launched():
    generator = torch.Generator(CUDA).manual_seed(3)
    x, made = torch.zeros(4, device=CUDA), []

    def work():
        x.add_(1)
        made[:] = [x * torch.rand(4, device=CUDA, generator=generator), F.dropout(x)]

    state = generator.get_state()
    graph = captured(work, generator)
    assert x.eq(0).all()
    assert made[0].isnan().all()
    assert torch.equal(generator.get_state(), state)
    graph.replay()
    first = made[0].clone()
    graph.replay()
    twin = torch.Generator(CUDA).manual_seed(3)
    drawn = [torch.rand(4, device=CUDA, generator=twin) for _ in range(2)]
    assert x.eq(2).all()
    assert torch.equal(first, drawn[0])
    assert torch.equal(made[0], 2 * drawn[1])
    with pytest.raises(RuntimeError, match="not registered"):
        captured(work)


def test_a_capture_has_batch_norms_statistics_as_they_were():
    norm = nn.BatchNorm1d(3).to(CUDA)
    x = torch.randn(8, 3, device=CUDA)
    graph = captured(lambda: norm(x))
    assert norm.running_mean.eq(0).all()
    graph.replay()
    assert torch.allclose(norm.running_mean, 0.1 * x.mean(0))


# Every kind of trial ------------------------------------------------------------------------------------------------------


def plan_by(bench, name, share=0.3):
    """Every layer that takes this lowering, at a share of its full rank."""
    lowering, layers = lowering_named(name), {}
    for layer in bench.net.layers:
        if lowering.supports(layer.spec):
            rank = tuple(max(1, round(share * r)) for r in sides(lowering.full_rank(layer.spec)))
            layers[layer.name] = LayerPlan(name, rank if len(rank) > 1 else rank[0])
    return RankPlan(layers, model="digits/resnet8")


@pytest.mark.parametrize(
    ("lowering", "changes"),
    [
        ("cp", {"projection": {"period": 9}}),
        ("tucker2_pivoted", {"projection": {"period": 5, "momentum": "reset"}, "factor_share": 1}),
        ("channel_pivoted", {"optimizer": "adamw", "projection": {"period": 5, "schedule": "removed_energy"}}),
        ("spatial", {"projection": {"period": 5, "rank_annealing": 0.5, "energy_transfer": True, "bn_rectification": True}}),
        ("im2col_pivoted", {"calibration": "bias", "factor_steps": "plain", "label_smoothing": 0.1, "clip_norm": 1.0}),
    ],
)  # fmt: skip
def test_every_kind_of_trial_is_replayed(small, tmp_path, gpu, lowering, changes):
    """Steps before and after the decomposition, and projections between them."""
    space, bench, _ = small
    before = gpu.replays
    result = test_gpu.run((space, bench, plan_by(bench, lowering)), tmp_path, steps=24, **changes)
    assert (result.status, result.reason, result.eager) == ("complete", None, None)
    assert gpu.replays > before + 10


def test_trials_in_the_metric_of_the_data_are_replayed(small, tmp_path, monkeypatch):
    _, bench, plan = small
    metric = MetricSetting("kfac", batches=2, refresh=2)
    monkeypatch.setattr(test_gpu, "run_trial", partial(run_trial, metric=metric))
    result = test_gpu.run((None, bench, plan), tmp_path, steps=24)
    assert (result.status, result.reason, result.eager) == ("complete", None, None)


def test_a_study_says_once_why_steps_are_made_one_by_one(tmp_path, digits_yaml, short_settings, monkeypatch):
    forward, told, fast = CifarResNet.forward, Told(), [*short_settings, "search.sensitivity=none"]
    monkeypatch.setattr(CifarResNet, "forward", lambda net, x: forward(net, x * (1 if float(x.sum()) > -1e30 else 0)))
    study = ranksearch.search(digits_yaml, settings=fast, runs=tmp_path, inline=True, observer=told)
    assert {row["status"] for row in study.trials} == {"complete"}
    assert all(f"waits for the GPU at {__file__}" in row.record()["eager"] for row in study.front)
    said = [line for line in told.lines if "not replayed from a recording" in line]
    assert len(said) == 1
    assert said[0].startswith("trial 000: ")


def test_launches_are_counted_by_part_and_steps_are_one_each():
    found = call("count_launches", str(REPOSITORY / "search_spaces" / "digits_resnet8.yaml"), "--lines", "3")
    parts, figures = {row["part"]: row for row in found["rows"]}, found["figures"]
    assert (figures["not_recorded"], figures["replays_per_trial"]) == (0, parts["train"]["replays"])
    assert parts["train: steps"]["calls"] == 12
    inside = sum(parts[name]["launches"] for name in ("begin: fit the layers", "train", "estimate BN", "decompose"))
    assert inside < figures["launches_per_trial"] == parts["trial"]["launches"]
    assert sum(note.startswith("waited ") for note in found["notes"]) == 3
