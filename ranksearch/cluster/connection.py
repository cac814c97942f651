"""Joining a Ray cluster, or starting Ray on this machine; what it holds, and whether its head still lives."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import ray

from ranksearch.cluster.packing import Machine, trials_at_once
from ranksearch.errors import StudyError
from ranksearch.search.space import AUTO, ResourcesSpace

HEAD = ("gcs_server", "raylet")


class HeadLost(StudyError):
    """Ray's own processes are gone: no trial can run, and none is to blame."""


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's CPU quota where it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def connect(address: str | None) -> None:
    """Joins the cluster at `address`, or starts Ray on this machine; a Ray that is running in this process is used as it is.

    Raises:
        StudyError: Ray does not start or cannot be reached.
    """
    if ray.is_initialized():
        return
    if address is None:
        # Ray's token authentication is on; a token for this cluster alone needs no file in a home that may be read-only
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # on one machine a control store that does not answer is dead, not far away; without it Ray ends this process
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    local = {
        "address": "local",
        "num_cpus": usable_cores(),
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    for tries_left in (1, 0):
        try:
            ray.init(**quiet, **(local if address is None else {"address": address}))
            return
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            # on a busy machine a node start can miss Ray's own time limit: once more, then it is a real failure
            if tries_left == 0 or address is not None:
                where = f"reach the Ray cluster at {address}" if address else "start Ray on this machine"
                raise StudyError(f"Could not {where}: {error}") from error
            ray.shutdown()


def head_is_gone() -> bool:
    """Whether a Ray that this process started has lost one of its own processes; of a cluster's head nothing is known here."""
    node = ray._private.worker._global_node
    return node is not None and node.head and any(name in HEAD for name, _ in node.dead_processes())


def nodes() -> list[dict[str, Any]]:
    """The cluster's nodes that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def join(resources: ResourcesSpace, address: str | None) -> tuple[float, int]:
    """Connects, and returns (GPUs per worker of a trial, trials at once) of the cluster for what one trial takes.

    What `auto` packs onto a GPU is not known yet: it counts as one GPU.

    Raises:
        StudyError: Ray does not start or cannot be reached.
        UsageError: one trial asks for more than the cluster has.
    """
    connect(address)
    machines = [Machine.of(node["Resources"]) for node in nodes()]
    gpus, workers = resources.gpus_per_trial, resources.workers
    if gpus is None or gpus == AUTO:
        gpus = float(any(machine.gpus > 0 for machine in machines))
    each = 1.0 if workers > 1 and gpus else float(gpus)
    return each, trials_at_once(machines, cpus=resources.cpus_per_trial, gpus=each, workers=workers)
