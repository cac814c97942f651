"""Layer rules: which layers may be lowered, and how, by name patterns (`layer1.*`, as in the shell)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ranksearch.compress import Layer, Net
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import sides


@dataclass(frozen=True)
class LayerRule:
    """What holds for the layers whose name matches: only these lowerings, at least this rank, ranks in these multiples; None leaves
    it as it was. With `share_ratio` they take one lowering at one ratio of its largest useful rank."""

    match: str
    lowerings: tuple[str, ...] | None = None
    min_rank: int | None = None
    rank_multiple: int | None = None
    share_ratio: bool = False


@dataclass(frozen=True)
class LayerRules:
    """Layers that match `include` and not `exclude` are lowered; where several rules match, a later one overrides."""

    lowerings: tuple[str, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rules: tuple[LayerRule, ...] = ()
    rank_multiple: int = 1
    """Ranks are multiples of this; hardware that computes in tiles wants 8, 16 or more."""

    def for_layer(self, name: str, also: Sequence[str] = ()) -> LayerRule:
        """The rule of one layer; no lowerings for a layer that stays dense. `also` names the layers that share its weight."""
        names = (name, *also)
        if not _any_matches(names, self.include) or _any_matches(names, self.exclude):
            return LayerRule(name, (), 1, 1)
        lowerings, min_rank, multiple = self.lowerings, 1, self.rank_multiple
        for rule in self.rules:
            if any(fnmatchcase(one, rule.match) for one in names):
                lowerings = lowerings if rule.lowerings is None else rule.lowerings
                min_rank = min_rank if rule.min_rank is None else rule.min_rank
                multiple = multiple if rule.rank_multiple is None else rule.rank_multiple
        return LayerRule(name, lowerings, min_rank, multiple)

    def groups_among(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The groups of `names` that share a ratio; where several sharing rules match a layer, the last one takes it."""
        groups: dict[int, list[str]] = {}
        for name in names:
            sharing = [i for i, rule in enumerate(self.rules) if rule.share_ratio and fnmatchcase(name, rule.match)]
            if sharing:
                groups.setdefault(sharing[-1], []).append(name)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def check(self, net: Net) -> None:
        """Raises UsageError for a pattern that matches no layer, or a lowering that no matching layer supports."""
        names = [name for layer in net.layers for name in (layer.name, *layer.shared_with)]
        names += [name for name, _ in net.skipped]
        keyed = [("layers.include", self.include), ("layers.exclude", self.exclude)]
        keyed += [(f"layers.rules.{i}.match", (rule.match,)) for i, rule in enumerate(self.rules)]
        for key, patterns in keyed:
            for pattern in patterns:
                if not any(_matches(name, [pattern]) for name in names):
                    raise UsageError(f"{key}: {pattern!r} matches no layer. {nearest(pattern, names)}")
        for i, rule in enumerate(self.rules):
            layers = [layer for layer in net.layers if _any_matches((layer.name, *layer.shared_with), (rule.match,))]
            largest = max(map(self._largest_useful_rank, layers), default=0)
            if rule.min_rank is not None and layers and rule.min_rank > largest:
                raise UsageError(
                    f"layers.rules.{i}.min_rank: {rule.min_rank} leaves nothing to choose: the largest rank of {rule.match!r} that "
                    f"costs less than dense is {largest}; use exclude for layers that shall stay dense."
                )
            if rule.rank_multiple is not None and layers and rule.rank_multiple > largest:
                raise UsageError(
                    f"layers.rules.{i}.rank_multiple: no multiple of {rule.rank_multiple} costs less than dense for {rule.match!r}; the "
                    f"largest rank that does is {largest}; use exclude for layers that shall stay dense."
                )
            for lowering in map(lowering_named, rule.lowerings or ()):
                if not any(lowering.supports(layer.spec) for layer in layers):
                    why = f" {lowering.refusal(layers[0].spec)}" if layers else ""
                    raise UsageError(f"layers.rules.{i}: {lowering.name} takes no layer of {rule.match!r}.{why}")

    def why_dense(self, layer: Layer) -> str | None:
        """Why no allowed lowering makes the layer cheaper, as a sentence; None where one does."""
        names = (layer.name, *layer.shared_with)
        if not _any_matches(names, self.include):
            return "layers.include does not name it."
        if _any_matches(names, self.exclude):
            return "layers.exclude names it."
        rule = self.for_layer(layer.name, layer.shared_with)
        allowed = [lowering_named(name) for name in rule.lowerings or () if lowering_named(name).has_rank]
        takers = [lowering.name for lowering in allowed if lowering.supports(layer.spec)]
        if not takers:
            alike = replace(layer.spec, lookup=False, tied=False)  # what refuses an embedding for being one says most
            nearest_ones = [lowering for lowering in allowed if lowering.supports(alike)] or allowed
            refusals = list(dict.fromkeys(lowering.refusal(layer.spec) or "" for lowering in nearest_ones))
            return (
                f"no lowering that is allowed here takes it: {refusals[0]}" if refusals else "no lowering is allowed."
            )
        largest, smallest = self._largest_useful_rank(layer), max(rule.min_rank or 1, rule.rank_multiple or 1)
        if largest >= smallest:
            return None
        if largest == 0:
            return f"no rank of {', '.join(takers)} costs less than the dense layer."
        return (
            f"the largest rank that costs less than the dense layer is {largest}; the rules ask for {smallest} or more."
        )

    def _largest_useful_rank(self, layer: Layer) -> int:
        """The largest rank of any allowed lowering that costs less than dense in MACs or params."""
        allowed = [lowering_named(name) for name in self.for_layer(layer.name, layer.shared_with).lowerings or ()]
        ranks = [
            max(sides(lowering.break_even_rank(layer.spec, cost, layer.in_sizes[0])))
            for lowering in allowed
            if lowering.supports(layer.spec)
            for cost in ("macs", "params")
        ]
        return max(ranks, default=0)


def _any_matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(_matches(name, patterns) for name in names)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
