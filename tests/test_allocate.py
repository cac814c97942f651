"""Budgets, rules, the solver against an exact MILP, and the baselines on closed-form spectra."""

import re
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

import ranksearch
from ranksearch.allocate import (
    BASELINES,
    COSTS,
    Budget,
    CostKind,
    Curves,
    LayerRule,
    LayerRules,
    allocate_plan,
    cost_value,
    parse_budget,
    rank_curves,
)  # fmt: skip
from ranksearch.allocate.curve_making import cost_curves
from ranksearch.allocate.curves import limits_of
from ranksearch.allocate.damage import WITHOUT_DATA
from ranksearch.allocate.exact import solve_exactly
from ranksearch.allocate.problem import Infeasible, Poser, Problem
from ranksearch.allocate.solver import solve
from ranksearch.compress import Cost, LayerPlan, RankPlan, dense_cost, plan_cost, trace
from ranksearch.costs import MACS, NANOSECONDS, same_cost
from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.space.search import SearchSpace
from ranksearch.tasks.resnet import CifarResNet

CONVS = ("im2col", "channel", "spatial")


@pytest.fixture(scope="module")
def curves() -> Curves:
    torch.manual_seed(0)
    model = CifarResNet(1, channels=3, classes=10)
    return rank_curves(model, trace(model, torch.zeros(1, 3, 16, 16)), LayerRules(CONVS))


def test_curves_are_the_same_where_several_threads_share_the_layers(curves):
    before = torch.get_num_threads()
    torch.manual_seed(0)
    model = CifarResNet(1, channels=3, classes=10)
    try:
        torch.set_num_threads(3)
        found = rank_curves(model, curves.net, LayerRules(CONVS))
        assert torch.get_num_threads() == 3
        model.layer1[0].conv2.weight.data.fill_(torch.inf)
        with pytest.raises(NonFiniteError, match=r"'layer1\.0\.conv2'"):
            rank_curves(model, curves.net, LayerRules(CONVS))
    finally:
        torch.set_num_threads(before)
    for ours, ever in zip(found.layers, curves.layers, strict=True):
        assert ours.choices == ever.choices
        np.testing.assert_allclose(ours.removed, ever.removed, rtol=0, atol=1e-6)


def random_problem(seed: int, costs: int) -> Problem:
    """Convex-ish damage curves with noise, as rank curves are, with one infeasible-looking tail of unused places."""
    rng = np.random.default_rng(seed)
    layers, options = int(rng.integers(3, 30)), int(rng.integers(3, 40))
    share = np.sort(rng.random((layers, options)), axis=1)
    share[:, -1] = 1.0
    damage = (1 - share) ** rng.uniform(1, 4, (layers, 1)) * rng.uniform(0.1, 5, (layers, 1))
    sizes = rng.uniform(0.2, 3, (costs, layers, 1)) * share * rng.uniform(0.8, 1.2, (costs, layers, options))
    smallest = sizes.min(axis=2).sum(axis=1)
    full = sizes[:, :, -1].sum(axis=1)
    limit = smallest + rng.uniform(0.15, 0.8, costs) * (full - smallest)
    damage[0, options // 2 :] = np.inf
    return Problem(damage, sizes / limit[:, None, None])


def exact(problem: Problem) -> float | None:
    """Optimum by scipy's HiGHS MILP: an independent reference."""
    layers, options = problem.damage.shape
    one_each = np.kron(np.eye(layers), np.ones(options))
    usable = np.isfinite(problem.damage).ravel().astype(float)
    done = milp(
        np.where(usable > 0, np.nan_to_num(problem.damage, posinf=0).ravel(), 0),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(problem.costs.reshape(len(problem.costs), -1), -np.inf, 1),
        ],
        integrality=np.ones(layers * options),
        bounds=Bounds(0, usable),
    )
    return done.fun if done.success else None


