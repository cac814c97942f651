"""Whether the head of a cluster still answers. If it does not, Ray's calls wait without end, and finally Ray ends the process."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ranksearch.cluster.nodes import GCS_ERRORS, answers
from ranksearch.cluster.ray_private import control_store

LOOK_SECONDS, ANSWER_SECONDS = 3.0, 5.0
RAY_ENDS_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112  Ray's spelling
"""A control store that comes back within this time (its fault tolerance restarts it) was not lost; after it Ray ends the process."""
END_SECONDS = 10.0
"""How long a driver that waits for a lost head may take to notice; then the watch prints the driver's sentence and ends the process."""
PATIENCE_SECONDS = max(LOOK_SECONDS, RAY_ENDS_SECONDS - 2 * END_SECONDS)


class HeadWatch:
    """Watches the control store in a thread of its own, since the driver's thread may be waiting for that store."""

    def __init__(self, says: str) -> None:
        self._says = says
        self._address = ray.get_runtime_context().gcs_address
        self._client = control_store()
        self.lost = False
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="head-watch").start()

    def _answers(self) -> bool:
        host, _, port = self._address.rpartition(":")
        if not answers(host, int(port), ANSWER_SECONDS):
            return False
        try:
            self._client.internal_kv_exists(b"ranksearch", None, timeout=ANSWER_SECONDS)
        except GCS_ERRORS:
            return False
        return True

    def _watch(self) -> None:
        heard = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            if self._answers():
                heard = time.monotonic()
            elif time.monotonic() > heard + PATIENCE_SECONDS:
                self.lost = True
                break
        if self.lost and not self._over.wait(END_SECONDS):
            print(f"ranksearch: {self._says}", file=sys.stderr, flush=True)
            os._exit(1)  # the driver's thread waits within Ray, where no exception reaches it

    def stop(self) -> None:
        self._over.set()


@contextmanager
def watched_head(says: str) -> Iterator[HeadWatch]:
    """Watches the head while the block runs; `says` is printed if the process must be ended."""
    watch = HeadWatch(says)
    try:
        yield watch
    finally:
        watch.stop()
