"""A trial's state on disk, written now and then, so that a trial that is started again goes on as if it had not stopped."""

from __future__ import annotations

import errno
import io
import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError

from ranksearch.places.place import Place, PlaceError, Remote

FULL = (errno.ENOSPC, errno.EDQUOT)
SAID_OF_FULL = ("StorageFull", "No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


class Leaving(Exception):
    """The trial's state is written, and the trial has to go on elsewhere: its machine is going to be taken away."""


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk has no room: an OSError, or what safetensors and PyTorch make of one while they write a file."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, SafetensorError | RuntimeError) and any(said in str(error) for said in SAID_OF_FULL)


def stays() -> bool:
    """Says that the machine stays: nobody is going to take it away."""
    return False


class CheckpointFile:
    """Where one trial's state is kept: `path` belongs to its plan, recipe and seed alone. `path` None keeps nothing.

    Once `leaving` says so the state is due at once, and its `save` is the trial's last act here: it raises `Leaving`.
    """

    def __init__(self, path: Place | None, every_seconds: float, leaving: Callable[[], bool] = stays) -> None:
        self._path, self._every, self._leaving = path, every_seconds, leaving
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        return self._path is not None and (time.monotonic() - self._written >= self._every or self._leaving())

    def save(self, state: dict[str, Any]) -> None:
        """Writes `state` (tensors, numbers, texts and containers of them) beside the old file, then in its place.

        A store that refuses it, or a disk without room, is tried again when the next one is due: the trial goes on, since a state
        only saves time.

        Raises:
            Leaving: the machine is going to be taken away; the state is written, if there was room.
        """
        if self._path is None:
            return
        if isinstance(self._path, Remote):
            held = io.BytesIO()
            torch.save(state, held)
            with suppress(PlaceError):
                self._path.write(held.getbuffer())
        else:
            try:
                self._write_beside(self._path, state)
            except (OSError, RuntimeError) as error:
                if not is_full(error):
                    raise
        self._written = time.monotonic()
        if self._leaving():
            raise Leaving

    @staticmethod
    def _write_beside(path: Path, state: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            torch.save(state, unfinished)
            os.replace(unfinished, path)
        finally:  # half a state would keep a full disk full
            unfinished.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The last state; None where there is none, or none that can be read (no code is run by reading it).

        Raises:
            PlaceError: the store that holds it does not answer.
        """
        if self._path is None:
            return None
        held = io.BytesIO(self._path.read() or b"") if isinstance(self._path, Remote) else self._path
        if not is_zipfile(held):  # a torch file that is whole is a zip file
            return None
        if isinstance(held, io.BytesIO):
            held.seek(0)
        try:
            return torch.load(held, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError):
            return None

    def remove(self) -> None:
        """Removes the state, and what a process that was killed while writing left behind."""
        if isinstance(self._path, Remote):
            with suppress(PlaceError):  # what stays does no harm: it is this plan's, recipe's and seed's alone
                self._path.remove()
        elif self._path is not None:
            for file in (self._path, *self._path.parent.glob(f"{self._path.name}.*")):
                file.unlink(missing_ok=True)
