"""`ranksearch.allocate`: from a model and budgets to a plan, without a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ranksearch.allocate.baselines import BASELINES, random
from ranksearch.allocate.budget import Budgets, assignments, parse_budget
from ranksearch.allocate.curve_making import rank_curves
from ranksearch.allocate.damage import MEASURES, USUAL_MEASURE
from ranksearch.allocate.exact import solve_exactly
from ranksearch.allocate.greedy import greedy, measure_scores
from ranksearch.allocate.latency import timed
from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.allocate.sensitivity import SENSITIVITIES, USUAL_SENSITIVITY, weigh
from ranksearch.allocate.solver import Solver, allocate_plan, solve
from ranksearch.calibration.drawn import SummedLoss
from ranksearch.compress import RankPlan, reestimate_bn_, trace
from ranksearch.compress.surgery import compress
from ranksearch.deploy.latency_table import LatencyTable
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import default_lowerings, expand_families
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.bare import bare

SOLVERS: dict[str, Solver] = {"solver": solve, "milp": partial(solve_exactly, time_limit=60.0)}
METHODS = (*SOLVERS, *BASELINES, "greedy")


def allocate(
    model: nn.Module,
    example_input: Any,
    budgets: Budgets,
    *,
    lowerings: Sequence[str] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    rules: Sequence[LayerRule] = (),
    rank_multiple: int = 1,
    method: str = "solver",
    sensitivity: str | None = None,
    measure: str = USUAL_MEASURE,
    calibration: Sequence[Any] = (),
    loss: SummedLoss | None = None,
    weightings: Mapping[str, Weighting] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    latency: LatencyTable | None = None,
    seed: int = 0,
) -> RankPlan:
    """The plan of least predicted damage within `budgets`; `plan.gap` says how far from the least it can be at most.

    Args:
        example_input: a batched input tensor, a tuple of arguments or a dict of keyword arguments (a `BatchEncoding`).
        budgets: such as {"flops": "50%", "size": "1.2MiB"}, "flops=50%" or ["flops=50%", "size=1.2MiB"].
        lowerings: names of the allowed lowerings or of families of them; all but the opt-in ones (`cp`, square tiles) where None.
        include, exclude: name patterns of the layers that may be lowered.
        rules: what holds for some layers: their lowerings, smallest rank, rank multiple, one ratio for all of them.
        rank_multiple: every rank is a multiple of this, as hardware that computes in tiles wants it.
        method: "solver" (milliseconds, within a fraction of a percent of the optimum), "milp" (the optimum to 0.01 %, or the best that
            a minute allows), or a baseline: "uniform", "energy", "minimax", "evbmf", "stable_rank", "random", or "greedy", which
            evaluates the net nine times a layer with `score`.
        sensitivity: what weighs a layer's error: "none" (the weights alone), or with `calibration` "activation", "fisher", "kfac",
            "kfac_balanced" (every class counts alike). Left out, "kfac" with `calibration` and "none" without.
        measure: damage as a function of the share that a layer loses, "log_kept_energy" or "relative_energy".
        calibration: batches of inputs as the model takes them, a list; "greedy" re-estimates BN statistics on them.
        loss: output of the model -> sum of the samples' losses, for "fisher" and "kfac"; left out, cross-entropy against labels drawn
            from the model's own prediction, or, for a model with one output, the squared error against that plus noise.
        weightings: layer -> the metric of its data (`ranksearch.weightings`) in which errors are measured; give `compress` the same ones.
        score: net -> figure of merit, higher is better.
        latency: for a budget on it, such as `LatencyTable(Stopwatch(LatencySetting("eager", batch=1, threads=1)))`; what it lacks is
            measured here.
        seed: seeds the drawn labels and positions, and "random".

    Raises:
        UsageError: an unknown name, a pattern that matches nothing, data that is missing, or a budget that cannot be met.
    """
    model = bare(model)
    sensitivity = sensitivity or (USUAL_SENSITIVITY if calibration else "none")
    for what, name, valid in (
        ("allocation method", method, METHODS), ("damage measure", measure, MEASURES), ("sensitivity", sensitivity, SENSITIVITIES),
    ):  # fmt: skip
        if name not in valid:
            raise UsageError(f"There is no {what} {name!r}. {nearest(name, valid)}")
    net = trace(model, example_input)
    found = LayerRules(
        expand_families(lowerings or default_lowerings(timed=latency is not None)),
        tuple(include),
        tuple(exclude),
        tuple(rules),
        rank_multiple,
    )
    found.check(net)
    curves = rank_curves(model, net, found, weightings=weightings)
    if latency is not None:
        curves = timed(curves, model, example_input, latency, lambda text: None)
    parsed = [parse_budget(*text.partition("=")[::2]) for text in assignments(budgets)]

    def chosen() -> RankPlan:
        if method in SOLVERS:
            damage = weigh(
                curves, model, calibration, sensitivity, MEASURES[measure], seed=seed, loss=loss, weightings=weightings
            )
            return allocate_plan(curves, parsed, damage=damage, solver=SOLVERS[method]).plan
        if method == "random":
            return random(curves, parsed, seed=seed)
        if method == "greedy":
            if score is None:
                raise UsageError(
                    "The method 'greedy' evaluates the net: give it score, a function from a net to a number."
                )
            return greedy(curves, parsed, scores=measure_scores(curves, partial(_scored, model, score, calibration)))
        return BASELINES[method](curves, parsed)

    return replace(chosen(), example_input=example_input)


def _scored(model: nn.Module, score: Callable[[nn.Module], float], calibration: Sequence[Any], plan: RankPlan) -> float:
    """The score of `model` under `plan`, its BN statistics made anew where there is data for it."""
    small = compress(model, plan).eval()
    if calibration and next(plan.lowered(), None) is not None:
        reestimate_bn_(small, calibration)
    return float(score(small))
