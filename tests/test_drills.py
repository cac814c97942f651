"""Drills on real Rays of this machine: a cluster that comes apart under a study, a study that is shot at."""

import pytest

from tests.conftest import DRILLS
from tests.test_scripts import call


@pytest.fixture(scope="module")
def drill():
    """A study of four trials on two nodes: one is killed in mid-trial, another one joins."""
    return call("drill_cluster")


def test_every_planned_trial_finishes_once_whatever_nodes_do(drill):
    figures = drill["figures"]
    assert figures["planned"] == figures["finished"] == figures["mlflow_runs"] == 4
    assert (figures["lost"], figures["doubled"], figures["went_back"]) == (0, 0, 0)
    assert [row["event"] for row in drill["rows"]] == ["node killed", "node joins"]
    assert figures["data_loads_per_node"] == 1


def test_a_trial_goes_on_from_its_state_and_repeats_no_more_than_a_checkpoint_interval(drill):
    killed, _ = drill["rows"]
    assert killed["trials_hit"] == 1
    # what writing takes on a busy machine
    assert killed["seconds_lost"] < drill["figures"]["checkpoint_seconds"] + 2.0


@DRILLS
@pytest.mark.timeout(900)
def test_a_drained_node_a_stopped_or_killed_driver_and_a_lost_head_cost_no_trial():
    drill = call("drill_cluster", "--rounds", "1", "--trials", "12", "--steps", "2500", quick=False)
    figures = drill["figures"]
    assert figures["planned"] == figures["finished"] == figures["mlflow_runs"] == 12
    assert (figures["lost"], figures["doubled"], figures["went_back"]) == (0, 0, 0)
    events = {row["event"]: row for row in drill["rows"]}
    assert list(events) == [
        "node killed",
        "node joins",
        "node drained",
        "driver SIGTERM",
        "driver SIGKILL",
        "head killed",
    ]
    hits = [row["trials_hit"] for row in drill["rows"] if "trials_hit" in row]
    assert hits == [1, 1, 2, 2, 2]  # a node's trial, or both nodes'
    assert events["node drained"]["seconds_lost"] == 0.0  # by its notice it wrote its state before it left
    assert figures["seconds_lost_max"] < figures["checkpoint_seconds"] + 2.0


def test_a_study_that_is_shot_at_finishes_every_trial_once():
    figures = call("drill_faults")["figures"]
    assert figures["kills"] == 3, "the study ended before the shots"
    assert figures["planned"] == figures["finished"] == figures["nets"] == figures["mlflow_runs"]
    assert (figures["lost"], figures["doubled"]) == (0, 0)


@DRILLS
def test_empty_trials_go_through_tune_as_real_ones_do():
    figures = call("simulate_cluster", "--only", "tune", "--tune-trials", "120", quick=False)["figures"]
    assert 0 < figures["tune_ms_median_100"] < 200
    assert 100 < figures["tune_rss_mib_120"] < 3000
