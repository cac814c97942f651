"""The schema of a search space and its defaults, stated here and nowhere else; its groups `recipe`, `search`, `storage` and `tracking`
have files of their own (`recipe.py`, `search.py`, ...). `reading.py` reads one from a file.

A value marked searchable is either fixed (`lr: 0.05`) or a distribution: `{low: 0.01, high: 0.1, log: true}` or
`{choices: [10, 20, 50]}`; `default` is what the first points use (left out: the middle of a range, the first choice).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import nn

from ranksearch.allocate.budget import Budget, parse_budget
from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.allocate.weightings import METRICS, WEIGHTS
from ranksearch.compress.stopwatch import LatencySetting
from ranksearch.errors import UsageError, shortened
from ranksearch.lowering import default_lowerings, expand_families
from ranksearch.places.trust import may_run, refuse_file
from ranksearch.space.quality import Quality, quality_of
from ranksearch.space.recipe import RecipeSpace
from ranksearch.space.search import SearchSpace
from ranksearch.space.settings import Strict
from ranksearch.space.storage import StorageSpace
from ranksearch.space.tracking import TrackingSpace
from ranksearch.tasks import TASKS, TaskKind, build_reference, is_own, task_kind

AUTO = "auto"
MOST_GPUS = 1024
"""The most GPUs that one trial may take."""


class LayerRuleSpace(Strict):
    """What holds for the layers whose names match a pattern; what is left out stays as it is for the others."""

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
    tiles), of forms with a pivoted one this alone unless latency counts."""
    rank_multiple: int = Field(default=1, ge=1)
    """Every rank is a multiple of this (a rule may say otherwise for its layers): many devices compute in tiles of 8, 16 or more."""
    metric: Literal[*METRICS] = WEIGHTS  # type: ignore[valid-type]
    """In what errors of a layer are measured, by rank curves, projections and decompositions alike: its weight's own norm ("weights"), its
    outputs' on the data ("inputs"), the loss to second order ("kfac"), or "auto": "inputs" where no BN takes the layer's output."""
    metric_refresh: int = Field(default=10, ge=1)
    """A trial measures the metric anew at every so many projections."""
    rules: list[LayerRuleSpace] = Field(default=[])
    """Rules for layers by name; where several match a layer, a later one overrides what it names."""

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _texts(cls, names: Any) -> Any:
        """Layers of a Sequential are called by numbers, which YAML reads as such."""
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
    """How latency is measured: where it is a budget or an objective, and of the front's nets at the end of every study."""

    runtime: Literal["eager", "compile", "onnx"] = "eager"
    """PyTorch as it is, torch.compile (whose table takes seconds per layer, lowering and rank), or ONNX Runtime on the CPU."""
    batch: int = Field(default=1, ge=1, le=2**31 - 1)
    """Inputs of one call."""
    threads: int = Field(default=1, ge=1, le=2**15 - 1)
    """Threads of the CPU."""

    def as_setting(self) -> LatencySetting:
        return LatencySetting(self.runtime, self.batch, self.threads)


SPELLINGS = {"gpus": "gpus_per_trial", "cpus": "cpus_per_trial"}
"""Other spelling -> key of `resources`."""


def one_spelling(resources: Any) -> Any:
    """`resources` as it was given, under the schema's own keys.

    Raises:
        ValueError: a key is given under both of its spellings.
    """
    if not isinstance(resources, dict):
        return resources
    for other, key in SPELLINGS.items():
        if other in resources and key in resources:
            raise ValueError(f"{other} and {key} are two spellings of one key: leave one of them out")
    return {SPELLINGS.get(key, key): value for key, value in resources.items()}


