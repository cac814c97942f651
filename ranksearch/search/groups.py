"""Groups of layers that share what is searched: by stage, by shape, each alone, all together, or by name patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ranksearch.allocate import Curves
from ranksearch.compress import Layer
from ranksearch.errors import UsageError, nearest
from ranksearch.space.space import Space

Grouping = str | Mapping[str, Sequence[str]]
"""One of `space.GROUPINGS`, or group -> name patterns; the first group that matches has the layer."""
BLOCKS = "blocks"
REST = "rest"
"""The group of layers that no pattern matches."""


MOST_OF_A_NET, MOST_BLOCKS = 0.7, 8
"""A first name that holds more than this share of the layers is taken apart, into at most so many groups."""


def blocks_of(names: Sequence[str]) -> dict[str, str]:
    """Layer -> its block: its first name, or where one first name holds most of a net, its first names as far as they tell it apart.

    Where more blocks than `MOST_BLOCKS` come of one name, neighbours are taken together (`encoder.0-2`).
    """
    known = {name: name.split(".") for name in names}
    found = {name: parts[0] for name, parts in known.items()}
    while True:
        sizes = {block: sum(other == block for other in found.values()) for block in found.values()}
        large = max(sizes, key=sizes.__getitem__, default="")
        inside = [name for name, block in found.items() if block == large]
        if not inside or (len(inside) <= max(1, MOST_OF_A_NET * len(names)) and len(sizes) > 1):
            return found
        depth = len(large.split(".")) + 1
        finer = {name: ".".join(known[name][:depth]) for name in inside}
        if set(finer.values()) == {large}:
            return found  # nothing finer
        found |= _merged(finer, large)


def _merged(finer: dict[str, str], outer: str) -> dict[str, str]:
    """Layer -> block, neighbours among the blocks of `outer` taken together where there are more than `MOST_BLOCKS`."""
    blocks = list(dict.fromkeys(finer.values()))
    if len(blocks) <= MOST_BLOCKS:
        return finer
    where = {block: number * MOST_BLOCKS // len(blocks) for number, block in enumerate(blocks)}
    runs: dict[int, list[str]] = {}
    for block, number in where.items():
        runs.setdefault(number, []).append(block)
    tails = {n: [block.removeprefix(f"{outer}.") for block in run] for n, run in runs.items()}
    called = {n: f"{outer}.{tail[0]}" + (f"-{tail[-1]}" if len(tail) > 1 else "") for n, tail in tails.items()}
    return {name: called[where[block]] for name, block in finer.items()}


def group_of(layer: Layer, grouping: Grouping) -> str:
    """The group of a layer: its first name for "stage" (`layer1`), its weight's shape for "shape" (`64x64x3x3`), itself for "layer"."""
    if not isinstance(grouping, str):
        found = (name for name, patterns in grouping.items() if any(fnmatchcase(layer.name, p) for p in patterns))
        return next(found, REST)
    if grouping == "stage":
        return layer.name.split(".")[0]
    if grouping == "shape":
        return "x".join(map(str, layer.spec.weight_shape))
    return layer.name if grouping == "layer" else "all"


def groups_of(curves: Curves, grouping: Grouping) -> dict[str, list[str]]:
    """Group -> names of its layers that have something to choose.

    Raises:
        UsageError: a pattern matches no such layer.
    """
    free = [options.layer for options in curves.layers if len(options.choices) > 1]
    if not isinstance(grouping, str):
        names = [layer.name for layer in free]
        for group, patterns in grouping.items():
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise UsageError(
                        f"search.groups.{group}: {pattern!r} matches no layer that may be lowered. {nearest(pattern, names)}"
                    )
    groups: dict[str, list[str]] = {}
    blocks = blocks_of([layer.name for layer in free]) if grouping == BLOCKS else {}
    for layer in free:
        groups.setdefault(blocks.get(layer.name) or group_of(layer, grouping), []).append(layer.name)
    return groups


def grouping_of(space: Space) -> Grouping:
    """The space's grouping; left out, by blocks, and each layer alone in a `direct` search."""
    default = BLOCKS if space.search.parametrization == "allocated" else "layer"
    return space.search.groups or default
