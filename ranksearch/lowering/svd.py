"""`svd`: a Linear S -> T as two, S -> r -> T. Params r(S + T).

It helps a square layer below half its width, and a classifier with few classes hardly ever: T = 10 leaves r <= 9.

Reference: Denton et al. 2014, arXiv 1404.0736.
"""

from __future__ import annotations

from torch import Tensor

from ranksearch.lowering.contract import MatrixLowering, register
from ranksearch.lowering.spec import LayerSpec


@register
class Svd(MatrixLowering):
    name = "svd"

    def refusal(self, spec: LayerSpec) -> str | None:
        return "svd lowers Linear layers; a convolution takes im2col, channel or spatial." if spec.is_conv else None

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        return spec.out_channels, spec.in_channels

    def unfold(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        return weight.unsqueeze(0)

    def fold(self, matrix: Tensor, spec: LayerSpec) -> Tensor:
        return matrix.squeeze(0)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        return LayerSpec(spec.in_channels, rank), LayerSpec(rank, spec.out_channels, bias=spec.bias)

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        return right.squeeze(0), left.squeeze(0)

    def join(self, first: Tensor, second: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        return second.unsqueeze(0), first.unsqueeze(0)
