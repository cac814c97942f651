"""The driver at scale: the real study, ledger, journal and MLflow mirror, driven by simulated workers. Nothing is trained.

Time is virtual: a worker takes a trial's seconds (60 ± 30 %, 1 % lost with their worker, 1 % diverged: `simulated_trials.py`), and the
driver, which does one thing after the other, what it was measured to take for this very trial (CPU time of its thread and waiting for the
disk, so that other work on the machine does not count), plus `--tune-ms` for what Ray Tune takes beside it (part `tune`). A worker whose
trial ended waits until the driver has settled it and asked for the next.

    python scripts/simulate_cluster.py --json           about half an hour on two cores
    python scripts/simulate_cluster.py --only growth --trials 2000 --profile
    python scripts/simulate_cluster.py --quick          within a minute: ResNet-8, 8 and 64 at once, 250 trials in the long study, no Tune

Parts, each in a process of its own (but under --quick):
workers   8, 64 and 512 at once, `--waves` trials a worker (at least 300).
    idle_share_N            of the workers' time from the start until the last trial is given out, what they waited for the driver
growth    one study of `--trials` trials, 64 at once, mirrored in MLflow (SQLite); the mirror catches up after each trial, off the clock.
    driver_ms_N, suggest_ms_N   median of ask + tell + progress, and of ask alone, of the 100 trials around N
    driver_rss_mib_max, driver_rss_mib_N, journal_mib, mlflow_mib, optuna_writes_per_trial (lines), optuna_syncs_per_trial
    open_seconds            opening the study again and reading its front, as `ranksearch front` does
    finish_seconds          the mirror's last call: what was missed, figures, report (no nets: simulated trials have none)
mirror    what MLflow's thread takes from a driver whose trials end as fast as 512 workers end them, every 117 ms of real time:
    driver_ms_mirrored, driver_ms_alone, mirror_ms, mlflow_values_per_second (of the thread's busy time)
tune      `--tune-trials` empty trials on a Ray of this machine, through the searcher that real studies use:
    tune_ms_N               CPU time of Tune's own loop per trial of the 100 around N, without the study's ask and tell
    tune_rss_mib_N          memory of the driver's process after N
"""

from __future__ import annotations

import argparse
import cProfile
import heapq
import os
import pstats
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from bench_mlflow import Busy
from empty_trials import tune
from report import Report, arguments
from simulated_trials import RESTART_SECONDS, Fate, bytes_of, diverged, simulated, workbench

from ranksearch.console import Terminal
from ranksearch.search.proposals import Candidate
from ranksearch.search.run import Driver
from ranksearch.search.space import Space
from ranksearch.search.space_file import read_space
from ranksearch.search.study import Study
from ranksearch.search.trial import TrialResult
from ranksearch.search.workbench import Workbench
from ranksearch.tracking.background import BackgroundMirror
from ranksearch.tracking.runs import trial_metrics

SPACE = Path(__file__).parent.parent / "search_spaces" / "cifar10_resnet20.yaml"
PARTS = ("workers", "growth", "mirror", "tune")
WORKERS = (8, 64, 512)
FEWEST = 300
WINDOW = 50
"""Trials on either side of a number over which a time is the median."""
MARKS = (100, 1000, 5000, 10_000)
END_EVERY = 0.117
"""Seconds between two ends of trials of a minute on 512 workers."""


def main() -> None:
    parser = arguments(__doc__, trials=10_000, waves=4, tune_trials=2000, tune_ms=10.0, mirror_trials=300)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="print where the driver's time goes, on stderr")
    parser.add_argument("--no-mirror", action="store_true", help="leave MLflow out of the part growth")
    options = parser.parse_args()
    options.only, options.workers = options.only.split(","), WORKERS
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    if options.quick:
        options.trials, options.waves, options.workers, options.mirror_trials = 250, 1, WORKERS[:2], 30
        options.only = [part for part in options.only if part != "tune"]
    report, figures = Report("simulate_cluster", options), {}
    parts = {"growth": grow, "mirror": mirror, "tune": tune}
    jobs = [(part, parts[part], (options,)) for part in options.only if part != "workers"]
    if "workers" in options.only:
        jobs = [("workers", serve, (options, count)) for count in options.workers] + jobs
    for name, work, given in jobs:
        row, found = work(*given) if options.quick else apart(work, *given)
        report.rows.append({"part": name, **row})
        figures |= found
        report.say(f"{name}: {found}")
    report.finish(figures, ["simulated workers; the driver, its files and its database are real"])


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """Calls `work` in a process of its own, whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, *given).result()


# A study, driven ----------------------------------------------------------------------------------------------------


@dataclass
class Driven:
    """What a driver took: seconds of every trial, in the order in which they ended."""

    asked: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    idle: float = 0.0
    """Worker-seconds of waiting until the last trial was given out."""
    until: float = 0.0
    """When that was."""
    ends: Counter[str] = field(default_factory=Counter)

    def around(self, number: int) -> slice:
        return slice(max(0, number - WINDOW), number + WINDOW)

    def driver_ms(self, number: int) -> float:
        both = [a + b for a, b in zip(self.asked, self.told, strict=True)]
        return round(1000 * median(both[self.around(number)]), 2)

    def suggest_ms(self, number: int) -> float:
        return round(1000 * median(self.asked[self.around(number)]), 2)


@dataclass
class Setting:
    """A new study with its driver."""

    study: Study
    bench: Workbench
    driver: Driver
    make: Callable[[Candidate], TrialResult]
    rng: random.Random
    mirror: BackgroundMirror | None


class Clock:
    """What the driver takes for an action: CPU time of its thread, and its waiting for the disk; not what else the machine does."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self._profile, self.syncs, self._waited, sync = profile, 0, 0.0, os.fsync

        def timed_sync(descriptor: int) -> None:
            started, cpu = time.perf_counter(), time.thread_time()
            sync(descriptor)
            self._waited += time.perf_counter() - started - (time.thread_time() - cpu)
            self.syncs += 1

        os.fsync = timed_sync

    def __call__(self, action: Callable[..., Any], *given: Any) -> tuple[Any, float]:
        """(what the action returns, seconds)"""
        if self._profile is not None:
            self._profile.enable()
        cpu, waited = time.thread_time(), self._waited
        value = action(*given)
        seconds = time.thread_time() - cpu + self._waited - waited
        if self._profile is not None:
            self._profile.disable()
        return value, seconds


