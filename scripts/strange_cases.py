"""The cases of `drill_strangers.py`: what is odd, which command meets it, and which exit codes are right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRET = "s3cr3t-0123456789abcdef"
CANARY = "executed-by-a-stranger"
TASK = """
import torch
from torch import nn
import ranksearch

def data(count, seed):
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] + x[:, 1] > 0).long()

def make_task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    return ranksearch.Task(model=net, train=data(64, 0), val=data(32, 1), test=data(32, 2))
"""
LATER = """
calls = 0
def loss(outputs, targets):
    global calls
    calls += 1
    if calls > 3:
        {}
    return nn.functional.cross_entropy(outputs, targets)
"""
SPACE = """
name: own
task: own.py:make_task
budgets: {flops: 80%}
recipe: {steps: 4, batch_size: 32, bn_batches: 1}
search: {trials: 2, sensitivity: none}
tracking: {models: false}
"""
ODD_FILES = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "text": b'"x"',
    "NaN": b"NaN",
    "half": b'{"study": "own", "de',
    "binary": bytes(range(256)),
    "deep": b"[" * 50_000,
    "deep mapping": b'{"a":' * 50_000,
    "huge number": b'{"0": ' + b"9" * 6000 + b"}",
    "empty mapping": b"{}",
    "nested NaN": b'{"0": NaN, "dense": NaN}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "keys of no use": b'{"x": {"y": []}}',
}
ODD_VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "list": [],
    "mapping": {},
    "minus": -1,
    "NaN": float("nan"),
    "inf": float("inf"),
    "huge": 10**400,
    "deep": [[[[[[[[[]]]]]]]]],
    "true": True,
}


@dataclass(frozen=True)
class Case:
    """A command on something odd."""

    group: str
    name: str
    argv: list[str]
    right: tuple[int, ...]
    """Exit codes that are right."""
    prepare: Callable[[Sandbox], None] = lambda sandbox: None
    says: str = ""
    """What its output must hold."""
    shell: str = ""
    """A line of bash in the place of `argv`."""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables of a process of its own; None takes one away."""
    long: bool = False
    """Takes many seconds: not in the quick form."""


