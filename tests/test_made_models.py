"""Models of a front's nets, made by processes of their own: the same as the driver's, whatever becomes of one of them or of the driver."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import mlflow.pytorch
import pytest
import torch
import yaml

from ranksearch import run_study
from ranksearch.api import resume, search, sync
from ranksearch.compress import load_net
from ranksearch.errors import StudyError
from ranksearch.study.study import Study
from ranksearch.tracking import background, made_models
from ranksearch.tracking.made_models import Closed, MadeModels, NotMade
from ranksearch.tracking.models import save_model
from tests.conftest import Told
from tests.own_tasks import CLASSIFIER, write_task
from tests.test_mirror import runs_of

SETTINGS = ("recipe.steps=20", "recipe.bn_batches=2", "search.sensitivity=kfac")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(a study with models, what its observer was told)"""
    runs, told = tmp_path_factory.mktemp("runs"), Told()
    space = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(made_models, "usable_cores", lambda: 4)
        return search(space, trials=3, settings=SETTINGS, runs=runs, inline=True, observer=told), told


@pytest.fixture
def making(ended):
    """Begins to make models of trials of the study; closed at the end."""
    begun = []

    def begin(trials, study=ended[0], told=lambda done: None):
        begun.append(MadeModels(study.space, study.folder, trials, 2, told))
        return begun[-1]

    yield begin
    for made in begun:
        made.close()


