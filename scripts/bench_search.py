"""What the search is worth: around the allocation against plain Optuna, against the solver alone, and what it costs the driver.

Trials are the same for all: plan, decomposition, BN re-estimation, a few steps on the factors, validation accuracy; one training seed per
study seed, so that equal plans score alike. Hypervolume in (accuracy, MACs as a ratio of dense) against reference 0 and 1.

1. Fronts from `--front-from` of the dense MACs up to the dense net, no budget. `allocated` + TPE (32 trials); `sweep`: the solver's
   uncorrected optimum at 32 evenly spaced levels, which is what allocation gives without a search; `direct` (lowering and rank ratio per
   layer) + TPE, + TPE opened with the same first points, + NSGA-II, random (64 each). As a control, `allocated_motpe`: Optuna's own
   TPE over the same parameters and both objectives.
2. The best net within 50 % of the FLOPs after 16 trials with the recipe searched too, against the solver's plan under the default recipe
   (which is the study's first trial), by validation accuracy.
3. What early stopping saves, and what it costs: a front within 50 % of the FLOPs with the recipe searched too, 24 trials.
4. Every plan of 2. and 3., and of studies under two budgets at once (simulated trials), against its budgets.
5. Two runs of one seed.
6. The driver's own time per trial (ask, tell, progress) as a study grows: simulated trials, eight at once.
   What MLflow adds: `bench_mlflow.py`.

    python scripts/bench_search.py --json > search.json           about an hour on two cores
    python scripts/bench_search.py --model resnet32 --seeds 1     another net
    python scripts/bench_search.py --task digits --model resnet8  other data (trains its dense net once)
    python scripts/bench_search.py --quick                        digits, one seed, within a minute

Trials are kept in `--out` and are not run twice. The public checkpoints have seen the validation images: their accuracies rank plans.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from report import Report, arguments

from ranksearch.allocate import parse_budget
from ranksearch.compress import RankPlan, dense_cost, plan_cost
from ranksearch.console import Terminal
from ranksearch.front.row import Row
from ranksearch.pareto import hypervolume
from ranksearch.places.files import write_atomically
from ranksearch.search.allocated import Allocated
from ranksearch.search.opening import CLASSICS, SOLVER
from ranksearch.search.parametrize import Opening
from ranksearch.search.samplers import plain_sampler
from ranksearch.search.workbench import Workbench, prepare
from ranksearch.space.reading import parse_space
from ranksearch.space.space import Space
from ranksearch.study.driver import run_inline
from ranksearch.study.study import Study
from ranksearch.training.evaluate import evaluate
from ranksearch.trial.attempt import attempt
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.result import TrialResult

FRONT_TRIALS = {
    "allocated_tpe": 32, "sweep": 32, "allocated_motpe": 32,
    "direct_tpe": 64, "direct_warm_tpe": 64, "direct_nsga2": 64, "random": 64,
}  # fmt: skip
"""Method -> trials of its study."""
PARTS = ("fronts", "best", "stopping", "driver")
COUNTS = (8, 16, 32)
BEST_TRIALS = 16
AT_ONCE = 8
"""Simulated trials that run beside each other."""
WINDOW = 50
"""Trials around a number over which the driver's time is the median."""

Score = Callable[[Candidate], TrialResult]


