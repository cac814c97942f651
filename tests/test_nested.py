"""A whole front from one run: levels of one weight, the nested run, plans that are cut from it, any budget afterwards."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ranksearch
from ranksearch.api import resume
from ranksearch.cli import app
from ranksearch.cluster.worker import candidate_of, packed
from ranksearch.compress import LayerPlan, RankPlan
from ranksearch.compress.nesting import Nesting
from ranksearch.errors import StudyError, UsageError
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.search.path import NESTED_RUN, nested_path
from ranksearch.space.reading import read_space
from ranksearch.study.driver import Driver, run_inline
from ranksearch.tracking.trial_figures import trial_charts
from ranksearch.training.evaluate import Evaluation
from ranksearch.trial.levels import Levels
from ranksearch.trial.mixture import SHARES, best_cut
from ranksearch.trial.nested import NESTED, save_weights
from ranksearch.trial.recipe import spread_recipes
from tests.conftest import simulated

NESTED_STUDY = [
    "search.strategy=nested", "search.nested.levels=4", "recipe.steps=24", "recipe.bn_batches=2", "search.trials=4",
    "search.sensitivity=kfac", "tracking.models=false",
]  # fmt: skip


def one_layer(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer)


LAYERS = [
    (nn.Conv2d(8, 12, 3, padding=1), "im2col", 3),
    (nn.Conv2d(8, 12, 3, padding=1), "channel_pivoted", 4),
    (nn.Conv2d(12, 8, 3, groups=2), "spatial", 5),
    (nn.Conv2d(8, 12, 3), "tucker2", (3, 4)),
    (nn.Linear(20, 9), "svd", 2),
]


@pytest.mark.parametrize(("layer", "name", "rank"), LAYERS, ids=[name for _, name, _ in LAYERS])
def test_at_a_level_a_weight_is_its_best_approximation_and_afterwards_what_it_was(layer, name, rank):
    model = one_layer(layer)
    before = model[0].weight.detach().clone()
    nesting = Nesting(model, [RankPlan({"0": LayerPlan(name, rank)}), RankPlan()])
    nesting.refresh()
    wanted = lowering_named(name).project(before, rank, LayerSpec.of(model[0])).weight
    with nesting.at(0):
        torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(model[0].weight, before)
    with nesting.at(1):
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("layer", "name", "rank"), LAYERS, ids=[name for _, name, _ in LAYERS])
def test_a_gradient_at_a_level_is_along_what_the_level_can_change(layer, name, rank):
    """Against finite differences of the projection, of a matrix with a gap behind its rank: its derivative is the tangent space."""
    model = one_layer(layer)
    choice, spec = LayerPlan(name, rank), LayerSpec.of(model[0])
    nesting = Nesting(model, [RankPlan({"0": choice})])
    kept = lowering_named(name).project(model[0].weight.detach(), rank, spec).weight
    with torch.no_grad():
        model[0].weight.copy_(kept + 1e-4 * torch.randn_like(kept))
    nesting.refresh()
    slopes = torch.randn_like(kept)
    with nesting.at(0):
        (model[0].weight * slopes).sum().backward()
    found = model[0].weight.grad
    if name == "tucker2":  # no matrix: as it is
        assert torch.equal(found, slopes)
        return
    step = 1e-3 * torch.randn_like(kept)
    there, back = (lowering_named(name).project(kept.double() + s * step.double(), rank, spec).weight for s in (1, -1))
    moved = float(((there - back) / 2 * slopes).sum())
    assert float((found * step).sum()) == pytest.approx(moved, rel=2e-2, abs=2e-5)


def test_earlier_gradients_stay_and_parts_of_a_packed_weight_get_their_own():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("attention", nn.MultiheadAttention(8, 2, batch_first=True))
    packed = model.attention.in_proj_weight
    nesting = Nesting(model, [RankPlan({"attention.q_proj": LayerPlan("svd", 2)})])
    nesting.refresh()
    packed.grad = torch.full_like(packed, 3.0)
    slopes = torch.randn_like(packed)
    with nesting.at(0):
        (packed * slopes).sum().backward()
    added = packed.grad - 3
    torch.testing.assert_close(added[8:], slopes[8:])  # k and v are dense at this level
    assert not torch.allclose(added[:8], slopes[:8])
    weight = packed[:8].detach().double()
    left, _, right = torch.linalg.svd(weight)
    u, v = left[:, :2], right[:2].T
    g = slopes[:8].double()
    torch.testing.assert_close(added[:8].double(), u @ u.T @ g + (g - u @ u.T @ g) @ v @ v.T, rtol=1e-4, atol=1e-5)


def test_smaller_levels_lie_within_larger_ones_also_after_the_weight_has_moved():
    model = one_layer(nn.Linear(20, 12))
    path = [RankPlan({"0": LayerPlan("svd", rank)}) for rank in (2, 5)]
    nesting = Nesting(model, path)
    nesting.refresh()
    with torch.no_grad():
        model[0].weight.add_(torch.randn(12, 20))
    seen = []
    for level in range(2):
        with nesting.at(level):
            seen.append(model[0].weight.detach().clone())
    assert [int(torch.linalg.matrix_rank(weight, rtol=1e-4)) for weight in seen] == [2, 5]
    # what the large one keeps beside the small one is orthogonal to it: one basis
    assert torch.linalg.matrix_norm(seen[0].T @ (seen[1] - seen[0])) < 1e-3


def test_levels_are_drawn_alike_at_every_step_and_all_of_them():
    model = one_layer(nn.Linear(20, 12))
    path = [RankPlan({"0": LayerPlan("svd", rank)}) for rank in (2, 4, 6)]
    levels = Levels(model, path, period=5, drawn=2, seed=3)
    drawn = [levels.at(step) for step in range(30)]
    assert drawn == [levels.at(step) for step in range(30)]
    assert {level for some in drawn for level in some} == {0, 1, 2}
    assert all(len(set(some)) == 2 for some in drawn)
    assert sum(levels.passes(0)) == pytest.approx(1)
    alone = Levels(model, path, period=5, drawn=1, seed=3)
    for first in range(0, 30, 3):  # each has its turn before any has another
        assert sorted(level for step in range(first, first + 3) for level in alone.at(step)) == [0, 1, 2]


def test_a_path_rises_to_the_budgets_and_keeps_each_layers_lowering(bench, digits_yaml):
    space = read_space(digits_yaml, settings=NESTED_STUDY, budgets=["flops=70%"])
    path = nested_path(space, bench.curves, bench.damage)
    macs = [bench.curves.cost(plan).macs / bench.curves.dense.macs for plan in path]
    assert len(path) == 4
    assert macs == sorted(macs)
    assert 0.2 < macs[0] < 0.22
    assert 0.65 < macs[-1] <= 0.7
    for name in path[0].layers:
        assert len({plan[name].lowering for plan in path if plan[name].rank}) <= 1


@pytest.fixture(scope="module")
def study(tmp_path_factory, bench):
    from tests.conftest import REPOSITORY

    return ranksearch.search(
        REPOSITORY / "search_spaces" / "digits_resnet8.yaml", settings=NESTED_STUDY, budgets=["flops=70%"],
        runs=tmp_path_factory.mktemp("runs"), name="nested", inline=True,
    )  # fmt: skip


def test_one_long_trial_then_plans_cut_from_its_weights(study):
    first, *others = study.trials
    assert first.allocator == NESTED_RUN
    assert study.nested_trial == first.trial
    assert first.recipe["steps"] == 24
    assert first.epochs > 0
    assert {entry["phase"] for entry in first.history} == {
        "level 1 of 4", "level 3 of 4", "level 4 of 4", "decomposed"
    }  # fmt: skip
    assert len(first.history) == 4 * 3 + 1  # the front is looked at while it trains
    looks = trial_charts(first, study.metric)["levels"].series
    assert [series.name.partition(":")[0] for series in looks] == ["step 6", "step 12", "step 18", "step 24"]
    last = [(e["macs_ratio"], e["val_accuracy"]) for e in first.history if "macs_ratio" in e and e["step"] == 24]
    assert [*looks[-1].x, *looks[-1].y] == pytest.approx(
        [*(100 * x for x, _ in sorted(last)), *(y for _, y in sorted(last))]
    )
    assert "levels" not in trial_charts(others[0], study.metric)
    assert len(others) == 3
    for row in others:
        assert row.complete
        assert row.epochs == 0
        assert row.recipe["steps"] == 0
        assert row.macs_ratio <= 0.7
        assert "lr" not in row.params_searched  # the recipe is the run's
    assert (study.trial_folder(0) / NESTED).is_file()
    assert all(row.test_accuracy is not None for row in study.front)


@pytest.mark.parametrize(("direction", "scores", "share", "tried"), [
    ("maximize", {1.0: 80, 0.5: 85, 0.0: 82}, 0.5, [1.0, 0.5, 0.0]), ("maximize", {1.0: 80, 0.5: 80, 0.0: 99}, 1.0, [1.0, 0.5]),
    ("minimize", {1.0: 3, 0.5: 2, 0.0: 1}, 0.0, [1.0, 0.5, 0.0]), ("minimize", {1.0: 3, 0.5: 4, 0.0: 1}, 1.0, [1.0, 0.5]),
])  # fmt: skip
def test_mixtures_are_tried_from_the_runs_weights_on_while_they_get_better(direction, scores, share, tried):
    trained, dense = ({"weight": torch.full((2,), value), "count": torch.tensor(int(value))} for value in (4.0, 0.0))
    seen = []

    def cut(weights):
        seen.append(float(weights["weight"][0]) / 4)
        assert weights["count"] == 4  # what is no floating point is the run's
        return nn.Identity()

    found = best_cut(cut, lambda net: Evaluation(scores[seen[-1]], 1.0), trained, dense, direction)
    assert (found.run_share, found.score.accuracy, seen) == (share, scores[share], tried)


def test_each_plan_says_of_what_mixture_it_is_unless_mixtures_are_off(study, make, bench):
    shares = [row.history[0]["run_share"] for row in study.trials[1:]]
    assert set(shares) <= set(SHARES)
    assert study.at("flops=50%").run_share in SHARES
    alone = make(settings=[*NESTED_STUDY, "search.nested.mix=false"], budgets=["flops=70%"])
    save_weights(bench.task.dense_model(), alone.trial_folder(0))
    Driver(alone, bench, lambda row: None, print).settle(0, simulated(alone.ask(bench), bench))
    assert alone.ask(bench).shares == SHARES[:1]
    again = candidate_of(json.loads(json.dumps(packed(replace(alone.ask(bench), shares=SHARES)))))
    assert again.shares == SHARES


def test_any_budget_in_any_order(study):
    small, large = study.at("flops=30%"), study.at("flops=60%")
    assert small.macs_ratio <= 0.30 < large.macs_ratio <= 0.60
    again = study.at("flops=30%")
    assert again.plan == small.plan
    assert again.val_accuracy == small.val_accuracy
    both = study.at(["flops=60%", "params=25%"])
    assert both.macs_ratio <= 0.60
    assert both.params_ratio <= 0.25
    with pytest.raises(UsageError, match="costs less than"):
        study.at("flops=0.1%")


def test_export_at_a_budget(study):
    call = ["export", str(study.folder), "--at", "flops=37%", "--at", "params=30%", "--json"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["at"] == ["flops=37%", "params=30%"]
    assert record["folder"].endswith("at-flops-37-params-30-state_dict")
    assert record["macs_ratio"] <= 0.37
    net = ranksearch.load(record["folder"])
    cut = study.at(record["at"])
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(net(x), cut.model(x), rtol=1e-3, atol=1e-4)
    for refused in ([str(study.folder)], [str(study.folder), "0", "--at", "flops=37%"]):
        done = CliRunner().invoke(app, ["export", *refused])
        assert isinstance(done.exception, UsageError) or done.exit_code == 2


def test_a_run_that_is_cut_short_goes_on_from_its_state(study, tmp_path, digits_yaml, steps_made):
    options = {
        "settings": [*NESTED_STUDY, "resources.checkpoint_seconds=1e-6"], "budgets": ["flops=70%"], "runs": tmp_path,
        "name": "cut", "inline": True,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        ranksearch.search(digits_yaml, **options)
    done = resume("cut", runs=tmp_path, inline=True)
    assert steps_made == [*range(15), None, *range(15, 24)]
    again, whole = (next(row for row in s.trials if row.trial == s.nested_trial) for s in (done, study))
    assert again.val_accuracy == pytest.approx(whole.val_accuracy)
    assert again.history[-1]["val_loss"] == pytest.approx(whole.history[-1]["val_loss"], rel=1e-4)
    assert done.finished == 4


def test_plans_wait_for_the_run_and_a_run_without_weights_ends_the_study(make, bench):
    study = make(settings=NESTED_STUDY, budgets=["flops=70%"])
    run = study.ask(bench)
    assert run.path[-1] == run.plan
    again = candidate_of(json.loads(json.dumps(packed(run))))
    assert again.path == run.path
    assert study.ask(bench) is None
    assert not study.exhausted
    with pytest.raises(UsageError, match="is not over"):
        study.at("flops=50%")
    found = replace(
        simulated(run, bench), status="diverged", val_accuracy=None, reason="the loss is nan by step 3 of 24"
    )
    Driver(study, bench, lambda row: None, print).settle(run.number, found)
    with pytest.raises(StudyError, match=r"gave no weights.*the loss is nan"):
        run_inline(study, bench, lambda row: None, print)


def test_several_runs_with_other_recipes_go_side_by_side_and_plans_are_cut_from_the_best(make, bench):
    settings = [*NESTED_STUDY, "search.nested.runs=3", "search.trials=5", "recipe.lr={low: 0.01, high: 0.1, log: true}"]
    study = make(settings=settings, budgets=["flops=70%"])
    runs = [study.ask(bench) for _ in range(3)]
    assert study.ask(bench) is None
    assert len({run.recipe.lr for run in runs}) == 3
    assert runs[0].recipe.lr == pytest.approx(0.01**0.5 * 0.1**0.5)
    assert all(run.plan == run.path[-1] == runs[0].plan for run in runs)
    driver = Driver(study, bench, lambda row: None, print)

    def ends(run, *levels, **changes):
        history = [{"phase": "level", "step": s, "val_accuracy": v, "macs_ratio": 0.5} for s, v in levels]
        driver.settle(run.number, replace(simulated(run, bench), history=history, **changes))

    save_weights(bench.task.dense_model(), study.trial_folder(1))
    ends(runs[0], (12, 99.0), (24, 60.0), (24, 80.0))
    assert study.ask(bench) is None  # others still run
    ends(runs[2], status="diverged", val_accuracy=None, reason="the loss is nan")
    ends(runs[1], (12, 10.0), (24, 70.0), (24, 75.0))
    assert study.nested_trial == 1
    record = study.front_record()
    assert record["nested"] == {"trial": 1, "scores": {"0": 70.0, "1": 72.5, "2": None}}
    assert "trial 1, the best of 3" in record["verdict"]["trust"]
    plan = study.ask(bench)
    assert plan.path == ()
    assert plan.weights == study.trial_folder(1) / NESTED
    assert plan.recipe.lr == runs[1].recipe.lr


def test_recipes_of_several_runs_cover_what_is_searched(digits_yaml):
    settings = ["recipe.lr={low: 0.01, high: 0.1, log: true}", "recipe.schedule={choices: [cosine, step]}"]
    space = read_space(digits_yaml, settings=[*NESTED_STUDY, *settings]).recipe
    found = spread_recipes(space, 9, seed=0)
    assert found == spread_recipes(space, 9, seed=0) != spread_recipes(space, 9, seed=1)
    rates = sorted(recipe["lr"] for recipe in found[1:])
    for i, rate in enumerate(rates):  # one in each eighth of the logarithm
        assert 10 ** (-2 + i / 8) <= rate <= 10 ** (-2 + (i + 1) / 8)
    assert {recipe["schedule"] for recipe in found} == {"cosine", "step"}
    fixed = ["recipe.lr=0.03", "recipe.factor_share=0.5", "recipe.projection.period=10"]
    few = read_space(digits_yaml, settings=[*NESTED_STUDY, *fixed, settings[1]]).recipe
    assert spread_recipes(few, 9, seed=0) == [{"schedule": "cosine"}, {"schedule": "step"}]
    none = read_space(digits_yaml, settings=[*NESTED_STUDY, *fixed]).recipe
    assert spread_recipes(none, 2, seed=0) == [{}]


def test_what_makes_no_sense_is_refused(digits_yaml, make):
    for settings, text in (
        (["search.early_stopping={}"], "leave early_stopping out"), (["search.repeats=1"], "leave repeats out"),
        (["recipe.steps=0"], "at least 1"),
        (["search.trials=1"], "2 trials or more"), (["search.nested.runs=4"], "5 trials or more"),
        (["search.nested.drawn=7"], "more than the 4 levels"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=text):
            read_space(digits_yaml, settings=[*NESTED_STUDY, *settings])
    with pytest.raises(UsageError, match=r"search\.strategy=nested"):
        make().at("flops=50%")
