"""What `preview`, `export` and `doctor` print of the records that they made."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ranksearch.compress import RankPlan
from ranksearch.console import table
from ranksearch.preflight.findings import ERROR, WARNING, Finding
from ranksearch.trial.metric import metric_text
from ranksearch.words import number


def print_preview(record: dict[str, Any]) -> None:
    """A line per level: every allocator's accuracy, then the solver's plan (or the first allocator's)."""
    names, metric = list(dict.fromkeys(row["allocator"] for row in record["plans"])), record["metric"]
    shown = "solver" if "solver" in names else names[0]
    columns = {f"{record['cost']} ≤": "right"} | {f"{name} {metric['unit']}".rstrip(): "right" for name in names}
    columns |= {"MACs %": "right", "params %": "right", "gap %": "right", f"plan of {shown}": "left"}
    rows = []
    for level in sorted({row["level"] for row in record["plans"]}, reverse=True):
        at = {row["allocator"]: row for row in record["plans"] if row["level"] == level}
        plan = at.get(shown)
        rows.append(
            [
                f"{level:g}%",
                *(_score(at.get(name), metric) for name in names),
                *(
                    [number(100 * plan["macs_ratio"], ".2f"), number(100 * plan["params_ratio"], ".2f")]
                    if plan
                    else ["–", "–"]
                ),
                number(100 * plan["gap"], ".2f") if plan and plan["gap"] is not None else "–",
                RankPlan.from_dict(plan["plan"]).summary() if plan else "",
            ]
        )
    rows.append(
        ["dense", *(metric_text(metric, record["dense"]["val_accuracy"]) for _ in names), "100.00", "100.00", "", ""]
    )
    table(
        f"{record['space']}: decomposed, BN re-estimated, not trained; {metric['name']} on {record['images']:,} validation samples, "
        f"* on the front",
        columns,
        rows,
        spare=(f"plan of {shown}", "gap %", "params %"),
    )


def _score(row: dict[str, Any] | None, metric: Mapping[str, str]) -> str:
    if row is None:
        return "–"
    return f"{metric_text(metric, row['val_accuracy'])}{'*' if row['on_front'] else ' '}"


OPENED_BY = {
    "state_dict": "ranksearch.load({folder!r})",
    "pt2": "torch.export.load({file!r}).module()",
    "onnx": "onnxruntime.InferenceSession({file!r})",
}


def print_export(record: dict[str, Any]) -> None:
    """What was exported, how far it is from the net, how fast it is, and how to open it; one line each."""
    folder, here = Path(record["folder"]), Path.cwd()
    folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
    opened = OPENED_BY[record["format"]].format(folder=str(folder), file=f"{folder}/model.{record['format']}")
    folded = f", {record['folded_bn']} BN layers folded" if record["folded_bn"] else ""
    opset = f", opset {record['opset']}" if record["opset"] else ""
    metric = record["metric"]
    checked = ", ".join(map(str, record["checked_batches"]))
    alike = record["latency_dense_runtime_ms"]
    dense = "" if alike is None else f", dense in the same runtime {alike:.3f} ms"
    what = f"the net at {' and '.join(record['at'])}" if "at" in record else f"trial {record['trial']}"
    print(
        f"{what} of {record['study']} as {record['format']}{opset}{folded}\n"
        f"  files     {folder}/: {', '.join(record['files'])} ({record['size_bytes']:,} bytes), export.json\n"
        f"  checked   max relative error {record['max_rel_error']:.1e} against the net, batches of {checked}\n"
        f"{_fixed(record)}"
        f"  latency   {record['latency_ms']:.3f} ms{dense}; eager {record['latency_eager_ms']:.3f} ms, dense eager "
        f"{record['latency_dense_ms']:.3f} ms (one image, {record['device']})\n"
        f"  {metric['name']:<9} validation {metric_text(metric, record['val_accuracy'], with_unit=True)}, "
        f"test {metric_text(metric, record['test_accuracy'], with_unit=True)}; "
        f"{record['macs']:,} MACs, {record['params']:,} params\n"
        f"  open it   {opened}"
    )


def _fixed(record: Mapping[str, Any]) -> str:
    axes = "; ".join(record.get("fixed_axes", ()))
    return f"  fixed     {axes}: the net takes other extents, this file does not\n" if axes else ""


def print_findings(report: Mapping[str, Any], found: Sequence[Finding]) -> None:
    """What `doctor` found: the nodes, then the checks, the worst first."""
    nodes = [
        [
            node["name"], *(["–"] * 5 if "silent" in node else _node_cells(node)),
        ]
        for node in report["nodes"]
    ]  # fmt: skip
    columns = {"node": "left", "CPUs": "right", "GPUs": "right", "memory free, MiB": "right", "torch": "left"}
    table(f"results: {report['results']}", columns | {"clock, s": "right"}, nodes)
    console = Console(width=None if sys.stdout.isatty() else 160)
    made = Table(show_lines=any(finding.mend for finding in found))
    for heading in ("", "check", "where"):
        made.add_column(heading, no_wrap=heading != "where")
    made.add_column("what", overflow="fold", ratio=1)
    for finding in found:
        what = f"{finding.what}.\n{finding.mend}" if finding.mend else finding.what
        made.add_row(finding.level, finding.check, finding.where, escape(what))
    console.print(made, highlight=False)
    print(ending(found))


def ending(found: Sequence[Finding]) -> str:
    """What `doctor` found in one sentence."""
    errors, warnings = (sum(finding.level == level for finding in found) for level in (ERROR, WARNING))
    if errors:
        return f"Not ready: {errors} of {len(found)} checks would stop a search; each says how to mend it."
    return f"Ready: a search can start{f', with {warnings} warnings above' if warnings else ''}."


def _node_cells(node: Mapping[str, Any]) -> list[str]:
    offers = node.get("offers", {})
    return [
        f"{offers.get('CPU', node['cores']):g}", f"{offers.get('GPU', len(node['gpus'])):g}", number(node["memory_mib"]),
        node["versions"]["torch"] or "–", number(node.get("offset_s"), "+.2f"),
    ]  # fmt: skip
