"""Embeddings, and heads that are tied to one: lowered where `svd` is asked for, else said to be left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ranksearch
from ranksearch.allocate.rules import LayerRules
from ranksearch.compress import LayerPlan, RankPlan, dense_cost, load_net, plan_cost, project_, save_net, trace
from ranksearch.errors import UsageError
from ranksearch.lowering import default_lowerings


class Language(nn.Module):
    def __init__(self, tied, bias=True):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16, padding_idx=0), nn.Embedding(8, 16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 50, bias=bias)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.relu(self.mix(self.words(ids) + self.places(torch.arange(ids.shape[1])))))


def made(tied, bias):
    torch.manual_seed(0)
    return Language(tied, bias), torch.randint(0, 50, (3, 6))


@pytest.mark.parametrize(("tied", "bias"), [(False, True), (True, True), (True, False)])
def test_it_is_lowered_exactly_counted_exactly_and_kept(tied, bias, tmp_path):
    net, ids = made(tied, bias)
    traced = trace(net, ids)
    assert not traced.skipped
    assert dense_cost(traced).params == sum(p.numel() for p in net.parameters())
    for rank in (16, 5):
        plan = RankPlan({"head" if tied else "words": LayerPlan("svd", rank), "places": LayerPlan("svd", 8)}, "own")
        small = ranksearch.compress(net, plan, example_input=ids)
        cost = plan_cost(traced, plan)
        assert cost.params == sum(p.numel() for p in small.parameters())
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            small(ids)
        assert abs(counted.get_total_flops() / 2 / len(ids) - cost.macs) <= 1
        projected = copy.deepcopy(net)
        project_(projected, plan)
        torch.testing.assert_close(small(ids), projected(ids), rtol=1e-4, atol=1e-5)
        if rank == 16:
            torch.testing.assert_close(small(ids), net(ids), rtol=1e-4, atol=1e-5)
        assert not small.words(torch.zeros(1, dtype=torch.long)).any()  # what padding looks up
        save_net(small, plan, tmp_path / str(rank))
        loaded = load_net(tmp_path / str(rank), lambda _: Language(tied, bias))
        torch.testing.assert_close(loaded(ids), small(ids))
        torch.testing.assert_close(pickle.loads(pickle.dumps(small))(ids), small(ids))
        small(ids).sum().backward()
        assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_takes_it_where_svd_is_named_and_leaves_it_alone_elsewhere(tied):
    net, ids = made(tied, True)
    plan = ranksearch.allocate(net, ids, {"params": "50%"}, lowerings=["svd"], sensitivity="kfac", calibration=[ids])
    assert plan["head" if tied else "words"].lowering == "svd"
    ranksearch.compress(net, plan)  # checked as a whole: the plan knows the example
    by_default = LayerRules(default_lowerings())
    traced = trace(net, ids)
    for name in ("places", "head" if tied else "words"):
        assert "name svd" in (by_default.why_dense(traced[name]) or "")
    with pytest.raises(UsageError, match="no plan under these layer rules"):
        ranksearch.allocate(net, ids, {"params": "50%"})
