"""`spatial`: vertical then horizontal, (S·kh) x (T·kw). A kh x 1 conv S -> r, then a 1 x kw conv r -> T. Conv2d only.

Params r(S·kh + T·kw) per group. Each factor takes its own axis' stride, padding and dilation; padding modes act per axis, so they
survive the split. On a kernel with one side of 1 it equals `channel` or `im2col`; on 1x1 kernels it is the plain bottleneck.

Reference: Jaderberg, Vedaldi & Zisserman 2014, arXiv 1405.3866 (scheme 2); spatial SVD in AIMET.
"""

from __future__ import annotations

from torch import Tensor

from ranksearch.lowering.contract import MatrixLowering, register
from ranksearch.lowering.spec import LayerSpec


@register
class Spatial(MatrixLowering):
    name = "spatial"

    def refusal(self, spec: LayerSpec) -> str | None:
        if len(spec.kernel_size) == 2:
            return None
        return "spatial splits a kernel into a column and a row, so it takes a Conv2d alone."

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        kh, kw = spec.kernel_size
        return spec.in_channels // spec.groups * kh, spec.out_channels // spec.groups * kw

    def unfold(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        # [g, T/g, S/g, kh, kw] -> [g, S/g, kh, T/g, kw] -> [g, S/g·kh, T/g·kw]
        return spec.grouped(weight).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)

    def fold(self, matrix: Tensor, spec: LayerSpec) -> Tensor:
        kh, kw = spec.kernel_size
        split = matrix.reshape(spec.groups, -1, kh, spec.out_channels // spec.groups, kw)
        return split.permute(0, 3, 1, 2, 4).reshape(spec.weight_shape)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        hidden = spec.groups * rank
        (kh, kw), (sh, sw), (dh, dw) = spec.kernel_size, spec.stride, spec.dilation
        if isinstance(spec.padding, str):
            vertical: tuple[int, ...] | str = spec.padding
            horizontal: tuple[int, ...] | str = spec.padding
        else:
            vertical, horizontal = (spec.padding[0], 0), (0, spec.padding[1])
        shared = {"groups": spec.groups, "padding_mode": spec.padding_mode}
        return (
            LayerSpec.conv(
                spec.in_channels,
                hidden,
                (kh, 1),
                stride=(sh, 1),
                padding=vertical,
                dilation=(dh, 1),
                **shared,
            ),
            LayerSpec.conv(
                hidden,
                spec.out_channels,
                (1, kw),
                stride=(1, sw),
                padding=horizontal,
                dilation=(1, dw),
                bias=spec.bias,
                **shared,
            ),
        )

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        (kh, kw), rank = spec.kernel_size, left.shape[-1]
        # [g, S/g·kh, r] -> [g·r, S/g, kh, 1] and [g, r, T/g·kw] -> [T, r, 1, kw]
        first = left.transpose(1, 2).reshape(spec.groups * rank, -1, kh, 1)
        second = right.reshape(spec.groups, rank, -1, kw).transpose(1, 2)
        return first, second.reshape(spec.out_channels, rank, 1, kw)

    def join(self, first: Tensor, second: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        rows, columns = self.matrix_shape(spec)
        left = first.reshape(spec.groups, -1, rows).transpose(1, 2)
        right = spec.grouped(second).flatten(3).transpose(1, 2).reshape(spec.groups, -1, columns)
        return left, right
