"""A net exported and held to it: written in a format, opened again, compared with the net that it came from, and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.compress.export import Build, unneeded
from ranksearch.deploy.fold import fold_bn_
from ranksearch.deploy.formats import FORMATS, Format, Function, told, traced
from ranksearch.deploy.latency import latencies_ms
from ranksearch.errors import StudyError, UsageError
from ranksearch.lowering.tiled import settle_
from ranksearch.model.axes import fixed_axes, free_axes, stretched
from ranksearch.model.copying import copied
from ranksearch.model.inputs import batch_size, call, mapped, shape_of
from ranksearch.model.plain import listed
from ranksearch.model.plan import RankPlan

TOLERANCE = 1e-4
"""The largest allowed max |a - b| / max |a|, with the net's outputs a and those of its exported form b."""
TRACED_BATCH = 2
"""Never 1, which torch.export may take for a constant."""
CHECKED_BATCHES = (1, 3, TRACED_BATCH)


@dataclass(frozen=True)
class Exported:
    """What was written, how far it is from the net in evaluation mode, and how fast it is on this machine's CPU."""

    files: tuple[str, ...]
    size_bytes: int
    opset: int | None
    folded_bn: int
    """How many BN layers were folded away."""
    max_rel_error: float
    latency_ms: float
    """Milliseconds of one call with one sample, measured in turn with the next two."""
    latency_eager_ms: float
    latency_dense_runtime_ms: float | None
    """The dense net written in the same format and opened in the same runtime; None without one, or where it cannot be written so."""
    others_ms: tuple[float, ...]
    fixed_axes: tuple[str, ...] = ()
    """Axes of inputs that the net itself takes in other extents, but what was written takes only in the example's."""


def export_net(
    model: nn.Module,
    plan: RankPlan,
    example: Any,
    folder: Path,
    *,
    form: Format,
    build: Build,
    fold_bn: bool,
    others: Sequence[nn.Module] = (),
    dense: nn.Module | None = None,
) -> Exported:
    """Writes `model` to the empty `folder`, opens what was written and holds it against the model at several batch sizes.

    The model is not changed; it may be in the form that its plan stores. Other extents (tokens, height, width) are tried too.

    Args:
        example: a batch of one input, a tensor or arguments: its shapes and dtypes are used, and the values of integers too.
        build: the dense model of `plan.model`, which `state_dict` needs.
        others: nets to time beside it as PyTorch runs them, such as the dense one.
        dense: a net to time beside it in the format's own runtime.

    Raises:
        UsageError: `fold_bn` with a format that keeps layers, or a model that returns no tensor.
        StudyError: the net cannot be traced or expressed, or what was written computes something else (by more than `TOLERANCE`).
    """
    check_fold(form, fold_bn)
    generator = torch.Generator().manual_seed(0)
    batch = _sample(example, TRACED_BATCH, generator)
    stored = copied(model).cpu().eval()
    eager = settle_(copied(stored))
    source, folded = eager if form.traced else stored, 0
    if fold_bn:
        source = copied(eager)
        folded = fold_bn_(source, traced(source, batch))
    program = form.write(source, plan, batch, folder)
    with told(f"What was written as {form.name} cannot be used, and was removed"):
        function = form.open(folder, build)
        batches = [_sample(example, count, generator) for count in CHECKED_BATCHES]
        error = max_rel_error(function, eager, batches, tolerance=TOLERANCE)
        free = free_axes(program, batch) if program is not None else ()
        if free and (longer := stretched(eager, batches[1], free)) is not None:
            error = max(error, max_rel_error(function, eager, [longer], tolerance=TOLERANCE))
    fixed = fixed_axes(eager, batch, free) if program is not None else ()
    alike = [] if dense is None else _in_the_same_runtime(dense, batch, form, fold_bn=fold_bn)
    one = _sample(example, 1, generator)
    own, of_eager, *of_others = latencies_ms([function, eager, *others, *alike], one)
    of_dense = of_others.pop() if alike else None
    files = sorted(path for path in folder.iterdir())
    return Exported(
        tuple(path.name for path in files), sum(path.stat().st_size for path in files), form.opset, folded,
        error, own, of_eager, of_dense, tuple(of_others), tuple(f"{name}, axis {axis}" for name, axis in fixed),
    )  # fmt: skip


def _in_the_same_runtime(dense: nn.Module, batch: Any, form: Format, *, fold_bn: bool) -> list[Function]:
    """The dense net as `form`'s runtime has it, for a time to compare with; nothing where the format keeps layers or refuses the net."""
    if not form.traced:
        return []
    try:
        source = copied(dense).cpu().eval()
        if fold_bn:
            fold_bn_(source, traced(source, batch))
        with tempfile.TemporaryDirectory() as folder:
            form.write(source, RankPlan(), batch, Path(folder))
            return [form.open(Path(folder), unneeded)]
    except StudyError:
        return []


def check_fold(form: Format, fold_bn: bool) -> None:
    """Raises UsageError where BN is to be folded in a format whose reader expects it."""
    if fold_bn and not form.traced:
        takers = " and ".join(name for name, other in FORMATS.items() if other.traced)
        raise UsageError(
            f"--fold-bn does not go with {form.name}: `ranksearch.load` rebuilds the net with its BN layers and would find no values "
            f"for them. Formats that take it: {takers}."
        )


@torch.inference_mode()
def max_rel_error(function: Function, net: nn.Module, batches: Sequence[Any], *, tolerance: float) -> float:
    """The largest max |a - b| / max |a| over `batches`, a = net(batch), b = function(batch).

    Raises:
        UsageError: the net does not return a tensor.
        StudyError: it is above `tolerance`, or the shapes differ.
    """
    errors = []
    for batch in batches:
        wanted, found = listed(call(net, batch)), listed(function(batch))
        if not wanted:
            raise UsageError("This net returns no tensor: only a net that returns tensors can be exported.")
        if [x.shape for x in found] != [x.shape for x in wanted]:
            raise StudyError(
                f"The exported net returns {shape_of(tuple(found))} where the net returns {shape_of(tuple(wanted))}; it was removed."
            )
        errors.append(max(starmap(_difference, zip(found, wanted, strict=True))))
        if not errors[-1] <= tolerance:  # NaN is no agreement either
            raise StudyError(
                f"The exported net differs from the net by {errors[-1]:.2g} (max |a - b| / max |a|, {batch_size(batch)} random inputs), "
                f"more than {tolerance:g}; it was removed."
            )
    return max(errors)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """max |a - b| / max |a|"""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _sample(example: Any, count: int, generator: torch.Generator) -> Any:
    """[count, ...]: random inputs like `example`: floats are normal, integers are drawn from its own, masks are repeated."""
    size = batch_size(example)

    def made(x: Tensor) -> Tensor:
        if not x.dim() or x.shape[0] != size:
            return x.cpu()
        shape = (count, *x.shape[1:])
        if x.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=x.dtype)
        return x.flatten()[torch.randint(x.numel(), shape, generator=generator)].cpu()

    return mapped(made, example)
