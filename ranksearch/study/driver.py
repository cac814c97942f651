"""Running a study's trials: what becomes of a result, and the plain loop in this process.

`cluster/tune.py` does the same on Ray.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError

from ranksearch.errors import StudyError, first_line
from ranksearch.front.failures import mend
from ranksearch.front.row import Row
from ranksearch.places.place import PlaceError
from ranksearch.search.workbench import Workbench
from ranksearch.study.study import Study
from ranksearch.trial.attempt import attempt
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.metric import Metric
from ranksearch.trial.reporting import RUNG, Report, Stopped
from ranksearch.trial.result import Status, TrialResult
from ranksearch.words import Log

OnRow = Callable[[Row], None]
T = TypeVar("T")
GIVE_UP_AFTER = 3
"""A study stops if this many first trials all failed: the rest would fail too."""
UNSUCCESSFUL = (Status.FAILED, Status.DIVERGED)
JUDGED_FROM = 10
"""Number of trials from which on the share of failures counts."""
PATIENCE_SECONDS, LOOK_SECONDS = 600.0, 5.0
"""How long a result is held until the disk has room for it, and how often that is tried."""
ROOM = 8
"""A disk that was full must have room for this many nets of the dense one's size: a trial's state, its net, and temporary files."""
FULL_ELSEWHERE = 3
"""The study ends after this many trials in a row found some disk full while the study's own has room."""
LOOKS = 4
"""How often, a second apart, to look for a net that another node has written."""


class Driver:
    """Asks the study for candidates and settles their results; ends the study when going on makes no sense."""

    def __init__(self, study: Study, bench: Workbench, on_row: OnRow, log: Log) -> None:
        self._study, self._bench, self._on_row, self._log = study, bench, on_row, log
        self._before = study.counts  # failures of an earlier run do not end this one
        self._full_since: float | None = None
        """When a trial found no room for its files; None while there is room, as far as is known."""
        self._look_at = 0.0
        self._full_elsewhere = 0
        """Trials in a row that found some disk full while the study's own was not."""
        self._told_of_eager_steps = False

    def ask(self) -> Candidate | None:
        """The next trial; None if there is none for now.

        Once a trial has found the disk full, none is begun until there is room again (`waits_for_room`).

        Raises:
            StudyError: not a single proposal was feasible, or the disk is full.
        """
        return self._patiently(lambda: self._study.ask(self._bench), "no trial is begun")

    def settle(self, number: int, result: TrialResult, node: str | None = None) -> None:
        """Records a result once its net is in the study's folder; if the disk is full, waits for room before it gives up.

        Args:
            node: where the trial ran, if in another process, which may not see the folder that the driver sees.

        Raises:
            StudyError: too large a share of the trials failed, the disk is full, or the place of results cannot be reached.

        A trial that found no room for its files is no result: it is run again once there is some.
        """
        if result.status == Status.NO_SPACE:
            self._run_again_with_room(number, result.reason, node)
            return
        if result.status == Status.NO_PLACE:
            first = (result.reason or "").splitlines()[0]
            raise StudyError(
                f"Trial {number}{f' on {node}' if node else ''} could not keep its net or state: {first}. It is run again: "
                f"`ranksearch resume {self._study.space.name}` goes on."
            )
        self._full_elsewhere = 0
        remote = self._study.results != self._study.folder
        if result.status == Status.COMPLETE and (remote or node is not None) and not self._brought_home(number):
            result = replace(result, status=Status.FAILED, reason=self._lost_net(node))
        self._on_row(self._patiently(lambda: self._study.tell(number, result), f"the result of trial {number} is held"))
        self._tell_of_eager_steps(number, result)
        self._check_failures()

    def _tell_of_eager_steps(self, number: int, result: TrialResult) -> None:
        """Says once why a GPU's steps are made one by one, several times slower than they could be."""
        if result.eager is not None and not self._told_of_eager_steps:
            self._told_of_eager_steps = True
            self._log(
                f"trial {number:03d}: its training was not replayed from a recording, which would be several times faster: {result.eager}. "
                f"Later trials like it are not told of; the tag `eager` of a trial's run says why (docs/gpu.md)."
            )

    def _run_again_with_room(self, number: int, reason: str | None, node: str | None) -> None:
        """Gives back a trial that found a disk full. If it is the study's own disk, no trial is begun until it has room.

        Raises:
            StudyError: another disk, such as that of a node's temporary folder, stays full.
        """
        full = not has_room(self._study.folder, self._room_wanted())
        self._full_elsewhere = 0 if full else self._full_elsewhere + 1
        first = (reason or "").partition("\n")[0]
        if self._full_elsewhere == FULL_ELSEWHERE:
            raise StudyError(
                f"No space is left for trial {number}{f' on {node}' if node else ''}, though {self._study.folder} has room: {first}. "
                f"It is run again. {self._resume_hint()}"
            )
        self._patiently(lambda: self._study.run_again(number), f"trial {number} is not begun again")
        self._full_since, self._look_at = time.monotonic() if full else None, 0.0
        when = f" once {self._study.folder} has {self._room_wanted() >> 20} MiB free: make room" if full else ""
        self._log(f"trial {number:03d}: no space was left for what it writes ({first}); it is run again{when}")

    def _room_wanted(self) -> int:
        return ROOM * self._study.dense.size_bytes + 2**20

    def waits_for_room(self) -> bool:
        """Whether the disk, which a trial found full, still is; it is looked at every few seconds, and no trial begins meanwhile.

        Raises:
            StudyError: it has been full for too long.
        """
        if self._full_since is None or time.monotonic() < self._look_at:
            return self._full_since is not None
        if has_room(self._study.folder, self._room_wanted()):
            self._log(f"{self._study.folder} has room again")
            self._full_since = None
        elif time.monotonic() > self._full_since + PATIENCE_SECONDS:
            raise StudyError(f"No space is left in {self._study.folder} for a trial's net. {self._resume_hint()}")
        self._look_at = time.monotonic() + LOOK_SECONDS
        return self._full_since is not None

    def _brought_home(self, number: int) -> bool:
        """Whether a trial's net is in the study's folder now; a shared disk may take a moment to show what another node wrote."""
        for _ in range(LOOKS):
            if self._patiently(lambda: self._study.bring_home(number), f"the net of trial {number} is not fetched"):
                return True
            time.sleep(1.0)
        return False

    def _lost_net(self, node: str | None) -> str:
        return (
            f"{node or 'its process'} wrote its net to {self._study.results}, but the driver does not find it there: that node does not "
            f"share this place. Put the studies on shared storage (--runs), or set storage.results"
        )

    def _patiently(self, action: Callable[[], T], meanwhile: str) -> T:
        """Does what writes to the study's folder, database or place of results, again and again for as long as that refuses."""
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
        """What refuses, and what to do about it."""
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
        early = total >= min(GIVE_UP_AFTER, self._study.planned) and failed == total and allowed < 1
        if not early and not (total >= JUDGED_FROM and failed > allowed * total):
            return
        record = self._study.front_record()
        found = record["failures"]
        what = (
            f"All of the first {total} trials failed or diverged"
            if early
            else f"{failed} of {total} trials failed or diverged, more than search.max_failures={allowed:g} allows"
        )
        change = f"{mend(found['reason'])} " if self._study.leader is not None else ""  # else the verdict says it
        ship = record["verdict"]["ship"]
        raise StudyError(f"{what}. {found['alike']} of {found['count']}: {found['reason']}. {change}{ship}")


