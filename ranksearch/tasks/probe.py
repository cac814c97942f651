"""A task of the user's own tried out on one batch, before anything is spent on it.

Shapes, loss and metric fit each other, or a sentence says what does not.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.data.source import Batch
from ranksearch.errors import UsageError, first_line
from ranksearch.model.inputs import batch_size, call, cut, detached, shape_of, tensors
from ranksearch.tasks.scores import Accuracy, accumulator, as_number, cross_entropy
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
    example = task.example_input
    try:
        _call(f"the model on example_input {shape_of(example)}", partial(call, model), example)
    except UsageError as error:
        hint = " Give the task an example_input=, what one call takes without targets." if task.nets_loss else ""
        raise UsageError(f"{error}{hint}") from error


def _check_batch(task: Task, model: nn.Module, split: str, batch: Batch) -> None:
    inputs, targets = batch
    if all(x.dim() and len(x) == batch_size(inputs) for x in tensors(targets)):
        inputs, targets = cut(inputs, 0, SAMPLES), cut(targets, 0, SAMPLES) if tensors(targets) else targets
    outputs = _call(f"the model on inputs {shape_of(inputs)} of {split}", partial(call, model), inputs)
    fed = f"outputs {shape_of(outputs)} and targets {shape_of(targets)} of {split}"
    loss = _call(f"the loss on {fed}", task.loss, outputs, targets)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise UsageError(f"Task: the loss of {split} is {shape_of(loss)}: expected a scalar, a mean over the batch.")
    if not loss.requires_grad and any(p.requires_grad for p in model.parameters()):
        raise UsageError("Task: the loss has no gradient by the model's weights; is it a metric?")
    with torch.no_grad():
        assert task.metric is not None
        if task.nets_loss and isinstance(task.metric, Accuracy):
            _check_accuracy(outputs, targets, loss)
        metric = accumulator(task.metric, reads_logits=task.reads_logits)
        _call(f"the metric on {fed}", metric.update, detached(outputs), targets)
        value = _call(f"the metric on {fed}", metric.compute)
    as_number(value, task.metric_name or "")


def _check_accuracy(outputs: Any, targets: Any, loss: Tensor) -> None:
    """Accuracy is the metric of a net that names none and computes its loss itself only where that loss is plain cross-entropy.

    For a language model, whose labels are shifted, or for a regression, it would be a number that means nothing.
    """
    try:
        plain = cross_entropy(outputs, targets)
    except (RuntimeError, ValueError, TypeError, IndexError, UsageError):
        plain = loss.new_tensor(float("inf"))
    if not (torch.isclose(plain, loss, rtol=1e-3, atol=1e-4) or bool(loss.isnan())):
        raise UsageError(
            f"Task: the net's own loss is not the cross-entropy of its logits against {shape_of(targets)}, so accuracy would mean nothing: "
            f"give the task a metric= of (logits, targets), and direction='minimize' where less is better."
        )


def _call(what: str, function: Any, *arguments: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # [N, 1] against [N] would be compared all with all
            warnings.filterwarnings("error", message="Using a target size")
            return function(*arguments)
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UsageError(f"Task: {what}: {type(error).__name__}: {first_line(error)}") from error
