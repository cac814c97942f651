"""Where Optuna keeps a study: the journal in its folder, or a database (`storage.optuna`) that several machines reach.

A database holds many studies, so the name of ours there ends with its id. No password is written down: a URL with one is read from an
environment variable, or the database's own client finds it (`PGPASSWORD`, `~/.pgpass`).
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from ranksearch.errors import StudyError, UsageError, first_line
from ranksearch.places.urls import CONNECT_SECONDS, DRIVER_HINT, OWN_DATABASE, database_url, shown
from ranksearch.search.optuna_private import delete, quiet
from ranksearch.space.space import Space
from ranksearch.store.journal import open_journal
from ranksearch.store.where import JOURNAL
from ranksearch.trial.metric import Direction
from ranksearch.words import COST_RATIOS


def open_storage(where: str | None, folder: Path) -> BaseStorage:
    """The journal in `folder`, or the database `where`; missing tables are made.

    Raises:
        UsageError: the driver is not installed, or the variable with the URL is not set.
        StudyError: the database does not answer, or refuses.
    """
    if where is None:
        return open_journal(folder / JOURNAL)
    import sqlalchemy.exc
    from optuna.storages import RDBStorage

    url = database_url(where)
    patience = {} if url.get_backend_name() == "sqlite" else {"connect_timeout": CONNECT_SECONDS}
    try:
        # a connection that died while trials trained is replaced before it is used
        return RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True, "connect_args": patience},
        )
    except ImportError as error:
        raise UsageError(f"storage.optuna: {error.__cause__ or error}: {DRIVER_HINT}.") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        first = OWN_DATABASE if _is_mlflows(url) else first_line(error)
        raise StudyError(f"storage.optuna: {shown(url)} cannot be opened: {first}.") from error


def _is_mlflows(url: Any) -> bool:
    """Whether a database that answers holds MLflow's tables."""
    import sqlalchemy

    with suppress(sqlalchemy.exc.SQLAlchemyError):
        engine = sqlalchemy.create_engine(url)
        try:
            return "experiments" in sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()
    return False


def study_name(space: Space, info: dict[str, Any]) -> str:
    """Optuna's name of the study; in a database it is unique."""
    return info["study"] if space.storage.optuna is None else f"{info['study']}-{info['id']}"


def make_study(space: Space, folder: Path, info: dict[str, Any], directions: list[Direction]) -> optuna.Study:
    """Makes a study of Optuna's and names its objectives (`optuna-dashboard` shows the names).

    Raises:
        UsageError: the driver or the variable of `storage.optuna` is missing.
        StudyError: its database does not answer.
    """
    storage = open_storage(space.storage.optuna, folder)
    with quiet():
        made = optuna.create_study(storage=storage, study_name=study_name(space, info), directions=directions)
    names = [info["metric"]["name"] if name == "accuracy" else COST_RATIOS[name] for name in space.search.objectives]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of metrics are experimental
        made.set_metric_names(names)
    return made


def open_study(space: Space, folder: Path, info: dict[str, Any]) -> optuna.Study:
    """The study of Optuna's that `make_study` made.

    Raises:
        FileNotFoundError, KeyError: it is not there.
        UsageError, StudyError: as `make_study`.
    """
    if space.storage.optuna is None and not (folder / JOURNAL).is_file():
        raise FileNotFoundError(f"{JOURNAL} is missing")
    try:
        return optuna.load_study(storage=open_storage(space.storage.optuna, folder), study_name=study_name(space, info))
    except KeyError:
        where = space.storage.optuna or JOURNAL
        raise FileNotFoundError(f"{where} holds no study {study_name(space, info)!r}") from None


def forget_study(space: Space, study: optuna.Study) -> None:
    """Removes a half-made study from its database; a journal goes with its folder."""
    if space.storage.optuna is not None:
        delete(study)
