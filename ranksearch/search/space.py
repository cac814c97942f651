"""The schema of a search space and its defaults, stated here and nowhere else. `space_file.py` reads one from a file.

A value marked searchable is either fixed (`lr: 0.05`) or a distribution: `{low: 0.01, high: 0.1, log: true}` or
`{choices: [10, 20, 50]}`; `default` is what the first points use (left out: the middle of a range, the first choice).
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import nn

from ranksearch.allocate.baselines import BASELINES
from ranksearch.allocate.budget import Budget, parse_budget
from ranksearch.allocate.damage import MEASURES
from ranksearch.allocate.rules import LayerRule, LayerRules
from ranksearch.allocate.sensitivity import SENSITIVITIES
from ranksearch.compress.stopwatch import LatencySetting
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import default_lowerings, expand_families
from ranksearch.search.settings import SWITCH, Range, Strict, searchable, searchable_choice, values_of
from ranksearch.tasks import TASKS, TaskKind, build_reference, is_own, task_kind
from ranksearch.tasks.schedule import SCHEDULES
from ranksearch.tasks.train import OPTIMIZERS

GROUPINGS = ("stage", "shape", "layer", "all")
"""Ways to group layers by themselves; names with patterns are another."""


def _to_the_end(value: Any) -> Any:
    return 1.0 if value is True else value


class ProjectionSpace(Strict):
    """When the dense weights are projected, and how. The last step before the decomposition is always followed by a projection."""

    period: searchable(1, 1_000_000, whole=True) = 20  # type: ignore[valid-type]
    """Optimizer steps between projections. At least ten projections per trial pay; with a long run, thirty or more."""
    start: searchable(0, 1) = 0.0  # type: ignore[valid-type]
    """Share of the steps before the decomposition that pass until the first period begins."""
    until_end: Annotated[searchable(0, 1), BeforeValidator(_to_the_end)] = 1.0  # type: ignore[valid-type]
    """Share of those steps after which periodic projections cease; 1 (or true): they go on until the end."""
    schedule: searchable_choice("constant", "learning_rate", "removed_energy") = "constant"  # type: ignore[valid-type]
    """Length of a period: constant; the steps weighted by their learning rate (as many projections, but fewer where steps are small);
    or shorter where a projection removed more than `removed_energy`, longer where less, within a factor of four."""
    removed_energy: searchable(1e-9, 1) = 1e-3  # type: ignore[valid-type]
    """Mean share of the layers' ||W||² that a projection is to remove under the schedule `removed_energy`."""
    rank_annealing: searchable(0, 1) = 0.0  # type: ignore[valid-type]
    """Share of the steps (from `start` on) over which ranks come down from full to the plan's, fast at first; 0: at once."""
    momentum: searchable_choice("keep", "reset") = "keep"  # type: ignore[valid-type]
    """Whether the optimizer forgets its moments at a projection."""
    energy_transfer: SWITCH = False  # type: ignore[valid-type]
    """Scale what a projection keeps of a weight so that its energy stays (LRPET, Guo et al. 2024, arXiv 2204.05566)."""
    bn_rectification: SWITCH = False  # type: ignore[valid-type]
    """Choose what a projection keeps by the weight as the BN layer behind it will scale it (LRPET)."""

    @model_validator(mode="after")
    def _in_order(self) -> ProjectionSpace:
        latest, earliest = max(values_of(self.start)), min(values_of(self.until_end))
        if latest > earliest:
            raise ValueError(f"start {latest:g} is after until_end {earliest:g}")
        return self


class DistillationSpace(Strict):
    weight: searchable(0, 1) = 0.0  # type: ignore[valid-type]
    """Share of the loss that comes from the dense net's outputs; 0 does without, and saves a quarter of the time."""
    temperature: searchable(0.1, 100) = 8.0  # type: ignore[valid-type]
    """Softens both nets' outputs; on CIFAR-10 the gain levels off between 8 and 16."""


