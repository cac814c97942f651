"""What is decided about nodes and losses; a study that is told to leave or to end. `test_drills.py` takes a real cluster apart."""

import os
import signal
import socket
import time
from dataclasses import replace

import pytest

from ranksearch.cluster.nodes import AHEAD, NodeState, state_of, wanted
from ranksearch.cluster.packing import Machine, workers_on
from ranksearch.study.study import NODE_LOSSES, Study
from ranksearch.trial.attempt import attempt
from ranksearch.trial.checkpoint import CheckpointFile, Leaving
from tests.test_cli import start_search


def test_a_node_holds_what_fits_it_whole():
    assert workers_on(Machine.of({"CPU": 7.0}), 2, 0) == 3
    assert workers_on(Machine.of({"CPU": 16.0, "GPU": 2.0}), 4, 1) == 2
    assert workers_on(Machine.of({"CPU": 16.0, "GPU": 2.0}), 1, 0.4) == 4  # two on each GPU: a fifth would lie on both
    assert workers_on(Machine.of({"CPU": 16.0, "GPU": 7.0}), 1, 2) == 3
    assert workers_on(Machine.of({"memory": 1e9}), 1, 0) == 0  # a head that is kept free of trials


def test_demand_runs_ahead_of_a_cluster_that_grows_by_demand_alone():
    assert wanted(4, None) == 4  # no autoscaler
    assert wanted(0, 100) == AHEAD
    assert wanted(20, 100) == 40
    assert wanted(90, 100) == 100
    assert wanted(6, 2) == 6  # nodes that the autoscaler has not started


def test_a_node_that_does_not_answer_is_gone_before_ray_says_so():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    record = {"NodeID": "a", "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": closed}
    assert state_of(record) == NodeState.GONE
    assert state_of(record | {"Alive": False}) == NodeState.GONE
    assert state_of(None) == NodeState.GONE


def test_a_lost_node_is_not_counted_as_a_loss_of_the_trials_own(make, bench):
    study = make(settings=["resources.worker_losses=1"])
    for _ in range(NODE_LOSSES):
        assert study.retry(study.ask(bench).number, blameless=True)
    candidate = study.ask(bench)
    assert study.retry(candidate.number)  # its own process, for the first time
    again = study.ask(bench)
    assert (again.plan, again.seed) == (candidate.plan, candidate.seed)  # before the classics that were never begun
    assert not study.retry(again.number)
    assert not study.retry(again.number, blameless=True)  # it may be what takes the nodes down


def test_a_trial_that_is_told_to_leave_writes_its_state_and_goes_on_from_it(make, bench, tmp_path):
    study = make(settings=["recipe.steps=40", "recipe.bn_batches=2", "recipe.factor_share=0.5"])
    candidate = study.ask(bench)
    entries, options = [], {"report": lambda entry: entries.append(entry), "checkpoint_seconds": 60}
    told = iter([False] * 30)

    def leaving():
        return next(told, True)

    task = bench.task.without_test()
    with pytest.raises(Leaving):
        attempt(task, bench.dense, bench.net, candidate, leaving=leaving, **options)
    state = CheckpointFile(candidate.checkpoint, 60).load()
    assert state["phase"] == "factors"
    assert 0 < state["training"]["done"] < 20
    scored = len(entries)
    result = attempt(task, bench.dense, bench.net, candidate, **options)
    assert result.status == "complete"
    assert len(result.history) > scored  # what was scored before is not scored again
    fresh = replace(candidate, checkpoint=tmp_path / "fresh.pt", save_to=tmp_path / "fresh")
    whole = attempt(task, bench.dense, bench.net, fresh, **options)
    assert result.val_accuracy == pytest.approx(whole.val_accuracy, abs=0.3)


def test_sigterm_keeps_what_is_done_and_says_how_to_go_on(tmp_path, digits_yaml):
    search = start_search(tmp_path, digits_yaml, "stopped", "--inline")
    os.kill(search.pid, signal.SIGTERM)
    started = time.monotonic()
    _, errors = search.communicate(timeout=120)
    assert search.returncode == 143, errors
    assert time.monotonic() - started < 60
    assert "stopped by SIGTERM" in errors
    assert "`ranksearch resume stopped` goes on" in errors
    assert "Traceback" not in errors
    assert Study.open(tmp_path / "runs" / "stopped").finished >= 1
