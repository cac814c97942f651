"""Where trials ran and what reached their nodes: a value per trial, and a file with a line per process that made the task.

Knows nothing of Ray: `cluster/` fills these in.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LOADS = "loads.jsonl"


@dataclass(frozen=True)
class RanOn:
    """A process on a node of the cluster."""

    node: str
    """The node's host name."""
    node_id: str
    """Ray's id of the node: nodes that share a host differ in it."""
    ip: str
    pid: int
    gpus: list[str] = field(default_factory=list)
    """Ids of the GPUs that the process sees."""


@dataclass(frozen=True)
class Placement(RanOn):
    """Where a trial ran, and whether it had to wait for its data there."""

    unpacked: bool = False
    """Whether the process made the task for this trial; False where it had it from an earlier one."""
    data_loaded: bool = False
    """Whether the data came to the node for this trial: into its object store, or onto its disk."""
    load_seconds: float = 0.0
    peak_bytes: int | None = None
    """The process's own memory at its peak, without what it shares; None where that is not known."""
    workers: list[dict[str, Any]] = field(default_factory=list)
    """The processes of a data-parallel trial, rank 0 first, each as a placement of its own; empty where it is one process."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Load:
    """A process made the task from what was shared; `trial` None is the driver, which shared it."""

    run: str
    """One run of trials: a resumed study, or a Ray that was started again, shares the data anew."""
    trial: int | None
    node_id: str
    node: str
    ip: str
    pid: int
    key: str
    """A digest of the data's content."""
    bytes: int
    data_loaded: bool
    seconds: float


def note_load(folder: Path, load: Load) -> None:
    """Adds a line to the study's file."""
    with (folder / LOADS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(load)) + "\n")


def loads_of(folder: Path) -> list[Load]:
    """What the study's file holds; half a line of a killed driver is left out."""
    path, found = folder / LOADS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(Load(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def data_loads_per_node(folder: Path) -> dict[str, int]:
    """Node id -> how often one study's data came to that node, in the run where it came most often: 1 is what it should be.

    The node of the driver counts the driver's own.
    """
    counts = Counter((load.node_id, load.run, load.key) for load in loads_of(folder) if load.data_loaded)
    nodes = {node for node, _, _ in counts}
    return {node: max(n for (other, _, _), n in counts.items() if other == node) for node in sorted(nodes)}
