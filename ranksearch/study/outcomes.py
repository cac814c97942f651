"""What becomes of a trial's result: its record in the journal, and what Optuna is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import optuna
from optuna.trial import TrialState

from ranksearch.compress import Cost
from ranksearch.front.front import objective_values
from ranksearch.front.row import row_of
from ranksearch.search.optuna_private import storage_of
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import Status, TrialResult


def record_of(result: TrialResult, cost: Cost) -> dict[str, Any]:
    """A result as the journal keeps it, with its plan's `cost`, which is known even for trials that did not end well.

    A complete trial without a finite metric counts as diverged.
    """
    accuracy = result.val_accuracy
    finite = accuracy is not None and isfinite(accuracy)
    return {
        **result.to_dict(), "status": Status.DIVERGED if result.status is Status.COMPLETE and not finite else result.status,
        "macs": cost.macs, "params": cost.params, "size_bytes": cost.size_bytes, "latency_predicted_ms": cost.latency_ms,
    }  # fmt: skip


def tell_optuna(
    study: optuna.Study, trial_id: int, dense: Mapping[str, Any], metric: Metric, objectives: Sequence[str]
) -> None:
    """Tells Optuna the result in a trial's attributes, unless it was told already; `dense` is as in `study.json`."""
    trial = storage_of(study).get_trial(trial_id)
    if trial.state != TrialState.RUNNING:
        return
    row = row_of(trial, dense, metric)
    if row.complete:
        study.tell(trial.number, objective_values(row, objectives))
    else:
        study.tell(trial.number, state=TrialState.PRUNED if row.status is Status.STOPPED else TrialState.FAIL)
