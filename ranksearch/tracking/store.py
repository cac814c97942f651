"""Where MLflow's store is: the space's `tracking.uri`, else `MLFLOW_TRACKING_URI`, else a SQLite file beside the studies."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ranksearch.errors import UsageError
from ranksearch.places.urls import FROM_ENVIRONMENT, from_environment, without_password

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
TRIALS_VIEW = "ranksearch"
"""The name of the view of an experiment's trials, as a link has it."""
VARIABLE = "MLFLOW_TRACKING_URI"
NOTED = "mlflow.json"
"""In a study's folder: which store, experiment and run mirror it."""


def quiet_mlflow() -> None:
    """No usage telemetry, no progress of schema migrations on stderr; call it before MLflow is imported."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # a server's clients would print a link per run, on the stdout that is kept for results
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        # a server that is away is told of within a minute, not after ten; what it missed is logged later
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)


def store_uri(runs: Path, configured: str | None) -> str:
    """URI of the store for studies in the folder `runs`; it may hold a password.

    Raises:
        UsageError: `configured` names an environment variable that is not set.
    """
    if configured is not None:
        return from_environment(configured, "tracking.uri")
    return os.environ.get(VARIABLE) or f"sqlite:///{(runs / DATABASE).absolute()}"


def written(uri: str, configured: str | None) -> str:
    """A store's URI as it is written down and shown: by the variable that holds it where it has a password."""
    if configured is not None:
        return configured
    return uri if without_password(uri) == uri else f"{FROM_ENVIRONMENT}{VARIABLE}"


def note_in(folder: Path) -> dict[str, str]:
    """What a study's folder says of its mirror: `uri`, `experiment`, `parent`; empty where it says nothing that can be read."""
    try:
        known = json.loads((folder / NOTED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(known, dict) and all(isinstance(known.get(key), str) for key in ("uri", "experiment", "parent"))
    return known if whole else {}


def noted_uri(noted: str) -> str:
    """URI of a store that was `written` down; where its variable is not set any more, as it was written."""
    try:
        return from_environment(noted, NOTED)
    except UsageError:
        return noted


def is_server(uri: str) -> bool:
    """Whether a store is one that answers over the network by itself; else it is a database."""
    return uri.startswith(("http:", "https:", "databricks"))


def artifact_root(runs: Path, uri: str, configured: str | None) -> str | None:
    """Where a new experiment's files go: as configured, else beside the studies; None leaves it to the server."""
    return configured or (None if is_server(uri) else (runs / ARTIFACTS).absolute().as_uri())
