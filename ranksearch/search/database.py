"""The URL of a database that holds a study (`storage.optuna`), which may be a secret: what of it is written down, and said."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ranksearch.errors import UsageError, nearest

FROM_ENVIRONMENT = "env:"
DATABASES = ("postgresql", "mysql", "sqlite")
DRIVER_HINT = "install the database's Python driver (of PostgreSQL: pip install 'ranksearch[postgres]')"
CONNECT_SECONDS = 10
SECRETS = re.compile("pass|secret|token", re.IGNORECASE)


def checked_url(text: str) -> str:
    """`storage.optuna` as it may be written down: `env:NAME`, or a URL without a password, a SQLite file by its absolute path.

    Raises:
        UsageError: it is none of these. The text never holds what was given, which may be a secret.
    """
    if text.startswith(FROM_ENVIRONMENT):
        name = text.removeprefix(FROM_ENVIRONMENT)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"{text!r} names no environment variable; expected {FROM_ENVIRONMENT}NAME")
        return text
    url = _parsed(text)
    if url.password is not None or any(SECRETS.search(key) for key in url.query):
        raise UsageError(
            "the URL holds a password, which would be written to space.yaml and MLflow: leave it out and set PGPASSWORD (or ~/.pgpass), "
            "or put the whole URL into an environment variable and write env:NAME"
        )
    if url.get_backend_name() == "sqlite" and url.database:
        url = url.set(database=str(Path(url.database).expanduser().absolute()))
    return url.render_as_string(hide_password=True)


def _parsed(text: str) -> Any:
    """A database's URL.

    Raises:
        UsageError: it is none, or of a database that Optuna does not take.
    """
    import sqlalchemy  # a third of a second, which a study in its own folder does not need

    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise UsageError(
            "expected a database's URL, such as postgresql://user@host/database, or env:NAME, a variable that holds one"
        ) from None
    if url.get_backend_name() not in DATABASES:
        raise UsageError(
            f"there is no database {url.get_backend_name()!r} here. {nearest(url.get_backend_name(), DATABASES)}"
        )
    return url


def database_url(where: str) -> Any:
    """SQLAlchemy's URL of `storage.optuna`; printed, it hides its password.

    Raises:
        UsageError: the environment variable that it names is not set, or holds no URL.
    """
    if not where.startswith(FROM_ENVIRONMENT):
        return _parsed(where)
    name = where.removeprefix(FROM_ENVIRONMENT)
    if not os.environ.get(name):
        raise UsageError(f"storage.optuna: {where}: the environment variable {name} is not set: set it to the URL.")
    try:
        return _parsed(os.environ[name])
    except UsageError as error:
        raise UsageError(f"storage.optuna: {where}: {error}.") from None


def shown(url: Any) -> str:
    """A database's URL without its password and options."""
    return str(url.set(query={}).render_as_string(hide_password=True))
