"""Makes, and reads again, what a study's folder holds before its first trial."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import safetensors.torch
import yaml

from ranksearch.deploy.stopwatch import Stopwatch
from ranksearch.errors import UsageError
from ranksearch.front.front import directions_of
from ranksearch.front.layer_costs import layer_records
from ranksearch.places.files import settle
from ranksearch.places.trust import FILE, remember
from ranksearch.search.allocated import Allocated
from ranksearch.search.groups import Grouping, grouping_of
from ranksearch.search.opening import first_points
from ranksearch.search.parametrize import Opening
from ranksearch.search.path import is_nested, nested_openings
from ranksearch.search.workbench import Workbench
from ranksearch.space.reading import load_yaml, parse_space
from ranksearch.space.space import Space
from ranksearch.store.addresses import remember_addresses
from ranksearch.store.folder import keep_task_file
from ranksearch.store.provenance import provenance
from ranksearch.store.records import STUDY, read_record
from ranksearch.store.storage import make_study
from ranksearch.store.where import DENSE_WEIGHTS, INFO, SPACE, UNFINISHED
from ranksearch.study.proposals import allocated, form_of
from ranksearch.tasks import is_own
from ranksearch.tasks.task import Task
from ranksearch.trial.metric import Metric
from ranksearch.trial.recipe import BEFORE


def begin(
    folder: Path, space: Space, bench: Workbench, val_accuracy: float
) -> tuple[Space, dict[str, Any], optuna.Study, list[Opening]]:
    """Begins a study in an empty folder; returns its space as kept there, what `study.json` says, Optuna's study, and its first points.

    This writes the dense net's weights, the task's file and the journal; the caller writes the rest.
    """
    if space.data is not None:  # the study is opened from other working directories too
        space = space.model_copy(update={"data": str(Path(space.data).expanduser().resolve())})
    space = _grouped(bench.settled(space), grouping_of(space))
    (folder / UNFINISHED).touch()
    own = keep_task_file(space, folder)
    if own is not None:
        remember(FILE, own["sha256"], own["origin"])
    space = space.kept_in(folder, own, trust=True)
    remember_addresses(space)
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in bench.dense.items()}, folder / DENSE_WEIGHTS)
    settle(folder / DENSE_WEIGHTS)
    dense = {"val_accuracy": val_accuracy, "test_accuracy": None} | asdict(bench.curves.dense)
    metric = Metric.of(bench.task, val_accuracy)
    metric.limit(space.quality)  # refuses a limit on another metric, or beyond it
    form = form_of(space, bench)
    known = form if isinstance(form, Allocated) else allocated(space, bench)
    opening = first_points(space, bench.curves, form, known, scored=bench.prediction is not None)
    if is_nested(space):
        opening = [*nested_openings(space, bench), *opening]
    info = {
        "study": space.name, "id": uuid.uuid4().hex, "metric": metric.to_dict(), "task_file": own, "dense": dense,
        "samples": samples_of(bench.task), "seed": space.search.seed, "provenance": provenance(folder),
        "opened_with": dict(Counter(point.allocator for point in opening)), "layers": bench.layer_facts(),
        "prediction": dict(bench.prediction.scores) if bench.prediction is not None else None,
        "layer_costs": layer_records(bench.net.layers, {}),
        "latency_key": Stopwatch(space.latency.as_setting()).key if space.has_latency else None,
    }  # fmt: skip
    study = make_study(space, folder, info, directions_of(space.search.objectives, metric))
    return space, info, study, opening


def _grouped(space: Space, grouping: Grouping) -> Space:
    """Returns the space with its grouping filled in: a study keeps the one that it began with."""
    groups = grouping if isinstance(grouping, str) else {name: list(patterns) for name, patterns in grouping.items()}
    return space.model_copy(update={"search": space.search.model_copy(update={"groups": groups})})


def samples_of(task: Task) -> dict[str, int | None]:
    """The number of samples for choosing nets, and for scoring the front at the end."""
    return {"validation": len(task.val), "test": None if task.test is None else len(task.test)}


def space_text(space: Space) -> str:
    """A study's space as its folder keeps it, in YAML; the task's file is named as the copy there, wherever the folder is moved."""
    values = space.model_dump()
    if is_own(space.task):
        values["task"] = Path(space.task).name
    return yaml.safe_dump(values, sort_keys=False)


def _as_it_was(values: Any) -> Any:
    """A study's space with what its trials did before there was a key for it: a study goes on as it began."""
    recipe = values.get("recipe") if isinstance(values, dict) else None
    return {**values, "recipe": {**BEFORE, **recipe}} if isinstance(recipe, dict) else values


def read_folder(folder: Path, *, trust: bool = False) -> tuple[Space, dict[str, Any]]:
    """A study's space and what `study.json` says.

    Args:
        trust: whether a task file that lies in the folder may run, whoever wrote it.

    Raises:
        UsageError: a file is missing or damaged.
    """
    try:
        info = read_record(folder / INFO, STUDY)
        space = parse_space(_as_it_was(load_yaml(folder / SPACE)), str(folder / SPACE))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is not a readable study: {Path(error.filename).name} is missing.") from None
    own = info.get("task_file")
    if own is None and is_own(space.task):
        raise UsageError(
            f"{folder / INFO}: task_file: expected the record of {space.task!r}, which {SPACE} names: a study runs only its "
            f"own copy of a file."
        )
    if space.search.groups is None:  # a study from before there were blocks
        space = _grouped(space, "stage" if space.search.parametrization == "allocated" else "layer")
    return space.kept_in(folder, own, trust=trust), info
