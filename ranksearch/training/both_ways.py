"""A replayed step against the same step made by hand, once, before any other one is replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

ALIKE = 0.1
"""How far a replayed step may end from the same step made by hand, as a share of the step: sums in another order move it by less than .01
in bf16, what a recording has missed by much more."""


def difference(
    memory: Sequence[Tensor], generator: torch.Generator, by_hand: Callable[[], None], by_replay: Callable[[], bool]
) -> str | None:
    """Makes a step by hand, undoes it, and makes it by replay; returns why replays cannot be trusted, None where they can.

    Afterwards the step has been made once: as it was replayed, or by hand where these differ.

    Args:
        memory: all that the step changes.
        generator: what it draws from, beside torch's own.
        by_replay: says whether it was a replay; one that was refused, and made by hand, is no difference.
    """
    device = memory[0].device
    before, drawn = _copies(memory), generator.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        by_hand()
    expected, drawn_then = _copies(memory), generator.get_state()
    _overwrite(memory, before)
    generator.set_state(drawn)
    replayed = by_replay()
    apart, moved = _distance(_copies(memory), expected), _distance(before, expected)
    if not replayed or not isfinite(moved) or apart <= ALIKE * moved:
        return None
    _overwrite(memory, expected)
    generator.set_state(drawn_then)
    return f"a replayed step ends {apart / moved if moved else apart:.2g} steps away from where the same step made by hand does"


def _copies(memory: Sequence[Tensor]) -> list[Tensor]:
    """On the CPU: a GPU that is shared may have no room for them."""
    return [tensor.detach().to("cpu", copy=True) for tensor in memory]


@torch.no_grad()
def _overwrite(memory: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(memory, values, strict=True):
        tensor.copy_(value)


def _distance(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """Euclidean distance of two lists of tensors as one vector each; those of whole numbers do not count."""
    pairs = [(a, b) for a, b in zip(these, those, strict=True) if a.is_floating_point()]
    return float(torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum().sqrt())
