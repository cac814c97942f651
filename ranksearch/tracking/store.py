"""Where MLflow's store is: the space's `tracking.uri`, else `MLFLOW_TRACKING_URI`, else a SQLite file beside the studies."""

from __future__ import annotations

import os
from pathlib import Path

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"


def quiet_mlflow() -> None:
    """No usage telemetry, no progress of schema migrations on stderr; call it before MLflow is imported."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "GIT_PYTHON_REFRESH": "quiet",
        # a server that is away is told of within a minute, not after ten; what it missed is logged later
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)


def store_uri(runs: Path, configured: str | None) -> str:
    """URI of the store for studies in the folder `runs`."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(runs / DATABASE).absolute()}"


def artifact_root(runs: Path, uri: str) -> str | None:
    """Where a SQLite store's artifacts go; None leaves it to the server."""
    return (runs / ARTIFACTS).absolute().as_uri() if uri.startswith("sqlite:") else None
