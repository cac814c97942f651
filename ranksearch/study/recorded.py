"""`RecordedStudy`: what a study's folder and journal hold (trials, their front, the best one, what was measured at the end)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import optuna

from ranksearch.allocate.budget import Budgets, assignments, parse_budget
from ranksearch.compress import Cost
from ranksearch.errors import RanksearchError, UsageError, clipped, first_line
from ranksearch.front.best import Wanted, best_row, steps_saved
from ranksearch.front.failures import commonest
from ranksearch.front.front import front_record, in_order
from ranksearch.front.importance import importances
from ranksearch.front.row import Row, row_of
from ranksearch.places.files import write_atomically, write_durably
from ranksearch.search.path import is_nested
from ranksearch.space.quality import ACCURACY, Limits, limits_of, quality_of
from ranksearch.space.space import Space
from ranksearch.store.addresses import OPTUNA, confirm_addresses
from ranksearch.store.beyond import beyond_budget
from ranksearch.store.folder import place_of_results
from ranksearch.store.late import DENSE, Late
from ranksearch.store.storage import open_study
from ranksearch.store.where import FRONT, INFO, lost_nets, trial_folder
from ranksearch.study.cut import Cut, Cutter
from ranksearch.study.ledger import Ledger
from ranksearch.study.making import read_folder
from ranksearch.study.nested_runs import best_run, run_scores
from ranksearch.trial.metric import Metric
from ranksearch.words import Log, Note, unnoted


class RecordedStudy:
    """A study as it is recorded. It proposes nothing and runs nothing: that is `Study`."""

    def __init__(self, folder: Path, space: Space, info: dict[str, Any], study: optuna.Study) -> None:
        self.folder, self.space, self.info = folder, space, info
        self.results = place_of_results(space, folder, info)
        """Where workers write their nets and states."""
        self._study = study
        dense = info["dense"]
        self.dense = Cost(dense["macs"], dense["params"], dense["size_bytes"], dense["latency_ms"])
        self.metric = Metric.of_study(info)
        self._cutter: Cutter | None = None
        trials = study.get_trials(deepcopy=False)
        done = [t for t in trials if t.state.is_finished() and "result" in t.user_attrs]
        done.sort(key=lambda t: t.datetime_complete.timestamp() if t.datetime_complete else 0.0)
        rows = (row_of(t, info["dense"], self.metric) for t in done)
        self._late = Late(folder)
        least = self.metric.least_share(space.quality)
        self._ledger = Ledger(self._objectives, rows, faster=space.has_latency, least=least)
        self._ledger.score(self._late.test_accuracies())
        self._ledger.time(self._late.latencies())
        self._ledger.repeat(self._late.repeats())
        self._front_changed = False
        """Whether the front has changed since it was written."""

    def __repr__(self) -> str:
        done = f"{self.finished} of {self.planned} trials done, {len(self.front)} on the front"
        return f"<Study {self.space.name!r} in {self.folder}: {done}>"

    @classmethod
    def open(cls, folder: str | Path, *, trust: bool = False) -> Self:
        """Reads a study from its folder.

        Args:
            trust: whether to run a task file in it and to use the addresses that it names, even if they are new to this user.

        Raises:
            UsageError: the folder's files are missing or damaged, or its database is at an address that is new to this user.
            StudyError: the study's database does not answer.
        """
        folder = Path(folder)
        space, info = read_folder(folder, trust=trust)
        confirm_addresses(space, folder, (OPTUNA,), trust=trust)
        try:
            return cls(folder, space, info, open_study(space, folder, info))
        except RanksearchError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
            told = f"{type(error).__name__}: {clipped(first_line(error))}"
            raise UsageError(f"{folder} is not a readable study: {told}") from error

    @property
    def planned(self) -> int:
        return self.space.search.trials

    @property
    def done(self) -> bool:
        """Whether the planned number of trials was reached, or the study was concluded with fewer."""
        return self.finished >= self.planned or bool(self.info.get("done"))

    @property
    def finished(self) -> int:
        """Trials that ended, well or not: complete, stopped, diverged and failed ones."""
        return len(self._ledger)

    def trial_folder(self, number: int) -> Path:
        """Where a trial's net is: `plan.json` and `model.safetensors`."""
        return trial_folder(self.folder, number)

    @property
    def nested_trial(self) -> int | None:
        """The trial whose dense weights serve every budget, the best of the nested runs; None if there is none, or none yet."""
        return best_run(self._nested_scores(), self.metric)

    def _nested_scores(self) -> dict[int, float | None]:
        """Trial -> score of the nested runs that ended; None for a run that left no weights."""
        return run_scores(self._study, self.space.search.nested.runs) if is_nested(self.space) else {}

    def _nested_record(self) -> dict[str, Any] | None:
        """The nested runs for a front's record: the `trial` that plans are cut from, and the `scores` by trial."""
        scores = self._nested_scores()
        best = best_run(scores, self.metric)
        return None if best is None else {"trial": best, "scores": {str(run): score for run, score in scores.items()}}

    def at(self, budgets: Budgets) -> Cut:
        """The net within `budgets` ("flops=37%", or several that hold at once) of a nested study, cut from its weights in seconds.

        The weights stay as they are: any budget can be asked for, in any order. Its score is on the validation set.

        Raises:
            UsageError: the study is not nested, its run is not over, or the budgets cannot be met.
        """
        if self._cutter is None:
            self._cutter = Cutter(self.space, self.folder, self.nested_trial, self.info.get("latency_key"))
        return self._cutter(budgets)

    def _note(self, **facts: Any) -> None:
        self.info = self.info | facts
        write_durably(self.folder / INFO, json.dumps(self.info, indent=2))

    # What is known ----------------------------------------------------------------------------------------------------

    @property
    def _objectives(self) -> list[str]:
        return list(self.space.search.objectives)

    @property
    def cost(self) -> str:
        """The first cost that is searched."""
        return next((name for name in self._objectives if name != "accuracy"), "macs")

    @property
    def trials(self) -> list[Row]:
        """A row per finished trial, in their order."""
        return [row.unfolded() for row in self._ledger.rows]

    @property
    def rows(self) -> list[Row]:
        """The rows as the study holds them, with folded curves; do not change them."""
        return self._ledger.rows

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of finished trials."""
        return {str(status): count for status, count in self._ledger.counts.items()}

    @property
    def front(self) -> list[Row]:
        """The nondominated complete trials, the best metric first; if the metric has a limit, those above it, the cheapest first."""
        return [row.unfolded() for row in self._ledger.front]

    @property
    def on_front(self) -> set[int]:
        """Numbers of the trials on the front."""
        return self._ledger.on_front

    @property
    def steps_saved(self) -> float:
        """Share of the finished trials' training steps that early stopping spared."""
        return steps_saved(self.rows)

    def importances(self) -> dict[str, dict[str, float]]:
        """Target -> searched parameter -> the share that it explains; empty with too few trials."""
        return importances(self._study, self.rows, self._objectives)

    def progress(self) -> dict[str, float]:
        """How far the study is, in numbers."""
        return self._ledger.progress()

    @property
    def leader(self) -> Row | None:
        """The complete trial with the best metric so far."""
        return self._ledger.best

    @property
    def hypervolume(self) -> float:
        """The hypervolume of the front in (share, costs as ratios of dense), against share 0 (or the limit's) and the dense costs."""
        return self._ledger.hypervolume

    def status(self, number: int) -> str | None:
        """How a trial ended, else "running", "waiting" or "given back" (run again under another number); None if there is none."""
        if number in self._ledger:
            return self._ledger[number]["status"]
        trials = self._study.get_trials(deepcopy=False)
        if not 0 <= number < len(trials):
            return None
        state = trials[number].state
        return "given back" if state.is_finished() else state.name.lower()

    def best(self, budget: Budgets | None = None, *, budgets: Budgets = (), accuracy: str | float | None = None) -> Row:
        """The best complete trial within the given budgets, such as budget="flops=30%", budgets=["params=40%", "size=1MiB"].

        That is the one with the best metric. With a limit `accuracy` ("-1": points below dense, "-2%": a share, "90": the value), or in a
        study whose space has such a limit, it is the cheapest net above it, by the first cost that is searched.

        Raises:
            UsageError: no trial meets them.
        """
        given = [*assignments(budgets), *assignments(budget or ())]
        return self.picked(given, {} if accuracy is None else {ACCURACY: accuracy}).unfolded()

    def picked(self, budgets: Budgets, at_least: Limits) -> Row:
        """Picks like `best`, by conditions as the command line has them; without a limit among them, the study's own holds."""
        wanted = self._wanted(budgets, at_least)
        own = wanted if at_least else replace(wanted, quality=self.space.quality)
        return best_row(self.rows, self.dense, self.metric, self.space, own)

    def _wanted(self, budgets: Budgets, at_least: Limits) -> Wanted:
        limits = [parse_budget(*text.partition("=")[::2]) for text in assignments(budgets)]
        return Wanted(limits, quality_of(limits_of(at_least)))

    # Latencies, test set and front file -------------------------------------------------------------------------------

    def is_timed(self, number: int) -> bool:
        """Whether a trial's net was timed at the end of the study."""
        return str(number) in self._late.latencies()

    def note_latencies(self, found: Mapping[int, tuple[float, float]], *, measured_with: str) -> None:
        """Keeps what was measured at the end, trial number -> (milliseconds, ratio of dense); the front is made anew.

        Args:
            measured_with: the stopwatch's key: device, runtime, versions, batch, threads.
        """
        self._note(measured_with=measured_with)
        self._ledger.time(self._late.note_latencies(found))
        self.write_front()

    def note_layer_times(
        self, dense: Mapping[str, float], trials: Mapping[str, Mapping[str, float]], *, measured_with: str
    ) -> None:
        """Keeps milliseconds by layer, for the dense net and by trial (its number as text)."""
        before = self.info.get("layer_ms", {}).get("trials", {})
        self._note(layer_ms={"measured_with": measured_with, "dense": dict(dense), "trials": {**before, **trials}})

    def test_accuracies(self) -> dict[str, float | None]:
        """Trial number (or "dense") -> the metric on the test set, for the nets that were scored at the end."""
        return self._late.test_accuracies()

    def score_test(self, evaluate: Callable[[Row | None], float | None], log: Log, note: Note = unnoted) -> None:
        """Scores the dense net and the front on the test set, once each: `evaluate(row)`, or None for the dense net.

        `evaluate` returns None for a net whose files are lost.
        """
        self._ledger.score(self._late.score(self._ledger.front, self.metric, evaluate, log, note))
        self.write_front()

    def repeats(self, number: int) -> list[dict[str, float | None]]:
        """The metric by split for each time that a trial was trained again at the end."""
        return self._late.repeats().get(str(number), [])

    def note_repeat(self, number: int, found: Mapping[str, float | None]) -> None:
        """Keeps what a trial reached with another seed; the front is written anew."""
        self._ledger.repeat(self._late.note_repeat(number, found))
        self.write_front()

    def front_record(self, *, budgets: Budgets = (), at_least: Limits = ()) -> dict[str, Any]:
        """What `front.json` holds; with conditions, only the part of the front that meets them all (the hypervolume is of the whole)."""
        front, wanted = self._ledger.front, self._wanted(budgets, at_least)
        if budgets or at_least:
            front = wanted.met_by(front, self.dense, self.metric)
            front = front or [best_row(self.rows, self.dense, self.metric, self.space, wanted)]
            if wanted.quality is not None:
                front = in_order(front, self.cost)
        dense = {**self.info["dense"], "test_accuracy": self._late.test_accuracies().get(DENSE)}
        quality = wanted.quality or self.space.quality
        return front_record(self.space, dense, self.metric, front, self._ledger.hypervolume, self.facts(), quality)

    def facts(self) -> dict[str, Any]:
        """How far the study is: `state` (running, complete, or failed if it is over without a net), trials by status, the commonest
        reason of failures, sizes of the splits, what the last trials gained, what a preview knows beyond the budget, and, once the study is
        over, the trials of the front whose nets are lost. `nested` holds the runs that its nets are cut from.
        """
        state = "running" if not self.done else "complete" if self.counts.get("complete") else "failed"
        return {
            "state": state, "planned": self.planned, "counts": self.counts, "failures": commonest(self._ledger.reasons()),
            "samples": self.info.get("samples") or {"validation": self.space.validation, "test": None}, "gains": self._ledger.gains(),
            "best": None if self.leader is None else {"trial": self.leader.trial, "val_accuracy": self.leader.val_accuracy},
            "measured_with": self.info.get("measured_with"),
            "preview": beyond_budget(self.folder, self.space, self.metric.direction),
            "lost": lost_nets(self.folder, (row.trial for row in self._ledger.front)) if self.done else [],
            "nested": self._nested_record(),
        }  # fmt: skip

    def write_front(self) -> None:
        write_atomically(self.folder / FRONT, json.dumps(self.front_record(), allow_nan=False))
        self._front_changed = False
