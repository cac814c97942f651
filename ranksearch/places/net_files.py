"""The two files of a compressed net. Code that loads neither torch nor optuna asks here whether a folder holds one."""

from __future__ import annotations

from pathlib import Path

WEIGHTS, PLAN = "model.safetensors", "plan.json"


def missing_files(folder: Path) -> list[str]:
    """Names of a net's files that are not in its folder, or are empty there."""
    return [name for name in (PLAN, WEIGHTS) if not (folder / name).is_file() or not (folder / name).stat().st_size]


def holds_net(folder: Path) -> bool:
    """Whether both files of a compressed net are there and neither is empty."""
    return not missing_files(folder)
