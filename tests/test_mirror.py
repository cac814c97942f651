"""The mirror in MLflow: what stands there, that writing it again changes nothing, and that a study never depends on it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ranksearch.api import resume, search, sync
from ranksearch.errors import StudyError
from ranksearch.front.verdict import verdict_of
from ranksearch.space.reading import read_space
from ranksearch.study.study import Study
from ranksearch.tracking import background
from ranksearch.tracking.mirror import Mirror
from ranksearch.tracking.runs import plan_line, run_name, trial_metrics
from ranksearch.tracking.store import NOTED
from ranksearch.tracking.view import View
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import TrialResult
from tests.conftest import Told, drain, simulated


def runs_of(uri, name="digits_resnet8"):
    """(client, the study's run, trial number -> run)"""
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    (parent,) = [run for run in found if run.data.tags["ranksearch.kind"] == "study"]
    return client, parent, {int(r.data.tags["ranksearch.trial"]): r for r in found if "ranksearch.trial" in r.data.tags}


def values_of(client, run):
    """(metric, step, value) of everything that a run holds, sorted."""
    return sorted(
        (m.key, m.step, m.value) for k in run.data.metrics for m in client.get_metric_history(run.info.run_id, k)
    )


def assert_holds(client, runs, study):
    """The runs of the trials hold every value of their rows, all steps, to the digit and once."""
    for row in study.trials:
        metrics = trial_metrics(row, study.metric)
        wanted = [(name, step, value) for step, found in metrics for name, value in found.items()]
        assert values_of(client, runs[row["trial"]]) == sorted(wanted)


def dump(uri, name="digits_resnet8"):
    """Everything that the store holds of a study but times: metrics with all their steps, parameters, tags, artifacts."""
    client, parent, trials = runs_of(uri, name)
    found = {}
    for key, run in [("study", parent), *trials.items()]:
        artifacts = sorted(artifact.path for artifact in client.list_artifacts(run.info.run_id))
        found[key] = (
            values_of(client, run),
            run.data.params,
            run.data.tags,
            run.info.status,
            run.info.run_name,
            artifacts,
        )
    return found


def artifact(client, run, name, folder):
    return json.loads(Path(client.download_artifacts(run.info.run_id, name, str(folder))).read_text())


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def mirrored(make, bench, tmp_path, uri):
    """A study of twenty simulated trials, one of them diverged, mirrored trial by trial."""
    study = make(trials=20, settings=["tracking.models=false"])
    mirror = Mirror(View.of(study), tmp_path)
    while (candidate := study.ask(bench)) is not None:
        result = simulated(candidate, bench)
        if candidate.number == 3:
            result = TrialResult(
                "diverged", candidate.seed, 0.5, val_accuracy=12.0, reason="the loss is nan by step 7 of 20"
            )
        row = study.tell(candidate.number, result)
        mirror.log_trial(row, study.progress(), {r["trial"] for r in study.front})
    return study, mirror


def test_a_list_of_runs_says_what_each_trial_is(mirrored, uri):
    study, _ = mirrored
    _, parent, trials = runs_of(uri)
    assert sorted(trials) == [
        row["trial"] for row in study.trials
    ]  # a plan that was there before takes a number, and no run
    assert len(trials) == 20
    on_front = {row["trial"] for row in study.front}
    for row in study.trials:
        run = trials[row["trial"]]
        assert run.info.run_name == run_name(row, "macs", study.metric)
        tags = run.data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tags["on_front"] == str(row["trial"] in on_front).lower()  # while the study goes on, too
        assert tags["status"] == row["status"]
        assert tags["plan"] == plan_line(row["plan"])
        assert {"lowerings", "sampler", "device"} <= set(tags)
        assert set(run.data.params) == {"trial", "seed", "allocator", *row["params_searched"]}
        ended = run.info.end_time / 1000
        assert ended == pytest.approx(row["ended"], abs=0.01)
    assert trials[3].info.status == "FAILED"
    assert trials[3].info.run_name == "t003 diverged"
    assert "val_accuracy" not in trials[3].data.metrics
    assert "by step 7" in trials[3].data.tags["reason"]


def test_a_runs_name_tells_the_cost_that_is_searched(mirrored):
    accuracy, error = Metric("accuracy", "maximize", "%", 95.0), Metric("rmse", "minimize", "K", 2.0)
    row = mirrored[0].trials[0] | {"latency_ratio": 0.831, "val_accuracy": 91.23, "params_ratio": 0.42}
    assert run_name(row, "latency", accuracy) == "t000 91.2% @83% latency"
    assert run_name(row, "params", accuracy) == "t000 91.2% @42% params"
    assert run_name(row, "params", error) == "t000 rmse 91.23 K @42% params"


def test_progress_of_the_study_is_a_curve_on_its_run(mirrored, uri):
    study, mirror = mirrored
    mirror.finish(View.of(study), {}, print, complete=False)
    client, parent, _ = runs_of(uri)
    for name, final in (
        ("hypervolume", study.hypervolume),
        ("best_within_budget", study.leader["val_accuracy"]),
    ):
        history = sorted(client.get_metric_history(parent.info.run_id, name), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == list(range(1, 21))
        values = [metric.value for metric in history]
        assert values == sorted(values)
        assert values[-1] == final
    assert parent.data.metrics["diverged_trials"] == 1


def test_finishing_twice_changes_nothing_and_doubles_nothing(mirrored, uri, tmp_path):
    study, mirror = mirrored
    view = View.of(study)
    mirror.finish(view, study.importances(), print, complete=True)
    first = dump(uri)
    assert first["study"][3] == "FINISHED"
    assert "report.html" in first["study"][5]
    mirror.finish(view, study.importances(), print, complete=True)
    assert dump(uri) == first
    other = Mirror(View.of(Study.open(study.folder)), tmp_path)  # as `sync` does: from the folder alone
    other.finish(View.of(Study.open(study.folder)), {}, print, complete=True)
    again = dump(uri)
    assert {k: v for k, v in again.items() if k != "study"} == {k: v for k, v in first.items() if k != "study"}
    assert again["study"][0] == first["study"][0]
    client, parent, _ = runs_of(uri)
    table = artifact(client, parent, "front_table.json", tmp_path)
    assert len(table["data"]) == len(study.front)  # not appended to the one before


def test_what_was_lost_of_a_store_is_written_again(mirrored, uri, tmp_path):
    study, mirror = mirrored
    mirror.finish(View.of(study), {}, print, complete=True)
    whole = dump(uri)
    client, parent, trials = runs_of(uri)
    client.delete_run(trials[5].info.run_id)  # somebody threw a trial away
    client.update_run(trials[6].info.run_id, status="RUNNING")  # a driver was killed while it logged this one
    (study.folder / NOTED).unlink()
    reopened = Study.open(study.folder)
    other = Mirror(View.of(reopened), tmp_path)
    assert other.parent_id == parent.info.run_id
    other.finish(View.of(reopened), {}, print, complete=True)
    assert dump(uri) == whole


def test_a_study_goes_to_another_store_as_a_whole(mirrored, uri, tmp_path):
    study, mirror = mirrored
    mirror.finish(View.of(study), {}, print, complete=True)
    elsewhere = f"sqlite:///{tmp_path / 'other.db'}"
    space = study.space.model_copy(update={"tracking": study.space.tracking.model_copy(update={"uri": elsewhere})})
    moved = View(study.folder, space, study.info, study.front_record(), study.trials)
    Mirror(moved, tmp_path).finish(moved, {}, print, complete=True)
    first, second = dump(uri), dump(elsewhere)
    for found in (first, second):
        for _, _, tags, *_ in found.values():
            tags.pop("mlflow.parentRunId", None)
            tags.pop("mlflow.note.content", None)
    assert second == first


def test_the_first_line_of_the_experiments_note_says_which_net_to_ship(mirrored, uri):
    study, mirror = mirrored
    client, parent, _ = runs_of(uri)

    def noted():
        return client.get_experiment(parent.info.experiment_id).tags["mlflow.note.content"]

    mirror.finish(View.of(study), {}, print, complete=True)
    first = noted()
    ended = client.get_run(parent.info.run_id).info.end_time
    time.sleep(0.01)
    again = Mirror(View.of(study), study.folder.parent)
    again.finish(View.of(study), {}, print, complete=True)
    assert client.get_run(parent.info.run_id).info.end_time == ended  # nothing was added
    verdict = verdict_of(study.front_record())
    assert first.startswith(verdict.ship)  # a list of experiments shows its first words
    (row,) = [row for row in study.front if row.trial == verdict.trial]
    score = f"validation {verdict.value:.1f}% (dense {verdict.dense:.1f}%) @{100 * row['macs_ratio']:.0f}% MACs"
    named = client.get_run(parent.info.run_id).info.run_name
    assert named == f"{study.space.name}: ship t{row.trial:03d} {score}"
    for before, others in ((f"**other**: {first}", ["other"]), (first, []), ("mine", None)):
        client.set_experiment_tag(parent.info.experiment_id, "mlflow.note.content", before)
        mirror.show(View.of(study), {}, complete=True)
        if others is None:
            assert noted() == before
            continue
        own, *lines, holds = noted().split("\n\n")
        assert own == verdict.ship
        assert [line.split("**")[1] for line in lines] == others
        assert holds.endswith("its trials beneath it.")


def test_what_a_deleted_experiment_asks_for(mirrored, uri, tmp_path):
    study, _ = mirrored
    client, parent, _ = runs_of(uri)
    client.delete_experiment(parent.info.experiment_id)
    (study.folder / NOTED).unlink()
    with pytest.raises(background.MIRROR_ERRORS, match=r"was deleted: restore it, or set tracking\.experiment"):
        Mirror(View.of(study), tmp_path)


def test_the_table_of_trials_has_a_view_with_the_columns_that_matter(make, tmp_path, uri):
    study = make(settings=["search.objectives=[accuracy, latency]"])
    Mirror(View.of(study), tmp_path)
    client = MlflowClient(tracking_uri=uri)
    view = json.loads(client.get_experiment_by_name("digits_resnet8").tags["mlflow.sharedViewState.ranksearch"])
    assert {"metrics.`val_percent`", "metrics.`latency_percent`", "tags.`on_front`"} <= set(view["selectedColumns"])
    assert client.search_runs(["1"], view["searchFilter"]) == []  # a filter that MLflow understands


def test_a_long_description_is_cut_and_says_so(make, bench):
    study = make(trials=6)
    drain(study, bench)
    view = View.of(study)
    rows = [study.trials[0] | {"trial": n} for n in range(90)]
    many = View(view.folder, view.space, view.info, view.front | {"trials": rows}, rows)
    from ranksearch.tracking.note import note

    text = note(many, registered=True)
    assert len(text) < 5000
    assert "60 more in front.csv" in text
    assert "models:/digits_resnet8@champion" in text


# Real trials -------------------------------------------------------------------------------------------------------


def test_what_training_and_projections_did_are_metrics_of_the_trials_run(tmp_path, digits_yaml, short_settings, uri):
    settings = [*short_settings, "search.trials=1", "recipe.projection.period=4", "recipe.factor_share=0.2"]
    study = search(digits_yaml, settings=settings, runs=tmp_path, inline=True)
    (row,) = study.trials
    client, parent, trials = runs_of(uri)
    run = trials[0]
    for name in ("projection/loss_before", "projection/loss_after", "projection/removed_energy_mean"):
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == [4, 8, 12, 16], name
    removed = row["projections"][-1]["removed_energy"]
    assert run.data.metrics["projection/removed_energy_max"] == max(removed.values())
    losses = sorted(client.get_metric_history(run.info.run_id, "train_loss"), key=lambda metric: metric.step)
    assert [metric.step for metric in losses] == list(range(1, 21))
    assert 0 < run.data.metrics["phases/val_accuracy"] <= 100
    assert run.data.metrics["images_per_second"] > 0
    assert 0 < run.data.metrics["projection_share"] < 1
    assert parent.data.params["recipe.projection.period"] == "4"
    assert parent.data.params["recipe.distillation.temperature"] == f"{row['recipe']['distillation']['temperature']:g}"
    kept = artifact(client, run, "trial.json", tmp_path)
    assert kept["projections"] == row["projections"]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"plan.json", "trial.json", "figures"}


def test_a_resumed_study_goes_on_in_the_same_runs(tmp_path, digits_yaml, short_settings, uri):
    study = search(digits_yaml, settings=[*short_settings, "search.trials=2"], runs=tmp_path, inline=True)
    resume("digits_resnet8", trials=4, runs=tmp_path, inline=True)
    _, parent, trials = runs_of(uri)
    assert sorted(trials) == [0, 1, 2, 3]
    assert parent.data.tags["planned_trials"] == "4"
    front = {row["trial"] for row in Study.open(study.folder).front}
    assert {number for number, run in trials.items() if run.data.tags["on_front"] == "true"} == front


def test_studies_that_begin_at_once_make_one_store_between_them(tmp_path):
    uri, opening = f"sqlite:///{tmp_path / 'mlflow.db'}", "import sys; from ranksearch.tracking.mirror import _client"
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", f"{opening}; _client(sys.argv[1])", uri], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [(process.communicate()[1], process.returncode) for process in begun] == [("", 0)] * 3


# A store that is away ----------------------------------------------------------------------------------------------


def test_an_unreachable_store_costs_a_message_not_the_study(tmp_path, digits_yaml, short_settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log = Told()
    settings = [*short_settings, "tracking.uri=http://127.0.0.1:9", "search.trials=2"]
    study = search(digits_yaml, settings=settings, runs=tmp_path, inline=True, observer=log)
    assert study.finished == 2
    assert any("MLflow: not logged" in line and str(study.folder) in line for line in log.lines)
    assert (study.folder / "front.json").is_file()


def test_a_store_whose_driver_is_missing_says_what_to_install(tmp_path, digits_yaml, short_settings):
    log = Told()
    settings = [*short_settings, "tracking.uri=mysql://u@127.0.0.1:9/x", "search.trials=1"]
    assert search(digits_yaml, settings=settings, runs=tmp_path, inline=True, observer=log).finished == 1
    assert any("No module named 'MySQLdb': install the database's Python driver" in line for line in log.lines)


def test_sync_brings_a_store_up_to_date_that_was_away(tmp_path, digits_yaml, short_settings):
    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}"  # below a file: it cannot be made
    log = Told()
    study = search(
        digits_yaml, settings=[*short_settings, f"tracking.uri={uri}"], runs=tmp_path, inline=True, observer=log
    )
    assert sum("ranksearch sync" in line for line in log.lines) == 1
    with pytest.raises(StudyError, match="MLflow is not up to date"):
        sync("digits_resnet8", runs=tmp_path)
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    sync("digits_resnet8", runs=tmp_path)
    client, parent, trials = runs_of(uri)
    assert_holds(client, trials, study)
    steps = sorted(m.step for m in client.get_metric_history(parent.info.run_id, "hypervolume"))
    assert steps == [1, 2, 3]


class Store:
    """Stands in for a mirror: slow, or away for its first calls."""

    calls, seconds, failures = [], 0.0, 0

    def __init__(self, view, runs):
        Store.calls.append("open")

    def log_trial(self, row, progress, on_front):
        time.sleep(Store.seconds)
        Store.calls.append(row["trial"])
        if len(Store.calls) <= Store.failures:
            raise OSError("the store is away")

    def show(self, view, importances, *, complete):
        Store.calls.append("show")

    def finish(self, view, importances, log, note, *, complete, made):
        Store.calls.append("finish")


@pytest.fixture
def store(monkeypatch, tmp_path, digits_yaml):
    Store.calls, Store.seconds, Store.failures = [], 0.0, 0
    monkeypatch.setattr(background, "Mirror", Store)

    class Study:
        folder, info, front, trials, rows = tmp_path, {}, [], [], []
        space = read_space(digits_yaml, settings=["tracking.models=false"])

        @property
        def on_front(self):
            return frozenset(row["trial"] for row in self.front)

        def progress(self):
            return {"finished_trials": 1}

        def front_record(self):
            return {}

        def importances(self):
            return {}

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


def test_a_front_that_changed_is_shown_while_the_study_goes_on(store, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "REFRESH_SECONDS", 0.0)
    mirror = background.BackgroundMirror(store, tmp_path, print)
    for number, front in enumerate(([0], [0], [0, 2])):
        store.front = [{"trial": trial} for trial in front]
        mirror.log_trial({"trial": number})
    mirror.finish(complete=True)
    assert Store.calls == ["open", 0, "show", 1, 2, "show", "finish"]
