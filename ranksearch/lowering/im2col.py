"""`im2col`: the lowering of Lee et al. 2019, T x (k·S). A k conv S -> r, then a 1x1 conv r -> T.

Params r(T + S·k) per group. The first conv keeps stride, padding and dilation, so the maps shrink once. It helps most where
T is large against r; on a 1x1 kernel it is the plain SVD bottleneck, and on depthwise convs (T/g = 1) no rank is cheaper than dense.
A transposed conv whose stride enlarges the map pays for the 1x1 conv at the enlarged size: `channel` then costs less for a rank.

Reference: Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145; as two conv layers: Zhang et al. 2016, arXiv 1505.06798.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ranksearch.lowering.contract import kernel_area, register
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.spec import LayerSpec


@register
class Im2col(MatrixLowering):
    name = "im2col"
    pivoted_ends = ("last",)

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.is_conv else "im2col lowers convolutions; a Linear takes svd."

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        outputs, inputs = spec.block_shape[:2]
        return outputs, inputs * kernel_area(spec)

    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor:
        # [g, T/g, S/g, *k] -> [g, T/g, k·S/g]: of a channels_last weight this is a view
        return blocks.flatten(3).transpose(2, 3).flatten(2)

    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor:
        return matrices.unflatten(2, (*spec.kernel_size, -1)).movedim(-1, 2)

    def chain(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        hidden = spec.groups * rank
        return (
            replace(spec, out_channels=hidden, bias=False),
            spec.pointwise(hidden, spec.out_channels, groups=spec.groups, bias=spec.bias),
        )

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
        return self.fold(right, spec), left.reshape(*left.shape, *(1 for _ in spec.kernel_size))

    def join(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
        first, second = factors
        return second.flatten(2), self.unfold(first, spec)
