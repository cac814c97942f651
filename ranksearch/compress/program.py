"""The projections of a whole plan as one program of batched products, for GPUs: nothing in it waits for the host, so it can be captured.

Layers whose matrices are alike are stacked, and the Gram matrices of all of them, padded to one width per class of sizes, are worked on at
once (`subspaces.py`). Every row starts from the basis of its last projection. What is not certified is not written: such a layer stays as
it is until it is projected exactly, which whoever runs the program sees to.

It takes lowerings that are batches of matrices and Tucker-2, plain or pivoted; `cp`, weights in fp64 and layers in the metric of their data
are none of its business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranksearch import linalg
from ranksearch.compress.plan import LayerPlan
from ranksearch.compress.slots import Slot
from ranksearch.lowering import LayerSpec, Lowering, MatrixLowering
from ranksearch.lowering.contract import kernel_area, sides
from ranksearch.lowering.pivoted import PivotedLowering
from ranksearch.lowering.tucker2 import Bases, Tucker2
from ranksearch.subspaces import Subspaces, judged, leading_exactly, leading_nearby

LEAST_WIDTH = 64
"""Smaller Gram matrices are padded to this width: on a GPU they take no longer so, and all go into one stack."""


class Outcome(IntEnum):
    """What became of a layer."""

    DONE = 0
    UNCERTIFIED = 1
    NOT_FINITE = 2


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
    known = isinstance(plain(lowering), MatrixLowering | Tucker2)
    return known and weight.is_floating_point() and weight.dtype != torch.float64


@dataclass
class _Stack:
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


class _Taken(NamedTuple):
    """A shape's weights as matrices or tensors [b, ..] with entries of at most 1, and the powers of two they were divided by."""

    values: Tensor
    scale: Tensor  # [b, 1, 1]
    finite: Tensor  # [b]


def _scaled(matrices: Tensor) -> _Taken:
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)  # to the last digit undone again
    return _Taken(matrices / scale, scale, torch.isfinite(largest[:, 0, 0]))


class _Made(NamedTuple):
    """What becomes of them, in the weights' own units, and what a layer keeps that is not written."""

    values: Tensor
    unchanged: Tensor
    left_out: Tensor  # [b], fp64
    energy: Tensor
    certified: Tensor
    finite: Tensor


