"""`Study`: a folder and its Optuna study. It asks for candidates, is told results, and knows the front.

The journal on disk is the truth: parameters, plans and results of every trial are in it, so a study that lost its driver is
opened again from its folder. Ray and MLflow are not known here.

    runs/NAME/space.yaml        the resolved space          runs/NAME/front.json   the front, written after every trial
    runs/NAME/study.json        dense net, versions, seed   runs/NAME/trials/007/  plan.json, model.safetensors
    runs/NAME/optuna.journal    Optuna's storage            runs/NAME/test.json    test accuracies of the front, at the end
    runs/NAME/checkpoints/      states of running trials
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import filelock
import optuna
import safetensors.torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ranksearch.allocate import parse_budget
from ranksearch.compress import Cost, RankPlan, dense_cost
from ranksearch.errors import StudyError, UsageError, nearest
from ranksearch.files import write_atomically
from ranksearch.search.checkpoint import CheckpointFile
from ranksearch.search.front import Row, front_hypervolume, front_of, front_record, objective_values, row_of
from ranksearch.search.parametrize import first_points, suggest
from ranksearch.search.provenance import provenance
from ranksearch.search.recipe import Recipe
from ranksearch.search.samplers import make_sampler
from ranksearch.search.space import OBJECTIVES, Space
from ranksearch.search.space_file import parse_space
from ranksearch.search.trial import TrialResult
from ranksearch.search.workbench import Workbench

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the study's own progress is shown, not Optuna's

SPACE, INFO, JOURNAL, FRONT, TEST = "space.yaml", "study.json", "optuna.journal", "front.json", "test.json"
DENSE_WEIGHTS, CHECKPOINTS = "dense.safetensors", "checkpoints"
CURVES, PREVIEW = "curves.safetensors", "preview"
NOT_RUN = ("infeasible", "duplicate", "interrupted")
"""Outcomes of proposals that did not become a finished trial; they do not count towards the planned number."""
MAX_REJECTED = 200
MAX_WORKERS_LOST = 1
"""A trial whose worker was lost is run once more; a second loss is its own doing (out of memory, say) and a failure."""


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


def find_study(name: str, runs: Path) -> Path:
    """The folder of a study given by name (in `runs`) or by path.

    Raises:
        UsageError: no such study; the text names the nearest one.
    """
    for folder in (Path(name), runs / name):
        if (folder / INFO).is_file():
            return folder.resolve()
    known = sorted(p.parent.name for p in runs.glob(f"*/{INFO}"))
    raise UsageError(f"There is no study {name!r}, neither as a folder nor in {runs}. {nearest(name, known)}")


def _in_the_way(folder: Path) -> list[Path]:
    """What a new study's folder must not hold: everything but what a preview leaves there."""
    if not folder.is_dir():
        return [folder] if folder.exists() else []
    return [path for path in folder.iterdir() if path.name not in (PREVIEW, CURVES)]


