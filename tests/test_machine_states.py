"""What the machine does: disks that are full, workers that end, files that are lost, starts that take long. Nothing that counts is lost,
and it is said."""

import errno
import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, TensorDataset

from ranksearch.cluster.ask_tell import KEPT, Forget
from ranksearch.cluster.connection import told_meanwhile
from ranksearch.cluster.losses import Losses
from ranksearch.compress import RankPlan
from ranksearch.compress.export import save_net
from ranksearch.data.loaded import as_source, batch_text
from ranksearch.places.files import partly_written, write_durably
from ranksearch.run_study import run_study
from ranksearch.store.where import finished_front
from ranksearch.study.study import Study
from ranksearch.trial.checkpoint import CheckpointFile, is_full
from ranksearch.trial.nested import save_weights
from tests.conftest import SmallNet, Told

STORED = Path(__file__).parent / "stored_study"


@pytest.fixture
def folder(tmp_path):
    made = Path(shutil.copytree(STORED, tmp_path / "runs" / "stored"))
    Study.open(made).write_front()  # of this version
    return made


TRAIN = "ray::ImplicitFunc.train() (pid=7, ip=127.0.0.1)\n  File x, line 3\n"


@pytest.mark.parametrize(
    ("error", "final", "text"),
    [
        ("Traceback\n  File x\nModuleNotFoundError: No module named 'sibling'\n", True, "No module named 'sibling'"),
        (TRAIN + "FileNotFoundError: [Errno 2] No such file: '/data'", True, "could not begin: FileNotFoundError"),
        (TRAIN + "ranksearch.errors.UsageError: task: own.py, line 3: no data", True, "could not begin: task: own.py, line 3: no data"),
        (TRAIN + "OSError: [Errno 28] No space left on device", False, "killed, or it left"),
        (TRAIN + "RuntimeError: CUDA error: device-side assert", False, "killed, or it left"),
        (TRAIN + "ranksearch.trial.checkpoint.Leaving", False, "killed, or it left"),
        (TRAIN + "ray.exceptions.ObjectLostError: Failed to retrieve object", False, "killed, or it left"),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory", False, "ran out of memory"),
        ("ActorDiedError: (1) The process is killed by SIGKILL by OOM killer due to high memory usage", False, "killed, or it left"),
    ],
)  # fmt: skip
def test_a_worker_that_cannot_begin_is_told_with_its_own_error_and_not_tried_again(monkeypatch, error, final, text):
    losses = Losses(print)
    monkeypatch.setattr("ranksearch.cluster.losses.find_node", lambda node_id: None)
    monkeypatch.setattr("ranksearch.cluster.losses.state_of", lambda node: "alive")
    losses._errors["t"], losses._nodes["t"] = error, "0" * 32
    loss = losses.explain("t")
    assert (loss.final, loss.blameless) == (final, False)
    assert text in loss.text
    assert ("memory" in loss.text) == ("low on memory" in error)


def test_workers_that_leave_before_they_begin_are_not_tried_three_times_and_their_last_line_is_said(
    monkeypatch, tmp_path
):
    (tmp_path / "worker-abc-01000000-7.err").write_text(
        ":job_id:01000000\n:actor_name:ImplicitFunc\nthe licence server said no\n[2026-11-28 12:00:00,1 E 7 7] core_worker.cc: bye\n"
    )
    monkeypatch.setattr("ranksearch.cluster.losses.logs_folder", lambda: str(tmp_path))
    monkeypatch.setattr("ranksearch.cluster.losses.actor_record", lambda actor: SimpleNamespace(pid=7))
    monkeypatch.setattr("ranksearch.cluster.losses.find_node", lambda node_id: None)
    monkeypatch.setattr("ranksearch.cluster.losses.state_of", lambda node: "alive")
    losses = Losses(print)

    def lose(begun):
        losses._errors["t"], losses._nodes["t"], losses._actors["t"] = (
            "ActorDiedError: died",
            "0" * 32,
            "a" + str(begun),
        )
        if begun:
            losses.on_trial_result(0, [], SimpleNamespace(trial_id="t"), {})
        return losses.explain("t")

    assert [lose(begun).final for begun in (False, True, False, False, False)] == [False, False, False, True, True]
    assert lose(False).text.endswith("the last that it wrote: the licence server said no)")


def test_tune_lets_go_of_trials_that_ended():
    ended, running = SimpleNamespace(is_finished=lambda: True), SimpleNamespace(is_finished=lambda: False)
    trials = [ended, running] * KEPT
    Forget().on_step_end(0, trials)
    assert trials == [running] * KEPT  # the list itself: it is Tune's own
    over = [ended] * (KEPT + 1)
    Forget().on_step_end(0, over)
    assert over == [ended]


def test_what_takes_long_is_not_a_minute_of_silence(monkeypatch):
    monkeypatch.setattr("ranksearch.cluster.connection.STILL_SECONDS", 0.01)
    said = []
    with told_meanwhile(said.append, "Ray is still starting"):
        time.sleep(0.1)
    assert said
    assert said[0] == "Ray is still starting (0 s)"
    count = len(said)
    time.sleep(0.05)
    assert len(said) == count


