"""`Late`: what is measured once the trials are over (test accuracies, latencies, repeats), kept in files beside the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path

from ranksearch.front.row import Row
from ranksearch.places.files import write_durably
from ranksearch.store.records import LATENCIES, REPEATED, TEST_ACCURACIES, read_record
from ranksearch.store.where import MEASURED, REPEATS, TEST
from ranksearch.trial.metric import Metric
from ranksearch.words import Log, Note

DENSE = "dense"
"""The dense net's key where a trial has its number."""


class Late:
    """The files `latencies.json`, `test.json` and `repeats.json` of a study's folder."""

    def __init__(self, folder: Path) -> None:
        self._latencies, self._test, self._repeats = folder / MEASURED, folder / TEST, folder / REPEATS

    def latencies(self) -> dict[str, list[float]]:
        """Trial number -> (milliseconds, ratio of dense) of the nets that were timed."""
        return read_record(self._latencies, LATENCIES) if self._latencies.is_file() else {}

    def note_latencies(self, found: Mapping[int, tuple[float, float]]) -> dict[str, list[float]]:
        """Adds latencies by trial number; returns all that are known."""
        known = self.latencies() | {str(number): list(times) for number, times in found.items()}
        write_durably(self._latencies, json.dumps(known, indent=2))
        return known

    def repeats(self) -> dict[str, list[dict[str, float | None]]]:
        """Trial number -> the metric by split for each time that it was trained again; None if that failed."""
        return read_record(self._repeats, REPEATED) if self._repeats.is_file() else {}

    def note_repeat(self, number: int, found: Mapping[str, float | None]) -> dict[str, list[dict[str, float | None]]]:
        """Adds one repeat of a trial; returns all that are known."""
        known = self.repeats()
        known.setdefault(str(number), []).append(dict(found))
        write_durably(self._repeats, json.dumps(known, indent=2, allow_nan=False))
        return known

    def test_accuracies(self) -> dict[str, float | None]:
        """Trial number (or "dense") -> the metric on the test set, for the nets that were scored; None if it was not finite."""
        return read_record(self._test, TEST_ACCURACIES) if self._test.is_file() else {}

    def score(
        self,
        front: Sequence[Row],
        metric: Metric,
        evaluate: Callable[[Row | None], float | None],
        log: Log,
        note: Note,
    ) -> dict[str, float | None]:
        """Scores the dense net (`evaluate(None)`) and a front's nets, once each; returns all that is known.

        A net for which `evaluate` returns None, because its files are lost, stays without a score.

        Args:
            note: is told before each net, and at the end, how many of those that had no score have been looked at.
        """
        known = self.test_accuracies()
        keys = {DENSE if row is None else str(row.trial): row for row in [None, *front]}
        missing = [key for key in keys if key not in known]
        for i, (key, row) in enumerate(keys.items(), start=1):
            if key not in missing:
                continue
            note("test set", f"{missing.index(key)} of {len(missing)} nets")
            if (found := evaluate(row)) is not None:
                known[key] = found if isfinite(found) else None
                net = "the dense net" if row is None else f"trial {key}"
                text = metric.text(found) if isfinite(found) else f"{found}, which is recorded as not measured"
                log(f"[{i}/{len(keys)}] test {metric.name} of {net}: {text}")
                write_durably(self._test, json.dumps(known, indent=2))
        if missing:
            note("test set", f"{len(missing)} of {len(missing)} nets")
        return known
