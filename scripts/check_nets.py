"""Checks nets as a whole: traced, planned at half the FLOPs, decomposed, exported, with what is not lowered listed by name and reason.

Nets of torchvision, timm and Hugging Face (small configurations) with random weights, where they load, small nets with the same
structures (`structures.py`), and nets that people write themselves (`own_nets.py`), which need none of them. BN statistics are those
of random inputs, BN and layer scales are drawn, so that a wrong layer shows in the outputs. For every net (errors are
max |a - b| / max |a|, batches of random inputs):

  counted     MACs and params of the dense net and of the decomposed one are torch's own (`flop_counter`, parameters)
  full rank   every layer lowered, in turn by each lowering that takes it, at full rank: the outputs are the net's. Where a net is so
              deep that rounding alone passes the limit, it is settled in fp64: 1e-9, and in fp32 ten times the net's own rounding
  projected   the net projected onto its plan and the decomposed net compute the same
  pt2, onnx   what was exported, opened again, computes what the decomposed net does, at three batch sizes

A net that ranksearch refuses, or whose export it refuses, in a sentence, is `refused`; where all of the above holds it is
`exact`; everything else is a silent error, and so is a traceback. `compress_passes_max`: forward passes of a net that one `compress`
takes at most, its check as a whole included.

Exit code 1 where an error is above 1e-4, a count is wrong or the plan is above its budget.

    python scripts/check_nets.py                    all nets, ten minutes on two cores
    python scripts/check_nets.py --quick            the small nets
    python scripts/check_nets.py --only vit,timm:vit_small_patch16_224 --json
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from own_nets import NETS as OTHERS
from report import Report, arguments
from structures import INPUT, STRUCTURES
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import ranksearch
from ranksearch.allocate.rules import LayerRules
from ranksearch.compress import LayerPlan, Net, RankPlan, dense_cost, plan_cost, project_, reestimate_bn_, trace
from ranksearch.deploy.exported import TOLERANCE, export_net
from ranksearch.deploy.formats import format_named
from ranksearch.errors import RanksearchError, UsageError
from ranksearch.lowering import default_lowerings, lowering_named
from ranksearch.model.inputs import call, cast, cut, tensors

BUDGET = 0.5
EXACT = 1e-9
"""Largest error of a full-rank net in fp64."""
ROUNDINGS = 10
"""Times the net's own rounding (fp32 against fp64) that a full-rank net may be off in fp32, where that is more than the tolerance."""
LIBRARY_NETS = {
    "torchvision:resnet18": (3, 64, 64),
    "torchvision:resnet50": (3, 64, 64),
    "torchvision:vgg16_bn": (3, 64, 64),
    "torchvision:mobilenet_v2": (3, 64, 64),
    "torchvision:mobilenet_v3_large": (3, 64, 64),
    "torchvision:densenet121": (3, 64, 64),
    "torchvision:efficientnet_b0": (3, 64, 64),
    "torchvision:convnext_tiny": (3, 64, 64),
    "timm:vit_small_patch16_224": (3, 64, 64),
    "timm:swin_tiny_patch4_window7_224": (3, 224, 224),
}
"""Name -> shape of one input."""
MAPS = {**dict.fromkeys(STRUCTURES, INPUT), **LIBRARY_NETS}
"""Name -> shape of one input, of nets that take one map."""
NETS = [*MAPS, *OTHERS]
FORMS = ("pt2", "onnx")


def build(name: str) -> nn.Module:
    """A net by name, random weights; ViTs are built for the input that `NETS` states."""
    if name in OTHERS:
        return OTHERS[name].build()
    if name in STRUCTURES:
        return STRUCTURES[name]()
    if name.startswith("timm:vit"):
        try:
            import timm
        except ImportError as error:
            raise UsageError(f"timm is not installed here ({error})") from error
        return timm.create_model(name.partition(":")[2], pretrained=False, num_classes=100, img_size=MAPS[name][-1])
    from ranksearch.tasks.nets import build_named

    return build_named(name, 100)


