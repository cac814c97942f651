"""`LatencyTable`: measured times of layers under their lowerings and ranks, kept on disk and asked for any rank.

Ranks are measured at every multiple of the device's step up to the largest rank that saves MACs or params, at half a step, and at that
largest rank itself. Where other ranks may be chosen, two more are measured in each step: one just above its beginning and one amid it that
is no multiple of 4; and the smallest rank of all. A format with several ranks has a coarse grid of them.

Multiples of 4 and other ranks are two kinds: ONNX Runtime takes the whole step's time for the former and up to a quarter more for the
latter, PyTorch climbs evenly. Time is interpolated among measured ranks of the same kind (among several sides by Delaunay's simplices), and
where it changes much from one to the next, ranks between them are measured until it does not: both runtimes have cliffs where they change
to another kernel (PyTorch for one image where the input of a conv exceeds 20,480 values).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.spatial import Delaunay

from ranksearch.compress.plan import DENSE, LayerPlan
from ranksearch.compress.stopwatch import Stopwatch
from ranksearch.compress.trace import Layer
from ranksearch.files import write_atomically
from ranksearch.lowering import LayerSpec, Lowering, Rank, lowering_named
from ranksearch.lowering.contract import sides
from ranksearch.lowering.spec import Ints

FORMAT = 2
"""Counts up when a time comes to mean something else: older files are then not used any more."""
FINE = 4
"""Multiples of this are as fast as a whole step in a runtime that computes in blocks; others are slower there."""
STEEP = 0.1
"""Times of neighbouring measured ranks differ by at most this share of the dense layer's time per side of a rank, unless no rank lies
between them."""
LEVELS = 5
"""Of each side of a rank that has several, at first."""

Shape = tuple[LayerSpec, Ints]
"""What a layer's time depends on: its spec and the size of its input."""


def measured_ranks(lowering: Lowering, shape: Shape, step: int, multiple: int) -> list[Rank]:
    """The ranks that are measured; `multiple` is what every rank that is asked for is a multiple of."""
    spec, in_size = shape
    full = sides(lowering.full_rank(spec))
    if len(full) > 1:
        return [
            rank
            for fine in _kinds(multiple)
            for rank in product(*(_levels(most, step, multiple, fine) for most in full))
        ]
    most = max(max(sides(lowering.break_even_rank(spec, cost, in_size))) for cost in ("macs", "params"))
    if not most:
        return []
    between = [start + FINE for start in range(0, most, step)] if multiple % step else []
    odd = [multiple, *_amid(step, most)] if multiple % FINE else []
    return sorted({*_multiples(step, most), *(rank for rank in between + odd if rank < most)})


def _kinds(multiple: int) -> tuple[bool, ...]:
    """Which kinds of ranks are multiples of `multiple`: True for multiples of `FINE`, False for others."""
    return (True, False) if multiple % FINE else (True,)


def _is_fine(rank: Rank) -> bool:
    return all(side % FINE == 0 for side in sides(rank))


