"""The default form: Optuna searches corrections around the optimum of a good prediction, never raw ranks.

Where several predictions came close to each other before the first trial (`predicting.py`), which of them makes the plan is searched, too.
A suggestion is a factor per group of layers on its predicted damage (1 = trust the prediction), how far the measured sensitivities are
trusted at all, the lowerings that a group may take, and the budgets' level where a front is asked for. The solver turns it into a
plan within every budget, so no trial is spent on an infeasible one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import exp, log
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from ranksearch.allocate import BASELINES, Curves, Damage, allocate_plan
from ranksearch.compress import RankPlan
from ranksearch.search.budgets import at_level, budgets_of, has_levels, lowest_level
from ranksearch.search.groups import grouping_of, groups_of
from ranksearch.search.parametrize import LEVEL, distribution
from ranksearch.space.search import RULES
from ranksearch.space.settings import Choices, Range, middle_of
from ranksearch.space.space import Space
from ranksearch.tasks import model_reference

ANY, TRUST, PREDICTION = "any", "trust", "prediction"


class Allocated:
    """Corrections around the solver's optimum."""

    def __init__(
        self, space: Space, curves: Curves, damage: Damage, rivals: Mapping[str, Damage] | None = None
    ) -> None:
        """
        Args:
            rivals: sensitivity -> damage, of the space's `predictions` that are no rules.
        """
        self._search, self._curves, self._damage, self._rivals = space.search, curves, damage, rivals or {}
        self.predictions = [n for n in space.search.predictions or () if n in self._rivals or n in RULES]
        """What competes at making plans, the preferred one first; no more than one where nothing competes."""
        self._budgets = budgets_of(space, curves)
        self._levels, self._lowest = has_levels(space), lowest_level(space, curves)
        self._reference = model_reference(space.task, space.model)
        self._groups = groups_of(curves, grouping_of(space))

    @cached_property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {}
        if self._levels:
            found[LEVEL] = FloatDistribution(self._lowest, 1.0)
        if len(self.predictions) > 1:
            found[PREDICTION] = CategoricalDistribution(self.predictions)
        scaled = self._damage.scales or any(damage.scales for damage in self._rivals.values())
        if scaled and isinstance(self._search.trust, Range | Choices):
            found[TRUST] = distribution(self._search.trust, whole=False)
        spread = log(self._search.weight_range)
        for group, names in self._groups.items():
            if spread > 0:
                found[f"log_weight/{group}"] = FloatDistribution(-spread, spread)
            lowerings = self._lowerings(names)
            if self._search.search_lowerings and len(lowerings) > 1:
                found[f"lowering/{group}"] = CategoricalDistribution([ANY, *lowerings])
        return found

    def _lowerings(self, names: Sequence[str]) -> list[str]:
        return sorted({c.lowering for o in self._curves.layers if o.layer.name in names for c in o.choices if c.rank})

    def neutral(self, level: float = 1.0) -> dict[str, Any]:
        """The parameters of the uncorrected optimum at a level of the budgets."""
        values: dict[str, Any] = {}
        for name in self.distributions:
            if name == LEVEL:
                values[name] = level
            elif name == PREDICTION:
                values[name] = self.predictions[0]
            elif name == TRUST:  # a parameter only where it is a distribution
                values[name] = middle_of(self._search.trust)
            else:
                values[name] = 0.0 if name.startswith("log_weight/") else ANY
        return values

    def plan(self, values: Mapping[str, Any]) -> RankPlan:
        """The solver's plan under these corrections: a layer's damage is weighted by scale^(trust - 1) times its group's factor.

        A rule that competes with the solver knows the budgets alone: its plan is taken as it is.
        """
        budgets = at_level(self._budgets, values.get(LEVEL, 1.0), self._curves)
        prediction = values.get(PREDICTION)
        if prediction in RULES:
            return BASELINES[prediction](self._curves, budgets, self._reference)
        damage = self._damage if prediction is None else self._rivals[prediction]
        fixed = self._search.trust if isinstance(self._search.trust, int | float) else 1.0
        trust = float(values.get(TRUST, fixed))
        weights = {name: scale ** (trust - 1) for name, scale in damage.scales.items() if scale > 0}
        allowed: dict[str, list[str]] = {}
        for group, names in self._groups.items():
            factor = exp(values.get(f"log_weight/{group}", 0.0))
            weights |= {name: factor * weights.get(name, 1.0) for name in names}
            if (lowering := values.get(f"lowering/{group}", ANY)) != ANY:
                allowed |= {name: [lowering] for name in names}
        return allocate_plan(
            self._curves, budgets, weights=weights, damage=damage, allowed=allowed, model=self._reference
        ).plan

    def params_of(self, plan: RankPlan) -> dict[str, Any] | None:
        """Always None, since many corrections, or none at all, lead to a given plan."""
