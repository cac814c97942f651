"""Which parts of the training recipe help: one change at a time against a base recipe, on the real CIFAR-10 by validation accuracy.

Every variant starts from the same checkpoint, and sees the same batches as the base of its seed unless it trains factors (the BN
re-estimation before them draws from the same random numbers). A row gives the mean over seeds and the differences seed by seed. The public
checkpoint has seen the validation images, which favours what stays close to it: differences count, accuracies are too high. The
test set is not read.

    python scripts/ablate_recipe.py --seeds 2          ResNet-20 at a quarter of its parameters, 150 steps: about half an hour on two cores
    python scripts/ablate_recipe.py --only "EMA .95" "period x 4" --steps 1000
    python scripts/ablate_recipe.py --quick            whether it runs
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from report import Report, arguments
from training_runs import Bench, add_options, choose_device

from ranksearch.errors import nearest
from ranksearch.lowering import default_lowerings
from ranksearch.space.recipe import RecipeSpace
from ranksearch.trial.recipe import Recipe, middle

WITH_CP = (*default_lowerings(), "cp")
BASE: dict[str, Any] = {
    "calibration": "none",
    "factor_steps": "plain",
    "factor_share": 0.0,
    "distillation.weight": 0.7,
    "distillation.temperature": 2.0,
}


def variants(lr: float, period: int) -> dict[str, dict[str, Any]]:
    """Name -> changes of the base recipe, by dotted names; `plan` chooses another plan of the same size."""
    return {
        "base": {},
        "no distillation": {"distillation.weight": 0.0},
        "distillation .95": {"distillation.weight": 0.95},
        "temperature 4": {"distillation.temperature": 4.0},
        "temperature 8": {"distillation.temperature": 8.0},
        "temperature 16": {"distillation.temperature": 16.0},
        "distillation .95, temperature 4": {"distillation.weight": 0.95, "distillation.temperature": 4.0},
        "factors for the last 15 %": {"factor_share": 0.15},
        "factors for the last half": {"factor_share": 0.5},
        "factors for the last 15 %, lr x .1": {"factor_share": 0.15, "factor_lr": 0.1},
        "factors for the last half, lr x .1": {"factor_share": 0.5, "factor_lr": 0.1},
        "factors for the last half, matched steps": {"factor_share": 0.5, "factor_steps": "matched"},
        "decomposed first": {"factor_share": 1.0},
        "decomposed first, matched steps": {"factor_share": 1.0, "factor_steps": "matched"},
        "fitted layer after layer": {"calibration": "sequential"},
        "period / 4": {"projection.period": max(1, period // 4)},
        "period x 4": {"projection.period": 4 * period},
        "projections from 30 % on": {"projection.start": 0.3},
        "projections until 70 %": {"projection.until_end": 0.7},
        "period by learning rate": {"projection.schedule": "learning_rate"},
        "period by removed energy": {"projection.schedule": "removed_energy"},
        "momentum reset": {"projection.momentum": "reset"},
        "energy transfer": {"projection.energy_transfer": True},
        "BN rectification": {"projection.bn_rectification": True},
        "lr / 2": {"lr": lr / 2},
        "lr x 2": {"lr": 2 * lr},
        "constant lr": {"schedule": "constant"},
        "no warm-up": {"warmup": 0.0},
        "AdamW, lr .001": {"optimizer": "adamw", "lr": 1e-3},
        "label smoothing .1": {"label_smoothing": 0.1},
        "gradient norm <= 1": {"clip_norm": 1.0},
        "EMA .95": {"ema": 0.95},
        "plan without cp": {"plan": ("solver", default_lowerings())},
        "plan without cp, BN rectification": {
            "plan": ("solver", default_lowerings()), "projection.bn_rectification": True,
        },
        "plan without cp, ranks annealed over half": {
            "plan": ("solver", default_lowerings()), "projection.rank_annealing": 0.5,
        },
        "plan without cp, factors for the last half": {"plan": ("solver", default_lowerings()), "factor_share": 0.5},
        "plan without cp, factors for the last half, matched steps": {
            "plan": ("solver", default_lowerings()), "factor_share": 0.5, "factor_steps": "matched",
        },
        "plan: uniform Tucker-2": {"plan": ("uniform", ("tucker2",))},
    }  # fmt: skip


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"projection.period": 5} -> {"projection": {"period": 5}}"""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return found


def main() -> None:
    parser = arguments(__doc__, steps=150, batch_size=128, lr=0.02, period=8, ratio=4.28)
    add_options(parser, out="runs/ablate_recipe")
    parser.set_defaults(model="resnet20", validation=2000)
    parser.add_argument("--only", nargs="+", help="names of variants (default: all)")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.period, options.validation, options.batch_size = 8, 2, 250, 32
        options.only, options.out = options.only or ["energy transfer"], options.out / "quick"
    known = variants(options.lr, options.period)
    for name in options.only or ():
        if name not in known:
            parser.error(f"there is no variant {name!r}. {nearest(name, known)}")
    choose_device(options.device)
    report = Report("ablate_recipe", options)
    bench = Bench.open(options, report.say)
    seeds = range(options.seed, options.seed + options.seeds)
    chosen = {name: known[name] for name in ["base", *(options.only or list(known)[1:])]}
    found: dict[str, list[dict[str, Any]]] = {}
    shared = {"steps": options.steps, "batch_size": options.batch_size, "lr": options.lr} | BASE
    shared |= {"projection.period": options.period} | ({"bn_batches": 5} if options.quick else {})
    for name, changes in chosen.items():
        settings = shared | changes
        allocator, lowerings = settings.pop("plan", ("solver", WITH_CP))
        plan = bench.plan(allocator, options.ratio, lowerings, include=("layer*",))
        recipe = Recipe.settled(RecipeSpace(**nested(settings)), middle)
        found[name] = [bench.run({"variant": name}, plan, recipe, seed, test=False) for seed in seeds]
        report.rows.append(compared(name, found[name], found["base"]))
    report.finish({"base_val_accuracy": report.rows[0]["val_accuracy"]}, seeds=list(seeds))


def compared(name: str, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of a variant, and its validation accuracy minus the base's, seed by seed. A diverged run has no accuracy."""

    def scores_of(runs: list[dict[str, Any]]) -> list[float | None]:
        return [run["val_accuracy"] if run["status"] == "complete" else None for run in runs]

    scores = scores_of(rows)
    known = [score for score in scores if score is not None]
    trained = [row["val_trained"] for row in rows if "val_trained" in row]
    pairs = zip(scores, scores_of(base), strict=True)
    return {
        "variant": name,
        "val_accuracy": mean(known) if known else None,
        "differences": [round(a - b, 2) for a, b in pairs if a is not None and b is not None],
        "diverged": len(scores) - len(known),
        "val_trained": mean(trained) if trained else None,
        "macs": rows[0]["macs"],
        "projection_share": rows[0]["projection_share"],
        "seconds": mean(row["seconds"] for row in rows),
    }


if __name__ == "__main__":
    main()
