"""CUDA MPS on one machine: with it the kernels of several processes run side by side on a GPU, without it they take turns.

    started(folder)        starts our own control daemon, with its pipes in `folder`; returns the reason if it cannot
    stop(folder)           stops that daemon, and no other
    use(folder)            lets CUDA that this process or its children begin later go through the daemon, if it runs
    side_by_side(folder)   does all of these around a block
    state()                what a machine has, for `doctor`

If CUDA itself finds a daemon that somebody else started, that one is used as it is and left alone. Only the standard library is imported,
so that a worker answers at once.

Reference: https://docs.nvidia.com/deploy/mps/ (the control daemon, its environment and its commands).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

CONTROL, PIPES, LOGS = "nvidia-cuda-mps-control", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
SECONDS = 15.0
"""A command that takes longer counts as failed."""
ABSENT, OTHERS, AVAILABLE = "absent", "others", "available"
TAKEN = "somebody's MPS is running already, and is used"
FIRST_CONTEXT = (
    "import ctypes, sys; cuda, context = ctypes.CDLL('libcuda.so.1'), ctypes.c_void_p(); "
    "sys.exit(cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))"
)
"""A program that begins CUDA, without any library."""


def new_folder() -> str:
    """A free path for a daemon's pipes; it is short, since the path of a socket has at most a hundred letters."""
    return str(Path(tempfile.gettempdir()) / f"ranksearch-mps-{uuid.uuid4().hex[:12]}")


def state() -> str:
    """`ABSENT` without the control program, `OTHERS` if somebody's daemon runs, else `AVAILABLE`."""
    if shutil.which(CONTROL) is None:
        return ABSENT
    return OTHERS if _answers(os.environ) else AVAILABLE


def started(folder: str) -> str | None:
    """Starts a daemon with its pipes in the new `folder`; returns None if it runs, else why trials take turns.

    A daemon under which CUDA cannot begin (in a container without shared memory, say) is stopped again.
    """
    found = state()
    if found != AVAILABLE:
        return f"there is no {CONTROL}" if found == ABSENT else TAKEN
    try:
        Path(folder).mkdir(mode=0o700)
        _call(["-d"], _environment(folder))
        _run([sys.executable, "-c", FIRST_CONTEXT], _environment(folder))
    except (OSError, subprocess.SubprocessError) as error:
        stop(folder)
        return f"MPS does not work here ({_said(error)})"
    return None


def stop(folder: str) -> None:
    """Stops the daemon of `folder`, if there is one, and removes its pipes."""
    if not Path(folder).is_dir():
        return
    with suppress(OSError, subprocess.SubprocessError):  # it has ended by itself, or never begun
        _call([], _environment(folder), "quit\n")
    shutil.rmtree(folder, ignore_errors=True)


def use(folder: str | None) -> None:
    """Lets CUDA, if this process has not begun it, go through the daemon of `folder`, if that was started on this machine."""
    if folder is not None and Path(folder).is_dir():
        os.environ[PIPES] = folder


@contextmanager
def side_by_side(folder: str) -> Iterator[str | None]:
    """Runs a daemon for the processes that the block starts, and ends it with the block; yields the reason if there is none."""
    before, reason = os.environ.get(PIPES), started(folder)
    try:
        if reason is None:
            use(folder)
        yield reason
    finally:
        if reason is None:
            os.environ.pop(PIPES, None)
            if before is not None:
                os.environ[PIPES] = before
            stop(folder)


def _environment(folder: str) -> dict[str, str]:
    """The environment of a daemon, which serves all GPUs even if its starter, such as a task of Ray's, is given none."""
    mine = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return {**mine, PIPES: folder, LOGS: folder}


def _answers(environment: Mapping[str, str]) -> bool:
    try:
        _call([], environment, "get_server_list\n")
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _call(options: list[str], environment: Mapping[str, str], command: str = "") -> None:
    _run([CONTROL, *options], environment, command)


def _run(command: list[str], environment: Mapping[str, str], said: str = "") -> None:
    # no pipe for the output: a daemon would hold it open
    subprocess.run(
        command, env=dict(environment), input=said.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        timeout=SECONDS, check=True,
    )  # fmt: skip


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{Path(error.cmd[0]).name} ended with {error.returncode}"
    return f"{type(error).__name__}"
