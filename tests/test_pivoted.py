"""Pivoted forms: the plain form's function from fewer numbers, in 16 bits, on the worst of weights, while trained, shared and stored."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ranksearch
from ranksearch.allocate import LayerRules, rank_curves
from ranksearch.compress import LayerPlan, RankPlan, restructure_, trace
from ranksearch.lowering import LOWERINGS, LayerSpec, default_lowerings, expand_families, pivoted_layers
from ranksearch.lowering.pivoted_layers import PivotedInput, PivotedOutput, is_merging, merged_pivots, stored_pivots
from ranksearch.maxvol import BOUND
from ranksearch.space.reading import parse_space
from ranksearch.training.evaluate import evaluate

PIVOTED = expand_families(["pivoted"])
CONV = LayerSpec.conv(16, 24, (3, 3), padding=(1, 1), bias=True)
GROUPED = LayerSpec.conv(16, 32, (3, 3), stride=(2, 2), groups=2, bias=True)
LINEAR = LayerSpec(24, 24, bias=True)


def specs_for(name: str) -> list[LayerSpec]:
    return [spec for spec in (CONV, GROUPED, LINEAR) if LOWERINGS[name].supports(spec)]


def layer_of(spec: LayerSpec, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(spec.build(dtype=dtype))


def sample(spec: LayerSpec) -> torch.Tensor:
    shape = (4, spec.in_channels, 9, 8) if spec.is_conv else (4, 5, spec.in_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pivoted_ends(net: nn.Module) -> list[nn.Module]:
    found = [module for module in net.modules() if isinstance(module, PivotedInput | PivotedOutput)]
    assert found
    return found


def plans(name: str, spec: LayerSpec, ratio: float) -> tuple[RankPlan, RankPlan]:
    """(pivoted, plain) at one rank."""
    rank = LOWERINGS[name].scaled_rank(spec, ratio)
    return tuple(RankPlan({"0": LayerPlan(kind, rank)}) for kind in (name, name.removesuffix("_pivoted")))


@pytest.mark.parametrize("name", PIVOTED)
def test_it_saves_the_square_of_the_rank_and_shares_the_plain_curve(name):
    for spec in specs_for(name):
        pivoted, plain = LOWERINGS[name], LOWERINGS[name.removesuffix("_pivoted")]
        rank = plain.scaled_rank(spec, 0.5)
        ranks = rank if isinstance(rank, tuple) else (rank,)
        tiles = int(plain.name.removeprefix("tiled_c")) if plain.name.startswith("tiled_c") else 1
        saved = spec.groups * tiles * sum(side**2 for side in ranks)
        assert plain.params(spec, rank) - pivoted.params(spec, rank) == saved
        weight = spec.build().weight.data
        for one, other in zip(pivoted.curve(weight, spec).removed, plain.curve(weight, spec).removed, strict=True):
            assert one == other
        assert pivoted.curve_name == plain.name


@pytest.mark.parametrize("name", PIVOTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_loses_no_more_than_the_plain_form(name, dtype):
    for spec in specs_for(name):
        dense, x = layer_of(spec), sample(spec)
        pivoted, plain = (ranksearch.compress(dense, plan) for plan in plans(name, spec, 0.6))
        exact = plain(x)
        errors = [(net.to(dtype)(x.to(dtype)).float() - exact).norm() / exact.norm() for net in (pivoted, plain)]
        assert errors[0] <= 2 * errors[1]


WORST = {
    "zero": lambda w: torch.zeros_like(w),
    "rank one": lambda w: w.flatten(1)[:, :1].mul(w.flatten(1)[:1]).reshape(w.shape),
    "dead outputs": lambda w: torch.cat([torch.zeros_like(w[1:]), w[:1]]),
    "dead inputs": lambda w: torch.cat([torch.zeros_like(w[:, 1:]), w[:, :1]], dim=1),
    "graded": lambda w: w * torch.logspace(0, -12, len(w)).reshape(-1, *(1 for _ in w.shape[1:])),
    "tiny": lambda w: w * 1e-25,
    "huge": lambda w: w * 1e18,
}


@pytest.mark.parametrize("name", PIVOTED)
@pytest.mark.parametrize("weight", WORST)
def test_no_weight_makes_large_coefficients_or_another_function(name, weight):
    for spec in specs_for(name):
        dense = layer_of(spec)
        dense[0].weight.data = WORST[weight](dense[0].weight.data)
        dense[0].bias.data.zero_()
        pivoted, plain = (ranksearch.compress(dense, plan) for plan in plans(name, spec, 0.5))
        expected = plain(sample(spec))
        assert (pivoted(sample(spec)) - expected).norm() <= 2e-5 * expected.norm() + 1e-30
        for end in pivoted_ends(pivoted):
            assert end.weight.numel() == 0 or end.weight.abs().max() <= BOUND * (1 + 1e-6)


@pytest.mark.parametrize("name", PIVOTED)
def test_its_factors_train_at_the_plain_forms_rate(name):
    # not quite as fast: identity and bounded entries are another scale than two factors of one norm
    spec = specs_for(name)[0]
    dense, x = layer_of(spec), sample(spec)
    losses, goal = [], dense(x).detach()
    for plan in plans(name, spec, 0.5):
        net = ranksearch.compress(dense, plan)
        before = float(((net(x) - goal).square().sum() / goal.square().sum()).detach())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        for _ in range(40):
            optimizer.zero_grad()
            loss = (net(x) - goal).square().sum() / goal.square().sum()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] <= 1.5 * losses[1]
    assert losses[0] < before


class Tied(nn.Module):
    """Two layers of one weight, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)
        self.two.weight = self.one.weight
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x).relu())
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", PIVOTED)
def test_merged_kernels_compute_the_same_and_its_gradients(name):
    reflected = LayerSpec.conv(8, 12, (3, 3), padding=(1, 1), dilation=(1, 1), padding_mode="reflect")
    same = LayerSpec.conv(8, 12, (2, 3), padding="same", dilation=(2, 1))
    others = [spec for spec in (reflected, same) if LOWERINGS[name].supports(spec)]
    for spec in (*specs_for(name), *others):
        for ratio in (0.5, 1.0):
            net = ranksearch.compress(layer_of(spec, torch.float64), plans(name, spec, ratio)[0])
            x = sample(spec).double()
            found = []
            for context in (nullcontext, merged_pivots):
                net.zero_grad()
                with context():
                    out = net(x)
                out.square().sum().backward()
                found.append([out.detach(), *(p.grad.clone() for p in net.parameters() if p.numel())])
            for stored, merged in zip(*found, strict=True):
                torch.testing.assert_close(merged, stored, rtol=1e-9, atol=1e-9)
    assert not is_merging()


