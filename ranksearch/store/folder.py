"""Where a study lives on disk: the names in its folder, finding it, a free name for a new one.

runs/NAME/space.yaml        the resolved space          runs/NAME/front.json   the front, written whenever it changes
runs/NAME/space.given.yaml  the space as it was given   runs/NAME/trials/007/  plan.json, model.safetensors
runs/NAME/study.json        dense net, versions, seed   runs/NAME/test.json    test accuracies of the front, at the end
runs/NAME/optuna.journal    Optuna's storage            runs/NAME/mlflow.json  which runs of which MLflow store mirror it
runs/NAME/FILE.py           the file of the user's own task, as it was when the study was made
runs/NAME/latency.json      times of its layers         runs/NAME/latencies.json  of the front's nets, measured at the end
runs/NAME/report.html       figures and tables, at the end     runs/NAME/front.png      the front's picture
runs/NAME/checkpoints/      states of running trials    runs/NAME/exports/     nets in the formats of other runtimes

With `storage.results`, workers write trials/ and checkpoints/ there, and finished nets are brought here; with `storage.optuna`, a database
stands in for the journal.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from ranksearch.errors import UsageError
from ranksearch.places.files import settle
from ranksearch.places.place import Place, Remote
from ranksearch.space.space import Space
from ranksearch.store.where import CURVES, EXPORTS, FRONT, INFO, LOCK, PREVIEW, TRIALS, UNFINISHED, find_study


def place_of_results(space: Space, folder: Path, info: dict[str, Any]) -> Place:
    """Where workers write nets and states: the study's folder, or this study's own folder in `storage.results`."""
    where = space.storage.results
    return folder if where is None else Remote(where) / f"{info['study']}-{info['id'][:8]}"


def study_around(folder: Path) -> Path | None:
    """The study that the folder of a trial or an export lies in, if it has a task of the user's own; else None."""
    study = folder.resolve().parent.parent
    if folder.resolve().parent.name not in (TRIALS, EXPORTS) or not (study / INFO).is_file():
        return None
    try:
        own = json.loads((study / INFO).read_text(encoding="utf-8")).get("task_file")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return study if own else None


def find_front(where: str, runs: Path) -> Path:
    """The front file of a study given by name or folder, or the file itself.

    Raises:
        UsageError: there is none; the message names the nearest study.
    """
    if Path(where).expanduser().is_file():
        return Path(where).expanduser().resolve()
    try:
        path = find_study(where, runs) / FRONT
    except UsageError as error:
        raise UsageError(f"warm start: {error}") from None
    if not path.is_file():
        raise UsageError(f"warm start: the study in {path.parent} has no {FRONT} yet: none of its trials has finished.")
    return path


def in_the_way(folder: Path) -> list[Path]:
    """What a new study's folder must not hold: everything but what a preview leaves there."""
    if not folder.is_dir():
        return [folder] if folder.exists() else []
    return [path for path in folder.iterdir() if path.name not in (PREVIEW, CURVES, LOCK)]


def clear(folder: Path) -> None:
    """Removes a study that was only half made, which would be in the way of the next try; what a preview left stays."""
    for path in in_the_way(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if {path.name for path in folder.iterdir()} <= {LOCK}:
        shutil.rmtree(folder)


def new_folder(runs: Path, name: str) -> Path:
    """The new study's folder; raises UsageError if its name is taken, and proposes a free one.

    The remains of a driver that was killed while it made a study of that name are removed: they hold nothing yet.
    """
    folder = runs / name
    if (folder / UNFINISHED).is_file() and not (folder / INFO).is_file():
        with locked(folder):  # a process that is making it right now holds the lock
            clear(folder)
    if not (folder / INFO).is_file() and in_the_way(folder):
        raise UsageError(
            f"{folder} is there, but is not a study ({INFO} is missing): remove it, or take another --name."
        )
    if (folder / INFO).is_file():
        free = next(f"{name}-{i}" for i in range(2, 10_000) if not (runs / f"{name}-{i}").exists())
        raise UsageError(
            f"There is a study {name!r} in {runs} already, and it is kept. Continue it with `ranksearch resume "
            f"{name}`, or start another one with `--name {free}`."
        )
    return folder


def keep_task_file(space: Space, folder: Path) -> dict[str, str] | None:
    """Copies the file of the user's own task to the study's folder; returns its record for `study.json`, None for a task of ours."""
    file = space.kind().own
    if file is None:
        return None
    code = file.code
    (folder / file.path.name).write_bytes(code.source)
    settle(folder / file.path.name)
    return {"file": file.path.name, "function": file.function, "sha256": code.sha256, "origin": code.origin}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a study for this process: two drivers would settle each other's trials. The kernel lets go when the process dies.

    Raises:
        UsageError: another process is running the study.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(
            f"{folder} is being run by another process: wait until that ends; `ranksearch front` works meanwhile."
        ) from None
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be locked ({error.strerror or error}): run the study where its folder can be written."
        ) from error
    try:
        yield
    finally:
        lock.release()
