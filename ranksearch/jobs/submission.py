"""`Submission`: a study as a job for a Ray cluster, before any cluster is asked: its command, files and variables.

On the cluster, paths are the cluster's. What a relative path names here is sent along: the space, the user's own task file with the files
beside it, a checkpoint, fronts to begin with. Absolute paths are left as they are.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ranksearch.errors import UsageError
from ranksearch.jobs.upload import Files, folder_files
from ranksearch.places.urls import FROM_ENVIRONMENT, without_password
from ranksearch.space.space import Space
from ranksearch.store.where import FRONT, INFO
from ranksearch.tasks import is_own
from ranksearch.tracking.store import VARIABLE

PASSED = (VARIABLE, "RANKSEARCH_DATA")
"""Variables that a job gets from here if they are set."""
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
"""Settings by which stopping a job is like Ctrl-C: it closes MLflow's runs and says how to go on."""
STUDY, RUNS, VERB = "ranksearch.study", "ranksearch.runs", "ranksearch.verb"
"""Keys of a job's metadata."""


TRUSTED: dict[bool, tuple[str, ...]] = {True: ("--trust",), False: ()}
"""Whether to trust a study's own task file and addresses -> the option of the command on the cluster."""


@dataclass(frozen=True)
class Submission:
    """A job: what is run, with which files and variables, and the study that it is about."""

    id: str
    study: str
    runs: str
    command: tuple[str, ...]
    files: Files = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    """Variables that the space names (`env:NAME`)."""

    @property
    def entrypoint(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.command)

    @property
    def metadata(self) -> dict[str, str]:
        return {STUDY: self.study, RUNS: self.runs, VERB: self.command[3]}


def check_runs(runs: str | None) -> str:
    """Where the study lives on the cluster: a URI, or an absolute folder.

    Raises:
        UsageError: none is given, or a relative folder, which would be inside the job's own and vanish with it.
    """
    needed = "the folder of the studies on the cluster, on storage that every node sees, such as /shared/runs"
    if not runs:
        raise UsageError(f"--runs is missing: {needed}.")
    if "://" not in runs and not runs.startswith("/"):
        raise UsageError(
            f"--runs {runs}: a relative folder would lie on one node and end with the job: expected {needed}."
        )
    return runs