class Sandbox:
    """A folder `sandbox/` with a copy of the study, made anew for every case."""

    def __init__(self, made: Path, place: Path) -> None:
        self._made, self.place = made, place
        self.study = place / "runs" / "own"

    def fresh(self) -> None:
        if self.place.is_symlink():
            self.place.unlink()
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._made, self.place)

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a file below the sandbox."""
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def change(self, name: str, keys: str, value: Any) -> None:
        """Lays a value over one of a JSON file of the study; `...` removes it."""
        path = self.study / name
        data = json.loads(path.read_text())
        *parents, last = keys.split(".")
        place = data
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        path.write_text(json.dumps(data))

    def executed(self) -> bool:
        return any(self.place.rglob(CANARY))

    def holds_secret(self) -> bool:
        """Whether a file holds the secret, apart from those that the case gave (`given-*`)."""
        files = [path for path in self.place.rglob("*") if path.is_file() and not path.name.startswith("given-")]
        return any(SECRET.encode() in path.read_bytes() for path in files)


STUDY = "sandbox/runs/own"
READERS = (["front", STUDY], ["report", STUDY], ["resume", STUDY, "--inline"])


def all_cases() -> list[Case]:
    """Every case, group by group."""
    groups = (
        odd_files,
        odd_keys,
        odd_lines,
        odd_results,
        odd_spaces,
        settings,
        strangers,
        addresses,
        secrets,
        user_code,
        machine,
    )
    return [case for group in groups for case in group()]


def odd_files() -> Iterator[Case]:
    """Every file of a study, its content replaced."""
    derived = ("front.json", "mlflow.json")
    for file in ("study.json", "test.json", "latencies.json", "space.yaml", "optuna.journal", *derived):
        for name, content in ODD_FILES.items():
            for argv in READERS[:2]:
                right = (0,) if file in derived else (0, 2)

                def prepare(sandbox: Sandbox, file: str = file, content: bytes = content) -> None:
                    sandbox.change("study.json", "done", False)
                    sandbox.write(f"runs/own/{file}", content)

                yield Case("files", f"{file}: {name}: {argv[0]}", argv, right, prepare)
    for name, content in ODD_FILES.items():
        for file in ("plan.json", "model.safetensors"):
            yield Case(
                "nets",
                f"{file}: {name}",
                ["export", STUDY, "best", "--format", "state_dict"],
                (2,),
                lambda sandbox, file=file, content=content: [
                    sandbox.write(f"runs/own/trials/{number:03d}/{file}", content) for number in range(2)
                ],
            )


def odd_keys() -> Iterator[Case]:
    """Every key of `study.json` and of late results, its value replaced or gone."""
    keys = (
        "study",
        "id",
        "metric",
        "metric.name",
        "metric.direction",
        "metric.unit",
        "task_file",
        "task_file.sha256",
        "task_file.origin",
        "task_file.file",
        "dense",
        "dense.val_accuracy",
        "dense.macs",
        "dense.params",
        "dense.size_bytes",
        "provenance",
        "provenance.created",
        "provenance.git_revision",
        "provenance.versions",
        "samples",
        "layers",
        "layer_costs",
        "opened_with",
        "prediction",
    )
    for key in keys:
        for name, value in ({"gone": ...} | ODD_VALUES).items():
            verb = READERS[len(name) % 2]

            def prepare(sandbox: Sandbox, key: str = key, value: Any = value) -> None:
                sandbox.change("study.json", "done", False)
                sandbox.change("study.json", key, value)

            yield Case("study.json", f"{key}: {name}: {verb[0]}", verb, (0, 2), prepare)


def _line(sandbox: Sandbox, line: str) -> None:
    sandbox.change("study.json", "done", False)
    path = sandbox.study / "optuna.journal"
    path.write_text(path.read_text() + line + "\n")


def odd_lines() -> Iterator[Case]:
    """A line more in the journal."""
    lines = {
        "null": "null",
        "number": "7",
        "text": '"x"',
        "list": "[]",
        "mapping": "{}",
        "broken": '{"op_code": ',
        "blank": "",
        "unknown operation": '{"op_code": 99, "worker_id": "w"}',
        "no worker": '{"op_code": 8, "trial_id": 0, "user_attr": {"a": 1}}',
        "no attribute": '{"op_code": 8, "worker_id": "w", "trial_id": 0}',
        "text operation": '{"op_code": "8", "worker_id": "w"}',
        "trial of text": '{"op_code": 8, "worker_id": "w", "trial_id": "x", "user_attr": {"a": 1}}',
        "state": '{"op_code": 6, "worker_id": "w", "trial_id": 0, "state": 77, "values": null}',
        "distribution": json.dumps(
            {
                "op_code": 5,
                "worker_id": "w",
                "trial_id": 9,
                "param_name": "lr",
                "param_value_internal": 1,
                "distribution": "x",
            }
        ),
        "new trial of nothing": '{"op_code": 4, "worker_id": "w", "study_id": 0}',
        "study of nothing": '{"op_code": 0, "worker_id": "w"}',
        "deep": "[" * 50_000,
        "values of text": '{"op_code": 6, "worker_id": "w", "trial_id": 0, "state": 1, "values": ["x", "y"]}',
    }
    for name, line in lines.items():
        for argv in READERS:
            yield Case("journal", f"{name}: {argv[0]}", argv, (0, 2), lambda sandbox, line=line: _line(sandbox, line))


def odd_results() -> Iterator[Case]:
    """A trial's result in the journal, a value of it replaced."""
    keys = (
        "status",
        "val_accuracy",
        "macs",
        "params",
        "size_bytes",
        "history",
        "losses",
        "projections",
        "epochs",
        "seconds",
        "reason",
        "kept",
    )
    for key in keys:
        for name, value in ODD_VALUES.items():

            def prepare(sandbox: Sandbox, key: str = key, value: Any = value) -> None:
                path = sandbox.study / "optuna.journal"
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                for line in lines:
                    if "result" in (line.get("user_attr") or {}):
                        line["user_attr"]["result"][key] = value
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                sandbox.change("study.json", "done", False)

            yield Case("results", f"{key}: {name}", READERS[len(name + key) % 2], (0, 2), prepare)


