"""Calibration: a net whose decomposed layers are fitted, on data, to what the layers of the dense net compute.

`bias`: each layer by itself. A layer W x + b that becomes W_r x + b errs by (W − W_r) E[x] on average; its bias takes that up.

`sequential`: layer after layer. A layer that sees x in the dense net sees x̃ in the lowered one, whose earlier layers err. Among the
matrices of rank r the one whose outputs are nearest to W x is the best approximation, in the metric C̃ = E[x̃ x̃ᵀ], of

    W' = W (E[x x̃ᵀ] + λ) (C̃ + λ)⁻¹,      and its bias becomes b + W E[x] − W'_r E[x̃].

λ is the ridge that C̃ has anyway. Moments are about the means where a bias, or BN behind the layer, takes up what is left of them.

Reference: Zhang et al. 2016, arXiv 1505.06798 (asymmetric reconstruction).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.calibration.passes import Reached, asked, batch_statistics, drawn, rows_given, run, stages_of
from ranksearch.calibration.statistics import ROWS, Moment, width_of
from ranksearch.calibration.weightings import SHRINKAGE
from ranksearch.compress import LayerPlan, Net, RankPlan, trace
from ranksearch.compress.surgery import compress, open_parts_
from ranksearch.errors import NonFiniteError, UsageError, nearest
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.lowering.weighting import SecondMoment, Weighting
from ranksearch.model.bare import bare
from ranksearch.model.copying import copied
from ranksearch.model.inputs import cut
from ranksearch.model.slots import Slot, settled_, slots_of
from ranksearch.model.undisturbed import undisturbed

NUMBERS = 2**28
"""Numbers that the inputs in the dense net may take while one batch runs through the lowered one: 1 GiB."""
FEWEST = 1024
"""Rows of each layer's inputs that are kept however many layers there are."""
BIAS, SEQUENTIAL = FITS = ("bias", "sequential")
Settle = Callable[[str, "Seen"], None]
"""Gives a layer, by name, the weight and bias that follow from its inputs."""
WIDEST = 2048
"""A layer of more inputs keeps W as its target: what relates the inputs of both nets would be a matrix of so many rows."""


def calibrate(
    model: nn.Module,
    plan: RankPlan,
    calibration: Iterable[Any],
    *,
    fit: str = SEQUENTIAL,
    weightings: Mapping[str, Weighting] | None = None,
    example_input: Any = None,
    seed: int = 0,
) -> nn.Module:
    """What `compress` gives, with decomposed layers that are fitted to the dense net's on a few batches of inputs. Nothing is trained.

    Embeddings, layers that one pass calls more than once or whose weight others share, and experts, to which each net sends other tokens,
    are decomposed as by `compress`. BN layers of both nets use the statistics of each batch meanwhile, so batches should be as large as in
    training; re-estimate BN afterwards as ever (`reestimate_bn_`).

    Args:
        calibration: batches of inputs, as the model takes them, which are held in memory. A single batch, of some hundred samples, runs
            through each net once. Of several, which need less memory, "sequential" runs each through the beginning of both nets once for
            every layer, or once for layers of one input such as query, key and value.
        fit: "sequential" for weights and biases, one layer after the other, or "bias" for the biases alone.
        weightings: layer -> its metric (`ranksearch.weightings`). "sequential" takes the gradients' moments from it, and measures those of
            the inputs itself.
        example_input: as in `compress`; left out, the plan's, or the first batch.
        seed: of the positions that are drawn where a batch has many.

    Raises:
        UsageError: what `compress` raises it for, no batches, or no such `fit`.
        NonFiniteError: weights or inputs that are not finite; the text names the layer.
    """
    batches = list(calibration)
    if not batches:
        raise UsageError("A net is calibrated on data: give it at least one batch of inputs.")
    example = next((it for it in (example_input, plan.example_input) if it is not None), batches[0])
    net = trace(bare(model), example)
    work, warm = fitted(model, net, plan, batches, fit, weightings=weightings or {}, seed=seed)
    return compress(work, plan, example_input=example, warm=warm)


