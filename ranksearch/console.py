"""What a person sees in the terminal: tables on stdout, logs and progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ranksearch.front.verdict import verdict_of
from ranksearch.places.streams import Shown
from ranksearch.trial.metric import metric_column, metric_text
from ranksearch.words import (
    COST_NAMES,
    dense_ms,
    describe_budgets,
    limit_words,
    mix_of,
    number,
    over_budget,
    percent_of_dense,
    shown_costs,
)

if TYPE_CHECKING:
    from ranksearch.front.row import Row
    from ranksearch.study.study import Study


def table(title: str, columns: Mapping[str, str], rows: Sequence[Sequence[str]], *, spare: Sequence[str] = ()) -> None:
    """Prints a table on stdout; `columns` maps a heading to "left" or "right".

    Piped, it keeps every column. On a terminal too narrow for it, the columns `spare` are left out, the first ones first.
    """
    console = Console(width=None if sys.stdout.isatty() else 200)
    shown, unbounded = list(columns), console.options.update(max_width=10_000)
    for heading in (*spare, None):
        made = Table(title=title, title_justify="left")
        for name in shown:
            made.add_column(name, justify="right" if columns[name] == "right" else "left", no_wrap=True)
        for row in rows:
            made.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in shown))
        if heading is None or console.measure(made, options=unbounded).maximum <= console.width:
            break
        shown.remove(heading)
    console.print(made, highlight=False)


def _measured(row: Mapping[str, Any], front: Mapping[str, Any]) -> list[str]:
    """A net's cells of the front's table, from its validation accuracy to its size; `!` behind a latency above its budget."""
    dense, metric = front["dense"], front["metric"]
    ratio, beside, mark = row.get("latency_ratio"), None, "!" if "trial" in row and over_budget(front, row) else ""
    if row.get("latency_ms") is not None and ratio:
        beside = row["latency_ms"] / ratio
    return [
        metric_text(metric, row["val_accuracy"]), metric_text(metric, row["test_accuracy"]),
        number(100 * row["macs"] / dense["macs"], ".1f"), number(100 * row["params"] / dense["params"], ".1f"),
        number(100 * row["size_bytes"] / dense["size_bytes"], ".1f"), number(None if ratio is None else 100 * ratio, ".1f") + mark,
        number(row["latency_ms"], ".2f"), number(beside, ".2f"), number(row.get("latency_predicted_ms"), ".2f"),
        number(row["macs"]), number(row["params"]), number(row["size_bytes"] / 1024, ".1f"),
    ]  # fmt: skip


SPARE = ("plan", "KiB", "params", "MACs", "made by", "ms predicted", "dense ms", "size %", "params %", "ms %", "ms")
"""Columns of the front's table that a narrow terminal loses, the first ones first; never those of an objective or a budget."""


def front_table(front: Mapping[str, Any]) -> None:
    """The front, best first, with the dense net as the last line; costs in percent of dense before the absolute ones."""
    dense, metric = front["dense"], front["metric"]
    unit = metric_column(metric)
    best = "the most accurate" if metric["name"] == "accuracy" else f"the best {metric['name']}"
    worth = f", hypervolume {front['hypervolume']:.4f}" if len(front["objectives"]) > 1 else f", {best}"
    limit = f", {limit_words(front)}" if front.get("at_least") else ""
    title = f"{front['study']}: {describe_budgets(front)}{limit}{worth}"
    compute = "FLOPs %" if "flops" in shown_costs(front) else "MACs %"
    columns = {
        "trial": "right", f"val {unit}": "right", f"test {unit}": "right", compute: "right", "params %": "right", "size %": "right",
        "ms %": "right", "ms": "right", "dense ms": "right", "ms predicted": "right", "MACs": "right", "params": "right", "KiB": "right",
        "made by": "left", "plan": "left",
    }  # fmt: skip
    rows = [
        [str(row["trial"]), *_measured(row, front), row["allocator"], mix_of(row["plan"])] for row in front["trials"]
    ]
    found = dense_ms(front)
    rows.append(["dense", *_measured(dense | {"latency_ms": found, "latency_ratio": found and 1.0}, front), "", ""])
    times = {"ms %", "ms", "dense ms"} if all(row["latency_ms"] is None for row in front["trials"]) else set()
    times |= {"dense ms"} if found is not None else set()
    times |= {"ms predicted"} if all(row["latency_predicted_ms"] is None for row in front["trials"]) else set()
    known = [name for name in columns if name not in times]
    rows = [[cell for name, cell in zip(columns, row, strict=True) if name in known] for row in rows]
    searched = {f"{'ms' if cost == 'latency' else cost} %" for cost in (*shown_costs(front), *front["budgets"])}
    spare = [name for name in SPARE if name not in searched and name in known]
    table(title, {name: columns[name] for name in known}, rows, spare=spare)