class RecipeSpace(Strict):
    """How a trial trains: dense with projections first, then the factors."""

    steps: int = Field(ge=0)
    """Optimizer steps of a trial, over both phases."""
    batch_size: int = Field(default=128, ge=1)
    optimizer: searchable_choice(*OPTIMIZERS) = "sgd"  # type: ignore[valid-type]
    """SGD with Nesterov momentum, or AdamW, which wants a learning rate of its own (about 0.001)."""
    schedule: searchable_choice(*SCHEDULES) = "cosine"  # type: ignore[valid-type]
    """Learning rate after the warm-up: a cosine or a line to 0, steps (a tenth at half, a hundredth at three quarters), or constant."""
    warmup: searchable(0, 1) = 0.15  # type: ignore[valid-type]
    """Share of the steps over which the learning rate rises to its peak; with the cosine this is the one-cycle schedule."""
    lr: searchable(1e-8, 100) = 0.02  # type: ignore[valid-type]
    """Peak of the learning rate."""
    momentum: searchable(0.01, 0.9999) = 0.9  # type: ignore[valid-type]
    """SGD's momentum, or AdamW's first beta."""
    weight_decay: searchable(0, 1) = 5e-4  # type: ignore[valid-type]
    label_smoothing: searchable(0, 0.9) = 0.0  # type: ignore[valid-type]
    clip_norm: searchable(0, 1e9) = 0.0  # type: ignore[valid-type]
    """Largest norm of the gradient; 0 does without clipping."""
    ema: searchable(0, 0.999999) = 0.0  # type: ignore[valid-type]
    """Decay per step of a moving average of the weights, which each phase ends with; 0 does without."""
    factor_share: searchable(0, 1) = 0.5  # type: ignore[valid-type]
    """Share of the steps that trains the factors after decomposition; 0 is the pure form of Lee et al. 2019, 1 decomposes first."""
    factor_lr: searchable(1e-6, 1e6) = 1.0  # type: ignore[valid-type]
    """Learning rate of the factors as a multiple of the schedule's. `cp`, a product of four factors, wants about 0.1."""
    bn_batches: int = Field(default=20, ge=1)
    """Batches, augmented as in training, that BN statistics are re-estimated from."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the training; "auto" is bf16 where that is faster. Weights, projections and scores are fp32 (on a GPU, torch runs
    convs of fp32 in TF32 unless it is told otherwise)."""
    compile: bool = False
    """torch.compile the training step: pays in long trials on a GPU; a trial begins with a minute or more of compilation."""
    projection: ProjectionSpace = ProjectionSpace()
    distillation: DistillationSpace = DistillationSpace()


class LayerRuleSpace(Strict):
    match: str
    lowerings: list[str] | None = None
    min_rank: int | None = Field(default=None, ge=1)
    rank_multiple: int | None = Field(default=None, ge=1)
    share_ratio: bool = False
    """These layers take one lowering at one ratio of its largest useful rank."""

    @field_validator("lowerings")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        return None if names is None else list(expand_families(names))


class LayersSpace(Strict):
    """Which layers may be lowered, and how. Patterns match names as the shell matches files (`layer1.*`)."""

    include: list[str] = Field(default=["*"])
    exclude: list[str] = Field(default=[])
    lowerings: list[str] = Field(default_factory=lambda: list(default_lowerings()), min_length=1)
    """Names of lowerings, or of a family of them (`tiled`); left out, all but those that have to be asked for (`cp`, square tiles)."""
    rank_multiple: int = Field(default=1, ge=1)
    """Every rank is a multiple of this (a rule may say otherwise for its layers): many devices compute in tiles of 8, 16 or more."""
    rules: list[LayerRuleSpace] = Field(default=[])
    """Of several rules that match a layer a later one overrides what it names."""

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
    """How latency is measured, where it is a budget or an objective."""

    runtime: Literal["eager", "compile", "onnx"] = "eager"
    """PyTorch as it is, torch.compile (whose table takes seconds per layer, lowering and rank), or ONNX Runtime on the CPU."""
    batch: int = Field(default=1, ge=1)
    """Inputs of one call."""
    threads: int = Field(default=1, ge=1)
    """Of the CPU."""

    def as_setting(self) -> LatencySetting:
        return LatencySetting(self.runtime, self.batch, self.threads)


class EarlyStoppingSpace(Strict):
    """Stops trials that fall behind at a rung (ASHA; with several objectives MO-ASHA, which ranks by nondominated sorting)."""

    rungs: list[float] = Field(default=[0.15, 0.4], min_length=1)
    """Shares of a trial's steps after which it is scored: projected, BN re-estimated, on the validation set."""
    reduction: float = Field(default=3.0, gt=1, allow_inf_nan=False)
    """The best 1 / this of the trials that have reached a rung go on; whatever no other trial there betters goes on too."""

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: list[float]) -> list[float]:
        if not all(0 < rung < 1 for rung in rungs) or sorted(set(rungs)) != rungs:
            raise ValueError(f"expected rising shares between 0 and 1, got {rungs}")
        return rungs


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


