"""The nested runs of a study: which trials they are, how good each is, and the one whose weights its plans are cut from."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from statistics import mean
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from ranksearch.search.local_tpe import INTERRUPTED
from ranksearch.search.path import NESTED_RUN
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import Status


def run_scores(study: optuna.Study, runs: int) -> dict[int, float | None]:
    """Trial -> score of the nested runs that ended, well or not (see `level_score`); a run that was interrupted is run again and has not.

    Args:
        runs: how many the study has, so that a long study is not looked through to its end.
    """
    ended = (
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished()
        and trial.user_attrs.get("candidate", {}).get("allocator") == NESTED_RUN
        and trial.user_attrs.get("outcome") != INTERRUPTED
    )
    return {trial.number: level_score(trial) for trial in islice(ended, runs)}


def level_score(trial: FrozenTrial) -> float | None:
    """The mean metric of the levels that were scored at a run's end; None for a run that left no weights."""
    result: dict[str, Any] = trial.user_attrs.get("result", {})
    if result.get("status") != Status.COMPLETE:
        return None
    levels = [entry for entry in result["history"] if "macs_ratio" in entry]
    last = [entry["val_accuracy"] for entry in levels if entry["step"] == levels[-1]["step"]]
    return mean(last) if last else result["val_accuracy"]


def best_run(scores: Mapping[int, float | None], metric: Metric) -> int | None:
    """The run whose levels have the best mean; None if no run left weights.

    Levels are compared rather than the run's own net, which is only its largest level.
    """
    shares = {number: metric.share(score) for number, score in scores.items() if score is not None}
    return max(shares, key=shares.__getitem__, default=None)
