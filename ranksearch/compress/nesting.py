"""One dense weight that serves many sizes: for one pass its layers are what they are at a level, then the dense weights are back.

Levels are plans, the smallest first. A layer's basis is found from its weight now and then (`refresh`), the leading directions first; its
weight at any rank is then two small products. Formats that are no matrices (`tucker2`, `cp`) are projected anew at every pass.

Reference: nested directions of one weight, Horváth et al. 2021, arXiv 2102.13451 (FjORD, ordered dropout); the smallest and the largest
level at every step, Yu & Huang 2019, arXiv 1903.05134 (the sandwich rule).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch import linalg
from ranksearch.compress.plan import LayerPlan, RankPlan
from ranksearch.compress.slots import Slot, slots_of
from ranksearch.errors import NonFiniteError
from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import sides
from ranksearch.lowering.matrix import MatrixLowering

Key = tuple[str, str]
"""(layer, what it is seen as: forms that remove the same of a weight share their basis)"""


class Nesting:
    """The levels of a model under training."""

    def __init__(self, model: nn.Module, path: Sequence[RankPlan]) -> None:
        """
        Args:
            path: the plans of the levels, the smallest first.

        Raises:
            UsageError: a plan does not fit the model.
        """
        self.levels = [slots_of(model, plan) for plan in path]
        self._bases: dict[Key, Tensor] = {}
        self._most: dict[Key, int] = {}
        for slot, choice, matrix in self._matrices():
            key = slot.name, matrix.name
            self._most[key] = max(self._most.get(key, 1), *sides(choice.rank))

    def __len__(self) -> int:
        return len(self.levels)

    def _matrices(self) -> Iterator[tuple[Slot, LayerPlan, MatrixLowering]]:
        for slots in self.levels:
            for slot, choice in slots.values():
                if (matrix := _as_matrices(choice)) is not None:
                    yield slot, choice, matrix

    @torch.no_grad()
    def refresh(self) -> None:
        """Finds every layer's basis anew from its weight as it is.

        Raises:
            NonFiniteError: a weight is not finite; the text names the layer.
        """
        found = {(slot.name, matrix.name): (slot, matrix) for slot, _, matrix in self._matrices()}
        for key, (slot, matrix) in found.items():
            try:
                scaled, _ = linalg.moderate(matrix.unfold(slot.spec.blocks(slot.weight.detach()), slot.spec))
            except NonFiniteError as error:
                raise NonFiniteError(f"Layer {slot.name!r}: {error}") from error
            rows = scaled.shape[-2] <= scaled.shape[-1]
            self._bases[key] = linalg.leading(scaled if rows else scaled.mT, self._most[key])[0]

    @contextmanager
    def at(self, level: int) -> Iterator[None]:
        """Within, the model is what it is at a level; afterwards its weights are as before.

        Gradients that are added within go straight to the dense weights, those outside the basis too: so a basis can turn.
        """
        slots = self.levels[level].values()
        with torch.no_grad():
            kept = [slot.weight.detach().clone() for slot, _ in slots]
            for slot, choice in slots:
                slot.weight.copy_(self.cut(slot, choice, slot.weight.detach()))
        try:
            yield
        finally:
            with torch.no_grad():
                for (slot, _), weight in zip(slots, kept, strict=True):
                    slot.weight.copy_(weight)

    def cut(self, slot: Slot, choice: LayerPlan, tensor: Tensor) -> Tensor:
        """A tensor of a weight's shape, projected onto what the layer keeps of it at a rank."""
        matrix = _as_matrices(choice)
        if matrix is None:
            return lowering_named(choice.lowering).project(tensor, choice.rank, slot.spec).weight
        (count,) = sides(choice.rank)
        unfolded = matrix.unfold(slot.spec.blocks(tensor), slot.spec)
        basis = self._bases[slot.name, matrix.name][..., -count:].to(unfolded)
        rows = unfolded.shape[-2] <= unfolded.shape[-1]
        product = basis @ (basis.mT @ unfolded) if rows else (unfolded @ basis) @ basis.mT
        return slot.spec.weight_of(matrix.fold(product, slot.spec)).to(tensor.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The bases, as tensors by text."""
        return {f"{name} {form}": basis for (name, form), basis in self._bases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, basis in state.items():
            layer, _, form = name.rpartition(" ")
            self._bases[layer, form] = basis


def _as_matrices(choice: LayerPlan) -> MatrixLowering | None:
    """The lowering as a batch of matrices; a pivoted form is its plain one. None for formats that are none."""
    plain = lowering_named(lowering_named(choice.lowering).curve_name)
    return plain if isinstance(plain, MatrixLowering) else None
