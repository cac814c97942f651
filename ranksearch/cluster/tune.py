"""Running a study's trials on Ray Tune. The study's journal is the truth; Tune only places trials and restarts them.

Tune's own snapshot can lag behind the study or run ahead of it, so nothing is ever restored from it: a resumed study starts a fresh
`Tuner` for what is left.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ranksearch.cluster.connection import HEAD, HeadLost, head_is_gone, join
from ranksearch.cluster.ending import ended_with_group
from ranksearch.cluster.group import let_go, parallel_trial
from ranksearch.cluster.head import HeadWatch, watched_head
from ranksearch.cluster.losses import Losses
from ranksearch.cluster.nodes import usable_nodes
from ranksearch.cluster.probe import auto_share
from ranksearch.cluster.ray_private import quiet_tune
from ranksearch.cluster.room import Room
from ranksearch.cluster.shared import Shared, load_of, share
from ranksearch.cluster.sharing import shared_gpus
from ranksearch.cluster.worker import ENTRY, GROUP, METRIC, PLACE, RESULT, Terms, packed, trial
from ranksearch.errors import StudyError, Terminated
from ranksearch.search.workbench import Workbench
from ranksearch.space.space import AUTO, Space
from ranksearch.study.driver import Driver, Log, OnRow, stop_reason
from ranksearch.study.study import NODE_LOSSES, Study
from ranksearch.tasks.folder import data_folder
from ranksearch.tasks.loaded import loader_processes
from ranksearch.tasks.stage import Staging
from ranksearch.tasks.task import Task
from ranksearch.trial.metric import Metric
from ranksearch.trial.placement import LOADS, Load, Placement, note_load
from ranksearch.trial.result import Status, TrialResult
from ranksearch.trial.session import RUNG

RESTARTS = 3
"""How often a Ray of our own that lost its head is started again before the study ends."""
KEPT = 50
"""Trials that Tune's list may hold before those that ended leave it; those under way stay, however many."""
NEXT_TO_NOTHING = tune.PlacementGroupFactory([{"memory": 1}])
"""What Tune keeps for a data-parallel trial, whose workers ask for cores and GPUs themselves; Tune takes no empty request."""


