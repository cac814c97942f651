"""What Ray Tune's own loop takes per trial: empty trials on a Ray of this machine, through the searcher and settings of real studies."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path
from statistics import median
from typing import Any

from ranksearch.places.net_files import PLAN, WEIGHTS

MARKS = (100, 200, 500, 1000, 2000, 4000, 10_000)
WINDOW = 50


def _empty(config: dict[str, Any], shared: Any, terms: Any, result: str) -> None:
    """In a trial's place: leaves an empty net, reports a result as large as a real one's, with an accuracy of its own."""
    from ray import tune as ray_tune

    from ranksearch.cluster.shared import here
    from ranksearch.cluster.worker import candidate_of, message
    from ranksearch.trial.placement import Placement

    candidate = candidate_of(config)
    folder = Path(str(candidate.save_to))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PLAN, WEIGHTS):
        (folder / name).write_text("{}")
    found = json.loads(result) | {"seed": candidate.seed}
    found["val_accuracy"] = random.Random(candidate.seed).uniform(80, 99)
    ray_tune.report(message(Placement(**vars(here())), result=found))


def tune(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the study; CPU time of the loop's thread per trial, without what the study's own ask and tell took."""
    import ray
    from simulated_trials import new_study, rss_mib

    from ranksearch.cluster import tune as ours
    from ranksearch.study.driver import Driver

    trials = options.tune_trials
    with tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        at = new_study(options, Path(runs), trials, mirrored=False)
        candidate = at.study.ask(at.bench)
        assert candidate is not None
        text = json.dumps(at.make(candidate).to_dict())
        at.study.requeue_interrupted()
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this folder
        ours.trial = lambda config, shared, terms: _empty(config, shared, terms, text)
        study_cpu, loop_cpu, walls, memory = [0.0], [0.0], [time.perf_counter()], {}

        class Timed(Driver):
            def ask(self) -> Any:
                return _timed(study_cpu, super().ask)

            def settle(self, number: int, result: Any, node: str | None = None) -> None:
                _timed(study_cpu, lambda: super(Timed, self).settle(number, result, node))
                ended = len(loop_cpu)
                loop_cpu.append(time.thread_time() - study_cpu[0])
                walls.append(time.perf_counter())
                if ended in MARKS or ended == trials:
                    memory[ended] = rss_mib()
                    spent = 1000 * (loop_cpu[-1] - loop_cpu[-2 * WINDOW]) / (2 * WINDOW)
                    print(
                        f"{ended} trials, {memory[ended]:.0f} MiB, {spent:.1f} ms each", file=sys.__stderr__, flush=True
                    )

        ours.Driver = Timed  # type: ignore[misc]
        ours.run_on_ray(at.study, at.bench, lambda row: None, lambda text: None, address=None)
        folder = sum(file.stat().st_size for file in (at.study.folder / "ray").rglob("*") if file.is_file())
    per_trial = [1000 * (b - a) for a, b in itertools.pairwise(loop_cpu)]
    around = {n: per_trial[max(0, n - 2 * WINDOW) : n] for n in MARKS if n <= trials}
    figures: dict[str, Any] = {f"tune_ms_{n}": round(sum(part) / len(part), 2) for n, part in around.items()}
    figures |= {f"tune_ms_median_{n}": round(median(part), 2) for n, part in around.items()}
    figures |= {f"tune_rss_mib_{n}": round(mib) for n, mib in memory.items()}
    figures["tune_trials_per_second"] = round((trials - 100) / (walls[-1] - walls[100]), 2) if trials > 200 else None
    figures["tune_folder_mib"] = round(folder / 2**20, 1)
    return {"trials": trials}, figures


def _timed(total: list[float], action: Any) -> Any:
    started = time.thread_time()
    try:
        return action()
    finally:
        total[0] += time.thread_time() - started
