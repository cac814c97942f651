"""Sensitivities: how much an error in each weight matters, from a few batches of inputs.

With E = W - W_r the error of a layer at rank r, A the second moment of its inputs, G that of the loss gradients at its outputs:

| name | quadratic form of E | reference |
|---|---|---|
| `none` | ‖E‖² / ‖W‖² | Eckart & Young 1936 |
| `activation` | tr(E A Eᵀ) / tr(W A Wᵀ): share of the output's energy | Zhang et al. 2016, arXiv 1505.06798 |
| `fisher` | ½ Σ F_ij E_ij², F the diagonal Fisher information | LeCun et al. 1990; Hsu et al. 2022, arXiv 2207.00112 |
| `kfac` | ½ P tr(G E A Eᵀ), P positions per sample | Martens & Grosse 2015, arXiv 1503.05671; convs: arXiv 1602.01407 |
| `kfac_balanced` | the same with G of a loss in which every class counts alike, whatever its share | for metrics that do so |

`fisher` and the `kfac`s are in units of the loss (nats): second-order estimates of what the error costs. Where a BN layer follows, a shift
of the outputs' mean is gone once its statistics are re-estimated, so A is the covariance there.

The forms are evaluated at a few ranks of every lowering, whatever its format, and their quotient with ‖E‖² is interpolated over
the removed energy, along which it varies slowly. Cost: the batches forward (`activation`) and backward (the others), then a
handful of reconstructions per layer and lowering.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.allocate.curves import Curves, LayerOptions
from ranksearch.allocate.damage import Damage, Measure
from ranksearch.allocate.drawn import Loss, default_loss
from ranksearch.allocate.statistics import Statistics, collect
from ranksearch.compress.slots import find_slots
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.lowering.weighting import Weighting

SAMPLES = 8
"""Ranks per layer and lowering at which the form is evaluated."""
DAMPING = 0.3
"""Share of its mean diagonal that is added to each factor: other layers' errors reach a layer from directions that the dense net's inputs
do not have."""
TEMPER = 0.5
"""Exponent of the layers' absolute scales; 1 takes the second-order estimate at its word, 0 only each layer's shares."""
NEGLIGIBLE = 1e-9
"""Removed shares below this are rounding, of which no quotient can be taken."""

Form = Callable[..., Tensor]
"""(E [g, T/g, n], a layer's statistics, whether BN follows, damping) -> its damage, a number."""


def activation(error: Tensor, found: Statistics, norm: bool, damping: float) -> Tensor:
    """tr(E A Eᵀ)"""
    return (error * found.inputs.times(error, centred=norm, damping=damping)).sum()


def fisher(error: Tensor, found: Statistics, norm: bool, damping: float) -> Tensor:
    """½ Σ F_ij E_ij²; damping adds to F its mean."""
    assert found.fisher is not None
    weights = found.fisher.to(error.device)
    return 0.5 * ((weights + damping * weights.mean()) * error.square()).sum()


def kfac(error: Tensor, found: Statistics, norm: bool, damping: float) -> Tensor:
    """½ P tr(G E A Eᵀ)"""
    assert found.gradients is not None
    left = found.gradients.times(error.mT, centred=False, damping=damping).mT  # G E
    return 0.5 * found.positions * (left * found.inputs.times(error, centred=norm, damping=damping)).sum()


BALANCED = "kfac_balanced"
FORMS: dict[str, Form] = {"activation": activation, "fisher": fisher, "kfac": kfac, BALANCED: kfac}
SENSITIVITIES = ("none", *FORMS)
ABSOLUTE = ("fisher", "kfac", BALANCED)
"""Those in units of the loss; the other shares are of the layer's own output."""


def _blocks(weight: Tensor, spec: LayerSpec) -> Tensor:
    """torch's layout -> [g, T/g, n]"""
    return spec.blocks(weight).flatten(2)


def _shares(
    options: LayerOptions, weight: Tensor, form: Callable[[Tensor], Tensor], weighting: Weighting | None
) -> tuple[np.ndarray, float]:
    """(share of the weight's own form that every option removes [n options], the weight's own form)"""
    spec = options.layer.spec
    total = float(form(_blocks(weight, spec)))
    shares = options.removed.copy()
    if not total > 0:
        return np.zeros_like(shares), 0.0
    for name in options.lowerings:
        index = np.array(options.of_lowering(name))
        index = index[np.argsort(options.removed[index], kind="stable")]
        usable = index[options.removed[index] > NEGLIGIBLE]
        if len(usable) == 0:
            continue
        places = np.unique(np.linspace(0, len(usable) - 1, SAMPLES).round().astype(int))
        probed = usable[places]
        ranks = [options.choices[i].rank for i in probed]
        found = []
        lowering = lowering_named(name)
        view = lowering.seen(weighting, spec) if weighting is not None else None
        near = lowering.approximations(weight, ranks, spec) if view is None else view.approximations(weight, ranks)
        for option, approximation in zip(probed, near, strict=True):
            error = _blocks(weight - approximation.to(weight), spec)
            plain = view is None
            energy = float(error.square().sum() / weight.square().sum()) if plain else float(options.removed[option])
            found.append(float(form(error)) / total / max(energy, NEGLIGIBLE))
        logs = np.log(np.maximum(found, 1e-12))
        at, known = np.log(options.removed[usable]), np.log(options.removed[probed])
        shares[usable] = options.removed[usable] * np.exp(np.interp(at, known, logs))
    return shares, total


def weigh(
    curves: Curves,
    model: nn.Module,
    batches: Iterable[Any],
    sensitivity: str,
    measure: Measure,
    *,
    seed: int,
    generator: torch.Generator | None = None,
    loss: Loss | None = None,
    damping: float = DAMPING,
    temper: float = TEMPER,
    weightings: Mapping[str, Weighting] | None = None,
) -> Damage:
    """The damage of every option as `sensitivity` weighs it, from `batches` of inputs as the model takes them.

    Args:
        measure: of the weighted share, such as -log of what is kept.
        generator: draws positions, and labels where `loss` is None; one of `seed` where None.
        loss: output of the model -> sum of the samples' losses, for all but `activation`; where None, `drawn.default_loss`.
        damping: of the factors (in units of their mean diagonal), as in K-FAC; see `DAMPING`.
        temper: exponent of the absolute scale of a layer's damage; see `TEMPER`.
        weightings: those that the curves were made in, and the layers will be cut in.

    A layer that no gradient reaches (frozen, detached, or of an output that the loss does not use) is weighed by its inputs alone,
    one that no batch reaches (an expert) by its weight alone, both at the median of the others' scales.

    Raises:
        UsageError: no batches, or an output that the default loss cannot read.
        NonFiniteError: activations or gradients that are not finite.
    """
    if sensitivity == "none":
        return Damage(measure)
    generator, absolute = generator or torch.Generator().manual_seed(seed), sensitivity in ABSOLUTE
    if loss is None and absolute:
        loss = default_loss(generator, balanced=sensitivity == BALANCED)
    statistics = collect(
        model, curves.net, batches, gradients=FORMS[sensitivity] is kfac, fisher=sensitivity == "fisher", loss=loss, generator=generator
    )  # fmt: skip
    if absolute and not _informative(curves, statistics):
        warnings.warn(
            f"Sensitivity {sensitivity!r} is void here: the gradients of the loss are zero at every layer's output. The layers are "
            f"weighed by their activations instead; a loss of your own (output -> sum of the samples' losses) says more.",
            UserWarning, stacklevel=2,
        )  # fmt: skip
        sensitivity, absolute = "activation", False
    shares, scales, slots = {}, {}, find_slots(model)
    unscaled: list[str] = []
    for options in curves.layers:
        name, norm = options.layer.name, options.layer.norm is not None
        weight = slots[name].weight.detach().float()
        found = statistics.pop(name)  # each layer's moments are dropped as soon as they are used
        if not found.inputs.rows:  # no batch reaches it: weighed by its weight alone
            shares[name] = options.removed.copy()
            unscaled.append(name)
            continue
        without = absolute and not found.gradient_calls  # weighed by its inputs alone
        form = FORMS["activation" if without else sensitivity]
        with torch.no_grad():
            shares[name], total = _shares(
                options, weight, partial(form, found=found, norm=norm, damping=damping), (weightings or {}).get(name)
            )
        scales[name] = total**temper if absolute else 1.0
        if without:
            unscaled.append(name)
    known = [scale for name, scale in scales.items() if name not in unscaled]
    scales |= dict.fromkeys(unscaled, float(np.median(known)) if known else 1.0)
    return Damage(measure, shares, scales)


def _informative(curves: Curves, statistics: Mapping[str, Statistics]) -> bool:
    """Whether the loss has a gradient at the output of any layer that may be lowered."""
    found = [s for options in curves.layers if (s := statistics[options.layer.name]).gradient_calls]
    return any(bool((s.fisher if s.fisher is not None else s.gradients.energy).any()) for s in found)  # type: ignore[union-attr]
