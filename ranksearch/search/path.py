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
from ranksearch.tasks.dense import State

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


def nested_opening(space: Space, bench: Workbench) -> Opening:
    """The trial that opens a nested study: the nested run, whose own plan is its largest level."""
    return Opening({}, NESTED_RUN, nested_path(space, bench.curves, bench.damage)[-1])


def with_weights(space: Space, bench: Workbench, weights: State, log: Log) -> Workbench:
    """The workbench of the same net with other weights: curves and predictions are theirs, times of layers stay.

    Args:
        space: one that leaves nothing open about how plans are predicted.
    """
    model = bench.task.dense_model()
    model.load_state_dict(weights)
    fresh = rank_curves(model.eval(), bench.net, space.layers.as_rules())
    layers = tuple(
        replace(options, latency=before.latency)
        for options, before in zip(fresh.layers, bench.curves.layers, strict=True)
    )
    curves = replace(bench.curves, layers=layers)
    damage, rivals, _ = predicted_damage(space, bench.task, model, curves, {}, log)
    return replace(bench, dense=weights, curves=curves, damage=damage, rivals=rivals)
