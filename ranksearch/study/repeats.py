"""Trains the nets that a verdict speaks of again with other seeds, once the trials are over, to see how far one number can be trusted.

Repeats run in the driver's own process, one after the other, under their trial's plan and recipe; their nets are scored and dropped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from math import isfinite

from torch import nn

from ranksearch.compress import RankPlan, load_net
from ranksearch.front.row import Row
from ranksearch.search.workbench import Workbench
from ranksearch.study.proposals import cut_in
from ranksearch.study.study import Study
from ranksearch.trial.attempt import attempt
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.recipe import Recipe
from ranksearch.trial.result import Status
from ranksearch.words import COST_RATIOS, Log, Note, unnoted

FOLDER = "repeats"
SEEDS_APART = 1_000_003
"""The distance between the seed of a trial and that of its next repeat."""


def that_matter(front: Sequence[Row], cost: str) -> list[Row]:
    """The rows of a front (the best first) that matter for the verdict: the net to ship, the next cheaper one, and the cheapest."""
    if not front:
        return []
    share = COST_RATIOS[cost]
    best = front[0]
    less = [row for row in front if (row[share] or 0.0) < (best[share] or 0.0)]
    by_cost = sorted(less, key=lambda row: row[share] or 0.0)
    chosen = {row.trial: row for row in (best, *by_cost[-1:], *by_cost[:1])}
    return list(chosen.values())


def repeat_front(
    study: Study, bench: Workbench, score: Callable[[nn.Module], float] | None, log: Log, note: Note = unnoted
) -> None:
    """Trains the nets that matter as often as `search.repeats` says; what was done before is not done again.

    Args:
        score: returns the metric of a net on the test set; None without a test set.
        note: is told which repeat is trained.
    """
    wanted = study.space.search.repeats
    if not wanted:
        return
    for row in that_matter(study.front, study.cost):
        for number in range(len(study.repeats(row.trial)), wanted):
            note("again with other seeds", f"trial {row.trial}, {number + 1} of {wanted}")
            found = _again(study, bench, row, number, score)
            study.note_repeat(row.trial, found)
            text = " and ".join(
                f"{split} {study.metric.text(value)}" for split, value in found.items() if value is not None
            )
            log(
                f"trial {row.trial} again with another seed ({number + 1} of {wanted}): {text or 'it did not end well'}"
            )


def _again(
    study: Study, bench: Workbench, row: Row, number: int, score: Callable[[nn.Module], float] | None
) -> dict[str, float | None]:
    """The metric by split; None if the trial failed, or there is no such split."""
    assert row.plan is not None
    assert row.recipe is not None
    assert row.seed is not None
    seed = row.seed + SEEDS_APART * (number + 1)
    folder = study.folder / FOLDER / f"{row.trial:03d}-{number}"
    candidate = Candidate(
        row.trial,
        RankPlan.from_dict(row.plan),
        Recipe.from_dict(row.recipe),
        seed,
        folder,
        folder.with_suffix(".pt"),
        metric=cut_in(study.space),
    )
    try:
        result = attempt(
            bench.task.without_test(), bench.dense, bench.net, candidate, report=lambda entry: None,
            checkpoint_seconds=study.space.resources.checkpoint_seconds,
        )  # fmt: skip
        well = result.status is Status.COMPLETE and result.val_accuracy is not None and isfinite(result.val_accuracy)
        test = score(load_net(folder, study.space.build)) if well and score is not None else None
        return {"validation": result.val_accuracy if well else None, "test": test}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        candidate.checkpoint.unlink(missing_ok=True)  # type: ignore[union-attr]
