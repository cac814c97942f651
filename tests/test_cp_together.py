"""Many decompositions of `cp` at once, the way of a GPU, on the CPU: against the same one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from ranksearch.allocate import LayerRules, curve_making, rank_curves
from ranksearch.compress import trace
from ranksearch.errors import NonFiniteError
from ranksearch.lowering import LOWERINGS, LayerSpec, cp_als
from ranksearch.lowering.cp import Cp

ALONE, TOGETHER = Cp(together=False), Cp(together=True)
SPECS = {
    "plain": LayerSpec.conv(8, 12, (3, 3), padding=(1, 1)),
    "groups": LayerSpec.conv(8, 12, (3, 3), groups=2, padding=(1, 1)),
    "one axis": LayerSpec.conv(10, 8, (5,), padding=(2,)),
    "row": LayerSpec.conv(8, 9, (1, 5)),
    "three axes": LayerSpec.conv(5, 6, (3, 2, 3)),
    "transposed": LayerSpec.conv(6, 8, (4, 3), stride=(2, 1), transposed=True),
    "transposed groups": LayerSpec.conv(8, 12, (3, 3), groups=2, transposed=True),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def weight_of(spec: LayerSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensor_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def left_of(tensor: torch.Tensor, terms: list[torch.Tensor]) -> float:
    return float(cp_als.misfit(tensor.flatten(2), terms).sum() / tensor.square().sum())


@specs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_curves_of_several_layers_are_those_of_each_alone(spec, dtype):
    weights = [weight_of(spec, seed, dtype) * 10.0 ** (seed - 1) for seed in range(3)]
    found = TOGETHER.curves(weights, spec)
    assert len(found) == 3
    for weight, curve in zip(weights, found, strict=True):
        expected = ALONE.curve(weight, spec)
        assert curve.ranks == expected.ranks
        np.testing.assert_allclose(curve.removed, expected.removed, rtol=1e-6)
        np.testing.assert_allclose(curve.residual, expected.residual, rtol=1e-5)
        assert (np.diff(curve.removed) <= 0).all()


@specs
def test_approximations_are_those_of_each_rank_alone_and_exact_at_full_rank(spec):
    weight, full = weight_of(spec, dtype=torch.float64), ALONE.full_rank(spec)
    ranks = [5, 1, full, 3]  # in any order
    found, expected = (list(way.approximations(weight, ranks, spec)) for way in (TOGETHER, ALONE))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], weight, rtol=0, atol=1e-12)


def test_zero_weights_lose_nothing_beside_others():
    spec = SPECS["plain"]
    weights = [torch.zeros(spec.weight_shape), weight_of(spec), torch.zeros(spec.weight_shape)]
    zero, other, _ = TOGETHER.curves(weights, spec)
    assert not zero.removed.any()
    assert not zero.residual.any()
    np.testing.assert_allclose(other.removed, ALONE.curve(weights[1], spec).removed, rtol=1e-6)


def test_terms_of_smaller_ranks_are_padded_by_zeros_that_stay_zero_and_disturb_nothing():
    tensors, ranks = [tensor_of((2, 7, 6, 3), seed) for seed in range(3)], [2, 9, 4]
    until = cp_als.Until(sweeps=11, settled=0.0, rounding=0.0, work=1e15)
    starts = [cp_als.started(cp_als.mode_vectors(t), rank, 2) for t, rank in zip(tensors, ranks, strict=True)]
    problem = torch.arange(3).repeat_interleave(2)
    columns = torch.arange(9) < torch.tensor(ranks)[problem, None]
    many = cp_als.Many(torch.cat([t.flatten(2) for t in tensors]), columns, problem, 3)
    found = cp_als.settled_together(many, cp_als.padded(starts, 9), until)
    assert all(not bool(mode[~columns[:, None, :].expand_as(mode)].any()) for mode in found.terms)
    assert not bool(found.lost.any())
    for i, (tensor, start) in enumerate(zip(tensors, starts, strict=True)):
        expected = left_of(tensor, cp_als.settled_alone(tensor, start, until))
        assert float(found.left[i] / tensor.square().sum()) == pytest.approx(expected, rel=1e-6)


def test_each_problem_ends_by_its_own_rules():
    """One fits at the start, one has its work done after two sweeps, one settles, and one goes on; no misfit grows from sweep to sweep."""
    easy = torch.einsum("at,as,ak->atsk", *(tensor_of((1, n), n) for n in (7, 6, 3)))
    tensors = [easy, *(tensor_of((1, 7, 6, 3), seed) for seed in (1, 2, 3))]
    starts = [cp_als.started(cp_als.mode_vectors(t), 3, 1) for t in tensors]
    starts[0] = cp_als.settled_alone(easy, starts[0], cp_als.Until(60, 0.0, 1e-9, 1e15))
    many = cp_als.Many(
        torch.cat([t.flatten(2) for t in tensors]), torch.ones(4, 3, dtype=torch.bool), torch.arange(4), 4
    )
    most, before = torch.tensor([60, 2, 60, 60]), None
    for sweeps in (1, 2, 3, 9, 30):
        until = cp_als.Until(sweeps, 1e-4, 1e-6, 1e15)
        found = cp_als.settled_together(many, cp_als.padded(starts, 3), until, most=most)
        if before is not None:
            assert bool((found.left <= before * (1 + 1e-9)).all())
            assert float(found.left[1]) == float(before[1]) or sweeps <= 2
        before = found.left
        for i in (0, 2, 3):
            assert float(found.left[i]) == pytest.approx(
                float(cp_als.misfit(many.tensors[i : i + 1], cp_als.settled_alone(tensors[i], starts[i], until))),
                rel=1e-6, abs=1e-12,
            )  # fmt: skip
    assert all(torch.equal(mode[:1], start) for mode, start in zip(found.terms, starts[0], strict=True))


def test_without_looks_nothing_waits_and_the_result_is_the_same(monkeypatch):
    tensor = tensor_of((1, 8, 7, 3, 3), 0)
    start = cp_als.started(cp_als.mode_vectors(tensor), 6, 1)
    many = cp_als.Many(tensor.flatten(2), torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), 1)
    until = cp_als.Until(20, 1e-4, 1e-6, 1e15)
    expected = cp_als.settled_together(many, start, until)
    for name in ("__bool__", "__float__", "__int__", "item", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waits"))
    found = cp_als.settled_together(many, start, until, looks=False)
    monkeypatch.undo()
    assert torch.equal(found.left, expected.left)


def test_a_problem_on_which_arithmetic_breaks_down_is_reported_and_leaves_the_others_alone():
    tensors = [tensor_of((1, 7, 6, 3), seed) for seed in range(2)]
    until = cp_als.Until(30, 1e-4, 1e-6, 1e15)
    starts = [cp_als.started(cp_als.mode_vectors(t), 3, 1) for t in tensors]
    expected = [left_of(t, cp_als.settled_alone(t, s, until)) for t, s in zip(tensors, starts, strict=True)]
    starts[0] = [f * torch.nan for f in starts[0]]
    with pytest.raises(NonFiniteError, match="lost all digits"):
        cp_als.settled_alone(tensors[0], starts[0], until)
    many = cp_als.Many(
        torch.cat([t.flatten(2) for t in tensors]), torch.ones(2, 3, dtype=torch.bool), torch.arange(2), 2
    )
    found = cp_als.settled_together(many, cp_als.padded(starts, 3), until)
    assert not bool(torch.isfinite(found.left[0]))
    assert float(found.left[1] / tensors[1].square().sum()) == pytest.approx(expected[1], rel=1e-6)
    with pytest.raises(NonFiniteError, match="lost all digits"):
        cp_als.settled_many(tensors, starts, until)


def test_batches_hold_what_padding_to_the_largest_does_not_make_too_much(monkeypatch):
    shapes, ranks = (
        [(1, 8, 8, 3), (1, 8, 8, 3), (2, 8, 8, 3), (1, 4, 12, 3), (1, 8, 8, 3, 3), (1, 8, 8, 3)],
        [2, 30, 4, 4, 4, 1],
    )
    alone = cp_als.work_of_sweep(shapes[1], 30)
    monkeypatch.setattr(cp_als, "TOGETHER", alone)
    found = cp_als.batches(shapes, ranks)
    assert sorted(i for batch in found for i in batch) == list(range(6))
    assert [1] in found
    assert [4] in found  # of as many modes alone
    assert max(map(len, found)) > 1
    for batch in found:
        whole = sum(shapes[i][0] for i in batch), *cp_als.largest([shapes[i][1:] for i in batch])
        assert cp_als.work_of_sweep(whole, max(ranks[i] for i in batch)) <= alone
    monkeypatch.setattr(cp_als, "TOGETHER", 0)
    assert sorted(map(len, cp_als.batches(shapes, ranks))) == [1] * 6  # what is larger is alone
    assert cp_als.batches([], []) == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_layers_of_one_spec_are_asked_for_together_where_launches_are_shared(monkeypatch):
    torch.manual_seed(0)
    net, image, asked = Net(), torch.zeros(1, 8, 12, 12), []
    traced, rules, lowering = trace(net, image), LayerRules(("cp", "im2col")), LOWERINGS["cp"]
    expected = rank_curves(net, traced, rules)
    curves = Cp.curves
    monkeypatch.setattr(
        Cp, "curves", lambda self, weights, *rest: (asked.append(len(weights)), curves(self, weights, *rest))[1]
    )
    monkeypatch.setattr(curve_making, "_shares_launches", lambda device: True)
    monkeypatch.setattr(lowering, "_together", True)
    found = rank_curves(net, traced, rules, device=torch.device("cpu"))
    assert sorted(asked) == [1, 2]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.choices == other.choices
        np.testing.assert_allclose(one.removed, other.removed, rtol=1e-6)
    net.b.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="'b'"):
        rank_curves(net, traced, LayerRules(("cp",)))
