"""Convs and Linears of classes that compute by code of their own: what that code does, where it comes to a plain layer.

Such a class may pad its input in another way (timm's `Conv2dSame`, causal convolutions) and make its weight from its parameters row by row
(`StdConv2d`, equalised or normalised weights). It is not recognised by its name but watched: the layer is called a few times, the one
product that a call makes is caught, and its arguments are held against the input, the parameters and the settings. Whatever does
more than that is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ranksearch.lowering import LayerSpec
from ranksearch.lowering.padding import Pad, padded
from ranksearch.lowering.spec import Ints
from ranksearch.model.undisturbed import undisturbed

SIZES = 4
"""Probes of a convolution, each one step larger than the last: what it pads may depend on the size."""
MODES = ("constant", "replicate", "reflect", "circular")
ROUNDING = 1e-3
"""A weight may be made of another row by row, as a scale and a shift of it: it may be off by this share of the row's largest number."""
_PRODUCTS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, F.linear: 0}
"""Function -> spatial axes."""
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_RAISED = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Watched:
    """What the code of a layer comes to: `pad`, then the plain layer of `spec` with `weight`."""

    spec: LayerSpec
    pad: Pad | None
    weight: Tensor
    made: bool
    """Whether the weight is made of parameters; else it is the layer's parameter itself."""


