"""Running a study's trials on Ray Tune. The study's journal is the truth; Tune only places trials and restarts them.

Tune's own snapshot can lag behind the study or run ahead of it, so nothing is ever restored from it: a resumed study starts a fresh
`Tuner` for what is left.
"""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ranksearch.cluster.connection import HEAD, HeadLost, head_is_gone, join
from ranksearch.cluster.pack import Packed, pack, unpack
from ranksearch.compress import Net, RankPlan
from ranksearch.compress.stopwatch import LatencySetting
from ranksearch.errors import StudyError
from ranksearch.search.metric import Metric
from ranksearch.search.proposals import Candidate
from ranksearch.search.recipe import Recipe
from ranksearch.search.run import Driver, Log, OnRow, attempt, stop_reason
from ranksearch.search.study import Study
from ranksearch.search.trial import RUNG, TrialResult
from ranksearch.search.workbench import Workbench
from ranksearch.tasks.dense import State

METRIC, ENTRY, RESULT = "val_accuracy", "entry", "result"
RESTARTS = 3
"""How often a Ray of our own that lost its head is started again before the study ends."""


def _trainable(
    config: dict[str, Any], packed: Packed, dense: State, net: Net, threads: int, checkpoint_seconds: float
) -> None:
    """A trial on a Ray worker; entries and the result travel as JSON texts, because Tune flattens nested metrics."""
    torch.set_num_threads(threads)
    task = unpack(packed)
    candidate = Candidate(
        config["number"], RankPlan.from_dict(config["plan"]), Recipe.from_dict(config["recipe"]), config["seed"],
        Path(config["save_to"]), Path(config["checkpoint"]), rungs=tuple(config["rungs"]),
        latency=LatencySetting(**config["latency"]) if config["latency"] is not None else None,
    )  # fmt: skip

    def report(entry: dict[str, Any]) -> None:
        # returns where the trial goes on; where it does not, Tune ends this thread here
        tune.report({METRIC: entry[METRIC], ENTRY: json.dumps(entry), RESULT: ""})

    result = attempt(task, dense, net, candidate, checkpoint_seconds=checkpoint_seconds, report=report)
    tune.report({METRIC: result.val_accuracy or 0.0, ENTRY: "", RESULT: json.dumps(result.to_dict())})


class AskTell(Searcher):
    """Tune's searcher over the study's own ask and tell. The study is on disk: there is nothing to save or restore here."""

    def __init__(self, study: Study, bench: Workbench, on_row: OnRow, log: Log) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._study, self._driver = study, Driver(study, bench, on_row, log)
        self._numbers: dict[str, int] = {}
        self._seeds: dict[str, int] = {}
        self._history: dict[str, list[dict[str, Any]]] = {}
        self._stopped: set[str] = set()
        self.error: BaseException | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error is not None or self._lost_head():
            return Searcher.FINISHED
        try:
            candidate = self._driver.ask()
        except Exception as error:
            self.error, candidate = error, None
        if candidate is None:
            # a running trial may still lose its worker and be proposed again, so the end comes only after the last one
            return None if self._study.running and self.error is None else Searcher.FINISHED
        self._numbers[trial_id], self._seeds[trial_id] = candidate.number, candidate.seed
        self._history[trial_id] = []
        return {
            "number": candidate.number, "plan": candidate.plan.to_dict(), "recipe": candidate.recipe.to_dict(),
            "seed": candidate.seed, "save_to": str(candidate.save_to.absolute()),
            "checkpoint": str(candidate.checkpoint.absolute()), "rungs": list(candidate.rungs), 
            "latency": asdict(candidate.latency) if candidate.latency is not None else None,
        }  # fmt: skip

    def _lost_head(self) -> bool:
        if head_is_gone():
            kept = f"{self._study.finished} finished trials are kept: `ranksearch resume {self._study.space.name}` goes on."
            self.error = self.error or HeadLost(f"Ray's own processes ({' or '.join(HEAD)}) died. {kept}")
        return isinstance(self.error, HeadLost)

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Takes up what a running trial reports; False where it is to be stopped."""
        if trial_id not in self._numbers or not result.get(ENTRY):
            return True
        entry = json.loads(result[ENTRY])
        self._history[trial_id].append(entry)
        if entry["phase"] != RUNG or self._study.goes_on(self._numbers[trial_id], entry["rung"], entry[METRIC]):
            return True
        self._stopped.add(trial_id)
        return False

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        seed, history = self._seeds.pop(trial_id), self._history.pop(trial_id)
        payload = (result or {}).get(RESULT)
        try:
            if trial_id in self._stopped:
                found = _stopped_result(seed, history, self._study.metric)
            elif payload:
                found = TrialResult(**json.loads(payload))
            elif self._lost_head() or self._study.retry(number):
                return
            else:
                losses = self._study.space.resources.worker_losses + 1
                found = TrialResult(
                    "failed", seed, 0.0, reason=f"its worker died {losses} times: out of memory, or killed"
                )
            self._driver.settle(number, found)
        except Exception as caught:  # Tune would log it and go on: kept, and raised once the running trials have ended
            self.error = self.error or caught

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for its own snapshot, which is never restored


class StopBehind(FIFOScheduler):
    """Tune's scheduler over the study's rungs: first come, first served, and a trial that falls behind is stopped."""

    def __init__(self, searcher: AskTell) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return TrialScheduler.CONTINUE if self._searcher.goes_on(trial.trial_id, result) else TrialScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Forget(tune.Callback):
    """Tune keeps every trial to the end; what one that was told returned is in the study's journal, and Tune lets go of it."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial.run_metadata.last_result.pop(RESULT, None)


