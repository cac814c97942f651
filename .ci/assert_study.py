"""Asserts a finished study from outside: its front.json and its MLflow runs, without ranksearch's own code.

python .ci/assert_study.py RUNS NAME --trials N --macs-ratio LIMIT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow import MlflowClient

ROW = {
    "trial", "status", "epochs", "val_accuracy", "test_accuracy", "macs", "params", "size_bytes", "latency_ms", "macs_ratio",
    "params_ratio", "plan", "params_searched", "seed",
}  # fmt: skip
RECORD = {"study", "objectives", "budgets", "reference_point", "hypervolume", "dense", "trials"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("name")
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--macs-ratio", type=float, required=True)
    options = parser.parse_args()

    front = json.loads((options.runs / options.name / "front.json").read_text())
    assert set(front) >= RECORD, RECORD - set(front)
    assert front["trials"], "the front is empty"
    for row in front["trials"]:
        assert set(row) >= ROW, ROW - set(row)
        assert row["macs_ratio"] <= options.macs_ratio, row["macs_ratio"]
        assert row["macs_ratio"] == row["macs"] / front["dense"]["macs"]
        assert 0 < row["val_accuracy"] <= 100

    client = MlflowClient(tracking_uri=f"sqlite:///{(options.runs / 'mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name(options.name)
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1, len(parents)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == options.trials == len(runs) - 1, len(children)
    assert all(run.data.metrics["macs_ratio"] <= options.macs_ratio for run in children)
    on_front = {run.data.params["seed"]: run.data.metrics for run in children if run.data.tags["on_front"] == "true"}
    assert set(on_front) == {str(row["seed"]) for row in front["trials"]}
    for row in front["trials"]:
        for name in ("val_accuracy", "test_accuracy", "macs", "params", "size_bytes"):
            assert on_front[str(row["seed"])][name] == row[name], (row["trial"], name)
    print(f"{options.name}: {options.trials} trials, {len(on_front)} on the front, files and MLflow agree to the digit")


if __name__ == "__main__":
    main()
