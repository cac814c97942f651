"""`Row`: everything that is known of one finished trial, made in one place from what Optuna's study holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean, stdev
from typing import Any

from optuna.trial import FrozenTrial

from ranksearch.compress import Cost
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import Status

CURVES = ("history", "projections", "losses")
NOT_IN_RECORD = ("share", *CURVES, "started", "ended")
"""The fields that `front.json` leaves out."""


@dataclass(frozen=True)
class Row:
    """A finished trial: its result, its costs as ratios of the dense net's, and how it came about; what was not measured is None.

    The fields are read as attributes, or like a mapping's keys (`row["macs_ratio"]`, `dict(row)`), with the names that `front.json` uses.
    """

    trial: int
    status: Status
    epochs: float | None = None
    test_accuracy: float | None = None
    share: float | None = None
    """What `val_accuracy` is worth (`trial/metric.py`), by which trials are compared."""
    val_accuracy: float | None = None
    """The task's metric in its own unit."""
    val_loss: float | None = None
    repeats: dict[str, Any] | None = None
    """How the net did when it was trained again with other seeds at the end: `runs`, and mean and deviation by split (`repeats.py`)."""
    kept: dict[str, Any] | None = None
    """Which net of the trial this is: the `phase` and the `step` after which it was scored (`trial/kept.py`)."""
    macs: int | None = None
    params: int | None = None
    size_bytes: int | None = None
    latency_predicted_ms: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    images_per_second: float | None = None
    projection_share: float | None = None
    seconds: float | None = None
    macs_ratio: float | None = None
    params_ratio: float | None = None
    size_ratio: float | None = None
    plan: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    params_searched: dict[str, Any] = field(default_factory=dict)
    allocator: str | None = None
    seed: int | None = None
    reason: str | None = None
    eager: str | None = None
    """Why steps, or projections between them, were not replayed from a recording; None where they were, or on a CPU."""
    placement: dict[str, Any] | None = None
    history: Sequence[dict[str, Any]] = ()
    projections: Sequence[dict[str, Any]] = ()
    losses: Sequence[dict[str, float]] = ()
    started: float | None = None
    """Seconds since 1970, as `ended`."""
    ended: float | None = None

    @property
    def complete(self) -> bool:
        """Whether the trial has a net that counts."""
        return self.status is Status.COMPLETE

    @property
    def worth(self) -> float:
        """The share of a complete trial."""
        assert self.share is not None
        return self.share

    @property
    def value(self) -> float:
        """The metric of a complete trial, in its own unit."""
        assert self.val_accuracy is not None
        return self.val_accuracy

    @property
    def cost(self) -> Cost:
        """What the trial's plan costs, with its predicted latency; this is known for every trial."""
        assert self.macs is not None
        assert self.params is not None
        assert self.size_bytes is not None
        return Cost(self.macs, self.params, self.size_bytes, self.latency_predicted_ms)

    def __getitem__(self, name: str) -> Any:
        if name not in FIELDS:
            raise KeyError(name)
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field `name`, or `default` if there is no such field."""
        return getattr(self, name) if name in FIELDS else default

    def keys(self) -> tuple[str, ...]:
        """The fields' names."""
        return FIELDS

    def __or__(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The fields as a dictionary, with `changes` laid over them."""
        return {name: getattr(self, name) for name in FIELDS} | dict(changes)

    def __contains__(self, name: object) -> bool:
        return name in FIELDS

    def __iter__(self) -> Iterator[str]:
        return iter(FIELDS)

    def __len__(self) -> int:
        return len(FIELDS)

    def unfolded(self) -> Row:
        """The row with plain lists instead of packed curves."""
        history, projections, losses = (list(getattr(self, name)) for name in CURVES)
        return replace(self, history=history, projections=projections, losses=losses)

    def record(self) -> dict[str, Any]:
        """The row as `front.json` holds it."""
        return {name: getattr(self, name) for name in FIELDS if name not in NOT_IN_RECORD}


def repeated(own: Row, again: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Sums up a trial and its repeats: how many ended well (`runs`, the trial among them), mean and deviation (n - 1) by split.

    None if nothing was repeated. The trial itself was chosen for its validation, so a mean that includes it is a little too good.
    """
    if not again:
        return None
    found: dict[str, Any] = {"runs": 1 + sum(entry["validation"] is not None for entry in again), "failed": 0}
    found["failed"] = 1 + len(again) - found["runs"]
    for split, value in (("validation", own.val_accuracy), ("test", own.test_accuracy)):
        values = [v for v in (value, *(entry[split] for entry in again)) if v is not None]
        found[f"{split}_mean"] = fmean(values) if values else None
        found[f"{split}_std"] = stdev(values) if len(values) > 1 else None
    return found


FIELDS = tuple(found.name for found in fields(Row))
RATIOS = {"macs_ratio": "macs", "params_ratio": "params", "size_ratio": "size_bytes"}
FROM_RESULT = (
    "epochs", "val_accuracy", "val_loss", "kept", "macs", "params", "size_bytes", "latency_predicted_ms", "latency_ms", "latency_ratio",
    "images_per_second", "projection_share", "seconds", "reason", "eager", "placement",
)  # fmt: skip
FROM_CANDIDATE = ("plan", "recipe", "allocator", "seed")


def row_of(trial: FrozenTrial, dense: Mapping[str, Any], metric: Metric) -> Row:
    """The row of a finished trial; `dense` holds the dense net's costs, as `study.json` has them."""
    result, candidate = trial.user_attrs.get("result", {}), trial.user_attrs.get("candidate", {})
    ratios = {name: result[cost] / dense[cost] for name, cost in RATIOS.items() if result.get(cost) is not None}
    accuracy, started, ended = result.get("val_accuracy"), trial.datetime_start, trial.datetime_complete
    return Row(
        trial.number, Status(result.get("status", Status.FAILED)), params_searched=dict(trial.params),
        share=metric.share(accuracy) if accuracy is not None else None, **ratios,
        **{name: result.get(name) for name in FROM_RESULT}, **{name: candidate.get(name) for name in FROM_CANDIDATE},
        **{name: result.get(name, ()) for name in CURVES},
        started=started.timestamp() if started else None, ended=ended.timestamp() if ended else None,
    )  # fmt: skip
