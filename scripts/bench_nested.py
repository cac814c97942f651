"""A whole front from one run: a nested study against studies that train every plan for itself, by hypervolume and passes.

Both search fronts from 20 to 70 % of the dense MACs under one recipe. A pass is a forward and backward pass of one batch. `separate`
trains `--trials` plans for `--steps` steps each; `nested` trains one weight for `--share` of all those steps, cuts `--plans` plans from
it, which takes no passes, and scores them. Beside it, `separate` at the nested study's passes: a share of the trials (`fewer`), or all at
a share of the steps (`shorter`). `tuned` is the nested study again, whose plans' factors are trained for `--fine-tuning` steps each after
they were scored as they were cut: `rank_correlation` is Spearman's between the two scores of its plans, which says how far the scores of
plans that are not trained may be trusted to choose by. Hypervolume in (accuracy, MACs as a ratio of dense) against reference 0 and 1;
fronts are chosen on the validation set, `hv_test_*` is the same of the fronts' test accuracies, read once at a study's end.

    python scripts/bench_nested.py --json                              digits, ResNet-8, three seeds: about six minutes on one core
    python scripts/bench_nested.py --methods tuned                     the rank correlation alone
    python scripts/bench_nested.py --variants straight through fixed   other forms of the nested run beside the default one
    python scripts/bench_nested.py --space search_spaces/cifar10_resnet20.yaml --steps 450     hours on two cores; use a GPU
    python scripts/bench_nested.py --quick                             whether it runs
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from report import Report, arguments
from scipy.stats import spearmanr
from torch import Tensor

import ranksearch
from ranksearch.compress import LayerPlan
from ranksearch.compress.nesting import Nesting
from ranksearch.model.slots import Slot
from ranksearch.pareto import hypervolume
from ranksearch.study.study import Study
from ranksearch.trial.levels import Levels

REPOSITORY = Path(__file__).parent.parent
LOW, HIGH = 0.2, 0.7
"""Ends of the front, as shares of the dense MACs."""
SHARES = (20, 28, 36, 50, 70)
"""Percent of the dense MACs at which the best accuracies are compared."""


class Sandwich(Levels):
    """The smallest and the largest level at every step, and one drawn between them: a third of the steps for as many passes."""

    passes_per_step = 3

    def at(self, step: int) -> list[int]:
        last = len(self.path) - 1
        return [0, last, 1 + super().at(step)[0] % (last - 1)]

    def passes(self, step: int) -> Iterator[float]:
        for level in self.at(step):
            with self.nesting.at(level):
                yield 1 / 3


class Formed(Nesting):
    """Gradients get to the dense weight as they are."""

    def along(self, slot: Slot, choice: LayerPlan, gradient: Tensor) -> Tensor:
        return gradient


class FormedThrough(Nesting):
    """Gradients are projected as the weights are, so that they reach the kept directions alone: the derivative with the basis held."""

    def along(self, slot: Slot, choice: LayerPlan, gradient: Tensor) -> Tensor:
        return self.cut(slot, choice, gradient)


class Straight(Levels):
    """Gradients go straight to the dense weight, those outside the level's directions too."""

    kind = Formed


class Through(Levels):
    """Gradients reach the directions that the level keeps of the shorter side alone."""

    kind = FormedThrough


class Independent(Levels):
    """Each step draws its levels for itself, whatever came before."""

    def at(self, step: int) -> list[int]:
        return random.Random(f"{self._seed} {step}").sample(range(len(self.path)), self.drawn)


class Fixed(Levels):
    """The bases of the dense net, to the end."""

    def after_step(self, training: Any) -> None: ...


class Shrinking(Levels):
    """Progressive shrinking: the smaller half of the levels only comes in over the first half of the steps, the largest first."""

    steps = 1

    def at(self, step: int) -> list[int]:
        last = len(self.path) - 1
        first = max(0, round(last * (1 - 2 * step / self.steps)))
        return [first + level % (last - first + 1) for level in super().at(step)]


METHODS = ("nested", "separate", "fewer", "shorter", "tuned")
VARIANTS: dict[str, type[Levels]] = {
    "straight": Straight, "through": Through, "independent": Independent, "sandwich": Sandwich, "fixed": Fixed, "shrinking": Shrinking,
}  # fmt: skip


def main() -> None:
    parser = arguments(
        __doc__,
        trials=16,
        plans=48,
        steps=60,
        seeds=3,
        share=0.25,
        fine_tuning=30,
        space="search_spaces/digits_resnet8.yaml",
    )
    parser.add_argument(
        "--variants", nargs="*", default=[], choices=sorted(VARIANTS), help="other forms of the nested run"
    )
    parser.add_argument(
        "--methods", nargs="*", default=METHODS, choices=METHODS, help="left out, all (under --quick the first two)"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="laid over the space of all studies")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.plans, options.steps, options.seeds = 4, 4, 8, 1
        options.methods = METHODS[:2]
    report = Report("bench_nested", options)
    seeds = list(range(options.seed, options.seed + options.seeds))
    for seed in seeds:
        for method in [*options.methods, *options.variants]:
            row = measured(options, method, seed)
            report.rows.append(row)
            report.say(
                f"seed {seed} {method}: hypervolume {row['hv']:.4f}, {row['passes']} passes, {row['seconds']:.0f} s"
            )
    report.finish(figures(report.rows, options.trials, seeds), seeds=seeds)


