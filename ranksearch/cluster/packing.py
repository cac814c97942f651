"""How many trials fit: onto a GPU, a node, a cluster. Pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor

MARGIN = 0.10
"""The share of a trial's measured peak that is added: plans differ, and an allocator's blocks do not fit each other exactly."""
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
        """The offer of a node, from its resources as Ray names them."""
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0))


@dataclass(frozen=True)
class Needs:
    """What one trial takes of a cluster: so many workers, with so many cores and (parts of) GPUs each."""

    cpus: int
    gpus: float
    workers: int = 1

    def __str__(self) -> str:
        each = f" for each of its {self.workers} workers" if self.workers > 1 else ""
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs{each}"


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


def trials_at_once(machines: Iterable[Machine], needs: Needs, peak: int = 0) -> int:
    """How many trials these nodes hold at once.

    Args:
        peak: bytes of a one-process trial at its peak, where that is known: no node is given more than fit its memory, but one.
    """
    fits = []
    for machine in machines:
        found = workers_on(machine, needs.cpus, needs.gpus)
        fits.append(min(found, max(1, floor(machine.memory / peak))) if peak else found)
    return sum(fits) // needs.workers
