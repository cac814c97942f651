"""`LatencyTable`: measured times of layers under their lowerings and ranks, kept on disk and asked for any rank.

Ranks are measured at every multiple of the device's step up to the largest rank that saves MACs or params, at half a step, and at that
largest rank itself. Where other ranks may be chosen, two more are measured in each step: one just above its beginning and one in its
middle, which is no multiple of 4; and the smallest rank of all. ONNX Runtime takes the whole step's time for multiples of 4 and up to a
quarter more for others; PyTorch climbs evenly, except for cliffs where it changes to another kernel (for one image where the input exceeds
20,480 values). So time is interpolated among multiples of 4, and among the others, and where it changes much from one measured rank to the
next, ranks between them are measured until it does not. A format with several ranks has a coarse grid of them: one of multiples of the
step, and one of others where those may be chosen.
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

from ranksearch.deploy.stopwatch import Stopwatch, TimedShape
from ranksearch.lowering import Lowering, Rank, lowering_named
from ranksearch.lowering.contract import sides
from ranksearch.lowering.spec import Ints
from ranksearch.model.plan import DENSE, LayerPlan
from ranksearch.model.trace import Layer
from ranksearch.places.files import write_atomically

FORMAT = 3
"""It is counted up when a time comes to mean something else, so that older files are no longer used."""
FINE = 4
"""Multiples of this are as fast as a whole step in a runtime that computes in blocks; others are slower there."""
STEEP = 0.1
"""Times of neighbouring measured ranks differ by at most this share of the dense layer's time, unless no rank lies between them."""
LEVELS = 5
"""How many values of each side are measured where a rank has several."""


def measured_ranks(lowering: Lowering, shape: TimedShape, step: int, multiple: int) -> list[Rank]:
    """The ranks that are measured, where every rank that is asked for is a multiple of `multiple`."""
    spec, in_size = shape
    full = sides(lowering.full_rank(spec))
    if len(full) > 1:
        kinds = [grid(full, step, fine) for fine in ((True, False) if multiple % FINE else (True,))]
        return [rank for kind in kinds for rank in product(*kind)]
    most = max(max(sides(lowering.break_even_rank(spec, cost, in_size))) for cost in ("macs", "params"))
    if not most:
        return []
    between = [start + FINE for start in range(0, most, step)] if multiple % step else []
    odd = [multiple, *_amid(step, most)] if multiple % FINE else []
    return sorted({*_multiples(step, most), *(rank for rank in between + odd if rank < most)})