class _Matrices:
    """Layers whose matrices have one shape [n, m]; the Gram matrix is that of the smaller side."""

    def __init__(
        self, entries: Sequence[Entry], lowerings: Sequence[MatrixLowering], stacks: dict[Any, _Stack]
    ) -> None:
        self.entries, self.lowerings = list(entries), list(lowerings)
        n, m = lowerings[0].matrix_shape(entries[0].spec)
        self.left, self.size = n <= m, min(n, m)
        self.stack = stacks.setdefault(_width(self.size), _Stack(_width(self.size)))
        self.rows, self.counts, self.ranks = [], [], []
        for entry, lowering in zip(entries, lowerings, strict=True):
            count = lowering.unfold(entry.spec.blocks(entry.weight), entry.spec).shape[0]
            (rank,) = sides(entry.choice.rank)
            self.rows.append(self.stack.add(count, rank))
            self.counts.append(count)
            self.ranks.append(rank)
        self.all = slice(self.rows[0].start, self.rows[-1].stop)

    def take_in(self) -> _Taken:
        """The stacked matrices, wider than high."""
        found = [
            lowering.unfold(entry.spec.blocks(entry.seen()), entry.spec)
            for entry, lowering in zip(self.entries, self.lowerings, strict=True)
        ]
        matrices = torch.cat(found)
        return _scaled(matrices if self.left else matrices.mT)

    def gram_into(self, gram: Tensor, matrices: Tensor) -> None:
        gram[self.all, : self.size, : self.size] = matrices @ matrices.mT

    def made(self, taken: _Taken, found: Subspaces) -> _Made:
        basis = found.basis[self.all, : self.size, : max(self.ranks)]
        product, unchanged = (basis @ (basis.mT @ taken.values)) * taken.scale, taken.values * taken.scale
        square = taken.scale[:, 0, 0].double().square()
        return _Made(
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


class _Tensors:
    """Layers of Tucker-2 with weights of one shape, as tensors [b, t, k·s]."""

    def __init__(self, entries: Sequence[Entry], stacks: dict[Any, _Stack]) -> None:
        self.entries = list(entries)
        spec = entries[0].spec
        self.outputs, self.inputs = spec.block_shape[:2]
        self.area = kernel_area(spec)
        self.ranks = [sides(entry.choice.rank) for entry in entries]
        self.counts = [entry.spec.groups for entry in entries]
        keys = [(name, _width(size)) for name, size in (("inputs", self.inputs), ("outputs", self.outputs))]
        self.stack_s, self.stack_t = (stacks.setdefault(key, _Stack(key[1])) for key in keys)
        pairs = list(zip(self.counts, self.ranks, strict=True))
        self.rows_s = [self.stack_s.add(count, rank[0]) for count, rank in pairs]
        self.rows_t = [self.stack_t.add(count, rank[1]) for count, rank in pairs]
        self.all_s = slice(self.rows_s[0].start, self.rows_s[-1].stop)
        self.all_t = slice(self.rows_t[0].start, self.rows_t[-1].stop)

    def take_in(self) -> _Taken:
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

    def made(self, taken: _Taken, found_s: Subspaces, found_t: Subspaces) -> _Made:
        tensor = taken.values
        basis_s, basis_t = self._of(found_s.basis, inputs=True), self._of(found_t.basis, inputs=False)
        core = self._wide(self._tall(basis_t.mT @ tensor) @ basis_s)
        whole = self._wide(self._tall(basis_t @ core) @ basis_s.mT)
        square = taken.scale[:, 0, 0].double().square()
        energy = tensor.square().sum((-2, -1), dtype=torch.float64)
        left_out = (tensor - whole).square().sum((-2, -1), dtype=torch.float64)
        certified = found_s.certified[self.all_s] & found_t.certified[self.all_t]
        return _Made(
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


class Program:
    """The projection of `entries`, of one model on one device; it keeps the bases and belongs to these weights in these places.

    program.compute()            what the layers become, on the device: nothing waits
    program.outcomes             [layers] int64 on the device, of `Outcome`, in the order of `names`
    program.removed              [layers] fp64 on the device: shares of ||W||²
    program.write()              overwrites the weights; layers that are not DONE keep theirs
    """

    def __init__(self, entries: Sequence[Entry], lowerings: Mapping[str, Lowering], *, energy_transfer: bool) -> None:
        self.key = program_key(entries)
        self._energy_transfer = energy_transfer
        self._stacks: dict[Any, _Stack] = {}
        self._modes: dict[Any, _Stack] = {}
        matrices: dict[Any, list[tuple[Entry, MatrixLowering]]] = {}
        tensors: dict[Any, list[Entry]] = {}
        for entry in entries:
            lowering = plain(lowerings[entry.choice.lowering])
            if isinstance(lowering, MatrixLowering):
                matrices.setdefault(lowering.matrix_shape(entry.spec), []).append((entry, lowering))
            else:
                tensors.setdefault((entry.spec.block_shape, entry.spec.kernel_size), []).append(entry)
        device = entries[0].weight.device
        self._matrices = [
            _Matrices([e for e, _ in found], [lowering for _, lowering in found], self._stacks)
            for found in matrices.values()
        ]
        self._tensors = [_Tensors(found, self._modes) for found in tensors.values()]
        for stack in (*self._stacks.values(), *self._modes.values()):
            stack.settle(device)
        self._shapes: list[Any] = [*self._matrices, *self._tensors]
        self._places = [(shape, i) for shape in self._shapes for i in range(len(shape.entries))]
        self.entries = [shape.entries[i] for shape, i in self._places]
        self.names = [entry.name for entry in self.entries]
        counts = torch.tensor([shape.counts[i] for shape, i in self._places])
        self._layer_of_row = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)
        self.outcomes = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        self.removed = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._new: list[Tensor] = []
        """What the layers' weights become."""

    def start_from(self, warm: Mapping[str, Any], only: Collection[str] | None = None) -> list[str]:
        """Takes over the bases of earlier projections, of `only` these layers; the names of those that have none that fits."""
        return [
            entry.name
            for entry, (shape, i) in zip(self.entries, self._places, strict=True)
            if only is None or entry.name in only
            if warm.get(entry.name) is None or not shape.start_from(i, warm[entry.name])
        ]

    def warm(self) -> dict[str, Any]:
        """The bases, as the lowerings' own projections have them."""
        return {entry.name: shape.warm(i) for entry, (shape, i) in zip(self.entries, self._places, strict=True)}

    @torch.no_grad()
    def compute(self, *, exactly: bool = False) -> None:
        """What the layers become, from their weights and the bases of before.

        Args:
            exactly: matrices by `eigh`, for which the host waits; Tucker-2's sweeps go on from their bases all the same.
        """
        made = [*self._of_matrices(exactly), *self._of_tensors()]

        def by_layer(values: Sequence[Tensor]) -> Tensor:
            return torch.zeros_like(self.removed).index_add(0, self._layer_of_row, torch.cat(list(values)).double())

        left_out, energy = by_layer([found.left_out for found in made]), by_layer([found.energy for found in made])
        unsure, broken = by_layer([~found.certified for found in made]), by_layer([~found.finite for found in made])
        self.removed.copy_(torch.where(energy > 0, left_out / energy.clamp_min(1e-300), 0.0))
        self.outcomes.copy_(
            torch.where(broken > 0, int(Outcome.NOT_FINITE), torch.where(unsure > 0, int(Outcome.UNCERTIFIED), 0))
        )
        done = (self.outcomes == Outcome.DONE)[self._layer_of_row][:, None, None]
        self._new, first = [], 0
        for shape, found in zip(self._shapes, made, strict=True):
            values = torch.where(done[first : first + len(found.values)], found.values, found.unchanged)
            first, start = first + len(values), 0
            for i, count in enumerate(shape.counts):
                self._new.append(self._finished(len(self._new), shape.folded(i, values[start : start + count])))
                start += count

    def _finished(self, number: int, projected: Tensor) -> Tensor:
        """A layer's weight after BN rectification and energy transfer; its share removed is then that of the weight itself."""
        entry, weight = self.entries[number], self.entries[number].weight.float()
        if entry.scale is not None:
            projected = projected / entry.scale()
            energy = weight.double().square().sum()
            left_out = (weight - projected).double().square().sum()
            self.removed[number] = torch.where(energy > 0, left_out / energy.clamp_min(1e-300), 0.0)
        if self._energy_transfer:
            size, kept = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(projected)
            projected = projected * torch.where(kept > 0, size / kept.clamp_min(1e-38), 1.0)
        return projected

    def _of_matrices(self, exactly: bool) -> list[_Made]:
        taken = [shape.take_in() for shape in self._matrices]
        grams = {id(stack): stack.gram() for stack in self._stacks.values()}
        for shape, (matrices, *_) in zip(self._matrices, taken, strict=True):
            shape.gram_into(grams[id(shape.stack)], matrices)
        found = {}
        for stack in self._stacks.values():
            gram = grams[id(stack)]
            found[id(stack)] = (
                leading_exactly(gram, stack.columns) if exactly else leading_nearby(gram, stack.basis, stack.columns)
            )
            _keep(stack, found[id(stack)])
        pairs = zip(self._matrices, taken, strict=True)
        return [shape.made(parts, found[id(shape.stack)]) for shape, parts in pairs]

    def _of_tensors(self) -> list[_Made]:
        """One sweep of HOOI, both halves from the bases of before; then the first half is judged again, by the second's result."""
        taken = [shape.take_in() for shape in self._tensors]
        stacks_s = {id(shape.stack_s): shape.stack_s for shape in self._tensors}
        stacks_t = {id(shape.stack_t): shape.stack_t for shape in self._tensors}

        def grams(stacks: dict[int, _Stack], fill: Callable[[_Tensors, dict[int, Tensor], Tensor], None]) -> Any:
            made = {key: stack.gram() for key, stack in stacks.items()}
            for shape, (tensor, *_) in zip(self._tensors, taken, strict=True):
                fill(shape, made, tensor)
            return made

        def inputs(shape: _Tensors, made: dict[int, Tensor], tensor: Tensor) -> None:
            shape.gram_s_into(made[id(shape.stack_s)], tensor, shape.stack_t.basis)

        def outputs(shape: _Tensors, made: dict[int, Tensor], tensor: Tensor) -> None:
            shape.gram_t_into(made[id(shape.stack_t)], tensor, shape.stack_s.basis)

        for stacks, fill in ((stacks_s, inputs), (stacks_t, outputs)):
            found = {}
            for key, gram in grams(stacks, fill).items():
                found[key] = leading_nearby(gram, stacks[key].basis, stacks[key].columns)
                _keep(stacks[key], found[key])
        found_t = found if self._tensors else {}
        found_s = {
            key: judged(gram, stacks_s[key].basis, stacks_s[key].columns)
            for key, gram in grams(stacks_s, inputs).items()
        }
        return [
            shape.made(parts, found_s[id(shape.stack_s)], found_t[id(shape.stack_t)])
            for shape, parts in zip(self._tensors, taken, strict=True)
        ]

    @torch.no_grad()
    def write(self) -> None:
        """Overwrites the weights by what was computed; layers that are not done keep theirs."""
        for entry, projected in zip(self.entries, self._new, strict=True):
            entry.weight.copy_(projected)


def program_key(entries: Sequence[Entry]) -> tuple[Any, ...]:
    """What a program is made for: names, lowerings, ranks, and where the weights lie."""
    return tuple((entry.name, entry.choice, entry.slot.weight.data_ptr(), entry.scale is None) for entry in entries)


def _keep(stack: _Stack, found: Subspaces) -> None:
    """The new bases; those of rows on which arithmetic broke down stay what they were."""
    usable = torch.isfinite(found.basis).all(-1).all(-1)[:, None, None]
    stack.basis.copy_(torch.where(usable, found.basis, stack.basis))
