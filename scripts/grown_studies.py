"""What the driver takes in a study that has thousands of trials already: a driven one, grown by copies of its own trials in its journal."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections import deque
from contextlib import redirect_stderr
from pathlib import Path
from statistics import median
from typing import Any

from optuna.storages.journal._storage import JournalOperation as Op
from optuna.trial import TrialState
from simulated_trials import Clock, Setting, follow, new_study, rss_mib

from ranksearch.study.study import Study

MARKS = (100, 1000, 5000, 10_000)
AROUND, WORKERS = 50, 64


def grown(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """At every mark: the study is opened in its folder, and a hundred trials are driven, 64 at once."""
    marks = [mark for mark in MARKS if mark <= options.trials]
    figures: dict[str, Any] = {}
    clock, rng = Clock(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        at = new_study(options, Path(runs), marks[-1] + 2 * AROUND + WORKERS, mirrored=False)
        folder, study = at.study.folder, at.study
        for mark in marks:
            if mark > MARKS[0]:
                copy_trials(folder / "optuna.journal", mark - AROUND, rng)
                # the study is forgotten before it is read again
                bench, study, at = at.bench, None, None  # type: ignore[assignment]
                gc.collect()
                started = time.perf_counter(), time.process_time()
                study = Study.open(folder)
                study.front_record()
                figures[f"open_seconds_{mark}"] = round(time.perf_counter() - started[0], 2)
                figures[f"open_cpu_seconds_{mark}"] = round(time.process_time() - started[1], 2)
                at = follow(study, bench, rng)
            asked, told = steady(at, clock, (0 if mark > MARKS[0] else MARKS[0] - AROUND) + 2 * AROUND)
            both = [a + b for a, b in zip(asked, told, strict=True)][-2 * AROUND :]
            figures[f"driver_ms_{mark}"] = round(1000 * median(both), 2)
            figures[f"suggest_ms_{mark}"] = round(1000 * median(asked[-2 * AROUND :]), 2)
            figures[f"driver_rss_mib_{mark}"] = round(rss_mib())
            print(f"{mark}: {figures}", file=sys.__stderr__, flush=True)
            figures[f"journal_mib_{mark}"] = round((folder / "optuna.journal").stat().st_size / 2**20, 1)
    figures["driver_rss_mib_max"] = max(value for name, value in figures.items() if name.startswith("driver_rss"))
    figures["sync_ms"] = round(1000 * median(clock.waits), 2)
    return {"trials": marks[-1]}, figures


def steady(at: Setting, clock: Clock, count: int) -> tuple[list[float], list[float]]:
    """Seconds of ask and of settling of `count` trials, with others running beside them; those end off the clock."""
    running, asked, told = deque[tuple[Any, float]](), [], []
    while len(told) < count:
        while len(running) < WORKERS:
            running.append(clock(at.driver.ask))
        candidate, spent = running.popleft()
        asked.append(spent)
        told.append(clock(at.driver.settle, candidate.number, at.make(candidate))[1])
    for candidate, _ in running:
        at.driver.settle(candidate.number, at.make(candidate))
    return asked, told


def copy_trials(journal: Path, until: int, rng: random.Random) -> None:
    """Appends trials up to that number, each the lines of a complete one with other parameters, metric, seed and key."""
    logs, by_trial, made = [json.loads(line) for line in journal.read_text().splitlines()], dict[int, list[Any]](), 0
    for log in logs:
        if log["op_code"] == Op.CREATE_TRIAL:
            made, log = made + 1, {**log, "trial_id": made}
        if "trial_id" in log:
            by_trial.setdefault(log["trial_id"], []).append(log)
    whole = [
        lines for lines in by_trial.values()
        if "state" not in lines[0] and lines[-1].get("state") == TrialState.COMPLETE and len(lines) > 3
    ]  # fmt: skip
    with open(journal, "a") as file:
        for number in range(made, until):
            for log in _changed(whole[number % len(whole)], number, rng):
                file.write(json.dumps(log, separators=(",", ":")) + "\n")


def _changed(lines: list[Any], number: int, rng: random.Random) -> list[Any]:
    found: list[Any] = json.loads(json.dumps(lines))
    accuracy = min(99.9, lines[-1]["values"][0] + rng.gauss(0, 0.5))
    for log in found:
        log["trial_id"] = number
        if log["op_code"] == Op.SET_TRIAL_PARAM:
            kind = json.loads(log["distribution"])
            if kind["name"] == "FloatDistribution":
                low, high = kind["attributes"]["low"], kind["attributes"]["high"]
                value = log["param_value_internal"]
                inside = value not in (low, high)  # the level's end is where many trials are
                log["param_value_internal"] = min(high, max(low, value + inside * rng.gauss(0, 0.02) * (high - low)))
        elif "candidate" in log.get("user_attr", {}):
            log["user_attr"]["candidate"] |= {"key": f"copy {number}", "seed": number}
        elif "result" in log.get("user_attr", {}):
            log["user_attr"]["result"]["val_accuracy"] = accuracy
    del found[0]["trial_id"]
    found[-1]["values"][0] = accuracy
    return found