def print_verdict(front: Mapping[str, Any], where: str) -> None:
    """Which net to ship, and what is to be said of it: the last lines that a study prints.

    Args:
        where: how commands name the study.
    """
    verdict = verdict_of(front, where=where)
    console = Console(width=None if sys.stdout.isatty() else 200)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for heading, text in verdict.sentences().items():
        red = heading == "careful" or (heading == "trials" and front.get("failures", {}).get("count"))
        lines.add_row(heading, Text(text, style="red" if red else ""))
    console.print()
    console.print(lines, highlight=False)
    console.print(Text(f"\n{verdict.ship}", style="bold" if verdict.trial is not None else "bold red"))
    if verdict.export:
        console.print(Text(f"  {verdict.export}"), soft_wrap=True)


def _duration(seconds: float) -> str:
    """Such as `40 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _TwoLines(Progress):
    """A bar, and under it a line that is asked for at every refresh."""

    second: Callable[[], str] = staticmethod(lambda: "")

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(f"  {self.second()}", style="dim", no_wrap=True, overflow="ellipsis")


STATUS_SECONDS = 10.0
"""Where there is no terminal, the first pause between two lines of a study's end; each is twice as long as the one before."""


class Terminal:
    """Shows a study on stderr: two live lines where that is a terminal, else one plain line per finished trial."""

    def __init__(self) -> None:
        self.console = Console(file=cast(IO[str], Shown(sys.stderr)), highlight=False)
        self.progress: _TwoLines | None = None
        self._status: Status | None = None
        self._status_at, self._pause = time.monotonic(), STATUS_SECONDS
        self._task: Any = None
        self._started: float | None = None
        self._done_before = 0

    def log(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    def start(self, study: Study) -> None:
        self._started, self._done_before = None, study.finished
        if self.console.is_terminal:
            self.progress = _TwoLines(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} trials"), TimeElapsedColumn(), console=self.console, refresh_per_second=4,
            )  # fmt: skip
            self.progress.second = lambda: self._state(study)
            self.progress.start()
            self._task = self.progress.add_task(study.space.name, total=study.planned, completed=study.finished)
        else:
            self.log(f"{study.space.name}: {study.planned - study.finished} trials to run")

    def _state(self, study: Study) -> str:
        """Such as `trial 5: step 240/400 · best 98.33 % · about 3 min left`."""
        done, best = study.finished, study.leader
        parts = [in_progress(study.running_steps)] if study.running else []
        if best is not None:
            parts.append(f"best {study.metric.text(best.val_accuracy)}")
        if self._started is not None:
            pace = (time.monotonic() - self._started) / max(1, done - self._done_before)
            left = (
                f"about {_duration(pace * (study.planned - done))} left"
                if done < study.planned
                else "then the test set"
            )
            parts.append(left)
        if len(study.space.search.objectives) > 1 and best is not None:
            parts.append(f"hypervolume {study.hypervolume:.4f}")
        return " · ".join(parts)

    def row(self, study: Study, row: Row) -> None:
        if self._started is None:  # what went before the first trial, such as Ray's start, says nothing of the pace
            self._started = time.monotonic() - (row["seconds"] or 0.0)
        if row["status"] == "complete":
            cost = study.cost
            share = percent_of_dense(dict(row), cost)
            at = f"{100 * row['macs_ratio']:.1f} % of MACs" if share is None else f"{share:.1f} % of {COST_NAMES[cost]}"
            what = f"{study.metric.text(row['val_accuracy'])} at {at}, {row['seconds']:.0f} s"
        else:
            first, _, _ = (row["reason"] or "").partition("\n")
            what = f"{row['status']}: {first}"
        joined = row["status"] == "complete" and row["trial"] in study.on_front
        line = f"trial {row['trial']:03d} ({row['allocator']}): {what}{' · joins the front' if joined else ''}"
        bad = row["status"] in ("failed", "diverged")
        if self.progress is not None:
            self.console.print(
                Text(line, style="red" if bad else ""), soft_wrap=True
            )  # not `style=`: the bar would be red, too
            self.progress.update(self._task, completed=study.finished)
        else:
            counted = f"[{study.finished}/{study.planned}] {line} · {self._state(study)}"
            self.console.print(Text(counted, style="red" if bad else ""), soft_wrap=True)

    def status(self, line: str) -> None:
        """One live line on a terminal; elsewhere a plain one now and then, after longer and longer pauses."""
        if not self.console.is_terminal:
            self._log_status(line)
        elif self._status is not None and not line:
            self._status.stop()
            self._status = None
        elif self._status is not None:
            self._status.update(Text(line))
        elif line:
            self._status = self.console.status(Text(line))
            self._status.start()

    def _log_status(self, line: str) -> None:
        now = time.monotonic()
        if not line:
            self._pause = STATUS_SECONDS
        elif now > self._status_at + self._pause:
            self.log(line)
            self._status_at, self._pause = now, 2 * self._pause

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def in_progress(steps: Mapping[int, tuple[int, int]]) -> str:
    """Running trials (number -> steps done, steps in all) in a few words."""
    if len(steps) > 2:
        share = sum(done / of for done, of in steps.values()) / len(steps)
        return f"{len(steps)} running, {100 * share:.0f} % of their steps"
    return ", ".join(f"trial {number}: step {done}/{of}" for number, (done, of) in steps.items())
