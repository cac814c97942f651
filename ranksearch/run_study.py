"""One run of a study, new or resumed: the checks before it, the trials, the test set for the front alone, MLflow's last call.

`api.py` says what is run, and where.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite, nan
from pathlib import Path
from threading import Lock
from typing import Protocol

from torch import nn

from ranksearch.compress import load_net
from ranksearch.data.source import Source
from ranksearch.errors import UsageError
from ranksearch.front.row import Row
from ranksearch.places.net_files import missing_files
from ranksearch.places.place import check_place
from ranksearch.places.urls import check_apart, database_url
from ranksearch.search.workbench import Workbench
from ranksearch.space.space import Space
from ranksearch.study.driver import run_inline
from ranksearch.study.latency import time_front
from ranksearch.study.repeats import repeat_front
from ranksearch.study.study import Study
from ranksearch.tasks.task import Task
from ranksearch.tasks.task_file import told_of_user_code
from ranksearch.tracking.background import BackgroundMirror
from ranksearch.tracking.report import write_report
from ranksearch.tracking.store import store_uri
from ranksearch.tracking.view import View
from ranksearch.training.device import pick_device
from ranksearch.training.evaluate import evaluate
from ranksearch.trial.result import Status

LARGEST = 1e100
"""A metric beyond it cannot be drawn, and its squares are infinite."""
Score = Callable[[nn.Module], float]
"""The metric of a net on a split."""


class Observer(Protocol):
    """Whoever is told how a study goes; the command line shows it on stderr."""

    def log(self, message: str) -> None: ...

    def start(self, study: Study) -> None: ...

    def row(self, study: Study, row: Row) -> None: ...

    def status(self, line: str) -> None:
        """How far the end of a study is, said anew, and from several threads, whenever it gets further; empty once it is over."""

    def stop(self) -> None: ...


class Silent:
    """An observer that shows nothing."""

    def log(self, message: str) -> None: ...

    def start(self, study: Study) -> None: ...

    def row(self, study: Study, row: Row) -> None: ...

    def status(self, line: str) -> None: ...

    def stop(self) -> None: ...


class HowFar:
    """The parts of a study's end that go on side by side, in one line."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._parts, self._one, self._over = show, dict[str, str](), Lock(), False

    def __call__(self, part: str, how_far: str) -> None:
        with self._one:
            if not self._over:
                self._parts[part] = how_far
                self._show(" · ".join(f"{part}: {text}" for part, text in self._parts.items()))

    def end(self) -> None:
        with self._one:
            self._over = True
            self._show("")


def preflight(space: Space, runs: Path, observer: Observer, *, address: str | None, inline: bool) -> None:
    """Checks that the cluster, and every place that is written to, is ready before anything is spent; UsageError where one is not."""
    store = store_uri(runs, space.tracking.uri)
    if space.storage.optuna is not None:
        check_apart(database_url(space.storage.optuna), store)
    if space.storage.results is not None:
        check_place(space.storage.results)
    if address is None or inline:
        return
    from ranksearch.cluster.connection import connect
    from ranksearch.preflight import doctor

    connect(address)
    doctor.preflight(space, runs, observer.log)


class OnDevice:
    """The metric of nets on one split, on the GPU where there is one; the split is brought there once, with the first net."""

    def __init__(self, split: Source, task: Task) -> None:
        self._split, self._task = split, task
        self._there: Source | None = None

    def __call__(self, model: nn.Module) -> float:
        device = pick_device()
        if self._there is None:
            self._there = self._split.to(device)
        return evaluate(model.to(device), self._there, self._task).accuracy


@told_of_user_code()
def dense_accuracy(model: nn.Module, task: Task) -> float:
    """The validation metric of the dense net; UsageError where it is not finite, so that nothing can be compared with it."""
    found = OnDevice(task.val, task)(model)
    if not isfinite(found) or abs(found) > LARGEST:
        raise UsageError(
            f"The metric {task.metric_name!r} of the dense net on the validation set is {found}; it must be finite, at most {LARGEST:g}."
        )
    return found


