"""Settings of a search space that are fixed or searched: distributions, and the types that keep values within what is possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from ranksearch.errors import nearest


class Strict(BaseModel):
    """A part of a space: unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Strict):
    """A distribution over low..high, on a logarithmic scale if `log`."""

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


Scalar = bool | float | str


class Choices(Strict):
    """A distribution over listed values."""

    choices: list[Scalar] = Field(min_length=1)
    default: Scalar | None = None

    @model_validator(mode="after")
    def _listed(self) -> Choices:
        if self.default is not None and self.default not in self.choices:
            raise ValueError(f"default {self.default!r} is not one of {self.choices}")
        return self

    @property
    def middle(self) -> Scalar:
        return self.choices[0] if self.default is None else self.default


def _pick_form(value: Any) -> Any:
    """Reads a value in the form that it evidently has, so that an error speaks only of that form."""
    if isinstance(value, Mapping):
        return Choices.model_validate(value) if "choices" in value else Range.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Range | Choices):
        raise ValueError(f"expected a number, {{low, high}} or {{choices}}, got {value!r}")
    return value


def _pick_choice(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Choices.model_validate(value)
    if not isinstance(value, Scalar | Choices | int):
        raise ValueError(f"expected one value or {{choices}}, got {value!r}")
    return value


def values_of(setting: Scalar | Range | Choices) -> tuple[Scalar, ...]:
    """The extreme values that a setting can take."""
    if isinstance(setting, Range):
        return setting.low, setting.high
    return tuple(setting.choices) if isinstance(setting, Choices) else (setting,)


def middle_of(setting: Scalar | Range | Choices) -> Scalar:
    """The default of a setting that is searched, or the value of one that is fixed."""
    return setting.middle if isinstance(setting, Range | Choices) else setting


def numbers_of(setting: Scalar | Range | Choices) -> tuple[float, ...]:
    """The extreme values of a setting that is a number."""
    return tuple(float(value) for value in values_of(setting))


@dataclass(frozen=True)
class Within:
    """The values that a number may have: low..high, only whole ones if `whole`."""

    low: float
    high: float
    whole: bool

    def __call__(self, setting: Any) -> Any:
        for value in values_of(setting):
            if isinstance(value, bool | str):
                raise ValueError(f"expected a number, got {value!r}")
            if not self.low <= value <= self.high:
                raise ValueError(f"{value:g} is outside {self.low:g}..{self.high:g}")
            if self.whole and value != int(value):
                raise ValueError(f"{value:g} is not a whole number")
        return setting


@dataclass(frozen=True)
class OneOf:
    """The values that a choice may have: `names`."""

    names: tuple[Scalar, ...]

    def __call__(self, setting: Any) -> Any:
        for value in values_of(setting):
            if value not in self.names or isinstance(value, bool) is not isinstance(self.names[0], bool):
                raise ValueError(f"{value!r} is not possible. {nearest(str(value), map(str, self.names))}")
        return setting


Number = Annotated[float | Range | Choices, BeforeValidator(_pick_form)]
"""A number that may be fixed or searched; `Annotated[Number, within(low, high)]` says what it may be."""
Choice = Annotated[Scalar | Choices, BeforeValidator(_pick_choice)]
"""One of several values, fixed or searched (`{choices: [...]}`); `Annotated[Choice, one_of(...)]` names them."""


def within(low: float, high: float, *, whole: bool = False) -> AfterValidator:
    """Limits a `Number` to low..high, and to whole numbers if `whole`."""
    return AfterValidator(Within(low, high, whole))


def one_of(*names: Scalar) -> AfterValidator:
    """Limits a `Choice` to `names`."""
    return AfterValidator(OneOf(names))


Switch = Annotated[Choice, one_of(False, True)]
"""On or off, fixed or searched."""


def is_whole(field: FieldInfo) -> bool:
    """Whether a setting takes only whole numbers."""
    return any(isinstance(getattr(mark, "func", None), Within) and mark.func.whole for mark in field.metadata)
