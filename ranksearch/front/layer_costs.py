"""Where a net's MACs are, layer by layer: the dense net's, and what a plan keeps of them. Only `study.json` is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ranksearch.compress import Layer, RankPlan, layer_cost
from ranksearch.lowering import LayerSpec
from ranksearch.lowering.contract import sides


@dataclass(frozen=True)
class LayerCost:
    """One layer under a plan; MACs of one sample, over all its uses."""

    name: str
    shape: tuple[int, ...]
    """The shape of the dense weight."""
    macs: int
    kept_macs: int
    params: int
    kept_params: int
    becomes: str
    """The lowering and rank, such as `im2col 14`, or `dense`."""
    dense_ms: float | None
    """Milliseconds of the dense layer on its own, over all its uses, if they were measured."""
    kept_ms: float | None
    """The same for what the layer becomes."""


def layer_records(layers: Sequence[Layer], dense_ms: Mapping[str, float]) -> list[dict[str, Any]]:
    """What `study.json` keeps of the layers: enough to count each of them under any plan, without the net."""
    return [
        {
            "name": layer.name,
            "spec": asdict(layer.spec),
            "in_sizes": layer.in_sizes,
            "samples": layer.samples,
            "batch": layer.batch,
            "dense_ms": dense_ms.get(layer.name),
        }
        for layer in layers
    ]


def layer_costs(
    records: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], times: Mapping[str, Any] | None = None, trial: int | None = None
) -> list[LayerCost]:  # fmt: skip
    """Every layer of the net under a plan (its dictionary), in the net's order.

    Args:
        times: the study's `layer_ms` (`study/latency.py`), from which those of `trial` are taken.
    """
    chosen, found = RankPlan.from_dict(plan), []
    dense_ms = (times or {}).get("dense", {})
    kept_ms = (times or {}).get("trials", {}).get(str(trial), {})
    for record in records:
        layer = layer_of(record)
        choice = chosen[layer.name]
        kept_macs, kept_params = layer_cost(layer, choice)
        rank = "·".join(map(str, sides(choice.rank))) if choice.rank else ""
        becomes, spec = f"{choice.lowering} {rank}".strip(), layer.spec
        costs = (layer.macs, kept_macs, spec.params, kept_params)
        ms = (dense_ms.get(layer.name, record.get("dense_ms")), kept_ms.get(layer.name))
        found.append(LayerCost(layer.name, spec.weight_shape, *costs, becomes, *ms))
    return found


def layer_of(record: Mapping[str, Any]) -> Layer:
    """The layer that `layer_records` recorded; what an older study does not say of it has its default."""
    known = record["spec"]
    given: dict[str, Any] = {field.name: known[field.name] for field in fields(LayerSpec) if field.name in known}
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    sizes, samples = tuple(tuple(size) for size in record["in_sizes"]), tuple(record["samples"])
    return Layer(record["name"], LayerSpec(**given), sizes, samples=samples, batch=record["batch"])
