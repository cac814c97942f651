"""Property tests over the whole space of layer settings, and cross-checks of Tucker-2 and CP against tensorly."""

import sys

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac, partial_tucker
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.lowering import LOWERINGS, LayerSpec, cp
from ranksearch.lowering.contract import running_layers, sides
from ranksearch.lowering.tiled import settle_
from tests.conftest import REPOSITORY

SIZES = {1: (9,), 2: (9, 8), 3: (6, 5, 7)}


@st.composite
def specs(draw) -> LayerSpec:
    axes = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3]))
    if axes == 0:
        return LayerSpec(draw(st.integers(1, 20)), draw(st.integers(1, 20)), bias=draw(st.booleans()))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel = draw(st.sampled_from([(1,) * axes, (3,) * axes, (5,) * axes, None])) or each(1, 7 if axes < 3 else 3)
    stride, dilation, transposed = each(1, 3), each(1, 2), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    width = st.sampled_from([1, 2, 3, 5, 6, 8, 8, 16])
    inputs, outputs = groups * draw(width), groups * draw(width)
    if draw(st.integers(0, 5)) == 0:
        groups, outputs = inputs, inputs * draw(st.integers(1, 2))
    same = not transposed and stride == (1,) * axes and draw(st.booleans())
    return LayerSpec(
        inputs, outputs, kernel, stride, "same" if same else each(0, 3), dilation, groups,
        bias=draw(st.booleans()),
        padding_mode="zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        transposed=transposed,
        output_padding=tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        if transposed
        else (),
    )  # fmt: skip


def sample(spec: LayerSpec) -> torch.Tensor:
    shape = (spec.in_channels, *SIZES[len(spec.kernel_size)]) if spec.is_conv else (5, spec.in_channels)
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("lowering", LOWERINGS.values(), ids=LOWERINGS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=specs(), ratio=st.floats(0.01, 1))
def test_what_is_not_refused_is_exact(lowering, spec, ratio):
    assume(lowering.supports(spec))
    x = sample(spec)
    torch.manual_seed(0)
    dense = spec.build(dtype=torch.float64)
    try:
        assume(dense(x).numel() > 0)
    except (RuntimeError, ValueError):
        assume(False)  # torch itself refuses the setting, such as a reflection wider than the map
    for rank in (lowering.full_rank(spec), lowering.scaled_rank(spec, ratio)):
        warm = None
        if rank != lowering.full_rank(spec):
            dense.weight.data, removed, warm = lowering.project(dense.weight.data, rank, spec)
            assert 0 <= removed <= 1
        built = lowering.build(spec, rank, dtype=torch.float64)
        factors = lowering.decompose(dense.weight.data, rank, spec, warm)
        for parameter, factor in zip(lowering.stored_weights(built), factors, strict=True):
            parameter.data = factor
        if spec.bias:
            running_layers(built)[-1].bias.data = dense.bias.data
        assert (built(x) - dense(x)).norm() <= 1e-10 * dense(x).norm()
        assert lowering.params(spec, rank) == sum(p.numel() for p in built.parameters())
        settle_(built)
        with FlopCounterMode(display=False) as counter:
            built(x)
        in_size = tuple(x.shape[2:]) if spec.is_conv else tuple(x.shape[1:-1])
        assert 2 * lowering.macs(spec, rank, in_size) == counter.get_total_flops()


KERNELS = [(12, 9, 3, 3), (8, 16, 1, 5), (6, 6, 5, 5), (10, 7, 3), (5, 6, 2, 3, 2)]


