"""Several trials on one GPU: CUDA MPS by a control program that is made up, and how many are packed by how fast they are together."""

import os
import sys
from pathlib import Path

import pytest
import torch

from ranksearch.cluster import mps, pace, sharing
from ranksearch.compress import LayerPlan, RankPlan, trace
from ranksearch.errors import UsageError
from ranksearch.space.recipe import RecipeSpace
from ranksearch.trial.recipe import Recipe, middle
from tests.test_capture import task

CONTROL = """#!/bin/sh
# as NVIDIA's: -d makes a daemon, whose pipe is there for as long as it runs; without it commands are read and sent there
pipe="${CUDA_MPS_PIPE_DIRECTORY:-$0.pipes}/control"
echo "$1 $CUDA_VISIBLE_DEVICES" >> "$0.log"
if [ "$1" = -d ]; then [ -z "$BROKEN" ] && mkdir -p "$(dirname "$pipe")" && touch "$pipe"; exit; fi
[ -e "$pipe" ] || exit 1
read -r command
echo "$command" >> "$0.log"
if [ "$command" = quit ]; then rm "$pipe"; fi
"""


@pytest.fixture
def control(tmp_path, monkeypatch) -> Path:
    program = tmp_path / "bin" / mps.CONTROL
    program.parent.mkdir()
    program.write_text(CONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv(mps.PIPES, raising=False)
    monkeypatch.setattr(mps, "FIRST_CONTEXT", "")  # nothing here could begin CUDA
    return program


def test_without_the_program_trials_take_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mps.state() == mps.ABSENT
    assert mps.started(str(tmp_path / "pipes")) == f"there is no {mps.CONTROL}"
    assert not (tmp_path / "pipes").exists()


def test_a_daemon_of_our_own_runs_for_as_long_as_the_block(control, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as a task of Ray's without a GPU has it
    folder = tmp_path / "pipes"
    with mps.side_by_side(str(folder)) as reason:
        assert reason is None
        assert (folder / "control").exists()
        assert os.environ[mps.PIPES] == str(folder)
        assert mps.started(str(tmp_path / "second")) == mps.TAKEN  # it is found as CUDA finds it
    assert not folder.exists()
    assert mps.PIPES not in os.environ
    said = Path(f"{control}.log").read_text().splitlines()
    assert "-d " in said  # with all GPUs
    assert said[-1] == "quit"


def test_somebody_elses_daemon_is_left_alone(control, tmp_path):
    theirs = Path(f"{control}.pipes")
    theirs.mkdir()
    (theirs / "control").touch()
    assert mps.state() == mps.OTHERS
    with mps.side_by_side(str(tmp_path / "pipes")) as reason:
        assert reason == mps.TAKEN
        assert mps.PIPES not in os.environ
    assert (theirs / "control").exists()


@pytest.mark.parametrize("broken", ["daemon", "context"])
def test_a_daemon_that_nothing_can_begin_under_is_not_used(control, tmp_path, monkeypatch, broken):
    if broken == "daemon":
        monkeypatch.setenv("BROKEN", "1")
    else:
        monkeypatch.setattr(mps, "FIRST_CONTEXT", "raise SystemExit(3)")
    reason = mps.started(str(tmp_path / "pipes"))
    program = mps.CONTROL if broken == "daemon" else Path(sys.executable).name
    assert reason == f"MPS does not work here ({program} ended with {1 if broken == 'daemon' else 3})"
    assert not (tmp_path / "pipes").exists()


NODES = [
    {"NodeID": "a", "Resources": {"GPU": 2.0}}, {"NodeID": "b", "Resources": {"CPU": 4.0}}, {"NodeID": "c", "Resources": {"GPU": 1.0}},
]  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What nodes are asked for, and what they answer to a start."""
    found, answers = [], {}

    def on(nodes, function, folder):
        found.extend((node, function.__name__) for node in nodes)
        return [answers.get(node) for node in nodes] if function is mps.started else [None for _ in nodes]

    monkeypatch.setattr(sharing, "_on", on)
    return found, answers


def test_every_node_with_gpus_runs_one_while_the_trials_do(asked):
    found, answers = asked
    answers["c"], lines = "there is no such thing", []

    def study() -> None:
        with sharing.shared_gpus("auto", True, NODES, lines.append) as folder:
            assert folder is not None
            assert found == [("a", "started"), ("c", "started")]
            raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        study()
    assert found[2:] == [("a", "stop"), ("c", "stop")]
    assert lines == ["resources.sharing: MPS on 1 of 2 nodes; there is no such thing"]


def test_what_is_asked_for_and_cannot_be_is_said(asked):
    _, answers = asked
    answers |= {"a": "no", "c": "no"}
    with (
        pytest.raises(UsageError, match=r"resources.sharing: mps: no\. With `time_slice`"),
        sharing.shared_gpus("mps", True, NODES, print),
    ):
        pass
    lines = []
    with sharing.shared_gpus("auto", True, NODES, lines.append) as folder:
        assert folder is None
    assert lines == ["resources.sharing: trials take turns on a GPU; no"]
    answers |= {"a": mps.TAKEN, "c": mps.TAKEN}
    with sharing.shared_gpus("mps", True, NODES, lines.append) as folder:
        assert folder is None  # where CUDA looks by itself


@pytest.mark.parametrize(
    ("how", "several", "nodes"), [("time_slice", True, NODES), ("auto", False, NODES), ("mps", True, NODES[1:2])]
)
def test_where_nothing_is_shared_no_node_is_asked(asked, how, several, nodes):
    with sharing.shared_gpus(how, several, nodes, print) as folder:
        assert folder is None
    assert asked[0] == []


@pytest.mark.parametrize(
    ("rates", "most", "count"),
    [
        ([100, 190, 250, 260], 8, 4),
        ([100, 190, 370, 700], 8, 8),
        ([100, 102], 8, 1),
        ([100, 180, 210], 3, 3),  # half as many again have to give half as much of the gain
        ([100, 180, 185], 3, 2),
        ([100], 1, 1),
    ],
)
def test_more_trials_than_help_are_not_packed(rates, most, count):
    numbers = [1, *(min(2**i, most) for i in range(1, len(rates)))]
    known = dict(zip(numbers, map(float, rates), strict=True))
    assert pace.useful(most, known.__getitem__) == (count, known)


def test_a_pace_is_that_of_real_steps():
    given, plan = task(), RankPlan({"conv": LayerPlan("im2col", 2)})
    recipe = Recipe.settled(RecipeSpace(steps=10, batch_size=16, projection={"period": 5}), middle)
    net = trace(given.dense_model(), given.example_input)
    found = pace.Pace(given, given.model.state_dict(), net, plan, recipe)
    assert found.steps(lambda: found._training.done >= 40) == 40 - pace.WARM
    weight = found._training.model.conv.weight.detach()
    assert torch.linalg.matrix_rank(weight.flatten(1), atol=1e-5) == 2  # projected at its 40th step
    assert found.rate(0.1) > 0
