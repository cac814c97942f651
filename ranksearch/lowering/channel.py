"""`channel`: the input side, (T·k) x S. A 1x1 conv S -> r, then a k conv r -> T.

Params r(S + T·k) per group. The 1x1 conv has no bias and works per position, so any padding mode of the second conv sees what
the dense layer saw. Under a stride the first conv still runs on the full map: `im2col` or `spatial` then cost less for a rank.
On depthwise convs (S/g = 1) no rank is cheaper than dense.

Reference: input-side channel decomposition as in Li et al. 2019 (arXiv 1812.02402) and ALDS, Liebenwein et al. 2021 (arXiv 2107.11442).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ranksearch.lowering.contract import kernel_area, register
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.spec import LayerSpec


@register
class Channel(MatrixLowering):
    name = "channel"
    pivoted_ends = ("first",)

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.is_conv else "channel lowers convolutions; a Linear takes svd."

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        outputs, inputs = spec.block_shape[:2]
        return outputs * kernel_area(spec), inputs

    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor:
        return blocks.flatten(3).transpose(2, 3).flatten(1, 2)  # [g, T/g, S/g, k] -> [g, T/g·k, S/g]

    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor:
        taps_last = matrices.unflatten(1, (-1, kernel_area(spec))).transpose(2, 3)
        return taps_last.reshape(spec.groups, *spec.block_shape)

    def chain(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        hidden = spec.groups * rank
        return spec.pointwise(spec.in_channels, hidden, groups=spec.groups), replace(spec, in_channels=hidden)

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
        kernel = spec.kernel_size
        second = left.unflatten(1, (-1, kernel_area(spec))).transpose(2, 3)  # [g, T/g, r, k]
        return right.reshape(*right.shape, *(1 for _ in kernel)), second.unflatten(3, kernel)

    def join(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
        first, second = factors
        return second.flatten(3).transpose(2, 3).flatten(1, 2), first.flatten(2)
