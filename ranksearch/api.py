"""The public Python API that joins the floors: `search`, `resume`, `preview`, `sync`, `report`; nets are in `nets.py`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ranksearch.allocate import CurveCache
from ranksearch.allocate.budget import Budgets
from ranksearch.cluster.address import check_address
from ranksearch.compress import RankPlan
from ranksearch.errors import StudyError, UsageError
from ranksearch.places.files import write_atomically
from ranksearch.run_study import HowFar, Observer, Silent, dense_accuracy, preflight, run_study, tell_of_lost_nets
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
from ranksearch.store.addresses import ARTIFACTS, EVERY, MLFLOW, confirm_addresses
from ranksearch.store.folder import find_front, locked, new_folder
from ranksearch.store.latency_file import open_table
from ranksearch.store.where import CURVES, DENSE_WEIGHTS, LATENCY, PREVIEW, REPORT, find_study
from ranksearch.study.study import Study
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
        address: Ray cluster to join ("auto" or "HOST:PORT"); left out, Ray is started on this machine.
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
        trials: the planned number from now on, finished ones included; with a larger one a study that is done goes on.
        trust: whether to run a task file that came with the folder, and to write to the addresses that its space names, if you have
            not done so before.

    Raises:
        UsageError: no such study, another process is running it, or it has more trials than that already.
    """
    observer, folder = observer or Silent(), find_study(str(name), Path(runs))
    check_address(None if inline else address)
    with locked(folder):
        if Study.mend(folder):
            observer.log(
                "the journal ended in half a line, because its driver was killed while writing it; it was cut off"
            )
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
            nets' models, if you have not done so before.

    Raises:
        UsageError: no such study, or another process is running it.
        StudyError: the store still cannot be reached.
    """
    observer, folder = observer or Silent(), find_study(str(name), Path(runs))
    with locked(folder):
        Study.mend(folder)
        study = Study.open(folder, trust=trust)
        confirm_addresses(study.space, folder, (MLFLOW, ARTIFACTS), trust=trust)
        note = HowFar(observer.status)
        mirror = BackgroundMirror(study, folder.parent, observer.log, note)
        try:
            mirror.finish(complete=study.done)
        finally:
            note.end()
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
        trust: whether to read the study from a database that its space names, if you have not done so before.

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
