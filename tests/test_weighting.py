"""Lowerings in the metric of data: optimal there by Eckart-Young, plain where it is the identity, exact where nothing is cut."""

import itertools
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import scipy.linalg
import torch

from ranksearch.lowering import LOWERINGS, LayerSpec
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.weighting import SecondMoment, Weighting

SPECS = {
    "tall": LayerSpec(6, 20),
    "wide": LayerSpec(20, 6),
    "conv": LayerSpec.conv(4, 6, (3, 3)),
    "uneven": LayerSpec.conv(8, 4, (3, 1)),
    "groups": LayerSpec.conv(8, 12, (3, 2), groups=2),
    "transposed": LayerSpec.conv(6, 4, (2, 3), transposed=True),
}
CASES = [
    pytest.param(lowering, spec, id=f"{name}-{label}")
    for (name, lowering), (label, spec) in itertools.product(LOWERINGS.items(), SPECS.items())
    if lowering.supports(spec) and lowering.has_rank and not name.startswith(("tiled", "cp"))
]
cases = pytest.mark.parametrize(("lowering", "spec"), CASES)


def definite(generator: np.random.Generator, count: int, width: int) -> torch.Tensor:
    """[count, width, width], of condition about 100."""
    factor = generator.normal(size=(count, width, 2 * width)) * np.geomspace(0.2, 2, width)[:, None]
    return torch.from_numpy(factor @ factor.transpose(0, 2, 1) / width)


def moment(core: torch.Tensor) -> SecondMoment:
    return SecondMoment(core, torch.full((len(core),), 1e-9, dtype=core.dtype), wide=False)


def separable(spec: LayerSpec, *, outputs: bool, seed: int = 0) -> Weighting:
    """A weighting that is a product over channels and each axis of the kernel, so that every unfolding sees it exactly."""
    generator, groups = np.random.default_rng(seed), spec.groups
    core = definite(generator, groups, spec.block_shape[1])
    for extent in spec.kernel_size:
        axis = definite(generator, groups, extent)
        core = torch.stack([torch.kron(a, b) for a, b in zip(core, axis, strict=True)])
    found = definite(generator, groups, spec.block_shape[0]) if outputs else None
    return Weighting(moment(core), None if found is None else moment(found))


def form(error: torch.Tensor, weighting: Weighting, spec: LayerSpec) -> float:
    """tr(G E C Eᵀ)"""
    flat = spec.blocks(error).flatten(2)
    left = flat if weighting.outputs is None else weighting.outputs.core @ flat
    return float((left * (flat @ weighting.inputs.core)).sum())


def weight_of(spec: LayerSpec, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def middle(lowering, spec):
    ladder = lowering.ladder(spec)
    return ladder[len(ladder) // 2]


@cases
@pytest.mark.parametrize("outputs", [False, True])
def test_removed_is_the_error_in_the_metric_and_no_more_than_the_curve_says(lowering, spec, outputs):
    weight, weighting = weight_of(spec), separable(spec, outputs=outputs)
    view = lowering.seen(weighting, spec)
    curve = view.curve(weight)
    by_rank = dict(zip(curve.ranks, curve.removed, strict=True))
    rank = middle(lowering, spec)
    projected, removed, warm = view.project(weight, rank)
    actual = form(weight - projected, weighting, spec) / form(weight, weighting, spec)
    assert actual == pytest.approx(removed, rel=1e-3)  # the taps' share of the metric is itself regularised
    assert actual <= by_rank[rank] * (1 + 1e-3)
    if isinstance(lowering, MatrixLowering):
        assert removed == pytest.approx(by_rank[rank], rel=1e-6)
    plain = form(weight - lowering.project(weight, rank, spec).weight, weighting, spec)
    assert actual * form(weight, weighting, spec) < plain
    # it has the rank: cutting again, in the metric or not, takes nothing more
    assert (view.project(projected, rank, warm).weight - projected).norm() <= 1e-7 * projected.norm()
    assert (lowering.project(projected, rank, spec).weight - projected).norm() <= 1e-7 * projected.norm()


@pytest.mark.parametrize("label", ["tall", "wide", "conv", "groups", "transposed"])
def test_the_optimum_is_the_tail_of_the_whitened_singular_values(label):
    """Against scipy's matrix square roots and numpy's SVD, with a C that is no product."""
    spec = SPECS[label]
    lowering = LOWERINGS["im2col" if spec.is_conv else "svd"]
    generator = np.random.default_rng(1)
    inputs = definite(generator, spec.groups, prod(spec.block_shape[1:]))
    outputs = definite(generator, spec.groups, spec.block_shape[0])
    weighting, weight = Weighting(moment(inputs), moment(outputs)), weight_of(spec)
    tails = np.zeros(lowering.full_rank(spec) + 1)
    for block, c, g in zip(spec.blocks(weight).flatten(2).numpy(), inputs.numpy(), outputs.numpy(), strict=True):
        values = np.linalg.svd(scipy.linalg.sqrtm(g) @ block @ scipy.linalg.sqrtm(c), compute_uv=False)
        tails += np.append(np.cumsum(values[::-1] ** 2)[::-1], 0)
    for rank in range(1, lowering.full_rank(spec)):
        found = lowering.seen(weighting, spec).project(weight, rank).weight
        assert form(weight - found, weighting, spec) == pytest.approx(tails[rank], rel=1e-6)


@cases
def test_the_identity_gives_the_plain_projection_and_curve(lowering, spec):
    groups, width = spec.groups, prod(spec.block_shape[1:])
    identity = Weighting(moment(torch.eye(width).double().repeat(groups, 1, 1)))
    weight, rank, view = weight_of(spec), middle(lowering, spec), lowering.seen(identity, spec)
    plain = lowering.project(weight, rank, spec)
    assert (view.project(weight, rank).weight - plain.weight).norm() <= 1e-6 * weight.norm()
    np.testing.assert_allclose(view.curve(weight).removed, lowering.curve(weight, spec).removed, atol=1e-6)


@cases
def test_approximations_are_the_projections(lowering, spec):
    weight, weighting, ladder = weight_of(spec), separable(spec, outputs=True), lowering.ladder(spec)
    view = lowering.seen(weighting, spec)
    for rank, found in zip(ladder[:3], view.approximations(weight, ladder[:3]), strict=True):
        assert (found - view.project(weight, rank).weight).norm() <= 1e-6 * weight.norm()


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-7)])
def test_full_rank_is_exact_and_what_has_the_rank_already_comes_back(lowering, spec, dtype, tolerance):
    """The whitened weight is steeper than the weight, by the square of the metric's condition: fp32 loses that many digits."""
    weight, found = weight_of(spec, dtype), separable(spec, outputs=True)
    assert found.outputs is not None
    weighting = Weighting(*(SecondMoment.shrunk(m.core, 1e-2) for m in (found.inputs, found.outputs)))
    assert torch.equal(lowering.seen(weighting, spec).project(weight, lowering.full_rank(spec)).weight, weight)
    rank = middle(lowering, spec)
    low = lowering.project(weight, rank, spec).weight
    assert (lowering.seen(weighting, spec).project(low, rank).weight - low).norm() <= tolerance * low.norm()