def measured(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """One study: its hypervolumes, what it cost, and the best accuracy within each of some shares of the MACs."""
    started, trials = time.perf_counter(), options.trials
    passes = round(options.share * trials * options.steps)
    steps = options.steps
    settings = [
        f"search.seed={seed}",
        "search.sensitivity=kfac",
        f"search.front_from={LOW / HIGH}",
        "tracking.models=false",
    ]
    settings += ["recipe.distillation.weight=0.7", "recipe.distillation.temperature=4", *options.set]
    if method == "fewer":
        trials = max(1, round(options.share * trials))
    elif method == "shorter":
        steps = max(1, round(options.share * steps))
    elif method != "separate":
        form = VARIANTS.get(method, Levels)
        steps, trials = passes // getattr(form, "passes_per_step", 1), options.plans + 1
        settings += ["search.strategy=nested"]
        if method == "tuned":
            settings += [f"search.nested.fine_tuning={options.fine_tuning}"]
        if form is Shrinking:
            Shrinking.steps = steps
    with tempfile.TemporaryDirectory() as runs, as_form(VARIANTS.get(method)):
        study = ranksearch.search(
            REPOSITORY / options.space, budgets={"flops": f"{100 * HIGH:g}%"}, trials=trials,
            settings=[*settings, f"recipe.steps={steps}"], runs=runs, name="bench", inline=True,
        )  # fmt: skip
        return {
            "seed": seed, "method": method, "hv": study.hypervolume, "hv_test": of_test(study),
            "passes": sum(passes_of(row.recipe, row.allocator, method) for row in study.trials), "trials": study.finished,
            **{f"best_{percent}": best_within(study, percent) for percent in SHARES},
            "seconds_per_plan": median(row.seconds or 0.0 for row in study.trials if row.allocator != "nested"),
            "seconds": time.perf_counter() - started,
            "rank_correlation": rank_correlation(study) if method == "tuned" else None,
        }  # fmt: skip


@contextmanager
def as_form(form: type[Levels] | None) -> Iterator[None]:
    """Within, nested runs take that form of the levels."""
    with mock.patch("ranksearch.trial.nested.Levels", form or Levels):
        yield


def passes_of(recipe: dict[str, Any] | None, allocator: str | None, method: str) -> int:
    per_step = getattr(VARIANTS.get(method), "passes_per_step", 1) if allocator == "nested" else 1
    return 0 if recipe is None else per_step * int(recipe["steps"])


def rank_correlation(study: Study) -> float:
    """Spearman's between the accuracies of plans as they were cut and after their factors were trained."""
    rows = [row for row in study.trials if row.complete and row.allocator != "nested"]
    scores = [{entry["phase"]: entry["val_accuracy"] for entry in row.history} for row in rows]
    return float(spearmanr([s["decomposed"] for s in scores], [s["factors"] for s in scores]).statistic)


def of_test(study: Study) -> float | None:
    """Hypervolume of the front's test accuracies."""
    rows = [row for row in study.front if row.test_accuracy is not None]
    return hypervolume([[1 - row.test_accuracy / 100, row.macs_ratio] for row in rows], [1.0, 1.0]) if rows else None


def best_within(study: Study, percent: int) -> float | None:
    """The best validation accuracy within a share of the dense MACs, with a percent of leeway for plans just above it."""
    fits = [row.val_accuracy for row in study.front if (row.macs_ratio or 1) <= percent / 100 + 0.01]
    return max(fits, default=None)


def figures(rows: list[dict[str, Any]], trials: int, seeds: list[int]) -> dict[str, Any]:
    """Medians over the seeds, by method."""

    def values(method: str, name: str) -> list[Any]:
        return [row[name] for row in rows if row["method"] == method and row[name] is not None]

    found: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        label = f"separate_{trials}" if method == "separate" else method
        for name in ("hv", "hv_test", "seconds", *(f"best_{percent}" for percent in SHARES)):
            found[f"{name}_{label}"] = median(values(method, name)) if values(method, name) else None
    if values("nested", "passes") and values("separate", "passes"):
        found["passes_ratio"] = median(values("nested", "passes")) / median(values("separate", "passes"))
        for name in ("hv", "hv_test"):
            pairs = zip(values("nested", name), values("separate", name), strict=True)
            found[f"seeds_above_{name}"] = sum(a >= b for a, b in pairs)
    if values("tuned", "rank_correlation"):
        found["rank_correlation"] = median(values("tuned", "rank_correlation"))
    if values("nested", "seconds_per_plan"):
        found["seconds_per_plan"] = median(values("nested", "seconds_per_plan"))
    return found


if __name__ == "__main__":
    main()
