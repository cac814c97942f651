"""The model itself: what is inside of wrappers, and a sentence for what is no net of layers any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ranksearch.errors import UsageError

COMPILED = "_orig_mod"
"""Where torch.compile keeps the module that it wraps."""


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """(the model inside DDP, DataParallel and torch.compile; the process group of its replicas, or None)"""
    replicas = None
    while True:
        if isinstance(model, DistributedDataParallel):
            model, replicas = model.module, model.process_group
        elif isinstance(model, DataParallel):
            model = model.module
        elif COMPILED in getattr(model, "_modules", {}):
            model = model._modules[COMPILED]  # type: ignore[assignment]
        else:
            return model, replicas


def bare(model: Any) -> nn.Module:
    """The model without DDP, DataParallel and torch.compile around it.

    Raises:
        UsageError: it is no module, or has no layers that could be replaced: scripted, exported, or without numbers (on the meta device).
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = " Give the module that it was exported from." if isinstance(model, torch.export.ExportedProgram) else ""
        raise UsageError(f"The model is a torch.nn.Module, got a {kind}.{hint}")
    model = unwrapped(model)[0]
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "The model is scripted (TorchScript): its layers cannot be replaced. Give the nn.Module that it was made from."
        )
    if isinstance(model, torch.fx.GraphModule):
        raise UsageError(
            "The model is an exported graph (torch.export, torch.fx), whose layers are operators: give the nn.Module that it was made from."
        )
    meta = next((name for name, p in model.named_parameters() if p.is_meta and not is_lazy(p)), None)
    if meta is not None:
        raise UsageError(
            f"The model's {meta!r} is on the meta device, which holds no numbers: load its weights first (model.to_empty)."
        )
    return model


def is_lazy(tensor: Any) -> bool:
    """Whether it is a lazy layer's parameter or buffer that no input has given a shape yet."""
    return isinstance(tensor, Tensor) and torch.nn.parameter.is_lazy(tensor)
