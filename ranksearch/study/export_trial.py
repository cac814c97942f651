"""A trial's net leaves its study: which trial, where to, and `export.json`, which tells whoever finds the folder what it is."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ranksearch.allocate.budget import Budgets
from ranksearch.compress import RankPlan
from ranksearch.compress.export import Build, load_stored_net
from ranksearch.compress.whole import check_rebuilt
from ranksearch.deploy.exported import CHECKED_BATCHES, Exported, export_net
from ranksearch.deploy.formats import Format
from ranksearch.errors import UsageError
from ranksearch.front.row import Row
from ranksearch.lowering.tiled import settle_
from ranksearch.model.copying import copied
from ranksearch.model.plain import named_inputs
from ranksearch.places.files import new_folder_atomically, write_atomically
from ranksearch.places.net_files import PLAN, holds_net
from ranksearch.space.quality import Limits
from ranksearch.store.provenance import cpu_name
from ranksearch.store.where import EXPORTS
from ranksearch.study.cut import Cut
from ranksearch.study.study import Study
from ranksearch.trial.result import Status

RECORD = "export.json"
BEST = "best"
INPUT_FORMULA = {"formula": "(image / scale - mean) / std, per channel"}
FROM_ROW = ("val_accuracy", "test_accuracy", "macs", "params", "macs_ratio", "params_ratio")


def pick_trial(
    study: Study,
    trial: int | str,
    budgets: Budgets = (),
    at_least: Limits = (),
) -> Row:
    """The row of a complete trial whose net is on disk, by its number, or by `best` for the best one under the conditions.

    Raises:
        UsageError: there is none; the message says what the trial is instead, and which numbers are nearest.
    """
    if trial == BEST:
        trial = study.picked(budgets, at_least).trial
    elif budgets or at_least:
        raise UsageError(
            f"--budget and --at-least choose among the nets for `{BEST}`, but trial {trial} was named: leave them out."
        )
    elif isinstance(trial, str) and not trial.isdecimal():
        raise UsageError(f"TRIAL: {trial!r} is neither a trial's number nor `{BEST}`. {_nearest(study, 0)}")
    number = int(trial)
    status = study.status(number)
    if status is None:
        raise UsageError(f"{study.space.name!r} has no trial {number}. {_nearest(study, number)}")
    if status != "complete":
        raise UsageError(f"Trial {number} of {study.space.name!r} is {status}, not complete. {_nearest(study, number)}")
    if not holds_net(study.trial_folder(number)):
        raise UsageError(f"The net of trial {number} is not in {study.trial_folder(number)}. {_nearest(study, number)}")
    return next(row for row in study.rows if row.trial == number)


def _nearest(study: Study, number: int, shown: int = 5) -> str:
    """A sentence that names the nearest trials that can be exported."""
    complete = [row.trial for row in study.rows if row.complete]
    valid = sorted((n for n in complete if holds_net(study.trial_folder(n))), key=lambda n: (abs(n - number), n))
    if not valid:
        return "None of its trials can be exported yet."
    more = f", … ({len(valid)} in all)" if len(valid) > shown else ""
    best = f"; or `{BEST}`" if study.best()["trial"] in valid else ""
    return f"Nearest that can be exported: {', '.join(map(str, valid[:shown]))}{more}{best}."


def name_at(budgets: Sequence[str]) -> str:
    """The name of an export of a net at some budgets, such as `at-flops-37`."""
    return "-".join(["at", *(re.sub(r"[^A-Za-z0-9.]+", "-", budget).strip("-") for budget in budgets)])


def target_folder(study: Study, what: int | str, form: Format, output: Path | None, *, force: bool) -> Path:
    """Where an export goes: `output`, else exports/TRIAL-FORMAT in the study's folder.

    Args:
        what: the trial's number, or another name of the net.

    Raises:
        UsageError: something is there already. With `force` an earlier export is replaced, and nothing else.
    """
    name = f"{what:03d}" if isinstance(what, int) else what
    folder = output or study.folder / EXPORTS / f"{name}-{form.name}"
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder with -o.")
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    others = sorted(held - _exported(folder))
    if others:
        raise UsageError(
            f"{folder} holds other things than an export ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}), which are kept: "
            f"name another folder with -o."
        )
    if held and not force:
        raise UsageError(f"{folder} holds an export already: --force replaces it, or name another folder with -o.")
    return folder


def _exported(folder: Path) -> set[str]:
    """Names of the files that an earlier export to `folder` wrote."""
    try:
        return {RECORD, *json.loads((folder / RECORD).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def export_trial(study: Study, row: Row, folder: Path, form: Format, *, build: Build, fold_bn: bool) -> dict[str, Any]:
    """Writes a trial's net and `export.json` to `folder`, whole or not at all; returns what that file holds.

    Raises:
        UsageError: the trial's files are damaged or belong to another net, or `folder` cannot be written.
        StudyError: the exported form computes something else, or cannot be made.
    """
    model, plan = load_stored_net(study.trial_folder(row.trial), build)
    if plan != RankPlan.from_dict(row.plan):
        raise UsageError(
            f"{study.trial_folder(row['trial'])} holds another net: its {PLAN} is not the plan of trial {row['trial']}."
        )
    return _export(study, row, model, plan, folder, form, build=build, fold_bn=fold_bn, at=None)


def export_cut(study: Study, cut: Cut, folder: Path, form: Format, *, build: Build, fold_bn: bool) -> dict[str, Any]:
    """Does the same for a net that was cut from a nested run's weights; `at` in `export.json` says at which budgets.

    Raises:
        UsageError: `folder` cannot be written.
        StudyError: as `export_trial`.
    """
    number, cost = study.nested_trial, cut.cost
    assert number is not None
    row = Row(
        number, Status.COMPLETE, val_accuracy=cut.val_accuracy, macs=cost.macs, params=cost.params, macs_ratio=cut.macs_ratio,
        params_ratio=cut.params_ratio, plan=cut.plan.to_dict(),
    )  # fmt: skip
    return _export(study, row, cut.model, cut.plan, folder, form, build=build, fold_bn=fold_bn, at=list(cut.budgets))


def _export(
    study: Study,
    row: Row,
    model: nn.Module,
    plan: RankPlan,
    folder: Path,
    form: Format,
    *,
    build: Build,
    fold_bn: bool,
    at: list[str] | None,
) -> dict[str, Any]:
    kind = study.space.kind()
    dense = build(plan.model or "").eval()  # untrained weights would take as long as trained ones
    check_rebuilt(settle_(copied(model)), plan, dense, kind.example_input)
    try:
        with new_folder_atomically(folder) as partial:
            exported = export_net(
                model,
                plan,
                kind.example_input,
                partial,
                form=form,
                build=build,
                fold_bn=fold_bn,
                others=[dense],
                dense=dense,
            )
            record = _record(study, row, form, plan.model, exported) | ({} if at is None else {"at": at})
            write_atomically(partial / RECORD, json.dumps(record, indent=2, allow_nan=False))
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error}): name another folder with -o.") from error
    return record


def _inputs(example: Any) -> dict[str, Any]:
    """What one call takes: `inputs` by name, and, for a single tensor, its shape and dtype under their old keys."""
    named = [
        {"name": name, "shape": ["batch", *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
        for name, x in named_inputs(example).items()
    ]
    alone = named[0] if isinstance(example, Tensor) else {"shape": None, "dtype": None}
    return {"input_shape": alone["shape"], "input_dtype": alone["dtype"], "inputs": named}


def _record(study: Study, row: Row, form: Format, model: str | None, exported: Exported) -> dict[str, Any]:
    kind = study.space.kind()
    (dense_ms,) = exported.others_ms
    return {
        "study": study.space.name, "study_id": study.info["id"], "trial": row.trial, "format": form.name, "files": list(exported.files),
        "size_bytes": exported.size_bytes, "model": model, **_inputs(kind.example_input),
        "input_made_by": INPUT_FORMULA | asdict(kind.normalise) if kind.normalise is not None else None,
        "metric": study.metric.to_dict(),
        "opset": exported.opset, "folded_bn": exported.folded_bn, "max_rel_error": exported.max_rel_error,
        "checked_batches": list(CHECKED_BATCHES), "fixed_axes": list(exported.fixed_axes),
        "latency_ms": exported.latency_ms, "latency_eager_ms": exported.latency_eager_ms,
        "latency_dense_ms": dense_ms, "latency_dense_runtime_ms": exported.latency_dense_runtime_ms,
        "device": cpu_name(), **{key: row[key] for key in FROM_ROW}, "plan": row.plan,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in ("torch", *form.needs)}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
