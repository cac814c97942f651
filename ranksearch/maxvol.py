"""Pivot rows of a basis, so that all other rows are combinations of them with bounded coefficients. Values only.

In a matrix [n, r] of full column rank any r independent rows are a basis of its rows: M = A M[pivots], A the identity on the pivots. Rows
of large volume |det M[pivots]| keep A small: a row with a coefficient a enlarges the volume |a| times where it takes the pivot's place, so
the exchange ends, and ends with no coefficient above `BOUND`. For orthonormal columns such pivots have a condition number of at most
sqrt(1 + BOUND² r(n - r)).

Reference: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov & Zamarashkin 2010, "How to find a good submatrix" (maximum volume); Gu &
Eisenstat 1996, "Efficient algorithms for computing a strong rank-revealing QR factorization".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BOUND = 1.05
"""No coefficient is larger, in absolute value."""
REFRESH = 32
"""Exchanges by rank-one updates before the coefficients are computed anew."""


class Pivoted(NamedTuple):
    """matrix[others] = coefficients @ matrix[pivots], for every matrix [n, r] of a batch."""

    pivots: Tensor  # [b, r] int64, rising
    others: Tensor  # [b, n - r] int64, rising
    coefficients: Tensor  # [b, n - r, r] fp64, entries within BOUND


def pivot_rows(matrix: Tensor) -> Pivoted:
    """Pivots of the column space of `matrix` [b, n, r], r <= n: a dependent column counts as any direction that is still free.

    Only the space counts, not the columns' scales: they are orthonormalised first, in fp64. O(b n r²) and O(b n r) per exchange.
    """
    basis = torch.linalg.qr(matrix.double()).Q
    batch, n, rank = basis.shape
    picked = _eliminated(basis)
    every = torch.arange(batch, device=matrix.device)
    settled = rank == n
    while not settled:
        coefficients = _coefficients(basis, picked)
        for done in range(REFRESH):
            largest, where = coefficients.abs().flatten(1).max(dim=1)
            change = largest > BOUND
            if not bool(change.any()):
                settled = done == 0  # as they were computed, not updated
                break
            row, place = where // rank, where % rank
            move = every[change]
            picked[move, place[move]] = row[move]
            pivot_row = coefficients[move, row[move]]  # [c, r]
            column = coefficients[move, :, place[move]]  # [c, n]
            value = pivot_row.gather(1, place[move, None])
            pivot_row = pivot_row.scatter_add(1, place[move, None], -torch.ones_like(value))
            coefficients[move] -= column[:, :, None] * (pivot_row / value)[:, None, :]
    pivots = picked.sort(dim=1).values
    is_pivot = torch.zeros(batch, n, dtype=torch.bool, device=matrix.device).scatter_(1, pivots, True)
    others = (~is_pivot).nonzero()[:, 1].reshape(batch, n - rank)
    coefficients = _coefficients(basis, pivots).gather(1, others[..., None].expand(-1, -1, rank))
    return Pivoted(pivots, others, coefficients)


def _eliminated(basis: Tensor) -> Tensor:
    """The rows that Gaussian elimination with partial pivoting takes first: [b, n, r] -> [b, r]."""
    swaps = torch.linalg.lu_factor(basis).pivots.long() - 1  # [b, r]: row j was exchanged with row swaps[j]
    rows = torch.arange(basis.shape[1], device=basis.device).repeat(basis.shape[0], 1)
    for j in range(basis.shape[2]):
        other = swaps[:, j : j + 1]
        here, there = rows[:, j : j + 1].clone(), rows.gather(1, other)
        rows[:, j : j + 1] = there
        rows.scatter_(1, other, here)
    return rows[:, : basis.shape[2]].clone()


def _coefficients(basis: Tensor, picked: Tensor) -> Tensor:
    """Every row as a combination of those `picked`: [b, n, r], [b, r] -> [b, n, r]."""
    square = basis.gather(1, picked[..., None].expand(-1, -1, basis.shape[-1]))
    return torch.linalg.solve(square, basis, left=False)
