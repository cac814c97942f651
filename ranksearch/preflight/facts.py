"""What one machine knows of itself, as plain values. Imports only the standard library, so that a worker answers within a second."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import ranksearch
from ranksearch.cluster import mps
from ranksearch.cores import affinity_cores, quota_cores
from ranksearch.places.place import Place, Remote, place_at

PACKAGES = ("torch", "ray", "optuna", "numpy")
TOKEN = "driver"
"""The file that the driver writes in the place of results, for the nodes to read."""
MIB = 2**20


def node_facts(question: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of this machine: versions, resources, and what it sees.

    Args:
        question: `probe`, the folder where the driver has written `token`, as text; `answer`, the file to write there, None for none;
            `data`, the paths that must be here.
    """
    place = place_at(question["probe"])
    return {
        "host": socket.gethostname(),
        "versions": _versions(),
        "cores": affinity_cores(),
        "quota": quota_cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memory_mib": _memory_mib(),
        "gpus": _gpus(),
        "mps": mps.state(),
        "disk_mib": {"temporary": _disk_mib(tempfile.gettempdir(), "free")} | _disk_of(place),
        "shm_mib": _disk_mib("/dev/shm", "total"),
        "missing": missing(question["data"]),
        "results": _exchanged(place, question["token"], question["answer"]),
    }


def clock() -> float:
    """This machine's time, in seconds since 1970."""
    return time.time()


def missing(paths: Sequence[str]) -> list[str]:
    """Those of `paths` that are not on this machine."""
    return [path for path in paths if not Path(path).exists()]


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "ranksearch": _own_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _own_version() -> str:
    """Our version, with a digest of the code: two checkouts may have the same number."""
    root, digest = Path(ranksearch.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{ranksearch.__version__} ({digest.hexdigest()[:8]})"


def _memory_mib() -> int | None:
    """Free memory, also within a container's limit."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) // 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, (int(limit) - int(used)) // MIB)
    except (OSError, ValueError):
        return free


def _gpus() -> list[dict[str, Any]]:
    """Name, free and total memory of each GPU, from nvidia-smi; empty without it."""
    command = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    return [
        {"name": name, "free_mib": int(free), "total_mib": int(total)}
        for name, free, total in rows
        if free.isdecimal() and total.isdecimal()
    ]


def _disk_mib(path: str | Path, what: Literal["free", "total"]) -> int | None:
    try:
        return int(getattr(shutil.disk_usage(path), what)) // MIB
    except OSError:
        return None


def _disk_of(place: Place) -> dict[str, int | None]:
    return {"results": _disk_mib(place, "free")} if isinstance(place, Path) and place.is_dir() else {}


# The place of results ------------------------------------------------------------------------------------------------


def write_token(place: Place, name: str, token: str) -> str | None:
    """Writes a small file; returns what went wrong, or None."""
    try:
        if isinstance(place, Remote):
            (place / name).write(token.encode())
        else:
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(token)
    except OSError as error:
        return str(error)
    return None


def read_token(place: Place, name: str) -> str | None:
    """What `write_token` wrote; None if the file is not seen here.

    Raises:
        OSError: the place itself cannot be read.
    """
    if isinstance(place, Remote):
        data = (place / name).read()
        return None if data is None else data.decode(errors="replace")
    return (place / name).read_text() if (place / name).is_file() else None


def _exchanged(place: Place, token: str, answer: str | None) -> dict[str, Any]:
    """Whether the driver's token is seen here; only then an answer is written, which the driver must see."""
    try:
        sees = read_token(place, TOKEN) == token
    except OSError as error:
        return {"sees": False, "error": str(error)}
    refused = write_token(place, answer, token) if sees and answer is not None else None
    return {"sees": sees, "error": refused}
