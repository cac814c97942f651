"""Early stopping: the law of the rungs, and that a small net is not stopped for being less accurate than a large one."""

import json

import numpy as np
import pytest

import ranksearch
from ranksearch.study.stopping import Rungs, sorting_ranks


def test_ranks_of_nondominated_sorting_against_brute_force():
    points = np.random.default_rng(0).integers(0, 6, (40, 3)).astype(float)
    ranks = sorting_ranks(points)
    for i, p in enumerate(points):
        better = [j for j, q in enumerate(points) if (q <= p).all() and (q < p).any()]
        assert ranks[i] == (1 + max(ranks[j] for j in better) if better else 0)


def test_one_objective_is_asha():
    rungs = Rungs(1, 3)
    assert [rungs.goes_on(i, 0, [value]) for i, value in enumerate([0.5, 0.4])] == [True, True]  # too few to tell
    assert not rungs.goes_on(2, 0, [0.6])
    assert rungs.goes_on(3, 0, [0.1])
    assert not rungs.goes_on(4, 0, [0.2])  # second of five, of whom a third, one, goes on
    assert rungs.goes_on(5, 0, [0.15])  # second of six


def test_a_small_net_is_not_stopped_for_being_less_accurate():
    rungs = Rungs(1, 3)
    for i in range(9):
        rungs.record(i, 0, [0.05 + i / 100, 0.9 - i / 100])  # large and accurate, none better than another
    assert rungs.goes_on(9, 0, [0.40, 0.2])  # small: none betters it
    assert not rungs.goes_on(10, 0, [0.45, 0.21])  # worse than that one in both, and behind the first front
    assert Rungs(1, 3).goes_on(0, 0, [0.9, 0.9])


def test_rungs_are_apart():
    rungs = Rungs(2, 2)
    for i in range(4):
        rungs.record(i, 0, [0.1])
    assert rungs.goes_on(9, 1, [0.9])
    assert not rungs.goes_on(9, 0, [0.9])


@pytest.fixture
def settings(short_settings):
    stopping = "search.early_stopping={rungs: [0.25, 0.5], reduction: 3}"
    searched = "recipe.lr={low: 0.000001, high: 0.1, log: true, default: 0.03}"
    return [*short_settings, stopping, searched, "recipe.steps=24", "search.objectives=[accuracy]"]


def test_stopped_trials_are_neither_on_the_front_nor_complete_in_optunas_memory(tmp_path, digits_yaml, settings):
    from optuna.trial import TrialState

    study = ranksearch.search(digits_yaml, settings=[*settings, "search.trials=12"], runs=tmp_path, inline=True)
    stopped = [row for row in study.trials if row["status"] == "stopped"]
    assert study.finished == 12
    assert stopped, "nothing was stopped: the test tells nothing"
    for row in stopped:
        assert "fell behind at step" in row["reason"]
        assert [entry["phase"] for entry in row["history"]][-1] == "rung"
        assert row["history"][-1]["step"] in (6, 12)
        assert row["epochs"] < 24 * 64 / 1077
        assert not study.trial_folder(row["trial"]).exists()
    assert {row["trial"] for row in study.front}.isdisjoint(row["trial"] for row in stopped)
    states = {t.number: t.state for t in study._study.get_trials()}
    assert all(states[row["trial"]] == TrialState.PRUNED for row in stopped)
    assert all(t.values is None for t in study._study.get_trials() if t.state == TrialState.PRUNED)
    spared = sum(24 - row["history"][-1]["step"] for row in stopped) / (12 * 24)
    assert study.steps_saved == pytest.approx(spared)
    # opened again it knows its rungs
    again = type(study).open(study.folder)
    assert again._rungs._reached == study._rungs._reached
    assert again.counts == study.counts


def test_a_trial_that_is_not_stopped_trains_as_without_rungs(tmp_path, digits_yaml, short_settings):
    """Every phase scores the very same; which candidate is kept may differ, since a rung's net is one too."""

    def phases(name, *more):
        found = [*short_settings, "search.trials=1", "recipe.factor_share=0.5", *more]
        history = (
            ranksearch.search(digits_yaml, settings=found, name=name, runs=tmp_path, inline=True).trials[0].history
        )
        rungs = [entry["rung"] for entry in history if entry["phase"] == "rung"]
        return rungs, {e["phase"]: (e["val_loss"], e["val_accuracy"]) for e in history if e["phase"] != "rung"}

    none, plain = phases("plain")
    rungs, watched = phases("watched", "search.early_stopping={rungs: [0.2, 0.4, 0.8]}")
    assert (none, rungs) == ([], [0, 1, 2])
    assert {"decomposed", "factors"} <= watched.keys()
    assert watched == plain


def test_the_space_says_what_is_wrong_with_rungs(digits_yaml):
    from ranksearch.errors import UsageError
    from ranksearch.space.reading import read_space

    with pytest.raises(
        UsageError, match=r"search\.early_stopping\.rungs: expected rising shares between 0 and 1, got \[0\.5, 0\.2\]"
    ):
        read_space(digits_yaml, settings=["search.early_stopping.rungs=[0.5, 0.2]"])
    assert json.loads(
        read_space(digits_yaml, settings=["search.early_stopping={}"]).search.early_stopping.model_dump_json()
    )


def test_rungs_that_steps_cannot_tell_apart_are_refused(digits_yaml):
    from ranksearch.errors import UsageError
    from ranksearch.space.reading import read_space

    for rungs in ("[0.01, 0.5]", "[0.5, 0.52]"):
        with pytest.raises(UsageError, match=r"of 20 steps are the steps .*expected different ones from 1 on"):
            read_space(digits_yaml, settings=["recipe.steps=20", f"search.early_stopping.rungs={rungs}"])


def test_a_trial_that_is_run_again_stands_once_at_a_rung_and_macs_stand_in_for_latency(make, bench):
    study = make(trials=9, settings=["search.early_stopping={}", "search.objectives=[accuracy, latency]"])
    asked = [study.ask(bench) for _ in range(4)]  # the first points; what is retried comes after them
    assert study.goes_on(asked[0].number, 0, 50.0)
    assert study.retry(asked[0].number)
    again = study.ask(bench)
    assert again.plan == asked[0].plan
    assert study.goes_on(again.number, 0, 50.0)
    assert list(study._rungs._reached[0]) == [again.number]
    points = [study._rung_point(99 - 5 * i, type(study.dense)(700_000 // (i + 1), 1, 1)) for i in range(6)]
    assert all(
        study._rungs.goes_on(100 + i, 0, point) for i, point in enumerate(points)
    )  # ever smaller, ever less accurate
