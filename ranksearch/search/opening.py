"""The trials that open a study: the classics, so that the search can only improve on them, and the fronts of earlier studies.

The solver's uncorrected optimum at several levels of the budgets, one uniform ratio, an energy threshold, minimax.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ranksearch.allocate import BASELINES, Budget, Curves
from ranksearch.compress import RankPlan
from ranksearch.errors import UsageError
from ranksearch.search.allocated import PREDICTION, Allocated
from ranksearch.search.budgets import at_level, budgets_of, has_levels, lowest_level, violations
from ranksearch.search.optuna_private import holds
from ranksearch.search.parametrize import Form, Opening
from ranksearch.space.search import RULES
from ranksearch.space.settings import Choices, is_whole
from ranksearch.space.space import Space
from ranksearch.tasks import model_reference
from ranksearch.trial.recipe import flattened, searched_settings

SOLVER, WARM = "solver", "warm start"
CLASSICS = ("solver", "uniform", "energy", "minimax")
"""What opens a study whose space does not say it, and whose baselines were not scored before; a `direct` one opens with nothing."""
BY_PARAMETERS = ("nsga2", "nsga3", "gp")
"""Samplers that model only what all complete trials have in common: plans without parameters would leave them nothing to model."""
LEVELS = (1.0, 0.0, 0.5, 0.25, 0.75)
"""Levels of the solver's first points, as shares of the way from the lowest level to the budgets themselves; the first ones first."""

LEVELS_ABOVE_A_LIMIT = (1.0, 0.5)
"""The same where the metric has a limit: no trial is spent far below it, the sampler goes down from here."""


def first_points(space: Space, curves: Curves, form: Form, known: Allocated, *, scored: bool = False) -> list[Opening]:
    """The trials that open the study, half of the planned ones at most: the first classic, then the plans of earlier studies, then the
    other classics. Where earlier fronts hold more plans than fit, these are evenly spread over them.

    For the samplers `BY_PARAMETERS` plans that no parameters of the form lead to (baselines in an allocated search) are left out.

    Args:
        known: the default form, whose neutral point is the solver's uncorrected optimum, whatever `form` the study searches in.
        scored: whether the baselines were held against the solver before, without training: those that kept up are among what `known`
            predicts by, and training the others would tell nothing new.
    """
    names = space.search.first_points
    if names is None:
        names = [] if not isinstance(form, Allocated) else [SOLVER] if scored else list(CLASSICS)
    classics, room = [*_classics(space, curves, form, known, names)], max(1, space.search.trials // 2)
    warm = _distinct([*_warm(space, curves, form)])
    if space.search.sampler in BY_PARAMETERS:
        classics, warm = (
            [p for p in points if p.params.keys() >= form.distributions.keys()] for points in (classics, warm)
        )
    spread = _spread(warm, max(1, room - len(classics[:1])))
    return _distinct([*classics[:1], *spread, *classics[1:]])[:room]


def _spread(points: Sequence[Opening], count: int) -> list[Opening]:
    """`count` of them, evenly, the first and the last among them."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / max(1, count - 1))] for i in range(count)]


def _classics(space: Space, curves: Curves, form: Form, known: Allocated, names: Sequence[str]) -> Iterator[Opening]:
    """The solver at the budgets, at the lowest level and half-way, then the first baseline, the solver again, the other baselines."""
    settled = searched_settings(space.recipe)
    shares = LEVELS if space.quality is None else LEVELS_ABOVE_A_LIMIT
    levels = [_level(space, curves, share) for share in shares] if has_levels(space) else [1.0]
    if not space.budgets and has_levels(space):
        levels = levels[1:]  # without a budget the optimum at level 1 is the dense net
    solver = [_solver(level, form, known, settled) for level in levels] if SOLVER in names else []
    rivals = [_rival(name, level, form, known, settled) for name in known.predictions[1:] for level in levels[:2]]
    # a baseline is compared with the solver at one and the same level
    budgets = at_level(budgets_of(space, curves), 1.0 if space.budgets else _level(space, curves, 0.5), curves)
    others = [o for name in names if name != SOLVER for o in _baseline(name, space, curves, budgets, form, settled)]
    if SOLVER not in names:
        rivals = []
    if rivals:  # one plan by two predictions is one trial
        opened = {_digest(opening, known) for opening in solver}
        rivals = [rival for rival in rivals if _digest(rival, known) not in opened]
    yield from [*solver[:2], *rivals[:2], *solver[2:3], *others[:1], *rivals[2:], *solver[3:], *others[1:]]


def _digest(opening: Opening, known: Allocated) -> str:
    return (opening.plan or known.plan(opening.params)).digest()


def _level(space: Space, curves: Curves, share: float) -> float:
    low = lowest_level(space, curves)
    return low + share * (1 - low)


def _solver(level: float, form: Form, known: Allocated, settled: dict[str, Any]) -> Opening:
    values = known.neutral(level)
    leading = values.get(PREDICTION)
    allocator = leading if leading in RULES else SOLVER
    if isinstance(form, Allocated):
        return Opening(settled | values, allocator)
    return _given(known.plan(values), allocator, form, settled)


def _rival(name: str, level: float, form: Form, known: Allocated, settled: dict[str, Any]) -> Opening:
    """Another prediction that competes, at a level at which the first one is tried."""
    values = known.neutral(level) | {PREDICTION: name}
    allocator = name if name in RULES else SOLVER
    if isinstance(form, Allocated):
        return Opening(settled | values, allocator)
    return _given(known.plan(values), allocator, form, settled)


def _baseline(
    name: str, space: Space, curves: Curves, budgets: Sequence[Budget], form: Form, settled: dict[str, Any]
) -> Iterator[Opening]:
    try:
        plan = BASELINES[name](curves, budgets, model_reference(space.task, space.model))
    except UsageError:
        return  # this rule has no plan within the budgets; the others open the study
    yield _given(plan, name, form, settled)


def _given(plan: RankPlan, allocator: str, form: Form, settled: dict[str, Any]) -> Opening:
    params = form.params_of(plan)
    return Opening(settled | (params or {}), allocator, plan)


def _warm(space: Space, curves: Curves, form: Form) -> Iterator[Opening]:
    """The plans of earlier fronts that lie within the budgets and the layer rules, with what of their recipe is searched here.

    Raises:
        UsageError: no front there, or one of another net.
    """
    dense, budgets = curves.dense, budgets_of(space, curves)
    for where in space.search.warm_start:
        for row in read_front(where):
            plan = _plan_of(row, where)
            if not _fits(plan, curves, where):
                continue
            if max(violations(budgets, curves.cost(plan), dense).values()) > 0:
                continue
            settled = searched_settings(space.recipe)
            recipe = dict(flattened(row.get("recipe") or {}))
            settled |= {k: recipe[k] for k in settled if k in recipe and _possible(space, k, recipe[k])}
            params = {k: v for k, v in (row.get("params_searched") or {}).items() if k in form.distributions}
            same_form = set(params) == set(form.distributions) and _leads_to(form, params, plan)
            if same_form:
                yield Opening(settled | params, WARM)
            else:
                yield _given(plan, WARM, form, settled)


def read_front(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a front file: a study's `front.json`, or what `ranksearch front NAME --json` printed.

    Raises:
        UsageError: it is no front.
    """
    try:
        rows = json.loads(Path(path).read_text())["trials"]
        for row in rows:
            parts = [row["plan"], row.get("recipe") or {}, row.get("params_searched") or {}]
            if not all(isinstance(part, dict) for part in parts):
                raise TypeError("a trial's plan, recipe or params_searched is no mapping")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"warm start: {path} is no front of a study: {error}") from error
    return rows


