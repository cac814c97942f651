"""A limit on the metric: how it is written, where the search looks, what front, `best` and verdict make of it; blocks of layers."""

import json

import numpy as np
import pytest
from torch import nn

from ranksearch.allocate import LayerRules, rank_curves
from ranksearch.compress import plan_cost, trace
from ranksearch.errors import UsageError
from ranksearch.search.budgets import lowest_level
from ranksearch.search.groups import MOST_BLOCKS, blocks_of
from ranksearch.search.local_tpe import cost_at_limit
from ranksearch.space.quality import limits_of, parse_quality
from ranksearch.space.reading import read_space
from ranksearch.study.driver import run_inline
from ranksearch.study.repeats import repeat_front, that_matter
from ranksearch.study.study import Study
from ranksearch.trial.metric import Metric
from tests.conftest import simulated


@pytest.mark.parametrize(
    ("text", "direction", "dense", "value"),
    [
        ("-1", "maximize", 92.4, 91.4), ("-2%", "maximize", 92.4, 92.4 * 0.98), ("90", "maximize", 92.4, 90.0),
        ("+0.5", "maximize", 92.4, 92.9), ("-1", "minimize", 50.0, 51.0), ("-2%", "minimize", 50.0, 51.0),
        ("52.5", "minimize", 50.0, 52.5), ("-10%", "maximize", -4.0, -4.4), (-1, "maximize", 80.0, 79.0), (85, "maximize", 80.0, 85.0),
    ],
)  # fmt: skip
def test_a_limit_is_read_as_it_is_said(text, direction, dense, value):
    metric = Metric("m", direction, "", dense)
    quality = parse_quality("m", text)
    assert metric.limit(quality) == pytest.approx(value)
    better, worse = (value + sign * 1e-6 * (1 if direction == "maximize" else -1) for sign in (1, -1))
    assert metric.share(better) >= metric.least_share(quality) > metric.share(worse)