class Study:
    """A study on disk. `create` makes a new one, `open` continues or reads one."""

    def __init__(self, folder: Path, space: Space, info: dict[str, Any], study: optuna.Study) -> None:
        self.folder, self.space, self.info = folder, space, info
        self._study = study
        self._running: dict[int, optuna.Trial] = {}
        self.exhausted = False
        """Whether the space had nothing new to propose before the planned number was reached."""
        self.dense = Cost(info["dense"]["macs"], info["dense"]["params"], info["dense"]["size_bytes"])

    # Making and opening ------------------------------------------------------------------------------------------

    @staticmethod
    def check_name(runs: Path, space: Space) -> Path:
        """The new study's folder; raises UsageError where that name is taken, and proposes a free one."""
        folder = runs / space.name
        if not (folder / INFO).is_file() and _in_the_way(folder):
            raise UsageError(
                f"{folder} is there, but is no study ({INFO} is missing): remove it, or take another --name."
            )
        if (folder / INFO).is_file():
            free = next(f"{space.name}-{i}" for i in range(2, 10_000) if not (runs / f"{space.name}-{i}").exists())
            raise UsageError(
                f"There is a study {space.name!r} in {runs} already, and it is kept. Continue it with `ranksearch resume "
                f"{space.name}`, or start another one with `--name {free}`."
            )
        return folder

    @classmethod
    def create(cls, runs: Path, space: Space, bench: Workbench, dense_val_accuracy: float) -> Study:
        """A new study in `runs`/NAME with its first points enqueued."""
        folder = cls.check_name(runs, space)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return cls._fill(folder, space, bench, dense_val_accuracy)
        except BaseException:
            for path in _in_the_way(folder):  # half a study would be in the way of the next try
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
            raise

    @classmethod
    def _fill(cls, folder: Path, space: Space, bench: Workbench, dense_val_accuracy: float) -> Study:
        if space.data is not None:  # the study is opened from other working directories too
            space = space.model_copy(update={"data": str(Path(space.data).expanduser().resolve())})
        (folder / SPACE).write_text(yaml.safe_dump(space.model_dump(), sort_keys=False))
        safetensors.torch.save_file({k: v.contiguous() for k, v in bench.dense.items()}, folder / DENSE_WEIGHTS)
        cost = dense_cost(bench.net)
        dense = {"val_accuracy": dense_val_accuracy, "test_accuracy": None} | asdict(cost)
        info = {"study": space.name, "dense": dense, "seed": space.search.seed, "provenance": provenance(folder)}
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        directions = [OBJECTIVES[name] for name in space.search.objectives]
        opening = first_points(space, bench.curves)
        study = optuna.create_study(
            storage=storage, study_name=space.name, directions=directions, sampler=make_sampler(space, 0)
        )
        for params, allocator in opening:
            study.enqueue_trial(params, user_attrs={"allocator": allocator})
        write_atomically(folder / INFO, json.dumps(info, indent=2))  # last: a folder with it is a study
        return cls(folder, space, info, study)

    @classmethod
    def open(cls, folder: Path) -> Study:
        """Reads a study from its folder.

        Raises:
            UsageError: the folder's files are missing or damaged.
        """
        try:
            info = json.loads((folder / INFO).read_text())
            space = parse_space(yaml.safe_load((folder / SPACE).read_text()), str(folder / SPACE))
            storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
            study = optuna.load_study(storage=storage, study_name=info["study"])
        except (OSError, json.JSONDecodeError, yaml.YAMLError, KeyError) as error:
            raise UsageError(f"{folder} is no readable study: {error}") from error
        study.sampler = make_sampler(space, len(study.get_trials(deepcopy=False)))
        return cls(folder, space, info, study)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the study for this process: two drivers would settle each other's trials.

        Raises:
            UsageError: another process is running the study.
        """
        try:
            with filelock.FileLock(self.folder / ".lock", timeout=0):
                yield
        except filelock.Timeout:
            raise UsageError(
                f"{self.folder} is being run by another process; `ranksearch front` may be called meanwhile."
            ) from None

    # Ask and tell ------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> int:
        return self.space.search.trials

    def _outcomes(self) -> list[FrozenTrial]:
        """Finished trials that count: complete, failed and diverged ones."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        return [t for t in trials if t.user_attrs.get("outcome") not in NOT_RUN]

    @property
    def finished(self) -> int:
        return len(self._outcomes())

    @property
    def running(self) -> int:
        """Trials that this process has asked for and not told yet."""
        return len(self._running)

    def trial_folder(self, number: int) -> Path:
        """Where a trial's net is: `plan.json` and `model.safetensors`."""
        return self.folder / "trials" / f"{number:03d}"

    def requeue_interrupted(self) -> int:
        """Settles what a lost driver left running; returns how many trials are proposed again.

        A trial whose result was written but not yet told is told; any other one is proposed again under the same parameters and seed.
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
        """Proposes a trial again whose worker was lost, under the same parameters and seed; False where that was its last attempt."""
        frozen = self._study.get_trials(deepcopy=False)[number]
        lost = frozen.user_attrs.get("workers_lost", 0) + 1
        if lost > MAX_WORKERS_LOST:
            return False
        del self._running[number]
        self._give_back(frozen, enqueue=True, workers_lost=lost)
        return True

    def _give_back(self, frozen: FrozenTrial, *, enqueue: bool, **attrs: int) -> None:
        """Ends a trial without a result, and enqueues its parameters, allocator and seed once more."""
        if enqueue:
            kept = {name: frozen.user_attrs[name] for name in ("allocator", "seed") if name in frozen.user_attrs}
            self._study.enqueue_trial(frozen.params, user_attrs={**kept, **attrs, "retry_of": frozen.number})
        self._study._storage.set_trial_user_attr(frozen._trial_id, "outcome", "interrupted")
        self._study.tell(frozen.number, state=TrialState.FAIL)

    def ask(self, bench: Workbench) -> Candidate | None:
        """The next trial, its plan within every budget.

        None once the planned number is under way or done, or `exhausted`: proposal after proposal was in the study already.

        Raises:
            StudyError: not a single proposal was feasible.
        """
        if self.exhausted or self.finished + len(self._running) >= self.planned:
            return None
        for _ in range(MAX_REJECTED):
            trial = self._study.ask()
            try:
                found = suggest(trial, self.space, bench.curves, bench.damage)
            except UsageError as error:
                self._reject(trial, "infeasible", str(error))
                continue
            key = f"{found.plan.digest()} {json.dumps(found.recipe.to_dict(), sort_keys=True)}"
            if "retry_of" not in trial.user_attrs and key in self._keys():
                self._reject(trial, "duplicate", "the same plan and recipe are in the study already")
                continue
            seed = trial.user_attrs.get("seed", self.space.search.seed * 100_003 + trial.number)
            for name, value in (
                ("allocator", found.allocator), ("plan", found.plan.to_dict()), ("recipe", found.recipe.to_dict()),
                ("seed", seed), ("key", key),
            ):  # fmt: skip
                trial.set_user_attr(name, value)
            self._running[trial.number] = trial
            folder, checkpoint = self.trial_folder(trial.number), self._checkpoint(key, seed)
            return Candidate(trial.number, found.plan, found.recipe, seed, folder, checkpoint)
        if not self._keys():
            raise StudyError(f"None of {MAX_REJECTED} proposals was feasible: widen the space or the budgets.")
        self.exhausted = True
        return None

    def _checkpoint(self, key: str, seed: int) -> Path:
        """The file of a plan, recipe and seed: a trial that is proposed again finds the state that it had."""
        return self.folder / CHECKPOINTS / f"{hashlib.sha256(f'{key} {seed}'.encode()).hexdigest()[:16]}.pt"

    def _keys(self) -> set[str]:
        """Plan and recipe of every trial so far, by which a duplicate is recognised."""
        return {t.user_attrs["key"] for t in self._study.get_trials(deepcopy=False) if "key" in t.user_attrs}

    def _reject(self, trial: optuna.Trial, outcome: str, reason: str) -> None:
        trial.set_user_attr("outcome", outcome)
        trial.set_user_attr("reason", reason)
        self._study.tell(trial, state=TrialState.FAIL)

    def tell(self, number: int, result: TrialResult) -> Row:
        """Records a trial's result and returns its row. Only a complete trial with finite values becomes an objective."""
        trial = self._running.pop(number)
        accuracy = result.val_accuracy
        finite = accuracy is not None and isfinite(accuracy)
        status = "diverged" if result.status == "complete" and not finite else result.status
        trial.set_user_attr("result", {**result.to_dict(), "status": status})
        row = self._finish(number)
        self.write_front()
        return row

    def _finish(self, number: int) -> Row:
        """Tells Optuna the result that stands in the trial's attributes already, so that a crash in between loses nothing."""
        trial = self._study.get_trials(deepcopy=False)[number]
        row = row_of(trial, self.info["dense"], None)
        self._study._storage.set_trial_user_attr(trial._trial_id, "outcome", row["status"])
        if row["status"] == "complete":
            self._study.tell(number, objective_values(row, self._objectives))
        else:
            self._study.tell(number, state=TrialState.FAIL)
        CheckpointFile(self._checkpoint(trial.user_attrs["key"], trial.user_attrs["seed"]), 0.0).remove()
        return row

    # What is known -----------------------------------------------------------------------------------------------

    @property
    def _objectives(self) -> list[str]:
        return list(self.space.search.objectives)

    @property
    def trials(self) -> list[Row]:
        """A row per finished trial, in their order."""
        test = self.test_accuracies()
        return [row_of(trial, self.info["dense"], test.get(str(trial.number))) for trial in self._outcomes()]

    @property
    def front(self) -> list[Row]:
        """The nondominated complete trials, most accurate first."""
        return front_of(self.trials, self._objectives)

    @property
    def hypervolume(self) -> float:
        """Of the front in (accuracy as a share, costs as shares of dense), against accuracy 0 and the dense costs."""
        return front_hypervolume(self.front, self._objectives)

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
        self.write_front()

    def front_record(self) -> dict[str, Any]:
        """What `front.json` holds."""
        dense = {**self.info["dense"], "test_accuracy": self.test_accuracies().get("dense")}
        return front_record(self.space, dense, self.front)

    def write_front(self) -> None:
        write_atomically(self.folder / FRONT, json.dumps(self.front_record(), indent=2, allow_nan=False))
