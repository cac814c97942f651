"""Matched steps against Jacobians by autograd, and against the step of a dense weight."""

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.compress.factor_steps import match_steps_, reaches
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.lowering.contract import LOWERINGS

CONV = LayerSpec.conv(6, 8, (3, 3), padding=(1, 1), bias=True)


def lowered(name, spec=CONV, ratio=0.5):
    torch.manual_seed(0)
    layer, kernel = spec.build(), len(spec.kernel_size)
    net = nn.Sequential(layer)
    example = torch.randn(2, spec.in_channels, *(5,) * kernel)
    rank = lowering_named(name).scaled_rank(spec, ratio)
    plan = ranksearch.RankPlan({"0": ranksearch.LayerPlan(name, rank)})
    return ranksearch.compress(net, plan, example_input=example), example


def products(net):
    """Parameter name -> the layer's weight as a function of it."""
    chain = net[0]
    stored = chain.lowering.stored_weights(nn.Sequential(*chain.layers))

    def of(place):
        return lambda factor: chain.lowering.reconstruct([*stored[:place], factor, *stored[place + 1 :]], chain.spec)

    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(factor)]: (of(i), factor) for i, factor in enumerate(stored) if id(factor) in names}


@pytest.mark.parametrize(
    "name", sorted(n for n in LOWERINGS if n != "dense" and lowering_named(n).refusal(CONV) is None)
)
def test_a_reach_is_the_mean_square_of_the_jacobian(name):
    net, _ = lowered(name)
    if not hasattr(net[0], "lowering"):  # its weight is rebuilt from factors at every call
        assert set(reaches(net)) == {n for n, p in net.named_parameters() if "weight" in n}
        return
    found = reaches(net)
    assert set(found) == set(products(net))
    for parameter, (product, factor) in products(net).items():
        jacobian = torch.autograd.functional.jacobian(product, factor.detach()).reshape(-1, factor.numel())
        assert found[parameter] == pytest.approx(float(jacobian.square().sum() / factor.numel()), rel=0.35), parameter


def test_a_step_goes_as_far_as_on_the_dense_weight_however_large_one_factor_is():
    """Scaled by 30 and 1/30, the factors make the same net; plain steps on them differ by the square of that."""
    far = {}
    for scale in (1.0, 30.0):
        for kind in ("plain", "matched"):
            net, example = lowered("im2col")
            with torch.no_grad():
                first, last = (layer.weight for layer in net[0].layers)
                first.mul_(scale)
                last.div_(scale)
            before = net[0].weight.dense().detach().clone()
            if kind == "matched":
                match_steps_(net, reaches(net))
            torch.manual_seed(1)
            (net(example) * torch.randn(2, 8, 5, 5)).sum().backward()
            torch.optim.SGD(net.parameters(), lr=1e-4).step()
            far[kind, scale] = float((net[0].weight.dense().detach() - before).norm())
    assert far["matched", 30.0] == pytest.approx(far["matched", 1.0], rel=0.2)
    assert far["plain", 30.0] > 50 * far["plain", 1.0]
    # of a dense step the part that has the rank
    torch.manual_seed(0)
    dense = CONV.build()
    torch.manual_seed(1)
    (dense(example) * torch.randn(2, 8, 5, 5)).sum().backward()
    assert 0.3 < far["matched", 1.0] / float(1e-4 * dense.weight.grad.norm()) < 3


def test_what_is_not_lowered_or_not_trained_keeps_its_gradient():
    net, _ = lowered("spatial")
    assert set(reaches(net)) == {"0.0.weight", "0.1.weight"}
    assert reaches(nn.Linear(3, 3)) == {}
    net[0].layers[0].weight.requires_grad_(False)
    assert set(reaches(net)) == {"0.1.weight"}
