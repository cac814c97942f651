"""What the latency table is worth: how well it predicts whole nets, what speed plans made with it reach, and what a latency study leaves.

1. `prediction`: ResNet-18 at 224 x 224 and ResNet-20 at 32 x 32, batch 1 and 32, PyTorch eager and ONNX Runtime: a dozen plans each (random
   ones at any rank, the solver's, uniform ones), measured whole in turn with the dense net. The error is |predicted / dense in the table -
   measured / dense in the same run| as a share of the latter.
2. `speedup`: ResNet-18, batch 1, one thread: the fastest plans by the table that still use 50 and 25 % of the FLOPs (to three points),
   beside the solver's plans that know of FLOPs alone; dense / plan, measured in turn, median of `--repeats` measurements.
3. `front`: a study of the digits' ResNet-8 with latency as objective; nets on its front that are slower than the dense one.
4. `pivoted`: ResNet-18 and a sentence encoder (MiniLM, 64 tokens; extra `text`), batch 1 and 32, eager and ONNX Runtime: every layer
   lowered alike at half of the FLOPs, and in the pivoted form at the same ranks, measured whole in turn with the dense net.

    python scripts/bench_latency.py --json > latency.json       about half an hour on one core
    python scripts/bench_latency.py --quick                     ResNet-20 at batch 1, eager, fewer plans, a small study, within a minute

Weights are random but for the study's. Tables are kept in `--tables` and used again; delete the folder to time the layers anew.
"""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from imagenet_resnets import resnet18
from report import Report, arguments
from torch import Tensor, nn

import ranksearch
from ranksearch.allocate import BASELINES, Curves, LayerRules, allocate_plan, parse_budget, rank_curves
from ranksearch.allocate.baselines import random as random_plan
from ranksearch.allocate.latency import timed
from ranksearch.compress import RankPlan, restructure_, trace
from ranksearch.deploy.latency_table import LatencyTable
from ranksearch.deploy.stopwatch import LatencySetting, Stopwatch
from ranksearch.errors import UsageError
from ranksearch.tasks.resnet import CifarResNet

LOWERINGS = ("im2col", "channel", "spatial", "tucker2")
RUNTIMES = ("eager", "onnx")
NETS = {"resnet18": (resnet18, 224), "resnet20": (lambda: CifarResNet(3, channels=3, classes=10), 32)}
RANDOM = (85, 75, 65, 55, 50, 45)
SOLVED = ((75, 1), (50, 1), (50, 16), (60, 16))
"""(FLOPs in percent, rank multiple)"""
UNIFORM = ("im2col", "spatial")
NEAR = 3.0
"""A plan at 50 % of the FLOPs uses at least this many points less."""