def amid_steep(times: Mapping[Rank, float], steep: float, multiple: int, step: int) -> list[Rank]:
    """Ranks to be measured next: between measured ones of one kind whose times differ by more than `steep` for every side.

    Args:
        times: those that are known, of one format.
        multiple: what every rank that is asked for is a multiple of.
        step: of the device; ranks of several sides are not told apart below half of it.
    """
    found: set[Rank] = set()
    for fine in _kinds(multiple):
        known = {rank: time for rank, time in times.items() if _is_fine(rank) is fine}
        if known and isinstance(next(iter(known)), int):
            for low, high in pairwise(sorted(known, key=sides)):
                if abs(known[high] - known[low]) > steep and (
                    rank := _between(sides(low), sides(high), multiple, fine)
                ):
                    found.add(rank[0])
        else:
            found |= _amid_simplices(known, steep, multiple, fine, step // 2)
    return sorted(found - times.keys(), key=sides)


def _between(low: Ints, high: Ints, multiple: int, fine: bool) -> Ints | None:
    """The middle of two ranks, each side of the kind and strictly between, or where they share it; None where there is none."""
    middle = []
    for first, last in zip(low, high, strict=True):
        inside = (
            [r for r in range(first + 1, last) if r % multiple == 0 and (r % FINE == 0) is fine]
            if first < last
            else [first]
        )
        if not inside:
            return None
        middle.append(inside[len(inside) // 2])
    return tuple(middle)


def _amid_simplices(known: Mapping[Rank, float], steep: float, multiple: int, fine: bool, width: int) -> set[Rank]:
    """Amid Delaunay's simplices of measured ranks those with several sides; a simplex as narrow as `width` is left as it is."""
    ranks, times = np.array([sides(rank) for rank in known]), np.array(list(known.values()))
    used = np.ptp(ranks, axis=0) > 0 if len(ranks) else np.zeros(0, bool)
    if used.sum() < 2:
        return set()
    found: set[Rank] = set()
    for simplex in Delaunay(ranks[:, used] / ranks[:, used].max(0)).simplices:
        low, high = ranks[simplex].min(0), ranks[simplex].max(0)
        if np.ptp(times[simplex]) > steep * used.sum() and (high - low).max() > width:
            rank = _between(tuple(low.tolist()), tuple(high.tolist()), multiple, fine)
            found |= {rank} if rank is not None else set()
    return found


def _levels(most: int, step: int, multiple: int, fine: bool) -> Ints:
    """The first values of one side of a rank that has several, up to `most`, rising: multiples of `FINE`, or others."""
    if not fine:
        return _spread(_others(step, most))
    least = {FINE} if multiple < step // 2 and most > FINE else set()
    return _spread(tuple(sorted({*_multiples(step, most), *least})))


def _amid(step: int, most: int) -> list[int]:
    """Amid every step below `most` a rank that is no multiple of `FINE`."""
    return [rank for start in range(0, most, step) if (rank := start + step // 2 + 1) < most]


def _others(step: int, most: int) -> Ints:
    """From 1 on, no multiples of `FINE`, where `most` leaves any: the last one is next to it, or `most` itself."""
    return tuple(sorted({1, *_amid(step, most), most - 1 if most % FINE == 0 else most}))


def _multiples(step: int, most: int) -> Ints:
    """Half a step, its multiples below `most`, and `most`."""
    return tuple(sorted({min(step // 2, most), *range(step, most, step), most}))


def _spread(values: Ints) -> Ints:
    """`LEVELS` of them in about equal ratios, the first and the last among them."""
    wanted = np.geomspace(values[0], values[-1], LEVELS)
    return tuple(sorted({min(values, key=lambda value: abs(value - target)) for target in wanted}))


class LatencyTable:
    """Times of one setting; `files` are read, the first one's times before the others', and all written by `save`. A file that cannot be
    read is made anew. `key`, under which they stand there, is the stopwatch's own but for times that were taken elsewhere.
    """

    def __init__(self, stopwatch: Stopwatch, files: Sequence[Path] = (), key: str | None = None) -> None:
        self.stopwatch, self.files, self.key = stopwatch, tuple(files), key or stopwatch.key
        self._layers: dict[str, dict[str, dict[Rank, float]]] = {}
        self._nets: dict[str, dict[str, float]] = {}
        self._step: int | None = None
        self.added = 0
        for file in reversed(self.files):
            self._take(_read(file).get(self.key, {}))

    @property
    def step(self) -> int:
        """The width of the steps in which time climbs with a rank."""
        if self._step is None:
            self._step, self.added = self.stopwatch.step(), self.added + 1
        return self._step

    # Layers ----------------------------------------------------------------------------------------------------------

    def measure(self, wanted: Iterable[tuple[Layer, Sequence[str], int]], log: Callable[[str], None]) -> None:
        """Times every layer under the ranks of its lowerings (names, rank multiple) that are not known yet; layers of one shape once."""
        asked: dict[Shape, dict[tuple[str, int], None]] = {}
        for layer, lowerings, multiple in wanted:
            for shape in _shapes(layer):
                asked.setdefault(shape, {}).update(dict.fromkeys((name, multiple) for name in lowerings))
        missing = {shape: found for shape, kinds in asked.items() if (found := self._missing(shape, kinds))}
        if not missing:
            return
        count = sum(map(len, missing.values()))
        log(
            f"latency table: timing {count} forms of {len(missing)} layer shapes, and more where time is steep ({self.key})"
        )
        for number, shape in enumerate(missing, start=1):
            while found := self._missing(shape, asked[shape]):
                self._fill(shape, found)
            log(f"latency table: {number} of {len(missing)} layer shapes")

    def _missing(self, shape: Shape, kinds: Iterable[tuple[str, int]]) -> list[LayerPlan]:
        """What is to be timed next of a shape, by lowering and rank multiple: what is always timed, then what lies where time is steep."""
        found: dict[LayerPlan, None] = {}
        for name, multiple in kinds:
            known = self._layers.get(_text(shape), {}).get(name, {})
            ranks = [rank for rank in self._measured(shape, name, multiple) if rank not in known]
            if not ranks and known:
                ranks = amid_steep(known, STEEP * self._layers[_text(shape)][DENSE.lowering][0], multiple, self.step)
            found |= dict.fromkeys(LayerPlan(name, rank) for rank in ranks)
        return list(found)

    def _measured(self, shape: Shape, name: str, multiple: int) -> list[Rank]:
        return measured_ranks(lowering_named(name), shape, self.step, multiple)

    def _fill(self, shape: Shape, choices: Sequence[LayerPlan]) -> None:
        times = self.stopwatch.layers_ms(*shape, [DENSE, *choices])
        known = self._layers.setdefault(_text(shape), {})
        before = known.get(DENSE.lowering, {}).get(
            0, times[0]
        )  # what was timed earlier is compared with its own dense time
        known.setdefault(DENSE.lowering, {})[0] = before
        for choice, time in zip(choices, times[1:], strict=True):
            known.setdefault(choice.lowering, {})[choice.rank] = time * before / times[0]
        self.added += len(choices)

    def dense_ms(self, layer: Layer) -> float:
        """Time of the layer as it is, all its uses."""
        return sum(self._layers[_text(shape)][DENSE.lowering][0] for shape in _shapes(layer))

    def times_ms(self, layer: Layer, name: str, ranks: Sequence[Rank]) -> np.ndarray:
        """[n ranks]: time of the layer under a lowering, all its uses; KeyError where it was not measured."""
        total = np.zeros(len(ranks))
        for shape in _shapes(layer):
            total += _interpolated(self._layers[_text(shape)][name], ranks)
        return total

    def faster_below(self, layer: Layer, name: str) -> Rank | None:
        """The largest measured rank at which the lowering is faster than the dense layer; None where it is at none.

        Of a format with several ranks, of those the one with the largest product.
        """
        ranks = sorted(self._layers[_text(_shapes(layer)[0])].get(name, {}), key=sides)
        if not ranks:
            return None
        faster = [
            r for r, ms in zip(ranks, self.times_ms(layer, name, ranks), strict=True) if ms < self.dense_ms(layer)
        ]
        return max(faster, key=lambda rank: np.prod(sides(rank)), default=None)

    # Nets and files --------------------------------------------------------------------------------------------------

    @property
    def nets(self) -> dict[str, dict[str, float]]:
        """Net -> what was measured of it as a whole; see `allocate.latency`."""
        return self._nets

    def save(self) -> None:
        """Writes what was added to every one of its files that can be written; other settings' times in there stay."""
        for file in self.files if self.added else ():
            with contextlib.suppress(OSError):  # a folder that cannot be written: it is measured again next time
                self.save_to(file)
        self.added = 0

    def save_to(self, file: Path) -> None:
        """Writes it to one file; other settings' times in there stay.

        Raises:
            OSError: it cannot be written.
        """
        layers = {
            shape: {name: {_rank_text(rank): ms for rank, ms in times.items()} for name, times in lowerings.items()}
            for shape, lowerings in self._layers.items()
        }
        entry = {"setting": asdict(self.stopwatch.setting), "step": self._step, "layers": layers, "nets": self._nets}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"format": FORMAT, "tables": _read(file) | {self.key: entry}}))

    def _take(self, entry: dict[str, Any]) -> None:
        self._step = entry.get("step", self._step)
        self._nets |= entry.get("nets", {})
        for shape, lowerings in entry.get("layers", {}).items():
            for name, times in lowerings.items():
                known = self._layers.setdefault(shape, {}).setdefault(name, {})
                known |= {_rank_of(text): float(ms) for text, ms in times.items()}


def _shapes(layer: Layer) -> list[Shape]:
    return [(layer.spec, size) for size in layer.in_sizes]


def _text(shape: Shape) -> str:
    spec, in_size = shape
    return f"{spec} on {in_size}"


def _rank_text(rank: Rank) -> str:
    return ",".join(map(str, sides(rank)))


def _rank_of(text: str) -> Rank:
    numbers = tuple(map(int, text.split(",")))
    return numbers[0] if len(numbers) == 1 else numbers


def _interpolated(times: Mapping[Rank, float], ranks: Sequence[Rank]) -> np.ndarray:
    """[n ranks]: measured ones as they are, others among the measured ones of their kind or, where there are none, among all."""
    found = np.array([times.get(rank, np.nan) for rank in ranks])
    for fine in (True, False):
        wanted = [i for i, rank in enumerate(ranks) if np.isnan(found[i]) and _is_fine(rank) is fine]
        if wanted:
            known = {rank: time for rank, time in times.items() if _is_fine(rank) is fine} or times
            at = np.array([sides(ranks[i]) for i in wanted], float)
            found[wanted] = _linear(np.array([sides(r) for r in known], float), np.array(list(known.values())), at)
    return found


def _linear(known: np.ndarray, times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[m]: times [n] at ranks [n, sides], linear between them, at others [m, sides]; beyond them as at the end of their box."""
    used = np.ptp(known, axis=0) > 0
    at, known = np.clip(at, known.min(0), known.max(0))[:, used], known[:, used]
    if used.sum() < 2:
        order = np.argsort(known[:, 0]) if used.any() else np.zeros(1, int)
        return np.interp(at[:, 0], known[order, 0], times[order]) if used.any() else np.full(len(at), times[0])
    scale = known.max(0)
    found = LinearNDInterpolator(known / scale, times)(at / scale)
    edge = np.isnan(found)  # rounded off the rim
    found[edge] = NearestNDInterpolator(known / scale, times)(at[edge] / scale)
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        return dict(content["tables"]) if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
