"""`im2col`: the lowering of Lee et al. 2019, T x (S·k). A k conv S -> r, then a 1x1 conv r -> T.

Params r(T + S·k) per group. The first conv keeps stride, padding and dilation, so the maps shrink once. It helps most where
T is large against r; on a 1x1 kernel it is the plain SVD bottleneck, and on depthwise convs (T/g = 1) no rank is cheaper than dense.

Reference: Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145; as two conv layers: Zhang et al. 2016, arXiv 1505.06798.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ranksearch.lowering.contract import MatrixLowering, kernel_area, register
from ranksearch.lowering.spec import LayerSpec


@register
class Im2col(MatrixLowering):
    name = "im2col"

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.is_conv else "im2col lowers convolutions; a Linear takes svd."

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        return spec.out_channels // spec.groups, spec.in_channels // spec.groups * kernel_area(spec)

    def unfold(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        return spec.grouped(weight).flatten(2)

    def fold(self, matrix: Tensor, spec: LayerSpec) -> Tensor:
        return matrix.reshape(spec.weight_shape)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        hidden = spec.groups * rank
        return (
            replace(spec, out_channels=hidden, bias=False),
            spec.pointwise(hidden, spec.out_channels, groups=spec.groups, bias=spec.bias),
        )

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        groups, rows, rank = left.shape
        first = right.reshape(groups * rank, spec.in_channels // spec.groups, *spec.kernel_size)
        second = left.reshape(groups * rows, rank, *(1 for _ in spec.kernel_size))
        return first, second

    def join(self, first: Tensor, second: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        rows, columns = self.matrix_shape(spec)
        return second.reshape(spec.groups, rows, -1), first.reshape(spec.groups, -1, columns)
