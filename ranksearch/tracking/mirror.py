"""The study in MLflow: a parent run per study and a child run per trial, written only by the driver and in batches.

Results are on disk first. This mirror is made so that writing it again changes nothing: runs are found by the study's and the trials'
tags, and metrics bear the time at which their trial ended. Workers never touch the store. `runs.py` says what runs hold.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import alembic.util
import filelock
import sqlalchemy.exc
from sqlalchemy.engine import make_url

from ranksearch.front.row import Row
from ranksearch.places.files import write_atomically
from ranksearch.places.urls import DRIVER_HINT
from ranksearch.store.where import FRONT, GIVEN, REPORT, SPACE
from ranksearch.tracking.chart import Plot
from ranksearch.tracking.draw_png import save_png, save_thumbnail
from ranksearch.tracking.figures import study_charts
from ranksearch.tracking.front_nets import FIGURES, log_front_nets
from ranksearch.tracking.made_models import MadeModels
from ranksearch.tracking.note import THUMBNAIL, experiment_note, front_csv, front_table, headline, note, trial_note
from ranksearch.tracking.report import write_report
from ranksearch.tracking.runs import (
    ENDED,
    MODEL_TAG,
    PARENT_TAG,
    STUDY_TAG,
    TRIAL_TAG,
    Step,
    created,
    dense_tags,
    late_metrics,
    run_name,
    study_params,
    study_tags,
    trial_file,
    trial_metrics,
    trial_params,
    trial_tags,
    trials_view,
)
from ranksearch.tracking.store import (
    NOTED,
    artifact_root,
    at_home,
    note_in,
    noted_uri,
    quiet_mlflow,
    store_uri,
    written,
)
from ranksearch.tracking.view import View, shown_costs
from ranksearch.trial.recipe import searched_settings
from ranksearch.words import Log, Note, unnoted

quiet_mlflow()
from mlflow import MlflowClient, MlflowException  # noqa: E402  (its settings are read at import)
from mlflow.entities import Metric, Param, Run, RunTag  # noqa: E402

MIRROR_ERRORS = (MlflowException, OSError, sqlalchemy.exc.SQLAlchemyError, alembic.util.CommandError)
"""What a store raises that is down, full, refusing, or just being made by somebody else."""
NOTE = "mlflow.note.content"
"""The tag that the UI shows as the description."""
PROGRESS_SECONDS = 5.0
"""How often at most the study's progress is logged; otherwise it would take a quarter of a trial's time in the store."""
ENTITIES, PARAMS = 1000, 100
"""How many metrics, parameters and tags together, and how many parameters, a store takes at once."""


def _client(uri: str) -> MlflowClient:
    """Opens a store and makes its tables if it has none; those of a file are made by one process at a time, as two would clash."""
    file = make_url(uri).database if uri.startswith("sqlite:") else None
    try:
        with filelock.FileLock(f"{file}.lock") if file else nullcontext():
            return MlflowClient(tracking_uri=uri)
    except ModuleNotFoundError as error:
        raise MlflowException(f"{error}: {DRIVER_HINT}") from error


class Mirror:
    """Writes a study's trials to MLflow. Make it before the first trial, since it creates a database's schema."""

    def __init__(self, view: View, runs: Path) -> None:
        self._folder, self._space, self._info, self._metric = view.folder, view.space, view.info, view.metric
        self.uri = store_uri(runs, view.space.tracking.uri)
        self.client = _client(self.uri)
        at_home(runs, self.uri)
        artifacts = artifact_root(runs, self.uri, view.space.tracking.artifacts)
        parent = self._find() or self._make(view, artifacts)
        self.experiment_id, self.parent_id = parent.info.experiment_id, parent.info.run_id
        self._ended_at: int | None = parent.info.end_time
        """When the study's run ended, in ms, if nothing was added to it since; None stands for now."""
        self._describe(view, parent)
        self._runs: dict[int, str] = {}
        """Trial -> the ID of its run."""
        self._models: dict[int, str] = {}
        """Trial -> the ID of its logged model."""
        self._logged: set[int] = set()
        """Trials whose runs hold everything."""
        self._on_front: set[int] = set()
        self._progress: list[tuple[Row, Mapping[str, float]]] = []
        """Trials and how far the study was after each, as long as that has not been logged."""
        self._progress_at = -PROGRESS_SECONDS
        self._adopt()
        write_atomically(view.folder / NOTED, json.dumps(self._note()))

    # Finding and making runs -------------------------------------------------------------------------------------

    def _note(self) -> dict[str, str]:
        uri = written(self.uri, self._space.tracking.uri)
        return {"uri": uri, "experiment": self.experiment_id, "parent": self.parent_id}

    def _find(self) -> Run | None:
        """The study's run in this store, found where it was before, else by the study's tag."""
        known = note_in(self._folder)
        tag = study_tags(self._info, self._space)[STUDY_TAG]
        if noted_uri(known.get("uri", "")) == self.uri:
            try:
                run = self.client.get_run(known["parent"])
                if run.info.lifecycle_stage == "active" and run.data.tags.get(STUDY_TAG) == tag:
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = self._experiment()
        if experiment is None:
            return None
        made = self.client.search_runs([experiment], f"tags.`{STUDY_TAG}` = '{tag}'", max_results=1)
        return made[0] if made else None

    def _experiment(self) -> str | None:
        name = self._space.tracking.experiment or self._space.name
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise MlflowException(f"experiment {name!r} was deleted: restore it, or set tracking.experiment")
        return experiment.experiment_id if experiment is not None else None

    def _make(self, view: View, artifacts: str | None) -> Run:
        name, experiment = self._space.tracking.experiment or self._space.name, self._experiment()
        if experiment is None:
            experiment = self.client.create_experiment(name, artifact_location=artifacts)
            # so that the UI shows its pages for model training, not GenAI's
            self.client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")
        searched = list(searched_settings(self._space.recipe))
        for tag, value in trials_view(view.costs, view.metric, searched).items():
            self.client.set_experiment_tag(experiment, tag, value)
        self._note_experiment(view, experiment)
        return self.client.create_run(experiment, run_name=self._space.name, tags=study_tags(self._info, self._space))

    def _note_experiment(self, view: View, experiment: str) -> None:
        before = self.client.get_experiment(experiment).tags.get(NOTE, "")
        self.client.set_experiment_tag(experiment, NOTE, experiment_note(view, before))

    def _describe(self, view: View, parent: Run) -> None:
        """Logs what is searched, and the dense net, also for an existing run: its driver may have been killed right after making it."""
        self.client.update_run(self.parent_id, status="RUNNING")
        known = parent.data.params  # they cannot be changed
        params = {name: value for name, value in study_params(self._space).items() if name not in known}
        self._batch(
            self.parent_id, at=created(self._info), params=params,
            tags={"planned_trials": str(self._space.search.trials)} | dense_tags(view),
        )  # fmt: skip
        for file in (SPACE, GIVEN):
            if (self._folder / file).is_file():
                self.client.log_artifact(self.parent_id, str(self._folder / file))

    def _adopt(self) -> None:
        """Finds the runs of trials that exist already, so that none is made twice, whatever became of the driver that made it."""
        token = None
        while True:
            found = self.client.search_runs(
                [self.experiment_id], f"tags.`{PARENT_TAG}` = '{self.parent_id}'", max_results=1000, page_token=token
            )
            for run in found:
                if (number := run.data.tags.get(TRIAL_TAG)) is not None:
                    self._runs[int(number)] = run.info.run_id
                    if MODEL_TAG in run.data.tags:
                        self._models[int(number)] = run.data.tags[MODEL_TAG]
                    if run.info.status != "RUNNING":
                        self._logged.add(int(number))
                    if run.data.tags.get("on_front") == "true":
                        self._on_front.add(int(number))
            token = found.token
            if not token:
                return

    # Writing -----------------------------------------------------------------------------------------------------

    def _batch(
        self, run_id: str, *, at: float, params: Mapping[str, str] | None = None, metrics: Iterable[Step] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Logs parameters, tags and metrics of several steps, in as few calls as the store allows; `at` is their time in seconds."""
        names = [Param(k, v) for k, v in (params or {}).items()]
        for start in range(PARAMS, len(names), PARAMS):
            self.client.log_batch(run_id, params=names[start : start + PARAMS])
        marks = [RunTag(k, v) for k, v in (tags or {}).items()]
        values = [Metric(k, float(v), int(at * 1000), step) for step, found in metrics for k, v in found.items()]
        room = ENTITIES - len(names[:PARAMS]) - len(marks)
        self.client.log_batch(run_id, metrics=values[:room], params=names[:PARAMS], tags=marks)
        for start in range(room, len(values), ENTITIES):
            self.client.log_batch(run_id, metrics=values[start : start + ENTITIES])

    def log_trial(self, row: Row, progress: Mapping[str, float], on_front: set[int]) -> None:
        """Logs a child run with all that is known of a trial, how far the study is after it, and which trials are on the front now.

        A trial that is logged already is left alone; if its logging broke off, it continues in the same run.
        """
        if row["trial"] not in self._logged:
            self._log_row(row, on_front=row["trial"] in on_front)
            self._progress.append((row, progress))
        self._mark_front(on_front)
        if time.monotonic() > self._progress_at + PROGRESS_SECONDS:
            self._log_progress()

    def _log_row(self, row: Row, *, on_front: bool) -> None:
        number, cost, ended = row["trial"], shown_costs(self._space)[0], row["ended"] or time.time()
        if number not in self._runs:
            tags = trial_tags(row, self._info, self._space, on_front=on_front) | {PARENT_TAG: self.parent_id}
            tags[NOTE] = trial_note(row, self._folder, self._info, self._metric)
            started = int(1000 * (ended - (row["seconds"] or 0.0)))
            run = self.client.create_run(self.experiment_id, started, tags, run_name(row, cost, self._metric))
            self._runs[number] = run.info.run_id
            self._on_front |= {number} if on_front else set()
        run_id, self._ended_at = self._runs[number], None
        self._batch(run_id, params=trial_params(row), metrics=trial_metrics(row, self._metric), at=ended)
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in {"plan.json": row["plan"], "trial.json": trial_file(row)}.items():
                if content is not None:
                    (Path(scratch) / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
            self.client.log_artifacts(run_id, scratch)
        self.client.set_terminated(run_id, ENDED.get(row["status"], "FAILED"), end_time=int(1000 * ended))
        self._logged.add(number)

    def _log_progress(self) -> None:
        """Logs, in one call, how far the study was after each trial since the last time."""
        self._progress_at, entries, self._progress = time.monotonic(), self._progress, []
        values = [
            Metric(name, float(value), int(1000 * (row["ended"] or 0.0)), int(progress["finished_trials"]))
            for row, progress in entries
            for name, value in progress.items()
        ]
        for start in range(0, len(values), ENTITIES):
            self.client.log_batch(self.parent_id, metrics=values[start : start + ENTITIES])

    def _mark_front(self, on_front: set[int]) -> None:
        """Updates the tag `on_front` of the trials that joined the front or left it."""
        for number in sorted(self._on_front ^ on_front):
            if number in self._runs:
                self.client.set_tag(self._runs[number], "on_front", str(number in on_front).lower())
                self._on_front ^= {number}

    def _name_anew(self, view: View) -> None:
        """Renames the runs of trials whose latency was predicted when they ended and has been measured since."""
        if (cost := view.costs[0]) == "latency":
            for row in view.front_rows:
                self.client.update_run(self._runs[row["trial"]], name=run_name(row, cost, self._metric))

    def show(self, view: View, importances: Mapping[str, Any], *, complete: bool) -> None:
        """Logs the front to the parent run: JSON, CSV, a table, figures, a description."""
        parent = self.parent_id
        self.client.log_dict(parent, view.front, "front.json")
        self.client.log_text(parent, front_csv(view.front), "front.csv")
        self.client.log_dict(parent, front_table(view.front), "front_table.json")
        with tempfile.TemporaryDirectory() as scratch:
            for name, chart in study_charts(view, importances).items():
                folder = Path(scratch) / (
                    "" if name == "front" else FIGURES
                )  # the front's picture lies beside its table
                folder.mkdir(exist_ok=True)
                save_png([chart], folder / f"{name}.png")
                if name == "front" and isinstance(chart, Plot):
                    save_thumbnail(chart, folder / THUMBNAIL)
            self.client.log_artifacts(parent, scratch)
        self.client.update_run(parent, name=headline(view))
        registered = self._space.tracking.models and self._space.tracking.register
        self._note_experiment(view, self.experiment_id)
        self._batch(
            parent, at=time.time(),
            tags={
                NOTE: note(view, registered=registered and complete, run_id=parent),
                "mlflow.loggedArtifacts": json.dumps([{"path": "front_table.json", "type": "table"}]),
            },
        )  # fmt: skip

    @property
    def models(self) -> set[int]:
        """Trials whose nets are models in the store."""
        return set(self._models)

    def finish(
        self, view: View, importances: Mapping[str, Any], log: Log, note: Note = unnoted, *, complete: bool,
        made: MadeModels | None = None,
    ) -> None:  # fmt: skip
        """Logs what was missed, test accuracies and the front; if the study is complete, also the report and the front's nets, those
        among them that were `made` into models already.
        """
        for row in view.trials:
            if row["trial"] not in self._logged:
                self._log_row(row, on_front=row["trial"] in view.on_front)
        self._mark_front(view.on_front)
        self._name_anew(view)
        self._catch_up(view)
        for row in view.trials:
            for seconds_on, late in late_metrics(row, self._metric, timed_before=self._space.has_latency):
                self._batch(self._runs[row["trial"]], metrics=[(0, late)], at=(row["ended"] or 0.0) + seconds_on)
            if row["repeats"] is not None:
                again = {f"again_{name}": float(value) for name, value in row["repeats"].items() if value is not None}
                self._batch(self._runs[row["trial"]], metrics=[(0, again)], at=row["ended"] or 0.0)
        self._batch(self.parent_id, tags=dense_tags(view), at=created(self._info))
        self.show(view, importances, complete=complete)
        if complete:
            page, front = self._folder / REPORT, self._folder / FRONT
            if not page.is_file() or page.stat().st_mtime < front.stat().st_mtime:  # else it was written just now
                write_report(view, importances, self._folder)
            self.client.log_artifact(self.parent_id, str(page))
            complete = log_front_nets(self.client, self.experiment_id, self._runs, self._models, view, log, note, made)
        ended = "FAILED" if view.trials and not view.complete else "FINISHED" if complete else "KILLED"
        self.client.set_terminated(self.parent_id, ended, end_time=self._ended_at)

    def _catch_up(self, view: View) -> None:
        """Logs the progress after trials that were logged late."""
        known = {metric.step for metric in self.client.get_metric_history(self.parent_id, "finished_trials")}
        self._progress = [entry for entry in view.progress() if int(entry[1]["finished_trials"]) not in known]
        self._log_progress()
