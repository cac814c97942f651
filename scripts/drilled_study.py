"""A study under fire as it is on disk, looked at from outside: what was finished must stay, to the digit."""

from __future__ import annotations

import json
from pathlib import Path

from ranksearch.store.where import INFO, find_study
from ranksearch.study.study import Study
from ranksearch.tracking.store import quiet_mlflow, store_uri


class DrilledStudy:
    """The study `name` in `runs`, and the results that were seen of it."""

    def __init__(self, runs: Path, name: str) -> None:
        self._runs, self._name = runs, name
        self.seen: dict[int, str] = {}
        """Trial number -> its result, as text."""
        self.lost = 0
        """How often a result that had been seen was not there, or another one."""

    def study(self) -> Study | None:
        there = (self._runs / self._name / INFO).is_file()
        return Study.open(find_study(self._name, self._runs)) if there else None

    def look(self) -> int:
        """Compares finished results with those seen before; returns how many there are."""
        study = self.study()
        if study is None:
            return 0
        found = {row["trial"]: json.dumps([row["status"], row["val_accuracy"], row["plan"]]) for row in study.trials}
        self.lost += sum(found.get(trial) != result for trial, result in self.seen.items())
        self.seen |= found
        return len(found)

    @staticmethod
    def doubled(study: Study) -> int:
        """Finished trials beyond the distinct pairs of plan and recipe."""
        rows = study.trials
        return len(rows) - len({json.dumps([row["plan"]["layers"], row["recipe"]], sort_keys=True) for row in rows})

    def mlflow_runs(self) -> int:
        """Trials' runs in MLflow."""
        quiet_mlflow()
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=store_uri(self._runs, None))
        experiment = client.get_experiment_by_name(self._name)
        return len(client.search_runs([experiment.experiment_id], "tags.`ranksearch.kind` = 'trial'"))
