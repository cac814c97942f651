"""Verbs that run a study, and the one that prints its front."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from ranksearch.cli.options import (
    DEFAULT_RUNS,
    Address,
    AtLeast,
    BudgetFlags,
    Inline,
    Json,
    NewName,
    ObjectiveFlag,
    Runs,
    SettingFlags,
    SpaceFile,
    StudyName,
    Trials,
    Trust,
    app,
    ours_is_stdout,
    print_json,
    runs_option,
)
from ranksearch.errors import StudyError, Terminated, UsageError
from ranksearch.places.urls import without_password
from ranksearch.tracking.store import VARIABLE


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one signal is enough: ending a study takes seconds
    raise Terminated


def _conclude(run: Any, name: str, runs: Path, as_json: bool) -> None:
    """Runs a search or its continuation, then prints the front and where to look at it."""
    from ranksearch.console import Terminal, front_table, print_verdict
    from ranksearch.front.verdict import verdict_of

    terminal = Terminal()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with ours_is_stdout():
            study = run(terminal)
    except KeyboardInterrupt as interruption:
        terminal.stop()
        started = (runs / name / "study.json").is_file() or (Path(name) / "study.json").is_file()
        kept = f" What is finished is kept: `ranksearch resume {name}{runs_option(runs)}` goes on." if started else ""
        stopped = isinstance(interruption, Terminated)
        terminal.log(f"ranksearch: {'stopped by SIGTERM' if stopped else 'interrupted'}.{kept}")
        raise typer.Exit(128 + (signal.SIGTERM if stopped else signal.SIGINT)) from None
    front = study.front_record()
    if as_json:
        print_json(front)
    else:
        front_table(front)
        print_verdict(front, f"{study.space.name}{runs_option(runs)}")
    if not front["trials"] and study.leader is not None and front["at_least"] is not None:
        raise StudyError(verdict_of(front).ship)
    if not front["trials"] and study.leader is not None:
        raise StudyError(
            f"Every net of {study.space.name!r} was measured to be slower than the dense one, so the front is empty; `ranksearch latency` "
            f"says which layers gain. Allow other lowerings, or another runtime or batch (latency.runtime, latency.batch)."
        )
    if not front["trials"]:
        raise StudyError(f"No trial of {study.space.name!r} was completed; see `{study.folder}`.")
    store = study.space.tracking.uri or without_password(os.environ.get(VARIABLE, ""))
    experiment, here = study.space.tracking.experiment or study.space.name, f"{study.space.name}{runs_option(runs)}"
    at = f"MLflow at {store}, experiment {experiment!r}, or " if store else ""
    terminal.log(
        f"\nThe study is in {study.folder}/ (front.json, trials/NNN/ with each net).\n"
        f"To look at it: {at}`ranksearch ui {here}` (MLflow), `ranksearch report {here}` (one HTML file)."
    )


@app.command(rich_help_panel="Studies")
def search(
    space: SpaceFile,
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
            help="An earlier study, or a file that `front --json` printed: its plans are tried first; repeatable.",
        ),
    ] = None,
    address: Address = None,
    inline: Inline = False,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Search: train trials within the budgets and print the Pareto front.

    Example: ranksearch search search_spaces/cifar10_resnet20.yaml --budget flops=50% --trials 6
    Or the smallest net at most a point below dense: ranksearch search SPACE.yaml --at-least accuracy=-1 --objective smallest
    """
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
    from ranksearch import api  # takes seconds to import: mistakes in the space are reported before

    _conclude(
        lambda terminal: api.search(resolved, runs=runs, address=address, inline=inline, observer=terminal),
        resolved.name,
        runs,
        as_json,
    )


@app.command(rich_help_panel="Studies")
def resume(
    study: StudyName,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="New number of planned trials, finished ones included; continues even a study that is done."
        ),
    ] = None,
    address: Address = None,
    inline: Inline = False,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Continue a study that was interrupted or killed: finished trials are kept, running ones go on from their saved states.

    Example: ranksearch resume digits_resnet8 --trials 32
    """
    from ranksearch import api

    _conclude(
        lambda terminal: api.resume(
            study, trials=trials, runs=runs, address=address, inline=inline, trust=trust, observer=terminal
        ),
        study,
        runs,
        as_json,
    )


@app.command(rich_help_panel="Studies")
def front(
    study: StudyName,
    budget: BudgetFlags = None,
    at_least: AtLeast = None,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Print the front of a study, best first; also while it is running. With conditions, print the part that meets them all, cheapest first
    if one of them is on the metric.

    Example: ranksearch front digits_resnet8 --budget params=40% --at-least accuracy=-1
    """
    from ranksearch.console import front_table, print_verdict
    from ranksearch.store.where import find_study, finished_front, kept_front

    folder = find_study(study, runs)
    record, damaged = finished_front(folder) if not (budget or at_least) else None, None
    if record is None:  # the study still runs: its journal knows more than the file; takes seconds to import
        from ranksearch.study.study import Study

        try:
            record = Study.open(folder, trust=trust).front_record(budgets=budget or (), at_least=at_least or ())
        except UsageError as error:
            if budget or at_least or (record := kept_front(folder)) is None:
                raise
            damaged = UsageError(f"{error}\nWhat is printed is the last front that was written.")
    if as_json:
        print_json(record)
    else:
        front_table(record)
        print_verdict(record, f"{study}{runs_option(runs)}")
    if damaged is not None:
        raise damaged
