"""The nets of a front as MLflow models, made by processes of their own beside whatever the driver does meanwhile.

Making a model takes seconds of one core and needs nothing but the trial's folder; logging it is the mirror's, since only the driver writes
to the store. What no process delivers (it was killed, it ran out of memory) is made by whoever asks for it.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle

from ranksearch.compress import load_net
from ranksearch.cores import THREAD_VARIABLES, usable_cores
from ranksearch.errors import StudyError, UsageError
from ranksearch.space.space import Space
from ranksearch.store.where import trial_folder
from ranksearch.tasks import TaskKind
from ranksearch.tracking.model_maker import BEGIN, Job, Order

FEWEST_CORES = 4
"""On fewer, the driver makes the models itself: the helper's imports and first exports cost more than two cores save if anything else runs
there. Digits, seven nets, two cores, from the last latency on: 24 and 30 s against 35 and 37 s where both are free, 38 s against 33 s where
one is.
"""
MEMORY, COPIES = 4 * 2**30, 8
"""How much memory the nets may take that are made at once, and how often a net's weights are held meanwhile."""


class NotMade(Exception):
    """Nobody made the model, and nothing is known against it."""


class Closed(Exception):
    """The models are wanted no more, because the study was interrupted."""


class MadeModels:
    """Models that are being made. Close it: that ends what still runs, and removes the models."""

    def __init__(
        self, space: Space, folder: Path, trials: Sequence[int], at_once: int, told: Callable[[int], None]
    ) -> None:
        """Begins to make the models of trials of the study in `folder`.

        Args:
            told: is called, in another thread, with the number of nets that are done.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="ranksearch-models-", ignore_cleanup_errors=True)
        self._told, self._changed = told, threading.Condition()
        self._outcomes: dict[int, dict[str, Any]] = {}
        self._over = self.closed = False
        try:
            order = _order(space, folder, trials, at_once, self._scratch.name)
            self._asked = {job.trial: Path(job.target) for job in order.jobs}
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | dict.fromkeys(THREAD_VARIABLES, "1")
            self._process = subprocess.Popen(
                [sys.executable, "-c", BEGIN, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._scratch.cleanup()
            raise
        self._listener = threading.Thread(
            target=self._listen, args=[pickle.dumps(order)], name="made-models", daemon=True
        )
        self._listener.start()

    def _listen(self, order: bytes) -> None:
        """Sends the order, then hears how each net went until the process ends; stdin stays open, its end would be the process's."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError, ValueError):  # the process has died, or was ended
            self._process.stdin.write(f"{len(order)}\n".encode() + order)
            self._process.stdin.flush()
        for line in self._process.stdout:
            outcome = json.loads(line)
            with self._changed:
                self._outcomes[outcome["trial"]] = outcome
                self._changed.notify_all()
            self._told(len(self._outcomes))
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def model(self, trial: int) -> Path:
        """Waits for a trial's model and returns its folder.

        Raises:
            StudyError: the net cannot be one; the text says why.
            NotMade: it was not asked for, or its process was lost.
            Closed: the study was interrupted.
        """
        with self._changed:
            if trial in self._asked:
                self._changed.wait_for(lambda: trial in self._outcomes or self._over or self.closed)
            if self.closed:
                raise Closed
            outcome = self._outcomes.get(trial, {})
        if outcome.get("made"):
            return self._asked[trial]
        if "reason" in outcome:
            raise StudyError(outcome["reason"])
        raise NotMade

    def close(self) -> None:
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._changed.notify_all()
        assert self._process.stdin is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        with suppress(OSError):
            self._process.stdin.close()
        self._scratch.cleanup()


def begin(
    space: Space, folder: Path, trials: Sequence[int], size_bytes: int, told: Callable[[int], None]
) -> MadeModels | None:
    """Begins to make models of trials' nets, as many at once as there are cores; None where the driver had better make them itself.

    Args:
        size_bytes: of the dense net.
        told: is called, in another thread, with the number of nets that are done.
    """
    cores = usable_cores()
    if not trials or cores < FEWEST_CORES:
        return None
    at_once = max(1, min(len(trials), cores, MEMORY // (COPIES * max(1, size_bytes))))
    try:
        return MadeModels(space, folder, trials, at_once, told)
    except (OSError, UsageError):  # whoever makes a model meets it again, and tells
        return None


def _order(space: Space, folder: Path, trials: Sequence[int], at_once: int, scratch: str) -> Order:
    kind = space.kind()
    jobs = []
    for trial in trials:
        home, target = trial_folder(folder, trial), Path(scratch) / f"{trial:03d}"
        try:
            jobs.append(Job(trial, str(home), str(target), None if kind.own is None else _pickled(space, kind, home)))
        except (
            Exception
        ):  # lost, or not to be pickled, where a user's own code may raise anything: the driver makes it, and tells
            continue
    return Order(tuple(jobs), space.task, None if kind.own is None else kind.own.code, at_once, scratch)


def _pickled(space: Space, kind: TaskKind, folder: Path) -> bytes:
    return cloudpickle.dumps((load_net(folder, space.build), kind.example_input, kind.normalise))
