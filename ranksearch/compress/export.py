"""A compressed net on disk: `plan.json` beside `model.safetensors`. No pickle, so a stranger's file executes nothing.

What other runtimes read is written by `formats.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from ranksearch.compress.surgery import restructure_
from ranksearch.errors import UsageError
from ranksearch.lowering.tiled import settle_
from ranksearch.model.plan import RankPlan
from ranksearch.places.files import make_folder, partly_written, write_durably
from ranksearch.places.net_files import PLAN, WEIGHTS

Build = Callable[[str], nn.Module]
"""Makes the untrained dense model that a plan's `model` names."""


def unneeded(name: str) -> nn.Module:
    """The `Build` of a format that holds what a net computes: nothing asks it for an architecture."""
    raise NotImplementedError(name)


def save_net(model: nn.Module, plan: RankPlan, directory: Path) -> None:
    """Writes the state dict and the plan that rebuilds the architecture; neither file is ever half written, and both are on the disk.

    A tensor that several layers share is written once.
    """
    make_folder(directory)
    with partly_written(directory / WEIGHTS) as partial:
        safetensors.torch.save_model(model, str(partial))
    write_durably(directory / PLAN, plan.to_json())


def load_net(directory: Path, build: Build) -> nn.Module:
    """The net that `save_net` wrote, in evaluation mode; `build` makes the dense model of the plan's name.

    Layers that are stored as factors but have no layers of that form (`tiled_64` and its like) are rebuilt to dense ones.

    Raises:
        UsageError: a file is missing or damaged, or its tensors do not fit the plan.
    """
    return settle_(load_stored_net(directory, build)[0])


def load_stored_net(directory: Path, build: Build) -> tuple[nn.Module, RankPlan]:
    """The same net in the form that it is stored in, which `save_net` takes, and its plan.

    Raises:
        UsageError: as `load_net`.
    """
    for name in (PLAN, WEIGHTS):
        if not (directory / name).is_file():
            raise UsageError(f"{directory} holds no compressed net: {name} is missing.")
    try:
        plan = RankPlan.from_json((directory / PLAN).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{directory / PLAN} is not a rank plan: it is no text ({error}).") from error
    except OSError as error:
        raise UsageError(f"{directory / PLAN} cannot be read ({error.strerror or error}).") from error
    if plan.model is None:
        raise UsageError(f"{directory / PLAN} does not name its model, so the dense architecture is unknown.")
    model = restructure_(build(plan.model), plan)
    try:
        safetensors.torch.load_model(model, directory / WEIGHTS)
    except (SafetensorError, RuntimeError, OSError, json.JSONDecodeError) as error:
        first, *more = [line.strip() for line in str(error).splitlines() if not line.startswith("Error(s) in")]
        others = f" (and {len(more)} more)" if more else ""
        raise UsageError(f"{directory / WEIGHTS} does not fit {PLAN}: {first}{others}") from error
    return model.eval(), plan
