"""Checks every lowering under at least 500 layer settings: what is not refused with a sentence must be exact.

Settings are drawn from the product of Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d with kernel shapes, strides (uneven too), padding
(uneven, "same"), padding modes, dilation, groups (depthwise too) and bias; channels and map sizes are drawn as well. For every setting and
lowering, in fp32 and fp64:

  full rank   the built module equals the dense layer (1e-4 in fp32, 1e-10 in fp64, of its norm)
  projected   after projection at the break-even rank in params, the decomposed layer equals the projected dense layer (same limits)
  costs       MACs equal `torch.utils.flop_counter`'s, params the module's own

or, where it refuses, that the refusal is a sentence and that building is refused too. An error is silent where a lowering took a setting
and was wrong. Exit code 1 if there is one.

    python scripts/check_lowerings.py            600 settings
    python scripts/check_lowerings.py --quick    500 of them, fp32 alone
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from dataclasses import asdict

import torch
from report import Report, arguments
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.errors import UsageError
from ranksearch.lowering import LOWERINGS, LayerSpec, Lowering, Rank
from ranksearch.lowering.contract import running_layers
from ranksearch.lowering.tiled import settle_

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-10}
KERNELS = {
    1: [(1,), (2,), (3,), (5,), (7,)],
    2: [(1, 1), (3, 3), (3, 3), (1, 3), (3, 1), (5, 5), (7, 7), (2, 4), (4, 3)],
    3: [(1, 1, 1), (3, 3, 3), (1, 3, 3), (3, 1, 2)],
}
MODES = ["zeros", "zeros", "reflect", "replicate", "circular"]


def draw(rng: random.Random) -> tuple[LayerSpec, tuple[int, ...]]:
    """A setting that torch accepts, and the extents of its input."""
    while True:
        kind = rng.choices(["linear", "conv", "transposed"], weights=[1, 12, 5])[0]
        if kind == "linear":
            tokens = rng.choice([(), (5,), (3, 4)])
            return LayerSpec(rng.randint(1, 40), rng.randint(1, 40), bias=rng.random() < 0.5), tokens
        axes = rng.choices([1, 2, 3], weights=[2, 7, 1])[0]
        spec = draw_conv(rng, axes, transposed=kind == "transposed")
        in_size = tuple(rng.randint(4, 13) for _ in range(axes))
        try:  # torch itself decides what is valid
            with torch.no_grad():
                empty = spec.build()(torch.zeros(1, spec.in_channels, *in_size)).numel() == 0
        except (RuntimeError, ValueError):
            continue
        if not empty:
            return spec, in_size


def draw_conv(rng: random.Random, axes: int, *, transposed: bool) -> LayerSpec:
    groups = rng.choice([1, 1, 1, 2, 4])
    inputs, outputs = groups * rng.randint(1, 14), groups * rng.randint(1, 14)
    if rng.random() < 0.15:  # depthwise, with or without a multiplier
        groups = inputs
        outputs = inputs * rng.choice([1, 1, 2, 3])

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randint(low, high) for _ in range(axes))

    stride, dilation = rng.choice([(1,) * axes, each(1, 3)]), rng.choice([(1,) * axes, (1,) * axes, each(1, 3)])
    kernel = rng.choice(KERNELS[axes])
    padding: tuple[int, ...] | str = rng.choice([(0,) * axes, tuple(k // 2 for k in kernel), each(0, 3)])
    if transposed:
        extra = tuple(rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        mode = "zeros"
    else:
        extra, mode = (), rng.choice(MODES)
        padding = "same" if stride == (1,) * axes and rng.random() < 0.3 else padding
    return LayerSpec(
        inputs, outputs, kernel, stride, padding, dilation, groups,
        bias=rng.random() < 0.5, padding_mode=mode, transposed=transposed, output_padding=extra,
    )  # fmt: skip


def filled(lowering: Lowering, spec: LayerSpec, rank: Rank, dense: nn.Module, warm: object) -> nn.Module:
    built = lowering.build(spec, rank, dtype=dense.weight.dtype)
    factors = lowering.decompose(dense.weight.data, rank, spec, warm)
    for parameter, factor in zip(lowering.stored_weights(built), factors, strict=True):
        parameter.data = factor
    if spec.bias:
        running_layers(built)[-1].bias.data = dense.bias.data
    return built


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.norm()
    return float((found - expected).norm() / norm) if norm > 0 else float(found.norm())


@torch.no_grad()
def check(lowering: Lowering, spec: LayerSpec, in_size: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """Check -> its error; a wrong cost, or a layer that was taken and then raises, is an infinite one."""
    try:
        return measured_errors(lowering, spec, in_size, dtype)
    except Exception as error:
        return {f"{type(error).__name__}: {error}": float("inf")}


def measured_errors(
    lowering: Lowering, spec: LayerSpec, in_size: tuple[int, ...], dtype: torch.dtype
) -> dict[str, float]:
    shape = (2, spec.in_channels, *in_size) if spec.is_conv else (2, *in_size, spec.in_channels)
    x, dense = torch.randn(shape, dtype=dtype), spec.build(dtype=dtype)
    full = lowering.full_rank(spec)
    errors = {"full rank": relative(filled(lowering, spec, full, dense, None)(x), dense(x))}
    rank = lowering.break_even_rank(spec, "params") or (lowering.ladder(spec)[0] if lowering.has_rank else 0)
    dense.weight.data, _, warm = lowering.project(dense.weight.data, rank, spec)
    built = filled(lowering, spec, rank, dense, warm)
    errors["projected"] = relative(built(x), dense(x))
    params = sum(p.numel() for p in built.parameters())
    settle_(built)
    with FlopCounterMode(display=False) as counter:
        built(x[:1])
    costs = {"params": params, "macs": counter.get_total_flops() // 2}
    right = all(lowering.cost(spec, rank, name, in_size) == value for name, value in costs.items())
    errors["costs"] = 0.0 if right else float("inf")
    return errors


def check_refusal(lowering: Lowering, spec: LayerSpec) -> bool:
    """Whether a refusal is a sentence, and building is refused by it."""
    reason = lowering.refusal(spec)
    try:
        lowering.build(spec, 1)
    except UsageError as error:
        return bool(reason) and reason.endswith(".") and reason in str(error)
    return False


def main() -> int:
    options = arguments(__doc__, settings=600).parse_args()
    report = Report("check_lowerings", options)
    warnings.filterwarnings("ignore", message="Using padding='same'")
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    settings = [draw(rng) for _ in range(min(500, options.settings) if options.quick else options.settings)]
    dtypes = [torch.float32] if options.quick else list(LIMITS)
    worst = {name: dict.fromkeys(LIMITS, 0.0) for name in LOWERINGS}
    taken, refused, failed = Counter(), Counter(), Counter()
    failures, checks = [], 0
    for i, (spec, in_size) in enumerate(settings):
        if i % 100 == 0:
            report.say(f"setting {i} of {len(settings)}: {checks} checks, {sum(failed.values())} silent errors")
        for name, lowering in LOWERINGS.items():
            if not lowering.supports(spec):
                refused[name] += 1
                checks += 1
                if not check_refusal(lowering, spec):
                    failed[name] += 1
                    failures.append({"lowering": name, "check": "refusal", "spec": asdict(spec)})
                continue
            taken[name] += 1
            for dtype in dtypes:
                for what, error in check(lowering, spec, in_size, dtype).items():
                    checks += 1
                    worst[name][dtype] = max(worst[name][dtype], error)
                    if not error <= LIMITS[dtype]:
                        failed[name] += 1
                        failures.append({"lowering": name, "check": what, "error": error, "spec": asdict(spec)})
    for name in LOWERINGS:
        report.rows.append(
            {
                "lowering": name,
                "taken": taken[name],
                "refused": refused[name],
                "silent_errors": failed[name],
                "max_rel_error_fp32": worst[name][torch.float32],
                "max_rel_error_fp64": None if options.quick else worst[name][torch.float64],
            }
        )
    figures = {
        "settings": len(settings),
        "distinct_settings": len(set(settings)),
        "checks": checks,
        "silent_errors": sum(failed.values()),
        "max_rel_error_fp32": max(w[torch.float32] for w in worst.values()),
    }
    if not options.quick:
        figures["max_rel_error_fp64"] = max(w[torch.float64] for w in worst.values())
    report.finish(figures, [f"FAILED {failure}" for failure in failures[:20]])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
