"""`RankPlan`: layer name -> (lowering, rank). JSON; with the model's name it rebuilds the architecture."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ranksearch.errors import UsageError
from ranksearch.lowering import LOWERINGS, Rank, lowering_named


@dataclass(frozen=True)
class LayerPlan:
    """One layer's lowering and rank (an int >= 1, a tuple of them for a format with several; 0 for `dense`)."""

    lowering: str
    rank: Rank


DENSE = LayerPlan("dense", 0)


@dataclass(frozen=True)
class RankPlan:
    """What every low-rank layer of a net becomes; a layer that is not named stays dense."""

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    model: str | None = None
    gap: float | None = field(default=None, compare=False)
    """How far a solver's plan may be from the optimum: its predicted damage is at most this share of itself above the least possible."""

    example_input: Any = field(default=None, compare=False, repr=False)
    """The input that `allocate` was given, on which `compress` checks the compressed net. It is not written to files."""

    def __getitem__(self, name: str) -> LayerPlan:
        return self.layers.get(name, DENSE)

    def lowered(self) -> Iterator[tuple[str, LayerPlan]]:
        """(name, plan) of the layers that do not stay dense."""
        return ((name, layer) for name, layer in self.layers.items() if layer.lowering != DENSE.lowering)

    def summary(self) -> str:
        """One short line: how many layers take which lowering, such as `spatial 12 · im2col 3 · dense 4`."""
        counts = Counter(layer.lowering for layer in self.layers.values())
        return " · ".join(f"{name} {count}" for name, count in counts.most_common()) or "dense"

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds, and equal to what is read back from it: a rank with several sides is a list."""
        layers: dict[str, dict[str, Any]] = {}
        for name, layer in self.layers.items():
            rank = list(layer.rank) if isinstance(layer.rank, tuple) else layer.rank
            layers[name] = {"lowering": layer.lowering} | ({"rank": rank} if rank else {})
        gap = {} if self.gap is None else {"gap": self.gap}
        return {"format": 1, "model": self.model, **gap, "layers": layers}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def digest(self) -> str:
        """Content hash of lowerings and ranks, by which equal plans are recognised."""
        lowered = sorted((name, layer.lowering, layer.rank) for name, layer in self.lowered())
        return hashlib.sha256(json.dumps(lowered).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: Any) -> RankPlan:
        """Reads what `to_dict` writes.

        Raises:
            UsageError: not a plan, an unknown lowering, a rank that is no whole number >= 1, or a model that is no name.
        """
        if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
            raise UsageError('This is not a rank plan: it needs {"layers": {name: {"lowering": ..., "rank": ...}}}.')
        layers = {}
        for name, entry in data["layers"].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("lowering"), str):
                raise UsageError(f'Plan, layer {name!r}: expected {{"lowering": ..., "rank": ...}}, got {entry!r}.')
            lowering, rank = lowering_named(entry["lowering"]).name, entry.get("rank", 0)
            layers[name] = LayerPlan(lowering, _read_rank(rank, f"Plan, layer {name!r}: {lowering}", lowering))
        gap = data.get("gap")
        if gap is not None and not (isinstance(gap, float | int) and gap >= 0):
            raise UsageError(f"Plan: gap is a share >= 0, got {gap!r}.")
        model = data.get("model")
        if not isinstance(model, str | None):
            raise UsageError(f"Plan: model is a name such as cifar10/resnet20, got {model!r}.")
        return cls(layers, model, gap)

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, too
            raise UsageError(f"This is not a rank plan: no JSON ({error}).") from error
        return cls.from_dict(data)


def _read_rank(rank: Any, where: str, lowering: str) -> Rank:
    """A rank as JSON has it: a whole number, a list of them for a format with several sides, none for `dense`."""
    numbers = rank if isinstance(rank, list) and rank else [rank]
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if not whole or (rank != 0 if not LOWERINGS[lowering].has_rank else min(numbers) < 1):
        raise UsageError(f"{where} at rank {rank!r}; a rank is a whole number >= 1, or a list of them.")
    return tuple(rank) if isinstance(rank, list) else rank
