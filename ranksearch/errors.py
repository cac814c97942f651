"""The errors that a user can cause or meet, and the sentence that names the nearest valid value.

The command line turns `UsageError` into exit code 2 and `StudyError` into exit code 1, one message each, no traceback.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 4, 6, 80, 80


class RanksearchError(Exception):
    """Base of every error that ranksearch raises on purpose; its text is written for the user."""


class UsageError(RanksearchError, ValueError):
    """The input is wrong: a file, a key, a value, a name. Nothing was started and nothing is lost."""


class StudyError(RanksearchError, RuntimeError):
    """The study could not be finished. What was finished is on disk."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: the process is being stopped from outside, by a batch system, a cluster or a spot market. It ends a run as Ctrl-C does."""


class NonFiniteError(RanksearchError, ValueError):
    """Weights hold NaN or infinite values, so they have no SVD; in a trial this is divergence."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text; its class where it has none, a sentence where making it raises, and for `sys.exit`."""
    if isinstance(error, SystemExit):
        return f"it left by sys.exit({error.code!r})"
    try:
        text = str(error).strip()
    except Exception as inner:
        return f"its text cannot be shown: __str__ raised {type(inner).__name__}"
    return text.splitlines()[0] if text else f"{type(error).__name__} without a message"


def clipped(text: str, most: int = 160) -> str:
    """A text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def shortened(value: Any) -> str:
    """A value as a sentence may show it, in at most 80 characters, whatever it holds: a list of itself, a huge number."""
    try:
        return clipped(_SHORT.repr(value), 80)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


def nearest(name: str, valid: Iterable[str], *, shown: int = 12) -> str:
    """A sentence that helps from a wrong name to a right one: the nearest valid name and the list of them."""
    names = sorted(set(valid))
    listed = ", ".join(names[:shown]) + (f", … ({len(names)} in all)" if len(names) > shown else "")
    same = [valid for valid in names if valid.lower() == str(name).lower()]
    close = same or difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    return f"Did you mean {close[0]!r}? Valid: {listed}." if close else f"Valid: {listed or 'none'}."
