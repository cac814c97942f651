"""Verbs that take a study's results elsewhere: `export`, `sync`, `report`, `ui`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import (
    DEFAULT_RUNS,
    AtLeast,
    BudgetFlags,
    Json,
    Runs,
    StudyName,
    Trust,
    app,
    ours_is_stdout,
    print_json,
)
from ranksearch.errors import UsageError
from ranksearch.places.files import write_atomically


@app.command(rich_help_panel="Results")
def export(
    study: StudyName,
    trial: Annotated[
        str | None, typer.Argument(metavar="TRIAL", help="A trial's number, or `best`; left out with --at.")
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="COST=LIMIT",
            help="For a nested study: the net for any budget, such as flops=37%; repeated, all hold at once.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="state_dict|pt2|onnx",
            help="For ranksearch.load, for plain PyTorch, or for other runtimes.",
        ),
    ] = "state_dict",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Left out, runs/NAME/exports/TRIAL-FORMAT.")
    ] = None,
    budget: BudgetFlags = None,
    at_least: AtLeast = None,
    fold_bn: Annotated[bool, typer.Option("--fold-bn", help="Fold BN into the layers before it (pt2, onnx).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Export a trial's net: write it, open it again, compare it with the net, time it. An export that computes something else is removed.

    Example: ranksearch export digits_resnet8 best --format onnx
    Or with conditions: ranksearch export digits_resnet8 best --format onnx --budget params=40% --at-least accuracy=-1
    """
    from ranksearch import nets
    from ranksearch.console import Terminal
    from ranksearch.result_tables import print_export

    with ours_is_stdout():
        record = nets.export(
            study,
            trial,
            format=format,
            at=at or (),
            output=output,
            runs=runs,
            fold_bn=fold_bn,
            force=force,
            trust=trust,
            observer=Terminal(),
            budgets=budget or (),
            at_least=at_least or (),
        )
    if as_json:
        print_json(record)
    else:
        print_export(record)


@app.command("plan-to", rich_help_panel="Results")
def plan_to(
    form: Annotated[str, typer.Argument(metavar="peft|torchao|json", help="Who will read it.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json, or a folder with one, such as a trial's.")],
    period: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps between projections (torchao); left out, every step.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Left out, stdout.")] = None,
) -> None:
    """Write a plan for others: PEFT's LoRA patterns, a pruning config of torchao's PAT, or plain JSON.

    Example: ranksearch plan-to peft runs/digits_resnet8/trials/003
    """
    from ranksearch import nets

    with ours_is_stdout():
        record = nets.plan_file_to(plan, form, period=period)
    for name, why in record.get("left_out", {}).items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    if output is None:
        print_json(record)
    else:
        try:
            write_atomically(output, json.dumps(record, indent=2))
        except OSError as error:
            raise UsageError(f"{output} cannot be written ({error}): name another file with -o.") from error


@app.command(rich_help_panel="Results")
def sync(study: StudyName, trust: Trust = False, runs: Runs = DEFAULT_RUNS) -> None:
    """Bring MLflow up to date with a study, for example after its server was down; nothing is logged twice.

    Example: ranksearch sync digits_resnet8
    """
    from ranksearch import api
    from ranksearch.console import Terminal

    api.sync(study, runs=runs, trust=trust, observer=Terminal())


@app.command(rich_help_panel="Results")
def report(
    study: StudyName,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Left out, report.html in the study's folder.")
    ] = None,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Write a study's figures and tables as one HTML file, to send to a colleague; also while it is running.

    Example: ranksearch report digits_resnet8 -o report.html
    """
    from ranksearch import api

    with ours_is_stdout():
        path = api.report(study, output=output, runs=runs, trust=trust)
    if as_json:
        print_json({"study": study, "report": str(path), "size_bytes": path.stat().st_size})
    else:
        print(path)


@app.command(rich_help_panel="Results")
def ui(
    where: Annotated[str, typer.Argument(metavar="[DIR|NAME]", help="Folder of the studies, or one study.")] = "runs",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port; if it is in use, the next free one is taken.")
    ] = 5000,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Open MLflow's UI on 127.0.0.1 and print the links of the studies' pages.

    Example: ranksearch ui digits_resnet8
    """
    from ranksearch.tracking.store import is_server
    from ranksearch.tracking.ui import find_store, say_pages, serve

    def say(text: str) -> None:
        print(text, flush=True)

    opened = find_store(where, runs, trust=trust)
    if is_server(opened.uri):
        address = re.sub(r"(?<=://)[^/@]*@", "", opened.uri)  # a browser asks for user and password itself
        say(f"The studies are on an MLflow server already: {address}")
        say_pages(opened, address, say)
        return
    serve(opened, port, say)
