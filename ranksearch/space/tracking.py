"""The group `tracking` of a search space: MLflow's mirror of a study."""

from __future__ import annotations

import warnings

from pydantic import field_validator

from ranksearch.places.urls import checked_artifacts, checked_store
from ranksearch.space.settings import Strict

with warnings.catch_warnings():
    # `register` is a method of abstract classes, which pydantic's models are, and which nobody calls here
    warnings.filterwarnings("ignore", message='Field name "register"')

    class TrackingSpace(Strict):
        """Where a study is mirrored in MLflow, and which parts of it."""

        uri: str | None = None
        """MLflow store: a server's or database's URL without a password, or `env:NAME`, the environment variable that holds it; left out,
        `MLFLOW_TRACKING_URI`, else a SQLite file beside the studies."""
        artifacts: str | None = None
        """Where a new experiment's files go, such as `s3://bucket/mlflow`; left out, the server's choice, or beside the studies."""
        experiment: str | None = None
        """MLflow experiment; left out, the study's name."""
        models: bool = True
        """Whether the front's nets are logged as MLflow models when a study ends: each takes seconds and twice its weights' size."""
        register: bool = False
        """Whether the most accurate net within the budgets is registered under the study's name, with the alias `champion`."""

        @field_validator("artifacts")
        @classmethod
        def _without_a_secret(cls, where: str | None) -> str | None:
            return None if where is None else checked_artifacts(where)

        @field_validator("uri")
        @classmethod
        def _without_a_password(cls, where: str | None) -> str | None:
            return None if where is None else checked_store(where)
