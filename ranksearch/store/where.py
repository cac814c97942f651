"""The names in a study's folder, finding it, and the front of one that is over. Loads neither torch nor optuna: `front` must be quick."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ranksearch.errors import UsageError, nearest, shortened
from ranksearch.front.verdict import SCHEMA, verdict_of
from ranksearch.places.net_files import holds_net
from ranksearch.places.place import Place, Remote
from ranksearch.places.trust import STUDY_FILE

SPACE, GIVEN, INFO, JOURNAL = "space.yaml", "space.given.yaml", STUDY_FILE, "optuna.journal"
FRONT, TEST = "front.json", "test.json"
REPEATS = "repeats.json"
DENSE_WEIGHTS, CHECKPOINTS, TRIALS = "dense.safetensors", "checkpoints", "trials"
REPORT, FRONT_PNG = "report.html", "front.png"
CURVES, PREVIEW, EXPORTS = "curves.safetensors", "preview", "exports"
LATENCY, MEASURED = "latency.json", "latencies.json"
LOCK, UNFINISHED = ".lock", ".unfinished"
"""The second file is in a folder while a study is being made there."""

AnyPlace = TypeVar("AnyPlace", Path, Remote, Place)


def find_study(name: str, runs: Path) -> Path:
    """The folder of a study given by name (in `runs`) or by path.

    Raises:
        UsageError: there is no such study; the message names the nearest one.
    """
    for folder in (Path(name), runs / name):
        with suppress(OSError, ValueError):  # no file can have such a name: too long, or with a NUL
            if (folder / INFO).is_file():
                return folder.resolve()
    known = sorted(p.parent.name for p in runs.glob(f"*/{INFO}"))
    raise UsageError(f"There is no study {shortened(name)}, neither as a folder nor in {runs}. {nearest(name, known)}")


def lost_nets(folder: Path, trials: Iterable[int]) -> list[int]:
    """Those of a study's complete trials whose nets are lost."""
    return [number for number in sorted(trials) if not holds_net(trial_folder(folder, number))]


def trial_folder(folder: AnyPlace, number: int) -> AnyPlace:
    """Where a trial's net is: `plan.json` and `model.safetensors`."""
    return folder / TRIALS / f"{number:03d}"


def finished_front(folder: Path) -> dict[str, Any] | None:
    """The front's record of a study that is over, as `front.json` keeps it, with the nets that were lost since; None if the study must be
    opened for it.
    """
    record = kept_front(folder)
    if record is None or record["state"] == "running":
        return None
    try:
        if json.loads((folder / INFO).read_text(encoding="utf-8"))["done"] is not True:
            return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    record["lost"] = lost_nets(folder, [row["trial"] for row in record["trials"]])
    return record | {"verdict": verdict_of(record).to_dict()}  # in this version's words


def kept_front(folder: Path) -> dict[str, Any] | None:
    """The front's record as it was last written; None if it is missing, incomplete or of another version."""
    from ranksearch.store.records import FRONT as WHOLE
    from ranksearch.store.records import read_record

    try:
        record = read_record(folder / FRONT, WHOLE)
    except (OSError, UsageError):
        return None
    return record if record.get("schema") == SCHEMA else None
