"""Rank curves: for every layer, each lowering and rank with the energy it removes and what it costs.

One Gram `eigvalsh` per layer and lowering gives the error at every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from ranksearch.allocate.budget import Budget, check_feasible
from ranksearch.allocate.rules import LayerRules
from ranksearch.compress import DENSE, Layer, LayerPlan, Net, RankPlan, dense_cost, layer_cost
from ranksearch.compress.slots import find_slots
from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.lowering import Lowering, lowering_named
from ranksearch.lowering.contract import BYTES_PER_WEIGHT, sides
from ranksearch.pareto import nondominated


def relative_energy(removed: np.ndarray) -> np.ndarray:
    """Damage as the removed share of ||W||²."""
    return removed


def log_kept_energy(removed: np.ndarray) -> np.ndarray:
    """Damage as -log of the kept share of ||W||²: a layer that loses nearly everything costs more than its share.

    On ResNets without training it ranks plans better than the relative energy at small budgets.
    """
    return -np.log(np.clip(1 - removed, 1e-12, 1))


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log_kept_energy": log_kept_energy,
    "relative_energy": relative_energy,
}


@dataclass(frozen=True)
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
    _efficient: dict[frozenset[str] | None, np.ndarray] = field(default_factory=dict, repr=False)

    def efficient(self, lowerings: Collection[str] | None = None) -> np.ndarray:
        """Indices of the options, of `lowerings` and dense (all where None), nondominated in (removed, macs, params).

        Computed once per set of lowerings: neither a layer's weight nor a monotone measure changes what dominates.
        """
        key = None if lowerings is None else frozenset(lowerings)
        if key not in self._efficient:
            allowed = [i for i, c in enumerate(self.choices) if key is None or c.lowering in key or c == DENSE]
            table = np.stack([self.removed, self.macs, self.params], axis=1)[allowed]
            self._efficient[key] = np.array(allowed)[nondominated(table)]
        return self._efficient[key]


@dataclass(frozen=True)
class Curves:
    """The options of every layer of a net, and its fixed costs."""

    net: Net
    layers: tuple[LayerOptions, ...]

    def plan(self, picks: Mapping[str, int], model: str | None = None) -> RankPlan:
        """The plan that takes option `picks[name]` of every layer."""
        return RankPlan({o.layer.name: o.choices[picks[o.layer.name]] for o in self.layers}, model)

    def smallest(self) -> dict[str, int]:
        """The smallest reachable value of every cost, each taken alone."""
        macs = self.net.other_macs + sum(int(o.macs.min()) for o in self.layers)
        params = self.net.other_params + sum(int(o.params.min()) for o in self.layers)
        size = (params + self.net.other_floats) * BYTES_PER_WEIGHT + self.net.other_bytes
        return {"flops": 2 * macs, "macs": macs, "params": params, "size": size}


def _lowering_options(
    layer: Layer, weight: Tensor, lowering: Lowering, min_rank: int
) -> tuple[list[LayerPlan], np.ndarray]:
    """The ranks of one lowering that are cheaper than dense in MACs or params, and [4, n]: removed, residual, macs, params."""
    dense_macs, dense_params = layer_cost(layer, DENSE)
    even = [lowering.break_even_rank(layer.spec, cost, layer.in_sizes[0]) for cost in ("macs", "params")]
    if max(max(sides(rank)) for rank in even) < min_rank:
        return [], np.zeros((4, 0))
    curve = lowering.curve(weight, layer.spec)
    choices, columns = [], []
    for rank, removed, residual in zip(curve.ranks, curve.removed, curve.residual, strict=True):
        choice = LayerPlan(lowering.name, rank)
        macs, params = layer_cost(layer, choice)
        if min(sides(rank)) >= min_rank and (macs < dense_macs or params < dense_params):
            choices.append(choice)
            columns.append((removed, residual, macs, params))
    return choices, np.array(columns).reshape(-1, 4).T


def rank_curves(model: nn.Module, net: Net, rules: LayerRules) -> Curves:
    """Options of every layer of `net` under `rules`, from the weights of `model`.

    Raises:
        UsageError: the rules leave no layer that could be lowered.
        NonFiniteError: a weight is not finite; the text names the layer.
    """
    layers, slots = [], find_slots(model)
    for layer in net.layers:
        rule = rules.for_layer(layer.name)
        macs, params = layer_cost(layer, DENSE)
        choices, tables = [DENSE], [np.array([[0.0], [0.0], [macs], [params]])]
        weight = slots[layer.name].weight.detach()
        for lowering in map(lowering_named, rule.lowerings or ()):
            if lowering.has_rank and lowering.supports(layer.spec):
                try:
                    more, table = _lowering_options(layer, weight, lowering, rule.min_rank or 1)
                except NonFiniteError as error:
                    raise NonFiniteError(f"Layer {layer.name!r}: {error}") from error
                choices += more
                tables.append(table)
        removed, residual, layer_macs, layer_params = np.concatenate(tables, axis=1)
        macs_int, params_int = layer_macs.astype(np.int64), layer_params.astype(np.int64)
        layers.append(LayerOptions(layer, tuple(choices), removed, residual, macs_int, params_int))
    if all(len(options.choices) == 1 for options in layers):
        raise UsageError("The layer rules leave no layer to lower: check layers.include, exclude and lowerings.")
    return Curves(net, tuple(layers))


def limits_of(curves: Curves, budgets: Iterable[Budget]) -> np.ndarray:
    """Budgets as limits on (MACs, params) of the layers alone: [2], infinite where nothing limits.

    Raises:
        UsageError: a budget is below the smallest reachable cost.
    """
    budgets, net, dense = list(budgets), curves.net, dense_cost(curves.net)
    check_feasible(budgets, curves.smallest(), dense)
    limits = np.array([np.inf, np.inf])
    for budget in budgets:
        limit = budget.limit(dense)
        if budget.cost == "size":
            limit = (limit - net.other_bytes) // BYTES_PER_WEIGHT - net.other_floats
        axis, value = {
            "flops": (0, limit // 2 - net.other_macs),
            "macs": (0, limit - net.other_macs),
            "params": (1, limit - net.other_params),
            "size": (1, limit - net.other_params),
        }[budget.cost]
        limits[axis] = min(limits[axis], value)
    return limits
