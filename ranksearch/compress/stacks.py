"""Layers of one shape, stacked for a program of batched products: what is taken in, its Gram matrices and bases, what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranksearch import linalg
from ranksearch.lowering import LayerSpec, Lowering, MatrixLowering
from ranksearch.lowering.contract import kernel_area, sides
from ranksearch.lowering.cp import Cp
from ranksearch.lowering.pivoted import PivotedLowering
from ranksearch.lowering.tucker2 import Bases, Tucker2
from ranksearch.model.plan import LayerPlan
from ranksearch.model.slots import Slot
from ranksearch.subspaces import Subspaces

LEAST_WIDTH = 64
"""Smaller Gram matrices are padded to this width: on a GPU they take no longer so, and all go into one stack."""


@dataclass(frozen=True)
class Entry:
    """A layer of the plan."""

    slot: Slot
    choice: LayerPlan
    scale: Callable[[], Tensor] | None
    """The weight of every output channel for the choice of what is kept, laid out as the layer's weight; None for none."""

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def spec(self) -> LayerSpec:
        return self.slot.spec

    @property
    def weight(self) -> Tensor:
        return self.slot.weight.detach()

    def seen(self) -> Tensor:
        """The weight as it is projected."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale()


def plain(lowering: Lowering) -> Lowering:
    """The lowering that projects: of a pivoted form its plain one."""
    return lowering.plain if isinstance(lowering, PivotedLowering) else lowering


def takes(lowering: Lowering, weight: Tensor) -> bool:
    """Whether a layer can be part of a program."""
    known = isinstance(plain(lowering), MatrixLowering | Tucker2 | Cp)
    return known and weight.is_floating_point() and weight.dtype != torch.float64


@dataclass
class Stack:
    """Rows of one class of sizes: Gram matrices [b, n, n], bases [b, n, r], which of their columns count [b, r]."""

    width: int
    ranks: list[int] = field(default_factory=list)
    basis: Tensor = field(init=False)
    columns: Tensor = field(init=False)

    def add(self, count: int, rank: int) -> slice:
        """Rows for `count` matrices."""
        first = len(self.ranks)
        self.ranks += count * [rank]
        return slice(first, len(self.ranks))

    def settle(self, device: torch.device) -> None:
        most = max(self.ranks)
        self.basis = torch.zeros(len(self.ranks), self.width, most, device=device)
        self.columns = torch.arange(most, device=device) < torch.tensor(self.ranks, device=device)[:, None]

    def put(self, rows: slice, vectors: Tensor) -> None:
        """Sets the basis of `rows` to [b, n, r], the leading column last, as `linalg.leading` has it; here it comes first."""
        self.basis[rows] = 0
        self.basis[rows, : vectors.shape[1], : vectors.shape[2]] = vectors.flip(-1).to(self.basis)

    def get(self, rows: slice, size: int, rank: int) -> Tensor:
        """What `put` takes."""
        return self.basis[rows, :size, :rank].flip(-1)

    def gram(self) -> Tensor:
        return self.basis.new_zeros(len(self.ranks), self.width, self.width)


def _width(size: int) -> int:
    """The class of sizes: the next power of two."""
    return max(LEAST_WIDTH, 1 << (size - 1).bit_length())


class Taken(NamedTuple):
    """A shape's weights as matrices or tensors [b, ..] with entries of at most 1, and the powers of two they were divided by."""

    values: Tensor
    scale: Tensor  # [b, 1, 1]
    finite: Tensor  # [b]


def _scaled(matrices: Tensor) -> Taken:
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)  # undone again to the last digit
    return Taken(matrices / scale, scale, torch.isfinite(largest[:, 0, 0]))


class Made(NamedTuple):
    """What becomes of them, in the weights' own units, and what a layer keeps that is not written."""

    values: Tensor
    unchanged: Tensor
    left_out: Tensor  # [b], fp64
    energy: Tensor
    certified: Tensor
    finite: Tensor


class MatrixGroup:
    """Layers whose matrices have one shape [n, m]; the Gram matrix is that of the smaller side."""

    def __init__(self, entries: Sequence[Entry], lowerings: Sequence[MatrixLowering], stacks: dict[Any, Stack]) -> None:
        self.entries, self.lowerings = list(entries), list(lowerings)
        n, m = lowerings[0].matrix_shape(entries[0].spec)
        self.left, self.size = n <= m, min(n, m)
        self.stack = stacks.setdefault(_width(self.size), Stack(_width(self.size)))
        self.rows, self.counts, self.ranks = [], [], []
        for entry, lowering in zip(entries, lowerings, strict=True):
            count = lowering.unfold(entry.spec.blocks(entry.weight), entry.spec).shape[0]
            (rank,) = sides(entry.choice.rank)
            self.rows.append(self.stack.add(count, rank))
            self.counts.append(count)
            self.ranks.append(rank)
        self.all = slice(self.rows[0].start, self.rows[-1].stop)

    def take_in(self) -> Taken:
        """The stacked matrices, wider than high."""
        found = [
            lowering.unfold(entry.spec.blocks(entry.seen()), entry.spec)
            for entry, lowering in zip(self.entries, self.lowerings, strict=True)
        ]
        matrices = torch.cat(found)
        return _scaled(matrices if self.left else matrices.mT)

    def gram_into(self, gram: Tensor, matrices: Tensor) -> None:
        gram[self.all, : self.size, : self.size] = matrices @ matrices.mT

    def made(self, taken: Taken, found: Subspaces) -> Made:
        basis = found.basis[self.all, : self.size, : max(self.ranks)]
        product, unchanged = (basis @ (basis.mT @ taken.values)) * taken.scale, taken.values * taken.scale
        square = taken.scale[:, 0, 0].double().square()
        return Made(
            product if self.left else product.mT, unchanged if self.left else unchanged.mT,
            found.left_out[self.all] * square, found.energy[self.all] * square, found.certified[self.all], taken.finite,
        )  # fmt: skip

    def folded(self, index: int, matrices: Tensor) -> Tensor:
        entry, lowering = self.entries[index], self.lowerings[index]
        return entry.spec.weight_of(lowering.fold(matrices, entry.spec))

    def start_from(self, index: int, warm: Any) -> bool:
        """Takes over the basis of an earlier projection; whether it fits."""
        rows, vectors = self.rows[index], warm[0]
        if warm[1] is not self.left or vectors.shape != (self.counts[index], self.size, self.ranks[index]):
            return False
        self.stack.put(rows, vectors)
        return True

    def warm(self, index: int) -> Any:
        return linalg.Basis(self.stack.get(self.rows[index], self.size, self.ranks[index]), self.left)


