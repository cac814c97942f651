"""Optuna's journal on disk, made to survive and to scale: no torn line, no lock that outlives its process, one write per step of a study.

Optuna's file backend appends JSON lines. A process killed in the middle of a line, or a disk that is full, leaves half a line, on which the
next one would be glued: the whole journal would be unreadable from there on. And a lock file left by a killed process costs thirty seconds.

It also writes every parameter by itself, and waits for the disk each time: a dozen waits per trial. What is written `together` is one
append and one wait; a driver killed before it leaves nothing of it. The lines are the same, in the same order.
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
from ranksearch.study.folded import Folded
from ranksearch.study.records import check_line

CURVES = ("losses", "projections")
"""The long lists of a result: read from the journal they are kept folded."""


class KernelLock(BaseJournalFileLock):
    """What Optuna asks of a lock (acquire, release); the kernel releases it when its process dies."""

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class WholeLines(JournalFileBackend):
    """Appends lines whole or not at all, and one by one unless they are to be written `together`."""

    def __init__(self, file_path: str, lock: KernelLock) -> None:
        super().__init__(file_path, lock)
        self._lines, self._bytes = 0, 0
        """How much of the file has been read: lines, and where the next one begins."""
        self._held: list[str] = []
        """What is to be written together: in this process it counts already, after the file's last line."""
        self._holding = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is appended inside is written at the end, by one write; for who holds the study, as nobody else may write meanwhile.

        Raises:
            OSError: the disk takes no more. What is held then goes before whatever is written next.
        """
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            self.append_logs([])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends; raises OSError where the disk takes no more, and leaves the journal as it was."""
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
        self._lines += len(self._held)  # what was held counts already, and is not read again
        self._bytes += sum(len(line.encode()) for line in self._held)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The lines from a number on, then what is held; raises UsageError where a line is broken and is not the last one."""
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
                    return  # half a line: somebody is writing it, or was killed
                log = self._checked(line) if self._lines >= log_number_from else None
                self._lines, self._bytes = self._lines + 1, self._bytes + len(line)
                if log is not None:
                    yield log

    def _checked(self, line: bytes) -> dict[str, Any]:
        """A line of the file as Optuna replays it.

        Raises:
            UsageError: it is none that a study writes; the text names the line.
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
    """Optuna's storage over the journal; what a study asks for at every trial takes no time that grows with their number."""

    def __init__(self, backend: WholeLines) -> None:
        self._looked_at, self._waiting = 0, list[int]()
        super().__init__(backend)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna's; in a journal of one study, as ours are, every trial is of it, and none need be searched for."""
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
    """The storage in `path`, made where there is none."""
    return Journal(WholeLines(str(path), KernelLock(path.with_name(f".{path.name}.lock"))))


def together(storage: BaseStorage) -> AbstractContextManager[None]:
    """What is written to a journal inside is one write; to another storage it goes as it comes."""
    backend = getattr(storage, "_backend", None)
    return backend.together() if isinstance(backend, WholeLines) else nullcontext()


def mend_journal(path: Path) -> int:
    """Cuts off half a line at the journal's end, which a killed process may have left; returns the bytes that were cut.

    To be called by who holds the study: a line that another process is writing looks the same.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return len(data) - whole