def test_what_a_trial_leaves_is_on_the_disk_before_it_counts(small_net, tmp_path, monkeypatch):
    """A file's content before its name, the names of files and new folders before the call returns."""
    events, sync, replace_ = [], os.fsync, Path.replace

    def fsync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def renamed(self, target):
        events.append(("name", self, Path(target)))
        return replace_(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    folder = tmp_path / "trials" / "000"
    save_net(small_net, RankPlan(model="small"), folder)
    save_weights(small_net, folder)
    write_durably(tmp_path / "study.json", "{}")
    named = [event for event in events if event[0] == "name"]
    assert {event[2].name for event in named} == {"plan.json", "model.safetensors", "nested.safetensors", "study.json"}
    for event in named:
        at = events.index(event)
        assert ("sync", event[1]) in events[:at]
        assert ("sync", event[2].parent) in events[at:]
    assert {("sync", tmp_path), ("sync", folder.parent)} <= set(events)


def test_a_file_that_could_not_be_written_leaves_no_half_of_it_on_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="No space"), partly_written(tmp_path / "model") as partial:  # noqa: PT012
        partial.write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_state_that_a_full_disk_does_not_take_ends_no_trial(tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr("torch.save", full)
    CheckpointFile(tmp_path / "state.pt", 0.0).save({"a": 1})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("torch.save", lambda state, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        CheckpointFile(tmp_path / "state.pt", 0.0).save({"a": 1})


@pytest.mark.parametrize("left", ["nothing", "an empty file"])
def test_a_study_whose_nets_are_lost_is_completed_and_says_which(folder, bench, monkeypatch, left):
    monkeypatch.setattr("ranksearch.run_study.BackgroundMirror", lambda *given: MagicMock())
    (folder / "test.json").unlink()
    record = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(record | {"done": False}))
    study, heard = Study.open(folder), Told()
    if left == "an empty file":
        for row in study.front:
            save_net(SmallNet(), RankPlan(model="resnet8"), study.trial_folder(row.trial))
            (study.trial_folder(row.trial) / "model.safetensors").write_bytes(b"")
    run_study(study, bench, folder.parent, heard, address=None, inline=True)
    record = json.loads((folder / "front.json").read_text())
    assert record["state"] == "complete"
    assert (folder / "report.html").is_file()
    assert record["dense"]["test_accuracy"] is not None
    for row in record["trials"]:
        assert row["test_accuracy"] is None
        assert any(text.startswith(f"the net of trial {row['trial']} is lost") for text in heard.lines)
    assert json.loads((folder / "test.json").read_text()).keys() == {"dense"}  # a net that comes back is scored
    assert record["lost"] == sorted(row["trial"] for row in record["trials"])
    assert record["verdict"]["warning"].startswith("the net")
    assert record["verdict"]["warning"] in html.unescape((folder / "report.html").read_text())

    back = record["trials"][-1]["trial"]
    save_net(SmallNet(), RankPlan(model="resnet8"), study.trial_folder(back))
    assert (
        finished_front(folder)["lost"]
        == Study.open(folder).front_record()["lost"]
        == sorted({*record["lost"]} - {back})
    )
    assert finished_front(folder)["verdict"]["trial"] == back  # the one that is there to ship


@pytest.mark.parametrize(
    ("split", "text"),
    [
        ((torch.zeros(50, 4), torch.zeros(50)), "32"),
        ((torch.zeros(9, 4), torch.zeros(9)), "9"),
        (DataLoader(TensorDataset(torch.zeros(50, 4), torch.zeros(50)), batch_size=7), "7, as the task's loader"),
        ([(torch.zeros(5, 4), torch.zeros(5))] * 3, "5, as the task's loader"),
    ],
)
def test_messages_name_the_batches_that_a_loader_makes(split, text):
    assert batch_text(as_source(split, "train"), 32).startswith(text)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
        ),
        RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0: file write failed"
        ),
    ],
)
def test_a_full_disk_is_no_failure_of_the_trial(error):
    assert is_full(error)
    assert not is_full(RuntimeError("shape"))


@pytest.mark.parametrize(("whole_group", "code"), [(True, 143), (False, 7)])
def test_a_signal_to_the_group_of_our_ray_ends_with_a_sentence_and_one_to_us_alone_as_we_answer_it(whole_group, code):
    program = (
        "import signal, sys, time\n"
        "from types import SimpleNamespace\n"
        "from ranksearch.cluster import ending\n"
        "ending.own_node = lambda: SimpleNamespace(head=True)\n"
        "def answer(number, frame):\n"
        "    time.sleep(1)\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, answer)\n"
        "with ending.ended_with_group(lambda: 'stopped', 143):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, **pipes)
    assert driver.stdout.readline() == "ready\n"
    (os.killpg if whole_group else os.kill)(driver.pid, signal.SIGTERM)
    _, said = driver.communicate(timeout=60)
    assert (driver.returncode, said) == (code, "ranksearch: stopped\n" if whole_group else "")
