"""Pivot rows: what they promise of every matrix, against brute force and on the worst of matrices."""

from itertools import combinations

import pytest
import torch

from ranksearch.maxvol import BOUND, pivot_rows


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(of: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return of.gather(1, index[..., None].expand(-1, -1, of.shape[2]))


def kahan(n: int) -> torch.Tensor:
    """Of rank-revealing factorizations by greedy pivots the classic failure: every step looks fine, the last pivots are tiny."""
    c, s = 0.2, 0.96**0.5
    triangle = torch.eye(n) - c * torch.ones(n, n).triu(1)
    return (s ** torch.arange(n) * triangle.T).double()[None]


CASES = {
    "tall": matrix(1, 40, 7),
    "batch": matrix(5, 9, 4),
    "square": matrix(2, 6, 6),
    "one": matrix(3, 5, 1),
    "graded": matrix(1, 30, 8) * torch.logspace(0, -14, 8, dtype=torch.float64),
    "graded rows": matrix(1, 30, 8) * torch.logspace(0, -14, 30, dtype=torch.float64)[:, None],
    "equal columns": matrix(1, 20, 1).expand(1, 20, 4).clone(),
    "zero": torch.zeros(1, 8, 3, dtype=torch.float64),
    "kahan": torch.cat([kahan(24), kahan(24).flip(2)], dim=1),
}


@pytest.mark.parametrize("name", CASES)
def test_other_rows_are_bounded_combinations_of_the_pivots(name):
    given = CASES[name]
    found = pivot_rows(given)
    assert found.coefficients.shape == (given.shape[0], given.shape[1] - given.shape[2], given.shape[2])
    assert (found.coefficients.abs() <= BOUND * (1 + 1e-9)).all()
    taken = torch.cat([found.pivots, found.others], dim=1).sort(dim=1).values
    assert torch.equal(taken, torch.arange(given.shape[1]).expand_as(taken))
    rebuilt = found.coefficients @ rows(given, found.pivots)
    assert (rebuilt - rows(given, found.others)).norm() <= 1e-12 * given.norm()


@pytest.mark.parametrize("seed", range(5))
def test_the_volume_is_near_the_largest(seed):
    given = matrix(1, 9, 3, seed=seed)
    found = pivot_rows(given).pivots[0]
    largest = max(given[0, list(picked)].det().abs() for picked in combinations(range(9), 3))
    # a dominant submatrix has at least r^(-r/2) of the maximum volume (Goreinov et al. 2010, lemma 1), times the slack of BOUND
    assert given[0, found].det().abs() >= largest / (BOUND * 3**0.5) ** 3


def test_columns_scales_do_not_matter():
    given = matrix(1, 25, 6)
    scaled = given * torch.logspace(20, -20, 6, dtype=torch.float64)
    assert torch.equal(pivot_rows(given).pivots, pivot_rows(scaled).pivots)
