"""A preview: plans over a range of budgets, scored without training, on the real digits and through the command line."""

import json

import numpy as np
import pytest
from matplotlib import image as png

import ranksearch
from ranksearch.allocate import CurveCache
from ranksearch.compress import RankPlan, plan_cost
from ranksearch.errors import UsageError
from ranksearch.search.preview import ALLOCATORS, levels_of
from ranksearch.search.workbench import open_net, prepare
from ranksearch.space.reading import read_space
from ranksearch.store.folder import new_folder
from ranksearch.tracking.preview_figures import kept_chart
from tests.test_cli import call


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(folder, record) of a preview by every allocator but the measured one, after a search's curves were not there."""
    from tests.conftest import REPOSITORY

    folder = tmp_path_factory.mktemp("preview")
    record = ranksearch.preview(
        REPOSITORY / "search_spaces" / "digits_resnet8.yaml", budgets=["flops=45%"], levels=[70, 45.4, 25, 0.5],
        allocators=[name for name in ALLOCATORS if name != "greedy"], images=200, runs=folder,
        settings=["search.sensitivity=kfac", "search.calibration_batches=2"],
    )  # fmt: skip
    return folder, record


def test_every_plan_is_within_its_level_and_costs_what_is_said(digits):
    _, record = digits
    space = read_space("search_spaces/digits_resnet8.yaml")
    _, net = open_net(space)
    # 45.4 is the space's own 45, and no plan has half a percent
    assert sorted({row["level"] for row in record["plans"]}) == [25, 45, 70]
    for row in record["plans"]:
        cost = plan_cost(net, RankPlan.from_dict(row["plan"]))
        assert row["macs"] == cost.macs <= row["level"] / 100 * record["dense"]["macs"]
        assert row["macs_ratio"] == cost.macs / record["dense"]["macs"]
        assert row["params"] == cost.params
        assert 0 <= row["val_accuracy"] <= 100
        assert (row["gap"] is not None) == (row["allocator"] == "solver")
    assert {row["allocator"] for row in record["plans"]} == set(ALLOCATORS) - {"greedy"}
    assert record["images"] == 200
    assert record["dense"]["val_accuracy"] > 95


def test_the_solver_predicts_least_damage_and_the_front_is_what_nothing_betters(digits):
    _, record = digits
    for level in (70, 45, 25):
        at = {row["allocator"]: row["predicted_damage"] for row in record["plans"] if row["level"] == level}
        assert at["solver"] == min(at.values())
    for row in record["plans"]:
        better = [
            other for other in record["plans"]
            if other["val_accuracy"] >= row["val_accuracy"] and other["macs_ratio"] <= row["macs_ratio"]
            and (other["val_accuracy"], other["macs_ratio"]) != (row["val_accuracy"], row["macs_ratio"])
        ]  # fmt: skip
        assert row["on_front"] == (not better)


def test_files_and_figures_are_there_and_do_not_stand_in_a_studys_way(digits, tmp_path):
    folder, record = digits
    study = folder / "digits_resnet8"
    assert json.loads((study / "preview" / "preview.json").read_text()) == json.loads(json.dumps(record))
    picture = png.imread(study / "preview" / "preview.png")
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.05
    page = (study / "preview" / "preview.html").read_text()
    for word in ("stable_rank", "layer2.0.conv1", "validation accuracy"):
        assert word in page
    assert len(CurveCache(study / "curves.safetensors")) > 0
    made = ranksearch.search(
        read_space("search_spaces/digits_resnet8.yaml", settings=["recipe.steps=4", "search.trials=1"]),
        runs=folder,
        inline=True,
    )
    assert made.finished == 1
    assert (study / "preview" / "preview.png").is_file()
    with pytest.raises(UsageError, match="There is a study"):
        new_folder(folder, made.space.name)


def test_heat_map_shows_shares_of_the_largest_useful_rank(digits):
    _, record = digits
    chart = kept_chart(record)
    layers, texts = chart.rows, chart.texts
    assert chart.columns == ["25", "45", "70"]
    table = np.array(chart.values)
    assert table.shape == (len(layers), 3)
    assert ((table > 0) & (table <= 1)).all()
    assert (np.diff(table.mean(axis=0)) > 0).all()  # larger budgets keep more
    plan = next(r for r in record["plans"] if r["allocator"] == "solver" and r["level"] == 25)["plan"]["layers"]
    for name, row in zip(layers, texts, strict=True):
        assert row[0] == "" if plan[name]["lowering"] == "dense" else row[0].split()[-1] == str(plan[name]["rank"])


def test_several_budgets_keep_their_proportion_over_the_levels(tmp_path):
    space = read_space("search_spaces/digits_resnet8.yaml", budgets=["flops=40%", "size=60%"])
    bench = prepare(space, fallback=tmp_path, log=lambda text: None)
    said = []
    levels = levels_of(space, bench.curves, [80, 40, 20, 1], said.append)
    assert [round(level.percent) for level in levels] == [80, 40, 20]
    assert {b.cost: b.text for b in levels[0].budgets} == {"flops": "80%", "size": "100%"}
    assert {b.cost: b.text for b in levels[2].budgets}["size"] == "30%"
    assert "1 % is left out" in said[0]
    with pytest.raises(UsageError, match="None of the levels 1 can be met"):
        levels_of(space.model_copy(update={"budgets": {}}), bench.curves, [1], said.append)


def test_preview_verb(tmp_path, digits_yaml):
    arguments = [
        "preview",
        digits_yaml,
        "--levels",
        "60,30",
        "--allocator",
        "solver",
        "--allocator",
        "greedy",
        "--images",
        "100",
    ]
    done = call(*arguments, "--json", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert {row["allocator"] for row in record["plans"]} == {"solver", "greedy"}
    assert "evaluations on 100 training images" in done.stderr
    assert "preview.png" in done.stderr
    pairs = [
        "--set",
        "layers.lowerings=[tucker2,svd]",
        "--set",
        "layers.rank_multiple=4",
    ]  # ranks with two sides, in multiples
    again = call(*arguments[:4], *pairs, "--runs", "other", cwd=tmp_path).stdout
    assert "tucker2" in again
    assert "solver %" in again
    assert "not trained" in again
    assert "dense" in again


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--levels", "fifty"], "--levels fifty: expected percentages"),
        (["--levels", "120"], "--levels 120: expected percentages"),
        (["--allocator", "solvr"], "Did you mean 'solver'"),
        (["--budget", "flops=1%"], "no plan under these layer rules costs less than"),
        (["--set", "search.sensitivity=hessian"], "there is no sensitivity 'hessian'"),
    ],
)
def test_a_wrong_preview_is_one_message(tmp_path, digits_yaml, arguments, says):
    done = call("preview", digits_yaml, *arguments, cwd=tmp_path, code=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "digits_resnet8" / "preview").exists()
