"""`Study`: a folder and its Optuna study. It asks for candidates, is told results, and knows the front.

The journal on disk is the truth: parameters, plans and results of every trial are in it, so a study that lost its driver is
opened again from its folder. Ray and MLflow are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from ranksearch.compress import Cost
from ranksearch.errors import StudyError, UsageError
from ranksearch.front.failures import mend
from ranksearch.front.row import Row, row_of
from ranksearch.places.files import settle, write_durably
from ranksearch.places.net_files import PLAN, WEIGHTS, holds_net
from ranksearch.places.place import Remote, fetch
from ranksearch.search.optuna_private import id_of, storage_of
from ranksearch.search.parametrize import Opening
from ranksearch.search.path import NESTED_RUN, is_nested
from ranksearch.search.workbench import Workbench
from ranksearch.space.space import Space
from ranksearch.store.folder import clear, locked, new_folder
from ranksearch.store.journal import mend_journal, together
from ranksearch.store.orphans import settle_orphans
from ranksearch.store.storage import forget_study
from ranksearch.store.where import FRONT, GIVEN, JOURNAL, SPACE, UNFINISHED, trial_folder
from ranksearch.study.making import begin, samples_of, space_text
from ranksearch.study.nested_runs import best_run
from ranksearch.study.outcomes import record_of, tell_optuna
from ranksearch.study.proposals import Proposals
from ranksearch.study.recorded import RecordedStudy
from ranksearch.study.stopping import recorded_rungs, rung_point
from ranksearch.tasks.task import Task
from ranksearch.trial.candidate import Candidate
from ranksearch.trial.checkpoint import CheckpointFile
from ranksearch.trial.nested import NESTED
from ranksearch.trial.result import TrialResult

NODE_LOSSES = 20
"""How many nodes a trial may lose: a trial that takes down every node it is put on fails then."""


class Study(RecordedStudy):
    """A study on disk. `create` makes a new one, `open` continues or reads one."""

    def __init__(self, folder: Path, space: Space, info: dict[str, Any], study: optuna.Study) -> None:
        super().__init__(folder, space, info, study)
        self._running: dict[int, Cost] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        """Trial -> (steps done, steps in all), for trials that this process has asked for; only in memory."""
        self.exhausted = ""
        """Why the space had nothing more to propose before the planned number was reached; empty while it has."""
        self._orphans = False
        """Whether a proposal broke off, so that the journal may call a trial running that nobody runs."""
        self._proposals = self._make_proposals()
        self._rungs = recorded_rungs(space.search.early_stopping, self._ledger.rows, self._rung_point)

    # Making and opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, runs: Path, space: Space, bench: Workbench, dense_val_accuracy: float) -> Study:
        """A new study in `runs`/NAME with its first points enqueued; `dense_val_accuracy` is the dense net's metric.

        Raises:
            UsageError: the name is taken, or a warm start's front is missing or belongs to another net.
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
                write_durably(folder / GIVEN, space.given)
            made._note()  # last: a folder with it is a study
            settle(folder.parent)
        except BaseException:
            forget_study(space, study)
            raise
        (folder / UNFINISHED).unlink()
        return made

    def enqueue(self, point: Opening) -> None:
        """Enqueues a trial of the caller's own, which comes before what the sampler proposes."""
        self._study.enqueue_trial(dict(point.params), user_attrs=point.attrs())

    def use_sampler(self, sampler: BaseSampler, bench: Workbench) -> None:
        """Proposes by another sampler than the space's."""
        self._proposals.use_sampler(sampler, bench)

    def locked(self) -> AbstractContextManager[None]:
        """Holds the study for this process; raises UsageError if another one is running it."""
        return locked(self.folder)

    @staticmethod
    def mend(folder: Path) -> int:
        """Cuts off half a line that a killed driver left in the journal. Call it before the study is opened, and only while holding it."""
        return mend_journal(folder / JOURNAL) if (folder / JOURNAL).is_file() else 0

    # Ask ---------------------------------------------------------------------------------------------------------

    def plan_for(self, trials: int) -> None:
        """Plans another number of trials, finished ones included, and writes that to the study's space.

        Raises:
            UsageError: more trials than that are finished already.
        """
        if trials < self.finished:
            raise UsageError(f"--trials {trials}: {self.finished} trials of {self.space.name!r} are finished already.")
        self.space = self.space.model_copy(update={"search": self.space.search.model_copy(update={"trials": trials})})
        self._write_space()
        self._note(done=False)
        self._proposals = self._make_proposals()

    def conclude(self) -> None:
        """Notes in the study's folder that it is done, even if it had nothing more to propose."""
        self._note(done=True)
        self.write_front()

    def note_samples(self, task: Task) -> None:
        """Records how many samples the nets are scored on, if the study is from before this was recorded."""
        if "samples" not in self.info:
            self._note(samples=samples_of(task))

    def note_probe(self, found: Mapping[str, Any]) -> None:
        """Records what a trial took of a GPU (`device`, `peak_bytes`), so that a resumed study need not measure it again."""
        self._note(gpu_probe=dict(found))

    def _make_proposals(self) -> Proposals:
        return Proposals(self._study, self.space, self.results, self.dense, self.metric)

    def _write_space(self) -> None:
        write_durably(self.folder / SPACE, space_text(self.space))

    @property
    def running(self) -> int:
        """Trials that this process has asked for and not told yet."""
        return len(self._running)

    def note_step(self, number: int, step: int) -> None:
        """Records how far a running trial is, for whoever shows it."""
        if number in self._steps:
            self._steps[number] = (step, self._steps[number][1])

    @property
    def running_steps(self) -> dict[int, tuple[int, int]]:
        """Running trial -> (steps done, steps in all); on a cluster as of its last phase."""
        return {number: self._steps[number] for number in list(self._running) if number in self._steps}

    def bring_home(self, number: int) -> bool:
        """Brings a complete trial's net from the place of results to the study's folder; False if it is not there.

        Raises:
            OSError: the place cannot be read, or the folder cannot be written.
        """
        home = self.trial_folder(number)
        if isinstance(self.results, Remote):
            nested = self._study.get_trials(deepcopy=False)[number].user_attrs["candidate"]["allocator"] == NESTED_RUN
            return fetch(trial_folder(self.results, number), home, (*((NESTED,) if nested else ()), WEIGHTS, PLAN))
        return holds_net(home)

    def ask(self, bench: Workbench) -> Candidate | None:
        """The next trial, with a plan within every budget.

        None once the planned number is under way or done, or the space is `exhausted`.

        Raises:
            StudyError: not a single proposal was feasible.
            OSError: the journal cannot be written; asking again is fine.
        """
        if self.exhausted or self.finished + len(self._running) >= self.planned:
            return None
        if is_nested(self.space) and not self._is_due_in_nested():
            return None
        if self._orphans:
            self._settle_orphans()
        # until this proposal is complete: if it breaks off, as on a full disk, the next one settles it
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

    def _is_due_in_nested(self) -> bool:
        """Whether the next proposal may be made: a nested run as long as some are missing, then, once all have ended, a plan.

        Raises:
            StudyError: none of the runs left weights.
        """
        ended, runs = self._nested_scores(), self.space.search.nested.runs
        if len(ended) < runs:
            return len(ended) + len(self._running) < runs
        if best_run(ended, self.metric) is None:
            row = self._ledger[max(ended)]
            reason = row.reason or str(row.status)
            which = "The nested run" if runs == 1 else f"Each of the {runs} nested runs"
            raise StudyError(
                f"{which} of {self.space.name!r} gave no weights to cut nets from. {reason}. {mend(reason)}"
            )
        return True

    # Trials that did not end -------------------------------------------------------------------------------------

    def requeue_interrupted(self) -> int:
        """Settles what a lost driver, or a lost Ray, left running (`orphans.py`); returns how many trials are proposed again.

        They are proposed under the same plan, recipe and seed.
        """
        self._running.clear()
        return self._settle_orphans()

    def _settle_orphans(self) -> int:
        """Does the same for trials that the journal calls running but that nobody runs."""
        again = settle_orphans(
            self._study.get_trials(deepcopy=False), self._running, finish=lambda frozen: self._finish(id_of(frozen)),
            give_back=lambda frozen, enqueue: self._give_back(frozen, enqueue=enqueue),
        )  # fmt: skip
        self._orphans = False
        return again

    def retry(self, number: int, *, blameless: bool = False) -> bool:
        """Proposes a trial whose worker was lost again, under the same plan, recipe and seed; False if that was its last attempt.

        Args:
            blameless: whether its whole node was lost or taken away. A trial survives `NODE_LOSSES` of those, since it may be the cause.
        """
        frozen = self._study.get_trials(deepcopy=False)[number]
        name, most = ("nodes_lost", NODE_LOSSES) if blameless else ("workers_lost", self.space.resources.worker_losses)
        lost = frozen.user_attrs.get(name, 0) + 1
        if lost > most:
            return False
        del self._running[number]
        self._give_back(frozen, enqueue=True, **{name: lost})
        return True

    def run_again(self, number: int) -> None:
        """Proposes a trial again that ended without a result because its disk was full, which is not its fault or its node's.

        Raises:
            OSError: the journal cannot be written; calling this again is fine.
        """
        trials = self._study.get_trials(deepcopy=False)
        with together(storage_of(self._study)):
            if not trials[number].state.is_finished():
                known = any(trial.user_attrs.get("retry_of") == number for trial in trials)
                self._give_back(trials[number], enqueue=not known)
        self._running.pop(number, None)
        self._steps.pop(number, None)

    def _give_back(self, frozen: FrozenTrial, *, enqueue: bool, **attrs: int) -> None:
        if self._rungs is not None:
            self._rungs.forget(frozen.number)
        if enqueue:
            self.exhausted = ""
        self._proposals.give_back(frozen, enqueue=enqueue, **attrs)

    # Tell --------------------------------------------------------------------------------------------------------

    def goes_on(self, number: int, rung: int, val_accuracy: float) -> bool:
        """Records what a running trial reached at a rung; returns whether it is worth the rest of its steps."""
        assert self._rungs is not None
        return self._rungs.goes_on(number, rung, self._rung_point(val_accuracy, self._running[number]))

    def _rung_point(self, val_accuracy: float, cost: Cost) -> list[float]:
        return rung_point(val_accuracy, cost, self.dense, self.metric, self._objectives)

    def tell(self, number: int, result: TrialResult) -> Row:
        """Records a trial's result and returns its row. Only a complete trial with finite values becomes an objective.

        Raises:
            OSError: not all of it could be written; telling the same again writes what is missing.
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
        """Takes up a result that is in the trial's attributes already: a crash before it was told has lost nothing."""
        with together(storage_of(self._study)):
            self._tell_optuna(trial_id)
        self._take_up(trial_id)

    def _tell_optuna(self, trial_id: int) -> None:
        tell_optuna(self._study, trial_id, self.info["dense"], self.metric, self._objectives)

    def _take_up(self, trial_id: int) -> Row:
        """Puts a trial that was told into the ledger, and writes the front if it changed."""
        trial = storage_of(self._study).get_trial(trial_id)
        row, candidate = row_of(trial, self.info["dense"], self.metric), trial.user_attrs["candidate"]
        CheckpointFile(self._proposals.checkpoint(candidate["key"], candidate["seed"]), 0.0).remove()
        if trial.number not in self._ledger:
            self._front_changed |= self._ledger.add(row)
        if self._front_changed or self.done or not (self.folder / FRONT).is_file():
            self.write_front()
        return row