def _net_of(study: Study, row: Row) -> nn.Module:
    """The compressed net of a complete trial."""
    return load_net(study.trial_folder(row["trial"]), study.space.build)


def _told_accuracy(study: Study, bench: Workbench, score: Score, observer: Observer, row: Row | None) -> float | None:
    """The metric on the test set of a trial's net, or of the dense net where `row` is None.

    Where the user's metric fails on the test set it is NaN, since the trials are done and the front is to be written; where the trial's net
    is lost or damaged it is None. The observer is told why.
    """
    model = None
    if row is not None:
        try:
            model = _net_of(study, row)
        except UsageError as error:
            observer.log(f"the net of trial {row.trial} is not scored on the test set: {error}")
            return None
    try:
        with told_of_user_code():
            found = score(bench.dense_model() if model is None else model)
    except UsageError as error:
        observer.log(f"test: {error}")
        return nan
    return found if abs(found) <= LARGEST else nan


def tell_of_lost_nets(study: Study, observer: Observer) -> None:
    """Says which nets of the front are lost: their numbers stand, and a net that is brought back counts again."""
    for row in study.front:
        folder = study.trial_folder(row.trial)
        if gone := missing_files(folder):
            observer.log(
                f"the net of trial {row.trial} is lost: {' and '.join(gone)} of {folder} {'is' if len(gone) == 1 else 'are'} missing or "
                f"empty. It stays on the front by its numbers, and cannot be exported; `resume --trials` with more trials finds others."
            )


def _write_pages(study: Study, observer: Observer) -> None:
    """Writes the report and the front's picture to the study's folder; where the disk is full, only these are missing."""
    try:
        write_report(View.of(study), study.importances(), study.folder)
    except OSError as error:
        observer.log(f"the report was not written ({error}); `ranksearch report {study.space.name}` tries again")


def run_study(
    study: Study, bench: Workbench, runs: Path, observer: Observer, *, address: str | None, inline: bool
) -> Study:
    """Trials, then the test set for the front alone, then the mirror's front; an interruption closes the mirror too."""
    study.note_samples(bench.task)
    note = HowFar(observer.status)
    mirror = BackgroundMirror(study, runs, observer.log, note)

    def on_row(row: Row) -> None:
        observer.row(study, row)
        mirror.log_trial(row)

    observer.start(study)
    try:
        if inline:
            run_inline(study, bench, on_row, observer.log)
        else:
            from ranksearch.cluster.tune import run_on_ray  # Ray is imported where it is used alone

            run_on_ray(study, bench, on_row, observer.log, address=address)
        observer.stop()
        if study.exhausted:
            observer.log(f"{study.exhausted} after {study.finished} of {study.planned} trials")
        if stopped := study.counts.get(Status.STOPPED):
            saved = 100 * study.steps_saved
            observer.log(
                f"early stopping: {stopped} of {study.finished} trials stopped, {saved:.0f} % of all training steps saved"
            )
        if study.front:
            assert bench.task.example_input is not None
            time_front(
                study, bench.dense_model(), lambda row: _net_of(study, row), bench.task.example_input, observer.log
            )
        mirror.begin_models()  # only now: they keep the cores busy, and would be in the latencies
        score = None if bench.task.test is None else OnDevice(bench.task.test, bench.task)
        if score is not None:
            study.score_test(partial(_told_accuracy, study, bench, score, observer), observer.log, note)
        repeat_front(study, bench, score, observer.log, note)
        tell_of_lost_nets(study, observer)
        study.conclude()
        _write_pages(study, observer)
    except BaseException:
        observer.stop()
        note.end()
        mirror.finish(complete=False)
        raise
    try:
        mirror.finish(complete=True)
    finally:
        note.end()
    return study
