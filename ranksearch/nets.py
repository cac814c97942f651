"""Nets that leave a study, and come back: `load`, `save`, `export`, `plan_file_to`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ranksearch.allocate.budget import Budgets, assignments
from ranksearch.compress import RankPlan, load_net
from ranksearch.compress.export import load_stored_net
from ranksearch.compress.whole import check_rebuilt
from ranksearch.deploy.exported import check_fold
from ranksearch.deploy.formats import format_named
from ranksearch.deploy.plan_to import plan_to
from ranksearch.deploy.standalone import export_alone, save_like
from ranksearch.errors import UsageError
from ranksearch.lowering.tiled import settle_
from ranksearch.places.net_files import PLAN
from ranksearch.run_study import Observer, Silent
from ranksearch.space.quality import Limits
from ranksearch.space.starter import imported_net
from ranksearch.store.folder import study_around
from ranksearch.store.where import find_study
from ranksearch.study.export_trial import export_cut, export_trial, name_at, pick_trial, target_folder
from ranksearch.study.making import read_folder
from ranksearch.study.study import Study
from ranksearch.tasks import build_reference


def load(folder: str | Path, *, build: Callable[[], nn.Module] | str | None = None, trust: bool = False) -> nn.Module:
    """The compressed net of a trial's folder (`plan.json`, `model.safetensors`), in evaluation mode. Runs no pickle.

    A plan that names one of our models is enough to build it. A net of a task of your own, whose `folder` lies within its study's, is built
    by the study's copy of your file if you started a study with that file, and is checked as a whole. No file runs merely because a folder
    holds it.

    Args:
        build: a function that makes the dense net, with any weights, or where to import one from, such as "package.module:make_net";
            needed for a net of your own away from its study, or of somebody else's.
        trust: whether to run the task file that came with the folder, whoever wrote it.

    Raises:
        UsageError: a file is missing, damaged or does not fit, the dense net is unknown, or its task file is not trusted: pass `build`.
    """
    if not isinstance(folder, str | Path):
        raise UsageError(
            f"load takes the folder of a trial or an export, such as runs/NAME/trials/007, got a {type(folder).__name__}."
        )
    folder = Path(folder)
    if build is not None:
        make = partial(imported_net, build) if isinstance(build, str) else build
        return load_net(folder, lambda reference: make())
    study = study_around(folder)
    if study is None:
        return load_net(folder, build_reference)
    space = read_folder(study, trust=trust)[0]
    net, plan = load_stored_net(folder, space.build)
    net = settle_(net)
    check_rebuilt(net, plan, space.build(plan.model or ""), space.kind().example_input)
    return net


def save(net: nn.Module, folder: str | Path, *, like: str | Path | RankPlan) -> Path:
    """Writes a compressed net that was trained further to `folder`: `plan.json` and `model.safetensors`. `load` reads it again.

    To load a net of your own away from its study, pass `build` to `load`.

    Args:
        like: the folder that the net was loaded from, or the plan that it was compressed by.

    Raises:
        UsageError: the net is not of that structure, or `folder` is that folder.
    """
    return save_like(net, Path(folder), like if isinstance(like, RankPlan) else Path(like))


def plan_file_to(path: str | Path, form: str, *, period: int | None = None) -> dict[str, Any]:
    """A plan's file for another library, as `ranksearch.plan_to` writes it; the dense net is the one that the plan names.

    Args:
        path: a plan.json, or a folder with one; for a net of your own it has to lie within its study's folder.
        period: optimizer steps between projections.

    Raises:
        UsageError: no such file or form, a plan without a model, or a plan of which that form can express nothing.
    """
    path = Path(path)
    path = path / PLAN if path.is_dir() else path
    try:
        plan = RankPlan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as a plan ({error}): name a plan.json, or a folder with one."
        ) from error
    if plan.model is None:
        raise UsageError(
            f"{path} does not name its model: from Python, `ranksearch.plan_to(plan, {form!r}, model=net)`."
        )
    study = study_around(path.parent)
    build = build_reference if study is None else read_folder(study)[0].build
    return plan_to(plan, form, model=build(plan.model), period=period)


def export(
    name: str | Path | nn.Module,
    trial: Any = None,
    *,
    format: str = "state_dict",
    at: Budgets = (),
    output: str | Path | None = None,
    runs: str | Path = "runs",
    fold_bn: bool = False,
    force: bool = False,
    trust: bool = False,
    budgets: Budgets = (),
    at_least: Limits = (),
    dense: nn.Module | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Writes a net in a form that other programs load, opens it again and compares it with the net; returns what `export.json` says.

    The net is a trial's or, in a nested study, one cut `at` any budget.

        ranksearch.export("NAME", "best", format="onnx")                              a net of a study
        ranksearch.export(net, example_input, format="onnx", output="exports/net")    any net by itself, such as one trained further

    Args:
        name: the study, by name or folder; or a net.
        trial: a complete trial's number, or "best" for the one with the best metric; for a net by itself, a batch of one input; left
            out with `at`.
        format: "state_dict" (for `load`), "pt2" (torch.export) or "onnx" (needs the extra `onnx`).
        at: budgets that hold at once, such as "flops=37%" or ["flops=37%", "size=60KiB"]: a net is cut for them from the weights of a
            nested study.
        output: folder of the export; None is exports/TRIAL-FORMAT in the study's folder, or exports/at-BUDGETS-FORMAT.
        fold_bn: folds BN into the layers before it; with "pt2" and "onnx".
        force: replaces an earlier export in `output`.
        trust: whether to run a task file that came with the study's folder, whoever wrote it.
        dense: for a net by itself, a net to time beside it.
        budgets, at_least: conditions that "best" must meet, such as "params=40%" and "accuracy=-1".

    Raises:
        UsageError: no such study, trial or format, its extra is not installed, or `output` holds something.
        StudyError: the net cannot be expressed in that format, or the exported form computes something else.
    """
    if not isinstance(name, str | Path | nn.Module):
        raise UsageError(
            f"export takes a study's name or folder, and a trial of it, or a net and a batch of one input, got a {type(name).__name__}."
        )
    observer = observer or Silent()
    form = format_named(format)
    check_fold(form, fold_bn)
    if isinstance(name, nn.Module):
        if output is None:
            raise UsageError("export: a net by itself goes to a folder that you name: output=…")
        if force or budgets or at_least or at:
            raise UsageError("export: force, budgets, at_least and at go with a study, not with a net by itself.")
        return export_alone(name, trial, Path(output), form, fold_bn=fold_bn, dense=dense)
    if dense is not None:
        raise UsageError("export: dense goes with a net by itself; a study knows its own.")
    study = Study.open(find_study(str(name), Path(runs)), trust=trust)
    given = None if output is None else Path(output)
    if texts := assignments(at):
        if budgets or at_least:
            raise UsageError(
                "export: budgets and at_least choose among the trials; `at` cuts a net: leave one of them out."
            )
        if trial is not None:
            raise UsageError(f"Export trial {trial}, or the net at {' and '.join(texts)}? Leave one of them out.")
        folder = target_folder(study, name_at(texts), form, given, force=force)
        observer.log(
            f"cutting the net of {study.space.name!r} at {' and '.join(texts)}, and exporting it as {form.name}"
        )
        return {"folder": str(folder)} | export_cut(
            study, study.at(texts), folder, form, build=study.space.build, fold_bn=fold_bn
        )
    if trial is None:
        raise UsageError(
            "Which net? Name a TRIAL by its number, or `best`; in a nested study, any budget by --at flops=37%."
        )
    row = pick_trial(study, trial, budgets, at_least)
    folder = target_folder(study, row.trial, form, given, force=force)
    observer.log(
        f"exporting trial {row['trial']} of {study.space.name!r} as {form.name}, and holding it against the net"
    )
    return {"folder": str(folder)} | export_trial(study, row, folder, form, build=study.space.build, fold_bn=fold_bn)
