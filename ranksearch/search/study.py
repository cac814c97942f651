"""`Study`: a folder and its Optuna study. It asks for candidates, is told results, and knows the front.

The journal on disk is the truth: parameters, plans and results of every trial are in it, so a study that lost its driver is
opened again from its folder. Ray and MLflow are not known here.

    runs/NAME/space.yaml        the resolved space          runs/NAME/front.json   the front, written after every trial
    runs/NAME/study.json        dense net, versions, seed   runs/NAME/trials/007/  plan.json, model.safetensors
    runs/NAME/optuna.journal    Optuna's storage            runs/NAME/test.json    test accuracies of the front, at the end
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import optuna
import safetensors.torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ranksearch.allocate import parse_budget
from ranksearch.compress import Cost, RankPlan, dense_cost
from ranksearch.errors import StudyError, UsageError, nearest
from ranksearch.pareto import hypervolume, nondominated
from ranksearch.search.parametrize import first_points, suggest
from ranksearch.search.provenance import provenance
from ranksearch.search.space import OBJECTIVES, Space, parse_space
from ranksearch.search.trial import Recipe, TrialResult
from ranksearch.search.workbench import Workbench

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the study's own progress is shown, not Optuna's

SPACE, INFO, JOURNAL, FRONT, TEST = "space.yaml", "study.json", "optuna.journal", "front.json", "test.json"
DENSE_WEIGHTS = "dense.safetensors"
NOT_RUN = ("infeasible", "duplicate", "interrupted")
"""Outcomes of proposals that did not become a finished trial; they do not count towards the planned number."""
MAX_REJECTED = 200
COST_RATIOS = {"macs": "macs_ratio", "params": "params_ratio", "size": "size_ratio"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A trial to run: everything a worker needs besides the workbench."""

    number: int
    plan: RankPlan
    recipe: Recipe
    seed: int
    save_to: Path


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _sampler(space: Space, opened_with: int, opening: int) -> optuna.samplers.BaseSampler:
    """The sampler of a study that holds `opened_with` trials already and opens with `opening` first points.

    A seeded sampler made anew at each resume would repeat its draws, so the number of trials is part of its seed.
    """
    seed = space.search.seed + 1_000_003 * opened_with
    if space.search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if space.search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, space.search.trials // 4)), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # `group`: the classic plans have no corrections, and must not take these out of the joint model
        return optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=opening + 2, seed=seed)


def find_study(name: str, runs: Path) -> Path:
    """The folder of a study given by name (in `runs`) or by path.

    Raises:
        UsageError: no such study; the text names the nearest one.
    """
    for folder in (Path(name), runs / name):
        if (folder / INFO).is_file():
            return folder
    known = sorted(p.parent.name for p in runs.glob(f"*/{INFO}"))
    raise UsageError(f"There is no study {name!r}, neither as a folder nor in {runs}. {nearest(name, known)}")


