"""Verbs that look at a space before any trial: `init`, `check`, `layers`, `latency`, `preview`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import (
    DEFAULT_RUNS,
    BudgetFlags,
    Json,
    Runs,
    SettingFlags,
    SpaceFile,
    Trust,
    app,
    ours_is_stdout,
    print_json,
)
from ranksearch.errors import UsageError, nearest

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
"""Kinds of numbers that an input may hold."""


@app.command(rich_help_panel="Before a search")
def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="package.module:callable, torchvision:NAME or timm:NAME.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]CxHxW",
            help="Shape of an input without the batch, and the argument that takes it; repeatable (left out: 3x224x224).",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="float32|int64|…",
            help="Kind of numbers: one for all inputs, or one for each --input in turn (left out: float32).",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where both files go.")] = Path(),
) -> None:
    """Begin with a model of your own: write NAME.yaml, which lists its layers, and NAME_task.py, for you to fill in.

    Example: ranksearch init my_package.nets:make_net --input 3x32x32
    """
    given, dtypes = inputs or ["3x224x224"], dtype or ["float32"]
    if len(dtypes) not in (1, len(given)):
        raise UsageError(
            f"--dtype: got {len(dtypes)} for {len(given)} inputs; give one for all, or one for each --input in turn."
        )
    for wrong in [name for name in dtypes if name not in DTYPES]:
        raise UsageError(f"--dtype {wrong}: expected one of {', '.join(DTYPES)}. {nearest(wrong, DTYPES)}")
    found = [_input(text, kind) for text, kind in zip(given, dtypes * (len(given) // len(dtypes)), strict=True)]
    names = [name for name, _, _ in found if name is not None]
    if names and (len(names) != len(found) or len(set(names)) != len(names)):
        raise UsageError(f"--input: {', '.join(given)}: give every input a name of its own, or none.")
    from ranksearch.space.starter import Given, write_start

    with ours_is_stdout():
        space, task = write_start(model, [Given(shape, kind, name) for name, shape, kind in found], output)
    print(f"{space}\n{task}")
    print(f"Fill in {task} where it says TODO, then: ranksearch check {space}", file=sys.stderr)


def _input(text: str, dtype: str) -> tuple[str | None, tuple[int, ...], str]:
    """Reads NAME=CxHxW or CxHxW as (argument or None, shape, dtype); `NAME=` has the empty shape."""
    name, equals, shape = text.rpartition("=")
    parts = [part.strip() for part in shape.lower().replace(",", "x").split("x")] if shape or not equals else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (equals and not name.isidentifier()):
        raise UsageError(
            f"--input {text}: expected a shape without the batch, such as 3x224x224, or one with its argument, such as input_ids=16."
        )
    return name if equals else None, tuple(map(int, parts)), dtype


@app.command(rich_help_panel="Before a search")
def check(
    space: SpaceFile,
    budget: BudgetFlags = None,
    setting: SettingFlags = None,
    trials: int | None = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Validate a space and print the range of costs it can reach. Trains nothing, needs no data.

    Example: ranksearch check search_spaces/digits_resnet8.yaml --budget size=100KiB
    """
    from ranksearch.console import Terminal
    from ranksearch.space.reading import read_space
    from ranksearch.tables import check_record, print_check

    resolved = read_space(space, budgets=budget or (), settings=setting or (), trials=trials, trust=trust)
    with ours_is_stdout():
        record = check_record(resolved, Terminal().log)
    if as_json:
        print_json(record)
    else:
        print_check(record)


@app.command(rich_help_panel="Before a search")
def layers(space: SpaceFile, setting: SettingFlags = None, trust: Trust = False, as_json: Json = False) -> None:
    """List the layers of a space's net: shapes, MACs, params, measured milliseconds, break-even rank per lowering. Needs no data.

    Example: ranksearch layers search_spaces/cifar10_resnet20.yaml
    """
    from ranksearch.console import Terminal
    from ranksearch.space.reading import read_space
    from ranksearch.tables import layer_rows, print_layers

    resolved = read_space(space, settings=setting or (), trust=trust)
    with ours_is_stdout():
        found = layer_rows(resolved, Terminal().log)
    if as_json:
        print_json(found)
    else:
        print_layers(found)


@app.command(rich_help_panel="Before a search")
def latency(
    space: SpaceFile,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="eager|compile|onnx", help="Left out, the space's; the same goes for --batch and --threads."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Inputs of one call.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    setting: SettingFlags = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Time a net's layers under every lowering and rank on this machine: up to which rank each is faster. Kept in the data folder.

    Example: ranksearch latency search_spaces/cifar10_resnet20.yaml --runtime onnx --batch 32
    """
    from ranksearch.space.reading import read_space

    given = {"runtime": runtime, "batch": batch, "threads": threads}
    settings = [f"latency.{key}={value}" for key, value in given.items() if value is not None]
    resolved = read_space(space, settings=[*(setting or ()), *settings], trust=trust)
    from ranksearch.console import Terminal
    from ranksearch.tables import latency_record, print_latency

    with ours_is_stdout():
        record = latency_record(resolved, Terminal().log)
    if as_json:
        print_json(record)
    else:
        print_latency(record)


@app.command(rich_help_panel="Before a search")
def preview(
    space: SpaceFile,
    budget: BudgetFlags = None,
    setting: SettingFlags = None,
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
            help="solver, uniform, energy, minimax (left out: these four), evbmf, stable_rank, random, greedy, or all; repeatable.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images that a plan is scored on.")] = 1000,
    trust: Trust = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Predict the front in about a minute: plans over a range of budgets, scored after decomposition. Trains no trial.

    Example: ranksearch preview search_spaces/cifar10_resnet20.yaml --levels 75,50,35 --allocator solver --allocator uniform
    """
    from ranksearch.space.reading import read_space

    resolved = read_space(space, budgets=budget or (), settings=setting or (), trust=trust)
    percents = _percents(levels) if levels is not None else None
    from ranksearch import api
    from ranksearch.console import Terminal
    from ranksearch.result_tables import print_preview
    from ranksearch.search.preview import ALLOCATORS, DEFAULT_ALLOCATORS, LEVELS

    names = list(ALLOCATORS) if allocator and "all" in allocator else allocator or DEFAULT_ALLOCATORS
    try:
        with ours_is_stdout():
            record = api.preview(
                resolved, levels=percents or LEVELS, allocators=names, images=images, runs=runs, observer=Terminal()
            )
    except KeyboardInterrupt:
        print("ranksearch: interrupted; no preview was written.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json(record)
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
