"""The layers of a net as values: one forward pass finds names, specs, map sizes, MACs and params."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import LayerSpec
from ranksearch.lowering.spec import Ints


@dataclass(frozen=True)
class Layer:
    """A layer of a net: its name as in `named_modules`, its spec, and the size of its input at every use."""

    name: str
    spec: LayerSpec
    in_sizes: tuple[Ints, ...]

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


def _shared_weights(model: nn.Module) -> set[int]:
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(name)
    return {key for key, names in owners.items() if len(names) > 1}


def _tuple(example_input: Any) -> tuple[Any, ...]:
    return tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)


def _refusal(module: nn.Module, shared: set[int], uses: Sequence[Ints]) -> str | None:
    """Why a module with weights is left out; None for a layer that can be lowered."""
    if LayerSpec.of(module) is None:
        return f"{type(module).__name__} is no plain Conv1d/2d/3d or Linear."
    if id(module.weight) in shared:
        return "its weight is shared with another module."
    if not uses:
        return "the forward pass does not call it as a module."
    return None


def trace(model: nn.Module, example_input: Any) -> Net:
    """Runs `model` once on `example_input` (a batched tensor or a tuple of them; mode and buffers are restored).

    The total of MACs is `torch.utils.flop_counter`'s, so what is computed outside of layers (attention, functional
    convs) is in `other_macs` and no cost is missed.

    Raises:
        UsageError: the model has no layer that can be lowered.
    """
    inputs = _tuple(example_input)
    batch = next(x.shape[0] for x in inputs if isinstance(x, Tensor))
    modules = dict(model.named_modules())
    uses: dict[str, list[Ints]] = defaultdict(list)

    def recorder(name: str, is_conv: bool):
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            uses[name].append(tuple(args[0].shape[2:] if is_conv else args[0].shape[1:-1]))

        return record

    specs = {name: spec for name, module in modules.items() if (spec := LayerSpec.of(module)) is not None}
    hooks = [modules[name].register_forward_pre_hook(recorder(name, spec.is_conv)) for name, spec in specs.items()]
    training = {name: module.training for name, module in modules.items()}
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            module.training = training[name]

    shared, layers, skipped = _shared_weights(model), [], []
    for name, module in modules.items():
        if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.dim() < 2:
            continue  # containers, norms: nothing to lower
        reason = _refusal(module, shared, uses[name])
        if reason is None:
            layers.append(Layer(name, specs[name], tuple(uses[name])))
        else:
            skipped.append((name, reason))
    if not layers:
        raise UsageError(f"{type(model).__name__} has no Conv1d/2d/3d or Linear layer that can be lowered.")
    # shared weights are counted once: parameters() and buffers() yield every tensor once
    buffers = list(model.buffers())
    return Net(
        layers=tuple(layers),
        skipped=tuple(skipped),
        other_macs=counter.get_total_flops() // 2 // batch - sum(layer.macs for layer in layers),
        other_params=sum(p.numel() for p in model.parameters()) - sum(layer.spec.params for layer in layers),
        other_floats=sum(b.numel() for b in buffers if b.is_floating_point()),
        other_bytes=sum(b.numel() * b.element_size() for b in buffers if not b.is_floating_point()),
    )
