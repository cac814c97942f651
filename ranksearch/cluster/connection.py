"""Joining a Ray cluster, or starting Ray on this machine; what it holds, and whether its head is still alive."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from ranksearch.cluster.nodes import room_at_most, room_now, usable_nodes
from ranksearch.cluster.packing import Needs
from ranksearch.cluster.ray_private import own_node
from ranksearch.cores import usable_cores
from ranksearch.errors import StudyError, UsageError, first_line
from ranksearch.space.resources import ResourcesSpace
from ranksearch.space.search import AUTO

HEAD = ("gcs_server", "raylet")
SAY_AGAIN_SECONDS, LOOK_SECONDS = 60.0, 1.0
"""How often a wait for room is reported, and how often room is looked for."""
STILL_SECONDS = 10.0
"""How often to report that Ray is still starting."""


class HeadLost(StudyError):
    """Ray's own processes are gone: no trial can run, and none is to blame."""


def connect(address: str | None) -> None:
    """Joins the cluster at `address`, or starts Ray on this machine; a Ray that already runs in this process is used as it is.

    Raises:
        StudyError: Ray does not start or cannot be reached.
    """
    if ray.is_initialized():
        return
    if address is None:
        # Ray's token authentication is on; a token for only this cluster needs no file in a home that may be read-only
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
            with own_sigterm():
                ray.init(**quiet, **(local if address is None else {"address": address}))
            return
        except Exception as error:
            # on a busy machine a node may start too late for Ray's own time limit, and Ray then raises a bare `Exception`: a second
            # failure is a real one
            if tries_left == 0 or address is not None:
                where = f"reach the Ray cluster at {address}" if address else "start Ray on this machine"
                raise StudyError(f"Could not {where}: {first_line(error)}") from error
            ray.shutdown()


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keeps this process's own handler of SIGTERM, if it has one: `ray.init` would replace it by an exit."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def head_is_gone() -> bool:
    """Whether a Ray that this process started has lost one of its own processes; this says nothing about a cluster's head."""
    node = own_node()
    return node is not None and node.head and any(name in HEAD for name, _ in node.dead_processes())


def join(resources: ResourcesSpace, address: str | None, log: Callable[[str], None]) -> Needs:
    """Connects, and returns what a trial needs. If the cluster has no room for a trial, waits for nodes that may still be coming.

    A share of a GPU by `auto` is not known yet: it counts as one GPU.

    Raises:
        StudyError: Ray does not start or cannot be reached.
        UsageError: one trial needs more than this machine has, or than the cluster has or may grow to after the wait.
    """
    if address is None and not ray.is_initialized():
        log("starting Ray on this machine")  # seconds, on a busy machine a minute
    with told_meanwhile(log, "Ray is still starting" if address is None else f"{address} has not answered yet"):
        connect(address)
    gpus, workers = resources.gpus_per_trial, resources.workers
    if gpus is None or gpus == AUTO:
        gpus = float(any(node["Resources"].get("GPU", 0) > 0 for node in usable_nodes()))
    needs = Needs(resources.cpus_per_trial, 1.0 if workers > 1 and gpus else float(gpus), workers)
    wait_for_room(needs, 0.0 if address is None else resources.wait_seconds, log)
    return needs


@contextmanager
def told_meanwhile(log: Callable[[str], None], text: str) -> Iterator[None]:
    """Logs every few seconds that the block is still running, and for how long: it may be stuck in Ray's code."""
    over, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(STILL_SECONDS):
            log(f"{text} ({time.monotonic() - started:.0f} s)")

    thread = threading.Thread(target=tell, daemon=True, name="still")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_room(needs: Needs, seconds: float, log: Callable[[str], None]) -> None:
    """Returns once the cluster has room for a trial, or its autoscaler may start a node that has.

    Raises:
        UsageError: it has none after `seconds`, or the autoscaler may start no such node.
    """
    started, said_at = time.monotonic(), float("-inf")
    while not room_now(needs):
        at_most, waited = room_at_most(needs), time.monotonic() - started
        if at_most:
            log(f"no node has room for a trial ({needs}) yet: the cluster's autoscaler is asked for one")
            return
        if at_most == 0 or waited >= seconds:
            raise UsageError(
                f"resources: a trial asks for {needs}, but the cluster has {held()}"
                f"{f' after {waited:.0f} s' if seconds else ''}: lower resources.cpus_per_trial or gpus_per_trial"
                f"{', or wait longer for nodes (resources.wait_seconds)' if seconds else ''}."
            )
        if time.monotonic() > said_at + SAY_AGAIN_SECONDS:
            said_at = time.monotonic()
            log(
                f"no node has room for a trial ({needs}; the cluster has {held()}): waiting for nodes, "
                f"{seconds - waited:.0f} s more (resources.wait_seconds)"
            )
        time.sleep(LOOK_SECONDS)


def held() -> str:
    """The CPUs and GPUs of the cluster's nodes, in words."""
    available, count = ray.cluster_resources(), len(usable_nodes())
    return f"{available.get('CPU', 0):g} CPUs and {available.get('GPU', 0):g} GPUs on {count} {'node' if count == 1 else 'nodes'}"