@pytest.mark.parametrize("text", ["2%", "one", "", "-", True, "1..2", "-1 point"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(UsageError, match="at least accuracy="):
        parse_quality("accuracy", text)


def test_limits_are_written_in_several_ways():
    assert limits_of("accuracy=-1") == limits_of("-1") == limits_of(["accuracy=-1"]) == {"accuracy": "-1"}
    assert limits_of({"dice": 0.8}) == {"dice": 0.8}


def test_the_cheapest_net_above_a_limit_is_closed_in_on():
    """A saturating curve with noise: few proposals lie far below the limit, and the cheapest known comes near the true crossing."""
    rng, known, far = np.random.default_rng(0), [[0.5, 0.9], [0.3, 0.86]], 0

    def accuracy(cost):
        return 0.92 - 0.5 * np.exp(-cost / 0.07)

    limit = 0.88
    true = -0.07 * np.log(0.04 / 0.5)
    for _ in range(20):
        cost, _ = cost_at_limit(np.array(known), limit, 0.02, 0.5, rng)
        cost = rng.uniform(0.2, 0.5) if cost is None else cost
        known.append([cost, accuracy(cost) + rng.normal(0, 0.003)])
        far += known[-1][1] < limit - 0.1
    cheapest = min(cost for cost, value in known if value >= limit)
    assert far == 0
    assert cheapest < 1.15 * true
    # nothing above it yet: upwards; as dear as can be already: the dearest again
    assert 0.3 < cost_at_limit(np.array([[0.3, 0.7]]), limit, 0.02, 0.5, rng)[0] <= 0.5
    assert cost_at_limit(np.array([[0.5, 0.7]]), limit, 0.02, 0.5, rng)[0] == 0.5


def test_a_failure_by_less_than_the_noise_does_not_close_what_lies_below_it():
    rng = np.random.default_rng(0)
    known = [
        [0.5, 0.96],
        [0.3, 0.938],
        [0.28, 0.949],
        [0.2, 0.938],
        [0.25, 0.952],
    ]  # about .95 all over, the limit a little below
    costs = [cost_at_limit(np.array(known), 0.94, 0.05, 0.5, rng)[0] for _ in range(40)]
    below = [cost for cost in costs if cost is not None]
    assert 30 < len(below) < 40
    assert max(below) < 0.2
    known[3][1] = 0.8  # a clear one does
    costs = [cost_at_limit(np.array(known), 0.94, 0.05, 0.5, rng)[0] for _ in range(20)]
    assert min(cost for cost in costs if cost is not None) > 0.2


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_where_only_the_largest_nets_are_above_the_limit_the_front_above_it_has_no_gap_to_fill(
    bench, tmp_path, digits_yaml
):
    study = Study.create(tmp_path, read_space(digits_yaml, trials=24, at_least="accuracy=-1"), bench, 97.0)
    most = 0.0
    while (candidate := study.ask(bench)) is not None:
        macs = plan_cost(bench.net, candidate.plan).macs
        most = max(most, macs)
        study.tell(candidate.number, simulated(candidate, bench, 97.0 if macs >= most else 90.0))
    assert study.counts == {"complete": 24}
    assert all(row.val_accuracy == 97.0 for row in study.front)


def test_a_study_with_a_limit_ends_on_the_cheapest_net_above_it(bench, tmp_path, digits_yaml):
    space = read_space(digits_yaml, trials=16, at_least=["accuracy=-1"], objective="fewest MACs")
    study = Study.create(tmp_path, space, bench, 97.0)

    def accuracy(candidate):
        return 97.5 - 60 * np.exp(-plan_cost(bench.net, candidate.plan).macs / 747_136 / 0.08)

    while (candidate := study.ask(bench)) is not None:
        study.tell(candidate.number, simulated(candidate, bench, accuracy(candidate)))
    assert {row.status for row in study.trials} == {"complete"}
    front = study.front
    ratios = [row.macs_ratio for row in front]
    assert ratios == sorted(ratios)
    assert all(row.val_accuracy >= 96 for row in front)
    assert any(row.val_accuracy < 96 for row in study.trials), "the limit was never reached: the test tells nothing"
    assert sum(row.val_accuracy < 87 for row in study.trials) <= 3
    met = [row for row in study.trials if row.val_accuracy >= 96]
    assert study.best().trial == front[0].trial == min(met, key=lambda row: row.macs_ratio).trial
    record = study.front_record()
    assert record["at_least"] == {"text": "-1", "value": 96.0}
    assert record["reference_point"] == [pytest.approx(0.96), 1.0]
    assert 0 < record["hypervolume"] < 0.04
    assert record["verdict"]["trial"] == front[0].trial
    assert "accuracy ≥ 96.00 %" in record["verdict"]["why"]
    # several conditions at once, on the study and on its front
    tight = study.best(budgets=["macs=45%", "params=60%"], accuracy="-0.5")
    assert tight.val_accuracy >= 96.5
    assert tight.macs_ratio <= 0.45
    assert tight.params_ratio <= 0.6
    part = study.front_record(budgets=["macs=45%"], at_least=["accuracy=96.5"])
    assert part["trials"]
    assert all(row["val_accuracy"] >= 96.5 and row["macs_ratio"] <= 0.45 for row in part["trials"])
    with pytest.raises(UsageError, match=r"no finished trial|No finished trial .* reaches"):
        study.best(accuracy="99.9")
    opened = Study.open(study.folder)
    assert [row.trial for row in opened.front] == [row.trial for row in front]
    assert json.loads((study.folder / "front.json").read_text())["at_least"]["value"] == 96.0


def test_a_study_whose_nets_all_miss_the_limit_says_how_far_the_best_is(bench, tmp_path, digits_yaml):
    study = Study.create(tmp_path, read_space(digits_yaml, trials=3, at_least="accuracy=98"), bench, 97.0)
    while (candidate := study.ask(bench)) is not None:
        study.tell(candidate.number, simulated(candidate, bench, 90.0))
    record = study.front_record()
    assert record["trials"] == []
    assert "accuracy ≥ 98.00 %" in record["verdict"]["ship"]
    assert "reaches 90.00 %" in record["verdict"]["ship"]
    with pytest.raises(UsageError, match="which no net can have"):
        Study.create(tmp_path, read_space(digits_yaml, name="other", at_least="accuracy=+9"), bench, 97.0)
    with pytest.raises(UsageError, match="'accuracy'"):
        Study.create(tmp_path, read_space(digits_yaml, name="another", at_least="dice=-1"), bench, 97.0)


def test_the_budgeted_cost_is_the_searched_one(tmp_path, digits_yaml):
    path = tmp_path / "space.yaml"
    path.write_text(
        digits_yaml.read_text().replace("  objectives: [accuracy, macs]\n", "").replace("flops: 50%", "params: 60%")
    )
    assert read_space(path).search.objectives == ["accuracy", "params"]
    assert read_space(path, budgets=["flops=50%"]).search.objectives == ["accuracy", "macs"]
    assert read_space(path, objective="smallest").search.objectives == ["accuracy", "size"]
    assert read_space(path, objective="latency,size").search.objectives == ["accuracy", "latency", "size"]
    with pytest.raises(UsageError, match="smallest"):
        read_space(path, objective="smalest")
    with pytest.raises(UsageError, match="name a cost too"):
        read_space(path, at_least="-1", settings=["search.objectives=[accuracy]"])


def test_levels_run_over_what_is_reachable(bench, digits_yaml):
    space = read_space(digits_yaml)
    assert lowest_level(space, bench.curves) == space.search.front_from
    least = bench.curves.smallest()["flops"]
    tight = read_space(digits_yaml, budgets=[f"flops={2 * least}"], settings=["search.front_from=0.1"])
    assert 0.5 < lowest_level(tight, bench.curves) < 1


def test_blocks_take_apart_what_one_name_holds():
    resnet = [f"layer{i}.{j}.conv" for i in (1, 2, 3) for j in (0, 1)]
    assert set(blocks_of(resnet).values()) == {"layer1", "layer2", "layer3"}
    wrapped = [f"net.{name}" for name in resnet]
    assert set(blocks_of(wrapped).values()) == {"net.layer1", "net.layer2", "net.layer3"}
    mostly = [*(f"encoder.layer.{i}.{part}" for i in range(12) for part in ("q", "k", "v")), "head"]
    found = blocks_of(mostly)
    assert found["head"] == "head"
    inside = {block for name, block in found.items() if name != "head"}
    assert len(inside) == MOST_BLOCKS
    assert {found[f"encoder.layer.0.{part}"] for part in ("q", "k", "v")} == {"encoder.layer.0-1"}
    assert blocks_of(["only"]) == {"only": "only"}
    assert blocks_of([]) == {}


def test_a_net_in_one_module_is_searched_by_blocks(digits_yaml):
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))))
    import torch

    from ranksearch.search.groups import grouping_of, groups_of

    curves = rank_curves(net, trace(net, torch.zeros(1, 8, 8, 8)), LayerRules(("im2col",)))
    assert len(groups_of(curves, grouping_of(read_space(digits_yaml)))) == 3
    assert len(groups_of(curves, "stage")) == 1


