"""Lowerings in the metric of a layer's data: what is nearest to the weight there, and what each rank removes of it.

With the metric tr(L E R Eᵀ) of an error E [n, m] the best rank r is the truncated SVD of L^½ W R^½, carried back. Only the root of
the smaller side is needed: of n <= m rows the leading eigenvectors U of L^½ W R Wᵀ L^½ give W_r = L^-½ U Uᵀ L^½ W, and the metric
of the inputs alone, L = 1, is projected without any root at all; a wide layer's R is applied and never factored.

A view projects and has curves as its lowering does. Decomposing needs none: a weight of rank r is the same product in every metric.

Reference: Chen et al. 2021 (DRONE, NeurIPS); Wang et al. 2024, arXiv 2403.07378 (SVD-LLM); Eckart & Young 1936.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ranksearch import linalg
from ranksearch.lowering.contract import Lowering, Projected, Rank, RankCurve, sides
from ranksearch.lowering.spec import LayerSpec
from ranksearch.lowering.weighting import Root, Sides, Weighting, sides_of


class Unfolding(Protocol):
    """What a view needs of a lowering whose weight is a batch of matrices."""

    def check_rank(self, spec: LayerSpec, rank: Rank) -> None: ...
    def full_rank(self, spec: LayerSpec) -> Rank: ...
    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor: ...
    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor: ...
    def curve_of(self, squared: Tensor, spec: LayerSpec, multiple: int) -> RankCurve: ...


class _Side(NamedTuple):
    """The smaller side of a batch of matrices, carried into the metric."""

    gram: Tensor  # [b, k, k], k = min(n, m)
    scale: Tensor | None
    product: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Orthonormal columns [b, k, r] -> factors [b, n, r], [b, r, m] of the matrices projected onto them."""
    left: bool


class MatrixView:
    """A batch of matrices, each cut by a truncated SVD in the metric."""

    def __init__(self, lowering: Unfolding, spec: LayerSpec, weighting: Weighting) -> None:
        self.lowering, self.spec = lowering, spec
        self._sides = sides_of(weighting, spec, lowering.unfold)

    def project(self, weight: Tensor, rank: Rank, warm: Any = None) -> Projected:
        self.lowering.check_rank(self.spec, rank)
        if rank == self.lowering.full_rank(self.spec):
            return Projected(weight.clone(), 0.0, None)  # to the last digit
        (count,) = sides(rank)
        side = self._side(weight)
        start = warm[0].to(side.gram) if warm is not None and warm[1] == side.left else None
        basis, left_out, energy = linalg.leading_of_gram(side.gram, count, start)
        left, right = side.product(basis)
        if side.scale is not None:
            square = side.scale[..., 0, 0].double().square()
            left_out, energy = left_out * square, energy * square
        share = float(left_out.sum() / energy.sum()) if float(energy.sum()) > 0 else 0.0
        return Projected(self._folded(left @ right, side, weight), share, linalg.Basis(basis, side.left))

    def curve(self, weight: Tensor, multiple: int = 1) -> RankCurve:
        side = self._side(weight)
        squared = torch.linalg.eigvalsh(side.gram).clamp_min(0).flip(-1).double()
        if side.scale is not None:
            squared = squared * side.scale[..., 0].double() ** 2
        return self.lowering.curve_of(squared, self.spec, multiple)

    def approximations(self, weight: Tensor, ranks: Sequence[Rank]) -> Iterator[Tensor]:
        counts = [sides(rank)[0] for rank in ranks]
        side = self._side(weight)
        basis, *_ = linalg.leading_of_gram(side.gram, max(counts, default=1), None)
        left, right = side.product(basis.flip(-1))  # the leading ones first
        for count in counts:
            yield self._folded(left[..., :count] @ right[..., :count, :], side, weight)

    def _side(self, weight: Tensor) -> _Side:
        matrix, scale = linalg.moderate(self.lowering.unfold(self.spec.blocks(weight), self.spec))
        seen = self._sides.like(matrix)
        if matrix.shape[-2] <= matrix.shape[-1]:
            root, undone = seen.row_root()
            carried = root(matrix)
            gram = seen.columns.times(carried) @ carried.mT
            return _Side(gram, scale, lambda basis: (undone(basis), basis.mT @ carried), True)
        columns: Root = seen.columns.root()
        carried = columns.after(matrix)
        gram = carried.mT @ seen.rows_times(carried)
        return _Side(gram, scale, lambda basis: (carried @ basis, columns.undone(basis.mT)), False)

    def _folded(self, matrices: Tensor, side: _Side, weight: Tensor) -> Tensor:
        blocks = self.lowering.fold(linalg.rescaled(matrices, side.scale), self.spec)
        return self.spec.weight_of(blocks).to(weight.dtype)


class ModesView:
    """A format of channel modes, in a metric that is a product over them: the lowering itself after a change of variables.

    W' = (outputs^½, inputs^½, taps^½) · W is lowered as any weight is, and carried back: the modes keep their ranks. The inputs' C is
    approximated by the product of its partial traces over channels and taps.
    """

    def __init__(
        self, lowering: Lowering, spec: LayerSpec, weighting: Weighting, unfold: Callable[..., Tensor]
    ) -> None:
        self.lowering, self.spec, self._unfold = lowering, spec, unfold
        self._sides: Sides = sides_of(weighting, spec, unfold)

    def project(self, weight: Tensor, rank: Rank, warm: Any = None) -> Projected:
        if rank == self.lowering.full_rank(self.spec):
            return Projected(weight.clone(), 0.0, None)
        there, back = self._change(weight)
        found = self.lowering.project(there(weight), rank, self.spec, warm)
        return found._replace(weight=back(found.weight))

    def curve(self, weight: Tensor, multiple: int = 1) -> RankCurve:
        there, _ = self._change(weight)
        return self.lowering.curve(there(weight), self.spec, multiple)

    def approximations(self, weight: Tensor, ranks: Sequence[Rank]) -> Iterator[Tensor]:
        there, back = self._change(weight)
        return (back(found) for found in self.lowering.approximations(there(weight), ranks, self.spec))

    def _change(self, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The change of variables and its inverse, from weights to weights."""
        computed = weight if weight.dtype == torch.float64 else weight.float()
        seen = self._sides.like(computed)
        rows, rows_undone = seen.row_root()
        columns = seen.columns.root()
        return (
            lambda w: self._folded(rows(columns.after(self._unfolded(w, computed))), w),
            lambda w: self._folded(rows_undone(columns.undone(self._unfolded(w, computed))), w),
        )

    def _unfolded(self, weight: Tensor, like: Tensor) -> Tensor:
        return self._unfold(self.spec.blocks(weight.to(like)), self.spec)

    def _folded(self, matrices: Tensor, weight: Tensor) -> Tensor:
        taps_last = matrices.unflatten(1, (self.spec.block_shape[0], -1)).transpose(2, 3)
        return self.spec.weight_of(taps_last.reshape(self.spec.groups, *self.spec.block_shape)).to(weight.dtype)
