"""Projection: overwriting dense weights by their low-rank approximations, in place.

Reference: the weight distortion of Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145.
"""

from __future__ import annotations

import torch
from torch import nn

from ranksearch.compress.plan import RankPlan
from ranksearch.compress.surgery import lowerable_module
from ranksearch.errors import NonFiniteError
from ranksearch.lowering import lowering_named


@torch.no_grad()
def project_(model: nn.Module, plan: RankPlan) -> dict[str, float]:
    """Projects the layers of `plan` in place; call it beside `optimizer.step()` every `period` steps.

    Returns:
        Layer name -> share of its ||W||² that was removed (0 where the weight had the rank already).

    Raises:
        UsageError: a layer that is not there, a rank outside its range.
        NonFiniteError: weights that are not finite; the text names the layer.
    """
    removed = {}
    for name, choice in plan.lowered():
        module, spec = lowerable_module(model, name)
        try:
            projected, share = lowering_named(choice.lowering).project(module.weight, choice.rank, spec)
        except NonFiniteError as error:
            raise NonFiniteError(f"Layer {name!r}: {error}") from error
        module.weight.copy_(projected)
        removed[name] = share
    return removed
