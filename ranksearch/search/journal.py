"""Optuna's journal on disk, made to survive: no torn line, no lock that outlives its process.

Optuna's file backend appends JSON lines. A process killed in the middle of a line, or a disk that is full, leaves half a line, on which the
next one would be glued: the whole journal would be unreadable from there on. And a lock file left by a killed process costs thirty seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import filelock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


class KernelLock:
    """What Optuna asks of a lock (acquire, release); the kernel releases it when its process dies."""

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class WholeLines(JournalFileBackend):
    """Appends lines whole or not at all."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends; raises OSError where the disk takes no more, and leaves the journal as it was."""
        size = os.path.getsize(self._file_path)
        try:
            super().append_logs(logs)
        except OSError:
            os.truncate(self._file_path, size)
            raise


def open_journal(path: Path) -> JournalStorage:
    """The storage in `path`, made where there is none."""
    return JournalStorage(WholeLines(str(path), KernelLock(path.with_name(f".{path.name}.lock"))))


def mend_journal(path: Path) -> int:
    """Cuts off half a line at the journal's end, which a killed process may have left; returns the bytes that were cut.

    To be called by who holds the study: a line that another process is writing looks the same.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return len(data) - whole