class TensorGroup:
    """Layers of Tucker-2 with weights of one shape, as tensors [b, t, k·s]."""

    def __init__(self, entries: Sequence[Entry], stacks: dict[Any, Stack]) -> None:
        self.entries = list(entries)
        spec = entries[0].spec
        self.outputs, self.inputs = spec.block_shape[:2]
        self.area = kernel_area(spec)
        self.ranks = [sides(entry.choice.rank) for entry in entries]
        self.counts = [entry.spec.groups for entry in entries]
        keys = [(name, _width(size)) for name, size in (("inputs", self.inputs), ("outputs", self.outputs))]
        self.stack_s, self.stack_t = (stacks.setdefault(key, Stack(key[1])) for key in keys)
        pairs = list(zip(self.counts, self.ranks, strict=True))
        self.rows_s = [self.stack_s.add(count, rank[0]) for count, rank in pairs]
        self.rows_t = [self.stack_t.add(count, rank[1]) for count, rank in pairs]
        self.all_s = slice(self.rows_s[0].start, self.rows_s[-1].stop)
        self.all_t = slice(self.rows_t[0].start, self.rows_t[-1].stop)

    def take_in(self) -> Taken:
        blocks = [entry.spec.blocks(entry.seen()).flatten(3).transpose(2, 3).flatten(2) for entry in self.entries]
        return _scaled(torch.cat(blocks))

    def _tall(self, unfolded: Tensor) -> Tensor:
        """[b, a, k·c] -> [b, a·k, c]"""
        return unfolded.unflatten(2, (self.area, -1)).flatten(1, 2)

    def _wide(self, unfolded: Tensor) -> Tensor:
        """[b, a·k, c] -> [b, a, k·c]"""
        return unfolded.unflatten(1, (-1, self.area)).flatten(2)

    def _of(self, basis: Tensor, *, inputs: bool) -> Tensor:
        if inputs:
            return basis[self.all_s, : self.inputs, : max(rank[0] for rank in self.ranks)]
        return basis[self.all_t, : self.outputs, : max(rank[1] for rank in self.ranks)]

    def gram_s_into(self, gram: Tensor, tensor: Tensor, basis_t: Tensor) -> None:
        """The inputs' Gram matrix of what the outputs' basis leaves of the tensor."""
        seen = self._tall(self._of(basis_t, inputs=False).mT @ tensor)
        gram[self.all_s, : self.inputs, : self.inputs] = seen.mT @ seen

    def gram_t_into(self, gram: Tensor, tensor: Tensor, basis_s: Tensor) -> None:
        half = self._wide(self._tall(tensor) @ self._of(basis_s, inputs=True))
        gram[self.all_t, : self.outputs, : self.outputs] = half @ half.mT

    def made(self, taken: Taken, found_s: Subspaces, found_t: Subspaces) -> Made:
        tensor = taken.values
        basis_s, basis_t = self._of(found_s.basis, inputs=True), self._of(found_t.basis, inputs=False)
        core = self._wide(self._tall(basis_t.mT @ tensor) @ basis_s)
        whole = self._wide(self._tall(basis_t @ core) @ basis_s.mT)
        square = taken.scale[:, 0, 0].double().square()
        energy = tensor.square().sum((-2, -1), dtype=torch.float64)
        left_out = (tensor - whole).square().sum((-2, -1), dtype=torch.float64)
        certified = found_s.certified[self.all_s] & found_t.certified[self.all_t]
        return Made(
            whole * taken.scale, tensor * taken.scale, left_out * square, energy * square, certified, taken.finite
        )

    def folded(self, index: int, tensors: Tensor) -> Tensor:
        spec = self.entries[index].spec
        return spec.weight_of(tensors.unflatten(2, (*spec.kernel_size, -1)).movedim(-1, 2))

    def start_from(self, index: int, warm: Any) -> bool:
        rank, count = self.ranks[index], self.counts[index]
        shapes = (count, self.outputs, rank[1]), (count, self.inputs, rank[0])
        if tuple(tuple(part.shape) for part in warm) != shapes:
            return False
        self.stack_t.put(self.rows_t[index], warm[0])
        self.stack_s.put(self.rows_s[index], warm[1])
        return True

    def warm(self, index: int) -> Any:
        rank = self.ranks[index]
        outputs = self.stack_t.get(self.rows_t[index], self.outputs, rank[1])
        return Bases(outputs, self.stack_s.get(self.rows_s[index], self.inputs, rank[0]))


def keep(stack: Stack, found: Subspaces) -> None:
    """The new bases; those of rows on which arithmetic broke down stay what they were."""
    usable = torch.isfinite(found.basis).all(-1).all(-1)[:, None, None]
    stack.basis.copy_(torch.where(usable, found.basis, stack.basis))
