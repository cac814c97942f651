"""Pivoted forms, `NAME_pivoted`: the same function as the plain chain's from r(n + m - r) numbers in the place of r(n + m).

A rank-r matrix n x m is spanned by r of its own rows, the pivots; the others are combinations of them. Where the chain's last layer is a
1x1 conv or a Linear, the layer before it computes the pivot channels of the output themselves and the last one the others from them,
y[pivots] = h, y[others] = A h: r² MACs per output position and r² params less (`im2col`, `svd`, `tucker2`; `tiled`: r² per tile).
The first layer's inputs pivot likewise, h = x[pivots] + A x[others], r² per position (`channel`, `tucker2`); where it has a kernel
(`spatial`) x are the channels as each of its taps reads them, put side by side, and A is a 1x1 conv. So a rank below full costs fewer
params than dense (of `tucker2`, most do). The pivots are rows of maximum volume (`maxvol.py`): no entry of A exceeds 1.05 in absolute
value, whatever the weight is, of deficient rank or zero too; 16 bits lose about as much as in the plain form, and no weight is refused.

It does **not** help latency as it does MACs: a gather and a concatenation move the whole map, in a tiled form once per tile, and the
batch norm behind a pivoted output is not folded at export. The index of every pivoted side is stored as int32: it counts as size,
not as params. Curves, projections and warm starts are the plain form's.

Reference: Zhao et al. 2025, arXiv 2501.19090 (PIFA: Linears of language models); for convs this is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.lowering.contract import LOWERINGS, Lowering, Projected, Rank, RankCurve, WeightView, kernel_area
from ranksearch.lowering.pivoted_layers import (
    PivotedInput,
    PivotedOutput,
    inverse,
    merged_input,
    merged_output,
    rows_at,
    tap_major,
)
from ranksearch.lowering.spec import Ints, LayerSpec
from ranksearch.lowering.weighting import Weighting
from ranksearch.maxvol import pivot_rows

FIRST, LAST = "first", "last"


class PivotedLowering(Lowering):
    """The pivoted form of `plain`; everything but how the chain's ends are stored and run is the plain form's."""

    family = "pivoted"

    def __init__(self, plain: Lowering) -> None:
        self.plain, self.name = plain, f"{plain.name}_pivoted"
        self.is_projection, self.opt_in = plain.is_projection, plain.opt_in

    @property
    def curve_name(self) -> str:
        return self.plain.curve_name

    def refusal(self, spec: LayerSpec) -> str | None:
        if (reason := self.plain.refusal(spec)) is not None:
            return reason
        if spec.lookup or spec.tied:
            return f"{self.name} takes no embedding and no head that is tied to one: name {self.plain.name}, its plain form."
        if FIRST in self.plain.pivoted_ends and self._at_rank_one(spec)[0].transposed:
            return f"{self.name} gathers what a kernel's taps read, but those of a transposed convolution write: take {self.plain.name}."
        return None

    def _at_rank_one(self, spec: LayerSpec) -> tuple[LayerSpec, ...]:
        """The plain chain at the smallest rank: layouts do not depend on it."""
        full = self.plain.full_rank(spec)
        return self.plain.factor_specs(spec, 1 if isinstance(full, int) else (1,) * len(full))

    def full_rank(self, spec: LayerSpec) -> Rank:
        return self.plain.full_rank(spec)

    def ranks(self, spec: LayerSpec, multiple: int = 1) -> tuple[Rank, ...]:
        return self.plain.ranks(spec, multiple)

    def curve(self, weight: Tensor, spec: LayerSpec, multiple: int = 1) -> RankCurve:
        return self.plain.curve(weight, spec, multiple)

    def project(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> Projected:
        self.check_rank(spec, rank)
        return self.plain.project(weight, rank, spec, warm)

    def approximations(self, weight: Tensor, ranks: Sequence[Rank], spec: LayerSpec) -> Iterator[Tensor]:
        return self.plain.approximations(weight, ranks, spec)

    def seen(self, weighting: Weighting, spec: LayerSpec) -> WeightView | None:
        return self.plain.seen(weighting, spec)

    # What is stored and runs -----------------------------------------------------------------------------------------

    def factor_specs(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        """The plain chain's layers without the pivots: a layer for the others has no channels where all are pivots."""
        layers = list(self.plain.factor_specs(spec, rank))
        if LAST in self.plain.pivoted_ends:
            layers[-1] = _output_others(layers[-2], layers[-1])
        if FIRST in self.plain.pivoted_ends:
            first, hidden = layers[0], layers[0].out_channels
            inputs = kernel_area(first) * first.in_channels - hidden
            layers[0] = spec.pointwise(inputs, hidden, groups=first.groups, stride=first.stride)
        return tuple(layers)

    def _orders(self, spec: LayerSpec, rank: Rank) -> dict[str, int]:
        """Lengths of the stored indices: one number per channel and tile of a pivoted output, per channel and tap of a pivoted input."""
        layers = self.plain.factor_specs(spec, rank)
        lengths = {FIRST: spec.in_channels * kernel_area(layers[0]), LAST: spec.out_channels * _tiles(layers)}
        return {end: lengths[end] for end in self.plain.pivoted_ends}

    def stored_shapes(self, spec: LayerSpec, rank: Rank) -> tuple[Ints, ...]:
        """The weights, first to last; behind them the index of every pivoted end."""
        weights = tuple(factor.weight_shape for factor in self.factor_specs(spec, rank))
        return *weights, *((length,) for length in self._orders(spec, rank).values())

    def indices(self, spec: LayerSpec, rank: Rank) -> int:
        return sum(self._orders(spec, rank).values())

    def params(self, spec: LayerSpec, rank: Rank) -> int:
        return super().params(spec, rank) - self.indices(spec, rank)

    def macs(self, spec: LayerSpec, rank: Rank, in_size: Ints) -> int:
        total = 0
        for own, plain in zip(self.factor_specs(spec, rank), self.plain.factor_specs(spec, rank), strict=True):
            out_size = plain.out_size(in_size)  # a pivoted layer runs where the plain one does
            total += prod(in_size if plain.transposed else out_size) * prod(own.weight_shape)
            in_size = out_size
        return total

    def break_even_rank(self, spec: LayerSpec, cost: str, in_size: Ints = ()) -> Rank:
        """Searched from the top: a pivoted form's costs need not grow with the rank where its first layer runs on a larger map."""
        dense = LOWERINGS["dense"].cost(spec, 0, cost, in_size)
        cheaper = (r for r in reversed(self.ladder(spec)) if self.cost(spec, r, cost, in_size) < dense)
        return next(cheaper, 0)

    def build(
        self,
        spec: LayerSpec,
        rank: Rank,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        self.check_rank(spec, rank)
        plain, own = self.plain.factor_specs(spec, rank), self.factor_specs(spec, rank)
        ends, count = self.plain.pivoted_ends, len(own)
        layers: list[nn.Module] = []
        for i, layer in enumerate(own):
            if i == 0 and FIRST in ends:
                layers.append(PivotedInput(layer, plain[0], device=device, dtype=dtype))
            elif i == count - 1 and LAST in ends:
                layers.append(PivotedOutput(layer, spec, _tiles(plain), device=device, dtype=dtype))
            else:
                layers.append(layer.build(device=device, dtype=dtype))
        return nn.Sequential(*layers)

    def stored_weights(self, built: nn.Module) -> tuple[Tensor, ...]:
        layers: tuple[Any, ...] = tuple(built)  # type: ignore[arg-type]
        orders = [layer.order for layer in layers if isinstance(layer, PivotedInput | PivotedOutput)]
        return *(layer.weight for layer in layers), *orders

    def decompose(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> tuple[Tensor, ...]:
        self.check_rank(spec, rank)
        layers = self.plain.factor_specs(spec, rank)
        factors = self.plain.decompose(weight, rank, spec, warm)
        blocks = [layer.blocks(factor).double() for layer, factor in zip(layers, factors, strict=True)]
        orders = {}
        if FIRST in self.plain.pivoted_ends:
            right = blocks[0].flatten(2)  # [g, r, S/g·k]
            found = pivot_rows(right.mT)
            square = rows_at(right.mT, found.pivots).mT
            blocks[1] = torch.einsum("gtr...,grs->gts...", blocks[1], square)
            blocks[0] = found.coefficients.mT
            orders[FIRST] = tap_major(_input_order(found.pivots, found.others), kernel_area(layers[0]))
        if LAST in self.plain.pivoted_ends:
            left = _per_tile(blocks[-1].flatten(2), _tiles(layers))  # [b, T/g, r]
            found = pivot_rows(left)
            blocks[-2] = torch.einsum("btr,brs...->bts...", rows_at(left, found.pivots), blocks[-2])
            blocks[-1] = found.coefficients
            orders[LAST] = _output_order(found.pivots, found.others, _tiles(layers))
        own = self.factor_specs(spec, rank)
        shaped = (f.reshape(f.shape[0], *s.block_shape) for s, f in zip(own, blocks, strict=True))
        stored = (s.weight_of(f).to(weight.dtype).contiguous() for s, f in zip(own, shaped, strict=True))
        return *stored, *(orders[end].int() for end in self.plain.pivoted_ends)

    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        ends = self.plain.pivoted_ends
        layers = self._at_rank_one(spec)
        count = len(factors) - len(ends)
        orders = dict(zip(ends, factors[count:], strict=True))
        whole = list(factors[:count])
        if FIRST in ends:
            hidden = layers[1].blocks(factors[1]).shape[2]
            whole[0] = merged_input(factors[0], orders[FIRST], layers[0], hidden)
        if LAST in ends:
            hidden = layers[-2].blocks(factors[count - 2]).shape[1]
            axes = len(spec.kernel_size)
            whole[-1] = merged_output(factors[count - 1], orders[LAST], spec.groups, _tiles(layers), hidden, axes)
        return self.plain.reconstruct(whole, spec)


def register_pivoted() -> None:
    """Registers the pivoted form of every lowering that has one."""
    for plain in tuple(LOWERINGS.values()):
        if plain.pivoted_ends:
            made = PivotedLowering(plain)
            LOWERINGS[made.name] = made


def _tiles(layers: Sequence[LayerSpec]) -> int:
    """Into how many tiles a chain's last layer adds up those before it: q; 1 for all but `tiled`."""
    return layers[-2].groups // layers[-1].groups


def _output_others(before: LayerSpec, last: LayerSpec) -> LayerSpec:
    """[b·r] -> [b·(T/g - r)] in b groups"""
    outputs, hidden = last.out_channels // last.groups, before.out_channels // before.groups
    return replace(last, out_channels=before.groups * (outputs - hidden), groups=before.groups)


def _per_tile(last: Tensor, tiles: int) -> Tensor:
    """[g, T/g, q·r] -> [g·q, T/g, r]"""
    return last.unflatten(2, (tiles, -1)).transpose(1, 2).flatten(0, 1)


def _input_order(pivots: Tensor, others: Tensor) -> Tensor:
    """Which channels come first to last, all blocks' pivots and then all others: [b, r], [b, n - r] -> [b·n]."""
    blocks, width = pivots.shape[0], pivots.shape[1] + others.shape[1]
    start = width * torch.arange(blocks, device=pivots.device)[:, None]
    return torch.cat([(start + pivots).flatten(), (start + others).flatten()])


def _output_order(pivots: Tensor, others: Tensor, tiles: int) -> Tensor:
    """Where every channel lies in what a pivoted output puts together: [b, r], [b, n - r] -> [q·g·n], the tiles outermost."""
    place = inverse(_input_order(pivots, others))
    return place.reshape(-1, tiles, pivots.shape[1] + others.shape[1]).transpose(0, 1).flatten()