def budget_of(name: str) -> float:
    """The share of the net's FLOPs that its plan may take."""
    return OTHERS[name].budget if name in OTHERS else BUDGET


def example(name: str, count: int) -> Any:
    """Random inputs of `count` samples."""
    return OTHERS[name].example(count) if name in OTHERS else torch.randn(count, *MAPS[name])


@torch.no_grad()
def lively_(model: nn.Module, x: Any) -> nn.Module:
    """Draws scales and shifts of norms and layer scales, then takes BN statistics from `x`: no layer is near to nothing or to identity."""
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.uniform_(0.3, 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.LayerNorm) and module.weight is not None:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
    reestimate_bn_(model, [x])
    return model.eval()


def counted(model: nn.Module, x: Any) -> tuple[int, int]:
    """(MACs of one sample by torch's counter, parameters), where torch does everything by products and convolutions that it counts."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    experts = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if experts is not None:  # of Hugging Face: one by one, not by an operator that torch does not count
        model.set_experts_implementation("eager")  # type: ignore[operator]
    try:
        plain = sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False)
        with plain[0], plain[1], torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model, cut(x, 0, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if experts is not None:
            model.set_experts_implementation(experts)  # type: ignore[operator]
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def full_plan(net: Net) -> RankPlan:
    """Every layer at full rank; the lowerings that take a kind of layer have turns."""
    turns: dict[tuple[str, ...], Any] = {}
    layers = {}
    for layer in net.layers:
        takers = tuple(name for name in default_lowerings() if lowering_named(name).supports(layer.spec))
        if takers:
            name = next(turns.setdefault(takers, cycle(takers)))
            layers[layer.name] = LayerPlan(name, lowering_named(name).full_rank(layer.spec))
    return RankPlan(layers)


@torch.inference_mode()
def difference(found: nn.Module, wanted: nn.Module, x: Any) -> float:
    """The largest max |a - b| / max |a| over the tensors that the nets return."""
    a, b = (call(net, cast(x, next(net.parameters()).dtype)) for net in (wanted, found))
    return max(float((m - n).abs().max() / m.abs().max()) for m, n in zip(tensors(a), tensors(b), strict=True))


class Passes:
    """Counts forward passes of nets of a class, those within one another once."""

    def __init__(self, kind: type) -> None:
        self.count, self._depth, self._kind = 0, 0, kind

    def __enter__(self) -> Passes:
        self._hooks = (
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        )
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if type(module) is self._kind:
            self.count, self._depth = self.count + (self._depth == 0), self._depth + 1

    def _after(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._depth -= type(module) is self._kind


def untouched(net: Net) -> list[tuple[str, str]]:
    """(name, why) of everything with a weight that cannot become cheaper."""
    rules = LayerRules(default_lowerings())
    dense = [(layer.name, reason) for layer in net.layers if (reason := rules.why_dense(layer)) is not None]
    return [*dense, *net.skipped]


def check_net(name: str, forms: tuple[str, ...] = FORMS) -> dict[str, Any]:
    """One row: what was found of the net `name`, its errors and the wrong counts by name."""
    torch.manual_seed(0)
    started = time.perf_counter()
    x = example(name, 4)
    one = cut(x, 0, 1)
    model = lively_(build(name), x)
    net = trace(model, one)
    dense = dense_cost(net)
    budget = budget_of(name)
    plan = ranksearch.allocate(model, one, {"flops": f"{100 * budget:g}%"})
    with Passes(type(model)) as passes:
        small = ranksearch.compress(model, plan)
    cost = plan_cost(net, plan)
    projected = copy.deepcopy(model)
    project_(projected, plan)
    whole = full_plan(net)
    row = {
        "net": name, "layers": len(net.layers), "lowered": len(list(plan.lowered())), "budget": budget,
        "params": dense.params, "macs": dense.macs,
        "compress_passes": passes.count, "macs_ratio": cost.macs / dense.macs, "params_ratio": cost.params / dense.params,
        "full_rank_error": difference(ranksearch.compress(model, whole), model, x),
        "projected_error": difference(small, projected, x),
    }  # fmt: skip
    if row["full_rank_error"] > TOLERANCE:
        double = copy.deepcopy(model).double()
        row["own_rounding"] = difference(model, double, x)
        row["full_rank_fp64"] = difference(ranksearch.compress(double, whole), double, cast(x, torch.float64))
    refused: dict[str, str] = {}
    for form in forms:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = export_net(
                    small, plan, one, Path(folder), form=format_named(form), build=lambda _: build(name), fold_bn=False
                )
            except RanksearchError as error:
                refused[form] = str(error)
            else:
                row[f"{form}_error"] = made.max_rel_error
    right = {
        "dense": counted(model, x) == (dense.macs, dense.params),
        "decomposed": counted(small, x) == (cost.macs, cost.params),
    }
    skipped = [{"name": layer, "reason": reason} for layer, reason in untouched(net)]
    row |= {"untouched": len(skipped), "wrong_counts": [what for what, same in right.items() if not same]}
    return row | {
        "refused": refused,
        "seconds": round(time.perf_counter() - started, 1),
        "skipped": {e["name"]: e["reason"] for e in skipped},
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words."""
    limits = {key: TOLERANCE for key in row if key.endswith("_error")}
    if "full_rank_fp64" in row:
        limits |= {"full_rank_fp64": EXACT, "full_rank_error": max(TOLERANCE, ROUNDINGS * row["own_rounding"])}
    found = [f"{key} {row[key]:.2g}" for key, limit in limits.items() if not row[key] <= limit]
    found += [f"counts of the {what} net" for what in row["wrong_counts"]]
    return found + [f"macs_ratio {row['macs_ratio']:.4f}"] * (row["macs_ratio"] > row["budget"])


