"""Layer rules: which layers may be lowered, and how, by name patterns (`layer1.*`, as in the shell)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ranksearch.compress import Layer, Net
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import sides


@dataclass(frozen=True)
class LayerRule:
    """What holds for the layers whose name matches: only these lowerings, at least this rank; None leaves it as it was."""

    match: str
    lowerings: tuple[str, ...] | None = None
    min_rank: int | None = None


@dataclass(frozen=True)
class LayerRules:
    """Layers that match `include` and not `exclude` are lowered; of several matching rules a later one overrides."""

    lowerings: tuple[str, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rules: tuple[LayerRule, ...] = ()

    def for_layer(self, name: str) -> LayerRule:
        """The rule of one layer; no lowerings for a layer that stays dense."""
        if not _matches(name, self.include) or _matches(name, self.exclude):
            return LayerRule(name, (), 1)
        lowerings, min_rank = self.lowerings, 1
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                lowerings = lowerings if rule.lowerings is None else rule.lowerings
                min_rank = min_rank if rule.min_rank is None else rule.min_rank
        return LayerRule(name, lowerings, min_rank)

    def check(self, net: Net) -> None:
        """Raises UsageError for a pattern that matches no layer, or a lowering that no matching layer supports."""
        names = [layer.name for layer in net.layers] + [name for name, _ in net.skipped]
        keyed = [("layers.include", self.include), ("layers.exclude", self.exclude)]
        keyed += [(f"layers.rules.{i}.match", (rule.match,)) for i, rule in enumerate(self.rules)]
        for key, patterns in keyed:
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise UsageError(f"{key}: {pattern!r} matches no layer. {nearest(pattern, names)}")
        for i, rule in enumerate(self.rules):
            layers = [layer for layer in net.layers if fnmatchcase(layer.name, rule.match)]
            largest = max(map(self._largest_useful_rank, layers), default=0)
            if rule.min_rank is not None and layers and rule.min_rank > largest:
                raise UsageError(
                    f"layers.rules.{i}.min_rank: {rule.min_rank} leaves nothing to choose: the largest rank of {rule.match!r} that "
                    f"costs less than dense is {largest}; use exclude for layers that shall stay dense."
                )
            for lowering in map(lowering_named, rule.lowerings or ()):
                if not any(lowering.supports(layer.spec) for layer in layers):
                    why = f" {lowering.refusal(layers[0].spec)}" if layers else ""
                    raise UsageError(f"layers.rules.{i}: {lowering.name} takes no layer of {rule.match!r}.{why}")

    def _largest_useful_rank(self, layer: Layer) -> int:
        """The largest rank of any allowed lowering that costs less than dense in MACs or params."""
        allowed = [lowering_named(name) for name in self.for_layer(layer.name).lowerings or ()]
        ranks = [
            max(sides(lowering.break_even_rank(layer.spec, cost, layer.in_sizes[0])))
            for lowering in allowed
            if lowering.supports(layer.spec)
            for cost in ("macs", "params")
        ]
        return max(ranks, default=0)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
