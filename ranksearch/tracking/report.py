"""A study as one self-contained HTML page: its figures, the front, every trial. To send to somebody who has neither MLflow nor us."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from typing import Any

from ranksearch import __version__
from ranksearch.compress import RankPlan
from ranksearch.study.row import Row
from ranksearch.tracking.draw_html import fragment
from ranksearch.tracking.figures import study_charts
from ranksearch.tracking.runs import plan_line
from ranksearch.tracking.trial_figures import trial_charts
from ranksearch.tracking.view import View, cost_percent
from ranksearch.trial.metric import PERCENT, metric_text
from ranksearch.words import COST_NAMES, describe_budgets

DRAWN_TRIALS = 30
"""Nets of the front whose training is drawn; a page with more is slow to open."""


def report_html(view: View, importances: Mapping[str, Mapping[str, float]]) -> str:
    """The page, about 5 MB, nearly all of it the script that draws; nothing is fetched from elsewhere."""
    from jinja2 import Environment, select_autoescape

    charts = study_charts(view, importances)
    drawn = [fragment(chart, script=i == 0) for i, chart in enumerate(charts.values())]
    shown = view.front_rows[::-1]
    trials = [
        {"row": row, "figures": [fragment(chart, script=False) for chart in trial_charts(row, view.metric).values()]}
        for row in shown[:DRAWN_TRIALS]
    ]
    page = Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        "metric": view.metric.text,
        "value": partial(metric_text, view.metric.to_dict()),
        "number": _number,
        "percent": _percent,
        "line": plan_line,
        "mix": _mix,
        "first_line": _first_line,
    }
    template = page.from_string(files(__package__).joinpath("report.html.j2").read_text())
    costs = [cost for cost in dict.fromkeys([*view.costs, "macs", "params", "size"]) if cost != "flops"]
    return template.render(
        view=view, figures=drawn, trials=trials, costs=[(cost, COST_NAMES[cost]) for cost in costs], shown=shown, drawn_trials=DRAWN_TRIALS,
        budgets=describe_budgets(view.front), version=__version__, written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        saved=_saved(view),
    )  # fmt: skip


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _percent(row: Mapping[str, Any], cost: str) -> str:
    return _number(cost_percent(row, cost), ".1f")


def _mix(plan: Mapping[str, Any]) -> str:
    return RankPlan.from_dict(plan).summary()


def _first_line(text: str | None) -> str:
    return text.splitlines()[0] if text else ""


def _saved(view: View) -> Row | None:
    """The net of the front with the fewest MACs among those at most one point below the dense net; None where points mean nothing."""
    if view.metric.unit != PERCENT:
        return None
    least = view.metric.share(view.metric.dense) - 0.01
    near = [row for row in view.front_rows if row["share"] >= least]
    return min(near, key=lambda row: row["macs"], default=None)
