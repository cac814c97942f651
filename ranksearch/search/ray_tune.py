"""Running a study's trials on Ray Tune. The study's journal is the truth; Tune only places trials and restarts them.

Tune's own snapshot can lag behind the study or run ahead of it, so nothing is ever restored from it: a resumed study starts a fresh
`Tuner` for what is left. The only module that imports Ray.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ranksearch.compress import Net, RankPlan
from ranksearch.compress.stopwatch import LatencySetting
from ranksearch.errors import StudyError, UsageError
from ranksearch.search.metric import Metric
from ranksearch.search.proposals import Candidate
from ranksearch.search.recipe import Recipe
from ranksearch.search.run import Driver, Log, OnRow, attempt, stop_reason
from ranksearch.search.space import ResourcesSpace
from ranksearch.search.study import Study
from ranksearch.search.trial import RUNG, TrialResult
from ranksearch.search.workbench import Workbench
from ranksearch.tasks.dense import State
from ranksearch.tasks.resident import Resident
from ranksearch.tasks.task import Task
from ranksearch.tasks.task_file import TaskCode, TaskFile

# Usage statistics, log files per trial and Tune's own tables stay off; an explicit setting of the user wins. Ray reads these at import.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without a GPU share sees none
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

METRIC, ENTRY, RESULT = "val_accuracy", "entry", "result"
HEAD = ("gcs_server", "raylet")
RESTARTS = 3
"""How often a Ray of our own that lost its head is started again before the study ends."""


class HeadLost(StudyError):
    """Ray's own processes are gone: no trial can run, and none is to blame."""


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's CPU quota where it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def connect(address: str | None) -> None:
    """Joins the cluster at `address`, or starts Ray on this machine; a Ray that is running in this process is used as it is.

    Raises:
        StudyError: Ray does not start or cannot be reached.
    """
    if ray.is_initialized():
        return
    if address is None:
        # Ray's token authentication is on; a token for this cluster alone needs no file in a home that may be read-only
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # on one machine a control store that does not answer is dead, not far away; without it Ray ends this process
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    local = {
        "address": "local",
        "num_cpus": usable_cores(),
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    for tries_left in (1, 0):
        try:
            ray.init(**quiet, **(local if address is None else {"address": address}))
            return
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            # on a busy machine a node start can miss Ray's own time limit: once more, then it is a real failure
            if tries_left == 0 or address is not None:
                where = f"reach the Ray cluster at {address}" if address else "start Ray on this machine"
                raise StudyError(f"Could not {where}: {error}") from error
            ray.shutdown()


def head_is_gone() -> bool:
    """Whether a Ray that this process started has lost one of its own processes; of a cluster's head nothing is known here."""
    node = ray._private.worker._global_node
    return node is not None and node.head and any(name in HEAD for name, _ in node.dead_processes())


def trials_at_once(cpus: float, gpus: float, available: dict[str, float]) -> int:
    """How many trials the cluster holds at once.

    Raises:
        UsageError: not even one.
    """
    fits = available.get("CPU", 0) / cpus
    if gpus:
        fits = min(fits, available.get("GPU", 0) / gpus)
    if fits < 1:
        raise UsageError(
            f"resources: a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the cluster has "
            f"{available.get('CPU', 0):g} and {available.get('GPU', 0):g}: lower resources.cpus_per_trial or gpus_per_trial."
        )
    return int(fits)


def join(resources: ResourcesSpace, address: str | None) -> tuple[float, int]:
    """Connects, and returns (GPUs per trial, trials at once) of the cluster for what one trial takes.

    Raises:
        StudyError: Ray does not start or cannot be reached.
        UsageError: one trial asks for more than the cluster has.
    """
    connect(address)
    available = ray.cluster_resources()
    gpus = resources.gpus_per_trial
    if gpus is None:
        gpus = float(available.get("GPU", 0) > 0)
    return gpus, trials_at_once(resources.cpus_per_trial, gpus, available)


@dataclass(frozen=True)
class Packed:
    """A task on its way to the workers.

    Resident data travel as arrays, which lie once per node in Ray's object store and are read there without a copy. The rest is pickled
    apart: what a user's own file defines can be read only after that file's module was made.
    """

    code: TaskCode | None
    rest: bytes
    arrays: dict[str, tuple[np.ndarray, np.ndarray]]
    """Split -> inputs, targets."""


def pack(task: Task, own: TaskFile | None = None) -> Packed:
    """The task without its test set, and the user's file that it comes from.

    Raises:
        UsageError: something of it cannot be pickled.
    """
    splits = {"train": task.train, "val": task.val}
    resident = {name: source for name, source in splits.items() if isinstance(source, Resident)}
    arrays = {name: (source.inputs.numpy(), source.targets.numpy()) for name, source in resident.items()}
    nothing = torch.empty(0)
    hollow = {name: replace(source, inputs=nothing, targets=nothing) for name, source in resident.items()}
    try:
        rest = ray.cloudpickle.dumps(replace(task.without_test(), **hollow))
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, pickle.PicklingError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(
            f"task: it cannot be sent to Ray's workers ({first}): open files and connections when they are first used, not in the "
            f"task; or run the trials in this process, by --inline."
        ) from error
    return Packed(own.code if own is not None else None, rest, arrays)


def unpack(packed: Packed) -> Task:
    """The task of `pack`, its tensors views of the object store's read-only memory: nothing writes to a data set."""
    if packed.code is not None:
        packed.code.module()
    task: Task = ray.cloudpickle.loads(packed.rest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        whole = {
            name: replace(getattr(task, name), inputs=torch.from_numpy(inputs), targets=torch.from_numpy(targets))
            for name, (inputs, targets) in packed.arrays.items()
        }
    return replace(task, **whole)


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
            storage_path=str(study.folder.absolute()),
            verbose=0,
            # Tune counts one death of a reused actor twice, so the study does the retrying
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    tuner.fit()
    if searcher.error is not None:
        raise searcher.error
    if study.running:
        raise KeyboardInterrupt  # Tune takes SIGINT for itself and returns; what was cut off stays RUNNING in the journal
    if study.finished < study.planned and not study.exhausted:
        raise StudyError(
            f"Ray Tune ended after {study.finished} of {study.planned} trials: `ranksearch resume` goes on."
        )
