"""What is searched, and how a suggestion becomes a plan and a recipe. The forms of it: `allocated.py` (the default) and `direct.py`.

A form says its parameters as Optuna distributions, up front, so that a sampler need not find them out trial by trial, and makes a
plan of their values. The recipe's searched settings are common to all forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from ranksearch.compress import RankPlan
from ranksearch.space.recipe import RecipeSpace
from ranksearch.space.settings import Choices, Range
from ranksearch.trial.recipe import Recipe, searched

LEVEL = "level"
"""The parameter that says at which share of the budgets a plan is allocated."""
SEARCH = "search"
"""Who chose a plan that no classic rule did."""


class Form(Protocol):
    """A parametrization of plans within a study's budgets."""

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Parameter -> what it may be."""
        ...

    def plan(self, values: Mapping[str, Any]) -> RankPlan:
        """The plan of these parameters.

        Raises:
            UsageError: there is none.
        """
        ...

    def params_of(self, plan: RankPlan) -> dict[str, Any] | None:
        """Parameters that lead to `plan`; None where this form has none that do."""
        ...


@dataclass(frozen=True)
class Opening:
    """A trial that opens a study: its settled parameters, who made its plan, and the plan where the parameters do not say it."""

    params: Mapping[str, Any]
    allocator: str
    plan: RankPlan | None = None

    def attrs(self) -> dict[str, Any]:
        """What the enqueued trial carries, read again by `suggest`."""
        given = {} if self.plan is None else {"given": self.plan.to_dict(), "brings": sorted(self.params)}
        return {"allocator": self.allocator} | given


@dataclass(frozen=True)
class Suggestion:
    """A plan and the recipe to train it by; `allocator` says who made the plan."""

    plan: RankPlan
    recipe: Recipe
    allocator: str


@dataclass(frozen=True)
class Searched:
    """Everything that a study searches: a form's parameters and the recipe's."""

    form: Form
    recipe: RecipeSpace
    distributions: Mapping[str, BaseDistribution] = field(init=False)

    def __post_init__(self) -> None:
        of_recipe = {name: distribution(*setting) for name, setting in searched(self.recipe).items()}
        object.__setattr__(self, "distributions", {**self.form.distributions, **of_recipe})

    def suggest(self, trial: optuna.Trial) -> Suggestion:
        """Draws a suggestion; a trial that was enqueued with a plan takes that one.

        Raises:
            UsageError: the drawn parameters have no plan.
        """
        recipe = Recipe.settled(
            self.recipe, lambda name, setting, whole: draw(trial, name, distribution(setting, whole))
        )
        allocator = trial.user_attrs.get("allocator", SEARCH)
        given, form = trial.user_attrs.get("given"), self.form.distributions
        if given is not None:
            for name in trial.user_attrs.get(
                "brings", ()
            ):  # what leads to the plan, where anything does: the sampler learns from it
                if name in form:
                    draw(trial, name, form[name])
            return Suggestion(RankPlan.from_dict(given), recipe, allocator)
        values = {name: draw(trial, name, found) for name, found in form.items()}
        return Suggestion(self.form.plan(values), recipe, allocator)


def distribution(setting: Range | Choices, whole: bool) -> BaseDistribution:
    """A searched setting as Optuna has it."""
    if isinstance(setting, Choices):
        return CategoricalDistribution(setting.choices)
    if whole:
        return IntDistribution(int(setting.low), int(setting.high), log=setting.log)
    return FloatDistribution(setting.low, setting.high, log=setting.log)


def draw(trial: optuna.Trial, name: str, found: BaseDistribution) -> Any:
    """The trial's value of a parameter: as it was enqueued, else as the sampler says."""
    match found:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, found.choices)
        case IntDistribution():
            return trial.suggest_int(name, found.low, found.high, log=found.log, step=found.step)
        case FloatDistribution():
            return trial.suggest_float(name, found.low, found.high, log=found.log, step=found.step)
    raise TypeError(f"no such distribution: {found}")
