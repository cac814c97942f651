"""What we use of Ray beyond its public interface, each with the reason; `tests/test_private_parts.py` names the version that has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray

ANSWER_SECONDS = 3.0
"""How long the control store may take to answer; it is waited for a second longer."""


def draining_nodes() -> dict[str, int]:
    """Ids of nodes that are going to be taken away -> when, in ms of the epoch, 0 if not known; `ray.nodes()` does not say it."""
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found


def autoscaler_config() -> Any | None:
    """What an autoscaler may start (`node_group_configs`); None without one. The state API knows only nodes that are there already."""
    return ray._private.state.state.get_cluster_config()


def actor_record(actor_id: str) -> Any | None:
    """The control store's record of an actor (`address.node_id`, `pid`), even if it has died; None if there is none.

    The state API needs the dashboard, and `ray._private.state.actors` ends the whole process if the store dies meanwhile.

    Raises:
        RayError: the store does not answer.
    """
    actor = ray.ActorID.from_hex(actor_id)

    async def asked() -> Any:
        return await control_store().async_get_all_actor_info(actor_id=actor, timeout=ANSWER_SECONDS)

    with ThreadPoolExecutor(1) as apart:  # a notebook's thread has an event loop of its own
        return apart.submit(asyncio.run, asked()).result().get(actor)


def logs_folder() -> str | None:
    """Where the Ray that this process is connected to writes its logs on this machine; None without one."""
    node = ray._private.worker._global_node
    return None if node is None else str(node.get_logs_dir_path())


def own_node() -> Any | None:
    """The Ray that this process has started, whose own processes can be watched; None without one."""
    return ray._private.worker._global_node


def control_store() -> Any:
    """The client of the cluster's control store; only its calls take a time limit."""
    return ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Keeps Tune from saying "Trials did not complete", which it says even of trials that went on elsewhere."""
    logger = logging.getLogger("ray.tune.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
