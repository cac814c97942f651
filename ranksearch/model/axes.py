"""The axes of an exported net: which ones it leaves free, and what an ONNX model's readers know them by (`batch`, `input_ids_1`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ranksearch.model.inputs import call, mapped, tensors
from ranksearch.model.plain import named_inputs

BATCH = "batch"


def free_axes(program: ExportedProgram, batch: Any) -> tuple[tuple[str, int], ...]:
    """(input, axis) of every axis but the batch's that the graph leaves free, such as tokens, height and width."""
    # half a second of sympy, which a search never needs
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    shapes = [n.meta["val"].shape for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    names = list(named_inputs(batch))
    return tuple(
        (n, i) for n, s in zip(names, shapes, strict=True) for i, e in enumerate(s) if i and not is_concrete_int(e)
    )


def fixed_axes(net: Callable[..., Any], batch: Any, free: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """(input, axis) of every axis that is not `free` although the net takes one more step of it, in all inputs that have it at once."""
    found: list[tuple[str, int]] = []
    named = named_inputs(batch)
    for i in range(1, max(x.dim() for x in named.values())):
        axes = [(name, i) for name, x in named.items() if x.dim() > i and x.shape[i] > 1 and (name, i) not in set(free)]
        if axes and stretched(net, batch, axes) is not None:
            found += axes
    return tuple(found)


@torch.inference_mode()
def stretched(net: Callable[..., Any], batch: Any, free: Sequence[tuple[str, int]]) -> Any:
    """`batch` with one more step along every free axis; None where the net itself takes no such input."""
    names = {id(x): name for name, x in named_inputs(batch).items()}

    def longer(x: Tensor) -> Tensor:
        for axis in [axis for name, axis in free if name == names[id(x)]]:
            x = torch.cat([x, x.narrow(axis, 0, 1)], axis)
        return x

    made = {id(x): longer(x) for x in tensors(batch)}
    found = mapped(lambda x: made[id(x)], batch)
    try:
        call(net, found)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return None
    return found


def name_axes_(made: Any, batched: set[str]) -> None:
    """Renames the free axes of what `torch.onnx.export` made, where they are torch's own symbols such as `s77`.

    The first axis of the inputs `batched` becomes `batch`; any other free axis i of an input becomes `NAME_i`. An axis that the exporter
    writes as a symbol called "8" is the number 8.
    """
    names: dict[str, str] = {}
    for value in made.model.graph.inputs:
        for axis, extent in enumerate(value.shape):
            symbol = getattr(extent, "value", None)
            if isinstance(symbol, str) and symbol.isidentifier():
                names.setdefault(symbol, BATCH if axis == 0 and value.name in batched else f"{value.name}_{axis}")
    made.rename_axes(names)
    for value in _values(made.model.graph):
        if value.shape is not None and any(_number(extent) is not None for extent in value.shape):
            known = [(extent, _number(extent)) for extent in value.shape]
            value.shape = type(value.shape)([extent if number is None else number for extent, number in known])


def _number(extent: Any) -> int | None:
    symbol = getattr(extent, "value", None)
    return int(symbol) if isinstance(symbol, str) and symbol.isdigit() else None


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
