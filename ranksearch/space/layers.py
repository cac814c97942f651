"""The part of a search space that says which layers may be lowered and how, and how latency is measured."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
)

from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.calibration.weightings import METRICS, WEIGHTS
from ranksearch.deploy.stopwatch import LatencySetting
from ranksearch.lowering import default_lowerings, expand_families
from ranksearch.space.settings import Strict


class LayerRuleSpace(Strict):
    """Settings of the layers whose names match a pattern; what is left out stays as it is for the other layers."""

    match: str
    """Name pattern of layers."""
    lowerings: list[str] | None = None
    """Names of lowerings, or of a family of them, that these layers may take."""
    min_rank: int | None = Field(default=None, ge=1)
    """Smallest rank."""
    rank_multiple: int | None = Field(default=None, ge=1)
    """Every rank is a multiple of this."""
    share_ratio: bool = False
    """These layers take one lowering at one ratio of its largest useful rank."""

    @field_validator("lowerings")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        return None if names is None else list(expand_families(names))


class LayersSpace(Strict):
    """Which layers may be lowered, and how. Patterns match names as the shell matches files (`layer1.*`)."""

    include: list[str] = Field(default=["*"])
    """Name patterns of layers that may be lowered."""
    exclude: list[str] = Field(default=[])
    """Name patterns of layers that stay dense."""
    lowerings: list[str] = Field(default_factory=lambda: list(default_lowerings()), min_length=1)
    """Names of lowerings, or of a family of them (`tiled`, `pivoted`); left out, all but those that have to be asked for (`cp`, square
    tiles); where a form has a pivoted one, only that one, unless latency counts."""
    rank_multiple: int = Field(default=1, ge=1)
    """Every rank is a multiple of this (a rule may say otherwise for its layers): many devices compute in tiles of 8, 16 or more."""
    metric: Literal[*METRICS] = WEIGHTS  # type: ignore[valid-type]
    """How errors of a layer are measured, in rank curves, projections and decompositions alike: by the norm of its weight ("weights") or of
    its outputs on the data ("inputs"), by the loss to second order ("kfac"), or "auto": "inputs" where no BN takes the layer's output."""
    metric_refresh: int = Field(default=10, ge=1)
    """Number of projections after which a trial measures the metric anew."""
    rules: list[LayerRuleSpace] = Field(default=[])
    """Rules for layers by name; where several match a layer, a later one overrides what it names."""

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _texts(cls, names: Any) -> Any:
        """Turns numbers into texts: YAML reads the names of a Sequential's layers as numbers."""
        return [str(name) if type(name) is int else name for name in names] if isinstance(names, list) else names

    @field_validator("lowerings")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        return list(expand_families(names))

    def as_rules(self) -> LayerRules:
        rules = tuple(
            LayerRule(
                rule.match, tuple(rule.lowerings) if rule.lowerings is not None else None, rule.min_rank, rule.rank_multiple,
                rule.share_ratio,
            )
            for rule in self.rules
        )  # fmt: skip
        return LayerRules(
            tuple(self.lowerings), tuple(self.include), tuple(self.exclude), rules, rank_multiple=self.rank_multiple
        )


class LatencySpace(Strict):
    """How latency is measured: if it is a budget or an objective, and for the front's nets at the end of every study."""

    runtime: Literal["eager", "compile", "onnx"] = "eager"
    """PyTorch as it is, torch.compile (whose table takes seconds per layer, lowering and rank), or ONNX Runtime on the CPU."""
    batch: int = Field(default=1, ge=1, le=2**31 - 1)
    """Inputs per call."""
    threads: int = Field(default=1, ge=1, le=2**15 - 1)
    """CPU threads."""

    def as_setting(self) -> LatencySetting:
        return LatencySetting(self.runtime, self.batch, self.threads)
