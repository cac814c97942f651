"""The front in words and tables: the description of a study's run (Markdown), CSV, MLflow's table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ranksearch.front.layer_costs import layer_costs
from ranksearch.front.row import Row
from ranksearch.front.verdict import verdict_of
from ranksearch.tasks import model_reference
from ranksearch.tracking.runs import TAG_LENGTH, scored
from ranksearch.tracking.view import View, cost_percent
from ranksearch.trial.metric import Metric, metric_text
from ranksearch.words import COST_NAMES, COST_RATIOS, MADE_BY, describe_budgets

COLUMNS = (
    "trial", "val_accuracy", "test_accuracy", "macs", "macs_ratio", "params", "params_ratio", "size_bytes", "size_ratio", "latency_ms",
    "latency_ratio", "allocator", "epochs", "seed",
)  # fmt: skip
THUMBNAIL = "front_small.png"
NOTE_END = "a run per study, its trials beneath it."
NOTED_STUDIES = 9
"""The most other studies of an experiment that its note names."""
SHOWN = 30
"""The most nets of a front that the description lists: a store takes 5,000 characters."""


def front_csv(front: dict[str, Any]) -> str:
    """The front as CSV, one line per net, most accurate first."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(front["trials"])
    return buffer.getvalue()


def front_table(front: dict[str, Any]) -> dict[str, Any]:
    """The front in the form of MLflow's tables. (`MlflowClient.log_table` would append to the previous one.)"""
    return {"columns": list(COLUMNS), "data": [[row[name] for name in COLUMNS] for row in front["trials"]]}


def headline(view: View) -> str:
    """The name of a study's run, which heads its page: the verdict in short, `digits: ship t008 test 98.6% (dense 99.2%) @45% MACs`."""
    verdict, best, metric = verdict_of(view.front), view.champion, view.metric
    if best is None or verdict.value is None or verdict.dense is None:
        return f"{view.name}: no net to ship" if view.trials and not view.complete else view.name
    score = f"{verdict.split} {scored(verdict.value, metric)} (dense {scored(verdict.dense, metric).removeprefix(f'{metric.name} ')})"
    cost = view.costs[0]
    return f"{view.name}: ship t{best['trial']:03d} {score} @{cost_percent(best, cost):.0f}% {COST_NAMES[cost]}"


def experiment_note(view: View, before: str) -> str:
    """Describes an experiment: a line per study, this one's verdict first (the UI shows the first line above every page), and a sentence.

    Args:
        before: the note so far. Other studies' lines are kept; a note that somebody else wrote stays as it is.
    """
    search, net = view.space.search, model_reference(view.space.task, view.space.model)
    wanted = " and ".join(view.metric.name if name == "accuracy" else COST_NAMES[name] for name in search.objectives)
    if before and not before.endswith(NOTE_END):
        return before
    alone = view.space.tracking.experiment in (None, view.name)  # a list shows the first words, without Markdown
    own = [f"{'' if alone else f'**{view.name}**: '}{verdict_of(view.front).ship}"] if view.trials else []
    others = [line for line in before.splitlines() if line.startswith("**") and not line.startswith(f"**{view.name}**")]
    holds = f"Low-rank forms of {net} for {wanted} within {describe_budgets(view.front)}: {NOTE_END}"
    return "\n\n".join([*own, *others[:NOTED_STUDIES], holds])


