"""Replaces the layers of a plan by their chains, with decomposed weights (`compress`) or without (`restructure_`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.lowering.chain import Turned, become_
from ranksearch.lowering.contract import running_layers
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.as_plain import settle_
from ranksearch.model.attention import IN_PROJ, QKV, leave_fused_, open_attention_
from ranksearch.model.bare import bare
from ranksearch.model.copying import copied
from ranksearch.model.experts import open_experts_
from ranksearch.model.plan import LayerPlan, RankPlan
from ranksearch.model.reached import reached_by_classes
from ranksearch.model.recurrent import open_recurrent_
from ranksearch.model.slots import Slot, find_slots, slots_of


def compress(
    model: nn.Module,
    plan: RankPlan,
    *,
    example_input: Any = None,
    warm: Mapping[str, Any] | None = None,
    weightings: Mapping[str, Weighting] | None = None,
) -> nn.Module:
    """A copy of `model` whose layers named in `plan` are chains of smaller layers with the decomposed weights.

    The model may be any `nn.Module`: no wrapper, no naming rules. `model` itself is not changed. A weight that several layers
    share is decomposed once, and their chains share the factors.

    Args:
        example_input: the compressed net is then checked as a whole (`whole.py`, two forward passes). Left out, it is the plan's,
            where `allocate` leaves it; without either, only the structure is checked, and that no class's code reaches the original's
            layers.
        warm: what a `Projector` keeps of its last projection of this model; `cp` needs it to find the projected weight's own terms.
        weightings: layer -> the metric of its data (`ranksearch.weightings`), in which what is kept of it is nearest to it; for layers that
            are not named, and for lowerings that know no other metric (`cp`), the weight's own norm decides.

    Raises:
        UsageError: a layer that is not there, a lowering that refuses it, a rank outside its range, or a compressed net that costs or
            computes something else than planned.
        NonFiniteError: weights that are not finite; the text names the layer.
    """
    example = plan.example_input if example_input is None else example_input
    if example is None:  # where there is one, it is measured
        _check_reached(bare(model), plan)
    small = _restructured(copied(bare(model)), plan, fill=True, warm=warm or {}, weightings=weightings or {})
    if example is not None and next(plan.lowered(), None) is not None:
        from ranksearch.compress.whole import check_whole

        check_whole(model, small, plan, example)
    return small


def _check_reached(model: nn.Module, plan: RankPlan) -> None:
    """Raises UsageError where code of a class computes with a layer of the plan: a copy's classes are the model's own."""
    reached = reached_by_classes(model)
    for name, _ in plan.lowered() if reached else ():
        if name in reached:
            raise UsageError(
                f"Layer {name!r} cannot be lowered: {reached[name]} reaches it by a global or a closure, so that a copy of the model would "
                f"go on computing with the original. Exclude it, or let the module hold it."
            )


def restructure_(model: nn.Module, plan: RankPlan) -> nn.Module:
    """Gives `model` the architecture of `plan` in place, with initial weights: the form to load a state dict into."""
    return _restructured(model, plan, fill=False, warm={}, weightings={})


def _restructured(
    model: nn.Module, plan: RankPlan, *, fill: bool, warm: Mapping[str, Any], weightings: Mapping[str, Weighting]
) -> nn.Module:
    open_parts_(model, slots_of(model, plan))  # everything wrong is told before anything is changed
    for name, (slot, choice) in slots_of(model, plan).items():
        nearest = _nearest(slot, choice, weightings.get(name)) if fill else slot.weight
        _replace_(model, slot, choice, nearest, fill=fill, warm=warm.get(name))
    return model


def open_parts_(model: nn.Module, names: Iterable[str]) -> None:
    """Opens the attentions, recurrent nets and fused experts that the slots `names` are parts of: each is a Linear of that name then.

    Raises:
        UsageError: an attention is named both packed and by its parts.
    """
    parts: dict[tuple[str, ...], set[str]] = defaultdict(set)
    recurrent: set[str] = set()
    experts: set[str] = set()
    slots = find_slots(model)
    for name in names:
        slot = slots[name]
        if slot.recurrent is not None:
            recurrent.add(slot.recurrent)
        if slot.experts is not None:
            experts.add(slot.experts)
        if slot.attention is not None:
            paths = tuple(path.rpartition(".")[0] for path in slot.paths)
            parts[paths].add(name.rpartition(".")[2])
    for paths, found in parts.items():
        if IN_PROJ in found and found & set(QKV):
            raise UsageError(f"The plan lowers {paths[0]}.{IN_PROJ} and a part of it: name it packed or its parts.")
    for paths, found in parts.items():
        open_attention_(model, paths, found)
    for path in recurrent:
        open_recurrent_(model, path)
    for path in experts:
        open_experts_(model, path)


def _nearest(slot: Slot, choice: LayerPlan, weighting: Weighting | None) -> Tensor:
    """What is to be decomposed of a layer: its weight, or what is nearest to it in a metric and has the rank already.

    In fp64: a whitened weight is steeper than the weight, and this is done once.
    """
    view = lowering_named(choice.lowering).seen(weighting, slot.spec) if weighting is not None else None
    weight = slot.weight.detach()
    if view is None:
        return weight
    try:
        return view.project(weight.double(), choice.rank).weight
    except NonFiniteError as error:
        raise NonFiniteError(f"Layer {slot.name!r}: {error}") from error


def _replace_(model: nn.Module, slot: Slot, choice: LayerPlan, nearest: Tensor, *, fill: bool, warm: Any) -> None:
    """Turns the layers that compute with the slot's weight into chains, in place: whatever refers to them goes on."""
    lowering, weight = lowering_named(choice.lowering), slot.weight
    done: set[int] = set()
    shared: tuple[Tensor, ...] | None = None
    for path in slot.paths:
        module: Any = model.get_submodule(path)
        leave_fused_(model, path)
        if id(module) in done:
            continue
        base, pad = settle_(module) if slot.layer is not None else (type(module), None)
        bias = getattr(module, "bias", None)
        spec = replace(slot.spec, bias=bias is not None)
        if slot.spec.tied and isinstance(module, nn.Embedding):
            spec = LayerSpec(spec.out_channels, spec.in_channels, transposed=True, lookup=True)
        built = lowering.build(spec, choice.rank, device=weight.device, dtype=weight.dtype)
        if spec.lookup:
            _look_up_as_(built, module)
        own: tuple[Tensor, ...] = ()
        if slot.spec.tied and spec.lookup:
            built[1] = Turned(built[1])  # type: ignore[index, operator]
            built[0].weight, built[1].turned = reversed(shared or ())  # type: ignore[index, union-attr]
        else:
            own = lowering.stored_weights(built)
        if shared is None:
            shared = own
            if fill:
                _fill_(own, slot, nearest, choice, warm)
        elif own:
            _share_(built, own, shared)
        if spec.bias:
            running_layers(built)[-1].bias = bias
        become_(module, built.train(module.training), spec, lowering, choice.rank, base=base, pad=pad)
        done.add(id(module))
    for stored in shared or ():
        if stored.is_floating_point():
            stored.requires_grad_(weight.requires_grad)


def _look_up_as_(built: Any, module: nn.Embedding) -> None:
    """Gives the lookup of a chain the settings of the Embedding that it replaces."""
    if isinstance(built, nn.Sequential):
        for name in ("padding_idx", "scale_grad_by_freq", "sparse"):
            setattr(built[0], name, getattr(module, name))


def _fill_(parameters: tuple[Tensor, ...], slot: Slot, nearest: Tensor, choice: LayerPlan, warm: Any) -> None:
    with torch.no_grad():
        try:
            factors = lowering_named(choice.lowering).decompose(nearest.detach(), choice.rank, slot.spec, warm)
        except NonFiniteError as error:
            raise NonFiniteError(f"Layer {slot.name!r}: {error}") from error
        for parameter, factor in zip(parameters, factors, strict=True):
            parameter.copy_(factor)


def _share_(chain: nn.Module, own: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> None:
    """Lets `chain` compute with the parameters and buffers `shared` in the place of its `own`."""
    instead: dict[int, Any] = {id(mine): theirs for mine, theirs in zip(own, shared, strict=True)}
    for module in chain.modules():
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tensors:
            held |= {name: instead[id(tensor)] for name, tensor in held.items() if id(tensor) in instead}
