"""The tables of Lee, Kwon, Kim & Wei 2019 (arXiv 1905.10145) run again: ResNet-32 on CIFAR-10 from the same public checkpoint.

  dense        the dense control: the same checkpoint, schedule, steps and seeds, nothing projected
  projection   Tucker-2 at one rank ratio for all thirty convs, projected every `--period` steps, then decomposed (their method)
  decomposed   the same plan decomposed first and trained as factors (their baseline)
  ours         ranks and lowerings allocated per layer, with no more parameters than that plan, our recipe (`OURS`)
  tiled        square tiles of the nine largest convs by projection, at 2x and 4x of those layers

A ratio is dense parameters / compressed parameters of the whole net, batch norm and classifier included (harder than over the convs
alone). Test accuracy is read once, at a run's end, from the net as it is loaded from disk; nothing is chosen on it. The paper does not
state its schedule; here all runs share one: SGD, linear warm-up, cosine. Finished runs are kept in `--out`; a stopped script goes on.

    python scripts/reproduce_paper.py --epochs 100 --seeds 3                     in full, for a GPU: the paper's period of 200 steps
    python scripts/reproduce_paper.py --epochs 1 --seeds 2 --period 20           two cores, about an hour and a half
    python scripts/reproduce_paper.py --quick                                    whether it runs
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from report import Report, arguments
from training_runs import Bench, add_options, choose_device

from ranksearch.compress import LayerPlan, RankPlan
from ranksearch.lowering import default_lowerings
from ranksearch.places.files import write_atomically
from ranksearch.space.recipe import RecipeSpace
from ranksearch.trial.recipe import Recipe, middle

PAPER = {
    "projection": {1.57: 92.92, 2.06: 92.62, 2.80: 92.43, 4.28: 91.49, 6.72: 90.43},
    "decomposed": {1.57: 92.20, 2.06: 92.09, 2.80: 91.75, 4.28: 90.96, 6.72: 89.77},
}
PAPER_TILED = {
    2: {64: 93.34, 32: 93.11, 16: 93.01, 8: 93.23},
    4: {64: 92.94, 32: 92.97, 16: 93.00, 8: 92.81},
}
PAPER_MODEL = "resnet32"
METHODS = ("dense", "projection", "decomposed", "ours", "tiled")
FULL_EPOCHS, FULL_SEEDS = 60, 3
OURS_LOWERINGS = (*default_lowerings(), "cp")
OURS: dict[str, Any] = {"factor_share": 0.0, "distillation": {"weight": 0.7, "temperature": 8.0}}
"""What our recipe changes, chosen by validation accuracy in `scripts/ablate_recipe.py`."""

Job = tuple[dict[str, Any], RankPlan, dict[str, Any]]


def jobs(bench: Bench, methods: list[str], ratios: list[float], tiles: list[int]) -> Iterator[Job]:
    """(label, plan, what differs from the paper's pure recipe), the shorter table first."""
    if "dense" in methods:
        yield {"method": "dense"}, RankPlan(model=reference(bench)), {}
    for ratio in ratios:
        uniform = bench.plan("uniform", ratio, ("tucker2",), include=("layer*",))
        for method in methods:
            label = {"method": method, "target": ratio}
            if method == "projection":
                yield label, uniform, {}
            if method == "decomposed":
                yield label, uniform, {"factor_share": 1.0}
            if method == "ours":
                yield label, bench.plan("solver", bench.ratio(uniform), OURS_LOWERINGS), OURS
    if "tiled" in methods:
        for factor, tile in ((factor, tile) for factor in (2, 4) for tile in tiles):
            yield {"method": "tiled", "target": factor, "tile": tile}, tiled_plan(bench, tile, factor), {}


def reference(bench: Bench) -> str:
    return f"{bench.task.name}/{bench.task.model_name}"


def tiled_plan(bench: Bench, tile: int, factor: int) -> RankPlan:
    """Square tiles of side t at rank t / (2 * factor), so that a layer has 1 / factor of its parameters, on the largest convs."""
    convs = [layer for layer in bench.net.layers if layer.name.startswith("layer")]
    largest = max(layer.spec.params for layer in convs)
    chosen = [layer.name for layer in convs if layer.spec.params == largest]
    return RankPlan({name: LayerPlan(f"tiled_{tile}", tile // (2 * factor)) for name in chosen}, reference(bench))


def summarise(rows: list[dict[str, Any]]) -> dict[tuple[str, float | None, int | None], dict[str, Any]]:
    """(method, target, tile) -> mean and deviation of test accuracy over seeds, ratios, the loss by the last projection."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row.get("target"), row.get("tile")].append(row)
    found = {}
    for key, group in groups.items():
        tests = [row["test_accuracy"] for row in group if row["test_accuracy"] is not None]
        complete = len(tests) == len(group)  # a mean over the seeds that happened to survive would flatter
        lost = [row["val_trained"] - row["val_decomposed"] for row in group if row.get("val_decomposed") is not None]
        found[key] = {
            "test": mean(tests) if complete else None,
            "deviation": stdev(tests) if complete and len(tests) > 1 else None,
            "diverged": len(group) - len(tests),
            "n": len(tests),
            "ratio": group[0]["ratio"],
            "macs": group[0]["macs"],
            "lost": mean(lost) if lost else None,
        }
    return found


def figures(rows: list[dict[str, Any]], ratios: list[float], *, full: bool) -> dict[str, Any]:
    found = summarise(rows)

    def test(method: str, ratio: float | None = None) -> float | None:
        return found.get((method, ratio, None), {}).get("test")

    def difference(one: float | None, other: float | None) -> float | None:
        return round(one - other, 3) if one is not None and other is not None else None

    dense, result = test("dense"), {}
    for ratio in ratios:
        ours, projection, decomposed = (test(method, ratio) for method in ("ours", "projection", "decomposed"))
        result[f"projection_minus_decomposed_{ratio:.2f}"] = difference(projection, decomposed)
        result[f"ours_minus_projection_{ratio:.2f}"] = difference(ours, projection)
        result[f"ours_minus_decomposed_{ratio:.2f}"] = difference(ours, decomposed)
        for name, value in (("projection", projection), ("decomposed", decomposed), ("ours", ours)):
            result[f"{name}_minus_dense_{ratio:.2f}"] = difference(value, dense)
        if full and ratio in PAPER["projection"]:
            result[f"ours_minus_paper_{ratio:.2f}"] = difference(ours, PAPER["projection"][ratio])
    trained = [row for row in rows if row["method"] not in ("dense", "decomposed") and "val_decomposed" in row]
    lost = [row["val_projected"] - row["val_decomposed"] for row in trained]
    result["decomposition_loss_max"] = round(max(lost), 3) if lost else None
    lost = [row["val_trained"] - row["val_decomposed"] for row in trained]
    result["last_projection_loss_mean"] = round(mean(lost), 3) if lost else None
    return {name: value for name, value in result.items() if value is not None}


def markdown(rows: list[dict[str, Any]], ratios: list[float], heading: str, *, paper: bool) -> str:
    """The tables as people read them: test accuracy in percent, mean ± deviation over seeds, the paper's beside them where `paper`."""
    found = summarise(rows)

    def cell(method: str, target: float | None = None, tile: int | None = None) -> str:
        entry = found.get((method, target, tile))
        if entry is None:
            return "–"
        if entry["test"] is None:
            return f"{entry['diverged']} of {entry['n'] + entry['diverged']} diverged"
        spread = f" ± {entry['deviation']:.2f}" if entry["deviation"] is not None else ""
        return f"{entry['test']:.2f}{spread}"

    def line(name: str, cells: list[str]) -> str:
        return "| " + " | ".join([name, *cells]) + " |"

    lines = [heading, "", f"Dense control: {cell('dense')}.", ""]
    lines += [line("ratio", [f"{ratio:.2f}" for ratio in ratios]), line("---", ["---"] * len(ratios))]
    names = {"projection": "projection training, uniform Tucker-2", "decomposed": "decomposed, then trained"}
    for method in ("projection", "decomposed", "ours"):
        lines.append(line(names.get(method, method), [cell(method, ratio) for ratio in ratios]))
        if paper and method in PAPER:
            lines.append(line("*paper*", [f"*{PAPER[method][r]:.2f}*" if r in PAPER[method] else "–" for r in ratios]))
        if method != "decomposed":
            losses = [found.get((method, ratio, None), {}).get("lost") for ratio in ratios]
            cells = [f"{round(value, 1) + 0.0:.1f}" if value is not None else "–" for value in losses]
            lines.append(line("lost by the last projection and decomposing (validation)", cells))
    macs = [found.get(("ours", ratio, None), {}).get("macs") for ratio in ratios]
    lines.append(line("MACs of ours, % of dense", [f"{100 * m:.1f}" if m else "–" for m in macs]))
    if any(key[0] == "tiled" for key in found):
        tiles = list(PAPER_TILED[2])
        lines += ["", line("tiled", [f"{t}×{t}" for t in tiles]), line("---", ["---"] * len(tiles))]
        for factor, printed in PAPER_TILED.items():
            ratio = next((e["ratio"] for k, e in found.items() if k[:2] == ("tiled", factor)), None)
            whole = f" ({ratio:.2f}× of the net)" if ratio else ""
            lines.append(line(f"{factor}× of nine convs{whole}", [cell("tiled", factor, t) for t in tiles]))
            if paper:
                lines.append(line("*paper*", [f"*{printed[t]:.2f}*" for t in tiles]))
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], ratios: list[float], path: Path, *, paper: bool) -> None:
    """Test accuracy against the ratio of parameters: ours, the paper's two ways, its own figures where `paper`, the dense control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = summarise(rows)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {"ours": ("tab:green", "o"), "projection": ("tab:blue", "s"), "decomposed": ("tab:orange", "^")}
    for method, (colour, marker) in styles.items():
        entries = [found.get((method, ratio, None)) for ratio in ratios]
        known = [entry for entry in entries if entry is not None and entry["test"] is not None]
        if known:
            axes.errorbar(
                [entry["ratio"] for entry in known], [entry["test"] for entry in known],
                yerr=[entry["deviation"] or 0 for entry in known], color=colour, marker=marker, capsize=3, label=method,
            )  # fmt: skip
        if paper and method in PAPER:
            axes.plot(
                list(PAPER[method]), list(PAPER[method].values()), ":", color=colour, label=f"{method}, as printed"
            )
    dense = found.get(("dense", None, None), {}).get("test")
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=1, label="dense control")
    axes.set(xscale="log", xlabel="dense / compressed parameters", ylabel="test accuracy, %")
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = arguments(__doc__, epochs=100.0, batch_size=128, lr=0.02, period=200)
    add_options(parser, out="runs/reproduce_paper")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(PAPER["projection"]))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tiles", type=int, nargs="+", choices=list(PAPER_TILED[2]), default=list(PAPER_TILED[2]))
    options = parser.parse_args()
    if options.quick:
        options.subset, options.epochs, options.period, options.validation, options.batch_size = 320, 1.0, 2, 250, 64
        options.ratios, options.methods, options.seeds = [4.28], list(METHODS[:4]), 1
        options.out = options.out / "quick"
    choose_device(options.device)
    report = Report("reproduce_paper", options)
    bench = Bench.open(options, report.say, test_images=500 if options.quick else None)
    steps = bench.steps(options.epochs, options.batch_size)
    shared = {
        "steps": steps, "batch_size": options.batch_size, "lr": options.lr, "factor_share": 0.0,
        "calibration": "none",  # the paper starts from the dense weights
        "factor_steps": "plain",
        "projection": {"period": options.period},
    } | ({"bn_batches": 5} if options.quick else {})  # fmt: skip
    planned = list(jobs(bench, options.methods, options.ratios, options.tiles))
    seeds = list(range(options.seed, options.seed + options.seeds))
    for seed in seeds:
        for label, plan, changes in planned:
            recipe = Recipe.settled(RecipeSpace(**(shared | changes)), middle)
            report.say(f"run {len(report.rows) + 1} of {len(seeds) * len(planned)}: {label}, seed {seed}")
            report.rows.append(bench.run(label, plan, recipe, seed, test=True))
            write_tables(options.out, report, bench, options, steps)
    full = (
        bench.task.model_name == PAPER_MODEL
        and not options.subset
        and options.epochs >= FULL_EPOCHS
        and options.seeds >= FULL_SEEDS
    )
    report.finish(
        figures(report.rows, options.ratios, full=full),
        [f"table and figure: {options.out}/table.md, figure.png"],
        seeds=seeds,
    )


def write_tables(out: Path, report: Report, bench: Bench, options: Any, steps: int) -> None:
    """`table.md`, `figure.png` and `rows.json` of what is known by now."""
    minutes = sum(row["seconds"] for row in report.rows) / 60
    heading = (
        f"{bench.task.model_name}, official CIFAR-10: {len(bench.task.train):,} training images, {steps} steps of {options.batch_size} "
        f"({options.epochs:g} epochs), peak learning rate {options.lr:g}, period {options.period}, "
        f"seeds {options.seed}..{options.seed + options.seeds - 1}, "
        f"{len(bench.task.test or ()):,} test images; {report.device}, {options.threads} threads, torch {report.versions['torch']}; "
        f"{len(report.rows)} runs, {minutes:.0f} minutes of training."
    )
    out.mkdir(parents=True, exist_ok=True)
    paper = bench.task.model_name == PAPER_MODEL
    write_atomically(out / "table.md", markdown(report.rows, options.ratios, heading, paper=paper))
    draw(report.rows, options.ratios, out / "figure.png", paper=paper)
    record = {"device": report.device, "versions": report.versions, "rows": report.rows}
    write_atomically(out / "rows.json", json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
