"""Where and in which arithmetic a net is trained."""

from __future__ import annotations

import time

import torch

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


def use_bf16(precision: str, device: torch.device, macs: int) -> bool:
    """Whether to train under bf16 autocast: as `precision` says ("bf16", "fp32"), or for "auto" where it is faster.

    "auto" asks for bf16 arithmetic in the hardware and, on a CPU, for a net large enough to gain.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() and macs >= BF16_FROM_MACS
