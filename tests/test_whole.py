"""A compressed net is held to its plan and to its dense net wherever it appears: decomposed in a trial, exported, loaded."""

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, load_net, save_net
from ranksearch.compress.whole import check_rebuilt, check_whole, difference
from ranksearch.errors import UsageError


class Mixed(nn.Module):
    """Everything that is rebuilt in its own way: packed and open attention, tied weights, convs, layers that stay dense."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.odd = odd
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.packed = nn.MultiheadAttention(16, 2, batch_first=True)
        self.across = nn.MultiheadAttention(16, 2, batch_first=True)
        self.one, self.two, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.mT).mT
        x = self.packed(x, x, x, need_weights=False)[0]
        x = self.across(x, x.flip(1), x.flip(1), need_weights=False)[0]
        x = self.two(torch.relu(self.one(x)))
        return torch.relu(self.head(x)) if self.odd and type(self.one) is nn.Linear else self.head(x)


PLAN = RankPlan(
    {
        "conv": LayerPlan("tiled_8", 2),
        "packed.in_proj": LayerPlan("svd", 5),
        "packed.out_proj": LayerPlan("svd_pivoted", 5),
        "across.k_proj": LayerPlan("svd", 4),
        "one": LayerPlan("svd", 4),
    },
    model="mixed",
)


def rebuilt(folder, odd=False):
    torch.manual_seed(0)
    save_net(ranksearch.compress(Mixed(odd), PLAN), PLAN, folder)
    return load_net(folder, lambda name: Mixed(odd))


def test_a_rebuilt_net_is_held_to_the_dense_net_of_its_architecture(tmp_path):
    x = torch.randn(2, 5, 16)
    check_rebuilt(rebuilt(tmp_path), PLAN, Mixed(), x)
    with pytest.raises(UsageError, match=r"off by .* Exclude some of the lowered layers: .*'one'"):
        check_rebuilt(rebuilt(tmp_path, odd=True), PLAN, Mixed(odd=True), x)


def test_other_macs_and_layers_that_are_not_called_are_refused(tmp_path):
    x, small = torch.randn(2, 5, 16), rebuilt(tmp_path)
    other = RankPlan({**PLAN.layers, "one": LayerPlan("svd", 8)})
    with pytest.raises(UsageError, match=r"MACs a sample where the plan says"):
        check_rebuilt(small, other, Mixed(), x)
    small.forward = lambda x: small.head(torch.relu(small.one(x)))
    with pytest.raises(UsageError, match=r"does not call 'packed.in_proj', .*exclude it"):
        check_rebuilt(small, PLAN, Mixed(), x)


def test_what_has_diverged_in_the_dense_net_says_nothing():
    nothing = torch.full((3,), float("nan"))
    assert difference(nothing, torch.ones(3)) == 0
    assert not difference(torch.ones(3), nothing) <= 1e-4
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    net[0].weight.data *= 1e38
    plan = RankPlan({"1": LayerPlan("svd", 4)})
    check_whole(net, ranksearch.compress(net, plan), plan, 1e10 * torch.ones(1, 16))
