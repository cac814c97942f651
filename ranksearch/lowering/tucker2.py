"""`tucker2`: both channel modes cut, W ~ C x_S P_S x_T P_T. A 1x1 conv S -> rs, a k conv rs -> rt, a 1x1 conv rt -> T.

The rank is a pair (rs, rt), input side first; one number, a ratio, scales both sides by their width. Params S·rs + k·rs·rt + rt·T per
group: quadratic in the ratio, so it wins at strong compression of wide convs with large kernels, and loses to the two-layer
lowerings on layers with few channels and near full rank. It refuses 1x1 kernels, whose middle layer would be superfluous.

The projection starts from the truncated HOSVD (or from the bases of the last projection) and improves it by HOOI sweeps; the kept energy
grows with every one. The curve is that of the HOSVD, an upper bound of what is removed.

Reference: Kim et al. 2016, arXiv 1511.06530 (Tucker-2 of convs); De Lathauwer, De Moor & Vandewalle 2000 (HOSVD, HOOI).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ranksearch import linalg
from ranksearch.lowering.contract import (
    Lowering,
    Projected,
    Rank,
    RankCurve,
    Spectrum,
    WeightView,
    kernel_area,
    register,
    sides,
)
from ranksearch.lowering.in_metric import ModesView
from ranksearch.lowering.matrix import relative_operator_norm
from ranksearch.lowering.spec import LayerSpec
from ranksearch.lowering.weighting import Weighting

SWEEPS = 30
SETTLED = 5e-6
"""HOOI ends when the second half of a sweep gains less than this share of the removed energy."""
GRID = 24
"""Ranks per side that a curve offers to the allocation, beside the ladder of common ratios; all of them up to this width."""


class Bases(NamedTuple):
    """Orthonormal bases of the two channel modes."""

    outputs: Tensor  # [g, T/g, rt]
    inputs: Tensor  # [g, S/g, rs]


@register
class Tucker2(Lowering):
    name = "tucker2"
    pivoted_ends = ("first", "last")
    is_projection = True

    def refusal(self, spec: LayerSpec) -> str | None:
        if not spec.is_conv:
            return "tucker2 lowers convolutions; for a Linear it would be the plain svd: take that."
        if kernel_area(spec) == 1:
            return "tucker2 of a 1x1 kernel is the plain bottleneck with a layer to spare: take im2col."
        if min(spec.block_shape[:2]) < 2:
            return (
                "tucker2 cuts both channel modes, and a group with a single input or output channel has nothing to cut."
            )
        return None

    def full_rank(self, spec: LayerSpec) -> tuple[int, int]:
        outputs, inputs = spec.block_shape[:2]
        area = kernel_area(spec)
        return min(inputs, outputs * area), min(outputs, inputs * area)

    def factor_specs(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        (rs, rt), groups = sides(rank), spec.groups
        return (
            spec.pointwise(spec.in_channels, groups * rs, groups=groups),
            replace(spec, in_channels=groups * rs, out_channels=groups * rt, bias=False),
            spec.pointwise(groups * rt, spec.out_channels, groups=groups, bias=spec.bias),
        )

    def decompose(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> tuple[Tensor, ...]:
        self.check_rank(spec, rank)
        tensor, scale = _moderate(spec.blocks(weight))
        bases, core, _ = _hooi(tensor, rank, kernel_area(spec), warm)
        ones = (1,) * len(spec.kernel_size)
        first = linalg.rescaled(bases.inputs.mT, scale)
        # the three factors carry the same norm: fine-tuning and weight decay then treat them alike
        norms = [f.norm().clamp_min(1e-30) for f in (first, core, bases.outputs)]
        mean = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
        factors = (
            (first * (mean / norms[0])).reshape(*first.shape, *ones),
            _kernel_last(core * (mean / norms[1]), spec),
            (bases.outputs * (mean / norms[2])).reshape(*bases.outputs.shape, *ones),
        )
        layers = self.factor_specs(spec, rank)
        return tuple(s.weight_of(f).to(weight.dtype).contiguous() for s, f in zip(layers, factors, strict=True))

    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        layers = self.factor_specs(spec, (1, 1))  # a layout does not depend on the rank
        first, core, last = (layer.blocks(f) for layer, f in zip(layers, factors, strict=True))
        core = core.flatten(3).transpose(2, 3).flatten(2)
        whole = _multiplied(core, Bases(last.flatten(2), first.flatten(2).mT), kernel_area(spec))
        return spec.weight_of(_kernel_last(whole, spec))

    def project(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> Projected:
        self.check_rank(spec, rank)
        tensor, scale = _moderate(spec.blocks(weight))
        area = kernel_area(spec)
        bases, core, removed = _hooi(tensor, rank, area, warm)
        whole = linalg.rescaled(_multiplied(core, bases, area), scale)
        return Projected(spec.weight_of(_kernel_last(whole, spec)).to(weight.dtype), removed, bases)

    def ranks(self, spec: LayerSpec, multiple: int = 1) -> tuple[Rank, ...]:
        full_s, full_t = self.full_rank(spec)
        ladder = {(rank[0], rank[1]) for rank in map(sides, self.ladder(spec, multiple))}
        return tuple(sorted(ladder | {(rs, rt) for rs in _grid(full_s, multiple) for rt in _grid(full_t, multiple)}))

    def curve(self, weight: Tensor, spec: LayerSpec, multiple: int = 1) -> RankCurve:
        """The curve of the truncated HOSVD: with all basis vectors, the energies of the core's prefixes are the kept ones."""
        area = kernel_area(spec)
        moderate, scale = _moderate(spec.blocks(weight))
        tensor = moderate.double()
        values_s, all_s = torch.linalg.eigh(linalg.row_gram(_tall(tensor, area).mT))
        values_t, all_t = torch.linalg.eigh(linalg.row_gram(tensor))
        core = _tall(all_t.flip(-1).mT @ tensor, area) @ all_s.flip(-1)  # [g, T/g·k, S/g]
        energies = core.square().unflatten(1, (-1, area)).sum(dim=(0, 2))
        kept = energies.cumsum(0).cumsum(1).cpu().numpy()  # [T/g, S/g]
        total = kept[-1, -1]
        modes = [v.clamp_min(0).flip(-1) for v in (values_s, values_t)]
        mode_s, mode_t = map(relative_operator_norm, modes)
        full_s, full_t = self.full_rank(spec)
        ranks = self.ranks(spec, multiple)
        pairs = [sides(rank) for rank in ranks]
        removed = np.array([1 - kept[rt - 1, rs - 1] / total if total > 0 else 0.0 for rs, rt in pairs])
        residual = np.array([max(mode_s[rs - 1], mode_t[rt - 1]) for rs, rt in pairs])
        if ranks[-1] == (full_s, full_t):
            removed[-1] = residual[-1] = 0.0  # to the last digit
        unscaled = 1.0 if scale is None else float(scale) ** 2
        spectra = tuple(
            Spectrum((mode * unscaled)[..., :full].cpu().numpy(), (width, tensor[0].numel() // width))
            for mode, full, width in zip(modes, (full_s, full_t), spec.block_shape[1::-1], strict=True)
        )
        return RankCurve(ranks, removed.clip(0, 1), residual, spectra)

    def seen(self, weighting: Weighting, spec: LayerSpec) -> WeightView:
        return ModesView(self, spec, weighting, lambda blocks, _: blocks.flatten(3).transpose(2, 3).flatten(1, 2))


def _moderate(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """[g, T/g, S/g, *k] -> ([g, T/g, k·S/g] with entries of moderate size, what they were divided by, None for 1)."""
    flat = blocks.flatten(3).transpose(2, 3).flatten(2)  # of a channels_last weight this is a view
    moderate, scale = linalg.moderate(flat.flatten(0, 1))
    return moderate.unflatten(0, flat.shape[:2]), scale


def _tall(unfolded: Tensor, area: int) -> Tensor:
    """[g, a, k·b] -> [g, a·k, b], a view: the input side alone in the columns"""
    return unfolded.unflatten(2, (area, -1)).flatten(1, 2)


def _wide(unfolded: Tensor, area: int) -> Tensor:
    """[g, a·k, b] -> [g, a, k·b], the inverse of `_tall`"""
    return unfolded.unflatten(1, (-1, area)).flatten(2)


def _kernel_last(unfolded: Tensor, spec: LayerSpec) -> Tensor:
    """[g, a, k·b] -> [g, a, b, *k]"""
    return unfolded.unflatten(2, (*spec.kernel_size, -1)).movedim(-1, 2)


def _multiplied(core: Tensor, bases: Bases, area: int) -> Tensor:
    """core [g, rt, k·rs] -> the tensor of those bases, [g, T/g, k·S/g]"""
    return _wide(_tall(bases.outputs @ core, area) @ bases.inputs.mT, area)


def _hooi(tensor: Tensor, rank: Rank, area: int, warm: Sequence[Tensor] | None) -> tuple[Bases, Tensor, float]:
    """(bases, core [g, rt, k·rs], share of energy removed) of [g, T/g, k·S/g].

    Each half of a sweep finds the best basis of one mode for the other's. From the bases of a tensor nearby the sweeps end as soon as it is
    certified that another half would gain next to nothing, mostly after the first; from the HOSVD, where gains can shrink slowly,
    when they have shrunk.
    """
    rs, rt = sides(rank)
    energy = _energy(tensor)
    bases = Bases(*(b.to(tensor) for b in warm)) if warm is not None else None
    if bases and (bases.outputs.shape[-1], bases.inputs.shape[-1]) != (rt, rs):
        bases = None
    outputs = bases.outputs if bases else linalg.leading(tensor, rt)[0]
    inputs: Tensor = bases.inputs if bases else tensor[..., :0, :0]  # of no size: `leading` starts from none
    noise = 8 * torch.finfo(tensor.dtype).eps * energy
    for _ in range(SWEEPS):
        inputs, left_out, seen = linalg.leading(_tall(outputs.mT @ tensor, area).mT, rs, inputs)
        before = float((seen - left_out).sum())
        half = _wide(_tall(tensor, area) @ inputs, area)  # [g, T/g, k·rs]
        outputs, left_out, seen = linalg.leading(half, rt, outputs)
        kept = float((seen - left_out).sum())
        if bases and linalg.is_settled(_tall(outputs.mT @ tensor, area).mT, inputs):
            break
        if kept - before <= SETTLED * (energy - kept) + noise:
            break
    core = outputs.mT @ half
    removed = max(0.0, energy - _energy(core))
    return Bases(outputs, inputs), core, removed / energy if energy > 0 else 0.0


def _energy(tensor: Tensor) -> float:
    """||.||², added up in fp64 over the groups and fp32 within one."""
    return float(torch.linalg.vector_norm(tensor, dim=(1, 2)).double().square().sum())


def _grid(full: int, multiple: int) -> list[int]:
    """The multiples in 1..full, thinned out evenly to `GRID` of them, the largest included; `full` itself where it is smaller than all."""
    ranks = list(range(multiple, full + 1, multiple)) or [full]
    count = min(len(ranks), GRID)
    return sorted({ranks[round(i * (len(ranks) - 1) / max(count - 1, 1))] for i in range(count)})
