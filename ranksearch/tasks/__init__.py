"""What is trained on what: data sets, models, the training loop. `load_task` finds a task by name."""

from ranksearch.errors import UsageError, nearest
from ranksearch.tasks import cifar10, digits
from ranksearch.tasks.task import Task

TASKS = {"cifar10": cifar10.make_task, "digits": digits.make_task}


def load_task(name: str, model: str, *, data: str | None, validation: int, split_seed: int) -> Task:
    """The task `name` with the architecture `model`, its data in memory.

    Raises:
        UsageError: an unknown name, or data that are not there.
    """
    if name not in TASKS:
        raise UsageError(f"task: there is no task {name!r}. {nearest(name, TASKS)}")
    return TASKS[name](model, data=data, validation=validation, split_seed=split_seed)


__all__ = ["TASKS", "Task", "load_task"]
