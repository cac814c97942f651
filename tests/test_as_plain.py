"""Layers that are no plain Conv or Linear but compute what one does: weight norm, standardised weights, padding by code of their own."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, dense_cost, load_net, plan_cost, project_, save_net, trace
from ranksearch.errors import UsageError
from ranksearch.lowering import lowering_named
from ranksearch.model.copying import copied


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5), bias)


class Scaled(nn.Conv2d):
    """As timm's ScaledStdConv2d: standardised, with a gain of its own."""

    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=self.gain.flatten(), training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x):
        ends = []
        for n, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(n // -s) - 1) * s + (k - 1) * d + 1 - n, 0)
            ends = [total // 2, total - total // 2, *ends]
        return F.conv2d(F.pad(x, ends), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Ring(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (2, 1, 0, 1), mode="circular"), self.weight, self.bias)


class Equalised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.3, self.bias)


def old(layer, **settings):
    return nn.utils.weight_norm(layer, **settings)


LAYERS = {
    "standardised": (lambda: Standardised(6, 16, 3, padding=1, groups=2), (6, 9, 8)),
    "standardised with a gain": (lambda: Scaled(3, 16, 3, stride=2), (3, 9, 8)),
    "same": (lambda: Same(3, 16, 3, stride=2), (3, 9, 8)),
    "same, dilated": (lambda: Same(3, 16, (5, 2), stride=(1, 3), dilation=(2, 1)), (3, 9, 8)),
    "causal": (lambda: Causal(8, 16, 3, dilation=2), (8, 9)),
    "ring": (lambda: Ring(3, 16, 3, bias=False), (3, 9, 8)),
    "equalised": (lambda: Equalised(12, 16), (12,)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 16, 3, padding=1)), (3, 9, 8)),
    "weight norm of inputs": (lambda: parametrizations.weight_norm(nn.Linear(12, 16), dim=1), (12,)),
    "old weight norm": (lambda: old(nn.ConvTranspose1d(8, 16, 4, 2)), (8, 9)),
    "old weight norm of all": (lambda: old(nn.Linear(12, 16, bias=False), dim=None), (5, 12)),
}
"""Name -> (the layer, what it takes)."""
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer = layer()
    head = nn.Linear(16, 5) if isinstance(layer, nn.Linear) else nn.Flatten(2)
    return nn.Sequential(layer, nn.ReLU(), head), torch.randn(2, *shape)


def lowerings(net):
    if not net["0"].spec.is_conv:
        return [lowering_named("svd")]
    others = [name for name in ("tucker2", "spatial", "tiled_8") if lowering_named(name).supports(net["0"].spec)]
    return [lowering_named("im2col"), lowering_named(others[net["0"].spec.weight_shape[1] % len(others)])]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@every_layer
def test_it_is_lowered_exactly_counted_exactly_and_kept(name, tmp_path):
    model, x = made(name)
    net = trace(model, x)
    assert net.layers[0].name == "0", net.skipped
    assert dense_cost(net).params == sum(p.numel() for p in model.parameters())
    for lowering in lowerings(net):
        whole = RankPlan({"0": LayerPlan(lowering.name, lowering.full_rank(net["0"].spec))})
        torch.testing.assert_close(
            ranksearch.compress(model, whole, example_input=x)(x), model(x), rtol=1e-4, atol=1e-5
        )
        plan = RankPlan({"0": LayerPlan(lowering.name, lowering.scaled_rank(net["0"].spec, 0.5))}, "own")
        small = ranksearch.compress(model, plan, example_input=x)  # checks MACs and outputs, too
        assert isinstance(small[0], type(LAYERS[name][0]()).__mro__[1 if name.startswith("weight norm") else 0])
        assert plan_cost(net, plan).params == sum(p.numel() for p in small.parameters())
        projected = copied(model)
        project_(projected, plan)
        torch.testing.assert_close(projected(x), small(x), rtol=1e-4, atol=1e-5)
        save_net(small, plan, tmp_path / lowering.name)
        loaded = load_net(tmp_path / lowering.name, lambda _: made(name)[0])
        torch.testing.assert_close(loaded(x), small(x))
        if lowering.name != "tiled_8":  # torch pickles no parametrizations
            assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@every_layer
def test_it_is_weighed_by_data_and_projected_in_somebody_elses_loop(name):
    model, x = made(name)
    sensitivity = ("activation", "kfac", "fisher")[len(name) % 3]
    plan = ranksearch.allocate(model, x, {"params": "80%"}, sensitivity=sensitivity, calibration=[x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ranksearch.project_every(model, optimizer, plan, period=2) as projection:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(projection.compress()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_an_output_of_zero_weights_stays_zero_under_weight_norm():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].parametrizations.weight.original1[1:] = model[0].parametrizations.weight.original1[0]
        model[0].parametrizations.weight.original0[2] = 0
    project_(model, RankPlan({"0": LayerPlan("svd", 1)}))
    assert model(torch.randn(3, 6)).isfinite().all()
    assert not model[0].weight[2].any()


class Quantised(nn.Linear):
    def forward(self, x):
        return F.linear(x, (self.weight * 8).round() / 8, self.bias)


class Adapted(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.a, self.b = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, x):
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(super().forward(x))


class After(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Noisy(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * (2 if self.training else 1), self.bias)


class Normalising(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Strided(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(x, self.weight, self.bias, stride=2)


class Demanding(nn.Linear):
    def forward(self, x, scale):
        return F.linear(x, self.weight * scale, self.bias)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Quantised(8, 8), "no scale and shift"),
        (Adapted(8, 8), "computes with a beside its weight"),
        (Twice(8, 8), "makes 2 products"),
        (After(8, 8), "no product's result"),
        (Noisy(8, 8), "depends on its input or its mode"),
        (Normalising(8, 8), "adds something else|changes its input"),
        (Strided(8, 8, 3), r"stride is \(2,\) where the layer says \(1,\)"),
        (Demanding(8, 8), "raises TypeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_code_that_does_more_is_refused_with_the_reason(layer, says):
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(8, 8)})
    for change in (ranksearch.compress, project_):
        with pytest.raises(UsageError, match=f"'odd' cannot be lowered.*({says})"):
            change(model, RankPlan({"odd": LayerPlan("svd", 2)}))
