"""A folder that came from somebody else: what it holds runs nothing and sends nothing, and what is damaged in it is told in a sentence."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import ranksearch
from ranksearch.cli.studies import front
from ranksearch.compress import RankPlan
from ranksearch.compress.export import save_net
from ranksearch.errors import UsageError
from ranksearch.jobs.upload import folder_files
from ranksearch.space.reading import read_space
from ranksearch.space.starter import write_start
from ranksearch.study.ledger import Ledger
from ranksearch.study.study import Study
from ranksearch.tracking.ui import find_store
from tests.conftest import SmallNet

STORED = Path(__file__).parent / "stored_study"
CANARY = 'from pathlib import Path\nPath(__file__).with_name("executed").touch()\ndef make_task():\n    raise RuntimeError("made")\n'


@pytest.fixture
def folder(tmp_path):
    made = Path(shutil.copytree(STORED, tmp_path / "runs" / "stored"))
    Study.open(made).write_front()  # of this version
    return made


def change(path, changes):
    """Lays values over those of a JSON or YAML file, by dotted names."""
    read, write = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    data = read(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(write(data))


@pytest.fixture
def with_code(folder):
    """A study that came with a task file, of a net that is the stored one's by another name."""
    (folder / "own.py").write_text(CANARY)
    sha = hashlib.sha256(CANARY.encode()).hexdigest()
    record = {"file": "own.py", "function": "make_task", "sha256": sha, "origin": str(folder.parent.parent / "own.py")}
    change(folder / "study.json", {"task_file": record})
    change(folder / "space.yaml", {"task": "own.py:make_task", "model": None, "validation": None})
    return folder


def ran(folder):
    return [*folder.rglob("executed"), *folder.parent.parent.glob("executed")]


def test_a_task_file_that_came_with_a_folder_is_not_run(with_code, small_net):
    save_net(small_net, RankPlan(model="own.py:make_task"), with_code / "trials" / "000")
    ways = [
        lambda: ranksearch.load(with_code / "trials" / "000"),
        lambda: ranksearch.resume(with_code, inline=True, trials=6),
        lambda: ranksearch.export(with_code, 0, format="state_dict"),
        lambda: read_space(with_code / "space.yaml"),
        lambda: ranksearch.preview(with_code / "space.yaml"),
        lambda: Study.open(str(with_code)).space.kind(),
    ]
    for way in ways:
        with pytest.raises(UsageError, match=r"own\.py came with its folder|holds another net"):
            way()
    assert not ran(with_code)
    assert len(Study.open(with_code).front) == 4


def test_it_runs_for_a_user_who_says_so_or_has_the_same_file_outside(with_code):
    with pytest.raises(UsageError, match="made"):
        Study.open(with_code, trust=True).space.kind()
    assert ran(with_code)
    ran(with_code)[0].unlink()
    outside = with_code.parent.parent / "own.py"
    outside.write_text(CANARY + "\n")  # another byte
    with pytest.raises(UsageError, match="came with its folder"):
        Study.open(with_code).space.kind()
    change(with_code / "study.json", {"task_file.origin": str(with_code / "trials" / ".." / "own.py")})
    with pytest.raises(UsageError, match="came with its folder"):  # inside
        Study.open(with_code).space.kind()
    outside.write_text(CANARY)
    change(with_code / "study.json", {"task_file.origin": str(outside)})
    with pytest.raises(UsageError, match="made"):
        Study.open(with_code).space.kind()


def test_a_space_that_names_a_file_of_which_its_study_knows_nothing_runs_nothing(folder):
    outside = folder.parent.parent / "mine.py"
    outside.write_text(CANARY)
    change(folder / "space.yaml", {"task": f"{outside}:make_task", "model": None, "validation": None})
    for way in (lambda: Study.open(folder), lambda: read_space(folder / "space.yaml")):
        with pytest.raises(UsageError, match=r"mine\.py"):
            way()
    assert not ran(folder)


def test_a_net_of_somebody_elses_is_built_by_what_its_user_names(folder, small_net, monkeypatch):
    plan = RankPlan(model="own.py:make_task")
    save_net(small_net, plan, folder / "trials" / "000")
    for build in (SmallNet, "tests.conftest:SmallNet"):
        net = ranksearch.load(folder / "trials" / "000", build=build)
        assert all((a == b).all() for a, b in zip(net.parameters(), small_net.parameters(), strict=True))
    with pytest.raises(UsageError, match=r"tests\.conftest has no .SmallNot."):
        ranksearch.load(folder / "trials" / "000", build="tests.conftest:SmallNot")


@pytest.mark.parametrize(
    ("key", "address", "way"),
    [
        ("storage.optuna", "postgresql://db.stranger.example/optuna", Study.open),
        ("storage.optuna", "postgresql://db.stranger.example/optuna", ranksearch.report),
        ("storage.results", "s3://stranger/results", ranksearch.resume),
        ("tracking.uri", "https://mlflow.stranger.example", ranksearch.sync),
        ("tracking.artifacts", "s3://stranger/artifacts", ranksearch.sync),
    ],
)
def test_a_folders_own_addresses_are_not_used_until_its_user_says_so(folder, key, address, way, monkeypatch):
    change(folder / "space.yaml", {key: address})
    with pytest.raises(UsageError, match=rf"names {address} \({key}\).*--trust"):
        way(folder)
    if key == "tracking.uri":  # the user's own setting
        from ranksearch.store.addresses import EVERY, confirm_addresses

        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        confirm_addresses(Study.open(folder).space, folder, EVERY, trust=False)


