"""What this user has said yes to: task files that studies of one's own were started with, and addresses that they were sent to.

A folder that came from somebody else may hold a Python file, and name databases, buckets and servers. Neither is used because a folder says
so: a file runs, and an address gets this user's credentials, only if it is known here, or once the user has confirmed it by `--trust`.

What is known is an empty-handed thing: one small file per yes in `$XDG_STATE_HOME/ranksearch/trusted`, else
`~/.local/state/ranksearch/trusted`, named by a hash and holding a line that says what it is. Removing one takes the yes back.
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
    """Where the yeses are kept; None for a user who has no home, whose every yes is for one command."""
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "ranksearch" / "trusted"
    with suppress(RuntimeError):
        return Path.home() / ".local" / "state" / "ranksearch" / "trusted"
    return None


def remember(kind: str, *parts: str) -> None:
    """Keeps a yes; where the place of yeses cannot be written, it holds for this command alone."""
    folder = state_folder()
    if folder is None or (path := folder / _name(kind, parts)).is_file():
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(f"{kind} {' '.join(parts)}\n", encoding="utf-8", errors="surrogateescape")


def is_known(kind: str, *parts: str) -> bool:
    """Whether this user said yes to it."""
    folder = state_folder()
    with suppress(OSError):
        return folder is not None and (folder / _name(kind, parts)).is_file()
    return False


def _name(kind: str, parts: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join([kind, *parts]).encode(errors="surrogateescape")).hexdigest()


def may_run(file: Path, origin: str) -> bool:
    """Whether a Python file that lies in a study's folder is one that this user runs anyhow.

    Args:
        origin: where the study says that the file came from: beside it lie the modules that it imports.

    It is, where a study of this user's own was started with these bytes from there, or where the file there, outside the folder, is the
    same byte for byte.
    """
    content, there = file.read_bytes(), Path(origin)
    if is_known(FILE, hashlib.sha256(content).hexdigest(), origin):
        return True
    with suppress(OSError, ValueError):
        outside = there.is_absolute() and not there.resolve().is_relative_to(file.parent.resolve())
        return outside and there.is_file() and there.read_bytes() == content
    return False


def refuse_file(file: Path) -> UsageError:
    """What is said of a task file that is not run."""
    return UsageError(
        f"task: {file} came with its folder and is not a file that you have started a study with, so it is not run. Read it; then --trust "
        f"(in Python trust=True) runs it. To load a net without it: ranksearch.load(folder, build=make_net), or "
        f"build='package.module:make_net'; a stored program (pt2) is not taken in its place, since opening one may run code, too."
    )


def refuse_addresses(folder: Path, addresses: list[str]) -> UsageError:
    """What is said of addresses that are not used; they hold no secret that may not be shown."""
    return UsageError(
        f"{folder}: this study names {' and '.join(addresses)}, where you have sent no study of yours: your credentials would go there. "
        f"If that is right: --trust (in Python trust=True), once."
    )