class AskTell(Searcher):
    """Tune's searcher over the study's own ask and tell. The study is on disk: there is nothing to save or restore here."""

    def __init__(
        self, study: Study, bench: Workbench, on_row: OnRow, log: Log, *, shared: Shared, room: Room, head: HeadWatch | None
    ) -> None:  # fmt: skip
        super().__init__(metric=METRIC, mode="max")
        self._study, self._driver = study, Driver(study, bench, on_row, log)
        self._shared, self._room, self._head, self._log = shared, room, head, log
        self.losses = Losses(log)
        self.interrupted: Callable[[], bool] = lambda: False
        self._places: dict[str, dict[str, Any]] = {}
        self._groups: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._seeds: dict[str, int] = {}
        self._history: dict[str, list[dict[str, Any]]] = {}
        self._stopped: set[str] = set()
        self.error: BaseException | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        if self.error is not None or self._lost_head() or self.interrupted() or self._without_room():
            return Searcher.FINISHED
        if len(self._numbers) >= self._room():  # nodes come and go
            return None
        try:
            if self._driver.waits_for_room():
                return None
            candidate = self._driver.ask()
        except Exception as error:
            self.error, candidate = error, None
        if candidate is None:
            # a running trial may still lose its worker and be proposed again, so the end comes only after the last one
            return None if self._study.running and self.error is None else Searcher.FINISHED
        self._numbers[trial_id], self._seeds[trial_id] = candidate.number, candidate.seed
        self._history[trial_id] = []
        return packed(candidate)

    def _lost_head(self) -> bool:
        if head_is_gone():
            kept = f"{self._study.finished} finished trials are kept: `ranksearch resume {self._study.space.name}` goes on."
            self.error = self.error or HeadLost(f"Ray's own processes ({' or '.join(HEAD)}) died. {kept}")
        elif self._head is not None and self._head.lost:
            self.error = self.error or HeadLost(head_lost(self._study))
        return isinstance(self.error, HeadLost)

    def _without_room(self) -> bool:
        """Whether the cluster has had no node for a trial for longer than it may."""
        self._room()
        seconds, most = self._room.seconds_without, self._study.space.resources.wait_seconds
        if seconds and seconds >= most:
            self.error = StudyError(
                f"The cluster has had no room for a trial for {seconds:.0f} s (resources.wait_seconds). {self._study.finished} finished "
                f"trials are kept: `ranksearch resume {self._study.space.name}` goes on."
            )
        return self.error is not None

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Takes up what a running trial reports; False where it is to be stopped."""
        if trial_id not in self._numbers:
            return True
        if GROUP in result:
            self._groups[trial_id] = result[GROUP]
        self._note_place(trial_id, result)
        if not result.get(ENTRY):
            return True
        entry = json.loads(result[ENTRY])
        self._history[trial_id].append(entry)
        self._study.note_step(self._numbers[trial_id], entry["step"])
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
            if trial_id in self._groups:
                let_go(self._groups.pop(trial_id))
            if trial_id in self._stopped:
                found = _stopped_result(seed, history, self._study.metric)
            elif payload:
                found = TrialResult(**json.loads(payload))
            elif self._lost_head():
                return
            else:
                loss = self.losses.explain(trial_id)
                if not loss.final and self._study.retry(number, blameless=loss.blameless):
                    self._log(f"trial {number:03d}: {loss.text}; it goes on elsewhere from its last state")
                    return
                losses = NODE_LOSSES if loss.blameless else self._study.space.resources.worker_losses
                again = "it takes its nodes down; at last, " if loss.blameless else ""
                reason = loss.text if loss.final else f"lost {losses + 1} times: {again}{loss.text}"
                found = TrialResult(Status.FAILED, seed, 0.0, reason=reason)
            self._driver.settle(number, replace(found, placement=place), node=_node(place))
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

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._searcher.losses.note(trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def head_lost(study: Study) -> str:
    """What is said where a cluster's head no longer answers."""
    return (
        f"The cluster's head (its control store, gcs_server) no longer answers. {study.finished} finished trials are kept: "
        f"`ranksearch resume {study.space.name} --address HOST:PORT` goes on, on this cluster once it is back, or on another."
    )


def stopped(study: Study) -> str:
    """What is said where SIGTERM has ended Ray's own processes, too."""
    return (
        f"stopped by SIGTERM, and Ray's own processes with it. {study.finished} finished trials are kept: `ranksearch resume "
        f"{study.folder}` goes on."
    )


def _node(place: dict[str, Any] | None) -> str:
    """Where a trial ran, by its own account."""
    return f"{place['node']} ({place['ip']})" if place else "its node"


class Forget(tune.Callback):
    """Tune keeps every trial to the end, and looks through all of them whenever none runs. What one returned is in the study's journal:
    Tune lets go of it, and of the trial. The list that a callback is given is Tune's own."""

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if len(trials) > KEPT:
            # of an empty list Tune would look for files at the end
            trials[:] = [trial for trial in trials if not trial.is_finished()] or trials[-1:]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial.run_metadata.last_result.pop(RESULT, None)


def _stopped_result(seed: int, history: list[dict[str, Any]], metric: Metric) -> TrialResult:
    last = history[-1]
    return TrialResult(
        Status.STOPPED, seed, last["epochs"], reason=stop_reason(last, metric), history=history,
        val_accuracy=last["val_accuracy"], val_loss=last["val_loss"], seconds=last["seconds"],
    )  # fmt: skip


