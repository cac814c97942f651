"""Budgets: upper bounds on costs, relative (`50%` of dense) or absolute (`20M`, `1.2MiB`); several may hold at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from ranksearch.compress import Cost
from ranksearch.costs import COSTS
from ranksearch.errors import UsageError, nearest


@dataclass(frozen=True)
class Budget:
    """An upper bound on one cost: `value` in percent of dense where `relative`, else in units (FLOPs, MACs, bytes, nanoseconds)."""

    cost: str
    value: Decimal
    relative: bool
    text: str

    def __str__(self) -> str:
        return f"{self.cost}={self.text}"

    def limit(self, dense: Cost) -> int:
        """The largest allowed value in whole units of the cost (FLOPs, MACs, parameters, bytes or nanoseconds)."""
        return int(self.value * cost_value(dense, self.cost) / 100) if self.relative else int(self.value)

    def allows(self, cost: Cost, dense: Cost) -> bool:
        return cost_value(cost, self.cost) <= self.limit(dense)


def cost_value(cost: Cost, name: str) -> int:
    """The cost `name` in its own unit; `flops` are 2 x MACs, latency is in whole nanoseconds.

    Raises:
        UsageError: it was not measured.
    """
    value = COSTS[name].of(cost)
    if value is None:
        raise UsageError(f"{name.capitalize()} was not measured: {COSTS[name].unmeasured}.")
    return value


def shown(cost: str, value: int) -> str:
    """A cost's value in words, such as `1,258,291` or `3.512 ms`, rounded up, so that a budget of it is met."""
    return COSTS[cost].written(value)


def parse_budget(cost: str, text: object) -> Budget:
    """Reads a budget such as ("flops", "50%"), ("macs", "20M") or ("size", "1.2MiB").

    Raises:
        UsageError: an unknown cost or unit, a value that is no positive number, a bare fraction.
    """
    if cost not in COSTS:
        raise UsageError(f"There is no cost {cost!r} to set a budget on. {nearest(cost, COSTS)}")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*(%|[A-Za-z]*)\s*", str(text))
    if match is None:
        raise UsageError(f"Budget {cost}={text}: expected a number and a unit, such as {COSTS[cost].example}.")
    value, unit = Decimal(match[1]), match[2]
    if value <= 0:
        raise UsageError(f"Budget {cost}={text}: it must be above 0.")
    if unit == "%":
        return Budget(cost, value, relative=True, text=str(text).strip())
    units = COSTS[cost].units
    if not unit and unit not in units:
        raise UsageError(f"Budget {cost}={text}: the unit is missing, such as {COSTS[cost].example}.")
    if unit not in units:
        raise UsageError(f"Budget {cost}={text}: unknown unit {unit!r}. {nearest(unit, ['%', *filter(None, units)])}")
    if not unit and value <= 1:
        raise UsageError(f"Budget {cost}={text}: a share is written in percent, {cost}={value * 100:f}%.")
    return Budget(cost, value * units[unit], relative=False, text=str(text).strip())


Budgets = str | Mapping[str, object] | Sequence[str]
"""Budgets as one may write them: "flops=40%", ["flops=40%", "size=1MiB"] or {"flops": "40%"}."""


def assignments(budgets: Budgets) -> list[str]:
    """Returns every budget as "cost=limit", however they were written.

    Raises:
        UsageError: they are neither text, a mapping of costs to limits, nor a sequence of texts.
    """
    if isinstance(budgets, str):
        return [part.strip() for part in budgets.split(",")]
    if isinstance(budgets, Mapping):
        return [f"{cost}={limit}" for cost, limit in budgets.items()]
    if not isinstance(budgets, Sequence) or not all(isinstance(budget, str) for budget in budgets):
        raise UsageError(f'budgets: expected "flops=50%", a list of such, or {{"flops": "50%"}}, got {budgets!r:.80}.')
    return list(budgets)


def check_feasible(budgets: Iterable[Budget], smallest: dict[str, int], dense: Cost) -> None:
    """Raises UsageError where a budget lies below the smallest reachable cost; the text names that value."""
    for budget in budgets:
        limit, full = budget.limit(dense), cost_value(dense, budget.cost)
        low = smallest[budget.cost]
        if low > limit:
            raise UsageError(
                f"Budget {budget} allows {shown(budget.cost, limit)} of {shown(budget.cost, full)} {budget.cost}, but no plan under these "
                f"layer rules costs less than {shown(budget.cost, low)} ({percent_above(low, full)}%), {shown(budget.cost, low - limit)} "
                f"more: raise it to that, or allow more layers and lowerings."
            )


def percent_above(value: int, full: int) -> str:
    """`value` in percent of `full`, rounded up to a digit, so that a budget of it is met."""
    return f"{-(-value * 1000 // full) / 10}"
