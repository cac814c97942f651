"""A Ray cluster of two nodes on this machine, the second of which can be shut out of folders: it has mounts of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import free_ports

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
STARTED = "Ray runtime started"


def mounts_of_its_own() -> bool:
    """Whether a process here may have mounts that others do not see."""
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


class Nodes:
    """Ray's head and a second node with one CPU each; `hidden` are folders that are other, empty ones on the second node."""

    def __init__(self, folder: Path, hidden: Sequence[Path] = ()) -> None:
        port, client = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1",
        }  # fmt: skip
        self._folder, self._processes = folder, []
        self._start(
            "head",
            ["--head", "--port", f"{port}", "--include-dashboard", "false", "--ray-client-server-port", f"{client}"],
            [],
        )
        mounts = "; ".join(f"mount -t tmpfs none {path}" for path in hidden)
        own = ["unshare", "-m", "bash", "-c", f'{mounts}; exec "$@"', "bash"] if hidden else []
        self._start("second", ["--address", self.address], own)

    def _start(self, name: str, options: list[str], before: list[str]) -> None:
        command = [*before, *RAY, "start", *options, "--num-cpus", "1", "--node-ip-address", "127.0.0.1", "--block"]
        command += ["--object-store-memory", "100000000", "--disable-usage-stats"]
        log = self._folder / f"{name}.log"
        with open(log, "w") as out:
            self._processes.append(
                subprocess.Popen(
                    command, stdout=out, stderr=out, env=os.environ | self.environment, start_new_session=True
                )
            )
        until = time.monotonic() + 120
        while STARTED not in log.read_text():
            if time.monotonic() > until or self._processes[-1].poll() is not None:
                self.stop()
                raise AssertionError(f"{name}: {log.read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        for process in reversed(self._processes):
            try:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            except ProcessLookupError:
                pass


def skip_without_mounts() -> None:
    if not mounts_of_its_own():
        pytest.skip("a process may not have mounts of its own here (unshare -m is refused)")
