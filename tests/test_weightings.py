"""Metrics of data measured on whole nets, and how curves, allocation, decomposition and projection use them."""

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.allocate import LayerRules, rank_curves
from ranksearch.calibration.drawn import drawn_directions_loss
from ranksearch.calibration.statistics import Moment
from ranksearch.calibration.weightings import SHRINKAGE, measure_weightings
from ranksearch.compress import LayerPlan, Projector, RankPlan, trace
from ranksearch.errors import UsageError


class Net(nn.Module):
    """A conv with BN behind it, one without, and two Linears: anisotropic inputs come in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.wide = nn.Linear(12, 24)
        self.last = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu().mean(dim=(2, 3))
        return self.last(self.wide(x).relu())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(4, 4, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 0.1])[:, None]
    return [
        torch.einsum("nchw,cd->ndhw", torch.randn(32, 4, 6, 6, generator=generator), mixing).cumsum(3) for _ in range(4)
    ]


PLAN = RankPlan(
    {
        "first": LayerPlan("im2col", 3),
        "second": LayerPlan("channel", 3),
        "wide": LayerPlan("svd", 4),
        "last": LayerPlan("svd_pivoted", 3),
    }
)


def test_auto_leaves_layers_with_bn_behind_them_to_the_weights(net, batches):
    traced = trace(net, batches[0])
    assert set(measure_weightings(net, traced, batches, "auto", seed=0)) == {"second", "wide", "last"}
    assert measure_weightings(net, traced, [], "weights", seed=0) == {}
    assert set(measure_weightings(net, traced, batches, "inputs", seed=0)) == {"first", "second", "wide", "last"}
    with pytest.raises(UsageError, match="'inputs'"):
        measure_weightings(net, traced, batches, "input", seed=0)


def test_what_is_measured_is_the_second_moment_and_with_bn_behind_the_covariance(net, batches):
    found = ranksearch.weightings(net, batches[0], batches)
    whole, x = torch.cat(batches), nn.functional.unfold(torch.cat(batches), 3, padding=1)
    rows = x.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found["first"].inputs.core[0], torch.cov(rows.T, correction=0), atol=1e-3, rtol=1e-3)
    hidden = net.second(net.norm(net.first(whole)).relu()).relu().mean(dim=(2, 3)).detach()
    expected = hidden.T @ hidden / len(hidden)
    torch.testing.assert_close(found["wide"].inputs.core[0], expected, atol=1e-4, rtol=1e-3)
    assert float(found["wide"].inputs.ridge) == pytest.approx(SHRINKAGE * float(expected.diagonal().mean()), rel=1e-3)


@pytest.mark.parametrize("name", ["second", "wide", "last"])
def test_a_layer_cut_in_the_metric_of_its_inputs_computes_nearer_to_what_it_did(net, batches, name):
    plan, found = RankPlan({name: PLAN[name]}), ranksearch.weightings(net, batches[0], batches)
    held_out = batches[0].flip(0) * 0.9
    outputs = {}
    nets = {
        "dense": net,
        "plain": ranksearch.compress(net, plan),
        "in metric": ranksearch.compress(net, plan, weightings=found),
    }
    for key, net_ in nets.items():
        net_.get_submodule(name).register_forward_hook(
            lambda m, a, out, key=key: outputs.__setitem__(key, out.detach())
        )
        net_(held_out)
    errors = {key: float((outputs[key] - outputs["dense"]).norm()) for key in outputs}
    assert errors["in metric"] < 0.9 * errors["plain"]


@pytest.mark.parametrize("metric", ["inputs", "kfac"])
def test_projecting_and_decomposing_in_a_metric_agree(net, batches, metric):
    found = ranksearch.weightings(net, batches[0], batches, metric=metric, loss="directions")
    small = ranksearch.compress(net, PLAN, weightings=found)
    projector = Projector(PLAN, weightings=found)
    removed = projector(net)
    assert set(removed) == set(PLAN.layers)
    assert all(0 < share < 1 for share in removed.values())
    torch.testing.assert_close(net(batches[0]), small(batches[0]), atol=1e-3, rtol=1e-3)
    again = projector(net)  # from the bases of the last one; nothing is left to remove
    assert max(again.values()) < 1e-5
    torch.testing.assert_close(ranksearch.compress(net, PLAN)(batches[0]), net(batches[0]), atol=1e-4, rtol=1e-4)


def test_curves_and_the_allocation_are_in_the_metric_and_caches_tell_it_apart(net, batches):
    traced, rules, known = trace(net, batches[0]), LayerRules(("svd", "im2col"), ("*",), (), (), 1), {}
    found = ranksearch.weightings(net, batches[0], batches)
    plain = rank_curves(net, traced, rules, known)
    curves = rank_curves(net, traced, rules, known, found)
    assert len(known) == 2 * 4
    fresh = rank_curves(net, traced, rules, None, found)
    for a, b, c in zip(curves.layers, fresh.layers, plain.layers, strict=True):
        assert (a.removed == b.removed).all()
        assert a.removed[1] < c.removed[1]  # inputs with few directions lose less by a small rank
    for sensitivity in ("none", "activation", "kfac"):
        plan = ranksearch.allocate(
            net, batches[0], {"params": "60%"}, weightings=found, sensitivity=sensitivity, calibration=batches
        )
        assert next(plan.lowered(), None) is not None


def test_gradients_of_drawn_directions_are_the_gauss_newton_matrix():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(4000, 5)
    net = nn.Sequential(layer, nn.Linear(3, 2))
    found = ranksearch.weightings(net, x, [x], metric="kfac", loss="directions")["0"].outputs
    expected = net[1].weight.T @ net[1].weight
    torch.testing.assert_close(found.core[0], expected.detach(), atol=0.03, rtol=0.1)
    with pytest.raises(UsageError, match="directions"):
        ranksearch.weightings(net, x, [x], metric="kfac", loss="direction")
    with pytest.raises(UsageError, match="floating"):
        drawn_directions_loss(torch.Generator())({"out": x})


@pytest.mark.parametrize("width", [4096, 11008])
def test_moments_of_wide_inputs_stay_small(width):
    moment = Moment(torch.Generator().manual_seed(0), 2048)
    for seed in range(2):
        moment.add(torch.randn(700, 1, width, generator=torch.Generator().manual_seed(seed)))
    found = moment.shrunk(0.01, centred=False)
    assert found.core.shape == (1, 1024, width)
    weight = torch.randn(8, width, generator=torch.Generator().manual_seed(9))
    view = ranksearch.lowering.LOWERINGS["svd"].seen(
        ranksearch.lowering.weighting.Weighting(found), ranksearch.lowering.LayerSpec(width, 8)
    )
    assert 0 < view.project(weight, 4).removed < 0.5


class Words(nn.Module):
    """An embedding, a layer that no gradient reaches and one that no batch reaches, beside an ordinary one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.mix, self.aside = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 30)
        self.full = False
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        x = self.mix(x).relu() + self.aside(x.detach()).relu().detach()
        return self.head(self.other(x) if self.full else x).mean(dim=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("metric", ["inputs", "kfac"])
def test_embeddings_and_layers_without_data_keep_what_they_have(metric, tied):
    torch.manual_seed(0)
    net, ids = Words(tied), torch.randint(0, 30, (16, 5))
    net.full = True
    traced = trace(net, ids)
    net.full = False
    found = measure_weightings(net, traced, [ids], metric, seed=0)
    assert set(found) == {"mix", "aside", "head"}
    assert found["aside"].outputs is None
    assert (found["mix"].outputs is not None) == (metric == "kfac")
    names = [layer.name for layer in traced.layers]
    small = ranksearch.compress(net, RankPlan({name: LayerPlan("svd", 8) for name in names}), weightings=found)
    torch.testing.assert_close(small(ids), net(ids), rtol=1e-4, atol=1e-5)
