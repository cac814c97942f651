"""Alternating least squares for sums of rank-one terms: one tensor (`settled_alone`), or many at once (`settled_together`).

A tensor [b, n_0, n_1, ..] is b of them side by side, the groups of a layer; terms are its factor matrices [b, n_i, R], one a mode, in fp64.
Both ways make the same sweeps from the same start and end by the same rules (`Until`). Alone, the host looks at every sweep. Together,
tensors are padded with zeros to the largest and terms with zero columns to the largest rank, which stay exactly zero; who has settled is
kept on the device, by masks, and the host looks every few sweeps or not at all. On a GPU a small tensor's sweep takes as long as its
hundred launches, which many then share. On a CPU padding is work: the curves of ResNet-20 took 19 s of processor time together and 9.5
alone (one thread, torch 2.13.0+cpu).

Reference: Kolda & Bader 2009, "Tensor decompositions and applications".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ranksearch.errors import NonFiniteError
from ranksearch.subspaces import leading_first

RIDGE = 1e-10
"""Share of the mean diagonal added to the normal equations, which cancelling terms make singular."""
LOOK = 8
"""Sweeps of many tensors between two looks of the host at which of them are still at it."""
TOGETHER = 1e9
"""Floating-point operations of a sweep, padded, up to which tensors are put side by side. It bounds what padding wastes and what a batch
takes of memory. A guess, not measured on a card: launching a sweep takes Python some half a millisecond, a data-centre GPU does as much
in fp64 meanwhile, a consumer one a quarter of it."""


@dataclass(frozen=True)
class Until:
    """When the sweeps end."""

    sweeps: int
    settled: float
    """The share of the energy that a sweep has to gain for another one to follow."""
    rounding: float
    """The relative misfit at which terms fit as well as the weight's dtype can tell."""
    work: float
    """Floating-point operations for one problem; two sweeps are always made."""

    def most(self, shape: Sequence[int], rank: int) -> int:
        """Sweeps that may be made of a tensor [b, n_0, n_1, ..]."""
        return min(self.sweeps, max(2, int(self.work / work_of_sweep(shape, rank))))


def work_of_sweep(shape: Sequence[int], rank: int) -> int:
    """Floating-point operations of a sweep of a tensor [b, n_0, n_1, ..], its misfit included."""
    numel = torch.Size(shape).numel()
    return 6 * numel * rank + 2 * (len(shape) - 1) * shape[0] * rank**3


# Where it starts --------------------------------------------------------------------------------------------------------


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """[b, n_0, n_1, ..] -> [b, n_mode, the others in order]"""
    return tensor.movedim(mode + 1, 1).flatten(2)


def mode_vectors(tensor: Tensor) -> list[Tensor]:
    """The eigenvectors [b, n, n] of every mode's Gram matrix, the leading ones first."""
    found = []
    for mode in range(tensor.dim() - 1):
        flat = unfold(tensor, mode)
        found.append(leading_first(flat @ flat.mT)[1])
    return found


