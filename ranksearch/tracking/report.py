"""A study as one self-contained HTML page: figures, the front, every trial. One can send it to people without MLflow or ranksearch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from ranksearch import __version__
from ranksearch.front.layer_costs import LayerCost, layer_costs
from ranksearch.front.row import Row
from ranksearch.front.verdict import verdict_of
from ranksearch.places.files import write_atomically
from ranksearch.store.where import FRONT_PNG, REPORT
from ranksearch.tasks import model_reference
from ranksearch.tracking.chart import Chart
from ranksearch.tracking.draw_html import fragment, script
from ranksearch.tracking.draw_png import save_png
from ranksearch.tracking.figures import front_chart, study_charts
from ranksearch.tracking.learnt import learnt
from ranksearch.tracking.runs import plan_line
from ranksearch.tracking.trial_figures import trial_charts
from ranksearch.tracking.view import View, cost_percent
from ranksearch.trial.metric import metric_text
from ranksearch.words import COST_NAMES, MADE_BY, dense_ms, describe_budgets, mix_of, number, over_budget

LAYER_FIGURES = ("kept_rank", "lowerings")
DRAWN_TRIALS = 30
"""The most nets of the front whose training is drawn; a page with more is slow to open."""


def report_html(view: View, importances: Mapping[str, Mapping[str, float]]) -> str:
    """The page, of about 2 MB, nearly all of which is the script that draws; nothing is fetched from elsewhere."""
    from jinja2 import Environment, select_autoescape

    charts = study_charts(view, importances)
    figures = _in_their_places({name: fragment(_untitled(chart, view.name)) for name, chart in charts.items()})
    shown, verdict = view.front_rows[::-1], verdict_of(view.front)
    trials = [
        {
            "row": row,
            "layers": _layers(view, row["trial"]),
            "figures": [fragment(chart) for chart in trial_charts(row, view.metric).values()],
        }
        for row in shown[:DRAWN_TRIALS]
    ]
    page = Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        "metric": view.metric.text,
        "value": partial(metric_text, view.metric.to_dict()),
        "number": number,
        "percent": _percent,
        "line": plan_line,
        "mix": mix_of,
        "first_line": _first_line,
        "coded": _coded,
    }
    template = page.from_string(files(__package__).joinpath("report.html.j2").read_text())
    layers = _layers(view, verdict.trial)
    return template.render(
        view=view, verdict=verdict, net=model_reference(view.space.task, view.space.model), figures=figures, trials=trials, shown=shown,
        costs=[(cost, COST_NAMES[cost]) for cost in view.table_costs], drawn_trials=DRAWN_TRIALS, budgets=describe_budgets(view.front),
        objectives=[view.metric.name if name == "accuracy" else COST_NAMES[name] for name in view.objectives],
        counts=", ".join(f"{count} {status}" for status, count in view.front["counts"].items()) or "none done",
        timed=any(row["latency_ms"] is not None for row in shown), dense_ms=dense_ms(view.front),
        layers=layers, layers_timed="layer_ms" in view.info,
        over={row["trial"] for row in view.front["trials"] if over_budget(view.front, row)},
        script=script(), makers=_makers(shown), learnt=learnt(view, importances),
        version=__version__, written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def write_report(view: View, importances: Mapping[str, Mapping[str, float]], folder: Path) -> None:
    """Writes `report.html` and `front.png` into a folder."""
    write_atomically(folder / REPORT, report_html(view, importances))
    if view.complete:
        save_png([front_chart(view, view.costs[0])], folder / FRONT_PNG)


def _in_their_places(drawn: Mapping[str, str]) -> dict[str, list[str]]:
    """Section -> its figures; empty without figures."""
    places: dict[str, list[str]] = {"front": [], "layers": [], "learnt": [], "slices": []} if drawn else {}
    for name, figure in drawn.items():
        layers = "layers" if name in LAYER_FIGURES else "learnt"
        place = next((place for place in ("front", "slice") if name.startswith(place)), layers)
        places["slices" if place == "slice" else place].append(figure)
    return places


def _untitled(chart: Chart, study: str) -> Chart:
    """The chart without the study's name in its title, since it heads the page."""
    title = chart.title.removeprefix(f"{study}: ")
    return replace(chart, title=title[:1].upper() + title[1:])


def _layers(view: View, trial: int | None) -> list[LayerCost]:
    """Every layer under the plan of a trial; empty for a study from before layers were recorded."""
    row = next((row for row in view.trials if row["trial"] == trial), None)
    records = view.info.get("layer_costs")
    return layer_costs(records, row["plan"], view.info.get("layer_ms"), trial) if row is not None and records else []


def _makers(rows: Sequence[Row]) -> list[tuple[str, str]]:
    names = dict.fromkeys(row["allocator"] for row in rows)
    return [(name, MADE_BY[name]) for name in names if name in MADE_BY]


def _percent(row: Mapping[str, Any], cost: str) -> str:
    return number(cost_percent(row, cost), ".1f")


def _coded(text: str) -> str:
    """A sentence as HTML, with its commands, in backticks, as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _first_line(text: str | None) -> str:
    return text.splitlines()[0] if text else ""
