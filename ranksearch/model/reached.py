"""Layers that the code of a net's classes reaches by itself: by a global, or by what a function was made around.

A copy of a net shares its classes: such code goes on computing with the layers of the net that was copied, whatever becomes of the copy's.
Functions of instances are made anew with the copy (`copying.py`); those of classes cannot be.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from ranksearch.model.copying import is_filled

DEPTH = 3
"""Lists and dicts within one another that are looked into."""


def reached_by_classes(model: nn.Module) -> dict[str, str]:
    """Layer -> the function that reaches it, such as "Net.forward", of every layer of `model` that a class's code holds."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    for kind in {cls for module in model.modules() for cls in type(module).__mro__}:
        if kind.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for function in _functions(kind):
            for module in _modules(_held(function), DEPTH):
                if id(module) in names:
                    found[names[id(module)]] = function.__qualname__
    return found


def _functions(kind: type) -> Iterator[types.FunctionType]:
    for value in vars(kind).values():
        inner = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(inner, types.FunctionType):
            yield inner


def _held(function: types.FunctionType) -> list[Any]:
    """What a function may compute with beside its arguments: its closure, its defaults, the globals that it names."""
    held = [cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)]
    named = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    return [*held, *(function.__defaults__ or ()), *named]


def _modules(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, types.FunctionType) and depth:
        for cell in filter(is_filled, value.__closure__ or ()):
            yield from _modules(cell.cell_contents, depth - 1)
    elif isinstance(value, dict | list | tuple | set) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules(item, depth - 1)
