"""Which parameters to try next at a level: candidates from about the best nets so far, and a Gaussian process that picks among them.

Candidates are drawn as TPE draws them, from a Parzen estimator of the best trials. TPE would rank them by the ratio of two densities, of
good trials and bad ones, which knows little from a dozen trials; here a Gaussian process ranks them by what it expects and a share of how
unsure it is. What is modelled is how far a net lies above a parabola in the level through all of them; nets at other levels count the less
the farther off they are. The kernel's settings are not chosen but averaged over by their evidence, so that little data does not mislead.

What it is worth against TPE's ratio stands in `README.md` (`scripts/bench_search.py`, row `allocated_tpe`).

Reference: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, 2.7 (a basis of known functions), 5.4.1 (evidence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.linalg import solve_triangular

LENGTHS, NOISES, LINEAR = (0.7, 1.5, 4.0), (0.05, 0.2, 1.0), (0.0, 1.0)
"""Settings that are averaged over: the kernel's length (a parameter's range is 2), the noise's variance and that of a linear part, both in
multiples of the kernel's."""
ACROSS, NEAR = 1.0, 0.5
"""In logarithms of the level: over how much a correction's effect changes, and the width of the neighbourhood that counts most."""
LEAST_WEIGHT = 0.01
BASIS = 100.0
"""Variance of the parabola's coefficients, in multiples of the kernel's: what they are is left to the data."""
CANDIDATES, GOOD = 64, 0.25
"""Parameters that are drawn, about the best share of the trials."""
MOVED, STEPS = 0.5, (0.3, 0.8)
"""Chance of a parameter to be drawn anew, and the widths of the draw: a small and a large one (a parameter's range is 2)."""
WIDENED = 4
"""After so many proposals that came to nothing the widths are doubled."""
HOPE = 0.5
"""How many standard deviations of what is expected are hoped for."""
WORST = 3.0
"""A net that is farther below the median than so many times the best is above it (it diverged) counts as just so far below."""
UNLIKELY = 5.0
"""A setting whose logarithm of the evidence is so far behind the best is left out."""

Params = Mapping[str, Any]


def propose(
    known: Sequence[Params],
    offsets: np.ndarray,
    accuracy: np.ndarray,
    running: Sequence[tuple[Params, float]],
    space: Mapping[str, BaseDistribution],
    rng: np.random.Generator,
    in_vain: int = 0,
) -> dict[str, Any]:
    """Values of `space` to try next.

    Args:
        known: parameters of n trials, all of `space` among them.
        offsets: [n] logarithms of their levels over the one that is asked for; 0 where nothing has a level.
        accuracy: [n] shares.
        running: parameters and offsets of trials that run: there is nothing to be learnt beside them.
        in_vain: how many proposals in a row came to nothing, mostly because they led to plans that were there before: each halves the
            candidates and widens the steps, up to a draw from anywhere.
    """
    wider = 1 + in_vain / WIDENED
    if not known:
        return _drawn(space, [_middle(space)], wider, rng)
    encoded = np.array([_encoded(p, space) for p in known])
    process = _Process(_Data(encoded, offsets, _above(offsets, accuracy)))
    if running:
        process = process.with_more(
            np.array([_encoded(p, space) for p, _ in running]), np.array([o for _, o in running])
        )
    expected = process.expected(encoded, np.zeros(len(known)))[0]
    good = [known[i] for i in np.argsort(-expected, kind="stable")[: max(2, round(GOOD * len(known)))]]
    candidates = [_drawn(space, good, wider, rng) for _ in range(max(1, CANDIDATES >> in_vain))]
    mean, deviation = process.expected(np.array([_encoded(p, space) for p in candidates]), np.zeros(len(candidates)))
    return candidates[int(np.argmax(mean + HOPE * deviation))]


# Parameters as numbers -----------------------------------------------------------------------------------------------


def _encoded(params: Params, space: Mapping[str, BaseDistribution]) -> list[float]:
    """A number in [-1, 1] per number, one of 0 and 1 per choice."""
    row: list[float] = []
    for name, found in space.items():
        if isinstance(found, CategoricalDistribution):
            row += [float(params[name] == choice) for choice in found.choices]
        else:
            row.append(_unit(found, params[name]))
    return row


def _unit(found: BaseDistribution, value: float) -> float:
    assert isinstance(found, FloatDistribution | IntDistribution)
    low, high = float(found.low), float(found.high)
    if high <= low:
        return 0.0
    if found.log:
        low, high, value = log(low), log(high), log(value)
    return 2 * (value - low) / (high - low) - 1


def _value(found: BaseDistribution, unit: float) -> float | int:
    assert isinstance(found, FloatDistribution | IntDistribution)
    low, high, share = float(found.low), float(found.high), (min(1.0, max(-1.0, unit)) + 1) / 2
    value = low * exp(share * log(high / low)) if found.log else low + share * (high - low)
    if found.step:
        value = low + found.step * round((value - low) / found.step)
    value = min(high, max(low, value))
    return round(value) if isinstance(found, IntDistribution) else value


