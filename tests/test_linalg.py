"""Truncated SVDs against numpy, and their laws."""

import numpy as np
import pytest
import torch

from ranksearch import linalg
from ranksearch.errors import NonFiniteError


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (3, 6, 4)])
def test_truncated_svd_matches_numpy(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    for rank in range(1, min(shape[-2:]) + 1):
        left, right, removed = linalg.truncated_svd(matrix, rank)
        best = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
        np.testing.assert_allclose((left @ right).numpy(), best, atol=1e-10)
        np.testing.assert_allclose(removed.numpy(), (s[..., rank:] ** 2).sum(-1) / (s**2).sum(-1), atol=1e-12)


def test_spectrum_matches_numpy():
    matrix = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(linalg.squared_singular_values(matrix).numpy(), expected, rtol=1e-10)


def test_removed_energy_on_a_closed_form_spectrum():
    # squared singular values 16, 9, 4, 1: the classic off-by-one and complement mistakes give other numbers
    removed = linalg.removed_energy_by_rank(torch.tensor([16.0, 9.0, 4.0, 1.0]))
    np.testing.assert_allclose(removed.numpy(), [1, 14 / 30, 5 / 30, 1 / 30, 0])


def test_zero_matrix_loses_nothing():
    left, right, removed = linalg.truncated_svd(torch.zeros(4, 6), 2)
    assert torch.equal(left @ right, torch.zeros(4, 6))
    assert removed == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_matrix_raises(bad):
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        linalg.truncated_svd(torch.tensor([[1.0, bad], [0.0, 1.0]]), 1)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_outside_the_range_names_the_range(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.4"):
        linalg.truncated_svd(torch.eye(4), rank)


def test_balance_keeps_the_product_and_equalises_the_norms():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    right[2] = 0
    new_left, new_right = linalg.balance(left, right)
    torch.testing.assert_close(new_left @ new_right, left @ right)
    torch.testing.assert_close(new_left.norm(dim=0)[:2], new_right.norm(dim=1)[:2])


def drifted(n: int, m: int, rank: int, *, size: float, drift: str, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(a rank-`rank` matrix, the same after a drift of `size` times its norm: noise, or a few directions as gradients have)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    left, right = torch.linalg.qr(normal(n, rank)).Q, torch.linalg.qr(normal(m, rank)).Q
    matrix = (left * torch.arange(1.0, rank + 1) ** -decay) @ right.mT
    change = normal(n, m) if drift == "noise" else normal(n, 8) @ normal(8, m)
    return matrix[None], (matrix + size * matrix.norm() / change.norm() * change)[None]


@pytest.mark.parametrize("drift", ["noise", "few"])
@pytest.mark.parametrize("size", [0.003, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("decay", [0.2, 1.0])
@pytest.mark.parametrize("shape", [(200, 256), (256, 200)])
def test_warm_projection_is_optimal_to_a_thousandth_whatever_the_drift(shape, decay, size, drift, monkeypatch):
    monkeypatch.setattr(linalg, "WARM_FROM", 100)
    rank = 48
    matrix, moved = drifted(*shape, rank, size=size, drift=drift, decay=decay)
    start = linalg.projected(matrix, rank)
    warm = linalg.projected(moved, rank, start.basis)
    singular = np.linalg.svd(moved[0].double().numpy(), compute_uv=False)
    optimum = np.sqrt((singular[rank:] ** 2).sum())
    assert (moved - warm.matrix).norm().item() <= 1.001 * optimum
    assert warm.removed == pytest.approx(optimum**2 / (singular**2).sum(), rel=5e-3, abs=1e-6)
    assert np.linalg.matrix_rank(warm.matrix[0].double().numpy(), tol=1e-5 * singular[0]) <= rank


def test_warm_projection_is_taken_for_a_small_drift_and_not_for_a_large_one(monkeypatch):
    monkeypatch.setattr(linalg, "WARM_FROM", 100)
    calls = []
    monkeypatch.setattr(linalg, "row_gram", lambda matrix, gram=linalg.row_gram: calls.append(1) or gram(matrix))
    matrix, moved = drifted(200, 256, 48, size=0.01, drift="noise", decay=0.2)
    start = linalg.projected(matrix, 48)
    assert linalg.projected(moved, 48, start.basis).basis.left is not start.basis.left
    assert len(calls) == 1
    _, far = drifted(200, 256, 48, size=1.0, drift="noise", decay=1.0)
    linalg.projected(far, 48, start.basis)
    assert len(calls) == 2


def test_a_basis_of_another_shape_or_rank_is_not_used(monkeypatch):
    monkeypatch.setattr(linalg, "WARM_FROM", 100)
    matrix, moved = drifted(200, 256, 48, size=0.01, drift="noise", decay=0.2)
    basis = linalg.projected(matrix, 48).basis
    torch.testing.assert_close(linalg.projected(moved, 20, basis).matrix, linalg.projected(moved, 20).matrix)
    torch.testing.assert_close(linalg.projected(moved.mT, 48, basis).matrix, linalg.projected(moved.mT, 48).matrix)
