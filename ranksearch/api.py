"""The public Python API that joins the floors: `search`, `resume`, `preview`, `sync`, `report`, `load`, `export`, `plan_file_to`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ranksearch.allocate import CurveCache
from ranksearch.allocate.budget import Budgets, assignments
from ranksearch.cluster.address import check_address
from ranksearch.compress import RankPlan, load_net
from ranksearch.compress.export import PLAN, load_stored_net
from ranksearch.compress.exported import check_fold
from ranksearch.compress.formats import format_named
from ranksearch.compress.plan_to import plan_to
from ranksearch.compress.standalone import export_alone, save_like
from ranksearch.compress.whole import check_rebuilt
from ranksearch.errors import StudyError, UsageError
from ranksearch.lowering.tiled import settle_
from ranksearch.places.files import write_atomically
from ranksearch.run_study import Observer, Silent, dense_accuracy, preflight, run_study, tell_of_lost_nets
from ranksearch.search.opening import WARM
from ranksearch.search.preview import (
    DEFAULT_ALLOCATORS,
    LEVELS,
    check_names,
    levels_of,
    preview_record,
    preview_rows,
)
from ranksearch.search.range_test import with_recipe
from ranksearch.search.scorer import Scorer
from ranksearch.search.workbench import prepare
from ranksearch.space.quality import Limits
from ranksearch.space.reading import Settings, read_space
from ranksearch.space.space import Space
from ranksearch.space.starter import imported_net
from ranksearch.study.addresses import ARTIFACTS, EVERY, MLFLOW, confirm_addresses
from ranksearch.study.export_trial import export_cut, export_trial, name_at, pick_trial, target_folder
from ranksearch.study.folder import (
    CURVES,
    DENSE_WEIGHTS,
    LATENCY,
    PREVIEW,
    REPORT,
    find_front,
    find_study,
    locked,
    new_folder,
    study_around,
)
from ranksearch.study.latency_file import open_table
from ranksearch.study.making import read_folder
from ranksearch.study.study import Study
from ranksearch.tasks import build_reference
from ranksearch.tracking.background import BackgroundMirror
from ranksearch.tracking.draw_html import save_html
from ranksearch.tracking.draw_png import save_png
from ranksearch.tracking.preview_figures import preview_charts, preview_title
from ranksearch.tracking.report import report_html
from ranksearch.tracking.view import View
from ranksearch.trial.metric import Metric


def search(
    space: str | Path | Space,
    *,
    budgets: Budgets = (),
    trials: int | None = None,
    name: str | None = None,
    settings: Settings = (),
    warm_start: Sequence[str | Path] = (),
    at_least: Limits = (),
    objective: str | None = None,
    runs: str | Path = "runs",
    address: str | None = None,
    inline: bool = False,
    trust: bool = False,
    observer: Observer | None = None,
) -> Study:
    """Runs a new study and returns it; its `front`, `trials` and `best(budget)` are read from it.

    Args:
        space: a search-space file, or a `Space`.
        budgets: laid over the file's, such as "flops=50%", ["flops=50%", "size=1MiB"] or {"flops": "50%"}.
        settings: other values laid over the file's, such as ["recipe.steps=100"] or {"recipe": {"steps": 100}}.
        warm_start: earlier studies, by name or folder, or front files: their plans are tried first.
        at_least: a lower limit on the metric, such as "accuracy=-1" (points below dense), "accuracy=-2%" (of dense's value) or
            "accuracy=90" (as such): the cheapest net above it is looked for.
        objective: "smallest", "fastest", "fewest MACs", "fewest params", or names of costs; laid over the file's.
        runs: folder of the studies; this one goes to `runs`/NAME.
        address: Ray cluster to join ("auto" or "HOST:PORT"); Ray is started on this machine where None.
        inline: one trial after the other in this process, without Ray.
        trust: whether to run a task file that lies in a study's folder, and was not yours before.

    Raises:
        UsageError: something in the space, the data or the budgets is wrong, or the name is taken.
        StudyError: the trials fail.
        KeyboardInterrupt: interrupted; what is done is kept, and `resume` goes on.
    """
    if isinstance(space, Space):
        if budgets or settings or warm_start or at_least or any(x is not None for x in (trials, name, objective)):
            raise UsageError(
                "budgets, trials, name, settings, warm_start, at_least and objective go with a space file; a Space is taken as it is."
            )
    else:
        space = read_space(
            space,
            budgets=budgets,
            settings=settings,
            trials=trials,
            name=name,
            warm_start=[str(w) for w in warm_start],
            trust=trust,
            at_least=at_least,
            objective=objective,
        )
    observer, runs = observer or Silent(), Path(runs)
    fronts = [str(find_front(where, runs)) for where in space.search.warm_start]
    space = space.model_copy(update={"search": space.search.model_copy(update={"warm_start": fronts})})
    new_folder(runs, space.name)
    check_address(None if inline else address)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise UsageError(
            f"The folder of studies {runs} cannot be written ({error}): name another one by --runs."
        ) from error
    preflight(space, runs, observer, address=address, inline=inline)
    known = CurveCache(runs / space.name / CURVES)
    table = open_table(space, None)
    bench = prepare(space, fallback=runs / ".dense", log=observer.log, known=known, table=table)
    if not inline:
        from ranksearch.cluster.connection import join

        join(space.resources, address, observer.log)  # a cluster that is not there must not leave an empty study behind
    dense = dense_accuracy(bench.dense_model(), bench.task)
    study = Study.create(runs, space, with_recipe(space, bench, dense, observer.log), dense)
    known.save()
    if table is not None:
        table.save_to(study.folder / LATENCY)
    if space.search.warm_start:
        taken = study.info["opened_with"].get(WARM, 0)
        observer.log(
            f"warm start: {taken} plans of earlier fronts lie within the budgets and rules and are tried first"
        )
    with study.locked():
        return run_study(study, bench, runs, observer, address=address, inline=inline)


def resume(
    name: str | Path,
    *,
    trials: int | None = None,
    runs: str | Path = "runs",
    address: str | None = None,
    inline: bool = False,
    trust: bool = False,
    observer: Observer | None = None,
) -> Study:
    """Continues a study from its folder: finished trials are kept, interrupted ones go on under the same parameters.

    Args:
        trials: planned number from now on, finished ones included: a study that is done goes on so.
        trust: whether to run a task file that came with the folder, and to write to the addresses that its space names, where you did not
            before.

    Raises:
        UsageError: no such study, another process is running it, or it has more trials than that already.
    """
    observer, folder = observer or Silent(), find_study(str(name), Path(runs))
    check_address(None if inline else address)
    with locked(folder):
        if Study.mend(folder):
            observer.log("the journal ended in half a line, which its driver was killed in; it was cut off")
        study = Study.open(folder, trust=trust)
        confirm_addresses(study.space, folder, EVERY, trust=trust)
        preflight(study.space, folder.parent, observer, address=address, inline=inline)
        if trials is not None:
            study.plan_for(trials)
        again = study.requeue_interrupted()
        observer.log(f"{study.finished} of {study.planned} trials are done, {again} were interrupted and run again")
        known, dense = CurveCache(folder / CURVES), folder / DENSE_WEIGHTS
        table = open_table(study.space, folder, study.info.get("latency_key"))
        bench = prepare(study.space, fallback=folder, log=observer.log, known=known, saved_dense=dense, table=table)
        known.save()
        return run_study(study, bench, folder.parent, observer, address=address, inline=inline)


def sync(
    name: str | Path, *, runs: str | Path = "runs", trust: bool = False, observer: Observer | None = None
) -> Study:
    """Brings MLflow up to date with a study's folder, after a store that was away; what is there already stays as it is.

    Args:
        trust: whether to write to the addresses that the study's space names, and to run a task file that came with its folder for the
            nets' models, where you did not before.

    Raises:
        UsageError: no such study, or another process is running it.
        StudyError: the store cannot be reached still.
    """
    observer, folder = observer or Silent(), find_study(str(name), Path(runs))
    with locked(folder):
        Study.mend(folder)
        study = Study.open(folder, trust=trust)
        confirm_addresses(study.space, folder, (MLFLOW, ARTIFACTS), trust=trust)
        mirror = BackgroundMirror(study, folder.parent, observer.log)
        mirror.finish(complete=study.done)
    if mirror.failed:
        raise StudyError(f"MLflow is not up to date: {mirror.failed}.")
    tell_of_lost_nets(study, observer)
    observer.log(f"MLflow holds {study.finished} trials of {study.space.name!r}")
    return study


def report(
    name: str | Path, *, output: str | Path | None = None, runs: str | Path = "runs", trust: bool = False
) -> Path:
    """Writes a study's figures and tables as one self-contained HTML file and returns its path; also while it is running.

    Args:
        output: the file; left out, report.html in the study's folder.
        trust: whether to read the study from a database that its space names, where you did not before.

    Raises:
        UsageError: no such study, or the file cannot be written.
    """
    study = Study.open(find_study(str(name), Path(runs)), trust=trust)
    path = Path(output) if output is not None else study.folder / REPORT
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, report_html(View.of(study), study.importances()))
    except OSError as error:
        raise UsageError(f"The report cannot be written to {path}: {error}") from error
    return path


def preview(
    space: str | Path | Space,
    *,
    budgets: Budgets = (),
    settings: Settings = (),
    levels: Sequence[float] = LEVELS,
    allocators: Sequence[str] = DEFAULT_ALLOCATORS,
    images: int = 1000,
    runs: str | Path = "runs",
    trust: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """The front that allocation alone gives, before any training: what `ranksearch preview --json` prints.

    Plans over a range of budgets by several allocators, each decomposed, its BN statistics re-estimated, and scored on validation
    images. Also written to `runs`/NAME/preview/: preview.json, preview.png, preview.html.

    Args:
        levels: budgets in percent of the dense net's cost (of the space's first budget), beside the space's own.
        allocators: "solver" and names of baselines; "greedy" evaluates the net nine times a layer first.
        images: validation images that a plan is scored on.
        trust: whether to run a task file that lies in a study's folder, and was not yours before.

    Raises:
        UsageError: something in the space, the data or the names is wrong, or no level can be met.
    """
    started, observer = time.monotonic(), observer or Silent()
    if not isinstance(space, Space):
        space = read_space(space, budgets=budgets, settings=settings, trust=trust)
    check_names(allocators)
    folder = Path(runs) / space.name
    known = CurveCache(folder / CURVES)
    table = open_table(space, None)
    bench = prepare(space, fallback=Path(runs) / ".dense", log=observer.log, known=known, table=table)
    found = levels_of(space, bench.curves, levels, observer.log)
    known.save()
    images = min(images, len(bench.task.val))
    batch_size = space.recipe.batch_size
    val = bench.task.val.first(images)
    dense = Scorer(bench.task, bench.dense_model(), val, bn_batches=0, batch_size=batch_size)(RankPlan())
    metric, rows = Metric.of(bench.task, dense.accuracy), []
    for row in preview_rows(space, bench, found, list(dict.fromkeys(allocators)), images=images, log=observer.log):
        rows.append(row)
        observer.log(
            f"[{len(rows)}/{len(found) * len(allocators)}] {row['allocator']} at {row['level']:g} %: "
            f"{metric.text(row['val_accuracy'])} with {100 * row['macs_ratio']:.1f} % of MACs"
        )
    if not rows:
        raise UsageError(
            "None of the allocators has a plan at any level: see above; allow more lowerings, or raise --levels."
        )
    seconds = time.monotonic() - started
    record = preview_record(space, bench, rows, dense, images=images, seconds=seconds)
    target = folder / PREVIEW
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "preview.json", json.dumps(record, indent=2, allow_nan=False))
    charts, title = preview_charts(record), preview_title(record)
    save_png(charts, target / "preview.png", title=title)
    save_html(charts, target / "preview.html", title=title)
    observer.log(f"figures: {target / 'preview.png'}, {target / 'preview.html'}")
    return record


def load(folder: str | Path, *, build: Callable[[], nn.Module] | str | None = None, trust: bool = False) -> nn.Module:
    """The compressed net of a trial's folder (`plan.json`, `model.safetensors`), in evaluation mode. Runs no pickle.

    A plan that names one of our models is enough to build it. A net of a task of your own is built by the copy of your file in its study,
    where `folder` lies within that study's, if you started a study with that file, and is checked as a whole; no file runs because a
    folder holds it.

    Args:
        build: makes the dense net, with any weights, or where it is imported from, such as "package.module:make_net"; for a net of your own
            away from its study, or of somebody else's.
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
    """Keeps a compressed net that was trained further, `plan.json` and `model.safetensors` in `folder`; `load` reads it again.

    Away from its study, `load` of a net of your own wants `build`.

    Args:
        like: the folder that the net was loaded from, or the plan that it was compressed by.

    Raises:
        UsageError: the net is not of that structure, or `folder` is that folder.
    """
    return save_like(net, Path(folder), like if isinstance(like, RankPlan) else Path(like))