def _plan_of(row: dict[str, Any], where: str) -> RankPlan:
    try:
        return RankPlan.from_dict(row["plan"])
    except UsageError as error:
        raise UsageError(f"warm start: {where}: {error}") from error


def _fits(plan: RankPlan, curves: Curves, where: str) -> bool:
    """Whether the layer rules allow every choice of `plan`; UsageError where it is a plan of another net."""
    options = {o.layer.name: o for o in curves.layers}
    strange = [name for name in plan.layers if name not in options]
    if strange:
        raise UsageError(f"warm start: the front in {where} is of another net: this one has no layer {strange[0]!r}.")
    return all(plan[name] in options[name].choices for name in plan.layers)


def _possible(space: Space, name: str, value: Any) -> bool:
    """Whether a searched setting of the recipe can take `value`."""
    setting: Any = space.recipe
    *parents, last = name.split(".")
    for part in parents:
        setting = getattr(setting, part)
    whole = is_whole(type(setting).model_fields[last])
    setting = getattr(setting, last)
    if isinstance(setting, Choices):
        return value in setting.choices
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and setting.low <= value <= setting.high and (not whole or value == int(value))


def _leads_to(form: Form, params: dict[str, Any], plan: RankPlan) -> bool:
    try:
        possible = all(holds(found, params[name]) for name, found in form.distributions.items())
        return possible and form.plan(params).digest() == plan.digest()
    except (UsageError, ValueError, TypeError):
        return False


def _distinct(openings: Sequence[Opening]) -> list[Opening]:
    """Without those that were there before: the same plan under the same parameters."""
    found: dict[str, Opening] = {}
    for opening in openings:
        plan = opening.plan.digest() if opening.plan is not None else ""
        found.setdefault(plan + json.dumps(dict(opening.params), sort_keys=True, default=str), opening)
    return list(found.values())