def test_the_store_that_a_folder_names_is_not_opened_until_its_user_says_so(folder):
    noted = {"uri": "postgresql://db.stranger.example/mlflow", "experiment": "1", "parent": "0"}
    (folder / "mlflow.json").write_text(json.dumps(noted))
    for where in (folder, folder.parent):
        with pytest.raises(UsageError, match=r"db\.stranger\.example"):
            find_store(str(where), folder.parent)
    assert find_store(str(folder), folder.parent, trust=True).uri == noted["uri"]
    assert find_store(str(folder), folder.parent).uri == noted["uri"]  # said once


@pytest.mark.parametrize(
    ("file", "content", "place"),
    [
        ("test.json", "[]", "expected a mapping"),
        ("test.json", '{"0": "high"}', "0: expected a valid number, got 'high'"),
        ("test.json", '{"0": NaN}', "0: expected a finite number, got nan"),
        ("latencies.json", '{"0": ["fast", 1.0]}', r"0\.0: expected a valid number"),
        ("study.json", "null", "expected a mapping of keys, got None"),
        ("study.json", "[" * 100_000, "nested too deeply"),
        ("study.json", "{", "expected JSON"),
        ("study.json", {"id": 3}, "id: expected a valid string"),
        ("study.json", {"dense.macs": 0}, "dense.macs: expected greater than or equal to 1, got 0"),
        ("study.json", {"dense.macs": 10**400}, "dense.macs: "),
        ("study.json", {"provenance": {}}, "provenance.created: this key is missing"),
        ("study.json", {"provenance.created": "then"}, "provenance: "),
    ],
)
def test_a_damaged_file_is_told_with_its_place(folder, file, content, place):
    if isinstance(content, str):
        (folder / file).write_text(content)
    else:
        change(folder / file, content)
    with pytest.raises(UsageError, match=place) as told:
        Study.open(folder)
    assert str(told.value).startswith(str(folder / file))
    assert len(str(told.value).splitlines()) == 1


def attribute(attributes):
    return json.dumps({"op_code": 8, "worker_id": "", "trial_id": 0, "user_attr": attributes})


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("null", "expected a mapping of keys"),
        ("7", "expected a mapping of keys"),
        ('{"op_code": 99, "worker_id": ""}', "op_code: "),
        (attribute({"result": {"status": "complete", "val_accuracy": "x"}}), "result: val_acc"),
        (attribute({"result": {"status": "done"}}), "result: status"),
        (attribute({"candidate": []}), "candidate: expected a mapping"),
    ],
)  # fmt: skip
def test_a_damaged_line_of_the_journal_is_told_with_its_number_and_the_front_is_read_still(folder, line, place, capsys):
    journal = folder / "optuna.journal"
    count = journal.read_text().count("\n")
    journal.write_text(journal.read_text() + line + "\n")
    with pytest.raises(UsageError, match=rf"optuna.journal: line {count + 1}: {place}"):
        Study.open(folder)
    change(folder / "study.json", {"done": False})  # else the file of the front is all that is read
    with pytest.raises(UsageError, match=rf"optuna.journal: line {count + 1}: {place}"):
        front(str(folder), as_json=True)
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 4


def test_layers_that_are_called_by_numbers_go_through_init_and_check(tmp_path, monkeypatch):
    (tmp_path / "numbered.py").write_text(
        "from torch import nn\nmake = lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    written, _ = write_start("numbered:make", [32], tmp_path)
    assert read_space(written).layers.exclude == ["2"]
    assert read_space(written, settings=["layers.exclude=[2]"]).layers.exclude == ["2"]


def test_a_net_that_is_found_twice_is_on_the_front_once(folder):
    study = Study.open(folder)
    first = study.front[0]
    ledger = Ledger(["accuracy", "macs"], [first, replace(first, trial=90)])
    assert ledger.on_front == {first.trial}
    other = replace(first, trial=91, plan={**first.plan, "layers": {}})  # another net that is as good
    assert ledger.add(other)


def test_the_best_is_asked_for_as_python_users_write_it(folder):
    study = Study.open(str(folder))
    budgets = {"flops": "90%", "size": "90%"}
    assert study.best(["flops=90%", "size=90%"]) == study.best(budgets) == study.best("flops=90%,size=90%")
    with pytest.raises(UsageError, match="lies within flops=90% and flops=1%"):
        study.best(["flops=90%", "flops=1%"])


@pytest.mark.parametrize("call", [ranksearch.load, lambda net: ranksearch.export(net, 0, format="onnx")])
def test_a_net_in_the_place_of_a_folder_is_answered(small_net, call):
    with pytest.raises(UsageError, match=r"got a SmallNet|a net by itself"):
        call(small_net)


def test_a_metric_that_is_not_finite_on_the_test_set_is_not_recorded_and_not_asked_for_again(folder):
    (folder / "test.json").unlink()
    study, said = Study.open(folder), []
    study.score_test(lambda row: float("nan") if row is None else 98.0, said.append)
    assert "nan" in said[0]
    again = Study.open(folder)
    again.score_test(lambda row: pytest.fail("asked again"), said.append)
    record = again.front_record()
    assert record["dense"]["test_accuracy"] is None
    assert record["trials"][0]["test_accuracy"] == 98.0


def test_links_to_elsewhere_and_to_secrets_do_not_travel(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "project"
    outside.mkdir()
    root.mkdir()
    (outside / "notes.txt").write_text("x")
    (root / "code.py").write_text("x")
    (root / ".env").write_text("x")
    (root / "beside.py").symlink_to(root / "code.py")
    (root / "plain.txt").symlink_to(root / ".env")
    (root / "notes.txt").symlink_to(outside / "notes.txt")
    assert set(folder_files(root)) == {"code.py", "beside.py"}
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / ".git" / "config").write_text("[damaged")
    with pytest.raises(UsageError, match="git does not say what it ignores"):
        folder_files(root)
