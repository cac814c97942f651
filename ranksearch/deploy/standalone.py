"""Nets that have left their study: kept under the plan that they came with (`save_like`), or written for another runtime (`export_alone`).

A net that was trained further is neither a trial nor a dense net; its structure is still that of its plan.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ranksearch.compress.export import save_net, unneeded
from ranksearch.deploy.exported import CHECKED_BATCHES, export_net
from ranksearch.deploy.formats import Format
from ranksearch.errors import UsageError
from ranksearch.model.plan import RankPlan
from ranksearch.places.files import new_folder_atomically
from ranksearch.places.net_files import PLAN, WEIGHTS, holds_net


def save_like(model: nn.Module, folder: Path, like: RankPlan | Path) -> Path:
    """Writes a net under the plan that it was made by, or that lies in the folder which it was loaded from; `load_net` reads it.

    Raises:
        UsageError: that folder holds no net, one of another structure, or `folder` is it.
    """
    plan = like if isinstance(like, RankPlan) else _plan_of(model, folder, like)
    if plan.model is None:
        plan = replace(plan, model=f"own:{type(model).__name__}")
    save_net(model, plan, folder)
    return folder


def _plan_of(model: nn.Module, folder: Path, like: Path) -> RankPlan:
    if not holds_net(like):
        raise UsageError(
            f"save: {like} holds no compressed net ({PLAN}, {WEIGHTS}): name the folder that the net was loaded from."
        )
    if folder.resolve() == like.resolve():
        raise UsageError(f"save: {like} holds the net that this one began as: name another folder.")
    with safe_open(like / WEIGHTS, "pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118  (no mapping)
    own = model.state_dict()
    for name, shape in shapes.items():
        if name not in own or tuple(own[name].shape) != shape:
            has = "has none" if name not in own else f"has {list(own[name].shape)}"
            raise UsageError(
                f"save: the net in {like} has a tensor {name} {list(shape)}, this one {has}: it is another net, or one whose layers are "
                f"not kept as they are stored; export it as pt2 or onnx instead."
            )
    held = {own[name].data_ptr() for name in shapes}
    if more := [name for name, tensor in own.items() if name not in shapes and tensor.data_ptr() not in held]:
        raise UsageError(f"save: this net has a tensor {more[0]} that the one in {like} has not: it is another net.")
    return RankPlan.from_json((like / PLAN).read_text(encoding="utf-8"))


def export_alone(
    model: nn.Module, example: Any, folder: Path, form: Format, *, fold_bn: bool, dense: nn.Module | None
) -> dict[str, Any]:
    """Writes a net to `folder` in a traced format, opens it again and holds it against the net; returns what was found.

    Args:
        example: a batch of one input, as the net takes it.
        dense: a net to time beside it, in the same runtime and eagerly.

    Raises:
        UsageError: the format keeps layers, `folder` holds something or cannot be written, or the net returns no tensor.
        StudyError: the exported form computes something else, or cannot be made.
    """
    if not form.traced:
        raise UsageError(
            f"export: a net by itself is written as {form.name} by ranksearch.save(net, FOLDER, like=…); export writes pt2 and onnx."
        )
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something already: name another folder (output=…).")
    with new_folder_atomically(folder) as partial:
        found = export_net(
            model, RankPlan(), example, partial, form=form, build=unneeded, fold_bn=fold_bn,
            others=[] if dense is None else [dense], dense=dense,
        )  # fmt: skip
    facts = asdict(found) | {"latency_dense_ms": found.others_ms[0] if found.others_ms else None}
    del facts["others_ms"]
    return {"folder": str(folder), "format": form.name, "checked_batches": list(CHECKED_BATCHES)} | facts
