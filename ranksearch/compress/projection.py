"""Projection: overwriting dense weights by their low-rank approximations, in place.

Reference: the weight distortion of Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145; energy transfer and BN rectification: LRPET, Guo et
al. 2024, arXiv 2204.05566.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.compress.batched import Batched, Run
from ranksearch.compress.stacks import Entry, takes
from ranksearch.errors import NonFiniteError
from ranksearch.lowering import LayerSpec, Lowering, lowering_named
from ranksearch.lowering.contract import WeightView
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.bare import bare
from ranksearch.model.copying import copied
from ranksearch.model.plan import LayerPlan, RankPlan
from ranksearch.model.slots import Slot, settled_, slots_of

FLOOR = 1e-3
"""Channels that BN all but silences keep this share of the largest channel's weight in a rectified projection, so that it can be undone."""


class Projector:
    """Projects a model's layers again and again: `projector(model)` beside `optimizer.step()` every `period` steps.

    It keeps each layer's basis of the last projection; the next one of a weight nearby then is several times faster.
    """

    def __init__(
        self,
        plan: RankPlan,
        *,
        energy_transfer: bool = False,
        norms: Mapping[str, str] | None = None,
        weightings: Mapping[str, Weighting] | None = None,
        batched: bool | None = None,
    ) -> None:
        """
        Args:
            energy_transfer: scales what is kept of a weight so that it has the energy ||W||² that it had before.
            norms: layer -> the BN layer that takes its output (`Net.norms`). BN rectification: such a layer's output channels are
                weighted by |gamma| / sqrt(var + eps), by which BN will scale them, for the choice of what is kept. `cp` goes without:
                it has to find its own terms again when it decomposes.
            weightings: layer -> the metric of its data, in which what is kept of it is nearest to it; BN rectification then leaves it
                alone. `weigh` brings fresher ones.
            batched: all layers that can be as one program of batched products (`program.py`), the fastest on a GPU, or layer by
                layer, the fastest on a CPU; None: as it is fastest where the weights lie.
        """
        self.plan, self.energy_transfer, self.norms = plan, energy_transfer, dict(norms or {})
        self.warm: dict[str, Any] = {}
        self._warm_plan: dict[str, LayerPlan] = {}
        self._wanted, self._batched = batched, None  # type: bool | None, Batched | None
        self._known: tuple[nn.Module, dict[str, tuple[Slot, LayerPlan]]] | None = None
        self.weigh(weightings or {})

    def weigh(self, weightings: Mapping[str, Weighting]) -> None:
        """Projects in these metrics from now on; layers that are not named keep theirs."""
        self.weightings: dict[str, Weighting] = {**getattr(self, "weightings", {}), **weightings}
        self._views: dict[tuple[str, str], WeightView | None] = {}

    def _view(self, name: str, lowering: Lowering, spec: LayerSpec) -> WeightView | None:
        """Made once: it holds what the lowering's matrices see of the layer's metric."""
        if name not in self.weightings:
            return None
        if (name, lowering.name) not in self._views:
            self._views[name, lowering.name] = lowering.seen(self.weightings[name], spec)
        return self._views[name, lowering.name]

    @torch.no_grad()
    def __call__(self, model: nn.Module, plan: RankPlan | None = None) -> dict[str, float]:
        """Projects the layers of the plan in place; nothing is written unless every layer can be.

        Args:
            plan: used this once instead of the projector's own, such as one of larger ranks on the way down to it.

        Returns:
            Layer name -> share of its ||W||² that was removed (0 where the weight had the rank already), before energy transfer.

        Raises:
            UsageError: a layer that is not there, a rank outside its range.
            NonFiniteError: weights that are not finite; the text names the layer.
        """
        settled_(model, plan or self.plan)
        found = slots_of(model, plan or self.plan)
        batched = self._batched_of(model, found)
        removed, left = batched.now() if batched is not None else ({}, list(found))
        inside = batched.program.names if batched is not None else []
        alone, written = [name for name in found if name not in inside or name in left], []
        for name in alone:
            slot, choice = found[name]
            if name in left:
                self.warm[name] = None if name in inside else self.warm.get(name)
            projected, removed[name] = self._alone(model, slot, choice)
            written.append((slot, projected))
        if batched is not None:
            batched.program.write()
            batched.start_from({name: self.warm[name] for name in alone if name in inside})
            self.warm |= batched.warm()
            self._warm_plan |= {name: found[name][1] for name in inside}
        for slot, projected in written:
            slot.write_(projected)
        return {name: removed[name] for name in found}

    @torch.no_grad()
    def later(self, model: nn.Module, run: Run) -> None:
        """Projects in place as a call does, on a GPU without waiting for what becomes of it.

        A layer that is not certified to be next to the optimum keeps its weight this once: the next projection is exact.

        Args:
            model: the same one every time; for another one, its slots are looked for again.
            run: runs the program's statements, or replays them.

        Raises:
            NonFiniteError: weights were not finite, now or the last time; the text names the layer.
        """
        if self._known is None or self._known[0] is not model:
            self._known = model, slots_of(settled_(model, self.plan), self.plan)
        found = self._known[1]
        batched = self._batched_of(model, found)
        if batched is not None:
            batched.look()
        if batched is None or batched.unsure or any(slot.is_made for slot, _ in found.values()):
            self(model)
            return
        for name, (slot, choice) in found.items():
            if name not in batched.program.names:
                slot.write_(self._alone(model, slot, choice)[0])
        batched.later(run)

    def _batched_of(self, model: nn.Module, found: Mapping[str, tuple[Slot, LayerPlan]]) -> Batched | None:
        """The program of the layers that can be part of one, the last projection's where it still fits; None without any."""
        entries = [self._entry(model, *it) for it in found.values() if self._is_batched(*it)]
        if not entries:
            return None
        if self._batched is None or not self._batched.fits(entries):
            self._refresh()
            known = {
                e.name: self.warm.get(e.name) for e in entries if self._warm_plan.get(e.name, e.choice) == e.choice
            }
            self._batched = Batched(entries, known, energy_transfer=self.energy_transfer)
        return self._batched

    def _is_batched(self, slot: Slot, choice: LayerPlan) -> bool:
        lowering = lowering_named(choice.lowering)
        wanted = slot.weight.is_cuda if self._wanted is None else self._wanted
        full = choice.rank == lowering.full_rank(slot.spec)
        alone = full or slot.is_made or slot.name in self.weightings
        return wanted and not alone and takes(lowering, slot.weight)

    def _entry(self, model: nn.Module, slot: Slot, choice: LayerPlan) -> Entry:
        norm = self._norm(slot.name, lowering_named(choice.lowering))
        return Entry(slot, choice, partial(_channel_scale, model, norm, slot.spec) if norm is not None else None)

    def _norm(self, name: str, lowering: Lowering) -> str | None:
        """The BN layer by which a layer is rectified; `cp` goes without."""
        return self.norms.get(name) if lowering.is_projection else None

    def _refresh(self) -> None:
        """Brings `warm` up to date with what projections have left on the device."""
        if self._batched is not None:
            self.warm |= self._batched.warm()

    def _alone(self, model: nn.Module, slot: Slot, choice: LayerPlan) -> tuple[Tensor, float]:
        """(what a layer's weight becomes, the share of ||W||² that is removed), of this layer alone."""
        name, lowering = slot.name, lowering_named(choice.lowering)
        view = self._view(name, lowering, slot.spec)
        norm = self._norm(name, lowering) if view is None else None
        scale = _channel_scale(model, norm, slot.spec) if norm is not None else None
        weight = slot.weight.detach() if scale is None else slot.weight.detach() * scale
        warm = self.warm.get(name) if self._warm_plan.get(name, choice) == choice else None
        try:
            found = (
                lowering.project(weight, choice.rank, slot.spec, warm)
                if view is None
                else view.project(weight, choice.rank, warm)
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"Layer {name!r}: {error}") from error
        projected, share, self.warm[name] = found
        self._warm_plan[name] = choice
        if scale is not None:
            projected = projected / scale
        if scale is not None or view is not None:
            share = _removed(slot.weight, projected)
        if self.energy_transfer and share < 1 and projected.norm() > 0:
            projected = projected * (slot.weight.norm() / projected.norm())
        return projected, share

    def state_dict(self) -> dict[str, Any]:
        """The bases, as tensors and numbers that can be saved without pickling code."""
        self._refresh()
        return {name: None if warm is None else tuple(warm) for name, warm in self.warm.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.warm, self._warm_plan, self._batched = dict(state), {}, None


def project_(
    model: nn.Module,
    plan: RankPlan,
    *,
    energy_transfer: bool = False,
    norms: Mapping[str, str] | None = None,
    weightings: Mapping[str, Weighting] | None = None,
) -> dict[str, float]:
    """Projects the layers of `plan` in place, once; a training loop that does so every `period` steps is faster with a `Projector`.

    Arguments, result and errors are those of `Projector`.
    """
    return Projector(plan, energy_transfer=energy_transfer, norms=norms, weightings=weightings)(bare(model))


def iterated(model: nn.Module, plan: RankPlan) -> dict[str, tuple[Tensor, Any]]:
    """Layer -> (its weight, the terms that this is made of) after one projection, where that is an iteration (`cp`): on a GPU all at once.

    `model` stays as it is.
    """
    layers = {name: choice for name, choice in plan.lowered() if not lowering_named(choice.lowering).is_projection}
    if not layers:
        return {}
    model, projector = copied(bare(model)), Projector(RankPlan(layers))
    projector(model)
    found = slots_of(model, RankPlan(layers))
    return {name: (slot.weight.detach(), projector.warm[name]) for name, (slot, _) in found.items()}


def _removed(weight: Tensor, projected: Tensor) -> float:
    energy = weight.norm().square()
    return float((weight - projected).norm().square() / energy) if energy > 0 else 0.0


def _channel_scale(model: nn.Module, name: str, spec: LayerSpec) -> Tensor:
    """|gamma| / sqrt(var + eps) of the BN layer `name`, laid out to multiply the weight of `spec` (largest channel: 1)."""
    norm: Any = model.get_submodule(name)
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale * norm.weight.detach().abs() if norm.weight is not None else scale
    scale = (scale / scale.max().clamp_min(torch.finfo(scale.dtype).tiny)).clamp_min(FLOOR)
    blocks = scale.reshape(spec.groups, -1, *(1 for _ in spec.block_shape[1:])).expand(spec.groups, *spec.block_shape)
    return spec.weight_of(blocks)
