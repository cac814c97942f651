"""Batched projection, the way of a GPU, on the CPU: against the exact one layer by layer, and what it refuses to certify."""

import copy

import pytest
import torch
from torch import nn

from ranksearch.compress import LayerPlan, Projector, RankPlan
from ranksearch.errors import NonFiniteError
from ranksearch.linalg import CERTIFIED
from ranksearch.model.slots import find_slots
from ranksearch.subspaces import judged, leading_exactly, leading_nearby

PLANS = {
    "im2col": {"a": 5, "b": 7, "c": 4, "grouped": 3},
    "im2col_pivoted": {"a": 5, "b": 7, "c": 4, "grouped": 3},
    "channel": {"a": 6, "b": 6, "c": 9},
    "spatial": {"a": 8, "b": 9, "c": 5, "grouped": 2},
    "tiled_c2": {"a": 4, "b": 3},
    "tiled_8": {"a": 3, "b": 2},
    "tucker2": {"a": (5, 6), "b": (8, 4), "c": (6, 9), "grouped": (2, 3)},
    "tucker2_pivoted": {"a": (5, 6), "b": (8, 4)},
    "svd": {"head": 4},
}


class Net(nn.Module):
    """Two convs of one shape, another one, grouped ones, and a Linear, all with spectra that fall as trained ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.c, self.grouped = nn.Conv2d(16, 24, 3), nn.Conv2d(16, 24, 3, groups=2)
        self.head = nn.Linear(24, 10)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in (p for p in self.parameters() if p.dim() > 1):
                flat = torch.randn(weight.shape, generator=generator).flatten(1)
                u, s, v = torch.linalg.svd(flat, full_matrices=False)
                weight.copy_(((u * 0.75 ** torch.arange(len(s))) @ v).view_as(weight))


def plan_of(lowering: str) -> RankPlan:
    return RankPlan({name: LayerPlan(lowering, rank) for name, rank in PLANS[lowering].items()})


def drift_(net: nn.Module, size: float, seed: int = 1) -> None:
    """As gradients do: a strong direction and noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (p for p in net.parameters() if p.dim() > 1):
            noise = torch.randn(weight.shape, generator=generator)
            strong = noise.flatten(1)[:, :1] @ noise.flatten(1)[:1] / noise[0].numel() ** 0.5
            weight += size * weight.norm() * (0.3 * noise / noise.norm() + strong.view_as(weight) / strong.norm())


def just(owner: object, work) -> None:
    work()


def excess(before: nn.Module, after: nn.Module, best: nn.Module, plan: RankPlan) -> float:
    """The largest excess of a layer's error over that of the exact projection."""
    nets = [find_slots(net) for net in (before, after, best)]
    found = []
    for name in plan.layers:
        weight, projected, exact = (slots[name].weight.detach().double() for slots in nets)
        found.append(float((weight - projected).norm() / (weight - exact).norm().clamp_min(1e-12)) - 1)
    return max(found)


@pytest.mark.parametrize("lowering", PLANS)
def test_a_program_projects_as_each_layer_alone(lowering):
    plan, net = plan_of(lowering), Net()
    by_program, alone = Projector(plan, batched=True), Projector(plan, batched=False)
    for step in range(3):
        drift_(net, 0.02, seed=step)
        other, before = copy.deepcopy(net), copy.deepcopy(net)
        removed, expected = by_program(net), alone(other)
        assert set(removed) == set(expected)
        for name, share in expected.items():
            assert removed[name] == pytest.approx(share, rel=5e-3, abs=1e-6)
        assert excess(before, net, other, plan) < 2 * CERTIFIED
        assert max(Projector(plan, batched=False)(copy.deepcopy(net)).values()) < 1e-6  # of that rank indeed


@pytest.mark.parametrize("lowering", ["im2col", "spatial", "tucker2"])
def test_nothing_waits_after_the_first_projection_and_the_result_is_the_same(lowering, monkeypatch):
    plan, net = plan_of(lowering), Net()
    drift_(net, 0.02)
    projector = Projector(plan, batched=True)
    projector.later(net, just)  # cold: an exact one
    ran = []
    for step in range(3):
        drift_(net, 0.01, seed=step)
        before, exact = copy.deepcopy(net), copy.deepcopy(net)
        projector.later(net, lambda owner, work: (ran.append(owner), work()))
        Projector(plan, batched=False)(exact)
        assert excess(before, net, exact, plan) < 2 * CERTIFIED
    assert len(ran) == 3
    assert len(set(map(id, ran))) == 1


