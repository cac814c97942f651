"""Optuna's journal on disk, made to survive and to scale: no torn line, no lock that outlives its process, one write per step of a study.

Optuna's file backend appends JSON lines. A process killed in the middle of a line, or a full disk, leaves half a line, and the next one
would be appended to it: the journal would be unreadable from there on. And a lock file left by a killed process costs thirty seconds.

It also writes every parameter on its own and waits for the disk each time, a dozen times per trial. What is written `together` is one
append and one wait; if the driver is killed before, none of it is written. The lines are the same, in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import filelock
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file
from optuna.trial import FrozenTrial, TrialState

from ranksearch.errors import StudyError, UsageError, clipped, first_line
from ranksearch.store.folded import Folded
from ranksearch.store.line_records import check_line

CURVES = ("losses", "projections")
"""The long lists of a result, which are kept folded once they are read from the journal."""


class KernelLock(BaseJournalFileLock):
    """A lock as Optuna wants it (acquire, release), which the kernel releases when its process dies."""

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class WholeLines(JournalFileBackend):
    """Appends lines completely or not at all, one by one unless they are written `together`."""

    def __init__(self, file_path: str, lock: KernelLock) -> None:
        super().__init__(file_path, lock)
        self._lines, self._bytes = 0, 0
        """How many lines of the file have been read, and the byte at which the next one begins."""
        self._held: list[str] = []
        """Lines to be written together; in this process they count already, after the file's last line."""
        self._holding = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Writes what is appended inside the block at once, at its end. The caller must hold the study: nobody else may write meanwhile.

        Raises:
            OSError: the disk takes no more. The held lines are then written before any others.
        """
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            self.append_logs([])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends lines; if the disk takes no more, raises OSError and leaves the journal as it was."""
        lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
        if self._holding:
            self._held += lines
        elif self._held or lines:
            self._append([*self._held, *lines])
            self._held.clear()

    def _append(self, lines: list[str]) -> None:
        with get_lock_file(self._lock):
            size = os.path.getsize(self._file_path)
            if self._held and size != self._bytes:
                raise StudyError(f"{self._file_path} was written by another process: only one may run a study.")
            try:
                with open(self._file_path, "ab") as file:
                    file.write("".join(lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self._file_path, size)
                raise
        self._lines += len(self._held)  # the held lines count already and are not read again
        self._bytes += sum(len(line.encode()) for line in self._held)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The lines from a number on, then the held ones; raises UsageError if a line other than the last is broken."""
        if log_number_from < self._lines:
            self._lines, self._bytes = 0, 0
        if not self._held:
            yield from self._read_file(log_number_from)
        yield from (_parsed(line) for line in self._held[max(0, log_number_from - self._lines) :])

    def _read_file(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        size = os.stat(self._file_path).st_size
        if size == self._bytes:
            return
        with open(self._file_path, "rb") as file:
            file.seek(self._bytes)
            while self._bytes < size:
                line = file.readline()
                if not line.endswith(b"\n"):
                    return  # half a line: its writer is not done, or was killed
                log = self._checked(line) if self._lines >= log_number_from else None
                self._lines, self._bytes = self._lines + 1, self._bytes + len(line)
                if log is not None:
                    yield log

    def _checked(self, line: bytes) -> dict[str, Any]:
        """A line of the file as Optuna replays it.

        Raises:
            UsageError: a study writes no such line; the message names the line.
        """
        where = f"{self._file_path}: line {self._lines + 1}"
        try:
            log = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: expected JSON: {clipped(first_line(error))}.") from None
        check_line(log, where)
        return _folded(log)


def _parsed(line: str | bytes) -> dict[str, Any]:
    return _folded(json.loads(line))


def _folded(log: dict[str, Any]) -> dict[str, Any]:
    result = (log.get("user_attr") or {}).get("result")
    if isinstance(result, dict):
        result |= {name: Folded(result[name]) for name in CURVES if result.get(name)}
    return log


class Journal(JournalStorage):
    """Optuna's storage over the journal; what a study asks for at every trial takes no longer with more trials."""

    def __init__(self, backend: WholeLines) -> None:
        self._looked_at, self._waiting = 0, list[int]()
        super().__init__(backend)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Does what Optuna's does, without a search: in a journal of one study, as ours are, every trial belongs to it."""
        if deepcopy or states not in (None, (TrialState.WAITING,)):
            return super().get_all_trials(study_id, deepcopy, states)
        with self._thread_lock:
            self._sync_with_backend()
            if self._replay_result._studies.keys() == {study_id}:
                trials = list(self._replay_result._trials.values())
                if states is None:
                    return trials
                new, self._looked_at = range(self._looked_at, len(trials)), len(trials)
                # a trial that is not waiting never waits again
                self._waiting = [i for i in (*self._waiting, *new) if trials[i].state == TrialState.WAITING]
                return [trials[i] for i in self._waiting]
        return super().get_all_trials(study_id, deepcopy, states)  # which takes the lock itself


def open_journal(path: Path) -> JournalStorage:
    """The storage in `path`, which is made if there is none."""
    return Journal(WholeLines(str(path), KernelLock(path.with_name(f".{path.name}.lock"))))


def together(storage: BaseStorage) -> AbstractContextManager[None]:
    """Makes all that is written to a journal inside the block one write; another storage gets it as it comes."""
    backend = getattr(storage, "_backend", None)
    return backend.together() if isinstance(backend, WholeLines) else nullcontext()


def mend_journal(path: Path) -> int:
    """Cuts off half a line at the journal's end, which a killed process may have left; returns the bytes that were cut.

    The caller must hold the study: a line that another process is still writing looks the same.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return len(data) - whole
