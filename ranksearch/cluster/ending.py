"""A signal that ends a study and has reached Ray's own processes, too: `timeout`, a batch system or a shell signals a whole group.

Ray ends a driver whose Ray has died from within, where no exception and no exit code of ours gets through, some time after.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

from ranksearch.cluster.connection import head_is_gone

LOOK_SECONDS = 0.1
GRACE_SECONDS = 2.0
"""How long a driver whose Ray is gone may take to end by itself before it is ended with the sentence that it could not say."""


def end_with_ray(says: str, code: int) -> None:
    """From now on ends this process soon after the Ray that it started is gone, with a sentence on stderr, unless it ends by itself."""

    def watch() -> None:
        while not head_is_gone():
            time.sleep(LOOK_SECONDS)
        time.sleep(GRACE_SECONDS)
        if not head_is_gone():  # it was this process that ended its Ray, in good order
            return
        with suppress(OSError, ValueError):
            print(f"ranksearch: {says}", file=sys.stderr, flush=True)
        os._exit(code)

    threading.Thread(target=watch, daemon=True, name="end-with-ray").start()
