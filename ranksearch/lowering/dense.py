"""`dense`: the layer as it is. A plan may always choose it, so a plan is never worse than leaving a layer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ranksearch.lowering.contract import Lowering, Projected, Rank, RankCurve, register
from ranksearch.lowering.spec import LayerSpec


@register
class Dense(Lowering):
    """The identity: one layer, rank 0, nothing removed."""

    name = "dense"
    is_projection = True
    has_rank = False

    def refusal(self, spec: LayerSpec) -> str | None:
        return None

    def full_rank(self, spec: LayerSpec) -> int:
        return 0

    def factor_specs(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        return (spec,)

    def decompose(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> tuple[Tensor, ...]:
        self.check_rank(spec, rank)
        return (weight.clone(),)

    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        (weight,) = factors
        return weight

    def ranks(self, spec: LayerSpec, multiple: int = 1) -> tuple[Rank, ...]:
        return (0,)

    def curve(self, weight: Tensor, spec: LayerSpec, multiple: int = 1) -> RankCurve:
        return RankCurve((0,), np.zeros(1), np.zeros(1))

    def project(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> Projected:
        self.check_rank(spec, rank)
        return Projected(weight, 0.0, None)