# Trained again with other seeds ---------------------------------------------------------------------------------------


def test_the_nets_that_matter_are_trained_again_with_other_seeds(bench, tmp_path, digits_yaml):
    settings = ["search.repeats=2", "recipe.steps=4", "recipe.bn_batches=1", "tracking.models=false"]
    study = Study.create(tmp_path, read_space(digits_yaml, trials=3, settings=settings), bench, 97.0)
    run_inline(study, bench, lambda row: None, print)
    scored, said = [], []

    def score(net):
        scored.append(net)
        return 90.0 + len(scored)

    repeat_front(study, bench, score, said.append)
    matter = that_matter(study.front, study.cost)
    assert 1 <= len(matter) <= 3
    assert len(scored) == 2 * len(matter)
    assert sum("again with another seed" in line for line in said) == len(scored)
    again = study.front[0].repeats
    assert again["runs"] == 3
    assert again["failed"] == 0
    values = [study.front[0].val_accuracy, *(entry["validation"] for entry in study.repeats(study.front[0].trial))]
    assert again["validation_mean"] == pytest.approx(np.mean(values))
    assert again["validation_std"] == pytest.approx(np.std(values, ddof=1))
    assert again["test_mean"] == pytest.approx(91.5)  # the trial itself has not been scored on test here
    repeat_front(study, bench, score, said.append)
    assert len(scored) == 2 * len(matter), "what was done is not done again"
    opened = Study.open(study.folder)
    assert opened.front[0].repeats == again
    assert f"trial {study.front[0].trial} test 91.50 ± 0.71 over 3 seeds" in opened.front_record()["verdict"]["trust"]
    assert not list((study.folder / "repeats").iterdir())
