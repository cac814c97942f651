"""Running a study's trials: one attempt, what becomes of its result, and the plain loop in this process.

`cluster/tune.py` does the same on Ray.
"""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from ranksearch.compress import Net
from ranksearch.errors import StudyError
from ranksearch.search.checkpoint import CheckpointFile
from ranksearch.search.front import Row
from ranksearch.search.metric import Metric
from ranksearch.search.proposals import Candidate
from ranksearch.search.study import Study
from ranksearch.search.trial import RUNG, Report, Stopped, TrialResult, run_trial
from ranksearch.search.workbench import Workbench
from ranksearch.tasks.dense import State
from ranksearch.tasks.task import Task

OnRow = Callable[[Row], None]
Log = Callable[[str], None]
T = TypeVar("T")
GIVE_UP_AFTER = 3
"""A study stops where its first trials, this many, all failed: the rest would fail too."""
JUDGED_FROM = 10
"""Trials from which on the share of failures counts."""
NO_SPACE = "no space"
FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_SECONDS, LOOK_SECONDS = 600.0, 5.0
"""How long a result that the disk has no room for is held until somebody makes some, and how often that is tried."""


def attempt(
    task: Task, dense: State, net: Net, candidate: Candidate, *, report: Report, checkpoint_seconds: float
) -> TrialResult:
    """Runs a trial; an exception becomes a result with its reason, so that one bad trial does not end a study."""
    checkpoint = CheckpointFile(candidate.checkpoint, checkpoint_seconds)
    try:
        return run_trial(
            task, dense, net, candidate.plan, candidate.recipe, seed=candidate.seed, report=report, save_to=candidate.save_to,
            checkpoint=checkpoint, rungs=candidate.rungs, latency=candidate.latency,
        )  # fmt: skip
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()[-6:]
        status = NO_SPACE if isinstance(error, OSError) and error.errno in FULL else "failed"
        return TrialResult(status, candidate.seed, 0.0, reason="\n".join([f"{type(error).__name__}: {error}", *lines]))


class Driver:
    """Asks the study for candidates and settles their results; ends the study where going on makes no sense."""

    def __init__(self, study: Study, bench: Workbench, on_row: OnRow, log: Log) -> None:
        self._study, self._bench, self._on_row, self._log = study, bench, on_row, log
        self._before = study.counts  # failures of an earlier run do not end this one

    def ask(self) -> Candidate | None:
        """The next trial; None where there is none for now.

        Raises:
            StudyError: not a single proposal was feasible, or the disk is full.
        """
        return self._patiently(lambda: self._study.ask(self._bench), "no trial is begun")

    def settle(self, number: int, result: TrialResult) -> None:
        """Records a result; where the disk is full it waits for room before it gives up.

        Raises:
            StudyError: too large a share of the trials failed, or the disk is full.
        """
        if result.status == NO_SPACE:
            raise StudyError(
                f"No space is left for trial {number}'s net or state; it is run again. {self._resume_hint()}"
            )
        self._on_row(self._patiently(lambda: self._study.tell(number, result), f"the result of trial {number} is held"))
        self._check_failures()

    def _patiently(self, action: Callable[[], T], meanwhile: str) -> T:
        """Does what writes to the study's folder, again and again where that cannot be written."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return action()
            except OSError as error:
                if time.monotonic() > until:
                    raise StudyError(
                        f"{self._study.folder} cannot be written ({error}). {self._resume_hint()}"
                    ) from error
                self._log(f"{self._study.folder} cannot be written ({error.strerror}): make room; {meanwhile}")
                time.sleep(LOOK_SECONDS)

    def _resume_hint(self) -> str:
        done = self._study.finished
        return f"{done} finished trials are kept: make room, then `ranksearch resume {self._study.space.name}` goes on."

    def _check_failures(self) -> None:
        counts = {status: n - self._before.get(status, 0) for status, n in self._study.counts.items()}
        total, failed = sum(counts.values()), counts.get("failed", 0) + counts.get("diverged", 0)
        allowed = self._study.space.search.max_failures
        early = total >= min(GIVE_UP_AFTER, self._study.planned) and counts.get("failed", 0) == total
        if not early and not (total >= JUDGED_FROM and failed > allowed * total):
            return
        last = [row["reason"] for row in self._study.rows if row["status"] in ("failed", "diverged")][-1]
        what = (
            f"All of the first {total} trials failed"
            if early
            else f"{failed} of {total} trials failed or diverged, more than search.max_failures={allowed:g} allows"
        )
        raise StudyError(f"{what}. The last reason: {last}")


def run_inline(study: Study, bench: Workbench, on_row: OnRow, log: Log) -> None:
    """Runs what is left of the study one trial after the other, with every core of this machine.

    Raises:
        StudyError: too many trials fail, or the disk is full.
    """
    task, driver = bench.task.without_test(), Driver(study, bench, on_row, log)
    while (candidate := driver.ask()) is not None:
        result = attempt(
            task, bench.dense, bench.net, candidate, report=_stopper(study, candidate.number),
            checkpoint_seconds=study.space.resources.checkpoint_seconds,
        )  # fmt: skip
        driver.settle(candidate.number, result)


def _stopper(study: Study, number: int) -> Report:
    """A trial's report: at a rung it hears whether it goes on."""

    def report(entry: dict[str, Any]) -> None:
        if entry["phase"] == RUNG and not study.goes_on(number, entry["rung"], entry["val_accuracy"]):
            raise Stopped(stop_reason(entry, study.metric))

    return report


def stop_reason(entry: dict[str, Any], metric: Metric) -> str:
    """What a trial's record says of its end at a rung."""
    return f"fell behind at step {entry['step']}: {metric.text(entry['val_accuracy'])}"
