"""Cores that this process may use. Imports only the standard library, like `preflight/facts.py`, which calls it on every node."""

from __future__ import annotations

import os
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Where BLAS and OpenMP of a process, and of those that it starts, read how many threads they may compute with."""


def affinity_cores() -> int:
    """Cores that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota_cores() -> float | None:
    """Cores that a container's CPU quota allows; None without a quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def usable_cores() -> int:
    """Whole cores within the affinity and the quota, at least one."""
    cores, quota = affinity_cores(), quota_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))