@pytest.mark.parametrize("costs", [1, 2])
def test_solver_is_feasible_near_the_exact_optimum_and_its_bound_holds(costs):
    gaps = []
    for seed in range(40):
        problem = random_problem(seed, costs)
        optimum = exact(problem)
        if optimum is None:
            with pytest.raises(Infeasible):
                solve(problem)
            continue
        picks, bound = solve(problem)
        damage, used = problem.totals(picks)
        assert (used <= 1 + 1e-9).all()
        assert bound <= optimum + 1e-6 * abs(optimum)
        assert damage >= optimum - 1e-6 * abs(optimum)
        gaps.append((damage - optimum) / optimum)
    assert len(gaps) >= 30
    # with three layers a pair exchange can be stuck; nets have tens, and there the gap is below half a percent
    assert np.median(gaps) <= 0.002
    assert np.quantile(gaps, 0.9) <= 0.02
    assert max(gaps) <= 0.1


@pytest.mark.parametrize("costs", [1, 2])
def test_the_exact_solver_meets_the_reference_and_every_budget(costs):
    compared = 0
    for seed in range(12):
        problem = random_problem(seed, costs)
        optimum = exact(problem)
        if optimum is None:
            with pytest.raises(Infeasible):
                solve_exactly(problem, time_limit=20)
            continue
        picks, bound = solve_exactly(problem, time_limit=20)
        damage, used = problem.totals(picks)
        assert (used <= 1 + 1e-12).all()
        assert damage == pytest.approx(optimum, rel=2e-4)
        assert bound <= damage * (1 + 1e-9)
        assert bound == pytest.approx(optimum, rel=2e-4)
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("share", [10, 28, 35, 50, 75, 99])
@pytest.mark.parametrize("cost", ["flops", "params", "size"])
def test_plan_is_within_the_budget_and_nothing_more_fits(curves, cost, share):
    budget = parse_budget(cost, f"{share}%")
    allocation = allocate_plan(curves, [budget])
    dense, found = dense_cost(curves.net), plan_cost(curves.net, allocation.plan)
    assert cost_value(found, cost) <= budget.limit(dense)
    assert budget.allows(found, dense)
    assert 0 <= allocation.gap < 1
    problem, _ = Poser(curves, WITHOUT_DATA).pose(limits_of(curves, [budget]), weights={}, allowed={})
    assert allocation.bound <= exact(problem) * (1 + 1e-6)
    assert allocation.damage <= exact(problem) * 1.005
    for options in curves.layers:
        name = options.layer.name
        now = options.choices.index(allocation.plan[name])
        for i, choice in enumerate(options.choices):
            if options.removed[i] < options.removed[now] - 1e-12:
                layers = {**allocation.plan.layers, name: choice}
                better = plan_cost(curves.net, type(allocation.plan)(layers))
                assert cost_value(better, cost) > budget.limit(dense), f"{name} could take {choice}"


def test_two_budgets_hold_at_once(curves):
    dense = dense_cost(curves.net)
    for flops, params in ((50, 30), (30, 50), (70, 10), (15, 90)):
        budgets = [parse_budget("flops", f"{flops}%"), parse_budget("params", f"{params}%")]
        cost = plan_cost(curves.net, allocate_plan(curves, budgets).plan)
        assert all(budget.allows(cost, dense) for budget in budgets)


def test_a_layer_that_matters_more_keeps_more(curves):
    name, budgets = "layer3.0.conv2", [parse_budget("flops", "40%")]
    options = next(o for o in curves.layers if o.layer.name == name)

    def removed(weight: float) -> float:
        plan = allocate_plan(curves, budgets, weights={name: weight}).plan
        return float(options.removed[options.choices.index(plan[name])])

    assert removed(30) < removed(1) < removed(1 / 30)


def test_allowed_lowerings_are_kept_and_any_single_one_reaches_small_budgets(curves):
    names = [o.layer.name for o in curves.layers]
    for lowering in CONVS:
        plan = allocate_plan(curves, [parse_budget("flops", "20%")], allowed={name: [lowering] for name in names}).plan
        assert {choice.lowering for choice in plan.layers.values()} <= {lowering, "dense"}