def started(vectors: Sequence[Tensor], rank: int, groups: int) -> list[Tensor]:
    """HOSVD start: the leading vectors of `mode_vectors`, filled up with seeded noise where the mode is shorter than R.

    Args:
        groups: of one layer; the noise is the same for every layer.
    """
    generator = torch.Generator().manual_seed(0)
    starts = []
    for mode in vectors:
        rows, length = mode.shape[:2]
        missing = max(0, rank - length)
        noise = torch.randn((groups, length, missing), generator=generator, dtype=torch.float64).to(mode)
        starts.append(torch.cat([mode[..., :rank], noise.repeat(rows // groups, 1, 1) / length**0.5], dim=-1))
    return starts


# One sweep --------------------------------------------------------------------------------------------------------------


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """[b, n_i, R] each -> [b, n_1·n_2·.., R], the first index slowest."""
    product = matrices[0]
    for matrix in matrices[1:]:
        product = (product.unsqueeze(2) * matrix.unsqueeze(1)).flatten(1, 2)
    return product


def balanced(terms: Sequence[Tensor]) -> list[Tensor]:
    """Every term's norm is shared evenly by its vectors."""
    norms = [f.norm(dim=1, keepdim=True) for f in terms]
    mean = torch.stack(norms).log().mean(dim=0).exp()  # 0 where a vector is 0, and so is the term then
    return [torch.where(n > 0, f * mean / n.clamp_min(1e-300), 0) for f, n in zip(terms, norms, strict=True)]


def misfit(flat: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """||tensor - terms||² of each, [b], of the tensors as [b, n_0, n_1·n_2·..]."""
    return (flat - terms[0] @ khatri_rao(terms[1:]).mT).square().sum((-2, -1))


Solve = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(normal [b, R, R], right [b, n, R], the mode's vectors of before) -> X with X · normal = right, [b, n, R]"""


def swept(flat: Tensor, terms: Sequence[Tensor], solve: Solve) -> list[Tensor]:
    """Every mode's least squares in turn, of the tensor as [b, n_0, n_1·n_2·..].

    The modes after the first share one product of it with the new outputs' vectors, so a sweep costs two large products, not one a mode.
    """
    terms = list(terms)
    grams = [f.mT @ f for f in terms]

    def solved(mode: int, right: Tensor) -> None:
        normal = torch.stack([gram for m, gram in enumerate(grams) if m != mode]).prod(dim=0)
        terms[mode] = solve(normal, right, terms[mode])
        grams[mode] = terms[mode].mT @ terms[mode]

    solved(0, flat @ khatri_rao(terms[1:]))
    product = (flat.mT @ terms[0]).unflatten(1, (terms[1].shape[1], -1))  # [b, S, k, R]
    extents = [f.shape[1] for f in terms[2:]]
    solved(1, (product * khatri_rao(terms[2:])[:, None]).sum(dim=2) if extents else product[:, :, 0])
    kernel = (product * terms[1][:, :, None]).sum(dim=1)  # [b, k, R]
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


# Alone ------------------------------------------------------------------------------------------------------------------


def settled_alone(tensor: Tensor, terms: Sequence[Tensor], until: Until) -> list[Tensor]:
    """Alternating least squares from `terms` until it settles, the terms already fit to rounding, or the work is done.

    Raises:
        NonFiniteError: arithmetic broke down.
    """
    terms, energy, flat = list(terms), float(tensor.square().sum()), tensor.flatten(2)
    left = float(misfit(flat, terms).sum())
    for _ in range(until.most(tensor.shape, terms[0].shape[-1])):
        if left <= until.rounding**2 * energy:
            break
        terms = balanced(swept(flat, terms, _solved))
        before, left = left, float(misfit(flat, terms).sum())
        if before - left <= until.settled * energy:
            break
    return terms


LOST = "the alternating least squares of cp lost all digits; take a smaller rank, or another lowering."


def _solved(normal: Tensor, right: Tensor, before: Tensor) -> Tensor:
    """The ridge grows until the normal equations have a Cholesky factor."""
    mean = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-300)
    eye, ridge = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device), RIDGE
    while ridge <= 1:
        factor, info = torch.linalg.cholesky_ex(normal + ridge * mean * eye)
        if not info.any():
            return torch.cholesky_solve(right.mT, factor).mT
        ridge *= 100
    raise NonFiniteError(LOST)


# Together ---------------------------------------------------------------------------------------------------------------


def batches(shapes: Sequence[Sequence[int]], ranks: Sequence[int]) -> list[list[int]]:
    """Problems in batches, by index: the most work first, then the next, while all of them, padded to the largest, are within `TOGETHER`.

    Args:
        shapes: [b, n_0, n_1, ..] of each tensor; only those with as many modes are put side by side.
    """
    works = [work_of_sweep(shape, rank) for shape, rank in zip(shapes, ranks, strict=True)]
    found: list[list[int]] = []
    for i in sorted(range(len(shapes)), key=lambda i: (len(shapes[i]), -works[i])):
        more = [*(found[-1] if found else []), i]
        if found and len({len(shapes[j]) for j in more}) == 1:
            whole = sum(shapes[j][0] for j in more), *largest([shapes[j][1:] for j in more])
            if work_of_sweep(whole, max(ranks[j] for j in more)) <= TOGETHER:
                found[-1].append(i)
                continue
        found.append([i])
    return found


def largest(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape that holds all of `shapes`."""
    return tuple(map(max, *shapes)) if len(shapes) > 1 else tuple(shapes[0])


class Many(NamedTuple):
    """Problems side by side: the rows of a batch, several of which, the groups of a layer, may be one problem."""

    tensors: Tensor
    """[b, n_0, n_1·n_2·..], fp64"""
    columns: Tensor
    """[b, R], which terms count; the others are padding"""
    problem: Tensor
    """[b], the number of each row's problem"""
    problems: int
    """How many they are."""

    def sums(self, values: Tensor) -> Tensor:
        """[b] -> [problems]"""
        return values.new_zeros(self.problems).index_add(0, self.problem, values)

    def misfit(self, terms: Sequence[Tensor]) -> Tensor:
        return self.sums(misfit(self.tensors, terms))

    def energy(self) -> Tensor:
        return self.sums(self.tensors.square().sum((-2, -1)))


def padded(terms: Sequence[Sequence[Tensor]], rank: int) -> list[Tensor]:
    """Terms [b_i, n, R_i] of several problems, mode by mode in one tensor [sum of b_i, n, R], zero where a rank is smaller."""
    return [torch.cat([pad(f, (0, rank - f.shape[-1])) for f in mode]) for mode in zip(*terms, strict=True)]


class _Solver:
    """Solves the normal equations of all rows; where one has no Cholesky factor, its vectors stay and its ridge grows from there on."""

    def __init__(self, columns: Tensor) -> None:
        self._columns, self._counts = columns, columns.sum(-1, keepdim=True)
        self._ridge = torch.full((len(columns), 1), RIDGE, dtype=torch.float64, device=columns.device)
        self.failed = torch.zeros(len(columns), dtype=torch.bool, device=columns.device)

    def __call__(self, normal: Tensor, right: Tensor, before: Tensor) -> Tensor:
        mean = (normal.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / self._counts).clamp_min(1e-300)
        factor, info = torch.linalg.cholesky_ex(
            normal + torch.where(self._columns, self._ridge * mean, 1.0).diag_embed()
        )
        half = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
        found = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
        failed = (info != 0) | ~torch.isfinite(found).all(-1).all(-1)
        self._ridge = torch.where(failed[:, None], 100 * self._ridge, self._ridge)
        self.failed = self.failed | failed
        return torch.where(failed[:, None, None], before, found)

    def lost(self) -> Tensor:
        """[b], whether no ridge has helped."""
        return self._ridge[:, 0] > 1


class Settled(NamedTuple):
    """What becomes of many problems."""

    terms: list[Tensor]
    left: Tensor
    """[problems], their misfits ||.||²"""
    lost: Tensor
    """[problems], whether arithmetic broke down"""


def settled_together(
    many: Many, terms: Sequence[Tensor], until: Until, *, most: Tensor | None = None, looks: bool = True
) -> Settled:
    """`settled_alone` of every problem of `many`, from `terms` [b, n, R], zero where `columns` is False.

    Args:
        most: [problems], sweeps that may be made of each; `until.sweeps` where None.
        looks: whether the host may look if any is still at it; without, all `until.sweeps` are made, and nothing waits for the device.
    """
    terms, energy = list(terms), many.energy()
    left = many.misfit(terms)
    solver, most = _Solver(many.columns), energy.new_full((), until.sweeps) if most is None else most
    live = left > until.rounding**2 * energy
    for sweep in range(until.sweeps):
        live = live & (sweep < most)
        if looks and sweep % LOOK == 0 and not bool(live.any()):
            break
        solver.failed = torch.zeros_like(solver.failed)
        found = balanced(swept(many.tensors, terms, solver))
        before, now = left, many.misfit(found)
        failed = many.sums(solver.failed.to(left)) > 0
        taken = live[many.problem][:, None, None]
        terms = [torch.where(taken, new, old) for new, old in zip(found, terms, strict=True)]
        left = torch.where(live, now, before)
        live = live & (failed | (before - now > until.settled * energy)) & (left > until.rounding**2 * energy)
    return Settled(terms, left, (many.sums(solver.lost().to(left)) > 0) | ~torch.isfinite(left))


def side_by_side(counts: Sequence[int], ranks: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """`Many.columns` and `Many.problem` of problems of so many rows and such ranks."""
    problem = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    return torch.arange(max(ranks), device=device) < torch.tensor(ranks, device=device)[problem, None], problem


def settled_many(tensors: Sequence[Tensor], terms: Sequence[Sequence[Tensor]], until: Until) -> list[list[Tensor]]:
    """`settled_alone` of every tensor [b, n_0, n_1, ..], all of one shape, from its terms, in one batch.

    Raises:
        NonFiniteError: arithmetic broke down.
    """
    counts, ranks = [len(t) for t in tensors], [start[0].shape[-1] for start in terms]
    columns, problem = side_by_side(counts, ranks, tensors[0].device)
    most = [until.most(t.shape, rank) for t, rank in zip(tensors, ranks, strict=True)]
    many = Many(torch.cat([t.flatten(2) for t in tensors]), columns, problem, len(tensors))
    found = settled_together(many, padded(terms, max(ranks)), until, most=torch.tensor(most, device=problem.device))
    if bool(found.lost.any()):
        raise NonFiniteError(LOST)
    parts = zip(*(mode.split(counts) for mode in found.terms), strict=True)
    return [[f[..., :rank] for f in part] for part, rank in zip(parts, ranks, strict=True)]
