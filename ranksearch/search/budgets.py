"""The budgets of a study: those of its space, at a level of themselves, and what can be met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from ranksearch.allocate import Budget, Curves, allocate_plan
from ranksearch.allocate.budget import cost_value
from ranksearch.compress import Cost
from ranksearch.space.space import Space


def has_levels(space: Space) -> bool:
    """Whether the budgets' level is searched: a front over a range of costs is asked for."""
    return len(space.search.objectives) > 1 and space.search.front_from < 1


def budgets_of(space: Space, curves: Curves) -> list[Budget]:
    """The space's budgets; where it has none, the dense net's own cost, so that the front has a range to be searched in."""
    budgets = space.parsed_budgets()
    if budgets:
        return budgets
    known = curves.smallest()
    cost = next((name for name in space.search.objectives if name in known), "macs")
    full = cost_value(curves.dense, cost)
    return [Budget(cost, Decimal(full), relative=False, text=str(full))]


REACHABLE = 1.2
"""The lowest level is at least this many times the smallest plan: near that there is nothing left to choose."""


def lowest_level(space: Space, curves: Curves) -> float:
    """The lowest level that is searched: the space's `front_from`, or a higher one where the smallest plan leaves no room there."""
    smallest, dense = curves.smallest(), curves.dense
    reach = min((smallest[b.cost] / b.limit(dense) for b in budgets_of(space, curves)), default=0.0)
    return max(space.search.front_from, min(REACHABLE * reach, (1 + reach) / 2))


def at_level(budgets: Sequence[Budget], level: float, curves: Curves) -> list[Budget]:
    """The budgets lowered to `level` of themselves, but not below the smallest plan; level 1 leaves them exactly alone."""
    if level >= 1:
        return list(budgets)
    dense, smallest = curves.dense, curves.smallest()
    return [
        Budget(
            b.cost,
            Decimal(max(int(level * b.limit(dense)), smallest[b.cost])),
            relative=False,
            text=f"{b} x {level:.3f}",
        )
        for b in budgets
    ]


def violations(budgets: Sequence[Budget], cost: Cost, dense: Cost) -> dict[str, float]:
    """Budget -> cost / limit - 1; at most 0 where it is kept (Optuna's sign)."""
    return {str(b): cost_value(cost, b.cost) / b.limit(dense) - 1 for b in budgets}


def check_feasible_space(space: Space, curves: Curves) -> Mapping[str, tuple[int, int]]:
    """Cost -> (smallest, dense) value; raises UsageError where the budgets cannot be met, alone or together."""
    allocate_plan(curves, budgets_of(space, curves))
    smallest, dense = curves.smallest(), curves.dense
    return {cost: (low, cost_value(dense, cost)) for cost, low in smallest.items() if cost != "flops"}
