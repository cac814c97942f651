"""The group `search` of a search space: how plans are proposed, with every default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ranksearch.allocate.baselines import BASELINES
from ranksearch.allocate.damage import MEASURES
from ranksearch.allocate.sensitivity import SENSITIVITIES
from ranksearch.costs import COSTS, same_cost
from ranksearch.errors import nearest
from ranksearch.space.settings import Number, Range, Strict, within

AUTO = "auto"
"""Settled by untrained scores; if nothing is scored, it stands for `USUAL_SENSITIVITY` and `USUAL_MEASURE`."""
GROUPINGS = ("blocks", "stage", "shape", "layer", "all")
"""Ways to group layers that need no patterns."""
RULES = ("uniform", "energy", "minimax")
"""Baselines that may compete with the solver throughout a search."""


class EarlyStoppingSpace(Strict):
    """Stops trials that fall behind at a rung (ASHA; with several objectives MO-ASHA, which ranks by nondominated sorting)."""

    rungs: list[float] = Field(default=[0.15, 0.4], min_length=1)
    """Shares of a trial's steps after which it is scored: projected, BN re-estimated, on the validation set."""
    reduction: float = Field(default=3.0, gt=1, allow_inf_nan=False)
    """The best 1 / this of the trials that have reached a rung go on, and so does every trial that no other there beats."""

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: list[float]) -> list[float]:
        if not all(0 < rung < 1 for rung in rungs) or sorted(set(rungs)) != rungs:
            raise ValueError(f"expected rising shares between 0 and 1, got {rungs}")
        return rungs


class NestedSpace(Strict):
    """The nested runs of a study whose strategy is `nested`."""

    runs: int = Field(default=1, ge=1)
    """Number of nested runs, side by side if the resources allow it: the first by the recipe's defaults, the others by recipes spread over
    what is searched of it. Plans are cut from the run whose levels score best."""
    levels: int = Field(default=9, ge=2)
    """Plans that are trained at once: the solver's, evenly spaced on a log scale from `front_from` of the budgets to the budgets."""
    drawn: int = Field(default=1, ge=1)
    """Levels that one step trains, drawn anew each time; each takes a forward and a backward pass."""
    mix: bool = True
    """Cuts each plan from the mixture of the run's weights and the dense net's that scores best, rather than from the run's alone."""
    fine_tuning: int = Field(default=0, ge=0)
    """Steps that train a plan's factors after they are cut from the nested weights; 0 scores them as they are, in seconds."""

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> NestedSpace:
        if self.drawn > self.levels:
            raise ValueError(
                f"drawn {self.drawn} is more than the {self.levels} levels: at most {self.levels} can be drawn at once"
            )
        return self


def _grouping(value: Any) -> Any:
    if isinstance(value, str) and value not in GROUPINGS:
        raise ValueError(f"there is no grouping {value!r}. {nearest(value, GROUPINGS)}")
    if isinstance(value, dict) and value:
        named = {group: [patterns] if isinstance(patterns, str) else patterns for group, patterns in value.items()}
        for group, patterns in named.items():
            if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"{group}: expected a name pattern or a list of them, got {patterns!r}")
        return named
    if value is not None and not isinstance(value, str):
        raise ValueError(f"expected one of {', '.join(GROUPINGS)}, or group: patterns pairs, got {value!r}")
    return value


Objective = Literal["accuracy", *COSTS]  # type: ignore[valid-type]
GOALS = {
    "smallest": "size",
    "fastest": "latency",
    "fewest macs": "macs",
    "fewest flops": "flops",
    "fewest params": "params",
}
"""What one may call the objectives in a word -> the cost beside accuracy."""


