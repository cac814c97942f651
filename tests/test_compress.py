"""A net as a whole: tracing, plans, costs, surgery, projection, BN, files."""

import copy
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ranksearch
from ranksearch.compress import (
    LayerPlan,
    Projector,
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


def test_hooks_that_a_net_adds_in_its_first_pass_are_not_added_twice():
    """Hugging Face's nets collect outputs in this way."""

    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages, self.collected = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), []
            self.seen = {"calls": 0}

        def forward(self, x):
            if not hasattr(self, "hooked"):
                for stage in self.stages:
                    stage.register_forward_hook(lambda module, args, output: self.collected.append(output))
                self.hooked = True
            self.collected.clear()
            self.seen["calls"] += 1
            for stage in self.stages:
                x = stage(x)
            return torch.cat(self.collected, 1)

    model, x = Collecting().eval(), torch.randn(2, 6)
    trace(model, x)
    small = ranksearch.compress(model, ranksearch.allocate(model, x, {"params": "90%"}))
    assert (model.seen, model.collected, hasattr(model, "hooked")) == ({"calls": 0}, [], False)
    assert model(x).shape == small(x).shape == (2, 12)


def test_trace_says_what_it_skips_and_counts_shared_weights_once():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return super().forward(2 * x)

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
    assert set(reasons) == {"conv", "unused"}
    assert "does not call" in reasons["unused"]
    assert "Standardised" in reasons["conv"]
    assert [(layer.name, len(layer.in_sizes)) for layer in net.layers] == [("a", 2), ("twice", 2)]
    assert dense_cost(net).params == sum(p.numel() for p in model.parameters())
    assert 2 * dense_cost(net).macs == flops(model, x[:1])
    assert 2 * plan_cost(net, RankPlan({"twice": LayerPlan("svd", 2)})).macs == flops(
        ranksearch.compress(model, RankPlan({"twice": LayerPlan("svd", 2)})), x[:1]
    )


def test_compress_at_full_rank_computes_the_same_and_leaves_the_model_alone(small_net, image):
    before = copy.deepcopy(small_net.state_dict())
    small = ranksearch.compress(small_net, FULL)
    torch.testing.assert_close(small(image), small_net(image), rtol=1e-4, atol=1e-5)
    assert len(list(small.stem.children())) == 2
    assert not list(small_net.stem.children())
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


def test_energy_transfer_keeps_the_norm_and_the_rank(small_net):
    before = {name: small_net.get_submodule(name).weight.detach().clone() for name in PLAN.layers}
    plain = copy.deepcopy(small_net)
    removed = project_(plain, PLAN)
    assert project_(small_net, PLAN, energy_transfer=True) == removed
    for name, weight in before.items():
        moved = small_net.get_submodule(name).weight
        torch.testing.assert_close(moved.norm(), weight.norm())
        scale = (1 - removed[name]) ** 0.5  # Frobenius: what is kept has the energy (1 - removed) ||W||²
        torch.testing.assert_close(moved * scale, plain.get_submodule(name).weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lowering", ["im2col", "channel", "spatial", "tucker2", "tiled_c2"])
def test_bn_rectification_is_nearest_where_bn_looks(small_net, image, lowering):
    """Of all weights of that rank the rectified one is nearest in the norm that BN's scale gives, against numpy for im2col."""
    small_net.bn.weight.data = torch.linspace(0.1, 2.0, 12)
    small_net.bn.running_var = torch.linspace(0.5, 3.0, 12)
    model = nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), small_net.bn).eval()
    weight, scale = (
        model[0].weight.detach().clone(),
        small_net.bn.weight.detach() / (model[1].running_var + 1e-5).sqrt(),
    )
    net = trace(model, torch.randn(2, 4, 8, 8))
    assert net.norms() == {"0": "1"}
    plan = RankPlan({"0": LayerPlan(lowering, (2, 3) if lowering == "tucker2" else 3)})
    plain = copy.deepcopy(model)
    removed_plain, removed = project_(plain, plan)["0"], project_(model, plan, norms=net.norms())["0"]
    assert removed > removed_plain  # the plain one is nearest in the plain norm

    def seen_by_bn(projected: torch.Tensor) -> float:
        return ((projected - weight) * scale.reshape(-1, 1, 1, 1)).norm().item()

    assert seen_by_bn(model[0].weight) < seen_by_bn(plain[0].weight)
    assert project_(model, plan)["0"] < 1e-6  # it has the rank all the same
    if lowering == "im2col":
        singular = np.linalg.svd((weight * scale.reshape(-1, 1, 1, 1)).flatten(1).numpy(), compute_uv=False)
        assert seen_by_bn(model[0].weight) == pytest.approx(np.sqrt((singular[3:] ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"energy_transfer": True}, {"norms": {"stem": "bn"}}], ids=str)
