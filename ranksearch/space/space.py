"""The schema of a search space and its defaults, stated here and nowhere else; its groups `recipe`, `search`, `storage` and `tracking`
have files of their own (`recipe.py`, `search.py`, ...). `reading.py` reads one from a file.

A value marked searchable is either fixed (`lr: 0.05`) or a distribution: `{low: 0.01, high: 0.1, log: true}` or
`{choices: [10, 20, 50]}`; `default` is what the first points use (left out: the middle of a range, the first choice).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import nn

from ranksearch.allocate.budget import Budget, parse_budget
from ranksearch.calibration.weightings import WEIGHTS
from ranksearch.errors import UsageError
from ranksearch.lowering import default_lowerings
from ranksearch.places.trust import may_run, refuse_file
from ranksearch.space.layers import LatencySpace, LayersSpace
from ranksearch.space.quality import Quality, quality_of
from ranksearch.space.recipe import RecipeSpace
from ranksearch.space.resources import ResourcesSpace
from ranksearch.space.search import SearchSpace
from ranksearch.space.settings import Strict
from ranksearch.space.storage import StorageSpace
from ranksearch.space.tracking import TrackingSpace
from ranksearch.tasks import TASKS, TaskKind, build_reference, is_own, task_kind


class Space(Strict):
    """A search-space file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of the study, and of its folder."""
    task: str
    """The name of a task, or a function of your own that returns a `ranksearch.Task`: FILE.py:FUNCTION, with the file beside the
    space's or in the working directory."""
    model: str | None = Field(default=None, validate_default=True)
    """The net, by a name that the task knows; left out where the task is your own, which brings its model."""
    checkpoint: str = "auto"
    """Dense weights: "auto" (those of your own task's model, the public checkpoint, else trained once), "train", or a file."""
    data: str | None = None
    """Data folder; left out, `RANKSEARCH_DATA`, else ~/.cache/ranksearch."""
    validation: int | None = Field(default=None, ge=1, validate_default=True)
    """Number of training images set aside to choose by; left out if the task brings a validation split of its own."""
    split_seed: int = 0
    """Seed that picks the validation images."""
    budgets: dict[str, str | int | float] = Field(default={})
    """Cost (`flops`, `macs`, `params`, `size`, `latency`) -> upper bound: a share of the dense net's (`50%`) or absolute (`20M`, `1.2MiB`,
    `3.5ms`). Several hold at once."""
    at_least: dict[str, str | int | float] = Field(default={})
    """A lower limit on the metric: `{accuracy: -1}` is one point (or unit of the metric) below the dense net, `{accuracy: -2%}` a share of
    its value, `{accuracy: 90}` the value itself. The search then looks for the cheapest net above it, the front begins there, and so does
    its hypervolume."""
    latency: LatencySpace = LatencySpace()
    layers: LayersSpace = Field(default_factory=LayersSpace)
    recipe: RecipeSpace
    search: SearchSpace = Field(default_factory=SearchSpace)
    resources: ResourcesSpace = Field(default_factory=ResourcesSpace)
    storage: StorageSpace = Field(default_factory=StorageSpace)
    tracking: TrackingSpace = Field(default_factory=TrackingSpace)
    _given: str | None = PrivateAttr(default=None)
    _own: dict[str, str] | None = PrivateAttr(default=None)
    _trusted: bool = PrivateAttr(default=False)
    """Whether the task's file, which lies in a study's folder, may run."""

    @model_validator(mode="after")
    def _fast_forms_too(self) -> Space:
        if self.has_latency and "lowerings" not in self.layers.model_fields_set:
            names = list(default_lowerings(timed=True))
            # a frozen model is still being made here
            self.__dict__["layers"] = self.layers.model_copy(update={"lowerings": names})
        return self

    @field_validator("model", "validation")
    @classmethod
    def _told(cls, value: Any, info: ValidationInfo) -> Any:
        """A task of ours needs both; a user's own brings them."""
        task = str(info.data.get("task"))
        if is_own(task) and value is not None:
            raise ValueError(f"a task of your own brings its {info.field_name}: leave this key out")
        if value is None and task in TASKS and not (info.field_name == "validation" and TASKS[task].splits_itself):
            raise ValueError("this key is missing.")
        return value

    @field_validator("budgets")
    @classmethod
    def _readable(cls, budgets: dict[str, Any]) -> dict[str, Any]:
        for cost, text in budgets.items():
            parse_budget(cost, text)
        return budgets

    @field_validator("at_least")
    @classmethod
    def _limit(cls, limits: dict[str, Any]) -> dict[str, Any]:
        quality_of(limits)
        return limits

    @model_validator(mode="after")
    def _budgeted_cost_is_searched(self) -> Space:
        costs = list(self.budgets)
        if costs and "objectives" not in self.search.model_fields_set and not {"macs", "flops"} & set(costs):
            search = self.search.model_copy(update={"objectives": ["accuracy", costs[0]]})
            # a frozen model is still being made here
            self.__dict__["search"] = search
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Space:
        if self.search.objectives == ["accuracy"] and not self.budgets:
            raise ValueError("accuracy alone as the objective needs a budget, such as budgets: {flops: 50%}")
        return self

    @model_validator(mode="after")
    def _limited(self) -> Space:
        if self.at_least and self.search.objectives == ["accuracy"]:
            raise ValueError(
                "at_least asks for the cheapest net above a limit, but accuracy is the only objective: name a cost too, such as "
                "search.objectives: [accuracy, macs]"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> Space:
        size, workers = self.recipe.batch_size, self.resources.workers
        if size % workers:
            near = max(1, round(size / workers)) * workers
            raise ValueError(
                f"recipe.batch_size {size} cannot be split over the {workers} workers of a trial (resources): the nearest that can "
                f"is {near}"
            )
        return self

    @model_validator(mode="after")
    def _trained_at_all(self) -> Space:
        if self.search.strategy == "nested" and self.recipe.steps < 1:
            raise ValueError("search.strategy nested trains by the recipe: recipe.steps is 0, and at least 1 is needed")
        if self.search.strategy == "nested" and self.layers.metric != WEIGHTS:
            raise ValueError(
                f"search.strategy nested cuts layers in the metric of their weights alone: layers.metric {self.layers.metric} goes with "
                f"strategy separate; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _reached(self) -> Space:
        if self.search.early_stopping is not None:
            rungs, steps = self.search.early_stopping.rungs, self.recipe.steps
            at = [round(rung * steps) for rung in rungs]
            if 0 in at or len(set(at)) < len(at):
                raise ValueError(
                    f"search.early_stopping.rungs {rungs} of {steps} steps are the steps {at}: expected different ones from 1 on"
                )
        return self

    def __eq__(self, other: object) -> bool:
        """Whether the values are the same, wherever they were given."""
        return isinstance(other, Space) and self.model_dump() == other.model_dump()

    @property
    def given(self) -> str | None:
        """The space as it was given: the file's text, after the command line's values as comments; None for one made in Python."""
        return self._given

    def kind(self) -> TaskKind:
        """The task without its data, or a user's own with them.

        Raises:
            UsageError: there is no such task, or the user's file cannot be used, is not the one that the study was made with, or came
                with its folder and is not one that this user runs.
        """
        if self._own is None:
            return task_kind(self.task)
        path = Path(self.task.rpartition(":")[0])
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != self._own["sha256"]:
            raise UsageError(
                f"task: {path} is not the file that the study was made with (its sha256 differs): put that file back, or start "
                f"another study."
            )
        if path.is_file() and not self._trusted and not may_run(path, self._own["origin"]):
            raise refuse_file(path)
        return task_kind(self.task, self._own["origin"])

    def kept_in(self, folder: Path, own: dict[str, str] | None, *, trust: bool) -> Space:
        """Returns the space of a study, whose own task is the copy of its file in the study's folder, as `own` records it.

        Args:
            trust: whether that copy may run whoever wrote it; else it must be one that this user runs anyway (`places/trust.py`).
        """
        if own is None or not is_own(self.task):
            return self
        kept = self.model_copy(update={"task": f"{folder.absolute() / Path(own['file']).name}:{own['function']}"})
        kept._own, kept._trusted = dict(own), trust
        return kept

    def build(self, reference: str) -> nn.Module:
        """The untrained dense model of a plan that was made for this space."""
        return self.kind().build_model("") if is_own(self.task) else build_reference(reference)

    @property
    def has_latency(self) -> bool:
        """Whether latency is a budget or an objective: then it is measured."""
        return "latency" in self.budgets or "latency" in self.search.objectives

    @property
    def quality(self) -> Quality | None:
        """The limit on the metric; None without one."""
        return quality_of(self.at_least)

    def parsed_budgets(self) -> list[Budget]:
        return [parse_budget(cost, text) for cost, text in self.budgets.items()]
