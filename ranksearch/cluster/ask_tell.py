"""A study as Ray Tune's searcher and scheduler: Tune asks for trials and tells results; all that it knows is in the study, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ranksearch.cluster.connection import HEAD, HeadLost, head_is_gone
from ranksearch.cluster.group import let_go
from ranksearch.cluster.head import HeadWatch
from ranksearch.cluster.losses import Losses
from ranksearch.cluster.room import Room
from ranksearch.cluster.shared import Shared, load_of
from ranksearch.cluster.worker import ENTRY, GROUP, METRIC, PLACE, RESULT, packed
from ranksearch.errors import StudyError
from ranksearch.search.workbench import Workbench
from ranksearch.study.driver import Driver, Log, OnRow, stop_reason
from ranksearch.study.study import NODE_LOSSES, Study
from ranksearch.trial.metric import Metric
from ranksearch.trial.placement import LOADS, Load, Placement, note_load
from ranksearch.trial.reporting import RUNG
from ranksearch.trial.result import Status, TrialResult

RESTARTS = 3
"""How often a Ray of our own that lost its head is started again before the study ends."""


KEPT = 50
"""The number of trials in Tune's list above which those that ended are removed; those under way stay, however many."""


NEXT_TO_NOTHING = tune.PlacementGroupFactory([{"memory": 1}])
"""What Tune reserves for a data-parallel trial, whose workers ask for cores and GPUs themselves; Tune accepts no empty request."""


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
        """Whether the cluster has had no room for a trial for longer than `resources.wait_seconds`."""
        self._room()
        seconds, most = self._room.seconds_without, self._study.space.resources.wait_seconds
        if seconds and seconds >= most:
            self.error = StudyError(
                f"The cluster has had no room for a trial for {seconds:.0f} s (resources.wait_seconds). {self._study.finished} finished "
                f"trials are kept: `ranksearch resume {self._study.space.name}` goes on."
            )
        return self.error is not None

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Takes up what a running trial reports; returns False if it should stop."""
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
        """Records where a trial runs, what its processes loaded (at its first report), and how much memory it took (at its last)."""
        place = json.loads(result[PLACE])
        if trial_id not in self._places:
            for worker in place["workers"] or [place]:
                if worker["unpacked"]:
                    load = load_of(self._shared, Placement(**worker), self._numbers[trial_id])
                    record_load(self._study.folder, load, self._log)
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
                again = "it may be what takes its nodes down; the last time, " if loss.blameless else ""
                reason = loss.text if loss.final else f"lost {losses + 1} times: {again}{loss.text}"
                found = TrialResult(Status.FAILED, seed, 0.0, reason=reason)
            self._driver.settle(number, replace(found, placement=place), node=_node(place))
        except (
            Exception
        ) as caught:  # Tune would log it and go on: it is kept, and raised once the running trials have ended
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
    """The message for a cluster whose head no longer answers."""
    return (
        f"The cluster's head (its control store, gcs_server) no longer answers. {study.finished} finished trials are kept: "
        f"`ranksearch resume {study.space.name} --address HOST:PORT` goes on, on this cluster once it is back, or on another."
    )


def stopped(study: Study) -> str:
    """The message for a SIGTERM that has ended Ray's own processes, too."""
    return (
        f"stopped by SIGTERM, and Ray's own processes with it. {study.finished} finished trials are kept: `ranksearch resume "
        f"{study.folder}` goes on."
    )


def _node(place: dict[str, Any] | None) -> str:
    """The node on which a trial ran, by its own report."""
    return f"{place['node']} ({place['ip']})" if place else "its node"


class Forget(tune.Callback):
    """Makes Tune forget trials that ended. Tune would keep all of them and look through them whenever none runs; their results are in the
    study's journal. The list that a callback gets is Tune's own."""

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if len(trials) > KEPT:
            # if the list were empty, Tune would look for files at the end
            trials[:] = [trial for trial in trials if not trial.is_finished()] or trials[-1:]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial.run_metadata.last_result.pop(RESULT, None)


def _stopped_result(seed: int, history: list[dict[str, Any]], metric: Metric) -> TrialResult:
    last = history[-1]
    return TrialResult(
        Status.STOPPED, seed, last["epochs"], reason=stop_reason(last, metric), history=history,
        val_accuracy=last["val_accuracy"], val_loss=last["val_loss"], seconds=last["seconds"],
    )  # fmt: skip


def record_load(folder: Path, load: Load, log: Log) -> None:
    """Adds a line to the study's record of loads; a disk without room for it must not end a study."""
    try:
        note_load(folder, load)
    except OSError as error:
        log(f"{folder / LOADS} cannot be written ({error.strerror}): a load of trial {load.trial} is not recorded")
