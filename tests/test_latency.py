"""Latency as a cost: the laws of table, prediction, budgets and front under a clock that is known, and one real measurement."""

from copy import deepcopy
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.allocate import LayerRules, allocate_plan, parse_budget, rank_curves
from ranksearch.allocate.latency import fit_factors, timed
from ranksearch.compress import DENSE, LayerPlan, RankPlan, plan_cost, restructure_, trace
from ranksearch.deploy.latency import latencies_ms
from ranksearch.deploy.latency_table import LatencyTable, measured_ranks
from ranksearch.deploy.stopwatch import STEPS, LatencySetting, Stopwatch, probed_ranks, widest_step
from ranksearch.errors import UsageError
from ranksearch.front.row import Row
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.search.budgets import at_level, budgets_of
from ranksearch.space.reading import read_space
from ranksearch.study.ledger import Ledger
from ranksearch.tasks.resnet import CifarResNet
from ranksearch.trial.result import Status

SETTING = LatencySetting("eager", batch=1, threads=1)
CONVS = ("im2col", "channel", "spatial")
INSIDE = 1.2
"""What a layer takes inside a net, in units of what it takes by itself."""
OTHER_MS = 0.3


def known_ms(spec: LayerSpec, in_size, choice: LayerPlan) -> float:
    """10 us per layer that runs, and its MACs with both channel counts rounded up to 16 at 1 GMAC a second."""
    total = 0.0
    for factor in lowering_named(choice.lowering).factor_specs(spec, choice.rank):
        channels = prod(-(-n // 16) * 16 for n in (factor.in_channels, factor.out_channels))
        total += 0.01 + channels * prod(factor.kernel_size) * prod(factor.out_size(in_size)) * 1e-6
        in_size = factor.out_size(in_size)
    return total


class Known(Stopwatch):
    """A stopwatch that reckons."""

    key = "known"

    def __init__(self, setting=SETTING):
        super().__init__(setting)
        self.timed = []

    def layers_ms(self, spec, in_size, choices):
        self.timed += [(spec, in_size, choice) for choice in choices if choice != DENSE]
        return [known_ms(spec, in_size, choice) for choice in choices]

    def nets_and_layers_ms(self, nets, example, shapes, *, seconds=1.0):
        layers = [trace(net, example).layers for net in nets]
        alone = [
            sum(known_ms(layer.spec, size, DENSE) for layer in found for size in layer.in_sizes) for found in layers
        ]
        return [OTHER_MS + INSIDE * milliseconds for milliseconds in alone], [
            known_ms(*shape, DENSE) for shape in shapes
        ]


def silent(text: str) -> None: ...


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CifarResNet(1, channels=3, classes=10).eval()


@pytest.fixture(scope="module")
def curves(model):
    example = torch.zeros(1, 3, 32, 32)
    found = rank_curves(model, trace(model, example), LayerRules(CONVS))
    return timed(found, model, example, LatencyTable(Known()), silent)


def milliseconds(model, plan) -> float:
    return Known().nets_ms([restructure_(deepcopy(model), plan)], torch.zeros(1, 3, 32, 32))[0]


@pytest.mark.parametrize("percent", [100, 95, 85, 75])
def test_a_latency_budget_is_kept_by_the_table_and_the_table_predicts_the_net(curves, model, percent):
    budget = parse_budget("latency", f"{percent}%")
    plan = allocate_plan(curves, [budget]).plan
    cost = curves.cost(plan)
    assert budget.allows(cost, curves.dense)
    assert cost.latency_ms <= percent / 100 * curves.dense.latency_ms
    assert cost.latency_ms == pytest.approx(milliseconds(model, plan), rel=0.08)
    # nothing is lowered that is slower lowered
    for options in curves.layers:
        assert options.latency[options.choices.index(plan[options.layer.name])] <= options.latency[0]


def test_budgets_on_latency_and_flops_hold_at_once(curves):
    for latency, flops in ((80, 90), (95, 45), (75, 60)):
        budgets = [parse_budget("latency", f"{latency}%"), parse_budget("flops", f"{flops}%")]
        cost = curves.cost(allocate_plan(curves, budgets).plan)
        assert all(budget.allows(cost, curves.dense) for budget in budgets)


def test_absolute_budgets_have_units(curves):
    dense = replace(curves.dense, latency_ms=5.0)
    limits = {parse_budget("latency", text).limit(dense) for text in ("3.5ms", "3500us", "0.0035s", "70%")}
    assert limits == {3_500_000}
    with pytest.raises(UsageError, match="the unit is missing"):
        parse_budget("latency", "3.5")


def test_a_budget_that_cannot_be_met_names_the_smallest_which_can(curves):
    with pytest.raises(
        UsageError, match=r"Budget latency=1% allows .* ms of .* ms latency, but no plan .* less than ([\d.]+) ms"
    ) as error:
        allocate_plan(curves, [parse_budget("latency", "1%")])
    smallest = str(error.value).split("less than ")[1].split(" ms")[0]
    assert allocate_plan(curves, [parse_budget("latency", f"{smallest}ms")]).plan
    together = [parse_budget("latency", f"{smallest}ms"), parse_budget("flops", "100%")]
    assert allocate_plan(curves, together).plan


def test_without_measured_times_a_latency_budget_says_what_is_missing(model):
    curves = rank_curves(model, trace(model, torch.zeros(1, 3, 32, 32)), LayerRules(CONVS))
    with pytest.raises(UsageError, match="Latency was not measured"):
        allocate_plan(curves, [parse_budget("latency", "50%")])
    assert curves.cost(RankPlan()) == plan_cost(curves.net, RankPlan())


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_any_rank_has_the_time_of_its_step(multiple):
    layer = trace(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), torch.zeros(1, 64, 14, 14)).layers[0]
    table = LatencyTable(Known())
    table.measure([(layer, CONVS, multiple)], silent)
    for name in CONVS:
        values = measured_ranks(lowering_named(name), (layer.spec, layer.in_sizes[0]), 16, multiple)
        ranks = [rank for rank in lowering_named(name).ranks(layer.spec, multiple) if rank <= values[-1]]
        times = table.times_ms(layer, name, ranks)
        exact = [known_ms(layer.spec, (14, 14), LayerPlan(name, rank)) for rank in ranks]
        assert times == pytest.approx(
            exact, rel=0.5 if multiple == 1 else 1e-9
        )  # the clock's steps are not told apart by odd ranks
        assert np.mean(times) == pytest.approx(np.mean(exact), rel=0.05)
        faster = table.faster_below(layer, name)
        assert known_ms(layer.spec, (14, 14), LayerPlan(name, faster)) < table.dense_ms(layer)


def test_a_rank_with_two_sides_lies_between_its_neighbours():
    layer = trace(nn.Sequential(nn.Conv2d(128, 96, 3, padding=1)), torch.zeros(1, 128, 14, 14)).layers[0]
    table = LatencyTable(Known())
    table.measure([(layer, ["tucker2"], 1)], silent)
    ranks = [(8, 8), (16, 40), (70, 30), (100, 96), (128, 96)]
    exact = [known_ms(layer.spec, (14, 14), LayerPlan("tucker2", rank)) for rank in ranks]
    assert table.times_ms(layer, "tucker2", ranks) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("cliff", [21, 13])
def test_a_cliff_between_measured_ranks_is_found(cliff):
    """As PyTorch has where it changes to another kernel: from some rank on, a layer takes half of its dense time more."""

    class Cliff(Known):
        def layers_ms(self, spec, in_size, choices):
            times = super().layers_ms(spec, in_size, choices)
            return [ms + times[0] / 2 * (c.rank >= cliff) for ms, c in zip(times, choices, strict=True)]

    layer = trace(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), torch.zeros(1, 64, 14, 14)).layers[0]
    clock, lowering = Cliff(), lowering_named("spatial")
    table = LatencyTable(clock)
    table.measure([(layer, ["spatial"], 1)], silent)
    most = measured_ranks(lowering, (layer.spec, layer.in_sizes[0]), 16, 1)[-1]
    ranks = [rank for rank in lowering.ranks(layer.spec) if rank <= most]
    exact = Cliff().layers_ms(layer.spec, (14, 14), [DENSE, *(LayerPlan("spatial", rank) for rank in ranks)])
    wrong = np.abs(table.times_ms(layer, "spatial", ranks) - exact[1:]) / exact[0]
    assert np.mean(wrong > 0.25) <= 0.02
    assert len(clock.timed) < len(ranks) / 2 + 40  # not simply all of them