@pytest.mark.parametrize("shape", KERNELS, ids=str)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_tucker2_is_as_good_as_tensorlys(shape, ratio):
    spec = LayerSpec.conv(shape[1], shape[0], shape[2:])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lowering = LOWERINGS["tucker2"]
    rs, rt = rank = lowering.scaled_rank(spec, ratio)
    (core, factors), _ = partial_tucker(weight.numpy(), [rt, rs], modes=[0, 1], init="svd", n_iter_max=200, tol=1e-10)
    theirs = np.linalg.norm(weight.numpy() - tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
    projected, _, _ = lowering.project(weight, rank, spec)
    assert (weight - projected).norm().item() <= 1.002 * theirs


def test_the_tucker2_curve_is_that_of_the_truncated_hosvd():
    spec = LayerSpec.conv(7, 9, (3, 2))
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = LOWERINGS["tucker2"].curve(weight, spec)
    tensor = weight.numpy()
    for rank, removed, residual in zip(curve.ranks, curve.removed, curve.residual, strict=True):
        rs, rt = sides(rank)
        outputs, s_t, _ = np.linalg.svd(tensor.reshape(9, -1))
        inputs, s_s, _ = np.linalg.svd(np.moveaxis(tensor, 1, 0).reshape(7, -1))
        p_t, p_s = outputs[:, :rt] @ outputs[:, :rt].T, inputs[:, :rs] @ inputs[:, :rs].T
        kept = np.einsum("ut,ps,tskl->upkl", p_t, p_s, tensor)
        assert removed == pytest.approx(((tensor - kept) ** 2).sum() / (tensor**2).sum(), abs=1e-9)
        expected = max(np.append(s_t, 0)[rt] / s_t[0], np.append(s_s, 0)[rs] / s_s[0])
        assert residual == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", KERNELS, ids=str)
@pytest.mark.parametrize("rank", [2, 8, 20])
@pytest.mark.filterwarnings("ignore:.*")
def test_cp_is_about_as_good_as_tensorlys(shape, rank, monkeypatch):
    """Both are local optima of alternating least squares from an SVD start, swept until they settle."""
    monkeypatch.setattr(cp, "SWEEPS", 1000)
    monkeypatch.setattr(cp, "SETTLED", 1e-8)
    spec = LayerSpec.conv(shape[1], shape[0], shape[2:])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # tensorly's modes are ours: an axis of extent 1 has no factor of its own
    squeezed = weight.squeeze().numpy()
    theirs = parafac(squeezed, rank, n_iter_max=1000, tol=1e-8, init="svd", random_state=0)
    their_error = np.linalg.norm(squeezed - tensorly.cp_to_tensor(theirs)) / np.linalg.norm(squeezed)
    lowering = LOWERINGS["cp"]
    projected, removed, _ = lowering.project(weight, rank, spec)
    assert removed**0.5 <= 1.05 * their_error + 0.01
    factors = lowering.decompose(weight, rank, spec)
    rebuilt = lowering.reconstruct(factors, spec)
    assert ((weight - rebuilt).norm() / weight.norm()).item() == pytest.approx(removed**0.5, abs=1e-9)
    assert (projected - rebuilt).norm() <= 1e-9 * weight.norm()


def test_the_cp_curve_falls_and_is_what_decompositions_reach():
    spec = LayerSpec.conv(8, 12, (3, 3))
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    curve = LOWERINGS["cp"].curve(weight, spec)
    assert curve.ranks[-1] == LOWERINGS["cp"].break_even_rank(spec, "params")
    assert (np.diff(curve.removed) <= 0).all()
    for rank, removed in zip(curve.ranks, curve.removed, strict=True):
        # a curve decomposes at a few ranks, not to the end, and interpolates; on noise a single rank may end in a poor local optimum
        assert LOWERINGS["cp"].project(weight, rank, spec).removed == pytest.approx(removed, abs=0.05)


def test_the_fixed_sweep_finds_no_silent_error(monkeypatch, capsys):
    """A part of `scripts/check_lowerings.py`, which runs 600 settings."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    monkeypatch.setattr(sys, "argv", ["check_lowerings", "--json", "--quick", "--settings", "40", "--seed", "7"])
    import json

    import check_lowerings

    assert check_lowerings.main() == 0
    record = json.loads(capsys.readouterr().out)
    assert record["figures"]["settings"] == 40
    assert record["figures"]["silent_errors"] == 0
    assert record["figures"]["max_rel_error_fp32"] <= 1e-4
    assert {row["lowering"] for row in record["rows"]} == set(LOWERINGS)


def test_the_sweep_does_find_a_silent_error(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    monkeypatch.setattr(sys, "argv", ["check_lowerings", "--quick", "--settings", "10"])
    import check_lowerings

    im2col = LOWERINGS["im2col"]
    monkeypatch.setattr(
        im2col, "split", lambda left, right, spec: [1.01 * f for f in type(im2col).split(im2col, left, right, spec)]
    )
    assert check_lowerings.main() == 1
    assert "FAILED {'lowering': 'im2col'" in capsys.readouterr().out
