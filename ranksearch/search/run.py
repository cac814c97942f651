"""Running a study's trials: one attempt, and the plain loop over them in this process. `ray_tune.py` does the same on Ray."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable

from ranksearch.compress import Net
from ranksearch.errors import StudyError, UsageError
from ranksearch.search.checkpoint import CheckpointFile
from ranksearch.search.front import Row
from ranksearch.search.study import Candidate, Study
from ranksearch.search.trial import Report, TrialResult, run_trial
from ranksearch.search.workbench import Workbench
from ranksearch.tasks.dense import State
from ranksearch.tasks.task import Task

OnRow = Callable[[Row], None]
CONNECT_SECONDS = 10
GIVE_UP_AFTER = 3
"""A study stops where its first trials, this many, all failed: the rest would fail too."""


def check_address(address: str | None) -> None:
    """Raises UsageError for a Ray address that nothing answers at: Ray itself would go on trying for minutes.

    "auto" (or None) is left to Ray, which fails at once where this machine is part of no cluster.
    """
    if address in (None, "auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"--address {address}: expected auto or HOST:PORT, such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--address {address}: no Ray cluster answers there ({error}); is `ray start --head` running?"
        ) from error


def attempt(
    task: Task, dense: State, net: Net, candidate: Candidate, *, report: Report, checkpoint_seconds: float
) -> TrialResult:
    """Runs a trial; an exception becomes a result with its reason, so that one bad trial does not end a study."""
    checkpoint = CheckpointFile(candidate.checkpoint, checkpoint_seconds)
    try:
        return run_trial(
            task, dense, net, candidate.plan, candidate.recipe,
            seed=candidate.seed, report=report, save_to=candidate.save_to, checkpoint=checkpoint,
        )  # fmt: skip
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()[-6:]
        return TrialResult(
            "failed", candidate.seed, 0.0, reason="\n".join([f"{type(error).__name__}: {error}", *lines])
        )


def check_not_hopeless(study: Study) -> None:
    """Raises StudyError where every trial so far failed, and they are enough to tell."""
    rows = study.trials
    if len(rows) >= min(GIVE_UP_AFTER, study.planned) and all(row["status"] == "failed" for row in rows):
        raise StudyError(f"All of the first {len(rows)} trials failed. The last one: {rows[-1]['reason']}")


def run_inline(study: Study, bench: Workbench, on_row: OnRow) -> None:
    """Runs what is left of the study one trial after the other, with every core of this machine.

    Raises:
        StudyError: the first trials all fail.
    """
    task = bench.task.without_test()
    while (candidate := study.ask(bench)) is not None:
        result = attempt(
            task, bench.dense, bench.net, candidate,
            report=lambda metrics: None, checkpoint_seconds=study.space.resources.checkpoint_seconds,
        )  # fmt: skip
        on_row(study.tell(candidate.number, result))
        check_not_hopeless(study)