@torch.no_grad()
def take_over_(model: nn.Module, work: nn.Module, plan: RankPlan) -> None:
    """Gives the layers of `model` the weights and biases that `fitted` gave its copy `work`: to train on from there.

    Biases of what is within an attention or a recurrent net stay.
    """
    found = slots_of(work, plan)
    for name, (slot, _) in slots_of(bare(model), plan).items():
        slot.write_(found[name][0].weight.detach())
        if slot.inside is None and slot.spec.bias and len(slot.paths) == 1:
            there, here = list[Any](net.get_submodule(name) for net in (work, bare(model)))
            here.bias.copy_(there.bias)


@torch.no_grad()
def fitted(
    model: nn.Module,
    net: Net,
    plan: RankPlan,
    batches: Sequence[Any],
    fit: str,
    *,
    weightings: Mapping[str, Weighting],
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """(a copy of `model` in its dense form, in which the layers of the plan have their ranks, what their decompositions start from)"""
    if fit not in FITS:
        raise UsageError(f"There is no fit {fit!r} of decomposed layers. {nearest(fit, FITS)}")
    slots, norms = slots_of(bare(model), plan), {layer.name: layer.norm for layer in net.layers}
    taken = [
        n for n, (slot, _) in slots.items() if slot.experts is None and len(slot.paths) == 1 and not slot.spec.lookup
    ]
    dense, work = (copied(bare(model)) for _ in range(2))
    for net_of_both in (dense, work):
        open_parts_(settled_(net_of_both, plan), slots)
    before, after = slots_of(dense, plan), slots_of(work, plan)
    warm: dict[str, Any] = {}

    def settle(name: str, inputs: Seen) -> None:
        (slot, choice), weight = after[name], before[name][0].weight.detach()
        if not inputs.paired:
            warm[name] = _cut_(slot, choice, weight, weightings.get(name))
            return
        if fit == SEQUENTIAL:
            given = weightings.get(name)
            moment = inputs.moment()
            metric = Weighting(moment, None if given is None else given.outputs)
            warm[name] = _cut_(slot, choice, inputs.target(weight, moment), metric)
        if slot.spec.bias and norms[name] is None:
            layer: Any = work.get_submodule(name)
            layer.bias.data += inputs.shift(weight, slot.weight.detach())

    with undisturbed(dense), undisturbed(work), batch_statistics(dense), batch_statistics(work):
        stages = stages_of(dense, taken, cut(batches[0], 0, 2))
        called = {name: Seen(after[name][0].spec, norms[name] is not None) for stage in stages for name in stage}
        for name in slots if fit == BIAS else slots.keys() - called.keys():
            slot, choice = after[name]
            warm[name] = _cut_(slot, choice, slot.weight.detach(), weightings.get(name))
        if fit == BIAS:  # no layer waits for another: one stage, of the dense net alone
            _fit_stage(dense, dense, called, batches, seed, settle)
        elif len(batches) == 1:
            _fit_in_one_pass(dense, work, called, batches[0], seed, settle)
        else:
            for stage in stages:
                _fit_stage(dense, work, {name: called.pop(name) for name in stage}, batches, seed, settle)
    return work, warm


def _fit_stage(
    dense: nn.Module, work: nn.Module, seen: Mapping[str, Seen], batches: Sequence[Any], seed: int, settle: Settle
) -> None:
    """Fits layers of which none is fed by another, in passes of both nets as far as they are called."""
    specs = {name: inputs.spec for name, inputs in seen.items()}
    for number, batch in enumerate(batches):
        found = {net: rows_given(net, specs, batch, seed + number) for net in dict.fromkeys((dense, work))}
        for name, inputs in seen.items():
            inputs.add(found[dense].get(name), found[work].get(name))
    for name, inputs in seen.items():
        settle(name, inputs)


def _fit_in_one_pass(
    dense: nn.Module, work: nn.Module, seen: Mapping[str, Seen], batch: Any, seed: int, settle: Settle
) -> None:
    """Fits every layer just before it is called, so that the batch runs through each net once."""
    specs = {name: inputs.spec for name, inputs in seen.items()}
    most = NUMBERS // max(1, sum(width_of(spec) * spec.groups for spec in specs.values()))
    most = min(ROWS, max(FEWEST, most))
    of_dense = rows_given(dense, specs, batch, seed, most)

    def told(name: str, layer: nn.Module, x: Tensor) -> None:
        if name in of_dense:
            seen[name].add(of_dense.pop(name), drawn(x, specs[name], layer, seed, most))
            settle(name, seen[name])
            if not of_dense:
                raise Reached

    with asked(work, seen, told):
        run(work, batch)


class Seen:
    """The inputs of one layer in the dense net, x, and in the lowered one, x̃: moments over all batches."""

    def __init__(self, spec: LayerSpec, has_norm: bool) -> None:
        self.spec, self._centred = spec, spec.bias or has_norm
        self.lowered = Moment(torch.Generator().manual_seed(0), WIDEST)
        self._differs = False
        self._mean: Tensor | None = None  # of x [g, n], a sum
        self._error: Tensor | None = None  # of (x − x̃) x̃ᵀ [g, n, n], a sum

    def add(self, dense: Tensor | None, lowered: Tensor | None) -> None:
        """Rows of both [m, g, n], of the same positions; None where the batch did not reach the layer."""
        if dense is None or lowered is None or dense.shape != lowered.shape:
            self._differs |= dense is not lowered
            return
        self.lowered.add(lowered)
        total = dense.sum(dim=0)
        self._mean = total if self._mean is None else self._mean + total
        if dense is not lowered and dense.shape[2] <= WIDEST:
            error = (dense - lowered).movedim(0, 2) @ lowered.transpose(0, 1)
            self._error = error if self._error is None else self._error + error

    @property
    def paired(self) -> bool:
        """Whether both nets gave it as many rows: what a layer is given may depend on the data."""
        return self.lowered.rows > 0 and not self._differs

    @property
    def mean(self) -> Tensor:
        """E[x] [g, n]"""
        assert self._mean is not None
        return self._mean / self.lowered.rows

    def moment(self) -> SecondMoment:
        """C̃ + λ"""
        return self.lowered.shrunk(SHRINKAGE, centred=self._centred)

    def target(self, weight: Tensor, moment: SecondMoment) -> Tensor:
        """W' in fp64, laid out as the weight; `moment` is C̃ + λ."""
        blocks = self.spec.blocks(weight).double()
        if self._error is None:
            return weight.double()
        error = self._error / self.lowered.rows
        if self._centred:
            error = error - (self.mean - self.lowered.mean)[:, :, None] * self.lowered.mean[:, None]
        metric = moment.core.double() + torch.diag_embed(moment.ridge.double()[:, None].expand(-1, moment.width))
        change = torch.linalg.solve(metric, (blocks.flatten(2) @ error.double()).mT).mT
        return self.spec.weight_of(blocks + change.reshape(blocks.shape))

    def shift(self, dense: Tensor, lowered: Tensor) -> Tensor:
        """W E[x] − W_r E[x̃] [T], of the weights in both nets."""
        outputs = [
            (self.spec.blocks(weight).flatten(2).float() @ mean[:, :, None]).flatten()
            for weight, mean in ((dense, self.mean), (lowered, self.lowered.mean))
        ]
        return (outputs[0] - outputs[1]).to(dense.dtype)


def _cut_(slot: Slot, choice: LayerPlan, weight: Tensor, weighting: Weighting | None) -> Any:
    """Gives the layer what is nearest to `weight` at its rank; returns what its decomposition may start from."""
    lowering = lowering_named(choice.lowering)
    view = None if weighting is None else lowering.seen(weighting, slot.spec)
    try:
        if view is None:
            found = lowering.project(weight.to(slot.weight.dtype), choice.rank, slot.spec)
        else:
            found = view.project(weight.double(), choice.rank)
    except NonFiniteError as error:
        raise NonFiniteError(f"Layer {slot.name!r}: {error}") from error
    slot.write_(found.weight.to(slot.weight.dtype))
    return found.warm
