"""How many trials fit: onto a GPU, a node, a cluster. Pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor

from ranksearch.errors import UsageError

MARGIN = 0.10
"""Of a trial's measured peak that is added: plans differ, and an allocator's blocks do not fit each other exactly."""
MOST = 16
"""Trials on one GPU; with more each is slowed down by as much as the GPU gains."""
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What one node of a cluster has: cores, GPUs, bytes that its workers may use."""

    cpus: float
    gpus: float
    memory: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Machine:
        """Of a node's resources as Ray names them."""
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0))


def per_gpu(peak: int, sizes: Sequence[int], *, cpus_per_gpu: float, cpus: int) -> int:
    """How many trials share a GPU: the most whose equal shares of the smallest GPU each hold the peak with its margin.

    Args:
        peak: bytes of one trial on its device, all included.
        sizes: bytes of the cluster's GPUs.
        cpus_per_gpu: cores beside each GPU, of the node that has fewest.
        cpus: cores that one trial takes.

    Returns:
        At least 1, also where one trial does not fit.
    """
    by_memory = floor(min(sizes) / (peak * (1 + MARGIN)))
    return max(1, min(by_memory, floor(cpus_per_gpu / cpus), MOST))


def share_of(trials: int) -> float:
    """The part of a GPU that so many trials leave each; rounded down to what Ray counts in, so that all of them fit."""
    return floor(10_000 / trials) / 10_000


def workers_on(machine: Machine, cpus: float, gpus: float) -> int:
    """How many processes fit a node that take so many cores and (parts of) GPUs each."""
    fits = floor(machine.cpus / cpus)
    if not gpus:
        return fits
    # a part of a GPU lies on one GPU
    on_gpus = floor(machine.gpus) * floor(1 / gpus) if gpus < 1 else floor(machine.gpus / gpus)
    return min(fits, on_gpus)


def trials_at_once(machines: Sequence[Machine], *, cpus: float, gpus: float, workers: int) -> int:
    """How many trials the cluster holds at once, each of so many workers that take so many cores and GPUs each.

    Raises:
        UsageError: not even one.
    """
    fits = sum(workers_on(machine, cpus, gpus) for machine in machines) // workers
    if fits < 1:
        asks = f"{cpus:g} CPUs and {gpus:g} GPUs" + (f" for each of its {workers} workers" if workers > 1 else "")
        has = f"{sum(m.cpus for m in machines):g} and {sum(m.gpus for m in machines):g}"
        has += f" on {len(machines)} nodes" if len(machines) > 1 else ""
        raise UsageError(
            f"resources: a trial asks for {asks}, but the cluster has {has}: lower resources.cpus_per_trial or gpus_per_trial."
        )
    return fits


def trials_in_memory(machines: Iterable[Machine], peak: int, *, cpus: float, gpus: float) -> int:
    """How many one-process trials of so many bytes at their peak fit the nodes' memory and cores at once; at least 1."""
    return max(1, sum(min(workers_on(m, cpus, gpus), floor(m.memory / peak)) for m in machines))
