"""What is trained on what: data sets, models, the training loop. A task is found by name.

A `TaskKind` tells what is known without data (architectures, input shape), so that layers and costs need none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranksearch.errors import UsageError, nearest
from ranksearch.tasks import cifar10, digits
from ranksearch.tasks.task import Normalise, Task


@dataclass(frozen=True)
class TaskKind:
    """A task before its data are loaded."""

    build_model: Callable[[str], nn.Module]
    input_shape: tuple[int, ...]
    make_task: Callable[..., Task]
    normalise: Normalise
    """What the model expects to have been done to its inputs."""

    @property
    def example_input(self) -> Tensor:
        """A batch of one of the right shape: [1, *input_shape]."""
        return torch.zeros(1, *self.input_shape)


TASKS = {
    "cifar10": TaskKind(cifar10.build_model, (3, 32, 32), cifar10.make_task, cifar10.NORMALISE),
    "digits": TaskKind(digits.build_model, (1, 8, 8), digits.make_task, digits.NORMALISE),
}


def task_kind(name: str) -> TaskKind:
    """The task `name` without its data; UsageError names the nearest one."""
    if name not in TASKS:
        raise UsageError(f"task: there is no task {name!r}. {nearest(name, TASKS)}")
    return TASKS[name]


def model_reference(task: str, model: str) -> str:
    """The name under which a plan records its architecture, such as `cifar10/resnet20`."""
    return f"{task}/{model}"


def build_reference(reference: str) -> nn.Module:
    """The untrained dense model that `model_reference` named."""
    task, _, model = reference.partition("/")
    return task_kind(task).build_model(model)


__all__ = ["TASKS", "Task", "TaskKind", "build_reference", "model_reference", "task_kind"]
