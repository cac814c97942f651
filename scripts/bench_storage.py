"""What Optuna's storage costs the driver per trial: the journal, SQLite, and a database of yours.

python scripts/bench_storage.py [--url postgresql://user@host/database] [--trials 200] [--params 10] [--json] [--quick]

A trial is asked (quasi-random, in no time by itself), draws its parameters, gets a plan as an attribute (2 KB), then its result (4 KB), and
is told, as a study does it: the same calls, no training. The database is asked over the network, or on this machine, as the URL says; the
study is deleted afterwards.

ms_per_trial_{journal,sqlite,url}   median over the trials of the driver's time from ask to told
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from pathlib import Path
from statistics import median

import optuna
from report import Report, arguments

from ranksearch.store.journal import open_journal
from ranksearch.store.storage import open_storage

PLAN = {"plan": {"layers": {}}, "recipe": {"steps": 1}, "seed": 0, "key": "x" * 2000}
RESULT = {
    "status": "complete", "val_accuracy": 1.0, "macs": 1, "params": 1, "size_bytes": 4, "reason": "x" * 4000,
}  # fmt: skip


def main() -> None:
    options = arguments(__doc__, url="", trials=200, params=10).parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    report, trials = Report("bench_storage", options), 20 if options.quick else options.trials
    report.versions["optuna"] = optuna.__version__
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        storages = {"journal": lambda: open_journal(folder / "journal")}
        storages["sqlite"] = lambda: open_storage(f"sqlite:///{folder / 'optuna.db'}", folder)
        if options.url:
            storages["url"] = lambda: open_storage(options.url, folder)
        figures = {}
        for name, opened in storages.items():
            times = trial_times(opened(), trials, options.params, options.seed)
            figures[f"ms_per_trial_{name}"] = median(times)
            report.rows.append({"storage": name, "median ms": median(times), "largest ms": max(times), "n": trials})
            report.say(f"{name}: {median(times):.1f} ms")
    cores = os.getloadavg()
    report.finish(figures, [f"load average {cores[0]:.1f}"])


def trial_times(storage: optuna.storages.BaseStorage, trials: int, params: int, seed: int) -> list[float]:
    """Milliseconds of each trial, from ask to told; the study is gone afterwards."""
    study = optuna.create_study(
        storage=storage, study_name=f"bench-{uuid.uuid4().hex}", directions=["maximize", "minimize"],
        sampler=optuna.samplers.RandomSampler(seed=seed),
    )  # fmt: skip
    times = []
    for _ in range(trials):
        started = time.perf_counter()
        trial = study.ask()
        drawn = [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(params)]
        trial.set_user_attr("candidate", PLAN)
        found = study.get_trials(deepcopy=False)[trial.number]
        study._storage.set_trial_user_attr(found._trial_id, "result", RESULT)
        study.tell(trial.number, [sum(drawn), drawn[0]])
        times.append(1000 * (time.perf_counter() - started))
    study._storage.delete_study(study._study_id)
    return times


if __name__ == "__main__":
    main()
