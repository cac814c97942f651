"""The exact allocation, by scipy's HiGHS: seconds where the greedy solver takes milliseconds, and the reference that it is held against."""

from __future__ import annotations

import numpy as np

from ranksearch.allocate.problem import SLACK, Problem, by_milp
from ranksearch.allocate.solver import solve


def solve_exactly(problem: Problem, *, time_limit: float) -> tuple[np.ndarray, float]:
    """(options [L], lower bound) of least damage; the best that `time_limit` seconds allow, never worse than the greedy solver's.

    Raises:
        Infeasible: no choice of options meets all limits at once.
    """
    best, bound = solve(problem)
    for limit in (1.0, 1.0 - SLACK):
        picks, proven = by_milp(problem.damage, problem, limit, time_limit)
        if picks is None:
            break
        if limit == 1.0:
            bound = max(bound, proven)
        if problem.fits(picks):
            return (picks if problem.totals(picks)[0] < problem.totals(best)[0] else best), bound
    return best, bound
