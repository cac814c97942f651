"""What the trials of a finished front get in MLflow beside their runs: a figure of their training, a model, and the alias `champion`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ranksearch.compress import load_net
from ranksearch.errors import RanksearchError
from ranksearch.front.row import Row
from ranksearch.front.verdict import verdict_of
from ranksearch.store.where import trial_folder
from ranksearch.tracking.draw_png import save_png
from ranksearch.tracking.made_models import Closed, MadeModels, NotMade
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
from ranksearch.words import Log, Note

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIGURES = "figures"


def log_front_nets(
    client: MlflowClient, experiment_id: str, runs: Mapping[int, str], models: dict[int, str], view: View, log: Log, note: Note,
    made: MadeModels | None,
) -> bool:  # fmt: skip
    """Logs the figure of every trial on the front and, as the space says, its net as a model, and registers the best one.

    Args:
        runs: trial -> the ID of its run.
        models: trial -> the ID of its model, for those that have one; models that are logged here are added.
        made: models that other processes make; those of other trials are made here.

    Returns:
        Whether all was logged that could be; False where the study was interrupted.
    """
    tracking, rows = view.space.tracking, view.front_rows
    for row in rows:
        _log_figure(client, runs[row["trial"]], row, view.metric)
    missing = [row for row in rows if tracking.models and row["trial"] not in models]
    for i, row in enumerate(missing):
        number = row["trial"]
        note("models in MLflow", f"{i} of {len(missing)}")
        try:
            model_id = _log_net(client, experiment_id, runs[number], view, row, log, made)
        except Closed:
            return False
        models |= {number: model_id} if model_id is not None else {}
    if stored := [row["trial"] for row in missing if row["trial"] in models]:
        log(f"MLflow: {len(stored)} of {len(missing)} nets of the front stored as models")
    best = view.champion
    if tracking.models and tracking.register and best is not None and best["trial"] in models:
        from ranksearch.tracking.models import register  # takes seconds to import

        verdict = verdict_of(view.front)
        description = (  # without the run's name: the page makes a link of its "@50"
            f"The study {view.name}: {verdict.ship}\n\n"
            f'`mlflow.pytorch.load_model("models:/{view.name}@champion")`, or `{verdict.export}`.'
        )
        register(client, view.name, models[best["trial"]], runs[best["trial"]], description=description)
    return True


def _log_figure(client: MlflowClient, run_id: str, row: Row, metric: Metric) -> None:
    if charts := trial_charts(row, metric):
        with tempfile.TemporaryDirectory() as scratch:
            save_png(list(charts.values()), Path(scratch) / "training.png", stacked=True)
            client.log_artifacts(run_id, scratch, FIGURES)


def _log_net(
    client: MlflowClient, experiment_id: str, run_id: str, view: View, row: Row, log: Log, made: MadeModels | None
) -> str | None:
    """Logs a trial's net as a model; returns its ID, or None, with a message in the log, if that is not possible."""
    from ranksearch.tracking.models import log_model

    tags = {STUDY_TAG: study_tags(view.info, view.space)[STUDY_TAG], TRIAL_TAG: str(row["trial"])}
    _forget_half_made(client, experiment_id, tags)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = _made_model(view, row["trial"], made, Path(scratch) / "model")
        except (RanksearchError, TypeError) as error:  # TypeError: a dtype that numpy lacks
            log(f"MLflow: {error} The trial's folder has the net; its run has no model.")
            return None
        model_id = log_model(
            client, experiment_id, run_id, f"{view.name}-t{row['trial']:03d}", model,
            tags=tags | {KIND_TAG: "net"}, params=trial_params(row), metrics=final_metrics(row, view.metric),
            at_ms=int(1000 * (row["ended"] or 0.0)),
        )  # fmt: skip
    client.set_tag(run_id, MODEL_TAG, model_id)
    return model_id


def _made_model(view: View, trial: int, made: MadeModels | None, here: Path) -> Path:
    """The folder of a trial's model, as another process has made it, else made `here`."""
    if made is not None:
        with suppress(NotMade):
            return made.model(trial)
    from ranksearch.tracking.models import save_model

    folder, kind = trial_folder(view.folder, trial), view.space.kind()
    save_model(load_net(folder, view.space.build), folder, here, kind.example_input, kind.normalise)
    return here


def _forget_half_made(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> None:
    """Deletes a model of this trial that a killed driver left unfinished, so that its run does not name it."""
    wanted = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    for model in client.search_logged_models([experiment_id], wanted):
        client.delete_logged_model(model.model_id)
