"""`svd`: a Linear S -> T as two, S -> r -> T. Params r(S + T).

It helps a square layer below half its width, and a classifier with few classes hardly ever: T = 10 leaves r <= 9. Packed query, key
and value projections of attention are one Linear of 3S outputs: one input factor serves all three and every head (4rS params against
6rS for three separate ones). Per head there is nothing to gain: a head's d rows have rank d already, and no rank r < d is
cheaper than dense unless r < dS / (d + S).

An Embedding of S rows is a lookup of r numbers and a Linear r -> T: fewer params, r·T more MACs a row, and rows that calibration does not
meet are cut all the same, so it is lowered only where `svd` is asked for by name. A head that is tied to it shares its factors.

Reference: Denton et al. 2014, arXiv 1404.0736.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ranksearch.lowering.contract import register
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.spec import LayerSpec


@register
class Svd(MatrixLowering):
    name = "svd"
    pivoted_ends = ("last",)

    def refusal(self, spec: LayerSpec) -> str | None:
        return "svd lowers Linear layers; a convolution takes im2col, channel or spatial." if spec.is_conv else None

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        return spec.out_channels, spec.in_channels

    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor:
        return blocks

    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor:
        return matrices

    def chain(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        first = LayerSpec(spec.in_channels, rank, transposed=spec.lookup, lookup=spec.lookup)
        return first, LayerSpec(rank, spec.out_channels, bias=spec.bias)

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
        return right, left

    def join(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
        first, second = factors
        return second, first