def _stopped_result(seed: int, history: list[dict[str, Any]], metric: Metric) -> TrialResult:
    last = history[-1]
    return TrialResult(
        "stopped", seed, last["epochs"], reason=stop_reason(last, metric), history=history,
        val_accuracy=last["val_accuracy"], val_loss=last["val_loss"], seconds=last["seconds"],
    )  # fmt: skip


def run_on_ray(study: Study, bench: Workbench, on_row: OnRow, log: Log, *, address: str | None) -> None:
    """Runs what is left of the study, as many trials at once as the cluster's CPUs and GPUs hold.

    A trial whose worker dies is run again, from its state.

    Raises:
        StudyError: Ray does not start, too many trials fail, or the disk is full.
        UsageError: one trial asks for more than the cluster has.
        KeyboardInterrupt: Ctrl-C; what is finished is told.
    """
    for restarts_left in range(RESTARTS, -1, -1):
        if study.finished >= study.planned:
            return
        try:
            _run(study, bench, on_row, log, address=address)
            return
        except HeadLost as error:
            if address is not None or not restarts_left:
                raise
            again = study.requeue_interrupted()
            log(f"{error} Ray is started again; {again} trials go on from their states.")
            ray.shutdown()


def _run(study: Study, bench: Workbench, on_row: OnRow, log: Log, *, address: str | None) -> None:
    """One Tuner over what is left of the study."""
    cpus = study.space.resources.cpus_per_trial
    gpus, at_once = join(study.space.resources, address)
    searcher = AskTell(study, bench, on_row, log)
    trainable = tune.with_parameters(
        _trainable, packed=pack(bench.task, study.space.kind().own), dense=bench.dense, net=bench.net, threads=cpus,
        checkpoint_seconds=study.space.resources.checkpoint_seconds,
    )  # fmt: skip
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=StopBehind(searcher),
            num_samples=-1,  # the study says when it is done
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name="ray",
            callbacks=[Forget()],
            storage_path=str(study.folder.absolute()),
            verbose=0,
            # Tune counts one death of a reused actor twice, so the study does the retrying
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    interrupted = _fit(tuner)
    if searcher.error is not None:
        raise searcher.error
    if interrupted or study.running:
        raise KeyboardInterrupt  # what was cut off stays RUNNING in the journal
    if study.finished < study.planned and not study.exhausted:
        raise StudyError(
            f"Ray Tune ended after {study.finished} of {study.planned} trials: `ranksearch resume` goes on."
        )


def _fit(tuner: tune.Tuner) -> bool:
    """Runs the tuner; whether it was interrupted.

    Tune takes SIGINT for itself, returns as if all were well, and gives the signal back then alone.
    """
    before = signal.getsignal(signal.SIGINT)
    tuner.fit()
    interrupted = signal.getsignal(signal.SIGINT) is before
    if threading.current_thread() is not threading.main_thread():
        return False  # a thread that gets no signals
    signal.signal(signal.SIGINT, before)
    return interrupted
