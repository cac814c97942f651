"""`Task`: what is trained on what. One type for the built-in tasks and a user's own; no trainer, no wrapper around the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ranksearch.data.loaded import as_source
from ranksearch.data.targets import targets_taken, without_targets
from ranksearch.errors import UsageError, nearest
from ranksearch.model.copying import copied
from ranksearch.model.inputs import cut, moved, tensors
from ranksearch.tasks.schedule import OPTIMIZER_NAMES
from ranksearch.tasks.scores import Accuracy, Loss, MetricFunction, cross_entropy, is_accumulator, nets_loss

DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data, a loss and a metric. What a function in a user's own file returns for `task: FILE.py:FUNCTION`.

        ranksearch.Task(model=net, train=(x, y), val=loader)                                   # a classifier, accuracy in percent
        ranksearch.Task(model=net, train=…, val=…, loss=nn.MSELoss(), metric=rmse, direction="minimize", unit="K")
        ranksearch.Task(model=bert, train=loader, val=loader)                       # of Hugging Face, with a data collator's loaders

    A split is a pair of tensors (inputs [N, ...], targets [N, ...]), a torch Dataset of (input, target) pairs, or a DataLoader or
    any other iterable of (inputs, targets) batches that can be iterated again. Pairs and datasets are batched and shuffled as the
    recipe says; a loader's batches are taken as they come. Inputs may be tuples, the net's positional arguments, or dicts, its keyword
    arguments; a batch may be one dict with its targets under `labels` (or another name with `label` in it, `targets`,
    `start_positions`, `end_positions`), or end on its targets: (input, input, targets).

    Raises:
        UsageError: an argument cannot be used; the text says why in one sentence.
    """

    model: nn.Module
    """The dense net with its trained weights; it is copied and never changed."""
    train: Any
    val: Any
    """What trials are compared on."""
    test: Any = None
    """Read once, at the end, for the dense net and the front; None in every trial, so that nothing can be chosen on it."""
    loss: Loss | None = None
    """(outputs, targets) -> scalar, a mean over the batch; left out, the net's own (`loss` of its outputs) where its batches are
    dicts and its forward takes their targets by name, as nets of Hugging Face do; else cross-entropy over dimension 1 (images, pixels,
    tokens), or over the last one of outputs with `logits` [N, tokens, classes]."""
    metric: MetricFunction | None = None
    """(outputs, targets) of the whole split -> number; or an object with reset(), update(outputs, targets) and compute(), fed batch by
    batch (torchmetrics' are such). Both are given tensors on the CPU: the `logits` of outputs that have them, where no loss is given.
    Left out, accuracy in percent."""
    metric_name: str | None = None
    """Left out, the metric's own."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Which way the metric is better: "maximize" or "minimize"."""
    unit: str | None = None
    """The metric's unit, such as "K". A metric in "%" lies between 0 and 100; left out, "%" for accuracy and none for others."""
    example_input: Any = None
    """One input as a batch of one, [1, ...], or arguments as the net takes them; left out, the first training sample without its
    targets."""
    trained: bool = True
    """Whether the model's weights are those of the dense net; if not, it is trained once before the search."""
    trained_with: Mapping[str, str | float] | None = None
    """What the dense net was trained with, such as {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}: trials train so where the
    space's recipe names neither optimizer nor learning rate."""
    name: str = "own"
    model_name: str | None = None
    """Names the net in messages; left out, its class."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise UsageError(f"Task: model is an nn.Module, got {_kind(self.model)}.")
        if self.direction not in DIRECTIONS:
            raise UsageError(
                f"Task: direction {self.direction!r} is not possible. {nearest(self.direction, DIRECTIONS)}"
            )
        if self.example_input is not None and not tensors(self.example_input):
            raise UsageError(
                f"Task: example_input is one input [1, ...]: a tensor, a tuple of arguments or a dict of them, got "
                f"{_kind(self.example_input)}."
            )
        for name, value in (("loss", self.loss), ("metric", self.metric)):
            if value is not None and not callable(value) and not (name == "metric" and is_accumulator(value)):
                raise UsageError(f"Task: {name} is a function of (outputs, targets), got {_kind(value)}.")
        if self.metric is None and self.direction == "minimize":
            raise UsageError("Task: direction 'minimize' needs a metric; accuracy, the default, is maximised.")
        _check_trained_with(self.trained_with)
        taken = targets_taken(self.model) if self.loss is None else ()
        train = as_source(self.train, "train", taken)
        first = next(train.in_order(1))[0] if taken or self.example_input is None else None
        loss = nets_loss if isinstance(first, Mapping) and set(taken) & set(first) else self.loss
        settled: dict[str, Any] = {
            "train": train, "val": as_source(self.val, "val", taken),
            "test": as_source(self.test, "test", taken) if self.test is not None else None,
            "loss": cross_entropy if _is_cross_entropy(loss) else loss,
            "metric": self.metric if self.metric is not None else Accuracy(),
            "metric_name": self.metric_name or ("accuracy" if self.metric is None else _name(self.metric)),
            "unit": self.unit if self.unit is not None else ("%" if self.metric is None else ""),
            "model_name": self.model_name or type(self.model).__name__,
        }  # fmt: skip
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        if self.example_input is None:
            object.__setattr__(self, "example_input", moved(cut(without_targets(first), 0, 1), torch.device("cpu")))

    @property
    def cross_entropy(self) -> bool:
        """Whether the loss is the default: outputs are logits over dimension 1, and labels may be smoothed."""
        return self.loss is cross_entropy

    @property
    def nets_loss(self) -> bool:
        """Whether the loss is what the net computes itself from targets among its inputs."""
        return self.loss is nets_loss

    @property
    def reads_logits(self) -> bool:
        """Whether a metric is given the `logits` of outputs that have them: where no loss was given that knows the outputs' form."""
        return self.cross_entropy or self.nets_loss

    @property
    def classifies(self) -> bool:
        """Whether outputs are logits over dimension 1, from which labels can be drawn and which a teacher can soften."""
        return self.cross_entropy or isinstance(self.loss, nn.CrossEntropyLoss)

    def dense_model(self) -> nn.Module:
        """A fresh copy of the model as it was given."""
        return copied(self.model)

    def loss_on(self, device: torch.device) -> Loss:
        """The loss; a module, which may hold class weights, is copied to `device`."""
        assert self.loss is not None
        return copy.deepcopy(self.loss).to(device) if isinstance(self.loss, nn.Module) else self.loss

    def without_test(self) -> Task:
        return replace(self, test=None)

    def to(self, device: torch.device) -> Task:
        """The same task with its data, and a loss with buffers, on `device`; the model stays where it is."""
        test = self.test.to(device) if self.test is not None else None
        return replace(
            self,
            train=self.train.to(device),
            val=self.val.to(device),
            test=test,
            loss=self.loss_on(device),
            example_input=moved(self.example_input, device),
        )


