"""Decomposed layers fitted on data to what the dense net computes: biases alone, and layer after layer."""

import copy

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.calibration.passes import stages_of
from ranksearch.compress import LayerPlan, RankPlan, reestimate_bn_
from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.lowering import LOWERINGS
from tests.test_weightings import PLAN, Net


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    reestimate_bn_(net, images(0))
    return net


def images(seed: int, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(9)) * torch.tensor([3.0, 1.0, 0.3, 0.1])[:, None]
    return [
        torch.einsum("nchw,cd->ndhw", torch.randn(64, 4, 6, 6, generator=generator) + 0.5, mixing) for _ in range(count)
    ]


def error(small: nn.Module, dense: nn.Module, batches: list[torch.Tensor]) -> float:
    """Share of the outputs' variance that is off."""
    with torch.no_grad():
        found, wanted = (torch.cat([net(x) for x in batches]) for net in (small, dense))
    return float((found - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_each_fit_is_nearer_to_the_dense_net_on_inputs_that_it_has_not_seen(net, weighted):
    seen, others = images(1), images(2)
    known = ranksearch.weightings(net, seen[0], seen, metric="kfac", loss="directions") if weighted else {}
    plain = ranksearch.compress(net, PLAN, weightings=known)
    found = {fit: ranksearch.calibrate(net, PLAN, seen, fit=fit, weightings=known) for fit in ("bias", "sequential")}
    for small in (plain, *found.values()):
        reestimate_bn_(small, seen)
    errors = {name: error(small, net, others) for name, small in {"plain": plain, **found}.items()}
    assert errors["sequential"] < 0.8 * errors["plain"]
    assert errors["sequential"] < errors["bias"]
    assert weighted or errors["bias"] < errors["plain"]  # each layer errs less, of which those behind it need not gain


def test_a_bias_takes_up_what_its_layer_errs_on_average():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(500, 10) + 1
    small = ranksearch.calibrate(net, RankPlan({"0": LayerPlan("svd", 3)}), [x], fit="bias")
    torch.testing.assert_close(small[0](x).mean(dim=0), net[0](x).mean(dim=0), atol=1e-5, rtol=1e-4)
    plain = ranksearch.compress(net, RankPlan({"0": LayerPlan("svd", 3)}))
    assert (plain[0](x).mean(dim=0) - net[0](x).mean(dim=0)).abs().max() > 0.1
    weights = (net.state_dict() for net in (small, plain))
    mine, theirs = ({name: w for name, w in state.items() if w.dim() > 1} for state in weights)
    torch.testing.assert_close(mine, theirs)


def test_a_layer_behind_a_lowered_one_is_the_least_squares_fit_to_the_dense_outputs():
    """Against numpy's least squares: at full rank nothing but the ridge is between them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)).double()
    x = torch.randn(4000, 12, dtype=torch.float64)
    plan = RankPlan({"0": LayerPlan("svd", 5), "2": LayerPlan("svd", 6)})
    small = ranksearch.calibrate(net, plan, [x])
    with torch.no_grad():
        hidden = small[1](small[0](x))
        wanted = net(x)
        fit = torch.linalg.lstsq(
            torch.cat([hidden, torch.ones(len(x), 1, dtype=torch.float64)], dim=1), wanted
        ).solution
        best = float(
            (torch.cat([hidden, torch.ones(len(x), 1, dtype=torch.float64)], dim=1) @ fit - wanted).square().mean()
        )
        found = float((small(x) - wanted).square().mean())
        plain = float((ranksearch.compress(net, plan)(x) - wanted).square().mean())
    assert best <= found < 1.01 * best < plain


@pytest.mark.parametrize("fit", ["bias", "sequential"])
@pytest.mark.parametrize("name", sorted(n for n, it in LOWERINGS.items() if it.has_rank and it.is_projection))
def test_full_ranks_change_nothing(name, fit):
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, (3, 2), stride=2)
    )
    linear = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 5))
    for net, x in ((conv.eval(), torch.randn(32, 6, 8, 8)), (linear.eval(), torch.randn(64, 9))):
        layers = ranksearch.trace(net, x).layers
        plan = RankPlan(
            {
                layer.name: LayerPlan(name, LOWERINGS[name].full_rank(layer.spec))
                for layer in layers if LOWERINGS[name].supports(layer.spec)
            }
        )  # fmt: skip
        if not plan.layers:
            continue
        x = x - x.mean(dim=0) if fit == "bias" else x
        small = ranksearch.calibrate(net, plan, [x], fit=fit)
        if net is conv:  # with statistics of the batch: compared as it is fitted
            net, small = copy.deepcopy(net), copy.deepcopy(small)
            for both in (net, small):
                reestimate_bn_(both, [x])
        torch.testing.assert_close(small(x), net(x), atol=2e-4, rtol=1e-3)


class Strange(nn.Module):
    """Layers of every kind that a plan may name, one of them called twice and two of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.twice = nn.Linear(16, 16)
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.other.weight = self.one.weight
        self.up = nn.ConvTranspose1d(16, 12, 3, stride=2, groups=2)
        self.memory = nn.GRU(12, 10, batch_first=True)
        self.never = nn.Linear(10, 10)
        self.last = nn.Linear(10, 4, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.other(self.one(self.twice(self.twice(x)).relu()).relu())
        x = self.up(x.transpose(1, 2)).transpose(1, 2)
        return self.last(self.memory(x)[0].mean(dim=1))


@pytest.mark.parametrize("fit", ["bias", "sequential"])
def test_whatever_the_net_its_structure_is_that_of_compress_and_the_net_stays_as_it_was(fit):
    torch.manual_seed(0)
    net = Strange().eval()
    words = [torch.randint(20, (32, 7)) for _ in range(3)]
    ranks = {
        "words": 8,
        "attention.in_proj": 9,
        "attention.out_proj": 5,
        "twice": 6,
        "one": 6,
        "memory.ih_l0": 4,
        "memory.hh_l0": 4,
        "last": 2,
    }
    plan = RankPlan({name: LayerPlan("svd", rank) for name, rank in ranks.items()} | {"up": LayerPlan("im2col", 3)})
    before = copy.deepcopy(net.state_dict())
    small = ranksearch.calibrate(net, plan, words, fit=fit)
    plain = ranksearch.compress(net, plan, example_input=words[0])
    torch.testing.assert_close(net.state_dict(), before)
    assert {n: w.shape for n, w in small.state_dict().items()} == {n: w.shape for n, w in plain.state_dict().items()}
    assert error(small, net, words) < error(plain, net, words)
    for name, x in (("twice", torch.randn(5, 16)), ("words", words[0])):  # called twice, and looked up: as they are
        mine, theirs = small.get_submodule(name), plain.get_submodule(name)
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=1e-4)


class Routed(nn.Module):
    """Its second layer is given the rows that the first one says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        chosen = y[:, 0] > 0
        return self.last(y.index_put((chosen.nonzero()[:, 0],), self.second(y[chosen])))


@pytest.mark.parametrize("batches", [1, 3])
def test_a_layer_that_is_given_other_rows_in_each_net_is_decomposed_by_itself(batches):
    torch.manual_seed(0)
    net, inputs = Routed(), [torch.randn(200, 8) for _ in range(batches)]
    plan = RankPlan({"first": LayerPlan("svd", 1), "second": LayerPlan("svd", 3), "last": LayerPlan("svd", 2)})
    small, plain = ranksearch.calibrate(net, plan, inputs), ranksearch.compress(net, plan)
    x = torch.randn(50, 8)
    assert not torch.allclose(small.first(x)[:, 0] > 0, net.first(x)[:, 0] > 0)
    torch.testing.assert_close(small.second(x), plain.second(x), atol=1e-5, rtol=1e-4)
    assert error(small, net, inputs) < error(plain, net, inputs)


def test_layers_of_one_input_are_fitted_together_unless_it_changed_in_place():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            x.add_(self.a(x) + self.b(x))
            return self.c(x)

    with torch.no_grad():
        assert stages_of(Net(), ["a", "b", "c"], torch.randn(3, 4)) == [["a", "b"], ["c"]]


def test_what_cannot_be_calibrated_on_is_told(net):
    with pytest.raises(UsageError, match="at least one batch"):
        ranksearch.calibrate(net, PLAN, [])
    with pytest.raises(UsageError, match=r"no fit .sequence.*sequential"):
        ranksearch.calibrate(net, PLAN, images(1), fit="sequence")
    with pytest.raises(NonFiniteError, match="'first'"):
        ranksearch.calibrate(net, PLAN, [images(1)[0].fill_(float("nan"))], example_input=images(1)[0])
