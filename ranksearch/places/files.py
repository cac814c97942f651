"""Files and folders that are never half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranksearch.errors import UsageError


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
        UsageError: it cannot be read.
        FileNotFoundError: there is none.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: it cannot be read: {error.strerror or error}.") from error


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def new_folder_atomically(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which is `path` once the block ends; where the block raises, nothing is left of it.

    What stands at `path` until then stays there until the new folder is whole, and then gives way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("partial", "old"))
    try:
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
