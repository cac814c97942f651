"""What logging to MLflow costs the driver, and whether anything is missing: a study of simulated trials, twenty metrics each and more.

python scripts/bench_mlflow.py [--trials 200] [--store sqlite|server] [--json] [--quick]

Two studies of the same seed are driven in turn, ten trials of each, one of them with MLflow; between two trials the driver sleeps
for `--trial-ms`, as it does while workers train (200 ms: three hundred workers on trials of a minute). Of each trial the driver's
time is taken: its ask, its tell, the call that logs it. The mirror's thread may go on with its backlog during the logged study's
next trials, and is waited for before the other's.

log_ms_per_trial      median of what the logged study's trials take the driver more than the other's (paired by trial number)
call_ms_per_trial     median time of the call that logs a trial, alone
mirror_ms_per_trial   mean time that the mirror's thread is busy with a trial, beside the driver
missing, doubled      metric values of the study's folder that the store lacks, or holds twice, all steps, to the last digit
finish_seconds        the end: front, figures, report (no models: simulated trials have no nets)
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from report import Report, arguments
from simulated_trials import simulated

from ranksearch.front.row import Row
from ranksearch.search.workbench import Workbench, prepare
from ranksearch.space.reading import parse_space
from ranksearch.space.space import Space
from ranksearch.study.study import Study
from ranksearch.tracking.background import BackgroundMirror
from ranksearch.tracking.runs import PARENT_TAG, TRIAL_TAG, trial_metrics
from ranksearch.trial.metric import Metric

from mlflow import MlflowClient  # isort: skip  (after tracking, which quiets it)

BLOCK = 10
"""Trials of one study before it is the other's turn."""
PROJECTIONS = 20


def main() -> None:
    parser = arguments(__doc__, trials=200, store="sqlite", trial_ms=200.0)
    options = parser.parse_args()
    if options.store not in ("sqlite", "server"):
        parser.error(f"--store {options.store}: expected sqlite or server")
    options.trials = min(options.trials, 40) if options.quick else options.trials
    report = Report("bench_mlflow", options)
    with tempfile.TemporaryDirectory() as scratch, store(options, Path(scratch), report) as uri:
        figures = measure(options, Path(scratch), uri, report)
    report.finish(figures, [f"store: {options.store}, {options.trials} trials"])


