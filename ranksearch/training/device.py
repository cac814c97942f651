"""Where and in which arithmetic a net is trained, and how much memory it may take there."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

BF16_FROM_MACS = 5_000_000
"""Below about this many MACs per image a CPU loses more to autocast's casts than bf16 products gain."""


def pick_device() -> torch.device:
    """CUDA where there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock(device: torch.device) -> float:
    """Seconds on a running clock; what is queued on a GPU is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Spans:
    """Times of pieces of work that nobody waits for: on a GPU between two of its own events."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def span(self, device: torch.device) -> Iterator[None]:
        """What is queued within is timed."""
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def taken(self) -> float:
        """Seconds of all that has been timed since the last call; what is queued must have been waited for."""
        found = self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return found


def use_bf16(precision: str, device: torch.device, macs: int) -> bool:
    """Whether to train under bf16 autocast: as `precision` says ("bf16", "fp32"), or for "auto" where it is faster.

    "auto" asks for bf16 arithmetic in the hardware and, on a CPU, for a net large enough to gain.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() and macs >= BF16_FROM_MACS


def channels_last_(model: nn.Module) -> nn.Module:
    """Lays the weights of 2-D convs out as these compute fastest; other layers, for which there is no such layout, keep theirs."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


CONTEXT_BYTES = 512 * 2**20
"""Bytes that a process takes of a GPU beside what PyTorch allocates (CUDA context, kernels): an estimate, used where none was measured."""


class DeviceMemory(Protocol):
    """The memory of one device, as far as a trial's place on it depends on that."""

    kind: str
    """The device's name."""
    total: int
    """Bytes."""

    def reset(self) -> None:
        """Forgets the peak so far."""

    def peak(self) -> int:
        """Bytes that this process held at most since then, all included."""

    def limit(self, share: float) -> None:
        """Lets this process run out of memory, from now on, once it wants more than `share` of the device."""


class CudaMemory:
    """The memory of the current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.kind, self.total = properties.name, properties.total_memory

    def reset(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        free, total = torch.cuda.mem_get_info()
        # what is used and was not allocated by PyTorch: the context, and what other processes hold, which a trial would find there too
        context = max(0, total - free - torch.cuda.memory_reserved())
        return int(torch.cuda.max_memory_reserved() + context)

    def limit(self, share: float) -> None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, allocatable(share, self.total)))


def allocatable(share: float, total: int) -> float:
    """What PyTorch may allocate, as a fraction of the device, so that a process stays within its `share` with its context.

    Half of a share too small for that is left: PyTorch then runs out of memory at once, which says more than an allocator's error.
    """
    return max(share / 2, share - CONTEXT_BYTES / total)


def device_memory() -> DeviceMemory | None:
    """The memory of the current device; None on a CPU."""
    return CudaMemory() if torch.cuda.is_available() else None


def limit_share(gpus: float, memory: DeviceMemory | None) -> None:
    """Keeps this process within its part of a GPU that it shares, so that one trial's lack of memory is not its neighbours'."""
    if memory is not None and 0 < gpus < 1:
        memory.limit(gpus)


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """What a trial's record says of a GPU that was too small; what the trial held is given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    first = str(error).splitlines()[0] if str(error) else "CUDA out of memory"
    return (
        f"out of GPU memory: a smaller batch (recipe.batch_size, or the task's own loader) needs less, a larger resources.gpus_per_trial "
        f"gives a trial more of the GPU "
        f"({first})"
    )
