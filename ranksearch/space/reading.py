"""Reading a search space from a file and the command line: every mistake gets one sentence with its place and the nearest valid name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ranksearch.allocate.budget import Budgets, assignments
from ranksearch.costs import COSTS, same_cost
from ranksearch.errors import UsageError, clipped, nearest, shortened
from ranksearch.places.files import read_bytes
from ranksearch.places.trust import STUDY_FILE, may_run, refuse_file
from ranksearch.space.quality import Limits, limits_of
from ranksearch.space.resources import SPELLINGS, one_spelling
from ranksearch.space.space import Space
from ranksearch.tasks import is_own


def _fields_at(path: Sequence[Any]) -> list[str]:
    """Field names of the schema's model that holds the key at `path`."""
    model: Any = Space
    for key in path[:-1]:
        if isinstance(key, int):
            continue
        annotation = model.model_fields[key].annotation if key in getattr(model, "model_fields", {}) else None
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = annotation if isinstance(annotation, type) else (args[0] if args else None)
    return list(getattr(model, "model_fields", {}))


def _sentence(error: Mapping[str, Any]) -> str:
    path = [
        part for part in error["loc"] if not (isinstance(part, str) and ("[" in part or part in ("Range", "Choices")))
    ]
    where = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such key. {_nearest_key(str(path[-1]), _fields_at(path))}"
    if error["type"] == "missing":
        return f"{where}: this key is missing."
    if error["type"] == "literal_error":
        expected = [word.strip("' ") for word in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        given = error["input"]
        return f"{where}: {shortened(given)} is not possible. {nearest(clipped(given) if isinstance(given, str) else '', expected)}"
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: {shortened(error['input'])} may hold only letters, digits, '.', '_' and '-', and begins with a letter or digit."
    message = error["msg"].removeprefix("Value error, ")
    if message == "this key is missing.":
        return f"{where}: {message}"
    given = "" if error["type"] == "value_error" else f" (got {shortened(error['input'])})"
    where = where or "space"
    return f"{where}: {message[0].lower() + message[1:]}{given}"


ALSO_CALLED = {
    "learning_rate": "lr", "batch": "batch_size", "batchsize": "batch_size", "epochs": "steps", "iterations": "steps",
    "n_trials": "trials", "max_trials": "trials", "wd": "weight_decay", "l2": "weight_decay", "dataset": "task", "network": "model",
    "net": "model", "weights": "checkpoint", "flops": "budgets", "budget": "budgets", "objective": "objectives", "algorithm": "sampler",
}  # fmt: skip
"""Another name of a key, too unlike for `nearest` -> its name here."""


def _nearest_key(name: str, valid: Iterable[str]) -> str:
    """Does what `nearest` does, and knows what others call a key."""
    names = list(valid)
    other = ALSO_CALLED.get(name.lower())
    return nearest(name, names) if other not in names else f"Did you mean {other!r}? Valid: {', '.join(sorted(names))}."


def parse_space(data: Any, source: str) -> Space:
    """Validates the content of a space.

    Raises:
        UsageError: one sentence per mistake, each with its place in the file and the nearest valid name.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{source}: a search space is a mapping of keys, got {type(data).__name__}.")
    try:
        return Space.model_validate(data)
    except ValidationError as error:
        sentences = list(dict.fromkeys(_sentence(e) for e in error.errors()))
        raise UsageError("\n".join(f"{source}: {sentence}" for sentence in sentences)) from None


SEARCHED_BY = {"low", "high", "choices"}
"""Keys of a setting that is searched; a mapping without them is a group of settings."""
Settings = Sequence[str] | Mapping[str, Any]
"""Settings as one may write them: ["recipe.steps=100"], or Python values, {"recipe": {"steps": 100}} and {"recipe.steps": 100} alike."""


def setting_texts(settings: Settings, prefix: str = "") -> list[str]:
    """Returns every setting as "key=value", however they were written; a mapping goes down to the keys that hold values."""
    if not isinstance(settings, Mapping):
        return [settings] if isinstance(settings, str) else list(settings)
    found = []
    for name, value in settings.items():
        group = isinstance(value, Mapping) and not SEARCHED_BY & value.keys()
        found += setting_texts(value, f"{prefix}{name}.") if group else [f"{prefix}{name}={json.dumps(value)}"]
    return found


class _Numbers(yaml.SafeLoader):
    """Reads `1e-3` as a number, as YAML 1.2 does; PyYAML's YAML 1.1 calls it a text."""


_Numbers.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def yaml_value(text: str) -> Any:
    """What a YAML text holds: only plain values; `1e-3` is a number."""
    return yaml.load(text, _Numbers)


def _set(data: dict[str, Any], assignment: str) -> None:
    key, sign, text = assignment.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {assignment}: expected key=value, such as recipe.steps=200.")
    *parents, last = key.split(".")
    last = SPELLINGS.get(last, last) if parents == ["resources"] else last
    for parent in parents:
        if data.get(parent) is None:  # missing, or left empty in the file
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise UsageError(f"--set {assignment}: {parent!r} is a value, not a group of keys.")
    try:
        data[last] = yaml_value(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise UsageError(f"--set {key}: {shortened(text)} is no YAML value.") from error


def load_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UsageError: it cannot be read, or is not YAML.
        FileNotFoundError: there is none.
    """
    raw = read_bytes(path)
    try:
        return yaml_value(raw.decode("utf-8"))
    except RecursionError:
        raise UsageError(f"{path}: no valid YAML: lists or mappings nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        raise UsageError(f"{path}: no valid YAML: {clipped(str(error), 400)}") from error


def _placed(task: Any, folder: Path, *, trust: bool) -> Any:
    """Returns the user's own task by its absolute path: beside the space file, else in the working directory.

    Raises:
        UsageError: there is no such file, or the space is a study's and its file is not one that this user runs anyway.
    """
    if not isinstance(task, str) or not is_own(task):
        return task
    file, colon, function = task.rpartition(":") if not task.endswith(".py") else (task, "", "")
    places = [(base / Path(file).expanduser()).resolve() for base in (folder, Path())]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        beside = [p.name for place in dict.fromkeys(p.parent for p in places) for p in place.glob("*.py")]
        looked = " and ".join(dict.fromkeys(str(place.parent) for place in places))
        raise UsageError(f"task: there is no file {Path(file).name!r} in {looked}. {nearest(Path(file).name, beside)}")
    of_a_study = any((place / STUDY_FILE).is_file() for place in (folder, found.parent))
    if of_a_study and not trust and not may_run(found, _origin(found)):
        raise refuse_file(found)
    return f"{found}{colon}{function}"


def _origin(file: Path) -> str:
    """Where a file in a study's folder came from, as the study says; the file itself if it says nothing."""
    try:
        return str(json.loads((file.parent / STUDY_FILE).read_text(encoding="utf-8"))["task_file"]["origin"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(file)


def read_space(
    path: str | Path,
    *,
    budgets: Budgets = (),
    settings: Settings = (),
    trials: int | None = None,
    name: str | None = None,
    warm_start: Sequence[str] = (),
    trust: bool = False,
    at_least: Limits = (),
    objective: str | None = None,
) -> Space:
    """Reads a space file and lays the command line's values over it: `budgets`, `settings` and `at_least` are "key=value".

    A budget given here replaces the file's budget on the same cost (macs and flops are one cost); others stay.

    Args:
        trust: whether a task file that lies in a study's folder may run, whoever wrote it.

    Raises:
        UsageError: there is no such file, it is not YAML, or the schema refuses a value.
    """
    path = Path(path)
    if not path.is_file():
        known = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise UsageError(f"There is no search space {str(path)!r}. {nearest(str(path), known)}")
    data = load_yaml(path)
    text = path.read_text(encoding="utf-8")
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a search space is a mapping of keys, got {type(data).__name__}.")
    try:
        data |= {"resources": one_spelling(data["resources"])} if "resources" in data else {}
    except ValueError as error:
        raise UsageError(f"{path}: resources: {error}") from error
    settings, budgets = setting_texts(settings), assignments(budgets)
    for assignment in settings:
        _set(data, assignment)
    for assignment in budgets:
        cost, sign, text = assignment.partition("=")
        if not sign:
            raise UsageError(f"--budget {assignment}: expected cost=limit, such as flops=50% or size=1MiB.")
        same = {name for name in COSTS if cost in COSTS and same_cost(name, cost)} | {cost}
        if not isinstance(data.get("budgets") or {}, dict):
            raise UsageError(
                f"{path}: budgets: expected cost: limit pairs such as flops: 50%, got {data['budgets']!r}."
            )
        kept = {key: value for key, value in (data.get("budgets") or {}).items() if key not in same}
        data["budgets"] = {**kept, cost: text}
    if at_least:
        data["at_least"] = limits_of(at_least)
    if objective is not None:
        _set(data, f"search.objectives={json.dumps(objective)}")
    if trials is not None:
        _set(data, f"search.trials={trials}")
    if name is not None:
        data["name"] = name
    if warm_start:
        _set(data, f"search.warm_start={json.dumps(list(warm_start))}")
    space = parse_space(data | {"task": _placed(data.get("task"), path.parent, trust=trust)}, str(path))
    options = [f"--budget {budget}" for budget in budgets] + [f"--set {setting}" for setting in settings]
    options += [f"--trials {trials}"] * (trials is not None) + [f"--name {name}"] * (name is not None)
    options += [f"--at-least {name}={limit}" for name, limit in (limits_of(at_least) if at_least else {}).items()]
    options += [f"--objective {objective}"] * (objective is not None)
    options += [f"--warm-start {earlier}" for earlier in warm_start]
    space._given = "".join(f"# {line}\n" for line in [f"{path.name}, as it was given", *options]) + text
    return space
