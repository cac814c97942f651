"""The mirror when the store is away: a study never depends on it."""

from ranksearch.api import Silent, search


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
    text = (study.folder / "space.yaml").read_text()
    (study.folder / "space.yaml").write_text(text.replace("trials: 2", "trials: 4"))  # as if it had been cut short
    resume("digits_resnet8", runs=tmp_path, inline=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits_resnet8")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 5
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 4
    front = {str(row["seed"]) for row in Study.open(study.folder).front}
    assert {r.data.params["seed"] for r in runs if r.data.tags.get("on_front") == "true"} == front
