"""What a trial's and a study's run hold in MLflow: names, tags, parameters, metrics. These are only values; `mirror.py` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from ranksearch.compress import RankPlan
from ranksearch.front.row import Row
from ranksearch.lowering.contract import sides
from ranksearch.space.settings import Choices, Range, Strict
from ranksearch.space.space import Space
from ranksearch.tracking.store import TRIALS_VIEW
from ranksearch.tracking.view import View, cost_percent
from ranksearch.trial.metric import PERCENT, Metric, as_read
from ranksearch.trial.result import Status
from ranksearch.words import COST_NAMES, COST_RATIOS

PARENT_TAG = "mlflow.parentRunId"
KIND_TAG, STUDY_TAG, TRIAL_TAG, MODEL_TAG = (
    "ranksearch.kind",
    "ranksearch.study",
    "ranksearch.trial",
    "ranksearch.model",
)
ENDED = {Status.COMPLETE: "FINISHED", Status.STOPPED: "KILLED"}
"""Status of a trial -> MLflow's status; all others are FAILED."""
TAG_LENGTH = 5000
"""The most characters of a tag that every store takes."""
FINAL = (
    "test_accuracy", "macs", "params", "size_bytes", "latency_ms", "macs_ratio", "params_ratio", "size_ratio", "latency_ratio",
    "epochs", "images_per_second", "projection_share", "seconds",
)  # fmt: skip

ROUNDED = {"val_accuracy": "val_percent", "test_accuracy": "test_percent"}
"""Values of a metric in percent -> names of the same rounded for reading, since MLflow's tables show every digit."""
PERCENTS = {ratio.replace("_ratio", "_percent"): ratio for ratio in dict.fromkeys(COST_RATIOS.values())}
"""Name of a ratio in percent with one decimal, for tables -> name of the exact ratio."""

Step = tuple[int, dict[str, float]]


# A trial -----------------------------------------------------------------------------------------------------------


def run_name(row: Row, cost: str, metric: Metric) -> str:
    """A child run's readable name, such as `t017 91.2% @48% MACs`: it sorts well, and a narrow column still shows what matters."""
    if row["status"] != Status.COMPLETE:  # rows of a front's record are dictionaries
        return f"t{row['trial']:03d} {row['status']}"
    return (
        f"t{row['trial']:03d} {scored(row['val_accuracy'], metric)} @{cost_percent(row, cost):.0f}% {COST_NAMES[cost]}"
    )


def scored(value: float, metric: Metric) -> str:
    """A value of the metric in a name: `91.2%`, `rmse 0.485`."""
    text = f"{value:.1f}%" if metric.unit == PERCENT else metric.text(value)
    return text if metric.name == "accuracy" else f"{metric.name} {text}"


def plan_line(plan: Mapping[str, Any]) -> str:
    """A plan in one line, `layer lowering:rank`; layers that stay dense are left out."""
    found = RankPlan.from_dict(plan)
    parts = [f"{name} {layer.lowering}:{'·'.join(map(str, sides(layer.rank)))}" for name, layer in found.lowered()]
    return "; ".join(parts) or "dense"


def trial_tags(row: Row, info: Mapping[str, Any], space: Space, *, on_front: bool) -> dict[str, str]:
    """The tags by which trials are filtered."""
    plan = row["plan"]
    return {
        KIND_TAG: "trial",
        TRIAL_TAG: str(row["trial"]),
        "status": row["status"],
        "on_front": str(on_front).lower(),
        "allocator": str(row["allocator"]),
        **_provenance(info, space),
        **({"lowerings": RankPlan.from_dict(plan).summary(), "plan": plan_line(plan)[:TAG_LENGTH]} if plan else {}),
        **{name: row[name][:TAG_LENGTH] for name in ("reason", "eager") if row[name]},
        **({name: row["placement"][name] for name in ("node", "node_id")} if row["placement"] else {}),
    }


