"""MLflow's UI over the studies of a folder, reachable only from this machine, with links to their pages."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ranksearch.errors import StudyError, Terminated, UsageError, nearest
from ranksearch.places.trust import ADDRESS, is_known, refuse_addresses, remember
from ranksearch.places.urls import FROM_ENVIRONMENT, from_environment, without_password
from ranksearch.store.where import INFO
from ranksearch.tracking import mlflow_private
from ranksearch.tracking.mlflow_private import STORE
from ranksearch.tracking.store import (
    DATABASE,
    NOTED,
    TRIALS_VIEW,
    VARIABLE,
    artifact_root,
    at_home,
    holds_run,
    is_server,
    note_in,
    noted_uri,
    quiet_mlflow,
    store_uri,
)

HOST, SQLITE = "127.0.0.1", "sqlite:///"
WORKFLOW = "workflowType=machine_learning"
"""Without this the UI shows its pages for language models."""
END_SECONDS = 5.0
PATIENCE_SECONDS = 180.0
"""How long a server may take to answer; it takes half a minute on a busy machine, more if a database's schema is upgraded."""


@dataclass(frozen=True)
class Page:
    """Where a study is in MLflow, as paths below the address of its UI."""

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

    @property
    def charts(self) -> str:
        """The metric over the first cost, and parallel coordinates, of all trials."""
        return f"{self.trials}&compareRunsMode=CHART"


@dataclass(frozen=True)
class Opened:
    """A store, and the studies in it whose pages are linked, the newest first."""

    uri: str
    runs: Path
    pages: list[Page]


def find_store(where: str, runs: Path, *, trust: bool = False) -> Opened:
    """The store behind `where`: a folder of studies, a study's folder, or a study's name in `runs`.

    Args:
        trust: whether to open a store that a study's folder names but to which this user never sent a study.

    Raises:
        UsageError: nothing of that kind is there (the message names the nearest study), the environment variable with the store's URI
            is not set, or the store is somebody else's.
    """
    for folder in (Path(where), runs / where):
        if (folder / INFO).is_file():
            folder = folder.resolve()
            noted = _noted(folder)
            uri = from_environment(noted["uri"], NOTED) if "uri" in noted else store_uri(folder.parent, None)
            _confirm(folder, noted.get("uri", uri), trust=trust)
            return Opened(uri, folder.parent, _pages([folder], uri))
    folder = Path(where).resolve()
    studies = sorted((path.parent for path in folder.glob(f"*/{INFO}")), key=lambda p: -(p / INFO).stat().st_mtime)
    uri = store_uri(folder, None)
    if not is_server(uri) and not (folder / DATABASE).is_file() and VARIABLE not in os.environ:
        elsewhere = [(study, noted["uri"]) for study in studies if (noted := _noted(study))]
        if not elsewhere:
            known = sorted(path.parent.name for path in runs.glob(f"*/{INFO}"))
            raise UsageError(
                f"There is no MLflow store in {where}, and no study of that name: run `ranksearch search SPACE.yaml` first. "
                f"{nearest(where, known)}"
            )
        # a study whose variable is not set must not hide another study's store
        study, noted_as = next((e for e in elsewhere if not e[1].startswith(FROM_ENVIRONMENT)), elsewhere[0])
        _confirm(study, noted_as, trust=trust)
        uri = from_environment(noted_as, NOTED)
    return Opened(uri, folder, _pages(studies, uri))


def _confirm(study: Path, uri: str, *, trust: bool) -> None:
    """Checks that a study's store is this user's: beside the study, named by the user's variable, sent a study before, or `trust`ed now.

    Raises:
        UsageError: it is none of these.
    """
    beside = uri.startswith(SQLITE) and Path(uri.removeprefix(SQLITE)).parent in (study, study.parent)
    own = uri in (os.environ.get(VARIABLE), store_uri(study.parent, None))
    by_variable = note_in(study).get("uri", uri).startswith(FROM_ENVIRONMENT)
    if beside or own or by_variable or is_known(ADDRESS, uri):
        return
    if not trust:
        raise refuse_addresses(study, [f"{without_password(uri)} ({NOTED})"])
    remember(ADDRESS, uri)


def _noted(folder: Path) -> dict[str, str]:
    """The store, experiment and run that mirror a study; a store that was moved with the studies is looked for beside them."""
    known = note_in(folder)
    if not known:
        return known
    uri = known["uri"] = noted_uri(known["uri"])
    beside, noted = folder.parent / DATABASE, Path(uri.removeprefix(SQLITE))
    # a copy of a folder of studies opens the copy's store, not the original's, which may still exist
    if uri.startswith(SQLITE) and beside.is_file() and (not noted.is_file() or holds_run(beside, known["parent"])):
        known["uri"] = store_uri(folder.parent, None)
    return known


