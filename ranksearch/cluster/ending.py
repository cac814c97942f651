"""Ends a study well by a signal that reaches Ray's own processes, too, as when a batch system or a shell signals a whole group.

When Ray's processes die, Ray ends the driver from within, at once and with its own exit code: no exception, handler or sentence of ours
gets through any more. So a thread hears of the signal before Python's handler does, and a child process, which nothing else ends, shows
whether the signal went to the group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ranksearch.cluster.ray_private import own_node

GROUP_SECONDS = 0.2
"""How long the child may take to end after a signal to the group; a signal to only this process does not reach it."""
WAITS = "import sys; sys.stdin.read()"


@contextmanager
def ended_with_group(says: Callable[[], str], code: int) -> Iterator[None]:
    """Makes a SIGTERM to this process's group, with the Ray that it started, end the process at once, with a sentence on stderr.

    Only the main thread, which gets the signals, may use this.
    """
    child = subprocess.Popen([sys.executable, "-IS", "-c", WAITS], stdin=subprocess.PIPE)
    heard, hears = os.pipe()
    os.set_blocking(hears, False)

    def watch() -> None:
        while numbers := os.read(heard, 64):
            if signal.SIGTERM in numbers and _ended(child) and (node := own_node()) is not None and node.head:
                with suppress(OSError, ValueError):
                    print(f"ranksearch: {says()}", file=sys.stderr, flush=True)
                os._exit(code)

    thread = threading.Thread(target=watch, daemon=True, name="ended-with-group")
    thread.start()
    before = signal.set_wakeup_fd(hears, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(hears)
        thread.join()
        os.close(heard)
        child.communicate()


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether a signal has ended the child, or ends it within a moment."""
    with suppress(subprocess.TimeoutExpired):
        return child.wait(GROUP_SECONDS) == -signal.SIGTERM
    return False