def amid_steep(times: Mapping[Rank, float], steep: float, multiple: int) -> list[Rank]:
    """Returns the ranks to measure next: those half-way between neighbouring measured ranks whose times differ by more than `steep`.

    Multiples of `FINE` and other ranks run different kernels, so that neighbours are looked for within each kind.

    Args:
        times: what was measured so far, rank -> time; for a format with several ranks nothing is returned.
        multiple: a number that every rank must be a multiple of.
    """
    found: list[Rank] = []
    for fine in (True, False):
        kind = sorted(rank for rank in times if isinstance(rank, int) and (rank % FINE == 0) is fine)
        for low, high in pairwise(kind):
            between = [rank for rank in range(low + 1, high) if rank % multiple == 0 and (rank % FINE == 0) is fine]
            if between and abs(times[high] - times[low]) > steep:
                found.append(between[len(between) // 2])
    return found


def grid(full: Ints, step: int, fine: bool) -> tuple[Ints, ...]:
    """Per side of a rank that has several, up to `full`, the values that are measured, rising: multiples of the step, or others."""
    return tuple(_spread(_multiples(step, most) if fine else _others(step, most)) for most in full)


def _amid(step: int, most: int) -> list[int]:
    """One rank in the middle of every step below `most`; none is a multiple of `FINE`."""
    return [rank for start in range(0, most, step) if (rank := start + step // 2 + 1) < most]


def _others(step: int, most: int) -> Ints:
    """Ranks that are no multiples of `FINE`: 1, one in every step, and the last one below `most`, or `most` itself."""
    return tuple(sorted({1, *_amid(step, most), most - 1 if most % FINE == 0 else most}))


def _multiples(step: int, most: int) -> Ints:
    """Half a step, its multiples below `most`, and `most`."""
    return tuple(sorted({min(step // 2, most), *range(step, most, step), most}))


def _spread(values: Ints) -> Ints:
    """`LEVELS` of them in about equal ratios, the first and the last among them."""
    wanted = np.geomspace(values[0], values[-1], LEVELS)
    return tuple(sorted({min(values, key=lambda value: abs(value - target)) for target in wanted}))


class LatencyTable:
    """Times of one setting, read from `files`, of which earlier ones go first, and written to all of them by `save`. A file that cannot
    be read is made anew. `key` names the setting in the files; it is the stopwatch's own, except for times that were taken elsewhere.
    """

    def __init__(self, stopwatch: Stopwatch, files: Sequence[Path] = (), key: str | None = None) -> None:
        self.stopwatch, self.files, self.key = stopwatch, tuple(files), key or stopwatch.key
        self._layers: dict[str, dict[str, dict[Rank, float]]] = {}
        self._nets: dict[str, dict[str, Any]] = {}
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
        asked: dict[TimedShape, dict[tuple[str, int], None]] = {}
        for layer, lowerings, multiple in wanted:
            for shape in shapes_of(layer):
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

    def _missing(self, shape: TimedShape, kinds: Iterable[tuple[str, int]]) -> list[LayerPlan]:
        """What to time next for a shape, by lowering and rank multiple: what is always timed, then ranks where time is steep."""
        found: dict[LayerPlan, None] = {}
        for name, multiple in kinds:
            known = self._layers.get(_text(shape), {}).get(name, {})
            ranks = [rank for rank in self._measured(shape, name, multiple) if rank not in known]
            if not ranks and known:
                ranks = amid_steep(known, STEEP * self._layers[_text(shape)][DENSE.lowering][0], multiple)
            found |= dict.fromkeys(LayerPlan(name, rank) for rank in ranks)
        return list(found)

    def _measured(self, shape: TimedShape, name: str, multiple: int) -> list[Rank]:
        return measured_ranks(lowering_named(name), shape, self.step, multiple)

    def _fill(self, shape: TimedShape, choices: Sequence[LayerPlan]) -> None:
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
        return sum(self._layers[_text(shape)][DENSE.lowering][0] for shape in shapes_of(layer))

    def times_ms(self, layer: Layer, name: str, ranks: Sequence[Rank]) -> np.ndarray:
        """[n ranks]: time of the layer under a lowering, all its uses; KeyError where it was not measured."""
        total = np.zeros(len(ranks))
        for shape in shapes_of(layer):
            times = self._layers[_text(shape)][name]
            if isinstance(next(iter(times)), int):
                total += _interpolated(times, ranks)
                continue
            total += self._on_grids(sides(lowering_named(name).full_rank(shape[0])), times, ranks)
        return total

    def _on_grids(self, full: Ints, times: Mapping[Rank, float], ranks: Sequence[Rank]) -> list[float]:
        """[n ranks] of several sides: multiples of `FINE` on the grid of steps, the others on their own, where that was measured."""
        known = {}
        for fine in (True, False):
            values = grid(full, self.step, fine)
            cells = list(product(*values))
            if all(rank in times for rank in cells):
                known[fine] = values, np.array([times[rank] for rank in cells]).reshape([len(v) for v in values])
        found = []
        for rank in map(sides, ranks):
            fine = False not in known or all(side % FINE == 0 for side in rank)
            values, table = known[fine]
            found.append(_between(values, table, self._stepped(values, rank) if fine else rank))
        return found

    def _stepped(self, values: tuple[Ints, ...], rank: Ints) -> Ints:
        """Each side at the upper end of its step."""
        half = self.step // 2
        ends = (half if side <= half else -(-side // self.step) * self.step for side in rank)
        return tuple(min(end, known[-1]) for end, known in zip(ends, values, strict=True))

    def faster_below(self, layer: Layer, name: str) -> Rank | None:
        """The largest measured rank at which the lowering is faster than the dense layer; None where there is none.

        For a format with several ranks it is the one with the largest product.
        """
        ranks = sorted(self._layers[_text(shapes_of(layer)[0])].get(name, {}), key=sides)
        if not ranks:
            return None
        faster = [
            r for r, ms in zip(ranks, self.times_ms(layer, name, ranks), strict=True) if ms < self.dense_ms(layer)
        ]
        return max(faster, key=lambda rank: np.prod(sides(rank)), default=None)

    # Nets and files --------------------------------------------------------------------------------------------------

    @property
    def nets(self) -> dict[str, dict[str, Any]]:
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


def shapes_of(layer: Layer) -> list[TimedShape]:
    """One per use of the layer."""
    return [(layer.spec, size) for size in layer.sizes_per_sample()]


def _text(shape: TimedShape) -> str:
    spec, in_size = shape
    return f"{spec} on {in_size}"


def _rank_text(rank: Rank) -> str:
    return ",".join(map(str, sides(rank)))


def _rank_of(text: str) -> Rank:
    numbers = tuple(map(int, text.split(",")))
    return numbers[0] if len(numbers) == 1 else numbers


def _interpolated(times: Mapping[Rank, float], ranks: Sequence[Rank]) -> np.ndarray:
    """[n ranks]: measured ones as they are, others among the measured multiples of `FINE` or, where they are none, among the others."""
    known = sorted((rank, time) for rank, time in times.items() if isinstance(rank, int))
    kinds = [[pair for pair in known if (pair[0] % FINE == 0) is fine] or known for fine in (False, True)]
    found = []
    for rank in ranks:
        assert isinstance(rank, int)
        at, values = zip(*kinds[rank % FINE == 0], strict=True)
        found.append(times[rank] if rank in times else float(np.interp(rank, at, values)))
    return np.array(found)


def _between(values: tuple[Ints, ...], table: np.ndarray, at: Ints) -> float:
    """`table` [values of side 1, values of side 2, ...] at a point, linear between its own."""
    for known, where in zip(values, at, strict=True):
        low = min(max(int(np.searchsorted(known, where)) - 1, 0), max(len(known) - 2, 0))
        high = min(low + 1, len(known) - 1)
        share = 0.0 if high == low else np.clip((where - known[low]) / (known[high] - known[low]), 0, 1)
        table = (1 - share) * table[low] + share * table[high]
    return float(table)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        return dict(content["tables"]) if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
