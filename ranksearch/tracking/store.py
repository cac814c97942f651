"""Where MLflow's store is: the space's `tracking.uri`, else `MLFLOW_TRACKING_URI`, else a SQLite file beside the studies."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from ranksearch.errors import UsageError
from ranksearch.places.urls import FROM_ENVIRONMENT, from_environment, without_password

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
TRIALS_VIEW = "ranksearch"
"""The name, in links, of the view of an experiment's trials."""
VARIABLE = "MLFLOW_TRACKING_URI"
NOTED = "mlflow.json"
"""The file in a study's folder that says which store, experiment and run mirror it."""


def quiet_mlflow() -> None:
    """Turns off MLflow's usage telemetry and its progress of schema migrations on stderr; call it before MLflow is imported."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # a server's clients would print a link per run, on the stdout that is kept for results
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        # a server that is down is reported within a minute, not after ten; what it missed is logged later
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
    return os.environ.get(VARIABLE) or store_uri_beside(runs)


def store_uri_beside(runs: Path) -> str:
    """URI of the SQLite store in a folder of studies."""
    return f"sqlite:///{(runs / DATABASE).absolute()}"


def written(uri: str, configured: str | None) -> str:
    """A store's URI as it is written down and shown; if it has a password, the variable that holds it stands for it."""
    if configured is not None:
        return configured
    return uri if without_password(uri) == uri else f"{FROM_ENVIRONMENT}{VARIABLE}"


def note_in(folder: Path) -> dict[str, str]:
    """What a study's folder says of its mirror: `uri`, `experiment`, `parent`; empty if it says nothing readable."""
    try:
        known = json.loads((folder / NOTED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(known, dict) and all(isinstance(known.get(key), str) for key in ("uri", "experiment", "parent"))
    return known if whole else {}


def noted_uri(noted: str) -> str:
    """The URI of a store that was `written` down; if its variable is no longer set, what was written."""
    try:
        return from_environment(noted, NOTED)
    except UsageError:
        return noted


def is_server(uri: str) -> bool:
    """Whether a store is a server that answers over the network; else it is a database."""
    return uri.startswith(("http:", "https:", "databricks"))


def holds_run(database: Path, run: str) -> bool:
    """Whether a SQLite store has a run of this ID."""
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as store:
            return store.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run,)).fetchone() is not None
    except sqlite3.Error:
        return False


LOCATIONS = {
    "experiments": ("artifact_location",), "runs": ("artifact_uri",), "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}  # fmt: skip
"""Table of MLflow's database -> its columns that say where files are."""


def at_home(runs: Path, uri: str) -> int:
    """Corrects the places of files in the database beside the studies if their folder was moved or copied; returns the number of roots.

    This is needed because MLflow writes absolute paths down. Files that were configured to lie elsewhere stay there.
    """
    database, here = runs / DATABASE, (runs / ARTIFACTS).absolute()
    if uri != store_uri_beside(runs) or not database.is_file() or not here.is_dir():
        return 0
    with closing(sqlite3.connect(database, timeout=30)) as store, store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"experiments", "runs"} <= tables:
            return 0
        roots = [root for (root,) in store.execute("SELECT DISTINCT artifact_location FROM experiments") if root]
        moved = [root for root in roots if _moved(store, root, here)]
        for root in moved:
            for table in tables & LOCATIONS.keys():
                for column in LOCATIONS[table]:
                    store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (here.as_uri(), len(root) + 1, len(root), root),
                    )
        return len(moved)


def _moved(store: sqlite3.Connection, root: str, here: Path) -> bool:
    """Whether the files that a database has in `root` are now in `here`, as the folders of its runs show."""
    if root == here.as_uri() or not root.startswith("file:") or not root.endswith(f"/{ARTIFACTS}"):
        return False
    runs = store.execute(
        "SELECT run_uuid FROM runs JOIN experiments USING (experiment_id) WHERE artifact_location = ?", (root,)
    )
    return any((here / run).is_dir() for (run,) in runs)


def artifact_root(runs: Path, uri: str, configured: str | None) -> str | None:
    """Where a new experiment's files go: as configured, else beside the studies; None leaves it to the server."""
    return configured or (None if is_server(uri) else (runs / ARTIFACTS).absolute().as_uri())
