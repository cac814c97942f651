"""`Workbench`: what a study needs before its first trial: the task, the dense net, its layers and their rank curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ranksearch.allocate import Curves, rank_curves
from ranksearch.compress import Net, trace
from ranksearch.search.parametrize import check_feasible_space
from ranksearch.search.space import Space
from ranksearch.tasks import Task, task_kind
from ranksearch.tasks.dense import State, dense_state, read_checkpoint

Log = Callable[[str], None]


@dataclass(frozen=True)
class Workbench:
    """Everything the driver asks with; workers get the task (without its test set), the dense weights and the net."""

    task: Task
    dense: State
    net: Net
    curves: Curves

    def dense_model(self) -> torch.nn.Module:
        """The dense net with its trained weights."""
        model = self.task.build_model(self.task.model)
        model.load_state_dict(self.dense)
        return model.eval()


def open_net(space: Space) -> tuple[torch.nn.Module, Net]:
    """The untrained dense model of a space and its layers, the layer rules checked; needs no data.

    Raises:
        UsageError: an unknown task or model, or a layer rule that matches nothing.
    """
    kind = task_kind(space.task)
    model = kind.build_model(space.model)
    net = trace(model, kind.example_input)
    space.layers.as_rules().check(net)
    return model, net


def prepare(space: Space, *, fallback: Path, log: Log, saved_dense: Path | None = None) -> Workbench:
    """Loads the task, finds or trains the dense net (or reads `saved_dense`), traces it and computes its rank curves.

    `fallback` is the folder for a newly trained dense net where the data folder cannot be written.

    Raises:
        UsageError: data or checkpoint missing, a layer rule that matches nothing, budgets that cannot be met.
    """
    model, net = open_net(space)
    rules = space.layers.as_rules()
    if saved_dense is None:
        # costs depend on shapes alone: budgets that cannot be met fail here, before anything is loaded or trained
        check_feasible_space(space, rank_curves(model, net, rules))
    task = task_kind(space.task).make_task(
        space.model, data=space.data, validation=space.validation, split_seed=space.split_seed
    )
    if saved_dense is not None:
        dense = read_checkpoint(saved_dense)
    else:
        dense = dense_state(task, checkpoint=space.checkpoint, data=space.data, fallback=fallback, log=log)
    model.load_state_dict(dense)
    return Workbench(task, dense, net, rank_curves(model, net, rules))
