"""What all lowerings share whose weight is a batch of matrices (one per group, or several), each cut by a truncated SVD."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ranksearch import linalg
from ranksearch.lowering.contract import Lowering, Projected, Rank, RankCurve, Spectrum, WeightView, sides
from ranksearch.lowering.in_metric import MatrixView
from ranksearch.lowering.spec import LayerSpec
from ranksearch.lowering.weighting import Weighting


class MatrixLowering(Lowering):
    """A lowering whose weight is a batch of b matrices [n, m], b = g or a multiple of it.

    The two factors are [b, n, r] and [b, r, m]; their balanced product is the best rank-r approximation of every matrix.
    """

    is_projection = True

    @abstractmethod
    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor:
        """[g, T/g, S/g, *k] -> [b, n, m]"""

    @abstractmethod
    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor:
        """[b, n, m] -> [g, T/g, S/g, *k], the inverse of `unfold`"""

    @abstractmethod
    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
        """[b, n, r], [b, r, m] -> the blocks [g', T'/g', S'/g', *k'] of every layer that runs"""

    @abstractmethod
    def join(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """Blocks of every layer that runs -> [b, n, r], [b, r, m], the inverse of `split`"""

    @abstractmethod
    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        """(n, m) of one matrix"""

    @abstractmethod
    def chain(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        """The layers that run at an integer rank: `factor_specs`."""

    def factor_specs(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        (count,) = sides(rank)
        return self.chain(spec, count)

    def full_rank(self, spec: LayerSpec) -> int:
        return min(self.matrix_shape(spec))

    def decompose(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> tuple[Tensor, ...]:
        self.check_rank(spec, rank)
        (count,) = sides(rank)
        left, right, _ = linalg.truncated_svd(self.unfold(spec.blocks(weight), spec), count)
        return self.lay_out(self.split(*linalg.balance(left, right), spec), spec, rank)

    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        left, right = self.join(self.taken_in(factors, spec), spec)
        return spec.weight_of(self.fold(left @ right, spec))

    def lay_out(self, factors: Sequence[Tensor], spec: LayerSpec, rank: Rank) -> tuple[Tensor, ...]:
        """Blocks of the layers that run -> what is stored: the weights in torch's layout."""
        layers = self.factor_specs(spec, rank)
        return tuple(layer.weight_of(f).contiguous() for layer, f in zip(layers, factors, strict=True))

    def taken_in(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, ...]:
        """What is stored -> blocks of the layers that run, the inverse of `lay_out` (a layout does not depend on the rank)."""
        return tuple(layer.blocks(f) for layer, f in zip(self.factor_specs(spec, 1), factors, strict=True))

    def project(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> Projected:
        self.check_rank(spec, rank)
        (count,) = sides(rank)
        basis = linalg.Basis(warm[0].to(weight.device), warm[1]) if warm is not None else None
        cut = linalg.projected(self.unfold(spec.blocks(weight), spec), count, basis)
        folded = spec.weight_of(self.fold(cut.matrix, spec))
        return Projected(folded.to(weight.dtype), cut.removed, cut.basis)

    def approximations(self, weight: Tensor, ranks: Sequence[Rank], spec: LayerSpec) -> Iterator[Tensor]:
        counts = [sides(rank)[0] for rank in ranks]
        left, right, _ = linalg.truncated_svd(self.unfold(spec.blocks(weight), spec), max(counts, default=1))
        for count in counts:
            yield spec.weight_of(self.fold(left[..., :count] @ right[..., :count, :], spec))

    def curve(self, weight: Tensor, spec: LayerSpec, multiple: int = 1) -> RankCurve:
        squared = linalg.squared_singular_values(self.unfold(spec.blocks(weight), spec)).double()
        return self.curve_of(squared, spec, multiple)

    def curve_of(self, squared: Tensor, spec: LayerSpec, multiple: int) -> RankCurve:
        """The curve of matrices with the squared singular values `squared` [b, k], descending."""
        removed = linalg.removed_energy_by_rank(squared.sum(dim=0)).cpu().numpy()
        ranks = self.ranks(spec, multiple)
        index = np.array([sides(rank)[0] for rank in ranks], dtype=np.int64)
        spectrum = Spectrum(squared.cpu().numpy(), self.matrix_shape(spec))
        return RankCurve(ranks, removed[index], relative_operator_norm(squared)[index - 1], (spectrum,))

    def seen(self, weighting: Weighting, spec: LayerSpec) -> WeightView:
        return MatrixView(self, spec, weighting)


def relative_operator_norm(squared: Tensor) -> np.ndarray:
    """Squared singular values [b, k] -> sigma_{r+1} / sigma_1 for r = 1..k, the largest over the batch in both places: [k]."""
    largest = squared.amax(dim=0).cpu().numpy()
    following = np.append(largest[1:], 0.0)
    return np.sqrt(following / largest[0]) if largest[0] > 0 else np.zeros_like(following)
