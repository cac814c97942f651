"""The command line as a user meets it: real processes, a real Ray, a real MLflow store, real kills."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ranksearch.cli import main
from tests.conftest import free_ports

COMMAND = [sys.executable, "-m", "ranksearch"]
QUICK = ["--set", "recipe.steps=20", "--set", "recipe.bn_batches=2"]


def call(*arguments, cwd, code=0, **environment):
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A directory that is not the repository, after a search on Ray with three trials."""
    folder = tmp_path_factory.mktemp("elsewhere")
    space = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
    done = call("search", space, "--trials", 3, "--budget", "flops=45%", *QUICK, "--json", cwd=folder)
    return folder, json.loads(done.stdout), done.stderr


def test_search_on_ray_prints_the_front_and_says_where_to_look(studied):
    folder, front, errors = studied
    assert front["budgets"] == {"flops": "45%"}
    assert front["dense"]["test_accuracy"] > 95
    assert 1 <= len(front["trials"]) <= 3
    for row in front["trials"]:
        assert row["macs_ratio"] <= 0.45
        assert row["macs_ratio"] == row["macs"] / front["dense"]["macs"]
        assert row["test_accuracy"] is not None
        assert (folder / "runs" / "digits_resnet8" / "trials" / f"{row['trial']:03d}" / "model.safetensors").is_file()
    assert "ranksearch ui" in errors
    assert "[3/3]" in errors
    assert (folder / "runs" / "digits_resnet8" / "curves.safetensors").is_file()
    assert "Traceback" not in errors


def test_front_verb_agrees_to_the_digit(studied):
    folder, front, _ = studied
    assert json.loads(call("front", "digits_resnet8", "--json", cwd=folder).stdout) == front
    assert json.loads(call("front", "runs/digits_resnet8", "--json", cwd=folder).stdout) == front
    assert json.loads((folder / "runs" / "digits_resnet8" / "front.json").read_text()) == front
    text = call("front", "digits_resnet8", cwd=folder).stdout
    assert f"{front['trials'][0]['macs']:,}" in text
    assert "dense" in text


def test_a_front_opens_another_study_and_trials_that_fall_behind_are_stopped_on_ray(studied):
    from mlflow import MlflowClient

    folder, front, _ = studied
    space = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
    stopping = "search.early_stopping={rungs: [0.3], reduction: 2}"
    spread = "recipe.lr={low: 0.000001, high: 0.1, log: true, default: 0.03}"
    options = ["--name", "second", "--trials", 10, "--warm-start", "digits_resnet8", "--set", stopping, "--set", spread]
    done = call("search", space, *options, *QUICK, "--set", "search.objectives=[accuracy]", "--json", cwd=folder)
    assert f"warm start: {len(front['trials'])} plans of earlier fronts" in done.stderr
    assert "stopped: fell behind at step 6" in done.stderr
    assert "% of all training steps saved" in done.stderr
    assert "[10/10]" in done.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("second")
    runs = client.search_runs([experiment.experiment_id], "tags.`ranksearch.kind` = 'trial'")
    assert len(runs) == 10
    stopped = [run for run in runs if run.data.tags["status"] == "stopped"]
    assert stopped
    assert all(run.info.status == "KILLED" and run.data.tags["on_front"] == "false" for run in stopped)
    assert all("phases/val_accuracy" in run.data.metrics and "val_accuracy" not in run.data.metrics for run in stopped)
    shown = call("front", "second", cwd=folder).stdout
    assert "the most accurate" in shown