@contextmanager
def store(options: argparse.Namespace, scratch: Path, report: Report) -> Iterator[str]:
    """URI of an empty store: a SQLite file, or a real server over one."""
    database = f"sqlite:///{scratch / 'mlflow.db'}"
    if options.store == "sqlite":
        yield database
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", (scratch / "artifacts").as_uri()]
    with open(scratch / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # its signals are its own
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        report.say("the server answers")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{address} does not answer")


def space_of(options: argparse.Namespace, name: str, uri: str) -> Space:
    return parse_space({
        "name": name, "task": "digits", "model": "resnet8", "validation": 360, "budgets": {"flops": "60%"},
        "recipe": {"steps": 100, "lr": {"low": 0.01, "high": 0.1, "log": True}},
        "search": {"trials": options.trials, "seed": options.seed}, "tracking": {"uri": uri, "models": False},
    }, "bench")  # fmt: skip


class Driven:
    """A study that is driven trial by trial, and what that takes its driver."""

    def __init__(self, options: argparse.Namespace, scratch: Path, name: str, uri: str, bench: Workbench) -> None:
        self.bench, self.rng = bench, random.Random(options.seed)
        self.study = Study.create(scratch / "runs", space_of(options, name, uri), bench, 99.0)
        self.mirror: BackgroundMirror | None = None
        self.ms: list[float] = []
        self.call_ms: list[float] = []

    def run(self, trials: int, options: argparse.Namespace) -> None:
        for _ in range(trials):
            self._step()
            time.sleep(options.trial_ms / 1000)

    def _step(self) -> None:
        """One trial: asked, told, logged."""
        started = time.perf_counter()
        candidate = self.study.ask(self.bench)
        asked = time.perf_counter() - started
        assert candidate is not None
        result = simulated(self.bench, candidate, self.rng, projections=PROJECTIONS)
        started = time.perf_counter()
        row = self.study.tell(candidate.number, result)
        told = time.perf_counter()
        if self.mirror is not None:
            self.mirror.log_trial(row)
        ended = time.perf_counter()
        self.ms.append(1000 * (asked + ended - started))
        self.call_ms.append(1000 * (ended - told))


def measure(options: argparse.Namespace, scratch: Path, uri: str, report: Report) -> dict[str, Any]:
    bench = prepare(space_of(options, "bench", uri), fallback=scratch / "dense", log=report.say)
    plain, logged = (Driven(options, scratch, name, uri, bench) for name in ("plain", "logged"))
    logged.mirror = BackgroundMirror(logged.study, scratch / "runs", report.say)
    busy = Busy(logged.mirror)
    for start in range(0, options.trials, BLOCK):
        trials = min(BLOCK, options.trials - start)
        logged.run(trials, options)
        busy.drain()
        plain.run(trials, options)
    report.say(f"{options.trials} trials are told; {busy.waiting} still to be logged")
    busy.drain()
    mirror_ms = 1000 * busy.seconds / options.trials
    started = time.perf_counter()
    logged.mirror.finish(complete=True)
    finish = time.perf_counter() - started
    missing, doubled, values = compare(logged.study.trials, logged.study.metric, uri)
    report.say(f"{values} values in the store; {missing} missing, {doubled} doubled")
    more = [a - b for a, b in zip(logged.ms, plain.ms, strict=True)]
    report.rows += [
        {"study": "plain", "driver_ms_median": median(plain.ms), "driver_ms_max": max(plain.ms)},
        {"study": "logged", "driver_ms_median": median(logged.ms), "driver_ms_max": max(logged.ms)},
    ]
    return {
        "log_ms_per_trial": round(median(more), 3), "missing": missing, "doubled": doubled,
        "call_ms_per_trial": round(median(logged.call_ms), 3), "mirror_ms_per_trial": round(mirror_ms, 1),
        "metrics_per_trial": round(values / options.trials, 1), "finish_seconds": round(finish, 1),
    }  # fmt: skip


class Busy:
    """How long the mirror's thread is at work, and how much it has before it."""

    def __init__(self, mirror: BackgroundMirror) -> None:
        self.seconds, self._mirror, guarded = 0.0, mirror, mirror._guarded

        def timed(*args: Any, **options: Any) -> None:
            started = time.perf_counter()
            guarded(*args, **options)
            self.seconds += time.perf_counter() - started

        mirror._guarded = timed  # type: ignore[method-assign]

    @property
    def waiting(self) -> int:
        return self._mirror._worker._work_queue.qsize()

    def drain(self) -> None:
        self._mirror._worker.submit(lambda: None).result()


def compare(rows: list[Row], metric: Metric, uri: str) -> tuple[int, int, int]:
    """(values that the store lacks, values that it holds twice, values that it should hold) over all trials' metrics and steps."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("logged")
    runs = client.search_runs([experiment.experiment_id], f"tags.`{PARENT_TAG}` LIKE '%'", max_results=50_000)
    found = {int(run.data.tags[TRIAL_TAG]): run for run in runs}
    missing = doubled = total = 0
    for row in rows:
        wanted = [
            (name, step, value) for step, metrics in trial_metrics(row, metric) for name, value in metrics.items()
        ]
        total += len(wanted)
        held: list[tuple[str, int, float]] = []
        if row["trial"] in found:
            run_id = found[row["trial"]].info.run_id
            for name in sorted({name for name, _, _ in wanted}):
                held += [(m.key, m.step, m.value) for m in client.get_metric_history(run_id, name)]
        missing += len(set(wanted) - set(held))
        doubled += len(held) - len(set(held))
    return missing, doubled, total


if __name__ == "__main__":
    main()
