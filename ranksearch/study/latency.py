"""Latency at the end of a study: the front's nets and their layers timed, in turn with the dense net's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ranksearch.compress import Layer, LayerPlan, RankPlan
from ranksearch.deploy.latency_table import shapes_of
from ranksearch.deploy.stopwatch import NET_SECONDS, Stopwatch, TimedShape
from ranksearch.errors import RanksearchError, UsageError, first_line
from ranksearch.front.layer_costs import layer_of
from ranksearch.front.row import Row
from ranksearch.study.study import Study
from ranksearch.words import Log

AT_ONCE = 12
"""Number of nets of the front that are measured in turn with the dense one."""
TOLD_SECONDS, PIECE_SECONDS = 0.15, 0.02
"""Seconds that timing a net or a layer may take if latency is no part of the search and is only reported."""
PIECES = 150
"""The most different layers that are timed: all of them are in memory at once."""
EAGER = "eager"
"""The runtime in which a layer is timed without seconds of compilation."""

Piece = tuple[TimedShape, LayerPlan]


def time_front(study: Study, dense: nn.Module, load: Callable[[Row], nn.Module], example: Any, log: Log) -> None:
    """Times the nets of the front in turn with the dense one, and their layers. If latency is not searched, whatever cannot be timed is
    only logged, and so is a net whose files are lost.

    Raises:
        RanksearchError, RuntimeError: the nets cannot be timed, and latency is searched.
    """
    try:
        stopwatch = Stopwatch(study.space.latency.as_setting())
        measure_front(study, stopwatch, dense, load, example, log)
    except (RanksearchError, RuntimeError) as error:
        if study.space.has_latency:
            raise
        log(f"the front's nets were not timed: {first_line(error)}")
        return
    try:
        measure_layers(study, stopwatch)
    except (RanksearchError, RuntimeError) as error:
        log(f"the layers were not timed: {first_line(error)}")


def measure_front(
    study: Study, stopwatch: Stopwatch, dense: nn.Module, load: Callable[[Row], nn.Module], example: Any, log: Log
) -> None:
    """Times the nets of the front in turn with the dense one, each once. If latency is searched, slower ones leave the front, and the nets
    that take their place are timed too.
    """
    searched, lost = study.space.has_latency, set[int]()
    while rows := [row for row in study.front if not study.is_timed(row.trial) and row.trial not in lost][:AT_ONCE]:
        nets = {}
        for row in rows:
            try:
                nets[row.trial] = load(row)
            except UsageError as error:
                lost.add(row.trial)
                log(f"the net of trial {row.trial} is not timed: {error}")
        if not (rows := [row for row in rows if row.trial in nets]):
            continue
        if not searched:
            nets_of = "1 net" if len(rows) == 1 else f"{len(rows)} nets"
            log(f"timing {nets_of} of the front in turn with the dense one: {stopwatch.key}")
        seconds = NET_SECONDS if searched else TOLD_SECONDS
        dense_ms, *times = stopwatch.nets_ms([dense, *nets.values()], example, seconds=seconds)
        found = {row.trial: (ms, ms / dense_ms) for row, ms in zip(rows, times, strict=True)}
        study.note_latencies(found, measured_with=stopwatch.key)
        for row, ms in zip(rows, times, strict=True) if searched else ():
            known = row.latency_predicted_ms
            predicted = "" if known is None else f", predicted {known:.3f} ms"
            left = "; slower than the dense net, so not on the front" if ms > dense_ms else ""
            log(f"latency of trial {row['trial']}: {ms:.3f} ms, dense {dense_ms:.3f} ms{predicted}{left}")


def measure_layers(study: Study, stopwatch: Stopwatch) -> None:
    """Times every layer of the dense net and of the front's nets on its own, the best net first, in turn and each kind once.

    Does nothing for a study from before layers were recorded, and in a runtime that compiles each layer.
    """
    known, records = study.info.get("layer_ms", {}).get("trials", {}), study.info.get("layer_costs", ())
    rows = [row for row in study.front if str(row.trial) not in known]
    if not rows or not records or stopwatch.setting.runtime != EAGER:
        return
    layers = [layer for layer in map(layer_of, records) if layer.macs]
    wanted: dict[str, dict[str, list[Piece]]] = {"dense": _pieces(layers, RankPlan())}
    kinds = set(_kinds(wanted["dense"]))
    for row in rows:
        pieces = _pieces(layers, RankPlan.from_dict(row["plan"]))
        if len(kinds | set(_kinds(pieces))) <= PIECES or len(wanted) == 1:
            wanted[str(row.trial)], kinds = pieces, kinds | set(_kinds(pieces))
    in_turn = list(kinds)
    ms = dict(zip(in_turn, stopwatch.pieces_ms(in_turn, seconds=PIECE_SECONDS), strict=True))
    found = {
        net: {name: sum(ms[piece] for piece in of) for name, of in pieces.items()} for net, pieces in wanted.items()
    }
    study.note_layer_times(found.pop("dense"), found, measured_with=stopwatch.key)


def dense_layers_ms(layers: Sequence[Layer], stopwatch: Stopwatch) -> dict[str, float]:
    """Layer -> milliseconds of the dense layer on its own, summed over its uses, all in turn and each kind once. Embeddings, which multiply
    nothing, are left out.

    Empty in a runtime that compiles each layer, and if there are too many kinds.
    """
    pieces = _pieces([layer for layer in layers if layer.macs], RankPlan())
    kinds = list(dict.fromkeys(_kinds(pieces)))
    if stopwatch.setting.runtime != EAGER or len(kinds) > PIECES:
        return {}
    ms = dict(zip(kinds, stopwatch.pieces_ms(kinds, seconds=PIECE_SECONDS), strict=True))
    return {name: sum(ms[piece] for piece in of) for name, of in pieces.items()}


def _pieces(layers: Sequence[Layer], plan: RankPlan) -> dict[str, list[Piece]]:
    """Layer -> the pieces that it consists of under a plan, one per use."""
    return {layer.name: [(shape, plan[layer.name]) for shape in shapes_of(layer)] for layer in layers}


def _kinds(pieces: dict[str, list[Piece]]) -> list[Piece]:
    return [piece for of in pieces.values() for piece in of]
