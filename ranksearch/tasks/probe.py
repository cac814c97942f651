"""A task of the user's own tried out on one batch, before anything is spent on it.

Shapes, loss and metric fit each other, or a sentence says what does not.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.errors import UsageError
from ranksearch.tasks.scores import accumulator, as_number
from ranksearch.tasks.source import Batch
from ranksearch.tasks.task import Task

SAMPLES = 2
"""How many samples of each split are tried; a loader gives a whole batch, of which the first are taken."""


def check_task(task: Task) -> None:
    """Runs the model, the loss and the metric on the first samples of every split.

    Raises:
        UsageError: one of them raises, the loss is no scalar with a gradient, or the metric is no number.
    """
    model = task.dense_model().eval()
    for split, source in (("train", task.train), ("val", task.val), ("test", task.test)):
        if source is not None:
            _check_batch(task, model, split, next(source.in_order(SAMPLES)))
    assert task.example_input is not None
    _call(f"the model on example_input {list(task.example_input.shape)}", model, task.example_input)


def _check_batch(task: Task, model: nn.Module, split: str, batch: Batch) -> None:
    inputs, targets = batch
    if isinstance(targets, Tensor) and targets.dim() and len(targets) == len(inputs):
        inputs, targets = inputs[:SAMPLES], targets[:SAMPLES]
    outputs = _call(f"the model on inputs {_shape(inputs)} of {split}", model, inputs)
    fed = f"outputs {_shape(outputs)} and targets {_shape(targets)} of {split}"
    loss = _call(f"the loss on {fed}", task.loss, outputs, targets)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise UsageError(f"Task: the loss of {split} is {_shape(loss)}: expected a scalar, a mean over the batch.")
    if not loss.requires_grad and any(p.requires_grad for p in model.parameters()):
        raise UsageError("Task: the loss has no gradient by the model's weights; is it a metric?")
    with torch.no_grad():
        assert task.metric is not None
        metric = accumulator(task.metric)
        _call(f"the metric on {fed}", metric.update, _detached(outputs), targets)
        value = _call(f"the metric on {fed}", metric.compute)
    as_number(value, task.metric_name or "")


def _detached(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.detach()
    if isinstance(outputs, dict):
        return {key: _detached(part) for key, part in outputs.items()}
    return type(outputs)(map(_detached, outputs)) if type(outputs) in (tuple, list) else outputs


def _call(what: str, function: Any, *arguments: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # [N, 1] against [N] would be compared all with all
            warnings.filterwarnings("error", message="Using a target size")
            return function(*arguments)
    except UsageError:
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise UsageError(f"Task: {what}: {type(error).__name__}: {first}") from error


def _shape(value: Any) -> str:
    return (
        f"{list(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
