"""The helper process in which nets are made into MLflow models; `made_models.py` starts it.

Its order comes by stdin, and a line of JSON per net leaves by stdout. It imports torch and MLflow once, then forks the processes that make
models: the imports and what torch.export does the first time take longer than a small net. It sees no GPU and touches no store. Its stdin
stays open for as long as its driver wants it: when that ends, in whatever way, it ends with all that it has started. The pickles that it
reads come from its driver alone, by that pipe.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranksearch.tasks.task_file import TaskCode  # what loads torch is loaded once the order is read

BEGIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ranksearch.tracking.model_maker import main; main()"
)
"""What Python runs; its argument is the driver's `sys.path`."""
NUMBER = struct.Struct("<I")
"""A job's number in the queue."""
ALLOCATOR = "jemalloc_bg_thd"
"""The thread of pyarrow's allocator, which takes care of forks itself."""


@dataclass(frozen=True)
class Job:
    """A net that is to be made into a model."""

    trial: int
    folder: str
    """The trial's, with its plan and weights."""
    target: str
    """Where the model is written."""
    net: bytes | None
    """(net, example, normalise) of a task of the user's own, by cloudpickle; one of ours is built by its name."""


@dataclass(frozen=True)
class Order:
    """All that a helper process does."""

    jobs: tuple[Job, ...]
    task: str
    code: TaskCode | None
    """The file of a task of the user's own."""
    at_once: int
    scratch: str
    """A folder that is removed if the driver is gone."""


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    stdin = sys.stdin.buffer
    order: Order = pickle.loads(stdin.read(int(stdin.readline())))
    if order.code is not None:
        order.code.module()
    _import_all(warm=len(order.jobs) > 1)
    if _may_fork():
        _side_by_side(order, answers)
    else:
        for job in order.jobs:
            _end_if_unwanted(order)
            _answer(answers, job, _attempted(job, order.task))


def _import_all(*, warm: bool) -> None:
    """Imports what making a model needs, and lets torch.export set itself up by a net of three layers."""
    import torch
    from torch import nn

    from ranksearch.deploy.formats import traced
    from ranksearch.tracking import models  # noqa: F401

    torch.set_num_threads(1)
    if not warm:
        return
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    program = traced(net.eval(), torch.zeros(2, 1, 4, 4))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.pt2"
        torch.export.save(program, file)
        torch.export.load(file).module()


def _may_fork() -> bool:
    """Whether a copy of this process would lack no thread that another part of it waits for."""
    tasks = Path("/proc/self/task")
    if not hasattr(os, "fork") or not tasks.is_dir() or threading.active_count() > 1:
        return False
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir() if int(task.name) != os.getpid()]
    return all(name == ALLOCATOR for name in names)


def _side_by_side(order: Order, answers: int) -> None:
    """Makes the models in `order.at_once` processes, each of which takes the next net as soon as it is done with one; ends everything
    if the driver is gone.
    """
    queue, fill = os.pipe()
    os.write(fill, b"".join(NUMBER.pack(i) for i in range(len(order.jobs))))
    os.close(fill)
    said = {_begun(order, queue): b"" for _ in range(order.at_once)}  # what each process has said of a line
    while said:
        ready, _, _ = select.select([0, *said], [], [])
        if 0 in ready:
            _end(order)
        for pipe in ready:
            if not (heard := os.read(pipe, 2**16)):
                os.close(pipe)
                del said[pipe]
                os.wait()
                continue
            lines, end, said[pipe] = (said[pipe] + heard).rpartition(b"\n")
            os.write(answers, lines + end)


def _begun(order: Order, queue: int) -> int:
    """Starts a process that makes models for as long as there are numbers in `queue`; returns where its answers are read."""
    pipe, says = os.pipe()
    if os.fork() == 0:
        try:
            while number := os.read(queue, NUMBER.size):
                job = order.jobs[NUMBER.unpack(number)[0]]
                _answer(says, job, _attempted(job, order.task))
        finally:
            os._exit(0)
    os.close(says)
    return pipe


def _attempted(job: Job, task: str) -> dict[str, Any]:
    """Makes a model; says whether that went well, with the reason where the net is to blame. Of other failures the driver hears by
    making the model itself.
    """
    from ranksearch.compress import load_net
    from ranksearch.errors import RanksearchError
    from ranksearch.tasks import build_reference, task_kind
    from ranksearch.tracking.models import save_model

    try:
        folder, target = Path(job.folder), Path(job.target)
        if job.net is None:
            kind = task_kind(task)
            net, example, normalise = load_net(folder, build_reference), kind.example_input, kind.normalise
        else:
            net, example, normalise = pickle.loads(job.net)
        save_model(net, folder, target, example, normalise)
        return {"made": True}
    except (RanksearchError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        return {"made": False, "reason": str(error)}
    except Exception:
        return {"made": False}


def _answer(answers: int, job: Job, outcome: dict[str, Any]) -> None:
    os.write(answers, f"{json.dumps({'trial': job.trial, **outcome})}\n".encode())


def _end_if_unwanted(order: Order) -> None:
    if select.select([0], [], [], 0)[0]:
        _end(order)


def _end(order: Order) -> None:
    """Ends this process, which leads a group of its own, and all that it has started."""
    shutil.rmtree(order.scratch, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)
