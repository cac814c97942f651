"""The layers of a pivoted chain: channels at the pivots pass, the others are computed from them, in the order that the next layer wants."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.lowering.spec import LayerSpec


def tap_major(order: Tensor, taps: int) -> Tensor:
    """Numbers s·k + i of channel s at tap i -> i·S + s"""
    return order % taps * (len(order) // taps) + order // taps


def inverse(order: Tensor) -> Tensor:
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place


def _weight(layer: LayerSpec, device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    """torch's initial weight of the layer; an empty one where it has no channels."""
    if prod(layer.weight_shape):
        return layer.build(device=device, dtype=dtype).weight  # type: ignore[return-value]
    return nn.Parameter(torch.empty(layer.weight_shape, device=device, dtype=dtype))


class _Others(nn.Module):
    """What pivoted ends share: the 1x1 conv or Linear of the channels that are no pivots, and the index that orders channels."""

    if TYPE_CHECKING:  # TorchScript would try to compile what is annotated
        order: Tensor

    def __init__(self, layer: LayerSpec, channels: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = _weight(layer, device, dtype)
        self.register_buffer("order", torch.arange(channels, dtype=torch.int32, device=device))
        self.axes, self.groups = len(layer.kernel_size), layer.groups
        self.axis = 1 if layer.is_conv else -1

    def others(self, x: Tensor) -> Tensor:
        if self.axes == 0:  # written out, so that TorchScript takes it
            return F.linear(x, self.weight)
        if self.axes == 1:
            return F.conv1d(x, self.weight, groups=self.groups)
        if self.axes == 2:
            return F.conv2d(x, self.weight, groups=self.groups)
        return F.conv3d(x, self.weight, groups=self.groups)

    def ordered(self, x: Tensor) -> Tensor:
        """The channels of x in the order of the index. Along a Linear's last axis `index_select` takes seven times as long as `gather`."""
        if self.axes > 0:
            return x.index_select(1, self.order)
        return x.gather(-1, self.order.long().expand(x.shape))

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, channels={len(self.order)}, groups={self.groups}"


class PivotedInput(_Others):
    """h = x[pivots] + A x[others], x the input's channels as every tap of a kernel reads them."""

    def __init__(
        self,
        layer: LayerSpec,
        plain: LayerSpec,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer, layer.in_channels + layer.out_channels, device, dtype)
        self.hidden, self.rest = layer.out_channels, layer.in_channels
        self.taps = None if plain == layer_like(plain) else Taps(plain)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.taps is None else self.taps(x)
        ordered = self.ordered(x)
        if not self.rest:
            return ordered
        pivots, others = ordered.split((self.hidden, self.rest), dim=self.axis)
        return pivots + self.others(others)


def layer_like(layer: LayerSpec) -> LayerSpec:
    """The layer as one that reads every position by itself."""
    return layer.pointwise(layer.in_channels, layer.out_channels, groups=layer.groups) if layer.is_conv else layer


class Taps:
    """What every tap of a conv's kernel reads, side by side: [N, S, *in] -> [N, k·S, *out], the taps outermost."""

    def __init__(self, conv: LayerSpec) -> None:
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        same = [(total // 2, total - total // 2) for total in reach]
        sides = same if isinstance(conv.padding, str) else [(p, p) for p in conv.padding]
        self.conv, self.reach = conv, reach
        self.padding = [p for pair in reversed(sides) for p in pair]
        self.mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode

    def __call__(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, mode=self.mode)
        conv, read = self.conv, []
        for tap in product(*map(range, conv.kernel_size)):
            part = x
            for axis, (i, d, s, reach) in enumerate(zip(tap, conv.dilation, conv.stride, self.reach, strict=True), 2):
                last = x.shape[axis] - reach + i * d
                part = part[(slice(None),) * axis + (slice(i * d, last, s),)]
            read.append(part)
        return torch.cat(read, dim=1) if len(read) > 1 else read[0]


class PivotedOutput(_Others):
    """y[pivots] = h, y[others] = A h; several tiles are added up. The bias comes last."""

    def __init__(
        self,
        layer: LayerSpec,
        whole: LayerSpec,
        tiles: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer, tiles * whole.out_channels, device, dtype)
        self.tiles, self.rest = tiles, layer.out_channels
        bias = torch.zeros(whole.out_channels, device=device, dtype=dtype) if whole.bias else None
        self.bias = nn.Parameter(bias) if bias is not None else None
        self.along = [-1, *(1 for _ in range(self.axes))]
        """The bias's shape, to be added to a map."""

    def forward(self, h: Tensor) -> Tensor:
        y = torch.cat([h, self.others(h)], dim=self.axis) if self.rest > 0 else h
        y = self.ordered(y)
        if self.tiles > 1:
            y = y.unflatten(1, [self.tiles, -1]).sum(dim=1)
        bias = self.bias
        return y if bias is None else y + bias.reshape(self.along)
