"""What the figures say, and that both ways of drawing them draw it."""

import random
from dataclasses import replace
from itertools import pairwise, product

import matplotlib
import numpy as np
import pytest
from matplotlib import image as png

from ranksearch.front.front import dominates
from ranksearch.front.importance import AT_COST, FRONT, accuracy_at_cost
from ranksearch.front.layer_costs import layer_costs
from ranksearch.front.row import Row
from ranksearch.space.recipe import RecipeSpace
from ranksearch.tracking.chart import (
    BLACK,
    BLUE,
    DARK_TWINS,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Axis,
    Bars,
    HeatMap,
    Parallel,
    Plot,
    Series,
    decade_ticks,
    ink_on,
    luminance,
)
from ranksearch.tracking.draw_html import save_html
from ranksearch.tracking.draw_png import save_png
from ranksearch.tracking.figures import front_chart, study_charts
from ranksearch.tracking.learnt import learnt
from ranksearch.tracking.learnt_figures import learnt_charts
from ranksearch.tracking.report import report_html
from ranksearch.tracking.trial_figures import trial_charts
from ranksearch.tracking.view import View
from ranksearch.trial.metric import Metric
from ranksearch.trial.recipe import Recipe, flattened, middle
from ranksearch.trial.result import Status, TrialResult
from ranksearch.words import PARAMETERS, parameter_in_words, parameter_label
from tests.conftest import simulated

METRIC = Metric("accuracy", "maximize", "%", 95.0)
LOSSES = [{"step": step, "train_loss": 1 / step} for step in (2, 4, 6)]
PROJECTIONS = [
    {
        "step": 2,
        "loss_before": 0.5,
        "loss_after": 0.7,
        "removed_energy": {"layer1.0.conv1": 1e-2, "layer2.0.conv1": 0.0},
    },
    {
        "step": 4,
        "loss_before": None,
        "loss_after": None,
        "removed_energy": {"layer1.0.conv1": 1e-4, "layer2.0.conv1": 1e-6},
    },
]


@pytest.fixture
def studied(make, bench):
    """(study, view) of 24 simulated trials: accuracy grows with the cost; one is far below, one failed."""
    study, rng = make(trials=24, budgets=["flops=60%"]), random.Random(0)
    while (candidate := study.ask(bench)) is not None:
        result = simulated(candidate, bench)
        accuracy = {5: 10.0}.get(candidate.number, 80 + 18 * (result.macs / 747_136) ** 0.5 + rng.random())
        if candidate.number == 7:
            study.tell(7, TrialResult("failed", candidate.seed, 0.0, reason="ValueError: <b>no</b>\nmore"))
            continue
        history = [{"phase": "projected", "step": 4, "val_accuracy": accuracy - 1, "val_loss": 0.3}]
        study.tell(
            candidate.number,
            TrialResult(
                "complete", candidate.seed, 1.0, val_accuracy=accuracy, macs=result.macs, params=result.params,
                size_bytes=result.size_bytes, losses=LOSSES, projections=PROJECTIONS, history=history, seconds=2.0,
            ),
        )  # fmt: skip
    return study, View.of(study)


def test_the_front_is_told_from_what_it_dominates(studied):
    study, view = studied
    chart = front_chart(view, "macs")
    others, front, dense = chart.series
    assert len(front.x) == len(study.front)
    assert front.x == sorted(front.x)
    assert list(front.y) == sorted(front.y)
    assert len(others.x) + len(front.x) == 23
    assert others.faint
    rows = {row["trial"]: row for row in study.trials if row["status"] == "complete"}
    for number, row in rows.items():
        beaten = any(dominates(other, row, ["accuracy", "macs"]) for other in rows.values())
        assert any(text.startswith(f"trial {number} (") for text in front.hover) == (not beaten)
    labelled = [(x, y) for x, y, label in zip(front.x, front.y, front.labels, strict=True) if label]
    assert labelled[-1] == (front.x[-1], front.y[-1])  # the most accurate one; what lies close to it has none
    assert len(labelled) > 5
    assert all(b[0] - a[0] > 3 or b[1] - a[1] > 0.4 for a, b in pairwise(labelled))
    assert (dense.x, dense.y) == ([100.0], [99.0])
    (limit,) = chart.limits
    assert limit.x == pytest.approx(60)
    assert limit.label == "budget MACs ≤ 60%"
    low, high = chart.y_range  # the trial at 10 % does not flatten the front
    assert 10 < low < min(front.y)
    assert high > 99


@pytest.mark.parametrize(
    ("budget", "cost", "percent"),
    [
        ("macs=373568", "macs", 50),
        ("flops=373568", "macs", 25),
        ("params=37501", "params", 50),
        ("size=50%", "macs", None),
    ],
)
def test_the_budgets_line_is_where_the_budget_is(make, budget, cost, percent):
    view = View.of(make(budgets=[budget], settings=["budgets={}", f"search.objectives=[accuracy, {cost}]"]))
    found = view.budget_ratio(cost)
    assert found is None if percent is None else 100 * found == pytest.approx(percent, abs=0.01)


