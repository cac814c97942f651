"""Makes rank curves: from the weights, by one Gram `eigvalsh` per layer and lowering, or from the shapes alone.

Curves that are made by iterations (`Lowering.curve_iterates`) go to the GPU where there is one, layers of one spec in one batch: their
many small products in fp64 share their launches there, and by its data sheet even a consumer card, whose fp64 is a 64th of its fp32, does
as many of them a second as several cores of a CPU. An `eigvalsh` stays where the weights lie: a GPU is slower at small ones
(`subspaces.ON_CPU`). Neither way was timed on a card.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from ranksearch.allocate.curve_cache import curve_key
from ranksearch.allocate.curves import Curves, LayerOptions
from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.allocate.side_by_side import side_by_side
from ranksearch.compress import DENSE, Layer, LayerPlan, Net, layer_cost
from ranksearch.errors import NonFiniteError, UsageError
from ranksearch.lowering import Lowering, lowering_named
from ranksearch.lowering.contract import RankCurve, sides
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.slots import find_slots


def _lowering_options(layer: Layer, curve: RankCurve, name: str, min_rank: int) -> tuple[list[LayerPlan], np.ndarray]:
    """The ranks of one lowering that are cheaper than dense in MACs or params, and [4, n]: removed, residual, macs, params."""
    dense_macs, dense_params = layer_cost(layer, DENSE)
    choices, columns = [], []
    for rank, removed, residual in zip(curve.ranks, curve.removed, curve.residual, strict=True):
        choice = LayerPlan(name, rank)
        macs, params = layer_cost(layer, choice)
        if min(sides(rank)) >= min_rank and (macs < dense_macs or params < dense_params):
            choices.append(choice)
            columns.append((removed, residual, macs, params))
    return choices, np.array(columns).reshape(-1, 4).T


def _useful(layer: Layer, rule: LayerRule) -> Iterator[Lowering]:
    """The lowerings that a layer may take, and that have a rank that is cheaper than dense."""
    for lowering in map(lowering_named, rule.lowerings or ()):
        if lowering.has_rank and lowering.supports(layer.spec):
            even = [lowering.break_even_rank(layer.spec, cost, layer.in_sizes[0]) for cost in ("macs", "params")]
            if max(max(sides(rank)) for rank in even) >= (rule.min_rank or 1):
                yield lowering


def _options(layer: Layer, rule: LayerRule, curve_of: Callable[[Layer, Lowering, int], RankCurve]) -> LayerOptions:
    macs, params = layer_cost(layer, DENSE)
    choices, tables, spectra = [DENSE], [np.array([[0.0], [0.0], [macs], [params]])], {}
    min_rank, multiple = rule.min_rank or 1, rule.rank_multiple or 1
    for lowering in _useful(layer, rule):
        curve = curve_of(layer, lowering, multiple)
        more, table = _lowering_options(layer, curve, lowering.name, min_rank)
        choices += more
        tables.append(table)
        if more and curve.spectra:
            spectra[lowering.name] = curve.spectra
    removed, residual, layer_macs, layer_params = np.concatenate(tables, axis=1)
    return LayerOptions(
        layer, tuple(choices), removed, residual, layer_macs.astype(np.int64), layer_params.astype(np.int64), spectra, multiple
    )  # fmt: skip


Asked = tuple[Layer, Lowering, int]
"""A curve that is asked for: of this layer and lowering, at multiples of this rank."""


def _shares_launches(device: torch.device) -> bool:
    """Whether work is done in larger batches there; a CPU's cores have a layer each."""
    return device.type == "cuda"


