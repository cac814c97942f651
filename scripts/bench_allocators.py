"""What allocation is worth: the solver against the exact optimum, and every allocator on trained nets, without any training.

1. ResNet-50 (random weights, 224 x 224), three lowerings: the solver's time and its distance from the optimum at random budgets, then under
   two budgets at once. The optimum is HiGHS's, proven to a share `MILP_GAP` or as far as `--milp-seconds` allow; what it leaves open counts
   against the solver.
2. ResNet-20 and ResNet-32 on CIFAR-10 from the public checkpoints: a plan by every allocator at 75, 50 and 35 % of the FLOPs, decomposed,
   BN statistics re-estimated, scored on validation images. No training. Test accuracy is read for the solver's plans and the uniform ones.
3. The same nets, the solver's plans at 50, 35 and 28 % of the FLOPs with and without the pivoted forms, scored on test images
   (`test_{net}_{percent}_{lowerings}`), by which nothing here is chosen: plans by the weights alone, and (`…_settled`) by whichever of
   the weights, K-FAC, and K-FAC with layers alike predicts best on 500 validation images, as a study settles it; and the latter fitted to
   the dense net, layer after layer, on 256 training images (`…_calibrated`). `--only pivoted` is this part alone.

    python scripts/bench_allocators.py --json > allocators.json       about 40 minutes on two cores
    python scripts/bench_allocators.py --quick                        less of everything, within a minute

`accuracy_{net}_{percent}_{allocator}` are validation accuracies in percent; `random` is the mean of `--random-plans` plans, `random_best`
the best of them. The checkpoints have seen the validation images: the figures rank allocators, their absolute values are too high.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from imagenet_resnets import resnet50
from report import Report, arguments
from scipy.stats import spearmanr

import ranksearch
from ranksearch.allocate import (
    BASELINES,
    MEASURES,
    SENSITIVITIES,
    Curves,
    Damage,
    LayerRules,
    allocate_plan,
    cost_value,
    greedy,
    measure_scores,
    parse_budget,
    rank_curves,
    weigh,
)
from ranksearch.allocate.baselines import random as random_plan
from ranksearch.allocate.budget import Budget
from ranksearch.allocate.curves import limits_of
from ranksearch.allocate.damage import WITHOUT_DATA
from ranksearch.allocate.problem import OPTIMAL as MILP_GAP
from ranksearch.allocate.problem import Poser, by_milp
from ranksearch.compress import RankPlan, dense_cost, plan_cost, trace
from ranksearch.data.source import calibration_batches
from ranksearch.errors import UsageError
from ranksearch.lowering import LOWERINGS
from ranksearch.search.preview import damage_of
from ranksearch.search.scorer import Scorer
from ranksearch.tasks import cifar10
from ranksearch.training.dense import dense_state

CONVS = ("im2col", "channel", "spatial")
PERCENTS = (75, 50, 35)
PIVOTED_PERCENTS = (50, 35, 28)
SETTLED_ON = 500
"""Validation images on which the predictions of a plan are compared, as before a study."""


def optimum(curves: Curves, budgets: list[Budget], seconds: float) -> tuple[float, float]:
    """(damage of the best plan that HiGHS found, proven lower bound)"""
    problem, _ = Poser(curves, WITHOUT_DATA).pose(limits_of(curves, budgets), weights={}, allowed={})
    picks, bound = by_milp(problem.damage, problem, 1.0, seconds)
    return (problem.totals(picks)[0] if picks is not None else np.inf), bound


def resnet50_curves(report: Report) -> Curves:
    torch.manual_seed(0)
    model = resnet50().eval()
    net = trace(model, torch.zeros(1, 3, 224, 224))
    started = time.perf_counter()
    curves = rank_curves(model, net, LayerRules(CONVS))
    report.say(
        f"curves of ResNet-50, {sum(len(o.choices) for o in curves.layers):,} options: {time.perf_counter() - started:.1f} s"
    )
    return curves


def one_budget(report: Report, curves: Curves, count: int, milp_seconds: float) -> dict[str, Any]:
    """Random FLOP budgets between 15 and 90 % of dense."""
    generator, gaps, seconds = np.random.default_rng(report.options.seed), [], []
    for number in range(count):
        percent = round(float(generator.uniform(15, 90)), 2)
        budgets = [parse_budget("flops", f"{percent}%")]
        started = time.perf_counter()
        found = allocate_plan(curves, budgets)
        seconds.append(time.perf_counter() - started)
        best, bound = optimum(curves, budgets, milp_seconds)
        gaps.append(max(0.0, found.damage / bound - 1))
        report.rows.append(
            {
                "part": "resnet50", "budget": f"flops {percent}%", "seconds": seconds[-1], "gap_to_milp": gaps[-1],
                "certified_gap": found.gap, "milp_open": best / bound - 1,
            }
        )  # fmt: skip
        report.say(
            f"{number + 1}/{count}: {percent} %: {1000 * seconds[-1]:.0f} ms, {gaps[-1]:.5f} above the optimum at most"
        )
    return {
        "resnet50_seconds": float(np.median(seconds)), "resnet50_seconds_max": max(seconds), "milp_gap_max": max(gaps),
        "budgets": count,
    }  # fmt: skip


def budget_pairs(curves: Curves, count: int, seed: int) -> Iterator[list[Budget]]:
    """Pairs of FLOP and parameter budgets that some plan meets: by turns the costs of a random plan, and 10 to 90 % of each by itself.

    The smallest plan of a net like ResNet-50 has a few percent of both, so the second kind can be met too.
    """
    generator = np.random.default_rng(seed)
    for number in range(count):
        percent = generator.uniform(10, 90, 2)
        if number % 2:
            yield [parse_budget("flops", f"{percent[0]:.2f}%"), parse_budget("params", f"{percent[1]:.2f}%")]
            continue
        start = parse_budget("flops", f"{percent[0]:.2f}%")
        cost = plan_cost(curves.net, random_plan(curves, [start], seed=int(generator.integers(2**31))))
        yield [parse_budget(name, str(cost_value(cost, name))) for name in ("flops", "params")]


def two_budgets(report: Report, curves: Curves, count: int, milp_seconds: float) -> dict[str, Any]:
    dense, gaps, feasible, open_at_most = dense_cost(curves.net), [], 0, 0.0
    for number, budgets in enumerate(budget_pairs(curves, count, report.options.seed)):
        started = time.perf_counter()
        try:
            found = allocate_plan(curves, budgets)
        except UsageError as error:
            report.say(f"not found: {error}")
            continue
        seconds = time.perf_counter() - started
        cost = plan_cost(curves.net, found.plan)
        feasible += all(budget.allows(cost, dense) for budget in budgets)
        best, bound = (found.damage, found.bound) if found.gap <= MILP_GAP else optimum(curves, budgets, milp_seconds)
        bound = max(bound, found.bound)
        gaps.append(max(0.0, found.damage / bound - 1))
        open_at_most = max(open_at_most, best / bound - 1)
        shares = [100 * b.limit(dense) / cost_value(dense, b.cost) for b in budgets]
        report.rows.append(
            {
                "part": "two budgets", "budget": f"flops {shares[0]:.1f}%, params {shares[1]:.1f}%", "seconds": seconds,
                "gap_to_milp": gaps[-1], "certified_gap": found.gap, "milp_open": best / bound - 1,
            }
        )  # fmt: skip
        if number % 10 == 9:
            report.say(f"{number + 1}/{count} pairs: {feasible} feasible, at most {max(gaps):.5f} above the optimum")
    return {"two_budget_feasible": feasible / count, "two_budget_gap_max": max(gaps, default=np.inf), "pairs": count}


class TrainedNet:
    """A trained CIFAR ResNet with its curves and what every sensitivity predicts."""

    def __init__(self, report: Report, name: str, options: argparse.Namespace) -> None:
        self.name, self.report = name, report
        self.task = cifar10.make_task(name, data=options.data, validation=options.images, split_seed=0)
        model = self.task.dense_model()
        model.load_state_dict(
            dense_state(self.task, checkpoint="auto", data=options.data, fallback=Path("runs"), log=report.say)
        )
        self.model = model.eval()
        self.net = trace(model, self.task.example_input)
        self.curves = rank_curves(model, self.net, LayerRules(tuple(options.lowerings.split(",")), exclude=("linear",)))
        self.damages: dict[str, Damage] = {}
        for sensitivity in SENSITIVITIES:
            started = time.perf_counter()
            batches = calibration_batches(self.task.train, 8, 128, torch.Generator().manual_seed(options.seed))
            damage = weigh(self.curves, model, batches, sensitivity, MEASURES["log_kept_energy"], seed=options.seed)
            self.damages[sensitivity] = damage
            report.say(f"{name}: sensitivity {sensitivity}: {time.perf_counter() - started:.1f} s")
        self.scorer = Scorer(self.task, self.model, self.task.val, bn_batches=10, batch_size=128)
        self.options = options

    def allocators(self) -> dict[str, Any]:
        """Name -> (curves, budgets) -> plan; `solver` is the default, `solver_NAME` weighs by that sensitivity."""
        found: dict[str, Any] = {}
        for sensitivity, damage in self.damages.items():
            name = "solver" if sensitivity == "none" else f"solver_{sensitivity}"
            found[name] = lambda curves, budgets, damage=damage: allocate_plan(curves, budgets, damage=damage).plan
        relative = Damage(MEASURES["relative_energy"])
        found["solver_relative_energy"] = lambda curves, budgets: allocate_plan(curves, budgets, damage=relative).plan
        found |= {name: baseline for name, baseline in BASELINES.items() if name != "random"}
        if self.options.greedy_images:
            found["greedy"] = partial(greedy, scores=self._scores())
        return found

    def _scores(self) -> Any:
        train = self.task.train.first(self.options.greedy_images)
        scorer = Scorer(self.task, self.model, train, bn_batches=2, batch_size=128)
        started = time.perf_counter()
        scores = measure_scores(self.curves, lambda plan: scorer(plan).accuracy)
        seconds = time.perf_counter() - started
        self.report.say(
            f"{self.name}: greedy: {scores.evaluations} evaluations on {len(train)} training images, {seconds:.0f} s"
        )
        self.report.rows.append(
            {"part": f"{self.name} greedy", "evaluations": scores.evaluations, "images": len(train), "seconds": seconds}
        )
        return scores

    def score(self, percent: int, name: str, plan: RankPlan, *, test: bool) -> float:
        started = time.perf_counter()
        found = self.scorer(plan)
        cost, dense = plan_cost(self.net, plan), dense_cost(self.net)
        test_accuracy = None
        if test and self.options.test and self.task.test is not None:
            test_accuracy = Scorer(self.task, self.model, self.task.test, bn_batches=10, batch_size=128)(plan).accuracy
        self.report.rows.append(
            {
                "part": self.name, "budget": f"flops {percent}%", "allocator": name, "val_accuracy": found.accuracy,
                "val_loss": found.loss, "test_accuracy": test_accuracy, "macs": cost.macs / dense.macs,
                "params": cost.params / dense.params, "plan": plan.summary(), "seconds": time.perf_counter() - started,
            }
        )  # fmt: skip
        return found.accuracy


def trained_net(report: Report, name: str, options: argparse.Namespace) -> dict[str, Any]:
    net = TrainedNet(report, name, options)
    figures: dict[str, Any] = {f"accuracy_{name}_100_dense": net.score(100, "dense", RankPlan(), test=True)}
    allocators = net.allocators()
    for percent in options.percents:
        budgets = [parse_budget("flops", f"{percent}%")]
        for allocator, call in allocators.items():
            figures[f"accuracy_{name}_{percent}_{allocator}"] = net.score(
                percent, allocator, call(net.curves, budgets), test=allocator.startswith(("solver", "uniform"))
            )
        plans = [random_plan(net.curves, budgets, seed=options.seed + i) for i in range(options.random_plans)]
        accuracies = [net.score(percent, f"random {i}", plan, test=False) for i, plan in enumerate(plans)]
        if accuracies:
            figures[f"accuracy_{name}_{percent}_random"] = float(np.mean(accuracies))
            figures[f"accuracy_{name}_{percent}_random_best"] = max(accuracies)
        if len(accuracies) >= 10:
            for sensitivity, damage in net.damages.items():
                predicted = [damage_of(net.curves, damage, plan) for plan in plans]
                figures[f"spearman_{name}_{percent}_{sensitivity}"] = float(-spearmanr(predicted, accuracies).statistic)
        prefix = f"accuracy_{name}_{percent}_"
        shown = {key.removeprefix(prefix): round(value, 2) for key, value in figures.items() if key.startswith(prefix)}
        report.say(f"{name} at {percent} %: {shown}")
    return figures


def pivoted_rows(report: Report, name: str, options: argparse.Namespace) -> dict[str, float]:
    """Test accuracy of the solver's plans from plain lowerings and from these and their pivoted forms, without and with Tucker-2."""
    task = cifar10.make_task(name, data=options.data, validation=options.images, split_seed=0)
    model = task.dense_model()
    model.load_state_dict(
        dense_state(task, checkpoint="auto", data=options.data, fallback=Path("runs"), log=report.say)
    )
    net, known, figures = trace(model.eval(), task.example_input), {}, {}
    images = task.val if options.quick or task.test is None else task.test
    scorer = Scorer(task, model, images.first(options.test_images), bn_batches=10, batch_size=128)
    settling = Scorer(task, model, task.val.first(SETTLED_ON), bn_batches=3, batch_size=128)
    batches = list(calibration_batches(task.train, 8, 128, torch.Generator().manual_seed(options.seed)))
    for with_tucker, pivoted in ((False, False), (False, True), (True, False), (True, True)):
        plain = (*CONVS, "tucker2") if with_tucker else CONVS
        forms = tuple(f"{lowering}_pivoted" for lowering in plain if f"{lowering}_pivoted" in LOWERINGS)
        label = ("tucker2_" if with_tucker else "") + ("pivoted" if pivoted else "plain")
        curves = rank_curves(model, net, LayerRules(plain + forms if pivoted else plain, exclude=("linear",)), known)
        kfac = weigh(curves, model, batches, "kfac", MEASURES["log_kept_energy"], seed=options.seed)
        damages = (WITHOUT_DATA, kfac, replace(kfac, scales={}))
        for percent in PIVOTED_PERCENTS:
            started = time.perf_counter()
            budgets = [parse_budget("flops", f"{percent}%")]
            plans = [allocate_plan(curves, budgets, damage=damage).plan for damage in damages]
            solved = (time.perf_counter() - started) / len(plans)
            chosen = max(plans, key=lambda plan: settling(plan).accuracy)
            tested = scorer(plans[0])
            settled = tested if chosen is plans[0] else scorer(chosen)
            fitted = scorer.score(ranksearch.calibrate(model, chosen, [torch.cat(batches[:2])]))
            found_by = (
                (plans[0], label, tested),
                (chosen, f"{label}_settled", settled),
                (chosen, f"{label}_calibrated", fitted),
            )
            for plan, made, found in found_by:
                cost, dense = plan_cost(net, plan), dense_cost(net)
                figures[f"test_{name}_{percent}_{made}"] = found.accuracy
                report.rows.append(
                    {
                        "part": f"{name} pivoted", "budget": f"flops {percent}%", "allocator": made, "test_accuracy": found.accuracy,
                        "macs": cost.macs / dense.macs, "params": cost.params / dense.params, "plan": plan.summary(),
                        "seconds": solved,
                    }
                )  # fmt: skip
                report.say(f"{name}: {made} at {percent} %: {found.accuracy:.2f} on {options.test_images} test images")
    return figures


