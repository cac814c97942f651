"""The command line: verbs, results on stdout, logs and progress on stderr.

Exit codes: 0 done, 1 the study failed, 2 bad usage or configuration, 130 interrupted. A user's mistake is one message, never a traceback.
Heavy packages are imported inside the verbs: `ranksearch --help` loads neither torch nor ray nor mlflow.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ranksearch import __version__
from ranksearch.errors import RanksearchError, StudyError, UsageError

app = typer.Typer(
    name="ranksearch",
    help="Searches low-rank forms of a PyTorch net under a FLOP, size or latency budget; leaves a Pareto front in MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

SpaceFile = Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="Search-space file.")]
StudyName = Annotated[str, typer.Argument(metavar="NAME|DIR", help="A study's name, or its folder.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", metavar="COST=LIMIT", help="Upper bound, such as flops=50%, size=1MiB, latency=3.5ms; repeatable."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Overrides a value of the space, such as recipe.steps=200; repeatable."
    ),
]
Runs = Annotated[Path, typer.Option("--runs", envvar="RANKSEARCH_RUNS", help="Folder of the studies.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="auto|HOST:PORT", help="Ray cluster to join; left out, Ray runs on this machine."
    ),
]
Inline = Annotated[bool, typer.Option("--inline", help="One trial after the other in this process, without Ray.")]
DEFAULT_RUNS = Path("runs")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ranksearch {__version__}")
        raise typer.Exit


def _conclude(run: Any, name: str, runs: Path, as_json: bool) -> None:
    """Runs a search or its continuation, then prints the front and where to look at it."""
    from ranksearch.console import Terminal, front_table

    terminal = Terminal()
    try:
        study = run(terminal)
    except KeyboardInterrupt:
        terminal.stop()
        started = (runs / name / "study.json").is_file() or (Path(name) / "study.json").is_file()
        kept = f" What is finished is kept: `ranksearch resume {name}{_runs_option(runs)}` goes on." if started else ""
        print(f"ranksearch: interrupted.{kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    front = study.front_record()
    if as_json:
        _print_json(front)
    else:
        front_table(front)
    if not front["trials"] and study.leader is not None:
        raise StudyError(
            f"Every net of {study.space.name!r} was measured to be slower than the dense one, so the front is empty; `ranksearch latency` "
            f"says which layers gain. Allow other lowerings, or another runtime or batch (latency.runtime, latency.batch)."
        )
    if not front["trials"]:
        raise StudyError(f"No trial of {study.space.name!r} was completed; see `{study.folder}`.")
    store = study.space.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    experiment, here = study.space.tracking.experiment or study.space.name, f"{study.space.name}{_runs_option(runs)}"
    at = f"MLflow at {store}, experiment {experiment!r}, or " if store else ""
    print(
        f"\nThe study is in {study.folder}/ (front.json, trials/NNN/ with each net).\n"
        f"To look at it: {at}`ranksearch ui {here}` (MLflow), `ranksearch report {here}` (one HTML file).",
        file=sys.stderr,
    )


def _runs_option(runs: Path) -> str:
    return "" if runs == DEFAULT_RUNS else f" --runs {runs}"


@app.command()
def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="package.module:callable, torchvision:NAME or timm:NAME.")
    ],
    input_shape: Annotated[
        str, typer.Option("--input", metavar="CxHxW", help="Shape of one input, without the batch.")
    ] = "3x224x224",
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where both files go.")] = Path(),
) -> None:
    """Begin with a model of your own: write NAME.yaml, its layers listed, and NAME_task.py, to be filled in.

    Example: ranksearch init my_package.nets:make_net --input 3x32x32
    """
    parts = input_shape.lower().replace(",", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input {input_shape}: expected a shape without the batch, such as 3x224x224.")
    from ranksearch.search.starter import write_start

    space, task = write_start(model, [int(part) for part in parts], output)
    print(f"{space}\n{task}")
    print(f"Fill in {task} where it says TODO, then: ranksearch check {space}", file=sys.stderr)


@app.command()
def search(
    space: SpaceFile,
    budget: Budgets = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Number of trials.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study; left out, the space's.")] = None,
    setting: Settings = None,
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
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Search: train trials within the budgets and print the Pareto front.

    Example: ranksearch search search_spaces/cifar10_resnet20.yaml --budget flops=50% --trials 6
    """
    from ranksearch.search.space_file import read_space

    resolved = read_space(
        space, budgets=budget or (), settings=setting or (), trials=trials, name=name, warm_start=warm_start or ()
    )
    from ranksearch import api  # seconds of imports: a mistake in the space is told before them

    _conclude(
        lambda terminal: api.search(resolved, runs=runs, address=address, inline=inline, observer=terminal),
        resolved.name,
        runs,
        as_json,
    )


