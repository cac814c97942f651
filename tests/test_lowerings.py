"""The contract that every registered lowering keeps, over many layer settings. A new lowering is tested by being there."""

import itertools
import zlib

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.errors import UsageError
from ranksearch.lowering import LAYER_COSTS, LOWERINGS, LayerSpec, Lowering, Rank
from ranksearch.lowering.contract import running_layers, sides
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.tiled import settle_

IN_SIZES = {0: (5,), 1: (13,), 2: (13, 11), 3: (7, 6, 5)}


def conv(*args, **settings) -> LayerSpec:
    return LayerSpec.conv(*args, **settings)


SPECS = {
    "linear": LayerSpec(12, 7, bias=True),
    "linear_wide": LayerSpec(6, 20),
    "plain": conv(8, 12, (3, 3), padding=(1, 1)),
    "bias": conv(8, 12, (3, 3), padding=(1, 1), bias=True),
    "strided": conv(8, 12, (3, 3), stride=(2, 2), padding=(1, 1)),
    "uneven_stride": conv(8, 6, (3, 3), stride=(2, 1), padding=(0, 2), bias=True),
    "dilated": conv(6, 9, (3, 3), dilation=(2, 1), padding=(2, 1)),
    "dilated_strided": conv(6, 9, (5, 3), dilation=(1, 3), stride=(1, 3), padding=(1, 2), bias=True),
    "pointwise": conv(10, 6, (1, 1), bias=True),
    "pointwise_strided": conv(10, 6, (1, 1), stride=(2, 2)),
    "row_kernel": conv(7, 8, (1, 3), padding=(0, 1)),
    "column_kernel": conv(7, 8, (7, 1), padding=(3, 0), bias=True),
    "five": conv(4, 10, (5, 5), padding=(2, 2)),
    "even_kernel": conv(4, 6, (2, 4), stride=(2, 2)),
    "same": conv(6, 8, (4, 3), padding="same", bias=True),
    "groups": conv(8, 12, (3, 3), groups=4, padding=(1, 1), bias=True),
    "depthwise": conv(6, 6, (3, 3), groups=6, padding=(1, 1)),
    "depthwise_multiplier": conv(4, 12, (5, 5), groups=4, stride=(2, 2), padding=(2, 2)),
    "reflect": conv(8, 6, (3, 3), padding=(1, 1), padding_mode="reflect", bias=True),
    "circular": conv(8, 6, (3, 5), padding=(1, 2), padding_mode="circular"),
    "replicate": conv(8, 6, (3, 3), padding=(2, 1), stride=(2, 1), padding_mode="replicate"),
    "conv1d": conv(8, 6, (5,), stride=(2,), padding=(2,), bias=True),
    "conv3d": conv(4, 6, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
    "transposed": conv(8, 6, (3, 3), padding=(1, 1), transposed=True, bias=True),
    "transposed_strided": conv(
        6, 8, (4, 3), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2), transposed=True
    ),
    "transposed_groups": conv(8, 4, (3, 2), stride=(2, 2), groups=2, transposed=True, bias=True),
    "transposed1d": conv(6, 4, (4,), stride=(2,), padding=(1,), transposed=True),
}
CASES = [
    pytest.param(lowering, spec, id=f"{name}-{label}")
    for (name, lowering), (label, spec) in itertools.product(LOWERINGS.items(), SPECS.items())
    if lowering.supports(spec)
]
contract = pytest.mark.parametrize(("lowering", "spec"), CASES)


