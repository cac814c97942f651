"""What a projection costs beside a training step, against full SVDs, and how near to the optimum it is. All in one run.

For ResNet-20 (batch 128 at 32x32) and ResNet-18 (batch 32 at 224x224), for each lowering at half its break-even rank:

  svd_ms     the same projection by `torch.linalg.svd` (Tucker-2: HOSVD by SVDs of both unfoldings)
  cold_ms    ours without a basis of an earlier projection
  warm_ms    ours ten SGD steps after the last projection, with its basis: what a training run pays at period 10 (measured at the
             third projection of a run; the first period trains in bf16, the second in fp32)
  removed_max  the largest share of a layer's energy that ten steps brought and the projection takes away
  share_pN   of the time of N fp32 SGD steps, forward, backward and update, those of the second period (p10: warm_ms; p50, p200:
             cold_ms, the most it can be)
  excess     (||W - P|| - optimum) / optimum, the largest over layers, cold and warm; the optimum by numpy's fp64 SVD
             (Tucker-2: HOOI in fp64, swept until it settles; a negative excess is a better local optimum)

bf16 columns: the same against a bf16-autocast step, the fastest that this project trains with on a CPU.

    python scripts/bench_projection.py            about five minutes on two cores
    python scripts/bench_projection.py --quick    one step a period instead of ten; the optimum for layers of up to 64 channels alone
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from imagenet_resnets import resnet18
from report import Report, arguments
from torch import Tensor, nn

from ranksearch.compress import LayerPlan, Projector, RankPlan
from ranksearch.errors import UsageError
from ranksearch.lowering import MatrixLowering, lowering_named
from ranksearch.lowering.contract import sides
from ranksearch.model.slots import Slot, find_slots
from ranksearch.tasks import cifar10
from ranksearch.training.dense import checkpoint_path, read_checkpoint

NAMES = ("im2col", "channel", "spatial", "tucker2")
LR = {"resnet20": 0.02, "resnet18": 0.01}
"""0.02 is the default of a search space, momentum 0.9. Random weights have larger gradients than trained ones: at half that rate ten
steps bring ResNet-18 about the share of energy (`removed_max`) that they bring to the trained ResNet-20."""
ROUNDING = 1e-5
"""Share of ||W|| below which an optimum is rounding."""


def smooth_images(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random images with the spectrum of natural ones, roughly: noise at several scales."""
    images = torch.zeros(count, 3, side, side)
    for coarse in (4, 8, 16, 32):
        noise = torch.randn(count, 3, coarse, coarse, generator=generator)
        images += nn.functional.interpolate(noise, size=(side, side), mode="bilinear")
    return images


def half_break_even(model: nn.Module, name: str) -> RankPlan:
    """Every layer that `name` can make cheaper, at half its break-even rank in params."""
    lowering, layers = lowering_named(name), {}
    for slot in find_slots(model).values():
        if lowering.supports(slot.spec):
            even = lowering.break_even_rank(slot.spec, "params")
            if even and min(sides(even)) > 1:
                half = tuple(side // 2 for side in sides(even))
                layers[slot.name] = LayerPlan(name, half[0] if isinstance(even, int) else half)
    return RankPlan(layers)


def seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)


def by_svd(slot: Slot, choice: LayerPlan) -> Tensor:
    """The projection by full SVDs."""
    lowering, blocks = lowering_named(choice.lowering), slot.spec.blocks(slot.weight.detach())
    if isinstance(lowering, MatrixLowering):
        (rank,) = sides(choice.rank)
        u, s, vt = torch.linalg.svd(lowering.unfold(blocks, slot.spec), full_matrices=False)
        return lowering.fold((u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], slot.spec)
    rs, rt = sides(choice.rank)
    tensor = blocks[0].flatten(2)  # [T, S, k]
    outputs = torch.linalg.svd(tensor.flatten(1), full_matrices=False)[0][:, :rt]
    inputs = torch.linalg.svd(tensor.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rs]
    core = inputs.mT @ (outputs.mT @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])
    return (outputs @ (inputs @ core).flatten(1)).reshape(slot.spec.weight_shape)


