"""Truncated SVDs, projections and spectra by the Gram matrix of the smaller side. Values only: no layers, no files.

For an n x m matrix with n <= m the Gram matrix M Mᵀ = U S² Uᵀ costs one n x n `eigh` and two products; that is 2-9 times
faster than `torch.linalg.svd` on a CPU, and U_r U_rᵀ M is the optimal rank-r approximation (Eckart & Young 1936) to
the precision of U. Letters: n rows, m columns, r rank; leading dimensions are a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ranksearch.errors import NonFiniteError


class LowRank(NamedTuple):
    """left @ right is the best rank-r approximation of a matrix in the Frobenius norm."""

    left: Tensor  # [..., n, r]
    right: Tensor  # [..., r, m]
    removed_energy: Tensor  # [...], squared Frobenius norm of what was cut off, as a share of the matrix's own (0..1)


def moderate(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix [..., n, m] in fp32 or fp64 with entries of moderate size, its scale [..., 1, 1]: what it was divided by).

    Squaring halves the exponent range: without the scaling, weights of 1e-25 underflow and 1e18 overflow in fp32. Entries whose
    squares are far from both ends are left as they are.

    Raises:
        NonFiniteError: the matrix holds NaN or infinite values.
    """
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    largest = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    if not torch.isfinite(largest).all():
        raise NonFiniteError(
            "the matrix holds NaN or infinite values, so it has no SVD; was the training run diverging?"
        )
    if ((largest > SAFE[0]) & (largest < SAFE[1])).all():
        return matrix, torch.ones_like(largest)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return matrix / scale, scale


SAFE = (1e-6, 1e6)
"""max|M| between these needs no scaling: the squares of fp32 entries keep their digits."""


def _gram(matrix: Tensor) -> tuple[Tensor, bool]:
    """(Gram matrix of the smaller side, whether that side is the rows)."""
    rows_smaller = matrix.shape[-2] <= matrix.shape[-1]
    return (matrix @ matrix.mT if rows_smaller else matrix.mT @ matrix), rows_smaller


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Squared singular values of `matrix` [..., n, m], in descending order: [..., min(n, m)].

    One Gram `eigvalsh`; absolute error about eps * sigma_1², which is why small ones are clamped at 0.
    """
    scaled, scale = moderate(matrix)
    gram, _ = _gram(scaled)
    return torch.linalg.eigvalsh(gram).clamp_min(0).flip(-1) * scale[..., 0] ** 2


def removed_energy_by_rank(squared: Tensor) -> Tensor:
    """Share of the energy that truncation at rank 0, 1, .., k removes: [..., k] -> [..., k + 1], from 1 down to 0.

    Summed from the small end, so that the tail of a steep spectrum keeps its digits. A zero matrix loses nothing.
    """
    squared = squared.double()
    tail = squared.flip(-1).cumsum(-1).flip(-1)
    total = tail[..., :1]
    share = torch.where(total > 0, tail / torch.where(total > 0, total, torch.ones_like(total)), 0.0)
    return torch.cat([share, torch.zeros_like(share[..., :1])], dim=-1)


def _check_rank(matrix: Tensor, rank: int) -> None:
    full = min(matrix.shape[-2:])
    if not 1 <= rank <= full:
        shape = f"{matrix.shape[-2]} x {matrix.shape[-1]}"
        raise ValueError(f"rank {rank} is outside 1..{full}, the ranks of a {shape} matrix")


def truncated_svd(matrix: Tensor, rank: int) -> LowRank:
    """Best rank-`rank` approximation of `matrix` [..., n, m] as a product; one factor is orthonormal.

    Raises:
        ValueError: `rank` outside 1..min(n, m).
        NonFiniteError: the matrix is not finite.
    Reference: Eckart & Young 1936, "The approximation of one matrix by another of lower rank".
    """
    _check_rank(matrix, rank)
    scaled, scale = moderate(matrix)
    gram, rows_smaller = _gram(scaled)
    values, vectors = torch.linalg.eigh(gram)  # ascending
    basis = vectors[..., -rank:].flip(-1)
    left, right = (basis, basis.mT @ scaled) if rows_smaller else (scaled @ basis, basis.mT)
    left, right = (left, right * scale) if rows_smaller else (left * scale, right)
    removed = removed_energy_by_rank(values.clamp_min(0).flip(-1))[..., rank]
    return LowRank(left.to(matrix.dtype), right.to(matrix.dtype), removed)


class Basis(NamedTuple):
    """Orthonormal columns that span what a projection kept: of the column space [..., n, r] where `left`, else of the row space [..., m, r]."""

    vectors: Tensor
    left: bool


class Projection(NamedTuple):
    """The best rank-r approximation of a batch of matrices, the share of the batch's energy that it removes, and its basis."""

    matrix: Tensor  # [..., n, m]
    removed: float
    basis: Basis


