"""Matched steps against Jacobians by autograd, and against the step of a dense weight."""

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.compress.factor_steps import LEAST, match_steps_, reaches
from ranksearch.errors import UsageError
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
    stored = chain.stored_factors

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


def stepped(net, example, lr=1e-6):
    """How far a step of SGD moves the layer's weight."""
    before = net[0].weight.dense().detach().clone()
    torch.manual_seed(1)
    (net(example) * torch.randn(2, 8, 5, 5)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=lr).step()
    return float((net[0].weight.dense().detach() - before).norm()) / lr


def test_a_step_goes_as_far_as_on_the_dense_weight_however_large_one_factor_is():
    """Scaled by 5 and 1/5 the factors make the same net; plain steps on them differ by the square of that."""
    far = {}
    for scale in (1.0, 5.0):
        for kind in ("plain", "matched"):
            net, example = lowered("im2col")
            with torch.no_grad():
                first, last = (layer.weight for layer in net[0].layers)
                first.mul_(10 * scale)
                last.mul_(10 / scale)
            if kind == "matched":
                match_steps_(net, reaches(net))
            far[kind, scale] = stepped(net, example)
    assert far["matched", 5.0] == pytest.approx(far["matched", 1.0], rel=0.2)
    assert far["plain", 5.0] > 5 * far["plain", 1.0]
    torch.manual_seed(0)
    dense = CONV.build()
    torch.manual_seed(1)
    (dense(example) * torch.randn(2, 8, 5, 5)).sum().backward()
    assert 0.3 < far["matched", 1.0] / float(dense.weight.grad.norm()) < 3  # of a dense step the part that has the rank


@pytest.mark.parametrize("name", ["svd", "svd_pivoted"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-2])
def test_where_a_weight_is_next_to_nothing_no_gradient_grows_tenfold(name, scale):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 32, bias=False)), torch.randn(64, 32)
    target = x @ torch.randn(32, 32)
    with torch.no_grad():
        net[0].weight.mul_(scale)
    small = ranksearch.compress(net, ranksearch.RankPlan({"0": ranksearch.LayerPlan(name, 8)}), example_input=x)
    found = reaches(small)
    assert min(found.values()) == LEAST
    match_steps_(small, found)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.02, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (small(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reach_of_a_net_of_16_bits_is_that_of_the_same_net_in_fp32(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512)).to(dtype)
    plan = ranksearch.RankPlan({"0": ranksearch.LayerPlan("svd_pivoted", 100)})
    half = ranksearch.compress(net, plan, example_input=torch.zeros(1, 512, dtype=dtype))
    found, exact = reaches(half), reaches(half.float())
    assert found == pytest.approx(exact, rel=0.05)


def test_in_a_loop_of_ones_own_steps_are_matched_until_the_hooks_are_removed():
    net, example = lowered("im2col_pivoted")
    hooks = ranksearch.match_steps_(net)
    assert len(hooks) == len(reaches(net)) == 2
    matched = stepped(net, example)
    for hook in hooks:
        hook.remove()
    net, example = lowered("im2col_pivoted")
    assert stepped(net, example) > 2 * matched
    with pytest.raises(UsageError, match="no factors that are trained"):
        ranksearch.match_steps_(nn.Linear(3, 3))


def test_what_is_not_lowered_or_not_trained_keeps_its_gradient():
    net, _ = lowered("spatial")
    assert set(reaches(net)) == {"0.0.weight", "0.1.weight"}
    assert reaches(nn.Linear(3, 3)) == {}
    net[0].layers[0].weight.requires_grad_(False)
    assert set(reaches(net)) == {"0.1.weight"}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 16, bidirectional=True, batch_first=True), nn.Linear(32, 6)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def transformer():
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)


@pytest.mark.parametrize(("make", "width"), [(Recurrent, 12), (transformer, 16)])
def test_the_factors_of_recurrent_layers_and_attention_are_found(make, width):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(2, 5, width)
    plan = ranksearch.allocate(net, x, {"params": "60%"}, lowerings=["svd_pivoted"])
    small = ranksearch.compress(net, plan, example_input=x)
    before = {name for name, _ in net.named_parameters()}
    factors = {name for name, p in small.named_parameters() if name not in before and p.dim() > 1}
    assert len(factors) >= 4
    assert factors <= set(reaches(small))
