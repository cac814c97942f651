"""A study under fire: SIGKILL at random moments for its driver, its workers and Ray's head, then `ranksearch resume`, until it is done.

Digits on a real Ray of this machine. After every kill the study's journal is read: results that had been finished must be there, to the
digit. At the end every planned trial must have finished once, and MLflow must hold a run for each.

    python scripts/drill_faults.py --json         twenty kills, about ten minutes on two cores
    python scripts/drill_faults.py --quick        three kills, a minute or two
    python scripts/drill_faults.py --kills 60 --seed 1

A driver is killed anywhere from its start on (imports, Ray's start, trials, the test set at the end), a worker while it trains. Linux
alone.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from drilled_study import DrilledStudy
from loopback_cluster import descendants
from report import Report, arguments

SPACE = Path(__file__).parent.parent / "search_spaces" / "digits_resnet8.yaml"
NAME = "drill"
VICTIMS = {"driver": 0.5, "worker": 0.4, "head": 0.1}
HEAD = ("gcs_server", "raylet", "ray::DashboardAgent")
LONGEST_SECONDS = 240
"""A driver that neither ends nor makes progress for so long hangs: the drill fails."""


def main() -> None:
    parser = arguments(__doc__, kills=20, trials=40, steps=600)
    options = parser.parse_args()
    if options.quick:
        options.kills, options.trials, options.steps = 3, 6, 300
    report = Report("drill_faults", options)
    with tempfile.TemporaryDirectory() as folder:
        drill = Drill(Path(folder), options, report)
        drill.run()
        report.finish(drill.figures(), seeds=[options.seed])
    if drill.failed:
        sys.exit(1)


class Drill:
    """One study and whoever shoots at it."""

    def __init__(self, folder: Path, options: Any, report: Report) -> None:
        self.folder, self.options, self.report = folder, options, report
        self.random = random.Random(options.seed)
        self.kills: dict[str, int] = dict.fromkeys(VICTIMS, 0)
        self.drilled, self.failed = DrilledStudy(self.folder / "runs", NAME), False

    # Drivers and shots -------------------------------------------------------------------------------------------

    def start(self) -> subprocess.Popen[bytes]:
        """A driver: a new search, or the study's continuation."""
        if self.drilled.study() is None:
            fast = [
                f"recipe.steps={self.options.steps}",
                "resources.checkpoint_seconds=0.5",
                "resources.worker_losses=100",
                *(["tracking.models=false"] if self.options.quick else []),
            ]
            verb = ["search", str(SPACE), "--name", NAME, "--trials", str(self.options.trials)]
            verb += [word for setting in fast for word in ("--set", setting)]
        else:
            verb = ["resume", NAME, "--trials", str(self.options.trials)]
        log = (self.folder / "driver.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "ranksearch", *verb], cwd=self.folder, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self) -> None:
        driver, started = self.start(), time.monotonic()
        while True:
            wait = self.random.uniform(*((7.0, 14.0) if self.options.quick else (1.0, 16.0)))
            ended = self.wait(driver, wait)
            if ended and driver.returncode == 0:
                if sum(self.kills.values()) >= self.options.kills:
                    break
                self.options.trials += 4  # it was done before the shots were: it goes on
            if ended:  # it was done, or the head's end took it along
                if driver.returncode > 0:
                    self.report.say(f"the driver ended with {driver.returncode}:\n{self.tail()}")
                driver, started = self.start(), time.monotonic()
            elif sum(self.kills.values()) < self.options.kills:
                self.shoot(driver)
            elif time.monotonic() - started > LONGEST_SECONDS + 10 * self.options.trials:
                raise RuntimeError("the driver hangs:\n" + self.tail())
        self.drilled.look()

    @staticmethod
    def wait(driver: subprocess.Popen[bytes], seconds: float) -> bool:
        """Whether the driver ended within so many seconds."""
        try:
            driver.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False

    def shoot(self, driver: subprocess.Popen[bytes]) -> None:
        (victim,) = self.random.choices(list(VICTIMS), list(VICTIMS.values()))
        pid = driver.pid if victim == "driver" else self.find(driver.pid, victim)
        if pid is None:
            return  # no such process at this moment
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.kills[victim] += 1
        if victim == "driver":
            driver.wait()
        time.sleep(0.5)
        self.report.say(f"kill {sum(self.kills.values())}: {victim}; {self.drilled.look()} trials finished")
        self.report.rows.append(
            {
                "kill": sum(self.kills.values()),
                "victim": victim,
                "finished": len(self.drilled.seen),
                "lost": self.drilled.lost,
            }
        )

    def find(self, root: int, victim: str) -> int | None:
        """A process of the driver's Ray: a worker that trains, or one of the head's."""
        below = descendants(root)
        if victim == "worker":
            fitting = [pid for pid, title in below.items() if title.startswith("ray::ImplicitFunc")]
        else:
            fitting = [pid for pid, title in below.items() if any(name in title.split(" ")[0] for name in HEAD)]
        return self.random.choice(sorted(fitting)) if fitting else None

    def tail(self) -> str:
        return (self.folder / "driver.log").read_text(errors="replace")[-3000:]

    # What came of it ---------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        study = self.drilled.study()
        assert study is not None
        rows = study.trials
        complete = [row for row in rows if row["status"] == "complete"]
        found = {
            "kills": sum(self.kills.values()),
            **{f"kills_{victim}": count for victim, count in self.kills.items()},
            "planned": study.planned,
            "finished": len(complete),
            "lost": self.drilled.lost,
            "doubled": self.drilled.doubled(study),
            "mlflow_runs": self.drilled.mlflow_runs(),
            "nets": sum((study.trial_folder(row["trial"]) / "model.safetensors").is_file() for row in complete),
        }
        self.failed = found["finished"] != found["planned"] or found["lost"] > 0 or found["doubled"] > 0
        if self.failed:
            self.report.say(
                "statuses: "
                + ", ".join(f"{row['trial']} {row['status']} {row['reason']}" for row in rows)
                + "\n"
                + self.tail()
            )
        return found


if __name__ == "__main__":
    main()
