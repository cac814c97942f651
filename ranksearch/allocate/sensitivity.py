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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.allocate.curves import Curves, LayerOptions
from ranksearch.allocate.damage import Damage, Measure
from ranksearch.calibration.drawn import SummedLoss, default_loss
from ranksearch.calibration.statistics import Statistics, collect
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.slots import find_slots

SAMPLES = 8
"""Ranks per layer and lowering at which the form is evaluated."""
DAMPING = 0.3
"""Share of its mean diagonal that is added to each factor: other layers' errors reach a layer from directions that the dense net's inputs
do not have."""
TEMPER = 0.5
"""Exponent of the layers' absolute scales; 1 takes the second-order estimate at its word, 0 only each layer's shares."""
NEGLIGIBLE = 1e-9
"""Removed shares below this are rounding, by which nothing can be divided."""

Weigher = Callable[..., Tensor]
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
FORMS: dict[str, Weigher] = {"activation": activation, "fisher": fisher, "kfac": kfac, BALANCED: kfac}
SENSITIVITIES = ("none", *FORMS)
USUAL_SENSITIVITY = "kfac"
"""The one that is used where there are data, and nothing else was named or scored better."""
ABSOLUTE = ("fisher", "kfac", BALANCED)
"""Those in units of the loss; the other shares are of the layer's own output."""


def _blocks(weight: Tensor, spec: LayerSpec) -> Tensor:
    """torch's layout -> [g, T/g, n]"""
    return spec.blocks(weight).flatten(2)


def _shares(
    options: LayerOptions, weight: Tensor, forms: Mapping[str, Callable[[Tensor], Tensor]], weighting: Weighting | None
) -> dict[str, tuple[np.ndarray, float]]:
    """Name of a form -> (share of the weight's own form that every option removes [n options], the weight's own form); the layer is
    reconstructed once for all of them."""
    spec = options.layer.spec
    own = _blocks(weight, spec)
    totals = {name: float(form(own)) for name, form in forms.items()}
    forms = {name: form for name, form in forms.items() if totals[name] > 0}
    shares = {name: options.removed.copy() for name in forms}
    for lowered in options.lowerings if forms else ():
        index = np.array(options.of_lowering(lowered))
        index = index[np.argsort(options.removed[index], kind="stable")]
        usable = index[options.removed[index] > NEGLIGIBLE]
        if len(usable) == 0:
            continue
        places = np.unique(np.linspace(0, len(usable) - 1, SAMPLES).round().astype(int))
        probed = usable[places]
        ranks = [options.choices[i].rank for i in probed]
        found: dict[str, list[float]] = {name: [] for name in forms}
        lowering = lowering_named(lowered)
        view = lowering.seen(weighting, spec) if weighting is not None else None
        near = lowering.approximations(weight, ranks, spec) if view is None else view.approximations(weight, ranks)
        for option, approximation in zip(probed, near, strict=True):
            error = _blocks(weight - approximation.to(weight), spec)
            plain = view is None
            energy = float(error.square().sum() / weight.square().sum()) if plain else float(options.removed[option])
            for name, form in forms.items():
                found[name].append(float(form(error)) / totals[name] / max(energy, NEGLIGIBLE))
        at, known = np.log(options.removed[usable]), np.log(options.removed[probed])
        for name, quotients in found.items():
            logs = np.log(np.maximum(quotients, 1e-12))
            shares[name][usable] = options.removed[usable] * np.exp(np.interp(at, known, logs))
    void = np.zeros_like(options.removed)
    return {
        name: (shares.get(name, void), max(total, 0.0) if total == total else 0.0) for name, total in totals.items()
    }


