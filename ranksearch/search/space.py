"""The schema of a search space and its defaults, stated here and nowhere else. `space_file.py` reads one from a file.

A value marked searchable is either fixed (`lr: 0.05`) or a distribution: `{low: 0.01, high: 0.1, log: true}` or
`{choices: [10, 20, 50]}`; `default` is what the first points use (left out: the middle of a range, the first choice).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from ranksearch.allocate.budget import Budget, parse_budget
from ranksearch.allocate.curves import MEASURES
from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.errors import nearest
from ranksearch.lowering import default_lowerings, expand_families


class Strict(BaseModel):
    """Unknown keys are errors; a read space never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Strict):
    """A distribution over low..high, in logarithms where `log`."""

    low: float
    high: float
    log: bool = False
    default: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0, got {self.low:g}")
        if self.default is not None and not self.low <= self.default <= self.high:
            raise ValueError(f"default {self.default:g} is outside {self.low:g}..{self.high:g}")
        return self

    @property
    def middle(self) -> float:
        if self.default is not None:
            return self.default
        return sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2


class Choices(Strict):
    """A distribution over listed values."""

    choices: list[float] = Field(min_length=1)
    default: float | None = None

    @model_validator(mode="after")
    def _listed(self) -> Choices:
        if self.default is not None and self.default not in self.choices:
            raise ValueError(f"default {self.default:g} is not one of {self.choices}")
        return self

    @property
    def middle(self) -> float:
        return self.choices[0] if self.default is None else self.default


def _pick_form(value: Any) -> Any:
    """Reads a value as the form it plainly is, so that an error speaks of that form alone."""
    if isinstance(value, Mapping):
        return Choices.model_validate(value) if "choices" in value else Range.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Range | Choices):
        raise ValueError(f"expected a number, {{low, high}} or {{choices}}, got {value!r}")
    return value


def values_of(setting: float | Range | Choices) -> tuple[float, ...]:
    """The extreme values that a setting can take."""
    if isinstance(setting, Range):
        return setting.low, setting.high
    return tuple(setting.choices) if isinstance(setting, Choices) else (setting,)


def _within(low: float, high: float, whole: bool):
    def check(setting: Any) -> Any:
        for value in values_of(setting):
            if not low <= value <= high:
                raise ValueError(f"{value:g} is outside {low:g}..{high:g}")
            if whole and value != int(value):
                raise ValueError(f"{value:g} is not a whole number")
        return setting

    return check


def searchable(low: float, high: float, *, whole: bool = False) -> Any:
    """The type of a setting that may be fixed or searched, within low..high."""
    return Annotated[float | Range | Choices, BeforeValidator(_pick_form), AfterValidator(_within(low, high, whole))]


class ProjectionSpace(Strict):
    period: searchable(1, 1_000_000, whole=True) = 20  # type: ignore[valid-type]
    """Optimizer steps between projections. At least ten projections per trial pay; with a long run, thirty or more."""
    energy_transfer: bool = False
    """Scale what a projection keeps of a weight so that its energy stays (LRPET, Guo et al. 2024, arXiv 2204.05566)."""
    bn_rectification: bool = False
    """Choose what a projection keeps by the weight as the BN layer behind it will scale it (LRPET)."""


class DistillationSpace(Strict):
    weight: searchable(0, 1) = 0.0  # type: ignore[valid-type]
    """Share of the loss that comes from the dense net's outputs; 0 does without."""
    temperature: searchable(0.1, 100) = 2.0  # type: ignore[valid-type]


class RecipeSpace(Strict):
    """How a trial trains: dense with projections first, then the factors."""

    steps: int = Field(ge=0)
    batch_size: int = Field(default=128, ge=1)
    lr: searchable(1e-8, 100) = 0.02  # type: ignore[valid-type]
    """Peak of the one-cycle schedule."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    factor_share: searchable(0, 1) = 0.5  # type: ignore[valid-type]
    """Share of the steps that trains the factors after decomposition; 0 is the pure form of Lee et al. 2019."""
    bn_batches: int = Field(default=20, ge=1)
    """Batches, augmented as in training, that BN statistics are re-estimated from."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    projection: ProjectionSpace = ProjectionSpace()
    distillation: DistillationSpace = DistillationSpace()


class LayerRuleSpace(Strict):
    match: str
    lowerings: list[str] | None = None
    min_rank: int | None = Field(default=None, ge=1)

    @field_validator("lowerings")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        return None if names is None else list(expand_families(names))


