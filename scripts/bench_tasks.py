"""A search on small tasks that are unlike each other, against what else one could do: is it worth it on a stranger's net?

    python scripts/bench_tasks.py                            seven tasks, three seeds, 12 trials: about an hour on two cores
    python scripts/bench_tasks.py --quick                    two tasks, one seed, within a minute
    python scripts/bench_tasks.py --task FILE.py:FUNCTION    another task; repeatable, also by the names of `small_tasks.py`

FUNCTION returns a `ranksearch.Task`; where it takes `width`, a factor on the net's channels, narrower nets are compared with, too. Every
net of a task is trained by one recipe (AdamW, one learning rate, one batch size); only what is trained differs:

| method | what it is |
|---|---|
| `dense`, `dense_longer` | the dense net, and as many steps more as a trial has |
| `narrow` | a narrower net of the same kind within the cost, from scratch, as many steps as the dense net and a trial together |
| `uniform`, `solver` | one share of the ranks everywhere; the solver's plan by K-FAC: one trial |
| `optuna` | plain Optuna (TPE over a rank and a lowering per layer) |
| `ours` | the search as it is by default |

`optuna` and `ours` have as many trials as each other; the best of their nets on validation within a cost counts. Every figure
is on test; `above_X` is ours less X in points (of a metric that is not in percent: percent of the dense net's value), the mean over two
costs: those of ours within half and within a quarter of the MACs. Every control is made for, or chosen within, just that cost. In
`above_X_within` it may take the whole half or quarter instead, and ours, whose trials are spread over a range, mostly has less.

`smallest_at_minus_1`: share of the MACs of the cheapest net at most one point (or 2 % of the metric) below dense on validation: ours by a
search with that limit, against the cheapest of any control, at five costs each.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors.torch
import torch
from report import Report, arguments
from small_tasks import STEPS, TASKS
from torch import nn

from ranksearch.allocate import BASELINES, allocate_plan, parse_budget
from ranksearch.compress import RankPlan, dense_cost, load_net, trace
from ranksearch.search.workbench import Workbench, prepare
from ranksearch.space.reading import parse_space
from ranksearch.space.space import Space
from ranksearch.study.driver import run_inline
from ranksearch.study.study import Study
from ranksearch.tasks import model_reference
from ranksearch.tasks.task import Task
from ranksearch.tasks.task_file import TaskFile
from ranksearch.training.evaluate import evaluate
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Training
from ranksearch.trial.attempt import attempt
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.metric import PERCENT, Metric
from ranksearch.trial.recipe import Recipe, middle

QUICK = ("digits", "binary")
LEVELS = (0.5, 0.25)
"""Shares of the dense net's MACs within which ours is chosen; at its cost methods are compared."""
SAME = 0.005
"""Share of the dense net's MACs by which costs may differ and count as equal."""
LADDER = (0.5, 0.35, 0.25, 0.18, 0.12)
"""Those at which the controls look for the smallest net."""
CONTROLS = ("uniform", "narrow", "solver", "optuna")
FAR = 10.0
"""Points below dense that no trial should be spent on where the metric has a limit."""


@dataclass(frozen=True)
class Case:
    """A task by name, how to make it at a width, and its steps."""

    name: str
    path: str
    """As a space names it."""
    make: Callable[..., Task]
    dense_steps: int
    trial_steps: int

    @property
    def has_width(self) -> bool:
        return "width" in inspect.signature(self.make).parameters


@dataclass(frozen=True)
class Net:
    """A net of a method: its share of the dense MACs, its metric on validation and on test."""

    method: str
    cost: float
    val: float
    test: float


def main() -> None:
    parser = arguments(__doc__, seeds=3, trials=12, lr=0.002, batch=32)
    parser.add_argument("--task", action="append", help="FILE.py:FUNCTION, or a name of small_tasks.py; repeatable")
    parser.add_argument("--steps", help="DENSE,TRIAL steps of all tasks (default: small_tasks.py; 400,100 for others)")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.trials, options.steps = 1, 4, options.steps or "150,30"
    report = Report("bench_tasks", options)
    named = options.task or list(QUICK if options.quick else TASKS)
    seeds = list(range(options.seed, options.seed + options.seeds))
    for case in [case_of(name, options) for name in named]:
        for seed in seeds:
            found = Bench(case, seed, options, report.say).row()
            report.rows.append(found)
            report.say(f"{case.name}, seed {seed}: {summary(found)}")
    report.finish(figures(report.rows), seeds=seeds)


