"""A trial on a Ray worker: its threads and its share of a GPU, what it reads, what it reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import threadpoolctl
import torch
from ray import tune

from ranksearch.cluster import mps
from ranksearch.cluster.nodes import LeaveWatch
from ranksearch.cluster.shared import Shared, take, with_peak
from ranksearch.compress import RankPlan
from ranksearch.cores import THREAD_VARIABLES
from ranksearch.data.loaded import loader_processes
from ranksearch.deploy.stopwatch import LatencySetting
from ranksearch.places.place import place_at, text_of
from ranksearch.tasks.task import Task
from ranksearch.training.device import device_memory, limit_share
from ranksearch.trial.attempt import attempt
from ranksearch.trial.candidate import Candidate, MetricSetting
from ranksearch.trial.checkpoint import Leaving
from ranksearch.trial.placement import Placement
from ranksearch.trial.recipe import Recipe

METRIC, ENTRY, RESULT, PLACE = "val_accuracy", "entry", "result", "placement"
"""Keys of a report; all but the first are JSON texts, because Tune flattens nested metrics. An empty one is not part of this report."""
CANDIDATE = "candidate"
"""Key of the candidate in what Tune hands out, beside the trial's number."""
GROUP = "placement_group"
"""Key in the first report of a data-parallel trial: the placement group of its workers."""


@dataclass(frozen=True)
class Terms:
    """The terms of every trial of a study; cores and GPUs are those of one process."""

    cpus: int
    gpus: float
    workers: int
    checkpoint_seconds: float
    folder: str
    """The study's folder, absolute."""
    pipes: str | None = None
    """Where to look for the MPS that was started for the study on a node; None if none was."""


def packed(candidate: Candidate) -> dict[str, Any]:
    """A candidate as Tune hands it out: one text, because Tune copies and flattens what it is given, and keeps it to the end."""
    parts = {
        "plan": candidate.plan.to_dict(), "recipe": candidate.recipe.to_dict(), "seed": candidate.seed,
        "save_to": text_of(candidate.save_to), "checkpoint": text_of(candidate.checkpoint), "rungs": candidate.rungs,
        "latency": asdict(candidate.latency) if candidate.latency is not None else None,
        "metric": asdict(candidate.metric) if candidate.metric is not None else None,
        "path": [plan.to_dict() for plan in candidate.path], "drawn": candidate.drawn,
        "weights": text_of(candidate.weights) if candidate.weights is not None else None,
        "shares": candidate.shares,
    }  # fmt: skip
    return {"number": candidate.number, CANDIDATE: json.dumps(parts)}


def candidate_of(config: dict[str, Any]) -> Candidate:
    """Unpacks the candidate that `packed` packed."""
    parts = json.loads(config[CANDIDATE])
    return Candidate(
        config["number"], RankPlan.from_dict(parts["plan"]), Recipe.from_dict(parts["recipe"]), parts["seed"],
        place_at(parts["save_to"]), place_at(parts["checkpoint"]), rungs=tuple(parts["rungs"]),
        latency=LatencySetting(**parts["latency"]) if parts["latency"] is not None else None,
        metric=MetricSetting(**parts["metric"]) if parts.get("metric") is not None else None,
        path=tuple(RankPlan.from_dict(plan) for plan in parts["path"]), drawn=parts["drawn"],
        weights=place_at(parts["weights"]) if parts["weights"] is not None else None,
        shares=tuple(parts["shares"]),
    )  # fmt: skip


def message(
    placement: Placement, entry: dict[str, Any] | None = None, result: dict[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """A report as Tune takes it."""
    scored = (entry or result or {}).get(METRIC)
    return {
        METRIC: scored if scored is not None else 0.0,
        ENTRY: json.dumps(entry) if entry is not None else "",
        RESULT: json.dumps(result) if result is not None else "",
        PLACE: json.dumps(placement.to_dict()),
    }


def compute_threads(cpus: int, task: Task) -> int:
    """Threads that a process computes with: its cores, less those that the processes of its loaders keep busy; at least one."""
    return max(1, cpus - loader_processes(task))


def settle_in(terms: Terms, task: Task) -> None:
    """Keeps this process, and those that it starts, within its cores and its share of a GPU, side by side with others or in turns."""
    mps.use(terms.pipes if 0 < terms.gpus < 1 else None)
    threads = compute_threads(terms.cpus, task)
    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)  # BLAS and OpenMP, which were loaded before
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    limit_share(terms.gpus, device_memory())


def trial(config: dict[str, Any], shared: Shared, terms: Terms) -> None:
    """A trial in this process, as Tune runs it.

    Raises:
        Leaving: this node is going to be taken away. Tune then drops the worker; one that ends well would get the next trial.
    """
    with watched_leave() as watch:
        work, placement = take(shared)
        settle_in(terms, work.task)
        if placement.unpacked:
            tune.report(message(placement))  # at once, so that it is known what this process loaded even if it dies

        def report(entry: dict[str, Any]) -> None:
            # returns if the trial goes on; if not, Tune ends this thread here
            tune.report(message(placement, entry))

        result = attempt(
            work.task, work.dense, work.net, candidate_of(config), checkpoint_seconds=terms.checkpoint_seconds, report=report,
            leaving=watch.leaves,
        )  # fmt: skip
    tune.report(message(with_peak(placement), result=result.to_dict()))


@contextmanager
def watched_leave() -> Iterator[LeaveWatch]:
    """Asks while the block runs whether this process's node is going to be taken away.

    Raises:
        Leaving: it is known already that it will be.
    """
    watch = LeaveWatch()
    try:
        if watch.leaves():
            raise Leaving
        yield watch
    finally:
        watch.stop()
