"""The layers of a net as values: one forward pass finds names, specs, map sizes, MACs and params."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ranksearch.costs import BYTES_PER_WEIGHT
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import LayerSpec
from ranksearch.lowering.spec import Ints
from ranksearch.model.attention import IN_PROJ, OUT_PROJ, QKV
from ranksearch.model.bare import bare, is_lazy
from ranksearch.model.copying import memory
from ranksearch.model.counting import counter, macs
from ranksearch.model.inputs import batch_size, call
from ranksearch.model.recording import Recorder, Use, recording
from ranksearch.model.slots import KINDS, Slot, survey
from ranksearch.model.undisturbed import own


@dataclass(frozen=True)
class Layer:
    """A layer of a net: its name as in `named_modules`, its spec, and the size of its input at every use."""

    name: str
    spec: LayerSpec
    in_sizes: tuple[Ints, ...]
    norm: str | None = None
    """The BN layer that takes its output."""
    shared_with: tuple[str, ...] = ()
    """Other layers that compute with the same weight; they become what this one becomes."""
    samples: tuple[int, ...] = ()
    """How many maps (a Linear: rows, or sequences of them) every use took when the net got `batch` samples; () where just as many."""
    batch: int = 1
    bytes_per_weight: int = BYTES_PER_WEIGHT
    """Bytes of a number of its weight's dtype: 4 in float32, 2 in bfloat16."""
    own_params: int = 0
    """Parameters beside those of its spec that are gone once it is lowered, such as weight norm's g."""
    also: Layer | None = None
    """The lookups of an Embedding that computes with this Linear's weight, too."""
    stack: str | None = None
    """The stacked weight of fused experts that it is part of. A token that goes to another one of it costs the same only at one rank."""

    @property
    def idle(self) -> bool:
        """Whether it is one of fused experts that got no token: it costs params and, here, no MACs."""
        return self.stack is not None and bool(self.samples) and not any(self.samples)

    @property
    def params(self) -> int:
        """Parameters of the dense layer."""
        return self.spec.params + self.own_params

    @property
    def macs(self) -> int:
        """MACs of the dense layer for one sample, summed over its uses."""
        return self.summed(self.spec.macs)  # lookups cost none

    def summed(self, of_one: Callable[[Ints], int]) -> int:
        """The cost of all uses for one sample of the net, rounded up, from the cost `of_one` map of a size."""
        if not self.samples:
            return sum(map(of_one, self.in_sizes))
        sizes = dict.fromkeys(self.in_sizes)
        each = {size: of_one(size) for size in sizes}
        total = sum(count * each[size] for size, count in zip(self.in_sizes, self.samples, strict=True))
        return -(-total // self.batch)

    def sizes_per_sample(self) -> tuple[Ints, ...]:
        """Input sizes as one sample of the net meets them: a use that takes k maps a sample counts k times, at least once."""
        if not self.samples:
            return self.in_sizes
        counts = defaultdict[Ints, int](int)
        for size, count in zip(self.in_sizes, self.samples, strict=True):
            counts[size] += count
        return tuple(size for size, count in counts.items() for _ in range(max(1, round(count / self.batch))))


@dataclass(frozen=True)
class Net:
    """A net as the allocation sees it: layers that can be lowered, and the fixed cost of everything else.

    `skipped` names every other layer with weights, and why: nothing is passed over in silence.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[tuple[str, str], ...]
    other_macs: int
    other_params: int
    other_floats: int
    """Floating-point buffers, such as BN statistics."""
    other_bytes: int
    """Bytes of integer buffers."""
    other_size: int | None = None
    """Bytes of all that a state dict holds beside the layers; None where all of its floats are float32."""

    @property
    def bytes_per_weight(self) -> int:
        """Bytes of a number of the layers' dtype; the most, where they have several: a size counted by it is never below the real one."""
        return max((layer.bytes_per_weight for layer in self.layers), default=BYTES_PER_WEIGHT)

    @property
    def other_bytes_in_all(self) -> int:
        """Bytes of everything beside the layers."""
        if self.other_size is not None:
            return self.other_size
        return (self.other_params + self.other_floats) * BYTES_PER_WEIGHT + self.other_bytes

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        reasons = dict(self.skipped)
        why = f" It cannot be lowered: {reasons[name]}" if name in reasons else ""
        raise UsageError(f"No layer {name!r} to lower.{why} {nearest(name, [layer.name for layer in self.layers])}")

    def norms(self) -> dict[str, str]:
        """Layer -> the BN layer that takes its output, where there is one."""
        return {layer.name: layer.norm for layer in self.layers if layer.norm is not None}


def trace(model: nn.Module, example_input: Any) -> Net:
    """Runs `model` once on `example_input` (a batched tensor, a tuple of arguments or a dict of them, as `inputs.py` says).

    Model, inputs and random numbers stay as they are.

    The total of MACs is measured (`counting.py`), so what is computed outside of layers (attention, functional convs) is in
    `other_macs` and no cost is missed. Costs are those of the whole example divided by its number of samples, the
    first axis of its first tensor: a layer counts by the rows that it gets, whatever its place in the net.

    Raises:
        UsageError: the model has no layer that can be lowered (the text says why of each), or the example holds no batched tensor.
    """
    return traced(model, example_input)[0]


def traced(model: nn.Module, example_input: Any) -> tuple[Net, Any]:
    """(what `trace` returns, what the model returned)"""
    model = bare(model)
    batch = batch_size(example_input)
    if batch == 0:
        raise UsageError("The example input holds no sample: its first axis is 0 long.")
    with recording(model, batch) as recorder, torch.no_grad(), counter() as counted:
        outputs = call(model, own(example_input))

    slots, skipped = survey(model)  # now: lazy layers have their shapes
    names = {id(module): name for name, module in model.named_modules()}
    layers = []
    for slot in slots.values():
        also: Layer | None = None
        stack: str | None = None
        uses: list[Use] | None
        if slot.recurrent is not None:
            module = model.get_submodule(slot.recurrent)
            uses, reason, norm = recorder.uses[id(module)], recorder.odd.get(id(module)), None
        elif slot.experts is not None:
            module = model.get_submodule(slot.experts)
            stack, _, e = slot.name.rpartition(".")
            uses, reason, norm = recorder.of_expert(module, int(e)), recorder.odd.get(id(module)), None
        elif slot.attention is not None:
            uses, reason = _attention_uses(recorder, model.get_submodule(slot.attention), slot), None
            if uses is None:
                continue
            norm = None
        else:
            modules = list({id(m): m for m in map(model.get_submodule, slot.paths)}.values())
            if slot.spec.tied:
                lookups = [m for m in modules if isinstance(m, nn.Embedding)]
                modules = [m for m in modules if m not in lookups]
                also = _lookups(slot, [use for m in lookups for use in recorder.uses[id(m)]], batch)
            uses = [use for module in modules for use in recorder.uses[id(module)]]
            reason = next((recorder.odd[id(m)] for m in modules if id(m) in recorder.odd), None)
            if any(map(recorder.elsewhere.reads, modules)):
                reason = (
                    "its weight is used outside of its own calls, where a lowered layer would have to compute it anew."
                )
            behind = [recorder.norm_behind.get(id(m)) for m in modules]
            norm = names[id(behind[0])] if len(behind) == 1 and behind[0] is not None else None
        if not uses:
            reason = reason or "the forward pass does not call it as a module."
        if reason is None:
            sizes, samples = tuple(size for size, _ in uses), tuple(count for _, count in uses)
            samples = () if all(count == batch for count in samples) else samples
            width = slot.weight.element_size()
            layers.append(
                Layer(
                    slot.name,
                    slot.spec,
                    sizes,
                    norm,
                    slot.paths[1:],
                    samples,
                    batch,
                    width,
                    slot.own_params,
                    also=also,
                    stack=stack,
                )
            )
        else:
            skipped |= dict.fromkeys(slot.paths, reason)
    if not layers:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise UsageError(f"{type(model).__name__} has no {KINDS} layer that can be lowered.{reasons}")
    params = {memory(p): p for p in model.parameters() if not is_lazy(p)}  # shared weights are counted once
    buffers = [  # that a state dict holds
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    buffers = list({id(buffer): buffer for buffer in buffers}.values())
    measured = -(-macs(counted) // batch)
    stored = sum(t.numel() * t.element_size() for t in (*params.values(), *buffers))
    net = Net(
        layers=tuple(layers),
        skipped=tuple(skipped.items()),
        other_macs=max(0, measured - sum(layer.macs for layer in layers)),  # each layer is rounded up
        other_params=sum(p.numel() for p in params.values()) - sum(layer.params for layer in layers),
        other_floats=sum(b.numel() for b in buffers if b.is_floating_point()),
        other_bytes=sum(b.numel() * b.element_size() for b in buffers if not b.is_floating_point()),
        other_size=stored - sum(layer.params * layer.bytes_per_weight for layer in layers),
    )
    return net, outputs


def _lookups(slot: Slot, uses: list[Use], batch: int) -> Layer:
    """The uses of an Embedding whose weight is a head's."""
    spec = LayerSpec(slot.spec.out_channels, slot.spec.in_channels, transposed=True, lookup=True)
    return Layer(slot.name, spec, tuple(size for size, _ in uses), samples=tuple(n for _, n in uses), batch=batch)


def _attention_uses(recorder: Recorder, attention: nn.Module, slot: Slot) -> list[Use] | None:
    """Uses of one projection of an attention; None for the form, packed or in three, that it is not opened in."""
    tokens = recorder.uses[id(attention)]
    part = slot.name.rpartition(".")[2]
    packed = id(attention) not in recorder.crossing and attention.in_proj_weight is not None
    if part == OUT_PROJ:
        return tokens[::3]
    if (part == IN_PROJ) is not packed:
        return None
    return tokens[::3] if packed else tokens[QKV.index(part) :: 3]
