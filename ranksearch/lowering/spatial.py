"""`spatial`: vertical then horizontal, (T·kw) x (kh·S). A kh x 1 conv S -> r, then a 1 x kw conv r -> T. Two axes only.

Params r(S·kh + T·kw) per group. Each factor takes its own axis' stride, padding and dilation; padding modes act per axis, so they
survive the split, and so does a transposed conv's output padding. On a kernel with one side of 1 it equals `channel` or `im2col`; on
1x1 kernels it is the plain bottleneck. The one matrix lowering that can shrink a depthwise conv: a 3x3 kernel at rank 1 keeps 6 of 9.

Reference: Jaderberg, Vedaldi & Zisserman 2014, arXiv 1405.3866 (scheme 2); spatial SVD in AIMET.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ranksearch.lowering.contract import register
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.spec import LayerSpec


@register
class Spatial(MatrixLowering):
    name = "spatial"
    pivoted_ends = ("first",)
    takes_more = True

    def refusal(self, spec: LayerSpec) -> str | None:
        if len(spec.kernel_size) == 2:
            return None
        return "spatial splits a kernel into a column and a row, so it takes convolutions over two axes alone."

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        outputs, inputs, kh, kw = spec.block_shape
        return outputs * kw, kh * inputs

    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor:
        # [g, T/g, S/g, kh, kw] -> [g, T/g·kw, kh·S/g]; S stays innermost, as it is in channels_last weights
        return blocks.permute(0, 1, 4, 3, 2).flatten(3).flatten(1, 2)

    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor:
        outputs, inputs, kh, kw = spec.block_shape
        return matrices.reshape(spec.groups, outputs, kw, kh, inputs).permute(0, 1, 4, 3, 2)

    def chain(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        hidden, groups = spec.groups * rank, spec.groups
        return (
            spec.along(0, spec.in_channels, hidden, groups=groups),
            spec.along(1, hidden, spec.out_channels, groups=groups, bias=spec.bias),
        )

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
        kh, kw = spec.kernel_size
        first = right.unflatten(2, (kh, -1)).transpose(2, 3).unsqueeze(4)  # [g, r, kh·S/g] -> [g, r, S/g, kh, 1]
        second = left.unflatten(1, (-1, kw)).transpose(2, 3).unsqueeze(3)  # [g, T/g·kw, r] -> [g, T/g, r, 1, kw]
        return first, second

    def join(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
        first, second = factors
        return second.squeeze(3).transpose(2, 3).flatten(1, 2), first.squeeze(4).transpose(2, 3).flatten(2)
