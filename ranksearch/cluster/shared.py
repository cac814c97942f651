"""What all trials of a study read: it reaches every node once, and a worker process makes the task from it once.

The driver puts it into Ray's object store. The first worker of a node that asks for it has it copied there, and every process of the node
maps the same memory. The process that asks also counts what was loaded.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import ray

from ranksearch.cluster.pack import Array, Packed, pack, unpack
from ranksearch.compress import Net
from ranksearch.search.workbench import Workbench
from ranksearch.tasks.stage import Staging, staged
from ranksearch.tasks.task import Task
from ranksearch.tasks.task_file import TaskFile
from ranksearch.training.dense import State
from ranksearch.trial.placement import Load, Placement, RanOn

INLINE_BYTES = 128 * 1024
"""Objects below about 100 KB travel with their reference and are in no node's store; with this padding, every study's data are."""


@dataclass(frozen=True)
class Goods:
    """The shared object itself."""

    packed: Packed
    dense: dict[str, Array]
    net: Net
    padding: np.ndarray


@dataclass(frozen=True)
class Shared:
    """A reference to what was shared, small enough to travel with every trial."""

    run: str
    key: str
    """A digest of the content: a process that has it already does not ask again."""
    bytes: int
    goods: Any
    """Ray's reference. It is in a field, so that passing the value on does not fetch the object."""
    staging: Staging | None = None


@dataclass(frozen=True)
class Work:
    """A worker process's own task, dense weights and net; tensors are views of the node's object store."""

    task: Task
    dense: State
    net: Net


def here() -> RanOn:
    """This process's place in the cluster."""
    context = ray.get_runtime_context()
    return RanOn(
        socket.gethostname(), context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), [str(g) for g in ray.get_gpu_ids()]
    )  # fmt: skip


def share(bench: Workbench, own: TaskFile | None, staging: Staging | None) -> tuple[Shared, Load]:
    """Puts what trials need into the object store; also returns the record of the driver's own load.

    Raises:
        UsageError: a part of the task cannot be pickled.
    """
    started, place = time.perf_counter(), here()
    packed = pack(bench.task, own)
    dense = {name: Array.of(weight) for name, weight in bench.dense.items()}
    size = packed.nbytes + sum(weight.values.nbytes for weight in dense.values())
    goods = ray.put(Goods(packed, dense, bench.net, np.zeros(INLINE_BYTES, np.uint8)))
    shared = Shared(uuid.uuid4().hex[:12], digest(packed, dense), size, goods, staging)
    seconds = time.perf_counter() - started
    return shared, _load(shared, place, None, data_loaded=staging is None, seconds=seconds)


def digest(packed: Packed, dense: dict[str, Array]) -> str:
    """A digest of the content of both."""
    found = hashlib.sha256(packed.rest)
    halves = {f"{split}.{n}": half for split, pair in packed.arrays.items() for n, half in enumerate(pair)}
    for name, array in sorted({**halves, **dense}.items()):
        found.update(name.encode())
        found.update(array.values.data)
    return found.hexdigest()[:16]


def _load(shared: Shared, place: RanOn, trial: int | None, *, data_loaded: bool, seconds: float) -> Load:
    return Load(
        shared.run, trial, place.node_id, place.node, place.ip, place.pid, shared.key, shared.bytes, data_loaded, seconds
    )  # fmt: skip


def load_of(shared: Shared, placement: Placement, trial: int) -> Load:
    """The record of a worker process that made the task."""
    return _load(shared, placement, trial, data_loaded=placement.data_loaded, seconds=placement.load_seconds)


_kept: dict[str, Work] = {}
"""What this process has, by key: at most one study's."""


def take(shared: Shared) -> tuple[Work, Placement]:
    """What trials need, in this process: kept from an earlier trial, or made now; also returns where and how that happened."""
    place = here()
    if shared.key in _kept:
        return _kept[shared.key], Placement(**vars(place))
    started = time.perf_counter()
    # if several processes begin at once, one waits for the data and the others find them
    with _node_lock(place, shared.key):
        came = place.node_id not in _nodes_with(shared.goods)
        goods: Goods = ray.get(shared.goods)
        task = unpack(goods.packed)
        if shared.staging is not None:
            task, came = staged(task, shared.staging)
    work = Work(task, {name: weight.tensor() for name, weight in goods.dense.items()}, goods.net)
    _kept.clear()
    _kept[shared.key] = work
    seconds = time.perf_counter() - started
    return work, Placement(**vars(place), unpacked=True, data_loaded=came, load_seconds=seconds)


def _nodes_with(reference: Any) -> list[str]:
    """Ids of the nodes whose object store holds the object now."""
    found: dict[Any, dict[str, Any]] = ray.experimental.get_object_locations([reference])
    return list(found.get(reference, {}).get("node_ids") or [])


def _node_lock(place: RanOn, key: str) -> filelock.FileLock:
    folder = Path(tempfile.gettempdir()) / f"ranksearch-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return filelock.FileLock(folder / f"{place.node_id[:16]}-{key}.lock")


def with_peak(placement: Placement) -> Placement:
    """The placement with the process's own memory at its peak, if this system tells it."""
    return replace(placement, peak_bytes=_peak_bytes())


def _peak_bytes() -> int | None:
    """Bytes at the peak of this process, without what it shares with others (such as the object store); None except on Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    kib = [int(found[name][0]) for name in ("VmHWM", "RssShmem", "RssFile") if name in found]
    return 1024 * (kib[0] - sum(kib[1:])) if len(kib) == 3 else None
