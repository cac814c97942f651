"""Latency as a cost: what every option of every layer takes, and a whole net's time predicted from that.

predicted = dense net, measured + Σ over the lowered layers of (c · time of the chain - a · time of the dense layer)

What share of its dense layer's time a chain takes is read from a `LatencyTable`, where both were timed side by side. The dense layers' own
times are measured in turn with the net: a machine's speed changes over the minutes that a table takes. The factors are what a millisecond
of a layer by itself is worth inside this net: caches that others have used, work that a runtime fuses or spares. They are fitted to six of
its plans that are measured whole, in turn with the dense net, once per net, and held near 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ranksearch.allocate.curves import Curves, LayerOptions, Timing
from ranksearch.compress import restructure_
from ranksearch.costs import NS_PER_MS
from ranksearch.deploy.latency_table import FINE, LatencyTable, shapes_of
from ranksearch.lowering.contract import sides
from ranksearch.model.copying import copied
from ranksearch.model.trace import Net

FITTED_AT = (0.1, 0.3, 0.5)
"""Shares of the ladders of ranks. Most of these plans are faster than the dense net, as are those that a budget asks for. Slower plans cost
more inside a net than their layers alone, by more than other plans do, and would decide the fit."""
PRIOR = 0.2
"""How firmly the factors are held at 1: an error of this in both weighs as one of this share of the layers' time in one plan."""
FACTORS = (0.7, 1.5)

Picks = Mapping[str, int]
"""Layer -> option."""


def timed(curves: Curves, model: nn.Module, example: Any, table: LatencyTable, log: Callable[[str], None]) -> Curves:
    """`curves` with the latency of every option; what the table lacks is measured, and the table's files written.

    Args:
        model: the net, trained or not.
        example: a batch of one input.
    """
    table.measure(((o.layer, o.lowerings, o.rank_multiple) for o in curves.layers if o.lowerings), log)
    key = net_key(curves.net)
    if key not in table.nets:
        log("latency table: timing the whole net, its layers by themselves, and six plans of it")
        table.nets[key] = _measured_net(curves, model, example, table)
        table.added += 1
    table.save()
    net = table.nets[key]
    times = _times_ms(curves, table, net["layers_ms"])
    layers = []
    for options in curves.layers:
        factors = np.where([choice.rank == 0 for choice in options.choices], net["dense_factor"], net["chain_factor"])
        nanoseconds = np.round(factors * times[options.layer.name] * NS_PER_MS).astype(np.int64)
        layers.append(replace(options, latency=nanoseconds))
    dense_ns = round(net["dense_ms"] * NS_PER_MS)
    other_ns = dense_ns - sum(int(options.latency[0]) for options in layers if options.latency is not None)
    timing = Timing(dense_ns, other_ns, (net["dense_factor"], net["chain_factor"]))
    return replace(curves, layers=tuple(layers), timing=timing)


def net_key(net: Net) -> str:
    """Content hash of a net's layers and fixed costs."""
    return hashlib.sha256(repr(net).encode()).hexdigest()[:16]


def _times_ms(curves: Curves, table: LatencyTable, layers_ms: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Layer -> [n options]: time of the layer by itself; 0 for one that may only stay dense.

    Args:
        layers_ms: time of every dense layer, to which the table's are scaled.
    """
    found = {}
    for options in curves.layers:
        layer = options.layer
        times = np.zeros(len(options.choices))
        if options.lowerings:
            times[0] = table.dense_ms(layer)
            for name in options.lowerings:
                index = options.of_lowering(name)
                times[index] = table.times_ms(layer, name, [options.choices[i].rank for i in index])
            times *= layers_ms[layer.name] / times[0]
        found[layer.name] = times
    return found


def _measured_net(curves: Curves, model: nn.Module, example: Any, table: LatencyTable) -> dict[str, Any]:
    plans, layers = _fitting_plans(curves), curves.net.layers
    nets = [model, *(restructure_(copied(model), curves.plan(picks)) for picks in plans)]
    shapes = list(dict.fromkeys(shape for layer in layers for shape in shapes_of(layer)))
    (dense_ms, *found), alone = table.stopwatch.nets_and_layers_ms(nets, example, shapes)
    alone_ms = dict(zip(shapes, alone, strict=True))
    layers_ms = {layer.name: sum(alone_ms[shape] for shape in shapes_of(layer)) for layer in layers}
    times = _times_ms(curves, table, layers_ms)
    replaced = [sum(float(times[name][0]) for name, i in picks.items() if i) for picks in plans]
    chains = [sum(float(times[name][i]) for name, i in picks.items() if i) for picks in plans]
    dense_factor, chain_factor = fit_factors(np.array(replaced), np.array(chains), dense_ms - np.array(found))
    return {"dense_ms": dense_ms, "dense_factor": dense_factor, "chain_factor": chain_factor, "layers_ms": layers_ms}


def _fitting_plans(curves: Curves) -> list[Picks]:
    """Plans of every lowering at every layer in turn, at the shares `FITTED_AT` of its ladder: among all its ranks, and among multiples
    of 4, which some runtimes compute otherwise.

    Not the fastest or slowest options: those would be the ones whose times are most wrong.
    """
    plans: list[Picks] = []
    for fine in (False, True):
        for turn, share in enumerate(FITTED_AT):
            picks = {}
            for number, options in enumerate(curves.layers):
                ladder = _ladder(options, turn + number, fine)
                picks[options.layer.name] = ladder[int(share * len(ladder))]
            plans.append(curves.tied(picks))
    return plans


def _ladder(options: LayerOptions, turn: int, fine: bool) -> list[int]:
    """The options of one of a layer's lowerings, of multiples of `FINE` alone where it has any."""
    if not options.lowerings:
        return [0]
    ladder = list(options.ladder(options.lowerings[turn % len(options.lowerings)]))
    kept = [index for index in ladder if all(side % FINE == 0 for side in sides(options.choices[index].rank))]
    return kept if fine and kept else ladder


def fit_factors(replaced: np.ndarray, chains: np.ndarray, saved: np.ndarray) -> tuple[float, float]:
    """(a, c) of least squares in saved = a · replaced - c · chains over the plans, held near 1; within `FACTORS`.

    Args:
        replaced, chains: [plans], ms of the layers by themselves, dense and as chains.
        saved: [plans], ms of the whole net.
    """
    rows = np.stack([replaced, -chains], axis=1)
    hold = PRIOR * max(float(replaced.max(initial=0.0)), 1e-9) * np.eye(2)
    off = np.concatenate([saved - rows @ np.ones(2), np.zeros(2)])
    change, *_ = np.linalg.lstsq(np.concatenate([rows, hold]), off, rcond=None)
    a, c = np.clip(1 + change, *FACTORS)
    return float(a), float(c)