class _Catching(TorchFunctionMode):
    """Notes the arguments of products instead of computing them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        given = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
        with torch._C.DisableTorchFunction():
            shapes = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in given.items()}
            self.calls.append((func, given, func(**shapes)))
        return self.calls[-1][2]


def watched(module: Any, spec: LayerSpec) -> Watched | str:
    """What the code of `module`, a Conv or Linear whose attributes say `spec`, comes to; a sentence where that is no plain layer."""
    kind = type(module).__name__
    matrix = {n: sum(extent > 1 for extent in p.shape) > 1 for n, p in module.named_parameters()}
    extra = [n for n, is_matrix in matrix.items() if "." in n or (is_matrix and n != "weight")]
    if extra:
        return f"{kind} computes with {extra[0]} beside its weight."
    if spec.transposed:
        return f"{kind} is a transposed layer with code of its own."
    try:
        with undisturbed(module), torch.no_grad():
            found = [_one_product(module, spec, x) for x in _probes(module, spec)]
            module.train()
            found.append(_one_product(module, spec, next(_probes(module, spec))))
    except _RAISED as error:
        return f"{kind} has code of its own, which raises {type(error).__name__} when the layer is called by itself."
    if (reason := next((one for one in found if isinstance(one, str)), None)) is not None:
        return f"{kind} has code of its own: {reason}"
    (first, *others) = calls = [one for one in found if isinstance(one, _Call)]
    if any(other.spec != first.spec or not torch.equal(other.weight, first.weight) for other in others):
        return f"{kind} has code of its own: what it computes with depends on its input or its mode."
    made = first.weight is not module.weight
    if made and not _is_row_by_row(first.weight.detach(), module.weight.detach()):
        return f"{kind} has code of its own: its weight is no scale and shift of the rows of its parameter."
    pad = _pad_of([(call.x, call.given) for call in calls], first.spec)
    if isinstance(pad, str):
        return f"{kind} has code of its own: {pad}"
    return Watched(first.spec, pad, first.weight.detach().clone() if made else module.weight, made)


class _Call(NamedTuple):
    """One call of a layer with `x`: what was convolved, with what, and the plain layer that does so."""

    x: Tensor
    given: Tensor
    weight: Tensor
    spec: LayerSpec


def _probes(module: Any, spec: LayerSpec) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    like = module.weight

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    if not spec.is_conv:
        yield from (drawn(2, spec.in_channels), drawn(2, 3, spec.in_channels))
        return
    reach = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
    for more in range(SIZES):
        yield drawn(2, spec.in_channels, *(2 * r + s + 4 + more for r, s in zip(reach, spec.stride, strict=True)))


def _one_product(module: Any, spec: LayerSpec, x: Tensor) -> _Call | str:
    """What one call comes to, or what is wrong with it."""
    with _Catching() as caught:
        output = module.forward(x)
    if len(caught.calls) != 1:
        return f"a call makes {len(caught.calls)} products."
    func, given, result = caught.calls[0]
    if output is not result:
        return "what it returns is no product's result."
    weight, bias = given["weight"], given.get("bias")
    if _PRODUCTS[func] != len(spec.kernel_size) or weight.shape != spec.weight_shape:
        return "its product is of another shape than the layer."
    if bias is not module.bias:
        return "it adds something else than its bias."
    if not spec.is_conv:
        same = given["input"] is x or torch.equal(given["input"], x)
        return _Call(x, x, weight, spec) if same else "it changes its input."
    if given["input"].dtype != x.dtype or given["input"].shape[:2] != x.shape[:2]:
        return "it changes its input."
    axes = len(spec.kernel_size)
    settings = {name: _ints(given.get(name, 1), axes) for name in ("stride", "dilation")} | {
        "groups": given.get("groups", 1)
    }
    for name, value in settings.items():
        if value != getattr(spec, name):
            return f"its {name} is {value} where the layer says {getattr(spec, name)}."
    padding = given.get("padding", 0)
    padding = padding if padding == "same" else (0,) * axes if padding == "valid" else _ints(padding, axes)
    return _Call(x, given["input"], weight, replace(spec, padding=padding, padding_mode="zeros"))


def _ints(value: Any, axes: int) -> Ints:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _is_row_by_row(made: Tensor, raw: Tensor) -> bool:
    """Whether every row of `made` is a·row + b of the parameter, as standardising, normalising and scaling make it."""
    ours, theirs = made.flatten(1).double(), raw.flatten(1).double()
    own, other = ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    scale = (own * other).sum(1, keepdim=True) / other.square().sum(1, keepdim=True).clamp_min(1e-300)
    error = (own - scale * other).abs().amax(1)
    return bool((error <= ROUNDING * ours.abs().amax(1)).all())


def _pad_of(pairs: list[tuple[Tensor, Tensor]], spec: LayerSpec) -> Pad | str | None:
    """The padding that makes each input of `pairs` what was convolved; None where nothing is done."""
    if not spec.is_conv or all(x is given for x, given in pairs):
        return None
    settings = spec.kernel_size, spec.stride, spec.dilation
    candidates = [Pad(mode, ends, *settings) for ends in _ends(*pairs[0], len(spec.kernel_size)) for mode in MODES]
    for pad in (*candidates, Pad("constant", None, *settings)):
        if all(_pads(pad, x, given) for x, given in pairs):
            return pad if pad.ends is None or any(pad.ends) else None
    return "it changes its input in a way that is no padding known here."


def _ends(x: Tensor, given: Tensor, axes: int) -> Iterator[Ints]:
    """Every way to share what was added among the ends of the axes, the even one and the causal one first."""
    totals = [b - a for a, b in zip(x.shape[-axes:], given.shape[-axes:], strict=True)]
    if min(totals) < 0:
        return
    before = [sorted(range(total + 1), key=lambda n, t=total: (abs(2 * n - t), n != t)) for total in totals]  # type: ignore[misc]
    for first in product(*before):
        pairs = [(n, total - n) for n, total in zip(first, totals, strict=True)]
        yield tuple(end for pair in reversed(pairs) for end in pair)


def _pads(pad: Pad, x: Tensor, given: Tensor) -> bool:
    size = tuple(x.shape[-len(pad.kernel_size) :])
    if x.shape[:2] + torch.Size(pad.size_of(size)) != given.shape:
        return False
    try:
        return torch.equal(padded(x, pad), given)
    except RuntimeError:  # a mode that cannot pad so much
        return False
