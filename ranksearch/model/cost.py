"""Costs of a plan from its specs alone: nothing is built. 1 MAC = 2 FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import BYTES_PER_INDEX
from ranksearch.model.plan import LayerPlan, RankPlan
from ranksearch.model.trace import Layer, Net


@dataclass(frozen=True)
class Cost:
    """What a net costs: MACs per sample, parameters, bytes of its state dict, and latency where it was measured."""

    macs: int
    params: int
    size_bytes: int
    latency_ms: float | None = None


def layer_cost(layer: Layer, choice: LayerPlan) -> tuple[int, int]:
    """(MACs per sample, params) of one layer under a lowering and rank, summed over the layer's uses.

    Raises:
        UsageError: the lowering refuses the layer, or has no such rank; the text names the layer.
    """
    lowering = lowering_named(choice.lowering)
    lowering.check_rank(layer.spec, choice.rank)
    macs = layer.summed(lambda size: lowering.macs(layer.spec, choice.rank, size))
    if layer.also is not None:
        macs += layer_cost(layer.also, choice)[0]
    return macs, lowering.params(layer.spec, choice.rank) + (0 if lowering.has_rank else layer.own_params)


def layer_indices(layer: Layer, choice: LayerPlan) -> int:
    """Whole numbers that a layer stores beside its params, int32 whatever the dtype of these."""
    return lowering_named(choice.lowering).indices(layer.spec, choice.rank)


def plan_cost(net: Net, plan: RankPlan) -> Cost:
    """Cost of `net` under `plan`.

    Raises:
        UsageError: the plan names a layer that the net lacks, or a rank that the layer lacks.
    """
    for name in plan.layers:
        net[name]
    pairs = [layer_cost(layer, plan[layer.name]) for layer in net.layers]
    macs, params = net.other_macs + sum(m for m, _ in pairs), net.other_params + sum(p for _, p in pairs)
    weights = sum(own * layer.bytes_per_weight for layer, (_, own) in zip(net.layers, pairs, strict=True))
    indices = sum(layer_indices(layer, plan[layer.name]) for layer in net.layers)
    return Cost(macs, params, weights + indices * BYTES_PER_INDEX + net.other_bytes_in_all)


def dense_cost(net: Net) -> Cost:
    """Cost of `net` as it is."""
    return plan_cost(net, RankPlan())
