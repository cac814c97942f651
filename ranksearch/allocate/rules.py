"""Layer rules: which layers may be lowered, and how, by name patterns (`layer1.*`, as in the shell)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ranksearch.compress import Net
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import lowering_named


@dataclass(frozen=True)
class LayerRule:
    """What holds for the layers whose name matches: only these lowerings, or at least this rank."""

    match: str
    lowerings: tuple[str, ...] | None = None
    min_rank: int = 1


@dataclass(frozen=True)
class LayerRules:
    """Layers that match `include` and not `exclude` are lowered; the last matching rule decides how."""

    lowerings: tuple[str, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rules: tuple[LayerRule, ...] = ()

    def for_layer(self, name: str) -> LayerRule:
        """The rule of one layer; no lowerings for a layer that stays dense."""
        if not _matches(name, self.include) or _matches(name, self.exclude):
            return LayerRule(name, ())
        lowerings, min_rank = self.lowerings, 1
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                lowerings, min_rank = rule.lowerings if rule.lowerings is not None else lowerings, rule.min_rank
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
            for lowering in map(lowering_named, rule.lowerings or ()):
                if not any(lowering.supports(layer.spec) for layer in layers):
                    why = f" {lowering.refusal(layers[0].spec)}" if layers else ""
                    raise UsageError(f"layers.rules.{i}: {lowering.name} takes no layer of {rule.match!r}.{why}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
