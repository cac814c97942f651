"""The front that allocation alone predicts: plans over a range of budgets by several allocators, scored without any training.

Every plan is decomposed, gets fresh BN statistics and is scored on the validation images: what a user sees within a minute, before a
cluster is asked for hours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from ranksearch.allocate import BASELINES, Budget, allocate_plan, cost_value, greedy, measure_scores
from ranksearch.allocate.curves import Curves
from ranksearch.allocate.damage import Damage
from ranksearch.compress import Cost, RankPlan
from ranksearch.costs import ratio_of
from ranksearch.errors import UsageError, nearest
from ranksearch.pareto import nondominated
from ranksearch.search.budgets import budgets_of
from ranksearch.search.scorer import Scorer
from ranksearch.search.workbench import Workbench
from ranksearch.space.space import Space
from ranksearch.tasks import model_reference
from ranksearch.training.evaluate import Evaluation
from ranksearch.trial.metric import Metric
from ranksearch.words import COST_RATIOS, Log

ALLOCATORS = ("solver", *BASELINES, "greedy")
DEFAULT_ALLOCATORS = ("solver", "uniform", "energy", "minimax")
LEVELS = (75, 60, 50, 35, 25)
"""Budgets in percent of the dense net's cost, beside the space's own."""
BN_BATCHES = 5
"""Fewer than in a trial: five batches of 128 saturate."""

Allocator = Callable[[Curves, Sequence[Budget]], RankPlan]


@dataclass(frozen=True)
class Level:
    """Budgets of the range: the space's own, scaled so that the first one is `percent` of the dense net's cost."""

    percent: float
    budgets: tuple[Budget, ...]


def levels_of(space: Space, curves: Curves, percents: Sequence[float], log: Log) -> list[Level]:
    """The space's own level and the others of `percents`, falling; levels below the smallest plan are left out, and said.

    Raises:
        UsageError: no level can be met.
    """
    own = budgets_of(space, curves)
    dense, smallest = curves.dense, curves.smallest()
    full = cost_value(dense, own[0].cost)
    own_percent = _own_level(space, curves)
    found = {own_percent: Level(own_percent, tuple(own))} if own_percent is not None and own_percent < 100 else {}
    for percent in percents:
        factor = Decimal(percent) / 100 * full / own[0].limit(dense)
        budgets = tuple(_scaled(budget, factor, dense) for budget in own)
        if any(abs(percent - other) < 1 for other in found):
            continue
        if too_small := [b for b in budgets if b.limit(dense) < smallest[b.cost]]:
            low = smallest[too_small[0].cost] / cost_value(dense, too_small[0].cost)
            log(f"{percent:g} % is left out: no plan has less than {100 * low:.1f} % of the {too_small[0].cost}")
        else:
            found[percent] = Level(percent, budgets)
    if not found:
        raise UsageError(f"None of the levels {', '.join(f'{p:g}' for p in percents)} can be met: raise --levels.")
    return [found[percent] for percent in sorted(found, reverse=True)]


def _scaled(budget: Budget, factor: Decimal, dense: Cost) -> Budget:
    full = cost_value(dense, budget.cost)
    limit = min(int(factor * budget.limit(dense)), full)
    return Budget(budget.cost, Decimal(limit), relative=False, text=f"{100 * limit / full:.4g}%")


def measured_greedy(bench: Workbench, images: int, batch_size: int, log: Log) -> Callable[..., RankPlan]:
    """AIMET's allocator with its scores, measured on training images: the validation images are for the comparison."""
    train = bench.task.train.first(images)
    scorer = Scorer(
        bench.task, bench.dense_model(), train, bn_batches=2, batch_size=batch_size, weightings=bench.weightings
    )

    def tell(done: int, total: int) -> None:
        if done % 20 == 0 or done == total:
            log(f"greedy: {done} of {total} evaluations on {len(train)} training images")

    sign = 1 if bench.task.direction == "maximize" else -1
    scores = measure_scores(bench.curves, lambda plan: sign * scorer(plan).accuracy, tell)
    return partial(greedy, scores=scores)


def check_names(allocators: Sequence[str]) -> None:
    """Raises UsageError for an allocator that there is not."""
    for name in allocators:
        if name not in ALLOCATORS:
            raise UsageError(f"There is no allocator {name!r}. {nearest(name, ALLOCATORS)}")


