"""How many trials fit: onto a GPU, a node, a cluster. Pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor

MARGIN = 0.10
"""The share that is added to a trial's measured peak: plans differ, and memory allocators leave gaps."""
MOST = 16
"""The most trials on one GPU; with more, each slows down by as much as the GPU gains."""
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What one node of a cluster has: cores, GPUs, bytes that its workers may use."""

    cpus: float
    gpus: float
    memory: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Machine:
        """Makes one from a node's resources as Ray names them."""
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0))


@dataclass(frozen=True)
class Needs:
    """What one trial needs of a cluster: a number of workers, and for each of them cores and (parts of) GPUs."""

    cpus: int
    gpus: float
    workers: int = 1

    def __str__(self) -> str:
        each = f" for each of its {self.workers} workers" if self.workers > 1 else ""
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs{each}"


def per_gpu(peak: int, sizes: Sequence[int], *, cpus_per_gpu: float, cpus: int) -> int:
    """How many trials share a GPU: as many as have an equal share of the smallest GPU that holds the peak with its margin.

    Args:
        peak: bytes that one trial takes on its device in all.
        sizes: bytes of the cluster's GPUs.
        cpus_per_gpu: cores per GPU on the node that has fewest.
        cpus: cores that one trial takes.

    Returns:
        At least 1, also where one trial does not fit.
    """
    by_memory = floor(min(sizes) / (peak * (1 + MARGIN)))
    return max(1, min(by_memory, floor(cpus_per_gpu / cpus), MOST))


def share_of(trials: int) -> float:
    """The part of a GPU for each of `trials`, rounded down to Ray's precision so that all of them fit."""
    return floor(10_000 / trials) / 10_000


def workers_on(machine: Machine, cpus: float, gpus: float) -> int:
    """How many processes that take `cpus` cores and `gpus` (parts of) GPUs each fit onto a node."""
    fits = floor(machine.cpus / cpus)
    if not gpus:
        return fits
    # a part of a GPU must be on a single one
    on_gpus = floor(machine.gpus) * floor(1 / gpus) if gpus < 1 else floor(machine.gpus / gpus)
    return min(fits, on_gpus)


def trials_at_once(machines: Iterable[Machine], needs: Needs, peak: int = 0) -> int:
    """How many trials these nodes hold at once.

    Args:
        peak: bytes of a one-process trial at its peak, if known: a node gets no more trials than fit its memory, but at least one.
    """
    fits = []
    for machine in machines:
        found = workers_on(machine, needs.cpus, needs.gpus)
        fits.append(min(found, max(1, floor(machine.memory / peak))) if peak else found)
    return sum(fits) // needs.workers