def weigh(
    curves: Curves,
    model: nn.Module,
    batches: Iterable[Any],
    sensitivity: str,
    measure: Measure,
    *,
    seed: int,
    generator: torch.Generator | None = None,
    loss: SummedLoss | None = None,
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
    found = weigh_several(
        curves, model, batches, (sensitivity,), measure, seed=seed, generator=generator, loss=loss, damping=damping,
        temper=temper, weightings=weightings,
    )  # fmt: skip
    return found[sensitivity]


def weigh_several(
    curves: Curves,
    model: nn.Module,
    batches: Iterable[Any],
    sensitivities: Sequence[str],
    measure: Measure,
    *,
    seed: int,
    generator: torch.Generator | None = None,
    loss: SummedLoss | None = None,
    damping: float = DAMPING,
    temper: float = TEMPER,
    weightings: Mapping[str, Weighting] | None = None,
) -> dict[str, Damage]:
    """Name -> damage of several sensitivities from one pass over the batches; those with gradients are of one loss, so that
    `kfac_balanced` and another one of them need a pass each. Arguments as `weigh` has them."""
    names = [name for name in dict.fromkeys(sensitivities) if name != "none"]
    damages = {} if len(names) == len(sensitivities) else {"none": Damage(measure)}
    if not names:
        return damages
    generator, absolute = generator or torch.Generator().manual_seed(seed), [n for n in names if n in ABSOLUTE]
    if loss is None and absolute:
        loss = default_loss(generator, balanced=BALANCED in names)
    statistics = collect(
        model, curves.net, batches, gradients=any(FORMS[name] is kfac for name in names), fisher="fisher" in names,
        loss=loss if absolute else None, generator=generator,
    )  # fmt: skip
    if absolute and not _informative(curves, statistics):
        warnings.warn(
            f"Sensitivity {absolute[0]!r} is void here: the gradients of the loss are zero at every layer's output. The layers are "
            f"weighed by their activations instead; a loss of your own (output -> sum of the samples' losses) says more.",
            UserWarning, stacklevel=3,
        )  # fmt: skip
        absolute = []
    found: dict[str, dict[str, tuple[np.ndarray, float]]] = {name: {} for name in names}
    slots = find_slots(model)
    by_weight, by_inputs = [], []  # layers that no batch reaches, and that no gradient reaches
    for options in curves.layers:
        name, norm = options.layer.name, options.layer.norm is not None
        weight = slots[name].weight.detach().float()
        known = statistics.pop(name)  # each layer's moments are dropped as soon as they are used
        if not known.inputs.rows:
            by_weight.append(name)
            continue
        without = not known.gradient_calls
        if without:
            by_inputs.append(name)
        forms = {s: FORMS["activation" if s not in absolute or without else s] for s in names}
        bound = {s: partial(form, found=known, norm=norm, damping=damping) for s, form in forms.items()}
        with torch.no_grad():
            shares = _shares(options, weight, bound, (weightings or {}).get(name))
        for sensitivity, values in shares.items():
            found[sensitivity][name] = values
    for sensitivity, layers in found.items():
        unscaled = [*by_weight, *(by_inputs if sensitivity in absolute else [])]
        scales = {name: total**temper if sensitivity in absolute else 1.0 for name, (_, total) in layers.items()}
        others = [scale for name, scale in scales.items() if name not in unscaled]
        scales |= dict.fromkeys(unscaled, float(np.median(others)) if others else 1.0)
        by_weights = {o.layer.name: o.removed.copy() for o in curves.layers if o.layer.name in by_weight}
        damages[sensitivity] = Damage(
            measure, {name: share for name, (share, _) in layers.items()} | by_weights, scales
        )
    return damages


def _informative(curves: Curves, statistics: Mapping[str, Statistics]) -> bool:
    """Whether the loss has a gradient at the output of any layer that may be lowered and has inputs other than zero."""

    def seen(found: Statistics) -> bool:
        gradients = found.fisher if found.fisher is not None else found.gradients.energy  # type: ignore[union-attr]
        return bool(gradients.any()) and bool(found.inputs.energy.any())

    found = [s for options in curves.layers if (s := statistics[options.layer.name]).gradient_calls and s.inputs.rows]
    return any(map(seen, found))
