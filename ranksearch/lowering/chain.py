"""`Chain`: a lowered layer that still looks like the layer that it was.

Surgery turns the layer itself into its chain, in place: whatever refers to it (a plain list, a closure, a second name) has the chain then.
Its class inherits from the layer's class, so that code that asks for the type, for `weight`, `bias`, `in_features` or `stride` of
its layers keeps working. `weight` is computed from the factors: what the chain does when it is called, as one dense weight. The
smaller layers are its children "0", "1", …, as those of an `nn.Sequential` are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ranksearch.lowering.contract import Lowering, Rank, lowering_named
from ranksearch.lowering.padding import Pad, padded
from ranksearch.lowering.spec import LayerSpec

_CLASSES: dict[tuple[type, type], type] = {}
_INJECTED = ("weight", "__getstate__", "__deepcopy__")
"""What torch's parametrization puts into a class of its own."""


class Computed(Tensor):
    """A chain's dense weight: shape, dtype and device are known at once, its numbers are computed where it is computed with."""

    chain: Chain

    @staticmethod
    def __new__(cls, chain: Chain) -> Computed:
        like, shape = chain.layers[0].weight, chain.spec.weight_shape
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.chain = chain
        return made  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        """The numbers, with a graph that leads to the factors."""
        chain = self.chain
        return chain.lowering.reconstruct(chain.stored_factors, chain.spec)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Computed, Computed.dense, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Computed, Computed.dense, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


_ASKED = {
    *(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "is_leaf")
    ),
    *(
        getattr(Tensor, name)
        for name in ("dim", "size", "numel", "is_floating_point", "element_size", "nelement", "ndimension")
    ),
    *(getattr(torch, name) for name in ("is_floating_point", "is_complex", "numel")),
}
"""What a computed weight tells without being computed."""


class Chain(nn.Module):
    """The first of a lowered layer's two base classes; the other is the layer's own class."""

    if TYPE_CHECKING:  # TorchScript would try to compile what is annotated
        spec: LayerSpec
        lowering_name: str
        rank: Rank
        dims_of_one: int
    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias", "lowering", "layers", "stored_factors"]

    @property
    def lowering(self) -> Lowering:
        return lowering_named(self.lowering_name)

    @property
    def layers(self) -> tuple[Any, ...]:
        """The smaller layers, first to last; the bias is the last one's."""
        return tuple(self._modules.values())

    @property
    def stored_factors(self) -> tuple[Tensor, ...]:
        """The chain's factors, in the order of the lowering's `stored_shapes`."""
        return self.lowering.stored_weights(nn.Sequential(*self.layers))

    @property
    def weight(self) -> Tensor:
        """The dense weight that the chain computes with, in the layout of the layer; nothing is computed until it is used."""
        return Computed(self)

    @property
    def bias(self) -> Tensor | None:
        return self.layers[-1].bias

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's: the chain's layers one after the other, five at most. Written out, so that TorchScript takes it."""
        alone = input.dim() == self.dims_of_one  # one map without a batch axis, which convolutions take, too
        x = getattr(self, "1")(getattr(self, "0")(input.unsqueeze(0) if alone else input))
        if hasattr(self, "2"):
            x = getattr(self, "2")(x)
        if hasattr(self, "3"):
            x = getattr(self, "3")(x)
        if hasattr(self, "4"):
            x = getattr(self, "4")(x)
        return x.squeeze(0) if alone else x

    def reset_parameters(self) -> None:
        """Initial weights for the smaller layers."""
        for layer in self.layers:
            layer.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.lowering_name}, rank={self.rank}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the layer's class, from which the chain's is made again."""
        kind, base = type(self).__bases__
        return _empty, (base, kind), self.__getstate__()  # type: ignore[misc]


class PaddedChain(Chain):
    """A chain in the place of a layer that pads its input by code of its own."""

    if TYPE_CHECKING:
        own_pad: Pad

    def forward(self, input: Tensor) -> Tensor:
        """What a chain computes of the padded input."""
        return super().forward(padded(input, self.own_pad))


class Turned(nn.Module):
    """A Linear r -> T without bias whose weight is kept as [r, T]: the first factor of a head, which its embedding ends with."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.turned = nn.Parameter(like.weight.detach().t().contiguous())

    @property
    def weight(self) -> Tensor:
        """[T, r]"""
        return self.turned.t()

    @property
    def bias(self) -> None:
        return None

    def forward(self, input: Tensor) -> Tensor:
        """[.., r] -> [.., T]"""
        return input @ self.turned


def _empty(base: type, kind: type = Chain) -> Any:
    made: Any = class_of(base, kind)
    return made.__new__(made)


def class_of(base: type, kind: type) -> type:
    """The class, named as `base`, of a module of this `kind` (such as `Chain`) that stands in the place of one of class `base`."""
    if (base, kind) not in _CLASSES:
        _CLASSES[base, kind] = type(
            base.__name__, (kind, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
        )
    return _CLASSES[base, kind]


def become_(
    layer: nn.Module,
    built: nn.Module,
    spec: LayerSpec,
    lowering: Lowering,
    rank: Rank,
    *,
    base: type[nn.Module],
    pad: Pad | None,
) -> None:
    """Turns `layer` into what was `built` for it: a chain of layers, or one layer with a parametrized weight.

    Args:
        base: the class that a chain is an instance of.
        pad: what is done to the input first.
    """
    if isinstance(built, nn.Sequential):
        layer._parameters.clear()
        layer._modules = dict(built._modules)
        layer.__class__ = class_of(base, Chain if pad is None else PaddedChain)
        if pad is not None:
            layer.own_pad = pad  # type: ignore[assignment]
        layer.dims_of_one = len(spec.kernel_size) + 1 if spec.is_conv else -1  # type: ignore[assignment]
        layer.spec, layer.lowering_name, layer.rank = spec, lowering.name, rank  # type: ignore[assignment]
        return
    bias = layer._parameters.get("bias")
    layer._parameters.clear()
    layer._parameters["bias"] = bias
    layer._modules = built._modules
    injected = {name: value for name, value in vars(type(built)).items() if name in _INJECTED}
    layer.__class__ = type(type(built).__name__, (type(layer),), injected)
