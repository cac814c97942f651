"""The projections of a whole plan as one program of batched products, for GPUs: nothing in it waits for the host, so it can be captured.

Layers whose matrices are alike are stacked, and the Gram matrices of all of them, padded to one width per class of sizes, are worked on at
once (`subspaces.py`). Every row starts from the basis of its last projection. What is not certified is not written: such a layer stays as
it is until it is projected exactly, which whoever runs the program sees to.

It takes lowerings that are batches of matrices and Tucker-2, plain or pivoted, and `cp`, of which less is known (`terms.py`); it does not
take weights in fp64 or layers in the metric of their data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ranksearch.compress.stacks import Entry, Made, MatrixGroup, Stack, TensorGroup, keep, plain
from ranksearch.compress.terms import term_groups
from ranksearch.lowering import Lowering, MatrixLowering
from ranksearch.lowering.cp import Cp
from ranksearch.subspaces import judged, leading_exactly, leading_nearby


class Outcome(IntEnum):
    """What became of a layer."""

    DONE = 0
    UNCERTIFIED = 1
    NOT_FINITE = 2


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
        self._stacks: dict[Any, Stack] = {}
        self._modes: dict[Any, Stack] = {}
        matrices: dict[Any, list[tuple[Entry, MatrixLowering]]] = {}
        tensors: dict[Any, list[Entry]] = {}
        sums: list[tuple[Entry, Cp]] = []
        for entry in entries:
            lowering = plain(lowerings[entry.choice.lowering])
            if isinstance(lowering, MatrixLowering):
                matrices.setdefault(lowering.matrix_shape(entry.spec), []).append((entry, lowering))
            elif isinstance(lowering, Cp):
                sums.append((entry, lowering))
            else:
                tensors.setdefault((entry.spec.block_shape, entry.spec.kernel_size), []).append(entry)
        device = entries[0].weight.device
        self._matrices = [
            MatrixGroup([e for e, _ in found], [lowering for _, lowering in found], self._stacks)
            for found in matrices.values()
        ]
        self._tensors = [TensorGroup(found, self._modes) for found in tensors.values()]
        for stack in (*self._stacks.values(), *self._modes.values()):
            stack.settle(device)
        self._sums = term_groups(sums)
        self._shapes: list[Any] = [*self._matrices, *self._tensors, *self._sums]
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
        """Takes over the bases of earlier projections, for `only` these layers; returns the names of those without one that fits."""
        return [
            entry.name
            for entry, (shape, i) in zip(self.entries, self._places, strict=True)
            if only is None or entry.name in only
            if warm.get(entry.name) is None or not shape.start_from(i, warm[entry.name])
        ]

    def begin(self, names: Collection[str]) -> None:
        """Starts these layers of `cp` anew; the host waits."""
        for shape in self._sums:
            shape.begin(names)

    def warm(self) -> dict[str, Any]:
        """The bases, as the lowerings' own projections have them."""
        return {entry.name: shape.warm(i) for entry, (shape, i) in zip(self.entries, self._places, strict=True)}

    @torch.no_grad()
    def compute(self, *, exactly: bool = False, settle: bool = False) -> None:
        """What the layers become, from their weights and the bases of before.

        Args:
            exactly: matrices by `eigh`, for which the host waits; Tucker-2's sweeps go on from their bases all the same.
            settle: sweeps of `cp` until they settle, for which the host waits.
        """
        made = [*self._of_matrices(exactly), *self._of_tensors(), *(shape.made(settle=settle) for shape in self._sums)]

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

    def _of_matrices(self, exactly: bool) -> list[Made]:
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
            keep(stack, found[id(stack)])
        pairs = zip(self._matrices, taken, strict=True)
        return [shape.made(parts, found[id(shape.stack)]) for shape, parts in pairs]

    def _of_tensors(self) -> list[Made]:
        """One sweep of HOOI, both halves from the bases of before; then the first half is judged again, by the second's result."""
        taken = [shape.take_in() for shape in self._tensors]
        stacks_s = {id(shape.stack_s): shape.stack_s for shape in self._tensors}
        stacks_t = {id(shape.stack_t): shape.stack_t for shape in self._tensors}

        def grams(stacks: dict[int, Stack], fill: Callable[[TensorGroup, dict[int, Tensor], Tensor], None]) -> Any:
            made = {key: stack.gram() for key, stack in stacks.items()}
            for shape, (tensor, *_) in zip(self._tensors, taken, strict=True):
                fill(shape, made, tensor)
            return made

        def inputs(shape: TensorGroup, made: dict[int, Tensor], tensor: Tensor) -> None:
            shape.gram_s_into(made[id(shape.stack_s)], tensor, shape.stack_t.basis)

        def outputs(shape: TensorGroup, made: dict[int, Tensor], tensor: Tensor) -> None:
            shape.gram_t_into(made[id(shape.stack_t)], tensor, shape.stack_s.basis)

        for stacks, fill in ((stacks_s, inputs), (stacks_t, outputs)):
            found = {}
            for key, gram in grams(stacks, fill).items():
                found[key] = leading_nearby(gram, stacks[key].basis, stacks[key].columns)
                keep(stacks[key], found[key])
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
