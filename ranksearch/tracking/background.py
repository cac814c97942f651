"""The mirror in a thread of its own: a store that is slow, or away, holds up no trial and loses no result, for those are on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranksearch.search.front import Row
from ranksearch.search.study import Study
from ranksearch.tracking.mirror import MIRROR_ERRORS, Mirror
from ranksearch.tracking.store import store_uri

PAUSE_SECONDS = 60.0
"""A store that failed is left alone for so long; what was not logged meanwhile is logged at the end."""


class BackgroundMirror:
    """Calls a `Mirror` in turn, beside the study. Made before the first trial: the store's schema is created then."""

    def __init__(self, study: Study, runs: Path, log: Callable[[str], None]) -> None:
        self._study, self._runs, self._log = study, runs, log
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._mirror: Mirror | None = None
        self._paused_until = 0.0
        self.failed: str | None = None
        """What the store's last failure said; None where it has not failed since."""
        opened = self._worker.submit(self._guarded, lambda mirror: None)
        if store_uri(runs, study.space.tracking.uri).startswith("sqlite:"):
            opened.result()  # the store's schema is made before the trials need the cores; a server is not waited for

    def log_trial(self, row: Row) -> None:
        """Queues a trial; returns at once."""
        progress = self._study.progress()
        self._worker.submit(self._guarded, lambda mirror: mirror.log_trial(row, progress))

    def finish(self, *, complete: bool) -> None:
        """Waits for what is queued, logs what was missed, and the front."""
        self._worker.submit(self._guarded, lambda mirror: mirror.finish(complete=complete), at_once=True).result()
        self._worker.shutdown()

    def _guarded(self, action: Callable[[Mirror], None], *, at_once: bool = False) -> None:
        if time.monotonic() < self._paused_until and not at_once:
            return
        try:
            if self._mirror is None:
                self._mirror = Mirror(self._study, self._runs)
            action(self._mirror)
            self.failed = None
        except MIRROR_ERRORS as error:
            self._paused_until, first = time.monotonic() + PAUSE_SECONDS, self.failed is None
            self.failed = (str(error) or repr(error)).splitlines()[0]
            if first:
                self._log(
                    f"MLflow: not logged ({self.failed}); the results are in {self._study.folder}, and "
                    f"`ranksearch sync {self._study.folder}` brings MLflow up to date once it is back"
                )