def note(view: View, *, registered: bool, run_id: str | None = None) -> str:
    """Says, in Markdown, which net to ship, what the front is, and how to get its nets. The verdict is first, above what the UI folds away.

    Args:
        run_id: that of the study's run, which has `front.png` among its artifacts; without it no picture is shown.
    """
    front, dense, metric, verdict = view.front, view.dense, view.metric, verdict_of(view.front)
    costs = view.table_costs[:-1]
    lines = [f"**{verdict.ship}**", ""]
    if front["trials"] and run_id is not None:  # a low picture, which fits above what is folded away
        lines += [f"![the front](get-artifact?path={THUMBNAIL}&run_uuid={run_id})", ""]
    if verdict.export:
        lines += [f"`{verdict.export}`", ""]
    lines += [f"- {heading}: {text}" for heading, text in verdict.sentences().items()]
    if not front["trials"]:
        return "\n".join(lines)
    if run_id is not None:
        lines += ["", f"![the front](get-artifact?path=front.png&run_uuid={run_id})"]
    heads = " | ".join(f"{COST_NAMES[cost]} %" for cost in costs)
    lines += [
        "",
        f"| trial | validation {metric.column} | test {metric.column} | {heads} | plan made by |",
        "|---" * (4 + len(costs)) + "|",
    ]
    for row in front["trials"][:SHOWN]:
        lines.append(f"| {row['trial']} | {' | '.join(_cells(row, costs, metric))} | {row['allocator']} |")
    if (more := len(front["trials"]) - SHOWN) > 0:
        lines += [f"| … | {more} more in front.csv |"]
    lines += [
        f"| dense | {' | '.join(_cells({**dense, **dict.fromkeys(COST_RATIOS.values(), 1.0)}, costs, metric))} | |"
    ]
    return "\n".join([*lines, "", *_hints(view, registered=registered)])


def _cells(row: Mapping[str, Any], costs: Sequence[str], metric: Metric) -> list[str]:
    cells = [metric_text(metric.to_dict(), row[name]) for name in ("val_accuracy", "test_accuracy")]
    return cells + [f"{percent:.1f}" if (percent := cost_percent(row, cost)) is not None else "–" for cost in costs]


def trial_note(row: Row, folder: Path, info: Mapping[str, Any], metric: Metric) -> str:
    """Says, in Markdown, what became of a trial, how to load its net, and what its layers become; cut to what a store takes."""
    load = f'`ranksearch.load("{folder.parent.name}/{folder.name}/trials/{row["trial"]:03d}")`'
    if row["status"] != "complete":
        return f"**{row['status']}**: {row['reason'] or 'no reason was given'}"[:TAG_LENGTH]
    lines = [
        f"**validation {metric.text(row['val_accuracy'])}** with {100 * row['macs_ratio']:.0f} % of the MACs and "
        f"{100 * row['params_ratio']:.0f} % of the parameters; its plan: {MADE_BY.get(row['allocator'], row['allocator'])}.", "",
        f"To load it: {load}.",
    ]  # fmt: skip
    if info.get("layer_costs"):
        lines += ["", "| layer | becomes | MACs | dense MACs |", "|---|---|---|---|"]
        for layer in layer_costs(info["layer_costs"], row["plan"]):
            lines.append(f"| {layer.name} | {layer.becomes} | {layer.kept_macs:,} | {layer.macs:,} |")
    text = ""
    for line in lines:
        if len(text) + len(line) > TAG_LENGTH - 60:
            return f"{text}| … | all of them in plan.json | | |"
        text += f"{line}\n"
    return text.rstrip()


def _hints(view: View, *, registered: bool) -> list[str]:
    """Says how to get the nets."""
    best = view.champion
    if best is None:
        return []
    hints = [
        "Figures are among the artifacts; `report.html` has all of them, interactive, on one page. Trials of the front: "
        "filter `tags.on_front = 'true'`.",
        "",
        "To use a net:",
        f'- in Python with ranksearch: `ranksearch.load("{view.folder.parent.name}/{view.name}/trials/{best["trial"]:03d}")`',
    ]
    if view.space.tracking.models:
        hints.append(
            "- anywhere with MLflow and torch, without ranksearch: the run of a trial on the front links its model, "
            '`mlflow.pytorch.load_model("models:/MODEL_ID")` (an exported program; no pickle is read)'
        )
    hints.append(
        f"- as a file for other runtimes: `ranksearch export {view.name} {best['trial']} --format onnx` (or `pt2`, `state_dict`)"
    )
    if registered:
        hints.append(
            f'- the most accurate one within the budgets: `mlflow.pytorch.load_model("models:/{view.name}@champion")`'
        )
    return hints
