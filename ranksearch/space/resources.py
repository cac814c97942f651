"""The part of a search space that says what a trial uses of the machines: CPUs, GPUs, processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from ranksearch.errors import shortened
from ranksearch.space.search import AUTO
from ranksearch.space.settings import Strict

MOST_GPUS = 1024
"""The most GPUs that one trial may take."""


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
    """What one trial uses of the cluster; as many trials run at once as fit."""

    cpus_per_trial: int = Field(default=1, ge=1)
    """CPU cores of a trial, or of each of its workers (also spelled `cpus`). PyTorch computes with as many threads, less `data_workers`."""
    gpus_per_trial: float | Literal["auto"] | None = None
    """A fraction lets trials share a GPU; `auto` measures a trial's memory, and how fast several are at once, and packs as many onto a GPU
    as fit and pay off; more than one makes the trial data-parallel, a worker per GPU. Left out, a trial takes one GPU where the cluster has
    any. `gpus` is another spelling."""
    sharing: Literal["auto", "mps", "time_slice"] = "auto"
    """How trials share a GPU: with `mps` side by side, through CUDA MPS that is started on every node for as long as the study runs; with
    `time_slice` in turns; `auto` takes MPS where it is available. An MPS that somebody else started is used as it is."""
    workers_per_trial: int = Field(default=1, ge=1)
    """Processes that train one trial together, each on its part of every batch; `gpus_per_trial: 4` means four."""
    data_workers: int = Field(default=2, ge=0)
    """Processes per trial that read and prepare the images of an `imagefolder`."""
    stage: str | None = None
    """A folder of each node's own disk, to which the data folder of an `imagefolder` is copied once per node and read from there."""
    checkpoint_seconds: float = Field(default=60, gt=0)
    """Seconds between two saved states of a running trial, which goes on from there after a lost worker or a killed study."""
    worker_losses: int = Field(default=2, ge=0)
    """How often a trial whose worker died is run again, from its state; one more loss counts as its own fault (out of memory, say).
    The loss of a whole node does not count: its trials are simply run again."""
    wait_seconds: float = Field(default=600, ge=0)
    """How long a cluster (`--address`) may have no room for even one trial, at the start or later, while nodes are still coming."""

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