def preview_rows(
    space: Space, bench: Workbench, levels: Sequence[Level], allocators: Sequence[str], *, images: int, log: Log
) -> Iterator[dict[str, Any]]:
    """One row per level and allocator as it is scored; an allocator that has no plan at a level gives no row, which is logged."""
    val = bench.task.val.first(images)
    batch_size = space.recipe.batch_size
    scorer = Scorer(
        bench.task, bench.dense_model(), val, bn_batches=BN_BATCHES, batch_size=batch_size, weightings=bench.weightings
    )
    reference, dense = model_reference(space.task, space.model), bench.curves.dense
    known: dict[str, Evaluation] = {}

    def make(name: str) -> Allocator:
        if name == "solver":
            return lambda curves, budgets: allocate_plan(curves, budgets, damage=bench.damage, model=reference).plan
        if name == "greedy":
            return partial(measured_greedy(bench, images, batch_size, log), model=reference)
        seed = {"seed": space.search.seed} if name == "random" else {}
        return partial(BASELINES[name], model=reference, **seed)

    makers = {name: make(name) for name in allocators}
    for level in levels:
        for name, allocator in makers.items():
            started = time.perf_counter()
            try:
                plan = allocator(bench.curves, level.budgets)
            except UsageError as error:
                log(f"{name} has no plan at {level.percent:g} %: {error}")
                continue
            seconds = time.perf_counter() - started
            cost, digest = bench.curves.cost(plan), plan.digest()
            known[digest] = known.get(digest) or scorer(plan)
            yield {
                "allocator": name, "level": round(level.percent, 4), "budgets": {b.cost: b.text for b in level.budgets},
                "val_accuracy": known[digest].accuracy, "val_loss": known[digest].loss, "macs": cost.macs, "params": cost.params,
                "size_bytes": cost.size_bytes, "macs_ratio": cost.macs / dense.macs, "params_ratio": cost.params / dense.params,
                "size_ratio": cost.size_bytes / dense.size_bytes, "latency_predicted_ms": cost.latency_ms,
                "latency_ratio": ratio_of("latency", cost, dense), "predicted_damage": damage_of(bench.curves, bench.damage, plan),
                "gap": plan.gap, "allocation_seconds": round(seconds, 4), "plan": plan.to_dict(),
            }  # fmt: skip


def _own_level(space: Space, curves: Curves) -> float | None:
    """The space's first budget in percent of the dense net's cost; None where it has no budget."""
    if not space.budgets:
        return None
    first, dense = budgets_of(space, curves)[0], curves.dense
    return 100 * first.limit(dense) / cost_value(dense, first.cost)


def damage_of(curves: Curves, damage: Damage, plan: RankPlan) -> float:
    """Predicted damage of a whole plan."""
    return sum(float(damage(o)[o.choices.index(plan[o.layer.name])]) for o in curves.layers)


def preview_record(
    space: Space, bench: Workbench, rows: list[dict[str, Any]], dense: Evaluation, *, images: int, seconds: float
) -> dict[str, Any]:
    """What `preview --json` prints and `preview.json` holds: every plan, and which of them no other betters."""
    cost = budgets_of(space, bench.curves)[0].cost
    ratio = COST_RATIOS[cost]
    metric, search = Metric.of(bench.task, dense.accuracy), bench.settled(space).search
    best = nondominated([[-metric.share(row["val_accuracy"]), row[ratio]] for row in rows])
    full = bench.curves.dense
    return {
        "space": space.name, "task": space.task, "model": space.model, "metric": metric.to_dict(), "cost": cost, "cost_ratio": ratio,
        "objectives": list(search.objectives), "own_level": _own_level(space, bench.curves),
        "budgets": {name: str(text) for name, text in space.budgets.items()},
        "sensitivity": search.sensitivity, "measure": search.measure, "seed": search.seed,
        "images": min(images, len(bench.task.val)), "bn_batches": BN_BATCHES, "seconds": round(seconds, 1),
        "dense": {
            "val_accuracy": dense.accuracy, "val_loss": dense.loss, "macs": full.macs, "params": full.params,
            "size_bytes": full.size_bytes, "latency_ms": full.latency_ms,
        },
        "layers": bench.layer_facts(),
        "plans": [row | {"on_front": bool(on)} for row, on in zip(rows, best, strict=True)],
    }  # fmt: skip
