"""What the trials of a finished front get in MLflow beside their runs: a figure of their training, a model, and the alias `champion`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ranksearch.compress import load_net
from ranksearch.errors import RanksearchError
from ranksearch.front.row import Row
from ranksearch.front.verdict import verdict_of
from ranksearch.store.where import trial_folder
from ranksearch.tracking.draw_png import save_png
from ranksearch.tracking.runs import (
    KIND_TAG,
    MODEL_TAG,
    STUDY_TAG,
    TRIAL_TAG,
    final_metrics,
    study_tags,
    trial_params,
)
from ranksearch.tracking.trial_figures import trial_charts
from ranksearch.tracking.view import View
from ranksearch.trial.metric import Metric

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIGURES = "figures"


def log_front_nets(
    client: MlflowClient, experiment_id: str, runs: Mapping[int, str], models: dict[int, str], view: View, log: Callable[[str], None]
) -> None:  # fmt: skip
    """Logs the figure of every trial on the front and, as the space says, its net as a model, and registers the best one.

    Args:
        runs: trial -> the ID of its run.
        models: trial -> the ID of its model, for those that have one; models that are logged here are added.
    """
    tracking, rows = view.space.tracking, view.front_rows
    for i, row in enumerate(rows):
        number, run_id = row["trial"], runs[row["trial"]]
        _log_figure(client, run_id, row, view.metric)
        if tracking.models and number not in models:
            log(f"MLflow: model of trial {number} ({i + 1} of {len(rows)})")
            model_id = _log_net(client, experiment_id, run_id, view, row, log)
            models |= {number: model_id} if model_id is not None else {}
    best = view.champion
    if tracking.models and tracking.register and best is not None and best["trial"] in models:
        from ranksearch.tracking.models import register  # takes seconds to import

        verdict = verdict_of(view.front)
        description = (  # without the run's name: the page makes a link of its "@50"
            f"The study {view.name}: {verdict.ship}\n\n"
            f'`mlflow.pytorch.load_model("models:/{view.name}@champion")`, or `{verdict.export}`.'
        )
        register(client, view.name, models[best["trial"]], runs[best["trial"]], description=description)


def _log_figure(client: MlflowClient, run_id: str, row: Row, metric: Metric) -> None:
    if charts := trial_charts(row, metric):
        with tempfile.TemporaryDirectory() as scratch:
            save_png(list(charts.values()), Path(scratch) / "training.png", stacked=True)
            client.log_artifacts(run_id, scratch, FIGURES)


def _log_net(
    client: MlflowClient, experiment_id: str, run_id: str, view: View, row: Row, log: Callable[[str], None]
) -> str | None:
    """Logs a trial's net as a model; returns its ID, or None, with a message in the log, if that is not possible."""
    from ranksearch.tracking.models import log_model

    folder, name = trial_folder(view.folder, row["trial"]), f"{view.name}-t{row['trial']:03d}"
    tags = {STUDY_TAG: study_tags(view.info, view.space)[STUDY_TAG], TRIAL_TAG: str(row["trial"])}
    _forget_half_made(client, experiment_id, tags)
    try:
        model_id = log_model(
            client, experiment_id, run_id, name, load_net(folder, view.space.build), folder, view.space.kind(),
            tags=tags | {KIND_TAG: "net"}, params=trial_params(row), metrics=final_metrics(row, view.metric),
            at_ms=int(1000 * (row["ended"] or 0.0)),
        )  # fmt: skip
    except (RanksearchError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        log(f"MLflow: {error} The trial's folder has the net; its run has no model.")
        return None
    client.set_tag(run_id, MODEL_TAG, model_id)
    return model_id


def _forget_half_made(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> None:
    """Deletes a model of this trial that a killed driver left unfinished, so that its run does not name it."""
    wanted = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    for model in client.search_logged_models([experiment_id], wanted):
        client.delete_logged_model(model.model_id)
