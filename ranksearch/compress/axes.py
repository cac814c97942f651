"""The axes of an ONNX model by names that its readers know: `batch`, `input_ids_1`; and as a number where they are one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BATCH = "batch"


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
