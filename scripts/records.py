"""The two tables that ranksearch is measured by, on the real CIFAR-10, within ten minutes on one H100. Most important first.

  paper   ResNet-32 at the five ratios of Lee et al. 2019 (arXiv 1905.10145), dense / compressed parameters of the whole net: ours, the
          dense control, projection training of one Tucker-2 ratio for all convs, the same decomposed first and then trained
  haloc   ResNet-20 with 72.2 % of its MACs gone (HALOC, 2023: +0.07 there), and its dense control

All runs of a table begin with the same public checkpoint and share images, steps, batches and schedule; a run's net is that of its last
step, and its test accuracy is read once, of that net. Nothing is chosen by it, nor by those validation images that the checkpoint has seen:
`--choose` trains dense ResNets on the training images without a split of them, and takes the learning rate, the period and the distillation
one after the other by that split; the tables take what it wrote to `--out`, and say so. Without it they take the recipe of
`scripts/reproduce_paper.py`.

Several runs share a GPU (`--workers`), through CUDA MPS where it is available. Each row is printed as it is done (stderr, `rows.json`,
`table.md`). When `--minutes` are over the running ones write their state, and the same command goes on from there. With another number of
`--epochs` it is another table.

    python scripts/records.py --json --choose --out records       once, about four minutes on an H100 (not measured)
    python scripts/records.py --json --out records                the tables: `--epochs` is what should fit ten minutes there (not measured)
    python scripts/records.py --epochs 100 --minutes 120          nearer to the paper's length
    python scripts/records.py --device cpu --quick                whether it runs: digits, an untrained net
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import mean
from typing import Any

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parent), str(SCRIPT.parent.parent)]  # a source tree will do
if "cpu" in sys.argv[1:] and "--device" in sys.argv[1:]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
from report import Report, arguments  # noqa: E402
from reproduce_paper import OURS, OURS_LOWERINGS, PAPER, markdown, summarise  # noqa: E402
from reproduce_paper import figures as paper_figures  # noqa: E402
from training_runs import Bench, add_options, choose_device  # noqa: E402

from ranksearch.cluster.mps import new_folder, side_by_side  # noqa: E402
from ranksearch.compress import RankPlan, trace  # noqa: E402
from ranksearch.lowering import default_lowerings  # noqa: E402
from ranksearch.places.files import write_atomically  # noqa: E402
from ranksearch.space.recipe import RecipeSpace  # noqa: E402
from ranksearch.tasks import cifar10, digits, model_reference  # noqa: E402
from ranksearch.training.dense import dense_state  # noqa: E402
from ranksearch.trial.checkpoint import Leaving  # noqa: E402
from ranksearch.trial.recipe import Recipe, middle  # noqa: E402

HALOC, PUBLIC_RESNET20 = 0.722, 91.73
"""The share of MACs that is gone, and the test accuracy of the public ResNet-20."""
SHARED: dict[str, Any] = {"lr": 0.02, "period": 200, "weight": OURS["distillation"]["weight"]}
SHARED["temperature"] = OURS["distillation"]["temperature"]
AXES: dict[str, tuple[float, ...]] = {
    "lr": (0.02, 0.01, 0.05), "period": (200, 50), "weight": (0.7, 0.9), "temperature": (8.0, 4.0),
}  # fmt: skip
"""What `--choose` tries, one after the other, the first of each being what it starts from."""
CHOSEN_AT, CHOSEN_SPLIT = 4.28, 5000
CHOSEN = "chosen.json"
AHEAD_SECONDS = 20
"""So long before the time is over the runs write their state."""


@dataclass(frozen=True)
class Job:
    """One training: a row of a table, or of a choice."""

    label: dict[str, Any]
    model: str
    plan: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    test: bool


def main() -> None:
    parser = arguments(__doc__, epochs=9.0, minutes=10.0, batch_size=128)
    add_options(parser, out="runs/records")
    parser.set_defaults(seeds=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(PAPER["projection"]))
    parser.add_argument("--choose", action="store_true", help="choose the recipe by validation; no test image is read")
    parser.add_argument("--workers", type=int, help="runs at once (default: 4 on a GPU; 0 is this process, on a CPU)")
    options = parser.parse_args()
    options.until = time.time() + 60 * options.minutes - AHEAD_SECONDS
    if options.quick:
        options.epochs, options.batch_size, options.ratios, options.seeds = 0.2, 32, [4.28], 1
        options.out = options.out / "quick"
    choose_device(options.device)
    if options.workers is None:
        options.workers = 4 if torch.cuda.is_available() else 0
    report = Report("records", options)
    _BENCHES.clear()
    options.out.mkdir(parents=True, exist_ok=True)
    shared = torch.cuda.is_available() and options.workers > 1
    with side_by_side(new_folder()) if shared else nullcontext("nothing is shared") as reason:
        report.say(f"{options.workers or 1} at once, {'side by side through MPS' if reason is None else reason}")
        (chosen if options.choose else tables)(options, report)


# The tables ----------------------------------------------------------------------------------------------------------


def tables(options: argparse.Namespace, report: Report) -> None:
    settings, source = chosen_settings(options.out)
    jobs = planned(options, settings, report.say)
    notes = [f"recipe: {settings}, {source}", f"table: {options.out}/table.md"]
    started, left = time.time(), len(jobs)
    for job, row in done(jobs, options):
        left -= 1
        if row is None:
            notes.append(f"{job.label}, seed {job.seed}: the time was over; the same command goes on")
            continue
        report.rows.append(row)
        report.say(f"{told(row)}; {left} left, about {(time.time() - started) / len(report.rows) * left:.0f} s")
        write_atomically(options.out / "rows.json", json.dumps(report.rows, indent=1))
        write_atomically(options.out / "table.md", written(report, options, settings, source))
    if left:
        notes.append(f"{left} of {len(jobs)} runs were not begun: the same command goes on")
    if options.quick:
        notes.append("quick: digits and an untrained net, so accuracies say nothing")
    found = all_figures(report.rows, options) | {"runs": len(report.rows), "runs_planned": len(jobs)}
    report.finish(found, notes, seeds=range(options.seed, options.seed + options.seeds))


def planned(options: argparse.Namespace, settings: dict[str, Any], say: Callable[[str], None]) -> list[Job]:
    """All runs: ours and the dense controls of every seed, projection training, what is decomposed first."""
    if options.workers:
        torch.set_num_threads(os.cpu_count() or 1)  # nobody else computes yet
    paper, haloc = (
        (benches(model, options, say), name) for model, name in ((options.model, "paper"), ("resnet20", "haloc"))
    )
    lowerings = default_lowerings() if options.quick else OURS_LOWERINGS
    plain, ours = {"factor_share": 0.0}, ours_with(settings)
    rows: list[list[tuple[tuple[Bench, str], dict[str, Any], RankPlan, dict[str, Any]]]] = [[], [], []]
    for ratio in options.ratios:
        say(f"plans of {options.model} at 1/{ratio:g} of the parameters")
        uniform = kept_plan(options, paper[0], ratio, "uniform", ("tucker2",))
        own = kept_plan(options, paper[0], paper[0].ratio(uniform), "solver", lowerings)
        rows[0].append((paper, {"method": "ours", "target": ratio}, own, ours))
        rows[1].append((paper, {"method": "projection", "target": ratio}, uniform, plain))
        rows[2].append((paper, {"method": "decomposed", "target": ratio}, uniform, {"factor_share": 1.0}))
    gone = kept_plan(options, haloc[0], 1 / (1 - HALOC), "solver", lowerings, cost="macs")
    rows[0].append((haloc, {"method": "ours", "target": HALOC}, gone, ours))
    rows[0] += [(table, {"method": "dense"}, RankPlan(model=reference(table[0])), plain) for table in (haloc, paper)]
    return [
        Job({"table": name, **label}, bench.task.model_name or "", plan.to_dict(),
            recipe_of(bench, options, settings, changes), seed, test=True)
        for group in rows
        for seed in range(options.seed, options.seed + options.seeds)
        for (bench, name), label, plan, changes in group
    ]  # fmt: skip


def kept_plan(
    options: argparse.Namespace, bench: Bench, ratio: float, by: str, lowerings: tuple[str, ...], cost: str = "params"
) -> RankPlan:
    """The plan, read from disk where it is there: curves of `cp` take a minute."""
    name = f"{bench.task.model_name}-{bench.dense_digest[:8]}-{by}-{cost}-{ratio:.4f}-{'-'.join(lowerings)}.json"
    file = options.out / "plans" / name
    if not file.is_file():
        include = ("layer*",) if by == "uniform" else ("*",)
        found = bench.plan(by, ratio, lowerings, include=include, cost=cost)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(found.to_dict()))
    return RankPlan.from_dict(json.loads(file.read_text()))


def reference(bench: Bench) -> str:
    return model_reference(bench.task.name, bench.task.model_name)


def ours_with(settings: dict[str, Any]) -> dict[str, Any]:
    """What our recipe has beyond the table's."""
    distillation = {"weight": settings["weight"], "temperature": settings["temperature"]}
    return OURS | {"distillation": distillation}


