"""A compressed net on disk: `plan.json` beside `model.safetensors`. No pickle, so a stranger's file executes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from ranksearch.compress.plan import RankPlan
from ranksearch.compress.surgery import restructure_
from ranksearch.errors import UsageError
from ranksearch.files import write_atomically
from ranksearch.lowering.tiled import settle_

WEIGHTS, PLAN = "model.safetensors", "plan.json"


def save_net(model: nn.Module, plan: RankPlan, directory: Path) -> None:
    """Writes the state dict and the plan that rebuilds the architecture; neither file is ever half written.

    A tensor that several layers share is written once.
    """
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{WEIGHTS}.partial"
    safetensors.torch.save_model(model, str(partial))
    partial.replace(directory / WEIGHTS)
    write_atomically(directory / PLAN, plan.to_json())


def load_net(directory: Path, build: Callable[[str], nn.Module]) -> nn.Module:
    """The net that `save_net` wrote, in evaluation mode; `build` makes the dense model of the plan's name.

    Layers that are stored as factors but have no layers of that form (`tiled_64` and its like) are rebuilt to dense ones.

    Raises:
        UsageError: a file is missing or damaged, or its tensors do not fit the plan.
    """
    for name in (PLAN, WEIGHTS):
        if not (directory / name).is_file():
            raise UsageError(f"{directory} holds no compressed net: {name} is missing.")
    plan = RankPlan.from_json((directory / PLAN).read_text())
    if plan.model is None:
        raise UsageError(f"{directory / PLAN} does not name its model, so the dense architecture is unknown.")
    model = restructure_(build(plan.model), plan)
    try:
        safetensors.torch.load_model(model, directory / WEIGHTS)
    except (SafetensorError, RuntimeError, json.JSONDecodeError) as error:
        raise UsageError(f"{directory / WEIGHTS} does not fit {PLAN}: {error}") from error
    return settle_(model).eval()
