"""A copy of a model that computes with nothing of the original: `copy.deepcopy`, and what it leaves out.

`deepcopy` refuses tensors with a graph (activations that a forward pass has kept, weights that old weight norm computes), separates
weights that share their memory (`b.weight.data = a.weight.data`), and hands functions on as they are, so that a lambda in a copy goes
on computing with the original's layers.
"""

from __future__ import annotations

import copy
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.errors import UsageError
from ranksearch.model.bare import is_lazy


def memory(tensor: Any) -> tuple[Any, ...]:
    """Equal for two tensors that are the same numbers in the same places of memory."""
    opaque = is_lazy(tensor) or tensor.is_meta or hasattr(tensor, "placements") or tensor.layout != torch.strided
    if opaque or tensor.numel() == 0:
        return (id(tensor),)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*place, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with `model`; weights that share their memory do so in the copy, too.

    Raises:
        UsageError: something in the model cannot be copied; the text says what.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for tensor in _tensors(value):
                if tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UsageError(f"{type(model).__name__} cannot be copied (copy.deepcopy): {error}") from error
    _tie_(model, made)
    for module in made.modules():
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(module)[name] = _rebound(value, memo)
    return made


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _tie_(model: nn.Module, made: nn.Module) -> None:
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[memory(parameter)].append(name)
    for first, *others in groups.values():
        for other in others:
            made.get_parameter(other).data = made.get_parameter(first).data


def _rebound(value: Any, memo: dict[int, Any], depth: int = 2) -> Any:
    """`value` with functions that hold the original's modules and tensors replaced by functions that hold the copy's."""
    if isinstance(value, types.FunctionType) and value.__closure__:
        held = [cell.cell_contents if is_filled(cell) else None for cell in value.__closure__]
        instead = [_counterpart(item, memo) for item in held]
        if all(new is old for new, old in zip(instead, held, strict=True)):
            return value
        function = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(map(types.CellType, instead))
        )
        function.__kwdefaults__ = value.__kwdefaults__
        return function
    if depth and type(value) is list:
        value[:] = [_rebound(item, memo, depth - 1) for item in value]
    elif depth and isinstance(value, dict):
        for key, item in list(value.items()):
            value[key] = _rebound(item, memo, depth - 1)
    return value


def _counterpart(item: Any, memo: dict[int, Any], depth: int = 2) -> Any:
    if isinstance(item, nn.Module | Tensor):
        return memo.get(id(item), item)
    if isinstance(item, types.FunctionType):
        return _rebound(item, memo)
    if isinstance(item, types.MethodType) and isinstance(item.__self__, nn.Module):
        return types.MethodType(item.__func__, memo.get(id(item.__self__), item.__self__))
    if depth and type(item) in (list, tuple):
        instead = [_counterpart(part, memo, depth - 1) for part in item]
        return item if all(new is old for new, old in zip(instead, item, strict=True)) else type(item)(instead)
    if depth and type(item) is dict:
        found = {key: _counterpart(part, memo, depth - 1) for key, part in item.items()}
        return item if all(found[key] is item[key] for key in item) else found
    return item


def is_filled(cell: types.CellType) -> bool:
    """Whether a cell of a closure holds a value yet."""
    try:
        return cell.cell_contents is cell.cell_contents
    except ValueError:
        return False
