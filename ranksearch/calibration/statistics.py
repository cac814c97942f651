"""What a few calibration batches show of every layer: moments of its inputs, of the loss gradients at its outputs, and of its weight.

Hooks on a copy of the net; batches are inputs alone. Gradients are those of the loss that the caller gives, as a rule against targets that
are drawn from the net's own prediction (`drawn.py`).

Letters: g groups, N samples, P positions of a layer's output, n = S/g·k inputs of one output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.calibration.drawn import SummedLoss, default_loss
from ranksearch.compress import Net
from ranksearch.compress.surgery import open_parts_
from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.lowering import LayerSpec
from ranksearch.lowering.padding import padded
from ranksearch.lowering.weighting import SecondMoment
from ranksearch.model.as_plain import AsPlain, as_plain
from ranksearch.model.copying import copied
from ranksearch.model.inputs import (
    batch_size,
    call,
    mapped,
    moved,
)
from ranksearch.model.undisturbed import own, undisturbed

ROWS = 8192
"""The most positions of one batch and layer that enter a moment; where there are more, so many are drawn at random."""
WIDE = 1024
"""A moment over more inputs than this is kept as that many rows drawn at random, which stand for it: 4608² numbers are too many."""
FISHER_NUMBERS = 2**24
"""Numbers that the per-sample gradients of one chunk may take."""


class Moment:
    """Means of rows x [m, g, n] and of x xᵀ, as a matrix [g, n, n] or, where n is large, as drawn rows that stand for it."""

    def __init__(self, generator: torch.Generator, widest: int | None = None) -> None:
        """
        Args:
            widest: the most inputs of which the whole matrix is kept; `WIDE` where None.
        """
        self._generator, self._widest = generator, WIDE if widest is None else widest
        self.rows = 0
        self._sum: Tensor | None = None
        self._second: Tensor | None = None  # [g, n, n], a sum
        self._kept: Tensor | None = None  # [WIDE, g, n]
        self._keys = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """rows [m, g, n]"""
        self.rows += len(rows)
        total = rows.sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        if rows.shape[2] <= self._widest:
            grouped = rows.transpose(0, 1)  # [g, m, n]
            second = grouped.mT @ grouped
            self._second = second if self._second is None else self._second + second
            return
        # every row ever seen has the same chance to be among the kept ones: those of the largest random keys
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=self._generator)])
        kept = rows if self._kept is None else torch.cat([self._kept, rows])
        best = keys.topk(min(WIDE, len(keys))).indices
        self._keys, self._kept = keys[best], kept[best.to(rows.device)]

    @property
    def mean(self) -> Tensor:
        """[g, n]"""
        assert self._sum is not None
        return self._sum / max(self.rows, 1)

    def shrunk(self, shrinkage: float, *, centred: bool) -> SecondMoment:
        """M, or where `centred` the covariance, with `shrinkage` times its mean diagonal added to the diagonal."""
        mean = self.mean
        if self._second is not None:
            core = self._second / self.rows
            return SecondMoment.shrunk(core - mean[:, :, None] * mean[:, None] if centred else core, shrinkage)
        assert self._kept is not None
        kept = self._kept.transpose(0, 1)
        return SecondMoment.shrunk(
            (kept - mean[:, None] if centred else kept) / kept.shape[1] ** 0.5, shrinkage, wide=True
        )

    @property
    def energy(self) -> Tensor:
        """Mean squares of the columns, [g, n]; of a wide one, those of the kept rows."""
        if self._second is not None:
            return self._second.diagonal(dim1=-2, dim2=-1) / self.rows
        assert self._kept is not None
        return self._kept.square().mean(dim=0)

    def times(self, matrix: Tensor, *, centred: bool, damping: float) -> Tensor:
        """matrix [g, t, n] · (M + damping · mean diagonal of M · I), M = E[x xᵀ] or, where `centred`, the covariance: [g, t, n]"""
        if self._second is not None:
            product = matrix @ (self._second / self.rows)
            diagonal = self._second.diagonal(dim1=-2, dim2=-1) / self.rows
        else:
            assert self._kept is not None
            kept = self._kept.transpose(0, 1)  # [g, WIDE, n]
            product = (matrix @ kept.mT) @ kept / kept.shape[1]
            diagonal = kept.square().mean(dim=1)
        if centred:
            mean = self.mean
            product = product - (matrix @ mean[..., None]) * mean[:, None]
            diagonal = (diagonal - mean.square()).clamp_min(0)
        return product + damping * diagonal.mean(dim=-1)[:, None, None] * matrix


@dataclass
class Statistics:
    """The statistics of one layer over all of its uses; what was not asked for is None."""

    inputs: Moment
    """Second moments of the inputs of one output: [m, g, n]."""
    gradients: Moment | None
    """Second moments of the loss gradients at the outputs, per position: [m, g, T/g]."""
    fisher: Tensor | None
    """Mean squared gradient of one sample's loss by the weight, [g, T/g, n] (a sum until the collection ends)."""
    positions: float = 0.0
    """Positions of the output per sample, over all uses (a sum until the collection ends)."""
    gradient_calls: int = 0
    """Times that a gradient reached the layer's output; 0 in frozen or detached parts, and where the loss does not use the output."""


