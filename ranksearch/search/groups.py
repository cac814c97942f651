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
REST = "rest"
"""The group of layers that no pattern matches."""


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
    for layer in free:
        groups.setdefault(group_of(layer, grouping), []).append(layer.name)
    return groups


def grouping_of(space: Space) -> Grouping:
    """The space's grouping; left out, by stage, and each layer alone in a `direct` search."""
    default = "stage" if space.search.parametrization == "allocated" else "layer"
    return space.search.groups or default
