"""How a net is called with what it takes, and how its outputs are read. Whatever runs a user's net goes through here.

An *input* (an example, a batch) is what one call takes:

- a tensor, the net's one argument: `net(x)`;
- a tuple or list, its positional arguments: `net(*inputs)`;
- a mapping, a Hugging Face `BatchEncoding` too, its keyword arguments: `net(**inputs)`;
- and in each of them tensors, nested as the net takes them, beside values that are no tensors, which are handed on as they are.
  (A net whose one argument is a mapping or a list takes `({...},)`.)

    outputs = call(net, inputs)               in the place of net(inputs)
    count = batch_size(inputs)                in the place of len(inputs)
    inputs = moved(inputs, device)            tensors on a device; `cast` floats to a dtype
    part = cut(inputs, 0, 2)                  the first two samples of every batched tensor; `picked` by an index
    whole = joined([part, part])              batches laid end to end
    logits = class_logits(outputs)            [N, classes, ...] of a tensor, or of an output with `logits`
    outputs = mapped(function, outputs)       any other change of every tensor, in the same form: named tuples, dataclasses and
                                              Hugging Face's `ModelOutput` stay what they are

The batch is the first axis of the first tensor that has axes; a tensor is batched where its first axis is as long. That is for cutting
batches; costs are not counted by it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ranksearch.errors import UsageError

LOGITS, LOSS = "logits", "loss"
"""Fields of an output that nets of Hugging Face have."""


def call(net: Callable[..., Any], inputs: Any) -> Any:
    """What `net` returns for `inputs`, which are a tensor, positional arguments, or keyword arguments."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    if isinstance(inputs, tuple | list):
        return net(*inputs)
    return net(inputs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of that call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def mapped(function: Callable[[Any], Any], value: Any, kind: type = Tensor) -> Any:
    """`value` with each of its tensors (instances of `kind`) replaced by `function` of it, in new containers.

    A tensor that is there twice stays one: a net may ask whether its key is its query.
    """
    known: dict[int, tuple[Any, Any]] = {}  # both are held, so that no id is given twice

    def made(part: Any) -> Any:
        if isinstance(part, kind):
            if id(part) not in known:
                known[id(part)] = part, function(part)
            return known[id(part)][1]
        if isinstance(part, Mapping):
            return _mapping(part, {key: made(inner) for key, inner in part.items()})
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(made, part))
        if type(part) in (tuple, list):
            return type(part)([made(inner) for inner in part])
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            changed = copy.copy(part)
            for field in dataclasses.fields(part):
                object.__setattr__(changed, field.name, made(getattr(part, field.name)))
            return changed
        return part

    return made(value)