def recipe_of(bench: Bench, options: argparse.Namespace, settings: dict[str, Any], changes: dict[str, Any]) -> Any:
    """A recipe: what the table shares, and `changes`."""
    shared = {"steps": bench.steps(options.epochs, options.batch_size), "batch_size": options.batch_size}
    shared |= {
        "calibration": "none",
        "factor_steps": "plain",
        "lr": settings["lr"],
        "projection": {"period": int(settings["period"])},
    }
    shared |= {"bn_batches": 2} if options.quick else {}
    return Recipe.settled(RecipeSpace(**(shared | changes)), middle).to_dict()


def all_figures(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Differences of means over seeds; against the printed figures only where three seeds or more of all images are complete."""
    by_table = {name: [row for row in rows if row["table"] == name] for name in ("paper", "haloc")}
    full = not options.quick and not options.subset and options.seeds >= 3 and options.model == "resnet32"
    enough = full and all(
        found["n"] >= options.seeds for key, found in summarise(by_table["paper"]).items() if key[0] == "ours"
    )
    result = paper_figures(by_table["paper"], options.ratios, full=enough) if by_table["paper"] else {}
    found = summarise(by_table["haloc"])
    dense, ours = (found.get(key, {}).get("test") for key in (("dense", None, None), ("ours", HALOC, None)))
    if ours is not None and not options.quick:
        result["resnet20_test"] = ours
        result["resnet20_minus_public"] = round(ours - PUBLIC_RESNET20, 3)
        if dense is not None:
            result["resnet20_minus_dense"] = round(ours - dense, 3)
    return result


def written(report: Report, options: argparse.Namespace, settings: dict[str, Any], source: str) -> str:
    """`table.md`, of what is known by now."""
    heading = (
        f"CIFAR-10, {options.epochs:g} epochs of batch {options.batch_size}, {settings} ({source}), seeds {options.seed}.."
        f"{options.seed + options.seeds - 1}; {report.device}, torch {report.versions['torch']}; {len(report.rows)} runs."
    )
    rows = [row for row in report.rows if row["table"] == "paper"]
    text = markdown(rows, options.ratios, heading, paper=options.model == "resnet32")
    for (method, _, _), found in summarise([row for row in report.rows if row["table"] == "haloc"]).items():
        test = "diverged" if found["test"] is None else f"{found['test']:.2f}"
        spread = f" ± {found['deviation']:.2f}" if found["deviation"] is not None else ""
        macs = "–" if found["macs"] is None else f"{100 * found['macs']:.1f}"
        text += f"\nResNet-20, {method}: {test}{spread} (n = {found['n']}), {macs} % of the MACs."
    return text + "\n"


def told(row: dict[str, Any]) -> str:
    label = {name: row[name] for name in ("table", "method", "target", "seed", "setting") if name in row}
    how = f"{row['images_per_second']:,.0f} images/s" if row.get("images_per_second") else row.get("reason")
    said = f"{label}: {row['status']}, validation {row.get('val_accuracy')}, test {row.get('test_accuracy')}, {how}"
    return said + (f"; step by step: {row['eager']}" if row.get("eager") else "")


# The choice ----------------------------------------------------------------------------------------------------------


def chosen_settings(out: Path) -> tuple[dict[str, Any], str]:
    """(settings, where they come from)."""
    if (out / CHOSEN).is_file():
        return json.loads((out / CHOSEN).read_text())["settings"], "chosen by validation of a net trained without it"
    return SHARED, "as in reproduce_paper, not chosen for this length"


def chosen(options: argparse.Namespace, report: Report) -> None:
    """Takes the settings one after the other, each at the best of those before, by mean validation accuracy over the seeds."""
    options.model, options.validation = "resnet20", options.validation if options.quick else CHOSEN_SPLIT
    bench = benches(options.model, options, report.say)
    lowerings = default_lowerings() if options.quick else OURS_LOWERINGS
    uniform = bench.plan("uniform", CHOSEN_AT, ("tucker2",), include=("layer*",))
    plan = kept_plan(options, bench, bench.ratio(uniform), "solver", lowerings)
    settings, seeds = dict(SHARED), range(options.seed, options.seed + options.seeds)
    axes = {"lr": AXES["lr"][:2]} if options.quick else AXES
    for axis, values in axes.items():
        tried: dict[float, list[float]] = {value: [] for value in values}
        jobs = [
            Job({"setting": axis, "value": value, **settings, axis: value}, options.model, plan.to_dict(),
                recipe_of(bench, options, settings | {axis: value}, ours_with(settings | {axis: value})), seed, test=False)
            for value in values
            for seed in seeds
        ]  # fmt: skip
        for job, row in done(jobs, options):
            if row is None:
                report.finish({}, ["the time was over: nothing is chosen yet, the same command goes on"], seeds=seeds)
                return
            report.rows.append(row)
            report.say(told(row))
            accuracy = row["val_accuracy"] if row["status"] == "complete" else 0.0
            tried[job.label["value"]].append(accuracy)
        settings[axis] = max(values, key=lambda value, tried=tried: mean(tried[value]))  # type: ignore[misc]
    record = {"settings": settings, "rows": report.rows, "device": report.device, "versions": report.versions}
    write_atomically(options.out / CHOSEN, json.dumps(record, indent=1))
    report.finish({f"chosen_{name}": value for name, value in settings.items()}, seeds=seeds)


# Runs ----------------------------------------------------------------------------------------------------------------


def done(jobs: Iterable[Job], options: argparse.Namespace) -> Iterator[tuple[Job, dict[str, Any] | None]]:
    """Jobs and their rows, in the order they end; None for a row that the time was over for. What is not begun then is left out."""
    if not options.workers:
        for job in jobs:
            if time.time() < options.until:
                yield job, run(job, options)
        return
    context, waiting = multiprocessing.get_context("spawn"), deque(jobs)
    busy: dict[Connection, Job] = {}
    workers = []
    for _ in range(min(options.workers, len(waiting))):
        here, there = context.Pipe()
        workers.append(context.Process(target=work, args=(there, options), daemon=True))
        workers[-1].start()
        there.close()
        busy[here] = waiting.popleft()
        here.send(busy[here])
    while busy:
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            job = busy.pop(pipe)
            try:
                row = pipe.recv()
            except EOFError:
                yield job, failed(job, "its process died")
                continue
            yield job, row
            if waiting and time.time() < options.until:
                busy[pipe] = waiting.popleft()
                pipe.send(busy[pipe])
            else:
                pipe.close()
    for process in workers:
        process.join()


def work(pipe: Connection, options: argparse.Namespace) -> None:
    """A process that runs one job after the other, until nobody sends any."""
    torch.set_num_threads(options.threads)
    try:
        while True:
            pipe.send(run(pipe.recv(), options))
    except EOFError:
        return


def run(job: Job, options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of a job; None where the time is over."""
    try:
        bench = benches(job.model, options)
        return bench.run(job.label, RankPlan.from_dict(job.plan), Recipe.from_dict(job.recipe), job.seed, test=job.test)
    except Leaving:
        return None
    except Exception as error:  # the other runs are worth their time all the same
        return failed(job, f"{type(error).__name__}: {error}")


def failed(job: Job, reason: str) -> dict[str, Any]:
    nothing = {"test_accuracy": None, "val_accuracy": None, "ratio": None, "macs": None}
    return {**job.label, "seed": job.seed, "status": "failed", "reason": reason, **nothing}


_BENCHES: dict[str, Bench] = {}


def silent(text: str) -> None:
    """Whoever asked for the rows prints."""


def benches(model: str, options: argparse.Namespace, say: Callable[[str], None] = silent) -> Bench:
    """The bench of a model, made once in a process."""
    if model not in _BENCHES:
        made = quick_bench(options) if options.quick else real_bench(model, options, say)
        _BENCHES[model] = replace(made, say=silent, leaving=lambda: time.time() > options.until)
    return _BENCHES[model]


def real_bench(model: str, options: argparse.Namespace, say: Callable[[str], None]) -> Bench:
    """Of CIFAR-10: from the public checkpoint, or, for a choice, from a net that was trained here without the validation images."""
    if not options.choose:
        return Bench.open(argparse.Namespace(**(vars(options) | {"model": model})), say)
    task = cifar10.make_task(model, data=options.data, validation=options.validation, split_seed=0)
    dense = dense_state(task, checkpoint="train", data=options.data, fallback=options.out, log=say)
    return Bench(task, dense, trace(task.dense_model(), task.example_input), options.out, say)


def quick_bench(options: argparse.Namespace) -> Bench:
    task = digits.make_task("resnet8", data=None, validation=250, split_seed=0)
    net = trace(task.dense_model(), task.example_input)
    return Bench(task, dict(task.model.state_dict()), net, options.out, silent)


if __name__ == "__main__":
    main()
