"""The addresses that a study's space names (databases, buckets, servers): used if this user sent a study there, or confirms them now.

This user's credentials (`PGPASSWORD`, `AWS_PROFILE`, MLflow's password) go to whatever host a space names, and the space of a folder may be
somebody else's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ranksearch.places.trust import ADDRESS, is_known, refuse_addresses, remember
from ranksearch.places.urls import FROM_ENVIRONMENT, without_password
from ranksearch.space.space import Space

OPTUNA, RESULTS, MLFLOW, ARTIFACTS = "storage.optuna", "storage.results", "tracking.uri", "tracking.artifacts"
EVERY = (OPTUNA, RESULTS, MLFLOW, ARTIFACTS)
SETTING = "MLFLOW_TRACKING_URI"
"""The user's own variable that names a server."""


def named(space: Space, keys: Sequence[str] = EVERY) -> dict[str, str]:
    """The addresses of a space by their keys, without those that the user's own environment holds (`env:NAME`, MLflow's variable)."""
    found = {
        OPTUNA: space.storage.optuna, RESULTS: space.storage.results, MLFLOW: space.tracking.uri,
        ARTIFACTS: space.tracking.artifacts,
    }  # fmt: skip
    own = os.environ.get(SETTING)
    return {
        key: where
        for key in keys
        if (where := found[key]) is not None and not where.startswith(FROM_ENVIRONMENT) and where != own
    }


def remember_addresses(space: Space) -> None:
    """Records that this user sends studies to the addresses of a space."""
    for where in named(space).values():
        remember(ADDRESS, where)


def confirm_addresses(space: Space, folder: Path, keys: Sequence[str], *, trust: bool) -> None:
    """Checks that this user uses every address of a space; with `trust` the user does from now on.

    Raises:
        UsageError: one of them is new to this user.
    """
    new = {key: where for key, where in named(space, keys).items() if not is_known(ADDRESS, where)}
    if new and not trust:
        raise refuse_addresses(folder, [f"{without_password(where)} ({key})" for key, where in new.items()])
    for where in new.values():
        remember(ADDRESS, where)
