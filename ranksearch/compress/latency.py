"""Latency, measured: nets in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

ROUNDS, WARM_UP = 30, 3
SECONDS = 3.0
"""Rounds end here, but not before five of them."""


@torch.inference_mode()
def latencies_ms(
    models: Sequence[Callable[[torch.Tensor], Any]], example: torch.Tensor, rounds: int = ROUNDS
) -> list[float]:
    """Median time of one call in milliseconds, per model, on the device of `example` with the threads of this process.

    Args:
        models: nets, which are moved there and set to evaluation mode, or any functions of a batch.
        example: input batch, as the models take it.
    """
    device = example.device
    times: list[list[float]] = [[] for _ in models]
    started = time.perf_counter()
    for model in models:
        if isinstance(model, nn.Module):
            model.to(device).eval()
    for turn in range(WARM_UP + rounds):
        if turn >= WARM_UP + 5 and time.perf_counter() - started > SECONDS:
            break
        for model, found in zip(models, times, strict=True):
            _wait(device)
            before = time.perf_counter()
            model(example)
            _wait(device)
            if turn >= WARM_UP:
                found.append(1000 * (time.perf_counter() - before))
    return [median(found) for found in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
