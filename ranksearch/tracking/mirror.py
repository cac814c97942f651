"""The study in MLflow: a parent run per study, a child run per trial, written by the driver alone and in batches.

Results are on disk first; this is their mirror. Run ids are kept in the study's folder, so that a resumed study goes on in the
same runs. Workers never touch the store.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy.exc

from ranksearch.compress import RankPlan
from ranksearch.files import write_atomically
from ranksearch.search.front import Row, describe_budgets
from ranksearch.search.recipe import flattened
from ranksearch.search.study import Study
from ranksearch.tracking.figures import front_html, front_png
from ranksearch.tracking.store import artifact_root, quiet_mlflow, store_uri

quiet_mlflow()
from mlflow import MlflowClient, MlflowException  # noqa: E402  (its settings are read at import)
from mlflow.entities import Metric, Param  # noqa: E402

MIRROR_ERRORS = (MlflowException, OSError, sqlalchemy.exc.SQLAlchemyError)
"""What a store that is away, full or refusing raises."""

RUN_IDS = "mlflow.json"
PARENT_TAG, STUDY_TAG, TRIAL_TAG = "mlflow.parentRunId", "ranksearch.study", "ranksearch.trial"
ENDED = {"complete": "FINISHED", "stopped": "KILLED"}
"""Status of a trial -> MLflow's; others FAILED."""
COLUMNS = (
    "trial", "val_accuracy", "test_accuracy", "macs", "macs_ratio", "params", "params_ratio", "size_bytes", "latency_ms",
    "allocator", "epochs", "seed",
)  # fmt: skip


def front_csv(front: dict[str, Any]) -> str:
    """The front as CSV, one line per net."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(front["trials"])
    return buffer.getvalue()


def _metrics(row: Row) -> dict[str, float]:
    names: tuple[str, ...] = ("test_accuracy", "macs", "params", "size_bytes", "latency_ms")
    if row["status"] == "complete":  # what a diverged trial had before stands under its phases alone
        names += ("val_accuracy", "val_loss")
    names += ("macs_ratio", "params_ratio", "size_ratio", "epochs", "images_per_second", "projection_share", "seconds")
    return {name: float(row[name]) for name in names if row[name] is not None}


def _phase(entry: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """(step, metrics) after a phase, such as `decomposed_val_accuracy`."""
    found = {k: v for k, v in entry.items() if k not in ("phase", "step", "rung", "epochs", "seconds")}
    return entry["step"], {f"{entry['phase']}_{k}": v for k, v in found.items()}


def _projection(record: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """(step, metrics) of a recorded projection: `removed_energy/layer1.0.conv1`, the loss before and after."""
    removed = {f"removed_energy/{layer}": share for layer, share in record["removed_energy"].items()}
    losses = {f"projection/{name}": record[name] for name in ("loss_before", "loss_after") if record[name] is not None}
    return record["step"], losses | removed


def _params(row: Row) -> dict[str, str]:
    """Trial, allocator, seed, recipe, and lowering and rank per layer: `plan/layer2.0.conv1` = `spatial:12`."""
    layers = (row["plan"] or {}).get("layers", {})
    plan = {f"plan/{name}": f"{layer['lowering']}:{layer.get('rank', 'full')}" for name, layer in layers.items()}
    recipe = {name: str(value) for name, value in flattened(row["recipe"] or {})}
    known = {name: str(row[name]) for name in ("trial", "allocator", "seed")}
    return {**known, **recipe, **plan}


def run_name(row: Row) -> str:
    """A child run's readable name, such as `t017 macs 48% acc 91.2`."""
    if row["status"] != "complete":
        return f"t{row['trial']:03d} {row['status']}"
    return f"t{row['trial']:03d} macs {100 * row['macs_ratio']:.0f}% acc {row['val_accuracy']:.1f}"


