"""Where the targets of a batch are: beside its inputs, last in a tuple, or in a dict under names such as `labels`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ranksearch.errors import UsageError
from ranksearch.model.inputs import shape_of

NAMES = ("target", "targets", "start_positions", "end_positions")
"""Names that targets go by in a batch dict, beside every name with `label` in it, as Hugging Face has it."""


def is_target(name: object) -> bool:
    """Whether a key of a batch dict names targets."""
    return isinstance(name, str) and (name in NAMES or "label" in name)


def targets_taken(model: nn.Module) -> tuple[str, ...]:
    """The targets that a net's forward takes by name: such a net computes its loss itself, as those of Hugging Face do."""
    return tuple(name for name in inspect.signature(model.forward).parameters if is_target(name))


def without_targets(inputs: Any) -> Any:
    """Inputs as they are where there are no targets: what is exported and timed."""
    if not isinstance(inputs, Mapping):
        return inputs
    return {name: part for name, part in inputs.items() if not is_target(name)}


def split_batch(found: Any, split: str, kept: tuple[str, ...]) -> tuple[Any, Any]:
    """(inputs as the net is called with them, targets) of a batch: a pair, a tuple that ends on the targets, or a dict that holds them.

    The targets of a dict are the value of its one target, a dict where it has several, or None where it has none.

    Args:
        kept: targets that stay among the inputs, too.

    Raises:
        UsageError: it is none of them.
    """
    if isinstance(found, Mapping):
        targets = {name: part for name, part in found.items() if is_target(name)}
        inputs = {name: part for name, part in found.items() if name not in targets or name in kept}
        return inputs, (next(iter(targets.values())) if len(targets) == 1 else targets or None)
    if isinstance(found, tuple | list) and len(found) > 2:
        return tuple(found[:-1]), found[-1]
    if isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], Tensor | Mapping | tuple | list):
        return found[0], found[1]
    raise UsageError(
        f"Task: a batch of {split} is {shape_of(found)}: expected (inputs, targets), the inputs a tensor, a tuple or a dict; (input, …, "
        f"targets); or a dict with its targets under `labels`."
    )
