"""The command line's application, and what several of its verbs share: arguments, options, printing."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="ranksearch",
    help="Searches low-rank forms of a PyTorch net under a FLOP, size or latency budget; leaves a Pareto front in MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpaceFile = Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="Search-space file.")]
StudyName = Annotated[str, typer.Argument(metavar="NAME|DIR", help="A study's name, or its folder.")]
BudgetFlags = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", metavar="COST=LIMIT", help="Upper bound, such as flops=50%, size=1MiB, latency=3.5ms; repeatable."
    ),
]
AtLeast = Annotated[
    list[str] | None,
    typer.Option(
        "--at-least",
        metavar="METRIC=LIMIT",
        help="Lower limit on the metric: accuracy=-1 (points below dense), accuracy=-2% (of dense's value), accuracy=90 (the value).",
    ),
]
ObjectiveFlag = Annotated[
    str | None,
    typer.Option(
        "--objective",
        metavar="GOAL",
        help="smallest, fastest, fewest-MACs, fewest-params, or costs such as latency,size.",
    ),
]
Trials = Annotated[int | None, typer.Option(min=1, help="Number of trials.")]
NewName = Annotated[str | None, typer.Option(help="Name of the study; left out, the space's.")]
SettingFlags = Annotated[
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
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run the task file in a study's folder and use the addresses in it, even if somebody else made the study.",
    ),
]
DEFAULT_RUNS = Path("runs")


def ours_is_stdout() -> AbstractContextManager[Any]:
    """Sends what a user's code prints within the block to stderr, so that stdout holds only our results."""
    return redirect_stdout(sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def runs_option(runs: Path) -> str:
    """The option that a command needs if the studies are not in the default folder."""
    return "" if runs == DEFAULT_RUNS else f" --runs {runs}"