def main() -> None:
    options = parse()
    report = Report("bench_search", options)
    out = options.out / f"{options.task}-{options.model}{'-quick' if options.quick else ''}"
    out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(options.seed, options.seed + options.seeds))
    # a trial's arithmetic, and so its score, depends on its threads: one each, whatever the number of studies beside each other
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    jobs: list[tuple[Any, ...]] = []
    if "fronts" in options.only:
        jobs += [
            (front_study, method, seed)
            for seed in seeds
            for method in FRONT_TRIALS
            if method in options.methods.split(",")
        ]
    if "best" in options.only:
        jobs += [(best_study, "best", seed) for seed in seeds]
    if "stopping" in options.only:
        jobs += [(stopping_study, method, seed) for seed in seeds for method in ("stopping", "no_stopping")]
    rows: dict[str, dict[int, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(options.threads, _one_thread) as pool:
        for method, seed, found in pool.imap_unordered(partial(_do, options, out), jobs):
            rows.setdefault(method, {})[seed] = found
            report.say(f"{method}, seed {seed}: {found['summary']}")
    for method in rows:
        for seed in sorted(rows[method]):
            report.rows.append({"method": method, "seed": seed, **rows[method][seed]["row"]})
    kept = [share for found in rows.values() for one in found.values() for share in one["within_budget"]]
    if "fronts" in options.only:
        figures |= front_figures(rows)
    if "best" in options.only:
        figures |= best_figures(rows["best"])
    if "stopping" in options.only:
        figures |= stopping_figures(rows)
    if "driver" in options.only:
        figures |= driver_figures(options, out, report, kept)
    if options.figure is not None and "fronts" in options.only:
        draw(report.rows, f"{options.task}/{options.model}, {len(seeds)} seeds", options.figure)
    figures["within_budget"] = float(np.mean(kept)) if kept else None
    report.finish(figures, [f"trials are in {out}"], seeds=seeds)


def parse() -> argparse.Namespace:
    parser = arguments(
        __doc__, task="cifar10", model="resnet20", seeds=3, steps=10, front_from=0.1, validation=1000, budget="50%"
    )
    parser.add_argument("--lowerings", default="im2col,channel,spatial", help="default: %(default)s")
    parser.add_argument("--methods", default=",".join(FRONT_TRIALS), help="of the fronts (default: all)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure (default: %(default)s)")
    parser.add_argument("--driver-trials", type=int, default=5000, help="simulated trials (default: %(default)s)")
    parser.add_argument("--data", help="data folder (default: $RANKSEARCH_DATA, else ~/.cache/ranksearch)")
    parser.add_argument("--figure", type=Path, help="PNG of hypervolume against trials")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_search"), help="trials (default: %(default)s)")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    if options.quick:
        options.task, options.model, options.seeds, options.validation = "digits", "resnet8", 1, 360
        options.steps, options.driver_trials = 4, 110
    return options


def _one_thread() -> None:
    torch.set_num_threads(1)


# Spaces and trials -------------------------------------------------------------------------------------------------


def space_of(
    options: argparse.Namespace,
    name: str,
    seed: int,
    search: dict[str, Any],
    recipe: dict[str, Any] | None = None,
    budgets: dict[str, str] | None = None,
) -> Space:
    """The bench's space; the linear layer stays dense, the recipe is fixed unless `recipe` says otherwise."""
    fixed = {"steps": options.steps, "factor_share": 1.0, "lr": 0.01, "bn_batches": 3}
    return parse_space(
        {
            "name": name, "task": options.task, "model": options.model, "validation": options.validation, "data": options.data,
            "layers": {"lowerings": options.lowerings.split(","), "exclude": ["linear"]},
            "budgets": budgets or {},
            "recipe": fixed if recipe is None else recipe,
            "search": {"seed": seed, "front_from": options.front_from, "objectives": ["accuracy", "macs"]} | search,
        },
        "bench_search",
    )  # fmt: skip


def scorer(bench: Workbench, out: Path, seed: int) -> Score:
    """Runs candidates with the study's training seed, each plan and recipe once."""

    def score(candidate: Candidate) -> TrialResult:
        key = [
            bench.task.model_name,
            len(bench.task.val),
            candidate.plan.digest(),
            candidate.recipe.to_dict(),
            seed,
            torch.__version__,
        ]
        file = out / "trials" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
        if not file.is_file():
            alone = replace(candidate, seed=seed)
            result = attempt(
                bench.task, bench.dense, bench.net, alone, report=lambda entry: None, checkpoint_seconds=1e9
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(result.to_dict()))
        return replace(TrialResult(**json.loads(file.read_text())), seed=candidate.seed)

    return score


def simulated(bench: Workbench, candidate: Candidate) -> TrialResult:
    """What a trial might return, in no time: more accurate where it costs more, and where the predicted damage is lower."""
    cost, full = plan_cost(bench.net, candidate.plan), dense_cost(bench.net).macs
    noise = np.random.default_rng(candidate.seed).normal()
    accuracy = float(np.clip(100 * (cost.macs / full) ** 0.15 - 2 + noise, 1, 100))
    return TrialResult(
        "complete", candidate.seed, 1.0, val_accuracy=accuracy, val_loss=1.0, macs=cost.macs, params=cost.params,
        size_bytes=cost.size_bytes, seconds=60.0,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _workbench(
    task: str, model: str, lowerings: str, validation: int, data: str | None, front_from: float, seed: int, out: str
) -> Workbench:
    options = argparse.Namespace(
        task=task, model=model, lowerings=lowerings, validation=validation, data=data, steps=1, front_from=front_from
    )
    return prepare(space_of(options, "bench", seed, {}), fallback=Path(out) / "dense", log=lambda text: None)


def workbench(options: argparse.Namespace, out: Path, seed: int) -> Workbench:
    """Data, dense net, curves and sensitivities of a seed, kept for the next study of this process."""
    return _workbench(
        options.task,
        options.model,
        options.lowerings,
        options.validation,
        options.data,
        options.front_from,
        seed,
        str(out),
    )


@lru_cache(maxsize=1)
def dense_accuracy(bench: Workbench) -> float:
    """Validation accuracy of the dense net in percent."""
    return evaluate(bench.dense_model(), bench.task.val, bench.task).accuracy


def run(study: Study, bench: Workbench, score: Score) -> list[Row]:
    """The study's trials one after the other; its rows."""
    while (candidate := study.ask(bench)) is not None:
        study.tell(candidate.number, score(candidate))
    return study.trials


def within(bench: Workbench, rows: list[Row], budgets: dict[str, str]) -> list[float]:
    """1 for every row whose plan, counted anew from its shapes, keeps every budget, else 0."""
    dense, parsed = dense_cost(bench.net), [parse_budget(cost, text) for cost, text in budgets.items()]
    costs = [plan_cost(bench.net, RankPlan.from_dict(row["plan"])) for row in rows]
    return [float(all(budget.allows(cost, dense) for budget in parsed)) for cost in costs]


def _do(options: argparse.Namespace, out: Path, job: tuple[Any, ...]) -> tuple[str, int, dict[str, Any]]:
    work, method, seed = job
    return method, seed, work(options, out, method, seed)


# 1. Fronts ---------------------------------------------------------------------------------------------------------


def front_study(options: argparse.Namespace, out: Path, method: str, seed: int) -> dict[str, Any]:
    """A study of one method; hypervolumes after some of its trials, and every point of it."""
    trials = FRONT_TRIALS[method]
    search: dict[str, Any] = {"trials": trials}
    if method.startswith("direct") or method == "random":
        warm = list(CLASSICS) if method == "direct_warm_tpe" else []
        sampler = "random" if method == "random" else method.rsplit("_", 1)[1]
        search |= {"parametrization": "direct", "sampler": sampler, "first_points": warm}
    elif method == "sweep":
        search |= {"first_points": []}
    space, bench = space_of(options, f"{method}-{seed}", seed, search), workbench(options, out, seed)
    with tempfile.TemporaryDirectory() as runs:
        study = Study.create(Path(runs), space, bench, dense_accuracy(bench))
        if method == "sweep":
            enqueue_sweep(study, space, bench)
        if method == "allocated_motpe":
            study.use_sampler(plain_sampler("tpe", trials=trials, seed=seed), bench)
        rows = run(study, bench, scorer(bench, out, seed))
    full = dense_cost(bench.net).macs
    points = [(row["val_accuracy"], row["macs"] / full) for row in rows]
    found = {f"hv_{n}": _hypervolume(points[:n]) for n in (*COUNTS, 64) if n <= trials}
    summary = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    return {"row": {**found, "points": {"accuracy, macs ratio": points}}, "summary": summary, "within_budget": []}


def enqueue_sweep(study: Study, space: Space, bench: Workbench) -> None:
    """The uncorrected optimum at evenly spaced levels from the lowest up to, but without, the dense net itself."""
    form = Allocated(space, bench.curves, bench.damage)
    for level in np.linspace(space.search.front_from, 1, space.search.trials + 1)[:-1]:
        study.enqueue(Opening(form.neutral(float(level)), SOLVER))


def _hypervolume(points: list[tuple[float, float]]) -> float:
    return hypervolume([[1 - accuracy / 100, ratio] for accuracy, ratio in points], [1.0, 1.0])


def front_figures(rows: dict[str, dict[int, Any]]) -> dict[str, Any]:
    def of(method: str, count: int) -> dict[int, float]:
        return {seed: found["row"][f"hv_{count}"] for seed, found in rows[method].items()}

    figures: dict[str, Any] = {}
    for method, trials in FRONT_TRIALS.items():
        for count in COUNTS if method == "allocated_tpe" else (trials,):
            figures[f"hv_{method}_{count}"] = median(of(method, count).values()) if method in rows else None
    for name, method, count in (("sweep", "sweep", 32), ("direct_warm", "direct_warm_tpe", 64)):
        if method in rows and "allocated_tpe" in rows:
            ours = of("allocated_tpe", 32)
            figures[f"seeds_above_{name}"] = sum(ours[seed] > value for seed, value in of(method, count).items())
    return figures


STYLES = {
    "allocated_tpe": ("#0072B2", "-"), "sweep": ("#000000", "--"), "allocated_motpe": ("#56B4E9", "-."),
    "direct_warm_tpe": ("#D55E00", "-"), "direct_tpe": ("#E69F00", "-"), "direct_nsga2": ("#CC79A7", "--"), "random": ("#999999", ":"),
}  # fmt: skip
"""Method -> colour (Okabe & Ito's) and line."""


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Hypervolume after every trial, by method: median of the seeds, from least to most shaded."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), dpi=130, layout="constrained")
    for method, (colour, line) in STYLES.items():
        studies = [row["points"]["accuracy, macs ratio"] for row in rows if row["method"] == method and "points" in row]
        if studies:
            count = min(map(len, studies))
            curves = np.array([[_hypervolume(points[: n + 1]) for n in range(count)] for points in studies])
            numbers = np.arange(1, count + 1)
            axes.plot(
                numbers, np.median(curves, axis=0), color=colour, linestyle=line, label=f"{method}, {count} trials"
            )
            axes.fill_between(numbers, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="trials", ylabel="hypervolume (accuracy, MACs ratio; reference 0, 1)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)
    plt.close(figure)


# 2. One budget, recipe searched too --------------------------------------------------------------------------------

SEARCHED_RECIPE = {
    "lr": {"low": 0.002, "high": 0.1, "log": True, "default": 0.02},
    "factor_share": {"low": 0.0, "high": 1.0, "default": 0.5},
    "distillation": {"weight": {"low": 0.0, "high": 0.95, "default": 0.0}},
    "projection": {"period": {"low": 2, "high": 20, "log": True, "default": 20}},
}
"""Around the schema's own defaults, which the first points take."""


def best_study(options: argparse.Namespace, out: Path, method: str, seed: int) -> dict[str, Any]:
    """The best of a study for accuracy alone, and its first trial: the solver's plan under the default recipe."""
    recipe = {"steps": 3 * options.steps, "bn_batches": 3} | SEARCHED_RECIPE
    search = {"trials": BEST_TRIALS, "objectives": ["accuracy"]}
    budgets = {"flops": options.budget}
    space = space_of(options, f"best-{seed}", seed, search, recipe, budgets)
    bench = workbench(options, out, seed)
    with tempfile.TemporaryDirectory() as runs:
        study = Study.create(Path(runs), space, bench, dense_accuracy(bench))
        rows = run(study, bench, scorer(bench, out, seed))
        first, best = rows[0], study.best()
    assert first["allocator"] == SOLVER
    row = {
        "best": best["val_accuracy"], "solver_default": first["val_accuracy"], "best_trial": best["trial"],
        "chosen_by": best["allocator"], "macs_ratio": best["macs_ratio"], "searched": best["params_searched"],
    }  # fmt: skip
    summary = f"best {row['best']:.2f} (trial {row['best_trial']}), solver under the default recipe {row['solver_default']:.2f}"
    return {"row": row, "summary": summary, "within_budget": within(bench, rows, budgets)}


def best_figures(found: dict[int, Any]) -> dict[str, Any]:
    rows = [one["row"] for one in found.values()]
    return {
        "best_16": median(row["best"] for row in rows),
        "solver_default": median(row["solver_default"] for row in rows),
        "seeds_above_default": sum(row["best"] > row["solver_default"] for row in rows),
    }


# 3. Early stopping -------------------------------------------------------------------------------------------------

STOPPING_TRIALS, QUICK_TRIALS = 24, 5


def stopping_study(options: argparse.Namespace, out: Path, method: str, seed: int) -> dict[str, Any]:
    """A front within a budget with the recipe searched too, with or without early stopping; trials are run anew, six times as long."""
    recipe = {"steps": 6 * options.steps, "bn_batches": 3} | SEARCHED_RECIPE
    search = {"trials": QUICK_TRIALS if options.quick else STOPPING_TRIALS, "front_from": 0.4} | (
        {"early_stopping": {}} if method == "stopping" else {}
    )
    budgets = {"flops": options.budget}
    space = space_of(options, f"{method}-{seed}", seed, search, recipe, budgets)
    bench = workbench(options, out, seed)
    with tempfile.TemporaryDirectory() as runs:
        study = Study.create(Path(runs), space, bench, dense_accuracy(bench))
        run_inline(study, bench, lambda row: None, lambda text: None)
        rows, saved, worth = study.trials, study.steps_saved, study.hypervolume
    best = max(row["val_accuracy"] for row in rows if row["status"] == "complete")
    row = {
        "hypervolume": worth, "steps_saved": saved, "stopped": sum(row["status"] == "stopped" for row in rows),
        "best": best, "trial_seconds": sum(row["seconds"] for row in rows),
    }  # fmt: skip
    summary = (
        f"hypervolume {worth:.4f}, best {best:.2f}, {row['stopped']} stopped, {100 * saved:.0f} % of the steps saved"
    )
    return {"row": row, "summary": summary, "within_budget": within(bench, rows, budgets)}


def stopping_figures(rows: dict[str, dict[int, Any]]) -> dict[str, Any]:
    def of(method: str, name: str) -> float:
        return median(found["row"][name] for found in rows[method].values())

    saved = 1 - of("stopping", "trial_seconds") / of("no_stopping", "trial_seconds")
    return {
        "hv_stopping": of("stopping", "hypervolume"),
        "hv_no_stopping": of("no_stopping", "hypervolume"),
        "stopping_steps_saved": of("stopping", "steps_saved"),
        "stopping_time_saved": saved,
    }


# 4. to 6. Budgets, seeds, the driver's time ------------------------------------------------------------------------

TWO_BUDGETS = {"macs": "45%", "params": "40%"}


def driver_figures(options: argparse.Namespace, out: Path, report: Report, kept: list[float]) -> dict[str, Any]:
    bench = workbench(options, out, options.seed)
    for form in ("allocated", "direct"):
        rows = simulate(options, bench, {"parametrization": form}, 20 if options.quick else 60, budgets=TWO_BUDGETS)[0]
        kept += within(bench, rows, TWO_BUDGETS)
    twice = [simulate(options, bench, {}, 15 if options.quick else 40, at_once=1)[0] for _ in range(2)]
    same = [row["plan"] for row in twice[0]] == [row["plan"] for row in twice[1]]
    report.say(
        f"budgets kept by {sum(kept):.0f} of {len(kept)} plans; two runs of one seed give the same plans: {same}"
    )
    _, times = simulate(options, bench, {}, options.driver_trials, at_once=AT_ONCE)
    found = {f"driver_ms_{n}": _around(times, n) for n in (100, 1000, 5000)}
    report.say(f"driver: {found}, {sum(times):.0f} s in all")
    return {"same_seed_same_plans": float(same), **found}


def _around(times: list[float], number: int) -> float | None:
    """Median milliseconds of the trials around a number; None where the study was shorter."""
    part = times[max(0, number - WINDOW) : number + WINDOW]
    return round(1000 * median(part), 3) if len(times) >= number else None


def simulate(
    options: argparse.Namespace,
    bench: Workbench,
    search: dict[str, Any],
    trials: int,
    *,
    budgets: dict[str, str] | None = None,
    at_once: int = 1,
) -> tuple[list[Row], list[float]]:
    """Rows of a study of simulated trials, and the driver's seconds for each: its ask, its tell, its line of progress."""  # fmt: skip
    space = space_of(options, "simulated", options.seed, {"trials": trials} | search, None, budgets or {})
    times: list[float] = []
    with tempfile.TemporaryDirectory() as runs, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        study, terminal, running = (
            Study.create(Path(runs), space, bench, dense_accuracy(bench)),
            Terminal(),
            deque[tuple[Candidate, float]](),
        )
        terminal.start(study)
        while True:
            started = time.perf_counter()
            candidate = study.ask(bench) if len(running) < at_once else None
            spent = time.perf_counter() - started
            if candidate is not None:
                running.append((candidate, spent))
            elif running:
                oldest, asking = running.popleft()
                result = simulated(bench, oldest)
                started = time.perf_counter()
                terminal.row(study, study.tell(oldest.number, result))
                times.append(asking + time.perf_counter() - started)
            else:
                return study.trials, times


if __name__ == "__main__":
    main()
