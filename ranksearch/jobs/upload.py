"""The files that a job sends to a cluster: which ones of a folder, and the archive that holds them. Ray is not known here."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ranksearch.errors import UsageError, clipped

Files = Mapping[str, Path]
"""Name in the archive, with forward slashes -> the file here."""

LIMIT = 100 * 1024**2
"""Bytes that Ray's job server takes in one upload (its `DASHBOARD_CLIENT_MAX_SIZE`)."""
SEEN_LIMIT = 10 * LIMIT
"""Files of more bytes than this are not even compressed to see whether they fit the limit."""

LEFT_OUT = (
    ".git", ".hg", ".svn", "__pycache__", "*.py[cod]", ".venv", "venv", ".tox", ".nox", "node_modules", "*.egg-info", ".ipynb_checkpoints",
    ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".idea", ".vscode", ".DS_Store", "mlruns", "mlartifacts", "mlflow.db",
    "wandb", "lightning_logs",
)  # fmt: skip
"""Names of files and folders that a job does not need: version control, environments, caches."""
DATA = ("data", "datasets", "runs")
"""Names of folders that are left out too, unless Python files lie in them: then they are code."""
SECRETS = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    ".netrc",
    ".aws",
    ".ssh",
    ".kube",
    ".ray",
    "id_rsa*",
    "id_ed25519*",
    "*credentials*.json",
    "credentials",
    ".pgpass",
    ".pypirc",
    ".npmrc",
    ".git-credentials",
    "*.p12",
    "*.pfx",
    "*.keystore",
    "*.jks",
    "*service-account*.json",
    "*service_account*.json",
    "*secret*.json",
    "*secret*.y*ml",
    "*secret*.toml",
    "*secret*.txt",
    ".htpasswd",
    ".azure",
    ".gcloud",
    ".gnupg",
    ".docker",
)
"""Names that look like secrets, which stay here: everybody who may use a cluster can read what is uploaded to it."""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path, one of its folders or one of its names matches a shell pattern."""
    parts = name.split("/")
    candidates = [*parts, *("/".join(parts[: i + 1]) for i in range(len(parts)))]
    return any(fnmatch.fnmatchcase(candidate, pattern.rstrip("/")) for candidate in candidates for pattern in patterns)


@cache
def _holds_no_code(folder: Path) -> bool:
    """Whether a folder holds data or studies, or is a virtual or conda environment of any name."""
    if folder.name in DATA:
        return not any(folder.glob("*.py"))
    return (folder / "pyvenv.cfg").is_file() or (folder / "conda-meta").is_dir()


def _walk(root: Path, patterns: Sequence[str]) -> list[str]:
    """Names of the files below `root`; folders that match are not entered."""
    found = []
    for place, folders, files in os.walk(root):
        inside = Path(place).relative_to(root)
        folders[:] = [name for name in folders if not _matches((inside / name).as_posix(), patterns)]
        found += [(inside / name).as_posix() for name in files]
    return found


def _travels(root: Path, name: str, patterns: Sequence[str]) -> bool:
    """Whether a job may need the file `name` below `root`: neither its name nor a folder on the way to it says otherwise."""
    folders = [root.joinpath(*name.split("/")[:depth]) for depth in range(1, name.count("/") + 1)]
    return not _matches(name, patterns) and not any(map(_holds_no_code, folders))


def _known_to_git(root: Path) -> list[str] | None:
    """Names of the files below `root` that git does not ignore; None if git does not know the folder."""
    git = ["git", "-C", str(root)]
    try:
        english = os.environ | {"LC_ALL": "C"}
        asked = subprocess.run([*git, "check-ignore", "-q", "."], capture_output=True, timeout=60, env=english)
        # a repository of another owner, or a damaged one
        if asked.returncode not in (0, 1) and b"not a git repository" not in asked.stderr:
            raise UsageError(
                f"{root} is in a git checkout, but git does not say what it ignores there, which must stay here "
                f"({clipped(asked.stderr.decode(errors='replace'))}): mend that, or name another folder with --working-dir."
            )
        if asked.returncode != 1:
            return None  # not a checkout, or a folder that is ignored as a whole
        listed = subprocess.run(
            [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name] if listed.returncode == 0 else None


def folder_files(root: Path, *, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> dict[str, Path]:
    """The files of a folder to send: those that git does not ignore (all, if it is not a checkout), without what no job needs.

    Args:
        exclude: shell patterns of names or paths that stay here, too.
        include: files or folders below `root` to send whatever the rules say.

    Raises:
        UsageError: something to include is not there.
    """
    patterns = [*LEFT_OUT, *SECRETS, *exclude]
    listed = _known_to_git(root)
    names = _walk(root, patterns) if listed is None else listed
    for name in list(names):
        if (root / name).is_dir() and not (root / name).is_symlink():  # git names a submodule as one entry
            names += [f"{name.rstrip('/')}/{inner}" for inner in _walk(root / name, patterns)]
    names = [name for name in names if _travels(root, name, patterns)]
    asked_for: set[str] = set()
    for wanted in include:
        place = root / wanted
        if not place.exists():
            raise UsageError(f"--include {wanted}: there is no such file or folder in {root}.")
        within = place.resolve().relative_to(root.resolve()) if place.resolve().is_relative_to(root.resolve()) else None
        if within is None:
            raise UsageError(
                f"--include {wanted}: it lies outside {root}; name a folder above both with --working-dir."
            )
        asked_for |= (
            {(within / name).as_posix() for name in _walk(place, ())} if place.is_dir() else {within.as_posix()}
        )
    names += asked_for
    inside = root.resolve()
    return {
        name: root / name
        for name in sorted(set(names))
        if (root / name).is_file() and _stays_within(root / name, inside, patterns, named=name in asked_for)
    }


def _stays_within(file: Path, root: Path, patterns: Sequence[str], *, named: bool) -> bool:
    """Whether a file is what its name says: a link to elsewhere, or to a file that stays here, is not sent unless it is named."""
    real = file.resolve()
    return named or (real.is_relative_to(root) and not _matches(real.relative_to(root).as_posix(), patterns))


def size_text(size: float) -> str:
    """A size in bytes for people, such as `3 KiB` or `1.2 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def largest(files: Files, count: int = 5) -> str:
    """Names what takes most room: large files by name, small ones by their folder."""
    sizes: Counter[str] = Counter()
    for name, path in files.items():
        size = path.stat().st_size
        folder, slash, _ = name.rpartition("/")
        sizes[name if size >= LIMIT // 20 or not slash else f"{folder}/"] += size
    return ", ".join(f"{name} ({size_text(size)})" for name, size in sizes.most_common(count))


def write_archive(files: Files, path: Path) -> int:
    """Packs the files as a zip; returns its size in bytes. The same files give the same bytes, so that a cluster gets them only once.

    Raises:
        UsageError: it is larger than Ray takes, or a file cannot be read; the message names the largest things.
    """
    total = sum(file.stat().st_size for file in files.values())
    if total <= SEEN_LIMIT:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, file in sorted(files.items()):
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.external_attr = (file.stat().st_mode & 0o777) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                try:
                    content = file.read_bytes()
                except OSError as error:
                    raise UsageError(
                        f"{file} cannot be packed ({error}): leave it out with --exclude {name}."
                    ) from error
                archive.writestr(entry, content)
        if (size := path.stat().st_size) <= LIMIT:
            return size
        total = size
    raise UsageError(
        f"The job's files take {size_text(total)}, but Ray's job server takes {size_text(LIMIT)}. The largest: {largest(files)}. "
        f"Leave out what the job does not need with --exclude PATTERN, and put data and weights on the cluster's shared storage."
    )
