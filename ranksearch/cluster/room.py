"""How many trials run at once: as many as the cluster holds at a moment, or fewer if their measured memory would not fit."""

from __future__ import annotations

import time
from collections.abc import Callable

from ranksearch.cluster.nodes import GCS_ERRORS, machines, room_at_most, room_now, wanted
from ranksearch.cluster.packing import GIB, Needs

ASK_SECONDS = 1.0


class Room:
    """How many trials may be under way at this moment; the cluster is asked at most once a second."""

    def __init__(self, needs: Needs, log: Callable[[str], None]) -> None:
        self._needs, self._log = needs, log
        self._known, self._asked_at, self._peak = 0, float("-inf"), 0
        self._none_since: float | None = None

    def __call__(self) -> int:
        now = time.monotonic()
        if now > self._asked_at + ASK_SECONDS:
            try:
                room = room_now(self._needs, self._peak)
                self._known = wanted(room, room_at_most(self._needs))
            except GCS_ERRORS:
                room = self._known  # the head does not answer; `head.py` watches whether it is lost
            self._asked_at = time.monotonic()
            self._none_since = None if room else self._none_since or now
        return self._known

    @property
    def seconds_without(self) -> float:
        """For how long no node has had room for a trial."""
        return 0.0 if self._none_since is None else time.monotonic() - self._none_since

    def learn(self, peak_bytes: int | None) -> None:
        """Takes note of a one-process trial's own memory at its peak (None if not known): no more such trials run at once than fit the
        nodes' memory. The limit never rises again."""
        if not peak_bytes or peak_bytes <= self._peak:
            return
        before, self._peak = self._peak, peak_bytes
        fewer, room = room_now(self._needs, peak_bytes), room_now(self._needs, before)
        if fewer < room:
            memory = sum(machine.memory for machine in machines())
            self._log(
                f"memory: a trial took {peak_bytes / GIB:.2f} GiB at its peak, and the cluster's workers have {memory / GIB:.1f} GiB: "
                f"{fewer} trials at once from here on, not {room}; with a smaller batch (recipe.batch_size, or the task's own loader) "
                f"more fit"
            )
        self._asked_at = float("-inf")