def has_room(folder: Path, size: int) -> bool:
    """Whether a folder's disk has `size` bytes free and lets this user write: a quota may be used up before the disk is full."""
    probe = folder / f".room-{os.getpid()}"
    try:
        probe.write_bytes(bytes(2**16))
        return shutil.disk_usage(folder).free >= size
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def run_inline(study: Study, bench: Workbench, on_row: OnRow, log: Log) -> None:
    """Runs the rest of the study, one trial after the other, with every core of this machine.

    Raises:
        StudyError: too many trials fail, or the disk is full.
    """
    task, driver = bench.task.without_test(), Driver(study, bench, on_row, log)
    while True:
        while driver.waits_for_room():
            time.sleep(LOOK_SECONDS)
        if (candidate := driver.ask()) is None:
            return
        result = attempt(
            task, bench.dense, bench.net, candidate, report=_stopper(study, candidate.number),
            checkpoint_seconds=study.space.resources.checkpoint_seconds,
            watch=partial(study.note_step, candidate.number),
        )  # fmt: skip
        driver.settle(candidate.number, result)


def _stopper(study: Study, number: int) -> Report:
    """The report of a trial, which stops it at a rung where it fell behind."""

    def report(entry: dict[str, Any]) -> None:
        if entry["phase"] == RUNG and not study.goes_on(number, entry["rung"], entry["val_accuracy"]):
            raise Stopped(stop_reason(entry, study.metric))

    return report


def stop_reason(entry: dict[str, Any], metric: Metric) -> str:
    """The reason that is recorded for a trial that ended at a rung."""
    return f"fell behind at step {entry['step']}: {metric.text(entry['val_accuracy'])}"
