"""The plain form: a lowering and a rank ratio per group of layers, drawn by Optuna itself. The baseline that the default must beat.

Nothing keeps a suggestion within the budgets; a plan outside them is told as infeasible, with its violation, and not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from ranksearch.allocate import Curves
from ranksearch.allocate.curves import LayerOptions
from ranksearch.compress import DENSE, LayerPlan, RankPlan
from ranksearch.search.groups import grouping_of, groups_of
from ranksearch.space.space import Space
from ranksearch.tasks import model_reference


class Direct:
    """`lowering/G` and `ratio/G` for every group G (a layer each, unless the space says otherwise).

    A ratio in 0..1 is that share of the largest rank that saves MACs or params: 1 is the last rank before break-even.
    """

    def __init__(self, space: Space, curves: Curves) -> None:
        self._curves, self._reference = curves, model_reference(space.task, space.model)
        self._groups = groups_of(curves, grouping_of(space))
        self._options = {options.layer.name: options for options in curves.layers}

    @cached_property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {}
        for group, names in self._groups.items():
            found[f"lowering/{group}"] = CategoricalDistribution(self._lowerings(names))
            found[f"ratio/{group}"] = FloatDistribution(0.0, 1.0)
        return found

    def _lowerings(self, names: Sequence[str]) -> list[str]:
        known = dict.fromkeys(lowering for name in names for lowering in self._options[name].lowerings)
        return [*sorted(known), DENSE.lowering]

    def plan(self, values: Mapping[str, Any]) -> RankPlan:
        picks = dict.fromkeys(self._options, 0)
        for group, names in self._groups.items():
            lowering, ratio = values[f"lowering/{group}"], values[f"ratio/{group}"]
            if lowering != DENSE.lowering:
                picks |= {name: _at_ratio(self._options[name], lowering, ratio) for name in names}
        return self._curves.plan(self._curves.tied(picks), self._reference)

    def params_of(self, plan: RankPlan) -> dict[str, Any] | None:
        values: dict[str, Any] = {}
        for group, names in self._groups.items():
            choice = plan[names[0]]
            values[f"lowering/{group}"] = choice.lowering
            values[f"ratio/{group}"] = _ratio_of(self._options[names[0]], choice)
            if choice.lowering not in self._lowerings(names):
                return None
        return values if self.plan(values).digest() == plan.digest() else None


def _at_ratio(options: LayerOptions, lowering: str, ratio: float) -> int:
    ladder = options.ladder(lowering)
    return ladder[min(int(ratio * len(ladder)), len(ladder) - 1)]


def _ratio_of(options: LayerOptions, choice: LayerPlan) -> float:
    """The middle of the ratios that lead to `choice`; .5 where none does (a dense layer, a rank off the ladder)."""
    ladder = options.ladder(choice.lowering) if choice.lowering != DENSE.lowering else []
    ranks = [options.choices[i].rank for i in ladder]
    return (ranks.index(choice.rank) + 0.5) / len(ranks) if choice.rank in ranks else 0.5
