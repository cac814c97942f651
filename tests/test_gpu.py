"""What behaves differently on CUDA: recorded steps and projections against the same on the same card, one by one; a whole trial, its
restart, scores, sensitivities and a study there. Skipped without a card, and hidden from one unless `-m gpu` asks for it.
"""

import copy

import pytest
import torch

import ranksearch
from ranksearch.allocate import allocate_plan, parse_budget
from ranksearch.cluster import mps
from ranksearch.compress import LayerPlan, Projector, RankPlan
from ranksearch.lowering import LOWERINGS, LayerSpec
from ranksearch.search.scorer import Scorer
from ranksearch.search.workbench import prepare
from ranksearch.space.reading import read_space
from ranksearch.space.recipe import RecipeSpace
from ranksearch.training.capture import CudaGraphs
from ranksearch.training.evaluate import evaluate
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Training
from ranksearch.trial.checkpoint import CheckpointFile, Leaving
from ranksearch.trial.recipe import Recipe, middle
from ranksearch.trial.trial import run_trial
from tests.conftest import REPOSITORY
from tests.test_capture import CASES, Net, Refuses, task
from tests.test_program import CERTIFIED, drift_, excess, just, plan_of
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
    for (name, mine), theirs in zip(ours.model.named_parameters(), ever.model.parameters(), strict=True):
        if name != "conv.bias":  # batch norm takes it away: its gradient is rounding, of which AdamW makes whole steps
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


def test_recorded_projections_of_cp_are_those_made_step_by_step():
    """Its sweeps go on from terms that a card's own arithmetic found: a recording is held against the same statements, run each time."""
    training, _ = trained(recorded=True, steps=5)
    plan = RankPlan({name: LayerPlan("cp", rank) for name, rank in {"a": 12, "b": 7, "c": 14, "grouped": 6}.items()})
    nets = [Convs().to(CUDA), Convs().to(CUDA)]
    projectors = Projector(plan), Projector(plan)
    source = Convs()
    for step in range(8):
        drift_(source, 0.01, seed=step)
        for net, projector, run in zip(nets, projectors, (training.replay, just), strict=True):
            net.load_state_dict(source.state_dict())
            projector.later(net, run)
        for name in plan.layers:
            torch.testing.assert_close(*(net.get_submodule(name).weight for net in nets), rtol=0, atol=1e-5)
        source.load_state_dict(nets[0].state_dict())
    assert all(replayed.is_recorded for _, replayed in training._others.values())


def test_curves_of_cp_are_those_of_a_cpu():
    spec = LayerSpec.conv(16, 24, (3, 3))
    weights = [torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = LOWERINGS["cp"].curves([weight.to(CUDA) for weight in weights], spec)
    for weight, curve in zip(weights, found, strict=True):
        expected = LOWERINGS["cp"].curve(weight, spec)
        assert curve.ranks == expected.ranks
        assert curve.removed == pytest.approx(expected.removed, rel=1e-4)
        assert curve.residual == pytest.approx(expected.residual, rel=1e-3)


# Whole trials and studies: what `pick_device` finds is used throughout, and what comes of it is used on CPUs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A digits task, its dense net, and a plan of half its FLOPs."""
    space = read_space(REPOSITORY / "search_spaces" / "digits_resnet8.yaml", settings=["search.sensitivity=kfac"])
    bench = prepare(space, fallback=tmp_path_factory.mktemp("dense"), log=print)
    plan = allocate_plan(bench.curves, [parse_budget("flops", "50%")], damage=bench.damage, model="digits/resnet8").plan
    return space, bench, plan


def run(small, folder, *, leaving=lambda: False, **changes):
    _, bench, plan = small
    settings = {"steps": 60, "batch_size": 64, "bn_batches": 2, "projection": {"period": 5}, "ema": 0.9} | changes
    return run_trial(
        bench.task.without_test(), bench.dense, bench.net, plan, Recipe.settled(RecipeSpace(**settings), middle), seed=0,
        report=lambda entry: None, save_to=folder / "net", checkpoint=CheckpointFile(folder / "state", 1e9, leaving),
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"distillation": {"weight": 0.5, "temperature": 4.0}, "optimizer": "adamw"}], ids=str
)
def test_a_trials_net_scores_on_a_cpu_as_it_did_there(small, tmp_path, changes):
    result = run(small, tmp_path, **changes)
    assert (result.status, result.eager) == ("complete", None)
    task = small[1].task
    net = ranksearch.load(tmp_path / "net")
    assert next(net.parameters()).device.type == "cpu"
    assert evaluate(net, task.val, task).accuracy == pytest.approx(result.val_accuracy, abs=1.5)
    assert result.val_accuracy > 50


def test_a_trial_that_was_stopped_goes_on_as_if_it_had_not(small, tmp_path, monkeypatch):
    """Between a projection and the next, in steps that are replayed; the second process records its own."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole, asked = run(small, tmp_path / "whole", precision="fp32"), []

    def leaving() -> bool:
        asked.append(1)
        return len(asked) >= 17

    with pytest.raises(Leaving):
        run(small, tmp_path / "half", leaving=leaving, precision="fp32")
    again = run(small, tmp_path / "half", precision="fp32")
    assert [point["step"] for point in again.losses] == [point["step"] for point in whole.losses]
    assert again.val_loss == pytest.approx(whole.val_loss, rel=1e-3)
    ours, theirs = (ranksearch.load(tmp_path / name / "net") for name in ("half", "whole"))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_untrained_scores_are_those_of_a_cpu(small, monkeypatch):
    """`preview` and the first predictions: decompositions, BN re-estimation and scores on the device."""
    _, bench, plan = small

    def score():
        scorer = Scorer(bench.task, bench.dense_model(), bench.task.val, bn_batches=5, batch_size=128)
        return scorer.device.type, scorer(plan).accuracy

    there = score()
    monkeypatch.setattr("ranksearch.search.scorer.pick_device", lambda: torch.device("cpu"))
    here = score()
    assert (there[0], here[0]) == (CUDA.type, "cpu")
    assert there[1] == pytest.approx(here[1], abs=5)  # augmentation draws other numbers there


@pytest.mark.parametrize("sensitivity", ["activation", "fisher", "kfac"])
def test_sensitivities_are_measured_there(tmp_path, sensitivity):
    space = read_space(
        REPOSITORY / "search_spaces" / "digits_resnet8.yaml", settings=[f"search.sensitivity={sensitivity}"]
    )
    bench = prepare(space, fallback=tmp_path, log=print)
    assert bench.damage.scales
    assert min(bench.damage.scales.values()) >= 0
    assert max(bench.damage.scales.values()) > 0


def test_a_study_of_this_process(tmp_path, digits_yaml, short_settings):
    study = ranksearch.search(digits_yaml, settings=short_settings, runs=tmp_path, inline=True)
    assert len(study.trials) == 3
    assert study.front
    assert all(row["test_accuracy"] is not None for row in study.front)


def test_mps_runs_for_a_block_where_it_is_available(tmp_path):
    if mps.state() != mps.AVAILABLE:
        pytest.skip("no nvidia-cuda-mps-control, or somebody else's daemon")
    with mps.side_by_side(str(tmp_path / "mps")) as reason:
        if reason is not None:
            pytest.skip(reason)
        assert mps.state() == mps.OTHERS  # as whoever looks from here sees it
    assert mps.state() == mps.AVAILABLE
