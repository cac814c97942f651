"""A task on its way to the workers: resident data once per node, the rest pickled, a user's own file first."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from ranksearch.data.resident import Resident
from ranksearch.errors import UsageError, first_line
from ranksearch.model.inputs import mapped
from ranksearch.tasks.task import Task
from ranksearch.tasks.task_file import TaskCode, TaskFile


@dataclass(frozen=True)
class Array:
    """A tensor as Ray's object store hands it out without a copy."""

    values: np.ndarray
    dtype: torch.dtype
    """The tensor's dtype; if numpy lacks it, `values` holds the bytes."""

    @classmethod
    def of(cls, tensor: Tensor) -> Array:
        values = tensor.detach().cpu().contiguous()
        return cls((values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy(), values.dtype)

    def tensor(self) -> Tensor:
        """A view of the same memory, which may be read-only: nothing writes to data or to the dense net's weights."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.values).view(self.dtype)


@dataclass(frozen=True)
class Packed:
    """A task on its way to the workers.

    Resident data travel as arrays, which are in Ray's object store once per node and are read there without a copy. The rest is pickled
    separately: what a user's own file defines can be read only after that file's module was made.
    """

    code: TaskCode | None
    rest: bytes
    arrays: dict[str, tuple[Any, Any]]
    """Split -> inputs and targets, with arrays instead of tensors."""

    @property
    def nbytes(self) -> int:
        return len(self.rest) + sum(array.values.nbytes for array in _arrays(self.arrays))


def pack(task: Task, own: TaskFile | None = None) -> Packed:
    """Packs the task without its test set, and the user's file that it comes from.

    Raises:
        UsageError: a part of it cannot be pickled.
    """
    splits = {"train": task.train, "val": task.val}
    resident = {name: source for name, source in splits.items() if isinstance(source, Resident)}
    arrays = {
        name: (mapped(Array.of, source.inputs), mapped(Array.of, source.targets)) for name, source in resident.items()
    }
    nothing = torch.empty(0)
    hollow: dict[str, Any] = {
        name: replace(source, inputs=nothing, targets=nothing) for name, source in resident.items()
    }
    try:
        rest = ray.cloudpickle.dumps(replace(task.without_test(), **hollow))
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, pickle.PicklingError) as error:
        first = first_line(error)
        raise UsageError(
            f"task: it cannot be sent to Ray's workers ({first}): open files and connections when they are first used, not in the "
            f"task; or run the trials in this process with --inline."
        ) from error
    return Packed(own.code if own is not None else None, rest, arrays)


def _arrays(value: Any) -> list[Array]:
    found: list[Array] = []
    mapped(found.append, value, Array)
    return found


def _laid_out(half: Any) -> Any:
    return mapped(Array.tensor, half, Array)


def unpack(packed: Packed) -> Task:
    """The task that `pack` packed; its tensors are views of the object store's read-only memory."""
    if packed.code is not None:
        packed.code.module()
    task: Task = ray.cloudpickle.loads(packed.rest)
    whole = {
        name: replace(getattr(task, name), inputs=_laid_out(inputs), targets=_laid_out(targets))
        for name, (inputs, targets) in packed.arrays.items()
    }
    return replace(task, **whole)
