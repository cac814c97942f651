"""A net as a whole: tracing, plans, costs, surgery, projection, BN, files."""

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ranksearch
from ranksearch.compress import (
    LayerPlan,
    RankPlan,
    dense_cost,
    load_net,
    plan_cost,
    project_,
    reestimate_bn_,
    restructure_,
    save_net,
    trace,
)  # fmt: skip
from ranksearch.errors import NonFiniteError, UsageError

PLAN = RankPlan(
    {
        "stem": LayerPlan("channel", 2),
        "depthwise": LayerPlan("spatial", 1),
        "body.0": LayerPlan("im2col", 7),
        "head": LayerPlan("svd", 4),
    },
    model="small",
)
FULL = RankPlan(
    {
        "stem": LayerPlan("spatial", 9),
        "depthwise": LayerPlan("spatial", 3),
        "body.0": LayerPlan("im2col", 24),
        "head": LayerPlan("svd", 10),
    }
)


def state_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def flops(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("plan", [RankPlan(), PLAN, FULL], ids=["dense", "plan", "full"])
def test_cost_from_specs_equals_the_built_net(small_net, image, plan):
    built = ranksearch.compress(small_net, plan)
    cost = plan_cost(trace(small_net, image), plan)
    assert 2 * cost.macs == flops(built, image[:1])
    assert cost.params == sum(p.numel() for p in built.parameters())
    assert cost.size_bytes == state_bytes(built)


def test_trace_gives_names_sizes_and_leaves_the_model_as_it_was(small_net, image):
    small_net.train()
    small_net.bn.eval()
    before = copy.deepcopy(small_net.state_dict())
    net = trace(small_net, image)
    assert [layer.name for layer in net.layers] == ["stem", "depthwise", "body.0", "head"]
    assert net["body.0"].in_sizes == ((8, 8),)
    assert net["body.0"].macs == 24 * 12 * 9 * 16
    assert small_net.training
    assert not small_net.bn.training
    assert all(torch.equal(before[k], v) for k, v in small_net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in small_net.modules())


def test_trace_says_what_it_skips_and_counts_shared_weights_once():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.conv, self.unused = Standardised(1, 1, 1), nn.Linear(3, 3)
            self.twice = nn.Linear(6, 6)

        def forward(self, x):
            x = self.twice(self.twice(self.b(self.a(x))))
            return self.conv(x[:, None, None]).flatten(1)

    model = Odd()
    x = torch.randn(2, 6)
    net = trace(model, x)
    reasons = dict(net.skipped)
    assert set(reasons) == {"a", "b", "conv", "unused"}
    assert "shared" in reasons["a"]
    assert "does not call" in reasons["unused"]
    assert "Standardised" in reasons["conv"]
    assert [(layer.name, len(layer.in_sizes)) for layer in net.layers] == [("twice", 2)]
    assert dense_cost(net).params == sum(p.numel() for p in model.parameters())
    assert 2 * dense_cost(net).macs == flops(model, x[:1])
    assert 2 * plan_cost(net, RankPlan({"twice": LayerPlan("svd", 2)})).macs == flops(
        ranksearch.compress(model, RankPlan({"twice": LayerPlan("svd", 2)})), x[:1]
    )


def test_compress_at_full_rank_computes_the_same_and_leaves_the_model_alone(small_net, image):
    before = copy.deepcopy(small_net.state_dict())
    small = ranksearch.compress(small_net, FULL)
    torch.testing.assert_close(small(image), small_net(image), rtol=1e-4, atol=1e-5)
    assert isinstance(small.stem, nn.Sequential)
    assert isinstance(small_net.stem, nn.Conv2d)
    assert all(torch.equal(before[k], v) for k, v in small_net.state_dict().items())


def test_decomposing_after_a_projection_changes_nothing(small_net, image):
    removed = project_(small_net, PLAN)
    assert set(removed) == set(PLAN.layers)
    assert all(0 < share < 1 for share in removed.values())
    torch.testing.assert_close(ranksearch.compress(small_net, PLAN)(image), small_net(image), rtol=1e-4, atol=1e-5)
    assert all(share < 1e-6 for share in project_(small_net, PLAN).values())


@pytest.mark.parametrize(
    ("layer", "choice", "says"),
    [
        ("bodi.0", LayerPlan("im2col", 3), "Did you mean 'body.0'"),
        ("stem", LayerPlan("im2col", 99), r"rank 99 is outside 1\.\.12"),
        ("stem", LayerPlan("svd", 2), "svd cannot lower this layer"),
        ("stem", LayerPlan("spatail", 2), "Did you mean 'spatial'"),
        ("bn", LayerPlan("im2col", 3), "BatchNorm2d"),
    ],
)
def test_a_wrong_plan_names_the_layer_and_what_is_valid(small_net, layer, choice, says):
    before = copy.deepcopy(small_net.state_dict())
    with pytest.raises(UsageError, match=says):
        ranksearch.compress(small_net, RankPlan({layer: choice}))
    with pytest.raises(UsageError, match=says):
        project_(small_net, RankPlan({layer: choice}))
    assert all(torch.equal(before[k], v) for k, v in small_net.state_dict().items())


def test_non_finite_weights_name_the_layer(small_net):
    small_net.body[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"Layer 'body\.0'.*NaN"):
        project_(small_net, PLAN)


def test_plan_survives_json():
    again = RankPlan.from_json(PLAN.to_json())
    assert again == PLAN
    assert again.digest() == PLAN.digest()
    assert again["not there"] == LayerPlan("dense", 0)
    assert RankPlan({**PLAN.layers, "x": LayerPlan("dense", 0)}).digest() == PLAN.digest()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "not a rank plan"),
        ("{", "no JSON"),
        ('{"layers": {"a": {"lowering": "im2col"}}}', "rank"),
        ('{"layers": {"a": {"lowering": "im2col", "rank": 0}}}', "whole number >= 1"),
        ('{"layers": {"a": {"lowering": "im2col", "rank": 1.5}}}', "whole number >= 1"),
        ('{"layers": {"a": {"lowering": "im3col", "rank": 1}}}', "Did you mean 'im2col'"),
        ('{"layers": {"a": {"lowering": "dense", "rank": 3}}}', "rank"),
    ],
)
def test_a_damaged_plan_is_refused(text, says):
    with pytest.raises(UsageError, match=says):
        RankPlan.from_json(text)


