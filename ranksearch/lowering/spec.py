"""`LayerSpec`: what a conv or linear layer is, without its weights: enough to count it, build it and lower it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Ints = tuple[int, ...]

_CONVS: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
"""(spatial axes, transposed) -> module"""


@dataclass(frozen=True)
class LayerSpec:
    """A convolution over `len(kernel_size)` spatial axes, transposed or not, or a Linear where `kernel_size` is ().

    Letters, package-wide: T = out_channels, S = in_channels, k = kernel_size, g = groups. torch lays the weight out as
    [T, S/g, *k], and as [S, T/g, *k] where the layer is transposed; lowerings see neither, but `blocks`: [g, T/g, S/g, *k].
    Sizes of the maps are not part of it: a layer's `in_size` (spatial extents of its input; for a Linear the leading
    extents, such as tokens) is passed where MACs are counted, so that one layer may be used at several sizes.
    """

    in_channels: int
    out_channels: int
    kernel_size: Ints = ()
    stride: Ints = ()
    padding: Ints | str = ()
    dilation: Ints = ()
    groups: int = 1
    bias: bool = False
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Ints = ()
    """What a transposed convolution adds to its output; 0 elsewhere."""
    lookup: bool = field(default=False, repr=False)
    """Whether it is an Embedding: a transposed Linear of S rows, one of which is looked up at no MACs."""
    tied: bool = field(default=False, repr=False)
    """Whether it is a Linear in whose weight an Embedding looks up rows, too."""

    @classmethod
    def conv(cls, in_channels: int, out_channels: int, kernel_size: Ints, **settings: Any) -> LayerSpec:
        """A convolution with torch's defaults for what `settings` leaves out."""
        ones, zeros = (1,) * len(kernel_size), (0,) * len(kernel_size)
        extra = zeros if settings.get("transposed") else ()
        base = cls(
            in_channels, out_channels, kernel_size, stride=ones, padding=zeros, dilation=ones, output_padding=extra
        )
        return replace(base, **settings)

    @classmethod
    def of(cls, module: Any) -> LayerSpec | None:
        """The spec of a Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear; None for any other module.

        `Conv1D` of Hugging Face, which GPT-2 is made of, is a Linear whose weight lies the other way round: a transposed one. None also
        for one that computes something else (`own_forward`: weight standardisation, LoRA, ...), and where the weight is no parameter
        of the module but computed (weight norm, spectral norm, pruning, other parametrizations): what is written into it would not last.
        """
        if module._parameters.get("weight") is None or own_forward(module) is not None:
            return None
        return None if torch.nn.parameter.is_lazy(module.weight) else cls.stated(module)

    @classmethod
    def stated(cls, module: Any) -> LayerSpec | None:
        """What the attributes of a Conv, Linear or Embedding say, whatever it does with its weight; None for any other module."""
        if isinstance(module, nn.Embedding):
            plain = type(module).forward is nn.Embedding.forward and "forward" not in vars(module)
            rows, width = module.num_embeddings, module.embedding_dim
            return cls(rows, width, transposed=True, lookup=True) if plain and module.max_norm is None else None
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features, bias=module.bias is not None)
        if _base(module) is not None and not isinstance(module, tuple(_CONVS.values())):
            return cls(module.nx, module.nf, bias=module.bias is not None, transposed=True)
        for (axes, transposed), conv in _CONVS.items():
            if isinstance(module, conv):
                padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
                return cls(
                    module.in_channels,
                    module.out_channels,
                    kernel_size=tuple(module.kernel_size),
                    stride=tuple(module.stride),
                    padding=(0,) * axes if padding == "valid" else padding,
                    dilation=tuple(module.dilation),
                    groups=module.groups,
                    bias=module.bias is not None,
                    padding_mode=module.padding_mode,
                    transposed=transposed,
                    output_padding=tuple(module.output_padding) if transposed else (),
                )
        return None

    @property
    def is_conv(self) -> bool:
        return len(self.kernel_size) > 0

    @property
    def weight_shape(self) -> Ints:
        """torch's layout: [T, S/g, *k], transposed [S, T/g, *k]"""
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    @property
    def block_shape(self) -> Ints:
        """[T/g, S/g, *k]: what one group computes with."""
        return (self.out_channels // self.groups, self.in_channels // self.groups, *self.kernel_size)

    @property
    def params(self) -> int:
        """Number of parameters, bias included."""
        return prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    def out_size(self, in_size: Ints) -> Ints:
        """Spatial extents of the output for an input of extents `in_size` (a Linear keeps them)."""
        if not self.is_conv:
            return in_size
        if isinstance(self.padding, str):
            return in_size  # "same", which torch allows only at stride 1
        axes = zip(in_size, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        if self.transposed:
            sizes = ((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, p, d, k, s in axes)
            return tuple(n + extra for n, extra in zip(sizes, self.output_padding, strict=True))
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes)

    def macs(self, in_size: Ints) -> int:
        """Multiply-accumulates of one sample (1 MAC = 2 FLOPs), bias not counted, as `torch.utils.flop_counter` does.

        Every weight meets every position of the output, of a transposed convolution every position of the input.
        """
        if self.lookup:
            return 0
        return prod(in_size if self.transposed else self.out_size(in_size)) * prod(self.weight_shape)

    def build(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The torch layer of this spec, with torch's own initial weights (for a transposed Linear, those of its plain equal)."""
        if self.lookup:
            return nn.Embedding(self.in_channels, self.out_channels, device=device, dtype=dtype)
        if not self.is_conv:
            return nn.Linear(self.in_channels, self.out_channels, bias=self.bias, device=device, dtype=dtype)
        extra = {"output_padding": self.output_padding} if self.transposed else {}
        return _CONVS[len(self.kernel_size), self.transposed](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode,
            device=device,
            dtype=dtype,
            **extra,
        )

    def pointwise(self, in_channels: int, out_channels: int, **settings: Any) -> LayerSpec:
        """A 1x1 convolution over the same number of axes, not transposed."""
        return LayerSpec.conv(in_channels, out_channels, (1,) * len(self.kernel_size), **settings)

    def along(self, axis: int, in_channels: int, out_channels: int, **settings: Any) -> LayerSpec:
        """This convolution along one spatial axis alone: its kernel, stride, padding and dilation there, nothing elsewhere.

        Padding modes, "same" and output padding act per axis, so a convolution with a separable kernel is the chain of these over its axes.
        """

        def alone(values: Ints, neutral: int) -> Ints:
            return tuple(value if i == axis else neutral for i, value in enumerate(values))

        return LayerSpec(
            in_channels,
            out_channels,
            kernel_size=alone(self.kernel_size, 1),
            stride=alone(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else alone(self.padding, 0),
            dilation=alone(self.dilation, 1),
            padding_mode=self.padding_mode,
            transposed=self.transposed,
            output_padding=alone(self.output_padding, 0),
            **settings,
        )

    def blocks(self, weight: Tensor) -> Tensor:
        """torch's layout of the weight -> [g, T/g, S/g, *k]; the ranks of a chain's inner channels may differ from the spec's."""
        blocks = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return blocks.transpose(1, 2) if self.transposed else blocks

    def weight_of(self, blocks: Tensor) -> Tensor:
        """[g, T/g, S/g, *k] -> torch's layout, the inverse of `blocks`."""
        return (blocks.transpose(1, 2) if self.transposed else blocks).flatten(0, 1)


_COMPUTING = (
    "forward",
    "_conv_forward",
    "_output_padding",
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "__getattr__",
)
"""What decides what a Conv or Linear computes when it is called."""


def _base(module: nn.Module) -> type[nn.Module] | None:
    """The layer class of torch (or `Conv1D`) that `module` is an instance of; None where there is none."""
    if isinstance(module, (*_CONVS.values(), nn.Linear)):
        return next(c for c in (*_CONVS.values(), nn.Linear) if isinstance(module, c))
    kinds = type(module).__mro__  # not imported: whoever has such a layer has the package
    return next((c for c in kinds if (c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D")), None)


def own_forward(module: nn.Module) -> str | None:
    """Which of a Conv's or Linear's methods are not torch's own, as a sentence; None where all are, and for other modules."""
    base = _base(module)
    if base is None:
        return None
    for name in _COMPUTING:
        if name in vars(module):
            return f"its {name} was replaced on the instance, so that it computes something else than {base.__name__}."
    own = next(iter(own_methods(module)), None)
    return f"{type(module).__name__} is no plain {base.__name__}: it has a {own} of its own." if own else None


def own_methods(module: nn.Module) -> tuple[str, ...]:
    """The methods that decide what a Conv or Linear computes and that its class does not inherit from torch."""
    base = _base(module)
    return tuple(n for n in _COMPUTING if base and getattr(type(module), n, None) is not getattr(base, n, None))
