"""Ray's job server: submitting a study, following its log, stopping it. This is HTTP to the head's dashboard; no cluster is joined."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ranksearch.cluster.address import CONNECT_SECONDS
from ranksearch.errors import RanksearchError, StudyError, UsageError, nearest
from ranksearch.jobs.submission import RUNS, STUDY, VERB, Submission
from ranksearch.jobs.upload import LEFT_OUT, write_archive

Write = Callable[[str], None]
DONE = ("SUCCEEDED", "FAILED", "STOPPED")
LOST_SECONDS = 60
"""How long a cluster may be silent while its job is followed."""
TOKEN = "RAY_AUTH_TOKEN"


def job_server(address: str) -> str:
    """The URL of `address` ("HOST:PORT" or a URL), where something answers.

    Raises:
        UsageError: it is not an address, or nothing answers there within seconds; Ray itself would wait for minutes.
    """
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        usual = {"http": 80, "https": 443} if "://" in address else {}
        host, port = parts.hostname, parts.port or usual.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("http", "https"):
        raise UsageError(
            f"--address {address}: expected http://HOST:PORT of Ray's dashboard, such as http://10.0.0.1:8265."
        )
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"--address {address}: no job server answers there ({error}). It is part of a head with ray[default] and listens only on "
            f"that machine: bring it here by a tunnel, such as `ssh -L 8265:127.0.0.1:8265 HEAD` or `ray dashboard CLUSTER.yaml`."
        ) from error
    return url.rstrip("/")


def token() -> str | None:
    """The token that clusters ask for, from the places where Ray looks, in its order; None if there is none, or tokens are off.

    Raises:
        UsageError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if given := os.environ.get(TOKEN):
        return given
    named, usual = os.environ.get("RAY_AUTH_TOKEN_PATH"), Path(os.path.expanduser("~/.ray/auth_token"))
    if not named and not usual.is_file():
        return None
    try:
        return Path(named or usual).read_text().strip() or None
    except OSError as error:
        raise UsageError(f"RAY_AUTH_TOKEN_PATH={named}: it cannot be read ({error}).") from error


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turns what Ray raises into one sentence that says what to do.

    Raises:
        UsageError: there is no token or a wrong one, or no job server.
        StudyError: the job server refuses for another reason.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        what = (
            "takes another token than the one that is set here" if token() else "asks for a token, but none is set here"
        )
        raise UsageError(
            f"The cluster at {address} {what}: set {TOKEN} (or RAY_AUTH_TOKEN_PATH=FILE) to the head's; "
            "`ray get-auth-token` prints it there."
        ) from error
    except RanksearchError:
        raise
    except (RuntimeError, OSError, ValueError) as error:  # requests' errors are OSErrors
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        shown = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
        raise StudyError(f"The job server at {address} refused: {shown}") from error


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Raises UsageError: nothing answers at `address`, the token is not the cluster's, or ray[default] is missing here."""
        self.address = job_server(address)
        if missing := [name for name in ("aiohttp", "requests") if importlib.util.find_spec(name) is None]:
            raise UsageError(
                f"Ray's jobs need {' and '.join(missing)}, of the extra `cluster`: pip install -c constraints.txt 'ranksearch[cluster]'."
            )
        # passed as a header, because Ray decides at its import whether it sends one
        headers = {"authorization": f"Bearer {given}"} if (given := token()) else None
        before = os.environ.get("RAY_API_SERVER_ADDRESS")
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # Ray would prefer this variable to its argument
        try:
            with _told(self.address):
                from ray.job_submission import JobSubmissionClient

                for name in (
                    "dashboard.modules.dashboard_sdk",
                    "dashboard.modules.job.sdk",
                    "_private.runtime_env.packaging",
                ):
                    logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
                self._client = JobSubmissionClient(self.address, headers=headers)
        finally:
            if before is None:
                del os.environ["RAY_API_SERVER_ADDRESS"]
            else:
                os.environ["RAY_API_SERVER_ADDRESS"] = before

    def submit(self, job: Submission, *, ship: bool, driver_gpus: float) -> None:
        """Uploads the job's files and starts it.

        Args:
            ship: whether to send this installation's source of ranksearch; else the cluster's own is used.
            driver_gpus: share of a GPU that the driver holds, which trains the dense net and measures sensitivities.
        """
        environment: dict[str, Any] = {"env_vars": dict(job.variables)}
        with tempfile.TemporaryDirectory() as folder:
            if job.files:
                archive = Path(folder) / f"{job.study}.zip"
                write_archive(job.files, archive)
                environment["working_dir"] = str(archive)
            if ship:
                import ranksearch

                environment |= {"py_modules": [str(Path(ranksearch.__file__).parent)], "excludes": list(LEFT_OUT)}
            with _told(self.address):
                self._client.submit_job(
                    entrypoint=job.entrypoint, submission_id=job.id, runtime_env=environment, metadata=job.metadata,
                    entrypoint_num_gpus=driver_gpus or None,
                )  # fmt: skip

    def all(self) -> list[dict[str, Any]]:
        """Every submitted job of the cluster, the latest first."""
        with _told(self.address):
            found = [_record(details) for details in self._client.list_jobs() if details.submission_id is not None]
        return sorted(found, key=lambda row: row["started"] or "", reverse=True)

    def one(self, job: str) -> dict[str, Any]:
        """A job by its ID.

        Raises:
            UsageError: there is none; the message names the nearest one.
        """
        with _told(self.address):
            try:
                return _record(self._client.get_job_info(job))
            except RuntimeError:  # Ray has no type for a job that is missing: the list of jobs shows whether it is
                known = self._client.list_jobs()
                if job in {name for details in known for name in (details.submission_id, details.job_id)}:
                    raise
        ids = [details.submission_id for details in known if details.submission_id is not None]
        raise UsageError(f"There is no job {job!r} at {self.address}. {nearest(job, ids)}")

    def log(self, job: str) -> str:
        """What the job has printed so far."""
        self.one(job)
        with _told(self.address):
            return self._client.get_job_logs(job)

    def follow(self, job: str, write: Write) -> dict[str, Any]:
        """Writes the job's log as it grows, until the job has ended; a broken connection is opened again.

        Raises:
            StudyError: the cluster has not answered for a minute.
        """
        seen, silent_since = 0, None
        while True:
            try:
                seen = asyncio.run(self._tail(job, write, seen))
                record = self.one(job)
                silent_since = None
            except StudyError as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > LOST_SECONDS:
                    raise StudyError(
                        f"{error} The job may have been lost with its cluster; its study is on disk."
                    ) from error
                time.sleep(2)
                continue
            if record["status"] in DONE:
                write(self.log(job)[seen:])
                return record
            time.sleep(1)

    async def _tail(self, job: str, write: Write, seen: int) -> int:
        """Writes what follows the log's first `seen` characters while the connection holds; returns how many were seen."""
        import aiohttp

        read = 0
        try:
            async for text in self._client.tail_job_logs(job):
                read += len(text)
                if read > seen:
                    write(text[-(read - seen) :])
                    seen = read
        except (RuntimeError, OSError, aiohttp.ClientError):
            pass  # the caller asks next whether the job goes on
        return seen

    def stop(self, job: str, *, wait_seconds: float = 90) -> dict[str, Any]:
        """Interrupts a job, waits until it has ended, and returns its record.

        Raises:
            UsageError: there is no such job.
            StudyError: it has not ended in time.
        """
        self.one(job)
        with _told(self.address):
            self._client.stop_job(job)
        end = time.monotonic() + wait_seconds
        while (record := self.one(job))["status"] not in DONE:
            if time.monotonic() > end:
                raise StudyError(
                    f"The job {job!r} was told to stop, but still runs after {wait_seconds:g} s: look at its log, or stop it again."
                )
            time.sleep(0.5)
        return record


def _time(milliseconds: int | None) -> str | None:
    """A time as text, such as 2026-01-31T23:59:59Z."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if milliseconds else None


def _record(details: Any) -> dict[str, Any]:
    """A job as `status --json` prints it; what Ray does not know is None."""
    metadata = details.metadata or {}
    return {
        "id": details.submission_id, "status": str(getattr(details.status, "value", details.status)),
        "study": metadata.get(STUDY), "runs": metadata.get(RUNS), "verb": metadata.get(VERB),
        "started": _time(details.start_time), "ended": _time(details.end_time), "exit_code": details.driver_exit_code,
        "message": details.message, "command": details.entrypoint,
    }  # fmt: skip
