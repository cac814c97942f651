"""Levels of a nested training: which of them a step runs, and when the layers' bases are found anew."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ranksearch.compress import RankPlan
from ranksearch.compress.nesting import Nesting
from ranksearch.training.device import clock
from ranksearch.training.train import Training


class Levels:
    """The plans of a path over one model under training, each dealt equally often; in `Session.train_` it stands where projections do."""

    kind: type[Nesting] = Nesting

    def __init__(self, model: nn.Module, path: Sequence[RankPlan], *, period: int, drawn: int, seed: int) -> None:
        """
        Args:
            path: the plans of the levels.
            period: steps between two searches for the layers' bases.
            drawn: levels of one step, all different; at most all of them.
        """
        self.path = tuple(path)
        self.nesting, self._period, self._seed = self.kind(model, path), period, seed
        self.drawn = min(drawn, len(self.path))
        self.seconds = 0.0
        self.records: list[dict[str, Any]] = []
        """Always empty: single passes leave no records."""
        self._refresh(model)

    def at(self, step: int) -> list[int]:
        """The levels of a step: dealt from a shuffled deck of all of them, so that each has its turn before any has another.

        They are the same whenever they are asked for, so a run that goes on from its state has to keep no random numbers for them.
        """
        deals = len(self.path) // self.drawn
        deck = random.Random(f"{self._seed} {step // deals}").sample(range(len(self.path)), len(self.path))
        return deck[step % deals * self.drawn :][: self.drawn]

    def passes(self, step: int) -> Iterator[float]:
        """The passes of a step, each with the weights of a level, of equal shares in the loss."""
        for level in self.at(step):
            with self.nesting.at(level):
                yield 1 / self.drawn

    def after_step(self, training: Training) -> None:
        """Finds the bases anew where that is due."""
        if training.done % self._period == 0:
            self._refresh(training.model)

    def _refresh(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        started = clock(device)
        self.nesting.refresh()
        self.seconds += clock(device) - started

    def state_dict(self) -> dict[str, Any]:
        return {"bases": self.nesting.state_dict(), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.nesting.load_state_dict(state["bases"])
        self.seconds = state["seconds"]