def net_of(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    build, size = NETS[name]
    torch.manual_seed(seed)
    return build().eval(), torch.zeros(1, 3, size, size)


def curves_of(model: nn.Module, example: Tensor, lowerings: tuple[str, ...], multiple: int) -> Curves:
    return rank_curves(model, trace(model, example), LayerRules(lowerings, rank_multiple=multiple))


def table_of(options: Any, runtime: str, batch: int) -> LatencyTable:
    setting = LatencySetting(runtime, batch, options.threads)
    return LatencyTable(Stopwatch(setting), [Path(options.tables) / "latency.json"])


def plans_of(curves: dict[Any, Curves], quick: bool) -> Iterator[tuple[str, Any, RankPlan]]:
    """A dozen plans of a net: by which allocator at which share of the FLOPs, of which curves."""
    for seed, percent in enumerate(RANDOM[:2] if quick else RANDOM):
        yield f"random {percent}", 1, random_plan(curves[1], [parse_budget("flops", f"{percent}%")], seed=seed)
    for percent, multiple in SOLVED[:1] if quick else SOLVED:
        yield (
            f"solver {percent}, multiples of {multiple}",
            multiple,
            allocate_plan(curves[multiple], [parse_budget("flops", f"{percent}%")]).plan,
        )
    for name in UNIFORM[:1] if quick else UNIFORM:
        yield f"uniform {name}", name, BASELINES["uniform"](curves[name], [parse_budget("flops", "60%")])


def prediction(report: Report) -> dict[str, Any]:
    quick, worst = report.options.quick, 0.0
    for name in ("resnet20",) if quick else NETS:
        model, example = net_of(name, report.options.seed)
        curves: dict[Any, Curves] = {m: curves_of(model, example, LOWERINGS, m) for m in (1, 16)}
        curves |= {lowering: curves_of(model, example, (lowering,), 1) for lowering in UNIFORM}
        plans = list(plans_of(curves, quick))
        nets = [model, *(restructure_(copy.deepcopy(model), plan) for *_, plan in plans)]
        for batch in (1,) if quick else (1, 32):
            for runtime in RUNTIMES[:1] if quick else RUNTIMES:
                table = table_of(report.options, runtime, batch)
                known = {key: timed(found, model, example, table, report.say) for key, found in curves.items()}
                dense_ms, factors = known[1].dense.latency_ms, known[1].timing.factors
                dense, *measured = table.stopwatch.nets_ms(nets, example)
                errors = []
                for (text, key, plan), ms in zip(plans, measured, strict=True):
                    ratio = known[key].cost(plan).latency_ms / dense_ms
                    errors.append(ratio * dense / ms - 1)
                    report.rows.append({
                        "part": "prediction", "net": name, "runtime": runtime, "batch": batch, "plan": text, "dense_ms": dense,
                        "measured_ms": ms, "predicted_ms": ratio * dense, "error": errors[-1], "table_dense_ms": dense_ms,
                        "factors": "{:.3f} {:.3f}".format(*factors),
                    })  # fmt: skip
                worst = max(worst, float(np.abs(errors).max()))
                report.say(
                    f"{name}, {runtime}, batch {batch}: dense {dense:.3f} ms (table {dense_ms:.3f}), factors "
                    f"{factors[0]:.3f} {factors[1]:.3f}, errors {100 * min(errors):+.1f} to {100 * max(errors):+.1f} %"
                )
    return {"prediction_error_max": worst}


def fastest_at(curves: Curves, percent: int) -> RankPlan:
    """The plan of the smallest latency budget at which the solver still uses the FLOPs that it may, by bisection."""
    flops, low, high = parse_budget("flops", f"{percent}%"), 0.0, 100.0
    found = allocate_plan(curves, [flops]).plan
    for _ in range(12):
        level = (low + high) / 2
        try:
            plan = allocate_plan(curves, [flops, parse_budget("latency", f"{level:.4f}%")]).plan
            uses = 100 * curves.cost(plan).macs / curves.dense.macs
        except UsageError:
            uses = 0.0
        if uses >= percent - NEAR:
            found, high = plan, level
        else:
            low = level
    return found


def speedup(report: Report) -> dict[str, Any]:
    model, example = net_of("resnet18", report.options.seed)
    plain = curves_of(model, example, LOWERINGS, 16)
    found: dict[str, float] = {}
    for runtime in RUNTIMES:
        table = table_of(report.options, runtime, 1)
        curves = timed(plain, model, example, table, report.say)
        plans = {}
        for percent in (50, 25):
            plans[percent, "latency"] = fastest_at(curves, percent)
            plans[percent, "flops alone"] = allocate_plan(plain, [parse_budget("flops", f"{percent}%")]).plan
        nets = [model, *(restructure_(copy.deepcopy(model), plan) for plan in plans.values())]
        runs = np.array([table.stopwatch.nets_ms(nets, example) for _ in range(report.options.repeats)])
        ratios = runs[:, :1] / runs
        for column, ((percent, how), plan) in enumerate(plans.items(), start=1):
            value, cost = float(median(ratios[:, column])), curves.cost(plan)
            report.rows.append({
                "part": "speedup", "net": "resnet18", "runtime": runtime, "plan": f"{percent} %, {how}", "speedup": value,
                "lowest": float(ratios[:, column].min()), "highest": float(ratios[:, column].max()),
                "predicted": curves.dense.latency_ms / cost.latency_ms, "macs_ratio": cost.macs / curves.dense.macs,
                "dense_ms": float(median(runs[:, 0])), "lowerings": plan.summary(),
            })  # fmt: skip
            report.say(
                f"{runtime}, {percent} %, {how}: {value:.2f} times as fast, {100 * cost.macs / curves.dense.macs:.1f} % of FLOPs"
            )
            if how == "latency":
                found[f"speedup_resnet18_{percent}_{runtime}"] = value
    best = {f"speedup_resnet18_{p}": max(found[f"speedup_resnet18_{p}_{r}"] for r in RUNTIMES) for p in (50, 25)}
    return best | found


def front(report: Report) -> dict[str, Any]:
    space = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
    settings = ["search.objectives=[accuracy, latency]", "tracking.models=false"]
    settings += [f"latency.threads={report.options.threads}"]
    settings += ["recipe.steps=20", "search.trials=4"] if report.options.quick else ["recipe.steps=120"]
    with tempfile.TemporaryDirectory() as runs:
        study = ranksearch.search(space, settings=settings, runs=runs, inline=True)
        record = study.front_record()
        everything = study.trials
    on_front = {row["trial"] for row in record["trials"]}
    slower = [row for row in record["trials"] if row["latency_ratio"] > 1]
    for row in everything:
        report.rows.append({
            "part": "front", "net": "digits/resnet8", "trial": row["trial"], "on_front": row["trial"] in on_front,
            "val_accuracy": row["val_accuracy"], "latency_predicted_ms": row["latency_predicted_ms"], "latency_ms": row["latency_ms"],
            "latency_ratio": row["latency_ratio"], "macs_ratio": row["macs_ratio"],
        })  # fmt: skip
    report.say(f"front of {len(record['trials'])} of {len(everything)} trials, {len(slower)} of them slower than dense")
    return {"slower_than_dense_on_front": len(slower), "front_size": len(record["trials"])}


def pivoted(report: Report) -> dict[str, Any]:
    """Time over the dense net's of the plain and the pivoted form at equal ranks (`pivoted_{net}_{lowering}_{runtime}_{batch}`: over the
    plain one's)."""
    from encoder import TOKENS, minilm

    cases: dict[str, tuple[nn.Module, Tensor, tuple[str, ...], tuple[str, ...]]] = {
        "resnet18": (*net_of("resnet18", report.options.seed), LOWERINGS, ("*",))
    }
    try:
        cases["encoder"] = (minilm()[1], torch.zeros(1, TOKENS, dtype=torch.long), ("svd",), ("bert.encoder.*",))
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        report.say(f"the encoder is left out: {error} (the extra `text`)")
    figures: dict[str, Any] = {}
    for name, (model, example, lowerings, include) in cases.items():
        plans, net = {"dense": RankPlan()}, trace(model, example)
        for lowering in lowerings:
            curves = rank_curves(model, net, LayerRules((lowering,), include=include))
            plan = BASELINES["uniform"](curves, [parse_budget("flops", "50%")], None)
            plans[lowering] = plan
            plans[f"{lowering}_pivoted"] = RankPlan(
                {layer: replace(choice, lowering=f"{lowering}_pivoted") for layer, choice in plan.lowered()}
            )
        nets = [restructure_(copy.deepcopy(model), plan) for plan in plans.values()]
        for runtime in RUNTIMES:
            for batch in (1, 32):
                watch = Stopwatch(LatencySetting(runtime, batch, report.options.threads))
                ms = dict(zip(plans, watch.nets_ms(nets, example), strict=True))
                for lowering in lowerings:
                    plain, other = ms[lowering], ms[f"{lowering}_pivoted"]
                    report.rows.append({
                        "part": "pivoted", "net": name, "runtime": runtime, "batch": batch, "lowering": lowering, "dense_ms": ms["dense"],
                        "plain_ratio": plain / ms["dense"], "pivoted_ratio": other / ms["dense"],
                    })  # fmt: skip
                    figures[f"pivoted_{name}_{lowering}_{runtime}_{batch}"] = other / plain
                shown = ", ".join(
                    f"{low} {ms[low] / ms['dense']:.2f} → {ms[f'{low}_pivoted'] / ms['dense']:.2f}" for low in lowerings
                )
                report.say(f"{name}, {runtime}, batch {batch}: dense {ms['dense']:.2f} ms; {shown}")
    return figures


PARTS = {"prediction": prediction, "speedup": speedup, "front": front, "pivoted": pivoted}


def main() -> None:
    parser = arguments(__doc__, tables="bench-latency-tables", repeats=5)
    parser.add_argument("--only", action="append", choices=PARTS, help="repeatable; all where left out")
    parser.set_defaults(threads=1)
    report = Report("bench_latency", parser.parse_args())
    skipped = ("speedup", "pivoted") if report.options.quick else ()
    figures: dict[str, Any] = {}
    for name in report.options.only or [part for part in PARTS if part not in skipped]:
        figures |= PARTS[name](report)
    report.finish(figures)


if __name__ == "__main__":
    main()