@pytest.mark.parametrize("lowering", ["cp", "tucker2", "spatial", "tiled_8"])
def test_decomposing_what_a_projector_left_changes_nothing(small_net, image, lowering, options):
    plan = RankPlan({"stem": LayerPlan(lowering, (2, 5) if lowering == "tucker2" else 3)})
    projector = Projector(plan, **options)
    for seed in range(3):
        torch.manual_seed(seed)
        small_net.stem.weight.data += 0.05 * torch.randn_like(small_net.stem.weight)
        projector(small_net)
    small = ranksearch.compress(small_net, plan, warm=projector.warm)
    torch.testing.assert_close(small(image), small_net(image), rtol=1e-4, atol=1e-5)


def test_bn_rectification_survives_a_silent_channel(small_net):
    model = nn.Sequential(nn.Conv2d(4, 12, 3), nn.BatchNorm2d(12))
    model[1].weight.data[3:] = 0
    project_(model, RankPlan({"0": LayerPlan("im2col", 2)}), norms={"0": "1"})
    assert torch.isfinite(model[0].weight).all()


def test_nothing_is_projected_where_one_layer_is_not_finite(small_net):
    small_net.head.weight.data[0, 0] = float("inf")
    before = small_net.stem.weight.detach().clone()
    with pytest.raises(NonFiniteError, match="Layer 'head'"):
        project_(small_net, PLAN)
    assert torch.equal(small_net.stem.weight, before)


def test_a_projector_that_is_warm_projects_as_well_as_a_cold_one(small_net):
    plan = RankPlan({**PLAN.layers, "stem": LayerPlan("tucker2", (2, 4))})
    projector, generator = Projector(plan), torch.Generator().manual_seed(0)
    for _ in range(5):
        projector(small_net)
        for parameter in small_net.parameters():
            parameter.data += (
                0.02 * parameter.norm() * torch.randn(parameter.shape, generator=generator) / parameter.numel() ** 0.5
            )
        cold = project_(copy.deepcopy(small_net), plan)
        for name, share in projector(copy.deepcopy(small_net)).items():
            assert share == pytest.approx(cold[name], rel=1e-2, abs=1e-6)


def test_non_finite_weights_name_the_layer(small_net):
    small_net.body[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"Layer 'body\.0'.*NaN"):
        project_(small_net, PLAN)


def test_plan_survives_json():
    pair = RankPlan({"a": LayerPlan("tucker2", (3, 4)), "b": LayerPlan("dense", 0)})
    assert RankPlan.from_json(pair.to_json()) == pair
    assert RankPlan.from_json(pair.to_json()).digest() == pair.digest()
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
        ('{"layers": {"a": {"lowering": "tucker2", "rank": [3, 0]}}}', "whole number >= 1"),
        ('{"layers": {"a": {"lowering": "tucker2", "rank": []}}}', "whole number >= 1"),
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


def test_a_net_with_tiles_that_are_cut_is_written_without_their_padding(tmp_path):
    model = nn.Sequential(nn.Linear(16, 48)).eval()  # one tile across, and one and a half of side 32 down
    plan = RankPlan({"0": LayerPlan("tiled_32", 3)}, model="linear")
    small = ranksearch.compress(model, plan)
    save_net(small, plan, tmp_path)
    x = torch.randn(2, 16)
    assert torch.equal(load_net(tmp_path, lambda name: nn.Sequential(nn.Linear(16, 48)))(x), small(x))


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


def test_latency_of_nets_in_turn():
    from ranksearch.deploy.latency import latencies_ms

    small, large = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(512, 512) for _ in range(20)))
    wide = torch.nn.Sequential(nn.Linear(8, 512), large)
    fast, slow, again = latencies_ms([small, wide, small], torch.randn(16, 8))
    assert 0 < fast < slow
    assert again == pytest.approx(fast, rel=5)
    assert not small.training
