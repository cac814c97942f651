"""Weights that are not one layer's own: tied, aliased, packed in an attention, computed by a parametrization; transposed convs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import ranksearch
from ranksearch.compress import (
    LayerPlan,
    RankPlan,
    dense_cost,
    load_net,
    plan_cost,
    project_,
    save_net,
    trace,
)  # fmt: skip
from ranksearch.errors import UsageError


def flops(model: nn.Module, *inputs: torch.Tensor) -> int:
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    known = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(
            q, k, v
        )
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter, torch.no_grad():
        model(*inputs)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def full_plan(net, **names: str) -> RankPlan:
    """Every layer at full rank, by the lowering named for its kind."""
    layers = {}
    for layer in net.layers:
        lowering = ranksearch.lowering.lowering_named(names.get("conv", "im2col") if layer.spec.is_conv else "svd")
        layers[layer.name] = LayerPlan(lowering.name, lowering.full_rank(layer.spec))
    return RankPlan(layers)


class Tied(nn.Module):
    """One weight under two names of one module, and one shared by two modules with biases of their own."""

    def __init__(self):
        super().__init__()
        self.once = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.once
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.right.weight = self.left.weight

    def forward(self, x):
        return self.right(torch.relu(self.left(self.again(torch.relu(self.once(x))))))


@pytest.mark.parametrize("lowering", ["im2col", "tucker2", "cp", "tiled_8"])
def test_a_tied_weight_is_one_layer_counted_once_and_stays_tied(lowering, tmp_path):
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(2, 8, 6, 5)
    net = trace(model, x)
    found = [(layer.name, len(layer.in_sizes), layer.shared_with) for layer in net.layers]
    assert found == [("once", 2, ("again",)), ("left", 2, ("right",))]
    assert dense_cost(net).params == sum(p.numel() for p in model.parameters())
    rank = (3, 4) if lowering == "tucker2" else 4
    plan = RankPlan({"once": LayerPlan(lowering, rank), "left": LayerPlan(lowering, rank)}, model="tied")
    small = ranksearch.compress(model, plan)
    assert small.once is small.again
    assert plan_cost(net, plan).params == sum(p.numel() for p in small.parameters())
    save_net(small, plan, tmp_path)
    loaded = load_net(tmp_path, lambda name: Tied())
    torch.testing.assert_close(loaded(x), small(x))
    assert 2 * plan_cost(net, plan).macs == flops(loaded, x[:1])
    factors = {id(p) for n, p in small.left.named_parameters() if "bias" not in n}
    assert factors == {id(p) for n, p in small.right.named_parameters() if "bias" not in n}
    assert torch.equal(small.right(x), small.right(x))
    projected = copy.deepcopy(model)
    project_(projected, RankPlan({"left": LayerPlan("im2col", 2)}))
    assert projected.left.weight is projected.right.weight


def test_full_rank_chains_of_tied_layers_compute_the_same():
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(
        ranksearch.compress(model, full_plan(trace(model, x)))(x), model(x), rtol=1e-4, atol=1e-5
    )


def test_a_weight_shared_with_what_cannot_be_lowered_is_left_alone_and_said():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = (
                nn.Embedding(20, 8, max_norm=9),
                nn.Linear(8, 8),
                nn.Linear(8, 20, bias=False),
            )
            self.head.weight = self.embed.weight
            self.a, self.b = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=2, dilation=2)
            self.b.weight = self.a.weight

        def forward(self, ids):
            x = self.mix(self.embed(ids))
            return self.head(self.b(self.a(x.mT)).mT)

    net = trace(Language(), torch.randint(0, 20, (2, 5)))
    reasons = dict(net.skipped)
    assert [layer.name for layer in net.layers] == ["mix"]
    assert "shared with 'embed.weight'" in reasons["head"]
    assert "different kinds of layer" in reasons["a"] == reasons["b"]


def test_naming_the_other_one_of_a_tied_pair_says_which_to_name():
    with pytest.raises(UsageError, match="'right' shares its weight with 'left'"):
        ranksearch.compress(Tied(), RankPlan({"right": LayerPlan("im2col", 2)}))


@pytest.mark.parametrize("computed", ["spectral_norm", "prune", "two"])
def test_a_computed_weight_is_refused_with_the_reason(computed):
    layer = nn.Conv2d(4, 4, 3)
    match computed:
        case "two":
            parametrizations.spectral_norm(parametrizations.weight_norm(layer))
        case "spectral_norm":
            parametrizations.spectral_norm(layer)
        case "prune":
            prune.random_unstructured(layer, "weight", 0.5)
    model = nn.Sequential(layer, nn.Conv2d(4, 4, 3))
    net = trace(model, torch.randn(1, 4, 8, 8))
    assert [layer.name for layer in net.layers] == ["1"]
    assert "computed" in dict(net.skipped)["0"]
    for change in (ranksearch.compress, project_):
        with pytest.raises(UsageError, match=r"'0' cannot be lowered.*computed"):
            change(model, RankPlan({"0": LayerPlan("im2col", 2)}))


@pytest.mark.parametrize("given", [{"input": "text"}, [], [1, 2], torch.zeros(())], ids=str)
def test_an_example_without_a_batched_tensor_is_refused_in_a_sentence(given):
    with pytest.raises(UsageError, match=r"batched tensor \[N, \.\.\.\].*got a (dict|list|Tensor)"):
        trace(nn.Linear(4, 4), given)


def test_integer_inputs_beside_a_mask_are_traced():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(9, 8), nn.Linear(8, 4)

        def forward(self, ids, mask):
            return self.mix(self.embed(ids) * mask[..., None])

    given = torch.randint(9, (2, 5)), torch.ones(2, 5)
    net = trace(Tokens(), given)
    assert [(layer.name, layer.in_sizes) for layer in net.layers] == [("embed", ((5,),)), ("mix", ((5,),))]
    assert ranksearch.allocate(Tokens(), given, {"params": "95%"}).layers


def test_a_layer_with_hooks_is_refused_rather_than_its_hooks_lost():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].register_forward_hook(lambda *args: None)
    assert "hooks" in dict(trace(model, torch.randn(1, 4, 8, 8)).skipped)["0"]


def test_every_other_weight_is_said_to_be_left_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.lazy = nn.LSTM(8, 8, batch_first=True), nn.LazyLinear(8)
            self.odd, self.hooked = nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2)
            self.hooked.register_forward_hook(lambda *args: None)
            self.token = nn.Parameter(torch.zeros(1, 1, 8))

        def forward(self, x):
            x = self.lazy(self.lstm(x)[0] + self.token)
            return self.hooked(*[self.odd(x, x, x)[0]] * 3)[0]

    net = trace(Mixed(), torch.randn(2, 5, 8))
    reasons = dict(net.skipped)
    assert [layer.name for layer in net.layers] == ["lstm.ih_l0", "lstm.hh_l0", "lazy"]
    assert set(reasons) == {"(the model itself)", "odd", "hooked"}
    assert "add_bias_kv" in reasons["odd"]
    assert "hooks" in reasons["hooked"]


@pytest.mark.parametrize("conv", ["im2col", "channel", "spatial", "tucker2", "cp", "tiled_c2", "tiled_16"])
def test_a_decoder_of_transposed_convs_is_exact_at_full_rank_and_counted_right(conv):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), padding=(0, 1), output_padding=(1, 0), dilation=2, groups=1),
    ).eval()
    x = torch.randn(2, 8, 5, 4)
    net = trace(model, x)
    assert [(layer.name, layer.norm) for layer in net.layers] == [("0", "1"), ("3", None)]
    plan = full_plan(net, conv=conv)
    small = ranksearch.compress(model, plan)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
    assert plan_cost(net, plan).params == sum(p.numel() for p in small.parameters())
    assert 2 * dense_cost(net).macs == flops(model, x[:1])


def test_a_transposed_conv_that_is_told_its_output_size_is_left_alone_and_said():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up = nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3, stride=2)

        def forward(self, x):
            return self.up(self.first(x), output_size=(10, 10))

    net = trace(Decoder(), torch.randn(1, 4, 6, 6))
    assert [layer.name for layer in net.layers] == ["first"]
    assert "output size" in dict(net.skipped)["up"]


class Encoder(nn.Module):
    def __init__(self, batch_first=True, bias=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=batch_first, bias=bias)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(16, 5)

    def forward(self, x, mask=None):
        return self.head(self.encoder(x, src_key_padding_mask=mask))


@pytest.mark.parametrize(("batch_first", "bias"), [(True, True), (False, True), (True, False)])
def test_the_packed_projection_of_self_attention_is_a_layer(batch_first, bias):
    torch.manual_seed(0)
    model = Encoder(batch_first, bias).eval()
    x = torch.randn((2, 7, 16) if batch_first else (2, 2, 16))
    net = trace(model, x)
    names = [layer.name for layer in net.layers]
    parts = ("linear1", "linear2", "self_attn.in_proj", "self_attn.out_proj")
    assert set(names) == {"head", *(f"encoder.layers.{i}.{part}" for i in range(2) for part in parts)}
    assert net["encoder.layers.0.self_attn.in_proj"].spec.weight_shape == (48, 16)
    assert dense_cost(net).params == sum(p.numel() for p in model.parameters())
    plan = full_plan(net)
    small = ranksearch.compress(model, plan)
    with torch.no_grad():  # where torch would take its fused path
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert plan_cost(net, plan).params == sum(p.numel() for p in small.parameters())
    if batch_first:
        assert 2 * dense_cost(net).macs == flops(model, x[:1])
        assert 2 * plan_cost(net, plan).macs == flops(small, x[:1])
        mask = torch.zeros(2, 7, dtype=torch.bool)
        mask[0, 5:] = True
        with torch.no_grad():
            torch.testing.assert_close(small(x, mask)[~mask], model(x, mask)[~mask], rtol=1e-4, atol=1e-5)


def test_an_encoder_with_a_lowered_mlp_alone_keeps_off_the_fused_path():
    model, x = Encoder().eval(), torch.randn(2, 7, 16)
    plan = RankPlan({"encoder.layers.0.linear1": LayerPlan("svd", 16)})
    with torch.no_grad():
        torch.testing.assert_close(ranksearch.compress(model, plan)(x), model(x), rtol=1e-4, atol=1e-5)


class Cross(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, **settings)
        self.settings = {"need_weights": True}

    def forward(self, x, memory):
        out, weights = self.attention(x, memory, memory, **self.settings)
        return out if weights is None else (out, weights)


@pytest.mark.parametrize(
    "settings", [{"batch_first": True}, {"batch_first": True, "kdim": 6, "vdim": 6}], ids=["packed", "widths"]
)
def test_cross_attention_has_three_projections(settings):
    torch.manual_seed(0)
    model = Cross(**settings).eval()
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 9, settings.get("kdim", 12))
    net = trace(model, (x, memory))
    assert [layer.name.rpartition(".")[2] for layer in net.layers] == ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert [layer.in_sizes for layer in net.layers] == [((5,),), ((9,),), ((9,),), ((5,),)]
    plan = full_plan(net)
    small = ranksearch.compress(model, plan)
    for found, expected in zip(small(x, memory), model(x, memory), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert 2 * plan_cost(net, plan).macs == flops(small, x[:1], memory[:1])
    half = RankPlan({"attention.q_proj": LayerPlan("svd", 3), "attention.out_proj": LayerPlan("svd", 2)})
    project_(model, half)  # the slice of a packed weight is projected in place
    for found, expected in zip(ranksearch.compress(model, half)(x, memory), model(x, memory), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["bool", "float", "per_head", "none"])
def test_an_opened_attention_takes_every_mask(batch_first, masked):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    x = torch.randn(2, 5, 12) if batch_first else torch.randn(5, 2, 12)
    bool_mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mask = {"bool": bool_mask, "float": torch.randn(5, 5), "per_head": torch.randn(6, 5, 5), "none": None}[masked]
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    padding = padding if masked in ("bool", "none") else torch.zeros(2, 5).masked_fill(padding, float("-inf"))
    wrapped = nn.ModuleDict({"attention": attention})
    opened = ranksearch.compress(wrapped, RankPlan({"attention.in_proj": LayerPlan("svd", 12)}))["attention"]
    for need_weights in (True, False):
        for average in (True, False):
            settings = {
                "attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights, "average_attn_weights": average,
            }  # fmt: skip
            found, expected = opened(x, x, x, **settings), attention(x, x, x, **settings)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
            assert (found[1] is None) == (expected[1] is None)
            if need_weights:
                torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    single = x[0] if batch_first else x[:, 0]
    torch.testing.assert_close(
        opened(single, single, single)[0], attention(single, single, single)[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(opened(x, x.clone(), x)[0], attention(x, x.clone(), x)[0], rtol=1e-4, atol=1e-5)


def test_a_plan_that_names_a_projection_packed_and_in_part_is_refused():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(12, 3)})
    plan = RankPlan({"a.in_proj": LayerPlan("svd", 4), "a.q_proj": LayerPlan("svd", 4)})
    with pytest.raises(UsageError, match="name it packed or its parts"):
        ranksearch.compress(model, plan)


def test_an_opened_attention_comes_back_from_disk(tmp_path):
    model, x = Encoder().eval(), torch.randn(2, 7, 16)
    plan = RankPlan({"encoder.layers.1.self_attn.in_proj": LayerPlan("svd", 5)}, model="encoder")
    small = ranksearch.compress(model, plan)
    save_net(small, plan, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_net(tmp_path, lambda name: Encoder())(x), small(x))


def test_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].requires_grad_(False)
    small = ranksearch.compress(model, RankPlan({"0": LayerPlan("im2col", 2), "1": LayerPlan("im2col", 2)}))
    assert not any(p.requires_grad for p in small[0].parameters())
    assert all(p.requires_grad for p in small[1].parameters())