@pytest.mark.parametrize("name", ["svd", "im2col", "channel", "spatial", "tiled_c2", "tucker2", "tiled_8"])
def test_drawn_rows_stand_for_the_matrix_that_they_make(name):
    spec = LayerSpec(20, 12) if name == "svd" else LayerSpec.conv(8, 10, (3, 3), groups=2)
    lowering = LOWERINGS[name]
    groups, width = spec.groups, prod(spec.block_shape[1:])
    rows = torch.randn(groups, 9, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ridge = torch.full((groups,), 0.1, dtype=torch.float64)
    outputs = moment(definite(np.random.default_rng(0), groups, spec.block_shape[0]))
    weight, rank = weight_of(spec), middle(lowering, spec)
    found = [
        lowering.seen(Weighting(inputs, outputs), spec).project(weight, rank)
        for inputs in (SecondMoment(rows, ridge, wide=True), SecondMoment(rows.mT @ rows, ridge, wide=False))
    ]
    assert (found[0].weight - found[1].weight).norm() <= 1e-6 * weight.norm()
    assert found[0].removed == pytest.approx(found[1].removed, rel=1e-6)


@pytest.mark.parametrize("name", ["tiled_c2", "tiled_8", "tiled_16"])
def test_a_tile_sees_its_own_block_of_the_metric(name):
    spec, lowering = LayerSpec.conv(8, 20, (3, 3)), LOWERINGS[name]
    weighting = Weighting(separable(spec, outputs=False).inputs)
    weight, rank = weight_of(spec), 2
    found, removed, _ = lowering.seen(weighting, spec).project(weight, rank)
    width = 36 if name == "tiled_c2" else lowering.matrix_shape(spec)[1]
    error, whole = (spec.blocks(w).flatten(2)[0] for w in (weight - found, weight))
    total = cut = 0.0
    for start in range(0, 72, width):
        stop = min(72, start + width)
        core = weighting.inputs.core[0, start:stop, start:stop]
        cut += float((error[:, start:stop] @ core * error[:, start:stop]).sum())
        total += float((whole[:, start:stop] @ core * whole[:, start:stop]).sum())
    assert cut / total == pytest.approx(removed, rel=1e-6)
    plain = spec.blocks(weight - lowering.project(weight, rank, spec).weight).flatten(2)[0]
    assert cut < sum(
        float((plain[:, s : s + width] @ weighting.inputs.core[0, s : s + width, s : s + width] * plain[:, s : s + width]).sum())
        for s in range(0, 72, width)
    )  # fmt: skip


def test_few_samples_leave_no_direction_free():
    """Three rows of twenty inputs: without the ridge, all that they do not see would cost nothing."""
    rows = torch.randn(1, 3, 20, dtype=torch.float64)
    seen = SecondMoment.shrunk(rows.mT @ rows, 0.1)
    assert float(torch.linalg.eigvalsh(seen.core + seen.ridge[0] * torch.eye(20)).min()) > 0
    assert float(SecondMoment.shrunk(torch.zeros(1, 4, 4), 0.1).ridge) == 1


def test_content_hashes_tell_weightings_apart():
    one, other = (separable(SPECS["conv"], outputs=True, seed=seed) for seed in (0, 1))
    assert one.digest() == separable(SPECS["conv"], outputs=True).digest() != other.digest()
    assert replace(one, outputs=None).digest() != one.digest()
