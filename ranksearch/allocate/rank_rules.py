"""Rules that read a rank off a spectrum, without data and without a budget. Values only."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar


def stable_rank(squared: np.ndarray) -> float:
    """||W||²_F / ||W||²_2 = sum sigma² / sigma_1², between 1 and the rank; 0 for a zero matrix.

    Args:
        squared: squared singular values [k], descending.
    Reference: Rudelson & Vershynin 2007; as a rule for ranks: Cuttlefish, Wang et al. 2023, arXiv 2305.02538.
    """
    return float(squared.sum() / squared[0]) if squared[0] > 0 else 0.0


def evbmf_rank(squared: np.ndarray, shape: tuple[int, int]) -> int:
    """The number of components that variational Bayes takes for signal: low rank plus Gaussian noise of unknown variance.

    It has a closed form, except for the noise variance, which is searched along a line.

    Args:
        squared: squared singular values [min(n, m)], descending.
        shape: (n, m) of the matrix.
    Reference: Nakajima, Sugiyama, Babacan & Tomioka 2013, "Global analytic solution of fully-observed variational Bayesian matrix
        factorization", JMLR 14; as a rule for the ranks of convs: Kim et al. 2016, arXiv 1511.06530.
    """
    rows, columns = sorted(shape)
    if rows < 2 or squared[0] <= 0:
        return int(squared[0] > 0)
    squared = np.maximum(squared[:rows] / squared[0], 1e-12)
    alpha = rows / columns
    tau = 2.5129 * np.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)  # components whose sigma² / (m · variance) is above are kept

    def free_energy(variance: float) -> float:
        x = squared / (columns * variance)
        noise, signal = x[x <= edge], x[x > edge]
        t = (signal - (1 + alpha) + np.sqrt((signal - (1 + alpha)) ** 2 - 4 * alpha)) / 2
        fitted = signal - t + np.log((t + 1) / signal) + alpha * np.log(t / alpha + 1)
        return float((noise - np.log(noise)).sum() + fitted.sum())

    most = min(int(np.ceil(rows / (1 + alpha))) - 1, rows - 1)  # the noise needs this many components to be told
    tail = squared[most:]
    low = max(float(tail[0]) / (columns * edge), float(tail.mean()) / columns)
    high = float(squared.sum()) / (rows * columns)
    found = minimize_scalar(
        free_energy, bounds=(low, max(high, low * (1 + 1e-9))), method="bounded", options={"xatol": low * 1e-6}
    )
    return int((squared > columns * found.x * edge).sum())
