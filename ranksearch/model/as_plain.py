"""Layers that are no plain Conv or Linear but compute what one does: what to lower of them, how to write into them, what they become.

- Weight norm of both kinds, W = g v / ||v||: W is lowered. A projection writes v = W and g = ||W||, and training goes on under the norm.
- A class that pads its input by code of its own: its weight is lowered, and its chain pads first.
- A class that makes its weight of parameters (standardised, `own_code.py`): what it makes is lowered. What is written into the
  parameters would not come out of them again, so such a layer first stops making its weight: it is settled (`settle_`), in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm

from ranksearch.lowering import LayerSpec
from ranksearch.lowering.padding import Pad, padded
from ranksearch.lowering.spec import own_forward, own_methods
from ranksearch.lowering.tiled import leave_as_it_is_
from ranksearch.model.bare import is_lazy
from ranksearch.model.own_code import watched


@dataclass(frozen=True)
class AsPlain:
    """What a layer computes: `pad`, then the plain layer of `spec` with `weight`."""

    spec: LayerSpec
    weight: Tensor
    """The parameter, or what was made of the `sources` just now."""
    pad: Pad | None = None
    sources: tuple[Tensor, ...] = ()
    """The parameters that the weight is made of; () where it is one itself."""
    write: Callable[[Tensor], None] | None = None
    """Gives the layer another weight; None where writing into `weight` does that."""
    settles: bool = False
    """Whether the layer stops computing its weight before it is written into."""


def as_plain(module: Any) -> AsPlain | str | None:
    """What `module` computes, a sentence where that is more than a plain layer does; None for other modules than Convs and Linears."""
    if (spec := LayerSpec.of(module)) is not None:
        return AsPlain(spec, module.weight)
    if isinstance(module, Settled):
        return AsPlain(module.plain_spec, module.weight, module.own_pad)
    spec = LayerSpec.stated(module)
    if spec is None or any(map(is_lazy, module.parameters())):
        return None
    if (norm := _weight_norm(module)) is not None:
        return own_forward(module) or norm
    if not isinstance(module._parameters.get("weight"), Tensor):
        return None
    reason = own_forward(module)
    if reason is None or "instance" in reason or not set(own_methods(module)) <= {"forward", "_conv_forward"}:
        return reason
    found = watched(module, spec)
    if isinstance(found, str):
        return found
    if not found.made:
        return AsPlain(found.spec, module.weight, found.pad)
    sources = tuple(p for p in module.parameters() if p is not module.bias)
    weight = found.weight.requires_grad_(module.weight.requires_grad)
    return AsPlain(
        found.spec, weight, found.pad, sources, lambda new: _settle_(module, found.spec, found.pad, new), True
    )


def weight_norm_hook(module: nn.Module) -> WeightNorm | None:
    """The hook of old weight norm (`torch.nn.utils.weight_norm`) on the module's weight."""
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm))
    return next((hook for hook in hooks if hook.name == "weight"), None)


def _new_norm(module: Any) -> Any:
    """The parametrization of new weight norm, where it is the weight's only one."""
    made: Any = module.parametrizations["weight"] if parametrize.is_parametrized(module, "weight") else ()
    alone = len(made) == 1 and len(module.parametrizations) == 1
    return made[0] if alone and isinstance(made[0], parametrizations._WeightNorm) else None


def _weight_norm(module: Any) -> AsPlain | None:
    spec = LayerSpec.stated(module)
    if spec is None:
        return None
    if (hook := weight_norm_hook(module)) is not None:
        g, v, dim = module.weight_g, module.weight_v, hook.dim
    elif (made := _new_norm(module)) is not None:
        stored = module.parametrizations["weight"]
        g, v, dim = stored.original0, stored.original1, made.dim
    else:
        return None

    @torch.no_grad()
    def write(weight: Tensor) -> None:
        norm = torch.norm_except_dim(weight, 2, dim)
        v.copy_(torch.where(norm == 0, v, weight))  # a row of zeros keeps its direction, or the next norm is 0 / 0
        g.copy_(norm)
        if hook is not None:
            module.weight = torch._weight_norm(v, g, dim)

    with torch.no_grad():
        weight = torch._weight_norm(v, g, dim)
    return AsPlain(spec, weight.requires_grad_(v.requires_grad), None, (v, g), write)


def settle_(module: Any) -> tuple[type[nn.Module], Pad | None]:
    """Turns `module` into a layer whose weight is a parameter, in place; returns the class that it was of and its padding."""
    found = as_plain(module)
    assert isinstance(found, AsPlain)
    if weight_norm_hook(module) is not None:
        remove_weight_norm(module, "weight")
    elif found.sources and not found.settles:
        leave_as_it_is_(module)
        reading = (
            module._load_state_dict_pre_hooks
        )  # its hook for old names is a local function of torch, which cannot be pickled
        names = {key: getattr(getattr(hook, "hook", hook), "__qualname__", "") for key, hook in reading.items()}
        for key in [key for key, name in names.items() if name.startswith("weight_norm.")]:
            del reading[key]
    elif own_methods(module) and not isinstance(module, Settled):
        _settle_(module, found.spec, found.pad, found.weight)
    return (_was(module) if isinstance(module, Settled) else type(module)), found.pad


@torch.no_grad()
def _settle_(module: Any, spec: LayerSpec, pad: Pad | None, weight: Tensor) -> None:
    """Settles the layer; its parameter stays the same object, so that an optimizer goes on with it."""
    if isinstance(module, Settled):
        module.weight.copy_(weight)
        return
    if weight is not module.weight:
        module.weight.copy_(weight)
    for name in set(module._parameters) - {"weight", "bias"}:
        del module._parameters[name]
    base = type(module)
    module.__class__ = _settled_class(base)
    module.plain_spec, module.own_pad = spec, pad


class Settled(nn.Module):
    """A layer of a class with code of its own that now does plainly what it did; the second of its bases is that class."""

    weight: Tensor
    bias: Tensor | None

    plain_spec: LayerSpec
    own_pad: Pad | None

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        spec, x = self.plain_spec, input if self.own_pad is None else padded(input, self.own_pad)
        if not spec.is_conv:
            return F.linear(x, layer.weight, layer.bias)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(spec.kernel_size) - 1]
        return convolve(x, layer.weight, layer.bias, spec.stride, spec.padding, spec.dilation, spec.groups)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (_was(self),), self.__getstate__()  # type: ignore[misc]


def _was(layer: nn.Module) -> type:
    """The class that a settled layer was of."""
    kinds = type(layer).__mro__
    return kinds[kinds.index(Settled) + 1]


_CLASSES: dict[type, type] = {}


def _settled_class(base: type) -> type:
    if base not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _CLASSES[base] = type(base.__name__, (Settled, base), names)
    return _CLASSES[base]


def _empty(base: type) -> Any:
    made: Any = _settled_class(base)
    return made.__new__(made)
