"""BN re-estimation: fresh statistics after a decomposition, before anything is scored.

Right after a decomposition the running statistics belong to other activations and accuracy is near chance; at 3x it goes from
.13 to .85 with new ones. Reset and cumulative average: the default exponential average recovers much less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranksearch.lowering.pivoted_layers import merged_pivots
from ranksearch.model.inputs import call
from ranksearch.model.undisturbed import own, undisturbed


@torch.no_grad()
@merged_pivots(kept=True)
def reestimate_bn_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Averages the statistics of every BN layer anew over `batches` of inputs as the model takes them; returns the number used.

    Only BN layers run in training mode (dropout stays off); everything else of the model stays as it was. BN layers that no batch
    reaches keep their statistics, all keep them where anything is raised. A net without BN is left alone.

    Raises:
        ValueError: there are BN layers and `batches` is empty.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    used, calls = 0, Counter[nn.Module]()

    def before_call(norm: Any, args: Any) -> None:
        # a cumulative average: momentum=None is the same, and reads the count of batches back from a GPU at every call
        calls[norm] += 1
        norm.momentum = 1.0 / calls[norm]

    with undisturbed(model):
        hooks = [norm.register_forward_pre_hook(before_call) for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.training = True
            for batch in batches:
                call(model, own(batch))
                used += 1
        finally:
            for hook in hooks:
                hook.remove()
        fresh = {norm: {name: b.clone() for name, b in norm._buffers.items() if b is not None} for norm in calls}
    if used == 0:
        raise ValueError("BN re-estimation needs at least one batch")
    for module, numbers in fresh.items():
        for name, buffer in numbers.items():
            module.get_buffer(name).copy_(buffer)
    return used
