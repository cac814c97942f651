"""The contract that every registered lowering keeps, over many layer settings. A new lowering is tested by being there."""

import itertools
import zlib

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.errors import UsageError
from ranksearch.lowering import LOWERINGS, LayerSpec, Lowering

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


def some_ranks(lowering: Lowering, spec: LayerSpec) -> list[int]:
    full = lowering.full_rank(spec)
    return sorted({min(1, full), (full + 1) // 2, full})


def in_size(spec: LayerSpec) -> tuple[int, ...]:
    return IN_SIZES[len(spec.kernel_size)]


def sample(spec: LayerSpec, dtype: torch.dtype = torch.float64, batch: int = 2) -> torch.Tensor:
    shape = (spec.in_channels, *in_size(spec)) if spec.is_conv else (*in_size(spec), spec.in_channels)
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(1), dtype=dtype)


def filled(lowering: Lowering, spec: LayerSpec, rank: int, dense: torch.nn.Module) -> torch.nn.Module:
    chain = lowering.build(spec, rank, dtype=dense.weight.dtype)
    layers = list(chain) if isinstance(chain, torch.nn.Sequential) else [chain]
    for layer, weight in zip(layers, lowering.decompose(dense.weight.data, rank, spec), strict=True):
        assert layer.weight.shape == weight.shape
        layer.weight.data = weight
    if spec.bias:
        layers[-1].bias.data = dense.bias.data
    return chain


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
        chain = filled(lowering, spec, rank, dense)
        projected = spec.build(dtype=torch.float64)
        projected.load_state_dict(dense.state_dict())
        projected.weight.data, _ = lowering.project(dense.weight.data, rank, spec)
        x = sample(spec)
        assert (chain(x) - projected(x)).norm() <= 1e-10 * projected(x).norm()


@contract
def test_removed_energy_is_what_projection_removes_and_falls_with_the_rank(lowering, spec):
    weight = weight_of(spec)
    curve = lowering.removed_energy(weight, spec)
    assert len(curve) == lowering.full_rank(spec) + 1
    assert (np.diff(curve) <= 1e-12).all()
    assert curve[-1] == 0
    for rank in some_ranks(lowering, spec):
        projected, removed = lowering.project(weight, rank, spec)
        actual = ((weight - projected).square().sum() / weight.square().sum()).item()
        assert actual == pytest.approx(removed, abs=1e-9)
        assert actual == pytest.approx(curve[rank], abs=1e-9)


@contract
def test_projection_is_optimal_by_eckart_young(lowering, spec):
    if not hasattr(lowering, "unfold"):
        pytest.skip(f"{lowering.name} is not a matrix lowering")
    weight = weight_of(spec)
    matrices = lowering.unfold(weight, spec).numpy()
    for rank in some_ranks(lowering, spec):
        projected, _ = lowering.project(weight, rank, spec)
        tail = sum((np.linalg.svd(m, compute_uv=False)[rank:] ** 2).sum() for m in matrices)
        assert (weight - projected).square().sum().item() == pytest.approx(
            tail, abs=1e-9 * weight.square().sum().item()
        )


@contract
def test_projection_is_idempotent_and_reconstruct_inverts_decompose(lowering, spec):
    if not lowering.is_projection:
        pytest.skip(f"{lowering.name} is no projection")
    weight = weight_of(spec)
    for rank in some_ranks(lowering, spec):
        once, _ = lowering.project(weight, rank, spec)
        twice, removed = lowering.project(once, rank, spec)
        rebuilt = lowering.reconstruct(lowering.decompose(weight, rank, spec), spec)
        assert removed <= 1e-12
        assert torch.allclose(once, twice, atol=1e-10)
        assert torch.allclose(once, rebuilt, atol=1e-10)


@contract
def test_costs_equal_flop_counter_and_parameters(lowering, spec):
    for rank in some_ranks(lowering, spec):
        chain = lowering.build(spec, rank, dtype=torch.float64)
        assert lowering.params(spec, rank) == sum(p.numel() for p in chain.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            chain(sample(spec, batch=1))
        assert 2 * lowering.macs(spec, rank, in_size(spec)) == counter.get_total_flops()


@contract
@pytest.mark.parametrize("cost", ["params", "macs"])
def test_break_even_rank_is_the_last_that_is_cheaper(lowering, spec, cost):
    rank = lowering.break_even_rank(spec, cost, in_size(spec))

    def value(r: int) -> int:
        return lowering.params(spec, r) if cost == "params" else lowering.macs(spec, r, in_size(spec))

    dense = spec.params if cost == "params" else spec.macs(in_size(spec))
    assert rank == 0 or value(rank) < dense
    assert rank == lowering.full_rank(spec) or value(rank + 1) >= dense


@contract
def test_rank_outside_the_range_is_refused(lowering, spec):
    full = lowering.full_rank(spec)
    for rank in (-1, full + 1):
        with pytest.raises(UsageError, match=f"rank {rank} is outside"):
            lowering.decompose(weight_of(spec), rank, spec)


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
    reference, removed = LOWERINGS["im2col"].project(weight, 4, spec)
    scaled, removed_scaled = LOWERINGS["im2col"].project(weight * scale, 4, spec)
    assert removed_scaled == pytest.approx(removed, rel=1e-3)
    assert torch.allclose(scaled / scale, reference, atol=1e-5)


def test_subclass_with_its_own_forward_is_another_layer():
    class Standardised(torch.nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    assert LayerSpec.of(Standardised(3, 4, 3)) is None
    assert LayerSpec.of(torch.nn.Conv2d(3, 4, 3, padding="valid")).padding == (0, 0)