def patches(x: Tensor, spec: LayerSpec) -> Tensor:
    """What every output position of a layer is computed from: x [N, S, *in] -> a view [N, *out, S, *k]; for a Linear [N, .., S].

    A transposed conv, which spreads its inputs, is seen as the equal conv: its input stretched with zeros, its kernel flipped.
    """
    if not spec.is_conv:
        return x
    axes, kernel = len(spec.kernel_size), spec.kernel_size
    reach = [d * (k - 1) for d, k in zip(spec.dilation, kernel, strict=True)]
    strides = spec.stride
    if spec.transposed:
        assert not isinstance(spec.padding, str)
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], spec.stride, strict=True)]
        stretched = x.new_zeros((*x.shape[:2], *sizes))
        everywhere = (slice(None), slice(None), *(slice(None, None, s) for s in spec.stride))
        stretched[everywhere] = x
        ends = [(r - p, r - p + e) for r, p, e in zip(reach, spec.padding, spec.output_padding, strict=True)]
        x, strides, mode = stretched, (1,) * axes, "constant"
    else:
        same = isinstance(spec.padding, str)
        ends = [(r // 2, r - r // 2) for r in reach] if same else [(int(p), int(p)) for p in spec.padding]
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    x = F.pad(x, [end for pair in reversed(ends) for end in pair], mode=mode)
    for axis in range(axes):
        x = x.unfold(2 + axis, reach[axis] + 1, strides[axis])[..., :: spec.dilation[axis]]
    if spec.transposed:
        x = x.flip(tuple(range(2 + axes, 2 + 2 * axes)))
    return x.movedim(1, 1 + axes)


def batched(given: Tensor, spec: LayerSpec, module: nn.Module) -> Tensor:
    """What the layer `module` computes with of what it is given: [N, ...], padded as it pads.

    One map, or one row, without a batch axis becomes a batch of one.
    """
    own, x = as_plain(module), given.detach()
    x = x[None] if x.dim() == len(spec.kernel_size) + 1 else x
    return x if not isinstance(own, AsPlain) or own.pad is None else padded(x, own.pad)


def drawn_rows(x: Tensor, spec: LayerSpec, generator: torch.Generator, most: int = ROWS) -> Tensor:
    """The inputs of at most `most` of the outputs of a layer that is given x (see `batched`), drawn at random: [m, g, n]"""
    found = patches(x, spec)
    axes = len(spec.kernel_size)
    positions = found.shape[: found.dim() - 1 - axes]
    total = positions.numel()
    if total > most:
        drawn = torch.randperm(total, generator=generator)[:most].to(found.device)
        found = found[torch.unravel_index(drawn, positions)]
    return found.reshape(-1, spec.groups, width_of(spec))


def width_of(spec: LayerSpec) -> int:
    """n: inputs of one output."""
    inputs = spec.in_channels // spec.groups
    for extent in spec.kernel_size:
        inputs *= extent
    return inputs


class _Collector:
    """Hooks on the layers of a net."""

    def __init__(self, gradients: bool, fisher: bool, generator: torch.Generator, widest: int | None) -> None:
        self.statistics: dict[str, Statistics] = {}
        self.samples = 0
        self._gradients, self._fisher, self._generator, self._widest = gradients, fisher, generator, widest
        # of its own, so that the inputs' moments are the same whether or not gradients are asked for
        self._of_gradients = torch.Generator().manual_seed(generator.initial_seed() ^ 1)
        self.backward = False
        """Whether gradients are being computed: a layer that is called then is called again by a checkpoint, and was counted before."""
        self._without_graph: set[nn.Module] = set()

    def watch(self, name: str, spec: LayerSpec, module: nn.Module) -> None:
        found = self.statistics.setdefault(
            name,
            Statistics(
                Moment(self._generator, self._widest),
                Moment(self._of_gradients, self._widest) if self._gradients else None,
                torch.zeros(spec.groups, spec.out_channels // spec.groups, width_of(spec)) if self._fisher else None,
            ),
        )

        if isinstance(module, nn.Embedding):
            return  # rows that no batch looks up say nothing of it: it is weighed by its weight alone

        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            given: Tensor = args[0] if args else next(iter(kwargs.values()))
            x = batched(given, spec, layer)
            if not self.backward:
                found.inputs.add(drawn_rows(x, spec, self._generator).float())
                found.positions += output.numel() / spec.out_channels
            if not (self._gradients or self._fisher):
                return None
            if not torch.is_grad_enabled():
                self._without_graph.add(layer)
                return None
            if self.backward and layer not in self._without_graph:
                return None  # a checkpoint's second call, whose first one is in the graph
            # what nothing before it asks gradients of is made the beginning of a graph; times 1 it is no leaf
            begun = output if output.requires_grad else output.detach().requires_grad_() * 1
            rows = (lambda g: g[None]) if x.dim() > given.dim() else (lambda g: g)
            begun.register_hook(lambda gradient: self._backward(found, spec, x, rows(gradient.detach())))
            return begun

        module.register_forward_hook(after, with_kwargs=True)

    def _backward(self, found: Statistics, spec: LayerSpec, x: Tensor, gradient: Tensor) -> None:
        found.gradient_calls += 1
        channels_last = gradient.movedim(1, -1) if spec.is_conv else gradient
        rows = channels_last.reshape(len(gradient), -1, spec.groups, spec.out_channels // spec.groups).float()
        if found.gradients is not None:
            found.gradients.add(rows.flatten(0, 1))
        if found.fisher is not None:
            width = width_of(spec)
            size = max(1, FISHER_NUMBERS // max(spec.out_channels * width, rows.shape[1] * spec.groups * width))
            for start in range(0, len(x), size):
                part = patches(x[start : start + size], spec).reshape(
                    len(x[start : start + size]), -1, spec.groups, width
                )
                each = torch.einsum("npgt,npgi->ngti", rows[start : start + size], part.float())
                found.fisher += each.square().sum(dim=0).to(found.fisher.device)


def collect(
    model: nn.Module,
    net: Net,
    batches: Iterable[Any],
    *,
    gradients: bool,
    fisher: bool,
    loss: SummedLoss | None,
    generator: torch.Generator,
    widest: int | None = None,
) -> dict[str, Statistics]:
    """Layer -> its statistics over `batches` of inputs (tensors, tuples or dicts of a model's arguments), in evaluation mode.

    `model` is not changed: a copy is run, on the model's device. Without `gradients` and `fisher` nothing is differentiated; with one of
    them it is `loss`, or `default_loss` where that is None.
    Moments over more than `widest` inputs (`WIDE` where None) are kept as drawn rows.

    Raises:
        UsageError: no batches, or an output that the loss cannot read.
        NonFiniteError: the net's activations or gradients are not finite; the text names the layer.
    """
    probe = copied(model).eval()
    open_parts_(probe, [layer.name for layer in net.layers])
    collector = _Collector(gradients, fisher, generator, widest)
    for layer in net.layers:
        modules = {id(m): m for m in map(probe.get_submodule, (layer.name, *layer.shared_with))}
        for module in modules.values():
            collector.watch(layer.name, layer.spec, module)
    differentiated = (loss or default_loss(generator, balanced=False)) if gradients or fisher else None
    samples = _run(probe, batches, differentiated, collector)
    if samples == 0:
        raise UsageError("This sensitivity is measured on data: give it at least one batch of inputs (calibration).")
    for name, found in collector.statistics.items():
        found.positions /= samples
        if found.fisher is not None:
            found.fisher /= samples
        sums = [found.inputs.mean] if found.inputs.rows else []
        sums += [found.gradients.mean] if found.gradients is not None and found.gradients.rows else []
        sums += [found.fisher] if found.fisher is not None else []
        if not all(bool(total.isfinite().all()) for total in sums):
            raise NonFiniteError(
                f"Layer {name!r}: its inputs or the gradients at its output are not finite on the calibration data."
            )
    return collector.statistics


def _run(probe: nn.Module, batches: Iterable[Any], loss: SummedLoss | None, collector: _Collector) -> int:
    """Runs the batches forward, and backward from `loss` where there is one; returns the number of samples."""
    device, samples = next(probe.parameters()).device, 0
    for parameter in probe.parameters():
        parameter.requires_grad_(False)
    with torch.set_grad_enabled(loss is not None), undisturbed(probe):
        for batch in batches:
            inputs = moved(own(batch), device)  # the caller's own tensors stay as they are
            samples += batch_size(inputs)
            if loss is None:
                call(probe, inputs)
                continue
            # gradients flow from the inputs or from the first layer on, so that none are computed for weights; times 1 they are no
            # leaves, which layers that work in place refuse
            inputs = mapped(lambda x: x.requires_grad_() * 1 if x.is_floating_point() else x, inputs)
            total = loss(call(probe, inputs))
            if total.requires_grad:  # else everything is frozen or detached
                collector.backward = True
                total.backward()
                collector.backward = False
    return samples
