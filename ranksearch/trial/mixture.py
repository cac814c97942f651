"""Mixtures of a nested run's weights with the dense net's: the one that a plan is cut from.

A run's weights serve small plans; by them large ones lose what the dense net knew. On the straight line between a net and what it was
trained on to, a net is often better than at either end: at which share of the way depends on the plan's size.

Reference: Wortsman et al. 2022, arXiv 2109.01903 (WiSE-FT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from ranksearch.training.dense import State
from ranksearch.training.evaluate import Evaluation

SHARES = (1.0, 0.5, 0.0)
"""Shares of the run's weights, tried in this order as long as the score rises; the rest is the dense net's."""


def shares_tried(*, mix: bool) -> tuple[float, ...]:
    """`SHARES`, or without mixtures the run's weights alone."""
    return SHARES if mix else SHARES[:1]


class Cutting(NamedTuple):
    """A net that was cut from a mixture, and its score on the validation set."""

    net: nn.Module
    score: Evaluation
    run_share: float


def mixture(trained: State, dense: State, share: float) -> State:
    """share · trained + (1 − share) · dense; what is no floating point is the trained net's."""
    if share == 1:
        return trained
    return {
        name: dense[name].to(tensor).lerp(tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }


def best_cut(
    cut: Callable[[State], nn.Module],
    score: Callable[[nn.Module], Evaluation],
    trained: State,
    dense: State,
    direction: str,
    shares: Sequence[float] = SHARES,
) -> Cutting:
    """The net that scores best, of mixtures that are tried one after the other until one is no better than the one before.

    Args:
        cut: makes a net from dense weights.
        direction: that of the task's metric.
        shares: of the trained weights, falling.
    """
    best: Cutting | None = None
    for share in shares:
        net = cut(mixture(trained, dense, share))
        found = Cutting(net, score(net), share)
        if best is not None and not found.score.is_above(best.score, direction):
            break
        best = found
    assert best is not None
    return best
