"""How the trials of a study share a GPU: side by side through CUDA MPS, which runs on every node as long as they do, or in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ranksearch.cluster import mps
from ranksearch.cluster.nodes import GCS_ERRORS
from ranksearch.errors import UsageError

NODE_SECONDS = 90.0
"""How long to wait for a node; if it takes longer, its trials take turns."""


@contextmanager
def shared_gpus(
    sharing: str, several: bool, nodes: Sequence[dict[str, Any]], log: Callable[[str], None]
) -> Iterator[str | None]:
    """Runs MPS on the nodes that have GPUs until the block ends; yields the folder where trials look for it, None if it runs nowhere.

    A node that joins later has no MPS: trials there take turns.

    Args:
        sharing: `auto`, `mps` or `time_slice`, as `resources.sharing` says.
        several: whether trials share a GPU at all.
        nodes: Ray's records.

    Raises:
        UsageError: `mps` was asked for but runs nowhere.
    """
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU", 0) > 0]
    if sharing == "time_slice" or not several or not with_gpus:
        yield None
        return
    folder = mps.new_folder()
    try:
        reasons = _on(with_gpus, mps.started, folder)
        fine = [reason for reason in reasons if reason in (None, mps.TAKEN)]
        others = sorted({reason for reason in reasons if reason not in (None, mps.TAKEN)})
        if sharing == "mps" and not fine:
            raise UsageError(
                f"resources.sharing: mps: {'; '.join(others)}. With `time_slice`, trials take turns on a GPU."
            )
        said = f"MPS on {len(fine)} of {len(reasons)} nodes" if fine else "trials take turns on a GPU"
        log(f"resources.sharing: {'; '.join([said, *others])}")
        yield folder if None in reasons else None
    finally:
        _on(with_gpus, mps.stop, folder)


def _on(nodes: Sequence[str], function: Callable[[str], Any], folder: str) -> list[Any]:
    """What `function(folder)` returns on every node, or a sentence for a node that does not answer."""
    asked = [
        ray.remote(function)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(folder)
        for node in nodes
    ]
    found = []
    for task in asked:
        try:
            found.append(ray.get(task, timeout=NODE_SECONDS))
        except GCS_ERRORS as error:
            found.append(f"a node does not answer ({type(error).__name__})")
    return found