def test_bn_statistics_become_those_of_the_batches(small_net):
    batches = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    small_net.bn.running_mean.fill_(50)
    assert reestimate_bn_(small_net, batches) == 3
    stem = torch.stack([small_net.stem(b).mean((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(small_net.bn.running_mean, stem, rtol=1e-4, atol=1e-5)
    assert small_net.bn.momentum == 0.1
    assert not any(m.training for m in small_net.modules())


def test_bn_without_batches_is_an_error(small_net):
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_bn_(small_net, [])


def test_net_on_disk_is_the_same_net(small_net, image, tmp_path):
    small = ranksearch.compress(small_net, PLAN)
    save_net(small, PLAN, tmp_path)
    again = load_net(tmp_path, lambda name: type(small_net)())
    assert torch.equal(again(image), small(image))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


def test_a_tampered_net_is_refused(small_net, tmp_path):
    save_net(ranksearch.compress(small_net, PLAN), PLAN, tmp_path)

    def build(name):
        return type(small_net)()

    other = RankPlan({**PLAN.layers, "stem": LayerPlan("channel", 1)}, model="small")
    (tmp_path / "plan.json").write_text(other.to_json())
    with pytest.raises(UsageError, match="does not fit"):
        load_net(tmp_path, build)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.to_dict() | {"model": None}))
    with pytest.raises(UsageError, match="does not name its model"):
        load_net(tmp_path, build)
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04not tensors")
    with pytest.raises(UsageError, match="does not fit"):
        load_net(tmp_path, build)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors is missing"):
        load_net(tmp_path, build)


def test_restructured_net_takes_the_state_dict(small_net):
    small = ranksearch.compress(small_net, PLAN)
    empty = restructure_(type(small_net)(), PLAN)
    assert set(empty.state_dict()) == set(small.state_dict())
    safetensors.torch.save(empty.state_dict())
    empty.load_state_dict(small.state_dict())
