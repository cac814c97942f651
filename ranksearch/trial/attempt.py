"""One attempt at a trial: whatever goes wrong in it becomes a result with its reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ranksearch.compress import Net
from ranksearch.data.parallel import ALONE, Group, PeerLost
from ranksearch.errors import first_line
from ranksearch.places.place import PlaceError
from ranksearch.tasks.task import Task
from ranksearch.tasks.task_file import TASK_MODULE
from ranksearch.training.dense import State
from ranksearch.training.device import out_of_memory
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.checkpoint import CheckpointFile, Leaving, is_full, stays
from ranksearch.trial.nested import read_weights
from ranksearch.trial.reporting import Report, Watch, unwatched
from ranksearch.trial.result import Status, TrialResult
from ranksearch.trial.trial import run_trial

RAY = "ray"
"""The package whose own `sys.exit` ends a worker that is stopped or taken away."""


def attempt(
    task: Task,
    dense: State,
    net: Net,
    candidate: Candidate,
    *,
    report: Report,
    checkpoint_seconds: float,
    leaving: Callable[[], bool] = stays,
    group: Group = ALONE,
    watch: Watch = unwatched,
) -> TrialResult:
    """Runs a trial; an exception becomes a result with its reason, so that one bad trial does not end a study.

    The `sys.exit` of a user's loss or model is such an exception, too; the one by which Ray ends a worker is not, nor is Ctrl-C.

    Raises:
        Leaving: the machine is going to be taken away, as `leaving` said; the trial's state is written.
        PeerLost: another process of the group is gone; the trial is to be run again, from its state.
    """
    checkpoint = CheckpointFile(candidate.checkpoint, checkpoint_seconds, leaving)
    try:
        return run_trial(
            task, dense, net, candidate.plan, candidate.recipe, seed=candidate.seed, report=report, save_to=candidate.save_to,
            checkpoint=checkpoint, rungs=candidate.rungs, latency=candidate.latency, metric=candidate.metric, group=group, watch=watch,
            path=candidate.path, drawn=candidate.drawn,
            start=None if candidate.weights is None else read_weights(candidate.weights),
            shares=candidate.shares,
        )  # fmt: skip
    except (Leaving, PeerLost, KeyboardInterrupt):
        raise
    except torch.OutOfMemoryError as error:
        return TrialResult(Status.FAILED, candidate.seed, 0.0, reason=out_of_memory(error))
    except BaseException as error:
        if isinstance(error, SystemExit) and _by_ray(error):
            raise
        lines = traceback.format_exc().strip().splitlines()[-6:]
        status = (
            Status.NO_SPACE if is_full(error) else Status.NO_PLACE if isinstance(error, PlaceError) else Status.FAILED
        )
        first = f"{type(error).__name__}: {first_line(error)}{_place(error)}"
        return TrialResult(status, candidate.seed, 0.0, reason="\n".join([first, *lines]))


def _by_ray(error: BaseException) -> bool:
    """Whether code of Ray's raised it: its answer to SIGTERM, or a report of a trial that is to stop."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__", "")).partition(".")[0] == RAY for frame, _ in frames)


def _place(error: BaseException) -> str:
    """The last line of a user's task file that an exception went through, such as ` (task.py, line 12)`; empty where it was in none."""
    frames = [(frame.f_globals, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(found, line) for found, line in frames if str(found.get("__name__", "")).startswith(TASK_MODULE)]
    return f" ({Path(str(own[-1][0].get('__file__'))).name}, line {own[-1][1]})" if own else ""