@pytest.mark.parametrize("lowering", ["im2col", "tucker2"])
def test_a_layer_that_has_turned_away_is_caught_left_as_it_is_and_projected_exactly_the_next_time(lowering):
    plan, net = plan_of(lowering), Net()
    projector = Projector(plan, batched=True)
    projector.later(net, just)
    with torch.no_grad():
        net.a.weight.copy_(torch.randn(net.a.weight.shape, generator=torch.Generator().manual_seed(5)))
    turned = net.a.weight.detach().clone()
    projector.later(net, just)
    assert torch.equal(net.a.weight, turned)
    assert projector.state_dict()["a"] is None  # who goes on from here knows it, too
    exact = copy.deepcopy(net)
    Projector(plan, batched=False)(exact)
    projector.later(net, just)
    before = copy.deepcopy(net)
    before.a.weight.data.copy_(turned)
    assert excess(before, net, exact, RankPlan({"a": plan["a"]})) < 2 * CERTIFIED


def test_weights_that_are_not_finite_are_named_at_the_next_look():
    plan, net = plan_of("im2col"), Net()
    projector = Projector(plan, batched=True)
    projector.later(net, just)
    net.b.weight.data[0, 0, 0, 0] = torch.nan
    projector.later(net, just)
    with pytest.raises(NonFiniteError, match="'b'"):
        projector.later(net, just)
    with pytest.raises(NonFiniteError, match="'b'"):
        Projector(plan, batched=True)(net)


def assert_as_each_layer_alone(net: nn.Module, plan: RankPlan, **options) -> None:
    """Projected twice under these options of a `Projector`; layers may be rectified by a BN layer `bn`."""
    net.bn = nn.BatchNorm2d(16)
    net.bn.weight.data.uniform_(0.2, 2, generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(net)
    projectors = Projector(plan, batched=True, **options), Projector(plan, batched=False, **options)
    for step in range(2):
        drift_(net, 0.02, seed=step), drift_(other, 0.02, seed=step)
        removed, expected = projectors[0](net), projectors[1](other)
        assert removed == pytest.approx(expected, rel=5e-3)
        for name in plan.layers:
            torch.testing.assert_close(getattr(net, name).weight, getattr(other, name).weight, rtol=0, atol=2e-3)


def assert_a_saved_one_goes_on(net: nn.Module, plan: RankPlan) -> None:
    """A projector made from another's state projects as that one does, to the last digit."""
    one = Projector(plan, batched=True)
    one.later(net, just)
    other, copied = Projector(plan, batched=True), copy.deepcopy(net)
    other.load_state_dict(one.state_dict())
    for projector, model in ((one, net), (other, copied)):
        drift_(model, 0.01)
        projector.later(model, just)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), copied.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"energy_transfer": True}, {"norms": {"a": "bn", "b": "bn"}}])
def test_energy_transfer_and_rectification_are_those_of_a_layer_alone(options):
    plan = RankPlan({"a": LayerPlan("im2col", 5), "b": LayerPlan("spatial", 8)})
    assert_as_each_layer_alone(Net(), plan, **options)


def test_a_saved_projector_goes_on_to_the_last_digit():
    assert_a_saved_one_goes_on(Net(), plan_of("im2col"))


def test_the_bound_holds_and_what_is_far_from_the_optimum_is_not_certified():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(200, 12, 20, generator=generator) * 0.7 ** torch.arange(12)[:, None]
    gram, columns = matrices @ matrices.mT, torch.ones(200, 4, dtype=torch.bool)
    best = leading_exactly(gram.double(), columns)
    mixed = torch.logspace(-3, 0, 200)[:, None, None] * torch.randn(200, 12, 4, generator=generator)
    start = torch.linalg.qr(best.basis.float() + mixed).Q
    found = judged(gram, start, columns)
    over = (found.left_out - best.left_out) / best.left_out
    assert bool((over[found.certified] <= 2.1 * CERTIFIED).all())
    assert bool((over > 0.01).any())
    assert not bool(found.certified[over > 0.01].any())
    improved = leading_nearby(gram, start, columns)
    assert bool((improved.left_out <= found.left_out * (1 + 1e-4)).all())
    assert 20 < int(found.certified.sum()) < int(improved.certified.sum())
