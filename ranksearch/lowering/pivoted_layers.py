"""The layers of a pivoted chain: channels at the pivots pass, the others are computed from them, in the order that the next layer wants.

Within `merged_pivots` they compute the same by the kernel that the identity and A make together, as the plain form does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from math import prod
from threading import Lock, local
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.lowering.spec import LayerSpec

_open = {"merged": 0, "stored": 0}
"""How many `merged_pivots` and `stored_pivots` are open in this process: plain numbers, which torch.compile can guard."""
_counting = Lock()
_kept = local()
"""`kernels`: layer -> its merged kernel, for as long as weights do not change; None while they may."""


@contextmanager
def _opened(which: str) -> Iterator[None]:
    with _counting:
        _open[which] += 1
    try:
        yield
    finally:
        with _counting:
            _open[which] -= 1


@contextmanager
def merged_pivots(*, kept: bool = False) -> Iterator[None]:
    """Lets pivoted layers compute with merged kernels: the same function to rounding, and its gradients, for more MACs in less time.

    For training and scoring, where no map is gathered or put together then (ResNet-20's default plan at half of the FLOPs, batch 128, one
    core of an Intel Xeon: a pass takes .20 s instead of .47, a step on the factors .76 s instead of 1.42). What is timed, counted or
    exported runs as it is stored.

    Args:
        kept: no weight changes within, and no gradient is asked for: this thread makes each layer's kernel once.
    """
    before = getattr(_kept, "kernels", None)
    _kept.kernels = {} if kept else None
    try:
        with _opened("merged"):
            yield
    finally:
        _kept.kernels = before


@contextmanager
def stored_pivots() -> Iterator[None]:
    """Lets pivoted layers run as they are stored, also within `merged_pivots`: for what is timed or counted."""
    with _opened("stored"):
        yield


def is_merging() -> bool:
    return _open["merged"] > 0 and _open["stored"] == 0


def _once(layer: nn.Module, make: Callable[[], Tensor]) -> Tensor:
    """The layer's merged kernel, made anew where weights may have changed."""
    kernels: dict[nn.Module, Tensor] | None = getattr(_kept, "kernels", None)
    if kernels is None:
        return make()
    if layer not in kernels:
        kernels[layer] = make()
    return kernels[layer]


def rows_at(matrix: Tensor, index: Tensor) -> Tensor:
    """[b, n, r], [b, c] -> [b, c, r]"""
    return matrix.gather(1, index[..., None].expand(-1, -1, matrix.shape[2]))


def _with_identity(coefficients: Tensor) -> Tensor:
    """[b, n - r, r] -> [b, n, r], the pivots first"""
    rank = coefficients.shape[2]
    identity = torch.eye(rank, dtype=coefficients.dtype, device=coefficients.device)
    return torch.cat([identity.expand(coefficients.shape[0], rank, rank), coefficients], dim=1)


def _local(place: Tensor, rank: int, blocks: int) -> Tensor:
    """Places among all blocks' pivots and others -> among those of the own block, the pivots first: [b, n]."""
    block = torch.arange(blocks, device=place.device)[:, None]
    others = place.shape[1] - rank
    return torch.where(place < blocks * rank, place - block * rank, place - blocks * rank - block * others + rank)


def merged_input(coefficients: Tensor, order: Tensor, plain: LayerSpec, hidden: int) -> Tensor:
    """The weight of the plain chain's first layer, which a pivoted input stands for.

    Args:
        coefficients: A as stored, the weight of a 1x1 layer in `plain.groups` groups.
        order: the channels, tap by tap, in the order pivots, others.
        plain: the plain first layer, of any rank.
        hidden: channels of each group that it gives.
    """
    groups = plain.groups
    place = inverse(order.long()).reshape(prod(plain.kernel_size), -1).T  # [S, k]
    right = _with_identity(coefficients.reshape(groups, hidden, -1).mT)  # [g, S/g·k, r], pivots first
    found = rows_at(right, _local(place.reshape(groups, -1), hidden, groups))
    return found.mT.flatten(0, 1).reshape(hidden * groups, *plain.block_shape[1:])


def merged_output(coefficients: Tensor, order: Tensor, groups: int, tiles: int, hidden: int, axes: int) -> Tensor:
    """The weight [T, q·r, 1…] of the plain chain's last layer, which a pivoted output stands for.

    Args:
        coefficients: A as stored, the weight of a 1x1 layer in `groups` · `tiles` groups.
        order: where every channel of every tile lies among pivots and others.
        hidden: r, channels of each group and tile that the layer before gives.
        axes: of the kernel; 0 of a Linear.
    """
    left = _with_identity(coefficients.reshape(groups * tiles, -1, hidden))  # [g·q, T/g, r], pivots first
    place = order.long().reshape(tiles, groups, -1).transpose(0, 1).flatten(0, 1)  # [g·q, T/g]
    found = rows_at(left, _local(place, hidden, groups * tiles))
    joined = found.unflatten(0, (-1, tiles)).transpose(1, 2).flatten(2)  # [g, T/g, q·r]
    return joined.flatten(0, 1).reshape(-1, joined.shape[2], *(1,) * axes)


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
        return self.pointwise(x, self.weight, self.groups)

    def pointwise(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        if self.axes == 0:  # written out, so that TorchScript takes it
            return F.linear(x, weight)
        if self.axes == 1:
            return F.conv1d(x, weight, groups=groups)
        if self.axes == 2:
            return F.conv2d(x, weight, groups=groups)
        return F.conv3d(x, weight, groups=groups)

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
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would compile what stands beside it
            if is_merging():
                return self.merged(x)
        x = x if self.taps is None else self.taps(x)
        ordered = self.ordered(x)
        if not self.rest:
            return ordered
        pivots, others = ordered.split((self.hidden, self.rest), dim=self.axis)
        return pivots + self.others(others)

    @torch.jit.unused
    def merged(self, x: Tensor) -> Tensor:
        hidden = self.hidden // self.groups
        weight = _once(self, lambda: merged_input(self.weight, self.order, self.plain, hidden))
        if self.taps is None:
            return self.pointwise(x, weight, self.groups)
        return self.taps.conv_with(x, weight)


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

    def conv_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """The conv itself, by the weight of its whole kernel."""
        conv, call = self.conv, (F.conv1d, F.conv2d, F.conv3d)[len(self.conv.kernel_size) - 1]
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, self.padding, mode=self.mode), 0
        return call(x, weight, None, conv.stride, padding, conv.dilation, conv.groups)

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
        self.tiles, self.rest, self.hidden = tiles, layer.out_channels, layer.in_channels // layer.groups
        bias = torch.zeros(whole.out_channels, device=device, dtype=dtype) if whole.bias else None
        self.bias = nn.Parameter(bias) if bias is not None else None
        self.along = [-1, *(1 for _ in range(self.axes))]
        """The bias's shape, to be added to a map."""

    def forward(self, h: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would compile what stands beside it
            if is_merging():
                return self.merged(h)
        y = torch.cat([h, self.others(h)], dim=self.axis) if self.rest > 0 else h
        y = self.ordered(y)
        if self.tiles > 1:
            y = y.unflatten(1, [self.tiles, -1]).sum(dim=1)
        bias = self.bias
        return y if bias is None else y + bias.reshape(self.along)

    @torch.jit.unused
    def merged(self, h: Tensor) -> Tensor:
        groups = self.groups // self.tiles
        weight = _once(self, lambda: merged_output(self.weight, self.order, groups, self.tiles, self.hidden, self.axes))
        y = self.pointwise(h, weight, groups)
        return y if self.bias is None else y + self.bias.reshape(self.along)
