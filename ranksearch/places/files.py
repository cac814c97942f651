"""Files and folders that are never half written, and those that are on the disk before anything counts on them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranksearch.errors import UsageError

NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP)
"""What a network's disk says that does not know how to settle a folder."""


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


def write_durably(path: Path, text: str) -> None:
    """The same, and the disk has it once this returns: a machine that loses its power then still holds it."""
    with partly_written(path) as partial:
        partial.write_text(text, encoding="utf-8")


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a whole file its name, durably: its content is on the disk before its name is, and the name once this returns."""
    settle(partial)
    partial.replace(path)
    settle(path.parent)


@contextmanager
def partly_written(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which gets its own name, durably, once the block ends.

    Where the block raises, nothing is left of it: half a file would keep a full disk full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Waits until the disk has what a file holds, or which names a folder holds.

    Raises:
        OSError: the disk does not take it: some file systems say only now that they are full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDERS):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder, and those that it lies in, where they are not there yet; the disk has the names of those that were made."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        settle(folder.parent)


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
