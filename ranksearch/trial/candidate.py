"""`Candidate`: a trial to run, as the study hands it to a worker."""

from __future__ import annotations

from dataclasses import dataclass

from ranksearch.compress import RankPlan
from ranksearch.deploy.stopwatch import LatencySetting
from ranksearch.places.place import Place
from ranksearch.trial.recipe import Recipe


@dataclass(frozen=True)
class MetricSetting:
    """The metric that errors of layers are measured in, on how many batches, and how many projections pass until it is measured anew."""

    kind: str
    batches: int
    refresh: int


@dataclass(frozen=True)
class Candidate:
    """A trial to run: everything a worker needs besides the workbench."""

    number: int
    plan: RankPlan
    recipe: Recipe
    seed: int
    save_to: Place
    checkpoint: Place
    """Where the trial keeps its state while it runs; the same file for the same plan, recipe and seed."""
    rungs: tuple[float, ...] = ()
    """Shares of the steps after which it is scored for early stopping."""
    latency: LatencySetting | None = None
    """How the net is timed at the end; None: it is not."""
    metric: MetricSetting | None = None
    """The metric of the data in which layers are cut; None: that of the weights."""
    path: tuple[RankPlan, ...] = ()
    """The levels that a nested run trains, the smallest first; empty: the trial trains its plan alone."""
    drawn: int = 1
    """How many levels each of its steps trains."""
    weights: Place | None = None
    """The dense weights of a nested run that the trial starts from; None: the study's dense net."""
    shares: tuple[float, ...] = (1.0,)
    """Shares of those weights, the rest being the dense net's, of which the best mixture is started from."""