class Mirror:
    """Writes a study's rows to MLflow. Make it before the first trial: the store's schema is created then."""

    def __init__(self, study: Study, runs: Path) -> None:
        self.study = study
        self.uri = store_uri(runs, study.space.tracking.uri)
        self.client = MlflowClient(tracking_uri=self.uri)
        self._ids_file = study.folder / RUN_IDS
        known = json.loads(self._ids_file.read_text()) if self._ids_file.is_file() else {"ids": {}, "logged": []}
        self._ids: dict[str, str] = known["ids"]
        self._logged: set[str] = set(known["logged"])
        if "parent" in self._ids:
            self.client.update_run(self.parent_id, status="RUNNING")
            self._adopt()
        else:
            self._start(runs)

    @property
    def experiment_id(self) -> str:
        return self._ids["experiment"]

    @property
    def parent_id(self) -> str:
        return self._ids["parent"]

    def _adopt(self) -> None:
        """Takes up runs of trials that a killed driver had made and not noted: none is made twice."""
        token = None
        while True:
            found = self.client.search_runs(
                [self.experiment_id], f"tags.`{PARENT_TAG}` = '{self.parent_id}'", max_results=1000, page_token=token
            )
            for run in found:
                self._ids.setdefault(f"trial {run.data.tags.get(TRIAL_TAG)}", run.info.run_id)
            token = found.token
            if not token:
                return

    def _start(self, runs: Path) -> None:
        name = self.study.space.tracking.experiment or self.study.space.name
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            experiment_id = self.client.create_experiment(name, artifact_location=artifact_root(runs, self.uri))
            # the UI's pages for model training, not GenAI's
            self.client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        else:
            experiment_id = experiment.experiment_id
        space, info = self.study.space, self.study.info
        tags = {
            "ranksearch.kind": "study",
            STUDY_TAG: info.get("id", space.name),
            "sampler": space.search.sampler,
            "device": str(info["provenance"]["device"]),
        }
        if (revision := info["provenance"]["git_revision"]) is not None:
            tags["git_revision"] = revision
        made = self.client.search_runs([experiment_id], f"tags.`{STUDY_TAG}` = '{tags[STUDY_TAG]}'", max_results=1)
        parent = made[0] if made else self.client.create_run(experiment_id, run_name=space.name, tags=tags)
        self._remember(experiment=experiment_id, parent=parent.info.run_id)
        params = {
            "task": space.task, "model": space.model, "trials": space.search.trials, "seed": space.search.seed,
            "objectives": ",".join(space.search.objectives),
            "budgets": ", ".join(map(str, space.parsed_budgets())) or "none",
        }  # fmt: skip
        dense = {f"dense_{k}": v for k, v in info["dense"].items() if v is not None}
        self._batch(self.parent_id, {k: str(v) for k, v in params.items()}, [(0, dense)])
        self.client.log_artifact(self.parent_id, str(self.study.folder / "space.yaml"))

    def _remember(self, **ids: str) -> None:
        self._ids |= ids
        write_atomically(self._ids_file, json.dumps({"ids": self._ids, "logged": sorted(self._logged)}))

    def _batch(self, run_id: str, params: dict[str, str], steps: Iterable[tuple[int, dict[str, float]]]) -> None:
        """Logs parameters, and metrics of several steps at once."""
        now = int(time.time() * 1000)
        # the store takes at most 100 parameters, and 1000 entries, at once
        entries = [Param(k, v) for k, v in params.items()]
        for start in range(0, len(entries), 100):
            self.client.log_batch(run_id, params=entries[start : start + 100])
        metrics = [Metric(k, float(v), now, step) for step, found in steps for k, v in found.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000])

    def log_trial(self, row: Row, progress: dict[str, float]) -> None:
        """A child run with the trial's parameters, its metrics after every phase, its final costs and its plan; the study's `progress`.

        A trial that is logged already is left alone; one whose logging broke off goes on in the same run.
        """
        key = f"trial {row['trial']}"
        if key in self._logged:
            return
        tags = {
            PARENT_TAG: self.parent_id,
            "ranksearch.kind": "trial",
            TRIAL_TAG: str(row["trial"]),
            "status": row["status"],
            "on_front": "false",
            "lowerings": RankPlan.from_dict(row["plan"]).summary() if row["plan"] else "",
        }
        if row["reason"]:
            tags["reason"] = row["reason"][:4000]
        if key not in self._ids:
            run = self.client.create_run(self.experiment_id, run_name=run_name(row), tags=tags).info.run_id
            self._remember(**{key: run})
        run = self._ids[key]
        steps = [*map(_phase, row["history"]), *map(_projection, row["projections"]), (0, _metrics(row))]
        self._batch(run, _params(row), steps)
        if row["plan"] is not None:
            self.client.log_dict(run, row["plan"], "plan.json")
        self.client.set_terminated(run, ENDED.get(row["status"], "FAILED"))
        self._logged.add(key)
        self._remember()
        self._batch(self.parent_id, {}, [(int(progress["finished_trials"]), progress)])

    def finish(self, *, complete: bool) -> None:
        """The front on the parent: JSON, CSV, a table, figures, a note; `on_front` and test accuracies on the children."""
        front, trials = self.study.front_record(), self.study.trials
        on_front = {row["trial"] for row in front["trials"]}
        for row in trials:
            self.log_trial(row, self.study.progress())  # what a passing failure of the store kept out
            child = self._ids[f"trial {row['trial']}"]
            self.client.set_tag(child, "on_front", str(row["trial"] in on_front).lower())
            if row["test_accuracy"] is not None:
                self.client.log_metric(child, "test_accuracy", row["test_accuracy"])
        parent = self.parent_id
        if front["dense"]["test_accuracy"] is not None:
            self.client.log_metric(parent, "dense_test_accuracy", front["dense"]["test_accuracy"])
        self.client.log_dict(parent, front, "front.json")
        self.client.log_text(parent, front_csv(front), "front.csv")
        if front["trials"]:
            table = {name: [row[name] for row in front["trials"]] for name in COLUMNS}
            self.client.log_table(parent, table, "front_table.json")
        with tempfile.TemporaryDirectory() as folder:
            for draw, name in ((front_png, "front.png"), (front_html, "front.html")):
                draw(front, trials, Path(folder) / name)
                self.client.log_artifact(parent, str(Path(folder) / name))
        self.client.set_tag(parent, "mlflow.note.content", note(front, self.study.finished))
        self.client.set_terminated(parent, "FINISHED" if complete else "KILLED")


