"""Where a result comes from: versions, device, git revision of the working directory, time."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("ranksearch", "torch", "optuna", "ray", "mlflow", "numpy")


def device_name() -> str:
    """The GPU's name, else the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The processor's architecture and the number of threads that torch uses."""
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def git_revision(folder: Path) -> str | None:
    """The commit that `folder` is checked out at; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # run from a checkout that is not installed


def provenance(folder: Path) -> dict[str, object]:
    """The record that a study keeps of where it ran."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": device_name(),
        "git_revision": git_revision(folder),
    }