def odd_spaces() -> Iterator[Case]:
    """Space files that YAML itself makes odd."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    texts = {
        "alias bomb": bomb + "recipe: *a9\n",
        "alias bomb as a name": SPACE + bomb + "name: *a9\n",
        "loop": "&a [*a]",
        "loop in a key": SPACE + "layers: &a {include: [*a]}\n",
        "date": "name: 2026-99-99",
        "python tag": "!!python/object/apply:os.system ['true']",
        "two documents": SPACE + "---\n" + SPACE,
        "tabs": "\tname: x",
        "number as key": SPACE + "7: 8\n",
        "mapping as key": "? {a: b}\n: c",
        "null": "null",
        "binary": "\x00\x01",
        "empty": "",
        "deep": "[" * 3000,
        "long number": SPACE + f"split_seed: {'9' * 5000}\n",
        "not there": "",
        "emoji": SPACE + "name: \U0001f600\n",
        "name with a path": SPACE + "name: ../../x\n",
    }
    for name, text in texts.items():
        for verb in ("check", "layers"):
            yield Case(
                "spaces",
                f"{name}: {verb}",
                [verb, "sandbox/odd.yaml" if name != "not there" else "sandbox/none.yaml"],
                (2,),
                lambda sandbox, text=text: sandbox.write("odd.yaml", text),
            )


def settings() -> Iterator[Case]:
    """Every kind of value on keys of the schema."""
    keys = (
        "name",
        "model",
        "checkpoint",
        "data",
        "validation",
        "split_seed",
        "budgets.flops",
        "layers.include",
        "layers.lowerings",
        "layers.rank_multiple",
        "layers.rules",
        "recipe.steps",
        "recipe.batch_size",
        "recipe.lr",
        "recipe.optimizer",
        "recipe.projection",
        "search.trials",
        "search.sampler",
        "search.objectives",
        "search.early_stopping",
        "resources.gpus_per_trial",
        "resources.cpus_per_trial",
        "resources.workers",
        "storage.results",
        "tracking.experiment",
        "latency.batch",
    )
    values = ("true", "[]", "{}", "-1", "1e26", ".inf", ".nan", "x", "null", "2026-99-99", "[1, [2, [3]]]", "9" * 400)
    for key in keys:
        for value in values:
            yield Case(
                "settings", f"{key}={value[:20]}", ["layers", "sandbox/own.yaml", "--set", f"{key}={value}"], (0, 2)
            )
    for options in (
        ["--set", "nothing"],
        ["--set", "=1"],
        ["--set", "a.b.c=1"],
        ["--set", "name.x=1"],
        ["--budget", "flops"],
        ["--budget", "x=1"],
        ["--budget", "flops=NaN"],
    ):
        yield Case("settings", " ".join(options), ["check", "sandbox/own.yaml", *options], (2,))


def _strange(sandbox: Sandbox, *, knows: bool = True) -> None:
    """The study as a stranger's: its task file leaves a mark when it is run, and lies nowhere else."""
    code = f"from pathlib import Path\nPath({str(sandbox.place / CANARY)!r}).touch()\n" + TASK
    import hashlib

    sandbox.write("runs/own/own.py", code)
    sandbox.change("study.json", "task_file.sha256", hashlib.sha256(code.encode()).hexdigest())
    sandbox.change("study.json", "task_file.origin", str(sandbox.study / "own.py"))
    if not knows:
        sandbox.change("study.json", "task_file", None)


def strangers() -> Iterator[Case]:
    """Commands on a folder whose task file nobody trusts."""
    space = f"{STUDY}/space.yaml"
    for argv, right in (
        (["resume", STUDY, "--inline", "--trials", "3"], (2,)),
        (["export", STUDY, "best", "--format", "state_dict"], (2,)),
        (["sync", STUDY], (0, 2)),
        (["front", STUDY], (0, 2)),
        (["report", STUDY], (0, 2)),
        (["check", space], (2,)),
        (["layers", space], (2,)),
        (["preview", space], (2,)),
        (["search", space, "--inline", "--name", "other"], (2,)),
        (["latency", space], (2,)),
        (["submit", space, "--runs", "/shared/runs"], (2,)),
        (["doctor", space], (2,)),
    ):
        for knows in (True, False):
            yield Case(
                "strangers",
                f"{argv[0]}{'' if knows else ', no record of the file'}",
                argv,
                right if knows else (0, 2),
                lambda sandbox, knows=knows: _strange(sandbox, knows=knows),
            )


def _yaml(sandbox: Sandbox, key: str, value: str) -> None:
    import yaml

    path = sandbox.study / "space.yaml"
    data = yaml.safe_load(path.read_text())
    group, _, name = key.partition(".")
    data[group][name] = value
    path.write_text(yaml.safe_dump(data))


def addresses() -> Iterator[Case]:
    """Addresses of a folder that its user never sent a study to."""
    for key, where, verbs in (
        ("storage.optuna", "postgresql://nobody@db.invalid/x", ("front", "report", "resume", "sync", "export")),
        ("storage.results", "s3://bucket.invalid/x", ("resume",)),
        ("tracking.uri", "https://mlflow.invalid", ("resume", "sync")),
        ("tracking.artifacts", "s3://bucket.invalid/x", ("resume", "sync")),
        ("tracking.uri", "postgresql://db.invalid/x", ("resume", "sync")),
    ):
        for verb in verbs:
            more = {"resume": ["--inline"], "export": ["best", "--format", "state_dict"]}.get(verb, [])

            def prepare(sandbox: Sandbox, key: str = key, where: str = where) -> None:
                sandbox.change("study.json", "done", False)
                (sandbox.study / "front.json").unlink()
                _yaml(sandbox, key, where)

            yield Case("addresses", f"{key}: {verb}", [verb, STUDY, *more], (2,), prepare, "--trust")
    noted = json.dumps({"uri": "postgresql://db.invalid/x", "experiment": "1", "parent": "x"})
    yield Case(
        "addresses",
        "mlflow.json: ui",
        ["ui", STUDY],
        (2,),
        lambda sandbox: sandbox.write("runs/own/mlflow.json", noted),
        "--trust",
    )


