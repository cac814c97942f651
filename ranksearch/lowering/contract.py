"""The `Lowering` contract and what is derived from it.

A lowering is a way to see a layer's weight as matrices (or a small tensor format) and to replace the layer by a chain of
smaller layers at a rank. It states `refusal`, `full_rank`, `factor_specs`, `decompose`, `reconstruct`; params, MACs, break-even
rank, rank curves, projection and the built module follow from those, as do the contract tests. A lowering that is a matrix per
group inherits from `MatrixLowering` and states only how the weight is unfolded and how the two factors are laid out.

One file per lowering; `@register` adds it to the registry, and every file of this folder is imported: nothing else to edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch import linalg
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering.spec import Ints, LayerSpec

LOWERINGS: dict[str, Lowering] = {}

L = TypeVar("L", bound="type[Lowering]")


def register(cls: L) -> L:
    """Class decorator: one instance of the lowering enters the registry under its `name`."""
    if cls.name in LOWERINGS:
        raise ValueError(f"a lowering named {cls.name!r} is registered already")
    LOWERINGS[cls.name] = cls()
    return cls


def lowering_named(name: str) -> Lowering:
    """The lowering `name`.

    Raises:
        UsageError: no such lowering; the text names the nearest one.
    """
    if name not in LOWERINGS:
        raise UsageError(f"There is no lowering {name!r}. {nearest(name, LOWERINGS)}")
    return LOWERINGS[name]


class Lowering(ABC):
    """How a layer becomes a chain of smaller layers at a rank (an int >= 1; 0 for `dense`, which has none)."""

    name: str
    is_projection: bool
    """Whether reconstruct(decompose(.)) is an orthogonal projection: idempotent and nearest at its rank."""

    @abstractmethod
    def refusal(self, spec: LayerSpec) -> str | None:
        """Why this lowering cannot take the layer, as a sentence; None where it can."""

    @abstractmethod
    def full_rank(self, spec: LayerSpec) -> int:
        """The smallest rank at which the chain equals any dense layer of this spec."""

    @abstractmethod
    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        """The smaller layers, first to last, with stride, padding, dilation, groups and bias placed."""

    @abstractmethod
    def decompose(self, weight: Tensor, rank: int, spec: LayerSpec) -> tuple[Tensor, ...]:
        """Weights of the smaller layers from the dense `weight` [T, S/g, *k], in the order of `factor_specs`."""

    @abstractmethod
    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        """The dense weight [T, S/g, *k] that the chain of `factors` computes."""

    @abstractmethod
    def removed_energy(self, weight: Tensor, spec: LayerSpec) -> np.ndarray:
        """Share of ||W||² that rank 0, 1, ..., full_rank removes: [full_rank + 1], from 1 down to 0."""

    @abstractmethod
    def project(self, weight: Tensor, rank: int, spec: LayerSpec) -> tuple[Tensor, float]:
        """(reconstruct(decompose(weight)), share of ||W||² removed), without building the factors' layout."""

    # Derived -----------------------------------------------------------------------------------------------------

    def supports(self, spec: LayerSpec) -> bool:
        """Whether this lowering can take the layer; `refusal` says why not."""
        return self.refusal(spec) is None

    def check_rank(self, spec: LayerSpec, rank: int) -> None:
        """Raises UsageError where the lowering refuses the layer or `rank` is not one of its ranks."""
        if (reason := self.refusal(spec)) is not None:
            raise UsageError(f"{self.name} cannot lower this layer: {reason}")
        full = self.full_rank(spec)
        if not min(1, full) <= rank <= full:
            raise UsageError(f"rank {rank} is outside {min(1, full)}..{full}, the ranks of {self.name} on this layer")

    def params(self, spec: LayerSpec, rank: int) -> int:
        """Parameters of the chain, bias included."""
        return sum(factor.params for factor in self.factor_specs(spec, rank))

    def macs(self, spec: LayerSpec, rank: int, in_size: Ints) -> int:
        """MACs of the chain for one sample whose map enters with extents `in_size`."""
        total = 0
        for factor in self.factor_specs(spec, rank):
            total += factor.macs(in_size)
            in_size = factor.out_size(in_size)
        return total

    def break_even_rank(self, spec: LayerSpec, cost: str, in_size: Ints = ()) -> int:
        """The largest rank at which the chain costs less than the dense layer; 0 where there is none.

        `cost` is "params" or "macs"; costs grow with the rank, so this is a bisection.
        """
        if cost not in ("params", "macs"):
            raise UsageError(
                f"break-even ranks are known for params and macs, not {cost!r}. {nearest(cost, ['params', 'macs'])}"
            )
        dense = spec.params if cost == "params" else spec.macs(in_size)
        low, high = 0, self.full_rank(spec)
        while low < high:
            middle = (low + high + 1) // 2
            value = self.params(spec, middle) if cost == "params" else self.macs(spec, middle, in_size)
            low, high = (middle, high) if value < dense else (low, middle - 1)
        return low

    def build(
        self,
        spec: LayerSpec,
        rank: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The chain as a module with torch's initial weights; `decompose` gives the right ones."""
        self.check_rank(spec, rank)
        layers = [factor.build(device=device, dtype=dtype) for factor in self.factor_specs(spec, rank)]
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


class MatrixLowering(Lowering):
    """A lowering whose weight is one n x m matrix per group, cut by a truncated SVD.

    The two factors are [g, n, r] and [g, r, m]; their balanced product is the best rank-r approximation per group.
    """

    is_projection = True

    @abstractmethod
    def unfold(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        """[T, S/g, *k] -> [g, n, m]"""

    @abstractmethod
    def fold(self, matrix: Tensor, spec: LayerSpec) -> Tensor:
        """[g, n, m] -> [T, S/g, *k], the inverse of `unfold`"""

    @abstractmethod
    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """[g, n, r], [g, r, m] -> weights of the first and the second layer"""

    @abstractmethod
    def join(self, first: Tensor, second: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """Weights of the two layers -> [g, n, r], [g, r, m], the inverse of `split`"""

    @abstractmethod
    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        """(n, m) of one group"""

    def full_rank(self, spec: LayerSpec) -> int:
        return min(self.matrix_shape(spec))

    def decompose(self, weight: Tensor, rank: int, spec: LayerSpec) -> tuple[Tensor, ...]:
        self.check_rank(spec, rank)
        left, right, _ = linalg.truncated_svd(self.unfold(weight, spec), rank)
        first, second = self.split(*linalg.balance(left, right), spec)
        return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()

    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        first, second = factors
        left, right = self.join(first, second, spec)
        return self.fold(left @ right, spec)

    def project(self, weight: Tensor, rank: int, spec: LayerSpec) -> tuple[Tensor, float]:
        self.check_rank(spec, rank)
        matrix = self.unfold(weight, spec)
        left, right, removed = linalg.truncated_svd(matrix, rank)
        energy = matrix.double().square().sum(dim=(-2, -1))
        total = energy.sum().item()
        share = (energy * removed).sum().item() / total if total > 0 else 0.0
        return self.fold(left @ right, spec).to(weight.dtype), share

    def removed_energy(self, weight: Tensor, spec: LayerSpec) -> np.ndarray:
        squared = linalg.squared_singular_values(self.unfold(weight, spec)).double()
        return linalg.removed_energy_by_rank(squared.sum(dim=0)).cpu().numpy()


def kernel_area(spec: LayerSpec) -> int:
    """Number of taps of the kernel, 1 for a Linear."""
    return prod(spec.kernel_size)
