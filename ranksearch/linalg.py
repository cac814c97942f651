"""Truncated SVDs, projections and spectra by the Gram matrix of the smaller side. Values only: no layers, no files.

For an n x m matrix with n <= m the Gram matrix M Mᵀ = U S² Uᵀ costs one n x n `eigh` and two products; that is 2-9 times
faster than `torch.linalg.svd` on a CPU, and U_r U_rᵀ M is the optimal rank-r approximation (Eckart & Young 1936) to
the precision of U. Letters: n rows, m columns, r rank; leading dimensions are a batch.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ranksearch.errors import NonFiniteError


class LowRank(NamedTuple):
    """left @ right is the best rank-r approximation of a matrix in the Frobenius norm."""

    left: Tensor  # [..., n, r]
    right: Tensor  # [..., r, m]
    removed_energy: Tensor  # [...], squared Frobenius norm of what was cut off, as a share of the matrix's own (0..1)


NOT_FINITE = "the matrix holds NaN or infinite values, so it has no SVD; was the training run diverging?"
SAFE = (1e-6, 1e6)
"""max|M| between these needs no scaling: the squares of fp32 entries keep their digits."""


def moderate(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """(matrix [..., n, m] in fp32 or fp64 with entries of moderate size, its scale [..., 1, 1]: what it was divided by, None for 1).

    Squaring halves the exponent range: without the scaling, weights of 1e-25 underflow and 1e18 overflow in fp32. Entries whose
    squares are far from both ends are left as they are.

    Raises:
        NonFiniteError: the matrix holds NaN or infinite values.
    """
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    largest = torch.maximum(matrix.amax(dim=(-2, -1)), -matrix.amin(dim=(-2, -1)))
    smallest, most = float(largest.min()), float(largest.max())  # NaN travels through minima and maxima
    if not (isfinite(smallest) and isfinite(most)):
        raise NonFiniteError(NOT_FINITE)
    if SAFE[0] < smallest and most < SAFE[1]:
        return matrix, None
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))[..., None, None]
    return matrix / scale, scale


def rescaled(matrix: Tensor, scale: Tensor | None) -> Tensor:
    """Undoes `moderate`."""
    return matrix if scale is None else matrix * scale


BLOCKS = 4


def row_gram(matrix: Tensor) -> Tensor:
    """Lower triangle of M Mᵀ, [..., n, m] -> [..., n, n]: `eigh` reads no more than that.

    Large ones are made by block rows up to the diagonal, which saves 3/8 of the work.
    """
    n = matrix.shape[-2]
    if n < 256:
        return matrix @ matrix.mT
    gram = matrix.new_empty((*matrix.shape[:-1], n))
    for i in range(BLOCKS):
        first, last = i * n // BLOCKS, (i + 1) * n // BLOCKS
        gram[..., first:last, :last] = matrix[..., first:last, :] @ matrix[..., :last, :].mT
    return gram


def _gram(matrix: Tensor) -> tuple[Tensor, bool]:
    """(lower triangle of the Gram matrix of the smaller side, whether that side is the rows)."""
    rows_smaller = matrix.shape[-2] <= matrix.shape[-1]
    return row_gram(matrix if rows_smaller else matrix.mT), rows_smaller


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; in fp64 where fp32 does not converge, as happens for weights with many dead channels."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(gram.double())
    return values.to(gram.dtype), vectors.to(gram.dtype)


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Squared singular values of `matrix` [..., n, m], in descending order: [..., min(n, m)]; in fp64 where entries are not moderate.

    One Gram `eigvalsh`; absolute error about eps * sigma_1², which is why small ones are clamped at 0.
    """
    scaled, scale = moderate(matrix)
    gram, _ = _gram(scaled)
    squared = torch.linalg.eigvalsh(gram).clamp_min(0).flip(-1)
    return squared if scale is None else squared.double() * scale[..., 0].double() ** 2  # fp32 has no 1e50


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
    values, vectors = eigh(gram)  # ascending
    basis = vectors[..., -rank:].flip(-1)
    left, right = (basis, basis.mT @ scaled) if rows_smaller else (scaled @ basis, basis.mT)
    left, right = (left, rescaled(right, scale)) if rows_smaller else (rescaled(left, scale), right)
    removed = removed_energy_by_rank(values.clamp_min(0).flip(-1))[..., rank]
    return LowRank(left.to(matrix.dtype), right.to(matrix.dtype), removed)


class Basis(NamedTuple):
    """Orthonormal columns that span what a projection kept: of the column space [b, n, r] where `left`, else of the row space [b, m, r]."""

    vectors: Tensor
    left: bool


class Projection(NamedTuple):
    """The best rank-r approximation of a batch of matrices, the share of the batch's energy that it removes, and its basis."""

    matrix: Tensor  # [b, n, m]
    removed: float
    basis: Basis


