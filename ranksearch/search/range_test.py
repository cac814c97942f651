"""Which optimizer and learning rate suit a net whose task does not say what it was trained with: found by a few short trials.

Every candidate trains the solver's plan half-way to the study's budgets for a share of a trial's steps, by the whole recipe otherwise,
and is scored on validation samples. The recipe's own default stays unless another is better by more than chance. All of it costs
about a trial.

Reference: Smith 2017, arXiv 1506.01186 (the learning-rate range test), here on trials in place of one rising rate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranksearch.search.allocated import Allocated
from ranksearch.search.budgets import lowest_level
from ranksearch.search.predicting import leading
from ranksearch.search.workbench import Workbench
from ranksearch.space.space import Space
from ranksearch.tasks.task import Task
from ranksearch.trial.attempt import attempt
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.metric import Metric
from ranksearch.trial.recipe import Recipe, middle
from ranksearch.trial.result import Status
from ranksearch.words import Log

CANDIDATES = (("sgd", 0.004), ("adamw", 0.002), ("adamw", 0.0005))
"""Optimizers and learning rates that are tried beside the recipe's own."""
SHARE, MOST_STEPS = 0.2, 100
"""Each trains for this share of a trial's steps, and for so many at most."""
LEAST_STEPS = 10
"""Where the share is less, a trial is too short to tell optimizers apart."""
SAMPLES = 1000
FROM_TRIALS = 8
"""A study of fewer trials is a first look, which does without."""


def is_open(space: Space, task: Task) -> bool:
    """Whether a study has to find its optimizer and learning rate: its task is the user's own, and neither task nor recipe names them."""
    named = space.recipe.model_fields_set & {"optimizer", "lr"}
    return space.kind().own is not None and not named and not task.trained_with and space.search.trials >= FROM_TRIALS


def with_recipe(space: Space, bench: Workbench, dense: float, log: Log) -> Workbench:
    """The workbench, its task saying what optimizer and learning rate suit its net, where the space leaves them open.

    Args:
        dense: the dense net's metric on the validation set.
    """
    steps = min(MOST_STEPS, int(SHARE * space.recipe.steps))
    if not is_open(space, bench.task) or steps < LEAST_STEPS:
        return bench
    settled = bench.settled(space)
    low = lowest_level(settled, bench.curves)
    form = Allocated(settled, bench.curves, bench.damage, bench.rivals)
    plan = form.plan(form.neutral(low + (1 - low) / 2))
    usual = replace(Recipe.settled(settled.recipe, middle), steps=steps)
    task = replace(bench.task.without_test(), val=bench.task.val.first(SAMPLES))
    metric, found = Metric.of(task, dense), {}
    with tempfile.TemporaryDirectory() as folder:
        for optimizer, lr in [(usual.optimizer, usual.lr), *CANDIDATES]:
            recipe = replace(usual, optimizer=optimizer, lr=lr)
            place = Path(folder) / f"{optimizer}-{lr:g}"
            candidate = Candidate(0, plan, recipe, space.search.seed, place, place.with_suffix(".pt"))
            result = attempt(task, bench.dense, bench.net, candidate, report=_silent, checkpoint_seconds=float("inf"))
            if result.status == Status.COMPLETE and result.val_accuracy is not None:
                found[optimizer, lr] = result.val_accuracy
    if not found:  # what fails here fails in trials, and is told there
        return bench
    best = _best(found, (usual.optimizer, usual.lr), metric, len(task.val))
    scores = ", ".join(f"{optimizer} at {lr:g} {metric.text(value)}" for (optimizer, lr), value in found.items())
    log(f"recipe: {best[0]} at learning rate {best[1]:g}, after {steps} steps of one plan with each: {scores}")
    return replace(bench, task=replace(bench.task, trained_with={"optimizer": best[0], "lr": best[1]}))


def _best(
    found: Mapping[tuple[str, float], float], usual: tuple[str, float], metric: Metric, samples: int
) -> tuple[str, float]:
    """The best; the usual one where the best is not better by more than chance."""
    return leading({name: metric.share(value) for name, value in found.items()}, usual, samples)


def _silent(entry: Any) -> None: ...
