"""`Recipe`: how a trial trains, every value settled. Its fields are those of `RecipeSpace`, where meanings and defaults are stated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel

from ranksearch.compress.factor_steps import PLAIN
from ranksearch.space.recipe import RecipeSpace
from ranksearch.space.settings import Choices, Range, Scalar, is_whole
from ranksearch.tasks.schedule import Updates

Draw = Callable[[str, Range | Choices, bool], Scalar]
"""(dotted name, distribution, whether whole) -> a value"""

BEFORE = {"calibration": "none", "factor_steps": PLAIN}
"""What trials did before there was a key for it: records and studies without it mean that. The schema's defaults are others."""


@dataclass(frozen=True)
class ProjectionRecipe:
    """When the dense weights are projected, at which rank, and how."""

    period: int
    start: float
    until_end: float
    schedule: str
    removed_energy: float
    rank_annealing: float
    momentum: str
    energy_transfer: bool
    bn_rectification: bool


@dataclass(frozen=True)
class DistillationRecipe:
    """How much the loss listens to the dense net."""

    weight: float
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Recipe(Updates):
    """How a trial trains: `steps` optimizer steps, the last `factor_share` of them on the factors."""

    steps: int
    factor_share: float
    factor_lr: float
    bn_batches: int
    precision: str
    projection: ProjectionRecipe
    distillation: DistillationRecipe
    calibration: str = BEFORE["calibration"]
    factor_steps: str = BEFORE["factor_steps"]

    @property
    def dense_steps(self) -> int:
        """Steps before the decomposition."""
        return self.steps - round(self.factor_share * self.steps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def settled(cls, space: RecipeSpace, draw: Draw) -> Recipe:
        """The recipe of a space, each searched setting as `draw` says."""
        return cls.from_dict(_settled(space, draw, ""))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Reads what `to_dict` writes."""
        projection, distillation = ProjectionRecipe(**data["projection"]), DistillationRecipe(**data["distillation"])
        return cls(**{**data, "projection": projection, "distillation": distillation})


def _settled(space: BaseModel, draw: Draw, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in type(space).model_fields.items():
        value = getattr(space, name)
        if isinstance(value, Range | Choices):
            value = draw(prefix + name, value, is_whole(field))
        elif isinstance(value, BaseModel):
            value = _settled(value, draw, f"{prefix}{name}.")
        found[name] = int(value) if is_whole(field) else value
    return found


def middle(name: str, setting: Range | Choices, whole: bool) -> Scalar:
    """A `Draw` of every setting's default."""
    return round(float(setting.middle)) if whole else setting.middle


def fixed(space: RecipeSpace) -> RecipeSpace:
    """The same space with every searched setting at its default."""
    return RecipeSpace(**Recipe.settled(space, middle).to_dict())


def scored_after(recipe: Recipe, fine_tuning: int) -> Recipe:
    """The recipe of a plan that is cut from trained weights: decomposed at once, then `fine_tuning` steps on the factors."""
    return replace(recipe, steps=fine_tuning, factor_share=1.0)


def searched(space: RecipeSpace) -> dict[str, tuple[Range | Choices, bool]]:
    """Dotted name -> (distribution, whether whole) of the settings that are searched."""
    found: dict[str, tuple[Range | Choices, bool]] = {}

    def note(name: str, setting: Range | Choices, whole: bool) -> Scalar:
        found[name] = setting, whole
        return middle(name, setting, whole)

    Recipe.settled(space, note)
    return found


def searched_settings(space: RecipeSpace) -> dict[str, Scalar]:
    """Dotted name -> default of the settings that are searched."""
    return {name: middle(name, *setting) for name, setting in searched(space).items()}


def spread_recipes(space: RecipeSpace, count: int, seed: int) -> list[dict[str, Scalar]]:
    """Up to `count` different values of the searched settings, by dotted name: the defaults, then a Latin hypercube over their ranges.

    Fewer only where the space holds hardly more than it returns: small samples of few choices repeat each other, so larger ones are drawn.

    Reference: McKay, Beckman & Conover 1979 (Latin hypercube sampling).
    """
    from scipy.stats import qmc

    settings, found = searched(space), [searched_settings(space)]
    for size in (count - 1, 16 * count, 256 * count) if settings else ():
        found = found[:1]
        for point in qmc.LatinHypercube(len(settings), seed=seed).random(size):
            drawn = {
                name: at_share(*setting, share) for (name, setting), share in zip(settings.items(), point, strict=True)
            }
            if drawn not in found and len(found) < count:
                found.append(drawn)
        if len(found) == count:
            break
    return found


def at_share(setting: Range | Choices, whole: bool, share: float) -> Scalar:
    """The value below which a `share` (0..1) of a setting's distribution lies."""
    if isinstance(setting, Choices):
        return setting.choices[int(share * len(setting.choices))]
    low, high = setting.low, setting.high
    value = low * (high / low) ** share if setting.log else low + share * (high - low)
    return round(value) if whole else value


def flattened(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a nested mapping's leaves, such as ("projection.period", 20)."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
