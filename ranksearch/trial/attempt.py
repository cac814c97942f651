"""One attempt at a trial: whatever goes wrong in it becomes a result with its reason."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable

import torch

from ranksearch.compress import Net
from ranksearch.places.place import PlaceError
from ranksearch.tasks.dense import State
from ranksearch.tasks.device import out_of_memory
from ranksearch.tasks.parallel import ALONE, Group, PeerLost
from ranksearch.tasks.task import Task
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.checkpoint import CheckpointFile, Leaving, stays
from ranksearch.trial.result import Status, TrialResult
from ranksearch.trial.session import Report
from ranksearch.trial.trial import run_trial

FULL = (errno.ENOSPC, errno.EDQUOT)


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
) -> TrialResult:
    """Runs a trial; an exception becomes a result with its reason, so that one bad trial does not end a study.

    Raises:
        Leaving: the machine is going to be taken away, as `leaving` said; the trial's state is written.
        PeerLost: another process of the group is gone; the trial is to be run again, from its state.
    """
    checkpoint = CheckpointFile(candidate.checkpoint, checkpoint_seconds, leaving)
    try:
        return run_trial(
            task, dense, net, candidate.plan, candidate.recipe, seed=candidate.seed, report=report, save_to=candidate.save_to,
            checkpoint=checkpoint, rungs=candidate.rungs, latency=candidate.latency, group=group,
        )  # fmt: skip
    except (Leaving, PeerLost):
        raise
    except torch.OutOfMemoryError as error:
        return TrialResult(Status.FAILED, candidate.seed, 0.0, reason=out_of_memory(error))
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()[-6:]
        full = isinstance(error, OSError) and error.errno in FULL
        status = Status.NO_SPACE if full else Status.NO_PLACE if isinstance(error, PlaceError) else Status.FAILED
        return TrialResult(status, candidate.seed, 0.0, reason="\n".join([f"{type(error).__name__}: {error}", *lines]))