def _wanted(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    words = value.lower().replace("_", " ").replace("-", " ").strip()
    if words in GOALS:
        return ["accuracy", GOALS[words]]
    names = [name.strip() for name in value.split(",")]
    if all(name in ("accuracy", *COSTS) for name in names):
        return names if "accuracy" in names else ["accuracy", *names]
    raise ValueError(f"there is no objective {value!r}. {nearest(value, [*GOALS, 'accuracy', *COSTS])}")


class SearchSpace(Strict):
    """How plans are proposed."""

    trials: int = Field(default=16, ge=1)
    """Planned number of trials."""
    strategy: Literal["separate", "nested"] = "separate"
    """`separate` trains every plan on its own. `nested` trains one dense weight under many plans in the first trial, by the whole recipe;
    every other trial is a plan cut from it and scored, without training. Then `export NAME --at flops=37%` gives the net of any budget."""
    nested: NestedSpace = Field(default_factory=NestedSpace)
    parametrization: Literal["allocated", "direct"] = "allocated"
    """`allocated` searches corrections around the solver's optimum; `direct` a lowering and a rank ratio per group of layers."""
    sampler: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    """`tpe` is our own under `allocated` (`local_tpe.py`): TPE draws candidates, and a Gaussian process picks one. The others are Optuna's;
    `gp` takes seconds per trial after a few dozen trials."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """The seed of the proposals and of every trial."""
    objectives: Annotated[list[Objective], BeforeValidator(_wanted)] = Field(default=["accuracy", "macs"])
    """Accuracy (the task's metric, whatever it is) and up to two costs, of which the front is made; accuracy alone searches for the best
    net within the budgets. Left out: accuracy and the first budget's cost, or MACs without a budget. Or in a word: "smallest" (accuracy and
    size), "fastest" (latency), "fewest MACs", "fewest params". `latency` is predicted from a table before a trial and measured after it,
    in turn with the dense net; `latency:` says how."""
    front_from: float = Field(default=0.4, gt=0, le=1)
    """The front is searched from this share of the budgets up to the budgets themselves."""
    groups: Annotated[str | dict[str, list[str]] | None, BeforeValidator(_grouping)] = None
    """Layers that share what is searched: "blocks" (as "stage", but a first name that holds most of a net, such as one wrapped module, is
    taken apart), "stage" (those with the same first name, such as `layer1`), "shape" (of the weight), "layer" (each alone), "all", or names
    with patterns (`early: [conv1, "layer1.*"]`; layers that none matches are the group `rest`). Left out: "blocks", and "layer" where the
    parametrization is `direct`."""
    weight_range: float = Field(default=2.0, ge=1, le=1000)
    """A group's predicted damage is corrected by a factor between 1 / this and this."""
    trust: Annotated[Number, within(0, 4)] = Range(low=0.0, high=1.5, default=1.0)
    """How far measured sensitivities are believed: the exponent on the layers' scales. 1: as measured; 0: layers differ only in
    the energy they lose, which is better at small budgets."""
    search_lowerings: bool = False
    """Whether a group may be confined to a single lowering. Off: the solver's own choice is hard to beat, and fewer numbers are
    searched. ResNet-20 on CIFAR-10, 16 trials without training (1,500 validation images, CPU, seeds 0 and 1): hypervolume .643 and
    .642 without, .642 and .639 with it."""
    sensitivity: str = AUTO
    """How a layer's error is weighted: "none" (the weights alone), or from a few batches "activation", "fisher", "kfac", "kfac_balanced"
    (every class counts alike); gradients follow the task's loss. "auto" settles it, with `measure`, `trust` and `predictions`, before the
    first trial, by a handful of untrained scores on the task's metric. How they compare is in `allocate/README.md`."""
    predictions: list[str] | None = None
    """Predictions that compete at making plans, the first one first: sensitivities for the solver, and "uniform", "energy", "minimax". Left
    out: `sensitivity` alone, or under "auto" those that come close to the best."""
    calibration_batches: int = Field(default=8, ge=1)
    """Batches, augmented as in training, that the sensitivity is measured on."""
    measure: str = AUTO
    """Damage as a function of the share that a layer loses: "log_kept_energy", "relative_energy"; "auto" settles it with the sensitivity;
    if a sensitivity is named, it is "log_kept_energy"."""
    first_points: list[str] | None = None
    """Uncorrected plans that open the study, in at most half of its trials: "solver" or names of baselines. Left out: the solver; if the
    sensitivity is named, also uniform, energy and minimax, since no untrained scores say which of them keep up; none if the
    parametrization is `direct`."""
    warm_start: list[str] = Field(default=[])
    """Folders of earlier studies, or front files, whose plans are tried first, as far as they lie within budgets and layer rules."""
    early_stopping: EarlyStoppingSpace | None = None
    """Off by default: it pays off if trials are long."""
    repeats: int = Field(default=0, ge=0, le=100)
    """How often the nets that matter for the verdict (the one to ship, the next cheaper one, the cheapest of the front) are trained again
    with other seeds at the end, in the driver's process; front, report and MLflow show mean and deviation."""
    max_failures: float = Field(default=0.5, ge=0, le=1)
    """The study ends if more than this share of its trials failed or diverged, counted from ten on, or if all of the first three did; 1:
    never."""

    @model_validator(mode="after")
    def _nested_alone(self) -> SearchSpace:
        if self.strategy != "nested":
            return self
        if self.early_stopping is not None:
            raise ValueError(
                "strategy nested has one long trial, which nothing can be compared with: leave early_stopping out"
            )
        if self.repeats:
            raise ValueError(
                "strategy nested cuts its nets from one run, which cannot be repeated net by net: leave repeats out"
            )
        if self.trials <= self.nested.runs:
            raise ValueError(
                f"strategy nested needs {self.nested.runs + 1} trials or more: nested runs ({self.nested.runs}), then plans cut from them"
            )
        return self

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if not 1 <= len(names) <= 3 or len(set(names)) != len(names) or "accuracy" not in names:
            raise ValueError(f"expected one to three different objectives, accuracy among them, got {names}")
        costs = [name for name in names if name != "accuracy"]
        if len(costs) == 2 and same_cost(*costs):
            raise ValueError(f"{' and '.join(costs)} are one cost (1 MAC = 2 FLOPs): name one of them")
        return names

    @field_validator("measure")
    @classmethod
    def _measured(cls, name: str) -> str:
        if name not in (AUTO, *MEASURES):
            raise ValueError(f"there is no damage measure {name!r}. {nearest(name, [AUTO, *MEASURES])}")
        return name

    @field_validator("sensitivity")
    @classmethod
    def _sensible(cls, name: str) -> str:
        if name not in (AUTO, *SENSITIVITIES):
            raise ValueError(f"there is no sensitivity {name!r}. {nearest(name, [AUTO, *SENSITIVITIES])}")
        return name

    @field_validator("predictions")
    @classmethod
    def _predicting(cls, names: list[str] | None) -> list[str] | None:
        valid = (*SENSITIVITIES, *RULES)
        for name in names or ():
            if name not in valid:
                raise ValueError(f"there is no prediction {name!r}. {nearest(name, valid)}")
        return names

    @field_validator("first_points")
    @classmethod
    def _allocators(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in ("solver", *BASELINES):
                raise ValueError(f"there is no allocator {name!r}. {nearest(name, ['solver', *BASELINES])}")
        return names
