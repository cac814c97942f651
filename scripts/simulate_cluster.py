"""The driver at scale: the real study, ledger, journal and MLflow mirror, driven by simulated workers. Nothing is trained.

Time is virtual: a worker takes a trial's seconds (60 ± 30 %, 1 % lost with their worker, 1 % diverged: `simulated_trials.py`), and the
driver, which does one thing after the other, what it was measured to take for this very trial (CPU time of its thread and waiting for the
disk, so that other work on the machine does not count), plus `--tune-ms` for what Ray Tune takes beside it (part `tune`). A worker whose
trial ended waits until the driver has settled it and asked for the next.

    python scripts/simulate_cluster.py --json           about half an hour on two cores
    python scripts/simulate_cluster.py --only driven --driven-trials 2000 --profile
    python scripts/simulate_cluster.py --quick          within a minute: ResNet-8, 8 and 64 at once, a study of 250, no Tune

Parts, each in a process of its own (but under --quick):
workers   8, 64 and 512 at once, `--waves` trials a worker (at least 300).
    idle_share_N            of the workers' time from the start until the last trial is given out, what they waited for the driver
    idle_share_later_N      the same without the wait for their first trial, which a long study forgets
grown     a study of 150 driven trials, grown by copies of them in its journal to 1,000, 5,000 and `--trials`; there it is opened, as
          `ranksearch front` and `resume` do, and a hundred trials are driven, 64 at once.
    driver_ms_N, suggest_ms_N   median of ask + tell + progress, and of ask alone, of the 100 trials around N
    driver_rss_mib_N, driver_rss_mib_max, journal_mib_N, open_seconds_N
driven    one study of `--driven-trials`, every trial driven, 64 at once, mirrored in MLflow (SQLite); the mirror catches up off the clock.
    optuna_writes_per_trial (lines), optuna_syncs_per_trial, mirror_ms, mlflow_mib, driven_ms_N and driven_rss_mib_N as above
    finish_seconds          the mirror's last call: what was missed, figures, report (no nets: simulated trials have none)
mirror    what MLflow's thread takes from a driver whose trials end as fast as 512 workers end them, every 117 ms of real time:
    driver_ms_mirrored, driver_ms_alone, mirror_ms, mlflow_values_per_second (of the thread's busy time)
tune      `--tune-trials` empty trials on a Ray of this machine, through the searcher that real studies use:
    tune_ms_N               CPU time of Tune's own loop per trial of the 100 before N, without the study's ask and tell
    tune_rss_mib_N          memory of the driver's process after N
"""

from __future__ import annotations

import argparse
import cProfile
import heapq
import os
import pstats
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
from grown_studies import MARKS, grown
from report import Report, arguments
from simulated_trials import RESTART_SECONDS, Clock, Fate, Setting, bytes_of, diverged, new_study, rss_mib

from ranksearch.tracking.runs import trial_metrics
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.result import TrialResult

PARTS = ("workers", "grown", "driven", "mirror", "tune")
WORKERS = (8, 64, 512)
FEWEST = 300
WINDOW = 50
"""Trials on either side of a number over which a time is the median."""
END_EVERY = 0.117
"""Seconds between two ends of trials of a minute on 512 workers."""


def main() -> None:
    parser = arguments(
        __doc__, trials=10_000, driven_trials=1000, waves=4, tune_trials=2000, tune_ms=10.0, mirror_trials=300
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="print where the driver's time goes, on stderr")
    parser.add_argument("--no-mirror", action="store_true", help="leave MLflow out of the part driven")
    options = parser.parse_args()
    options.only, options.workers = options.only.split(","), WORKERS
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    if options.quick:
        options.trials, options.driven_trials, options.waves, options.workers, options.mirror_trials = (
            1000,
            120,
            1,
            WORKERS[:2],
            30,
        )
        options.only = [part for part in options.only if part != "tune"]
    report, figures = Report("simulate_cluster", options), {}
    parts = {"grown": grown, "driven": grow, "mirror": mirror, "tune": tune}
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
    starting: float = 0.0
    """The part of these seconds that was the wait for a worker's first trial."""
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
            found.starting += now if order <= workers else 0.0
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


# The parts ----------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`workers` at once."""
    trials = max(FEWEST // (3 if options.quick else 1), options.waves * workers)
    with tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        at = new_study(options, Path(runs), trials, mirrored=False)
        found = drive(at, Clock(), at.make, workers=workers, tune_seconds=options.tune_ms / 1000)
    share = found.idle / (workers * found.until)
    later = (found.idle - found.starting) / (workers * found.until - found.starting)
    both = [a + b for a, b in zip(found.asked, found.told, strict=True)]
    row = {
        "workers": workers, "trials": trials, "driver_ms": 1000 * median(both), "virtual_seconds": found.until,
        "driver_busy_share": (sum(both) + trials * options.tune_ms / 1000) / found.until, "ends": dict(found.ends),
    }  # fmt: skip
    return row, {f"idle_share_{workers}": round(share, 5), f"idle_share_later_{workers}": round(later, 5)}


def grow(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """One long study."""
    memory: dict[int, float] = {}
    sizes: list[int] = []
    profile = cProfile.Profile() if options.profile else None
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere:
        with redirect_stderr(nowhere):
            at = new_study(options, Path(scratch), options.driven_trials, mirrored=not options.no_mirror)
            clock, busy = Clock(profile), Busy(at.mirror) if at.mirror is not None else None
            marks = {min(mark, options.driven_trials) for mark in MARKS}

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
            finishing, memory[options.driven_trials] = time.perf_counter() - started, rss_mib()
        if profile is not None:
            pstats.Stats(profile, stream=sys.__stderr__).sort_stats("cumulative").print_stats(60)
        lines = (at.study.folder / "optuna.journal").read_bytes()
        figures = {f"driven_ms_{n}": found.driver_ms(n) for n in MARKS if n <= options.driven_trials}
        figures |= {f"driven_rss_mib_{n}": round(memory[n]) for n in sorted(memory) if n in MARKS}
        figures |= {
            "driver_rss_mib_max": round(max(memory.values())), "journal_mib": round(len(lines) / 2**20, 1),
            "optuna_writes_per_trial": round(lines.count(b"\n") / options.driven_trials, 2),
            "optuna_syncs_per_trial": round(len(clock.waits) / options.driven_trials, 2),
            "result_bytes": sizes[0],
        }  # fmt: skip
        if busy is not None:
            figures |= {
                "mirror_ms": round(1000 * busy.seconds / options.driven_trials, 1),
                "finish_seconds": round(finishing, 1),
                "mlflow_mib": round((Path(scratch) / "mlflow.db").stat().st_size / 2**20, 1),
            }
    row = {"workers": 64, "trials": options.driven_trials, "ends": dict(found.ends), "memory": {"mib": memory}}
    return row, figures


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
                values = sum(len(found) for row in at.study.trials for _, found in trial_metrics(row, at.study.metric))
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
