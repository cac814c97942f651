"""Verbs that run a study on a Ray cluster from outside it, through Ray's job server: `submit`, `status`, `stop`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranksearch.cli.options import (
    AtLeast,
    BudgetFlags,
    Json,
    NewName,
    ObjectiveFlag,
    SettingFlags,
    Trials,
    Trust,
    app,
    print_json,
)
from ranksearch.errors import StudyError, UsageError

if TYPE_CHECKING:
    from ranksearch.jobs.submission import Submission
    from ranksearch.space.space import Space

PANEL = "Clusters"
JobServer = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="http://HOST:PORT",
        envvar="RAY_API_SERVER_ADDRESS",
        help="Ray's dashboard on the cluster's head.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's ID, as `submit` and `status` print it.")]
SHOWN = 20
"""Number of files that are listed by name before they are sent."""
DEFAULT_SERVER = "http://127.0.0.1:8265"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@app.command(rich_help_panel=PANEL)
def submit(
    space: Annotated[Path | None, typer.Argument(metavar="SPACE.yaml", help="Search-space file.")] = None,
    budget: BudgetFlags = None,
    at_least: AtLeast = None,
    objective: ObjectiveFlag = None,
    trials: Trials = None,
    name: NewName = None,
    setting: SettingFlags = None,
    warm_start: Annotated[
        list[str] | None,
        typer.Option(
            "--warm-start",
            metavar="NAME|DIR|FILE",
            help="An earlier study on the cluster, or the relative path of a front file here; repeatable.",
        ),
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            envvar="RANKSEARCH_RUNS",
            help="Folder of the studies on the cluster: absolute, on storage that every node sees.",
        ),
    ] = None,
    address: JobServer = DEFAULT_SERVER,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="NAME", help="Continue a study on the cluster, instead of SPACE.yaml."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME[=VALUE]", help="A variable that the job gets; repeatable."),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            "--working-dir",
            metavar="DIR",
            help="Folder to send; left out, the smallest that holds the space and your own task file.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Files that stay here; repeatable.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATH", help="A file or folder to send although git ignores it; repeatable."),
    ] = None,
    installed: Annotated[
        bool,
        typer.Option(
            "--installed", help="Use the cluster's own ranksearch; left out, the source of this one is sent along."
        ),
    ] = False,
    driver_gpus: Annotated[
        float,
        typer.Option(
            min=0, help="GPUs of the driver, which trains the dense net and measures; 0: it runs on the head."
        ),
    ] = 0,
    check: Annotated[
        bool, typer.Option(help="Try the space here first; not possible where only the cluster has the task's data.")
    ] = True,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log.")] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run a search as a job of a Ray cluster and follow its log. Ctrl-C stops following, not the job.

    The space is checked here first. A task of your own is sent with the files beside it, except what git ignores. Prints the job's ID.

    Example: ranksearch submit search_spaces/own_task.yaml --runs /shared/runs --address http://127.0.0.1:8265
    """
    from ranksearch.jobs.submission import check_runs, continued, new_study, variables

    if (space is None) == (resume is None):
        raise UsageError("Name either a search-space file, or a study to continue by --resume NAME.")
    places = {"working_dir": working_dir, "exclude": exclude or (), "include": include or ()}
    common: dict[str, Any] = {
        "runs": check_runs(runs),
        "passed": variables(env or (), os.environ),
        "now": datetime.now(UTC),
        "trust": trust,
    }
    common |= places
    if space is None:
        if budget or at_least or objective or setting or name or warm_start:
            raise UsageError("--resume: a study keeps its space and its name; only --trials may change.")
        job = continued(resume or "", trials=trials, **common)
    else:
        from ranksearch.space.reading import read_space

        resolved = read_space(
            space,
            budgets=budget or (),
            settings=setting or (),
            trials=trials,
            name=name,
            warm_start=warm_start or (),
            trust=trust,
            at_least=at_least or (),
            objective=objective,
        )
        if check:
            _say(_checked(resolved))
        repeated = {"--budget": budget, "--at-least": at_least, "--set": setting}
        options = [(option, value) for option, values in repeated.items() for value in values or ()]
        single = {"--objective": objective, "--trials": trials, "--name": name}
        options += [(option, str(value)) for option, value in single.items() if value]
        job = new_study(space, resolved, options=[part for option in options for part in option], **common)
    _launch(job, address, ship=not installed, driver_gpus=driver_gpus, detach=detach, as_json=as_json)


def _launch(job: Submission, address: str, *, ship: bool, driver_gpus: float, detach: bool, as_json: bool) -> None:
    """Prints what is sent, sends it, and follows the job's log to its end unless `detach`."""
    from ranksearch.jobs.jobs import Jobs
    from ranksearch.jobs.submission import STOPPING, describe_variables

    cluster = Jobs(address)
    _say(
        f"files      {len(job.files)}, {'and this source of ranksearch' if ship else 'and the ranksearch of the cluster'}"
    )
    for name in list(job.files)[:SHOWN]:
        _say(f"           {name}")
    if len(job.files) > SHOWN:
        _say(f"           … and {len(job.files) - SHOWN} more (--exclude leaves out what should stay here)")
    passed = {variable: value for variable, value in job.variables.items() if variable not in STOPPING}
    for line in describe_variables(passed, job.reads) or ["none"]:
        _say(f"variables  {line}")
    _say(f"study      {job.study} in {job.runs} on the cluster, a folder that every node must see")
    cluster.submit(job, ship=ship, driver_gpus=driver_gpus)
    if not as_json:
        print(job.id, flush=True)
    try:
        record = cluster.one(job.id) if detach else cluster.follow(job.id, _write)
    except KeyboardInterrupt:
        _say(f"ranksearch: no longer following; the job goes on. {_hints(job.id, cluster.address)}")
        raise typer.Exit(130) from None
    if as_json:
        print_json(record)
    if detach:
        _say(_hints(job.id, cluster.address))
    else:
        _conclude(record, cluster.address)


