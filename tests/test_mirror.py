"""The mirror when the store is away: a study never depends on it."""

import json
import time

import pytest

from ranksearch.api import Silent, search
from ranksearch.errors import StudyError
from ranksearch.search.space_file import read_space
from ranksearch.tracking import background


class Log(Silent):
    def __init__(self):
        self.lines = []

    def log(self, message):
        self.lines.append(message)


def test_an_unreachable_store_costs_a_message_not_the_study(tmp_path, digits_yaml, short_settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log = Log()
    settings = [*short_settings, "tracking.uri=http://127.0.0.1:9", "search.trials=2"]
    study = search(digits_yaml, settings=settings, runs=tmp_path, inline=True, observer=log)
    assert study.finished == 2
    assert any("MLflow: not logged" in line and str(study.folder) in line for line in log.lines)
    assert (study.folder / "front.json").is_file()


def test_a_resumed_study_goes_on_in_the_same_runs(tmp_path, digits_yaml, short_settings):
    from mlflow import MlflowClient

    from ranksearch.api import resume
    from ranksearch.search.study import Study

    study = search(digits_yaml, settings=[*short_settings, "search.trials=2"], runs=tmp_path, inline=True)
    resume("digits_resnet8", trials=4, runs=tmp_path, inline=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits_resnet8")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 5
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 4
    front = {str(row["seed"]) for row in Study.open(study.folder).front}
    assert {r.data.params["seed"] for r in runs if r.data.tags.get("on_front") == "true"} == front


def test_what_every_projection_did_is_a_metric_of_the_trials_run(tmp_path, digits_yaml, short_settings):
    from mlflow import MlflowClient

    settings = [*short_settings, "search.trials=1", "recipe.projection.period=4", "recipe.factor_share=0.2"]
    study = search(digits_yaml, settings=settings, runs=tmp_path, inline=True)
    (row,) = study.trials
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits_resnet8")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ranksearch.kind` = 'trial'")
    lowered = [name for name, layer in row["plan"]["layers"].items() if layer["lowering"] != "dense"]
    names = ["projection/loss_before", "projection/loss_after", *(f"removed_energy/{layer}" for layer in lowered)]
    for name in names:
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == [4, 8, 12, 16], name
    assert history[-1].value == row["projections"][-1]["removed_energy"][lowered[-1]]
    for phase in ("trained", "projected", "decomposed", "factors"):
        assert 0 < run.data.metrics[f"{phase}_val_accuracy"] <= 100
    assert run.data.metrics["images_per_second"] > 0
    assert 0 < run.data.metrics["projection_share"] < 1
    assert run.data.params["projection.period"] == "4"
    assert run.data.params["distillation.temperature"] == str(row["recipe"]["distillation"]["temperature"])


def test_sync_brings_a_store_up_to_date_that_was_away_and_makes_no_run_twice(tmp_path, digits_yaml, short_settings):
    from mlflow import MlflowClient

    from ranksearch.api import sync
    from ranksearch.tracking.mirror import RUN_IDS

    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}"  # below a file: it cannot be made
    log = Log()
    study = search(
        digits_yaml, settings=[*short_settings, f"tracking.uri={uri}"], runs=tmp_path, inline=True, observer=log
    )
    assert sum("ranksearch sync" in line for line in log.lines) == 1
    with pytest.raises(StudyError, match="MLflow is not up to date"):
        sync("digits_resnet8", runs=tmp_path)
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    client = None
    for _ in range(2):  # the second time the notes of the runs are lost, as by a kill before they were written
        sync("digits_resnet8", runs=tmp_path)
        client = client or MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("digits_resnet8")
        runs = client.search_runs([experiment.experiment_id])
        assert len(runs) == 1 + study.finished
        noted = json.loads((study.folder / RUN_IDS).read_text())
        kept = {name: run for name, run in noted["ids"].items() if name in ("experiment", "parent")}
        (study.folder / RUN_IDS).write_text(json.dumps({"ids": kept, "logged": []}))
    found = {run.data.tags["ranksearch.trial"]: run.data for run in runs if "ranksearch.trial" in run.data.tags}
    for row in study.trials:
        assert found[str(row["trial"])].metrics["val_accuracy"] == row["val_accuracy"]
        assert found[str(row["trial"])].metrics["macs"] == row["macs"]


class Store:
    """Stands in for a mirror: slow, or away for its first calls."""

    calls, seconds, failures = [], 0.0, 0

    def __init__(self, study, runs):
        Store.calls.append("open")

    def log_trial(self, row, progress):
        time.sleep(Store.seconds)
        Store.calls.append(row["trial"])
        if len(Store.calls) <= Store.failures:
            raise OSError("the store is away")

    def finish(self, *, complete):
        Store.calls.append("finish")


@pytest.fixture
def store(monkeypatch, tmp_path, digits_yaml):
    Store.calls, Store.seconds, Store.failures = [], 0.0, 0
    monkeypatch.setattr(background, "Mirror", Store)

    class Study:
        folder = tmp_path
        space = read_space(digits_yaml)

        def progress(self):
            return {"finished_trials": 1}

    return Study()


def test_a_slow_store_holds_up_no_trial(store, tmp_path):
    Store.seconds = 0.2
    mirror = background.BackgroundMirror(store, tmp_path, print)
    started = time.perf_counter()
    for number in range(5):
        mirror.log_trial({"trial": number})
    assert time.perf_counter() - started < 0.1
    mirror.finish(complete=True)
    assert Store.calls == ["open", 0, 1, 2, 3, 4, "finish"]


def test_a_store_that_fails_is_left_alone_for_a_while_and_told_everything_at_the_end(store, tmp_path):
    Store.failures, said = 2, []
    mirror = background.BackgroundMirror(store, tmp_path, said.append)
    for number in range(5):
        mirror.log_trial({"trial": number})
    mirror.finish(complete=True)
    assert Store.calls == ["open", 0, "finish"]  # `finish` of the real one logs what is missing
    assert len(said) == 1
    assert "the store is away" in said[0]
