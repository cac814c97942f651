"""The nested runs of a study: which trials they are, how good each is, and the one whose weights its plans are cut from."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from ranksearch.search.local_tpe import INTERRUPTED
from ranksearch.search.path import NESTED_RUN
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import Status


def ended_runs(study: optuna.Study) -> list[FrozenTrial]:
    """The nested runs that ended, well or not; a run that was interrupted is run again and has not ended."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished()
        and trial.user_attrs.get("candidate", {}).get("allocator") == NESTED_RUN
        and trial.user_attrs.get("outcome") != INTERRUPTED
    ]


def level_score(trial: FrozenTrial) -> float | None:
    """The mean metric of the levels that were scored at a run's end; None for a run that left no weights."""
    result: dict[str, Any] = trial.user_attrs.get("result", {})
    if result.get("status") != Status.COMPLETE:
        return None
    levels = [entry for entry in result["history"] if "macs_ratio" in entry]
    last = [entry["val_accuracy"] for entry in levels if entry["step"] == levels[-1]["step"]]
    return mean(last) if last else result["val_accuracy"]


def best_run(runs: Sequence[FrozenTrial], metric: Metric) -> FrozenTrial | None:
    """The run whose levels have the best mean; None if no run left weights.

    Levels are compared rather than the run's own net, which is only its largest level.
    """
    scored = [(metric.share(score), -run.number, run) for run in runs if (score := level_score(run)) is not None]
    return max(scored)[2] if scored else None


def runs_record(study: optuna.Study, metric: Metric) -> dict[str, Any] | None:
    """The nested runs for a front's record: the `trial` that plans are cut from, and the `scores` by trial, None for diverged runs."""
    runs = ended_runs(study)
    best = best_run(runs, metric)
    return (
        None if best is None else {"trial": best.number, "scores": {str(run.number): level_score(run) for run in runs}}
    )