def test_the_cost_of_a_figure_is_the_one_that_is_searched(make, bench):
    study = make(trials=4, settings=["search.objectives=[accuracy, params, size]"])
    while (candidate := study.ask(bench)) is not None:
        study.tell(candidate.number, simulated(candidate, bench))
    charts = study_charts(View.of(study), {})
    assert charts["front"].x == "params (% of dense)"
    assert charts["front_size"].x == "size (% of dense)"
    assert [series.line for series in charts["front"].series if series.name == "front, validation"] == [
        ""
    ]  # no stairs of three objectives


def test_progress_grows_and_ends_at_the_study(studied):
    study, view = studied
    charts = study_charts(view, {})
    (line,) = charts["hypervolume"].series
    assert list(line.x) == list(range(1, 25))
    assert list(line.y) == sorted(line.y)
    assert line.y[-1] == study.hypervolume
    each, best, _ = charts["best_accuracy"].series
    assert len(each.x) == 23
    assert best.y[-1] == study.leader["val_accuracy"]


def test_the_maps_show_every_layer_of_every_net_of_the_front(studied, bench):
    study, view = studied
    charts = study_charts(view, {})
    kept, chosen = charts["kept_rank"], charts["lowerings"]
    assert list(kept.rows) == [o.layer.name for o in bench.curves.layers if len(o.choices) > 1]
    assert len(kept.columns) == len(study.front)
    for j, row in enumerate(view.front_rows):
        assert kept.columns[j].startswith(f"t{row['trial']}\n")
        for i, name in enumerate(kept.rows):
            layer = row["plan"]["layers"][name]
            assert chosen.values[i][j] == layer["lowering"]
            if layer["lowering"] == "dense":
                assert kept.values[i][j] == 1.0
            else:
                options = next(o for o in bench.curves.layers if o.layer.name == name)
                largest = options.choices[options.ladder(layer["lowering"])[-1]].rank
                assert kept.values[i][j] == pytest.approx(min(1, layer["rank"] / largest))
                assert kept.texts[i][j].endswith(f" {layer['rank']}")


def test_layers_of_a_study_that_was_made_before_a_setting_of_layers_was_known_are_read(studied):
    _, view = studied
    plan, records = view.front_rows[0]["plan"], view.info["layer_costs"]
    before = [r | {"spec": {name: value for name, value in r["spec"].items() if name != "lookup"}} for r in records]
    assert before != records
    assert layer_costs(before, plan) == layer_costs(records, plan)


def test_importances_find_the_parameter_that_decides(make, bench):
    settings = ["recipe.lr={low: 0.01, high: 0.1}", "recipe.projection.period=20", "search.sampler=random"]
    study = make(trials=60, settings=settings)
    assert study.importances() == {}  # too few trials say nothing
    while (candidate := study.ask(bench)) is not None:
        result = simulated(candidate, bench, accuracy=80 + 5 * candidate.recipe.lr / 0.1)
        study.tell(candidate.number, result)
    found = study.importances()
    assert set(found) == {FRONT, AT_COST}
    assert next(iter(found[AT_COST])) == "lr"
    assert sum(found[AT_COST].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.028, 1.35], [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]), ([1e-4, 0.05], [1e-4, 1e-3, 1e-2]), ([0.03, 0.03], [0.02])],
)
def test_a_logarithmic_axis_is_marked_with_whole_numbers(values, ticks):
    assert decade_ticks(values) == pytest.approx(ticks)


def test_accuracy_at_its_cost_is_what_a_parabola_leaves():
    costs = np.exp(np.linspace(-2, 0, 9))
    shares = [(90 + 4 * np.log(c) - np.log(c) ** 2) / 100 for c in costs]
    rows = [Row(0, Status.COMPLETE, macs_ratio=c, share=share) for c, share in zip(costs, shares, strict=True)]
    assert accuracy_at_cost(rows, ["accuracy", "macs"]) == pytest.approx(np.zeros(9), abs=1e-9)
    rows[4] = replace(rows[4], share=rows[4].share + 0.01)
    assert np.argmax(accuracy_at_cost(rows, ["accuracy", "macs"])) == 4
    assert accuracy_at_cost(rows, ["accuracy"]).mean() == pytest.approx(0)


def test_a_trials_charts_hold_its_curve_and_what_projections_removed(studied):
    row = studied[0].trials[0]
    charts = trial_charts(row, METRIC)
    loss, before, after = charts["training"].series
    assert list(loss.y) == [0.5, 0.25, pytest.approx(1 / 6)]
    assert (list(before.x), list(before.y), list(after.y)) == ([2], [0.5], [0.7])
    removed = charts["removed_energy"]
    assert (list(removed.rows), list(removed.columns)) == (["layer1.0.conv1", "layer2.0.conv1"], ["2", "4"])
    assert removed.values == [[1e-2, 1e-4], [None, 1e-6]]
    assert charts["phases"].series[0].labels == ["projected"]
    assert trial_charts(replace(row, losses=[], history=[], projections=[]), METRIC) == {}