def trial_params(row: Row) -> dict[str, str]:
    """Number, seed, the plan's allocator, and what was searched; fixed settings are in the study's run."""
    searched = {name: str(value) for name, value in row["params_searched"].items()}
    return {"trial": str(row["trial"]), "seed": str(row["seed"]), "allocator": str(row["allocator"]), **searched}


def trial_metrics(row: Row, metric: Metric) -> Iterator[Step]:
    """Yields (step, metrics): the final values (at step 0), the training curve, the score after every phase, what projections did."""
    yield 0, final_metrics(row, metric)
    for entry in row["losses"]:
        yield entry["step"], {"train_loss": entry["train_loss"]}
    for order, entry in enumerate(row["history"], start=1):  # several phases end at one step of the optimizer
        yield order, {f"phases/{name}": entry[name] for name in ("val_accuracy", "val_loss")}
    for record in row["projections"]:
        yield record["step"], _projection(record)


def rounded(values: Mapping[str, float], metric: Metric) -> dict[str, float]:
    """The metric's values rounded for reading, if the metric is in percent."""
    if metric.unit != PERCENT:
        return {}
    return {read: as_read(metric.to_dict(), values[name]) for name, read in ROUNDED.items() if name in values}


def final_metrics(row: Row, metric: Metric) -> dict[str, float]:
    """A trial's results; what a diverged or stopped trial reached before its end is only under its phases."""
    names = ("val_accuracy", "val_loss", *FINAL) if row["status"] == Status.COMPLETE else FINAL
    found = {name: float(row[name]) for name in names if row.get(name) is not None}
    return (
        found
        | rounded(found, metric)
        | {percent: round(100 * row[ratio], 1) for percent, ratio in PERCENTS.items() if row.get(ratio) is not None}
    )


def late_metrics(row: Row, metric: Metric, *, timed_before: bool) -> Iterator[tuple[float, dict[str, float]]]:
    """Yields (seconds after the trial's end, metrics) of what was measured once the trials were over; logging it again adds no value.

    Args:
        timed_before: whether the trial was also timed on its own; the value measured in turn with the dense net must then be the later one.
    """
    if row["test_accuracy"] is not None:
        tested = {"test_accuracy": row["test_accuracy"]}
        yield 0.0, tested | rounded(tested, metric)
    if row["latency_ms"] is not None:
        found = {name: value for name, value in final_metrics(row, metric).items() if name.startswith("latency")}
        yield 0.001 if timed_before else 0.0, found


def _projection(record: Mapping[str, Any]) -> dict[str, float]:
    """The loss before and after, and the mean and largest share of ||W||² that a layer lost; each layer's share is in trial.json."""
    losses = {f"projection/{name}": record[name] for name in ("loss_before", "loss_after") if record[name] is not None}
    removed = record["removed_energy"].values()
    if not removed:
        return losses
    return losses | {
        "projection/removed_energy_mean": sum(removed) / len(removed),
        "projection/removed_energy_max": max(removed),
    }


def trial_file(row: Row) -> dict[str, Any]:
    """What `trial.json` holds beside the run's metrics: the whole recipe, scores, losses, removed energy per layer."""
    names = (
        "trial",
        "seed",
        "status",
        "reason",
        "eager",
        "val_accuracy",
        "kept",
        "recipe",
        "params_searched",
        "history",
        "losses",
        "projections",
    )
    return {name: row.unfolded()[name] for name in names}


# A study -----------------------------------------------------------------------------------------------------------


def study_tags(info: Mapping[str, Any], space: Space) -> dict[str, str]:
    return {KIND_TAG: "study", STUDY_TAG: info.get("id", space.name), **_provenance(info, space)}


def _provenance(info: Mapping[str, Any], space: Space) -> dict[str, str]:
    found, revision = info["provenance"], info["provenance"]["git_revision"]
    tags = {"sampler": space.search.sampler, "device": str(found["device"])}
    tags |= {
        "mlflow.source.name": f"ranksearch {found['versions'].get('ranksearch') or ''}".strip(),
        "mlflow.source.type": "LOCAL",
    }
    return tags | ({"git_revision": revision, "mlflow.source.git.commit": revision} if revision is not None else {})


