"""`Study`: a folder and its Optuna study. It asks for candidates, is told results, and knows the front.

The journal on disk is the truth: parameters, plans and results of every trial are in it, so a study that lost its driver is
opened again from its folder. Ray and MLflow are not known here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import optuna
import safetensors.torch
import yaml
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from ranksearch.allocate import parse_budget
from ranksearch.compress import Cost, RankPlan, dense_cost, plan_cost
from ranksearch.errors import StudyError, UsageError
from ranksearch.files import write_atomically
from ranksearch.search.allocated import Allocated
from ranksearch.search.budgets import violations
from ranksearch.search.checkpoint import CheckpointFile
from ranksearch.search.direct import Direct
from ranksearch.search.front import COST_RATIOS, Row, front_record, objective_values, row_of
from ranksearch.search.journal import mend_journal, open_journal
from ranksearch.search.ledger import Ledger
from ranksearch.search.opening import first_points
from ranksearch.search.parametrize import Opening, Searched, Suggestion
from ranksearch.search.provenance import provenance
from ranksearch.search.recipe import Recipe
from ranksearch.search.samplers import make_sampler
from ranksearch.search.space import OBJECTIVES, Space
from ranksearch.search.space_file import parse_space
from ranksearch.search.stopping import Rungs
from ranksearch.search.study_folder import (
    CHECKPOINTS,
    DENSE_WEIGHTS,
    FRONT,
    INFO,
    JOURNAL,
    SPACE,
    TEST,
    TRIALS,
    in_the_way,
    locked,
    new_folder,
)
from ranksearch.search.trial import RUNG, TrialResult
from ranksearch.search.workbench import Workbench

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the study's own progress is shown, not Optuna's

NOT_RUN = ("infeasible", "duplicate", "interrupted")
"""Outcomes of proposals that did not become a finished trial; they do not count towards the planned number."""
MAX_REJECTED = 200
FINISHED = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


@dataclass(frozen=True)
class Candidate:
    """A trial to run: everything a worker needs besides the workbench."""

    number: int
    plan: RankPlan
    recipe: Recipe
    seed: int
    save_to: Path
    checkpoint: Path
    """Where the trial keeps its state while it runs; the same file for the same plan, recipe and seed."""
    rungs: tuple[float, ...] = ()
    """Shares of the steps after which it is scored for early stopping."""
    latency: bool = False
    """Whether the net is timed at the end."""


class Study:
    """A study on disk. `create` makes a new one, `open` continues or reads one."""

    def __init__(self, folder: Path, space: Space, info: dict[str, Any], study: optuna.Study) -> None:
        self.folder, self.space, self.info = folder, space, info
        self._study = study
        self._running: dict[int, Cost] = {}
        self._searched: Searched | None = None
        self.exhausted = False
        """Whether the space had nothing new to propose before the planned number was reached."""
        dense = info["dense"]
        self.dense = Cost(dense["macs"], dense["params"], dense["size_bytes"])
        trials = study.get_trials(deepcopy=False)
        self._keys = {t.user_attrs["candidate"]["key"] for t in trials if "candidate" in t.user_attrs}
        """Plan and recipe of every trial so far, by which a duplicate is recognised."""
        done = (t for t in trials if t.state in FINISHED and "result" in t.user_attrs)
        self._ledger = Ledger(self._objectives, (row_of(t, info["dense"], None) for t in done))
        self._ledger.score(self.test_accuracies())
        self._rungs = self._recorded_rungs()

    # Making and opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        runs: Path,
        space: Space,
        bench: Workbench,
        dense_val_accuracy: float,
        dense_latency_ms: float | None = None,
    ) -> Study:
        """A new study in `runs`/NAME with its first points enqueued; the dense net's accuracy in percent.

        Raises:
            UsageError: the name is taken, or a warm start's front is missing or of another net.
        """
        folder = new_folder(runs, space.name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return cls._fill(folder, space, bench, dense_val_accuracy, dense_latency_ms)
        except BaseException:
            for path in in_the_way(folder):  # half a study would be in the way of the next try
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
            raise

    @classmethod
    def _fill(
        cls, folder: Path, space: Space, bench: Workbench, val_accuracy: float, latency_ms: float | None
    ) -> Study:
        if space.data is not None:  # the study is opened from other working directories too
            space = space.model_copy(update={"data": str(Path(space.data).expanduser().resolve())})
        (folder / SPACE).write_text(yaml.safe_dump(space.model_dump(), sort_keys=False))
        safetensors.torch.save_file({k: v.contiguous() for k, v in bench.dense.items()}, folder / DENSE_WEIGHTS)
        dense = {"val_accuracy": val_accuracy, "test_accuracy": None} | asdict(dense_cost(bench.net))
        dense["latency_ms"] = latency_ms
        directions = [OBJECTIVES[name] for name in space.search.objectives]
        known = Allocated(space, bench.curves, bench.damage)
        form = known if space.search.parametrization == "allocated" else Direct(space, bench.curves)
        opening = first_points(space, bench.curves, form, known)
        info = {
            "study": space.name, "dense": dense, "seed": space.search.seed, "provenance": provenance(folder),
            "opened_with": dict(Counter(point.allocator for point in opening)),
        }  # fmt: skip
        study = optuna.create_study(
            storage=open_journal(folder / JOURNAL), study_name=space.name, directions=directions
        )
        for point in opening:
            study.enqueue_trial(dict(point.params), user_attrs=point.attrs())
        write_atomically(folder / INFO, json.dumps(info, indent=2))  # last: a folder with it is a study
        return cls(folder, space, info, study)

    def enqueue(self, point: Opening) -> None:
        """Proposes a trial of one's own, before whatever the sampler would."""
        self._study.enqueue_trial(dict(point.params), user_attrs=point.attrs())

    def use_sampler(self, sampler: BaseSampler, bench: Workbench) -> None:
        """Proposes by another sampler than the space's."""
        self._search(bench)
        self._study.sampler = sampler

    @classmethod
    def open(cls, folder: Path) -> Study:
        """Reads a study from its folder.

        Raises:
            UsageError: the folder's files are missing or damaged.
        """
        try:
            info = json.loads((folder / INFO).read_text())
            space = parse_space(yaml.safe_load((folder / SPACE).read_text()), str(folder / SPACE))
            if not (folder / JOURNAL).is_file():
                raise FileNotFoundError(f"{JOURNAL} is missing")
            study = optuna.load_study(storage=open_journal(folder / JOURNAL), study_name=info["study"])
            return cls(folder, space, info, study)
        except (OSError, ValueError, yaml.YAMLError, KeyError) as error:
            raise UsageError(f"{folder} is no readable study: {error}") from error

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

    @property
    def finished(self) -> int:
        """Trials that ended, well or not: complete, stopped, diverged and failed ones."""
        return len(self._ledger)

    @property
    def running(self) -> int:
        """Trials that this process has asked for and not told yet."""
        return len(self._running)

    def trial_folder(self, number: int) -> Path:
        """Where a trial's net is: `plan.json` and `model.safetensors`."""
        return self.folder / TRIALS / f"{number:03d}"

    def ask(self, bench: Workbench) -> Candidate | None:
        """The next trial, its plan within every budget.

        None once the planned number is under way or done, or `exhausted`: proposal after proposal was in the study already.

        Raises:
            StudyError: not a single proposal was feasible.
        """
        if self.exhausted or self.finished + len(self._running) >= self.planned:
            return None
        searched = self._search(bench)
        for _ in range(MAX_REJECTED):
            trial = self._study.ask()
            try:
                found = searched.suggest(trial)
            except UsageError as error:
                self._reject(trial, "infeasible", str(error))
                continue
            cost = plan_cost(bench.net, found.plan)
            if self._is_feasible(trial, cost) and self._is_new(trial, found):
                return self._take(trial, found, cost)
        if not self._keys:
            raise StudyError(f"None of {MAX_REJECTED} proposals was feasible: widen the space or the budgets.")
        self.exhausted = True
        return None

    def _search(self, bench: Workbench) -> Searched:
        """The form and the sampler, made at the first ask."""
        if self._searched is None:
            allocated = self.space.search.parametrization == "allocated"
            form = Allocated(self.space, bench.curves, bench.damage) if allocated else Direct(self.space, bench.curves)
            self._searched = Searched(form, self.space.recipe)
            count = len(self._study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING)))
            self._study.sampler = make_sampler(
                self.space,
                self._searched.distributions,
                opened_with=count,
                dense_accuracy=self.info["dense"]["val_accuracy"],
            )
        return self._searched

    def _is_feasible(self, trial: optuna.Trial, cost: Cost) -> bool:
        """Whether the plan is within every budget; if not, the sampler learns by how much it is not."""
        over = violations(self.space.parsed_budgets(), cost, self.dense)
        if (
            self.space.search.parametrization == "direct"
        ):  # a sampler that knows no constraints learns nothing from allocated plans
            for budget, value in over.items():
                trial.set_constraint(budget, value)
        if max(over.values(), default=0.0) <= 0:
            return True
        # a genetic sampler's generations hold complete trials alone: there the costs are told, and the worst accuracy
        genetic = self.space.search.sampler in ("nsga2", "nsga3")
        values = [0.0 if name == "accuracy" else self._ratio(name, cost) for name in self._objectives]
        self._reject(trial, "infeasible", f"above the budgets: {over}", values if genetic else None)
        return False

    def _ratio(self, objective: str, cost: Cost) -> float:
        """A cost's ratio to dense as far as it is known before the trial; 1 for latency."""
        of_dense = {
            "macs_ratio": cost.macs / self.dense.macs, "params_ratio": cost.params / self.dense.params,
            "size_ratio": cost.size_bytes / self.dense.size_bytes, "latency_ratio": 1.0,
        }  # fmt: skip
        return of_dense[COST_RATIOS[objective]]

    def _is_new(self, trial: optuna.Trial, found: Suggestion) -> bool:
        if "retry_of" in trial.user_attrs or self._key(found) not in self._keys:
            return True
        self._reject(trial, "duplicate", "the same plan and recipe are in the study already")
        return False

    @staticmethod
    def _key(found: Suggestion) -> str:
        recipe = json.dumps(found.recipe.to_dict(), sort_keys=True)
        return f"{found.plan.digest()} {hashlib.sha256(recipe.encode()).hexdigest()[:16]}"

    def _take(self, trial: optuna.Trial, found: Suggestion, cost: Cost) -> Candidate:
        key = self._key(found)
        seed = trial.user_attrs.get("seed", self.space.search.seed * 100_003 + trial.number)
        record = {
            "plan": found.plan.to_dict(), "recipe": found.recipe.to_dict(), "allocator": found.allocator, "seed": seed, "key": key,
        }  # fmt: skip
        trial.set_user_attr("candidate", record)
        self._keys.add(key)
        self._running[trial.number] = cost
        rungs = self.space.search.early_stopping
        return Candidate(
            trial.number, found.plan, found.recipe, seed, self.trial_folder(trial.number), self._checkpoint(key, seed),
            rungs=tuple(rungs.rungs) if rungs is not None else (), latency="latency" in self._objectives,
        )  # fmt: skip

    def _checkpoint(self, key: str, seed: int) -> Path:
        """The file of a plan, recipe and seed: a trial that is proposed again finds the state that it had."""
        return self.folder / CHECKPOINTS / f"{hashlib.sha256(f'{key} {seed}'.encode()).hexdigest()[:16]}.pt"

    def _reject(self, trial: optuna.Trial, outcome: str, reason: str, values: list[float] | None = None) -> None:
        trial.set_user_attr("outcome", outcome)
        trial.set_user_attr("reason", reason)
        if values is not None:
            self._study.tell(trial, values)
        else:
            # TPE counts a pruned trial that violates a constraint among the bad ones; a duplicate is neither good nor bad
            self._study.tell(trial, state=TrialState.PRUNED if outcome == "infeasible" else TrialState.FAIL)

    # Trials that did not end -------------------------------------------------------------------------------------

    def requeue_interrupted(self) -> int:
        """Settles what a lost driver left running; returns how many trials are proposed again.

        A trial whose result was written but not yet told is told; any other one is proposed again under the same plan, recipe and seed.
        """
        again = 0
        retried = {t.user_attrs.get("retry_of") for t in self._study.get_trials(deepcopy=False)}
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "result" in frozen.user_attrs:
                self._finish(frozen.number)
                continue
            self._give_back(frozen, enqueue=frozen.number not in retried)
            again += 1
        self._running.clear()
        return again

    def retry(self, number: int) -> bool:
        """Proposes a trial again whose worker was lost, under the same plan, recipe and seed; False where that was its last attempt."""
        frozen = self._study.get_trials(deepcopy=False)[number]
        lost = frozen.user_attrs.get("workers_lost", 0) + 1
        if lost > self.space.resources.worker_losses:
            return False
        del self._running[number]
        self._give_back(frozen, enqueue=True, workers_lost=lost)
        return True

    def _give_back(self, frozen: FrozenTrial, *, enqueue: bool, **attrs: int) -> None:
        """Ends a trial without a result, and enqueues its parameters, plan and seed once more."""
        if enqueue:
            kept = {
                name: frozen.user_attrs[name]
                for name in ("allocator", "given", "seed", "workers_lost")
                if name in frozen.user_attrs
            }
            if (candidate := frozen.user_attrs.get("candidate")) is not None:
                kept |= {"allocator": candidate["allocator"], "given": candidate["plan"], "seed": candidate["seed"]}
            params = {**frozen.system_attrs.get("fixed_params", {}), **frozen.params}
            self._study.enqueue_trial(params, user_attrs={**kept, **attrs, "retry_of": frozen.number})
        self._study._storage.set_trial_user_attr(frozen._trial_id, "outcome", "interrupted")
        self._study.tell(frozen.number, state=TrialState.FAIL)

    # Tell --------------------------------------------------------------------------------------------------------

    def goes_on(self, number: int, rung: int, val_accuracy: float) -> bool:
        """Records what a running trial reached at a rung, and decides whether it is worth the rest of its steps."""
        assert self._rungs is not None
        return self._rungs.goes_on(number, rung, self._rung_point(val_accuracy, self._running[number]))

    def _rung_point(self, val_accuracy: float, cost: Cost) -> list[float]:
        costs = [name for name in self._objectives if name not in ("accuracy", "latency")]
        return [1 - val_accuracy / 100, *(self._ratio(name, cost) for name in costs)]

    def _recorded_rungs(self) -> Rungs | None:
        """The rungs, with what the finished trials reached."""
        stopping = self.space.search.early_stopping
        if stopping is None:
            return None
        rungs = Rungs(len(stopping.rungs), stopping.reduction)
        for row in self._ledger.rows:
            for entry in row["history"]:
                if entry["phase"] == RUNG:
                    cost = Cost(row["macs"], row["params"], row["size_bytes"])
                    rungs.record(row["trial"], entry["rung"], self._rung_point(entry["val_accuracy"], cost))
        return rungs

    def tell(self, number: int, result: TrialResult) -> Row:
        """Records a trial's result and returns its row. Only a complete trial with finite values becomes an objective.

        Raises:
            OSError: it cannot be written; the trial is running still, and may be told again.
        """
        accuracy = result.val_accuracy
        finite = accuracy is not None and isfinite(accuracy)
        status = "diverged" if result.status == "complete" and not finite else result.status
        costs = asdict(self._running[number])
        record = {**result.to_dict(), "status": status}
        record |= {
            name: costs[name] for name in ("macs", "params", "size_bytes")
        }  # known of trials that did not end, too
        trial = self._study.get_trials(deepcopy=False)[number]
        self._study._storage.set_trial_user_attr(trial._trial_id, "result", record)
        del self._running[number]
        return self._finish(number)

    def _finish(self, number: int) -> Row:
        """Tells Optuna the result that stands in the trial's attributes already, so that a crash in between loses nothing."""
        trial = self._study.get_trials(deepcopy=False)[number]
        row = row_of(trial, self.info["dense"], None)
        if row["status"] == "complete":
            self._study.tell(number, objective_values(row, self._objectives))
        else:
            self._study.tell(number, state=TrialState.PRUNED if row["status"] == "stopped" else TrialState.FAIL)
        candidate = trial.user_attrs["candidate"]
        CheckpointFile(self._checkpoint(candidate["key"], candidate["seed"]), 0.0).remove()
        if self._ledger.add(row) or not (self.folder / FRONT).is_file():
            self.write_front()
        return row

    # What is known -----------------------------------------------------------------------------------------------

    @property
    def _objectives(self) -> list[str]:
        return list(self.space.search.objectives)

    @property
    def trials(self) -> list[Row]:
        """A row per finished trial, in their order."""
        return self._ledger.rows

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of finished trials."""
        return dict(self._ledger.counts)

    @property
    def front(self) -> list[Row]:
        """The nondominated complete trials, most accurate first."""
        return self._ledger.front

    @property
    def steps_saved(self) -> float:
        """Share of the finished trials' training steps that early stopping spared."""
        planned = sum(row["recipe"]["steps"] for row in self.trials)
        stopped = [row for row in self.trials if row["status"] == "stopped"]
        spared = sum(row["recipe"]["steps"] - row["history"][-1]["step"] for row in stopped)
        return spared / planned if planned else 0.0

    def progress(self) -> dict[str, float]:
        """How far the study is, in numbers: finished trials, hypervolume, best accuracy in percent."""
        best = {} if self.leader is None else {"best_val_accuracy": self.leader["val_accuracy"]}
        return {"finished_trials": self.finished, "hypervolume": self.hypervolume, **best}

    @property
    def leader(self) -> Row | None:
        """The most accurate complete trial so far."""
        return self._ledger.best

    @property
    def hypervolume(self) -> float:
        """Of the front in (accuracy as a share, costs as shares of dense), against accuracy 0 and the dense costs."""
        return self._ledger.hypervolume

    def best(self, budget: str | None = None) -> Row:
        """The most accurate complete trial, within `budget` ("flops=30%") where one is given.

        Raises:
            UsageError: no trial lies within it.
        """
        rows = [row for row in self.trials if row["status"] == "complete"]
        if budget is not None:
            limit = parse_budget(*budget.partition("=")[::2])
            rows = [r for r in rows if limit.allows(Cost(r["macs"], r["params"], r["size_bytes"]), self.dense)]
        if not rows:
            raise UsageError(f"No finished trial of {self.space.name!r} lies within {budget or 'the budgets'}.")
        return max(rows, key=lambda row: (row["val_accuracy"], -row["macs"]))

    # Test set and front file -------------------------------------------------------------------------------------

    def test_accuracies(self) -> dict[str, float]:
        """Trial number (or "dense") -> test accuracy in percent, of the nets that were scored at the end."""
        path = self.folder / TEST
        return json.loads(path.read_text()) if path.is_file() else {}

    def score_test(self, evaluate: Callable[[Row | None], float], log: Callable[[str], None]) -> None:
        """Scores the dense net and the front on the test set, once each: `evaluate(row)`, or None for the dense net."""
        known = self.test_accuracies()
        for row in [None, *self.front]:
            key = "dense" if row is None else str(row["trial"])
            if key not in known:
                known[key] = evaluate(row)
                log(f"test accuracy of {'the dense net' if row is None else f'trial {key}'}: {known[key]:.2f} %")
                write_atomically(self.folder / TEST, json.dumps(known, indent=2))
        self._ledger.score(known)
        self.write_front()

    def front_record(self) -> dict[str, Any]:
        """What `front.json` holds."""
        dense = {**self.info["dense"], "test_accuracy": self.test_accuracies().get("dense")}
        return front_record(self.space, dense, self.front, self._ledger.hypervolume)

    def write_front(self) -> None:
        write_atomically(self.folder / FRONT, json.dumps(self.front_record(), indent=2, allow_nan=False))
