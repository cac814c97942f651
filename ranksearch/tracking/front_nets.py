"""What the trials of a finished front get in MLflow beside their runs: a figure of their training, a model, the champion's name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ranksearch.compress import load_net
from ranksearch.errors import StudyError
from ranksearch.search.front import Row
from ranksearch.search.metric import Metric
from ranksearch.search.study_folder import trial_folder
from ranksearch.tracking.draw_png import save_png
from ranksearch.tracking.runs import (
    KIND_TAG,
    MODEL_TAG,
    STUDY_TAG,
    TRIAL_TAG,
    final_metrics,
    run_name,
    study_tags,
    trial_params,
)
from ranksearch.tracking.trial_figures import trial_charts
from ranksearch.tracking.view import View

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FIGURES = "figures"


def log_front_nets(
    client: MlflowClient, experiment_id: str, runs: Mapping[int, Run], view: View, log: Callable[[str], None]
) -> None:
    """Logs the figure of every trial on the front and, as the space says, its net as a model, and registers the best one."""
    tracking, rows = view.space.tracking, view.front_rows
    for i, row in enumerate(rows):
        run = runs[row["trial"]]
        _log_figure(client, run, row, view.metric)
        if tracking.models and MODEL_TAG not in run.data.tags:
            log(f"MLflow: model of trial {row['trial']} ({i + 1} of {len(rows)})")
            _log_net(client, experiment_id, run, view, row, log)
    if tracking.models and tracking.register and view.champion is not None:
        _register(client, runs[view.champion["trial"]], view, view.champion)


def _log_figure(client: MlflowClient, run: Run, row: Row, metric: Metric) -> None:
    if charts := trial_charts(row, metric):
        with tempfile.TemporaryDirectory() as scratch:
            save_png(list(charts.values()), Path(scratch) / "training.png", stacked=True)
            client.log_artifacts(run.info.run_id, scratch, FIGURES)


def _log_net(
    client: MlflowClient, experiment_id: str, run: Run, view: View, row: Row, log: Callable[[str], None]
) -> None:
    from ranksearch.tracking.models import log_model

    folder, name = trial_folder(view.folder, row["trial"]), f"{view.name}-t{row['trial']:03d}"
    tags = {STUDY_TAG: study_tags(view.info, view.space)[STUDY_TAG], TRIAL_TAG: str(row["trial"])}
    _forget_half_made(client, experiment_id, tags)
    try:
        model_id = log_model(
            client, experiment_id, run.info.run_id, name, load_net(folder, view.space.build), folder, view.space.kind(),
            tags=tags | {KIND_TAG: "net"}, params=trial_params(row), metrics=final_metrics(row), at_ms=int(1000 * (row["ended"] or 0.0)),
        )  # fmt: skip
    except StudyError as error:
        log(f"MLflow: {error} The trial's folder has the net; its run has no model.")
        return
    client.set_tag(run.info.run_id, MODEL_TAG, model_id)
    run.data.tags[MODEL_TAG] = model_id


def _forget_half_made(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> None:
    """Deletes a model of this trial that a driver was killed over: its run does not name it."""
    wanted = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    for model in client.search_logged_models([experiment_id], wanted):
        client.delete_logged_model(model.model_id)


def _register(client: MlflowClient, run: Run, view: View, best: Row) -> None:
    from ranksearch.tracking.models import register

    if MODEL_TAG in run.data.tags:
        description = f"Trial {best['trial']} of {view.name}: {run_name(best, view.costs[0], view.metric)}"
        register(client, view.name, run.data.tags[MODEL_TAG], run.info.run_id, description=description)