class SearchSpace(Strict):
    """How plans are proposed."""

    trials: int = Field(default=16, ge=1)
    parametrization: Literal["allocated", "direct"] = "allocated"
    """`allocated` searches corrections around the solver's optimum; `direct` a lowering and a rank ratio per group of layers."""
    sampler: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    """`tpe` around an allocation is our own use of Optuna's (`local_tpe.py`); `gp` takes seconds per trial from a few dozen on."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    objectives: list[Literal["accuracy", "macs", "flops", "params", "size", "latency"]] = Field(
        default=["accuracy", "macs"]
    )
    """Accuracy (the task's metric, whatever it is) and up to two costs, of which the front is made; accuracy alone searches the best net
    within the budgets. `latency` is predicted from a table before a trial and measured after it, in turn with the dense net;
    `latency:` says how."""
    front_from: float = Field(default=0.4, gt=0, le=1)
    """The front is searched from this share of the budgets up to the budgets themselves."""
    groups: Annotated[str | dict[str, list[str]] | None, BeforeValidator(_grouping)] = None
    """Layers that share what is searched: "stage" (those with the same first name, such as `layer1`), "shape" (of the weight), "layer"
    (each alone), "all", or names with patterns (`early: [conv1, "layer1.*"]`; layers that none matches are the group `rest`). Left out:
    "stage", and "layer" where the parametrization is `direct`."""
    weight_range: float = Field(default=2.0, ge=1, le=1000)
    """A group's predicted damage is corrected by a factor between 1 / this and this."""
    trust: searchable(0, 4) = Range(low=0.0, high=1.5, default=1.0)  # type: ignore[valid-type]
    """How far measured sensitivities are believed: the exponent on the layers' scales. 1: as measured; 0: layers are alike but for the
    energy they lose, which is better at small budgets."""
    search_lowerings: bool = False
    """Whether a group may be confined to a single lowering. Off: the solver's own choice is hard to better, and fewer numbers are
    searched. ResNet-20 on CIFAR-10, 16 trials without training (1,500 validation images, CPU, seeds 0 and 1): hypervolume .643 and
    .642 without, .642 and .639 with it."""
    sensitivity: str = "kfac"
    """What weighs a layer's error: "none" (the weights alone), or from a few batches "activation", "fisher", "kfac". How they compare is in
    `allocate/README.md`."""
    calibration_batches: int = Field(default=8, ge=1)
    """Batches, augmented as in training, that the sensitivity is measured on."""
    measure: str = "log_kept_energy"
    """Damage as a function of the share that a layer loses."""
    first_points: list[str] | None = None
    """Uncorrected plans that open the study, as far as half of the trials allows: "solver" or the name of a baseline. Left out: solver,
    uniform, energy, minimax, and none where the parametrization is `direct`."""
    warm_start: list[str] = Field(default=[])
    """Folders of earlier studies, or front files, whose plans are tried first, as far as they lie within budgets and layer rules."""
    early_stopping: EarlyStoppingSpace | None = None
    """Off by default: it pays where trials are long."""
    max_failures: float = Field(default=0.5, ge=0, le=1)
    """The study ends where more than this share of its trials (of ten at least, or all of the first three) failed or diverged."""

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if not 1 <= len(names) <= 3 or len(set(names)) != len(names) or "accuracy" not in names:
            raise ValueError(f"expected one to three different objectives, accuracy among them, got {names}")
        if {"macs", "flops"} <= set(names):
            raise ValueError("macs and flops are one cost (1 MAC = 2 FLOPs): name one of them")
        return names

    @field_validator("measure")
    @classmethod
    def _measured(cls, name: str) -> str:
        if name not in MEASURES:
            raise ValueError(f"there is no damage measure {name!r}. {nearest(name, MEASURES)}")
        return name

    @field_validator("sensitivity")
    @classmethod
    def _sensible(cls, name: str) -> str:
        if name not in SENSITIVITIES:
            raise ValueError(f"there is no sensitivity {name!r}. {nearest(name, SENSITIVITIES)}")
        return name

    @field_validator("first_points")
    @classmethod
    def _allocators(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in ("solver", *BASELINES):
                raise ValueError(f"there is no allocator {name!r}. {nearest(name, ['solver', *BASELINES])}")
        return names


class ResourcesSpace(Strict):
    """What one trial takes of the cluster; as many trials run at once as fit."""

    cpus_per_trial: int = Field(default=1, ge=1)
    gpus_per_trial: float | None = Field(default=None, ge=0)
    """A fraction lets trials share a GPU; left out, a trial takes one GPU where the cluster has any."""
    data_workers: int = Field(default=2, ge=0)
    """Processes per trial that read and prepare the images of an `imagefolder`."""
    checkpoint_seconds: float = Field(default=60, gt=0)
    """How often a running trial writes its state, from which a lost worker's or a killed study's trial goes on."""
    worker_losses: int = Field(default=2, ge=0)
    """How often a trial whose worker died is run again, from its state; one more loss is taken for its own doing (out of memory, say)."""

    @field_validator("gpus_per_trial")
    @classmethod
    def _shareable(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"{gpus:g} is neither a fraction of one GPU nor a whole number of them")
        return gpus


with warnings.catch_warnings():
    # `register` is a method of abstract classes, which pydantic's models are, and which nobody calls here
    warnings.filterwarnings("ignore", message='Field name "register"')

    class TrackingSpace(Strict):
        """Where a study is mirrored in MLflow, and what of it."""

        uri: str | None = None
        """MLflow store: a server or a database; left out, `MLFLOW_TRACKING_URI`, else a SQLite file beside the studies."""
        artifacts: str | None = None
        """Where a new experiment's files go, such as `s3://bucket/mlflow`; left out, the server's choice, or beside the studies."""
        experiment: str | None = None
        """MLflow experiment; left out, the study's name."""
        models: bool = True
        """Whether the nets of the front are logged as MLflow models, at the end of a study: some seconds and twice its weights each."""
        register: bool = False
        """Whether the most accurate net within the budgets is registered under the study's name, with the alias `champion`."""


class Space(Strict):
    """A search-space file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: str
    """The name of a task, or a function of your own that returns a `ranksearch.Task`: FILE.py:FUNCTION, the file beside the space's, or in
    the working directory."""
    model: str | None = Field(default=None, validate_default=True)
    """Of the task; left out where the task is your own, which brings its model."""
    checkpoint: str = "auto"
    """Dense weights: "auto" (those of your own task's model, the public checkpoint, else trained once), "train", or a file."""
    data: str | None = None
    """Data folder; left out, `RANKSEARCH_DATA`, else ~/.cache/ranksearch."""
    validation: int | None = Field(default=None, ge=1, validate_default=True)
    """Images carved from the training set to choose by; left out where the task brings a validation split of its own."""
    split_seed: int = 0
    budgets: dict[str, str | int | float] = Field(default={})
    latency: LatencySpace = LatencySpace()
    layers: LayersSpace = Field(default_factory=LayersSpace)
    recipe: RecipeSpace
    search: SearchSpace = Field(default_factory=SearchSpace)
    resources: ResourcesSpace = Field(default_factory=ResourcesSpace)
    tracking: TrackingSpace = Field(default_factory=TrackingSpace)
    _given: str | None = PrivateAttr(default=None)
    _own: dict[str, str] | None = PrivateAttr(default=None)

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

    @model_validator(mode="after")
    def _bounded(self) -> Space:
        if self.search.objectives == ["accuracy"] and not self.budgets:
            raise ValueError("accuracy alone as the objective needs a budget, such as budgets: {flops: 50%}")
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
            UsageError: no such task, or the user's file is of no use, or not the one that the study was made with.
        """
        if self._own is None:
            return task_kind(self.task)
        path = Path(self.task.rpartition(":")[0])
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != self._own["sha256"]:
            raise UsageError(
                f"task: {path} is not the file that the study was made with (its sha256 is another one): put that one back, or start "
                f"another study."
            )
        return task_kind(self.task, self._own["origin"])

    def kept_in(self, folder: Path, own: dict[str, str] | None) -> Space:
        """The space of a study: a task of the user's own is the copy of its file in the study's folder, as `own` records it."""
        if own is None or not is_own(self.task):
            return self
        kept = self.model_copy(update={"task": f"{folder.absolute() / Path(own['file']).name}:{own['function']}"})
        kept._own = dict(own)
        return kept

    def build(self, reference: str) -> nn.Module:
        """The untrained dense model of a plan that was made for this space."""
        return self.kind().build_model("") if is_own(self.task) else build_reference(reference)

    @property
    def has_latency(self) -> bool:
        """Whether latency is a budget or an objective: then it is measured."""
        return "latency" in self.budgets or "latency" in self.search.objectives

    def parsed_budgets(self) -> list[Budget]:
        return [parse_budget(cost, text) for cost, text in self.budgets.items()]
