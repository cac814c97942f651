"""The order in which training samples are seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Batches:
    """Endless shuffled index batches [batch_size]; every epoch is a new order, its ragged end is dropped.

    Its place can be saved and taken up again; the generator's state belongs to whoever made the generator.
    """

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        self._count, self._size, self._generator = count, min(batch_size, count), generator
        self._order = torch.empty(0, dtype=torch.int64, device=generator.device)
        self._next = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._next + self._size > len(self._order):
            self._order = torch.randperm(self._count, generator=self._generator, device=self._generator.device)
            self._next = 0
        self._next += self._size
        return self._order[self._next - self._size : self._next]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order, self._next = state["order"].to(self._generator.device), state["next"]