class Study:
    """A study on disk. `create` makes a new one, `open` continues or reads one."""

    def __init__(self, folder: Path, space: Space, info: dict[str, Any], study: optuna.Study) -> None:
        self.folder, self.space, self.info = folder, space, info
        self._study = study
        self._running: dict[int, optuna.Trial] = {}
        self.dense = Cost(info["dense"]["macs"], info["dense"]["params"], info["dense"]["size_bytes"])

    # Making and opening ------------------------------------------------------------------------------------------

    @staticmethod
    def check_name(runs: Path, space: Space) -> Path:
        """The new study's folder; raises UsageError where that name is taken, and proposes a free one."""
        folder = runs / space.name
        if folder.exists():
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
        folder.mkdir(parents=True)
        (folder / SPACE).write_text(yaml.safe_dump(space.model_dump(), sort_keys=False))
        safetensors.torch.save_file({k: v.contiguous() for k, v in bench.dense.items()}, folder / DENSE_WEIGHTS)
        cost = dense_cost(bench.net)
        dense = {"val_accuracy": dense_val_accuracy, "test_accuracy": None} | asdict(cost)
        info = {"study": space.name, "dense": dense, "seed": space.search.seed, "provenance": provenance(folder)}
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        directions = [OBJECTIVES[name] for name in space.search.objectives]
        opening = first_points(space, bench.curves)
        study = optuna.create_study(
            storage=storage, study_name=space.name, directions=directions, sampler=_sampler(space, 0, len(opening))
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
        count = len(study.get_trials(deepcopy=False))
        study.sampler = _sampler(space, count, len(space.search.first_points) + 2)
        return cls(folder, space, info, study)

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

    def trial_folder(self, number: int) -> Path:
        """Where a trial's net is: `plan.json` and `model.safetensors`."""
        return self.folder / "trials" / f"{number:03d}"

    def requeue_interrupted(self) -> int:
        """Proposes again, with the same parameters, what a lost driver left running; returns how many."""
        left = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for frozen in left:
            allocator = frozen.user_attrs.get("allocator", "search")
            attrs = {"allocator": allocator, "retry_of": frozen.number}
            self._study.enqueue_trial(frozen.params, user_attrs=attrs)
            self._study._storage.set_trial_user_attr(frozen._trial_id, "outcome", "interrupted")
            self._study.tell(frozen.number, state=TrialState.FAIL)
        self._running.clear()
        return len(left)

    def ask(self, bench: Workbench) -> Candidate | None:
        """The next trial, its plan within every budget; None once the planned number is under way or done.

        Raises:
            StudyError: proposal after proposal was infeasible or a duplicate.
        """
        if self.finished + len(self._running) >= self.planned:
            return None
        for _ in range(MAX_REJECTED):
            trial = self._study.ask()
            try:
                found = suggest(trial, self.space, bench.curves)
            except UsageError as error:
                self._reject(trial, "infeasible", str(error))
                continue
            key = f"{found.plan.digest()} {sorted(asdict(found.recipe).items())}"
            if key in {t.user_attrs.get("key") for t in self._study.get_trials(deepcopy=False)} - {None} and (
                "retry_of" not in trial.user_attrs
            ):
                self._reject(trial, "duplicate", "the same plan and recipe are in the study already")
                continue
            seed = self.space.search.seed * 100_003 + trial.number
            for name, value in (
                ("allocator", found.allocator), ("plan", found.plan.to_dict()), ("recipe", asdict(found.recipe)),
                ("seed", seed), ("key", key),
            ):  # fmt: skip
                trial.set_user_attr(name, value)
            self._running[trial.number] = trial
            return Candidate(
                trial.number, found.plan, found.recipe, seed, self.folder / "trials" / f"{trial.number:03d}"
            )
        raise StudyError(
            f"{MAX_REJECTED} proposals in a row were infeasible or duplicates: widen the space or the budgets."
        )

    def _reject(self, trial: optuna.Trial, outcome: str, reason: str) -> None:
        trial.set_user_attr("outcome", outcome)
        trial.set_user_attr("reason", reason)
        self._study.tell(trial, state=TrialState.FAIL)

    def tell(self, number: int, result: TrialResult) -> Row:
        """Records a trial's result and returns its row. Only a complete trial with finite values becomes an objective."""
        trial = self._running.pop(number)
        status = result.status
        if status == "complete" and not isfinite(
            result.val_accuracy if result.val_accuracy is not None else float("nan")
        ):
            status = "diverged"
        trial.set_user_attr("result", {**result.to_dict(), "status": status})
        trial.set_user_attr("outcome", status)
        if status == "complete":
            row = self._row(self._study.get_trials(deepcopy=False)[number])
            self._study.tell(
                trial, [row["val_accuracy"] if o == "accuracy" else row[COST_RATIOS[o]] for o in self._objectives]
            )
        else:
            self._study.tell(trial, state=TrialState.FAIL)
        self.write_front()
        return next(row for row in self.trials if row["trial"] == number)

    # What is known -----------------------------------------------------------------------------------------------

    @property
    def _objectives(self) -> list[str]:
        return list(self.space.search.objectives)

    def _row(self, trial: FrozenTrial) -> Row:
        attrs, result = trial.user_attrs, trial.user_attrs.get("result", {})

        def ratio(key: str) -> float | None:
            return result[key] / self.info["dense"][key] if result.get(key) is not None else None

        measured = (
            "val_accuracy",
            "val_loss",
            "macs",
            "params",
            "size_bytes",
            "latency_ms",
            "images_per_second",
            "seconds",
        )
        return {
            "trial": trial.number,
            "status": result.get("status", "failed"),
            "epochs": result.get("epochs"),
            "test_accuracy": self.test_accuracies().get(str(trial.number)),
            **{key: result.get(key) for key in measured},
            "macs_ratio": ratio("macs"),
            "params_ratio": ratio("params"),
            "size_ratio": ratio("size_bytes"),
            "plan": attrs.get("plan"),
            "recipe": attrs.get("recipe"),
            "params_searched": dict(trial.params),
            "allocator": attrs.get("allocator"),
            "seed": attrs.get("seed"),
            "reason": result.get("reason"),
            "history": result.get("history", []),
        }

    @property
    def trials(self) -> list[Row]:
        """A row per finished trial, in their order."""
        return [self._row(trial) for trial in self._outcomes()]

    def _points(self, rows: list[Row]) -> list[list[float]]:
        """Rows in minimisation form: 1 - accuracy as a share, costs as shares of dense."""
        return [
            [1 - row["val_accuracy"] / 100 if o == "accuracy" else row[COST_RATIOS[o]] for o in self._objectives]
            for row in rows
        ]

    @property
    def front(self) -> list[Row]:
        """The nondominated complete trials, most accurate first."""
        complete = [row for row in self.trials if row["status"] == "complete"]
        if not complete:
            return []
        kept = nondominated(self._points(complete))
        on_front = [row for row, keep in zip(complete, kept, strict=True) if keep]
        return sorted(on_front, key=lambda row: (-row["val_accuracy"], row["macs"], row["trial"]))

    @property
    def hypervolume(self) -> float:
        """Of the front in (accuracy as a share, costs as shares of dense), against accuracy 0 and the dense costs."""
        front = self.front
        return hypervolume(self._points(front), [1.0] * len(self._objectives)) if front else 0.0

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
        left_out = ("history", "recipe")
        return {
            "study": self.space.name,
            "objectives": [{"name": name, "direction": OBJECTIVES[name]} for name in self._objectives],
            "budgets": {budget.cost: budget.text for budget in self.space.parsed_budgets()},
            "reference_point": [0.0 if name == "accuracy" else 1.0 for name in self._objectives],
            "hypervolume": self.hypervolume,
            "dense": dense,
            "trials": [{k: v for k, v in row.items() if k not in left_out} for row in self.front],
        }

    def write_front(self) -> None:
        write_atomically(self.folder / FRONT, json.dumps(self.front_record(), indent=2))