TRAINED_WITH = ("optimizer", "lr", "weight_decay")


def _check_trained_with(given: Any) -> None:
    """Raises UsageError where it is no mapping of what a recipe can take over."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise UsageError(
            f'Task: trained_with is a mapping such as {{"optimizer": "adamw", "lr": 1e-3}}, got {_kind(given)}.'
        )
    for name, value in given.items():
        if name not in TRAINED_WITH:
            raise UsageError(f"Task: trained_with has no {name!r}. {nearest(str(name), TRAINED_WITH)}")
        if name == "optimizer":
            if value not in OPTIMIZER_NAMES:
                raise UsageError(
                    f"Task: trained_with: optimizer {value!r} is not possible. {nearest(str(value), OPTIMIZER_NAMES)}"
                )
            continue
        low = 1e-8 if name == "lr" else 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 100:
            raise UsageError(
                f"Task: trained_with: {name} {value!r} is not possible: expected a number from {low:g} to 100."
            )
    if ("optimizer" in given) != ("lr" in given):
        raise UsageError(
            "Task: trained_with: optimizer and lr belong together: the one says nothing without the other."
        )


def untrained(build: Callable[[str], nn.Module], name: str) -> nn.Module:
    """The model `name` with the same random weights whenever it is built; randomness around it stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(name)


def _is_cross_entropy(loss: Any) -> bool:
    """Whether a loss is cross-entropy as torch has it by default."""
    if type(loss) is nn.CrossEntropyLoss:
        return (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing) == (None, -100, "mean", 0.0)
    return loss is None or loss is F.cross_entropy or loss is cross_entropy


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _name(metric: Any) -> str:
    return str(getattr(metric, "__name__", None) or type(metric).__name__)
