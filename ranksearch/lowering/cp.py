"""`cp`: R rank-one terms. A 1x1 conv S -> R, a depthwise conv along every axis of the kernel, a 1x1 conv R -> T.

Params R(S + T + kh + kw) per group. The fewest params of all for a rank, and the least trustworthy: a best approximation need not exist,
alternating least squares finds a local one, terms may cancel each other, and nets with it fine-tune badly from small ranks. It is
no orthogonal projection: projecting twice moves the weight twice, unless the second one starts where the first ended
(`warm`). Opt-in for those reasons. It does not help 1x1 kernels (the plain bottleneck), nor depthwise convs (`spatial` is exact there).

Bounded: a decomposition takes at most `WORK` floating-point operations (about ten seconds of a CPU core) and, at any rank
that is cheaper than dense, a few times the memory of the weight: every mode starts from its own n x n Gram matrix, never from an SVD of
an unfolding with the long side in it.

Reference: Lebedev et al. 2015, arXiv 1412.6553; alternating least squares: Kolda & Bader 2009, "Tensor decompositions and applications".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranksearch import linalg
from ranksearch.errors import NonFiniteError
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
RIDGE = 1e-10
"""Share of the mean diagonal added to the normal equations, which cancelling terms make singular."""


@register
class Cp(Lowering):
    name = "cp"
    is_projection = False
    opt_in = True

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
        shape = _shape(spec)
        return prod(shape) // max(shape)

    def factor_specs(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        (terms,) = sides(rank)
        hidden, groups = spec.groups * terms, spec.groups
        return (
            spec.pointwise(spec.in_channels, hidden, groups=groups),
            *(spec.along(axis, hidden, hidden, groups=hidden) for axis in _axes(spec)),
            spec.pointwise(hidden, spec.out_channels, groups=groups, bias=spec.bias),
        )

    def approximations(self, weight: Tensor, ranks: Sequence[Rank], spec: LayerSpec) -> Iterator[Tensor]:
        for rank in ranks:
            terms = self._terms(weight, rank, spec, None, WORK / CURVE_PROBES, CURVE_SETTLED)
            yield spec.weight_of(_multiplied(terms, spec)).to(weight.dtype)

    def decompose(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> tuple[Tensor, ...]:
        self.check_rank(spec, rank)
        outputs, inputs, *kernel = _balanced(self._terms(weight, rank, spec, warm, WORK, SETTLED))
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
        terms = self._terms(weight, rank, spec, warm, WORK, SETTLED)
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
        """Decomposed at a few ranks, every one by itself, and interpolated: an estimate, within .02 of what
        decompositions remove (four layers of the trained ResNet-20)."""
        ranks = self.ranks(spec, multiple)
        probes = (
            [ranks[i] for i in sorted({round(i) for i in np.linspace(0, len(ranks) - 1, CURVE_PROBES)})]
            if ranks
            else []
        )
        removed, residual = [], []
        blocks = spec.blocks(weight).double()
        energy, top = float(blocks.square().sum()), _operator_norm(blocks)
        for rank in probes:
            terms = self._terms(weight, rank, spec, None, WORK / CURVE_PROBES, CURVE_SETTLED)
            left = blocks - _multiplied(terms, spec)
            removed.append(float(left.square().sum()) / energy if energy > 0 else 0.0)
            residual.append(_operator_norm(left) / top if top > 0 else 0.0)
        # a larger rank cannot do worse: where a local optimum says so, the smaller rank's terms are still there
        falling = [_between(ranks, probes, np.minimum.accumulate(found)) for found in (removed, residual)]
        return RankCurve(ranks, falling[0], falling[1])

    def _terms(
        self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any, work: float, settled: float
    ) -> list[Tensor]:
        """Factor matrices [g, n, R] of the modes (outputs, inputs, axes of the kernel), fp64."""
        (count,) = sides(rank)
        tensor, divisor = linalg.moderate(spec.blocks(weight).double().reshape(spec.groups, -1))
        scale = 1.0 if divisor is None else float(divisor)
        tensor = tensor.reshape(spec.groups, *_shape(spec))
        if count == self.full_rank(spec):
            return _scaled(_fibers(tensor), scale)
        fits = warm is not None and warm[0].shape[-1] == count
        start = _scaled([f.to(tensor.device) for f in warm], 1 / scale) if fits else _leading_vectors(tensor, count)
        rounding = 10 * torch.finfo(weight.dtype).eps if weight.dtype.is_floating_point else 1e-6
        return _scaled(_als(tensor, start, work, rounding, settled), scale)


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


def _shape(spec: LayerSpec) -> Ints:
    """The modes of one group's tensor: outputs, inputs, the axes of the kernel that have a layer."""
    return (*spec.block_shape[:2], *_extents(spec))


def _multiplied(terms: Sequence[Tensor], spec: LayerSpec) -> Tensor:
    """Factor matrices [g, n, R] -> blocks [g, T/g, S/g, *k]"""
    first, *others = terms
    return (first @ _khatri_rao(others).mT).reshape(spec.groups, *spec.block_shape)


def _khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """[g, n_i, R] each -> [g, n_1·n_2·.., R], the first index slowest."""
    product = matrices[0]
    for matrix in matrices[1:]:
        product = (product.unsqueeze(2) * matrix.unsqueeze(1)).flatten(1, 2)
    return product