def drive(
    at: Setting, clock: Clock, make: Callable[[Candidate], TrialResult], *, workers: int, tune_seconds: float,
    after: Callable[[int], None] = lambda ended: None,
) -> Driven:  # fmt: skip
    """Runs the study to its end in virtual time; `after` is called off the clock, with the number of trials that ended."""
    found, order, more = Driven(), 0, True
    free = [0.0] * workers  # a heap: since when workers have been waiting, or from when on they are there again
    running: list[tuple[float, int, Candidate, Fate, float]] = []  # a heap, by end
    now = 0.0  # when the driver is through with what it has begun
    while running or (more and free):
        # a worker that waits comes before a trial that ends: Tune fills its slots first
        while more and free and (not running or max(now, free[0]) <= max(now, running[0][0])):
            candidate, spent = clock(at.driver.ask)
            if candidate is None:
                more = bool(at.study.running)  # a lost trial may be proposed again
                break
            since, order = heapq.heappop(free), order + 1
            now = found.until = max(now, since) + spent + tune_seconds
            found.idle += now - since
            fate = Fate.draw(at.rng)
            heapq.heappush(running, (now + fate.seconds, order, candidate, fate, spent))
        if not running:
            continue
        end, _, candidate, fate, asking = heapq.heappop(running)
        found.ends[fate.end] += 1
        if fate.end == "lost":
            again, spent = clock(at.study.retry, candidate.number)
            if not again:
                raise SystemExit("a trial lost its worker more often than the study allows: another --seed")
            now, more = max(now, end) + spent, True
            heapq.heappush(free, end + RESTART_SECONDS)
            continue
        result = diverged(candidate) if fate.end == "diverged" else make(candidate)
        _, spent = clock(at.driver.settle, candidate.number, result)
        now = max(now, end) + spent
        heapq.heappush(free, end)
        found.asked.append(asking)
        found.told.append(spent)
        after(len(found.told))
    return found


def space_of(options: argparse.Namespace, trials: int, uri: str = "") -> Space:
    """ResNet-20 as in its search space, on images of 8 x 8 that need no download; every searched setting as there."""
    settings = [
        "task=digits", "validation=360", f"search.seed={options.seed}", "tracking.models=false",
        "resources.worker_losses=5", *([f"tracking.uri={uri}"] if uri else []),
        *(["model=resnet8", "layers.lowerings=[im2col, channel, spatial]"] if options.quick else []),
    ]  # fmt: skip
    return read_space(SPACE, trials=trials, name="simulated", settings=settings)


def new_study(options: argparse.Namespace, runs: Path, trials: int, *, mirrored: bool) -> Setting:
    space = space_of(options, trials, f"sqlite:///{runs / 'mlflow.db'}" if mirrored else "")
    bench, rng = workbench(space), random.Random(options.seed)
    study = Study.create(runs, space, bench, 99.0)
    terminal = Terminal()
    mirror = BackgroundMirror(study, runs, lambda text: print(text, file=sys.__stderr__)) if mirrored else None

    def on_row(row: Any) -> None:
        terminal.row(study, row)
        if mirror is not None:
            mirror.log_trial(row)

    terminal.start(study)
    driver = Driver(study, bench, on_row, lambda text: None)
    return Setting(study, bench, driver, lambda candidate: simulated(bench, candidate, rng), rng, mirror)


