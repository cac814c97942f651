"""What is trained on what: data sets, models, losses and metrics. A task is found by name, or made by a function in a user's file.

A `TaskKind` tells what is known without data (architectures, input shape), so that layers and costs need none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.data.resident import Normalise
from ranksearch.errors import UsageError, nearest
from ranksearch.tasks import cifar10, digits, idx, imagefolder
from ranksearch.tasks.task import Task
from ranksearch.tasks.task_file import TaskFile, is_own


@dataclass(frozen=True)
class TaskKind:
    """A task before its data are loaded."""

    build_model: Callable[[str], nn.Module]
    example_input: Any
    """A batch of one: a tensor [1, ...], or arguments as the net takes them."""
    make_task: Callable[..., Task]
    """(model, data, validation, split_seed) -> the task."""
    normalise: Normalise | None = None
    """How the model expects its inputs to be normalised, where that is known."""
    own: TaskFile | None = None
    """The file and function that make it, where it is a task of the user's own."""
    splits_itself: bool = False
    """Whether its validation images may be left to the data."""
    reads_files: bool = False
    """Whether `make_task` takes `workers`, processes that read and prepare its images."""

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one input, without the batch; None where a net takes several."""
        return tuple(self.example_input.shape[1:]) if isinstance(self.example_input, Tensor) else None


def _images(*shape: int) -> Tensor:
    return torch.zeros(1, *shape)


TASKS = {
    "cifar10": TaskKind(cifar10.build_model, _images(3, 32, 32), cifar10.make_task, cifar10.NORMALISE),
    "digits": TaskKind(digits.build_model, _images(1, 8, 8), digits.make_task, digits.NORMALISE),
    "idx": TaskKind(idx.build_model, _images(1, idx.SIDE, idx.SIDE), idx.make_task, idx.NORMALISE),
    "imagefolder": TaskKind(
        imagefolder.build_model,
        _images(3, imagefolder.SIZE, imagefolder.SIZE),
        imagefolder.make_task,
        imagefolder.NORMALISE,
        splits_itself=True,
        reads_files=True,
    ),
}


def task_kind(name: str, origin: str | None = None) -> TaskKind:
    """The task `name` without its data; a task of the user's own, `FILE.py:FUNCTION`, is made, with its data.

    Args:
        origin: where the file was written, if `name` names a copy.

    Raises:
        UsageError: no such task (the text names the nearest one), or the user's file is of no use.
    """
    if is_own(name):
        return _own_kind(TaskFile.parse(name, origin))
    if name not in TASKS:
        raise UsageError(
            f"task: there is no task {name!r}. {nearest(name, TASKS)} A task of your own is named FILE.py:FUNCTION."
        )
    return TASKS[name]


def _own_kind(file: TaskFile) -> TaskKind:
    task = file.make()
    assert task.example_input is not None
    return TaskKind(
        lambda name: task.dense_model(), task.example_input, lambda *args, **kwargs: task, own=file, splits_itself=True
    )


def model_reference(task: str, model: str | None) -> str:
    """The name under which a plan records its architecture, such as `cifar10/resnet20`, or `own.py:make_task` for a user's own."""
    return Path(task).name if is_own(task) else f"{task}/{model}"


def build_reference(reference: str) -> nn.Module:
    """The untrained dense model that `model_reference` named.

    Raises:
        UsageError: there is no such model, or it is of a task of the user's own: a plan is not trusted to name code that is run.
    """
    if is_own(reference):
        raise UsageError(
            f"This net was made by a task of its own ({reference}), and a plan alone runs no code: pass build=, a function that returns "
            f"the dense net, as in ranksearch.load(folder, build=make_net); or name a trial's folder within its study."
        )
    task, _, model = reference.partition("/")
    return task_kind(task).build_model(model)


__all__ = ["TASKS", "Task", "TaskKind", "build_reference", "is_own", "model_reference", "task_kind"]