def verdict(figures: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether, for every net and budget, the best allocator of ours is above the uniform ratio."""
    return all(
        max(v for k, v in figures.items() if k.startswith(f"accuracy_{net}_{percent}_solver"))
        > figures[f"accuracy_{net}_{percent}_uniform"]
        for net in options.nets for percent in options.percents
    )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, images=5000, test_images=3000, random_plans=20, greedy_images=1000, milp_seconds=30.0)
    parser.add_argument(
        "--nets", default="resnet20,resnet32", help="trained nets, comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--percents", default="75,50,35", help="budgets in percent of the dense FLOPs (default: %(default)s)"
    )
    parser.add_argument("--lowerings", default=",".join(CONVS), help="of the trained nets (default: %(default)s)")
    parser.add_argument("--only", choices=("resnet50", "trained", "pivoted"), help="one part of the measurement")
    parser.add_argument("--no-test", dest="test", action="store_false", help="leave the test set alone")
    parser.add_argument("--data", help="data folder (default: $RANKSEARCH_DATA, else ~/.cache/ranksearch)")
    options = parser.parse_args()
    options.nets = options.nets.split(",")
    options.percents = [int(percent) for percent in options.percents.split(",")]
    budgets, pairs = 20, 100
    if options.quick:
        options.images, options.random_plans = min(options.images, 250), 0
        options.test_images = min(options.test_images, 500)
        options.greedy_images, options.test = 0, False
        options.milp_seconds, options.nets, options.percents, budgets, pairs = 5.0, ["resnet20"], [50], 2, 5
    report, figures = Report("bench_allocators", options), {}
    if options.only in (None, "resnet50"):
        curves = resnet50_curves(report)
        figures |= one_budget(report, curves, budgets, options.milp_seconds)
        figures |= two_budgets(report, curves, pairs, options.milp_seconds)
    if options.only in (None, "pivoted"):
        for name in options.nets:
            figures |= pivoted_rows(report, name, options)
    if options.only in (None, "trained"):
        for name in options.nets:
            figures |= trained_net(report, name, options)
        figures["best_above_uniform_everywhere"] = verdict(figures, options)
    report.finish(figures, [f"validation: {options.images} images; BN re-estimated on 10 batches of 128; no training"])


if __name__ == "__main__":
    main()
