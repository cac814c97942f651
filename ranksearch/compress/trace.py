"""The layers of a net as values: one forward pass finds names, specs, map sizes, MACs and params."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.compress.attention import IN_PROJ, OUT_PROJ, QKV
from ranksearch.compress.inputs import batch_size, call
from ranksearch.compress.slots import KINDS, Slot, survey
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import LayerSpec
from ranksearch.lowering.spec import Ints


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

    @property
    def macs(self) -> int:
        """MACs of the dense layer for one sample, summed over its uses."""
        return sum(self.spec.macs(size) for size in self.in_sizes)


@dataclass(frozen=True)
class Net:
    """A net as the allocation sees it: layers that can be lowered, and the fixed cost of everything else.

    `skipped` names every other layer with weights, and why: what is not treated is said, not passed over.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[tuple[str, str], ...]
    other_macs: int
    other_params: int
    other_floats: int
    """Floating-point buffers, such as BN statistics."""
    other_bytes: int
    """Bytes of integer buffers, whatever the export dtype."""

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


class _Recorder:
    """What one forward pass shows of a model's layers: input sizes by module, calls that no chain could take, BN layers behind layers."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.uses: dict[int, list[Ints]] = defaultdict(list)
        self.odd: dict[int, str] = {}
        self.crossing: set[int] = set()
        """Attentions whose query, key and value are not one tensor."""
        self.norm_behind: dict[int, nn.Module] = {}
        self._batch = batch
        self._outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensors are held, so that no id is given twice
        self._hooks = []
        for module in model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _tokens(self, x: Tensor) -> Ints:
        """Leading extents of one sample's rows; where the batch is not in front, their number."""
        return tuple(x.shape[1:-1]) if x.shape[0] == self._batch else (x.numel() // x.shape[-1] // self._batch,)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, nn.MultiheadAttention):
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if query is not key or key is not value:
                self.crossing.add(id(module))
            self.uses[id(module)] += [self._tokens(x) for x in (query, key, value)]
        elif (spec := LayerSpec.of(module)) is not None:
            inputs = [*args, *kwargs.values()]
            if len(inputs) != 1:
                self.odd[id(module)] = "it is called with more than its input (an output size)."
            self.uses[id(module)].append(tuple(inputs[0].shape[2:]) if spec.is_conv else self._tokens(inputs[0]))
        elif isinstance(module, _BatchNorm) and module.track_running_stats and args:
            _, source = self._outputs.get(id(args[0]), (None, None))
            if source is not None:
                self.norm_behind[id(source)] = module

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if LayerSpec.of(module) is not None:
            self._outputs[id(output)] = output, module


@contextmanager
def _recording(model: nn.Module, batch: int) -> Iterator[_Recorder]:
    """Records one forward pass in evaluation mode, outside torch's fused attention, which calls no layers; all is restored."""
    recorder = _Recorder(model, batch)
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield recorder
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        recorder.close()
        for module, mode in training.items():
            module.training = mode


def trace(model: nn.Module, example_input: Any) -> Net:
    """Runs `model` once on `example_input` (a batched tensor, a tuple of arguments or a dict of them, as `inputs.py` says; mode and
    buffers are restored).

    The total of MACs is `torch.utils.flop_counter`'s, so what is computed outside of layers (attention, functional
    convs) is in `other_macs` and no cost is missed.

    Raises:
        UsageError: the model has no layer that can be lowered, or the example holds no batched tensor.
    """
    batch = batch_size(example_input)
    with _recording(model, batch) as recorder, torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model, example_input)

    slots, skipped = survey(model)  # now: lazy layers have their shapes
    names = {id(module): name for name, module in model.named_modules()}
    layers = []
    for slot in slots.values():
        if slot.attention is not None:
            uses, reason = _attention_uses(recorder, model.get_submodule(slot.attention), slot), None
            if uses is None:
                continue
            norm = None
        else:
            modules = list({id(m): m for m in map(model.get_submodule, slot.paths)}.values())
            uses = [size for module in modules for size in recorder.uses[id(module)]]
            reason = next((recorder.odd[id(m)] for m in modules if id(m) in recorder.odd), None)
            behind = [recorder.norm_behind.get(id(m)) for m in modules]
            norm = names[id(behind[0])] if len(behind) == 1 and behind[0] is not None else None
        if not uses:
            reason = "the forward pass does not call it as a module."
        if reason is None:
            layers.append(Layer(slot.name, slot.spec, tuple(uses), norm, slot.paths[1:]))
        else:
            skipped |= dict.fromkeys(slot.paths, reason)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no {KINDS} layer that can be lowered.")
    # shared weights are counted once: parameters() and buffers() yield every tensor once
    buffers = list(model.buffers())
    return Net(
        layers=tuple(layers),
        skipped=tuple(skipped.items()),
        other_macs=counter.get_total_flops() // 2 // batch - sum(layer.macs for layer in layers),
        other_params=sum(p.numel() for p in model.parameters()) - sum(layer.spec.params for layer in layers),
        other_floats=sum(b.numel() for b in buffers if b.is_floating_point()),
        other_bytes=sum(b.numel() * b.element_size() for b in buffers if not b.is_floating_point()),
    )


def _attention_uses(recorder: _Recorder, attention: nn.Module, slot: Slot) -> list[Ints] | None:
    """Input sizes of one projection of an attention; None for the form, packed or in three, that it is not opened in."""
    tokens = recorder.uses[id(attention)]
    part = slot.name.rpartition(".")[2]
    packed = id(attention) not in recorder.crossing and attention.in_proj_weight is not None
    if part == OUT_PROJ:
        return tokens[::3]
    if (part == IN_PROJ) is not packed:
        return None
    return tokens[::3] if packed else tokens[QKV.index(part) :: 3]
