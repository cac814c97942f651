"""`Kept`: the best net of a trial so far. It need not be the last one: a small data set is learnt by heart, a rate may be too high.

Candidates are the dense net decomposed as it is, what rungs score, what each phase ends with, and, where a moving average takes the place
of the weights, those too. The validation metric decides; between equals the loss, and then the later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ranksearch.training.evaluate import Evaluation


@dataclass(frozen=True, eq=False)
class Kept:
    """A candidate, its score on the validation set, and its weights as they were then."""

    phase: str
    step: int
    val_accuracy: float
    val_loss: float
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, phase: str, step: int, found: Evaluation, model: nn.Module) -> Kept:
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return cls(phase, step, found.accuracy, found.loss, weights)

    def gives_way_to(self, found: Evaluation, direction: str) -> bool:
        """Whether a later candidate that scored `found` is at least as good; `direction` is that of the task's metric."""
        return not Evaluation(self.val_accuracy, self.val_loss).is_above(found, direction)

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"phase": self.phase, "step": self.step}

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**vars(self), "weights": dict(self.weights)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Kept | None:
        """Reads what `to_state` made; None where a checkpoint holds none."""
        return None if state is None else cls(**state)
