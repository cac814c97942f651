"""`channel`: the input side, (T·k) x S. A 1x1 conv S -> r, then a k conv r -> T.

Params r(S + T·k) per group. The 1x1 conv has no bias and works per position, so any padding mode of the second conv sees what
the dense layer saw. Under a stride the first conv still runs on the full map: `im2col` or `spatial` then cost less for a rank.

Reference: input-side channel decomposition as in Li et al. 2019 (arXiv 1812.02402) and ALDS, Liebenwein et al. 2021 (arXiv 2107.11442).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ranksearch.lowering.contract import MatrixLowering, kernel_area, register
from ranksearch.lowering.spec import LayerSpec


@register
class Channel(MatrixLowering):
    name = "channel"

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.is_conv else "channel lowers convolutions; a Linear takes svd."

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        return spec.out_channels // spec.groups * kernel_area(spec), spec.in_channels // spec.groups

    def unfold(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        # [g, T/g, S/g, k] -> [g, T/g, k, S/g] -> [g, T/g·k, S/g]
        return spec.grouped(weight).flatten(3).transpose(2, 3).flatten(1, 2)

    def fold(self, matrix: Tensor, spec: LayerSpec) -> Tensor:
        inputs = spec.in_channels // spec.groups
        return matrix.reshape(spec.out_channels, -1, inputs).transpose(1, 2).reshape(spec.weight_shape)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        hidden = spec.groups * rank
        return (
            spec.pointwise(spec.in_channels, hidden, groups=spec.groups),
            replace(spec, in_channels=hidden),
        )

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        rank = right.shape[1]
        first = right.reshape(spec.groups * rank, -1, *(1 for _ in spec.kernel_size))
        second = left.reshape(spec.out_channels, -1, rank).transpose(1, 2)
        return first, second.reshape(spec.out_channels, rank, *spec.kernel_size)

    def join(self, first: Tensor, second: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        rows, columns = self.matrix_shape(spec)
        left = spec.grouped(second).flatten(3).transpose(2, 3).reshape(spec.groups, rows, -1)
        return left, first.reshape(spec.groups, -1, columns)