def test_layers_of_one_shape_are_timed_once_and_kept_on_disk(tmp_path, model):
    example, file = torch.zeros(1, 3, 32, 32), tmp_path / "latency.json"
    curves = rank_curves(model, trace(model, example), LayerRules(CONVS))
    first = Known()
    known = timed(curves, model, example, LatencyTable(first, [file, tmp_path / "file.json" / "no.json"]), silent)
    assert len(first.timed) == len(set(first.timed))
    shapes = {(o.layer.spec, size) for o in curves.layers if o.lowerings for size in o.layer.in_sizes}
    assert {(spec, size) for spec, size, _ in first.timed} == shapes
    again = Known()
    assert timed(curves, model, example, LatencyTable(again, [file]), silent).dense == known.dense
    assert again.timed == []
    other = Known()
    other.key = "another device"
    timed(curves, model, example, LatencyTable(other, [file]), silent)
    assert other.timed
    file.write_text("{")
    damaged = Known()
    timed(curves, model, example, LatencyTable(damaged, [file]), silent)
    assert damaged.timed


def test_a_machine_that_slows_down_between_the_layers_does_not_count(model):
    """The table's layers are timed one shape after the other; ten percent slower each here, the last ones twice as slow as the first."""

    class Slowing(Known):
        def layers_ms(self, spec, in_size, choices):
            slowed = 1.1 ** len({(spec, in_size) for spec, in_size, _ in self.timed})
            return [slowed * ms for ms in super().layers_ms(spec, in_size, choices)]

    example = torch.zeros(1, 3, 32, 32)
    found = rank_curves(model, trace(model, example), LayerRules(CONVS))
    steady, slowing = (timed(found, model, example, LatencyTable(clock), silent) for clock in (Known(), Slowing()))
    assert slowing.timing.factors == pytest.approx(steady.timing.factors)
    for one, other in zip(steady.layers, slowing.layers, strict=True):
        assert one.latency == pytest.approx(other.latency, abs=2)