def optimum(slot: Slot, weight: Tensor, choice: LayerPlan) -> float:
    """||W - best||, in fp64 by numpy."""
    lowering, blocks = lowering_named(choice.lowering), slot.spec.blocks(weight).double()
    if isinstance(lowering, MatrixLowering):
        (rank,) = sides(choice.rank)
        squared = [np.linalg.svd(m, compute_uv=False)[rank:] ** 2 for m in lowering.unfold(blocks, slot.spec).numpy()]
        return float(np.sqrt(np.sum(squared)))
    return tucker2_optimum(blocks[0].flatten(2).numpy(), choice.rank)


def tucker2_optimum(tensor: np.ndarray, rank: tuple[int, int]) -> float:
    """||W - best|| of [T, S, k] by HOOI from the HOSVD, swept until it gains less than 1e-6 of what is left out."""
    (rs, rt), energy, kept = rank, float((tensor**2).sum()), 0.0

    def leading(unfolded: np.ndarray, count: int) -> tuple[np.ndarray, float]:
        values, vectors = np.linalg.eigh(unfolded @ unfolded.T)
        return vectors[:, -count:], float(values[-count:].sum())

    outputs, _ = leading(tensor.reshape(len(tensor), -1), rt)
    while True:
        half = np.tensordot(outputs, tensor, axes=(0, 0))  # [rt, S, k]
        inputs, _ = leading(np.moveaxis(half, 1, 0).reshape(tensor.shape[1], -1), rs)
        half = np.tensordot(inputs, tensor, axes=(0, 1))  # [rs, T, k]
        outputs, now = leading(np.moveaxis(half, 1, 0).reshape(len(tensor), -1), rt)
        if now - kept <= 1e-6 * (energy - now):
            return float(np.sqrt(max(energy - now, 0.0)))
        kept = now


def largest_excess(before: dict[str, Tensor], model: nn.Module, plan: RankPlan, *, widest: int) -> float:
    slots, found = find_slots(model), []
    for name, choice in plan.lowered():
        if max(slots[name].spec.block_shape[:2]) > widest:
            continue
        weight, projected = before[name], slots[name].weight.detach()
        best = optimum(slots[name], weight, choice)
        error = float((weight.double() - projected.double()).norm())
        found.append((error - best) / max(best, ROUNDING * float(weight.norm())))
    return max(found)


