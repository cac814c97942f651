"""The path of a nested run: the plans that are trained at once, and the workbench of what came of it."""

from __future__ import annotations

from dataclasses import replace

from ranksearch.allocate import Curves, Damage, allocate_plan, rank_curves
from ranksearch.compress import RankPlan
from ranksearch.errors import UsageError
from ranksearch.search.budgets import at_level, budgets_of
from ranksearch.search.parametrize import Opening
from ranksearch.search.workbench import Log, Workbench, predicted_damage
from ranksearch.space.space import Space
from ranksearch.tasks import model_reference
from ranksearch.training.dense import State
from ranksearch.training.device import pick_device
from ranksearch.trial.recipe import spread_recipes

NESTED_RUN = "nested"
"""Who made the plan of the nested run: its largest level."""


def is_nested(space: Space) -> bool:
    """Whether one run trains all plans of the study."""
    return space.search.strategy == "nested"


def nested_path(space: Space, curves: Curves, damage: Damage) -> tuple[RankPlan, ...]:
    """The solver's plans from `front_from` of the budgets up to the budgets, all different, the smallest first.

    A layer keeps the lowering that it has at the middle level where that can be: then its ranks alone differ, and they share a basis.

    Raises:
        UsageError: the budgets cannot be met.
    """
    budgets, reference = budgets_of(space, curves), model_reference(space.task, space.model)

    def solved(level: float, allowed: dict[str, list[str]]) -> RankPlan:
        return allocate_plan(
            curves, at_level(budgets, level, curves), damage=damage, allowed=allowed, model=reference
        ).plan

    low, count = space.search.front_from, space.search.nested.levels
    levels = [low ** (1 - i / (count - 1)) for i in range(count)]
    kept = {name: [choice.lowering] for name, choice in solved(low**0.5, {}).lowered()}
    plans: dict[str, RankPlan] = {}
    for level in levels:
        try:
            plan = solved(level, kept)
        except UsageError:
            plan = solved(level, {})
        plans.setdefault(plan.digest(), plan)
    return tuple(plans.values())


def nested_openings(space: Space, bench: Workbench) -> list[Opening]:
    """The trials that open a nested study: its nested runs, whose own plan is the largest level.

    The first has the recipe's defaults. The others have recipes spread over what is searched of it (a Latin hypercube): they run side by
    side, so that none could learn of another.

    Raises:
        UsageError: there are not so many different recipes.
    """
    plan, runs = nested_path(space, bench.curves, bench.damage)[-1], space.search.nested.runs
    if runs == 1:
        return [Opening({}, NESTED_RUN, plan)]
    recipes = spread_recipes(space.recipe, runs, space.search.seed)
    if len(recipes) < runs:
        raise UsageError(
            f"search.nested.runs {runs}: there are {len(recipes)} different recipes to run and no more. Give the recipe a range, "
            f"such as recipe.lr: {{low: 0.005, high: 0.05, log: true}}, or set search.nested.runs={len(recipes)}."
        )
    return [Opening(recipe, NESTED_RUN, plan) for recipe in recipes]


def with_weights(space: Space, bench: Workbench, weights: State, log: Log) -> Workbench:
    """The workbench of the same net with other weights: curves and predictions are theirs, times of layers stay.

    Args:
        space: one that leaves nothing open about how plans are predicted.
    """
    model = bench.task.dense_model()
    model.load_state_dict(weights)
    fresh = rank_curves(model.eval(), bench.net, space.layers.as_rules(), device=pick_device())
    layers = tuple(
        replace(options, latency=before.latency)
        for options, before in zip(fresh.layers, bench.curves.layers, strict=True)
    )
    curves = replace(bench.curves, layers=layers)
    damage, rivals, _ = predicted_damage(space, bench.task, model, curves, {}, log)
    return replace(bench, dense=weights, curves=curves, damage=damage, rivals=rivals)
