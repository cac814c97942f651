"""The default parametrization: Optuna searches corrections around the optimum of a good prediction, never raw ranks.

A suggestion is a factor per group of layers on its predicted damage (1 = trust the prediction), the lowerings a group may take,
the budgets' level (where a front is asked for) and the recipe. The solver turns it into a plan within every budget, so no trial
is spent on an infeasible one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import exp, log
from typing import Any

import optuna

from ranksearch.allocate import BASELINES, Budget, Curves, Damage, allocate_plan
from ranksearch.allocate.budget import cost_value
from ranksearch.compress import RankPlan, dense_cost
from ranksearch.search.recipe import Recipe, searched_settings
from ranksearch.search.settings import Choices, Range, Scalar
from ranksearch.search.space import Space
from ranksearch.tasks import model_reference

ANY = "any"


@dataclass(frozen=True)
class Suggestion:
    """A plan within the budgets and the recipe to train it by; `allocator` says who made the plan."""

    plan: RankPlan
    recipe: Recipe
    allocator: str


def group_of(name: str, grouping: str) -> str:
    """The group of a layer: its first name for "stage", itself for "layer", one for "all"."""
    return {"stage": name.split(".")[0], "layer": name, "all": "all"}[grouping]


def groups_of(curves: Curves, grouping: str) -> dict[str, list[str]]:
    """Group -> names of its layers that have something to choose."""
    groups: dict[str, list[str]] = {}
    for options in curves.layers:
        if len(options.choices) > 1:
            groups.setdefault(group_of(options.layer.name, grouping), []).append(options.layer.name)
    return groups


def _lowerings_of(curves: Curves, names: Sequence[str]) -> list[str]:
    found = {c.lowering for o in curves.layers if o.layer.name in names for c in o.choices if c.rank}
    return sorted(found)


def at_level(budgets: Sequence[Budget], level: float, curves: Curves) -> list[Budget]:
    """The budgets lowered to `level` of themselves, but not below the smallest plan; level 1 leaves them exactly alone."""
    if level >= 1:
        return list(budgets)
    dense, smallest = dense_cost(curves.net), curves.smallest()
    return [
        Budget(
            b.cost,
            Decimal(max(int(level * b.limit(dense)), smallest[b.cost])),
            relative=False,
            text=f"{b} x {level:.3f}",
        )
        for b in budgets
    ]


def budgets_of(space: Space, curves: Curves) -> list[Budget]:
    """The space's budgets; where it has none, the dense net's own cost, so that the front has a range to be searched in."""
    budgets = space.parsed_budgets()
    if budgets:
        return budgets
    cost = next((name for name in space.search.objectives if name != "accuracy"), "macs")
    full = cost_value(dense_cost(curves.net), cost)
    return [Budget(cost, Decimal(full), relative=False, text=str(full))]


def _suggest_recipe(trial: optuna.Trial, space: Space) -> Recipe:
    def draw(name: str, setting: Range | Choices, whole: bool) -> Scalar:
        if isinstance(setting, Choices):
            return trial.suggest_categorical(name, setting.choices)
        if whole:
            return trial.suggest_int(name, int(setting.low), int(setting.high), log=setting.log)
        return trial.suggest_float(name, setting.low, setting.high, log=setting.log)

    return Recipe.settled(space.recipe, draw)


def suggest(trial: optuna.Trial, space: Space, curves: Curves, damage: Damage) -> Suggestion:
    """Draws a suggestion; a trial enqueued with the attribute `allocator` takes that classic plan without corrections.

    Raises:
        UsageError: no plan lies within the budgets under the drawn lowerings.
    """
    allocator = trial.user_attrs.get("allocator", "search")
    level = 1.0
    if len(space.search.objectives) > 1 and space.search.front_from < 1:
        level = trial.suggest_float("level", space.search.front_from, 1.0)
    recipe = _suggest_recipe(trial, space)
    budgets = at_level(budgets_of(space, curves), level, curves)
    reference = model_reference(space.task, space.model)
    if allocator in BASELINES:
        return Suggestion(BASELINES[allocator](curves, budgets, reference), recipe, allocator)
    weights: dict[str, float] = {}
    allowed: dict[str, list[str]] = {}
    spread = log(space.search.weight_range)
    for group, names in groups_of(curves, space.search.groups).items():
        if spread > 0:
            weight = exp(trial.suggest_float(f"log_weight/{group}", -spread, spread))
            weights |= dict.fromkeys(names, weight)
        lowerings = _lowerings_of(curves, names)
        if space.search.search_lowerings and len(lowerings) > 1:
            choice = trial.suggest_categorical(f"lowering/{group}", [ANY, *lowerings])
            if choice != ANY:
                allowed |= {name: [choice] for name in names}
    allocation = allocate_plan(curves, budgets, weights=weights, damage=damage, allowed=allowed, model=reference)
    return Suggestion(allocation.plan, recipe, allocator)


def first_points(space: Space, curves: Curves) -> list[tuple[dict[str, Any], str]]:
    """(parameters, allocator) of the trials that open the study: the classics, as far as half of the trials allows.

    The solver's uncorrected optimum at the budget comes first, then the first baseline, then, where a front is asked for, the solver
    half-way down, the other baselines, and the solver at the lowest level.
    """
    settled = searched_settings(space.recipe)
    neutral: dict[str, Any] = {}
    for group, names in groups_of(curves, space.search.groups).items():
        neutral |= {f"log_weight/{group}": 0.0}
        if space.search.search_lowerings and len(_lowerings_of(curves, names)) > 1:
            neutral |= {f"lowering/{group}": ANY}
    low = space.search.front_from
    has_levels = len(space.search.objectives) > 1 and low < 1
    points: list[tuple[dict[str, Any], str]] = []

    def add(allocator: str, level: float) -> None:
        corrections = neutral if allocator == "solver" else {}
        points.append((settled | corrections | ({"level": level} if has_levels else {}), allocator))

    solver = "solver" in space.search.first_points
    others = [name for name in space.search.first_points if name != "solver"]
    if solver:
        add("solver", 1.0)
    for allocator in others[:1]:
        add(allocator, 1.0)
    if solver and has_levels:
        add("solver", (1 + low) / 2)
    for allocator in others[1:]:
        add(allocator, 1.0)
    if solver and has_levels:
        add("solver", low)
    return points[: max(1, space.search.trials // 2)]


def check_feasible_space(space: Space, curves: Curves) -> Mapping[str, tuple[int, int]]:
    """Cost -> (smallest, dense) value; raises UsageError where the budgets cannot be met, alone or together."""
    allocate_plan(curves, budgets_of(space, curves))
    smallest, dense = curves.smallest(), dense_cost(curves.net)
    return {cost: (smallest[cost], cost_value(dense, cost)) for cost in ("macs", "params", "size")}
