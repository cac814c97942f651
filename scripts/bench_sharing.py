"""What a study's data cost on a cluster: copies in every node's object store, memory per worker process, time per trial.

Two Ray nodes on this machine, each with processes that take a task of random images as trials do, twice, and read every byte of it.

  copies         bytes that the node's object store gained, in sizes of the data
  data_loaded    processes of the node for which the data came there
  first_ms, again_ms   a process's first trial, which maps the data and makes the task; a later one, which has it
  unpack_ms      what a later trial took when every trial unpacked: deserialising what was shared, making the task of it
  private_mib    memory of its own that a process gained by taking the task and reading all of it

    python scripts/bench_sharing.py            200 MiB, three processes per node
    python scripts/bench_sharing.py --quick    50 MiB, two processes per node
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from report import Report, arguments

import ranksearch.cluster  # noqa: F401  (settings that Ray reads at its import)
from ranksearch.compress import trace
from ranksearch.data.resident import Resident
from ranksearch.tasks import cifar10
from ranksearch.tasks.task import Task


def private_mib() -> float:
    """Bytes of this process, without what it shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


class Taker:
    """A worker process, which takes the task as a trial does."""

    def __init__(self) -> None:
        import ranksearch.cluster.worker  # noqa: F401  (what a worker has loaded before its first trial)

    def take(self, shared: Any) -> dict[str, Any]:
        from ranksearch.cluster.shared import take

        before, started = private_mib(), time.perf_counter()
        work, placement = take(shared)
        seconds = time.perf_counter() - started
        read = int(work.task.train.inputs.sum()) + int(work.task.val.inputs.sum())
        return {
            "node_id": placement.node_id, "data_loaded": placement.data_loaded, "unpacked": placement.unpacked, "ms": 1000 * seconds,
            "private_mib": private_mib() - before, "sum": read,
        }  # fmt: skip

    def unpack(self, shared: Any) -> float:
        import ray

        from ranksearch.cluster.pack import unpack

        started = time.perf_counter()
        unpack(ray.get(shared.goods).packed)
        return 1000 * (time.perf_counter() - started)


def random_bench(mib: int, seed: int) -> Any:
    """A task of so many random images under CIFAR-10's ResNet-20, and what else is shared."""
    count = mib * 2**20 // (3 * 32 * 32)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    net = cifar10.build_model("resnet20")
    data = Resident(images, torch.zeros(count, dtype=torch.int64), cifar10.NORMALISE)
    task = Task(model=net, train=data, val=data.first(1000), example_input=torch.zeros(1, 3, 32, 32))
    return SimpleNamespace(task=task, dense=net.state_dict(), net=trace(net, task.example_input))


def main(words: list[str]) -> None:
    parser = arguments(__doc__, mib=200, processes=3)
    options = parser.parse_args(words)
    if options.quick:
        options.mib, options.processes = min(options.mib, 50), min(options.processes, 2)
    report = Report("bench_sharing", options)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    from ray._private.internal_api import node_stats
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ranksearch.cluster.shared import share

    bench = random_bench(options.mib, options.seed)
    store = {"object_store_memory": 4 * options.mib * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": options.processes, "include_dashboard": False, **store}
    )
    cluster.add_node(num_cpus=options.processes, **store)
    try:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        nodes = {node["NodeID"]: node for node in ray.nodes()}

        def stored(node: dict[str, Any]) -> int:
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
            return int(stats.store_stats.object_store_bytes_used)

        before = {name: stored(node) for name, node in nodes.items()}
        shared, driver = share(bench, None, None)
        report.say(f"{shared.bytes / 2**20:.0f} MiB shared in {driver.seconds:.2f} s")
        actor = ray.remote(num_cpus=1)(Taker)
        takers = [
            actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote()
            for name in nodes
            for _ in range(options.processes)
        ]
        first = ray.get([taker.take.remote(shared) for taker in takers])
        again = ray.get([taker.take.remote(shared) for taker in takers])
        unpacked = ray.get([taker.unpack.remote(shared) for taker in takers])
        loads = Counter(found["node_id"] for found in first + again if found["data_loaded"])
        loads[driver.node_id] += 1
        for name, node in nodes.items():
            here = [i for i, found in enumerate(first) if found["node_id"] == name]
            report.rows.append({
                "node": "driver's" if name == driver.node_id else "other", "processes": len(here),
                "copies": (stored(node) - before[name]) / shared.bytes, "data_loads": loads[name],
                "first_ms": median(first[i]["ms"] for i in here), "again_ms": median(again[i]["ms"] for i in here),
                "unpack_ms": median(unpacked[i] for i in here), "private_mib": max(first[i]["private_mib"] for i in here),
            })  # fmt: skip
        right = int(bench.task.train.inputs.sum()) + int(bench.task.val.inputs.sum())
        figures = {
            "data_loads_per_node": max(loads.values()), "copies_max": max(row["copies"] for row in report.rows),
            "private_mib_max": max(row["private_mib"] for row in report.rows), "data_mib": shared.bytes / 2**20,
            "first_ms": median(found["ms"] for found in first), "again_ms": median(found["ms"] for found in again),
            "unpack_ms": median(unpacked), "wrong_reads": sum(found["sum"] != right for found in first + again),
        }  # fmt: skip
    finally:
        ray.shutdown()
        cluster.shutdown()
    report.finish(figures)


if __name__ == "__main__":
    main(sys.argv[1:])