@app.command()
def resume(
    study: StudyName,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Planned trials from now on, finished ones included: goes on with a study that is done."
        ),
    ] = None,
    address: Address = None,
    inline: Inline = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Continue a study that was interrupted or killed: finished trials are kept, running ones go on from their states.

    Example: ranksearch resume digits_resnet8 --trials 32
    """
    from ranksearch import api

    _conclude(
        lambda terminal: api.resume(study, trials=trials, runs=runs, address=address, inline=inline, observer=terminal),
        study,
        runs,
        as_json,
    )


@app.command()
def layers(space: SpaceFile, setting: Settings = None, as_json: Json = False) -> None:
    """List the layers of a space's net: shapes, MACs, params, break-even rank per lowering. Needs no data.

    Example: ranksearch layers search_spaces/cifar10_resnet20.yaml
    """
    from ranksearch.search.space_file import read_space
    from ranksearch.tables import layer_rows, print_layers

    resolved = read_space(space, settings=setting or ())
    found = layer_rows(resolved)
    if as_json:
        _print_json(found)
    else:
        print_layers(found)


@app.command()
def check(
    space: SpaceFile, budget: Budgets = None, setting: Settings = None, trials: int | None = None, as_json: Json = False
) -> None:
    """Validate a space and print the range of costs it can reach. Trains nothing, needs no data.

    Example: ranksearch check search_spaces/digits_resnet8.yaml --budget size=100KiB
    """
    from ranksearch.console import Terminal
    from ranksearch.search.space_file import read_space
    from ranksearch.tables import check_record, print_check

    resolved = read_space(space, budgets=budget or (), settings=setting or (), trials=trials)
    record = check_record(resolved, Terminal().log)
    if as_json:
        _print_json(record)
    else:
        print_check(record)


@app.command()
def latency(
    space: SpaceFile,
    runtime: Annotated[
        str | None, typer.Option(metavar="eager|compile|onnx", help="Left out, the space's; as are the next two.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Inputs of one call.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    setting: Settings = None,
    as_json: Json = False,
) -> None:
    """Time a net's layers under every lowering and rank on this machine: up to which rank each is faster. Kept in the data folder.

    Example: ranksearch latency search_spaces/cifar10_resnet20.yaml --runtime onnx --batch 32
    """
    from ranksearch.search.space_file import read_space

    given = {"runtime": runtime, "batch": batch, "threads": threads}
    settings = [f"latency.{key}={value}" for key, value in given.items() if value is not None]
    resolved = read_space(space, settings=[*(setting or ()), *settings])
    from ranksearch.console import Terminal
    from ranksearch.tables import latency_record, print_latency

    record = latency_record(resolved, Terminal().log)
    if as_json:
        _print_json(record)
    else:
        print_latency(record)


@app.command()
def preview(
    space: SpaceFile,
    budget: Budgets = None,
    setting: Settings = None,
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="P,P,…", help="Budgets in percent of the dense net's cost; left out, 75 to 25 and the space's own."
        ),
    ] = None,
    allocator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="solver, uniform, energy, minimax (these four where left out), evbmf, stable_rank, random, greedy, or all; repeatable.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images that a plan is scored on.")] = 1000,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Predict the front in about a minute: plans over a range of budgets, scored after decomposition. Trains no trial.

    Example: ranksearch preview search_spaces/cifar10_resnet20.yaml --levels 75,50,35 --allocator solver --allocator uniform
    """
    from ranksearch.search.space_file import read_space

    resolved = read_space(space, budgets=budget or (), settings=setting or ())
    percents = _percents(levels) if levels is not None else None
    from ranksearch import api
    from ranksearch.console import Terminal
    from ranksearch.search.preview import ALLOCATORS, DEFAULT_ALLOCATORS, LEVELS
    from ranksearch.tables import print_preview

    names = list(ALLOCATORS) if allocator and "all" in allocator else allocator or DEFAULT_ALLOCATORS
    try:
        record = api.preview(
            resolved, levels=percents or LEVELS, allocators=names, images=images, runs=runs, observer=Terminal()
        )
    except KeyboardInterrupt:
        print("ranksearch: interrupted; no preview was written.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(record)
    else:
        print_preview(record)


def _percents(text: str) -> list[float]:
    """Levels such as "75,50,35": numbers above 0 and at most 100."""
    try:
        percents = [float(part.strip().rstrip("%")) for part in text.split(",")]
    except ValueError:
        percents = []
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise UsageError(f"--levels {text}: expected percentages of the dense net's cost, such as 75,50,35.")
    return percents


@app.command()
def front(study: StudyName, runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Print the front of a study, best first; also while it is running.

    Example: ranksearch front digits_resnet8 --json
    """
    from ranksearch.console import front_table
    from ranksearch.search.study import Study
    from ranksearch.search.study_folder import find_study

    record = Study.open(find_study(study, runs)).front_record()
    if as_json:
        _print_json(record)
    else:
        front_table(record)


@app.command()
def export(
    study: StudyName,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's number, or `best`: the most accurate one.")],
    format: Annotated[
        str,
        typer.Option("--format", metavar="state_dict|pt2|onnx", help="For ranksearch.load, PyTorch alone, or others."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Left out, runs/NAME/exports/TRIAL-FORMAT.")
    ] = None,
    fold_bn: Annotated[bool, typer.Option("--fold-bn", help="Fold BN into the layers before it (pt2, onnx).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Export a trial's net: written, opened again, compared with the net, timed. An export that computes something else is removed.

    Example: ranksearch export digits_resnet8 best --format onnx
    """
    from ranksearch import api
    from ranksearch.console import Terminal
    from ranksearch.tables import print_export

    record = api.export(
        study, trial, format=format, output=output, runs=runs, fold_bn=fold_bn, force=force, observer=Terminal()
    )
    if as_json:
        _print_json(record)
    else:
        print_export(record)


@app.command()
def sync(study: StudyName, runs: Runs = DEFAULT_RUNS) -> None:
    """Bring MLflow up to date with a study, after a server that was away; nothing is logged twice.

    Example: ranksearch sync digits_resnet8
    """
    from ranksearch import api
    from ranksearch.console import Terminal

    api.sync(study, runs=runs, observer=Terminal())


@app.command()
def report(
    study: StudyName,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Left out, report.html in the study's folder.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Write a study's figures and tables as one HTML file, to send to a colleague; also while it is running.

    Example: ranksearch report digits_resnet8 -o report.html
    """
    from ranksearch import api

    path = api.report(study, output=output, runs=runs)
    if as_json:
        _print_json({"study": study, "report": str(path), "size_bytes": path.stat().st_size})
    else:
        print(path)


@app.command()
def ui(
    where: Annotated[str, typer.Argument(metavar="[DIR|NAME]", help="Folder of the studies, or one study.")] = "runs",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port; the next free one is taken where it is in use.")
    ] = 5000,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Open MLflow's UI on 127.0.0.1 and print the links of the studies' pages.

    Example: ranksearch ui digits_resnet8
    """
    from ranksearch.tracking.store import is_server
    from ranksearch.tracking.ui import find_store, say_pages, serve

    def say(text: str) -> None:
        print(text, flush=True)

    opened = find_store(where, runs)
    if is_server(opened.uri):
        say(f"The studies are on an MLflow server already: {opened.uri}")
        say_pages(opened, opened.uri, say)
        return
    serve(opened, port, say)


def main() -> None:
    """Entry point: turns our own errors into one message and an exit code."""
    try:
        app()
    except UsageError as error:
        print(f"ranksearch: {error}", file=sys.stderr)
        sys.exit(2)
    except RanksearchError as error:
        print(f"ranksearch: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