class LayersSpace(Strict):
    """Which layers may be lowered, and how. Patterns match names as the shell matches files (`layer1.*`)."""

    include: list[str] = ["*"]
    exclude: list[str] = []
    lowerings: list[str] = Field(default_factory=lambda: list(default_lowerings()), min_length=1)
    """Names of lowerings, or of a family of them (`tiled`); left out, all but those that have to be asked for (`cp`, square tiles)."""
    rules: list[LayerRuleSpace] = []

    @field_validator("lowerings")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        return list(expand_families(names))

    def as_rules(self) -> LayerRules:
        rules = tuple(
            LayerRule(rule.match, tuple(rule.lowerings) if rule.lowerings is not None else None, rule.min_rank)
            for rule in self.rules
        )
        return LayerRules(tuple(self.lowerings), tuple(self.include), tuple(self.exclude), rules)


OBJECTIVES = {"accuracy": "maximize", "macs": "minimize", "params": "minimize", "size": "minimize"}


class SearchSpace(Strict):
    """How plans are proposed."""

    trials: int = Field(default=16, ge=1)
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    seed: int = Field(default=0, ge=0)
    objectives: list[Literal["accuracy", "macs", "params", "size"]] = ["accuracy", "macs"]
    front_from: float = Field(default=0.4, gt=0, le=1)
    """The front is searched from this share of the budgets up to the budgets themselves."""
    groups: Literal["stage", "layer", "all"] = "stage"
    """Layers that share a correction: those with the same first name (`layer1`), each layer alone, or all of them."""
    weight_range: float = Field(default=2.0, ge=1, le=1000)
    """A group's predicted damage is corrected by a factor between 1 / this and this."""
    search_lowerings: bool = False
    """Whether a group may be confined to a single lowering. Off: the solver's own choice is hard to better, and fewer numbers are
    searched. ResNet-20 on CIFAR-10, 16 trials without training (1,500 validation images, CPU, seeds 0 and 1): hypervolume .643 and
    .642 without, .642 and .639 with it."""
    measure: str = "log_kept_energy"
    first_points: list[Literal["solver", "uniform", "energy", "minimax"]] = ["solver", "uniform", "energy", "minimax"]
    """Uncorrected plans that open the study, as far as half of the trials allows."""

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if not 1 <= len(names) <= 3 or len(set(names)) != len(names) or "accuracy" not in names:
            raise ValueError(f"expected one to three different objectives, accuracy among them, got {names}")
        return names

    @field_validator("measure")
    @classmethod
    def _measured(cls, name: str) -> str:
        if name not in MEASURES:
            raise ValueError(f"there is no damage measure {name!r}. {nearest(name, MEASURES)}")
        return name


class ResourcesSpace(Strict):
    """What one trial takes of the cluster; as many trials run at once as fit."""

    cpus_per_trial: int = Field(default=1, ge=1)
    gpus_per_trial: float | None = Field(default=None, ge=0)
    """A fraction lets trials share a GPU; left out, a trial takes one GPU where the cluster has any."""

    @field_validator("gpus_per_trial")
    @classmethod
    def _shareable(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"{gpus:g} is neither a fraction of one GPU nor a whole number of them")
        return gpus


class TrackingSpace(Strict):
    uri: str | None = None
    """MLflow store; left out, `MLFLOW_TRACKING_URI`, else a SQLite file beside the studies."""
    experiment: str | None = None
    """MLflow experiment; left out, the study's name."""


class Space(Strict):
    """A search-space file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: str
    model: str
    checkpoint: str = "auto"
    """Dense weights: "auto" (the public checkpoint, else trained once), "train", or a file."""
    data: str | None = None
    """Data folder; left out, `RANKSEARCH_DATA`, else ~/.cache/ranksearch."""
    validation: int = Field(ge=1)
    """Images carved from the training set to choose by."""
    split_seed: int = 0
    budgets: dict[str, str | int | float] = {}
    layers: LayersSpace = Field(default_factory=LayersSpace)
    recipe: RecipeSpace
    search: SearchSpace = Field(default_factory=SearchSpace)
    resources: ResourcesSpace = Field(default_factory=ResourcesSpace)
    tracking: TrackingSpace = Field(default_factory=TrackingSpace)

    @field_validator("budgets")
    @classmethod
    def _readable(cls, budgets: dict[str, Any]) -> dict[str, Any]:
        for cost, text in budgets.items():
            parse_budget(cost, text)
        return budgets

    @model_validator(mode="after")
    def _bounded(self) -> Space:
        if self.search.objectives == ["accuracy"] and not self.budgets:
            raise ValueError("accuracy alone as the objective needs a budget, such as budgets: {flops: 50%}")
        return self

    def parsed_budgets(self) -> list[Budget]:
        return [parse_budget(cost, text) for cost, text in self.budgets.items()]
