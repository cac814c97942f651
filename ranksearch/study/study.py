"""`Study`: a folder and its Optuna study. It asks for candidates, is told results, and knows the front.

The journal on disk is the truth: parameters, plans and results of every trial are in it, so a study that lost its driver is
opened again from its folder. Ray and MLflow are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from ranksearch.allocate.budget import Budgets, assignments, parse_budget
from ranksearch.compress import Cost
from ranksearch.compress.export import PLAN, WEIGHTS, holds_net
from ranksearch.errors import RanksearchError, StudyError, UsageError, clipped, first_line
from ranksearch.places.files import write_atomically
from ranksearch.places.place import Remote, fetch
from ranksearch.search.optuna_private import id_of, storage_of
from ranksearch.search.parametrize import Opening
from ranksearch.search.path import NESTED_RUN, is_nested
from ranksearch.search.workbench import Workbench
from ranksearch.space.quality import ACCURACY, Limits, limits_of, quality_of
from ranksearch.space.space import Space
from ranksearch.study.addresses import OPTUNA, confirm_addresses
from ranksearch.study.best import Wanted, best_row, steps_saved
from ranksearch.study.cut import Cut, Cutter
from ranksearch.study.folder import (  # fmt: skip
    FRONT,
    GIVEN,
    INFO,
    JOURNAL,
    SPACE,
    UNFINISHED,
    clear,
    locked,
    new_folder,
    place_of_results,
    trial_folder,
)
from ranksearch.study.front import front_record, in_order
from ranksearch.study.importance import importances
from ranksearch.study.journal import mend_journal, together
from ranksearch.study.late import DENSE, Late
from ranksearch.study.ledger import Ledger
from ranksearch.study.making import begin, read_folder, samples_of, space_text
from ranksearch.study.orphans import settle_orphans
from ranksearch.study.outcomes import record_of, tell_optuna
from ranksearch.study.proposals import Proposals, nested_trial
from ranksearch.study.row import Row, row_of
from ranksearch.study.stopping import recorded_rungs, rung_point
from ranksearch.study.storage import forget_study, open_study
from ranksearch.study.verdict import commonest, mend
from ranksearch.tasks.task import Task
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.checkpoint import CheckpointFile
from ranksearch.trial.metric import Metric
from ranksearch.trial.nested import NESTED
from ranksearch.trial.result import TrialResult

NODE_LOSSES = 20
"""How many nodes a trial may lose: one that takes down every node it is put on ends there."""


class Study:
    """A study on disk. `create` makes a new one, `open` continues or reads one."""

    def __init__(self, folder: Path, space: Space, info: dict[str, Any], study: optuna.Study) -> None:
        self.folder, self.space, self.info = folder, space, info
        self.results = place_of_results(space, folder, info)
        """Where workers write their nets and states."""
        self._study = study
        self._running: dict[int, Cost] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        """Trial -> (steps done, steps in all), of those that this process has asked for; in memory alone."""
        self.exhausted = ""
        """Why the space had nothing more to propose before the planned number was reached; empty as long as it has."""
        self._orphans = False
        """Whether a proposal broke off, so that a trial may be running in the journal that nobody runs."""
        dense = info["dense"]
        self.dense = Cost(dense["macs"], dense["params"], dense["size_bytes"], dense["latency_ms"])
        self.metric = Metric.of_study(info)
        self._proposals = self._make_proposals()
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
        """Whether the front was changed since it was written."""
        self._rungs = recorded_rungs(space.search.early_stopping, self._ledger.rows, self._rung_point)

    def __repr__(self) -> str:
        done = f"{self.finished} of {self.planned} trials done, {len(self.front)} on the front"
        return f"<Study {self.space.name!r} in {self.folder}: {done}>"

    # Making and opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, runs: Path, space: Space, bench: Workbench, dense_val_accuracy: float) -> Study:
        """A new study in `runs`/NAME with its first points enqueued; `dense_val_accuracy` is the dense net's metric.

        Raises:
            UsageError: the name is taken, or a warm start's front is missing or of another net.
        """
        folder = new_folder(runs, space.name)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                return cls._fill(folder, space, bench, dense_val_accuracy)
            except BaseException:
                clear(folder)
                raise

    @classmethod
    def _fill(cls, folder: Path, space: Space, bench: Workbench, val_accuracy: float) -> Study:
        space, info, study, opening = begin(folder, space, bench, val_accuracy)
        try:
            made = cls(folder, space, info, study)
            with together(storage_of(study)):
                for point in opening:
                    made.enqueue(point)
            made._write_space()
            if space.given is not None:
                write_atomically(folder / GIVEN, space.given)
            made._note()  # last: a folder with it is a study
        except BaseException:
            forget_study(space, study)
            raise
        (folder / UNFINISHED).unlink()
        return made

    def enqueue(self, point: Opening) -> None:
        """Proposes a trial of one's own, before whatever the sampler would."""
        self._study.enqueue_trial(dict(point.params), user_attrs=point.attrs())

    def use_sampler(self, sampler: BaseSampler, bench: Workbench) -> None:
        """Proposes by another sampler than the space's."""
        self._proposals.use_sampler(sampler, bench)

    @classmethod
    def open(cls, folder: str | Path, *, trust: bool = False) -> Study:
        """Reads a study from its folder.

        Args:
            trust: whether to run a task file that lies in it, and to use the addresses that it names, where this user did not before.

        Raises:
            UsageError: the folder's files are missing or damaged, or its database is at an address of somebody else's.
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
            raise UsageError(f"{folder} is no readable study: {told}") from error

    def locked(self) -> AbstractContextManager[None]:
        """Holds the study for this process; UsageError where another one is running it."""
        return locked(self.folder)

    @staticmethod
    def mend(folder: Path) -> int:
        """Cuts half a line off the journal that a killed driver left; for who holds the study, before it is opened."""
        return mend_journal(folder / JOURNAL) if (folder / JOURNAL).is_file() else 0

    # Ask ---------------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> int:
        return self.space.search.trials

    def plan_for(self, trials: int) -> None:
        """Plans another number of trials, finished ones included, and writes that to the study's space.

        Raises:
            UsageError: more than that are finished already.
        """
        if trials < self.finished:
            raise UsageError(f"--trials {trials}: {self.finished} trials of {self.space.name!r} are finished already.")
        self.space = self.space.model_copy(update={"search": self.space.search.model_copy(update={"trials": trials})})
        self._write_space()
        self._note(done=False)
        self._proposals = self._make_proposals()

    def conclude(self) -> None:
        """Notes in the study's folder that it is done, also where it had nothing more to propose."""
        self._note(done=True)
        self.write_front()

    def note_samples(self, task: Task) -> None:
        """Keeps how many samples the nets are scored on, of a study that was made before this was kept."""
        if "samples" not in self.info:
            self._note(samples=samples_of(task))

    def note_probe(self, found: Mapping[str, Any]) -> None:
        """Keeps what a trial took of a GPU (`device`, `peak_bytes`), so that a resumed study need not measure it again."""
        self._note(gpu_probe=dict(found))

    def _note(self, **facts: Any) -> None:
        self.info = self.info | facts
        write_atomically(self.folder / INFO, json.dumps(self.info, indent=2))

    @property
    def done(self) -> bool:
        """Whether the planned number was reached, or the study was concluded with fewer."""
        return self.finished >= self.planned or bool(self.info.get("done"))

    def _make_proposals(self) -> Proposals:
        return Proposals(self._study, self.space, self.results, self.dense, self.metric)

    def _write_space(self) -> None:
        write_atomically(self.folder / SPACE, space_text(self.space))

    @property
    def finished(self) -> int:
        """Trials that ended, well or not: complete, stopped, diverged and failed ones."""
        return len(self._ledger)

    @property
    def running(self) -> int:
        """Trials that this process has asked for and not told yet."""
        return len(self._running)

    def note_step(self, number: int, step: int) -> None:
        """Keeps how far a running trial is, for whoever shows it."""
        if number in self._steps:
            self._steps[number] = (step, self._steps[number][1])

    @property
    def running_steps(self) -> dict[int, tuple[int, int]]:
        """Running trial -> (steps done, steps in all); on a cluster as of its last phase."""
        return {number: self._steps[number] for number in list(self._running) if number in self._steps}

    def trial_folder(self, number: int) -> Path:
        """Where a trial's net is: `plan.json` and `model.safetensors`."""
        return trial_folder(self.folder, number)

    def bring_home(self, number: int) -> bool:
        """Brings a complete trial's net from the place of results to the study's folder; False where it is not there.

        Raises:
            OSError: the place cannot be read, or the folder not be written.
        """
        home = self.trial_folder(number)
        if isinstance(self.results, Remote):
            nested = self._study.get_trials(deepcopy=False)[number].user_attrs["candidate"]["allocator"] == NESTED_RUN
            return fetch(trial_folder(self.results, number), home, (*((NESTED,) if nested else ()), WEIGHTS, PLAN))
        return holds_net(home)

    def ask(self, bench: Workbench) -> Candidate | None:
        """The next trial, its plan within every budget.

        None once the planned number is under way or done, or `exhausted`.

        Raises:
            StudyError: not a single proposal was feasible.
            OSError: the journal cannot be written; asking again is fine.
        """
        if self.exhausted or self.finished + len(self._running) >= self.planned:
            return None
        if is_nested(self.space) and not self._nested_is_over():
            return None
        if self._orphans:
            self._settle_orphans()
        # until this proposal is through: one that breaks off, on a full disk, is settled by the next
        self._orphans = True
        proposed = self._proposals.propose(bench)
        self._orphans = False
        if proposed is None:
            self.exhausted = self._proposals.why_exhausted
            return None
        candidate, cost = proposed
        self._running[candidate.number] = cost
        self._steps[candidate.number] = (0, candidate.recipe.steps)
        return candidate

    def _nested_is_over(self) -> bool:
        """Whether plans can be cut, or the nested run is to be proposed; not as long as it runs.

        Raises:
            StudyError: it ended without weights.
        """
        if self.nested_trial is not None:
            return True
        ended = [row for row in self.rows if row.allocator == NESTED_RUN]
        if ended:
            reason = ended[-1].reason or str(ended[-1].status)
            raise StudyError(
                f"The nested run of {self.space.name!r} gave no weights to cut nets from. {reason}. {mend(reason)}"
            )
        return not self._running

    @property
    def nested_trial(self) -> int | None:
        """The trial whose dense weights serve every budget; None where there is none, or not yet."""
        return nested_trial(self._study) if is_nested(self.space) else None

    def at(self, budgets: Budgets) -> Cut:
        """The net within `budgets` ("flops=37%", or several that hold at once) of a nested study, cut from its weights in seconds.

        The weights stay as they are: any budget can be asked for, in any order. Its score is on the validation set.

        Raises:
            UsageError: the study is not nested, its run is not over, or the budgets cannot be met.
        """
        if self._cutter is None:
            self._cutter = Cutter(self.space, self.folder, self.nested_trial, self.info.get("latency_key"))
        return self._cutter(budgets)

    # Trials that did not end -------------------------------------------------------------------------------------

    def requeue_interrupted(self) -> int:
        """Settles what a lost driver, or a lost Ray, left running; returns how many trials are proposed again.

        A trial whose result was written but not yet told is told; one that had been given a plan, or was enqueued, is proposed again
        under the same plan, recipe and seed. A proposal that had not come so far is given up: the sampler makes it again.
        """
        self._running.clear()
        return self._settle_orphans()

    def _settle_orphans(self) -> int:
        """The same for trials that are running in the journal and that nobody runs."""
        again = settle_orphans(
            self._study.get_trials(deepcopy=False), self._running, finish=lambda frozen: self._finish(id_of(frozen)),
            give_back=lambda frozen, enqueue: self._give_back(frozen, enqueue=enqueue),
        )  # fmt: skip
        self._orphans = False
        return again

    def retry(self, number: int, *, blameless: bool = False) -> bool:
        """Proposes a trial again whose worker was lost, under the same plan, recipe and seed; False where that was its last attempt.

        Args:
            blameless: its whole node was lost or taken away. A trial survives `NODE_LOSSES` of those: it may be what kills them.
        """
        frozen = self._study.get_trials(deepcopy=False)[number]
        name, most = ("nodes_lost", NODE_LOSSES) if blameless else ("workers_lost", self.space.resources.worker_losses)
        lost = frozen.user_attrs.get(name, 0) + 1
        if lost > most:
            return False
        del self._running[number]
        self._give_back(frozen, enqueue=True, **{name: lost})
        return True

    def _give_back(self, frozen: FrozenTrial, *, enqueue: bool, **attrs: int) -> None:
        if self._rungs is not None:
            self._rungs.forget(frozen.number)
        if enqueue:
            self.exhausted = ""
        self._proposals.give_back(frozen, enqueue=enqueue, **attrs)

    # Tell --------------------------------------------------------------------------------------------------------

    def goes_on(self, number: int, rung: int, val_accuracy: float) -> bool:
        """Records what a running trial reached at a rung, and decides whether it is worth the rest of its steps."""
        assert self._rungs is not None
        return self._rungs.goes_on(number, rung, self._rung_point(val_accuracy, self._running[number]))

    def _rung_point(self, val_accuracy: float, cost: Cost) -> list[float]:
        return rung_point(val_accuracy, cost, self.dense, self.metric, self._objectives)

    def tell(self, number: int, result: TrialResult) -> Row:
        """Records a trial's result and returns its row. Only a complete trial with finite values becomes an objective.

        Raises:
            OSError: not all of it could be written; the same may be told again, which writes what is missing.
        """
        trial, cost = self._study.get_trials(deepcopy=False)[number], self._running[number]
        with together(storage_of(self._study)):
            if "result" not in trial.user_attrs:
                storage_of(self._study).set_trial_user_attr(id_of(trial), "result", record_of(result, cost))
            self._tell_optuna(id_of(trial))
        row = self._take_up(id_of(trial))
        del self._running[number]
        self._steps.pop(number, None)
        return row.unfolded()

    def _finish(self, trial_id: int) -> None:
        """Takes up a result that stands in the trial's attributes already: a crash before it was told has lost nothing."""
        with together(storage_of(self._study)):
            self._tell_optuna(trial_id)
        self._take_up(trial_id)

    def _tell_optuna(self, trial_id: int) -> None:
        tell_optuna(self._study, trial_id, self.info["dense"], self.metric, self._objectives)

    def _take_up(self, trial_id: int) -> Row:
        """A trial that was told, into the ledger and, where that changed, the front."""
        trial = storage_of(self._study).get_trial(trial_id)
        row, candidate = row_of(trial, self.info["dense"], self.metric), trial.user_attrs["candidate"]
        CheckpointFile(self._proposals.checkpoint(candidate["key"], candidate["seed"]), 0.0).remove()
        if trial.number not in self._ledger:
            self._front_changed |= self._ledger.add(row)
        if self._front_changed or self.done or not (self.folder / FRONT).is_file():
            self.write_front()
        return row

    # What is known -----------------------------------------------------------------------------------------------

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
        """The same as the study holds them, their curves folded; not to be changed."""
        return self._ledger.rows

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of finished trials."""
        return {str(status): count for status, count in self._ledger.counts.items()}

    @property
    def front(self) -> list[Row]:
        """The nondominated complete trials, the best metric first; where that has a limit, those above it, the cheapest first."""
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
        """Target -> searched parameter -> share of what it explains; empty with too few trials."""
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
        """How a trial ended, else "running", "waiting" or "given back" (run again under another number); None where there is none."""
        if number in self._ledger:
            return self._ledger[number]["status"]
        trials = self._study.get_trials(deepcopy=False)
        if not 0 <= number < len(trials):
            return None
        state = trials[number].state
        return "given back" if state.is_finished() else state.name.lower()

    def best(self, budget: Budgets | None = None, *, budgets: Budgets = (), accuracy: str | float | None = None) -> Row:
        """The best complete trial within the budgets that are given, such as budget="flops=30%", budgets=["params=40%", "size=1MiB"].

        That is the one with the best metric; or with `accuracy` ("-1": points below dense, "-2%": a share, "90": as such), and in a study
        whose space has such a limit, the cheapest net above it, by the first cost that is searched.

        Raises:
            UsageError: no trial lies within them.
        """
        given = [*assignments(budgets), *assignments(budget or ())]
        return self.picked(given, {} if accuracy is None else {ACCURACY: accuracy}).unfolded()

    def picked(self, budgets: Budgets, at_least: Limits) -> Row:
        """The same by conditions as the command line has them; a study's own limit holds where none is given."""
        wanted = self._wanted(budgets, at_least)
        own = wanted if at_least else replace(wanted, quality=self.space.quality)
        return best_row(self.rows, self.dense, self.metric, self.space, own)

    def _wanted(self, budgets: Budgets, at_least: Limits) -> Wanted:
        limits = [parse_budget(*text.partition("=")[::2]) for text in assignments(budgets)]
        return Wanted(limits, quality_of(limits_of(at_least)))

    # Latencies, test set and front file --------------------------------------------------------------------------

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
        """Keeps milliseconds by layer, of the dense net and by trial (its number as text)."""
        before = self.info.get("layer_ms", {}).get("trials", {})
        self._note(layer_ms={"measured_with": measured_with, "dense": dict(dense), "trials": {**before, **trials}})

    def test_accuracies(self) -> dict[str, float | None]:
        """Trial number (or "dense") -> the metric on the test set, of the nets that were scored at the end."""
        return self._late.test_accuracies()

    def score_test(self, evaluate: Callable[[Row | None], float], log: Callable[[str], None]) -> None:
        """Scores the dense net and the front on the test set, once each: `evaluate(row)`, or None for the dense net."""
        self._ledger.score(self._late.score(self._ledger.front, self.metric, evaluate, log))
        self.write_front()

    def repeats(self, number: int) -> list[dict[str, float | None]]:
        """The metric by split of each time that a trial was trained again at the end."""
        return self._late.repeats().get(str(number), [])

    def note_repeat(self, number: int, found: Mapping[str, float | None]) -> None:
        """Keeps what a trial reached with another seed; the front is written anew."""
        self._ledger.repeat(self._late.note_repeat(number, found))
        self.write_front()

    def front_record(self, *, budgets: Budgets = (), at_least: Limits = ()) -> dict[str, Any]:
        """What `front.json` holds; with conditions, of the front's part that meets them all (the hypervolume stays the whole front's)."""
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
        """How far the study is: `state` (running, complete, or failed where it is over without a net), trials by status, the commonest
        reason of failures, sizes of the splits, what the last trials gained.
        """
        state = "running" if not self.done else "complete" if self.counts.get("complete") else "failed"
        return {
            "state": state, "planned": self.planned, "counts": self.counts, "failures": commonest(self._ledger.reasons()),
            "samples": self.info.get("samples") or {"validation": self.space.validation, "test": None}, "gains": self._ledger.gains(),
            "best": None if self.leader is None else {"trial": self.leader.trial, "val_accuracy": self.leader.val_accuracy},
            "measured_with": self.info.get("measured_with"),
        }  # fmt: skip

    def write_front(self) -> None:
        write_atomically(self.folder / FRONT, json.dumps(self.front_record(), allow_nan=False))
        self._front_changed = False