def test_mlflow_holds_the_same_numbers(studied):
    from mlflow import MlflowClient

    folder, front, _ = studied
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits_resnet8")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["ranksearch.kind"] == "study"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3 == len(runs) - 1
    assert all(run.info.status == "FINISHED" for run in runs)
    on_front = {run.data.params["seed"]: run for run in children if run.data.tags["on_front"] == "true"}
    assert set(on_front) == {str(row["seed"]) for row in front["trials"]}
    for row in front["trials"]:
        run = on_front[str(row["seed"])]
        data = run.data
        for name in ("val_accuracy", "test_accuracy", "macs", "params", "size_bytes", "macs_ratio", "params_ratio"):
            assert data.metrics[name] == row[name]
        for name, read in (("val_accuracy", "val_percent"), ("test_accuracy", "test_percent")):
            assert data.metrics[read] == round(row[name], 2)
        whole = Path(client.download_artifacts(run.info.run_id, "trial.json", str(folder)))
        assert json.loads(whole.read_text())["val_accuracy"] == row["val_accuracy"]
        lowered = [
            f"{name} {c['lowering']}:{c['rank']}"
            for name, c in row["plan"]["layers"].items()
            if c["lowering"] != "dense"
        ]
        assert data.tags["plan"].split("; ") == lowered
        assert data.params["projection.period"] == str(row["params_searched"]["projection.period"])
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"front.json", "front.csv", "front_table.json", "front.png", "report.html"} <= names
    assert [name for name in names if name.endswith(".html")] == ["report.html"]
    given = Path(client.download_artifacts(parent.info.run_id, "space.given.yaml", str(folder))).read_text()
    assert "# --trials 3" in given
    assert "space.yaml" in names
    stored = Path(client.download_artifacts(parent.info.run_id, "front.json", str(folder)))
    assert json.loads(stored.read_text()) == front
    assert parent.data.tags["mlflow.note.content"].startswith("**Ship trial ")
    assert parent.data.metrics["hypervolume"] == pytest.approx(front["hypervolume"], abs=0)


def test_a_second_study_of_the_same_name_is_refused_and_nothing_is_lost(studied, digits_yaml):
    folder, front, _ = studied
    done = call("search", digits_yaml, "--trials", 3, cwd=folder, code=2)
    assert "--name digits_resnet8-2" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((folder / "runs" / "digits_resnet8" / "front.json").read_text()) == front


def test_resume_of_a_finished_study_changes_nothing(studied):
    folder, front, _ = studied
    assert json.loads(call("resume", "digits_resnet8", "--inline", "--json", cwd=folder).stdout) == front


