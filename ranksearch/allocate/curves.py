"""Rank curves: for every layer, each lowering and rank with the energy it removes and what it costs.

They are values here; `curve_making.py` makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ranksearch.allocate.budget import Budget, check_feasible
from ranksearch.compress import DENSE, Cost, Layer, LayerPlan, Net, RankPlan, dense_cost, plan_cost
from ranksearch.costs import BYTES_PER_INDEX, COSTS, NANOSECONDS, NS_PER_MS
from ranksearch.errors import UsageError
from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import Spectrum
from ranksearch.model.cost import layer_indices


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """Every way one layer can be; option 0 is dense. Arrays are [n options]."""

    layer: Layer
    choices: tuple[LayerPlan, ...]
    removed: np.ndarray
    """Share of ||W||² removed."""
    residual: np.ndarray
    """Relative operator-norm error sigma_{r+1} / sigma_1."""
    macs: np.ndarray
    params: np.ndarray
    spectra: Mapping[str, tuple[Spectrum, ...]]
    """Lowering -> the whole spectra of the matrices that it cuts, one per side of its rank; without the lowerings that cut none."""
    rank_multiple: int = 1
    latency: np.ndarray | None = None
    """Nanoseconds inside the net, where a latency table is at hand."""

    def of_lowering(self, name: str) -> list[int]:
        """The options of one lowering."""
        return [i for i, choice in enumerate(self.choices) if choice.lowering == name]

    def ladder(self, name: str) -> list[int]:
        """The options of one lowering whose ranks are of a common ratio, smallest first.

        A layer that refuses the lowering has the ladder of its own first one; a layer that may take none stays dense.
        """
        mine = self.of_lowering(name) or self.of_lowering(self.choices[min(1, len(self.choices) - 1)].lowering)
        lowering = lowering_named(self.choices[mine[0]].lowering)
        if not lowering.has_rank:
            return mine
        ranks = set(lowering.ladder(self.layer.spec, self.rank_multiple))
        return [i for i in mine if self.choices[i].rank in ranks] or mine

    @property
    def lowerings(self) -> tuple[str, ...]:
        """The lowerings that this layer may take besides dense."""
        return tuple(dict.fromkeys(choice.lowering for choice in self.choices[1:]))


@dataclass(frozen=True, eq=False)
class CurveRow:
    """Layers that are chosen for together: one by itself, or a group that takes one lowering at one ratio."""

    members: tuple[LayerOptions, ...]
    picks: np.ndarray
    """[n options, members]: which option of each member"""

    def total(self, values: Iterable[np.ndarray]) -> np.ndarray:
        """Sum over the members of their `values` [n options of the member] -> [n options of the row]"""
        columns = [value[self.picks[:, i]] for i, value in enumerate(values)]
        return np.sum(columns, axis=0)

    @cached_property
    def costs(self) -> np.ndarray:
        """[3, n options]: MACs, params, nanoseconds (0 where they are not known)."""
        columns = [[m.macs, m.params, np.zeros_like(m.macs) if m.latency is None else m.latency] for m in self.members]
        return np.stack([self.total(column) for column in zip(*columns, strict=True)])

    def allowed(self, lowerings: Mapping[str, Iterable[str]]) -> np.ndarray:
        """[n options]: whether every member takes one of its `lowerings` (any, where it is not named) or stays dense."""
        fine = np.ones(len(self.picks), dtype=bool)
        for i, member in enumerate(self.members):
            if member.layer.name in lowerings:
                names = {*lowerings[member.layer.name], DENSE.lowering}
                fine &= np.array([choice.lowering in names for choice in member.choices])[self.picks[:, i]]
        return fine


def _single(options: LayerOptions) -> CurveRow:
    return CurveRow((options,), np.arange(len(options.choices))[:, None])


def _group(members: tuple[LayerOptions, ...]) -> CurveRow:
    """Every lowering at every ratio of its largest useful rank, the same for all members, and all of them dense."""
    rows = [(0,) * len(members)]
    for name in dict.fromkeys(name for member in members for name in member.lowerings):
        ladders = [member.ladder(name) for member in members]
        steps = max(map(len, ladders))
        for step in range(steps):
            ratio = step / max(steps - 1, 1)
            rows.append(tuple(ladder[int(ratio * (len(ladder) - 1))] for ladder in ladders))
    return CurveRow(members, np.array(list(dict.fromkeys(rows))))


@dataclass(frozen=True)
class Timing:
    """A whole net's time in nanoseconds, and how single layers' times become shares of it."""

    dense_ns: int
    """Measured."""
    other_ns: int
    """What no layer's option changes; negative where layers by themselves are slower than in a net that the runtime fuses."""
    factors: tuple[float, float]
    """Factors on the times of layers by themselves, dense ones and chains; the options' times contain them already."""


