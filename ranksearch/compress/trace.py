"""The layers of a net as values: one forward pass finds names, specs, map sizes, MACs and params."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from ranksearch.compress.as_plain import AsPlain, as_plain, weight_norm_hook
from ranksearch.compress.attention import IN_PROJ, OUT_PROJ, QKV
from ranksearch.compress.bare import bare, is_lazy
from ranksearch.compress.copying import memory
from ranksearch.compress.counting import counter, macs
from ranksearch.compress.experts import are_experts, tokens_of_each
from ranksearch.compress.inputs import batch_size, call
from ranksearch.compress.slots import KINDS, Slot, survey
from ranksearch.compress.undisturbed import own, undisturbed
from ranksearch.costs import BYTES_PER_WEIGHT
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
    samples: tuple[int, ...] = ()
    """How many maps (of a Linear: rows, or sequences of them) every use took when the net was given `batch` samples; () where as many."""
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
        """What all uses cost for one sample of the net, rounded up, where `of_one` says it of one map of a size."""
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

    `skipped` names every other layer with weights, and why: what is not treated is said, not passed over.
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


Use = tuple[Ints, int]
"""(size of one map or extents of its rows, number of maps)"""


class _Elsewhere(TorchDispatchMode):
    """Notes whose weights are computed with outside of their own calls: there a lowered layer would have to make its weight anew."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        """The layers that are being called, outermost first."""
        self.found: set[int] = set()
        self._holders = defaultdict[int, list[nn.Module]](list)
        for module in model.modules():
            for source in _sources(module):
                self._holders[id(source)].append(module)

    def reads(self, module: nn.Module) -> bool:
        """Whether something else computed with the weight of `module`."""
        return any(id(source) in self.found for source in _sources(module))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            holders = self._holders.get(id(value))
            if holders is not None and not any(holder in self.running for holder in holders):
                self.found.add(id(value))
        return func(*args, **(kwargs or {}))


def _sources(module: nn.Module) -> tuple[Tensor, ...]:
    """The parameters that a Conv or Linear computes with, its bias aside; () for other modules and lazy ones.

    Also under old weight norm, which computes with them before the layer is called and leaves others the weight.
    """
    if LayerSpec.stated(module) is None or any(map(is_lazy, module.parameters())) or weight_norm_hook(module):
        return ()
    return tuple(p for p in module.parameters() if p.dim() > 1)


class _Recorder:
    """What one forward pass shows of a model's layers: uses by module, calls that no chain could take, BN layers behind layers."""

    def __init__(self, model: nn.Module, batch: int, elsewhere: _Elsewhere) -> None:
        self.elsewhere = elsewhere
        self.uses: dict[int, list[Use]] = defaultdict(list)
        self.odd: dict[int, str] = {}
        self.crossing: set[int] = set()
        """Attentions whose query, key and value are not one tensor."""
        self.tokens_of: dict[int, list[list[int]]] = defaultdict(list)
        """Fused experts -> for every call, how many tokens each expert gets."""
        self.norm_behind: dict[int, nn.Module] = {}
        self._batch = batch
        self._own = {id(m): found for m in model.modules() if isinstance(found := _own(m), AsPlain)}
        self._outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensors are held, so that no id is given twice
        self._hooks = []
        for module in model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _spec(self, module: nn.Module) -> LayerSpec | None:
        own = self._own.get(id(module))
        return LayerSpec.of(module) if own is None else own.spec

    def _tokens(self, x: Tensor) -> Use:
        """Rows [.., S]: with the batch in front, or as many to each sample as there are, or one by one."""
        if x.dim() > 1 and x.shape[0] == self._batch:
            return tuple(x.shape[1:-1]), self._batch
        return self._spread(x.numel() // x.shape[-1] if x.shape[-1] else 0)

    def _spread(self, rows: int) -> Use:
        return ((rows // self._batch,), self._batch) if rows % self._batch == 0 else ((), rows)

    def of_expert(self, module: nn.Module, e: int) -> list[Use]:
        """Uses of one of fused experts, one of no rows where no call gives it a token; none where the experts are not called."""
        calls = [rows[e] for rows in self.tokens_of[id(module)]]
        return [self._spread(rows) for rows in calls if rows] or [((), 0) for _ in calls[:1]]

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, nn.MultiheadAttention):
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if query is not key or key is not value:
                self.crossing.add(id(module))
            self.uses[id(module)] += [self._tokens(x) for x in (query, key, value)]
        elif isinstance(module, nn.RNNBase):
            x = args[0] if args else next(iter(kwargs.values()), None)
            rows = x.data if isinstance(x, PackedSequence) else x
            if isinstance(rows, Tensor):
                self.uses[id(module)].append(self._spread(rows.numel() // max(rows.shape[-1], 1)))
            else:
                self.odd[id(module)] = f"it is called with a {type(x).__name__}."
        elif are_experts(module):
            try:
                self.tokens_of[id(module)].append(tokens_of_each(module, args, kwargs))
            except (KeyError, ValueError, RuntimeError, AttributeError) as error:
                self.odd[id(module)] = f"it is not called with tokens, their experts and the shares of these: {error}"
        elif (spec := self._spec(module)) is not None:
            self.elsewhere.running.append(module)
            inputs = [*args, *kwargs.values()]
            if spec.lookup and len(inputs) == 1 and isinstance(inputs[0], Tensor):
                self.uses[id(module)].append(self._tokens(inputs[0].unsqueeze(-1)))
                return
            if len(inputs) != 1:
                self.odd[id(module)] = "it is called with more than its input (an output size)."
            if not isinstance(inputs[0], Tensor):
                self.odd[id(module)] = f"it is called with a {type(inputs[0]).__name__}, not with a tensor."
            elif spec.is_conv:
                axes = len(spec.kernel_size)  # without a batch axis, too
                size, own = tuple(inputs[0].shape[-axes:]), self._own.get(id(module))
                size = size if own is None or own.pad is None else own.pad.size_of(size)
                self.uses[id(module)].append((size, inputs[0].shape[: -axes - 1].numel()))
            else:
                self.uses[id(module)].append(self._tokens(inputs[0]))
        elif isinstance(module, _BatchNorm) and module.track_running_stats and args:
            _, source = self._outputs.get(id(args[0]), (None, None))
            if source is not None:
                self.norm_behind[id(source)] = module

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._spec(module) is not None:
            self._outputs[id(output)] = output, module
            if self.elsewhere.running and self.elsewhere.running[-1] is module:
                self.elsewhere.running.pop()


def _own(module: nn.Module) -> AsPlain | str | None:
    """What a layer computes that is no plain Conv or Linear; None for one that is, and for other modules."""
    return None if LayerSpec.of(module) is not None else as_plain(module)


@contextmanager
def _recording(model: nn.Module, batch: int) -> Iterator[_Recorder]:
    """Records one forward pass, which leaves no trace."""
    with undisturbed(model):
        elsewhere = _Elsewhere(model)
        recorder = _Recorder(model, batch, elsewhere)
        try:
            with elsewhere:
                yield recorder
        finally:
            recorder.close()


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
    with _recording(model, batch) as recorder, torch.no_grad(), counter() as counted:
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
                reason = "its weight is computed with outside of its own calls, where a lowered layer would have to make it anew."
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


def _attention_uses(recorder: _Recorder, attention: nn.Module, slot: Slot) -> list[Use] | None:
    """Uses of one projection of an attention; None for the form, packed or in three, that it is not opened in."""
    tokens = recorder.uses[id(attention)]
    part = slot.name.rpartition(".")[2]
    packed = id(attention) not in recorder.crossing and attention.in_proj_weight is not None
    if part == OUT_PROJ:
        return tokens[::3]
    if (part == IN_PROJ) is not packed:
        return None
    return tokens[::3] if packed else tokens[QKV.index(part) :: 3]
