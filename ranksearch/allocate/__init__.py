"""Choosing a plan: rank curves, budgets, layer rules, the solver, the classic baselines.

Calling the package is `allocate(model, example_input, budgets)`.
"""

from ranksearch._callable import make_callable
from ranksearch.allocate.baselines import BASELINES
from ranksearch.allocate.budget import Budget, cost_value, parse_budget
from ranksearch.allocate.curve_cache import CurveCache
from ranksearch.allocate.curve_making import rank_curves
from ranksearch.allocate.curves import Curves
from ranksearch.allocate.damage import MEASURES, Damage
from ranksearch.allocate.greedy import greedy, measure_scores
from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.allocate.sensitivity import SENSITIVITIES, weigh, weigh_several
from ranksearch.allocate.solver import Allocation, allocate_plan
from ranksearch.costs import COSTS, CostKind

make_callable(__name__, "ranksearch.allocate.allocate:allocate")

__all__ = [
    "BASELINES",
    "COSTS",
    "MEASURES",
    "SENSITIVITIES",
    "Allocation",
    "Budget",
    "CostKind",
    "CurveCache",
    "Curves",
    "Damage",
    "LayerRule",
    "LayerRules",
    "allocate_plan",
    "cost_value",
    "greedy",
    "measure_scores",
    "parse_budget",
    "rank_curves",
    "weigh",
    "weigh_several",
]
