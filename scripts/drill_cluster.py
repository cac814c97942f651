"""A study on a cluster that comes apart: nodes lose their power, join, are drained; the driver and the head die; it is resumed.

Digits on a real Ray cluster of this machine (`loopback_cluster.py`): a head without room for trials and two nodes of one CPU each. After
every event the study is looked at from outside: its journal, the states of its running trials, MLflow.

    python scripts/drill_cluster.py --json        two rounds of every event, about ten minutes on two cores
    python scripts/drill_cluster.py --quick       a node killed, another joins: a minute or so
    python scripts/drill_cluster.py --rounds 1 --seed 1

`seconds_lost` of an event: training before it that is repeated, by the time of each trial's last state (at most a checkpoint interval
and what writing takes; 0 where a notice lets a trial write its state). `restart_seconds`: until such a trial has written a further one,
from the event on, or from the start of the next driver. Linux alone.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drilled_study import DrilledStudy
from loopback_cluster import LoopbackCluster, Node
from report import Report, arguments

from ranksearch.store.where import CHECKPOINTS
from ranksearch.trial.placement import data_loads_per_node

SPACE = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
NAME = "drill"
INTERVAL_SECONDS = 1.0
LONGEST_SECONDS = 300
"""What is waited for and does not come in so long has failed."""
LOST = re.compile(r"trial (\d+): its (?:node|process).*?; it goes on elsewhere")


def main() -> None:
    parser = arguments(__doc__, rounds=2, trials=24, steps=1200)
    options = parser.parse_args()
    if options.quick:
        options.trials, options.steps = 4, 1000
    report = Report("drill_cluster", options)
    with tempfile.TemporaryDirectory(prefix="rs", ignore_cleanup_errors=True) as folder:
        drill = Drill(Path(folder), options, report)
        try:
            drill.run()
            figures = drill.figures()
        finally:
            drill.stop()
        report.finish(figures, drill.notes, seeds=[options.seed])
    if drill.failed(figures):
        sys.exit(1)


class States:
    """The states that running trials write, as a thread sees them come: file name -> [(time, step)]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.written: dict[str, list[tuple[float, int]]] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for path in self._folder.glob("*.pt"):
                try:
                    at = path.stat().st_mtime
                    known = self.written.setdefault(path.name, [])
                    if not known or known[-1][0] != at:
                        state = torch.load(path, map_location="cpu", weights_only=True)
                        known.append((at, state["training"]["done"] + (10**6 if state["phase"] == "factors" else 0)))
                except (OSError, RuntimeError, EOFError):
                    continue  # replaced or removed meanwhile
            time.sleep(0.1)

    def last(self, name: str, before: float) -> tuple[float, int] | None:
        """The last state written before that time."""
        return next((entry for entry in reversed(self.written.get(name, [])) if entry[0] <= before), None)

    def next(self, name: str, after: float) -> tuple[float, int] | None:
        return next((entry for entry in self.written.get(name, []) if entry[0] > after), None)


