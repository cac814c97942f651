"""The costs of a net, one entry each: what it is called, written, measured and counted by. Everything else about a cost follows from it.

Every cost is `per_unit` times a count that the solver adds up over layers (MACs, params or nanoseconds), and a part that no plan changes.
A cost that is added here can be a budget and is allocated under; `of` is what measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

BYTES_PER_WEIGHT = 4
"""Bytes of a weight in float32; for another dtype see `Layer.bytes_per_weight`."""
BYTES_PER_INDEX = 4
"""Bytes of a stored whole number, int32."""
MACS, PARAMS, NANOSECONDS = 0, 1, 2
"""What the solver counts in every layer, in the order of its axes."""
NS_PER_MS = 1_000_000
"""Latency is counted in whole nanoseconds, so that a budget is kept exactly."""
_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_BYTES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class HasCosts(Protocol):
    """What a net costs, as `compress.Cost` has it; that class is not imported here, because this table loads no torch."""

    @property
    def macs(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def latency_ms(self) -> float | None: ...


@dataclass(frozen=True)
class CostKind:
    """One cost: how it is named, read, written and counted."""

    label: str
    """For a heading or an axis."""
    ratio: str
    """The field of a trial's row that holds it as a ratio of the dense net's."""
    of: Callable[[HasCosts], int | None]
    """Its value in whole units; None where it was not measured."""
    axis: int
    """Which of the solver's counts it is made of."""
    per_unit: int
    """Its own units per unit of that count."""
    units: Mapping[str, int]
    """Unit as a budget writes it -> its own units."""
    example: str
    """Budgets as one would write them."""
    written: Callable[[int], str] = "{:,}".format
    """A value in words, rounded up, so that a budget of it is met."""
    unmeasured: str = ""
    """What to do where it was not measured."""


COSTS: dict[str, CostKind] = {
    "flops": CostKind("FLOPs", "macs_ratio", lambda cost: 2 * cost.macs, MACS, 2, _COUNTS, "50% or 40M"),
    "macs": CostKind("MACs", "macs_ratio", lambda cost: cost.macs, MACS, 1, _COUNTS, "50% or 20M"),
    "params": CostKind("params", "params_ratio", lambda cost: cost.params, PARAMS, 1, _COUNTS, "50% or 130k"),
    "size": CostKind("size", "size_ratio", lambda cost: cost.size_bytes, PARAMS, BYTES_PER_WEIGHT, _BYTES, "50% or 1.2MiB"),
    "latency": CostKind(
        "latency", "latency_ratio", lambda cost: None if cost.latency_ms is None else round(cost.latency_ms * NS_PER_MS),
        NANOSECONDS, 1, {"us": 10**3, "ms": 10**6, "s": 10**9}, "70% or 3.5ms",
        written=lambda value: f"{-(-value // 1000) / 1000:,.3f} ms",
        unmeasured="say in `latency` with which runtime, batch and threads to measure it",
    ),
}  # fmt: skip
"""Name in budgets and objectives -> the cost."""


def same_cost(name: str, other: str) -> bool:
    """Whether two names mean one cost, as MACs and FLOPs do."""
    return COSTS[name].ratio == COSTS[other].ratio


def ratio_of(name: str, cost: HasCosts, dense: HasCosts) -> float | None:
    """A cost as a ratio of the dense net's; None where either is not known."""
    own, full = COSTS[name].of(cost), COSTS[name].of(dense)
    return own / full if own is not None and full else None


def cost_ratio(objective: str, cost: HasCosts, dense: HasCosts) -> float:
    """A cost as a ratio of the dense net's, as far as it is known before a trial; 1 where it is not."""
    found = ratio_of(objective, cost, dense)
    return 1.0 if found is None else found
