"""What a study's folder holds before its first trial is asked for, made and read again."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import safetensors.torch
import yaml

from ranksearch.compress.stopwatch import Stopwatch
from ranksearch.search.allocated import Allocated
from ranksearch.search.opening import first_points
from ranksearch.search.parametrize import Opening
from ranksearch.search.workbench import Workbench
from ranksearch.space.reading import parse_space
from ranksearch.space.space import Space
from ranksearch.study.folder import DENSE_WEIGHTS, INFO, SPACE, UNFINISHED, keep_task_file
from ranksearch.study.front import directions_of
from ranksearch.study.layer_costs import layer_records
from ranksearch.study.proposals import allocated, form_of
from ranksearch.study.provenance import provenance
from ranksearch.study.storage import make_study
from ranksearch.tasks import is_own
from ranksearch.tasks.task import Task
from ranksearch.trial.metric import Metric


def begin(
    folder: Path, space: Space, bench: Workbench, val_accuracy: float
) -> tuple[Space, dict[str, Any], optuna.Study, list[Opening]]:
    """Begins a study in an empty folder: its space as it is kept there, what `study.json` says, Optuna's study, its first points.

    The dense net's weights, the task's file and the journal are written; whoever called writes the rest.
    """
    if space.data is not None:  # the study is opened from other working directories too
        space = space.model_copy(update={"data": str(Path(space.data).expanduser().resolve())})
    space = bench.settled(space)
    (folder / UNFINISHED).touch()
    own = keep_task_file(space, folder)
    space = space.kept_in(folder, own)
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in bench.dense.items()}, folder / DENSE_WEIGHTS)
    dense = {"val_accuracy": val_accuracy, "test_accuracy": None} | asdict(bench.curves.dense)
    metric = Metric.of(bench.task, val_accuracy)
    form = form_of(space, bench)
    known = form if isinstance(form, Allocated) else allocated(space, bench)
    opening = first_points(space, bench.curves, form, known)
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


def samples_of(task: Task) -> dict[str, int | None]:
    """How many samples nets are chosen by, and how many the front is scored on at the end."""
    return {"validation": len(task.val), "test": None if task.test is None else len(task.test)}


def space_text(space: Space) -> str:
    """A study's space as its folder keeps it, in YAML; the task's file is the copy there, wherever that is moved."""
    values = space.model_dump()
    if is_own(space.task):
        values["task"] = Path(space.task).name
    return yaml.safe_dump(values, sort_keys=False)


def read_folder(folder: Path) -> tuple[Space, dict[str, Any]]:
    """A study's space and what `study.json` says.

    Raises:
        OSError, ValueError, yaml.YAMLError, KeyError: a file is missing or damaged.
    """
    info = json.loads((folder / INFO).read_text())
    space = parse_space(yaml.safe_load((folder / SPACE).read_text()), str(folder / SPACE))
    return space.kept_in(folder, info.get("task_file")), info