class Drill:
    """One study, its cluster, and whoever takes it apart."""

    def __init__(self, folder: Path, options: Any, report: Report) -> None:
        self.folder, self.options, self.report = folder, options, report
        self.random = random.Random(options.seed)
        self.runs = folder / "runs"
        self.states = States(self.runs / NAME / CHECKPOINTS)
        self.clusters: list[LoopbackCluster] = []
        self.log = folder / "driver.log"
        self.drilled, self.repeated = DrilledStudy(self.runs, NAME), 0
        self.kills: dict[str, int] = {}
        self.notes: list[str] = []
        self.driver: subprocess.Popen[bytes] | None = None

    def running(self) -> dict[int, str]:
        """Trial number -> its state's file name, of those that run."""
        study = self.drilled.study()
        if study is None:
            return {}
        trials = study._study.get_trials(deepcopy=False)
        known = {
            t.number: t.user_attrs["candidate"]
            for t in trials
            if t.state.name == "RUNNING" and "candidate" in t.user_attrs
        }
        return {n: study._proposals.checkpoint(c["key"], c["seed"]).name for n, c in known.items()}

    # Cluster and driver ------------------------------------------------------------------------------------------

    @property
    def cluster(self) -> LoopbackCluster:
        return self.clusters[-1]

    def new_cluster(self) -> LoopbackCluster:
        self.clusters.append(LoopbackCluster(self.folder / f"c{len(self.clusters)}"))
        return self.cluster

    def start_driver(self) -> None:
        """A new search, or the study's continuation, on the cluster as it is."""
        if self.drilled.study() is None:
            settings = [
                f"recipe.steps={self.options.steps}", f"resources.checkpoint_seconds={INTERVAL_SECONDS}", "resources.worker_losses=0",
                "tracking.models=false",
            ]  # fmt: skip
            verb = ["search", str(SPACE), "--name", NAME, "--trials", str(self.options.trials)]
            verb += [word for setting in settings for word in ("--set", setting)]
        else:
            verb = ["resume", NAME]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "ranksearch", *verb, "--address", self.cluster.address], cwd=self.folder,
                stdout=log, stderr=log, env=os.environ | self.cluster.environment,
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def until(self, what: str, happened: Callable[[], Any], seconds: float = LONGEST_SECONDS) -> Any:
        """What `happened` says, once it says something; RuntimeError where that does not come, or the driver ends before."""
        until = time.monotonic() + seconds
        while not (found := happened()):
            assert self.driver is not None
            if time.monotonic() > until or (self.driver.poll() is not None and what != "driver ends"):
                raise RuntimeError(f"{what}: waited in vain (driver: {self.driver.poll()})\n{self.text()[-3000:]}")
            time.sleep(0.1)
        return found

    def ends(self) -> int:
        """The driver's exit code, once it has ended."""
        assert self.driver is not None
        self.until("driver ends", lambda: self.driver is not None and self.driver.poll() is not None)
        return int(self.driver.returncode)

    def stop(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        for cluster in self.clusters:
            cluster.stop()

    def in_mid_trial(self, *nodes: Node) -> None:
        """Waits until every one of these nodes trains, and every running trial has written a state."""

        def trains() -> bool:
            names = self.running().values()
            recent = time.time() - 2 * INTERVAL_SECONDS - 1
            going = sum(
                self.states.last(name, time.time()) is not None and self.states.written[name][-1][0] > recent
                for name in names
            )
            return all(node.trial_workers for node in nodes) and going >= len(nodes)

        self.until("trials in the middle", trains)

    # Events ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.new_cluster()
        self.start_driver()  # before there is a node for its trials: it waits for one
        nodes = [self.cluster.add_node(), self.cluster.add_node()]
        for _ in range(self.options.rounds):
            nodes = self.node_dies(nodes)
            if self.options.quick:
                break
            nodes = self.node_is_drained(nodes)
            self.driver_dies(nodes, signal.SIGTERM)
            self.driver_dies(nodes, signal.SIGKILL)
            nodes = self.head_dies(nodes)
        code = self.ends()
        self.drilled.look()
        if code:
            self.notes.append(f"the driver ended with {code}: {self.text()[-2000:]}")

    def node_dies(self, nodes: list[Node]) -> list[Node]:
        """One node loses its power, and another one joins."""
        self.random.shuffle(nodes)
        first, second = nodes
        self.in_mid_trial(first, second)
        self.hit("node killed", first.lose_power, trials=1)
        third = self.cluster.add_node()
        self.until("the node that joined is used", lambda: third.trial_workers)
        self.row("node joins")
        return [second, third]

    def node_is_drained(self, nodes: list[Node]) -> list[Node]:
        """One node is taken away by notice; another one takes its place."""
        leaving, stays = nodes
        self.in_mid_trial(leaving, stays)
        self.hit("node drained", lambda: self.cluster.drain(leaving, 60), trials=1)
        self.until("the drained node is left", lambda: not leaving.trial_workers)
        leaving.lose_power()
        return [stays, self.cluster.add_node()]

    def hit(self, event: str, strike: Callable[[], None], trials: int) -> None:
        """Strikes, waits until the driver has said which trials were lost by it and until they have written a further state."""
        before, running, said = self.drilled.look(), self.running(), len(LOST.findall(self.text()))
        strike()
        struck = time.time()
        self.kills[event] = self.kills.get(event, 0) + 1
        self.until(f"{event}: its trials are given back", lambda: len(LOST.findall(self.text())) >= said + trials)
        numbers, told = [int(number) for number in LOST.findall(self.text())[said:]], time.time()
        hit = {n: running[n] for n in numbers if n in running}
        self.measure(event, struck, told, struck, hit, before)

    def measure(self, event: str, struck: float, over: float, again: float, hit: dict[int, str], before: int) -> None:
        """A row of the event: training that is repeated, time until its trials went on, steps that went backwards.

        Args:
            struck: when it happened.
            over: when the trials' processes had ended: what they wrote until then is what they go on from.
            again: what the time until they went on counts from.
            hit: their numbers -> their states.
        """
        lasts = {name: self.states.last(name, over) for name in hit.values()}
        goes_on = {
            name: self.until(
                f"{event}: trial {n} goes on", lambda name=name: self.states.next(name, over) or self.is_over(name)
            )
            for n, name in hit.items()
        }
        lost = [max(0.0, struck - last[0]) if last is not None else INTERVAL_SECONDS for last in lasts.values()]
        restarts = [entry[0] - again for entry in goes_on.values() if isinstance(entry, tuple)]
        for name, entry in goes_on.items():
            last = lasts[name]
            self.repeated += isinstance(entry, tuple) and last is not None and entry[1] < last[1]
        self.row(
            event, trials_hit=len(hit), finished_before=before, seconds_lost=max(lost, default=None),
            restart_seconds=max(restarts, default=None),
        )  # fmt: skip

    def is_over(self, name: str) -> bool:
        """Whether the trial of that state has ended: it was nearly through."""
        return not (self.runs / NAME / CHECKPOINTS / name).is_file() and name not in self.running().values()

    def driver_dies(self, nodes: list[Node], number: signal.Signals) -> None:
        """The driver is stopped or killed in mid-trial, and its study resumed on the same cluster."""
        self.in_mid_trial(*nodes)
        before, running, event = self.drilled.look(), self.running(), f"driver {number.name}"
        assert self.driver is not None
        self.driver.send_signal(number)
        struck = time.time()
        self.kills[event] = self.kills.get(event, 0) + 1
        code = self.ends()
        if number == signal.SIGTERM and code != 128 + number:
            self.notes.append(f"a driver that was stopped by SIGTERM ended with {code}")
        self.report.say(f"the driver ended {time.time() - struck:.1f} s after {number.name}, with {code}")
        while any(node.trial_workers for node in nodes):
            time.sleep(0.1)
        over = time.time()
        self.start_driver()
        self.measure(event, struck, over, over, running, before)

    def head_dies(self, nodes: list[Node]) -> list[Node]:
        """The head loses its power; the driver ends, and the study goes on on a new cluster."""
        self.in_mid_trial(*nodes)
        before, running = self.drilled.look(), self.running()
        self.cluster.head.lose_power()
        struck = time.time()
        self.kills["head killed"] = self.kills.get("head killed", 0) + 1
        code = self.ends()
        if code != 1 or "no longer answers" not in self.text():
            self.notes.append(f"a driver whose cluster had lost its head ended with {code}, or without a sentence")
        self.report.say(f"the driver ended {time.time() - struck:.0f} s after its cluster's head, with {code}")
        self.cluster.stop()
        over = time.time()
        self.new_cluster()
        found = [self.cluster.add_node(), self.cluster.add_node()]
        again = time.time()
        self.start_driver()
        self.measure("head killed", struck, over, again, running, before)
        return found

    def row(self, event: str, **found: Any) -> None:
        finished = self.drilled.look()
        self.report.rows.append({"event": event, **found, "finished": finished, "lost": self.drilled.lost})
        lost = found.get("seconds_lost")
        self.report.say(
            f"{event}; {finished} trials finished" + (f", {lost:.1f} s of training lost" if lost is not None else "")
        )

    # What came of it ---------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        study = self.drilled.study()
        assert study is not None
        rows = study.trials
        hits = [row for row in self.report.rows if row.get("seconds_lost") is not None]
        loads = data_loads_per_node(study.folder)
        return {
            "planned": study.planned,
            "finished": sum(row["status"] == "complete" for row in rows),
            "lost": self.drilled.lost,
            "doubled": self.drilled.doubled(study),
            "mlflow_runs": self.drilled.mlflow_runs(),
            "data_loads_per_node": max(loads.values()) if loads else None,
            "seconds_lost_max": max((row["seconds_lost"] for row in hits), default=None),
            "restart_seconds_max": max((row["restart_seconds"] or 0.0 for row in hits), default=None),
            "checkpoint_seconds": INTERVAL_SECONDS,
            "went_back": self.repeated,
            "kills": sum(self.kills.values()),
            **{f"kills_{event.replace(' ', '_').lower()}": count for event, count in self.kills.items()},
        }

    def failed(self, figures: dict[str, Any]) -> bool:
        return bool(
            not figures["planned"] == figures["finished"] == figures["mlflow_runs"]
            or figures["lost"] + figures["doubled"] + figures["went_back"]
            or any("ended with" in note for note in self.notes)
        )


if __name__ == "__main__":
    main()
