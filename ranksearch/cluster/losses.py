"""Why trials ended without a result. The loss of its process counts against a trial, the loss of its node does not."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune import Callback

from ranksearch.cluster.nodes import GCS_ERRORS, NodeState, find_node, node_of_actor, state_of
from ranksearch.cluster.ray_private import actor_record, logs_folder
from ranksearch.errors import clipped
from ranksearch.study.driver import Log

SUSPECT = 3
"""A node is named in the log after this many trials lost their processes there."""
START = re.compile(
    r"^\S*\b(ModuleNotFoundError|ImportError|AttributeError: Can't get attribute|SyntaxError)\b.*$", re.MULTILINE
)
"""Python's errors that end a worker before its trial begins; what a trial raises later is a result, not a loss."""
RAISED = re.compile(r"^([\w.]+\.)?([A-Z]\w*)(?:: .*)?$", re.MULTILINE)
"""The last line of a traceback: the exception's package and class, and its text."""
REMOTE = "ray::"
"""Occurs in the text of what a worker raised, but not in what Ray says of a worker that died."""
PASSES = ("Leaving", "PeerLost", "MemoryError")
PASSES_TOO = re.compile(r"\[Errno (28|122)\]|CUDA|HIP error")
"""Errors that another worker, or the same one later, need not meet: an end from outside, no memory, a full disk, a GPU's error."""
MEMORY = re.compile(r"OutOfMemoryError|MemoryError|running low on memory")
"""What Ray or Python says when memory was short. (That memory may have been short, Ray says of every process that died.)"""
NODE_DIED = "node has died"
"""What Ray says of an actor that was lost with its node before it started."""
STARTS = 2
"""Workers in a row that died before any began a trial, at which this counts as an error: a single one may be an accident."""
RAYS_OWN = re.compile(
    r"^(\[\d{4}-\d\d-\d\d .*\]|\[.*pid=\d+.*\]|:(job_id|task_name|actor_name):|\*\*\* .*|\s*@ .*|\s*PC: .*)"
)
"""Lines of a worker's log that Ray wrote: its own log, marks, and the frames below "*** SIGSEGV"."""
IMPORTS = "Every node must find what the driver imports: install it there, or send its folder (`submit --working-dir`)"


@dataclass(frozen=True)
class WorkerLoss:
    """Why a trial ended without a result."""

    blameless: bool
    """Whether its node was lost or taken away, which is not the trial's fault."""
    text: str
    final: bool = False
    """Whether it would happen again: the worker could not begin because of an error of its own."""


class Losses(Callback):
    """Tune's callback that records on which node each trial runs, and explains a loss by what became of that node."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._nodes: dict[str, str | None] = {}
        self._actors: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()
        self._begun: set[str] = set()
        """Actors that have reported something, so that their process found all that it needs."""
        self._starts = 0
        """Number of workers in a row that died before they began a trial."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        actor = trial.temporary_state.ray_actor
        if actor is not None:
            self._actors[trial.trial_id] = actor._actor_id.hex()
            self._nodes[trial.trial_id] = node_of_actor(self._actors[trial.trial_id])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._begun.add(self._actors.get(trial.trial_id, ""))
        self._starts = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._nodes.pop(trial.trial_id, None)
        self._actors.pop(trial.trial_id, None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's own snapshot, which is never restored

    def note(self, trial: Any) -> None:
        """Takes up what Tune says of a trial that failed, before the searcher is told that it did."""
        path = Path(trial.error_file) if trial.error_file else None
        text = path.read_text(errors="replace").strip() if path is not None and path.is_file() else ""
        self._errors[trial.trial_id] = text

    def explain(self, trial_id: str) -> WorkerLoss:
        """Says why the trial was lost; a node where this happens again and again is named in the log."""
        node_id, error = self._nodes.pop(trial_id, None), self._errors.pop(trial_id, "")
        actor = self._actors.pop(trial_id, "")
        try:
            node = find_node(node_id)
            state = state_of(node) if node_id is not None else None
        except GCS_ERRORS as silent:
            return WorkerLoss(True, f"its cluster's head does not answer ({silent})")
        if state in (NodeState.GONE, NodeState.LEAVING):
            return WorkerLoss(True, f"its node {_name(node, node_id)} {state.value}")
        where = f" on {_name(node, node_id)}" if node_id else ""
        if (found := START.search(error)) is not None:
            return WorkerLoss(False, f"a process{where} could not begin: {clipped(found[0])}. {IMPORTS}", final=True)
        if (raised := _raised(error)) is not None:
            return WorkerLoss(False, f"a process{where} could not begin: {clipped(raised)}", final=True)
        if state is None:
            return WorkerLoss(NODE_DIED in error, f"its process did not start: {_last(error)}")
        last = last_words(actor)
        left = f"killed, or it left by itself, as by os._exit{f'; the last that it wrote: {clipped(last)}' if last else ''}"
        short = bool(MEMORY.search(error))
        if actor and actor not in self._begun and not short:
            self._starts += 1
            return WorkerLoss(
                False, f"its process{where} died before a trial began there ({left})", final=self._starts >= STARTS
            )
        self._deaths[str(node_id)] += 1
        if self._deaths[str(node_id)] % SUSPECT == 0:
            self._log(
                f"the node {_name(node, node_id)} has lost the processes of {self._deaths[str(node_id)]} trials: look at its memory and "
                f"its kernel's log, or take it out (`ray drain-node`)"
            )
        return WorkerLoss(False, f"its process{where} died ({'its node ran out of memory' if short else left})")


def _raised(error: str) -> str | None:
    """What a worker's own code raised before its trial began, and would raise again; None if it was something else.

    Whatever is raised within a trial becomes its result, so what Tune hears of came from outside, or from making the task.
    """
    found = list(RAISED.finditer(error))
    if REMOTE not in error or not found:
        return None
    line, package, name = found[-1][0], found[-1][1] or "", found[-1][2]
    if package.startswith("ray.") or name in PASSES or PASSES_TOO.search(line):
        return None
    return (
        line.partition(": ")[2] if package.startswith("ranksearch.") else line
    )  # our own errors are sentences already


def last_words(actor: str) -> str:
    """The last line that a worker's process wrote to its stderr, which Ray keeps if it ran on this machine; empty if not known."""
    try:
        folder, record = logs_folder(), actor_record(actor) if actor else None
    except GCS_ERRORS:
        return ""
    files = sorted(Path(folder).glob(f"worker-*-{record.pid}.err")) if folder and record is not None else []
    lines = [line for file in files for line in _tail(file) if line.strip() and not RAYS_OWN.match(line)]
    return lines[-1].strip() if lines else ""


def _tail(file: Path, size: int = 16_384) -> list[str]:
    with suppress(OSError), file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - size))
        return stream.read().decode(errors="replace").splitlines()
    return []


def _name(node: dict[str, Any] | None, node_id: str | None) -> str:
    """A node as people know it: host, address, and the beginning of Ray's id."""
    known = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}), " if node is not None else ""
    return f"{known}{str(node_id)[:8]}"


def _last(error: str) -> str:
    return error.splitlines()[-1] if error else "unknown"