@dataclass(frozen=True, eq=False)
class Curves:
    """The options of every layer of a net, which layers share a ratio, and the net's fixed costs."""

    net: Net
    layers: tuple[LayerOptions, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    """Names of layers that take one lowering at one ratio; others are free."""
    timing: Timing | None = None
    """Where a latency table is at hand."""

    @cached_property
    def rows(self) -> tuple[CurveRow, ...]:
        """What there is to decide, in the order of the layers."""
        group_of = {name: group for group in self.groups for name in group}
        named = {options.layer.name: options for options in self.layers}
        rows = []
        for name, options in named.items():
            group = group_of.get(name, (name,))
            if name == group[0]:
                rows.append(_single(options) if len(group) == 1 else _group(tuple(named[n] for n in group)))
        return tuple(rows)

    def tied(self, picks: Mapping[str, int]) -> dict[str, int]:
        """The options `picks`, those of every group replaced by the group's largest that costs no more MACs and params."""
        tied = dict(picks)
        for row in self.rows:
            if len(row.members) == 1:
                continue
            chosen = [(member, tied[member.layer.name]) for member in row.members]
            most = [sum(int(m.macs[i]) for m, i in chosen), sum(int(m.params[i]) for m, i in chosen)]
            fits = np.flatnonzero((most >= row.costs[:2].T).all(axis=1))
            removed = row.total(member.removed for member in row.members)
            best = fits[np.argmin(removed[fits])] if len(fits) else np.lexsort(row.costs[1::-1])[0]
            tied |= {
                member.layer.name: int(option) for member, option in zip(row.members, row.picks[best], strict=True)
            }
        return tied

    def plan(self, picks: Mapping[str, int], model: str | None = None, gap: float | None = None) -> RankPlan:
        """The plan that takes option `picks[name]` of every layer."""
        return RankPlan({o.layer.name: o.choices[picks[o.layer.name]] for o in self.layers}, model, gap)

    def value(self, cost: str, layers: int) -> int:
        """The whole net's cost where its layers have `layers` MACs, params or nanoseconds, whichever the cost counts."""
        return self.per_unit(cost) * layers + self.fixed(cost)

    def per_unit(self, cost: str) -> int:
        """A cost's own units for each MAC, param or nanosecond of the layers: bytes of a size by the dtype of the layers."""
        return self.net.bytes_per_weight if cost == "size" else COSTS[cost].per_unit

    def fixed(self, cost: str) -> int:
        """What no plan changes of a cost, in its own unit: layers that cannot be lowered, buffers, the time between layers."""
        kind = COSTS[cost]
        if kind.axis == NANOSECONDS:
            assert self.timing is not None
            return self.timing.other_ns
        if cost == "size":
            return self.net.other_bytes_in_all + BYTES_PER_INDEX * self.indices
        layers = sum((layer.macs, layer.params)[kind.axis] for layer in self.net.layers)
        return (kind.of(self.dense) or 0) - kind.per_unit * layers

    @cached_property
    def indices(self) -> int:
        """The most whole numbers that the layers' options store beside their params; a size budget leaves room for them all."""
        return sum(max(layer_indices(o.layer, choice) for choice in o.choices) for o in self.layers)

    def smallest(self) -> dict[str, int]:
        """The smallest reachable value of every cost, each taken alone."""
        least = [sum(int(row.costs[axis].min()) for row in self.rows) for axis in range(3)]
        known = {name: kind.axis for name, kind in COSTS.items() if kind.axis != NANOSECONDS or self.timing is not None}
        return {cost: self.value(cost, least[axis]) for cost, axis in known.items()}

    @cached_property
    def dense(self) -> Cost:
        """Cost of the net as it is; its latency, where it is known, as measured."""
        latency = None if self.timing is None else self.timing.dense_ns / NS_PER_MS
        return replace(dense_cost(self.net), latency_ms=latency)

    def cost(self, plan: RankPlan) -> Cost:
        """Cost of the net under `plan`; its latency, where a table is at hand, as predicted.

        Raises:
            UsageError: the plan names a layer that the net lacks, or a rank that the layer lacks.
        """
        counted = plan_cost(self.net, plan)
        if self.timing is None:
            return counted
        taken = self.timing.other_ns
        for options in self.layers:
            choice, name = plan[options.layer.name], options.layer.name
            if choice not in options.choices or options.latency is None:
                raise UsageError(
                    f"The latency table has no {choice.lowering} at rank {choice.rank} for layer {name!r}: the layer rules do not allow it."
                )
            taken += int(options.latency[options.choices.index(choice)])
        return replace(counted, latency_ms=taken / NS_PER_MS)


def limits_of(curves: Curves, budgets: Iterable[Budget]) -> np.ndarray:
    """Budgets as limits on (MACs, params, nanoseconds) of the layers alone: [3], infinite where nothing limits.

    Raises:
        UsageError: a budget is below the smallest reachable cost, or on a latency that was not measured.
    """
    budgets, dense = list(budgets), curves.dense
    check_feasible(budgets, curves.smallest(), dense)
    limits = np.full(3, np.inf)
    for budget in budgets:
        kind = COSTS[budget.cost]
        layers = (budget.limit(dense) - curves.fixed(budget.cost)) // curves.per_unit(budget.cost)
        limits[kind.axis] = min(limits[kind.axis], layers)
    return limits
