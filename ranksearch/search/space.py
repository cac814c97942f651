"""The search-space file: its schema, its defaults (stated here and nowhere else), and errors that name the place in the file.

A value marked searchable is either fixed (`lr: 0.05`) or a distribution: `{low: 0.01, high: 0.1, log: true}` or
`{choices: [10, 20, 50]}`; `default` is what the first points use (the middle where it is left out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ranksearch.allocate.budget import Budget, parse_budget
from ranksearch.allocate.curves import MEASURES
from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import LOWERINGS


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
    """Reads a mapping as the form it plainly is, so that an error speaks of that form alone."""
    if isinstance(value, Mapping):
        return Choices.model_validate(value) if "choices" in value else Range.model_validate(value)
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
    bn_batches: int = Field(default=10, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    projection: ProjectionSpace = ProjectionSpace()
    distillation: DistillationSpace = DistillationSpace()


class LayerRuleSpace(Strict):
    match: str
    lowerings: list[str] | None = None
    min_rank: int = Field(default=1, ge=1)


class LayersSpace(Strict):
    """Which layers may be lowered, and how. Patterns match names as the shell matches files (`layer1.*`)."""

    include: list[str] = ["*"]
    exclude: list[str] = []
    lowerings: list[str] = Field(default_factory=lambda: [name for name in LOWERINGS if name != "dense"], min_length=1)
    rules: list[LayerRuleSpace] = []

    @field_validator("lowerings")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in LOWERINGS:
                raise ValueError(f"there is no lowering {name!r}. {nearest(name, LOWERINGS)}")
        return names

    @field_validator("rules")
    @classmethod
    def _known_in_rules(cls, rules: list[LayerRuleSpace]) -> list[LayerRuleSpace]:
        for rule in rules:
            cls._known(rule.lowerings or [])
        return rules

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
    weight_range: float = Field(default=4.0, ge=1)
    """A group's predicted damage is corrected by a factor between 1 / this and this."""
    search_lowerings: bool = True
    """Whether a group may be confined to a single lowering."""
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


def _fields_at(path: Sequence[Any]) -> list[str]:
    """Field names of the schema's model that holds the key at `path`."""
    model: Any = Space
    for key in path[:-1]:
        if isinstance(key, int):
            continue
        annotation = model.model_fields[key].annotation if key in getattr(model, "model_fields", {}) else None
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = annotation if isinstance(annotation, type) else (args[0] if args else None)
    return list(getattr(model, "model_fields", {}))


def _sentence(error: Mapping[str, Any]) -> str:
    path = [
        part for part in error["loc"] if not (isinstance(part, str) and ("[" in part or part in ("Range", "Choices")))
    ]
    where = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such key. {nearest(str(path[-1]), _fields_at(path))}"
    if error["type"] == "missing":
        return f"{where}: this key is missing."
    if error["type"] == "literal_error":
        expected = [word.strip("' ") for word in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{where}: {error['input']!r} is not possible. {nearest(str(error['input']), expected)}"
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: {error['input']!r} may hold letters, digits, '.', '_' and '-' alone, the first a letter or digit."
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    where = where or "space"
    return f"{where}: {message[0].lower() + message[1:]}{given}"


def parse_space(data: Any, source: str) -> Space:
    """Validates the content of a space.

    Raises:
        UsageError: one sentence per mistake, each with its place in the file and the nearest valid name.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{source}: a search space is a mapping of keys, got {type(data).__name__}.")
    try:
        return Space.model_validate(data)
    except ValidationError as error:
        sentences = list(dict.fromkeys(_sentence(e) for e in error.errors()))
        raise UsageError("\n".join(f"{source}: {sentence}" for sentence in sentences)) from None


def _set(data: dict[str, Any], assignment: str) -> None:
    key, sign, text = assignment.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {assignment}: expected key=value, such as recipe.steps=200.")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UsageError(f"--set {assignment}: {parent!r} is a value, not a group of keys.")
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {assignment}: {text!r} is no YAML value.") from error


def read_space(
    path: str | Path,
    *,
    budgets: Sequence[str] = (),
    settings: Sequence[str] = (),
    trials: int | None = None,
    name: str | None = None,
) -> Space:
    """Reads a space file and lays the command line's values over it: `budgets` and `settings` are "key=value".

    A budget given here replaces the file's budget on the same cost (macs and flops are one cost); others stay.

    Raises:
        UsageError: no such file, no YAML, or a value that the schema refuses.
    """
    path = Path(path)
    if not path.is_file():
        known = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise UsageError(f"There is no search space {str(path)!r}. {nearest(str(path), known)}")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a search space is a mapping of keys, got {type(data).__name__}.")
    for assignment in settings:
        _set(data, assignment)
    for assignment in budgets:
        cost, sign, text = assignment.partition("=")
        if not sign:
            raise UsageError(f"--budget {assignment}: expected cost=limit, such as flops=50% or size=1MiB.")
        same = {"flops", "macs"} if cost in ("flops", "macs") else {cost}
        kept = {key: value for key, value in (data.get("budgets") or {}).items() if key not in same}
        data["budgets"] = {**kept, cost: text}
    if trials is not None:
        _set(data, f"search.trials={trials}")
    if name is not None:
        data["name"] = name
    return parse_space(data, str(path))
