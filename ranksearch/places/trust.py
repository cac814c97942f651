"""What this user has confirmed: task files that the user started studies with, and addresses that the user sent studies to.

A folder that came from somebody else may hold a Python file, and name databases, buckets and servers. Neither is used just because a folder
says so: a file runs, and an address gets this user's credentials, only if it is known here, or once the user confirms it by `--trust`.

Each confirmation is one small file in `$XDG_STATE_HOME/ranksearch/trusted`, else `~/.local/state/ranksearch/trusted`, named by a hash, with
a line that says what was confirmed. Removing the file takes the confirmation back.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ranksearch.errors import UsageError

STUDY_FILE = "study.json"
"""A folder with it is a study's."""
FILE, ADDRESS = "file", "address"


def state_folder() -> Path | None:
    """Where confirmations are kept; None for a user without a home folder, whose confirmations hold for one command."""
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "ranksearch" / "trusted"
    with suppress(RuntimeError):
        return Path.home() / ".local" / "state" / "ranksearch" / "trusted"
    return None


def remember(kind: str, *parts: str) -> None:
    """Keeps a confirmation; if its file cannot be written, it holds only for this command."""
    folder = state_folder()
    if folder is None or (path := folder / _name(kind, parts)).is_file():
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(f"{kind} {' '.join(parts)}\n", encoding="utf-8", errors="surrogateescape")


def is_known(kind: str, *parts: str) -> bool:
    """Whether this user has confirmed it."""
    folder = state_folder()
    with suppress(OSError):
        return folder is not None and (folder / _name(kind, parts)).is_file()
    return False


def _name(kind: str, parts: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join([kind, *parts]).encode(errors="surrogateescape")).hexdigest()


def may_run(file: Path, origin: str) -> bool:
    """Whether a Python file in a study's folder is one that this user runs anyway.

    Args:
        origin: where the study says that the file came from; the modules that it imports lie beside it there.

    It is if this user started a study with these bytes from there, or if the file there, outside the folder, is the same byte for byte.
    """
    content, there = file.read_bytes(), Path(origin)
    if is_known(FILE, hashlib.sha256(content).hexdigest(), origin):
        return True
    with suppress(OSError, ValueError):
        outside = there.is_absolute() and not there.resolve().is_relative_to(file.parent.resolve())
        return outside and there.is_file() and there.read_bytes() == content
    return False


def refuse_file(file: Path) -> UsageError:
    """The error for a task file that is not run."""
    return UsageError(
        f"task: {file} came with its folder and is not a file that you have started a study with, so it is not run. Read it; then --trust "
        f"(in Python trust=True) runs it. To load a net without it: ranksearch.load(folder, build=make_net), or "
        f"build='package.module:make_net'; a stored program (pt2) is not used instead, since opening one may run code, too."
    )


def refuse_addresses(folder: Path, addresses: list[str]) -> UsageError:
    """The error for addresses that are not used; `addresses` are shown, so they must hold no secrets."""
    return UsageError(
        f"{folder}: this study names {' and '.join(addresses)}, to which you have sent no study of yours: your credentials would go there. "
        f"If that is what you want, add --trust (in Python trust=True) once."
    )
