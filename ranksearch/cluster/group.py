"""A data-parallel trial: Ray Train starts its workers, a GPU or some cores each, and their process group; Tune sees one trial.

The Tune trial itself takes nothing of the cluster: its workers have a placement group of their own. A worker that dies ends the group, and
the study runs the trial again from its state. If a trial is stopped or its Tune actor is lost, the driver removes the group.
"""

from __future__ import annotations

import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from ray.util.queue import Queue

from ranksearch.cluster.shared import Shared, take, with_peak
from ranksearch.cluster.worker import GROUP, Terms, candidate_of, message, settle_in, watched_leave
from ranksearch.data.parallel import Distributed
from ranksearch.trial.attempt import attempt
from ranksearch.trial.placement import Placement
from ranksearch.trial.result import Status, TrialResult

PATIENCE = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # Ray's 60 s may be too short for importing PyTorch on a busy machine
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often reports are fetched
}
COLLECTIVE_SECONDS = 1800
"""How long a worker waits for the others: only rank 0 evaluates, which may take a while."""
FAILED = "the trial failed on one of its workers: "


class TrialFailed(Exception):
    """The trial itself failed on one rank; the text holds its result as JSON. The others, which wait for that rank in vain, are ended."""


class Relay(UserCallback):
    """Hands the trial what its rank 0 reports to Train's controller.

    Ray's `TuneReportCallback` waits until Tune has taken each report, which is for ever if Tune has stopped the trial.
    """

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._reports.put(metrics[0])


def parallel_trial(config: dict[str, Any], shared: Shared, terms: Terms) -> None:
    """A trial of several workers, as Tune runs it.

    Raises:
        TrainingFailedError: a worker was lost; the trial should run again.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    resources = {"CPU": terms.cpus} | ({"GPU": terms.gpus} if terms.gpus else {})
    reports = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"trial": config, "shared": shared, "terms": terms},
        torch_config=TorchConfig(backend="nccl" if terms.gpus else "gloo", timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(num_workers=terms.workers, use_gpu=terms.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"{config['number']:03d}-{uuid.uuid4().hex[:8]}",  # Train would continue a run of the same name
            storage_path=os.path.join(terms.folder, "ray", "workers"),
            failure_config=FailureConfig(max_failures=0),  # the study does the retrying
            callbacks=[Relay(reports)],  # type: ignore[list-item]
        ),
    )

    def fit() -> None:
        try:
            trainer.fit()
        finally:
            reports.put(None)

    with ThreadPoolExecutor(1) as thread:
        fitted = thread.submit(fit)
        for report in iter(reports.get, None):
            tune.report(report)  # if the trial is stopped, Tune ends this thread here
    try:
        fitted.result()
    except TrainingFailedError as error:
        if (result := own_failure(error)) is None:
            raise
        tune.report(message(Placement(**result["placement"]), result=result))


def let_go(group: str) -> None:
    """Ends the workers of a data-parallel trial and frees what they hold, by the name that its reports gave; does nothing if they ended.

    Train's controller does so only if it ends by itself; its fallback asks the dashboard, which need not run.
    """
    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def own_failure(error: TrainingFailedError) -> dict[str, Any] | None:
    """The result of a trial that failed by its own fault on some rank; None if a worker was lost."""
    for failure in getattr(error, "worker_failures", {}).values():
        text = str(failure)
        if FAILED in text:
            found, _ = json.JSONDecoder().raw_decode(text[text.index(FAILED) + len(FAILED) :])
            return dict(found)
    return None


def _worker(config: dict[str, Any]) -> None:
    """Runs one of the workers. Every rank must make each of Train's reports, at which they meet; rank 0's counts."""
    shared, terms = config["shared"], config["terms"]
    group = Distributed()
    work, own = take(shared)
    settle_in(terms, work.task)
    placement = _placed(group, own)
    placed_by = get_current_placement_group()
    assert placed_by is not None
    ray.train.report(message(placement) | {GROUP: placed_by.id.hex()})
    with watched_leave() as watch:  # only rank 0, which writes the state, matters
        result = attempt(
            work.task, work.dense, work.net, candidate_of(config["trial"]), checkpoint_seconds=terms.checkpoint_seconds, group=group,
            report=lambda entry: ray.train.report(message(placement, entry)), leaving=watch.leaves,
        )  # fmt: skip
    if result.status in (Status.FAILED, Status.NO_SPACE, Status.NO_PLACE):
        raise TrialFailed(FAILED + json.dumps(_with(result, placement)))
    ray.train.report(message(with_peak(placement), result=result.to_dict()))


def _placed(group: Distributed, own: Placement) -> Placement:
    """The trial's placement: rank 0's, with those of all workers."""
    workers = group.all_gather(own.to_dict())
    return replace(own, workers=workers, data_loaded=any(w["data_loaded"] for w in workers))


def _with(result: TrialResult, placement: Placement) -> dict[str, Any]:
    return replace(result, placement=placement.to_dict()).to_dict()
