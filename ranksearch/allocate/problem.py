"""The allocation as numbers: one option per row, least damage, costs within their limits; and HiGHS's exact answer to it.

A row is a layer, or a group of layers that share a ratio (`curves.CurveRow`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ranksearch.allocate.curves import CurveRow, Curves
from ranksearch.allocate.damage import Damage
from ranksearch.costs import NANOSECONDS
from ranksearch.errors import RanksearchError
from ranksearch.pareto import nondominated

FITS = 1 + 1e-13
"""Costs are in units of their limits; this forgives rounding in their sum, and less than one MAC in 1e12."""
OPTIMAL = 1e-4
"""Share of the optimum that the exact search may leave open."""

SLACK = 2e-6
"""HiGHS meets constraints to 1e-6 only: where that breaks a budget, it is asked again for a little less than the budget."""


class Infeasible(RanksearchError):
    """No choice of options is within all limits at once."""


@dataclass(frozen=True)
class Problem:
    """damage [L, N] and costs [K, L, N] in units of their limits; unused places have infinite damage and cost 0."""

    damage: np.ndarray
    costs: np.ndarray

    def choose(self, multipliers: np.ndarray) -> np.ndarray:
        """The option [L] of every row that is best at these prices [K]."""
        return np.argmin(self.damage + np.tensordot(multipliers, self.costs, axes=1), axis=1)

    def totals(self, picks: np.ndarray) -> tuple[float, np.ndarray]:
        """(sum of damages, sums of costs [K]) of the options [L]."""
        rows = np.arange(len(picks))
        return float(self.damage[rows, picks].sum()), self.costs[:, rows, picks].sum(axis=1)

    def fits(self, picks: np.ndarray) -> bool:
        """Whether the options [L] are within all limits."""
        return bool((self.totals(picks)[1] <= FITS).all())


def _columns(row: CurveRow, damage: Damage, allowed: Mapping[str, Sequence[str]], axes: Sequence[int]) -> np.ndarray:
    """The options of a row that are allowed and that no other one betters in damage and all costs `axes` at once.

    In a group the members' damages may be weighted differently, so nothing is dropped there.
    """
    index = np.flatnonzero(row.allowed(allowed))
    if len(row.members) > 1:
        return index
    table = np.stack([damage(row.members[0]), *row.costs[list(axes)]], axis=1)[index]
    return index[nondominated(table)]


class Poser:
    """Poses problems over the same curves and damage; what dominates what is found once per set of lowerings."""

    def __init__(self, curves: Curves, damage: Damage) -> None:
        self.curves, self.damage = curves, damage
        self._found: dict[tuple[int, tuple[int, ...], frozenset[tuple[str, tuple[str, ...]]]], np.ndarray] = {}

    def _efficient(
        self, number: int, row: CurveRow, allowed: Mapping[str, Sequence[str]], axes: tuple[int, ...]
    ) -> np.ndarray:
        names = [member.layer.name for member in row.members]
        key = number, axes, frozenset((name, tuple(allowed[name])) for name in names if name in allowed)
        if key not in self._found:
            self._found[key] = _columns(row, self.damage, allowed, axes)
        return self._found[key]

    def pose(
        self, limits: np.ndarray, *, weights: Mapping[str, float], allowed: Mapping[str, Sequence[str]]
    ) -> tuple[Problem, list[np.ndarray]]:
        """The problem of `limits` [3] on the rows' MACs, params and nanoseconds, and which option of each row every column is.

        Args:
            weights: layer -> factor on its damage, 1 where missing.
            allowed: layer -> lowerings it may take besides dense, all where missing.
        """
        rows, bounded = self.curves.rows, np.flatnonzero(np.isfinite(limits))
        # where latency is limited, layers whose factors are slower stay dense: fewer MACs alone are no reason to keep an option
        axes = tuple(bounded.tolist()) if NANOSECONDS in bounded else (0, 1)
        columns = [self._efficient(i, row, allowed, axes) for i, row in enumerate(rows)]
        shape = (len(rows), max(map(len, columns)))
        damage, costs = np.full(shape, np.inf), np.zeros((len(bounded), *shape))
        for i, (row, index) in enumerate(zip(rows, columns, strict=True)):
            weighted = (weights.get(m.layer.name, 1.0) * self.damage(m) for m in row.members)
            damage[i, : len(index)] = row.total(weighted)[index]
            costs[:, i, : len(index)] = row.costs[bounded][:, index] / np.maximum(limits[bounded], 1e-9)[:, None]
        return Problem(damage, costs), columns


def by_milp(
    objective: np.ndarray, problem: Problem, limit: np.ndarray | float, time_limit: float, nodes: int | None = None
) -> tuple[np.ndarray | None, float]:
    """(options [L] of least `objective` [L, N] with costs <= `limit`, or None where none was found; proven lower bound).

    One 0/1 variable per row and option, one option per row. The bound is infinite where it is proven that there are none.
    """
    rows, columns = np.nonzero(np.isfinite(problem.damage))
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    with _quiet_stdout():
        done = milp(
            objective[rows, columns],
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(problem.costs[:, rows, columns], -np.inf, limit),
            ],
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            options={"time_limit": time_limit, "mip_rel_gap": OPTIMAL}
            | ({} if nodes is None else {"node_limit": nodes}),
        )
    if done.x is None:
        return None, np.inf if done.status == 2 else -np.inf
    picks = np.zeros(len(problem.damage), dtype=np.int64)
    taken = done.x > 0.5
    picks[rows[taken]] = columns[taken]
    return picks, float(done.mip_dual_bound)


def least(objective: np.ndarray, problem: Problem, time_limit: float, free: int | None = None) -> np.ndarray | None:
    """Options [L] of least `objective` [L, N] that are within all limits except that on the cost `free`; None where none was found."""
    bounded = np.arange(len(problem.costs)) != free
    usable = np.where(np.isfinite(problem.damage), objective, np.inf)
    for limit in (1.0, 1.0 - SLACK):
        picks, _ = by_milp(usable, problem, np.where(bounded, limit, np.inf), time_limit)
        if picks is not None and (problem.totals(picks)[1][bounded] <= FITS).all():
            return picks
    return None


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keeps off stdout, where results belong, the lines that HiGHS writes there now and then."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
