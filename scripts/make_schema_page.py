"""Writes docs/search_space.md: every key of a search space with type, range, default, whether it may be searched, and what it is.

All of it is read from the schema (`ranksearch/space/`): annotations, defaults, and the docstring under each key.

    python scripts/make_schema_page.py            writes the page
    python scripts/make_schema_page.py --check    exit code 1 where the page is not what would be written
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ranksearch.space.settings import Choices, OneOf, Range, Within
from ranksearch.space.space import Space

PAGE = Path(__file__).parent.parent / "docs" / "search_space.md"
COMMAND = "python scripts/make_schema_page.py"
HEADER = f"""# The search space, key by key

A search space is a YAML file; the [commented ones](../search_spaces) are the place to begin, and `ranksearch check FILE` validates one.
Unknown keys are errors. `--set KEY=VALUE` lays a value over the file's, such as `--set recipe.steps=200`. This page is written from the
schema by `{COMMAND}`.

A key that is marked *searched* is fixed (`lr: 0.05`) or a distribution that Optuna draws from: `lr: {{low: 0.01, high: 0.1, log: true}}`
or `schedule: {{choices: [cosine, step]}}`. A `default` in it is what the first trials use; left out, that is the middle of a range, or
the first choice.
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", type(None): "nothing"}
BOUNDS = (("ge", "≥ {}"), ("gt", "> {}"), ("le", "≤ {}"), ("lt", "< {}"))


@dataclass(frozen=True)
class Key:
    """A key of a group: what a line of its table says."""

    name: str
    kind: str
    default: str
    searched: bool
    text: str


@dataclass(frozen=True)
class Group:
    """A part of a space with keys of its own, such as `recipe.projection`; the space itself has the path ""."""

    path: str
    text: str
    keys: tuple[Key, ...]


def groups(model: type[BaseModel] = Space, path: str = "") -> Iterator[Group]:
    """The group of `model`, then those inside it."""
    texts = docstrings(model)
    inner, keys = [], []
    for name, field in model.model_fields.items():
        where = f"{path}.{name}" if path else name
        if (group := _group_of(field.annotation)) is not None:
            listed = get_origin(field.annotation) is list
            inner.append((group, f"{where}.N" if listed else where))
            if not listed and field.default is not None:
                continue  # its own table says it all
        keys.append(Key(where, _kind(field), _default(field), _within(field) is not None, texts.get(name, "")))
    own = ast.get_docstring(_class_node(model)) or ""
    yield Group(path, _one_line(own), tuple(keys))
    for group, where in inner:
        yield from groups(group, where)


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Field -> the docstring under it, on one line."""
    body = _class_node(model).body
    found = {}
    for statement, behind in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            and isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str)
        ):  # fmt: skip
            found[statement.target.id] = _one_line(behind.value.value)
    return found


def page() -> str:
    """The whole page."""
    parts = [HEADER]
    for group in groups():
        parts.append(f"## `{group.path}`\n\n{group.text}\n" if group.path else "## The file\n")
        rows = ["| key | type | default | searched | |", "|---|---|---|---|---|"]
        for key in group.keys:
            mark = "yes" if key.searched else ""
            rows.append(
                f"| `{key.name}` | {key.kind} | {key.default} | {mark} | {key.text.replace('|', chr(92) + '|')} |"
            )
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _class_node(model: type[BaseModel]) -> ast.ClassDef:
    path = importlib.import_module(model.__module__).__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == model.__name__)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _group_of(annotation: Any) -> type[BaseModel] | None:
    """The group that a field holds, by itself, in a list, or where it may be left out; a distribution is none."""
    members = [annotation, *get_args(annotation)]
    found = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel) and m not in (Range, Choices)]
    return found[0] if found else None


def _within(field: FieldInfo) -> Within | OneOf | None:
    """What a searchable field may be; None for one that is fixed."""
    marks = [getattr(mark, "func", None) for mark in field.metadata]
    return next((mark for mark in marks if isinstance(mark, Within | OneOf)), None)


def _kind(field: FieldInfo) -> str:
    within = _within(field)
    if isinstance(within, OneOf):
        return ", ".join(f"`{_yaml(name)}`" for name in within.names)
    if isinstance(within, Within):
        return f"{'whole number' if within.whole else 'number'}, {within.low:g} to {within.high:,g}"
    bounds = [text.format(f"{getattr(m, name):,}") for m in field.metadata for name, text in BOUNDS if hasattr(m, name)]
    return ", ".join([_named(field.annotation), *bounds])


def _named(annotation: Any) -> str:
    """An annotation in words."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{_yaml(member)}`" for member in members)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_named(member) for member in members if member is not type(None)))
    if origin is Annotated:
        return _named(members[0])
    if origin is list:
        return f"list of: {_named(members[0])}"
    if origin is dict:
        return f"mapping of {_named(members[0])} to {_named(members[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping, as below"
    return NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "left out"
    if isinstance(value, Range | Choices):
        value = value.model_dump(exclude_none=True)
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value as a space writes it, on one line."""
    if isinstance(value, list | dict):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip()
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.name} is not what the schema says: {COMMAND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
