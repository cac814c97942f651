"""What a learning rate does to factors: steps matched to those of the dense weight against plain ones, ResNet-20 on the real CIFAR-10.

The dense net is trained here, by SGD on the training images alone, so that validation accuracy favours nothing; after so few epochs it is
far from converged. Its plans within 35 and 20 % of the MACs then run by one recipe, half of the steps on the factors; what differs is
`recipe.factor_steps` and `factor_lr`, which scales the rate of all that is trained then, BN and biases included. A row has the validation
accuracy when the factors' training begins (`decomposed`) and ends (`factors`), and the last loss, means over the seeds; `projected alone`
trains no factors at all.

    python scripts/bench_factor_steps.py --threads 1 --seeds 2      about three quarters of an hour on one core
    python scripts/bench_factor_steps.py --quick                    whether it runs

Runs that are done are kept in `--out` and not made again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean
from typing import Any

import safetensors.torch
import torch
from report import Report, arguments
from training_runs import Bench, add_options, choose_device

from ranksearch.compress import dense_cost, trace
from ranksearch.lowering import default_lowerings
from ranksearch.places.files import partly_written
from ranksearch.space.recipe import RecipeSpace
from ranksearch.tasks import cifar10
from ranksearch.tasks.task import Task
from ranksearch.training.dense import State, read_checkpoint
from ranksearch.training.device import pick_device, use_bf16
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Training
from ranksearch.trial.recipe import Recipe, middle

SHARES = (0.35, 0.2)
VARIANTS: dict[str, dict[str, Any]] = {
    "projected alone": {"factor_share": 0.0},
    "plain": {"factor_steps": "plain"},
    "plain, rate x .3": {"factor_steps": "plain", "factor_lr": 0.3},
    "matched": {"factor_steps": "matched"},
    "matched, rate x 3": {"factor_steps": "matched", "factor_lr": 3.0},
}


def main() -> None:
    parser = arguments(__doc__, steps=200, batch_size=128, lr=0.02, dense_steps=1400)
    add_options(parser, out="runs/bench_factor_steps")
    parser.set_defaults(model="resnet20", validation=2000)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.dense_steps, options.validation, options.batch_size = 6, 6, 250, 32
        options.out = options.out / "quick"
    choose_device(options.device)
    report = Report("bench_factor_steps", options)
    task = cifar10.make_task(options.model, data=options.data, validation=options.validation, split_seed=0)
    if options.subset:
        task = replace(task, train=task.train.first(options.subset))
    dense = trained(task, options)
    bench = Bench(task, dense, trace(task.dense_model(), task.example_input), options.out, report.say)
    report.say(f"dense net after {options.dense_steps} steps: validation {bench.dense_accuracy:.2f} %")
    seeds = range(options.seed, options.seed + options.seeds)
    shared = {"steps": options.steps, "batch_size": options.batch_size, "lr": options.lr}
    shared |= {"bn_batches": 2} if options.quick else {}
    for share in SHARES:
        plan = bench.plan("solver", 1 / share, default_lowerings(), cost="macs")
        for name, changes in VARIANTS.items():
            recipe = Recipe.settled(RecipeSpace(**shared | changes), middle)
            runs = [bench.run({"macs": share, "steps": name}, plan, recipe, seed, test=False) for seed in seeds]
            report.rows.append({"macs": share, "factor_steps": name, **means(runs)})
    report.finish(figures(report.rows) | {"dense_val_accuracy": bench.dense_accuracy}, seeds=list(seeds))


def means(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What runs of several seeds reached; None where one of them did not get there."""
    found = {phase: [run.get(f"val_{phase}") for run in runs] for phase in ("decomposed", "factors")}
    found["loss"] = [run["val_loss"] if run["status"] == "complete" else None for run in runs]
    last = [run["val_accuracy"] if run["status"] == "complete" else None for run in runs]
    return {
        **{name: None if None in values else mean(values) for name, values in found.items()},
        "last": None if None in last else mean(last),
        "each": " ".join(run["status"] if value is None else f"{value:.2f}" for run, value in zip(runs, last, strict=True)),
    }  # fmt: skip


def trained(task: Task, options: argparse.Namespace) -> State:
    """The dense net after `dense_steps`, from the file of an earlier call where there is one."""
    kind = f"{options.model}-{len(task.train)}-{options.dense_steps}x{options.batch_size}"
    file = options.out / f"{kind}.safetensors"
    if file.is_file():
        return read_checkpoint(file)
    device, model = pick_device(), task.dense_model()
    settings = Optimisation(
        optimizer="sgd", schedule="cosine", lr=0.2, warmup=0.2, momentum=0.9, weight_decay=5e-4, batch_size=options.batch_size,
        total_steps=options.dense_steps, label_smoothing=0.0, clip_norm=0.0, ema=0.0, compile=False,
        bf16=use_bf16("auto", device, dense_cost(trace(model, task.example_input)).macs),
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    Training(model.to(device), task.to(device), settings, range(options.dense_steps), generator=generator).run()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    options.out.mkdir(parents=True, exist_ok=True)
    with partly_written(file) as partial:
        safetensors.torch.save_file(weights, partial)
    return weights


def figures(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Points by which matched steps end above plain ones, at the same rate and at the better one of two, by share of the MACs."""
    ends = {(row["macs"], row["factor_steps"]): row["last"] for row in rows}
    found: dict[str, float | None] = {}
    for share in SHARES:
        ours = ends[share, "matched"]
        plain = [
            end for (of, name), end in ends.items() if of == share and name.startswith("plain") and end is not None
        ]
        at_rate = ends[share, "plain"]
        found[f"matched_above_plain_{share:g}"] = None if ours is None or at_rate is None else ours - at_rate
        found[f"matched_above_best_plain_{share:g}"] = None if ours is None or not plain else ours - max(plain)
    return found


if __name__ == "__main__":
    main()
