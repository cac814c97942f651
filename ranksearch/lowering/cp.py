"""`cp`: R rank-one terms. A 1x1 conv S -> R, a depthwise conv along every axis of the kernel, a 1x1 conv R -> T.

Params R(S + T + kh + kw) per group. The fewest params of all for a rank, and the least trustworthy: a best approximation need not exist,
alternating least squares finds a local one, terms may cancel each other, and nets with it fine-tune badly from small ranks. It is
no orthogonal projection: projecting twice moves the weight twice, unless the second one starts where the first ended
(`warm`). Opt-in for those reasons. It does not help 1x1 kernels (the plain bottleneck), nor depthwise convs (`spatial` is exact there).

Bounded: a decomposition takes at most `WORK` floating-point operations (about ten seconds of a CPU core) and, at any rank
that is cheaper than dense, a few times the memory of the weight: every mode starts from its own n x n Gram matrix, never from an SVD of
an unfolding with the long side in it.

Here is what a layer becomes and what of it is cut; `cp_als.py` is the alternating least squares. The decompositions of a curve, and
those of the curves of several layers of one spec, are made one by one on a CPU and together on a GPU.

Reference: Lebedev et al. 2015, arXiv 1412.6553; alternating least squares: Kolda & Bader 2009, "Tensor decompositions and applications".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranksearch import linalg
from ranksearch.lowering import cp_als
from ranksearch.lowering.contract import Lowering, Projected, Rank, RankCurve, register, sides
from ranksearch.lowering.spec import Ints, LayerSpec

SWEEPS = 60
SETTLED = 1e-5
"""Sweeps end when one gains less than this share of the weight's energy."""
CURVE_SETTLED = 3e-4
"""The same for a curve, whose eight decompositions are estimates: removed shares came out at most .008 larger, in a third of the time
(trained ResNet-20, three layers)."""
WORK = 5e11
CURVE_RANKS, CURVE_PROBES = 40, 8
"""Ranks that a curve offers, and those among them that are decomposed; the others are interpolated."""