def case_of(name: str, options: argparse.Namespace) -> Case:
    """A task of ours by name, or another one by FILE.py:FUNCTION."""
    path = name if ".py" in name else f"{Path(__file__).parent / 'small_tasks.py'}:{name}"
    file = TaskFile.parse(path)
    steps = STEPS.get(name, (400, 100))
    if options.steps:
        dense, _, trial = options.steps.partition(",")
        steps = int(dense), int(trial)
    return Case(file.function, path, getattr(file.code.module(), file.function), *steps)


class Bench:
    """One task and seed: its dense net, and every method's nets."""

    def __init__(self, case: Case, seed: int, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.case, self.seed, self.options = case, seed, options
        torch.manual_seed(seed)  # of the dense net's first weights
        self.task, self._say = case.make(), say
        self.folder = Path(tempfile.mkdtemp(prefix="bench_tasks-"))
        dense = (
            self.train_(self.task.dense_model(), range(case.dense_steps)) if not self.task.trained else self.task.model
        )
        self.dense_file = self.folder / "dense.safetensors"
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in dense.state_dict().items()}, self.dense_file)
        self.dense = self._net("dense", 1.0, dense)
        self.metric = Metric.of(self.task, self.dense.val)
        self.limit = "-1" if self.metric.unit == PERCENT else "-2%"

    def train_(self, net: nn.Module, steps: range) -> nn.Module:
        """Trains a net by the recipe, its length the whole of `steps`."""
        options = self.options
        torch.manual_seed(self.seed)
        settings = Optimisation(
            optimizer="adamw", schedule="cosine", lr=options.lr, warmup=0.1, momentum=0.9, weight_decay=5e-4, batch_size=options.batch,
            total_steps=len(steps), label_smoothing=0.0, clip_norm=0.0, ema=0.0, bf16=False, compile=False,
        )  # fmt: skip
        Training(net, self.task, settings, steps, generator=torch.Generator().manual_seed(self.seed)).run()
        return net

    def _net(self, method: str, cost: float, net: nn.Module) -> Net:
        assert self.task.test is not None
        found = [evaluate(net.eval(), split, self.task).accuracy for split in (self.task.val, self.task.test)]
        return Net(method, cost, *found)

    # Spaces and studies ------------------------------------------------------------------------------------------

    def space(self, name: str, search: dict[str, Any], **more: Any) -> Space:
        options = self.options
        recipe = {
            "steps": self.case.trial_steps, "batch_size": options.batch, "optimizer": "adamw", "lr": options.lr, "bn_batches": 5,
            "projection": {"period": 10},
        }  # fmt: skip
        search = {"trials": options.trials, "seed": self.seed, "front_from": 0.2} | search
        return parse_space({
            "name": name, "task": self.case.path, "recipe": recipe, "search": search, "budgets": {"macs": f"{100 * LEVELS[0]:g}%"},
        } | more, "bench_tasks")  # fmt: skip

    def prepared(self, space: Space) -> Workbench:
        return prepare(space, fallback=self.folder, log=lambda text: None, saved_dense=self.dense_file)

    def study(self, name: str, search: dict[str, Any], **more: Any) -> Study:
        """A whole search, one trial after the other."""
        space = self.space(name, search, **more)
        bench = self.prepared(space)
        study = Study.create(self.folder, space, bench, self.dense.val)
        with study.locked():
            run_inline(study, bench, lambda row: None, lambda text: None)
        return study

    def best_within(self, study: Study, method: str, cost: float) -> Net | None:
        """The net of a study that is best on validation within a cost, scored on test."""
        rows = [row for row in study.trials if row.complete and row.macs_ratio is not None and row.macs_ratio <= cost]
        if not rows:
            return None
        best = max(rows, key=lambda row: row.worth)
        net = load_net(study.trial_folder(best.trial), study.space.build)
        return self._net(method, float(best.macs_ratio or 1.0), net)

    # Controls ----------------------------------------------------------------------------------------------------

    def planned(self, method: str, plan: RankPlan, bench: Workbench, space: Space) -> Net | None:
        """One trial of a plan."""
        folder = self.folder / f"{method}-{plan.digest()}"
        recipe = Recipe.settled(space.recipe, middle)
        candidate = Candidate(0, plan, recipe, self.seed, folder, folder.with_suffix(".pt"))
        result = attempt(
            bench.task.without_test(), bench.dense, bench.net, candidate, report=lambda entry: None, checkpoint_seconds=1e9
        )  # fmt: skip
        if result.status != "complete":
            return None
        return self._net(method, bench.curves.cost(plan).macs / bench.curves.dense.macs, load_net(folder, space.build))

    def narrow(self, cost: float) -> Net | None:
        """A narrower net within a cost, from scratch."""
        if not self.case.has_width:
            return None
        torch.manual_seed(self.seed)
        width, full = 1.0, self._macs(self.task.dense_model())
        while (share := self._macs(self.case.make(width=width).dense_model()) / full) > cost:
            width *= 0.97
            if width < 0.02:
                return None
        torch.manual_seed(self.seed + 1)
        model = self.case.make(width=width).dense_model()
        return self._net("narrow", share, self.train_(model, range(self.case.dense_steps + self.case.trial_steps)))

    def _macs(self, model: nn.Module) -> int:
        return dense_cost(trace(model, self.task.example_input)).macs

    @cached_property
    def of_controls(self) -> tuple[Space, Workbench]:
        """What the controls' plans are made with."""
        space = self.space("controls", {"sensitivity": "kfac"})
        return space, self.prepared(space)

    def controls(self, costs: Sequence[float]) -> Iterator[Net]:
        """One net per control and cost."""
        space, bench = self.of_controls
        reference = model_reference(space.task, space.model)
        makers: dict[str, Callable[[Any], RankPlan]] = {
            "uniform": lambda budgets: BASELINES["uniform"](bench.curves, budgets, reference),
            "solver": lambda budgets: allocate_plan(bench.curves, budgets, damage=bench.damage, model=reference).plan,
        }
        for cost in costs:
            budgets = [parse_budget("macs", f"{100 * cost:g}%")]
            for method, make in makers.items():
                try:
                    plan = make(budgets)
                except ValueError:  # no plan within this cost
                    continue
                if (net := self.planned(method, plan, bench, space)) is not None:
                    yield net
            if (net := self.narrow(cost)) is not None:
                yield net

    # Together ----------------------------------------------------------------------------------------------------

    def row(self) -> dict[str, Any]:
        """Everything that was found of the task with this seed."""
        try:
            return self._row()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _row(self) -> dict[str, Any]:
        longer = self.task.dense_model()
        longer.load_state_dict(safetensors.torch.load_file(self.dense_file))
        longer_net = self._net("dense_longer", 1.0, self.train_(longer, range(self.case.trial_steps)))
        nets = list(self.controls(LADDER))
        self._say(f"{self.case.name}: dense test {self.metric.text(self.dense.test)}, {len(nets)} nets of controls")
        ours, optuna = self.study("ours", {}), self.study("optuna", {"parametrization": "direct"})
        limited = self.study("limited", {"objectives": "fewest MACs"}, at_least={"accuracy": self.limit})
        mine = {level: self.best_within(ours, "ours", level) for level in LEVELS}
        costs = {level: level if net is None or level - net.cost < SAME else net.cost for level, net in mine.items()}
        made = nets + list(self.controls([cost for level, cost in costs.items() if cost != level]))

        def compared(costs: dict[float, float]) -> dict[str, dict[str, float | None]]:
            """Level -> method -> metric on test, every control within the cost of that level."""
            found: dict[str, dict[str, float | None]] = {}
            for level, cost in costs.items():
                own = {m: _largest_within(made, cost, m) for m in ("uniform", "narrow", "solver")}
                own |= {"optuna": self.best_within(optuna, "optuna", cost), "ours": mine[level]}
                found[f"{level:g}"] = {method: None if net is None else net.test for method, net in own.items()}
            return found

        at, within = compared(costs), compared({level: level for level in LEVELS})
        lies_at = {f"{level:g}": None if net is None else net.cost for level, net in mine.items()}
        least = self.metric.least_share(limited.space.quality)
        assert least is not None
        tried = [
            *((n.method, n.cost) for n in nets if self.metric.share(n.val) >= least),
            *(("optuna", float(r.macs_ratio or 1)) for r in optuna.trials if r.complete and r.worth >= least),
        ]
        smallest = {m: min((cost for method, cost in tried if method == m), default=None) for m in CONTROLS}
        smallest["ours"] = min((float(row.macs_ratio or 1) for row in limited.front), default=None)
        complete = [row for row in limited.trials if row.complete]
        far = [row for row in complete if self.points(row.value) < self.points(self.dense.val) - FAR]
        return {
            "task": self.case.name, "seed": self.seed, "metric": self.metric.name, "direction": self.metric.direction,
            "dense_val": self.dense.val, "dense": self.dense.test, "dense_longer": longer_net.test, "at": at, "within": within,
            "ours_lies_at": lies_at, "above": {m: self.above(at, m) for m in CONTROLS},
            "above_within": {m: self.above(within, m) for m in CONTROLS}, "smallest": smallest,
            "far_below": len(far) / max(1, len(complete)),
            "settled": list(ours.space.search.predictions or [ours.space.search.sensitivity]),
            "made_by": ours.best(f"macs={100 * LEVELS[0]:g}%").allocator,
        }  # fmt: skip

    def points(self, value: float) -> float:
        """A metric in points, the larger the better: percent as it is, another in percent of the dense net's value."""
        points = value if self.metric.unit == PERCENT else 100 * value / abs(self.metric.dense or 1.0)
        return points if self.metric.direction == "maximize" else -points

    def above(self, at: dict[str, dict[str, float | None]], method: str) -> float | None:
        """Ours less a control on test in points, the mean over the costs at which both have a net."""
        pairs = [(found["ours"], found[method]) for found in at.values()]
        known = [self.points(a) - self.points(b) for a, b in pairs if a is not None and b is not None]
        return fmean(known) if known else None


