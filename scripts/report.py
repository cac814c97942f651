"""What every measuring script shares: its arguments, and the one object that `--json` prints."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import ranksearch

PACKAGES = ("ranksearch", "torch", "numpy", "scipy")


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with `--json`, `--quick`, `--threads`, `--seed` and, for each of `defaults`, an option of that name and type."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="a smaller measurement, within a minute on two cores")
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    return parser


class Report:
    """Collects rows and figures of one run and prints them: a table for people, an object for programs."""

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.script, self.options = script, options
        self.rows: list[dict[str, Any]] = []
        self.device = _device()
        self.versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
        self._started = time.perf_counter()

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"[{time.perf_counter() - self._started:5.0f} s] {text}", file=sys.stderr, flush=True)

    def finish(
        self, figures: Mapping[str, Any], notes: Sequence[str] = (), *, seeds: Sequence[int] | None = None
    ) -> None:
        record = {
            "script": self.script,
            "quick": self.options.quick,
            "device": self.device,
            "threads": self.options.threads,
            "versions": self.versions,
            "seeds": [self.options.seed] if seeds is None else list(seeds),
            "seconds": round(time.perf_counter() - self._started, 1),
            "rows": self.rows,
            "figures": dict(figures),
            "notes": list(notes),
        }
        if self.options.json:
            print(json.dumps(record, allow_nan=False))
            return
        self._print_table()
        for name, value in figures.items():
            print(f"{name:40s} {value if not isinstance(value, float) else f'{value:.4g}'}")
        for note in notes:
            print(note)
        print(f"{self.device}, {self.options.threads} threads, torch {self.versions['torch']}, {record['seconds']} s")

    def _print_table(self) -> None:
        columns = list(dict.fromkeys(k for row in self.rows for k, v in row.items() if not isinstance(v, dict)))
        cells = [[_cell(row.get(name)) for name in columns] for row in self.rows]
        widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]
        for line in [columns, *cells]:
            print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
        print()


def _version(package: str) -> str:
    """As installed; of a source tree on `PYTHONPATH`, which has no metadata, as it says itself."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ranksearch.__version__ if package == "ranksearch" else "not installed"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
