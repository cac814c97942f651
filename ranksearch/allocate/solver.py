"""The allocation: the plan of least predicted damage within every budget, with a lower bound as its certificate.

One option per layer, minimise sum of damages, subject to sum of costs <= limit for every limited cost: a multiple-choice knapsack.
Its Lagrangian dual is concave and separates over the layers; Kelley's cutting planes find the multipliers in a few rounds (the
bound equals that of the LP relaxation). The plan starts from the best feasible one met on the way and is filled in greedily
until no layer can be improved within the budgets: never above a budget, below by less than one step of any layer. Where the
bound leaves room, pairs of layers are exchanged.

Reference: Sinha & Zoltners 1979 (multiple-choice knapsack); Kelley 1960 (cutting planes); Minoux 1978 (lazy greedy).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import linprog

from ranksearch.allocate.budget import Budget, cost_value, percent_above, shown
from ranksearch.allocate.curves import Curves, limits_of
from ranksearch.allocate.damage import WITHOUT_DATA, Damage
from ranksearch.allocate.problem import FITS, Infeasible, Poser, Problem, by_milp, least
from ranksearch.compress import RankPlan
from ranksearch.costs import COSTS
from ranksearch.errors import UsageError

ROUNDS = 60
TOLERANCE = 1e-6
GOOD_GAP = 2e-3
"""A plan certified to within this share of the bound is not exchanged any further."""
MOVES = 1200
"""Single moves that an exchange pairs up: their square is what one round costs."""
FAIR_GAP = 4e-3
"""Above this share HiGHS looks among the few options that could still improve the plan: a second for a net of fifty layers, milliseconds
for a small one."""
NODES = 10
"""Nodes that HiGHS may search among the few options that could still improve a plan."""
SEARCH_SECONDS = 20.0
"""How long HiGHS may look for a feasible choice where the prices found none, or for the smallest feasible value of a cost."""


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


def dual_bound(problem: Problem, starts: Sequence[np.ndarray]) -> tuple[float, np.ndarray, list[np.ndarray]]:
    """(best dual value, its multipliers [K], every choice met), by cutting planes from the choices `starts`.

    At multipliers m >= 0 the dual is min over choices of damage + m·(cost - 1): every choice is a cut.
    """
    met = list(starts)
    best, multipliers = -np.inf, np.zeros(len(problem.costs))
    cuts = [problem.totals(picks) for picks in met]
    if len(problem.costs) == 1 and (found := _dual_bound_of_one(problem, cuts)) is not None:
        return *found[:2], met + found[2]
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


def _dual_bound_of_one(
    problem: Problem, cuts: Sequence[tuple[float, np.ndarray]]
) -> tuple[float, np.ndarray, list[np.ndarray]] | None:
    """The same for a single limit, without an LP: the next multiplier is where the two cuts that bracket the optimum meet.

    None where no cut falls: every choice met is above the limit.
    """
    over = [(damage, float(cost[0])) for damage, cost in cuts if cost[0] > 1]
    under = [(damage, float(cost[0])) for damage, cost in cuts if cost[0] <= 1]
    if not over or not under:
        return None
    left, right = min(over), min(under)  # damage + m·(cost - 1): rising and falling in m
    best, multiplier, met = -np.inf, 0.0, []
    for _ in range(ROUNDS):
        at = max(0.0, (right[0] - left[0]) / (left[1] - right[1]))
        upper = left[0] + at * (left[1] - 1)
        picks = problem.choose(np.array([at]))
        damage, cost = problem.totals(picks)
        value = damage + at * float(cost[0] - 1)
        if value > best:
            best, multiplier = value, at
        if upper - value <= TOLERANCE * max(abs(upper), 1e-12):
            break
        met.append(picks)
        if cost[0] > 1:
            left = damage, float(cost[0])
        else:
            right = damage, float(cost[0])
    return best, np.array([multiplier]), met


def fill_in(problem: Problem, picks: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Improves one layer at a time, best damage per priced cost first, until nothing more fits.

    Lazily (Minoux 1978): a layer's best move waits in a queue, and is looked for again only when it comes up and no longer fits.
    """
    picks = picks.copy()
    room = FITS - problem.totals(picks)[1]
    prices = np.tensordot(multipliers, problem.costs, axes=1)

    def best_move(layer: int) -> list[tuple[float, int, int]]:
        current = picks[layer]
        gain = problem.damage[layer, current] - problem.damage[layer]
        extra = problem.costs[:, layer] - problem.costs[:, layer, current, None]  # [K, N]
        options = np.flatnonzero((extra <= room[:, None]).all(axis=0) & (gain > 0))
        if len(options) == 0:
            return []
        rate = gain[options] / np.maximum(prices[layer, options] - prices[layer, current], 1e-12)
        found = int(np.argmax(rate))
        return [(-float(rate[found]), layer, int(options[found]))]

    while True:
        queue = [move for layer in range(len(picks)) for move in best_move(layer)]
        if not queue:
            return picks
        heapq.heapify(queue)
        while queue:
            _, layer, option = heapq.heappop(queue)
            extra = problem.costs[:, layer, option] - problem.costs[:, layer, picks[layer]]
            if (extra <= room).all():
                picks[layer] = option
                room = room - extra
            for move in best_move(layer):
                heapq.heappush(queue, move)


