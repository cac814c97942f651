"""Running a study's trials: what becomes of a result, and the plain loop in this process.

`cluster/tune.py` does the same on Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError

from ranksearch.errors import StudyError, first_line
from ranksearch.places.place import PlaceError
from ranksearch.search.workbench import Workbench
from ranksearch.study.row import Row
from ranksearch.study.study import Study
from ranksearch.study.verdict import commonest, mend
from ranksearch.trial.attempt import attempt
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import Status, TrialResult
from ranksearch.trial.session import RUNG, Report, Stopped

OnRow = Callable[[Row], None]
Log = Callable[[str], None]
T = TypeVar("T")
GIVE_UP_AFTER = 3
"""A study stops where its first trials, this many, all failed: the rest would fail too."""
UNSUCCESSFUL = (Status.FAILED, Status.DIVERGED)
JUDGED_FROM = 10
"""Trials from which on the share of failures counts."""
PATIENCE_SECONDS, LOOK_SECONDS = 600.0, 5.0
"""How long a result that the disk has no room for is held until somebody makes some, and how often that is tried."""
LOOKS = 4
"""How often, a second apart, a net is looked for that another node has written."""


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

    def settle(self, number: int, result: TrialResult, node: str | None = None) -> None:
        """Records a result, its net at home; where the disk is full it waits for room before it gives up.

        Args:
            node: where the trial ran, if that was another process, which may not see the folder that the driver sees.

        Raises:
            StudyError: too large a share of the trials failed, the disk is full, or the place of results is away.
        """
        if result.status == Status.NO_SPACE:
            raise StudyError(
                f"No space is left for trial {number}'s net or state; it is run again. {self._resume_hint()}"
            )
        if result.status == Status.NO_PLACE:
            first = (result.reason or "").splitlines()[0]
            raise StudyError(
                f"Trial {number}{f' on {node}' if node else ''} could not keep its net or state: {first}. It is run again: "
                f"`ranksearch resume {self._study.space.name}` goes on."
            )
        remote = self._study.results != self._study.folder
        if result.status == Status.COMPLETE and (remote or node is not None) and not self._brought_home(number):
            result = replace(result, status=Status.FAILED, reason=self._lost_net(node))
        self._on_row(self._patiently(lambda: self._study.tell(number, result), f"the result of trial {number} is held"))
        self._check_failures()

    def _brought_home(self, number: int) -> bool:
        """Whether a trial's net is in the study's folder now; a shared disk may take a moment to show what another node wrote."""
        for _ in range(LOOKS):
            if self._patiently(lambda: self._study.bring_home(number), f"the net of trial {number} is not fetched"):
                return True
            time.sleep(1.0)
        return False

    def _lost_net(self, node: str | None) -> str:
        return (
            f"{node or 'its process'} wrote its net to {self._study.results}, where the driver does not find it: that node does not share "
            f"this place. Put the studies on shared storage (--runs), or set storage.results"
        )

    def _patiently(self, action: Callable[[], T], meanwhile: str) -> T:
        """Does what writes to the study's folder, database or place of results, again and again where that refuses."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return action()
            except (OSError, StorageInternalError) as error:
                what, mend = self._refusal(error)
                if time.monotonic() > until:
                    raise StudyError(f"{what}. {self._resume_hint(mend)}") from error
                self._log(f"{what}: {mend}; {meanwhile}")
                time.sleep(LOOK_SECONDS)

    def _refusal(self, error: Exception) -> tuple[str, str]:
        """What refuses, and what is to be done about it."""
        if isinstance(error, PlaceError):
            return str(error), "it is tried again"
        if isinstance(error, StorageInternalError):
            first = first_line(error.__cause__ or error)
            return f"Optuna's database does not answer ({first})", "start it"
        return f"{self._study.folder} cannot be written ({error})", "make room"

    def _resume_hint(self, mend: str = "make room") -> str:
        done = self._study.finished
        return f"{done} finished trials are kept: {mend}, then `ranksearch resume {self._study.space.name}` goes on."

    def _check_failures(self) -> None:
        counts = {status: n - self._before.get(status, 0) for status, n in self._study.counts.items()}
        total, failed = sum(counts.values()), sum(counts.get(status, 0) for status in UNSUCCESSFUL)
        allowed = self._study.space.search.max_failures
        early = total >= min(GIVE_UP_AFTER, self._study.planned) and failed == total
        if not early and not (total >= JUDGED_FROM and failed > allowed * total):
            return
        found = commonest([row.reason or row.status.value for row in self._study.rows if row.status in UNSUCCESSFUL])
        what = (
            f"All of the first {total} trials failed or diverged"
            if early
            else f"{failed} of {total} trials failed or diverged, more than search.max_failures={allowed:g} allows"
        )
        raise StudyError(f"{what}. {found['alike']} of {found['count']}: {found['reason']}. {mend(found['reason'])}")


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
            watch=partial(study.note_step, candidate.number),
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
