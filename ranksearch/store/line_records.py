"""What a line of the journal must hold: an operation of Optuna's, and the result or candidate of a trial in its attributes.

The journal is held to this as it is read; `records.py` does the same for the other files of a study.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from ranksearch.store.records import Count, Finite, PlanRecord, Record, checked
from ranksearch.trial.result import Status


class PhaseRecord(Record):
    """An entry of a result's history."""

    phase: str
    step: Count
    val_accuracy: float | None = None
    val_loss: float | None = None


class ProjectionRecord(Record):
    """A projection that was recorded."""

    step: Count
    loss_before: float | None
    loss_after: float | None
    removed_energy: dict[str, float]


class LossRecord(Record):
    """A point of the training curve."""

    step: Count
    train_loss: float


class ResultRecord(Record):
    """A trial's result in the journal."""

    status: Literal[tuple(str(status) for status in Status)]  # type: ignore[valid-type]
    seed: int | None = None
    epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    val_accuracy: float | None = None
    val_loss: float | None = None
    kept: dict[str, Any] | None = None
    macs: Count | None = None
    params: Count | None = None
    size_bytes: Count | None = None
    latency_predicted_ms: Finite | None = None
    latency_ms: Finite | None = None
    latency_ratio: Finite | None = None
    images_per_second: Finite | None = None
    seconds: Finite | None = None
    projection_share: Finite | None = None
    reason: str | None = None
    placement: dict[str, Any] | None = None
    history: list[PhaseRecord] = Field(default=[])
    losses: list[LossRecord] = Field(default=[])
    projections: list[ProjectionRecord] = Field(default=[])


class CompleteRecord(ResultRecord):
    """The result of a trial whose net counts."""

    status: Literal["complete"]
    val_accuracy: Finite
    macs: Count
    params: Count
    size_bytes: Count


class RecipeRecord(Record):
    """A recipe: all but its steps are checked where it is used."""

    steps: Count


class CandidateRecord(Record):
    """What a trial was to try: its plan, recipe and seed."""

    plan: PlanRecord
    recipe: RecipeRecord
    allocator: str | None = None
    seed: int
    key: str


class Line(Record):
    """A line of the journal: an operation of Optuna's on a study or a trial."""

    op_code: Annotated[int, Field(ge=0, le=10)]
    worker_id: str
    study_id: Count | None = None
    trial_id: Count | None = None
    user_attr: dict[str, Any] | None = None
    user_attrs: dict[str, Any] | None = None
    values: list[float] | None = None


LINE = TypeAdapter(Line)
RESULT, COMPLETE = TypeAdapter(ResultRecord), TypeAdapter(CompleteRecord)
CANDIDATE = TypeAdapter(CandidateRecord)


def check_line(log: Any, where: str) -> None:
    """Checks that a study can have written a line of the journal, with the result or candidate in it.

    Raises:
        UsageError: it cannot have.
    """
    checked(log, LINE, where)
    attributes = (log.get("user_attr") or {}) | (log.get("user_attrs") or {})
    if "result" in attributes:
        result = attributes["result"]
        complete = isinstance(result, dict) and result.get("status") == "complete"
        checked(result, COMPLETE if complete else RESULT, f"{where}: result")
    if "candidate" in attributes:
        checked(attributes["candidate"], CANDIDATE, f"{where}: candidate")