def test_the_factors_of_a_net_are_found():
    replaced, chains = np.array([4.0, 5.0, 3.0]), np.array([1.0, 4.5, 3.5])
    assert fit_factors(replaced, chains, 1.15 * replaced - 1.05 * chains) == pytest.approx((1.15, 1.05), abs=0.03)
    assert fit_factors(replaced, chains, replaced - chains) == pytest.approx((1, 1))
    assert fit_factors(np.zeros(3), np.zeros(3), np.zeros(3)) == (1, 1)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_the_probe_finds_the_width_of_the_steps(width):
    times = {rank: -(-rank // width) * (1 + 0.01 * (rank % 2)) for rank in probed_ranks(STEPS)}
    assert widest_step(times) == width


def test_levels_run_over_latency_where_it_is_what_is_searched(curves, digits_yaml):
    space = read_space(digits_yaml, settings=["budgets={}", "search.objectives=[accuracy, latency]"])
    (budget,) = budgets_of(space, curves)
    assert budget.cost == "latency"
    assert budget.limit(curves.dense) == round(curves.dense.latency_ms * 1e6)
    (lower,) = at_level([budget], 0.8, curves)
    assert curves.cost(allocate_plan(curves, [lower]).plan).latency_ms <= 0.8 * curves.dense.latency_ms
    (least,) = at_level([budget], 0.01, curves)
    assert least.limit(curves.dense) == curves.smallest()["latency"]


def test_what_is_slower_than_dense_leaves_the_front_and_what_it_hid_comes_up():
    def row(number, accuracy, ratio):
        known = {"val_accuracy": accuracy, "share": accuracy / 100, "macs": 1}
        return Row(number, Status.COMPLETE, latency_ratio=ratio, latency_ms=ratio, **known)

    ledger = Ledger(["accuracy", "latency"], [row(0, 90, 0.8), row(1, 89, 0.9), row(2, 95, 1.2)], faster=True)
    assert [r["trial"] for r in ledger.front] == [0]
    ledger.time({"0": [1.1, 1.1]})
    assert [r["trial"] for r in ledger.front] == [1]
    assert ledger.rows[0]["latency_ms"] == 1.1
    assert [r["trial"] for r in Ledger(["accuracy", "latency"], [row(2, 95, 1.2)]).front] == [2]


def test_a_latency_study_predicts_measures_and_keeps_its_table(tmp_path, digits_yaml, short_settings, monkeypatch):
    monkeypatch.setattr(Stopwatch, "key", "known")
    monkeypatch.setattr(Stopwatch, "nets_and_layers_ms", Known.nets_and_layers_ms)
    monkeypatch.setattr(
        Stopwatch, "layers_ms", lambda self, spec, size, choices: [known_ms(spec, size, c) for c in choices]
    )
    settings = [
        *short_settings,
        "search.objectives=[accuracy, latency]",
        "budgets={}",
        "latency={runtime: eager, batch: 2}",
        "search.trials=2",
    ]
    study = ranksearch.search(digits_yaml, settings=settings, runs=tmp_path, inline=True)
    record = study.front_record()
    assert record["latency"] == {"runtime": "eager", "batch": 2, "threads": 1}
    assert record["dense"]["latency_ms"] == study.dense.latency_ms > 0
    for row in study.trials:
        assert row["latency_predicted_ms"] == pytest.approx(row["latency_ms"], rel=0.1)
        assert row["latency_ratio"] == pytest.approx(row["latency_ms"] / study.dense.latency_ms)
    assert record["trials"]
    assert all(row["latency_ratio"] <= 1 and study.is_timed(row["trial"]) for row in record["trials"])
    assert (study.folder / "latency.json").is_file()
    assert type(study).open(study.folder).front_record() == record
    with pytest.raises(UsageError, match="within latency=1us"):
        study.best("latency=1us")
    more = ranksearch.resume(study.space.name, trials=3, runs=tmp_path, inline=True)
    assert more.finished == 3
    assert more.dense == study.dense


def test_a_small_rank_of_a_wide_conv_is_faster_and_the_clock_can_tell():
    spec = LayerSpec.conv(256, 256, (3, 3), padding=(1, 1))
    dense, small = Stopwatch(SETTING).layers_ms(spec, (14, 14), [DENSE, LayerPlan("spatial", 16)])
    assert 0 < small < 0.8 * dense
    one, two = latencies_ms([nn.Identity(), nn.Conv2d(64, 64, 3)], torch.zeros(1, 64, 32, 32), rounds=5)
    assert one < two