def plan_file_to(path: str | Path, form: str, *, period: int | None = None) -> dict[str, Any]:
    """A plan's file for another library, as `ranksearch.plan_to` writes it; the dense net is that which the plan names.

    Args:
        path: a plan.json, or a folder with one; of a net of your own it lies within its study's folder.
        period: optimizer steps between projections.

    Raises:
        UsageError: no such file or form, a plan without a model, or nothing of it can be said there.
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
    """Writes a net in a form that other programs load, opens it again and holds it against the net: what `export.json` says.

    It is a trial's net or, of a nested study, the one `at` any budget.

        ranksearch.export("NAME", "best", format="onnx")                              a net of a study
        ranksearch.export(net, example_input, format="onnx", output="exports/net")    any net by itself, such as one trained further

    Args:
        name: the study, by name or folder; or a net.
        trial: a complete trial's number, or "best" for the one with the best metric; of a net, a batch of one input; left out with
            `at`.
        format: "state_dict" (for `load`), "pt2" (torch.export) or "onnx" (needs the extra `onnx`).
        at: budgets that hold at once, such as "flops=37%" or ["flops=37%", "size=60KiB"]: a net is cut for them from the weights of a
            nested study.
        output: folder of the export; None is exports/TRIAL-FORMAT in the study's folder, or exports/at-BUDGETS-FORMAT.
        fold_bn: folds BN into the layers before it; with "pt2" and "onnx".
        force: an earlier export in `output` gives way.
        trust: whether to run a task file that came with the study's folder, whoever wrote it.
        dense: of a net by itself, the net that it is timed beside.
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
            "Which net? Name a TRIAL by its number, or `best`; of a nested study, any budget by --at flops=37%."
        )
    row = pick_trial(study, trial, budgets, at_least)
    folder = target_folder(study, row.trial, form, given, force=force)
    observer.log(
        f"exporting trial {row['trial']} of {study.space.name!r} as {form.name}, and holding it against the net"
    )
    return {"folder": str(folder)} | export_trial(study, row, folder, form, build=study.space.build, fold_bn=fold_bn)
