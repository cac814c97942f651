"""The mirror in a thread of its own: a store that is slow or down delays no trial and loses no result, since results are on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranksearch.errors import first_line
from ranksearch.front.row import Row
from ranksearch.places.urls import without_password
from ranksearch.study.study import Study
from ranksearch.tracking.made_models import MadeModels, begin
from ranksearch.tracking.mirror import MIRROR_ERRORS, Mirror
from ranksearch.tracking.store import is_server, store_uri
from ranksearch.tracking.view import View
from ranksearch.words import Log, Note, unnoted

PAUSE_SECONDS = 60.0
"""How long a store that failed is left alone; what was not logged meanwhile is logged at the end."""
REFRESH_SECONDS = 60.0
"""How often at most a changed front is shown on its run while the study runs: drawing takes a second or two."""


class BackgroundMirror:
    """Calls a `Mirror` one call after the other, beside the study. Make it before the first trial, since it creates a database's schema."""

    def __init__(self, study: Study, runs: Path, log: Log, note: Note = unnoted) -> None:
        """
        Args:
            note: is told, in several threads, how far the end is.
        """
        self._study, self._runs, self._log, self._note = study, runs, log, note
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._mirror: Mirror | None = None
        self._made: MadeModels | None = None
        self._paused_until = 0.0
        self._shown: set[int] = set()
        self._shown_at = time.monotonic()
        self.failed: str | None = None
        """The message of the store's last failure; None if its last call was fine."""
        self._view = View.of(study)
        self._opened = self._worker.submit(self._guarded, lambda mirror: None)
        if not is_server(store_uri(runs, study.space.tracking.uri)):
            self._opened.result()  # waits, so that a database's schema is made before the trials need the cores; a server makes its own

    def log_trial(self, row: Row) -> None:
        """Queues a trial; returns at once. What changes while the study goes on is read here, not in the thread."""
        progress, on_front = self._study.progress(), self._study.on_front
        self._worker.submit(self._guarded, lambda mirror: mirror.log_trial(row, progress, on_front))
        if on_front != self._shown and time.monotonic() > self._shown_at + REFRESH_SECONDS:
            self._shown, self._shown_at, view = on_front, time.monotonic(), View.of(self._study)
            self._worker.submit(self._guarded, lambda mirror: mirror.show(view, {}, complete=False))

    def begin_models(self) -> None:
        """Begins to make models of the front's nets, in processes of their own; `finish` logs them. Call it once nothing is timed any more.

        Nothing begins where models are not wanted, are in the store already, or the store is away.
        """
        study, mirror = self._study, self._mirror
        if self._made is not None or mirror is None or self.failed is not None or not study.space.tracking.models:
            return
        trials = [row["trial"] for row in View.of(study).front_rows if row["trial"] not in mirror.models]
        self._made = begin(
            study.space, study.folder, trials, study.dense.size_bytes,
            lambda done: self._note("models made", f"{done} of {len(trials)}"),
        )  # fmt: skip

    def finish(self, *, complete: bool) -> None:
        """Waits for what is queued, then logs what was missed, the front, and, if the study is complete, its nets."""
        try:
            if complete:
                self._opened.result()
                self.begin_models()
            elif self._made is not None:
                self._made.close()
            view, importances, made = View.of(self._study), self._study.importances(), self._made
            self._worker.submit(
                self._guarded,
                lambda mirror: mirror.finish(view, importances, self._log, self._note, complete=complete, made=made),
                at_once=True,
            ).result()
        finally:
            if self._made is not None:
                self._made.close()
        self._worker.shutdown()

    def _guarded(self, action: Callable[[Mirror], None], *, at_once: bool = False) -> None:
        if time.monotonic() < self._paused_until and not at_once:
            return
        try:
            if self._mirror is None:
                self._mirror = Mirror(self._view, self._runs)
            action(self._mirror)
            self.failed = None
        except MIRROR_ERRORS as error:
            self._paused_until, first = time.monotonic() + PAUSE_SECONDS, self.failed is None
            self.failed = without_password(first_line(error))
            if first:
                self._log(
                    f"MLflow: not logged ({self.failed}); the results are in {self._study.folder}, and "
                    f"`ranksearch sync {self._study.folder}` brings MLflow up to date once it is back"
                )