@register
class Cp(Lowering):
    name = "cp"
    is_projection = False
    opt_in = True
    curve_iterates = True

    def __init__(self, together: bool | None = None) -> None:
        """
        Args:
            together: several decompositions as batches of products, or one by one; None: as it is faster where the weights lie.
        """
        self._together = together

    def refusal(self, spec: LayerSpec) -> str | None:
        if not spec.is_conv:
            return "cp lowers convolutions; for a Linear it would be the plain svd: take that."
        if max(spec.kernel_size) == 1:
            return "cp of a 1x1 kernel is the plain bottleneck: take im2col."
        if min(spec.block_shape[:2]) < 2:
            return "cp separates input from output channels, and a group with a single one of either has nothing to separate."
        return None

    def full_rank(self, spec: LayerSpec) -> int:
        """Every weight is a sum of its fibers along the longest mode; no smaller rank is certain to do."""
        shape = self.modes(spec)
        return prod(shape) // max(shape)

    def modes(self, spec: LayerSpec) -> Ints:
        """The modes of one group's tensor: outputs, inputs, the axes of the kernel that have a layer."""
        return (*spec.block_shape[:2], *_extents(spec))

    def factor_specs(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        (terms,) = sides(rank)
        hidden, groups = spec.groups * terms, spec.groups
        return (
            spec.pointwise(spec.in_channels, hidden, groups=groups),
            *(spec.along(axis, hidden, hidden, groups=hidden) for axis in _axes(spec)),
            spec.pointwise(hidden, spec.out_channels, groups=groups, bias=spec.bias),
        )

    def approximations(self, weight: Tensor, ranks: Sequence[Rank], spec: LayerSpec) -> Iterator[Tensor]:
        for terms in self._at_ranks(spec.blocks(weight)[None], ranks, spec, weight.dtype):
            yield spec.weight_of(_multiplied(terms, spec)).to(weight.dtype)

    def decompose(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> tuple[Tensor, ...]:
        self.check_rank(spec, rank)
        outputs, inputs, *kernel = cp_als.balanced(self._terms(weight, rank, spec, warm))
        ones, layers = (1,) * len(spec.kernel_size), self.factor_specs(spec, rank)
        blocks = (
            inputs.mT.reshape(spec.groups, -1, inputs.shape[1], *ones),
            *(f.mT.reshape(-1, 1, 1, *s.kernel_size) for f, s in zip(kernel, layers[1:-1], strict=True)),
            outputs.reshape(*outputs.shape, *ones),
        )
        return tuple(s.weight_of(b).to(weight.dtype).contiguous() for s, b in zip(layers, blocks, strict=True))

    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        first, *kernel, last = factors
        layers = self.factor_specs(spec, 1)  # a layout does not depend on the rank
        inputs = layers[0].blocks(first).flatten(2).mT
        rows = [f.reshape(spec.groups, -1, extent).mT for f, extent in zip(kernel, _extents(spec), strict=True)]
        return spec.weight_of(_multiplied([layers[-1].blocks(last).flatten(2), inputs, *rows], spec))

    def project(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> Projected:
        self.check_rank(spec, rank)
        terms = self._terms(weight, rank, spec, warm)
        projected = spec.weight_of(_multiplied(terms, spec)).to(weight.dtype)
        energy, left = (float(w.double().square().sum()) for w in (weight, weight.double() - projected.double()))
        return Projected(projected, left / energy if energy > 0 else 0.0, terms)

    def ranks(self, spec: LayerSpec, multiple: int = 1) -> tuple[Rank, ...]:
        """At most `CURVE_RANKS`, in equal ratios, up to the break-even rank in params."""
        (last,) = sides(self.break_even_rank(spec, "params"))
        steps = last // multiple
        if steps == 0:
            return ()
        return tuple(sorted({multiple * round(steps ** (i / CURVE_RANKS)) for i in range(1, CURVE_RANKS + 1)}))

    def curve(self, weight: Tensor, spec: LayerSpec, multiple: int = 1) -> RankCurve:
        return self.curves([weight], spec, multiple)[0]

    def curves(self, weights: Sequence[Tensor], spec: LayerSpec, multiple: int = 1) -> list[RankCurve]:
        """Decomposed at a few ranks, every one by itself, and interpolated: an estimate, within .02 of what
        decompositions remove (four layers of the trained ResNet-20)."""
        ranks = self.ranks(spec, multiple)
        places = np.unique(np.linspace(0, len(ranks) - 1, CURVE_PROBES).round().astype(int)) if ranks else ()
        probes, dtype = [ranks[i] for i in places], weights[0].dtype
        blocks = torch.stack([spec.blocks(w).double() for w in weights])
        energy, top = blocks.flatten(1).square().sum(-1), _operator_norms(blocks)
        removed, residual = [energy.new_zeros(0, len(weights))], [energy.new_zeros(0, len(weights))]
        for terms in self._at_ranks(blocks, probes, spec, dtype):
            left = blocks - _multiplied(terms, spec).view_as(blocks)
            removed.append((left.flatten(1).square().sum(-1) / energy.clamp_min(1e-300))[None])
            residual.append((_operator_norms(left) / top.clamp_min(1e-300))[None])
        tables = [
            torch.cat(found).T.cpu().numpy() * (energy > 0).cpu().numpy()[:, None] for found in (removed, residual)
        ]
        # a larger rank cannot do worse: where a local optimum says so, the smaller rank's terms are still there
        falling = [[_between(ranks, probes, np.minimum.accumulate(row)) for row in table] for table in tables]
        return [RankCurve(ranks, *found) for found in zip(*falling, strict=True)]

    def _terms(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any) -> list[Tensor]:
        """Factor matrices [g, n, R] of the modes (outputs, inputs, axes of the kernel), fp64."""
        (count,) = sides(rank)
        tensor, scale = self._prepared(spec.blocks(weight)[None], spec)
        if count == self.full_rank(spec):
            return _scaled(_fibers(tensor), scale)
        if warm is not None and warm[0].shape[-1] == count:
            start = _scaled([f.to(tensor.device) for f in warm], 1 / scale)
        else:
            start = cp_als.started(cp_als.mode_vectors(tensor), count, spec.groups)
        until = until_settled(weight.dtype)
        return _scaled(cp_als.settled_alone(tensor, start, until), scale)

    def _prepared(self, blocks: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """Blocks of l layers [l, g, T/g, S/g, *k] -> (tensors [l·g, *modes], fp64, entries of moderate size, their scales [l·g, 1, 1]).

        Raises:
            NonFiniteError: the weights hold NaN or infinite values.
        """
        flat, divisor = linalg.moderate(blocks.double().flatten(2))
        scale = flat.new_ones(len(flat), 1, 1) if divisor is None else divisor
        return flat.reshape(-1, *self.modes(spec)), scale.repeat_interleave(spec.groups, 0)

    def _at_ranks(
        self, blocks: Tensor, ranks: Sequence[Rank], spec: LayerSpec, dtype: torch.dtype
    ) -> Iterator[list[Tensor]]:
        """Terms [l·g, n, R] of l layers [l, g, T/g, S/g, *k], of weights in `dtype`, at each of `ranks` in turn: estimates."""
        counts = [sides(rank)[0] for rank in ranks]
        tensor, scale = self._prepared(blocks, spec)
        layers = tensor.split(spec.groups)
        vectors = cp_als.mode_vectors(tensor)
        until = cp_als.Until(SWEEPS, CURVE_SETTLED, rounding_of(dtype), WORK / CURVE_PROBES)

        def started(count: int) -> list[list[Tensor]]:
            """Layer by layer."""
            modes = [f.split(spec.groups) for f in cp_als.started(vectors, count, spec.groups)]
            return [list(terms) for terms in zip(*modes, strict=True)]

        starts = (started(count) for count in counts if count < self.full_rank(spec))
        together = tensor.is_cuda if self._together is None else self._together
        settled = iter(_together(layers, list(starts), until)) if together else _one_by_one(layers, starts, until)
        for count in counts:
            yield _scaled(_fibers(tensor) if count == self.full_rank(spec) else next(settled), scale)


def _one_by_one(
    layers: Sequence[Tensor], starts: Iterable[Sequence[Sequence[Tensor]]], until: cp_als.Until
) -> Iterator[list[Tensor]]:
    """What `_together` returns, as it is asked for."""
    for start in starts:
        found = [cp_als.settled_alone(layer, terms, until) for layer, terms in zip(layers, start, strict=True)]
        yield [torch.cat(mode) for mode in zip(*found, strict=True)]


def _together(
    layers: Sequence[Tensor], starts: Sequence[Sequence[Sequence[Tensor]]], until: cp_als.Until
) -> list[list[Tensor]]:
    """`starts` of every rank and layer, settled in batches; the terms [l·g, n, R] of each rank.

    Raises:
        NonFiniteError: arithmetic broke down.
    """
    places = [(rank, layer) for rank in range(len(starts)) for layer in range(len(layers))]
    counts = [start[0][0].shape[-1] for start in starts]
    found: dict[tuple[int, int], list[Tensor]] = {}
    for batch in cp_als.batches([layers[layer].shape for _, layer in places], [counts[rank] for rank, _ in places]):
        inside = [places[i] for i in batch]
        tensors = [layers[layer] for _, layer in inside]
        terms = cp_als.settled_many(tensors, [starts[rank][layer] for rank, layer in inside], until)
        found |= dict(zip(inside, terms, strict=True))
    return [
        [torch.cat(mode) for mode in zip(*(found[rank, layer] for layer in range(len(layers))), strict=True)]
        for rank in range(len(starts))
    ]


def until_settled(dtype: torch.dtype) -> cp_als.Until:
    """When the sweeps of a projection of weights of `dtype` end."""
    return cp_als.Until(SWEEPS, SETTLED, rounding_of(dtype), WORK)


def _between(ranks: Sequence[Rank], probes: Sequence[Rank], found: np.ndarray) -> np.ndarray:
    """Values `found` at `probes`, falling, as values at `ranks`: their logarithm runs straight between two probes."""
    at, known = ([sides(rank)[0] for rank in group] for group in (ranks, probes))
    return (
        np.exp(np.interp(at, known, np.log(np.maximum(found, 1e-30)))) * (found.max(initial=0) > 0)
        if ranks
        else np.zeros(0)
    )


def _axes(spec: LayerSpec) -> list[int]:
    """The axes of the kernel that need a layer of their own: all but those where nothing happens."""
    padding = spec.padding if not isinstance(spec.padding, str) else (0,) * len(spec.kernel_size)
    extra = spec.output_padding or (0,) * len(spec.kernel_size)
    settings = zip(spec.kernel_size, spec.stride, padding, extra, strict=True)
    return [axis for axis, values in enumerate(settings) if values != (1, 1, 0, 0)]


def _extents(spec: LayerSpec) -> list[int]:
    return [spec.kernel_size[axis] for axis in _axes(spec)]


def rounding_of(dtype: torch.dtype) -> float:
    """The relative misfit that weights of `dtype` cannot tell from none."""
    return 10 * torch.finfo(dtype).eps if dtype.is_floating_point else 1e-6


def _multiplied(terms: Sequence[Tensor], spec: LayerSpec) -> Tensor:
    """Factor matrices [b, n, R] -> blocks [b, T/g, S/g, *k]"""
    first, *others = terms
    return (first @ cp_als.khatri_rao(others).mT).reshape(-1, *spec.block_shape)


def _fibers(tensor: Tensor) -> list[Tensor]:
    """The exact terms: every fiber along the longest mode times unit vectors of the others."""
    groups, *shape = tensor.shape
    longest = max(range(len(shape)), key=shape.__getitem__)
    others = [n for mode, n in enumerate(shape) if mode != longest]
    index = torch.unravel_index(torch.arange(prod(others), device=tensor.device), others)
    units = iter([torch.eye(n, device=tensor.device).to(tensor)[i].mT for n, i in zip(others, index, strict=True)])
    return [
        cp_als.unfold(tensor, mode) if mode == longest else next(units).expand(groups, -1, -1)
        for mode in range(len(shape))
    ]


def _scaled(terms: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    return [terms[0] * scale, *terms[1:]]


def _operator_norms(blocks: Tensor) -> Tensor:
    """[l, g, T/g, S/g, *k] -> [l], the largest singular value of each layer"""
    return linalg.squared_singular_values(blocks.flatten(3))[..., 0].amax(-1).sqrt()
