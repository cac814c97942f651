"""Images per second of our training loop against a plain one: the same net and batch size, in one run, on random images.

  plain       fp32, torch's DataLoader over a dataset that crops, flips and normalises image by image; with no worker process, with
              two, and with as many as there are cores (up to 8)
  resident    our loop in fp32: data on the device, augmentation on whole batches, channels_last
  ours        the same in the precision that a trial takes by itself ("auto": bf16 where the hardware has it)
  projected   ours, projected every `--period` steps to half the parameters by the solver's plan, as in a trial
  compiled    ours under torch.compile, with `--compile` alone: it takes minutes on a CPU

Rounds go through all of them in turn; a figure is the median over rounds. `throughput_ratio` is ours / the faster plain loop.

    python scripts/bench_training.py --json
    python scripts/bench_training.py --model resnet32 --period 10 --compile
    python scripts/bench_training.py --quick
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from report import Report, arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ranksearch.allocate import LayerRules, allocate_plan, parse_budget, rank_curves
from ranksearch.compress import dense_cost, trace
from ranksearch.data.resident import Augment, Normalise, Resident
from ranksearch.lowering import default_lowerings
from ranksearch.space.recipe import RecipeSpace
from ranksearch.tasks import cifar10
from ranksearch.tasks.task import Task
from ranksearch.training.device import clock, pick_device, use_bf16
from ranksearch.training.optimisation import Optimisation
from ranksearch.training.train import Training
from ranksearch.trial.projecting import Projecting
from ranksearch.trial.recipe import Recipe, middle

IMAGES, PAD, WARM = 10_000, 4, 6
WORKERS = sorted({0, 2, min(8, os.cpu_count() or 1)})


class PlainImages(Dataset):
    """One image at a time, as a transform pipeline does it: crop from a zero-padded image, mirror, scale, normalise."""

    def __init__(self, split: Resident) -> None:
        self.split = split
        assert split.normalise is not None
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (split.normalise.mean, split.normalise.std))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = F.pad(self.split.inputs[index], [PAD] * 4)
        top, left, mirrored = (int(torch.randint(high, ())) for high in (2 * PAD + 1, 2 * PAD + 1, 2))
        image = image[:, top : top + 32, left : left + 32]
        image = image.flip(-1) if mirrored else image
        return (image.float() / 255 - self.mean) / self.std, self.split.targets[index]


def random_task(model: str) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (IMAGES,), generator=generator)
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    split = Resident(images, labels, normalise, Augment(PAD, True))
    net = cifar10.build_model(model)
    return Task(name="random", model=net, trained=False, train=split, val=split.first(100))


def plain_loop(model: nn.Module, task: Task, recipe: Recipe, steps: int, workers: int) -> float:
    """Images per second of `steps` steps, after those that the workers had prepared before."""
    device = pick_device()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    loader = DataLoader(
        PlainImages(task.train), recipe.batch_size, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    batches, started = iter(loader), 0.0
    model.train()
    for step in range(WARM + steps):
        if step == WARM:
            started = clock(device)
        x, labels = (t.to(device, non_blocking=True) for t in next(batches))
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * recipe.batch_size / (clock(device) - started)


def our_loop(
    model: nn.Module, task: Task, settings: Optimisation, steps: int, projecting: Projecting | None
) -> tuple[float, float]:
    """(images per second, share of the time that projections took) of `steps` steps after the warm-up."""
    device, started, before = pick_device(), 0.0, 0.0

    def after_step(training: Training) -> None:
        nonlocal started, before
        if projecting is not None:
            projecting.after_step(training)
        if training.done == WARM:
            started, before = clock(device), projecting.seconds if projecting is not None else 0.0

    generator = torch.Generator(device).manual_seed(0)
    Training(model, task, settings, range(WARM + steps), generator=generator).run(after_step)
    seconds = clock(device) - started
    return steps * settings.batch_size / seconds, (projecting.seconds - before) / seconds if projecting else 0.0


def contestants(
    task: Task, recipe: Recipe, steps: int, *, compiled: bool
) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """(name, measurement of one round); each round starts from a fresh net."""
    device, on_device = pick_device(), task.to(pick_device())

    def net() -> nn.Module:
        torch.manual_seed(0)
        return task.dense_model().to(device)

    model = net().cpu()
    traced = trace(model, task.example_input)
    budget = parse_budget("params", "50%")
    curves = rank_curves(model, traced, LayerRules(default_lowerings()))
    plan = allocate_plan(curves, [budget]).plan

    def settings(*, bf16: bool, compile: bool = False) -> Optimisation:
        return Optimisation(
            optimizer="sgd", schedule="constant", lr=recipe.lr, warmup=0, momentum=recipe.momentum,
            weight_decay=recipe.weight_decay, batch_size=recipe.batch_size, total_steps=WARM + steps,
            label_smoothing=0, clip_norm=0, ema=0, bf16=bf16, compile=compile,
        )  # fmt: skip

    def ours(chosen: Optimisation, *, projected: bool = False) -> tuple[float, float]:
        rates = [recipe.lr] * (WARM + steps)
        return our_loop(
            net(), on_device, chosen, steps, Projecting(plan, traced, recipe.projection, rates) if projected else None
        )

    for workers in WORKERS:
        yield f"plain, {workers} workers", lambda w=workers: (plain_loop(net(), task, recipe, steps, w), 0.0)
    auto = use_bf16("auto", device, dense_cost(traced).macs)
    yield "resident", partial(ours, settings(bf16=False))
    yield "ours", partial(ours, settings(bf16=auto))
    yield "projected", partial(ours, settings(bf16=auto), projected=True)
    if compiled:
        yield "compiled", partial(ours, settings(bf16=auto, compile=True))


def main() -> None:
    parser = arguments(__doc__, steps=40, rounds=5, batch_size=128, period=10)
    parser.add_argument("--model", default="resnet20", choices=sorted(cifar10.BLOCKS), help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds, options.period, options.batch_size = 6, 2, 3, 32
    report = Report("bench_training", options)
    task = random_task(options.model)
    projection = {"period": options.period}
    space = RecipeSpace(steps=options.steps, batch_size=options.batch_size, projection=projection)
    recipe = Recipe.settled(space, middle)
    measured: dict[str, list[tuple[float, float]]] = {}
    running = list(contestants(task, recipe, options.steps, compiled=options.compile))
    for number in range(options.rounds):
        for name, measure in running:
            measured.setdefault(name, []).append(measure())
        report.say(f"round {number + 1} of {options.rounds}")
    speed = {name: median(rate for rate, _ in found) for name, found in measured.items()}
    plain = max(speed[f"plain, {workers} workers"] for workers in WORKERS)
    for name, found in measured.items():
        rates = [rate for rate, _ in found]
        report.rows.append({
            "loop": name, "images_per_second": speed[name], "slowest": min(rates), "fastest": max(rates),
            "ratio": speed[name] / plain, "projection_share": median(share for _, share in found), "model": options.model,
        })  # fmt: skip
    shares = [share for _, share in measured["projected"]]
    report.finish({
        "throughput_ratio": speed["ours"] / plain,
        "throughput_ratio_projected": speed["projected"] / plain,
        "projection_share": median(shares),
    })  # fmt: skip


if __name__ == "__main__":
    main()
