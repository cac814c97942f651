"""The exact allocation, by scipy's HiGHS: seconds where the greedy solver takes milliseconds, and the reference that it is held against."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ranksearch.allocate.solver import Problem, solve

OPTIMAL = 1e-4
"""Share of the optimum that the search may leave open."""
SLACK = 2e-6
"""HiGHS meets constraints to 1e-6 only: where that breaks a budget, it is asked again for a little less than the budget."""


def solve_exactly(problem: Problem, *, time_limit: float) -> tuple[np.ndarray, float]:
    """(options [L], lower bound) of least damage; the best that `time_limit` seconds allow, never worse than the greedy solver's.

    Raises:
        UsageError: no choice of options meets all limits at once.
    """
    best, bound = solve(problem)
    for limit in (1.0, 1.0 - SLACK):
        picks, proven = _by_milp(problem, limit, time_limit)
        if picks is None:
            break
        damage, used = problem.totals(picks)
        if limit == 1.0:
            bound = max(bound, proven)
        if (used <= 1 + 1e-12).all():
            return (picks, bound) if damage < problem.totals(best)[0] else (best, bound)
    return best, bound


def _by_milp(problem: Problem, limit: float, time_limit: float) -> tuple[np.ndarray | None, float]:
    """One 0/1 variable per layer and option, one option per layer: (options or None, proven bound)."""
    rows, columns = np.nonzero(np.isfinite(problem.damage))
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    done = milp(
        problem.damage[rows, columns],
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(problem.costs[:, rows, columns], -np.inf, limit),
        ],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit, "mip_rel_gap": OPTIMAL},
    )
    if done.x is None:
        return None, -np.inf
    picks = np.zeros(len(problem.damage), dtype=np.int64)
    taken = done.x > 0.5
    picks[rows[taken]] = columns[taken]
    return picks, float(done.mip_dual_bound)
