"""Trials that ended without a result: whose doing that was. A trial pays for its own process alone, not for its node."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune import Callback

from ranksearch.cluster.nodes import GCS_ERRORS, NodeState, find_node, node_of_actor, state_of
from ranksearch.errors import clipped
from ranksearch.study.driver import Log

SUSPECT = 3
"""Trials that lost their process on one node, and the node is named."""
START = re.compile(
    r"^\S*\b(ModuleNotFoundError|ImportError|AttributeError: Can't get attribute|SyntaxError)\b.*$", re.MULTILINE
)
"""An error of Python's by which a worker ends before its trial begins: what that raises later is a result, not a loss."""
MEMORY = re.compile(r"OutOfMemoryError|running low on memory")
"""What Ray says where memory was short; of every process that died it says that memory may have been."""
NODE_DIED = "node has died"
"""What Ray says of an actor that was lost with its node before it had started."""


@dataclass(frozen=True)
class Loss:
    """Why a trial ended without a result."""

    blameless: bool
    """Its node was lost or taken away: that is not the trial's doing."""
    text: str
    final: bool = False
    """It would be the same again: the worker could not begin, by an error of its own."""


class Losses(Callback):
    """Tune's callback that notes on which node each trial runs, and explains a loss by what has become of that node."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._nodes: dict[str, str | None] = {}
        self._errors: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        actor = trial.temporary_state.ray_actor
        if actor is not None:
            self._nodes[trial.trial_id] = node_of_actor(actor._actor_id.hex())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._nodes.pop(trial.trial_id, None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's own snapshot, which is never restored

    def note(self, trial: Any) -> None:
        """Takes up what Tune says of a trial that failed, before the searcher is told that it did."""
        path = Path(trial.error_file) if trial.error_file else None
        text = path.read_text(errors="replace").strip() if path is not None and path.is_file() else ""
        self._errors[trial.trial_id] = text

    def explain(self, trial_id: str) -> Loss:
        """Why the trial was lost; a node where this happens again and again is named in the log."""
        node_id, error = self._nodes.pop(trial_id, None), self._errors.pop(trial_id, "")
        try:
            node = find_node(node_id)
            state = state_of(node) if node_id is not None else None
        except GCS_ERRORS as silent:
            return Loss(True, f"its cluster's head does not answer ({silent})")
        if state in (NodeState.GONE, NodeState.LEAVING):
            return Loss(True, f"its node {_name(node, node_id)} {state.value}")
        if (found := START.search(error)) is not None:
            return Loss(
                False,
                f"a process{f' on {_name(node, node_id)}' if node_id else ''} could not begin: {clipped(found[0])}. What the driver "
                f"imports every node has to find too: install it there, or send the folder that it lies in (`submit --working-dir`)",
                final=True,
            )
        if state is None:
            return Loss(NODE_DIED in error, f"its process did not start: {_last(error)}")
        self._deaths[str(node_id)] += 1
        if self._deaths[str(node_id)] % SUSPECT == 0:
            self._log(
                f"the node {_name(node, node_id)} has lost the processes of {self._deaths[str(node_id)]} trials: look at its memory and "
                f"its kernel's log, or take it out (`ray drain-node`)"
            )
        why = "its node ran out of memory" if MEMORY.search(error) else "killed, or it left by itself, as by os._exit"
        return Loss(False, f"its process on {_name(node, node_id)} died ({why})")


def _name(node: dict[str, Any] | None, node_id: str | None) -> str:
    """A node as people know it: host, address, and how Ray's id begins."""
    known = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}), " if node is not None else ""
    return f"{known}{str(node_id)[:8]}"


def _last(error: str) -> str:
    return error.splitlines()[-1] if error else "unknown"