def _unfold(tensor: Tensor, mode: int) -> Tensor:
    """[g, n_0, n_1, ..] -> [g, n_mode, the others in order]"""
    return tensor.movedim(mode + 1, 1).flatten(2)


def _fibers(tensor: Tensor) -> list[Tensor]:
    """The exact terms: every fiber along the longest mode times unit vectors of the others."""
    groups, *shape = tensor.shape
    longest = max(range(len(shape)), key=shape.__getitem__)
    others = [n for mode, n in enumerate(shape) if mode != longest]
    index = torch.unravel_index(torch.arange(prod(others), device=tensor.device), others)
    units = iter([torch.eye(n, device=tensor.device).to(tensor)[i].mT for n, i in zip(others, index, strict=True)])
    return [
        _unfold(tensor, mode) if mode == longest else next(units).expand(groups, -1, -1) for mode in range(len(shape))
    ]


def _leading_vectors(tensor: Tensor, rank: int) -> list[Tensor]:
    """HOSVD start: the leading eigenvectors of every mode's Gram matrix, filled up with seeded noise where the mode is shorter than R."""
    generator = torch.Generator().manual_seed(0)
    starts = []
    for mode in range(tensor.dim() - 1):
        flat = _unfold(tensor, mode)
        vectors = torch.linalg.eigh(flat @ flat.mT).eigenvectors.flip(-1)[..., :rank]
        missing = rank - vectors.shape[-1]
        noise = torch.randn((*vectors.shape[:-1], missing), generator=generator, dtype=torch.float64).to(tensor)
        starts.append(torch.cat([vectors, noise / vectors.shape[-2] ** 0.5], dim=-1))
    return starts


def _als(tensor: Tensor, terms: list[Tensor], work: float, rounding: float, settled: float) -> list[Tensor]:
    """Alternating least squares from `terms` until it settles, the terms already fit to `rounding`, or the work is done."""
    rank, modes = terms[0].shape[-1], tensor.dim() - 1
    per_sweep = 6 * tensor.numel() * rank + 2 * modes * tensor.shape[0] * rank**3
    energy, flat = float(tensor.square().sum()), tensor.flatten(2)

    def misfit() -> float:
        return float((flat - terms[0] @ _khatri_rao(terms[1:]).mT).square().sum())

    left = misfit()
    for _ in range(min(SWEEPS, max(2, int(work / per_sweep)))):
        if left <= rounding**2 * energy:
            break
        terms = _balanced(_swept(flat, terms))
        before, left = left, misfit()
        if before - left <= settled * energy:
            break
    return terms


def _swept(flat: Tensor, terms: Sequence[Tensor]) -> list[Tensor]:
    """Every mode's least squares in turn, of the tensor as [g, T, S·k].

    The modes after the first share one product of it with the new outputs' vectors, so a sweep costs two large products, not one a mode.
    """
    terms = list(terms)
    grams = [f.mT @ f for f in terms]

    def solved(mode: int, right: Tensor) -> None:
        normal = torch.stack([gram for m, gram in enumerate(grams) if m != mode]).prod(dim=0)
        terms[mode] = _solve(normal, right)
        grams[mode] = terms[mode].mT @ terms[mode]

    solved(0, flat @ _khatri_rao(terms[1:]))
    product = (flat.mT @ terms[0]).unflatten(1, (terms[1].shape[1], -1))  # [g, S, k, R]
    extents = [f.shape[1] for f in terms[2:]]
    solved(1, (product * _khatri_rao(terms[2:])[:, None]).sum(dim=2) if extents else product[:, :, 0])
    kernel = (product * terms[1][:, :, None]).sum(dim=1)  # [g, k, R]
    for axis in range(len(extents)):
        right = kernel.unflatten(1, extents)
        for other in reversed(range(len(extents))):
            if other != axis:
                shape = [1] * len(extents)
                shape[other] = extents[other]
                vectors = terms[2 + other]
                right = (right * vectors.reshape(len(vectors), *shape, -1)).sum(dim=1 + other, keepdim=True)
        solved(2 + axis, right.flatten(1, -2))
    return terms


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """X with X · normal = right, [g, n, R]; the ridge grows until the normal equations have a Cholesky factor."""
    mean = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-300)
    eye, ridge = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device), RIDGE
    while ridge <= 1:
        factor, info = torch.linalg.cholesky_ex(normal + ridge * mean * eye)
        if not info.any():
            return torch.cholesky_solve(right.mT, factor).mT
        ridge *= 100
    raise NonFiniteError(
        "the alternating least squares of cp lost all digits; take a smaller rank, or another lowering."
    )


def _balanced(terms: Sequence[Tensor]) -> list[Tensor]:
    """Every term's norm is shared evenly by its vectors."""
    norms = [f.norm(dim=1, keepdim=True) for f in terms]
    mean = torch.stack(norms).log().mean(dim=0).exp()  # 0 where a vector is 0, and so is the term then
    return [torch.where(n > 0, f * mean / n.clamp_min(1e-300), 0) for f, n in zip(terms, norms, strict=True)]


def _scaled(terms: Sequence[Tensor], scale: float) -> list[Tensor]:
    return [terms[0] * scale, *terms[1:]]


def _operator_norm(blocks: Tensor) -> float:
    return float(linalg.squared_singular_values(blocks.flatten(2))[..., 0].max()) ** 0.5