def weight_of(spec: LayerSpec, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    seed = zlib.crc32(repr(spec).encode())
    return torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_ranks(lowering: Lowering, spec: LayerSpec) -> list[Rank]:
    if not lowering.has_rank:
        return [0]
    ladder = lowering.ladder(spec)
    return list(dict.fromkeys([ladder[0], ladder[len(ladder) // 2], lowering.full_rank(spec)]))


def in_size(spec: LayerSpec) -> tuple[int, ...]:
    return IN_SIZES[len(spec.kernel_size)]


def sample(spec: LayerSpec, dtype: torch.dtype = torch.float64, batch: int = 2) -> torch.Tensor:
    shape = (spec.in_channels, *in_size(spec)) if spec.is_conv else (*in_size(spec), spec.in_channels)
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(1), dtype=dtype)


def filled(lowering: Lowering, spec: LayerSpec, rank: Rank, dense: torch.nn.Module, warm=None) -> torch.nn.Module:
    built = lowering.build(spec, rank, dtype=dense.weight.dtype)
    factors = lowering.decompose(dense.weight.data, rank, spec, warm)
    for parameter, factor in zip(lowering.stored_weights(built), factors, strict=True):
        assert parameter.shape == factor.shape
        parameter.data = factor
    if spec.bias:
        running_layers(built)[-1].bias.data = dense.bias.data
    return built


@contract
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_equals_the_dense_layer_at_full_rank(lowering, spec, dtype, tolerance):
    dense = spec.build(dtype=dtype)
    chain = filled(lowering, spec, lowering.full_rank(spec), dense)
    x = sample(spec, dtype)
    expected = dense(x)
    assert (chain(x) - expected).norm() <= tolerance * expected.norm()


@contract
def test_decomposed_layer_computes_the_projected_dense_layer(lowering, spec):
    dense = spec.build(dtype=torch.float64)
    for rank in some_ranks(lowering, spec):
        projected = spec.build(dtype=torch.float64)
        projected.load_state_dict(dense.state_dict())
        projected.weight.data, _, warm = lowering.project(dense.weight.data, rank, spec)
        chain = filled(lowering, spec, rank, projected, warm)
        x = sample(spec)
        assert (chain(x) - projected(x)).norm() <= 1e-10 * projected(x).norm()


@contract
def test_curve_is_what_projection_removes_and_falls_with_the_rank(lowering, spec):
    weight = weight_of(spec)
    curve = lowering.curve(weight, spec)
    assert len(curve.ranks) == len(curve.removed) == len(curve.residual)
    by_rank = dict(zip(curve.ranks, curve.removed, strict=True))
    for smaller, larger in itertools.product(curve.ranks, repeat=2):
        if all(a <= b for a, b in zip(sides(smaller), sides(larger), strict=True)):
            assert by_rank[larger] <= by_rank[smaller] + 1e-12
    for rank in {curve.ranks[0], curve.ranks[len(curve.ranks) // 2], curve.ranks[-1]} if curve.ranks else ():
        projected, removed, _ = lowering.project(weight, rank, spec)
        actual = ((weight - projected).square().sum() / weight.square().sum()).item()
        assert actual == pytest.approx(removed, abs=1e-9)
        if isinstance(lowering, MatrixLowering):
            assert actual == pytest.approx(by_rank[rank], abs=1e-9)
        elif lowering.is_projection:
            assert actual <= by_rank[rank] + 1e-9


@contract
def test_projection_is_optimal_by_eckart_young(lowering, spec):
    if not isinstance(lowering, MatrixLowering):
        pytest.skip(f"{lowering.name} is not a matrix lowering")
    weight = weight_of(spec)
    matrices = lowering.unfold(spec.blocks(weight), spec).numpy()
    for rank in some_ranks(lowering, spec):
        projected, _, _ = lowering.project(weight, rank, spec)
        tail = sum((np.linalg.svd(m, compute_uv=False)[rank:] ** 2).sum() for m in matrices)
        assert (weight - projected).square().sum().item() == pytest.approx(
            tail, abs=1e-9 * weight.square().sum().item()
        )


@contract
def test_projection_is_idempotent_and_reconstruct_inverts_decompose(lowering, spec):
    weight = weight_of(spec)
    for rank in some_ranks(lowering, spec):
        once, _, warm = lowering.project(weight, rank, spec)
        rebuilt = lowering.reconstruct(lowering.decompose(once, rank, spec, warm), spec)
        assert torch.allclose(once, rebuilt, atol=1e-10)
        # a format whose best approximation is a local one stays where it is when it starts from there
        twice, removed, _ = lowering.project(once, rank, spec, None if lowering.is_projection else warm)
        assert removed <= 1e-12
        assert torch.allclose(once, twice, atol=1e-10)


@contract
def test_warm_projection_of_a_weight_nearby_is_as_good_as_a_cold_one(lowering, spec):
    weight = weight_of(spec)
    for rank in some_ranks(lowering, spec):
        _, _, warm = lowering.project(weight, rank, spec)
        moved = weight + 0.05 * weight_of(spec).flip(0)
        cold = lowering.project(moved, rank, spec).removed
        # where the optimum is a local one the two may end in different ones
        slack = 1e-9 if isinstance(lowering, MatrixLowering) else 0.2 * cold + 1e-2
        assert lowering.project(moved, rank, spec, warm).removed <= cold + slack


@contract
def test_costs_equal_flop_counter_and_parameters(lowering, spec):
    for rank in some_ranks(lowering, spec):
        built = lowering.build(spec, rank, dtype=torch.float64)
        assert [tuple(w.shape) for w in lowering.stored_weights(built)] == list(lowering.stored_shapes(spec, rank))
        params = sum(p.numel() for p in built.parameters())
        size = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in built.state_dict().values())
        settle_(built)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            built(sample(spec, batch=1))
        flops = counter.get_total_flops()
        expected = {"macs": flops // 2, "flops": flops, "params": params, "size": size}
        assert {cost: lowering.cost(spec, rank, cost, in_size(spec)) for cost in LAYER_COSTS} == expected


@contract
@pytest.mark.parametrize("cost", LAYER_COSTS)
def test_break_even_rank_is_the_last_of_the_ladder_that_is_cheaper(lowering, spec, cost):
    if not lowering.has_rank:
        assert lowering.break_even_rank(spec, cost, in_size(spec)) == 0
        return
    ladder = lowering.ladder(spec)
    assert ladder[-1] == lowering.full_rank(spec)
    dense = LOWERINGS["dense"].cost(spec, 0, cost, in_size(spec))
    cheaper = [rank for rank in ladder if lowering.cost(spec, rank, cost, in_size(spec)) < dense]
    assert lowering.break_even_rank(spec, cost, in_size(spec)) == (cheaper[-1] if cheaper else 0)


@contract
def test_rank_outside_the_range_is_refused(lowering, spec):
    full = sides(lowering.full_rank(spec))
    wrong: list[Rank] = [(0,) * len(full), tuple(side + 1 for side in full)] if lowering.has_rank else [(-1,), (1,)]
    for rank in wrong:
        with pytest.raises(UsageError, match="is outside"):
            lowering.decompose(weight_of(spec), rank if len(full) > 1 else rank[0], spec)
    with pytest.raises(UsageError, match="takes"):
        lowering.decompose(weight_of(spec), (1,) * (len(full) + 1), spec)


@pytest.mark.parametrize("lowering", LOWERINGS.values(), ids=LOWERINGS)
def test_what_is_not_supported_is_refused_with_a_sentence(lowering):
    for spec in SPECS.values():
        reason = lowering.refusal(spec)
        assert lowering.supports(spec) is (reason is None)
        if reason is not None:
            assert reason.endswith(".")
            with pytest.raises(UsageError, match="cannot lower"):
                lowering.build(spec, 1)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e18])
def test_fp32_weights_of_any_scale_are_cut_at_the_optimum(scale):
    spec = SPECS["plain"]
    weight = weight_of(spec, torch.float32)
    reference, removed, _ = LOWERINGS["im2col"].project(weight, 4, spec)
    scaled, removed_scaled, _ = LOWERINGS["im2col"].project(weight * scale, 4, spec)
    assert removed_scaled == pytest.approx(removed, rel=1e-3)
    assert torch.allclose(scaled / scale, reference, atol=1e-5)


def test_subclass_with_its_own_forward_is_another_layer():
    class Standardised(torch.nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    assert LayerSpec.of(Standardised(3, 4, 3)) is None
    assert LayerSpec.of(torch.nn.Conv2d(3, 4, 3, padding="valid")).padding == (0, 0)
