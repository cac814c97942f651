"""`LayerSpec`: what a conv or linear layer is, without its weights: enough to count it, build it and lower it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Ints = tuple[int, ...]

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class LayerSpec:
    """A convolution over `len(kernel_size)` spatial axes, or a Linear where `kernel_size` is ().

    Letters, package-wide: T = out_channels, S = in_channels, k = kernel_size. The weight is [T, S/groups, *k].
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

    @classmethod
    def conv(cls, in_channels: int, out_channels: int, kernel_size: Ints, **settings: Any) -> LayerSpec:
        """A convolution with torch's defaults for what `settings` leaves out."""
        ones, zeros = (1,) * len(kernel_size), (0,) * len(kernel_size)
        base = cls(in_channels, out_channels, kernel_size, stride=ones, padding=zeros, dilation=ones)
        return replace(base, **settings)

    @classmethod
    def of(cls, module: nn.Module) -> LayerSpec | None:
        """The spec of a Conv1d/2d/3d or Linear; None for any other module.

        A subclass with a `forward` of its own (weight standardisation, LoRA, ...) is another layer: None.
        """
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            return cls(module.in_features, module.out_features, bias=module.bias is not None)
        for conv in _CONVS.values():
            if isinstance(module, conv) and type(module).forward is conv.forward:
                padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
                return cls(
                    module.in_channels,
                    module.out_channels,
                    kernel_size=tuple(module.kernel_size),
                    stride=tuple(module.stride),
                    padding=(0,) * len(module.kernel_size) if padding == "valid" else padding,
                    dilation=tuple(module.dilation),
                    groups=module.groups,
                    bias=module.bias is not None,
                    padding_mode=module.padding_mode,
                )
        return None

    @property
    def is_conv(self) -> bool:
        return len(self.kernel_size) > 0

    @property
    def weight_shape(self) -> Ints:
        """[T, S/groups, *k]"""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def params(self) -> int:
        """Number of parameters, bias included."""
        return prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    def out_size(self, in_size: Ints) -> Ints:
        """Spatial extents of the output for an input of extents `in_size` (a Linear keeps them)."""
        if not self.is_conv:
            return in_size
        if isinstance(self.padding, str):
            return in_size  # "same", which torch allows at stride 1 alone
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(in_size, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        )

    def macs(self, in_size: Ints) -> int:
        """Multiply-accumulates of one sample (1 MAC = 2 FLOPs), bias not counted, as `torch.utils.flop_counter` does."""
        return prod(self.out_size(in_size)) * prod(self.weight_shape)

    def build(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The torch layer of this spec, with torch's own initial weights."""
        if not self.is_conv:
            return nn.Linear(self.in_channels, self.out_channels, bias=self.bias, device=device, dtype=dtype)
        return _CONVS[len(self.kernel_size)](
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
        )

    def pointwise(self, in_channels: int, out_channels: int, **settings: Any) -> LayerSpec:
        """A 1x1 convolution over the same number of axes."""
        return LayerSpec.conv(in_channels, out_channels, (1,) * len(self.kernel_size), **settings)

    def grouped(self, weight: Tensor) -> Tensor:
        """Splits the output channels of `weight` [T, S/g, *k] into its groups: [g, T/g, S/g, *k]."""
        return weight.reshape(self.groups, self.out_channels // self.groups, *weight.shape[1:])
