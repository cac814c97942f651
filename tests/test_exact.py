"""Nets as people write them: what is said of a compressed net is what it computes and costs, or it is refused by name and reason."""

import contextlib
import copy
import functools
import pickle
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, dense_cost, load_net, plan_cost, project_, save_net, trace
from ranksearch.errors import UsageError
from ranksearch.model.counting import counter, macs


def measured(model, *inputs):
    """MACs of one call per sample, by the counter whose formulas are tested below."""
    with torch.no_grad(), counter() as counted:
        model(*inputs)
    return macs(counted) / len(inputs[0])


def full_plan(net):
    layers = {}
    for layer in net.layers:
        lowering = ranksearch.lowering.lowering_named("im2col" if layer.spec.is_conv else "svd")
        layers[layer.name] = LayerPlan(lowering.name, lowering.full_rank(layer.spec))
    return RankPlan(layers)


def error(found, wanted):
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def assert_exact(net, x, plan):
    """The compressed net costs what the plan says and computes what the net projected in place does."""
    inputs = x if isinstance(x, tuple) else (x,)
    t = trace(net, x)
    small, before = ranksearch.compress(net, plan), copy.deepcopy(net.eval().state_dict())
    assert measured(small.eval(), *inputs) == pytest.approx(plan_cost(t, plan).macs, abs=len(t.layers))
    with torch.no_grad():
        project_(net, plan)
        assert error(small(*inputs), net(*inputs)) < 1e-5
        net.load_state_dict(before)
        assert error(ranksearch.compress(net, full_plan(t)).eval()(*inputs), net.eval()(*inputs)) < 1e-5
    return small


def halved(net, x):
    plan = ranksearch.allocate(net, x, {"flops": "60%"})
    assert list(plan.lowered())
    return plan


# What the counter knows beyond torch's: held against the same net written out in products that torch counts


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, False), (2, True)])
def test_a_fused_lstm_is_counted_as_its_steps_are(layers, bidirectional):
    lstm, x = nn.LSTM(6, 5, layers, bidirectional=bidirectional).eval(), torch.randn(4, 3, 6)
    double = copy.deepcopy(lstm).double()  # for which torch has no fused operator
    assert measured(lstm, x) == measured(double, x.double()) > 0


@pytest.mark.parametrize("grad", [False, True])
def test_attention_on_a_cpu_is_counted_by_every_path(grad):
    x, width, hidden = torch.randn(2, 5, 8), 8, 12
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).eval()
    attention = nn.MultiheadAttention(width, 2, batch_first=True).eval()
    with torch.set_grad_enabled(grad), counter() as counted:
        layer(x)
    assert macs(counted) == 10 * (4 * width**2 + 2 * 5 * width + 2 * width * hidden)
    for need_weights in (True, False):
        with torch.set_grad_enabled(grad), counter() as counted:
            attention(x, x, x, need_weights=need_weights)
        assert macs(counted) == 10 * (4 * width**2 + 2 * 5 * width)


def test_bilinear_and_vectors_are_counted():
    x = torch.randn(4, 6)
    written = nn.Bilinear(6, 6, 3)
    with counter() as counted:
        written(x, x)
    assert macs(counted) == 4 * 3 * (36 + 6)
    with counter() as counted:
        torch.randn(3, 6) @ x[0], x[0] @ x[1]
    assert macs(counted) == 18 + 6


# Layers that get other rows than the first input has


class Rows(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.grid = how, nn.Parameter(torch.randn(1, 3, 8, 8))
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 12)

    def forward(self, x):
        if self.how == "frames":
            return self.head(self.b(self.a(x.flatten(0, 1))).mean((2, 3)))
        if self.how == "siamese":
            one, two = self.b(self.a(torch.cat([x, x.flip(0)]))).mean((2, 3)).chunk(2)
            return self.head(one - two)
        if self.how == "grid":
            return self.head((self.b(self.a(self.grid)) + self.b(self.a(x))).mean((2, 3)))
        if self.how == "without a batch axis":
            return torch.stack([self.head(self.b(self.a(image)).mean((1, 2))) for image in x])
        return self.head(self.b(self.a(x[:1])).flatten(2).permute(2, 0, 1))  # rows in front