def group_of(leader):
    """Processes of a group that still run; a zombie does not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(") ")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def assert_gone(pid, seconds=30.0):
    until = time.monotonic() + seconds
    while group_of(pid):
        assert time.monotonic() < until, group_of(pid)
        time.sleep(0.05)


def record_of(model: Path) -> dict:
    """What an MLmodel file says, but for when and for whom it was made."""
    found = yaml.safe_load((model / "MLmodel").read_text())
    return {k: v for k, v in found.items() if k not in ("utc_time_created", "model_uuid", "model_size_bytes")}


def assert_same_net(model, net, example):
    with torch.inference_mode():
        wanted = net(example)
        assert (mlflow.pytorch.load_model(str(model))(example) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_every_net_of_the_front_is_a_model_of_its_trials_run_and_progress_is_told(ended, tmp_path):
    study, told = ended
    client, parent, trials = runs_of(f"sqlite:///{study.folder.parent / 'mlflow.db'}")
    models = {int(m.tags["ranksearch.trial"]): m for m in client.search_logged_models([parent.info.experiment_id])}
    front = [row.trial for row in study.front]
    assert sorted(models) == sorted(front)
    for trial, model in models.items():
        assert model.status == "READY"
        assert model.source_run_id == trials[trial].info.run_id
        kept = yaml.safe_load((Path(model.artifact_location.removeprefix("file://")) / "MLmodel").read_text())
        assert kept["model_id"] == kept["model_uuid"] == model.model_id
        assert kept["run_id"] == model.source_run_id
        assert kept["artifact_path"] == model.artifact_location
    count = len(front)
    assert f"MLflow: {count} of {count} nets of the front stored as models" in told.lines
    last, over = told.statuses[-2:]
    assert over == ""
    assert set(last.split(" · ")) >= {f"test set: {count + 1} of {count + 1} nets", f"models made: {count} of {count}"}
    assert any("test set: 0 of" in line for line in told.statuses)


def test_a_model_made_by_a_process_is_the_one_that_the_driver_makes(ended, making, tmp_path):
    study, done = ended[0], []
    trials = [row.trial for row in study.front]
    made = making(trials, told=done.append)
    kind = study.space.kind()
    for trial in trials:
        folder = study.trial_folder(trial)
        net, here = load_net(folder, study.space.build), tmp_path / str(trial)
        save_model(net, folder, here, kind.example_input, kind.normalise)
        there = made.model(trial)
        assert record_of(there) == record_of(here)
        files = {path.relative_to(here) for path in here.rglob("*") if path.is_file()}
        assert {path.relative_to(there) for path in there.rglob("*") if path.is_file()} == files
        assert_same_net(there, net, torch.randn(5, *kind.input_shape, generator=torch.Generator().manual_seed(0)))
    assert done == list(range(1, len(trials) + 1))


def test_a_net_that_cannot_be_a_model_keeps_none_of_the_others_from_it(ended, making, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(ended[0].folder, folder)
    study = Study.open(folder)
    damaged, good = sorted(row.trial for row in study.trials)[:2]
    weights = study.trial_folder(damaged) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    made = making([damaged, good, 77], study=study)
    with pytest.raises(StudyError, match=r"model\.safetensors does not fit plan\.json"):
        made.model(damaged)
    assert (made.model(good) / "MLmodel").is_file()
    with pytest.raises(StudyError, match=r"077 holds no compressed net: plan\.json is missing"):
        made.model(77)
    with pytest.raises(NotMade):
        made.model(78)  # nobody asked for it


def test_models_of_a_process_that_was_killed_are_made_by_the_driver(ended, making):
    trial = ended[0].front[0].trial
    made = making([trial])
    os.killpg(made._process.pid, signal.SIGKILL)
    with pytest.raises(NotMade):
        made.model(trial)


def test_closing_ends_every_process_and_removes_what_was_made(ended, making):
    trials = [row.trial for row in ended[0].trials]
    made = making(trials)
    assert (made.model(trials[0]) / "MLmodel").is_file()  # by now the others are being made
    scratch, leader = Path(made._scratch.name), made._process.pid
    made.close()
    assert group_of(leader) == []
    assert not scratch.exists()
    with pytest.raises(Closed):
        made.model(trials[1])


def test_a_driver_that_is_killed_leaves_no_process_behind(ended, tmp_path):
    script = f"""
    import time
    from pathlib import Path
    from ranksearch.study.study import Study
    from ranksearch.tracking.made_models import MadeModels
    study = Study.open({str(ended[0].folder)!r})
    made = MadeModels(study.space, study.folder, [row.trial for row in study.trials], 2, lambda done: None)
    print(made._process.pid, made._scratch.name, flush=True)
    time.sleep(600)
    """
    driver = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    leader, scratch = driver.stdout.readline().split()
    assert group_of(int(leader))
    driver.kill()
    driver.communicate()
    assert_gone(int(leader))
    assert not Path(scratch).exists()


def test_an_interruption_while_the_test_set_is_scored_ends_the_processes(ended, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / ended[0].space.name
    shutil.copytree(ended[0].folder, folder)
    for name in ("test.json", "mlflow.json"):
        (folder / name).unlink()
    begun, begin = [], background.begin
    monkeypatch.setattr(made_models, "usable_cores", lambda: 4)
    monkeypatch.setattr(background, "begin", lambda *args: begun.append(begin(*args)) or begun[-1])

    def interrupted(*args):
        assert group_of(begun[0]._process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_study, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resume(str(folder), inline=True)
    assert begun[0].closed
    assert group_of(begun[0]._process.pid) == []
    _, parent, _ = runs_of(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert parent.info.status == "KILLED"


def test_only_nets_without_a_model_are_made_into_one_again(ended, monkeypatch):
    study = ended[0]
    asked, told = [], Told()
    monkeypatch.setattr(
        background, "begin", lambda space, folder, trials, *rest: asked.append(trials)
    )  # and makes none
    client, parent, trials = runs_of(f"sqlite:///{study.folder.parent / 'mlflow.db'}")
    sync(str(study.folder), observer=told)
    lost = study.front[0].trial
    client.delete_tag(trials[lost].info.run_id, "ranksearch.model")
    sync(str(study.folder), observer=told)
    assert asked == [[], [lost]]
    assert told.lines.count("MLflow: 1 of 1 nets of the front stored as models") == 1
    models = client.search_logged_models([parent.info.experiment_id])
    assert len(models) == len(study.front)


def test_on_few_cores_the_driver_makes_the_models(ended, monkeypatch):
    monkeypatch.setattr(made_models, "usable_cores", lambda: 3)
    study = ended[0]
    assert made_models.begin(study.space, study.folder, [0], 1000, print) is None
    monkeypatch.setattr(made_models, "usable_cores", lambda: 8)
    assert made_models.begin(study.space, study.folder, [], 1000, print) is None


def test_a_net_of_the_users_own_code_is_made_there_too(tmp_path, making, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = search(write_task(tmp_path, CLASSIFIER), trials=1, runs=tmp_path / "runs", inline=True)
    (row,) = study.front
    made = making([row.trial], study=study)
    net = load_net(study.trial_folder(row.trial), study.space.build)
    assert_same_net(made.model(row.trial), net, torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert json.loads((made.model(row.trial) / "extra_files" / "plan.json").read_text()) == row.plan