def rank_curves(
    model: nn.Module,
    net: Net,
    rules: LayerRules,
    known: MutableMapping[str, RankCurve] | None = None,
    weightings: Mapping[str, Weighting] | None = None,
    device: torch.device | None = None,
) -> Curves:
    """Options of every layer of `net` under `rules`, from the weights of `model`.

    Args:
        weightings: layer -> the metric in which its error is measured; for layers that are not named, the weight's norm.
        known: curves by content hash, such as a `CurveCache`; what is not there is computed and added.
        device: where curves are made that are iterations; None: where the weights lie, as all others are.

    Raises:
        UsageError: the rules leave no layer that could be lowered.
        NonFiniteError: a weight is not finite; the text names the layer.
    """
    slots, found = find_slots(model), {} if known is None else known
    digests: dict[str, str] = {}
    keys: dict[tuple[str, str], str] = {}

    def key_of(layer: Layer, lowering: Lowering, multiple: int) -> str:
        """The key of a curve in the weights' own metric."""
        if (layer.name, lowering.curve_name) not in keys:
            weight = slots[layer.name].weight
            keys[layer.name, lowering.curve_name] = curve_key(weight, layer.spec, lowering.curve_name, multiple)
        return keys[layer.name, lowering.curve_name]

    def place_of(layer: Layer, lowering: Lowering) -> torch.device:
        return slots[layer.name].weight.device if device is None or not lowering.curve_iterates else device

    def batches(asked: Iterable[Asked]) -> Iterable[list[Asked]]:
        """Curves to be made at once: on a GPU by iterations of layers of one spec; each by itself elsewhere."""
        alike = defaultdict[Hashable, list[Asked]](list)
        for layer, lowering, multiple in asked:
            together = lowering.curve_iterates and _shares_launches(place_of(layer, lowering))
            kind = (lowering.curve_name, layer.spec, multiple, slots[layer.name].weight.dtype)
            alike[kind if together else len(alike)].append((layer, lowering, multiple))
        return alike.values()

    def make(asked: Sequence[Asked]) -> None:
        """Curves of layers of one spec, in the weights' own metric."""
        layer, lowering, multiple = asked[0]
        try:
            weights = [slots[one.name].weight.detach().to(place_of(one, lowering)) for one, *_ in asked]
            made = lowering.curves(weights, layer.spec, multiple)
        except NonFiniteError as error:
            if len(asked) == 1:
                raise NonFiniteError(f"Layer {layer.name!r}: {error}") from error
            for each in asked:  # one by one, to name it
                make([each])
            raise
        found.update({key_of(*each): curve for each, curve in zip(asked, made, strict=True)})

    def curve_of(layer: Layer, lowering: Lowering, multiple: int) -> RankCurve:
        weighting = (weightings or {}).get(layer.name)
        view = lowering.seen(weighting, layer.spec) if weighting is not None else None
        key = key_of(layer, lowering, multiple)
        if weighting is not None and view is not None:
            if layer.name not in digests:
                digests[layer.name] = weighting.digest()
            key = f"{key}-{digests[layer.name][:24]}"
        if key in found:
            return found[key]
        if view is None:
            make([(layer, lowering, multiple)])
            return found[key]
        try:
            found[key] = view.curve(slots[layer.name].weight.detach(), multiple)
        except NonFiniteError as error:
            raise NonFiniteError(f"Layer {layer.name!r}: {error}") from error
        return found[key]

    if not weightings:  # whose views of all layers at once might not fit into memory
        asked = [
            (layer, lowering, rule.rank_multiple or 1)
            for layer in net.layers
            for rule in [rules.for_layer(layer.name, layer.shared_with)]
            for lowering in _useful(layer, rule)
        ]
        first = {key: each for each in asked if (key := key_of(*each)) not in found}
        side_by_side([partial(make, batch) for batch in batches(first.values())])
    return _curves(net, rules, curve_of)


def cost_curves(net: Net, rules: LayerRules) -> Curves:
    """The same options and costs from the shapes alone: nothing is decomposed, and no option seems to remove anything.

    It tells which budgets can be met.

    Raises:
        UsageError: the rules leave no layer that could be lowered.
    """

    def curve_of(layer: Layer, lowering: Lowering, multiple: int) -> RankCurve:
        ranks = lowering.ranks(layer.spec, multiple)
        return RankCurve(ranks, np.zeros(len(ranks)), np.zeros(len(ranks)))

    return _curves(net, rules, curve_of)


def _curves(net: Net, rules: LayerRules, curve_of: Callable[[Layer, Lowering, int], RankCurve]) -> Curves:
    layers = [_options(layer, rules.for_layer(layer.name, layer.shared_with), curve_of) for layer in net.layers]
    if all(len(options.choices) == 1 for options in layers):
        raise UsageError("The layer rules leave no layer to lower: check layers.include, exclude, lowerings and ranks.")
    free = [options.layer.name for options in layers if len(options.choices) > 1]
    groups = rules.groups_among(free)
    left = set(free).difference(*groups)
    return Curves(net, tuple(layers), groups + _stacks([layer for layer in net.layers if layer.name in left]))


def _stacks(layers: Iterable[Layer]) -> tuple[tuple[str, ...], ...]:
    """Groups of fused experts' matrices, one per stacked weight: at one rank the MACs stay the same wherever tokens go."""
    stacks = defaultdict[str, list[str]](list)
    for layer in layers:
        if layer.stack is not None:
            stacks[layer.stack].append(layer.name)
    return tuple(tuple(names) for names in stacks.values() if len(names) > 1)