def exchange(problem: Problem, picks: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Moves two layers at once, one of them down so that the other can go up, while that lowers the damage.

    Where few layers share a budget the greedy fill-in leaves a remainder that no single move can use; this spends it. Of every
    layer the options nearest in price to its current one are tried.
    """
    picks, rows = picks.copy(), np.arange(len(picks))
    price = np.where(np.isfinite(problem.damage), np.tensordot(multipliers, problem.costs, axes=1), np.inf)
    window = max(2, min(price.shape[1], MOVES // len(picks)))
    while True:
        _, used = problem.totals(picks)
        distance = np.abs(price - price[rows, picks][:, None])
        options = np.argpartition(distance, window - 1, axis=1)[:, :window].ravel()
        layers = np.repeat(rows, window)
        delta = problem.damage[layers, options] - problem.damage[layers, picks[layers]]
        extra = problem.costs[:, layers, options] - problem.costs[:, layers, picks[layers]]  # [K, M]
        down = np.flatnonzero((delta > 0) & np.isfinite(delta) & (extra < 0).any(axis=0))
        up = np.flatnonzero(delta < 0)
        total = delta[down][:, None] + delta[up]
        fits = (used[:, None, None] + extra[:, down][:, :, None] + extra[:, up][:, None, :] <= FITS).all(axis=0)
        better = fits & (layers[down][:, None] != layers[up]) & (total < -1e-9 * np.abs(delta[up]))
        if not better.any():
            return picks
        i, j = np.unravel_index(np.argmin(np.where(better, total, np.inf)), total.shape)
        for move in (down[i], up[j]):
            picks[layers[move]] = options[move]


def solve(problem: Problem) -> tuple[np.ndarray, float]:
    """(options [L], lower bound) of a problem.

    Raises:
        Infeasible: no choice of options meets all limits at once.
    """
    count = len(problem.costs)
    everything_dense = np.argmin(problem.damage, axis=1)
    if problem.fits(everything_dense):
        return everything_dense, problem.totals(everything_dense)[0]
    usable = np.isfinite(problem.damage)
    prices = [*np.eye(count), *(np.full((1, count), 1 / count) if count > 1 else [])]
    cheapest = [np.argmin(np.where(usable, np.tensordot(p, problem.costs, axes=1), np.inf), axis=1) for p in prices]
    starts = [everything_dense, *cheapest]
    if not any(map(problem.fits, cheapest)):
        starts.append(_any_feasible(problem))
    bound, multipliers, met = dual_bound(problem, starts)
    feasible = sorted(filter(problem.fits, met), key=lambda picks: problem.totals(picks)[0])
    filled = [fill_in(problem, picks, multipliers) for picks in feasible[:3]]
    best = min(filled, key=lambda picks: problem.totals(picks)[0])
    for improve, enough in ((exchange, GOOD_GAP), (_among_the_few, FAIR_GAP)):
        if problem.totals(best)[0] - bound > enough * abs(bound):
            best = fill_in(problem, improve(problem, best, multipliers), multipliers)
    return best, bound


def _among_the_few(problem: Problem, picks: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """The best choice among the options whose reduced cost leaves room for a better one than `picks`; often a few per layer.

    Bounded by nodes of the search, not by time, so that the same problem has the same answer on a slower machine.
    """
    reduced = problem.damage + np.tensordot(multipliers, problem.costs, axes=1)
    least_reduced = reduced.min(axis=1, keepdims=True)
    room = problem.totals(picks)[0] - (float(least_reduced.sum()) - float(multipliers.sum()))
    few = reduced - least_reduced <= room
    restricted = Problem(np.where(few, problem.damage, np.inf), np.where(few, problem.costs, 0.0))
    found, _ = by_milp(restricted.damage, restricted, 1.0, SEARCH_SECONDS, nodes=NODES)
    better = found is not None and problem.fits(found) and problem.totals(found)[0] < problem.totals(picks)[0]
    return found if better and found is not None else picks


def _any_feasible(problem: Problem) -> np.ndarray:
    """A choice within all limits, where neither cost's cheapest choice nor their mean's is one.

    Raises:
        Infeasible: there is none.
    """
    picks = least(problem.costs.sum(axis=0), problem, SEARCH_SECONDS)
    if picks is None:
        raise Infeasible("No plan under these layer rules is within all budgets at once.")
    return picks


Solver = Callable[[Problem], tuple[np.ndarray, float]]
"""A problem -> (options [L], lower bound)."""


def allocate_plan(
    curves: Curves,
    budgets: Sequence[Budget],
    *,
    weights: Mapping[str, float] | None = None,
    damage: Damage = WITHOUT_DATA,
    allowed: Mapping[str, Sequence[str]] | None = None,
    model: str | None = None,
    solver: Solver = solve,
) -> Allocation:
    """The plan of least weighted damage within every budget.

    Args:
        weights: layer name -> factor on its damage (1 where missing): how much the prediction is corrected.
        damage: what every option is predicted to cost; left out, -log of the kept energy.
        allowed: layer name -> lowerings it may take besides dense (all of its options where missing).
        solver: `solve`, or `exact.solve_exactly` with a time limit.

    Raises:
        UsageError: the budgets cannot be met; the text names the smallest value that can.
    """
    limits = limits_of(curves, budgets)
    problem, columns = _poser(curves, damage).pose(limits, weights=weights or {}, allowed=allowed or {})
    try:
        picks, bound = solver(problem)
    except Infeasible:
        raise UsageError(_why_infeasible(curves, budgets, problem)) from None
    chosen = {
        member.layer.name: int(option)
        for row, index, pick in zip(curves.rows, columns, picks, strict=True)
        for member, option in zip(row.members, row.picks[index[pick]], strict=True)
    }
    total = problem.totals(picks)[0]
    allocation = Allocation(curves.plan(chosen, model), total, bound)
    return replace(allocation, plan=replace(allocation.plan, gap=allocation.gap))


@lru_cache(maxsize=16)
def _poser(curves: Curves, damage: Damage) -> Poser:
    """One per curves and damage, by identity: a search poses hundreds of problems over the same ones."""
    return Poser(curves, damage)


def _why_infeasible(curves: Curves, budgets: Sequence[Budget], problem: Problem) -> str:
    """Which of several budgets keeps the others from being met, by how much, and the smallest value that could be met."""
    dense, limits = curves.dense, limits_of(curves, budgets)
    bounded = np.flatnonzero(np.isfinite(limits)).tolist()
    sentences = []
    for budget in budgets:
        axis = bounded.index(COSTS[budget.cost].axis)
        picks = least(problem.costs[axis], problem, SEARCH_SECONDS, free=axis)
        if picks is None:
            continue
        layers = round(problem.totals(picks)[1][axis] * limits[bounded[axis]])
        low, full = curves.value(budget.cost, layers), cost_value(dense, budget.cost)
        sentences.append(
            f"With the others kept, the smallest {budget.cost} is {shown(budget.cost, low)} ({percent_above(low, full)}%), "
            f"{shown(budget.cost, low - budget.limit(dense))} above the budget {budget}."
        )
    return " ".join(
        [
            f"No plan is within {' and '.join(map(str, budgets))} at once.",
            *sentences,
            "Or allow more layers and lowerings.",
        ]
    )