@pytest.mark.parametrize("how", ["frames", "siamese", "grid", "without a batch axis", "one of the batch"])
@pytest.mark.parametrize("batch", [2, 3])
def test_a_layer_is_counted_by_the_rows_that_it_gets(how, batch):
    torch.manual_seed(0)
    net = Rows(how).eval()
    x = torch.randn(*((batch, 5) if how == "frames" else (batch,)), 3, 8, 8)
    t = trace(net, x)
    assert t.other_macs == 0
    assert dense_cost(t).macs == pytest.approx(measured(net, x), abs=3)
    small = assert_exact(net, x, plan := halved(net, x))
    assert measured(small, x) <= 0.6 * measured(net, x) + 3
    assert plan_cost(t, plan).macs <= 0.6 * dense_cost(t).macs


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 3), nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                y[chosen == i] = expert(input=x[chosen == i])
        return y


def test_experts_are_counted_by_their_tokens():
    torch.manual_seed(0)
    net, x = Experts(), torch.randn(23, 16)
    t = trace(net, x)
    assert t.other_macs == 0
    assert dense_cost(t).macs == pytest.approx(16 * 3 + 256, abs=4)
    assert_exact(net, x, RankPlan({f"experts.{i}": LayerPlan("svd", 3) for i in range(3)}))


# Layers that are reached, or looked at, otherwise than by name