CHARTS = [
    Plot("a plot", "step", "loss (nats)", [Series("one", [1, 2], [3, 4], "#0072B2", "circle", "steps", ["a", "b"], ["t1", "t2"])]),
    HeatMap("a map", "step", ["conv"], ["1", "2"], [[1e-3, None]], [["", ""]], [["x", "y"]], low=1e-6, high=1e-2, log=True),
    HeatMap("kinds", "net", ["c"], "12", [["svd", "dense"]], [["v", ""]], [["x", "y"]], colours={"dense": "#eeeeee", "svd": BLUE}),
    Bars("bars", "share", ["lr", "level"], {"front": [0.2, 0.8], "accuracy": [0.7, 0.3]}),
    Parallel("lines", [Axis("rate", [-2.0, -1.0], log=True), Axis("MACs %", [50.0, 60.0])], [90.0, 91.0], "validation", 90.0, 91.0),
]  # fmt: skip


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_every_kind_of_chart_is_drawn_both_ways(chart, tmp_path):
    backend = matplotlib.get_backend()
    save_png([chart], tmp_path / "figure.png")
    picture = png.imread(tmp_path / "figure.png")
    assert picture[..., :3].std() > 0.02
    assert matplotlib.get_backend() == backend
    save_html([chart, chart], tmp_path / "figure.html", title="two <b>")
    page = (tmp_path / "figure.html").read_text()
    assert page.count('class="plotly-graph-div"') == 2
    assert page.count('id="packed"') == 1  # the script is there once
    assert len(page) < 2_500_000
    assert chart.title in page
    assert "two &lt;b&gt;" in page


def test_a_report_is_one_page_that_fetches_nothing(studied):
    study, view = studied
    page = report_html(view, study.importances())
    assert page.count('id="packed"') == 1
    assert "<script src" not in page
    assert "<link" not in page
    assert page.count('class="plotly-graph-div"') == len(study_charts(view, study.importances())) + 3 * len(study.front)
    body = page
    for row in study.front:
        assert f"<td>{row['trial']}</td><td>{row['val_accuracy']:.2f}</td>" in body
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in page  # what a user's code says is no HTML of ours
    assert "more" not in page.split("ValueError")[1][:60]


def test_a_report_of_a_study_without_results_says_so(make):
    page = report_html(View.of(make()), {})
    assert "No trial has been completed." in page


def contrast(one: str, other: str) -> float:
    """Contrast of two colours `#rgb` or `#rrggbb`, 1 to 21."""
    digits = [colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:]) for colour in (one, other)]
    dark, light = sorted(luminance(*(part / 255 for part in bytes.fromhex(colour))) for colour in digits)
    return (light + 0.05) / (dark + 0.05)


def test_text_on_any_cell_stands_out():
    for red, green, blue in product(range(0, 256, 15), repeat=3):
        assert contrast(ink_on(red / 255, green / 255, blue / 255), f"#{red:02x}{green:02x}{blue:02x}") >= 4.5


@pytest.mark.parametrize("colour", [BLACK, GREY, BLUE, ORANGE, GREEN, PINK])
def test_series_stand_out_from_paper_and_from_a_dark_page(colour):
    assert contrast(colour, "#ffffff") >= 3  # what the guidelines ask of marks
    assert contrast(DARK_TWINS.get(colour, colour), "#17191c") >= 4.5


def test_what_was_searched_has_plain_names_in_every_figure_and_sentence(studied):
    study, view = studied
    charts = learnt_charts(view, study.importances())
    said = [*charts["importances"].names, *(axis.name for axis in charts["parallel"].axes)]
    said += [charts[name].title.removeprefix(f"{view.name}: ") for name in charts if name.startswith("slice")]
    stored = {name for row in view.complete for name in row["params_searched"]}
    assert {"level", "lr", "log_weight/layer1"} <= stored
    assert not {text.rstrip(" ▲▼") for text in said} & stored
    assert "learning rate" in {text.rstrip(" ▲▼") for text in said}
    for line in learnt(view, study.importances()):
        assert line.split(" (")[0] not in stored


def test_whatever_may_be_searched_has_a_label():
    names = {name for name, _ in flattened(Recipe.settled(RecipeSpace(steps=1), middle).to_dict())}
    fixed = {"steps", "batch_size", "bn_batches", "precision", "compile"}
    assert names - fixed <= set(PARAMETERS)
    assert set(PARAMETERS) - names == {"level", "trust", "prediction", "log_weight", "lowering", "ratio"}
    assert parameter_label("log_weight/layer1.0-2") == "protection of layer1.0-2"
    assert parameter_label("log_weight/2") == "protection of layer 2"  # an nn.Sequential's
    assert parameter_in_words("lr") == "learning rate (lr)"
    assert parameter_in_words("momentum") == "momentum"
    assert parameter_in_words("level") == "share of the budget used (1: all of it; level)"


def test_a_command_in_a_sentence_is_set_as_code_and_the_rest_is_text():
    from ranksearch.tracking.report import _coded

    assert str(_coded("lower it by `--set recipe.lr=1e-3`, to < 1")) == (
        "lower it by <code>--set recipe.lr=1e-3</code>, to &lt; 1"
    )