def chosen(options: argparse.Namespace) -> list[str]:
    names = list(STRUCTURES if options.quick else NETS)
    names = options.only.split(",") if options.only else names
    if unknown := [name for name in names if name not in NETS]:
        sys.exit(f"check_nets: there is no net {unknown[0]!r} here; known: {', '.join(NETS)}")
    return names


def main() -> int:
    options = arguments(__doc__, only="").parse_args()
    report = Report("check_nets", options)
    for package in ("torchvision", "timm", "onnx", "onnxruntime"):
        try:
            report.versions[package] = version(package)
        except PackageNotFoundError:
            report.versions[package] = "not installed"
    left_out, wrong, refused = [], [], []
    for name in chosen(options):
        try:
            row = check_net(name)
        except RanksearchError as error:
            absent = "does not load" in str(error) or "not installed" in str(error)
            (left_out if absent else refused).append(f"{name}: {error}")
            report.say(f"{name}: {'left out' if absent else 'refused'}: {error}")
            continue
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            report.say(wrong[-1])
            continue
        report.rows.append(row)
        wrong += [f"{name}: {fault}" for fault in faults(row)]
        refused += [f"{name}: {form}: {reason}" for form, reason in row["refused"].items()]
        report.say(f"{name}: {', '.join([*faults(row), *row['refused'].values()]) or 'right'}")
    errors = [row[key] for row in report.rows for key in row if key.endswith("_error")]
    figures = {
        "nets": len({text.partition(": ")[0] for text in [*refused, *wrong]} | {row["net"] for row in report.rows}),
        "exact": sum(not row["refused"] and not faults(row) for row in report.rows),
        "refused": len({text.partition(": ")[0] for text in refused} - {text.partition(": ")[0] for text in wrong}),
        "silent_errors": len({text.partition(": ")[0] for text in wrong}),
        "left_out": len(left_out),
        "compress_passes_max": max((row["compress_passes"] for row in report.rows), default=0),
        "max_rel_error": max(errors, default=0.0),
    }
    notes = [f"left out: {text}" for text in left_out] + [f"refused: {text}" for text in refused]
    notes += [f"WRONG: {text}" for text in wrong]
    notes += [
        f"{row['net']}: not lowered: {layer}: {reason}"
        for row in report.rows
        for layer, reason in row["skipped"].items()
    ]
    report.finish(figures, notes)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
