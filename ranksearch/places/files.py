"""Writes files and folders so that they are never half written, and, where asked, are on the disk before anything relies on them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranksearch.errors import UsageError

NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP)
"""Error codes of network disks that cannot sync a folder."""


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
    """Writes a file so that a reader sees the old one or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_durably(path: Path, text: str) -> None:
    """Writes a file as `write_atomically` does; once this returns, the file survives a loss of power."""
    with partly_written(path) as partial:
        partial.write_text(text, encoding="utf-8")


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a complete file its name, durably: the content is on the disk first, and the name once this returns."""
    settle(partial)
    partial.replace(path)
    settle(path.parent)


@contextmanager
def partly_written(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file written there becomes `path`, durably, once the block ends.

    If the block raises, the temporary file is removed: half a file would keep a full disk full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk.

    Raises:
        OSError: the disk does not take it; some file systems report only now that they are full.
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
    """Makes a folder and its missing parents; the names of new folders are on the disk once this returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        settle(folder.parent)


@contextmanager
def new_folder_atomically(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes `path` once the block ends; if the block raises, it is removed.

    Whatever is at `path` stays there until the new folder is complete, and is then replaced.
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