def projected(matrix: Tensor, rank: int, basis: Basis | None = None) -> Projection:
    """`matrix` [b, n, m] projected to rank `rank`: `truncated_svd` multiplied out, and faster from the `basis` of a matrix nearby.

    A large and nearly square matrix is projected by subspace iteration from `basis`, as far as a bound certifies the result
    (`_from_basis`); any other, and any that the bound does not certify, by the exact way of `truncated_svd`.

    Raises:
        ValueError: `rank` outside 1..min(n, m).
        NonFiniteError: the matrix is not finite.
    """
    _check_rank(matrix, rank)
    scaled, scale = moderate(matrix)
    found = None
    if basis is not None and scale is None and _warm_pays(scaled, rank, basis):
        found = _from_basis(scaled, rank, basis)
    if found is None:
        rows_smaller = scaled.shape[-2] <= scaled.shape[-1]
        side = scaled if rows_smaller else scaled.mT
        start = basis.vectors if basis is not None and basis.left is rows_smaller else None
        kept, removed, total = leading(side, rank, start)
        product = kept @ (kept.mT @ scaled) if rows_smaller else (scaled @ kept) @ kept.mT
        if scale is not None:  # the energies of a batch add up in the matrices' own units
            removed, total = (energy * scale[..., 0, 0].double().square() for energy in (removed, total))
        share = float(removed.sum() / total.sum()) if float(total.sum()) > 0 else 0.0
        found = Projection(product, share, Basis(kept, rows_smaller))
    return found._replace(matrix=rescaled(found.matrix, scale).to(matrix.dtype))


CERTIFIED = 7e-4
"""Largest excess of the error over the optimum, as a share of the optimum, that a projection from an earlier basis may be left with."""
PROBES = 16
WIDENING = 32
WELL_CONDITIONED = 0.1
"""Least pivot of a Cholesky factor of unit columns: they lose at most two of seven digits of orthogonality."""
WARM_FROM = 384


