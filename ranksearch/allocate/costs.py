"""A net's costs as ratios of the dense net's."""

from __future__ import annotations

from ranksearch.compress import Cost
from ranksearch.words import COST_RATIOS


def cost_ratio(objective: str, cost: Cost, dense: Cost) -> float:
    """A cost as a ratio of the dense net's, as far as it is known before a trial; latency is as predicted, 1 where it is not."""
    of_dense = {
        "macs_ratio": cost.macs / dense.macs, "params_ratio": cost.params / dense.params,
        "size_ratio": cost.size_bytes / dense.size_bytes, "latency_ratio": latency_ratio(cost, dense) or 1.0,
    }  # fmt: skip
    return of_dense[COST_RATIOS[objective]]


def latency_ratio(cost: Cost, dense: Cost) -> float | None:
    """Latency as a ratio of the dense net's; None where either is not known."""
    return cost.latency_ms / dense.latency_ms if cost.latency_ms is not None and dense.latency_ms else None