@app.command(rich_help_panel=PANEL)
def status(
    job: Annotated[str | None, typer.Argument(metavar="[ID]", help="A job's ID; left out, all jobs.")] = None,
    logs: Annotated[bool, typer.Option("--logs", help="Print what the job has printed.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print it as it grows, until the job ends.")] = False,
    address: JobServer = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """List a cluster's jobs, or show one: its state, its log.

    Example: ranksearch status digits_resnet8-20260131-235959 --follow
    """
    from ranksearch.jobs.jobs import Jobs

    if job is None and (logs or follow):
        raise UsageError("--logs and --follow need a job's ID; `ranksearch status` lists the jobs.")
    cluster = Jobs(address)
    if job is None:
        rows = cluster.all()
        print_json(rows) if as_json else _table(rows)
        return
    record = cluster.one(job)
    if follow:
        try:
            record = cluster.follow(job, _write if as_json else lambda text: print(text, end="", flush=True))
        except KeyboardInterrupt:
            _say(f"ranksearch: no longer following. {_hints(job, cluster.address)}")
            raise typer.Exit(130) from None
    elif logs and not as_json:
        print(cluster.log(job), end="")
    if as_json:
        print_json(record | ({"log": cluster.log(job)} if logs else {}))
    elif not logs and not follow:
        _show(record)
    if follow:
        _conclude(record, cluster.address)


@app.command(rich_help_panel=PANEL)
def stop(job: JobId, address: JobServer = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Stop a job, as Ctrl-C stops a search: finished trials are kept, and `submit --resume` goes on.

    Example: ranksearch stop digits_resnet8-20260131-235959
    """
    from ranksearch.jobs.jobs import DONE, Jobs

    cluster = Jobs(address)
    if (record := cluster.one(job))["status"] in DONE:
        _say(f"The job {job!r} has ended already.")
    else:
        record = cluster.stop(job)
    if as_json:
        print_json(record)
    else:
        _show(record)
    if record["status"] == "STOPPED" and (again := _again(record, cluster.address)):
        _say(again)


def _checked(space: Space) -> str:
    """What `ranksearch check` finds, in one line; UsageError where the study could not be started."""
    from ranksearch.search.workbench import open_net
    from ranksearch.tables import check_record
    from ranksearch.tasks import is_own

    try:
        if space.has_latency:  # measured where the study runs
            return f"space      {space.name} is valid: {len(open_net(space)[1].layers)} layers; its latencies are measured on the cluster"
        found = check_record(space)
    except UsageError as error:
        if not is_own(space.task):
            raise
        raise UsageError(
            f"{error}\nNothing was submitted. If only the cluster has what the task needs, add --no-check."
        ) from error
    lowered = f"{found['layers_lowered']} of {found['layers']} layers may be lowered"
    return f"space      {space.name} is valid: {lowered}, {found['trials']} trials"


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _elsewhere(address: str) -> str:
    """The option that a command needs if the job server is not the default one."""
    return "" if address == DEFAULT_SERVER else f" --address {address}"


def _hints(job: str, address: str) -> str:
    at = _elsewhere(address)
    return f"`ranksearch status {job} --follow{at}` follows it, `ranksearch stop {job}{at}` stops it."


def _again(record: Mapping[str, Any], address: str) -> str:
    """How to continue the study of a job that has ended; empty if the job is not one of ours."""
    if record["study"] is None:
        return ""
    again = f"ranksearch submit --resume {record['study']} --runs {record['runs']}{_elsewhere(address)}"
    return f"`{again}` goes on with what is in the study's folder."


def _conclude(record: Mapping[str, Any], address: str) -> None:
    """Prints how a job has ended.

    Raises:
        UsageError: the command on the cluster refused what it was given.
        StudyError: the job failed or was stopped.
    """
    if record["status"] == "SUCCEEDED":
        where = f"; the study is in {record['runs']}/{record['study']} on the cluster" if record["study"] else ""
        _say(f"The job {record['id']} is done{where}.")
        return
    if record["exit_code"] == 2:
        raise UsageError(
            f"the job {record['id']!r} was refused on the cluster: see the log above. Nothing was trained."
        )
    if record["status"] == "STOPPED":
        raise StudyError(f"the job {record['id']!r} was stopped. {_again(record, address)}")
    message = (record["message"] or "").strip().splitlines()
    raise StudyError(
        f"the job {record['id']!r} failed: {message[0] if message else 'see the log above'}. {_again(record, address)}"
    )


def _table(rows: list[dict[str, Any]]) -> None:
    from ranksearch.console import table

    columns = {"job": "left", "status": "left", "study": "left", "started (UTC)": "left", "ended (UTC)": "left"}
    cells = [[row[key] or "–" for key in ("id", "status", "study", "started", "ended")] for row in rows]
    table(
        f"{len(rows)} job{'s' * (len(rows) != 1)}",
        columns,
        [[cell.replace("T", " ").rstrip("Z") if i > 2 else cell for i, cell in enumerate(r)] for r in cells],
    )


def _show(record: Mapping[str, Any]) -> None:
    for key, value in record.items():
        if value is not None:
            print(f"{key:10} {value}")