class Listed(nn.Module):
    def __init__(self, how="list"):
        super().__init__()
        self.how, self.convs = how, []
        for i, (a, b) in enumerate([(3, 16), (16, 16), (16, 16)]):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, 3, padding=1))
            self.convs.append(getattr(self, f"conv{i}"))
        if how == "dict":
            self.convs = {"a": self.convs}
        if how == "closure":
            convs = self.convs
            self.run = lambda x: functools.reduce(lambda y, conv: torch.relu(conv(y)), convs, x)
        if how == "bound":
            self.first = self.conv0.forward
        if how == "partial":
            self.first = functools.partial(self.conv0)
        if how == "instance":
            self.forward = types.MethodType(lambda self, x: self.fc(torch.relu(self.conv0(x)).mean((2, 3))), self)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        if self.how == "closure":
            return self.fc(self.run(x).mean((2, 3)))
        if self.how == "partial":
            return self.fc(self.first(x).mean((2, 3)))
        for conv in self.convs["a"] if self.how == "dict" else self.convs:
            x = torch.relu(conv(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("how", ["list", "dict", "closure", "partial", "instance"])
def test_layers_that_are_not_reached_by_name_are_lowered_all_the_same(how, tmp_path):
    torch.manual_seed(0)
    net, x = Listed(how).eval(), torch.randn(2, 3, 8, 8)
    plan = halved(net, x)
    small = assert_exact(net, x, plan)
    assert error(small(x), net(x)) > 1e-4
    save_net(small, RankPlan(plan.layers, "net"), tmp_path)
    torch.testing.assert_close(load_net(tmp_path, lambda _: Listed(how))(x), small(x))


class Looking(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.layers = how, nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.conv = nn.Conv1d(16, 16, 3, padding=1, stride=1)

    def forward(self, x):
        for layer in self.layers:
            if self.how == "attributes":
                x = x.to(layer.weight.dtype) * (layer.in_features / 16) + (layer.bias is not None)
            x = layer(x)
            if self.how == "class name" and "Linear" in type(layer).__name__:
                x = torch.relu(x)
            if self.how == "type" and isinstance(layer, nn.Linear) and not isinstance(layer, nn.Sequential):
                x = torch.relu(x)
        if self.how == "conv":
            assert self.conv.stride[0] == 1
            assert isinstance(self.conv, nn.Conv1d)
            x = F.pad(self.conv(x[..., None].expand(-1, -1, 4)), (self.conv.padding[0], 0)).mean(2)
        return x


@pytest.mark.parametrize("how", ["attributes", "class name", "type", "conv"])
def test_a_chain_looks_like_the_layer_that_it_was(how):
    torch.manual_seed(0)
    net, x = Looking(how).eval(), torch.randn(4, 16)
    assert_exact(net, x, RankPlan({f"layers.{i}": LayerPlan("svd", 5) for i in range(3)}))
    if how == "conv":
        for lowering, rank in (("im2col", 5), ("tucker2", (4, 5)), ("cp", 7), ("tiled_8", 3), ("channel", 5)):
            small = ranksearch.compress(net, RankPlan({"conv": LayerPlan(lowering, rank)}))
            for made in (small, copy.deepcopy(small)):
                assert isinstance(made.conv, nn.Conv1d)
                assert (made.conv.in_channels, made.conv.kernel_size, made.conv.padding) == (16, (3,), (1,))
                y = torch.randn(2, 16, 6)
                wanted = F.conv1d(y, made.conv.weight, made.conv.bias, padding=1)
                torch.testing.assert_close(made.conv(y), wanted, rtol=1e-4, atol=1e-5)


LAYER = nn.Linear(16, 16)


class ByGlobal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = LAYER, nn.Linear(16, 16)

    def forward(self, x):
        return self.b(LAYER(x))


def by_closure(default=False):
    layers = [nn.Linear(16, 16)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers[0], nn.Linear(16, 16)

        def forward(self, x, held=layers if default else None):
            return self.b(held[0](x)) if default else self.b(layers[0](x))

    return Net()


@pytest.mark.parametrize(
    "made", [ByGlobal, by_closure, functools.partial(by_closure, True)], ids=["global", "closure", "default"]
)
def test_a_layer_that_a_classs_code_reaches_is_refused_without_an_example_too(made):
    net = made()
    with pytest.raises(UsageError, match=r"'a' cannot be lowered: .*forward reaches it by a global or a closure"):
        ranksearch.compress(net, RankPlan({"a": LayerPlan("svd", 4)}))
    small = ranksearch.compress(net, RankPlan({"b": LayerPlan("svd", 16)}))
    x = torch.randn(2, 16)
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.mix = nn.Linear(16, 12), nn.Linear(12, 12)

    def forward(self, x):
        return F.linear(torch.relu(self.mix(self.encoder(x))), self.encoder.weight.mT)


def test_a_weight_that_others_compute_with_is_left_alone_and_right_where_a_plan_lowers_it():
    torch.manual_seed(0)
    net, x = TiedAutoencoder().eval(), torch.randn(3, 16)
    t = trace(net, x)
    assert [layer.name for layer in t.layers] == ["mix"]
    assert "outside of its own calls" in dict(t.skipped)["encoder"]
    small = ranksearch.compress(net, plan := RankPlan({"encoder": LayerPlan("svd", 4)}))
    project_(net, plan)
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.encoder.parameters())


class Offset(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x + 1, weight, bias)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def patched(layer):
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias) + 1, layer)
    return layer


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Offset(8, 8, 3), "changes its input"),
        (Called(8, 8), "__call__ of its own"),
        (patched(nn.Linear(8, 8)), "forward was replaced on the instance"),
        (nn.Embedding(8, 8, max_norm=1.0), "Embedding"),
    ],
    ids=["conv_forward", "call", "instance", "embedding"],
)
def test_a_layer_that_computes_something_else_is_refused_with_the_reason(layer, says):
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(8, 8)})
    for change in (ranksearch.compress, project_):
        with pytest.raises(UsageError, match=f"'odd' cannot be lowered.*{says}"):
            change(model, RankPlan({"odd": LayerPlan("svd" if isinstance(layer, nn.Linear) else "im2col", 2)}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_size_is_what_the_state_dict_has_in_any_dtype(dtype, tmp_path):
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64)).to(dtype)
    x = torch.randn(2, 64, dtype=dtype)
    net[3].float()  # as mixed nets have it

    def size(net):
        return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())

    t = trace(net[:3].append(net[3].to(dtype)), x)
    assert dense_cost(t).size_bytes == size(net)
    budget = int(0.7 * size(net))
    plan = ranksearch.allocate(net, x, {"size": str(budget)})
    assert 0.9 * budget < plan_cost(t, plan).size_bytes == size(ranksearch.compress(net, plan)) <= budget


def test_a_size_of_layers_in_several_dtypes_is_right_and_its_budget_kept():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(64, 64), nn.Linear(64, 64).double(), nn.LayerNorm(64).bfloat16()

        def forward(self, x):
            return self.norm(self.b(self.a(x).double()).bfloat16())

    net, x = Mixed(), torch.randn(2, 64)
    dense = 4 * 65 * 64 + 8 * 65 * 64 + 2 * 128
    assert dense_cost(t := trace(net, x)).size_bytes == dense
    plan = ranksearch.allocate(net, x, {"size": "70%"})
    small = ranksearch.compress(net, plan)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in small.state_dict().values())
    assert plan_cost(t, plan).size_bytes == stored <= 0.7 * dense


@pytest.mark.parametrize("factor", [1e25, 1e-30])
def test_ranks_do_not_depend_on_the_scale_of_weights(factor):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(2, 64)
    wanted = ranksearch.allocate(net, x, {"flops": "50%"})
    net[0].weight.data *= factor
    found = ranksearch.allocate(net, x, {"flops": "50%"})
    assert abs(found["0"].rank - wanted["0"].rank) <= 1


