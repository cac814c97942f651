"""The sampler around an allocation: where it proposes, what it learns from, that it repeats itself and stays quick."""

import time

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from ranksearch.search.local_tpe import LocalTPE, _cost_of_level, _residuals
from ranksearch.search.parametrize import LEVEL
from ranksearch.search.seen import nearest, staircase

SPACE = {
    LEVEL: FloatDistribution(0.2, 1.0),
    "good": FloatDistribution(-1.0, 1.0),
    "kind": CategoricalDistribution(["any", "im2col"]),
}


def make(seed=0, space=SPACE, directions=("maximize", "minimize")):
    costs = 1 if len(directions) > 1 else None
    sampler = LocalTPE(space, accuracy_at=0, cost_at=costs, share=lambda percent: percent / 100, dense=98.0, seed=seed)
    return optuna.create_study(directions=directions, sampler=sampler)


def told(study, level, accuracy, good=0.0, state=TrialState.COMPLETE):
    """Adds a trial that had this level, and that cost half of it."""
    values = [accuracy, level / 2] if state == TrialState.COMPLETE else None
    params = {LEVEL: level, "good": good, "kind": "any"}
    study.add_trial(create_trial(state=state, values=values, params=params, distributions=SPACE))


def drawn(study):
    return study.ask(SPACE).params


def test_the_level_falls_into_the_gap_with_most_room():
    study = make()
    for level, accuracy in ((0.2, 20.0), (0.4, 90.0), (0.7, 95.0), (1.0, 97.0)):
        told(study, level, accuracy)
    assert 0.2 < drawn(study)[LEVEL] < 0.4  # .1 of cost times 70 points; the next one is .15 times 5


def test_a_gap_that_was_tried_in_vain_loses_its_attraction():
    study = make()
    for level, accuracy in ((0.2, 20.0), (0.4, 60.0), (1.0, 97.0)):
        told(study, level, accuracy)
    assert 0.4 < drawn(study)[LEVEL] < 1.0
    for state in (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL):
        told(study, 0.65, 59.0, state=state)  # dominated, failed, stopped
    assert 0.2 < drawn(study)[LEVEL] < 0.4


def test_running_trials_count_as_tries_so_that_workers_do_not_crowd():
    study = make()
    for level, accuracy in ((0.2, 20.0), (0.4, 80.0), (0.6, 90.0), (0.8, 94.0), (1.0, 97.0)):
        told(study, level, accuracy)
    levels = [drawn(study)[LEVEL] for _ in range(8)]
    assert sum(level < 0.4 for level in levels) >= 2
    assert any(level > 0.4 for level in levels)


def test_a_front_without_gaps_is_bettered_at_the_budget_itself():
    study = make()
    for level in np.linspace(0.2, 1.0, 60):
        told(study, float(level), 80 + 2 * float(np.sin(40 * level)) + 10 * float(level))
    seen = {round(drawn(study)[LEVEL], 6) for _ in range(6)}
    assert 1.0 in seen


def test_corrections_move_to_where_nets_are_better_than_their_neighbours():
    def mean_of_late_draws(slope):
        means = []
        for seed in range(3):
            study, rng = make(seed), np.random.default_rng(seed)
            for _ in range(40):
                trial = study.ask(SPACE)
                level, good = trial.params[LEVEL], trial.params["good"]
                study.tell(trial, [60 + 30 * level + slope * good + rng.normal() / 10, level / 2])
            means.append(np.mean([t.params["good"] for t in study.trials[20:]]))
        return np.mean(means)

    assert mean_of_late_draws(5.0) > 0.25
    assert mean_of_late_draws(-5.0) < -0.25


def test_one_objective_is_searched_without_a_level():
    space = {"x": FloatDistribution(-2, 2)}
    study = make(space=space, directions=["maximize"])
    for _ in range(40):
        trial = study.ask(space)
        study.tell(trial, 90 - (trial.params["x"] - 1) ** 2)
    assert abs(np.median([t.params["x"] for t in study.trials[20:]]) - 1) < 0.5


def test_draws_depend_on_seed_number_and_what_was_told_alone():
    def plans(seed):
        study = make(seed)
        for i in range(12):
            trial = study.ask(SPACE)
            study.tell(trial, [50 + 40 * trial.params[LEVEL] + i % 3, trial.params[LEVEL] / 2])
        return [t.params for t in study.trials]

    assert plans(1) == plans(1)
    assert plans(1) != plans(2)
    # a sampler made anew, as at a resume, goes on as the old one would have
    study = make(3)
    for level, accuracy in ((0.2, 20.0), (0.5, 60.0), (1.0, 97.0)):
        told(study, level, accuracy)
    again = make(3)
    again.add_trials(study.trials)
    assert drawn(study) == drawn(again)


def test_of_equally_near_trials_the_newest_are_learnt_from():
    table = np.array([[1.0, 0.5, 0.9]] * 40 + [[0.5, 0.2, 0.8]] * 10 + [[1.0, 0.5, np.nan]])
    assert sorted(nearest(table, 1.0)) == list(range(10, 40))
    assert sorted(nearest(table, 0.5)) == [*range(20, 40), *range(40, 50)]


def test_the_time_of_a_draw_does_not_grow_with_the_study():
    def seconds(count):
        study, rng = make(), np.random.default_rng(0)
        study.add_trials([
            create_trial(
                values=[50 + 40 * level + rng.normal(), level / 2],
                params={LEVEL: level, "good": 0.0, "kind": "any"},
                distributions=SPACE,
            )
            for level in rng.uniform(0.2, 1, count)
        ])  # fmt: skip
        drawn(study)  # takes up what is there
        started = time.perf_counter()
        for _ in range(10):
            drawn(study)
        return time.perf_counter() - started

    assert seconds(4000) < 3 * seconds(200)


def test_plans_that_were_given_are_part_of_the_front_and_not_of_the_model():
    study = make()
    study.add_trial(create_trial(values=[96.0, 0.1], params={}, distributions={}))  # better than all
    for level, accuracy in ((0.2, 20.0), (0.6, 80.0), (1.0, 97.0)):
        told(study, level, accuracy)
    assert drawn(study)[LEVEL] > 0.2  # nothing is to be gained below .96 but at the top
    assert set(drawn(study)) == set(SPACE)


def test_staircase_is_the_front_by_rising_cost():
    points = np.array([[0.5, 0.9], [0.1, 0.3], [0.3, 0.2], [0.3, 0.6], [0.7, 0.9], [0.1, 0.2]])
    assert staircase(points).tolist() == [[0.1, 0.3], [0.3, 0.6], [0.5, 0.9]]


def test_costs_beyond_those_seen_are_proportional():
    levels, costs = _cost_of_level(np.array([[0.5, 0.2]]), 0.25, 1.0)
    assert levels.tolist() == [0.25, 0.5, 1.0]
    assert costs.tolist() == pytest.approx([0.1, 0.2, 0.4])


def test_residuals_take_out_what_the_level_explains():
    levels = np.linspace(0.2, 1, 20)
    table = np.stack([levels, levels, 0.5 + 0.2 * np.log(levels)], axis=1)
    assert np.abs(_residuals(table, 0.5)).max() < 1e-9
    better = [0.5, 0.5, 0.5 + 0.2 * np.log(0.5) + 0.05]
    assert _residuals(np.vstack([table, better]), 0.5).argmax() == 20