def leading(matrix: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading left singular vectors of `matrix` [b, n, m], n <= m or not: (basis [b, n, r], energy left out [b], energy [b]).

    From the Gram matrix of the rows: by one subspace iteration from the basis `start` [b, n, r] of a matrix nearby where the matrix
    is large and the result certified (as in `_certified`, but exactly: the Gram matrix is small), else by `eigh`.
    """
    return leading_of_gram(row_gram(matrix), rank, start)


def leading_of_gram(gram: Tensor, rank: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`leading` from a Gram matrix [b, n, n], of which the lower triangle counts; the last basis vector is the leading one."""
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    if start is not None and gram.shape[-1] >= WARM_FROM and start.shape == (*gram.shape[:-1], rank):
        full = gram.tril() + gram.tril(-1).mT
        vectors = torch.linalg.qr(full @ start.to(full)).Q
        image = full @ vectors
        values, turn = torch.linalg.eigh(vectors.mT @ image)
        vectors = vectors @ turn
        left_out = (energy - values.sum(-1, dtype=torch.float64)).clamp_min(0)
        coupling = (image @ turn - vectors * values[..., None, :]).square().sum(dim=-2)

        def rest(x: Tensor) -> Tensor:
            return full @ x - vectors @ (values[..., None] * (vectors.mT @ x))

        seen = torch.linalg.qr(rest(_probes(full, full.shape[-1], PROBES))).Q
        top = 1.5 * torch.linalg.matrix_norm(rest(seen), ord=2)  # probes see most of the largest eigenvalue, not all
        gap = values - torch.minimum(top, left_out)[..., None]  # which is not above the trace either
        excess = (coupling / gap.clamp_min(1e-38)).sum(-1)
        if bool(((gap > 0).all(-1) & (excess <= 2 * CERTIFIED * left_out)).all()):
            return vectors, left_out, energy
    values, vectors = eigh(gram)
    return vectors[..., -rank:], values[..., :-rank].double().clamp_min(0).sum(-1), energy


def _warm_pays(matrix: Tensor, rank: int, basis: Basis) -> bool:
    """Whether iterating pays: below `WARM_FROM`, or with one side over twice the other, the Gram matrix is as fast (two CPU cores)."""
    small, large = sorted(matrix.shape[-2:])
    rows = matrix.shape[-2] if basis.left else matrix.shape[-1]
    fits = basis.vectors.shape == (*matrix.shape[:-2], rows, rank) and basis.vectors.device == matrix.device
    return fits and small >= WARM_FROM and large <= 2 * small and rank <= 0.6 * small


def _from_basis(matrix: Tensor, rank: int, basis: Basis) -> Projection | None:
    """Up to two half-steps of subspace iteration from `basis`; None where the excess error is not certified to be small then.

    Training drifts by noise, which one half-step removes, and by a few strong directions, as gradients have: the basis is widened by what
    random probes see outside it, so that convergence depends on the spectrum behind those; a Rayleigh-Ritz step then drops the
    weakest directions again.

    Reference: Saad 2011, "Numerical methods for large eigenvalue problems", ch. 5 (subspace iteration with Ritz projection); Halko,
    Martinsson & Tropp 2011, arXiv 0909.4061 (range finding by probes).
    """
    work, left = (matrix, True) if basis.left else (matrix.mT, False)
    start = basis.vectors.to(matrix.dtype)
    seen = work @ _probes(work, work.shape[-1], WIDENING)
    outside = torch.linalg.qr(seen - start @ (start.mT @ seen)).Q
    image = work.mT @ torch.cat([start, outside], dim=-1)
    for _ in range(2):
        vectors = _orthonormal(image)
        image = work @ vectors
        values, turn = torch.linalg.eigh(image.mT @ image)  # ascending
        dropped = turn[..., :WIDENING]
        spare = image @ dropped, vectors @ dropped
        kept = image - spare[0] @ dropped.mT, vectors.mT
        rest = torch.baddbmm(matrix, *(kept if left else (kept[1].mT, kept[0].mT)), alpha=-1)
        values, turn = values.flip(-1), turn.flip(-1)
        if _certified(rest if left else rest.mT, image, turn, spare, values, _probes(work, work.shape[-1], PROBES)):
            removed = float(rest.square().sum())
            share = removed / (removed + float(values[..., :rank].sum()) + 1e-38)
            return Projection(torch.sub(matrix, rest, out=rest), share, Basis(vectors @ turn[..., :rank], not left))
        work, left = work.mT, not left
    return None


def _probes(like: Tensor, width: int, count: int) -> Tensor:
    """Seeded random columns [b, width, count] on the device of `like` [b, .., ..]: a projection is the same every time."""
    generator = torch.Generator(like.device).manual_seed(width + count)
    return torch.randn((*like.shape[:-2], width, count), generator=generator, device=like.device).to(like)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of `matrix` [b, n, w]: by Cholesky where they are well conditioned, in half the time of QR."""
    unit = matrix / torch.linalg.vector_norm(matrix, dim=-2, keepdim=True).clamp_min(1e-30)
    factor, info = torch.linalg.cholesky_ex(unit.mT @ unit)
    if bool(info.any()) or float(factor.diagonal(dim1=-2, dim2=-1).amin()) < WELL_CONDITIONED:
        return torch.linalg.qr(matrix).Q
    return torch.linalg.solve_triangular(factor.mT, unit, upper=True, left=False)


def is_settled(matrix: Tensor, left: Tensor) -> bool:
    """Whether orthonormal columns `left` [b, n, r] are certified to span the best r-dimensional subspace for `matrix` [b, n, m]."""
    image = matrix.mT @ left
    values, turn = torch.linalg.eigh(image.mT @ image)
    values, turn = values.flip(-1), turn.flip(-1)
    rest = torch.baddbmm(matrix, left, image.mT, alpha=-1).mT
    probes = _probes(matrix, matrix.shape[-2], PROBES)
    return _certified(rest, image, turn, (image[..., :0], left[..., :0]), values, probes)


def _certified(
    rest: Tensor, image: Tensor, turn: Tensor, spare: tuple[Tensor, Tensor], values: Tensor, probes: Tensor
) -> bool:
    """Whether the kept Ritz vectors remove at most (1 + CERTIFIED) times the least error.

    A = (what was searched) + R; R couples the Ritz vector i to what was not searched by c_i = Rᵀ image_i. No eigenvalue then
    rises by more than |c_i|² / (values_i - ||R||²), so the r leading ones cannot sum to more than the largest r of the raised ones.
    (The share of energy that is removed says less: a drift of low rank removes next to nothing and may yet turn the best
    subspace.) |c_i| and ||R|| are estimated from a few random probes.

    Args: rest = A - (kept part); image [.., n, w], to be turned by `turn` [.., w, w] into the Ritz vectors' images; spare, the images
    and vectors of those that were searched but not kept; values [.., w], descending.

    Reference: quadratic residual bounds, Mathias 1998, "Quadratic residual bounds for the Hermitian eigenvalue problem".
    """
    spare_image, spare_vectors = spare
    rank = values.shape[-1] - spare_vectors.shape[-1]
    seen = rest @ probes - spare_image @ (spare_vectors.mT @ probes)  # R · probes
    coupling = (turn.mT @ (image.mT @ seen)).square().mean(dim=-1)  # E (c_i · probe)² = |c_i|²
    range_of = torch.linalg.qr(seen).Q
    back = rest.mT @ range_of - spare_vectors @ (spare_image.mT @ range_of)
    top = 1.5 * torch.linalg.matrix_norm(back, ord=2).square()[..., None]  # probes see most of the norm, not all
    gap = values - top
    raised = values + torch.where(gap > 0, coupling / gap.clamp_min(1e-38), torch.inf)
    # what lies below the unsearched part cannot be bounded so, but neither can it reach the kept ones while it couples weakly
    raised = torch.where((gap <= 0) & (values + coupling.sqrt() < values[..., rank - 1 : rank]), values, raised)
    excess = raised.sort(dim=-1, descending=True).values[..., :rank].sum(-1) - values[..., :rank].sum(-1)
    removed = torch.linalg.vector_norm(rest, dim=(-2, -1)).square()
    negligible = removed <= 1e-10 * values[..., :rank].sum(-1)
    return bool(
        (negligible | (excess <= 2 * CERTIFIED * removed)).all()
    )  # the excess of norms is half that of energies


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
