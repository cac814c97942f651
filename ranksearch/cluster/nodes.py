"""A cluster's nodes at this moment: how many trials they hold, which are gone, which are going to be taken away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from enum import Enum
from typing import Any

import ray
from ray.exceptions import RayError

from ranksearch.cluster.packing import Machine, Needs, trials_at_once, workers_on
from ranksearch.cluster.ray_private import actor_record, autoscaler_config, draining_nodes

POLL_SECONDS = 2.0
"""How often a worker asks, in a thread of its own, whether its node is going to be taken away; one question takes under 1 ms."""
ANSWER_SECONDS = 3.0
"""A node that does not answer on its port within this time is gone; Ray itself takes ten seconds or more to say so."""
AHEAD = 8
"""Number of trials that wait beyond what an autoscaling cluster holds, so that it grows; a larger cluster gets as many as it holds."""
GCS_ERRORS = (RayError, RuntimeError, ConnectionError)
"""What Ray raises when its control store does not answer."""


class NodeState(Enum):
    ALIVE = "alive"
    LEAVING = "is being taken away"
    GONE = "is gone"


def usable_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes that are alive and stay."""
    leaving = leaving_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def leaving_nodes() -> dict[str, int]:
    """Ids of the nodes that are going to be taken away (by `ray drain-node`, an autoscaler, a spot handler, SIGTERM to `ray start --block`)
    -> when, in ms of the epoch, 0 where that is not known."""
    return draining_nodes()


def machines() -> list[Machine]:
    """What each node that is alive and stays has."""
    return [Machine.of(node["Resources"]) for node in usable_nodes()]


def room_now(needs: Needs, peak: int = 0) -> int:
    """How many trials the cluster's nodes hold; `peak` as in `packing.trials_at_once`."""
    return trials_at_once(machines(), needs, peak)


def room_at_most(needs: Needs) -> int | None:
    """How many trials would fit onto all nodes that the cluster's autoscaler may start; None without an autoscaler."""
    config = autoscaler_config()
    if config is None or not config.node_group_configs:
        return None
    endless = 2**31
    groups = [(g.max_count if g.max_count >= 0 else endless, dict(g.resources)) for g in config.node_group_configs]
    return sum(count * workers_on(Machine.of(has), needs.cpus, needs.gpus) for count, has in groups) // needs.workers


def wanted(now: int, at_most: int | None) -> int:
    """How many trials may be under way: as many as there is room for, and, as only demand makes a cluster grow, some that wait."""
    return now if at_most is None else max(now, min(at_most, now + max(AHEAD, now)))


def node_of_actor(actor_id: str) -> str | None:
    """The id of the node that an actor is on, even if it has died; None if Ray does not know, or does not answer."""
    try:
        record = actor_record(actor_id)
    except GCS_ERRORS:
        return None
    return record.address.node_id.hex() or None if record is not None else None


def find_node(node_id: str | None) -> dict[str, Any] | None:
    """Ray's record of a node."""
    return next((node for node in ray.nodes() if node["NodeID"] == node_id), None)


def state_of(node: Mapping[str, Any] | None) -> NodeState:
    """The state of a node, from its record. Asks the node itself, since Ray notices late that one has died."""
    if node is None or not node["Alive"]:
        return NodeState.GONE
    if not answers(node["NodeManagerAddress"], node["NodeManagerPort"], ANSWER_SECONDS):
        return NodeState.GONE
    return NodeState.LEAVING if node["NodeID"] in leaving_nodes() else NodeState.ALIVE


def answers(host: str, port: int, seconds: float) -> bool:
    """Whether something listens at a TCP port."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError:
        return False
    return True


class LeaveWatch:
    """Watches whether this process's node is going to be taken away, in a thread, so that no training step waits for an answer."""

    def __init__(self) -> None:
        self._own = ray.get_runtime_context().get_node_id()
        self._leaves, self._over = threading.Event(), threading.Event()
        self._ask()
        threading.Thread(target=self._watch, daemon=True, name="leave-watch").start()

    def _ask(self) -> None:
        try:
            if self._own in leaving_nodes():
                self._leaves.set()
        except GCS_ERRORS:
            return  # the cluster's head does not answer, which says nothing about this node

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS) and not self._leaves.is_set():
            self._ask()

    def leaves(self) -> bool:
        return self._leaves.is_set()

    def stop(self) -> None:
        self._over.set()
