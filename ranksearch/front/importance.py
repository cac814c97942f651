"""Which searched parameters matter: their shares in what distinguishes the best trials from all, by Optuna's PED-ANOVA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna

from ranksearch.front.row import Row
from ranksearch.search.surrogate import above_parabola
from ranksearch.words import COST_RATIOS

FRONT, AT_COST = "reaching the front", "accuracy at its cost"
FEWEST = 12
"""With fewer complete trials nothing can be said."""
BEST = 0.25
"""Share of the trials that counts as the best."""


def importances(study: optuna.Study, rows: Sequence[Row], objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """Target -> parameter -> share, the largest first; empty with fewer than twelve complete trials.

    The targets are the front, if there are several objectives, and the accuracy above (or below) a parabola in log cost through all
    trials. Plain accuracy would only say that the budget's level matters, which is known.

    Reference: Watanabe, Bansal & Hutter 2023, arXiv 2304.10255 (PED-ANOVA).
    """
    complete = [row for row in rows if row.complete]
    if len(complete) < FEWEST:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # imports scikit-learn's forests

    above = dict(zip((row.trial for row in complete), accuracy_at_cost(complete, objectives).tolist(), strict=True))
    targets: dict[str, Callable[[Any], float] | None] = {FRONT: None} if len(objectives) > 1 else {}
    targets[AT_COST] = lambda trial: -above[trial.number]  # the least is the best
    found: dict[str, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is experimental
        for name, target in targets.items():
            evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
            found[name] = get_param_importances(study, evaluator=evaluator, target=target)
    return {name: shares for name, shares in found.items() if any(shares.values())}


def accuracy_at_cost(rows: Sequence[Row], objectives: Sequence[str]) -> np.ndarray:
    """How far the metrics of complete rows [n], as shares in percent, lie above a parabola in log cost through them."""
    accuracy = np.array([100 * row.worth for row in rows])
    costs = [name for name in objectives if name != "accuracy"]
    x = np.log([row[COST_RATIOS[costs[0]]] for row in rows]) if costs else np.zeros(len(rows))
    return above_parabola(x, accuracy, np.ones(len(rows)))