class TiedByData(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.view = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(6, 24)
        self.left.weight.data = self.right.weight.data

    def forward(self, x):
        return self.right(torch.relu(self.left(x)))


def test_weights_tied_by_their_memory_are_one_layer(tmp_path):
    torch.manual_seed(0)
    net, x = TiedByData().eval(), torch.randn(3, 12)
    t = trace(net, x)
    assert [(layer.name, layer.shared_with) for layer in t.layers] == [("left", ("right",))]
    plan = RankPlan({"left": LayerPlan("svd", 4)}, model="net")
    small = assert_exact(net, x, plan)
    assert plan_cost(t, plan).params == sum(p.numel() for p in small.parameters())
    for name in ("right", "ri*"):  # a second name of a weight excludes it, too
        with pytest.raises(UsageError, match="leave no layer to lower"):
            ranksearch.allocate(net, x, {"flops": "60%"}, exclude=[name])
    net.view.weight.data = net.left.weight.data.view(24, 6)
    with pytest.raises(
        UsageError, match=r"left: its weight shares memory with 'view.weight', which sees it in another shape"
    ):
        trace(net, x)


# Nothing of the caller's is changed


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.calls = nn.Linear(12, 12), nn.BatchNorm1d(12), 0
        self.register_buffer("average", torch.zeros(12))

    def forward(self, x):
        x.add_(1)
        self.calls, self.kept = self.calls + 1, self.a(x)
        self.average.lerp_(self.kept.detach().mean(0), 0.1)
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        if self.wrong:
            raise RuntimeError("not a number")
        return self.norm(self.kept - self.average) * noise


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_trace_leaves_model_inputs_and_random_numbers_as_they_were(value):
    net, x = Stateful().train(), torch.full((4, 12), value)
    net.wrong = value != value
    net.norm.eval()
    before, given = copy.deepcopy(net.state_dict()), x.clone()
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(RuntimeError, match="not a number") if net.wrong else contextlib.nullcontext():
        trace(net, x)
    torch.testing.assert_close(x, given, equal_nan=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert (net.calls, net.training, net.norm.training, hasattr(net, "kept")) == (0, True, False, False)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert (np.random.get_state()[1] == drawn[2]).all()


@pytest.mark.parametrize("keeps", ["activation", "old weight norm"])
def test_a_net_that_holds_a_tensor_with_a_graph_is_compressed(keeps):
    net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    if keeps == "activation":
        net[1].register_forward_hook(lambda module, args, out: setattr(module, "seen", {"last": [out]}))
    else:
        nn.utils.weight_norm(net[2])
    net(torch.randn(2, 12)).sum().backward()
    small = ranksearch.compress(net, RankPlan({"0": LayerPlan("svd", 12)}))
    x = torch.randn(3, 12)
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)


# What is no net of layers, or not yet


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.auxiliary = nn.Linear(16, 16), nn.LazyLinear(10)

    def forward(self, x):
        return self.auxiliary(x) if self.training else self.a(x)


def plain():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def test_models_that_hold_no_layers_are_refused_in_a_sentence():
    x = torch.randn(2, 16)
    with torch.device("meta"):
        meta = plain()
    exported = torch.export.export(plain(), (x,))
    for model, says in (
        (meta, "meta device"), (torch.jit.script(plain()), "scripted"), (exported.module(), "exported"), (exported, "exported"),
        ("net", "got a str"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            ranksearch.allocate(model, x, {"flops": "50%"})
        with pytest.raises(UsageError, match=says):
            ranksearch.compress(model, RankPlan())


def test_lazy_and_quantised_layers_are_named_with_a_reason():
    x = torch.randn(2, 16)
    assert "lazy" in dict(trace(Lazy().eval(), x).skipped)["auxiliary"]
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(16, 16)), {nn.Linear})
    assert "quantised" in dict(trace(nn.Sequential(quantised, nn.Linear(16, 10)), x).skipped)["0.0"]


def test_wrapped_models_are_unwrapped():
    net, x = plain(), torch.randn(2, 16)
    for wrapped in (nn.DataParallel(net), torch.compile(net)):
        plan = ranksearch.allocate(wrapped, x, {"flops": "60%"})
        assert set(plan.layers) == {"0", "2"}
        assert isinstance(ranksearch.compress(wrapped, plan), nn.Sequential)


@pytest.mark.parametrize("sensitivity", ["activation", "kfac", "fisher"])
def test_hugging_faces_conv1d_is_a_linear_whose_weight_lies_the_other_way_round(sensitivity):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    net, x = nn.Sequential(conv1d(20, 16), nn.GELU(), conv1d(12, 20), nn.Linear(12, 12)), torch.randn(3, 7, 16)
    twin = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 12), nn.Linear(12, 12))
    for own, theirs in zip(twin, net, strict=True):
        if isinstance(own, nn.Linear):
            own.weight.data = theirs.weight.data.T.contiguous() if isinstance(theirs, conv1d) else theirs.weight.data
            own.bias.data = theirs.bias.data
    plans = [
        ranksearch.allocate(model, x, {"flops": "70%"}, sensitivity=sensitivity, calibration=[x], lowerings=["svd"])
        for model in (net, twin)
    ]
    assert plans[0].layers == plans[1].layers
    small = assert_exact(net, x, plans[0])
    assert isinstance(small[0], conv1d)
    assert (small[0].nx, small[0].nf, small[0].weight.shape) == (16, 20, (16, 20))
    with pytest.raises(UsageError, match="lies the other way round"):
        ranksearch.compress(net, RankPlan({"0": LayerPlan("tiled_8", 2)}))


