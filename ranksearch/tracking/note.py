"""The front in words and tables: the description of a study's run (Markdown), CSV, MLflow's table."""

from __future__ import annotations

import csv
import io
from typing import Any

from ranksearch.tasks import model_reference
from ranksearch.tracking.view import View, cost_percent
from ranksearch.trial.metric import metric_text
from ranksearch.words import COST_NAMES, describe_budgets

COLUMNS = (
    "trial", "val_accuracy", "test_accuracy", "macs", "macs_ratio", "params", "params_ratio", "size_bytes", "size_ratio", "latency_ms",
    "latency_ratio", "allocator", "epochs", "seed",
)  # fmt: skip
SHOWN = 40
"""Nets of a front that the description lists: a store takes 5,000 characters."""


def front_csv(front: dict[str, Any]) -> str:
    """The front as CSV, one line per net, most accurate first."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(front["trials"])
    return buffer.getvalue()


def front_table(front: dict[str, Any]) -> dict[str, Any]:
    """The front as MLflow's UI shows tables. (`MlflowClient.log_table` would append it to the one before.)"""
    return {"columns": list(COLUMNS), "data": [[row[name] for name in COLUMNS] for row in front["trials"]]}


def note(view: View, *, complete: bool, registered: bool) -> str:
    """What was searched, the dense baseline, the front, how to get at its nets: Markdown."""
    front, search = view.front, view.space.search
    state = f"{len(view.trials)} trials" if complete else f"{len(view.trials)} of {search.trials} trials so far"
    dense, metric, net = view.dense, view.metric, model_reference(view.space.task, view.space.model)
    costs = [cost for cost in dict.fromkeys([*view.costs, "macs", "params"]) if cost != "flops"]
    heads = " | ".join(f"{COST_NAMES[cost]} % of dense" for cost in costs)
    lines = [
        f"**{view.name}**: low-rank forms of {net} for {' and '.join(search.objectives)} within "
        f"{describe_budgets(front)}; {state}, {search.parametrization} parametrization, sampler {search.sampler}"
        + (f", hypervolume {front['hypervolume']:.4f}." if len(search.objectives) > 1 else "."),
        "",
        f"Dense net: validation {metric.text(dense['val_accuracy'])}, test {metric.text(dense['test_accuracy'])}, "
        f"{dense['macs']:,} MACs, {dense['params']:,} parameters, {dense['size_bytes'] / 1024:,.0f} KiB.",
        "",
        f"| trial | validation {metric.column} | test {metric.column} | {heads} | plan made by |",
        "|---" * (4 + len(costs)) + "|",
    ]
    for row in front["trials"][:SHOWN]:
        cells = [metric_text(metric.to_dict(), row[name]) for name in ("val_accuracy", "test_accuracy")]
        cells += [f"{percent:.1f}" if (percent := cost_percent(row, cost)) is not None else "–" for cost in costs]
        lines.append(f"| {row['trial']} | {' | '.join(cells)} | {row['allocator']} |")
    if more := len(front["trials"]) - SHOWN:
        lines += [f"| … | {more} more in front.csv |"] if more > 0 else []
    return "\n".join([*lines, "", *_hints(view, registered=registered)])


def _hints(view: View, *, registered: bool) -> list[str]:
    """How to get at the nets."""
    best = view.champion
    if best is None:
        return ["No trial was completed."]
    hints = [
        "Figures are among the artifacts: `front.html`, more in `figures/`, all of them on one page in `report.html`. Trials of the front: "
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
