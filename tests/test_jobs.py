"""Ray Jobs for real: a head with a dashboard on loopback, its token on, a task file of the user's own."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ranksearch.cli import app
from ranksearch.errors import UsageError
from ranksearch.jobs.submission import new_study
from ranksearch.space.reading import read_space
from tests.conftest import DRILLS, free_ports

pytest.importorskip("opencensus", reason="Ray's job server needs the extra `cluster`")

SPACE = """
name: mine
task: mine.py:make_task
budgets: {flops: 50%}
recipe: {steps: 20, bn_batches: 2, batch_size: 64}
search: {trials: 2}
tracking: {models: false}
"""
TASK = """
import os, sys
import ranksearch
from helper import digits

def make_task():
    print("FILES", sorted(os.listdir(os.path.dirname(__file__))), "FROM", ranksearch.__file__, file=sys.stderr)
    return digits()
"""
HELPER = """
import torch
from sklearn.datasets import load_digits
from torch import nn
import ranksearch

def digits():
    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    return ranksearch.Task(model=net, train=(x[:1300], y[:1300]), val=(x[1300:], y[1300:]))
"""


@pytest.fixture(scope="module")
def cluster():
    """The job server's address, of a Ray head with three CPUs that asks for a token; the variables that reach it are set."""
    gcs, dashboard, client = free_ports(3)
    address = f"http://127.0.0.1:{dashboard}"
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_API_SERVER_ADDRESS": address}
    before = {name: os.environ.get(name) for name in ours}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=3", "--node-ip-address=127.0.0.1",
            f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=os.environ | ours | {"PATH": path},
    )  # fmt: skip
    os.environ.update(ours)
    try:
        wait_until(lambda: answers(dashboard) or head.poll() is not None, 90)
        assert head.poll() is None
        yield address
    finally:
        head.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.3)
    return found


def verb(capsys, *arguments):
    """What a verb prints on stdout, run in this process: Ray's import is paid once."""
    capsys.readouterr()
    app(list(map(str, arguments)), standalone_mode=False)
    return capsys.readouterr().out


def test_a_task_of_ones_own_is_submitted_followed_listed_and_another_job_stopped(cluster, tmp_path, capsys):
    from ranksearch.jobs.jobs import Jobs

    project, runs = tmp_path / "project", tmp_path / "shared"
    project.mkdir()
    for name, text in {"mine.yaml": SPACE, "mine.py": TASK, "helper.py": HELPER, ".env": "SECRET=1"}.items():
        (project / name).write_text(text)

    # one that would go on for long is on the cluster already, put there as `submit --detach` does it; it leaves a CPU to the next
    jobs, path = Jobs(cluster), project / "mine.yaml"
    space = read_space(path, name="long")
    long = new_study(
        path, space, runs=str(runs), passed={}, now=datetime.now(UTC),
        options=["--name", "long", "--trials", "50", "--set", "recipe.steps=2000", "--set", "resources.cpus_per_trial=2"],
    )  # fmt: skip
    jobs.submit(long, ship=True, driver_gpus=0)

    done = subprocess.run(
        [sys.executable, "-m", "ranksearch", "submit", "mine.yaml", "--runs", str(runs), "--env", "OMP_NUM_THREADS=1", "--no-check"],
        cwd=project, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert job.startswith("mine-20")
    assert "variables  OMP_NUM_THREADS=1" in done.stderr
    assert f"variables  RANKSEARCH_DATA={os.environ['RANKSEARCH_DATA']}" in done.stderr
    assert "[2/2]" in done.stderr  # the log, followed to its end
    assert "Traceback" not in done.stderr
    assert f"the study is in {runs}/mine on the cluster" in done.stderr
    # the task ran from what was packed, with the ranksearch that was sent along
    (told,) = {line for line in done.stderr.splitlines() if line.startswith("FILES")}
    assert "'helper.py', 'mine.py', 'mine.yaml']" in told
    assert ".env" not in told
    assert "py_modules_files" in told
    front = json.loads((runs / "mine" / "front.json").read_text())
    assert front["trials"]
    assert json.loads(verb(capsys, "status", job, "--json"))["status"] == "SUCCEEDED"
    assert verb(capsys, "status", job, "--logs") in done.stderr

    # the other one: interrupted as by Ctrl-C, so that it can go on
    wait_until(lambda: (runs / "long" / "study.json").is_file(), 90)
    wait_until(lambda: "trials to run" in jobs.log(long.id), 60)
    stopped = json.loads(verb(capsys, "stop", long.id, "--json"))
    assert (stopped["status"], stopped["study"], stopped["runs"]) == ("STOPPED", "long", str(runs))
    assert "What is finished is kept: `ranksearch resume long" in jobs.log(long.id)
    listed = {row["id"]: row["status"] for row in json.loads(verb(capsys, "status", "--json"))}
    assert listed == {job: "SUCCEEDED", long.id: "STOPPED"}
    table = verb(capsys, "status")
    assert "2 jobs" in table
    assert long.id in table


@DRILLS
def test_ctrl_c_leaves_the_job_alone_and_a_study_goes_on_by_resume(cluster, tmp_path, capsys):
    for name, text in {"mine.yaml": SPACE, "mine.py": TASK, "helper.py": HELPER}.items():
        (tmp_path / name).write_text(text)
    runs = tmp_path / "shared"
    submit = [sys.executable, "-m", "ranksearch", "submit", "--runs", str(runs)]
    following = subprocess.Popen(
        [*submit, "mine.yaml", "--name", "again", "--no-check"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    job = following.stdout.readline().strip()
    wait_until(lambda: json.loads(verb(capsys, "status", job, "--json"))["status"] == "RUNNING", 60)
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=60)
    assert following.returncode == 130, errors
    assert "no longer following; the job goes on" in errors
    assert "Traceback" not in errors
    wait_until(lambda: json.loads(verb(capsys, "status", job, "--json"))["status"] == "SUCCEEDED", 120)

    done = subprocess.run(
        [*submit, "--resume", "again", "--trials", "3"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 3 trials are done" in done.stderr
    assert "[3/3]" in done.stderr
    assert len(json.loads((runs / "again" / "front.json").read_text())["trials"]) >= 1


def test_a_wrong_id_a_wrong_token_and_none(cluster, capsys, monkeypatch):
    with pytest.raises(UsageError, match="There is no job 'nothing'"):
        verb(capsys, "stop", "nothing")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.raises(UsageError, match=r"takes another token .* set RAY_AUTH_TOKEN"):
        verb(capsys, "status")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(UsageError, match=r"asks for a token, but none is set here: set RAY_AUTH_TOKEN"):
        verb(capsys, "status")
