"""Leading subspaces of many Gram matrices at once, from bases of matrices nearby, by matrix products and Cholesky factors alone.

That is what a GPU does well: no `eigh`, nothing that the host waits for, one shape for a whole batch; it can be captured in a graph.
Smaller matrices are padded with zeros, smaller ranks with zero columns. Letters: b matrices, n their width, r the largest rank.

An answer is only taken where it is certified. With orthonormal V, C = Vᵀ G V, K = G V - V C and R = (1 - VVᵀ) G (1 - VVᵀ) <= t, and
where C' = C - t is positive definite,

    G - t  =  [C'^½; K C'^-½][..]ᵀ + (something <= 0)       so the r leading eigenvalues of G sum to at most  tr C + tr(KᵀK C'^-1),

of which tr C is kept: what a better basis could keep beyond is tr(KᵀK C'^-1) at most. t = ||R⁸||_F^(1/8) is never too small.

Reference: Saad 2011, "Numerical methods for large eigenvalue problems", ch. 5 (orthogonal iteration); Yamamoto, Nakatsukasa, Yanagisawa
& Fukaya 2015 (CholeskyQR2); the bound is the two lines above (cf. Mathias 1998, quadratic residual bounds).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ranksearch.linalg import CERTIFIED, eigh

RIDGE = 1e-5
"""Added to the unit diagonal on the way, so that columns that have grown alike do no harm; the last pass goes without."""
ORTHONORMAL = 1e-4
"""Largest entry of VᵀV - 1 that is accepted."""


class Subspaces(NamedTuple):
    """Bases of b matrices, what they leave out, and whether that is certified to be next to the least."""

    basis: Tensor  # [b, n, r], orthonormal columns, the leading ones first; zero where `columns` was False
    left_out: Tensor  # [b], energy outside, fp64
    energy: Tensor  # [b], the trace, fp64
    certified: Tensor  # [b], whether less than (1 + CERTIFIED)² times the least energy is left out, up to rounding


def leading_nearby(gram: Tensor, start: Tensor, columns: Tensor) -> Subspaces:
    """Improves the bases `start` [b, n, r], of matrices nearby, to those of the leading eigenvectors of `gram` [b, n, n].

    It takes three products with `gram`; they certify all layers of a trained ResNet-20, ten SGD steps after its last projection.

    Args:
        gram: symmetric and positive semidefinite, of any size, zero rows and columns where a matrix is smaller.
        columns: [b, r], which columns of a basis count.
    """
    scaled, _ = _to_unit_trace(gram)
    absent = torch.diag_embed((~columns).to(gram))
    vectors = _orthonormal(scaled @ (scaled @ start), absent, RIDGE)
    vectors = _orthonormal(_orthonormal(scaled @ vectors, absent, RIDGE), absent, 0.0)
    return judged(gram, vectors, columns)


def judged(gram: Tensor, vectors: Tensor, columns: Tensor) -> Subspaces:
    """What orthonormal columns `vectors` [b, n, r] leave out of `gram` [b, n, n], and whether that is certified to be next to the least."""
    gram, energy = _to_unit_trace(gram)
    eye = torch.eye(vectors.shape[-1], device=gram.device, dtype=gram.dtype)
    absent = torch.diag_embed((~columns).to(gram))
    image = gram @ vectors
    core = vectors.mT @ image
    core = (core + core.mT) / 2
    coupling = image - vectors @ core
    rest = gram - image @ vectors.mT - vectors @ coupling.mT  # = G - G V Vᵀ - V Vᵀ G + V C Vᵀ
    left_out = rest.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).clamp_min(0)
    factor, info = torch.linalg.cholesky_ex(torch.where(absent > 0, absent, core - _norm_bound(rest) * eye))
    usable = info == 0
    factor = torch.where(usable[:, None, None], factor, eye)
    excess = torch.linalg.solve_triangular(factor.mT, coupling, upper=True, left=False).square().sum((-2, -1))
    skew = (vectors.mT @ vectors + absent - eye).abs().amax((-2, -1))
    rounding = 4 * torch.finfo(gram.dtype).eps
    near = usable & (excess <= 2 * CERTIFIED * left_out + rounding)
    certified = (near | (left_out <= rounding)) & (skew < ORTHONORMAL)  # no better basis keeps more than all
    return Subspaces(vectors, left_out * energy, energy, certified)


def _to_unit_trace(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(`gram` divided by its trace, the trace [b] in fp64); zeros stay what they are."""
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    scale = energy.to(gram)[:, None, None]
    return gram / torch.where(scale > 0, scale, torch.ones_like(scale)), energy


def _orthonormal(matrix: Tensor, absent: Tensor, ridge: float) -> Tensor:
    """Columns that span those of `matrix` [b, n, r], orthonormal where they are well conditioned: Cholesky-QR after scaling to unit length.

    Columns that a factor breaks down on come out as NaN, which no certificate passes.
    """
    unit = matrix / torch.linalg.vector_norm(matrix, dim=-2, keepdim=True).clamp_min(1e-30)
    eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    factor, _ = torch.linalg.cholesky_ex(unit.mT @ unit + absent + ridge * eye)
    return torch.linalg.solve_triangular(factor.mT, unit, upper=True, left=False)


def _norm_bound(matrix: Tensor) -> Tensor:
    """An upper bound of the largest absolute eigenvalue of symmetric matrices [b, n, n], within n^(1/16) of it: [b, 1, 1]."""
    size = torch.linalg.matrix_norm(matrix)[..., None, None].clamp_min(1e-30)
    power = matrix / size
    for _ in range(3):
        power = power @ power
    return size * torch.linalg.matrix_norm(power)[..., None, None] ** 0.125


def leading_exactly(gram: Tensor, columns: Tensor) -> Subspaces:
    """The same by `eigh`, for all of them at once."""
    values, vectors = leading_first(gram)
    count = columns.shape[-1]
    basis = vectors[..., :count] * columns[:, None, :]
    kept = (values[..., :count].clamp_min(0) * columns).sum(-1, dtype=torch.float64)
    energy = values.clamp_min(0).sum(-1, dtype=torch.float64)
    return Subspaces(basis, (energy - kept).clamp_min(0), energy, torch.isfinite(energy))


def leading_first(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n], descending, and eigenvectors [b, n, n]; small ones by the CPU, several times faster there than by a GPU."""
    values, vectors = eigh(gram.cpu() if gram.shape[-1] <= ON_CPU else gram)
    return values.to(gram).flip(-1), vectors.to(gram).flip(-1)


ON_CPU = 256
"""Up to this width a batch's `eigh` goes to the CPU (18 of width 64: 4.9 ms there, 17.3 ms on an H100, torch 2.11)."""
