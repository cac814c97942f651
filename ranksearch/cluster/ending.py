"""A signal that ends a study and reaches Ray's own processes, too: a batch system or a shell signals a whole group.

Ray ends a driver whose Ray has died from within, at once and with an exit code of its own: no exception, handler or sentence of ours gets
through any more. So a thread hears of the signal before Python's handler does, and a child that nothing else ends says whether it was
for the group.
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
"""How long the child may take to end by a signal to the group; of one to this process alone it hears nothing."""
WAITS = "import sys; sys.stdin.read()"


@contextmanager
def ended_with_group(says: Callable[[], str], code: int) -> Iterator[None]:
    """Within it SIGTERM to the group of this process and of the Ray that it started ends the process at once, with a sentence on stderr.

    For the main thread alone, which has signals.
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
    """Whether a signal has ended the child, or does now."""
    with suppress(subprocess.TimeoutExpired):
        return child.wait(GROUP_SECONDS) == -signal.SIGTERM
    return False
