"""Running a study's trials on Ray Tune. The study's journal is the truth; Tune only places trials and restarts them.

Tune's own snapshot can lag behind the study or run ahead of it, so nothing is ever restored from it: a resumed study starts a fresh
`Tuner` for what is left.
"""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from ranksearch.cluster.ask_tell import (
    NEXT_TO_NOTHING,
    RESTARTS,
    AskTell,
    Forget,
    StopBehind,
    head_lost,
    record_load,
    stopped,
)
from ranksearch.cluster.connection import HeadLost, join
from ranksearch.cluster.ending import ended_with_group
from ranksearch.cluster.group import parallel_trial
from ranksearch.cluster.head import watched_head
from ranksearch.cluster.nodes import usable_nodes
from ranksearch.cluster.probe import auto_share
from ranksearch.cluster.ray_private import quiet_tune
from ranksearch.cluster.room import Room
from ranksearch.cluster.shared import Shared, share
from ranksearch.cluster.sharing import shared_gpus
from ranksearch.cluster.worker import Terms, trial
from ranksearch.data.folder import data_folder
from ranksearch.data.loaded import loader_processes
from ranksearch.errors import StudyError, Terminated
from ranksearch.search.workbench import Workbench
from ranksearch.space.search import AUTO
from ranksearch.space.space import Space
from ranksearch.study.driver import Log, OnRow
from ranksearch.study.study import Study
from ranksearch.tasks.stage import Staging
from ranksearch.tasks.task import Task


def run_on_ray(study: Study, bench: Workbench, on_row: OnRow, log: Log, *, address: str | None) -> None:
    """Runs the rest of the study, as many trials at once as the cluster's CPUs and GPUs hold at each moment.

    A trial whose worker or node is lost is run again, from its state.

    Raises:
        StudyError: Ray does not start, too many trials fail, or the disk is full.
        UsageError: one trial asks for more than the cluster has.
        KeyboardInterrupt: Ctrl-C, or SIGTERM (`Terminated`); finished trials are recorded.
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
    """Runs one Tuner over the rest of the study."""
    resources = study.space.resources
    needs = join(resources, address, log)
    shared, load = share(bench, study.space.kind().own, staging_of(study.space))
    record_load(study.folder, load, log)
    several = resources.gpus_per_trial == AUTO or 0 < needs.gpus < 1
    with (
        shared_gpus(resources.sharing, several, usable_nodes(), log) as pipes,
        # a Ray on this machine is watched by its processes instead
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
            reuse_actors=alone,  # the workers of a data-parallel trial end with its actor
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
        raise searcher.error  # a lost head is no error if a signal to the whole group has ended Ray's processes, too
    if ended_by is not None or study.running:
        raise ended_by or KeyboardInterrupt  # trials that were cut off stay RUNNING in the journal
    if study.finished < study.planned and not study.exhausted:
        raise StudyError(
            f"Ray Tune ended after {study.finished} of {study.planned} trials: `ranksearch resume` goes on."
        )


def staging_of(space: Space) -> Staging | None:
    """Where nodes copy the data folder, if the space says so and its task reads files."""
    folder = space.resources.stage
    if folder is None or not space.kind().reads_files:
        return None
    return Staging(data_folder(space.data), Path(folder))


def warn_of_loaders(task: Task, cpus: int, log: Log) -> None:
    """Warns if the processes that read a trial's data leave no core for its training."""
    loaders = loader_processes(task)
    if loaders >= cpus:
        log(
            f"resources: a trial has {cpus} CPUs for {loaders} processes that read its data and one that trains: raise cpus_per_trial, or "
            f"lower data_workers"
        )


def _fit(tuner: tune.Tuner, searcher: AskTell, study: Study) -> type[KeyboardInterrupt] | None:
    """Runs the tuner; returns the interruption that ended it, if there was one.

    Tune handles SIGINT itself, returns as if all were well, and restores the handler only in that case. SIGTERM is turned into SIGINT if
    the process has its own handler of SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        tuner.fit()
        return None  # this thread gets no signals
    before, on_term = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    terminated = threading.Event()

    def on_sigterm(number: int, frame: Any) -> None:
        terminated.set()
        signal.signal(signal.SIGTERM, on_term)  # a second one ends the process at once
        signal.raise_signal(signal.SIGINT)

    if callable(on_term):
        signal.signal(signal.SIGTERM, on_sigterm)
    # Tune itself does not notice while it waits for a proposal, which may take minutes
    searcher.interrupted = lambda: signal.getsignal(signal.SIGINT) is before
    try:
        with ended_with_group(lambda: stopped(study), 128 + signal.SIGTERM):
            tuner.fit()
    except KeyboardInterrupt:  # before Tune had put its own handler in place
        raise (Terminated if terminated.is_set() else KeyboardInterrupt) from None
    finally:
        interrupted = signal.getsignal(signal.SIGINT) is before
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, on_term)
    return Terminated if terminated.is_set() else KeyboardInterrupt if interrupted else None