def secrets() -> Iterator[Case]:
    """Secrets in addresses, given by `--set` and by a file."""
    forms = (
        f"https://{SECRET}@host.invalid",
        f"https://user:{SECRET}@host.invalid",
        f"https://host.invalid/?token={SECRET}",
        f"https://user:a/{SECRET}@host.invalid/x",
        f"s3://KEY:{SECRET}@bucket/x",
        f"s3://bucket/x?secret_key={SECRET}",
        f"postgresql://u:{SECRET}@host.invalid/db",
        f"postgresql://host.invalid/db?password={SECRET}",
        f"mysql://u:{SECRET}@host.invalid/db",
        f"gs://{SECRET}@bucket/x",
    )
    for key in ("storage.results", "storage.optuna", "tracking.uri", "tracking.artifacts"):
        for form in forms:
            yield Case(
                "secrets",
                f"{key}: {form.replace(SECRET, '…')}",
                [
                    "search",
                    "sandbox/own.yaml",
                    "--inline",
                    "--name",
                    "new",
                    "--runs",
                    "sandbox/runs",
                    "--set",
                    f"{key}={form}",
                ],
                (2,),
            )


def user_code() -> Iterator[Case]:
    """What a task file may do, at import, when it makes its task, and while it is trained."""
    acts = {
        "sys.exit(0)": "import sys; sys.exit(0)",
        "exit by argparse": "import argparse; argparse.ArgumentParser().parse_args(['--x'])",
        "raise": "raise ValueError('odd')",
        "odd exception": "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()",
        "BaseException": "raise BaseException('odd')",
        "GeneratorExit": "raise GeneratorExit",
        "SystemExit of a text": "raise SystemExit('odd')",
        "deep": "f = lambda: f(); f()",
        "assert": "assert False",
    }
    for name, act in acts.items():
        yield _own("at import", name, act + "\n" + TASK, "check", (2,))
        yield _own("in make_task", name, TASK.replace("torch.manual_seed(0)", act), "check", (2,))
        loss = LATER.format(act)
        yield _own(
            "in the loss, later", name, TASK.replace("test=data", "loss=loss, test=data") + loss, "search", (1, 2)
        )
    metrics = {
        "NaN": "float('nan')",
        "inf": "float('inf')",
        "huge": "10**400",
        "1e308": "1e308",
        "None": "None",
        "text": "'x'",
        "tensor": "torch.zeros(3)",
    }
    for name, value in metrics.items():
        body = f"\ndef metric(outputs, targets):\n    return {value}\n"
        yield _own("metric", name, TASK.replace("test=data", "metric=metric, test=data") + body, "search", (0, 1, 2))
        late = f"\ndef metric(outputs, targets):\n    return {value} if len(outputs) == 40 else float(len(outputs))\n"
        yield _own(
            "metric on test only",
            name,
            TASK.replace("test=data(32", "metric=metric, test=data(40") + late,
            "search",
            (0, 2),
        )
    yield _own("prints", "to stdout", "print('hello from the task')\n" + TASK, "check", (0,))
    yield _own("changes the folder", "os.chdir", "import os; os.chdir('/')\n" + TASK, "search", (0,))
    yield _own(
        "reads arguments", "argparse", "import argparse; argparse.ArgumentParser().parse_args()\n" + TASK, "check", (0,)
    )


def _own(group: str, name: str, code: str, verb: str, right: tuple[int, ...]) -> Case:
    def prepare(sandbox: Sandbox) -> None:
        sandbox.write("odd.py", code)
        sandbox.write("odd.yaml", SPACE.replace("own.py", "odd.py").replace("name: own", "name: odd"))

    more = ["--inline", "--runs", "sandbox/runs"] if verb == "search" else []
    return Case("user code", f"{group}: {name}", [verb, "sandbox/odd.yaml", *more], right, prepare)