def test_merged_kernels_are_for_training_and_scoring_alone(bench):
    """A plan's MACs are counted as they are stored; a scripted net, which knows no other way, may be called meanwhile."""
    net = ranksearch.compress(layer_of(CONV), plans("im2col_pivoted", CONV, 0.5)[0])
    x = sample(CONV)
    with FlopCounterMode(display=False) as stored:
        wanted = net(x)
    with merged_pivots(), FlopCounterMode(display=False) as merged:
        net(x)
    assert stored.get_total_flops() < merged.get_total_flops()
    with merged_pivots():
        torch.testing.assert_close(torch.jit.script(net)(x), wanted)
        with stored_pivots():
            assert not is_merging()
        model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1))
        ranksearch.compress(
            model, plans("im2col_pivoted", CONV, 0.5)[0], example_input=x
        )  # whose MACs are held against the plan's
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), []
    model.register_forward_hook(lambda *args: seen.append(is_merging()))
    evaluate(model, bench.task.val, bench.task)
    assert set(seen) == {True}
    assert not is_merging()


def test_kernels_that_are_kept_are_made_once_for_as_long_as_weights_do_not_change(monkeypatch):
    chain = ranksearch.compress(layer_of(CONV), plans("tucker2_pivoted", CONV, 0.5)[0])
    other, x, made = copy.deepcopy(chain), sample(CONV), []
    for name in ("merged_input", "merged_output"):
        make = getattr(pivoted_layers, name)
        monkeypatch.setattr(pivoted_layers, name, lambda *args, make=make: made.append(1) or make(*args))
    with torch.no_grad():
        wanted = chain(x)
        with merged_pivots(kept=True):
            found = [chain(x), chain(x), other(x)]
            with merged_pivots():  # as in training
                chain(x)
            with ThreadPoolExecutor() as pool:  # what another thread does with its nets is not known here
                pool.submit(chain, x).result()
        for net in (chain, other):
            for parameter in net.parameters():
                parameter.data.mul_(2)
        with merged_pivots(kept=True):
            changed = chain(x)
        ends = sum(isinstance(module, PivotedInput | PivotedOutput) for module in chain.modules())
        assert ends > 0
        assert len(made) == 5 * ends
        for each in found:
            torch.testing.assert_close(each, wanted)
        torch.testing.assert_close(changed, chain(x))


def test_tied_weights_attention_and_files(tmp_path):
    torch.manual_seed(0)
    dense, x = Tied().eval(), torch.randn(2, 5, 24)
    plan = RankPlan({name: LayerPlan("svd_pivoted", 9) for name in ("one", "attention.in_proj", "attention.out_proj")})
    small = ranksearch.compress(dense, plan)
    ranksearch.project_(dense, plan)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    (one,), (two,) = pivoted_ends(small.one), pivoted_ends(small.two)
    assert one.weight is two.weight
    assert one.order is two.order
    save_file({name: tensor.clone() for name, tensor in small.state_dict().items()}, tmp_path / "net.safetensors")
    again = restructure_(Tied().eval(), plan)
    again.load_state_dict(load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


def test_plain_forms_are_taken_by_default_only_where_they_may_be_faster_or_alone():
    default, timed = default_lowerings(), default_lowerings(timed=True)
    assert set(PIVOTED) <= set(default) < set(timed)
    assert set(timed) - set(default) == {"im2col", "channel", "tucker2", "svd", "tiled_c2", "tiled_c4", "tiled_c8"}
    space = {"name": "a", "task": "digits", "model": "resnet8", "validation": 100, "recipe": {"steps": 1}}
    for budget, names in (({"flops": "50%"}, default), ({"latency": "50%"}, timed)):
        assert parse_space(space | {"budgets": budget}, "test").layers.lowerings == list(names)
    named = parse_space(space | {"budgets": {"latency": "50%"}, "layers": {"lowerings": ["im2col"]}}, "test")
    assert named.layers.lowerings == ["im2col"]


@pytest.mark.parametrize("share", ["40%", "70%"])
def test_a_size_budget_holds_with_the_indices(share):
    dense = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3))
    plan = ranksearch.allocate(dense, torch.zeros(1, 8, 9, 9), {"size": share})
    assert any(name.endswith("_pivoted") for name in {layer.lowering for layer in plan.layers.values()})
    small = ranksearch.compress(dense, plan)
    sizes = [sum(t.numel() * t.element_size() for t in net.state_dict().values()) for net in (small, dense)]
    assert sizes[0] <= float(share.rstrip("%")) / 100 * sizes[1]


def test_one_decomposition_serves_the_plain_and_the_pivoted_form():
    dense = layer_of(CONV)
    net, found = trace(dense, sample(CONV)), {}
    rank_curves(dense, net, LayerRules(("im2col", "im2col_pivoted")), found)
    assert len(found) == 1
