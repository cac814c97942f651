"""MLflow's UI over the studies of a folder, on this machine alone, with links to their pages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ranksearch.errors import StudyError, UsageError, nearest
from ranksearch.places.urls import FROM_ENVIRONMENT, from_environment
from ranksearch.study.folder import INFO
from ranksearch.tracking.runs import TRIALS_VIEW
from ranksearch.tracking.store import (
    DATABASE,
    NOTED,
    VARIABLE,
    artifact_root,
    is_server,
    noted_uri,
    quiet_mlflow,
    store_uri,
)

HOST, SQLITE = "127.0.0.1", "sqlite:///"
WORKFLOW = "workflowType=machine_learning"
"""Without it the UI shows what is for language models."""
PATIENCE_SECONDS = 180.0
"""How long a server may take to answer: half a minute on a busy machine, more where a database's schema is upgraded."""


@dataclass(frozen=True)
class Page:
    """Where a study is in MLflow; the paths below the address of its UI."""

    study: str
    experiment: str
    run: str

    @property
    def front(self) -> str:
        """The study's own run: description, progress, figures."""
        return f"/#/experiments/{self.experiment}/runs/{self.run}?{WORKFLOW}"

    @property
    def trials(self) -> str:
        """The table of the trials, most accurate first, with the columns that matter."""
        return f"/#/experiments/{self.experiment}/runs?viewStateShareKey={TRIALS_VIEW}&{WORKFLOW}"


@dataclass(frozen=True)
class Opened:
    """A store, and the studies in it whose pages are linked, the newest first."""

    uri: str
    runs: Path
    pages: list[Page]


def find_store(where: str, runs: Path) -> Opened:
    """The store behind `where`: a folder of studies, a study's folder, or a study's name in `runs`.

    Raises:
        UsageError: nothing of that kind is there (the text names the nearest study), or the environment variable with the store's URI is
            not set.
    """
    for folder in (Path(where), runs / where):
        if (folder / INFO).is_file():
            folder = folder.resolve()
            noted = _noted(folder)
            uri = from_environment(noted["uri"], NOTED) if "uri" in noted else store_uri(folder.parent, None)
            return Opened(uri, folder.parent, _pages([folder], uri))
    folder = Path(where).resolve()
    studies = sorted((path.parent for path in folder.glob(f"*/{INFO}")), key=lambda p: -(p / INFO).stat().st_mtime)
    uri = store_uri(folder, None)
    if not is_server(uri) and not (folder / DATABASE).is_file() and VARIABLE not in os.environ:
        elsewhere = [noted["uri"] for study in studies if (noted := _noted(study))]
        if not elsewhere:
            known = sorted(path.parent.name for path in runs.glob(f"*/{INFO}"))
            raise UsageError(
                f"There is no MLflow store in {where}, and no study of that name: run `ranksearch search SPACE.yaml` first. "
                f"{nearest(where, known)}"
            )
        # a variable that is not set hides no other study's store
        uri = from_environment(
            next((uri for uri in elsewhere if not uri.startswith(FROM_ENVIRONMENT)), elsewhere[0]), NOTED
        )
    return Opened(uri, folder, _pages(studies, uri))


def _noted(folder: Path) -> dict[str, str]:
    """Which store, experiment and run mirror a study; a store that was moved together with the studies is where they are."""
    known = json.loads((folder / NOTED).read_text()) if (folder / NOTED).is_file() else {}
    if not known:
        return known
    uri = known["uri"] = noted_uri(known["uri"])
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file() and (folder.parent / DATABASE).is_file():
        known["uri"] = store_uri(folder.parent, None)
    return known


def _pages(studies: list[Path], uri: str) -> list[Page]:
    notes = [(study.name, _noted(study)) for study in studies]
    return [Page(name, noted["experiment"], noted["parent"]) for name, noted in notes if noted.get("uri") == uri]


def serve(opened: Opened, port: int, say: Callable[[str], None]) -> None:
    """Runs MLflow's server in the foreground until Ctrl-C; links are said once it answers.

    Raises:
        UsageError: no port is free.
        StudyError: the server ends by itself.
    """
    quiet_mlflow()
    port = _free_port(port)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    if (root := artifact_root(opened.runs, opened.uri, None)) is not None:
        command += ["--default-artifact-root", root]
    address = f"http://{HOST}:{port}"
    # in the environment: who lists the machine's processes reads their command lines, and the URI may hold a password
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": opened.uri}
    server = subprocess.Popen([*command, "--workers", "1"], stdout=sys.stderr, env=environment)
    try:
        _wait_until_it_answers(server, address)
        say(f"MLflow UI: {address} (Ctrl-C ends it)")
        say_pages(opened, address, say)
        code = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return
    raise StudyError(f"MLflow's server ended with exit code {code}.")


def say_pages(opened: Opened, address: str, say: Callable[[str], None]) -> None:
    """The links of the newest studies."""
    for page in opened.pages[:10]:
        say(f"  {page.study}: {address.rstrip('/')}{page.front}")
        say(f"  {' ' * len(page.study)}  {address.rstrip('/')}{page.trials}")


def _wait_until_it_answers(server: subprocess.Popen[bytes], address: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        if (code := server.poll()) is not None:
            raise StudyError(f"MLflow's server ended with exit code {code}.")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    server.terminate()
    raise StudyError(f"MLflow's server at {address} did not answer within {PATIENCE_SECONDS:.0f} s.")


def _free_port(first: int) -> int:
    for port in range(first, min(first + 100, 65536)):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) != 0:
                return port
    raise UsageError(f"--port: {first} and the ports after it are in use.")
