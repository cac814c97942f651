"""`tiled`: the im2col matrix T x (S·k) cut in tiles, every tile a truncated SVD of its own. Two kinds, one family.

`tiled_c2`, `tiled_c4`, `tiled_c8`: q column tiles that are aligned with the input channels. A grouped k conv S -> q·r (q groups), then a
1x1 conv q·r -> T that adds the groups up. Params r(S·k + q·T) per group: for the same params a total rank q·r that im2col does not have,
but each tile sees its own channels alone. It helps where blocks of channels carry different things; grouped convs run slower per MAC.

`tiled_64`, `tiled_32`, `tiled_16`, `tiled_8`: the paper's p x q square tiles of that side, which need not align with channels (64 columns
of a 3x3 kernel cut through a channel's taps; tiles at the lower and right edge are smaller). Such a tiling has no conv form: the layer is
projected and **stored** as factors, params r(q·T + p·S·k), and runs as the dense kernel, which is rebuilt while training and once at
load. It saves size, never MACs, and is opt-in.

Reference: Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145, Fig. 4 and Table 1; channel groups: ALDS, Liebenwein et al. 2021, arXiv 2107.11442.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ranksearch.lowering.contract import Lowering, Rank, kernel_area, register, sides
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.spec import Ints, LayerSpec


@register
class ChannelTiles(MatrixLowering):
    """q column tiles, aligned with q groups of input channels."""

    family = "tiled"
    pivoted_ends = ("last",)

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles
        self.name = f"tiled_c{tiles}"

    @classmethod
    def members(cls) -> Sequence[Lowering]:
        return [cls(tiles) for tiles in (2, 4, 8)]

    def refusal(self, spec: LayerSpec) -> str | None:
        if not spec.is_conv:
            return f"{self.name} needs grouped layers, which a Linear does not have; it takes svd or a square tiling."
        inputs = spec.block_shape[1]
        if inputs % self.tiles:
            return f"{self.name} needs input channels per group in multiples of {self.tiles}; here are {inputs}."
        return None

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        outputs, inputs = spec.block_shape[:2]
        return outputs, inputs // self.tiles * kernel_area(spec)

    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor:
        # [g, T/g, S/g, *k] -> [g, T/g, q, S/gq·k] -> [g·q, T/g, S/gq·k]
        return blocks.flatten(2).unflatten(2, (self.tiles, -1)).transpose(1, 2).flatten(0, 1)

    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor:
        return matrices.unflatten(0, (-1, self.tiles)).transpose(1, 2).reshape(spec.groups, *spec.block_shape)

    def chain(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        hidden = spec.groups * self.tiles * rank
        return (
            replace(spec, out_channels=hidden, groups=spec.groups * self.tiles, bias=False),
            spec.pointwise(hidden, spec.out_channels, groups=spec.groups, bias=spec.bias),
        )

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
        kernel = spec.kernel_size
        second = left.unflatten(0, (-1, self.tiles)).transpose(1, 2).flatten(2)  # [g·q, T/g, r] -> [g, T/g, q·r]
        return right.unflatten(2, (-1, *kernel)), second.reshape(*second.shape, *(1 for _ in kernel))

    def join(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
        first, second = factors
        left = second.flatten(2).unflatten(2, (self.tiles, -1)).transpose(1, 2).flatten(0, 1)
        return left, first.flatten(2)


@register
class SquareTiles(MatrixLowering):
    """p x q square tiles; the layer stores factors and runs dense."""

    family = "tiled"
    opt_in = True

    def __init__(self, side: int) -> None:
        self.side = side
        self.name = f"tiled_{side}"

    @classmethod
    def members(cls) -> Sequence[Lowering]:
        return [cls(side) for side in (64, 32, 16, 8)]

    def refusal(self, spec: LayerSpec) -> str | None:
        rows, columns = self._extents(spec)
        if spec.tied:
            return f"{self.name} cannot share its factors with an embedding: take svd."
        if spec.transposed and not spec.is_conv:
            return f"{self.name} rebuilds a torch layer's weight, and this one lies the other way round: take svd."
        if max(rows, columns) <= self.side:
            return f"{self.name} needs more than one tile of side {self.side}; the matrix is {rows} x {columns}."
        return None

    def _extents(self, spec: LayerSpec) -> tuple[int, int]:
        """Rows and columns of one group's matrix, T/g and S/g·k."""
        outputs, inputs = spec.block_shape[:2]
        return outputs, inputs * kernel_area(spec)

    def _counts(self, spec: LayerSpec) -> tuple[int, int]:
        """(p, q), the numbers of tiles down and across."""
        rows, columns = self._extents(spec)
        return -(-rows // self.side), -(-columns // self.side)

    def matrix_shape(self, spec: LayerSpec) -> tuple[int, int]:
        rows, columns = self._extents(spec)
        return min(rows, self.side), min(columns, self.side)

    def unfold(self, blocks: Tensor, spec: LayerSpec) -> Tensor:
        """[g, T/g, S/g, *k] -> [g·p·q, side, side], edge tiles filled up with zeros, which no rank counts."""
        (rows, columns), (p, q) = self._extents(spec), self._counts(spec)
        height, width = self.matrix_shape(spec)
        padded = nn.functional.pad(blocks.flatten(2), (0, q * width - columns, 0, p * height - rows))
        return padded.unflatten(2, (q, width)).unflatten(1, (p, height)).transpose(2, 3).flatten(0, 2)

    def fold(self, matrices: Tensor, spec: LayerSpec) -> Tensor:
        (rows, columns), counts = self._extents(spec), self._counts(spec)
        whole = matrices.unflatten(0, (-1, *counts)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return whole[:, :rows, :columns].reshape(spec.groups, *spec.block_shape)

    def chain(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, ...]:
        return (spec,)

    def stored_shapes(self, spec: LayerSpec, rank: Rank) -> tuple[Ints, ...]:
        """[g, q, T/g, r] and [g, p, r, S/g·k]"""
        (rows, columns), (p, q), (count,) = self._extents(spec), self._counts(spec), sides(rank)
        return (spec.groups, q, rows, count), (spec.groups, p, count, columns)

    def lay_out(self, factors: Sequence[Tensor], spec: LayerSpec, rank: Rank) -> tuple[Tensor, ...]:
        # copies: a slice of padded tiles may be contiguous and still hold the padding, and safetensors refuses such a tensor
        return tuple(factor.clone(memory_format=torch.contiguous_format) for factor in factors)

    def taken_in(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, ...]:
        return tuple(factors)

    def split(self, left: Tensor, right: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
        (rows, columns), counts = self._extents(spec), self._counts(spec)
        tall = left.unflatten(0, (-1, *counts)).transpose(1, 2).flatten(2, 3)  # [g, q, p·side, r]
        wide = right.unflatten(0, (-1, *counts)).transpose(2, 3).flatten(3, 4)  # [g, p, r, q·side]
        return tall[:, :, :rows], wide[..., :columns]

    def join(self, factors: Sequence[Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
        (rows, columns), (p, q) = self._extents(spec), self._counts(spec)
        height, width = self.matrix_shape(spec)
        tall = nn.functional.pad(factors[0], (0, 0, 0, p * height - rows)).unflatten(2, (p, height)).transpose(1, 2)
        wide = nn.functional.pad(factors[1], (0, q * width - columns)).unflatten(3, (q, width)).transpose(2, 3)
        return tall.flatten(0, 2), wide.flatten(0, 2)

    def build(
        self,
        spec: LayerSpec,
        rank: Rank,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The dense layer, its weight computed from factors that are its parameters."""
        layer = super().build(spec, rank, device=device, dtype=dtype)
        parametrize.register_parametrization(layer, "weight", Rebuilt(self, spec, rank))
        return layer

    def stored_weights(self, built: nn.Module) -> tuple[Tensor, ...]:
        stored = built.parametrizations["weight"]  # type: ignore[index, union-attr]
        return tuple(getattr(stored, f"original{i}") for i in range(2))


class Rebuilt(nn.Module):
    """The parametrization: the dense weight from its stored factors. `settle_` replaces it by the weight itself."""

    def __init__(self, lowering: Lowering, spec: LayerSpec, rank: Rank) -> None:
        super().__init__()
        self.lowering, self.spec, self.rank = lowering, spec, rank

    def forward(self, *factors: Tensor) -> Tensor:
        return self.lowering.reconstruct(factors, self.spec)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.lowering.decompose(weight, self.rank, self.spec)


def stores_factors(model: nn.Module) -> bool:
    """Whether a layer of the model rebuilds its weight from factors at every call."""
    return any(isinstance(module, Rebuilt) for module in model.modules())


def settle_(model: nn.Module) -> nn.Module:
    """Turns every layer that stores factors into the dense layer it computes, in place: nothing is rebuilt from then on."""
    for module in model.modules():
        if rebuilt(module) is not None:
            leave_as_it_is_(module)
    return model


def rebuilt(module: nn.Module) -> Rebuilt | None:
    """How a layer rebuilds its weight from factors; None where it does not."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    (first, *_) = module.parametrizations["weight"]  # type: ignore[index, union-attr]
    return first if isinstance(first, Rebuilt) else None


def leave_as_it_is_(module: nn.Module) -> None:
    """Makes the weight that a parametrization computes the layer's parameter. Copies of the layer keep their parametrization."""
    own = type(module)  # copies share it, and torch takes the weight from the class
    module.__class__ = type(own.__name__, own.__bases__, dict(vars(own)))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
