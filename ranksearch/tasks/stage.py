"""Staging: a data folder copied to a node's own disk, once, and read from there.

Whoever comes first copies, under a lock, to a folder beside, which takes its name when it is whole; the others wait and find it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
from torch.utils.data import Subset

from ranksearch.data.loaded import LoadedDataset
from ranksearch.errors import UsageError
from ranksearch.tasks.imagefolder import ImageFolder
from ranksearch.tasks.task import Task


@dataclass(frozen=True)
class Staging:
    """A data folder, and where on a node it is copied to."""

    source: Path
    """The data folder, as every node sees it."""
    folder: Path
    """A folder of the node's own disk; the copy lies in it under a name made of the source's."""

    @property
    def copy(self) -> Path:
        source = self.source.absolute()
        return self.folder.expanduser() / f"{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:12]}"


def stage(staging: Staging) -> bool:
    """Copies the folder where its copy is not there yet; whether this call copied.

    Raises:
        UsageError: the source is missing on this node, or the copy cannot be written; the text says which.
    """
    copy = staging.copy
    if copy.is_dir():
        return False
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(copy.with_name(f"{copy.name}.lock")):
            if copy.is_dir():
                return False
            if not staging.source.is_dir():
                raise UsageError(
                    f"data: there is no folder {staging.source} on this node ({os.uname().nodename}) to copy from."
                )
            unfinished = copy.with_name(f"{copy.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            shutil.copytree(staging.source, unfinished)
            unfinished.rename(copy)
            return True
    except OSError as error:
        raise UsageError(f"resources.stage: {staging.source} cannot be copied to {copy}: {error}") from error


def staged(task: Task, staging: Staging) -> tuple[Task, bool]:
    """The task with its images read from the node's copy, which is made where it is missing; and whether it was made now."""
    copied = stage(staging)
    source, copy = staging.source.absolute(), staging.copy

    def moved(path: Path) -> Path:
        return copy / path.absolute().relative_to(source)

    return replace(task, train=_moved(task.train, moved), val=_moved(task.val, moved)), copied


def _moved(source: Any, moved: Callable[[Path], Path]) -> Any:
    return replace(source, dataset=_read_from(source.dataset, moved)) if isinstance(source, LoadedDataset) else source


def _read_from(dataset: Any, moved: Callable[[Path], Path]) -> Any:
    if isinstance(dataset, Subset):
        return Subset(_read_from(dataset.dataset, moved), dataset.indices)
    return dataset.moved(moved) if isinstance(dataset, ImageFolder) else dataset
