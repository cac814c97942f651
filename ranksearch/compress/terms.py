"""Layers of `cp`, side by side for a program of batched products (`program.py`): their tensors and terms, in fp64.

`cp` is no projection, and nothing certifies that its terms are near the best ones. What is guaranteed of a layer that is written: its
terms are finite, and the misfit is not larger than that of the terms of before (on the weight as it is now), from which the sweeps start
and which stay where they are better. Where the sweeps made it larger by more than the share of the energy at which they end anyway, the
terms cancel each other: then the layer counts as not certified, keeps its weight, and starts anew the next time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ranksearch.compress.stacks import Entry, Made
from ranksearch.lowering import cp_als
from ranksearch.lowering.contract import sides
from ranksearch.lowering.cp import Cp, until_settled

SWEEPS = 3
"""Sweeps of a projection that nobody waits for. One by one, every layer of the trained ResNet-20 settles in two or three (six projections,
ten steps of SGD apart, learning rate .02, half the break-even ranks); what is further away goes on at the next one."""


def term_groups(entries: Sequence[tuple[Entry, Cp]]) -> list[TermsGroup]:
    """Layers of any shapes, in batches that padding to the largest does not make too much work."""
    shapes = [(entry.spec.groups, *lowering.modes(entry.spec)) for entry, lowering in entries]
    ranks = [sides(entry.choice.rank)[0] for entry, _ in entries]
    return [TermsGroup([entries[i] for i in batch]) for batch in cp_als.batches(shapes, ranks)]


class TermsGroup:
    """Layers of as many modes, their tensors and terms padded with zeros to the largest."""

    def __init__(self, entries: Sequence[tuple[Entry, Cp]]) -> None:
        self.entries = [entry for entry, _ in entries]
        self.counts = [entry.spec.groups for entry in self.entries]
        self.ranks = [sides(entry.choice.rank)[0] for entry in self.entries]
        self._modes = [lowering.modes(entry.spec) for entry, lowering in entries]
        whole, device = cp_als.largest(self._modes), self.entries[0].weight.device
        self._columns, self._problem = cp_als.side_by_side(self.counts, self.ranks, device)
        rows, rank = self._columns.shape
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        self._rows = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        self._tensors = torch.zeros(rows, *whole, dtype=torch.float64, device=device)
        self._terms = [torch.zeros(rows, n, rank, dtype=torch.float64, device=device) for n in whole]
        finest = min((entry.weight.dtype for entry in self.entries), key=lambda dtype: torch.finfo(dtype).eps)
        self._until = until_settled(finest)
        shapes = [(count, *modes) for count, modes in zip(self.counts, self._modes, strict=True)]
        most = [self._until.most(shape, rank) for shape, rank in zip(shapes, self.ranks, strict=True)]
        self._most = torch.tensor(most, device=device)

    def _inside(self, index: int) -> tuple[slice, ...]:
        """Where a layer's tensor lies."""
        return self._rows[index], *(slice(n) for n in self._modes[index])

    def _taken_in(self, index: int) -> Tensor:
        """A layer's weight as it is now."""
        entry, inside = self.entries[index], self._tensors[self._inside(index)]
        return inside.copy_(entry.spec.blocks(entry.weight).reshape(inside.shape))

    def _many(self) -> cp_als.Many:
        """The weights as they are now."""
        for i in range(len(self.entries)):
            self._taken_in(i)
        return cp_als.Many(self._tensors.flatten(2), self._columns, self._problem, len(self.entries))

    def made(self, *, settle: bool) -> Made:
        """What becomes of the layers.

        Args:
            settle: sweeps until every layer has settled, for which the host waits, not `SWEEPS` of them.
        """
        many = self._many()
        finite = torch.isfinite(many.tensors).all(-1).all(-1)
        energy, before = many.energy(), many.misfit(self._terms)
        until = self._until if settle else replace(self._until, sweeps=SWEEPS)
        found = cp_als.settled_together(many, self._terms, until, most=self._most, looks=settle)
        better = (~found.lost & (found.left <= before))[self._problem][:, None, None]
        for mine, new in zip(self._terms, found.terms, strict=True):
            mine.copy_(torch.where(better, new, mine))
        certified = ~found.lost & (found.left <= before + self._until.settled * energy)
        product = self._terms[0] @ cp_als.khatri_rao(self._terms[1:]).mT
        left_out = (many.tensors - product).square().sum((-2, -1))
        each = many.tensors.square().sum((-2, -1))
        return Made(product.float(), many.tensors.float(), left_out, each, certified[self._problem], finite)

    def folded(self, index: int, tensors: Tensor) -> Tensor:
        spec = self.entries[index].spec
        _, *inside = self._inside(index)
        tensor = tensors.unflatten(2, self._tensors.shape[2:])[(slice(None), *inside)]
        return spec.weight_of(tensor.reshape(spec.groups, *spec.block_shape))

    def begin(self, names: Collection[str]) -> None:
        """Starts these layers anew, from the leading vectors of their weights where those are finite; the host waits."""
        for i in [i for i, entry in enumerate(self.entries) if entry.name in names]:
            if bool(torch.isfinite(tensor := self._taken_in(i)).all()):
                self.start_from(i, cp_als.started(cp_als.mode_vectors(tensor), self.ranks[i], self.counts[i]))

    def start_from(self, index: int, warm: Any) -> bool:
        """Takes over the terms of an earlier projection; whether they fit."""
        shapes = [(self.counts[index], n, self.ranks[index]) for n in self._modes[index]]
        if [tuple(part.shape) for part in warm] != shapes:
            return False
        for mine, terms in zip(self._terms, warm, strict=True):
            mine[self._rows[index]] = 0
            mine[self._rows[index], : terms.shape[1], : terms.shape[2]] = terms.to(mine)
        return True

    def warm(self, index: int) -> Any:
        rows, rank = self._rows[index], self.ranks[index]
        return [mine[rows, :n, :rank].clone() for mine, n in zip(self._terms, self._modes[index], strict=True)]
