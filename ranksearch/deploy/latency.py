"""Latency, measured: nets in turn, so that what else the machine does falls on all of them alike.

Three things make a time repeatable on a machine that is shared, each worth tens of percent there: one thread on a CPU is timed by its
own clock, which stands still while other processes have the core; a short call is preceded by one that is not timed, so that a net
finds its weights in the caches as it does where it runs by itself; and memory is kept between calls (fresh pages from the system
are a third of ResNet-20's time at batch 32).
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from ranksearch.model.inputs import call, device_of

ROUNDS, WARM_UP = 30, 3
SECONDS = 3.0
"""Rounds end here, but not before five of them."""
SHORT_MS = 20.0
"""A call that takes less is preceded by one that warms the caches for it."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


@torch.inference_mode()
def latencies_ms(
    models: Sequence[Callable[..., Any]],
    example: Any,
    rounds: int = ROUNDS,
    *,
    seconds: float = SECONDS,
    least: int = 5,
) -> list[float]:
    """Median time of one call in milliseconds, per model, on the device of `example` with the threads of this process.

    Args:
        models: nets, which are moved there and set to evaluation mode, or any functions of a batch, which is one value to them.
        example: input batch, as the models take it.
        seconds: rounds end after this long, but not before `least` of them.
    """
    device = device_of(example)
    clock = _clock(device)
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        if isinstance(model, nn.Module):
            model.to(device).eval()
    functions = [partial(call, model) if isinstance(model, nn.Module) else model for model in models]
    with _memory_kept(device):
        started = time.perf_counter()
        short = [_timed_ms(model, example, clock) < SHORT_MS for model in functions]
        for turn in range(WARM_UP + rounds):
            if turn >= min(WARM_UP, least) + least and time.perf_counter() - started > seconds:
                break
            for model, found, brief in zip(functions, times, short, strict=True):
                if brief:
                    model(example)
                found.append(_timed_ms(model, example, clock))
    warm_up = min(WARM_UP, least)
    return [median(found[warm_up:]) for found in times]


def _timed_ms(model: Callable[[Any], Any], example: Any, clock: Callable[[], float]) -> float:
    device = device_of(example)
    _wait(device)
    before = clock()
    model(example)
    _wait(device)
    return 1000 * (clock() - before)


def _clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds: this thread's own where nothing else computes, else the wall's."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _memory_kept(device: torch.device) -> Iterator[None]:
    """Freed memory stays with the process, so that no call pays for fresh pages; where the C library is not glibc, nothing changes."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # where glibc's own adjustment ends up in a process that has freed large blocks; it does not go on once mallopt was called
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)


@contextlib.contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Within, torch and whatever is opened compute with `count` threads on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def hardware_name(device: torch.device) -> str:
    """The GPU's name, else the processor's, under which a table of measured times is kept."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
