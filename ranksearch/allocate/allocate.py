"""`ranksearch.allocate`: from a model and budgets to a plan, without a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ranksearch.allocate.baselines import BASELINES
from ranksearch.allocate.budget import parse_budget
from ranksearch.allocate.curves import MEASURES, rank_curves
from ranksearch.allocate.exact import solve_exactly
from ranksearch.allocate.rules import LayerRules
from ranksearch.allocate.solver import Solver, allocate_plan, solve
from ranksearch.compress import RankPlan, trace
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import default_lowerings, expand_families

SOLVERS: dict[str, Solver] = {"solver": solve, "milp": partial(solve_exactly, time_limit=60.0)}


def allocate(
    model: nn.Module,
    example_input: Any,
    budgets: Mapping[str, object],
    *,
    lowerings: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    method: str = "solver",
    measure: str = "log_kept_energy",
) -> RankPlan:
    """The plan of least predicted damage within `budgets`, from the weights alone (no data, no training).

    Args:
        example_input: a batched input tensor, or a tuple of them.
        budgets: cost -> limit, such as {"flops": "50%", "size": "1.2MiB"}.
        lowerings: names of the allowed lowerings or of families of them; all but the opt-in ones (`cp`, square tiles) where None.
        include, exclude: name patterns of the layers that may be lowered.
        method: "solver" (milliseconds, within a fraction of a percent of the optimum), "milp" (the optimum to 0.01 %, or the best that
            a minute allows), or a classic baseline: "uniform", "energy", "minimax".
        measure: damage measure of the solver, "log_kept_energy" or "relative_energy".

    Raises:
        UsageError: an unknown name, a pattern that matches nothing, or a budget that cannot be met.
    """
    if method not in (*SOLVERS, *BASELINES):
        raise UsageError(f"There is no allocation method {method!r}. {nearest(method, [*SOLVERS, *BASELINES])}")
    if measure not in MEASURES:
        raise UsageError(f"There is no damage measure {measure!r}. {nearest(measure, MEASURES)}")
    net = trace(model, example_input)
    rules = LayerRules(expand_families(lowerings or default_lowerings()), tuple(include), tuple(exclude))
    rules.check(net)
    curves = rank_curves(model, net, rules)
    parsed = [parse_budget(cost, text) for cost, text in budgets.items()]
    if method in SOLVERS:
        return allocate_plan(curves, parsed, measure=MEASURES[measure], solver=SOLVERS[method]).plan
    return BASELINES[method](curves, parsed)