def machine() -> Iterator[Case]:
    """States of the machine, each in a process of its own."""

    def read_only(sandbox: Sandbox) -> None:
        shutil.rmtree(sandbox.study.parent)
        sandbox.study.parent.write_text("a file")

    yield Case(
        "machine",
        "--runs is a file",
        ["search", "sandbox/own.yaml", "--inline", "--runs", "sandbox/runs"],
        (2,),
        read_only,
    )
    yield Case("machine", "no study of that name", ["front", "nothing"], (2,))
    yield Case("machine", "a very long name", ["front", "x" * 5000], (2,))
    yield Case("machine", "a name with a NUL", ["front", "a\0b"], (2,))
    python = "python -m ranksearch"
    yield Case(
        "machine",
        "stdout closed early",
        [],
        (0, 1, 141),
        shell=f"set -o pipefail; {python} front {STUDY} --json | head -c 10",
    )
    yield Case("machine", "stdout closed", [], (0, 1), shell=f"{python} front {STUDY} >&-")
    yield Case("machine", "stdout full", [], (1,), shell=f"{python} front {STUDY} --json > /dev/full")
    yield Case(
        "machine",
        "LANG=C",
        ["front", STUDY],
        (0,),
        environment={"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": None},
    )
    yield from _lost_nets()
    yield from _ended_or_unheard()
    yield Case("machine", "no home", ["front", STUDY], (0,), environment={"HOME": None, "XDG_STATE_HOME": None})


def _lost_nets() -> Iterator[Case]:
    """The front's nets gone or empty: the study is completed, synced and reported, and what is missing is said."""
    for name, act in {"gone": lambda file: file.unlink(), "empty": lambda file: file.write_bytes(b"")}.items():

        def prepare(sandbox: Sandbox, act: Callable[[Path], object] = act) -> None:
            (sandbox.study / "test.json").unlink()
            (sandbox.study / "latencies.json").unlink(missing_ok=True)
            sandbox.change("study.json", "done", False)
            for file in sandbox.study.glob("trials/*/model.safetensors"):
                act(file)

        yield Case("lost nets", f"{name}: resume", ["resume", STUDY, "--inline"], (0,), prepare, "is lost: model.saf")
        yield Case("lost nets", f"{name}: sync", ["sync", STUDY], (0,), prepare, "is lost: model.saf")
        yield Case("lost nets", f"{name}: report", ["report", STUDY], (0,), prepare)
        yield Case("lost nets", f"{name}: export", ["export", STUDY, "0"], (2,), prepare)


def _ended_or_unheard() -> Iterator[Case]:
    """A signal to the whole group, on Ray, whose processes it ends first; a log that nobody reads, or on a full disk; output in between."""
    chatty = TASK.replace("test=data", "loss=loss, test=data") + (
        "\ndef loss(outputs, targets):\n    print('from the loss')\n    return nn.functional.cross_entropy(outputs, targets)\n"
    )

    def write(sandbox: Sandbox) -> None:
        sandbox.write("odd.py", chatty)
        space = SPACE.replace("own.py", "odd.py").replace("name: own", "name: odd")
        sandbox.write("odd.yaml", space)
        sandbox.write("long.yaml", space.replace("trials: 2", "trials: 500"))

    search = "python -m ranksearch search sandbox/odd.yaml --inline --runs sandbox/runs --json"
    lines = {
        "a loss that prints": f"set -o pipefail; {search} | python -m json.tool",
        "the log is on a full disk": f"{search} 2> /dev/full",
        "the log has no reader": f"{search} 2> >(true)",
    }
    for name, line in lines.items():
        yield Case("unheard", name, [], (0,), write, '"study": "odd"', line, long=True)
    nobody = (
        "import os, pwd, sys; os.environ.pop('HOME', None); pwd.getpwuid = lambda uid: {}[uid]; sys.argv[0] = 'ranksearch'; "
        "from ranksearch.cli import main; main()"
    )
    line = (
        f'env -u RANKSEARCH_DATA -u XDG_STATE_HOME python -c "{nobody}" {search.removeprefix("python -m ranksearch ")}'
    )
    yield Case("unheard", "a user without a home", [], (0,), write, '"study": "odd"', line, long=True)
    for where in ("", "--inline"):
        begun = "grep -q '\"result\"' sandbox/runs/odd/optuna.journal 2> /dev/null"
        line = (
            f"setsid python -m ranksearch search sandbox/long.yaml --runs sandbox/runs {where} & "
            f"until {begun} || ! kill -0 $!; do sleep .2; done; kill -TERM -- -$!; wait $!"
        )
        name = f"SIGTERM to the whole group {where or 'on Ray'}"
        yield Case("ended", name, [], (143,), write, "stopped by SIGTERM", line, long=True)