def _largest_within(nets: Sequence[Net], cost: float, method: str) -> Net | None:
    """The net of a control at a cost: the largest of its nets within it, which was made for it."""
    return max((n for n in nets if n.method == method and n.cost <= cost + 1e-9), key=lambda n: n.cost, default=None)


def summary(row: dict[str, Any]) -> str:
    """A row in a line."""
    above = ", ".join(f"{m} {v:+.2f}" for m, v in row["above"].items() if v is not None)
    smallest = ", ".join(f"{m} {'–' if v is None else f'{v:.3f}'}" for m, v in row["smallest"].items())
    return f"ours above {above} points; smallest {smallest}; far below {row['far_below']:.2f}; predicts by {row['settled']}"


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of tasks by the means of seeds."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    found: dict[str, Any] = {"tasks": len(by_task)}
    for method in CONTROLS:
        for key, suffix in (("above", ""), ("above_within", "_within")):
            means = {t: _mean([row[key][method] for row in own]) for t, own in by_task.items()}
            found[f"tasks_above_{method}{suffix}"] = sum(v is not None and v > 0 for v in means.values())
            found |= {f"above_{method}{suffix}_{t}": v for t, v in means.items()}
    smaller = 0
    for task, own in by_task.items():
        ours = fmean([row["smallest"]["ours"] or 1.0 for row in own])
        controls = [fmean([row["smallest"][m] or 1.0 for row in own]) for m in CONTROLS]
        found[f"smallest_at_minus_1_{task}"], found[f"smallest_at_minus_1_control_{task}"] = ours, min(controls)
        smaller += ours <= min(controls)
    found["smallest_at_minus_1_tasks"] = smaller
    found["far_below_share"] = fmean([row["far_below"] for row in rows])
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


if __name__ == "__main__":
    main()