def _middle(space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    return {n: f.choices[0] if isinstance(f, CategoricalDistribution) else _value(f, 0.0) for n, f in space.items()}


def _drawn(
    space: Mapping[str, BaseDistribution], good: Sequence[Params], wider: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Parameters about one of the good trials, one of them moved at least."""
    about, step = good[int(rng.integers(len(good)))], wider * float(rng.choice(STEPS))
    params = {name: about[name] for name in space}
    moved = [name for name in space if rng.random() < MOVED] or [list(space)[int(rng.integers(len(space)))]]
    for name in moved:
        found = space[name]
        if not isinstance(found, CategoricalDistribution):
            params[name] = _value(found, _unit(found, params[name]) + step * rng.normal())
        elif rng.random() < step / 2:
            params[name] = found.choices[rng.integers(len(found.choices))]
    return params


# The Gaussian process ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """What is known: parameters [n, d], offsets [n], how far above the parabola [n]."""

    x: np.ndarray
    offsets: np.ndarray
    above: np.ndarray


@dataclass(frozen=True)
class _Pairs:
    """What the kernel is made of, between n points and m: the same for all of its settings."""

    squared: np.ndarray
    """[n, m] squared distances of the parameters."""
    products: np.ndarray
    """[n, m] mean products of the parameters."""
    near: np.ndarray
    """[n, m] how much the levels have to do with each other."""
    basis: np.ndarray
    """[n, m] the parabola's part."""

    @classmethod
    def of(cls, x: np.ndarray, offsets: np.ndarray, y: np.ndarray, others: np.ndarray) -> _Pairs:
        """Those of points at (x [n, d], offsets [n]) and (y [m, d], others [m])."""
        products = x @ y.T
        squared = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * products
        near = np.exp(-0.5 * ((offsets[:, None] - others) / ACROSS) ** 2)
        return cls(squared, products / x.shape[1], near, BASIS * _basis(offsets) @ _basis(others).T)

    def covariance(self, length: float, linear: float) -> np.ndarray:
        """[n, m], in multiples of the kernel's variance."""
        return (np.exp(-0.5 * self.squared / length**2) + linear * self.products) * self.near + self.basis


def _basis(offsets: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(offsets), offsets, offsets**2], axis=1)


@dataclass(frozen=True)
class _Model:
    """A Gaussian process under one setting of its kernel."""

    length: float
    linear: float
    root: np.ndarray
    """Cholesky factor of the covariance [n, n], in multiples of `scale`."""
    solved: np.ndarray
    """[n] the root's inverse times what is known."""
    scale: float
    evidence: float
    """Logarithm of the likelihood, up to what all settings share."""

    def expected(self, cross: _Pairs, own: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance [m] at m points, whose mean squares and squared basis are `own` and `basis` [m]."""
        solved = solve_triangular(self.root, cross.covariance(self.length, self.linear), lower=True)
        variance = 1 + self.linear * own + BASIS * basis - np.square(solved).sum(axis=0)
        return solved.T @ self.solved, self.scale * np.maximum(variance, 1e-9)


def _weights(offsets: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * (offsets / max(NEAR, float(np.std(offsets)))) ** 2) + LEAST_WEIGHT


def above_parabola(x: np.ndarray, accuracy: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How far accuracies [n] lie above a parabola in x [n] through them, or a line or a mean where they are few; residuals are weighted."""
    degree = max(0, min(2, len(np.unique(x)) - 1, len(x) - 2))
    fitted = np.polynomial.polynomial.polyfit(x, accuracy, degree, w=weight)
    return accuracy - np.polynomial.polynomial.polyval(x, fitted)


def _above(offsets: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """How far accuracies lie above a parabola in the offset, nets that failed not too far below."""
    above = above_parabola(offsets, accuracy, np.sqrt(_weights(offsets)))
    middle = float(np.median(above))
    return np.maximum(above, middle - WORST * (float(above.max()) - middle))


class _Process:
    """Gaussian processes over what is known, under every setting of the kernel that the data do not speak against."""

    def __init__(self, data: _Data) -> None:
        self._data = data
        pairs, noise = _Pairs.of(data.x, data.offsets, data.x, data.offsets), 1 / _weights(data.offsets)
        freedom = max(1, len(data.above) - 3) + 1
        least = 1e-4 + 1e-2 * float(np.var(data.above))
        found = []
        for length, linear in product(LENGTHS, LINEAR):
            covariance = pairs.covariance(length, linear)
            for share in NOISES:
                root = np.linalg.cholesky(covariance + np.diag(share * noise + 1e-8))
                solved = solve_triangular(root, data.above, lower=True)
                scale = (float(solved @ solved) + least) / freedom
                evidence = -0.5 * freedom * log(scale) - float(np.log(np.diag(root)).sum())
                found.append(_Model(length, linear, root, solved, scale, evidence))
        best = max(model.evidence for model in found)
        self._models = [model for model in found if model.evidence > best - UNLIKELY]
        self._weights = np.exp([model.evidence - best for model in self._models])

    def expected(self, x: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [m] at parameters [m, d] and offsets [m], averaged over the settings by their evidence."""
        cross = _Pairs.of(self._data.x, self._data.offsets, x, offsets)
        own, basis = np.square(x).mean(axis=1), np.square(_basis(offsets)).sum(axis=1)
        means, variances = np.stack([model.expected(cross, own, basis) for model in self._models], axis=1)
        mean = np.average(means, axis=0, weights=self._weights)
        return mean, np.sqrt(np.average(variances + (means - mean) ** 2, axis=0, weights=self._weights))

    def with_more(self, x: np.ndarray, offsets: np.ndarray) -> _Process:
        """As if what is expected at more parameters [m, d] and offsets [m] had been found there."""
        data, above = self._data, self.expected(x, offsets)[0]
        return _Process(_Data(np.vstack([data.x, x]), np.append(data.offsets, offsets), np.append(data.above, above)))
