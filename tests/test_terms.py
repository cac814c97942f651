"""Projections of `cp` in a program of batched products, the way of a GPU, on the CPU: against each layer alone, and what is guaranteed."""

import copy

import pytest
import torch
from torch import nn

from ranksearch.compress import LayerPlan, Projector, RankPlan
from ranksearch.compress.program import Outcome
from ranksearch.compress.surgery import compress
from ranksearch.errors import NonFiniteError
from ranksearch.lowering import cp_als
from ranksearch.model.slots import find_slots
from ranksearch.search.scorer import Scorer
from tests.test_capture import task as capture_task
from tests.test_program import Net as Convs
from tests.test_program import assert_a_saved_one_goes_on, assert_as_each_layer_alone, drift_, just


class Net(Convs):
    """Those convs, and one each of one axis, of three, transposed and with bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.three = nn.Conv1d(8, 10, 5), nn.Conv3d(5, 6, (3, 2, 3))
        self.up = nn.ConvTranspose2d(12, 8, (4, 3), stride=2, groups=2)


RANKS = {"a": 12, "b": 7, "c": 14, "grouped": 6, "one": 5, "three": 6, "up": 4}
PLAN = RankPlan({name: LayerPlan("cp", rank) for name, rank in RANKS.items()})


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    slots = find_slots(net)
    return {name: slots[name].weight.detach().clone() for name in PLAN.layers}


def close(net: nn.Module, other: nn.Module, tolerance: float) -> bool:
    pairs = zip(weights_of(net).values(), weights_of(other).values(), strict=True)
    return all(float((mine - theirs).norm() / theirs.norm()) <= tolerance for mine, theirs in pairs)


@pytest.mark.parametrize("together", [1e12, 1e6, 0])
def test_a_program_projects_as_each_layer_alone(together, monkeypatch):
    """However the layers are batched: all in two batches (of four modes and of others), some, each by itself."""
    monkeypatch.setattr(cp_als, "TOGETHER", together)
    net = Net()
    by_program, alone = Projector(PLAN, batched=True), Projector(PLAN, batched=False)
    other = copy.deepcopy(net)
    for step in range(3):  # the first one from the leading vectors, the others from the terms of before
        drift_(net, 0.02, seed=step), drift_(other, 0.02, seed=step)
        removed, expected = by_program(net), alone(other)
        assert removed == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert close(net, other, 1e-4)
    rebuilt = compress(net, PLAN, warm=by_program.warm)  # its terms are those of the weight
    for name, weight in weights_of(net).items():
        chain = rebuilt.get_submodule(name)
        x = torch.randn(2, *{1: (8, 9), 3: (5, 4, 4, 4)}.get(weight.dim() - 2, (12 if name == "up" else 16, 6, 6)))
        torch.testing.assert_close(chain(x), net.get_submodule(name)(x), rtol=1e-3, atol=1e-4)


def test_nothing_waits_after_the_first_projection_and_no_layer_is_further_than_from_its_terms(monkeypatch):
    net, ran = Net(), []
    projector = Projector(PLAN, batched=True)
    projector.later(net, just)  # cold: the host waits

    def without_waiting(owner, work):
        ran.append(owner)
        with monkeypatch.context() as patched:
            for name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "cpu", "numpy"):
                patched.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waits"))
            work()

    other, alone = copy.deepcopy(net), Projector(PLAN, batched=False)
    alone.load_state_dict(projector.state_dict())
    for step in range(4):
        earlier = weights_of(net)  # where its terms are
        drift_(net, 0.02, seed=step), drift_(other, 0.02, seed=step)
        drifted = weights_of(net)
        projector.later(net, without_waiting)
        alone(other)
        for name, weight in weights_of(net).items():
            assert bool(torch.isfinite(weight).all())
            assert (drifted[name] - weight).norm() <= (drifted[name] - earlier[name]).norm() * (1 + 1e-5)
        assert close(net, other, 0.02)
    assert len(ran) == 4
    assert len(set(map(id, ran))) == 1


def test_what_has_turned_away_is_approached_projection_by_projection():
    net, projector = Net(), Projector(PLAN, batched=True)
    projector.later(net, just)
    target = torch.randn(net.a.weight.shape, generator=torch.Generator().manual_seed(5))
    left = []
    for _ in range(25):
        with torch.no_grad():
            net.a.weight.copy_(target)
        projector.later(net, just)
        left.append(float((net.a.weight.detach() - target).norm() / target.norm()))
    assert (torch.tensor(left).diff() <= 1e-6).all()
    cold = copy.deepcopy(net)
    with torch.no_grad():
        cold.a.weight.copy_(target)
    assert left[-1] ** 2 <= Projector(PLAN, batched=False)(cold)["a"] + 0.02


def test_where_sweeps_do_harm_the_layer_keeps_its_weight_once_and_starts_anew(monkeypatch):
    net, projector = Net(), Projector(PLAN, batched=True)
    projector.later(net, just)
    drift_(net, 0.02)
    drifted, swept = weights_of(net), cp_als.swept

    def harmful(*arguments):
        return [1.2 * f for f in swept(*arguments)]

    with monkeypatch.context() as patched:
        patched.setattr(cp_als, "swept", harmful)
        projector.later(net, just)
    assert all(torch.equal(weight, drifted[name]) for name, weight in weights_of(net).items())
    assert set(projector.state_dict().values()) == {None}  # who goes on from here knows it, too
    cold = copy.deepcopy(net)
    Projector(PLAN, batched=False)(cold)
    projector.later(net, just)
    assert close(net, cold, 1e-4)


def test_terms_stay_where_sweeps_do_a_little_harm(monkeypatch):
    """Less than the share of the energy at which sweeps end: the misfit is not larger all the same, and nothing starts anew."""
    net, projector, swept = Net(), Projector(PLAN, batched=True), cp_als.swept
    projector(net)
    kept = projector.state_dict()
    drift_(net, 1e-4)
    monkeypatch.setattr(cp_als, "swept", lambda *arguments: [1.0003 * f for f in swept(*arguments)])
    projector.later(net, just)
    for name, found in projector.state_dict().items():
        assert all(torch.equal(mine, other) for mine, other in zip(found, kept[name], strict=True))


def test_terms_stay_where_sweeps_gain_nothing_and_the_weight_is_theirs():
    net, projector = Net(), Projector(PLAN, batched=True)
    projector(net)
    before, kept = weights_of(net), projector.state_dict()
    projector.later(net, just)
    for name, found in projector.state_dict().items():
        assert all(torch.equal(mine, other) for mine, other in zip(found, kept[name], strict=True))
        torch.testing.assert_close(weights_of(net)[name], before[name], rtol=0, atol=1e-7)


def test_weights_that_are_not_finite_are_named_at_the_next_look_and_spoil_no_other():
    net, projector = Net(), Projector(PLAN, batched=True)
    projector.later(net, just)
    drift_(net, 0.01)
    other, net.b.weight.data[0, 0, 0, 0] = copy.deepcopy(net), torch.inf
    alone = Projector(PLAN, batched=True)
    alone.load_state_dict(projector.state_dict())
    projector.later(net, just)
    alone.later(other, just)
    assert torch.equal(net.a.weight, other.a.weight)
    with pytest.raises(NonFiniteError, match="'b'"):
        projector.later(net, just)
    with pytest.raises(NonFiniteError, match="'b'"):
        Projector(PLAN, batched=True)(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_are_projected_as_alone(dtype):
    net = Net().to(dtype)
    other = copy.deepcopy(net)
    removed = Projector(PLAN, batched=True)(net)
    expected = Projector(PLAN, batched=False)(other)
    assert all(weight.dtype is dtype for weight in weights_of(net).values())
    # alone, a weight's rounding after the projection counts too
    assert removed == pytest.approx(expected, rel=1e-2, abs=float(torch.finfo(dtype).eps) ** 2)
    assert close(net, other, 4 * float(torch.finfo(dtype).eps))


def test_zero_weights_stay_zero():
    net, projector = Net(), Projector(PLAN, batched=True)
    with torch.no_grad():
        net.c.weight.zero_()
    assert projector(net)["c"] == 0
    projector.later(net, just)
    assert not bool(net.c.weight.any())


@pytest.mark.parametrize("options", [{"energy_transfer": True}, {"norms": {"a": "bn", "b": "bn"}}], ids=str)
def test_beside_matrices_under_energy_transfer_and_rectification_it_is_as_alone(options):
    plan = RankPlan({"a": LayerPlan("cp", 12), "b": LayerPlan("im2col", 5), "c": LayerPlan("cp", 9)})
    assert_as_each_layer_alone(Net(), plan, **options)


def test_a_saved_projector_goes_on_to_the_last_digit():
    assert_a_saved_one_goes_on(Net(), PLAN)


def test_outcomes_are_certified_where_sweeps_are_sound():
    net, projector = Net(), Projector(PLAN, batched=True)
    projector.later(net, just)
    drift_(net, 0.02)
    projector.later(net, just)
    program = projector._batched.program
    assert program.outcomes.tolist() == [Outcome.DONE] * len(RANKS)
    assert sum(len(group.entries) for group in program._sums) == len(RANKS)


def test_untrained_plans_iterate_each_choice_once_and_leave_the_net_as_it_was(monkeypatch):
    own, choice = capture_task(), LayerPlan("cp", 3)
    scorer, plan = Scorer(own, own.dense_model(), own.val, bn_batches=2, batch_size=16), RankPlan({"conv": choice})
    before = copy.deepcopy(scorer.model.state_dict())
    first = scorer(plan)
    monkeypatch.setattr(Projector, "__call__", None)  # what is known already is not iterated again
    monkeypatch.setattr("ranksearch.lowering.cp_als.swept", None)
    assert scorer(plan) == first
    assert all(torch.equal(value, before[name]) for name, value in scorer.model.state_dict().items())
    monkeypatch.undo()
    nearest = own.dense_model()
    Projector(plan)(nearest)
    assert scorer.score(nearest).loss == pytest.approx(first.loss, rel=1e-3)