def rss_mib() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# The parts ----------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`workers` at once."""
    trials = max(FEWEST // (3 if options.quick else 1), options.waves * workers)
    with tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        at = new_study(options, Path(runs), trials, mirrored=False)
        found = drive(at, Clock(), at.make, workers=workers, tune_seconds=options.tune_ms / 1000)
    share = found.idle / (workers * found.until)
    both = [a + b for a, b in zip(found.asked, found.told, strict=True)]
    row = {
        "workers": workers, "trials": trials, "driver_ms": 1000 * median(both), "virtual_seconds": found.until,
        "driver_busy_share": (sum(both) + trials * options.tune_ms / 1000) / found.until, "ends": dict(found.ends),
    }  # fmt: skip
    return row, {f"idle_share_{workers}": round(share, 5)}


def grow(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """One long study."""
    memory: dict[int, float] = {}
    sizes: list[int] = []
    profile = cProfile.Profile() if options.profile else None
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere:
        with redirect_stderr(nowhere):
            at = new_study(options, Path(scratch), options.trials, mirrored=not options.no_mirror)
            clock, busy = Clock(profile), Busy(at.mirror) if at.mirror is not None else None
            marks = {min(mark, options.trials) for mark in MARKS}

            def after(ended: int) -> None:
                if busy is not None:
                    busy.drain()
                if ended % 100 == 0 or ended in marks:
                    memory[ended] = rss_mib()
                if ended % 1000 == 0:
                    print(f"{ended} trials, {memory[ended]:.0f} MiB", file=sys.__stderr__, flush=True)

            def make(candidate: Candidate) -> TrialResult:
                result = at.make(candidate)
                sizes.append(bytes_of(result))
                return result

            tune_seconds = options.tune_ms / 1000
            found = drive(at, clock, make, workers=64, tune_seconds=tune_seconds, after=after)
            started = time.perf_counter()
            if at.mirror is not None:
                at.mirror.finish(complete=True)
            finishing, memory[options.trials] = time.perf_counter() - started, rss_mib()
        if profile is not None:
            pstats.Stats(profile, stream=sys.__stderr__).sort_stats("cumulative").print_stats(60)
        folder = at.study.folder
        lines = (folder / "optuna.journal").read_bytes()
        figures = {f"driver_ms_{n}": found.driver_ms(n) for n in MARKS if n <= options.trials}
        figures |= {f"suggest_ms_{n}": found.suggest_ms(n) for n in MARKS if n <= options.trials}
        figures |= {f"driver_rss_mib_{n}": round(memory[n]) for n in sorted(memory) if n in MARKS}
        figures |= {
            "driver_rss_mib_max": round(max(memory.values())), "journal_mib": round(len(lines) / 2**20, 1),
            "optuna_writes_per_trial": round(lines.count(b"\n") / options.trials, 2),
            "optuna_syncs_per_trial": round(clock.syncs / options.trials, 2),
            "result_bytes": sizes[0],
        }  # fmt: skip
        if busy is not None:
            figures |= {
                "mirror_ms": round(1000 * busy.seconds / options.trials, 1),
                "finish_seconds": round(finishing, 1),
                "mlflow_mib": round((Path(scratch) / "mlflow.db").stat().st_size / 2**20, 1),
            }
        opening, opened = reopen(folder) if options.quick else apart(reopen, folder)
        figures |= {"open_seconds": round(opening, 2), "reopened_rss_mib": round(opened)}
    row = {"workers": 64, "trials": options.trials, "ends": dict(found.ends), "memory": {"mib": memory}}
    return row, figures


def reopen(folder: Path) -> tuple[float, float]:
    """(seconds, MiB) of opening a study and reading its front."""
    started = time.perf_counter()
    Study.open(folder).front_record()
    return time.perf_counter() - started, rss_mib()


def mirror(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same study with and without MLflow, a trial ending every 117 ms, in real time."""
    taken: dict[bool, list[float]] = {}
    figures: dict[str, Any] = {}
    for mirrored in (False, True):
        with tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            at = new_study(options, Path(runs), options.mirror_trials, mirrored=mirrored)
            busy = Busy(at.mirror) if at.mirror is not None else None
            taken[mirrored] = _paced(at, options.mirror_trials)
            if at.mirror is not None and busy is not None:
                started = time.perf_counter()
                busy.drain()
                behind = time.perf_counter() - started
                values = sum(len(found) for row in at.study.trials for _, found in trial_metrics(row))
                figures = {
                    "mirror_ms_512": 1000 * busy.seconds / options.mirror_trials, "mirror_seconds_behind": behind,
                    "mlflow_values_per_second": values / busy.seconds, "mlflow_values_per_trial": values / options.mirror_trials,
                }  # fmt: skip
                at.mirror.finish(complete=False)
    figures |= {"driver_ms_alone": 1000 * median(taken[False]), "driver_ms_mirrored": 1000 * median(taken[True])}
    return {"trials": options.mirror_trials}, {name: round(value, 2) for name, value in figures.items()}


def _paced(at: Setting, trials: int) -> list[float]:
    """The driver's seconds of each trial, when one ends every `END_EVERY` seconds and the next is asked for at once."""
    taken, due = [], time.monotonic()
    for _ in range(trials):
        started = time.perf_counter()
        candidate = at.driver.ask()
        asked = time.perf_counter() - started
        if candidate is None:
            break
        result = at.make(candidate)
        due = max(due + END_EVERY, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        started = time.perf_counter()
        at.driver.settle(candidate.number, result)
        taken.append(asked + time.perf_counter() - started)
    return taken


if __name__ == "__main__":
    main()
