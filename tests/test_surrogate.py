"""What picks the parameters to try next: its Gaussian process against scikit-learn's, and what it does with strange trials."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

from ranksearch.search import surrogate
from ranksearch.search.optuna_private import holds
from ranksearch.search.surrogate import BASIS, _Data, _Process, propose

SPACE = {"x": FloatDistribution(-1.0, 1.0), "y": FloatDistribution(-1.0, 1.0)}


@pytest.mark.parametrize(("length", "noise", "linear"), [(0.7, 0.05, 0.0), (1.5, 0.2, 1.0), (4.0, 1.0, 1.0)])
def test_the_process_is_the_one_of_scikit_learn(monkeypatch, length, noise, linear):
    for name, value in (("LENGTHS", length), ("NOISES", noise), ("LINEAR", linear)):
        monkeypatch.setattr(surrogate, name, (value,))
    rng = np.random.default_rng(0)
    x, wanted, above = rng.uniform(-1, 1, (12, 3)), rng.uniform(-1, 1, (5, 3)), rng.normal(size=12) / 50
    process = _Process(_Data(x, np.zeros(12), above))
    mean, deviation = process.expected(wanted, np.zeros(5))
    kernel = ConstantKernel(BASIS) + RBF(length)
    if linear:
        kernel += ConstantKernel(linear / 3) * DotProduct(sigma_0=0.0)
    alpha = noise / (1 + surrogate.LEAST_WEIGHT) + 1e-8
    reference = GaussianProcessRegressor(kernel, alpha=alpha, optimizer=None).fit(x, above)
    its_mean, its_deviation = reference.predict(wanted, return_std=True)
    np.testing.assert_allclose(mean, its_mean, atol=1e-8)
    np.testing.assert_allclose(deviation / deviation[0], its_deviation / its_deviation[0], rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 8), running=st.integers(0, 3))
def test_what_is_proposed_is_in_the_space(seed, count, running):
    space = {
        "rate": FloatDistribution(1e-4, 1.0, log=True), "step": FloatDistribution(0.0, 1.0, step=0.25), "one": FloatDistribution(2.0, 2.0),
        "period": IntDistribution(1, 100, log=True), "even": IntDistribution(0, 10, step=2),
        "kind": CategoricalDistribution([None, True, "a"]),
    }  # fmt: skip
    rng = np.random.default_rng(seed)

    def drawn():
        return {
            "rate": 10 ** rng.uniform(-4, 0), "step": 0.25 * rng.integers(5), "one": 2.0, "period": int(rng.integers(1, 101)),
            "even": 2 * int(rng.integers(6)), "kind": [None, True, "a"][rng.integers(3)],
        }  # fmt: skip

    known, beside = [drawn() for _ in range(count)], [(drawn(), 0.1) for _ in range(running)]
    found = propose(known, rng.normal(size=count), rng.random(count), beside, space, rng)
    assert found.keys() == space.keys()
    assert all(holds(space[name], value) for name, value in found.items())


def late(accuracy, draws=30):
    """The parameters of the second half of a search by `accuracy` alone."""
    known, values, rng = [], [], np.random.default_rng(0)
    for _ in range(draws):
        known.append(propose(known, np.zeros(len(known)), np.array(values), [], SPACE, rng))
        values.append(accuracy(known[-1]["x"], known[-1]["y"]))
    return np.array([[p["x"], p["y"]] for p in known[draws // 2 :]])


def test_a_search_ends_near_the_best():
    found = late(lambda x, y: 0.9 - 0.1 * (x - 0.6) ** 2 - 0.1 * (y + 0.4) ** 2)
    np.testing.assert_allclose(np.median(found, axis=0), [0.6, -0.4], atol=0.15)


def test_what_diverges_is_avoided_and_hides_nothing():
    found = late(lambda x, y: 0.01 if x > 0.8 else 0.9 - 0.01 * (x - 0.5) ** 2 - 0.01 * (y + 0.4) ** 2)
    assert np.mean(found[:, 0] > 0.8) < 0.1
    assert abs(np.median(found[:, 1]) + 0.4) < 0.3


def test_nothing_is_to_be_learnt_beside_trials_that_run():
    known = [{"x": x, "y": y} for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)]
    accuracy = np.array([0.8 + 0.01 * p["x"] for p in known])
    space, beside = {"x": SPACE["x"]}, [({"x": 0.9}, 0.0)] * 4
    encoded = np.array([[p["x"]] for p in known])
    process = _Process(_Data(encoded, np.zeros(9), accuracy - accuracy.mean()))
    near = np.array([[0.9]]), np.zeros(1)
    assert (
        process.with_more(*(np.array(v) for v in ([[0.9]] * 4, [0.0] * 4))).expected(*near)[1]
        < process.expected(*near)[1]
    )
    assert -1 <= propose(known, np.zeros(9), accuracy, beside, space, np.random.default_rng(0))["x"] <= 1


def test_other_levels_count_less_and_a_parabola_in_them_is_taken_out():
    offsets = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    above = surrogate._above(offsets, 0.5 + 0.3 * offsets - 0.1 * offsets**2)
    np.testing.assert_allclose(above, 0, atol=1e-9)
    weights = surrogate._weights(offsets)
    assert weights[2] > weights[1] > weights[0]


def test_what_comes_to_nothing_is_followed_from_farther_afield():
    known, accuracy = (
        [{"x": 0.1 * i, "y": 0.0} for i in range(-3, 4)],
        np.array([0.9 - (0.1 * i) ** 2 for i in range(-3, 4)]),
    )

    def spread(in_vain):
        drawn = [
            propose(known, np.zeros(7), accuracy, [], SPACE, np.random.default_rng(seed), in_vain) for seed in range(30)
        ]
        return np.std([params["x"] for params in drawn])

    assert spread(0) < 0.3 < spread(8)
    assert spread(200) > 0.5