class Training:
    """A net, its data and SGD: what a step costs, and the drift between projections."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, *, batch: int, lr: float) -> None:
        self.batch = batch
        self.model = model.to(memory_format=torch.channels_last).train()
        self.images, self.labels, self.taken = images, labels, 0
        self.sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    def step(self, *, bf16: bool = False) -> None:
        first = self.taken % len(self.labels)
        self.taken += self.batch
        images = self.images[first : first + self.batch].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(self.model(images), self.labels[first : first + self.batch])
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()

    def weights(self, plan: RankPlan) -> dict[str, Tensor]:
        slots = find_slots(self.model)
        return {name: slots[name].weight.detach().clone() for name in plan.layers}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        slots = find_slots(self.model)
        for name, weight in weights.items():
            slots[name].weight.copy_(weight)


def measure(report: Report, net: str, training: Training, *, drift: int, repeats: int, widest: int) -> None:
    training.step(bf16=True)  # first calls allocate
    start = copy.deepcopy(training.model.state_dict())
    for name in NAMES:
        training.model.load_state_dict(start)
        training.sgd.state.clear()
        plan = half_break_even(training.model, name)

        def timed(
            weights: dict[str, Tensor], warm: dict[str, object], count: int, plan: RankPlan = plan
        ) -> tuple[float, Projector, float]:
            """Median seconds of a projection of `weights` that starts from `warm`, its projector, the largest share removed.

            Leaves the projected weights.
            """
            times = []
            for _ in range(count):
                training.restore(weights)
                projector = Projector(plan)
                projector.warm = dict(warm)
                started = time.perf_counter()
                removed = projector(training.model)
                times.append(time.perf_counter() - started)
            return median(times), projector, max(removed.values())

        before = training.weights(plan)
        slots = find_slots(training.model)
        svd = seconds(lambda: [by_svd(slots[n], c) for n, c in plan.lowered()], repeats // 2)  # noqa: B023
        cold, projector, _ = timed(before, {}, repeats // 2)
        excess_cold = largest_excess(before, training.model, plan, widest=widest)
        step = {}
        for bf16 in (True, False):
            step[bf16] = seconds(lambda: training.step(bf16=bf16), drift)  # noqa: B023
            if bf16:
                projector(training.model)
        drifted = training.weights(plan)
        warm, _, drift_removed = timed(drifted, projector.warm, repeats)
        left = Projector(plan)(copy.deepcopy(training.model))  # of projected weights: nothing is left to remove
        assert max(left.values()) < 1e-5, left
        row = {
            "net": net,
            "lowering": name,
            "layers": len(plan.layers),
            "svd_ms": 1e3 * svd,
            "cold_ms": 1e3 * cold,
            "warm_ms": 1e3 * warm,
            "speedup_over_svd": svd / warm,
            "removed_max": drift_removed,
            "excess_cold": excess_cold,
            "excess_warm": largest_excess(drifted, training.model, plan, widest=widest),
            "step_fp32_ms": 1e3 * step[False],
            "share_p10": warm / (10 * step[False]),
            "share_p50": cold / (50 * step[False]),
            "share_p200": cold / (200 * step[False]),
            "share_p10_bf16": warm / (10 * step[True]),
        }
        report.rows.append(row)
        report.say(
            f"{net} {name}: svd {1e3 * svd:.0f} ms, cold {1e3 * cold:.0f} ms, warm {1e3 * warm:.0f} ms, step {step[False]:.2f} s"
        )


def resnet20_training(report: Report, generator: torch.Generator) -> Training:
    """On the real weights and images where the data folder has them."""
    try:
        task = cifar10.make_task("resnet20", data=None, validation=1000, split_seed=0)
        path = checkpoint_path(task, "auto", None)
        model = cifar10.build_model("resnet20")
        model.load_state_dict(read_checkpoint(path))
        images, labels = next(task.train.in_order(2560))
        return Training(model, images, labels, batch=128, lr=LR["resnet20"])
    except UsageError as missing:
        report.say(f"random weights and images for ResNet-20: {missing}")
        labels = torch.randint(0, 10, (2560,), generator=generator)
        return Training(
            cifar10.build_model("resnet20"), smooth_images(2560, 32, generator), labels, batch=128, lr=LR["resnet20"]
        )


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("bench_projection", options)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    effort = {"drift": 1, "repeats": 3, "widest": 64} if options.quick else {"drift": 10, "repeats": 5, "widest": 10**9}
    measure(report, "resnet20", resnet20_training(report, generator), **effort)
    labels = torch.randint(0, 1000, (320,), generator=generator)
    training = Training(resnet18(), smooth_images(320, 224, generator), labels, batch=32, lr=LR["resnet18"])
    measure(report, "resnet18", training, **effort)
    rows = {(row["net"], row["lowering"]): row for row in report.rows}
    figures = {f"step_share_p10_resnet18_{name}": rows["resnet18", name]["share_p10"] for name in NAMES}
    figures["excess_error_max"] = max(max(row["excess_cold"], row["excess_warm"]) for row in report.rows)
    figures |= {f"speedup_over_svd_{name}": rows["resnet18", name]["speedup_over_svd"] for name in NAMES}
    report.finish(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
