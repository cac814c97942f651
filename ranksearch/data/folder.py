"""Where data, checkpoints and trained dense nets lie: `$RANKSEARCH_DATA`, else `~/.cache/ranksearch`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ranksearch.errors import UsageError


def data_folder(override: str | None = None) -> Path:
    """The data folder: what the space or `--set data=` says, else `$RANKSEARCH_DATA`, else `~/.cache/ranksearch`; for a user without a
    home, as in a container, a folder in the system's temporary one."""
    named = Path(override or os.environ.get("RANKSEARCH_DATA") or "~/.cache/ranksearch")
    try:
        return named.expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"ranksearch-{os.getuid()}"


def writable_cache(folder: Path, fallback: Path) -> Path:
    """`folder`/dense where it can be written, else `fallback`: a read-only home must not stop a study.

    Raises:
        UsageError: neither can be written.
    """
    for candidate in (folder / "dense", fallback):
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=candidate):
                return candidate
        except OSError:
            continue
    raise UsageError(
        f"Neither {folder / 'dense'} nor {fallback} can be written; name another place by RANKSEARCH_DATA or --runs."
    )
