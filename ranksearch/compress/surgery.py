"""Replaces the layers of a plan by their chains, with decomposed weights (`compress`) or without (`restructure_`)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ranksearch.compress.plan import LayerPlan, RankPlan
from ranksearch.errors import NonFiniteError, UsageError, nearest
from ranksearch.lowering import LayerSpec, lowering_named


def lowerable_module(model: nn.Module, name: str) -> tuple[Any, LayerSpec]:
    """The module `name` and its spec.

    Raises:
        UsageError: there is no such module, or it is no plain conv or Linear.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        names = [n for n, m in model.named_modules() if LayerSpec.of(m) is not None]
        raise UsageError(f"The model has no layer {name!r}. {nearest(name, names)}") from None
    spec = LayerSpec.of(module)
    if spec is None:
        raise UsageError(f"Layer {name!r} is a {type(module).__name__}, not a plain Conv1d/2d/3d or Linear.")
    return module, spec


def _replace_(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _chain(module: Any, spec: LayerSpec, choice: LayerPlan, name: str) -> nn.Module:
    try:
        lowering = lowering_named(choice.lowering)
        weight = module.weight
        chain = lowering.build(spec, choice.rank, device=weight.device, dtype=weight.dtype)
    except UsageError as error:
        raise UsageError(f"Layer {name!r}: {error}") from error
    return chain.train(module.training)


def _fill_(chain: Any, module: Any, spec: LayerSpec, choice: LayerPlan, name: str) -> None:
    layers: list[Any] = list(chain) if isinstance(chain, nn.Sequential) else [chain]
    with torch.no_grad():
        try:
            factors = lowering_named(choice.lowering).decompose(module.weight.detach(), choice.rank, spec)
        except NonFiniteError as error:
            raise NonFiniteError(f"Layer {name!r}: {error}") from error
        for layer, factor in zip(layers, factors, strict=True):
            layer.weight.copy_(factor)
        if spec.bias:
            layers[-1].bias.copy_(module.bias)


def compress(model: nn.Module, plan: RankPlan) -> nn.Module:
    """A copy of `model` whose layers named in `plan` are chains of smaller layers with the decomposed weights.

    The model may be any `nn.Module`: no wrapper, no naming rules. `model` itself is not changed.

    Raises:
        UsageError: a layer that is not there, a lowering that refuses it, a rank outside its range.
    """
    model = copy.deepcopy(model)
    for name, choice in plan.lowered():
        module, spec = lowerable_module(model, name)
        chain = _chain(module, spec, choice, name)
        _fill_(chain, module, spec, choice, name)
        _replace_(model, name, chain)
    return model


def restructure_(model: nn.Module, plan: RankPlan) -> nn.Module:
    """Gives `model` the architecture of `plan` in place, with initial weights: the form to load a state dict into."""
    for name, choice in plan.lowered():
        module, spec = lowerable_module(model, name)
        _replace_(model, name, _chain(module, spec, choice, name))
    return model