def run_on_ray(study: Study, bench: Workbench, on_row: OnRow, log: Log, *, address: str | None) -> None:
    """Runs what is left of the study, as many trials at once as the cluster's CPUs and GPUs hold at each moment.

    A trial whose worker or node is lost is run again, from its state.

    Raises:
        StudyError: Ray does not start, too many trials fail, or the disk is full.
        UsageError: one trial asks for more than the cluster has.
        KeyboardInterrupt: Ctrl-C, or SIGTERM (`Terminated`); what is finished is told.
    """
    for restarts_left in range(RESTARTS, -1, -1):
        if study.finished >= study.planned:
            return
        try:
            with quiet_tune():
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
    needs = join(resources, address, log)
    shared, load = share(bench, study.space.kind().own, staging_of(study.space))
    _note_load(study.folder, load, log)
    several = resources.gpus_per_trial == AUTO or 0 < needs.gpus < 1
    with (
        shared_gpus(resources.sharing, several, usable_nodes(), log) as pipes,
        # a Ray of this machine is looked at by its processes
        nullcontext() if address is None else watched_head(head_lost(study)) as head,
    ):
        if resources.gpus_per_trial == AUTO:
            needs = replace(needs, gpus=auto_share(study, bench, shared, usable_nodes(), log, pipes=pipes))
        warn_of_loaders(bench.task, needs.cpus, log)
        folder = str(study.folder.absolute())
        terms = Terms(needs.cpus, needs.gpus, needs.workers, resources.checkpoint_seconds, folder, pipes)
        searcher = AskTell(study, bench, on_row, log, shared=shared, room=Room(needs, log), head=head)
        _fit_all(searcher, study, shared, terms)


def _fit_all(searcher: AskTell, study: Study, shared: Shared, terms: Terms) -> None:
    alone = terms.workers == 1
    trainable = tune.with_parameters(trial if alone else parallel_trial, shared=shared, terms=terms)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": terms.cpus, "gpu": terms.gpus} if alone else NEXT_TO_NOTHING),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=StopBehind(searcher),
            num_samples=-1,  # the study says when it is done
            reuse_actors=alone,  # with the actor of a data-parallel trial its workers end
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(study.folder.absolute()),
            verbose=0,
            callbacks=[searcher.losses, Forget()],
            # Tune counts one death of a reused actor twice, so the study does the retrying
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    ended_by = _fit(tuner, searcher, study)
    if searcher.error is not None and not (ended_by is not None and isinstance(searcher.error, HeadLost)):
        raise searcher.error  # a signal to a whole group ends Ray's processes as well: then it is what ended the study
    if ended_by is not None or study.running:
        raise ended_by or KeyboardInterrupt  # what was cut off stays RUNNING in the journal
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


def _fit(tuner: tune.Tuner, searcher: AskTell, study: Study) -> type[KeyboardInterrupt] | None:
    """Runs the tuner; what it was interrupted by, if it was.

    Tune takes SIGINT for itself, returns as if all were well, and gives the signal back then alone. SIGTERM is made the same of it, where
    the process has an answer to SIGTERM of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        tuner.fit()
        return None  # a thread that gets no signals
    before, on_term = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    terminated = threading.Event()

    def on_sigterm(number: int, frame: Any) -> None:
        terminated.set()
        signal.signal(signal.SIGTERM, on_term)  # a second one ends the process at once
        signal.raise_signal(signal.SIGINT)

    if callable(on_term):
        signal.signal(signal.SIGTERM, on_sigterm)
    # Tune itself does not look while it waits for a proposal, minutes long
    searcher.interrupted = lambda: signal.getsignal(signal.SIGINT) is before
    try:
        with ended_with_group(lambda: stopped(study), 128 + signal.SIGTERM):
            tuner.fit()
    except KeyboardInterrupt:  # before Tune had taken the signal for itself
        raise (Terminated if terminated.is_set() else KeyboardInterrupt) from None
    finally:
        interrupted = signal.getsignal(signal.SIGINT) is before
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, on_term)
    return Terminated if terminated.is_set() else KeyboardInterrupt if interrupted else None
