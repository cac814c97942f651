"""A real Ray cluster of several nodes on this machine: nodes that join, leave by notice, or lose their power. For drills and tests.

Every node is a `ray start --block` of its own with its processes below it; token authentication is on. Ray listens on this
machine's interfaces, whatever address a node is given. Linux alone.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path

START_SECONDS = 90
OBJECT_STORE_BYTES = 100_000_000
TOKEN = secrets.token_hex(32)
"""The token of this process's clusters; no other process can talk to them."""
TRAINS = "ray::ImplicitFunc"
"""How the title of a process begins that runs trials."""


class Node:
    """One node: its processes, and the id that Ray knows it by."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        self.id = ""

    def wait_until_up(self) -> None:
        """Raises RuntimeError where it does not start."""
        until = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"a node did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        (raylet,) = [line for line in descendants(self.process.pid).values() if "raylet/raylet" in line.split(" ")[0]]
        (self.id,) = [word.split("=")[1] for word in raylet.split() if word.startswith("--node_id=")]

    @property
    def trial_workers(self) -> list[int]:
        """Process ids of the workers that hold trials."""
        return [pid for pid, title in descendants(self.process.pid).items() if title.startswith(TRAINS)]

    def lose_power(self) -> None:
        """SIGKILL for everything that runs on it, at once."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended meanwhile
        self.process.wait()


class LoopbackCluster:
    """A head without room for trials, and nodes of one CPU each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.port = free_ports(1)[0]
        self.environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        """What a driver on this cluster needs in its environment."""
        self.nodes: list[Node] = []
        client, agent = free_ports(2)
        self.head = self._start(
            "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        )  # fmt: skip

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add_node(self) -> Node:
        """A node of one CPU more."""
        agent = free_ports(1)[0]
        return self._start(f"--address={self.address}", "--num-cpus=1", f"--dashboard-agent-listen-port={agent}")

    def _start(self, *arguments: str) -> Node:
        log = self._folder / f"node{len(self.nodes)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["ray", "start", "--block", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", *arguments],
                stdout=out, stderr=out, env=os.environ | self.environment, cwd=self._folder, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        node = Node(process, log)
        self.nodes.append(node)
        node.wait_until_up()  # one after the other: nodes that start at once on one machine take each other's sockets
        return node

    def drain(self, node: Node, seconds: int) -> None:
        """A preemption notice, as a cloud's spot handler sends it by `ray drain-node`: the node is taken away after so many seconds."""
        # a process of its own: Ray reads the kind of authentication once, when it is imported
        done = subprocess.run(
            [
                "ray", "drain-node", "--address", self.address, "--node-id", node.id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "spot instance reclaimed", "--deadline-remaining-seconds", str(seconds),
            ],
            env=os.environ | self.environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"the node is not drained: {done.stdout}{done.stderr}")

    def stop(self) -> None:
        """Kills what is left of every node."""
        for node in self.nodes:
            node.lose_power()


def _end_with_parent() -> None:
    """SIGTERM for a node where the process that started it is killed: no cluster is left behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def descendants(root: int) -> dict[int, str]:
    """pid -> command line of the processes below `root`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue  # it ended meanwhile
    found: dict[int, str] = {}
    for pid in parents:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root and pid != root:
            try:
                found[pid] = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
            except OSError:
                continue
    return found