def projected(matrix: Tensor, rank: int, basis: Basis | None = None) -> Projection:
    """`matrix` [..., n, m] projected to rank `rank`: as `truncated_svd`, but multiplied out, and faster from the `basis` of a matrix nearby.

    A large and nearly square matrix is projected by subspace iteration from `basis`, as far as a bound certifies the result
    (`_from_basis`); any other, and any that the bound does not certify, by the exact way of `truncated_svd`.

    Raises:
        ValueError: `rank` outside 1..min(n, m).
        NonFiniteError: the matrix is not finite.
    """
    _check_rank(matrix, rank)
    scaled, scale = moderate(matrix)
    found = _from_basis(scaled, basis) if basis is not None and _warm_pays(scaled, rank, basis) else None
    if found is None:
        gram, rows_smaller = _gram(scaled)
        values, vectors = torch.linalg.eigh(gram)
        kept = vectors[..., -rank:]
        product = kept @ (kept.mT @ scaled) if rows_smaller else (scaled @ kept) @ kept.mT
        energy = values.double().clamp_min(0)
        weights = scale[..., 0, 0].double().square()  # energies of a batch add up in the matrices' own units
        total = float((energy.sum(-1) * weights).sum())
        removed = float((energy[..., :-rank].sum(-1) * weights).sum()) / total if total > 0 else 0.0
        found = Projection(product, removed, Basis(kept, rows_smaller))
    return found._replace(matrix=(found.matrix * scale).to(matrix.dtype))


CERTIFIED = 2.5e-4
"""Largest excess of the error over the optimum, as a share of the optimum, that a warm projection may be left with."""
HALF_STEPS = 3
PROBES = 8


def _warm_pays(matrix: Tensor, rank: int, basis: Basis) -> bool:
    """Measured on two CPU cores (`scripts/bench_projection.py`): below 192, or where one side is 3 times the other, Gram + eigh is as fast."""
    small, large = sorted(matrix.shape[-2:])
    rows = matrix.shape[-2] if basis.left else matrix.shape[-1]
    fits = basis.vectors.shape == (*matrix.shape[:-2], rows, rank) and basis.vectors.device == matrix.device
    return fits and small >= 192 and large <= 3 * small and rank <= 0.6 * small


def _from_basis(matrix: Tensor, basis: Basis) -> Projection | None:
    """Half-steps of subspace iteration until the excess error is certified to be small; None where it is not in time.

    With Q orthonormal, A = B Qᵀ + R, B = A Q, the best rank-r approximation of A removes at most
    ||C||² / (lambda_r(BᵀB) - ||R||²) less energy than B Qᵀ does, C = BᵀR being what couples the two parts. (The share of energy
    that is removed says less: a drift of low rank removes next to nothing and may yet turn the best subspace.) ||C|| and ||R|| are
    estimated from a few random probes.

    Reference: quadratic residual bounds, Mathias 1998, "Quadratic residual bounds for the Hermitian eigenvalue problem".
    """
    work, left = (matrix, True) if basis.left else (matrix.mT, False)
    image = work.mT @ basis.vectors.to(matrix.dtype)
    energy = matrix.square().sum(dim=(-2, -1))
    for _ in range(HALF_STEPS):
        vectors = torch.linalg.qr(image).Q
        image = work @ vectors
        product = image @ vectors.mT
        if _certified(work - product, image, energy):
            removed = float((work - product).square().sum() / energy.sum().clamp_min(1e-38))
            return Projection(product if left else product.mT, removed, Basis(vectors, not left))
        work, left = work.mT, not left
    return None


def _certified(rest: Tensor, image: Tensor, energy: Tensor) -> bool:
    """Whether the bound on the excess error of every matrix of the batch is below `CERTIFIED`; rest is R, image is B."""
    removed = rest.square().sum(dim=(-2, -1))
    negligible = removed <= 1e-10 * energy
    generator = torch.Generator(rest.device).manual_seed(0)
    probes = torch.randn((*rest.shape[:-2], rest.shape[-1], PROBES), generator=generator, device=rest.device).to(rest)
    seen = rest @ probes
    coupling = (image.mT @ seen).square().sum(dim=(-2, -1)) / PROBES
    top = torch.linalg.matrix_norm(rest.mT @ torch.linalg.qr(seen).Q, ord=2).square()
    gap = torch.linalg.eigvalsh(image.mT @ image)[..., 0] - 1.5 * top
    excess = coupling / gap.clamp_min(1e-38) / removed.clamp_min(1e-38) / 2  # of norms: half of that of energies
    return bool((negligible | ((gap > 0) & (excess < CERTIFIED))).all())


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rescales the r rank-one terms so that both factors carry the same norm; the product is unchanged.

    Gradient descent on left @ right is best conditioned when both sides weigh the same, and weight decay then acts on
    both alike. A term of norm 0 is left alone.
    """
    left_norm, right_norm = left.norm(dim=-2), right.norm(dim=-1)  # [..., r]
    usable = (left_norm > 0) & (right_norm > 0)
    ratio = torch.where(usable, right_norm / torch.where(usable, left_norm, 1), 1.0)
    scale = torch.where(usable, ratio.sqrt(), torch.ones_like(ratio))
    return left * scale.unsqueeze(-2), right / scale.unsqueeze(-1)
