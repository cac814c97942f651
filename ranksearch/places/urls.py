"""URLs of databases and servers (`storage.optuna`, `tracking.uri`), which may hold secrets: what of them is written down and shown."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ranksearch.errors import UsageError, nearest

FROM_ENVIRONMENT = "env:"
DATABASES = ("postgresql", "mysql", "sqlite")
"""Those that Optuna takes."""
MLFLOWS = (*DATABASES, "mssql")
"""Those that MLflow takes."""
DRIVER_HINT = "install the database's Python driver (for PostgreSQL: pip install 'ranksearch[postgres]')"
CONNECT_SECONDS = 10
OWN_DATABASE = (
    "Optuna and MLflow each keep a table alembic_version, and refuse the other's: give each a database (`createdb optuna`), or a schema "
    "(`?options=-csearch_path%3Doptuna` at the URL's end)"
)
SECRETS = re.compile("pass|pwd|secret|token|api_?key|credential|odbc_connect", re.IGNORECASE)
"""Options of a database's URL that hold a secret; ODBC's is a whole connection string with its `PWD=`."""
SERVER_PASSWORD = re.compile(r"(?<=://)(?P<user>[^/@:\s]*):(?!\d+/)[^@\s]*(?=@)")
"""The user and the password in a server's URL; a password may hold slashes, but a port before a path is not a password."""
SERVER_TOKEN = re.compile(r"(?P<scheme>\b(?:https?|s3|gs)://)[^/@:\s?#]{16,}(?=@)", re.IGNORECASE)
"""A word alone before a server's name, at least as long as tokens are; a shorter one is a user's name."""
SERVER_OPTION = re.compile(
    r"(?P<key>[?&][\w.-]*(?:pass|pwd|secret|token|key|sig|auth|credential)[\w.-]*=)(?!\*\*\*)[^&#\s]+", re.IGNORECASE
)
"""An option of a URL whose name says that its value is a secret."""


def checked_url(text: str, databases: tuple[str, ...] = DATABASES) -> str:
    """`storage.optuna` as it may be written down: `env:NAME`, or a URL without a password, with the absolute path of a SQLite file.

    Raises:
        UsageError: it is none of these. The message never holds what was given, which may be a secret.
    """
    if text.startswith(FROM_ENVIRONMENT):
        return _checked_name(text)
    url = _parsed(text, databases)
    if _holds_password(url):
        raise _refused("PGPASSWORD (or ~/.pgpass)")
    if url.get_backend_name() == "sqlite" and url.database:
        url = url.set(database=str(Path(url.database).expanduser().absolute()))
    return url.render_as_string(hide_password=True)


def checked_store(text: str) -> str:
    """`tracking.uri` as it may be written down: as `checked_url`, or the URL of a server of MLflow's without a password.

    Raises:
        UsageError: as `checked_url`.
    """
    if text.startswith(FROM_ENVIRONMENT):
        return _checked_name(text)
    if backend_of(text) in MLFLOWS:
        return checked_url(text, MLFLOWS)
    if holds_secret(text):
        raise _refused("MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    return text


def checked_artifacts(text: str) -> str:
    """`tracking.artifacts` as it may be written down: a URI without a secret.

    Raises:
        UsageError: it holds one.
    """
    if holds_secret(text):
        raise _refused("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS)")
    return text


def without_password(text: str) -> str:
    """A database's or server's URL, or a text that holds a server's, as it may be shown: `***` for a password, and no options that may hold
    one."""
    if backend_of(text) in MLFLOWS:
        with suppress(UsageError):
            url = _parsed(text, MLFLOWS)
            return shown(url) if _holds_password(url) else text
    return SERVER_OPTION.sub(
        r"\g<key>***", SERVER_TOKEN.sub(r"\g<scheme>***", SERVER_PASSWORD.sub(r"\g<user>:***", text))
    )


def holds_secret(text: str) -> bool:
    """Whether the URL of a server or a bucket holds a password, a token or an option that is one."""
    return any(pattern.search(text) for pattern in (SERVER_PASSWORD, SERVER_TOKEN, SERVER_OPTION))


def from_environment(where: str, key: str) -> str:
    """What `where` stands for: for `env:NAME`, the value of that environment variable, else `where` itself.

    Raises:
        UsageError: the variable is not set; `key` says where it was named.
    """
    if not where.startswith(FROM_ENVIRONMENT):
        return where
    name = where.removeprefix(FROM_ENVIRONMENT)
    if not os.environ.get(name):
        raise UsageError(f"{key}: {where}: the environment variable {name} is not set: set it to the URL.")
    return os.environ[name]


def database_url(where: str) -> Any:
    """SQLAlchemy's URL of `storage.optuna`; printed, it hides its password.

    Raises:
        UsageError: the environment variable that it names is not set, or holds no URL.
    """
    text = from_environment(where, "storage.optuna")
    try:
        return _parsed(text)
    except UsageError as error:
        if text == where:
            raise
        raise UsageError(f"storage.optuna: {where}: {error}.") from None


def check_apart(url: Any, store: str) -> None:
    """Refuses one database for both Optuna and MLflow: each keeps its schema's version in a table `alembic_version`.

    Args:
        url: SQLAlchemy's URL of `storage.optuna`.
        store: URI of MLflow's store.

    Raises:
        UsageError: both name the same schema of the same database.
    """
    if backend_of(store) not in MLFLOWS:
        return
    other = _parsed(store, MLFLOWS)

    def place(url: Any) -> tuple[Any, ...]:
        return url.get_backend_name(), url.host, url.port, url.database, url.query.get("options")

    if place(url) == place(other):
        raise UsageError(f"storage.optuna: {shown(url)} is MLflow's database too: {OWN_DATABASE}.")


def shown(url: Any) -> str:
    """SQLAlchemy's URL without its password and options."""
    return str(url.set(query={}).render_as_string(hide_password=True))


def backend_of(text: str) -> str:
    """What kind of database a URL names, such as postgresql; for another URL, its scheme."""
    return text.partition(":")[0].partition("+")[0]


def _checked_name(text: str) -> str:
    name = text.removeprefix(FROM_ENVIRONMENT)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UsageError(f"{text!r} names no environment variable; expected {FROM_ENVIRONMENT}NAME")
    return text


def _holds_password(url: Any) -> bool:
    return url.password is not None or any(SECRETS.search(key) for key in url.query)


def _refused(instead: str) -> UsageError:
    return UsageError(
        f"the URL holds a password, which would be written to space.yaml and MLflow: leave it out and set {instead}, or put the whole URL "
        f"into an environment variable and write env:NAME"
    )


def _parsed(text: str, databases: tuple[str, ...] = DATABASES) -> Any:
    """A database's URL.

    Raises:
        UsageError: it is not a URL, or it is one of another kind of database.
    """
    import sqlalchemy  # takes a third of a second, and a study in its own folder does not need it

    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise UsageError(
            "expected a database's URL, such as postgresql://user@host/database, or env:NAME, a variable that holds one"
        ) from None
    if url.get_backend_name() not in databases:
        raise UsageError(
            f"there is no database {url.get_backend_name()!r} here. {nearest(url.get_backend_name(), databases)}"
        )
    return url