def test_products_of_fused_experts_are_counted():
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped products")
    rows, experts = torch.randn(12, 16).bfloat16(), torch.randn(3, 16, 24).bfloat16()
    with counter() as counted:
        torch._grouped_mm(rows, experts, offs=torch.tensor([4, 4, 12], dtype=torch.int32))
    assert macs(counted) == 12 * 16 * 24


def test_a_model_that_is_one_layer_is_lowered():
    net, x = nn.Linear(32, 32), torch.randn(2, 32)
    assert_exact(net, x, ranksearch.allocate(net, x, {"flops": "60%"}))


def test_a_net_without_a_layer_to_lower_says_why_of_each():
    with pytest.raises(UsageError, match=r"(?s)no .* layer that can be lowered.*0: .*changes its input"):
        trace(nn.Sequential(Offset(3, 8, 3)), torch.randn(1, 3, 8, 8))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.conv, self.head = nn.MultiheadAttention(16, 4), nn.Conv1d(16, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.conv(x.mT).mT)


@pytest.mark.parametrize(("norm_first", "batch_first"), [(False, True), (True, False)])
def test_a_compressed_encoder_is_still_scripted_and_computes_with_every_mask(norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first, norm_first=norm_first)
    net, x = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False).eval(), torch.randn(5, 5, 16)
    small = ranksearch.compress(net, full_plan(trace(net, x)))
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    scripted = torch.jit.script(small)
    assert isinstance(small, nn.TransformerEncoder)
    with torch.no_grad():
        for mask in ({}, {"src_key_padding_mask": hidden}, {"mask": nn.Transformer.generate_square_subsequent_mask(5)}):
            wanted = net(x, **mask)
            torch.testing.assert_close(small(x, **mask), wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scripted(x, **mask), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", ["im2col", "im2col_pivoted", "tucker2", "cp"])
def test_a_compressed_net_is_still_scripted_and_pickled(lowering):
    net, x = Attending().eval(), torch.randn(5, 6, 16)
    plan = RankPlan(
        full_plan(trace(net, x)).layers | {"conv": LayerPlan(lowering, (4, 4) if lowering == "tucker2" else 4)}
    )
    small = ranksearch.compress(net, plan)
    with torch.no_grad():
        wanted = small(x)
        torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), wanted)
        torch.testing.assert_close(torch.jit.script(small)(x), wanted)


# A compressed net is checked as a whole


class Exactly(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.b(self.a(x))
        if self.how == "computes":
            return torch.relu(y) if type(self.a) is nn.Linear else y
        if self.how == "costs" and type(self.a) is not nn.Linear:
            return y + 0 * (x @ x.mT @ x)
        return y


@pytest.mark.parametrize("how", ["computes", "costs", "plain"])
def test_what_is_not_as_planned_is_refused_by_name(how):
    torch.manual_seed(0)
    net, x = Exactly(how).eval(), torch.randn(8, 16)
    plan = ranksearch.allocate(net, x, {"flops": "60%"})
    if how == "plain":
        assert ranksearch.compress(net, plan)(x).shape == (8, 16)
        return
    for given in ({}, {"example_input": x}):
        with pytest.raises(UsageError, match="xclude"):
            ranksearch.compress(net, plan, **given)
