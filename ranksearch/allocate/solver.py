"""The allocation: the plan of least predicted damage within every budget, with a lower bound as its certificate.

One option per layer, minimise sum of damages, subject to sum of costs <= limit for every limited cost: a multiple-choice knapsack.
Its Lagrangian dual is concave and separates over the layers; Kelley's cutting planes find the multipliers in a few rounds (the
bound equals that of the LP relaxation). The plan starts from the best feasible one met on the way and is filled in greedily
until no layer can be improved within the budgets: never above a budget, below by less than one step of any layer.

Reference: Sinha & Zoltners 1979 (multiple-choice knapsack); Kelley 1960 (cutting planes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from ranksearch.allocate.budget import Budget
from ranksearch.allocate.curves import Curves, limits_of, log_kept_energy
from ranksearch.compress import RankPlan
from ranksearch.errors import UsageError

ROUNDS = 60
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Allocation:
    """A plan within the budgets, its predicted damage, and how far from optimal it can be at most."""

    plan: RankPlan
    damage: float
    bound: float
    """No plan within the budgets has a smaller predicted damage."""

    @property
    def gap(self) -> float:
        """(damage - bound) / damage, 0 for a plan that is proven optimal."""
        return max(0.0, (self.damage - self.bound) / self.damage) if self.damage > 0 else 0.0


@dataclass(frozen=True)
class Problem:
    """damage [L, N] and costs [K, L, N] in units of their limits; unused places have infinite damage and cost 0."""

    damage: np.ndarray
    costs: np.ndarray

    def choose(self, multipliers: np.ndarray) -> np.ndarray:
        """The option [L] of every layer that is best at these prices [K]."""
        return np.argmin(self.damage + np.tensordot(multipliers, self.costs, axes=1), axis=1)

    def totals(self, picks: np.ndarray) -> tuple[float, np.ndarray]:
        """(sum of damages, sums of costs [K]) of the options [L]."""
        rows = np.arange(len(picks))
        return float(self.damage[rows, picks].sum()), self.costs[:, rows, picks].sum(axis=1)


def dual_bound(problem: Problem, starts: Sequence[np.ndarray]) -> tuple[float, np.ndarray, list[np.ndarray]]:
    """(best dual value, its multipliers [K], every choice met), by cutting planes from the choices `starts`.

    At multipliers m >= 0 the dual is min over choices of damage + m·(cost - 1): every choice is a cut.
    """
    met = list(starts)
    best, multipliers = -np.inf, np.zeros(len(problem.costs))
    cuts = [problem.totals(picks) for picks in met]
    scale = max(damage for damage, _ in cuts) + 1e-12
    for _ in range(ROUNDS):
        # maximise q subject to q <= damage + m·(cost - 1) for every cut, in units of `scale`
        a = np.array([[1.0, *(1 - cost)] for _, cost in cuts])
        b = np.array([damage / scale for damage, _ in cuts])
        objective = np.zeros(a.shape[1])
        objective[0] = -1
        bounds = [(None, 1.0), *[(0, 1e9)] * (a.shape[1] - 1)]
        solution = linprog(objective, A_ub=a, b_ub=b, bounds=bounds, method="highs")
        upper, trial = solution.x[0] * scale, solution.x[1:] * scale
        picks = problem.choose(trial)
        damage, cost = problem.totals(picks)
        value = damage + float(trial @ (cost - 1))
        if value > best:
            best, multipliers = value, trial
        if upper - best <= TOLERANCE * max(abs(upper), 1e-12):
            break
        met.append(picks)
        cuts.append((damage, cost))
    return best, multipliers, met


def fill_in(problem: Problem, picks: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Improves one layer at a time, best damage per priced cost first, until nothing more fits."""
    picks, rows = picks.copy(), np.arange(len(picks))
    _, used = problem.totals(picks)
    while True:
        gain = problem.damage[rows, picks][:, None] - problem.damage  # [L, N]
        extra = problem.costs - problem.costs[:, rows, picks][:, :, None]  # [K, L, N]
        fits = ((used[:, None, None] + extra) <= 1 + 1e-12).all(axis=0) & (gain > 0)
        if not fits.any():
            return picks
        price = np.maximum(np.tensordot(multipliers, extra, axes=1), 1e-12)
        layer, option = np.unravel_index(np.argmax(np.where(fits, gain / price, -1.0)), fits.shape)
        picks[layer] = option
        _, used = problem.totals(picks)


def solve(problem: Problem) -> tuple[np.ndarray, float]:
    """(options [L], lower bound) of a problem with at least one feasible choice.

    Raises:
        UsageError: every limit can be met alone, but not all together.
    """
    count = len(problem.costs)
    everything_dense = np.argmin(problem.damage, axis=1)
    if (problem.totals(everything_dense)[1] <= 1).all():
        return everything_dense, problem.totals(everything_dense)[0]
    usable = np.isfinite(problem.damage)
    prices = [*np.eye(count), *(np.full((1, count), 1 / count) if count > 1 else [])]
    cheapest = [np.argmin(np.where(usable, np.tensordot(p, problem.costs, axes=1), np.inf), axis=1) for p in prices]
    if not any((problem.totals(picks)[1] <= 1 + 1e-12).all() for picks in cheapest):
        raise UsageError("Each budget can be met alone, but not all of them together: raise one of them.")
    bound, multipliers, met = dual_bound(problem, [everything_dense, *cheapest])
    feasible = [picks for picks in met if (problem.totals(picks)[1] <= 1 + 1e-12).all()]
    feasible.sort(key=lambda picks: problem.totals(picks)[0])
    filled = [fill_in(problem, picks, multipliers) for picks in feasible[:3]]
    return min(filled, key=lambda picks: problem.totals(picks)[0]), bound


def allocate_plan(
    curves: Curves,
    budgets: Sequence[Budget],
    *,
    weights: Mapping[str, float] | None = None,
    measure: Callable[[np.ndarray], np.ndarray] = log_kept_energy,
    allowed: Mapping[str, Sequence[str]] | None = None,
    model: str | None = None,
) -> Allocation:
    """The plan of least weighted damage within every budget.

    Args:
        weights: layer name -> factor on its damage (1 where missing): how much the prediction is corrected.
        measure: damage from the removed energy share; see `curves.MEASURES`.
        allowed: layer name -> lowerings it may take besides dense (all of its options where missing).

    Raises:
        UsageError: the budgets cannot be met; the text names the smallest value that can.
    """
    weights, allowed = weights or {}, allowed or {}
    limits = limits_of(curves, budgets)
    bounded = np.flatnonzero(np.isfinite(limits))
    kept = []
    for options in curves.layers:
        names = allowed.get(options.layer.name)
        keep = options.efficient.copy()
        if names is not None:
            keep &= np.array([choice.lowering in (*names, "dense") for choice in options.choices])
        kept.append(np.flatnonzero(keep))
    width = max(len(index) for index in kept)
    damage = np.full((len(kept), width), np.inf)
    costs = np.zeros((len(bounded), len(kept), width))
    for row, (options, index) in enumerate(zip(curves.layers, kept, strict=True)):
        damage[row, : len(index)] = weights.get(options.layer.name, 1.0) * measure(options.removed[index])
        for axis, which in enumerate(bounded):
            costs[axis, row, : len(index)] = (options.macs, options.params)[which][index] / max(limits[which], 1e-9)
    picks, bound = solve(Problem(damage, costs))
    chosen = {o.layer.name: int(i[p]) for o, i, p in zip(curves.layers, kept, picks, strict=True)}
    total, _ = Problem(damage, costs).totals(picks)
    return Allocation(curves.plan(chosen, model), total, bound)