def variables(given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a job: those of `PASSED` that are set here, then `given`: "NAME=VALUE", or "NAME" with the value it has here.

    Raises:
        UsageError: there is no name, or a variable without a value is not set here.
    """
    passed = {name: environment[name] for name in PASSED if environment.get(name)}
    for text in given:
        name, sign, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env {text}: expected NAME=VALUE, or the NAME of a variable that is set here.")
        if not sign and name not in environment:
            raise UsageError(f"--env {name}: it is not set here; write --env {name}=VALUE.")
        passed[name] = value if sign else environment[name]
    return passed


def masked(name: str, value: str) -> str:
    """A variable's value as it may be shown: without the password of a URI, and `***` if the variable's name suggests a secret."""
    if re.search(r"(?i)token|secret|passw|_pass$|^pass$|pwd$|_pat$|credential|_keys?$|^keys?$|apikey", name):
        return "***"
    return without_password(value)


def describe_variables(passed: Mapping[str, str], reads: Sequence[str] = ()) -> list[str]:
    """Describes a job's variables before it is submitted: each by name, and what may be wrong with it.

    Args:
        reads: variables that the space names.
    """
    lines = [f"{name}={masked(name, value)}" for name, value in passed.items()]
    if hidden := [name for name, value in passed.items() if masked(name, value) != value]:
        lines.append(f"note: whoever may read the cluster's jobs can read {', '.join(hidden)}")
    for name, value in passed.items():
        if "://" in value and urlsplit(value).hostname in ("localhost", "127.0.0.1", "::1"):
            lines.append(f"note: {name} names this machine; on the cluster, that means the node on which the job runs")
    for name in sorted(set(reads) - set(passed)):
        lines.append(f"note: the space reads {name}: set it on the cluster's nodes, or pass it with --env {name}")
    return lines


def submission_id(study: str, now: datetime) -> str:
    """A job's ID, such as `digits_resnet8-20260131-235959`, with the time in UTC."""
    return f"{study}-{now.astimezone(UTC):%Y%m%d-%H%M%S}"


def _root(space: Path, own: Path | None, working_dir: Path | None) -> Path:
    """The folder to send: the given one, else the smallest that holds the space and the task's file.

    Raises:
        UsageError: the given one is not a folder, or does not hold both.
    """
    needed = [path.resolve() for path in (space, own) if path is not None]
    if working_dir is None:
        return Path(os.path.commonpath([path.parent for path in needed]))
    root = working_dir.resolve()
    if not root.is_dir():
        raise UsageError(f"--working-dir {working_dir}: there is no such folder.")
    for path in needed:
        if not path.is_relative_to(root):
            raise UsageError(f"--working-dir {working_dir}: {path} lies outside it; name a folder above both.")
    return root


def _warm_start(where: str, files: dict[str, Path]) -> str:
    """An earlier study or front as the job names it; one that a relative path names here is added to `files`."""
    here = Path(where).expanduser()
    front = here / FRONT if (here / INFO).is_file() else here
    if here.is_absolute() or not front.is_file():
        return where
    name = f"fronts/{sum(known.startswith('fronts/') for known in files)}.json"
    files[name] = front
    return name


def new_study(
    path: Path, space: Space, *, runs: str, options: Sequence[str], passed: Mapping[str, str], now: datetime, trust: bool = False,
    working_dir: Path | None = None, exclude: Sequence[str] = (), include: Sequence[str] = (),
) -> Submission:  # fmt: skip
    """A job that runs `ranksearch search` on a space that was read and is valid.

    Args:
        options: `--budget`, `--at-least`, `--objective`, `--set`, `--trials` and `--name` as they were given.
        trust: whether the cluster runs a task file that lies in a study's folder.
        working_dir: the folder to send; None stands for only the space's file or, with the user's own task, the smallest folder that
            holds both.

    Raises:
        UsageError: something that the job needs cannot be sent.
    """
    own = Path(space.task.rpartition(":")[0]) if is_own(space.task) else None
    root = _root(path, own, working_dir)
    whole = own is not None or working_dir is not None
    files = folder_files(root, exclude=exclude, include=include) if whole or include else {}
    settings = []
    for needed in (path.resolve(), own and own.resolve()):
        if needed is not None:  # even if git ignores it
            files[needed.relative_to(root).as_posix()] = needed
    if own is not None:
        function = space.task.rpartition(":")[2]
        settings.append(f"task={own.resolve().relative_to(root).as_posix()}:{function}")
    if space.data is not None and not PurePosixPath(space.data).is_absolute():
        raise UsageError(
            f"data: {space.data!r} is relative, and data are not sent: name the cluster's folder with --set data=/…."
        )
    checkpoint = Path(space.checkpoint).expanduser()
    if not checkpoint.is_absolute() and checkpoint.is_file():
        files[f"checkpoint/{checkpoint.name}"] = checkpoint
        settings.append(f"checkpoint=checkpoint/{checkpoint.name}")
    fronts = [_warm_start(where, files) for where in space.search.warm_start]
    command = ["python", "-m", "ranksearch", "search", path.resolve().relative_to(root).as_posix(), *options]
    command += [part for setting in settings for part in ("--set", setting)]
    command += [part for front in fronts for part in ("--warm-start", front)]
    command += ["--runs", runs, "--address", "auto", *TRUSTED[trust]]
    named = [
        where for where in (space.storage.optuna, space.tracking.uri) if where and where.startswith(FROM_ENVIRONMENT)
    ]
    return Submission(
        submission_id(space.name, now), space.name, runs, tuple(command), files, STOPPING | dict(passed),
        reads=tuple(where.removeprefix(FROM_ENVIRONMENT) for where in named),
    )  # fmt: skip


def continued(
    study: str, *, runs: str, trials: int | None, passed: Mapping[str, str], now: datetime, trust: bool = False,
    working_dir: Path | None = None, exclude: Sequence[str] = (), include: Sequence[str] = (),
) -> Submission:  # fmt: skip
    """A job that runs `ranksearch resume` on a study on the cluster; `working_dir` is sent for what the user's own task imports."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", study):
        raise UsageError(f"--resume {study}: expected the name of a study in {runs}.")
    files: dict[str, Path] = {}
    if working_dir is not None:
        if not working_dir.is_dir():
            raise UsageError(f"--working-dir {working_dir}: there is no such folder.")
        files = folder_files(working_dir.resolve(), exclude=exclude, include=include)
    command = ["python", "-m", "ranksearch", "resume", study]
    command += ["--trials", str(trials)] if trials is not None else []
    command += ["--runs", runs, "--address", "auto", *TRUSTED[trust]]
    return Submission(submission_id(study, now), study, runs, tuple(command), files, STOPPING | dict(passed))
