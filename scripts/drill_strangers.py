"""Hundreds of odd files, settings, pieces of user code and machine states: each must end with the right exit code and a sentence.

python scripts/drill_strangers.py [--json] [--quick]

A small study of a user's own task is made once; every case changes a copy of its folder, or writes a task or a space of its own, and
calls the command line on it, in this process with its output taken (what needs a process of its own has one). The cases are
in `strange_cases.py`. Each case is a row: exit code and first line.

cases             how many were tried
tracebacks        cases that ended in an exception which is no sentence
wrong_exit        cases whose exit code was none of those that are right
executed          cases in which Python code ran that came with a folder and that nobody trusted
secrets_written   cases after which a secret stood in a file or in what was printed
"""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from report import Report, arguments
from strange_cases import SECRET, SPACE, TASK, Case, Sandbox, all_cases

from ranksearch.cli import main as command_line

EVERY = 9
"""The quick form tries one case in so many of each group, drawn by `--seed`."""
SECONDS = 300
"""How long a process of its own may take: half a minute, on a busy machine many times that."""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int | None
    """None where it ended in an exception."""
    stdout: str
    stderr: str

    @property
    def first_line(self) -> str:
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[0][:200] if lines else ""


def called(argv: list[str]) -> Outcome:
    """The command line in this process."""
    out, err, before, here = io.StringIO(), io.StringIO(), sys.argv, Path.cwd()
    sys.argv, code = ["ranksearch", *argv], 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            command_line()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:
        code = None
        err.write(traceback.format_exc())
    finally:
        sys.argv = before
        os.chdir(here)
    return Outcome(code, out.getvalue(), err.getvalue())


def spawned(case: Case) -> Outcome:
    """The command line in a process of its own, as a shell runs it."""
    command = case.shell or [sys.executable, "-m", "ranksearch", *case.argv]
    environment = {key: value for key, value in (os.environ | case.environment).items() if value is not None}
    done = subprocess.run(
        command, shell=isinstance(command, str), executable="/bin/bash" if case.shell else None, env=environment,
        capture_output=True, text=True, timeout=SECONDS, errors="replace",
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def tried(case: Case, sandbox: Sandbox) -> dict[str, object]:
    """One case's row."""
    sandbox.fresh()
    case.prepare(sandbox)
    found = spawned(case) if case.shell or case.environment else called(case.argv)
    printed = found.stdout + found.stderr
    return {
        "group": case.group, "case": case.name, "exit": found.code, "right": "/".join(map(str, case.right)),
        "traceback": found.code is None or "Traceback (most recent call last)" in printed,
        "wrong_exit": found.code not in case.right or (case.says not in printed),
        "executed": sandbox.executed(), "secret": SECRET in printed or sandbox.holds_secret(),
        "first_line": found.first_line,
    }  # fmt: skip


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report("drill_strangers", options)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch).resolve()
        os.environ |= {
            "XDG_STATE_HOME": str(place / "state"), "RANKSEARCH_DATA": str(place / "data"), "COLUMNS": "200",
            "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db",
        }  # fmt: skip
        os.environ.pop("RANKSEARCH_RUNS", None)
        made = place / "made"
        made.mkdir()
        (made / "own.py").write_text(TASK)
        (made / "own.yaml").write_text(SPACE)
        first = called(["search", str(made / "own.yaml"), "--inline", "--runs", str(made / "runs")])
        assert first.code == 0, first.stderr
        os.chdir(place)
        cases = all_cases()
        groups = {
            case.group: [c for c in cases if c.group == case.group and not (options.quick and c.long)] for case in cases
        }
        draw = random.Random(options.seed)
        chosen = [
            case
            for group in groups.values()
            for case in (draw.sample(group, min(len(group), max(1, len(group) // EVERY))) if options.quick else group)
        ]
        report.say(f"a study was made; {len(chosen)} of {len(cases)} cases")
        sandbox = Sandbox(made, place / "sandbox")
        for case in chosen:
            row = tried(case, sandbox)
            report.rows.append(row)
            if row["traceback"] or row["wrong_exit"] or row["executed"] or row["secret"]:
                report.say(f"{case.group}: {case.name}: exit {row['exit']}, not {row['right']}: {row['first_line']}")
        shutil.rmtree(sandbox.place, ignore_errors=True)
    figures = {"cases": len(report.rows)}
    for figure, column in {
        "tracebacks": "traceback", "wrong_exit": "wrong_exit", "executed": "executed", "secrets_written": "secret",
    }.items():  # fmt: skip
        figures[figure] = sum(bool(row[column]) for row in report.rows)
    report.finish(figures)


if __name__ == "__main__":
    main()