class ResourcesSpace(Strict):
    """What one trial takes of the cluster; as many trials run at once as fit."""

    cpus_per_trial: int = Field(default=1, ge=1)
    """CPU cores of a trial, or of each of its workers (also spelled `cpus`). PyTorch computes with as many threads, less `data_workers`."""
    gpus_per_trial: float | Literal["auto"] | None = None
    """A fraction lets trials share a GPU; `auto` measures a trial's memory, and how fast several are at once, and packs as many onto a GPU
    as fit and pay off; more than one makes the trial data-parallel, a worker per GPU. Left out, a trial takes one GPU where the cluster has
    any. `gpus` is another spelling."""
    sharing: Literal["auto", "mps", "time_slice"] = "auto"
    """How trials share a GPU: `mps` side by side through CUDA MPS, started on every node for as long as the study runs, `time_slice` by
    turns; `auto` takes MPS where it is available. Somebody else's MPS is used as it is."""
    workers_per_trial: int = Field(default=1, ge=1)
    """Processes that train one trial together, each on its part of every batch; `gpus_per_trial: 4` means four."""
    data_workers: int = Field(default=2, ge=0)
    """Processes per trial that read and prepare the images of an `imagefolder`."""
    stage: str | None = None
    """A folder of each node's own disk, to which the data folder of an `imagefolder` is copied once per node and read from there."""
    checkpoint_seconds: float = Field(default=60, gt=0)
    """How often a running trial writes its state, from which a lost worker's or a killed study's trial goes on."""
    worker_losses: int = Field(default=2, ge=0)
    """How often a trial whose worker died is run again, from its state; one more loss is taken for its own doing (out of memory, say).
    A node that is lost or taken away is not: its trials are run again without being counted."""
    wait_seconds: float = Field(default=600, ge=0)
    """How long a cluster (`--address`) may have no room for a single trial, at the start or later, while its nodes are still coming."""

    @model_validator(mode="before")
    @classmethod
    def _spelt(cls, given: Any) -> Any:
        return one_spelling(given)

    @field_validator("gpus_per_trial", mode="before")
    @classmethod
    def _shareable(cls, gpus: Any) -> Any:
        if gpus is None or gpus == AUTO:
            return gpus
        if isinstance(gpus, bool) or not isinstance(gpus, int | float):
            raise ValueError(
                f"{gpus!r} is not possible: expected a fraction of one GPU, a whole number of them, or {AUTO}"
            )
        if gpus < 0:
            raise ValueError(f"{gpus:g} is below 0")
        if gpus > MOST_GPUS:
            raise ValueError(f"expected at most {MOST_GPUS}, got {shortened(gpus)}")
        if gpus > 1 and not float(gpus).is_integer():
            raise ValueError(f"{gpus:g} is neither a fraction of one GPU nor a whole number of them")
        return float(gpus)

    @model_validator(mode="after")
    def _one_gpu_each(self) -> ResourcesSpace:
        workers, gpus = self.workers_per_trial, self.gpus_per_trial
        if workers > 1 and gpus not in (None, 0, workers):
            raise ValueError(
                f"workers_per_trial: {workers} with gpus_per_trial: {gpus}: every worker of a data-parallel trial has one GPU, or none: "
                f"write gpus_per_trial: {workers}, or 0"
            )
        return self

    @property
    def workers(self) -> int:
        """Processes that train one trial."""
        gpus = self.gpus_per_trial
        return int(gpus) if isinstance(gpus, float) and gpus > 1 else self.workers_per_trial


class Space(Strict):
    """A search-space file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of the study, and of its folder."""
    task: str
    """The name of a task, or a function of your own that returns a `ranksearch.Task`: FILE.py:FUNCTION, the file beside the space's, or in
    the working directory."""
    model: str | None = Field(default=None, validate_default=True)
    """The net, by a name that the task knows; left out where the task is your own, which brings its model."""
    checkpoint: str = "auto"
    """Dense weights: "auto" (those of your own task's model, the public checkpoint, else trained once), "train", or a file."""
    data: str | None = None
    """Data folder; left out, `RANKSEARCH_DATA`, else ~/.cache/ranksearch."""
    validation: int | None = Field(default=None, ge=1, validate_default=True)
    """Images carved from the training set to choose by; left out where the task brings a validation split of its own."""
    split_seed: int = 0
    """Which images those are."""
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
        """The space as it was given: the file's text, after the command line's values as comments; None of one made in Python."""
        return self._given

    def kind(self) -> TaskKind:
        """The task without its data, or a user's own with them.

        Raises:
            UsageError: no such task, or the user's file is of no use, or not the one that the study was made with, or came with its
                folder and is no file that this user runs.
        """
        if self._own is None:
            return task_kind(self.task)
        path = Path(self.task.rpartition(":")[0])
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != self._own["sha256"]:
            raise UsageError(
                f"task: {path} is not the file that the study was made with (its sha256 is another one): put that one back, or start "
                f"another study."
            )
        if path.is_file() and not self._trusted and not may_run(path, self._own["origin"]):
            raise refuse_file(path)
        return task_kind(self.task, self._own["origin"])

    def kept_in(self, folder: Path, own: dict[str, str] | None, *, trust: bool) -> Space:
        """The space of a study: a task of the user's own is the copy of its file in the study's folder, as `own` records it.

        Args:
            trust: whether that copy may run whoever wrote it; else it has to be one that this user runs anyhow (`places/trust.py`).
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
        """The limit on the metric; None where there is none."""
        return quality_of(self.at_least)

    def parsed_budgets(self) -> list[Budget]:
        return [parse_budget(cost, text) for cost, text in self.budgets.items()]