def test_ui_serves_the_study_on_loopback(studied):
    folder, *_ = studied
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [*COMMAND, "ui", "runs", "--port", str(port)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search", data=b'{"max_results": 10}',
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        for _ in range(240):
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    found = json.loads(answer.read())
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        assert "digits_resnet8" in {e["name"] for e in found["experiments"]}
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    shown = server.stdout.read()  # of every study its page, its trials and their charts, labelled
    assert shown.count("which net to ship: http") == shown.count("all trials:        http") >= 1
    assert shown.count("http") == 3 * shown.count("which net to ship: http")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0  # nobody serves any more


def start_search(folder, space, name, *options):
    """A search of four trials in a process group of its own, up to its first result."""
    command = [
        *COMMAND, "search", str(space), "--trials", "4", "--name", name,
        "--set", "recipe.steps=100", "--set", "tracking.models=false", *options,
    ]  # fmt: skip
    search = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in search.stderr:
        if "[1/4]" in line:
            break
    return search


def assert_complete(folder, name, count=4):
    """Every planned trial once, none left running, none doubled."""
    from ranksearch.study.study import Study

    study = Study.open(folder / "runs" / name)
    assert study.finished == count == len({str(row["plan"]) + str(row["seed"]) for row in study.trials})
    assert "RUNNING" not in {t.state.name for t in study._study.get_trials()}
    assert [row["reason"] for row in study.trials] == [None] * count
    return study


def test_a_killed_search_is_resumed_on_ray_without_loss(tmp_path, digits_yaml):
    search = start_search(tmp_path, digits_yaml, "killed")
    os.killpg(search.pid, signal.SIGKILL)  # the driver, Ray's head and the workers at once
    search.communicate()
    before = json.loads(call("front", "killed", "--json", cwd=tmp_path).stdout)
    front = json.loads(call("resume", "killed", "--json", cwd=tmp_path).stdout)
    study = assert_complete(tmp_path, "killed")
    assert front["hypervolume"] >= before["hypervolume"]
    retried = [t.user_attrs["retry_of"] for t in study._study.get_trials() if "retry_of" in t.user_attrs]
    assert len(retried) == len(set(retried))


def test_a_killed_worker_costs_no_trial(tmp_path, digits_yaml):
    search = start_search(tmp_path, digits_yaml, "worker")
    workers = subprocess.run(["pgrep", "-f", "^ray::.*Func"], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    _, errors = search.communicate(timeout=200)
    assert search.returncode == 0, errors
    assert_complete(tmp_path, "worker")


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path, digits_yaml):
    search = start_search(tmp_path, digits_yaml, "stopped")
    os.kill(search.pid, signal.SIGINT)
    _, errors = search.communicate(timeout=120)
    assert search.returncode == 130, errors
    assert "`ranksearch resume stopped` goes on" in errors
    assert "Traceback" not in errors
    call("resume", "stopped", "--inline", cwd=tmp_path)
    assert_complete(tmp_path, "stopped")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "nowhere.yaml"], "There is no search space 'nowhere.yaml'"),
        (["search", "SPACE", "--budget", "flops=1%"], "costs less than"),
        (["search", "SPACE", "--budget", "flops=half"], "expected a number and a unit"),
        (["search", "SPACE", "--set", "search.sampler=tpee"], "Did you mean 'tpe'"),
        (["search", "SPACE", "--set", "layers.exclude=[layer7]"], "matches no layer"),
        (
            ["search", "SPACE", "--set", "task=cifar10", "--set", "model=resnet20", "--set", "data=nothing"],
            "CIFAR-10 is not in",
        ),
        (["search", "SPACE", "--address", "127.0.0.1:9"], "no Ray cluster answers there"),
        (["search", "SPACE", "--address", "somewhere"], "expected auto or HOST:PORT"),
        (["check", "SPACE", "--set", "model=resnet9"], "Did you mean 'resnet8'"),
        (["front", "nothing"], "There is no study 'nothing'"),
        (["resume", "nothing"], "There is no study 'nothing'"),
        (["ui", "nothing"], "There is no MLflow store"),
        (["serch"], "No such command"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, digits_yaml, arguments, says, monkeypatch, capsys):
    """In this process: a dozen imports of torch would be waited for otherwise. The drill on strangers' input starts real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ranksearch", *(str(digits_yaml) if a == "SPACE" else a for a in arguments)])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))  # the command line puts its own in their places
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert says in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "runs" / "digits_resnet8").exists()


def test_too_many_resources_are_an_error_not_a_hang(tmp_path, digits_yaml):
    done = call("search", digits_yaml, "--set", "resources.cpus_per_trial=1000", cwd=tmp_path, code=2)
    assert "a trial asks for 1000 CPUs" in done.stderr
    assert not (tmp_path / "runs" / "digits_resnet8").exists()


def test_no_cluster_to_join_leaves_no_study_behind(tmp_path, digits_yaml):
    done = call("search", digits_yaml, "--address", "auto", cwd=tmp_path, code=1, RAY_TMPDIR=str(tmp_path))
    assert "Could not reach the Ray cluster at auto" in done.stderr
    assert not (tmp_path / "runs" / "digits_resnet8").exists()


def test_a_home_that_cannot_be_written(tmp_path, digits_yaml):
    environment = {"HOME": "/proc/nowhere", "RANKSEARCH_DATA": ""}
    call("search", digits_yaml, "--trials", 1, *QUICK, "--set", "tracking.models=false", cwd=tmp_path, **environment)
    assert list((tmp_path / "runs" / ".dense").glob("digits-resnet8-*.safetensors"))


def test_layers_and_check_in_json(tmp_path, digits_yaml):
    layers = json.loads(call("layers", digits_yaml, "--json", cwd=tmp_path).stdout)
    assert sum(row["params"] for row in layers["layers"]) < layers["total"]["params"]
    by_name = {row["name"]: row for row in layers["layers"]}
    # a 3x3 conv 64 -> 64 on one map: im2col breaks even below 64·64·9 / (64 + 64·9) = 57.6
    assert by_name["layer3.0.conv2"]["break_even_rank"]["im2col"] == {"macs": 57, "params": 57, "size": 57}
    assert by_name["linear"]["break_even_rank"]["im2col"] == {"macs": None, "params": None, "size": None}
    assert by_name["layer3.0.conv2"]["break_even_rank"]["tucker2"]["macs"] == [57, 57]
    stay = {row["name"]: row["stays_dense"] for row in layers["layers"] if row["stays_dense"]}
    assert stay == {"linear": "layers.exclude names it."}
    record = json.loads(call("check", digits_yaml, "--json", "--budget", "params=30%", cwd=tmp_path).stdout)
    assert record["costs"]["params"]["limit"] == int(0.3 * 75_002)
    assert "digits_resnet8" in call("check", digits_yaml, cwd=tmp_path).stdout
    assert "layer3.0.conv2" in call("layers", digits_yaml, cwd=tmp_path).stdout
