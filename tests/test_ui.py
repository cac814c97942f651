"""Which store the UI opens, and the links that it prints."""

import gc
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from ranksearch.errors import UsageError
from ranksearch.places.trust import ADDRESS, remember
from ranksearch.tracking.mlflow_private import serve
from ranksearch.tracking.store import at_home, written
from ranksearch.tracking.ui import Opened, Page, _listening, find_store, say_pages
from tests.conftest import free_ports


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two studies in a SQLite store beside them, one on a server, one that was never mirrored."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    remember(ADDRESS, "https://mlflow.example.org/")
    folder = tmp_path / "runs"
    own = f"sqlite:///{folder / 'mlflow.db'}"
    for age, (name, uri) in enumerate(
        (("old", own), ("new", own), ("served", "https://mlflow.example.org/"), ("bare", None))
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "study.json").write_text("{}")
        os.utime(folder / name / "study.json", (age, age))
        if uri is not None:
            (folder / name / "mlflow.json").write_text(
                json.dumps({"uri": uri, "experiment": str(age), "parent": f"run-{name}"})
            )
    (folder / "mlflow.db").touch()
    return folder


def test_a_folder_of_studies_links_those_in_its_store_the_newest_first(runs):
    opened = find_store(str(runs), runs)
    assert opened.uri == f"sqlite:///{runs / 'mlflow.db'}"
    assert [page.study for page in opened.pages] == ["new", "old"]


@pytest.mark.parametrize("by", ["name", "folder"])
def test_a_study_opens_its_own_store(runs, by):
    opened = find_store("served" if by == "name" else str(runs / "served"), runs)
    assert opened.uri == "https://mlflow.example.org/"
    assert opened.pages == [Page("served", "2", "run-served")]
    said = []
    say_pages(opened, opened.uri, said.append)
    assert said[0].strip() == "served"
    assert said[1].endswith("https://mlflow.example.org/#/experiments/2/runs/run-served?workflowType=machine_learning")
    assert "https://mlflow.example.org/#/experiments/2/runs?viewStateShareKey=" in said[2]


def test_a_store_with_a_password_is_noted_by_its_variable(runs, monkeypatch):
    secret = "https://me:hunter2@mlflow.example.org/"
    assert written(secret, None) == "env:MLFLOW_TRACKING_URI"
    assert written(secret, "env:MY_STORE") == "env:MY_STORE"
    assert written("https://mlflow.example.org/", None) == "https://mlflow.example.org/"
    note = runs / "served" / "mlflow.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"uri": "env:MY_STORE"}))
    monkeypatch.delenv("MY_STORE", raising=False)
    with pytest.raises(UsageError, match="the environment variable MY_STORE is not set"):
        find_store("served", runs)
    assert [page.study for page in find_store(str(runs), runs).pages] == ["new", "old"]  # the others' are there still
    monkeypatch.setenv("MY_STORE", secret)
    opened = find_store("served", runs)
    assert (opened.uri, [page.study for page in opened.pages]) == (secret, ["served"])


def test_studies_that_were_moved_with_their_store_are_found_where_they_are(runs, tmp_path):
    moved = runs.rename(tmp_path / "elsewhere")
    opened = find_store("new", moved)
    assert opened.uri == f"sqlite:///{moved / 'mlflow.db'}"
    assert [page.run for page in opened.pages] == ["run-new"]
    assert [page.study for page in find_store(str(moved), moved).pages] == ["new", "old"]


def test_a_study_that_was_never_mirrored_opens_the_store_beside_it(runs):
    opened = find_store("bare", runs)
    assert opened == Opened(f"sqlite:///{runs / 'mlflow.db'}", runs, [])
    said = []
    say_pages(opened, "http://127.0.0.1:5000", said.append)
    assert "ranksearch sync NAME" in said[0]


def test_a_folder_without_a_store_opens_that_of_its_studies(runs):
    (runs / "mlflow.db").unlink()
    for name in ("old", "new"):
        (runs / name / "mlflow.json").unlink()
    opened = find_store(str(runs), runs)
    assert opened.uri == "https://mlflow.example.org/"
    assert [page.study for page in opened.pages] == ["served"]


