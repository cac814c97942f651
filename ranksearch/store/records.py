"""What a study's files must hold, as pydantic models: `study.json`, `front.json`, and what is measured late.

A file may be half written, edited, of an earlier version, or a stranger's. If something does not fit, one sentence names the file, the
place in it, and what was expected. Unknown keys are left alone, since a later version may have written them. The journal's lines have a
file of their own, `line_records.py`.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ranksearch.errors import UsageError, clipped, shortened
from ranksearch.places.files import read_bytes

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Record(BaseModel):
    """A part of a file, in which a number is a number, not a text that looks like one."""

    model_config = ConfigDict(strict=True, extra="ignore")


class DenseRecord(Record):
    """The dense net's metric and costs."""

    val_accuracy: Finite
    test_accuracy: Finite | None = None
    macs: Positive
    params: Positive
    size_bytes: Positive
    latency_ms: AboveZero | None = None


class MetricRecord(Record):
    """What trials are judged by."""

    name: str
    direction: Literal["maximize", "minimize"]
    unit: str


class TaskFileRecord(Record):
    """The user's own file that makes the task."""

    file: str
    function: str
    sha256: str
    origin: str


class LayerRecord(Record):
    """A layer that may be lowered."""

    name: str
    largest_rank: dict[str, Positive | list[Positive]]


class LayerCostRecord(Record):
    """What is needed to count the MACs of a layer."""

    name: str
    spec: dict[str, Any]
    in_sizes: list[list[Count]]
    samples: list[Any]
    batch: Any
    dense_ms: Finite | None = None


class SamplesRecord(Record):
    """Sizes of the splits."""

    validation: Count | None
    test: Count | None


class ProvenanceRecord(Record):
    """Where a study was made."""

    created: str
    git_revision: str | None = None
    python: str | None = None
    device: str | None = None
    versions: dict[str, str | None] = {}

    @model_validator(mode="after")
    def _is_a_time(self) -> ProvenanceRecord:
        datetime.fromisoformat(self.created)
        return self


class ProbeRecord(Record):
    """What a trial took of a GPU."""

    device: str
    peak_bytes: Count


class StudyRecord(Record):
    """`study.json`."""

    study: Name
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{8,64}$")]
    metric: MetricRecord | None = None
    task_file: TaskFileRecord | None = None
    dense: DenseRecord
    samples: SamplesRecord | None = None
    seed: int | None = None
    provenance: ProvenanceRecord
    opened_with: dict[str, Count] = {}
    layers: list[LayerRecord] | None = None
    prediction: dict[str, float | None] | None = None
    layer_costs: list[LayerCostRecord] | None = None
    latency_key: str | None = None
    done: bool = False
    gpu_probe: ProbeRecord | None = None


class LayerPlanRecord(Record):
    """A layer of a plan."""

    lowering: str
    rank: Positive | list[Positive] | None = None


class PlanRecord(Record):
    """A plan as the journal has it."""

    model: str | None = None
    layers: dict[str, LayerPlanRecord]


class FrontRowRecord(Record):
    """A trial of the front."""

    trial: Count
    allocator: str | None
    plan: PlanRecord
    val_accuracy: Finite
    test_accuracy: Finite | None
    macs: Count
    params: Count
    size_bytes: Count
    macs_ratio: Finite
    params_ratio: Finite
    size_ratio: AboveZero
    latency_ms: Finite | None
    latency_ratio: Finite | None
    latency_predicted_ms: Finite | None


class ObjectiveRecord(Record):
    """What a front was searched for."""

    name: Literal["accuracy", "flops", "macs", "params", "size", "latency"]
    direction: Literal["maximize", "minimize"]


class GainsRecord(Record):
    """What the last trials gained."""

    last: Count
    last_gain: Finite
    half_gain: Finite


class FailuresRecord(Record):
    """Why trials failed, the commonest reason first."""

    count: Count
    reason: str | None
    alike: Count


class PreviewedRecord(Record):
    """A previewed plan, not trained."""

    percent: Finite
    val_accuracy: Finite


class NestedRecord(Record):
    """The nested run that plans are cut from, and every run's score by its trial."""

    trial: Count
    scores: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Finite | None]


class FrontRecord(Record):
    """`front.json`, which is made from the other files, so that a damaged one is simply made anew."""

    study: Name
    metric: MetricRecord
    objectives: Annotated[list[ObjectiveRecord], Field(min_length=1)]
    budgets: dict[Literal["flops", "macs", "params", "size", "latency"], str | int | float]
    hypervolume: Finite
    state: Literal["running", "complete", "failed"]
    planned: Count
    counts: dict[str, Count]
    failures: FailuresRecord
    samples: SamplesRecord
    gains: GainsRecord | None = None
    preview: list[PreviewedRecord] = []
    dense: DenseRecord
    trials: list[FrontRowRecord]
    lost: list[Count] = []
    nested: NestedRecord | None = None


STUDY, FRONT = TypeAdapter(StudyRecord), TypeAdapter(FrontRecord)
TEST_ACCURACIES = TypeAdapter(
    dict[Annotated[str, Field(pattern=r"^(\d{1,9}|dense)$")], Finite | None], config=ConfigDict(strict=True)
)
REPEATED = TypeAdapter(
    dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], list[dict[Literal["validation", "test"], Finite | None]]],
    config=ConfigDict(strict=True),
)
LATENCIES = TypeAdapter(
    dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[list[AboveZero], Field(min_length=2, max_length=2)]],
    config=ConfigDict(strict=True),
)


def read_record(path: Path, expected: TypeAdapter[Any]) -> Any:
    """The content of a JSON file, unchanged.

    Raises:
        UsageError: it is not JSON, or does not hold what was expected; one sentence with the file, the place and the expectation.
        FileNotFoundError: there is none.
    """
    raw = read_bytes(path)
    try:
        data = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise UsageError(f"{path}: expected JSON, got lists or mappings nested too deeply to be read.") from None
    except ValueError as error:
        raise UsageError(f"{path}: expected JSON: {clipped(str(error))}.") from None
    return checked(data, expected, str(path))


def checked(data: Any, expected: TypeAdapter[Any], where: str) -> Any:
    """Returns `data` if it holds what was expected.

    Raises:
        UsageError: it does not; `where` begins the sentence.
    """
    try:
        expected.validate_python(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {_sentence(error)}") from None
    except (RecursionError, OverflowError) as error:
        raise UsageError(f"{where}: {type(error).__name__}: lists or mappings nested too deeply.") from None
    return data


def _sentence(error: ValidationError) -> str:
    first, *more = error.errors(include_url=False)
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "missing":
        return f"{place}: this key is missing."
    message = "a mapping of keys" if first["type"] in ("model_type", "dict_type", "model_attributes_type") else message
    others = f" ({len(more)} more places are damaged)" if more else ""
    given = first["input"]
    return f"{f'{clipped(place)}: ' if place else ''}expected {message[0].lower() + message[1:]}, got {shortened(given)}{others}."
