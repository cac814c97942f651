"""Settles trials that a lost driver, or a lost Ray, left running in the journal, so that none is lost or run twice."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from optuna.trial import FrozenTrial, TrialState


def settle_orphans(
    trials: Sequence[FrozenTrial],
    running: Container[int],
    *,
    finish: Callable[[FrozenTrial], object],
    give_back: Callable[[FrozenTrial, bool], object],
) -> int:
    """Settles the trials that the journal calls running but that nobody runs; returns how many of them are proposed again.

    A trial whose result was written but not yet told is finished; one that has a plan, or was enqueued, is given back to be proposed
    again. A proposal that had not come so far is given up: the sampler makes it again.

    Args:
        running: numbers of the trials that somebody runs.
        give_back: called with a trial, and whether to enqueue it again.
    """
    again = 0
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    for frozen in [t for t in trials if t.state == TrialState.RUNNING and t.number not in running]:
        if "result" in frozen.user_attrs:
            finish(frozen)
            continue
        wanted = "candidate" in frozen.user_attrs or "fixed_params" in frozen.system_attrs
        give_back(frozen, wanted and frozen.number not in retried)
        again += wanted
    return again
