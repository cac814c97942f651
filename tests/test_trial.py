"""The trial, in-process, on the real digits."""

import copy
import dataclasses

import pytest
import torch

import ranksearch
from ranksearch.allocate import LayerRules, allocate_plan, parse_budget, rank_curves
from ranksearch.compress import dense_cost, project_, trace
from ranksearch.search import trial
from ranksearch.search.trial import Recipe, run_trial
from ranksearch.tasks import digits
from ranksearch.tasks.dense import dense_state
from ranksearch.tasks.train import Evaluation, evaluate


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    task = digits.make_task("resnet8", data=None, validation=360, split_seed=0)
    dense = dense_state(task, checkpoint="auto", data=None, fallback=tmp_path_factory.mktemp("dense"), log=print)
    model = task.build_model("resnet8")
    model.load_state_dict(dense)
    net = trace(model, task.example_input)
    curves = rank_curves(model, net, LayerRules(("im2col", "channel", "spatial"), exclude=("linear",)))
    plan = allocate_plan(curves, [parse_budget("flops", "30%")], model="digits/resnet8").plan
    return task.without_test(), dense, net, plan


def recipe(**changes) -> Recipe:
    return Recipe(
        **{
            "steps": 60, "batch_size": 64, "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "period": 10, "factor_share": 0.5,
            "bn_batches": 5, "precision": "auto", "energy_transfer": False, "bn_rectification": False,
            "distillation_weight": 0.0, "distillation_temperature": 2.0,
        }
        | changes
    )  # fmt: skip


def run(bench, save_to=None, seed=0, **changes):
    reports = []
    return run_trial(*bench, recipe(**changes), seed=seed, report=reports.append, save_to=save_to), reports


def test_a_trial_ends_accurate_within_its_cost_and_loses_nothing_by_decomposing(bench, tmp_path):
    task, _, net, _plan = bench
    result, reports = run(bench, save_to=tmp_path)
    assert result.status == "complete"
    assert result.macs <= 0.3 * dense_cost(net).macs
    assert [entry["phase"] for entry in reports] == ["projected", "decomposed", "factors"]
    assert reports == result.history
    phases = {entry["phase"]: entry for entry in reports}
    # the dense form has the plan's ranks when it is decomposed; what is left of the difference are BN statistics
    assert abs(phases["decomposed"]["val_accuracy"] - phases["projected"]["val_accuracy"]) < 5
    assert result.val_accuracy == phases["factors"]["val_accuracy"] > 90
    assert 0 < phases["projected"]["removed_energy_max"] < 1
    assert result.epochs == pytest.approx(60 * 64 / len(task.train))
    loaded = ranksearch.load(tmp_path)
    assert evaluate(loaded, task.val, task).accuracy == result.val_accuracy
    assert sum(p.numel() for p in loaded.parameters()) == result.params


def test_projection_training_ends_on_the_low_rank_set(bench, monkeypatch):
    """What is decomposed has the plan's ranks already, so decomposing changes the outputs by rounding alone."""
    task, _, _, plan = bench
    x, checked = task.normalise(task.val.images[:64]), []

    def checked_compress(model, given, **settings):
        small = ranksearch.compress.surgery.compress(model, given, **settings)
        with torch.no_grad():
            expected, found = model.eval()(x), small.eval()(x)
        checked.append(((found - expected).norm() / expected.norm()).item())
        assert max(project_(copy.deepcopy(model), plan).values()) < 1e-6
        return small

    monkeypatch.setattr(trial, "compress", checked_compress)
    result, reports = run(bench, factor_share=0.0)
    assert [entry["phase"] for entry in reports] == ["projected", "decomposed"]
    assert result.status == "complete"
    assert checked[0] < 1e-4


def test_the_same_seed_gives_the_same_trial(bench):
    torch.set_num_threads(2)
    once, _ = run(bench, steps=20)
    again, _ = run(bench, steps=20)
    other, _ = run(bench, steps=20, seed=1)
    assert (once.val_accuracy, once.val_loss) == (again.val_accuracy, again.val_loss)
    assert once.val_loss != other.val_loss


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_steps_at_all_is_decomposition_with_fresh_bn_statistics(bench, share):
    result, _ = run(bench, steps=0, factor_share=share)
    assert result.status == "complete"
    assert result.epochs == 0
    assert result.images_per_second is None
    assert result.val_accuracy > 60  # near chance, 10 %, without the re-estimation


def test_divergence_is_a_result(bench, tmp_path):
    result, _ = run(bench, lr=1e12, save_to=tmp_path / "net")
    assert result.status == "diverged"
    assert "step" in result.reason
    assert result.macs
    assert not (tmp_path / "net").exists()
    assert result.epochs < 60 * 64 / len(bench[0].train)  # what was seen, not what was planned
    assert all(v is None or v == v for v in dataclasses.asdict(result).values() if not isinstance(v, list))


def test_a_net_whose_outputs_are_not_finite_is_divergence_too(bench, monkeypatch):
    """Its argmax is class 0, an accuracy of 10 % that looks like a result."""
    monkeypatch.setattr(trial, "evaluate", lambda *args: Evaluation(accuracy=10.0, loss=float("nan")))
    result, _ = run(bench, steps=2)
    assert result.status == "diverged"
    assert "validation loss" in result.reason
    assert result.val_accuracy is None


def test_distillation_runs_through_the_trial(bench):
    result, _ = run(bench, distillation_weight=0.7)
    assert result.status == "complete"
    assert result.val_accuracy > 85


@pytest.mark.parametrize("option", ["energy_transfer", "bn_rectification"])
def test_options_of_the_projection_reach_it(bench, option):
    plain, _ = run(bench, steps=20)
    result, _ = run(bench, steps=20, **{option: True})
    assert result.status == "complete"
    assert result.val_accuracy > 80
    assert result.val_loss != plain.val_loss
