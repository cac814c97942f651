"""Running a study's trials on Ray Tune. The study's journal is the truth; Tune only places trials and restarts them.

Tune's own snapshot can lag behind the study or run ahead of it, so nothing is ever restored from it: a resumed study starts a fresh
`Tuner` for what is left.
"""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ranksearch.cluster.connection import HEAD, HeadLost, head_is_gone, join, nodes
from ranksearch.cluster.group import parallel_trial
from ranksearch.cluster.packing import Machine, trials_at_once
from ranksearch.cluster.probe import auto_share
from ranksearch.cluster.room import Room
from ranksearch.cluster.shared import Shared, load_of, share
from ranksearch.cluster.worker import ENTRY, METRIC, PLACE, RESULT, Terms, trial
from ranksearch.errors import StudyError
from ranksearch.search.metric import Metric
from ranksearch.search.placement import LOADS, Load, Placement, note_load
from ranksearch.search.run import Driver, Log, OnRow, stop_reason
from ranksearch.search.space import AUTO, Space
from ranksearch.search.study import Study
from ranksearch.search.trial import RUNG, TrialResult
from ranksearch.search.workbench import Workbench
from ranksearch.tasks.folder import data_folder
from ranksearch.tasks.loaded import loader_processes
from ranksearch.tasks.stage import Staging
from ranksearch.tasks.task import Task

RESTARTS = 3
"""How often a Ray of our own that lost its head is started again before the study ends."""
NEXT_TO_NOTHING = tune.PlacementGroupFactory([{"memory": 1}])
"""What Tune keeps for a data-parallel trial, whose workers ask for cores and GPUs themselves; Tune takes no empty request."""


class AskTell(Searcher):
    """Tune's searcher over the study's own ask and tell. The study is on disk: there is nothing to save or restore here."""

    def __init__(self, study: Study, bench: Workbench, shared: Shared, room: Room, on_row: OnRow, log: Log) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._study, self._driver = study, Driver(study, bench, on_row, log)
        self._shared, self._room, self._log = shared, room, log
        self._places: dict[str, dict[str, Any]] = {}
        self._numbers: dict[str, int] = {}
        self._seeds: dict[str, int] = {}
        self._history: dict[str, list[dict[str, Any]]] = {}
        self._stopped: set[str] = set()
        self.error: BaseException | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error is not None or self._lost_head():
            return Searcher.FINISHED
        if len(self._numbers) >= self._room.at_once:
            return None
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
        if trial_id not in self._numbers:
            return True
        self._note_place(trial_id, result)
        if not result.get(ENTRY):
            return True
        entry = json.loads(result[ENTRY])
        self._history[trial_id].append(entry)
        if entry["phase"] != RUNG or self._study.goes_on(self._numbers[trial_id], entry["rung"], entry[METRIC]):
            return True
        self._stopped.add(trial_id)
        return False

    def _note_place(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keeps where a trial runs, and at its first report what its processes loaded; at its last, what it took."""
        place = json.loads(result[PLACE])
        if trial_id not in self._places:
            for worker in place["workers"] or [place]:
                if worker["unpacked"]:
                    load = load_of(self._shared, Placement(**worker), self._numbers[trial_id])
                    _note_load(self._study.folder, load, self._log)
        self._places[trial_id] = place
        if not place["workers"]:
            self._room.learn(place["peak_bytes"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        seed, history = self._seeds.pop(trial_id), self._history.pop(trial_id)
        place = self._places.pop(trial_id, None)
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
            self._driver.settle(number, replace(found, placement=place))
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
    resources = study.space.resources
    gpus, at_once = join(resources, address)
    shared, load = share(bench, study.space.kind().own, staging_of(study.space))
    _note_load(study.folder, load, log)
    machines = [Machine.of(node["Resources"]) for node in nodes()]
    if resources.gpus_per_trial == AUTO:
        gpus = auto_share(study, bench, shared, nodes(), log)
        at_once = trials_at_once(machines, cpus=resources.cpus_per_trial, gpus=gpus, workers=1)
    warn_of_loaders(bench.task, resources.cpus_per_trial, log)
    terms = Terms(
        resources.cpus_per_trial, gpus, resources.workers, resources.checkpoint_seconds, str(study.folder.absolute())
    )
    room = Room(machines, at_once, cpus=terms.cpus, gpus=gpus, log=log)
    searcher = AskTell(study, bench, shared, room, on_row, log)
    alone = terms.workers == 1
    trainable = tune.with_parameters(trial if alone else parallel_trial, shared=shared, terms=terms)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": terms.cpus, "gpu": gpus} if alone else NEXT_TO_NOTHING),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=StopBehind(searcher),
            num_samples=-1,  # the study says when it is done
            max_concurrent_trials=at_once,
            reuse_actors=alone,  # with the actor of a data-parallel trial its workers end
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name="ray",
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


def _note_load(folder: Path, load: Load, log: Log) -> None:
    """Adds a line to the study's record of loads; a disk without room for it must not end a study."""
    try:
        note_load(folder, load)
    except OSError as error:
        log(f"{folder / LOADS} cannot be written ({error.strerror}): a load of trial {load.trial} is not recorded")


def staging_of(space: Space) -> Staging | None:
    """Where the nodes copy the data folder to, if the space says so and its task reads files."""
    folder = space.resources.stage
    if folder is None or not space.kind().reads_files:
        return None
    return Staging(data_folder(space.data), Path(folder))


def warn_of_loaders(task: Task, cpus: int, log: Log) -> None:
    """Says where the processes that read a trial's data leave its training no core of its own."""
    loaders = loader_processes(task)
    if loaders >= cpus:
        log(
            f"resources: a trial has {cpus} CPUs for {loaders} processes that read its data and one that trains: more cpus_per_trial, or "
            f"fewer data_workers"
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