def study_params(space: Space) -> dict[str, str]:
    """What was searched for, and every setting of the recipe, searched ones with their range."""
    search = space.search
    recipe = {f"recipe.{name}": value for name, value in _settings(space.recipe)}
    return {
        "task": space.task, "model": str(space.model or "the task's own"), "seed": str(search.seed),
        "objectives": ",".join(search.objectives), "budgets": ", ".join(map(str, space.parsed_budgets())) or "none",
        "parametrization": search.parametrization, "sensitivity": search.sensitivity, **recipe,
    }  # fmt: skip


def _settings(group: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in group:
        match value:
            case Range(low=low, high=high, log=log):
                yield f"{prefix}{name}", f"{low:g} to {high:g}{' (log)' if log else ''}"
            case Choices(choices=choices):
                yield f"{prefix}{name}", " | ".join(map(str, choices))
            case Strict():
                yield from _settings(value, f"{prefix}{name}.")
            case float():
                yield f"{prefix}{name}", f"{value:g}"
            case _:
                yield f"{prefix}{name}", str(value)


CHARTS = "ranksearch"
"""The section of MLflow's chart view that holds our charts, above those that MLflow makes itself."""


def trials_view(costs: Sequence[str], metric: Metric, searched: Sequence[str]) -> dict[str, str]:
    """The experiment's tag, MLflow's own way to share a view, by which a link opens the table of trials with these columns, or the charts.

    Args:
        searched: parameters of the recipe that are searched, for the parallel coordinates.
    """
    shown = [COST_RATIOS[cost].replace("_ratio", "_percent") for cost in costs]
    scores = [ROUNDED[name] if metric.unit == PERCENT else name for name in ("val_accuracy", "test_accuracy")]
    columns = [f"metrics.`{name}`" for name in dict.fromkeys([*scores, *shown])]
    columns += ["tags.`status`", "tags.`on_front`", "params.`allocator`"]
    view = {
        "searchFilter": f"tags.`{KIND_TAG}` = 'trial'", "orderByKey": "metrics.`val_accuracy`",
        "orderByAsc": metric.direction == "minimize", "selectedColumns": columns,
        "compareRunSections": [{"uuid": CHARTS, "name": "The search", "display": True, "isReordered": False, "columns": 2}],
        "isAccordionReordered": True,  # else sections are sorted by their names
        "compareRunCharts": [
            _chart("front", "SCATTER", xaxis={"key": shown[0], "type": "METRIC"}, yaxis={"key": "val_accuracy", "type": "METRIC"}),
            _chart("parallel", "PARALLEL", selectedParams=list(searched), selectedMetrics=[*shown, "val_accuracy"], showAllRuns=True),
        ],
    }  # fmt: skip
    return {f"mlflow.sharedViewState.{TRIALS_VIEW}": json.dumps(view)}


def _chart(name: str, kind: str, **settings: Any) -> dict[str, Any]:
    """A chart as MLflow's page keeps it in a view."""
    made = {"uuid": f"{CHARTS}-{name}", "type": kind, "metricSectionId": CHARTS, "runsCountToCompare": 100}
    return made | {"deleted": False, "isGenerated": False} | settings


def dense_tags(view: View) -> dict[str, str]:
    """The dense net's metric and costs. They are tags, since as metrics their charts of single points would crowd out the others."""
    known = {name: value for name, value in view.dense.items() if value is not None}
    known |= {name: as_read(view.metric.to_dict(), known[name]) for name in ROUNDED.keys() & known.keys()}
    return {f"dense_{name}": f"{value:.10g}" for name, value in known.items()}


def created(info: Mapping[str, Any]) -> float:
    """When a study was made, in seconds since 1970."""
    return datetime.fromisoformat(info["provenance"]["created"]).timestamp()
