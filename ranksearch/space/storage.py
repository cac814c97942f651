"""The group `storage` of a search space: where results and Optuna's study live, if not in the study's own folder."""

from __future__ import annotations

from pydantic import field_validator

from ranksearch.errors import UsageError
from ranksearch.places.place import as_uri
from ranksearch.places.urls import checked_url, holds_secret
from ranksearch.space.settings import Strict


class StorageSpace(Strict):
    """Where a study keeps what it writes; left out, all of it is in the study's folder, which every node must then see under one path."""

    results: str | None = None
    """Where workers write their nets and states: `s3://bucket/path`, `gs://bucket/path`, `file:///path` or a path. Finished nets are
    brought to the study's folder. Credentials come from the environment of every node."""
    optuna: str | None = None
    """Where Optuna keeps the study: a database's URL without a password (`postgresql://user@host/database`), or `env:NAME`, the environment
    variable that holds it; left out, a journal in the study's folder."""

    @field_validator("results")
    @classmethod
    def _absolute(cls, where: str | None) -> str | None:
        if where is not None and holds_secret(where):
            raise UsageError(
                "the URI holds a secret, which would be written to space.yaml and MLflow: leave it out; credentials come from the "
                "environment of every node (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS)"
            )
        return None if where is None else as_uri(where)

    @field_validator("optuna")
    @classmethod
    def _without_a_password(cls, where: str | None) -> str | None:
        return None if where is None else checked_url(where)
