"""`Ledger`: the rows of a study's finished trials and its front, updated as trials come in, never computed anew over the whole study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from ranksearch.front.front import dominates, front_hypervolume, in_order, merit, same_net
from ranksearch.front.row import Row, repeated
from ranksearch.trial.result import Status


class Ledger:
    """Rows by trial number, and the front: the nondominated complete ones, with `faster` only those no slower than the dense net."""

    def __init__(
        self, objectives: Sequence[str], rows: Iterable[Row] = (), *, faster: bool = False, least: float | None = None
    ) -> None:
        """
        Args:
            least: a limit on the share; rows below it are not on the front, which is then ordered by cost.
        """
        self._objectives, self._faster, self._least = tuple(objectives), faster, least
        self._rows: dict[int, Row] = {}
        self._front: list[Row] = []
        self._best: Row | None = None
        self.counts: dict[Status, int] = {}
        """Status -> number of trials."""
        self._worth: list[tuple[int, float]] = []
        """(number of finished trials, hypervolume) at each change of the front."""
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]

    def add(self, row: Row) -> bool:
        """Adds a finished trial, once; returns whether it is on the front now."""
        if row.trial in self._rows:
            raise ValueError(f"trial {row['trial']} is in the ledger already")
        self._rows[row.trial] = row
        self.counts[row.status] = self.counts.get(row.status, 0) + 1
        if not row.complete:
            return False
        if self._best is None or merit(row) > merit(self._best):
            self._best = row
        if taken := self._take_to_front(row):
            self._worth.append((len(self._rows), self.hypervolume))
        return taken

    def _take_to_front(self, row: Row) -> bool:
        if self._faster and (row.latency_ratio or 0.0) > 1:
            return False
        if self._least is not None and row.worth < self._least:
            return False
        if any(
            dominates(other, row, self._objectives) or same_net(other, row, self._objectives) for other in self._front
        ):
            return False
        self._front = [other for other in self._front if not dominates(row, other, self._objectives)]
        self._front.append(row)
        self.__dict__.pop("hypervolume", None)
        return True

    @property
    def rows(self) -> list[Row]:
        """Every finished trial, in the order of their numbers."""
        return [self._rows[number] for number in sorted(self._rows)]

    @property
    def front(self) -> list[Row]:
        """The nondominated complete trials, the best metric first, or the cheapest first if the metric has a limit."""
        cost = next((name for name in self._objectives if name != "accuracy"), None)
        return in_order(self._front, cost if self._least is not None else None)

    @property
    def on_front(self) -> set[int]:
        """Numbers of the trials on the front."""
        return {row.trial for row in self._front}

    @property
    def best(self) -> Row | None:
        """The complete trial with the best metric; among equals, the one with the fewest MACs."""
        return self._best

    @cached_property
    def hypervolume(self) -> float:
        return front_hypervolume(self._front, self._objectives, self._least)

    def progress(self) -> dict[str, float]:
        """How far the study is, in numbers: finished trials by status, hypervolume, size of the front, the best metric."""
        found = {"finished_trials": len(self), "hypervolume": self.hypervolume, "front_size": len(self._front)}
        best = {} if self._best is None else {"best_within_budget": self._best.value}
        return found | best | {f"{status.replace(' ', '_')}_trials": count for status, count in self.counts.items()}

    def gains(self) -> dict[str, float] | None:
        """What the last trials added to the hypervolume, as shares of what it is now; None before there is a front.

        `last_gain` is that of the last `last` trials, a quarter of all but at most five; `half_gain` is that of the second half.
        """
        if not self._worth or not self._worth[-1][1]:
            return None
        finished, (_, now) = len(self._rows), self._worth[-1]
        last = max(1, min(5, finished // 4))

        def since(count: int) -> float:
            before = next((worth for at, worth in reversed(self._worth) if at <= count), 0.0)
            return max(0.0, (now - before) / now)

        return {"last": last, "last_gain": since(finished - last), "half_gain": since(finished // 2)}

    def reasons(self) -> list[str]:
        """Why trials failed or diverged, in the order of their numbers."""
        return [row["reason"] or row["status"] for row in self.rows if row["status"] in ("failed", "diverged")]

    def time(self, found: Mapping[str, Sequence[float]]) -> None:
        """Writes latencies (trial number as text -> milliseconds, ratio of dense) into the rows, and makes the front anew."""
        if not found:
            return
        for key, (milliseconds, ratio) in found.items():
            if int(key) in self._rows:
                row = self._rows[int(key)]
                self._rows[row.trial] = replace(row, latency_ms=milliseconds, latency_ratio=ratio)
        self._rebuild()

    def score(self, test: Mapping[str, float | None]) -> None:
        """Writes test accuracies (trial number as text -> percent) into the rows."""
        if not test:
            return
        for key, accuracy in test.items():
            if key.isdigit() and int(key) in self._rows:
                self._rows[int(key)] = replace(self._rows[int(key)], test_accuracy=accuracy)
        self._rebuild()

    def repeat(self, found: Mapping[str, Sequence[Mapping[str, float | None]]]) -> None:
        """Writes the results of repeats (trial number as text -> metric by split) into the rows."""
        for key, again in found.items():
            if int(key) in self._rows:
                row = self._rows[int(key)]
                self._rows[row.trial] = replace(row, repeats=repeated(row, again))
        if found:
            self._rebuild()

    def _rebuild(self) -> None:
        """Makes the front and the best trial anew after rows were replaced."""
        self._front = []
        self.__dict__.pop("hypervolume", None)
        complete = [row for row in self.rows if row.complete]
        self._best = max(complete, key=merit, default=None)
        for row in complete:
            self._take_to_front(row)