def note(front: dict[str, Any], finished: int) -> str:
    """The parent's description, Markdown: what was searched, the dense baseline, the front."""
    dense, budgets = front["dense"], describe_budgets(front)
    test = f", test {dense['test_accuracy']:.2f} %" if dense["test_accuracy"] is not None else ""
    lines = [
        f"**{front['study']}**: {finished} trials, {budgets}, hypervolume {front['hypervolume']:.4f}.",
        "",
        f"Dense net: validation {dense['val_accuracy']:.2f} %{test}, {dense['macs']:,} MACs, {dense['params']:,} parameters.",
        "",
        "| trial | validation % | test % | MACs % | params % | allocator |",
        "|---|---|---|---|---|---|",
    ]
    for row in front["trials"]:
        score = f"{row['test_accuracy']:.2f}" if row["test_accuracy"] is not None else "–"
        lines.append(
            f"| {row['trial']} | {row['val_accuracy']:.2f} | {score} | {100 * row['macs_ratio']:.1f} "
            f"| {100 * row['params_ratio']:.1f} | {row['allocator']} |"
        )
    folder = (
        f'`trials/NNN/` in the study\'s folder holds each net: `ranksearch.load("runs/{front["study"]}/trials/NNN")`.'
    )
    return "\n".join([*lines, "", folder])
