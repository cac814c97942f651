"""Padding that a layer's own code does before it convolves: `Pad` says which, `padded` does it.

torch's layers pad both ends of an axis alike. Layers of other libraries pad them differently (causal convolutions) or as the size asks
for ("same" at a stride, as TensorFlow has it). A convolution of such a layer is the padding and then a plain one without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ranksearch.lowering.spec import Ints


@dataclass(frozen=True)
class Pad:
    """What is added to the ends of a map's spatial axes."""

    mode: str
    """As `torch.nn.functional.pad` names it; "constant" adds zeros."""
    ends: Ints | None
    """(before, after) of the last axis, of the one before it, …; None: as much as makes the output ceil(size / stride) long, the larger
    half behind."""
    kernel_size: Ints
    stride: Ints
    dilation: Ints

    def ends_of(self, size: Ints) -> list[int]:
        """`ends` for a map of extents `size`."""
        if self.ends is not None:
            return list(self.ends)
        found: list[int] = []
        for n, k, s, d in zip(size, self.kernel_size, self.stride, self.dilation, strict=True):
            total = torch.sym_max((-(n // -s) - 1) * s + (k - 1) * d + 1 - n, 0)
            found = [total // 2, total - total // 2, *found]
        return found

    def size_of(self, size: Ints) -> Ints:
        """The padded extents of a map of extents `size`."""
        ends = self.ends_of(size)
        axes = len(size)
        return tuple(n + ends[2 * (axes - 1 - i)] + ends[2 * (axes - 1 - i) + 1] for i, n in enumerate(size))


def padded(x: Tensor, pad: Pad) -> Tensor:
    """x [.., S, *size] -> [.., S, *pad.size_of(size)]"""
    return F.pad(x, pad.ends_of(tuple(x.shape[-len(pad.kernel_size) :])), mode=pad.mode)