def _mapping(like: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """A mapping of the type of `like` that holds `parts`; a plain dict where that type cannot be written to."""
    if type(like) is dict:
        return parts
    changed = copy.copy(like)
    try:
        for key, part in parts.items():
            changed[key] = part  # type: ignore[index]
    except TypeError:
        return parts
    return changed


def tensors(value: Any) -> list[Tensor]:
    """Every tensor within `value`, once, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(note, value)
    return found


def batch_size(inputs: Any) -> int:
    """Samples of a batch: the first extent of its first tensor that has axes.

    Raises:
        UsageError: there is no such tensor.
    """
    for tensor in tensors(inputs):
        if tensor.dim():
            return tensor.shape[0]
    raise UsageError(
        f"An input is a batched tensor [N, ...], or a tuple or dict of what the net takes with such a tensor in it; got a "
        f"{type(inputs).__name__}."
    )


def device_of(inputs: Any) -> torch.device:
    """Where an input's first tensor lies; the CPU where there is none."""
    return next((tensor.device for tensor in tensors(inputs)), torch.device("cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`; a copy to a GPU is not waited for."""
    return mapped(lambda x: x.to(device, non_blocking=device.type != "cpu"), value)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating tensors in `dtype`; integers and masks stay what they are."""
    return mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def detached(value: Any) -> Any:
    """`value` with its tensors cut off from their graphs."""
    return mapped(lambda x: x.detach(), value)


def _batched(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    size = batch_size(inputs)
    return mapped(lambda x: function(x) if x.dim() and x.shape[0] == size else x, inputs)


def cut(inputs: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of every batched tensor of `inputs`; the others as they are."""
    return _batched(lambda x: x[start:stop], inputs)


def picked(inputs: Any, index: Tensor) -> Any:
    """The samples of `index` of every batched tensor of `inputs`; the others as they are."""
    return _batched(lambda x: x[index], inputs)


def repeated(inputs: Any, count: int, generator: torch.Generator | None = None) -> Any:
    """[count, ...] samples like the first one of `inputs`: floats are normal random numbers, everything else is repeated."""

    def made(x: Tensor) -> Tensor:
        batch = x[:1].expand(count, *x.shape[1:])
        return (
            torch.randn(batch.shape, dtype=x.dtype, generator=generator)
            if x.is_floating_point()
            else batch.contiguous()
        )

    return _batched(made, inputs)


def joined(parts: Sequence[Any]) -> Any:
    """Batches of one form laid end to end; what cannot be (no tensor, other extents) becomes the list of the parts."""
    first = parts[0]
    if isinstance(first, Tensor):
        fits = first.dim() and all(part.shape[1:] == first.shape[1:] for part in parts)
        return torch.cat(list(parts)) if fits else list(parts)
    if isinstance(first, Mapping):
        return _mapping(first, {key: joined([part[key] for part in parts]) for key in first})
    if isinstance(first, tuple | list):
        laid = [joined(list(part)) for part in zip(*parts, strict=True)]
        return type(first)(*laid) if hasattr(first, "_fields") else type(first)(laid)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        whole = copy.copy(first)
        for field in dataclasses.fields(first):
            object.__setattr__(whole, field.name, joined([getattr(part, field.name) for part in parts]))
        return whole
    return list(parts)


def shape_of(value: Any) -> str:
    """An input or output in a message: `[2, 3] (float32)`, `input_ids [2, 9] (int64), …`, `a str`."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {shape_of(part)}' for key, part in value.items())}}}"
    if isinstance(value, tuple | list) and value and len(value) <= 8:
        return f"({', '.join(map(shape_of, value))})"
    return f"a {type(value).__name__}"


def field_of(outputs: Any, name: str) -> Any:
    """The field `name` of an output that is a mapping, a named tuple or a dataclass; None where it has none."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if isinstance(outputs, Tensor) or not (dataclasses.is_dataclass(outputs) or hasattr(outputs, "_fields")):
        return None
    return getattr(outputs, name, None)


def own_loss(outputs: Any) -> Tensor | None:
    """The loss that a net has computed itself, as those of Hugging Face do where their batch holds labels; else None."""
    found = field_of(outputs, LOSS)
    return found if isinstance(found, Tensor) else None


def main_output(outputs: Any) -> Tensor:
    """The tensor that an output stands for: itself, its `logits`, or the only tensor in it.

    Raises:
        UsageError: it is none of them.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(found := field_of(outputs, LOGITS), Tensor):
        return found
    inside = tensors(outputs)
    if len(inside) != 1:
        raise UsageError(
            f"The net returns {shape_of(outputs)}: without one tensor, or one called {LOGITS!r}, a loss and a metric of your own must say "
            f"what of it counts."
        )
    return inside[0]


def class_logits(outputs: Any) -> Tensor:
    """Logits [N, classes, ...] of an output.

    A tensor holds them in that order; in a field `logits` [N, positions, classes], as nets of Hugging Face return it, the classes
    are moved to the front.

    Raises:
        UsageError: as `main_output`.
    """
    found = main_output(outputs)
    named = not isinstance(outputs, Tensor) and field_of(outputs, LOGITS) is not None
    return found.movedim(-1, 1) if named and found.dim() == 3 else found


def flat(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor within `value`, named by its keys and fields; a lone tensor is called `name`, those of a tuple
    `name_0`, `name_1`.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from flat(part, str(key))
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", None) or [f"{name}_{i}" for i in range(len(value))]
        for key, part in zip(names, value, strict=True):
            yield from flat(part, key)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from flat(getattr(value, field.name), field.name)
