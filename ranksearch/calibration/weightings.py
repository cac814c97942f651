"""Weightings: the metrics in which errors of a net's layers count, measured on a few batches of inputs.

| metric | tr(G E C Eᵀ) with | what is nearest then |
|---|---|---|
| `weights` | G = C = 1 | the truncated SVD of the weight |
| `inputs` | C = E[x xᵀ] of the layer's inputs, G = 1 | the layer's outputs, as far as the rank allows |
| `kfac` | and G = E[d dᵀ] of the loss gradients at its outputs | the net's loss to second order, if inputs and gradients were independent |
| `auto` | `inputs` where no BN takes the layer's output, else `weights` | |

Where a BN layer takes the output, a shift of its mean is gone once its statistics are re-estimated: C is the covariance there. Elsewhere it
is the second moment about 0; `SHRINKAGE` says what is added to its diagonal.

Reference: inputs: Zhang et al. 2016, arXiv 1505.06798; Chen et al. 2021 (DRONE); Wang et al. 2024, arXiv 2403.07378 (SVD-LLM). Both sides:
Martens & Grosse 2015, arXiv 1503.05671 (K-FAC).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ranksearch.calibration.drawn import SummedLoss, drawn_directions_loss
from ranksearch.calibration.statistics import collect
from ranksearch.compress import Net, trace
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering.weighting import Weighting

WEIGHTS = "weights"
"""The metric that needs no data."""
METRICS = ("auto", WEIGHTS, "inputs", "kfac")
SHRINKAGE = 0.01
"""Share of a second moment's mean diagonal that is added to its diagonal."""
WIDEST = 2048
"""A second moment over more inputs is kept as 1,024 drawn rows and the ridge: 16 MiB for 4,096 inputs and 43 MiB for 11,008, in the
place of 64 and 462 MiB."""
DIRECTIONS = "directions"
"""Takes the place of a loss: random directions of the output, for nets whose outputs are compared by distance (embeddings)."""


def measure_weightings(
    model: nn.Module,
    net: Net,
    batches: Iterable[Any],
    metric: str,
    *,
    seed: int,
    loss: SummedLoss | str | None = None,
) -> dict[str, Weighting]:
    """Layer -> its weighting in `metric`; layers that keep the weights' own metric are left out, as are embeddings and layers that no
    batch reaches. A layer that no gradient reaches counts in the metric of its inputs alone.

    Args:
        batches: of inputs, as the model takes them.
        loss: for `kfac`, as in `weigh`; or "directions".

    Raises:
        UsageError: no such metric, or no batches.
        NonFiniteError: activations or gradients that are not finite.
    """
    if metric not in METRICS:
        raise UsageError(f"There is no metric {metric!r} of layers. {nearest(metric, METRICS)}")
    layers = [
        layer for layer in net.layers if metric in ("inputs", "kfac") or (metric == "auto" and layer.norm is None)
    ]
    if not layers:
        return {}
    generator = torch.Generator().manual_seed(seed)
    if loss is not None and not callable(loss):
        if loss != DIRECTIONS:
            raise UsageError(f"loss is a function of the net's output or {DIRECTIONS!r}, not {loss!r}.")
        loss = drawn_directions_loss(generator)
    chosen = replace(net, layers=tuple(layers))
    found = collect(
        model, chosen, batches, gradients=metric == "kfac", fisher=False, loss=loss, generator=generator, widest=WIDEST
    )
    weightings = {}
    for layer in layers:
        statistics = found.pop(layer.name)
        if not statistics.inputs.rows:  # an embedding, whose rows are looked up, or a layer that no batch reaches
            continue
        outputs = statistics.gradients
        if outputs is not None and not outputs.rows:  # detached from the loss
            outputs = None
        weightings[layer.name] = Weighting(
            statistics.inputs.shrunk(SHRINKAGE, centred=layer.norm is not None),
            None if outputs is None else outputs.shrunk(SHRINKAGE, centred=False),
        )
    return weightings


def weightings(
    model: nn.Module,
    example_input: Any,
    calibration: Iterable[Any],
    *,
    metric: str = "inputs",
    loss: SummedLoss | str | None = None,
    seed: int = 0,
) -> dict[str, Weighting]:
    """The metric of data for every layer of `model`: for `allocate`, `compress`, `project_` and `Projector`.

    Args:
        example_input: a batched input tensor, or a tuple of them.
        calibration: batches of inputs; some thousand rows (positions, tokens) per layer do.
        metric: "inputs", "kfac", or "auto" ("inputs" where no BN takes a layer's output).
        loss: for "kfac": output of the model -> sum of the samples' losses; "directions" for embeddings, which are compared by distance;
            left out, cross-entropy against labels drawn from the model's own prediction.
        seed: of what is drawn.

    Raises:
        UsageError: no such metric, no batches, or an output that the loss cannot read.
        NonFiniteError: activations or gradients that are not finite.
    """
    return measure_weightings(model, trace(model, example_input), calibration, metric, seed=seed, loss=loss)
