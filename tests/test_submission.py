"""What a job takes along to a cluster, and what is refused before anything is sent. No Ray here."""

import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ranksearch.cli import app, clusters
from ranksearch.errors import UsageError
from ranksearch.jobs import upload
from ranksearch.jobs.submission import (
    STOPPING,
    check_runs,
    continued,
    describe_variables,
    masked,
    new_study,
    variables,
)
from ranksearch.jobs.upload import folder_files, write_archive
from ranksearch.space.reading import read_space

NOW = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
SPACE = "name: mine\ntask: mine.py:make_task\nbudgets: {flops: 50%}\nrecipe: {steps: 20}\n"


def put(root: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def project(tmp_path):
    """A folder with a task of its own, and with what should stay at home."""
    root = tmp_path / "project"
    put(root, "conf/mine.yaml", text=SPACE)
    put(root, "conf/mine.py", text="def make_task(): ...\n")
    put(root, "conf/helper.py", "conf/data/loaders.py", "src/net.py")
    put(
        root,
        "conf/runs/old/front.json",
        "conf/data/inner/raw.bin",
        "conf/.env",
        "conf/key.pem",
        "conf/__pycache__/mine.pyc",
    )
    put(root, "conf/myenv/pyvenv.cfg", "conf/myenv/lib/big.py", "conf/.git/HEAD", "conf/datasets/images.bin")
    return root


def submission(project, *, space="conf/mine.yaml", options=(), passed=None, read=None, **places):
    path = project / space
    return new_study(
        path,
        read_space(path, **(read or {})),
        runs="/shared/runs",
        options=options,
        passed=passed or {},
        now=NOW,
        **places,
    )


def test_a_task_of_ones_own_travels_with_what_lies_beside_it(project):
    job = submission(project, options=["--budget", "flops=40%", "--set", "recipe.lr={low: 0.1, high: 1}"])
    # data/ holds code and travels, less what lies in a folder of data alone; secrets, studies and environments stay
    assert sorted(job.files) == ["data/inner/raw.bin", "data/loaders.py", "helper.py", "mine.py", "mine.yaml"]
    assert job.id == "mine-20260131-235959"
    assert job.entrypoint == (
        "python -m ranksearch search mine.yaml --budget flops=40% --set 'recipe.lr={low: 0.1, high: 1}' "
        "--set task=mine.py:make_task --runs /shared/runs --address auto"
    )
    assert job.metadata == {"ranksearch.study": "mine", "ranksearch.runs": "/shared/runs", "ranksearch.verb": "search"}
    assert job.variables == STOPPING


def test_a_task_of_ours_needs_its_space_alone(digits_yaml):
    job = new_study(digits_yaml, read_space(digits_yaml), runs="s3://b/runs", options=(), passed={}, now=NOW)
    assert list(job.files) == ["digits_resnet8.yaml"]
    assert job.command[-4:] == ("--runs", "s3://b/runs", "--address", "auto")


def test_the_working_tree_travels_where_it_is_named(project):
    job = submission(project, working_dir=project, exclude=["helper.py"], include=["conf/datasets"])
    assert sorted(job.files) == [
        "conf/data/inner/raw.bin", "conf/data/loaders.py", "conf/datasets/images.bin", "conf/mine.py", "conf/mine.yaml", "src/net.py",
    ]  # fmt: skip
    assert "conf/mine.yaml --set task=conf/mine.py:make_task" in job.entrypoint
    with pytest.raises(UsageError, match="lies outside it"):
        submission(project, working_dir=project / "src")
    with pytest.raises(UsageError, match="no such file or folder"):
        submission(project, include=["nothing"])
    with pytest.raises(UsageError, match="lies outside"):
        submission(project, include=["../src/net.py"])


def test_the_job_finds_task_and_space_as_they_were_packed(project, tmp_path, monkeypatch):
    """The command that is sent, read as the cluster reads it: from the unpacked archive, which is all there is."""
    job = submission(project, working_dir=project)
    write_archive(job.files, tmp_path / "job.zip")
    there = tmp_path / "there"
    zipfile.ZipFile(tmp_path / "job.zip").extractall(there)
    monkeypatch.chdir(there)
    settings = [value for option, value in zip(job.command, job.command[1:], strict=False) if option == "--set"]
    assert read_space(job.command[4], settings=settings).task == f"{there}/conf/mine.py:make_task"


def test_checkpoints_and_fronts_that_lie_here_travel_and_absolute_paths_are_the_clusters(project, monkeypatch):
    monkeypatch.chdir(project)
    put(project, "weights.pt", "earlier/study.json", "earlier/front.json", "sent.json")
    read = {"settings": ["checkpoint=weights.pt"], "warm_start": ["earlier", "sent.json", "/shared/front.json", "old"]}
    job = submission(project, read=read)
    assert job.files["checkpoint/weights.pt"] == Path("weights.pt")
    assert job.files["fronts/0.json"] == Path("earlier/front.json")
    assert job.files["fronts/1.json"] == Path("sent.json")
    asked = [v for o, v in zip(job.command, job.command[1:], strict=False) if o == "--warm-start"]
    assert asked == ["fronts/0.json", "fronts/1.json", "/shared/front.json", "old"]
    assert "--set checkpoint=checkpoint/weights.pt" in job.entrypoint
    with pytest.raises(UsageError, match="data are not sent"):
        submission(project, read={"settings": ["data=here"]})
    absolute = submission(project, read={"settings": ["data=/shared/d", f"checkpoint={project}/weights.pt"]})
    assert not [name for name in absolute.files if name.startswith("checkpoint/")]


def test_what_git_ignores_stays_but_the_task_itself_travels(project):
    root = project / "conf"
    (root / ".git" / "HEAD").unlink()
    (root / ".git").rmdir()
    put(root, ".gitignore", text="helper.py\nmine.py\n*.bin\n")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    assert sorted(submission(project).files) == [".gitignore", "data/loaders.py", "mine.py", "mine.yaml"]
    put(project, "other/.gitignore", text="*\n")
    put(project, "other/code.py")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    assert "code.py" in folder_files(project / "other")  # a folder that is ignored as a whole is taken as it is


def test_the_same_files_are_the_same_archive(project, tmp_path):
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    size = write_archive(submission(project).files, first)
    (project / "conf/helper.py").touch()
    write_archive(submission(project).files, second)
    assert first.read_bytes() == second.read_bytes()
    assert size == first.stat().st_size
    put(project, "conf/helper.py", text="y")
    write_archive(submission(project).files, second)
    assert first.read_bytes() != second.read_bytes()


def test_too_much_is_refused_and_the_largest_are_named(project, tmp_path, monkeypatch):
    import random

    (project / "conf/weights.bin").write_bytes(random.Random(0).randbytes(60_000))
    (project / "conf/zeros.bin").write_bytes(bytes(90_000))  # compresses to nothing
    files = submission(project).files
    monkeypatch.setattr(upload, "LIMIT", 100_000)
    assert 60_000 < write_archive(files, tmp_path / "job.zip") < 70_000
    for name in ("LIMIT", "SEEN_LIMIT"):  # once after compression, once without trying it
        monkeypatch.setattr(upload, name, 50_000)
        with pytest.raises(
            UsageError, match=r"takes 49 KiB. The largest: zeros.bin \(88 KiB\), weights.bin \(59 KiB\)"
        ):
            write_archive(files, tmp_path / "job.zip")


@pytest.mark.parametrize("runs", [None, "", "runs", "./runs", "~/runs"])
def test_studies_need_a_place_that_outlives_the_job(runs):
    with pytest.raises(UsageError, match="storage that every node sees"):
        check_runs(runs)


def test_variables_are_named_and_secrets_are_masked(monkeypatch):
    here = {
        "MLFLOW_TRACKING_URI": "https://me:hunter2@mlflow.example:5000",
        "RANKSEARCH_DATA": "/d",
        "AWS_SECRET_KEY": "s",
        "HOME": "/h",
    }
    assert variables([], here) == {name: here[name] for name in ("MLFLOW_TRACKING_URI", "RANKSEARCH_DATA")}
    passed = variables(["RANKSEARCH_DATA=/shared/d", "AWS_SECRET_KEY"], here)
    assert passed == {
        "MLFLOW_TRACKING_URI": here["MLFLOW_TRACKING_URI"],
        "RANKSEARCH_DATA": "/shared/d",
        "AWS_SECRET_KEY": "s",
    }
    said = "\n".join(describe_variables(passed))
    assert "hunter2" not in said
    assert "AWS_SECRET_KEY=***" in said
    assert "https://me:***@mlflow.example:5000" in said
    assert "whoever may read the cluster's jobs can read MLFLOW_TRACKING_URI, AWS_SECRET_KEY" in said
    for name in ("DB_PASS", "DB_PWD", "PGPASSWORD", "GITHUB_PAT", "MY_KEYS", "APIKEY"):
        assert masked(name, "hunter2") == "***", name
    assert masked("RANKSEARCH_PATH", "/d") == "/d"
    assert masked("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    assert "names this machine" in describe_variables({"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"})[1]
    for wrong in ("NOT_SET", "=1", "A B=1"):
        with pytest.raises(UsageError, match="--env"):
            variables([wrong], here)


def test_a_study_of_the_cluster_goes_on(project):
    job = continued("mine", runs="/shared/runs", trials=20, passed={}, now=NOW)
    assert job.entrypoint == "python -m ranksearch resume mine --trials 20 --runs /shared/runs --address auto"
    assert not job.files
    assert job.metadata["ranksearch.verb"] == "resume"
    assert "mine.py" in continued("m", runs="/r", trials=None, passed={}, now=NOW, working_dir=project / "conf").files
    with pytest.raises(UsageError, match="name of a study"):
        continued("/shared/runs/mine", runs="/r", trials=None, passed={}, now=NOW)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["submit", "SPACE"], "--runs is missing"),
        (["submit", "SPACE", "--runs", "/r", "--budget", "flops=1%"], "costs less than"),
        (["submit", "SPACE", "--runs", "/r", "--set", "search.sampler=tpee"], "Did you mean 'tpe'"),
        (["submit", "SPACE", "--runs", "/r"], "no job server answers there"),
        (["submit", "SPACE", "--runs", "/r", "--resume", "digits"], "either a search-space file"),
        (["submit", "--runs", "/r"], "either a search-space file"),
        (["submit", "--resume", "a", "--runs", "/r", "--budget", "flops=1%"], "a study keeps its space"),
        (["submit", "--resume", "a", "--runs", "/r", "--at-least", "accuracy=-1"], "a study keeps its space"),
        (["submit", "SPACE", "--runs", "/r", "--objective", "smalest"], "smallest"),
        (["status", "--address", "nowhere"], "expected http://HOST:PORT"),
        (["status", "--address", "http://127.0.0.1:99999"], "expected http://HOST:PORT"),
        (["status", "--logs"], "need a job's ID"),
        (["stop", "some-job"], "no job server answers there"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(digits_yaml, arguments, says, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.delenv("RANKSEARCH_RUNS", raising=False)
    done = CliRunner().invoke(app, [str(digits_yaml) if a == "SPACE" else a for a in arguments])
    assert isinstance(done.exception, UsageError)
    assert says in str(done.exception)
    assert done.stdout == ""


def test_what_a_search_is_told_a_job_is_told_too(digits_yaml, monkeypatch):
    sent = []
    monkeypatch.setattr(clusters, "_launch", lambda job, *_, **__: sent.append(job.entrypoint))
    wishes = [
        "--budget",
        "flops=40%",
        "--at-least",
        "accuracy=-1",
        "--set",
        "recipe.steps=9",
        "--objective",
        "smallest",
        "--trials",
        "3",
    ]
    done = CliRunner().invoke(app, ["submit", str(digits_yaml), "--runs", "/r", "--no-check", *wishes])
    assert done.exception is None
    assert all(
        wish in sent[0]
        for wish in ("flops=40%", "--at-least accuracy=-1", "steps=9", "--objective smallest", "--trials 3")
    )


def test_a_task_that_fails_here_is_not_submitted_unless_asked_to(project, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    put(project, "conf/mine.py", text="def make_task(): open('/only/on/the/cluster')\n")
    arguments = ["submit", str(project / "conf/mine.yaml"), "--runs", "/r"]
    refused = CliRunner().invoke(app, arguments)
    assert "FileNotFoundError" in str(refused.exception)
    assert "--no-check" in str(refused.exception)
    assert "no job server answers" in str(CliRunner().invoke(app, [*arguments, "--no-check"]).exception)


def test_without_the_extra_the_message_names_it(monkeypatch):
    import importlib.util
    import socket

    from ranksearch.jobs import jobs

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else real(name))
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(
            UsageError, match=r"need aiohttp, of the extra `cluster`: pip install .* 'ranksearch\[cluster\]'"
        ),
    ):
        jobs.Jobs(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_submitting_loads_ray_only_to_talk_to_the_cluster():
    probe = "import sys\nfrom ranksearch.jobs import submission, upload\nimport ranksearch.cli\nassert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=120)