def _pages(studies: list[Path], uri: str) -> list[Page]:
    notes = [(study.name, _noted(study)) for study in studies]
    return [Page(name, noted["experiment"], noted["parent"]) for name, noted in notes if noted.get("uri") == uri]


def serve(opened: Opened, port: int, say: Callable[[str], None]) -> None:
    """Runs MLflow's server in the foreground until Ctrl-C; prints links at once, and a page that is opened early waits for the server.

    Raises:
        UsageError: no port is free.
        StudyError: the server ended by itself.
    """
    quiet_mlflow()
    at_home(opened.runs, opened.uri)
    root = artifact_root(opened.runs, opened.uri, None)
    # the job executor, a queue for judges of language models, is half a dozen processes that no study needs
    environment = os.environ | {STORE: opened.uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile() as said, _ended_alike():
        with _listening(port) as listening:
            port = listening.getsockname()[1]
            words = [str(listening.fileno()), HOST, str(port), *([root] if root else [])]
            # a session of its own: Ctrl-C then reaches only this process, which ends the whole group quietly
            server = subprocess.Popen(
                [sys.executable, "-m", mlflow_private.__name__, *words], stdout=said, stderr=subprocess.STDOUT, env=environment,
                pass_fds=[listening.fileno()], start_new_session=True,
            )  # fmt: skip
        address = f"http://{HOST}:{port}"
        watcher = _ends_with_us(server.pid)
        try:
            # a page that is opened now waits for the server in the socket's queue
            say(f"MLflow UI: {address} (its first page takes seconds; Ctrl-C ends it)")
            say_pages(opened, address, say)
            _wait_until_it_answers(server, address)
            code = server.wait()
        except KeyboardInterrupt:
            return
        except StudyError as error:
            raise StudyError(f"{error}{_last_words(said)}") from None
        finally:
            watcher.kill()
            watcher.wait()
            _end(server)
        raise StudyError(f"MLflow's server ended with exit code {code}.{_last_words(said)}")


@contextmanager
def _ended_alike() -> Iterator[None]:
    """Makes SIGTERM, and a terminal that closes, act like Ctrl-C within the block; the handlers from before are put back."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ends_with_us(group: int) -> subprocess.Popen[bytes]:
    """Starts a shell that waits for this process to end in any way, even by SIGKILL, and then ends a process group.

    The shell reads from a pipe whose other end only this process holds.
    """
    script = 'read -r _; kill -s TERM -- "-$0"; sleep 5; kill -s KILL -- "-$0"'
    return subprocess.Popen(
        ["sh", "-c", script, str(group)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server with its workers, and kills those that do not end within seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(END_SECONDS)
            return


def _last_words(said: IO[bytes]) -> str:
    """The last lines of a server that ended by itself."""
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return f" Its last words: {' | '.join(lines[-3:])}" if lines else ""


def say_pages(opened: Opened, address: str, say: Callable[[str], None]) -> None:
    """Prints links to the newest studies and what each shows, or how to bring a study there if there is none."""
    if not opened.pages:
        say("  No study is in this store: `ranksearch sync NAME` brings one there.")
    for page in opened.pages[:10]:
        say(f"  {page.study}")
        say(f"    which net to ship: {address.rstrip('/')}{page.front}")
        say(f"    all trials:        {address.rstrip('/')}{page.trials}")
        say(f"    their charts:      {address.rstrip('/')}{page.charts}")


def _wait_until_it_answers(server: subprocess.Popen[bytes], address: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    # without a proxy (`http_proxy`), which would not reach this machine's ports
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < until:
        if (code := server.poll()) is not None:
            raise StudyError(f"MLflow's server ended with exit code {code}.")
        try:
            with direct.open(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise StudyError(f"MLflow's server at {address} did not answer within {PATIENCE_SECONDS:.0f} s.")


def _listening(first: int) -> socket.socket:
    """A socket that listens on the first free port from `first` on.

    Raises:
        UsageError: a hundred ports are taken, or this user may not listen there.
    """
    for port in range(first, min(first + 100, 65536)):
        try:
            return socket.create_server((HOST, port))
        except PermissionError as error:
            raise UsageError(
                f"--port: {port} needs rights that you do not have ({error}): choose one from 1024 on."
            ) from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise UsageError(f"--port: {first} and the ports after it are in use: choose another one.")
