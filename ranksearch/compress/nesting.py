"""One dense weight that serves many sizes: for one pass its layers are what they are at a level, then the dense weights are back.

Levels are plans, the smallest first. A layer's bases are found from its weight now and then (`refresh`), the leading directions first; its
weight at any rank is then two small products. Formats that are no matrices (`tucker2`, `cp`) are projected anew at every pass.

A gradient G at a level goes to the dense weight along the tangent space of the matrices of that rank: U Uᵀ G + (1 - U Uᵀ) G V Vᵀ, with the
leading left and right directions U and V. That changes what the level computes, and turns its bases; the rest of G would only feed
directions that the level does not see. Formats that are no matrices get G as it is.

References: nested directions of one weight, Horváth et al. 2021, arXiv 2102.13451 (FjORD, ordered dropout); the tangent space,
Vandereycken 2013, arXiv 1209.3834.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch import linalg
from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import sides
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.model.plan import LayerPlan, RankPlan
from ranksearch.model.slots import Slot, slots_of

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
        if made := [slot.name for slots in self.levels for slot, _ in slots.values() if slot.is_made]:
            raise UsageError(
                f"A nested run cannot lower {made[0]!r}, whose weight is made of other parameters: exclude it, or make it a plain one."
            )
        self._bases: dict[Key, tuple[Tensor, Tensor]] = {}
        """The leading directions [blocks, side, rank] of the shorter side and of the longer one, the last one leads."""
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
        """Finds every layer's bases anew from its weight as it is.

        Raises:
            NonFiniteError: a weight is not finite; the text names the layer.
        """
        found = {(slot.name, matrix.name): (slot, matrix) for slot, _, matrix in self._matrices()}
        for key, (slot, matrix) in found.items():
            try:
                scaled, _ = linalg.moderate(matrix.unfold(slot.spec.blocks(slot.weight.detach()), slot.spec))
            except NonFiniteError as error:
                raise NonFiniteError(f"Layer {slot.name!r}: {error}") from error
            wide = scaled.mT if _is_tall(scaled) else scaled
            near = linalg.leading(wide, self._most[key])[0]
            # W'U has orthogonal columns; one of length 0 is no direction
            self._bases[key] = near, nn.functional.normalize(wide.mT @ near, dim=-2)

    @contextmanager
    def at(self, level: int) -> Iterator[None]:
        """Within, the model is what it is at a level; afterwards its weights are as before.

        Gradients that come in within go to the dense weights along the level's tangent space, see above; earlier ones stay as they are.
        """
        slots = list(self.levels[level].values())
        owners = list({id(owner): owner for owner in (_owner(slot.weight) for slot, _ in slots)}.values())
        earlier = [owner.grad for owner in owners]
        with torch.no_grad():
            kept = [slot.weight.detach().clone() for slot, _ in slots]
            for slot, choice in slots:
                slot.weight.copy_(self.cut(slot, choice, slot.weight.detach()))
        for owner in owners:
            owner.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for (slot, choice), weight in zip(slots, kept, strict=True):
                    slot.weight.copy_(weight)
                    if (gradient := _gradient(slot.weight)) is not None:
                        gradient.copy_(self.along(slot, choice, gradient))
                for owner, before in zip(owners, earlier, strict=True):
                    if before is not None:
                        owner.grad = before if owner.grad is None else owner.grad.add_(before)

    def cut(self, slot: Slot, choice: LayerPlan, tensor: Tensor) -> Tensor:
        """What a tensor T of the weight's shape becomes at a rank: U Uᵀ T, or the lowering's own projection."""
        matrix = _as_matrices(choice)
        if matrix is None:
            return lowering_named(choice.lowering).project(tensor, choice.rank, slot.spec).weight
        near, _ = self._kept(slot, choice, matrix, tensor)
        return _through(matrix, slot, tensor, lambda wide: near @ (near.mT @ wide))

    def along(self, slot: Slot, choice: LayerPlan, gradient: Tensor) -> Tensor:
        """A gradient of a weight's shape along the tangent space at a rank; as it is for a format that is no matrix."""
        matrix = _as_matrices(choice)
        if matrix is None:
            return gradient
        near, far = self._kept(slot, choice, matrix, gradient)

        def tangent(wide: Tensor) -> Tensor:
            inside = near @ (near.mT @ wide)
            return inside + ((wide - inside) @ far) @ far.mT

        return _through(matrix, slot, gradient, tangent)

    def _kept(self, slot: Slot, choice: LayerPlan, matrix: MatrixLowering, like: Tensor) -> tuple[Tensor, Tensor]:
        """The directions that a rank keeps of the shorter side, and of the longer one."""
        (count,) = sides(choice.rank)
        near, far = self._bases[slot.name, matrix.name]
        return near[..., -count:].to(like), far[..., -count:].to(like)

    def state_dict(self) -> dict[str, Any]:
        """The bases, as tensors by text."""
        return {f"{name} {form}": bases for (name, form), bases in self._bases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, (near, far) in state.items():
            layer, _, form = name.rpartition(" ")
            self._bases[layer, form] = near, far


def _as_matrices(choice: LayerPlan) -> MatrixLowering | None:
    """The lowering as a batch of matrices; a pivoted form is its plain one. None for formats that are none."""
    plain = lowering_named(lowering_named(choice.lowering).curve_name)
    return plain if isinstance(plain, MatrixLowering) else None


def _is_tall(matrices: Tensor) -> bool:
    return matrices.shape[-2] > matrices.shape[-1]


def _through(matrix: MatrixLowering, slot: Slot, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of a slot's shape, changed as matrices [blocks, n, m] with n <= m."""
    unfolded = matrix.unfold(slot.spec.blocks(tensor), slot.spec)
    changed = change(unfolded.mT).mT if _is_tall(unfolded) else change(unfolded)
    return slot.spec.weight_of(matrix.fold(changed, slot.spec)).to(tensor.dtype)


def _owner(weight: Tensor) -> Tensor:
    """The parameter that a slot's weight is, or is a part of."""
    return weight if weight._base is None else weight._base


def _gradient(weight: Tensor) -> Tensor | None:
    """The gradient of a slot's weight, itself a part of a larger one where the weight is; None where there is none."""
    whole, owner = _owner(weight).grad, _owner(weight)
    if whole is None or owner is weight:
        return whole
    return whole.as_strided(weight.shape, weight.stride(), weight.storage_offset() - owner.storage_offset())
