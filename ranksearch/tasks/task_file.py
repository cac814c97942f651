"""A task of the user's own: a function in a Python file, `FILE.py:FUNCTION`, that returns a `Task`.

The file is run as a module under a name made of its content and of the place where it was written, so that a copy of it elsewhere (a
study's folder, another machine's worker) gives the same module, and what was pickled with the one is read with the other. Its
`__file__` and what it imports from beside itself stay those of the place where it was written: the same file in two projects is two
modules, each with the data beside it. What the file prints goes to stderr, for stdout is the result's; where it leaves by `sys.exit`, it
has failed.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from ranksearch.errors import RanksearchError, UsageError, first_line, nearest
from ranksearch.tasks.probe import check_task
from ranksearch.tasks.task import Task

TASK_MODULE = "ranksearch_task_"
"""How the name of a task file's module begins."""
_OWN = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")


def is_own(task: str) -> bool:
    """Whether a space's `task` names a Python file and not a task of ours."""
    return task.endswith(".py") or _OWN.fullmatch(task) is not None


@dataclass(frozen=True)
class TaskCode:
    """A task file as it travels: everything that makes its module."""

    source: bytes
    origin: str
    """Absolute path where it was written: its `__file__`."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    @property
    def module_name(self) -> str:
        made_of = hashlib.sha256(self.source + b"\0" + self.origin.encode(errors="surrogateescape"))
        return f"{TASK_MODULE}{made_of.hexdigest()[:16]}"

    def module(self) -> ModuleType:
        """The module, run once per process.

        Raises:
            UsageError: the file raises; the text names its line and the exception.
        """
        if self.module_name in sys.modules:
            return sys.modules[self.module_name]
        made = ModuleType(self.module_name)
        made.__file__ = self.origin
        if (folder := str(Path(self.origin).parent)) not in sys.path:
            sys.path.append(folder)
        sys.modules[self.module_name] = made
        try:
            with _as_a_guest():
                exec(compile(self.source, self.origin, "exec"), made.__dict__)
        except KeyboardInterrupt:
            del sys.modules[self.module_name]
            raise
        except BaseException as error:
            del sys.modules[self.module_name]
            raise UsageError(f"task: {told(error, self.origin)}") from error
        return made


@dataclass(frozen=True)
class TaskFile:
    """Where a task's function is read from: a file, and the place where that file was written, which may be another one."""

    path: Path
    function: str
    origin: Path

    @classmethod
    def parse(cls, text: str, origin: str | None = None) -> TaskFile:
        """Reads `FILE.py:FUNCTION`.

        Raises:
            UsageError: no function is named, or there is no such file; the text names the nearest one.
        """
        found = _OWN.fullmatch(text)
        if found is None:
            raise UsageError(
                f"task: {text!r} names no function: write {text}:make_task, or whatever it is called there."
            )
        path = Path(found["path"]).expanduser().resolve()
        if not path.is_file():
            beside = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
            raise UsageError(f"task: there is no file {str(path)!r}. {nearest(str(path), beside)}")
        return cls(path, found["function"], Path(origin) if origin is not None else path)

    @property
    def code(self) -> TaskCode:
        return TaskCode(self.path.read_bytes(), str(self.origin))

    def make(self) -> Task:
        """The task that the function returns, tried out on a batch; made once per process, however often it is asked for.

        Raises:
            UsageError: the file, its function or what that returns cannot be used; the text says why in one sentence.
        """
        return _made(self.code, self.function, self.path.stem)


@lru_cache(maxsize=4)
def _made(code: TaskCode, function: str, name: str) -> Task:
    module = code.module()
    make = getattr(module, function, None)
    if not callable(make):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UsageError(f"task: {code.origin} has no function {function!r}. {nearest(function, own)}")
    try:
        with _as_a_guest():
            task = make()
    except KeyboardInterrupt:
        raise
    except UsageError as error:
        raise UsageError(f"task: {code.origin}: {function}: {error}") from error
    except BaseException as error:
        raise UsageError(f"task: {function}() raised: {told(error, code.origin)}") from error
    if not isinstance(task, Task):
        raise UsageError(
            f"task: {code.origin}: {function}() returned a {type(task).__name__}: expected a ranksearch.Task(model=…, train=…, val=…)."
        )
    check_task(task)
    return replace(task, name=name) if task.name == "own" else task


@contextmanager
def told_of_user_code() -> Iterator[None]:
    """Turns what a task file raises outside of a trial (in its loss while the dense net is scored, say) into a sentence with its line.

    Raises:
        UsageError: an exception went through a task file, `sys.exit` among them; what did not is raised as it is.
    """
    try:
        yield
    except (KeyboardInterrupt, RanksearchError):
        raise
    except BaseException as error:
        frames = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = [found for found in frames if str(found.get("__name__", "")).startswith(TASK_MODULE)]
        if not own:
            raise
        raise UsageError(f"task: {told(error, str(own[-1].get('__file__')))}") from error


@contextmanager
def _as_a_guest() -> Iterator[None]:
    """Surrounds a user's code: what it prints goes to stderr; it finds no arguments but the program's name, since the command line is
    ours; and the working directory, in which a study's relative folders lie, is afterwards what it was."""
    arguments, here = sys.argv, Path.cwd()
    sys.argv = arguments[:1]
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv = arguments
        os.chdir(here)


def told(error: BaseException, origin: str) -> str:
    """An exception of a user's file in one line, with the last line of that file that it went through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == origin]
    at = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{origin}{f', line {at}' if at else ''}: {type(error).__name__}: {first_line(error)}"