def test_everything_dense_where_the_budget_allows_it(curves):
    allocation = allocate_plan(curves, [parse_budget("flops", "100%")])
    assert allocation.plan.summary().startswith("dense")
    assert allocation.damage == allocation.gap == 0


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("share", [8, 35, 60])
def test_baselines_are_within_every_budget_and_close_to_it(curves, method, share):
    budgets = [parse_budget("flops", f"{share}%"), parse_budget("params", "70%")]
    cost = plan_cost(curves.net, BASELINES[method](curves, budgets))
    dense = dense_cost(curves.net)
    assert all(budget.allows(cost, dense) for budget in budgets)
    assert max(cost_value(cost, b.cost) / b.limit(dense) for b in budgets) > 0.75


@pytest.mark.parametrize("method", ["solver", *BASELINES])
def test_a_budget_below_the_smallest_plan_names_the_smallest(curves, method):
    budgets = [parse_budget("flops", "1%")]
    call = BASELINES.get(method, allocate_plan)
    with pytest.raises(UsageError, match=r"no plan .* costs less than [\d,]+ \([\d.]+%\)"):
        call(curves, budgets)
    low = curves.smallest()["flops"]
    assert allocate_plan(curves, [parse_budget("flops", str(low))]).plan


def known_curves() -> Curves:
    """One 4x4 Linear with squared singular values 16, 9, 4, 1: energies removed are 14/30, 5/30, 1/30."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Flatten())
    model[0].weight.data = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    return rank_curves(model, trace(model, torch.zeros(1, 4)), LayerRules(("svd",)))


def test_curves_on_a_closed_form_spectrum():
    (options,) = known_curves().layers
    # rank 2 costs as much as dense (2 x 8 = 16), so only rank 1 is worth having
    assert options.choices == (LayerPlan("dense", 0), LayerPlan("svd", 1))
    assert options.removed[1] == pytest.approx(14 / 30)
    assert options.residual[1] == pytest.approx(3 / 4)  # sigma_2 / sigma_1
    assert options.macs.tolist() == options.params.tolist() == [16, 8]


def wide_curves() -> Curves:
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Flatten())
    model[0].weight.data = torch.diag(torch.linspace(40, 1, 40))
    return rank_curves(model, trace(model, torch.zeros(1, 40)), LayerRules(("svd",)))


def test_energy_and_minimax_take_the_smallest_rank_that_keeps_their_threshold():
    curves, squares = wide_curves(), np.arange(40, 0, -1.0) ** 2
    budget = [parse_budget("macs", "50%")]  # 800 MACs: rank 10 of 80 MACs each
    for method in ("energy", "minimax"):
        plan = BASELINES[method](curves, budget)
        assert plan.layers["0"] == LayerPlan("svd", 10)
    (options,) = curves.layers
    at_ten = options.choices.index(LayerPlan("svd", 10))
    assert options.removed[at_ten] == pytest.approx(squares[10:].sum() / squares.sum())
    assert options.residual[at_ten] == pytest.approx(30 / 40)


@pytest.mark.parametrize(
    ("cost", "text", "limit"),
    [
        ("flops", "50%", 1_000_000),
        ("macs", "50%", 500_000),
        ("flops", "1.5M", 1_500_000),
        ("params", "20k", 20_000),
        ("params", 20_000, 20_000),
        ("size", "1.2MiB", 1_258_291),
        ("size", "0.1MB", 100_000),
        ("size", "33.3%", 333_000),
        ("macs", "1e5", 100_000),
    ],
)
def test_budgets_are_read_exactly(cost, text, limit):
    assert parse_budget(cost, text).limit(Cost(1_000_000, 500_000, 1_000_000)) == limit


@pytest.mark.parametrize(
    ("cost", "text", "says"),
    [
        ("flop", "50%", "Did you mean 'flops'"),
        ("flops", "half", "expected a number and a unit"),
        ("flops", "0.5", "written in percent, flops=50"),
        ("flops", "-5%", "expected a number"),
        ("flops", "0%", "above 0"),
        ("size", "3MIB", "Did you mean 'MiB'"),
        ("params", "3MiB", "unknown unit"),
        ("latency", "3", "the unit is missing, such as 70% or 3.5ms"),
    ],
)
def test_a_wrong_budget_says_what_is_valid(cost, text, says):
    with pytest.raises(UsageError, match=says):
        parse_budget(cost, text)


def test_rules_decide_by_name():
    rules = LayerRules(
        CONVS, include=("layer*",), exclude=("layer1.*",), rules=(LayerRule("layer3.*", ("im2col",), min_rank=5),)
    )
    assert rules.for_layer("conv1").lowerings == ()
    assert rules.for_layer("layer1.0.conv1").lowerings == ()
    assert rules.for_layer("layer2.0.conv1").lowerings == CONVS
    assert rules.for_layer("layer3.0.conv1") == LayerRule("layer3.0.conv1", ("im2col",), 5, 1)


def test_a_later_rule_overrides_what_it_names_alone():
    rules = LayerRules(CONVS, rules=(LayerRule("layer3.*", min_rank=6), LayerRule("layer3.0.*", ("im2col",))))
    assert rules.for_layer("layer3.0.conv1") == LayerRule("layer3.0.conv1", ("im2col",), 6, 1)
    assert rules.for_layer("layer3.1.conv1") == LayerRule("layer3.1.conv1", CONVS, 6, 1)


def test_min_rank_and_excluded_layers_hold_in_the_curves():
    torch.manual_seed(0)
    model = CifarResNet(1, channels=1, classes=10)
    net = trace(model, torch.zeros(1, 1, 8, 8))
    rules = LayerRules(CONVS, exclude=("conv1",), rules=(LayerRule("layer3.*", None, 6),))
    curves = {o.layer.name: o for o in rank_curves(model, net, rules).layers}
    assert curves["conv1"].choices == (LayerPlan("dense", 0),)
    assert min(c.rank for c in curves["layer3.0.conv1"].choices if c.rank) == 6


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (LayerRules(CONVS, exclude=("layr1.*",)), r"layers\.exclude: 'layr1\.\*' matches no layer.*layer1"),
        (LayerRules(CONVS, include=("x",)), r"layers\.include"),
        (LayerRules(CONVS, rules=(LayerRule("layer9.*"),)), r"layers\.rules\.0\.match"),
        (LayerRules(CONVS, rules=(LayerRule("linear", ("im2col",)),)), "takes no layer of 'linear'"),
        (LayerRules(CONVS, rules=(LayerRule("layer1.*", None, 40),)), r"min_rank: 40 leaves nothing.*than dense is 23"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(rules, says):
    model = CifarResNet(1, channels=1, classes=10)
    with pytest.raises(UsageError, match=says):
        rules.check(trace(model, torch.zeros(1, 1, 8, 8)))


def test_nothing_to_lower_and_bad_weights_are_errors():
    model = CifarResNet(1, channels=1, classes=10)
    net = trace(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match="leave no layer to lower"):
        rank_curves(model, net, LayerRules(CONVS, exclude=("*",)))
    model.layer2[0].conv1.weight.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"layer2\.0\.conv1"):
        rank_curves(model, net, LayerRules(CONVS))


@pytest.mark.parametrize("method", ["solver", "milp", "uniform"])
def test_public_allocate_on_a_net_of_the_users_own(small_net, image, method):
    plan = ranksearch.allocate(small_net, image, {"flops": "60%", "size": "80%"}, method=method)
    small = ranksearch.compress(small_net, plan)
    net = trace(small_net, image)
    assert plan_cost(net, plan).macs <= 0.6 * dense_cost(net).macs
    assert small(image).shape == (2, 10)


def test_public_allocate_names_the_nearest(small_net, image):
    with pytest.raises(UsageError, match="Did you mean 'uniform'"):
        ranksearch.allocate(small_net, image, {"flops": "60%"}, method="unifrom")
    with pytest.raises(UsageError, match="Did you mean 'relative_energy'"):
        ranksearch.allocate(small_net, image, {"flops": "60%"}, measure="relativ")


def test_zero_layer_stays_cheap_and_harmless():
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    model[0].weight.data.zero_()
    curves = rank_curves(model, trace(model, torch.zeros(1, 20)), LayerRules(("svd",)))
    plan = allocate_plan(curves, [parse_budget("params", "60%")]).plan
    assert plan["0"] == LayerPlan("svd", 1)
    assert SimpleNamespace(**plan.to_dict()).format == 1


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_every_rank_is_a_multiple_and_a_rule_may_say_otherwise(multiple):
    torch.manual_seed(0)
    model = CifarResNet(1, channels=3, classes=10)
    net = trace(model, torch.zeros(1, 3, 16, 16))
    rules = LayerRules(
        (*CONVS, "tucker2"), rules=(LayerRule("layer3.*", rank_multiple=3),), rank_multiple=multiple, exclude=("conv1",)
    )
    curves = rank_curves(model, net, rules)
    for options in curves.layers:
        step = 3 if options.layer.name.startswith("layer3") else multiple
        ranks = [side for c in options.choices[1:] for side in (c.rank if isinstance(c.rank, tuple) else (c.rank,))]
        assert all(rank % step == 0 for rank in ranks), options.layer.name
        assert len(options.choices) > 1 or options.layer.name in ("conv1", "linear")
    for method in (allocate_plan, *BASELINES.values()):
        found = method(curves, [parse_budget("flops", "60%")])
        plan = getattr(found, "plan", found)
        assert plan_cost(net, plan).macs <= 0.6 * dense_cost(net).macs
        assert all(c in o.choices for o in curves.layers for c in [plan[o.layer.name]])


def test_a_multiple_that_no_useful_rank_has_is_an_error():
    model = CifarResNet(1, channels=1, classes=10)
    net = trace(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match=r"rank_multiple: no multiple of 64 .* largest rank that does is 23"):
        LayerRules(CONVS, rules=(LayerRule("layer1.*", rank_multiple=64),)).check(net)
    with pytest.raises(UsageError, match="leave no layer to lower"):
        rank_curves(model, net, LayerRules(CONVS, rank_multiple=512))


SHARED = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2")


@pytest.fixture(scope="module")
def shared() -> Curves:
    torch.manual_seed(0)
    model = CifarResNet(1, channels=3, classes=10)
    rules = LayerRules(CONVS, rules=(LayerRule("layer?.0.conv*", share_ratio=True), LayerRule("layer3.*")))
    curves = rank_curves(model, trace(model, torch.zeros(1, 3, 16, 16)), rules)
    assert len(curves.groups) == 1
    return curves


def ratios(curves: Curves, plan, names) -> list[tuple[str, float]]:
    """(lowering, position on its ladder of useful ranks, 0..1) of each named layer."""
    found = []
    for options in curves.layers:
        if options.layer.name in names:
            index = options.choices.index(plan[options.layer.name])
            ladder = options.ladder(options.choices[index].lowering)
            found.append((options.choices[index].lowering, ladder.index(index) / max(len(ladder) - 1, 1)))
    return found


@pytest.mark.parametrize("method", ["solver", *BASELINES])
@pytest.mark.parametrize("share", [12, 30, 55])
def test_layers_of_a_group_share_lowering_and_ratio(shared, method, share):
    (group,) = shared.groups
    budgets = [parse_budget("flops", f"{share}%"), parse_budget("params", f"{share + 10}%")]
    found = BASELINES.get(method, allocate_plan)(shared, budgets)
    plan, dense = getattr(found, "plan", found), dense_cost(shared.net)
    assert all(budget.allows(plan_cost(shared.net, plan), dense) for budget in budgets)
    lowerings, positions = zip(*ratios(shared, plan, group), strict=True)
    assert len(set(lowerings)) == 1
    # one ratio, each layer's rank rounded down on its own ladder
    assert max(positions) - min(positions) <= 1 / 8


def test_a_group_costs_damage_and_no_group_is_free_to_differ(shared, curves):
    budgets = [parse_budget("flops", "35%")]
    free, tied = allocate_plan(curves, budgets), allocate_plan(shared, budgets)
    assert free.damage <= tied.damage
    assert tied.bound <= tied.damage


def test_budgets_that_exclude_each_other_say_by_how_much_and_that_value_works(curves):
    smallest, dense = curves.smallest(), dense_cost(curves.net)
    budgets = [parse_budget("flops", str(smallest["flops"])), parse_budget("params", str(smallest["params"]))]
    with pytest.raises(UsageError, match="at once") as error:
        allocate_plan(curves, budgets)
    text = str(error.value)
    (least,) = re.findall(r"smallest flops is ([\d,]+)", text)
    value = int(least.replace(",", ""))
    assert smallest["flops"] < value
    assert f"{value - smallest['flops']:,} above the budget" in text
    kept = [parse_budget("flops", str(value)), budgets[1]]
    cost = plan_cost(curves.net, allocate_plan(curves, kept).plan)
    assert all(b.allows(cost, dense) for b in kept)


def test_a_single_budget_that_cannot_be_met_says_what_is_missing(curves):
    low = curves.smallest()["flops"]
    with pytest.raises(UsageError, match=f"{low:,} .*, {low - 1000:,} more: raise it"):
        allocate_plan(curves, [parse_budget("flops", "1000")])


def test_costs_from_shapes_alone_are_those_of_the_curves(curves):
    torch.manual_seed(0)
    model = CifarResNet(1, channels=3, classes=10)
    from_shapes = cost_curves(trace(model, torch.zeros(1, 3, 16, 16)), LayerRules(CONVS))
    assert from_shapes.smallest() == curves.smallest()
    for mine, theirs in zip(from_shapes.layers, curves.layers, strict=True):
        assert mine.choices == theirs.choices
        assert (mine.macs == theirs.macs).all()


def test_a_budget_is_met_to_the_last_mac(curves):
    """The cost of a plan as its own budget: nothing is lost to rounding, and one MAC less is another plan."""
    for share in (17, 33, 51, 68, 87):
        plan = allocate_plan(curves, [parse_budget("flops", f"{share}%")]).plan
        macs = plan_cost(curves.net, plan).macs
        again = plan_cost(curves.net, allocate_plan(curves, [parse_budget("macs", str(macs))]).plan)
        assert again.macs <= macs
        assert allocate_plan(curves, [parse_budget("macs", str(macs))]).damage <= damage_of(curves, plan) * 1.005
        assert plan_cost(curves.net, allocate_plan(curves, [parse_budget("macs", str(macs - 1))]).plan).macs < macs


def damage_of(curves: Curves, plan) -> float:
    return sum(float(WITHOUT_DATA(o)[o.choices.index(plan[o.layer.name])]) for o in curves.layers)


def test_the_gap_travels_with_the_plan_and_does_not_make_it_another(curves):
    allocation = allocate_plan(curves, [parse_budget("flops", "40%")])
    assert allocation.plan.gap == allocation.gap
    read = RankPlan.from_json(allocation.plan.to_json())
    assert read.gap == allocation.gap
    assert read.digest() == RankPlan(allocation.plan.layers).digest()
    with pytest.raises(UsageError, match="gap"):
        RankPlan.from_dict({"layers": {}, "gap": "small"})


def test_public_allocate_by_measured_score(small_net, image):
    calls = []

    def score(net) -> float:
        calls.append(1)
        with torch.no_grad():
            return -float((net(image) - small_net(image)).square().mean())

    plan = ranksearch.allocate(small_net, image, {"flops": "60%"}, method="greedy", score=score, calibration=[image])
    net = trace(small_net, image)
    assert plan_cost(net, plan).macs <= 0.6 * dense_cost(net).macs
    assert len(calls) > len(net.layers)
    with pytest.raises(UsageError, match="give it score"):
        ranksearch.allocate(small_net, image, {"flops": "60%"}, method="greedy")


def test_public_allocate_weighs_by_kfac_where_it_has_data(small_net):
    torch.manual_seed(3)
    images = [torch.randn(8, 3, 12, 12) for _ in range(2)]
    budgets = {"params": "60%"}
    told = {
        name: ranksearch.allocate(small_net, images[0], budgets, sensitivity=name, calibration=images)
        for name in ("kfac", "none")
    }
    assert told["kfac"].digest() != told["none"].digest()
    assert ranksearch.allocate(small_net, images[0], budgets, calibration=images).digest() == told["kfac"].digest()
    assert ranksearch.allocate(small_net, images[0], budgets).digest() == told["none"].digest()


def test_public_allocate_takes_rules_and_multiples(small_net, image):
    names = [layer.name for layer in trace(small_net, image).layers]
    rules = [ranksearch.LayerRule(names[0], min_rank=4)]
    plan = ranksearch.allocate(small_net, image, {"params": "70%"}, rules=rules, rank_multiple=2)
    assert all(
        side % 2 == 0 for _, c in plan.lowered() for side in (c.rank if isinstance(c.rank, tuple) else (c.rank,))
    )
    assert plan[names[0]].lowering == "dense" or min(np.atleast_1d(plan[names[0]].rank)) >= 4
    with pytest.raises(UsageError, match="Did you mean 'kfac'"):
        ranksearch.allocate(small_net, image, {"params": "70%"}, sensitivity="k-fac")


# The table of costs ------------------------------------------------------------------------------------------------------


def test_a_cost_that_is_added_to_the_table_is_a_budget_at_once(curves, monkeypatch):
    """Energy, at four picojoules per MAC: one entry, and it is read, refused, allocated under and shown like the others."""
    energy = CostKind(
        "energy", "macs_ratio", lambda cost: 4 * cost.macs, MACS, 4, {"pJ": 1, "nJ": 10**3, "uJ": 10**6}, "50% or 3uJ",
        written=lambda value: f"{value:,} pJ",
    )  # fmt: skip
    monkeypatch.setitem(COSTS, "energy", energy)
    with pytest.raises(UsageError, match="the unit is missing, such as 50% or 3uJ"):
        parse_budget("energy", "3")
    with pytest.raises(UsageError, match=r"no plan .* costs less than [\d,]+ pJ"):
        allocate_plan(curves, [parse_budget("energy", "1nJ")])
    for text in ("40%", "1uJ"):
        budget = parse_budget("energy", text)
        plan, same = (
            allocate_plan(curves, [b]).plan
            for b in (budget, Budget("macs", budget.limit(curves.dense) / Decimal(4), False, ""))
        )
        cost = curves.cost(plan)
        assert plan == same
        assert cost_value(cost, "energy") == 4 * cost.macs <= budget.limit(curves.dense)
    assert same_cost("energy", "macs")
    assert SearchSpace(objectives=["accuracy", "params"]).objectives == ["accuracy", "params"]


@pytest.mark.parametrize("name", [name for name, kind in COSTS.items() if kind.axis != NANOSECONDS])
def test_a_costs_fixed_part_and_its_layers_are_the_whole(curves, name):
    kind = COSTS[name]
    layers = sum((layer.macs, layer.spec.params)[kind.axis] for layer in curves.net.layers)
    assert curves.value(name, layers) == cost_value(curves.dense, name)