def test_a_store_whose_variable_is_not_set_does_not_hide_the_other_studies(runs, monkeypatch):
    (runs / "mlflow.db").unlink()
    monkeypatch.delenv("MY_STORE", raising=False)
    note = runs / "new" / "mlflow.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"uri": "env:MY_STORE"}))
    (runs / "old" / "mlflow.json").unlink()
    assert [page.study for page in find_store(str(runs), runs).pages] == ["served"]
    (runs / "served" / "mlflow.json").unlink()
    with pytest.raises(UsageError, match="the environment variable MY_STORE is not set"):
        find_store(str(runs), runs)


def test_what_is_not_there_names_the_nearest_study(runs, tmp_path):
    with pytest.raises(UsageError, match=r"There is no MLflow store in serve.*Did you mean 'served'"):
        find_store("serve", runs)


def a_store(folder, root, runs):
    """What is of use here of MLflow's tables: an experiment whose files are in `root`, with runs."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        store.execute("CREATE TABLE experiments (experiment_id INTEGER, artifact_location TEXT)")
        store.execute("CREATE TABLE runs (run_uuid TEXT, experiment_id INTEGER, artifact_uri TEXT)")
        store.execute("INSERT INTO experiments VALUES (1, ?)", (root,))
        for run in runs:
            store.execute("INSERT INTO runs VALUES (?, 1, ?)", (run, f"{root}/{run}/artifacts"))
            (folder / "mlartifacts" / run / "artifacts").mkdir(parents=True)


def uris(folder):
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        return [uri for (uri,) in store.execute("SELECT artifact_uri FROM runs")]


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "copied"])
def test_a_folder_that_was_moved_or_copied_keeps_its_files_and_opens_its_own_store(runs, tmp_path, moved):
    (runs / "mlflow.db").unlink()
    a_store(runs, (runs / "mlartifacts").as_uri(), ["run-old", "run-new"])
    before = uris(runs)
    there = tmp_path / "elsewhere"
    shutil.move(runs, there) if moved else shutil.copytree(runs, there)
    opened = find_store("new", there)
    assert opened.uri == f"sqlite:///{there / 'mlflow.db'}"
    assert [page.run for page in opened.pages] == ["run-new"]
    assert at_home(there, opened.uri) == 1
    assert uris(there) == [uri.replace(runs.as_uri(), there.as_uri()) for uri in before]
    assert at_home(there, opened.uri) == 0  # once is enough
    if not moved:
        assert uris(runs) == before


def test_files_that_were_configured_to_lie_elsewhere_stay_there(runs):
    (runs / "mlflow.db").unlink()
    a_store(runs, "file:///shared/mlartifacts", ["run-new"])
    (runs / "mlartifacts" / "run-new").rename(runs / "mlartifacts" / "another")
    assert at_home(runs, f"sqlite:///{runs / 'mlflow.db'}") == 0
    assert uris(runs) == ["file:///shared/mlartifacts/run-new/artifacts"]


def test_what_the_ui_starts_ends_with_it_even_if_it_is_killed():
    script = (
        "import subprocess, sys, time\n"
        "from ranksearch.tracking.ui import _ends_with_us\n"
        "server = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "_ends_with_us(server.pid)\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)"
    )
    ours = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    server = int(ours.stdout.readline())
    ours.kill()
    ours.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until and Path(f"/proc/{server}/cmdline").exists():
        if not Path(f"/proc/{server}/cmdline").read_bytes():  # a zombie: whoever reaps it is nobody of ours
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{server}").exists()


def test_the_next_port_is_taken_where_one_is_in_use():
    (port,) = free_ports(1)
    with _listening(port) as first, _listening(port) as second:
        assert first.getsockname() == ("127.0.0.1", port)
        assert port < second.getsockname()[1] < port + 100


@pytest.mark.parametrize("root", ["file:///elsewhere", None])
def test_an_mlflow_with_other_parts_is_served_by_its_own_command(monkeypatch, root):
    started = []

    def execv(program, command):
        started.extend(command)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # whoever imports it fails
    try:
        with _listening(free_ports(1)[0]) as listening, pytest.raises(SystemExit):
            serve(os.dup(listening.fileno()), "127.0.0.1", 5123, root)
    finally:
        gc.enable()
    assert started[1:6] == ["-m", "mlflow", "server", "--host", "127.0.0.1"]
    assert ("--default-artifact-root" in started) == (root is not None)
