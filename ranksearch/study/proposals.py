"""Proposals: the sampler suggests plans until one is new and within every budget; that one becomes a candidate.

Optuna is told at once of a plan that is turned down: an infeasible one with its violation, a duplicate as a failure. It costs no trial.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from ranksearch.calibration.weightings import WEIGHTS
from ranksearch.compress import Cost
from ranksearch.costs import cost_ratio
from ranksearch.errors import StudyError, UsageError
from ranksearch.places.place import Place
from ranksearch.search.allocated import Allocated
from ranksearch.search.budgets import violations
from ranksearch.search.direct import Direct
from ranksearch.search.local_tpe import INTERRUPTED
from ranksearch.search.optuna_private import id_of, storage_of
from ranksearch.search.parametrize import Form, Searched, Suggestion
from ranksearch.search.path import NESTED_RUN, is_nested, nested_path, with_weights
from ranksearch.search.samplers import make_sampler
from ranksearch.search.workbench import Workbench
from ranksearch.space.recipe import RecipeSpace
from ranksearch.space.space import Space
from ranksearch.store.journal import together
from ranksearch.store.where import CHECKPOINTS, trial_folder
from ranksearch.study.nested_runs import best_run, run_scores
from ranksearch.trial.candidate import Candidate, MetricSetting
from ranksearch.trial.metric import Metric
from ranksearch.trial.mixture import shares_tried
from ranksearch.trial.nested import NESTED, read_weights
from ranksearch.trial.recipe import fixed, scored_after

MAX_REJECTED = 200
"""The space counts as exhausted after this many proposals in a row that were infeasible or known already."""


def form_of(space: Space, bench: Workbench) -> Form:
    """The space's parametrization."""
    return Direct(space, bench.curves) if space.search.parametrization == "direct" else allocated(space, bench)


def allocated(space: Space, bench: Workbench) -> Allocated:
    """The default form, with every prediction of the workbench."""
    return Allocated(space, bench.curves, bench.damage, bench.rivals)


def cut_in(space: Space) -> MetricSetting | None:
    """The metric in which a space's trials cut their layers; None stands for that of the weights."""
    layers = space.layers
    if layers.metric == WEIGHTS:
        return None
    return MetricSetting(layers.metric, space.search.calibration_batches, layers.metric_refresh)


class Proposals:
    """Asks Optuna's study for candidates."""

    def __init__(self, study: optuna.Study, space: Space, results: Place, dense: Cost, metric: Metric) -> None:
        self._study, self._space, self._results = study, space, results
        self._dense, self._metric = dense, metric
        self._searched: Searched | None = None
        self._searched_on: Workbench | None = None
        self._nested: tuple[int, Workbench] | None = None
        """Once all nested runs are over: the trial of the best one, and the workbench of its weights."""
        self.why_exhausted = ""
        self._may_hold_returned = True
        """Whether a trial that was under way before may be waiting."""
        trials = study.get_trials(deepcopy=False)
        self.keys = {t.user_attrs["candidate"]["key"] for t in trials if "candidate" in t.user_attrs}
        """Plan and recipe of every trial so far, by which a duplicate is recognised."""

    def use_sampler(self, sampler: BaseSampler, bench: Workbench) -> None:
        """Proposes by another sampler than the space's."""
        self._search(bench)
        self._study.sampler = sampler

    def propose(self, bench: Workbench) -> tuple[Candidate, Cost] | None:
        """The next candidate and its plan's cost; None if there is nothing new.

        Raises:
            StudyError: not a single proposal was feasible.
        """
        if is_nested(self._space):
            bench = self._with_nested_weights(bench)
        searched, known = self._search(bench), False
        for _ in range(MAX_REJECTED):
            with together(storage_of(self._study)):
                candidate, cost = self._draw(searched, bench)
            if candidate is not None:
                assert cost is not None
                return candidate, cost
            known |= cost is not None
        if not self.keys:
            raise StudyError(f"None of {MAX_REJECTED} proposals was feasible: widen the space or the budgets.")
        self.why_exhausted = (
            "the space has nothing new to propose"
            if known
            else f"none of {MAX_REJECTED} proposals was within the budgets"
        )
        return None

    def _returned(self) -> optuna.Trial | None:
        """The next trial that was under way before; it comes before new ones, since part of its training is done."""
        if not self._may_hold_returned:
            return None
        storage = storage_of(self._study)
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if "retry_of" in frozen.user_attrs and storage.set_trial_state_values(id_of(frozen), TrialState.RUNNING):
                return optuna.Trial(self._study, id_of(frozen))
        self._may_hold_returned = False
        return None

    def _draw(self, searched: Searched, bench: Workbench) -> tuple[Candidate | None, Cost | None]:
        """One proposal and its cost; no candidate if it was turned down, and no cost if the budgets were the reason."""
        trial = self._returned() or self._study.ask()
        try:
            found = searched.suggest(trial)
        except UsageError as error:
            self._reject(trial, "infeasible", str(error))
            return None, None
        cost = bench.curves.cost(found.plan)
        if not self._is_feasible(trial, cost):
            return None, None
        if is_nested(self._space):
            found = self._in_turn(found)
        return (self._take(trial, found, bench) if self._is_new(trial, found) else None), cost

    def _search(self, bench: Workbench) -> Searched:
        """The form; it and the sampler are made at the first proposal."""
        if self._searched is None or self._searched_on is not bench:
            self._searched, self._searched_on = Searched(form_of(self._space, bench), self._recipe()), bench
            self._study.sampler = make_sampler(
                self._space, self._searched.distributions, opened_with=len(self._study.get_trials(deepcopy=False)),
                metric=self._metric,
            )  # fmt: skip
        return self._searched

    def _recipe(self) -> RecipeSpace:
        """The recipe to search: a nested study fixes it, or, with several runs, searches it and then keeps the best run's."""
        if not is_nested(self._space):
            return self._space.recipe
        if self._space.search.nested.runs == 1:
            return fixed(self._space.recipe)
        if self._nested is None:
            return self._space.recipe
        run = self._study.get_trials(deepcopy=False)[self._nested[0]]
        return RecipeSpace(**run.user_attrs["candidate"]["recipe"])

    def _is_feasible(self, trial: optuna.Trial, cost: Cost) -> bool:
        """Whether the plan is within every budget; if not, the sampler learns by how much it is above."""
        over = violations(self._space.parsed_budgets(), cost, self._dense)
        # an allocated plan never violates: there is nothing to learn
        if self._space.search.parametrization == "direct":
            for budget, value in over.items():
                trial.set_constraint(budget, value)
        if max(over.values(), default=0.0) <= 0:
            return True
        # a genetic sampler's generations hold only complete trials: it is told the costs and the worst metric
        genetic = self._space.search.sampler in ("nsga2", "nsga3")
        objectives = self._space.search.objectives
        worst = [
            self._metric.worst if name == "accuracy" else cost_ratio(name, cost, self._dense) for name in objectives
        ]
        self._reject(trial, "infeasible", f"above the budgets: {over}", worst if genetic else None)
        return False

    def _is_new(self, trial: optuna.Trial, found: Suggestion) -> bool:
        again = "retry_of" in trial.user_attrs and "seed" in trial.user_attrs  # it had been a candidate
        if again or self._key(found) not in self.keys:
            return True
        self._reject(trial, "duplicate", "the same plan and recipe are in the study already")
        return False

    @staticmethod
    def _key(found: Suggestion) -> str:
        recipe = json.dumps(found.recipe.to_dict(), sort_keys=True)
        return f"{found.plan.digest()} {hashlib.sha256(recipe.encode()).hexdigest()[:16]}"

    def _in_turn(self, found: Suggestion) -> Suggestion:
        """Returns the suggestion with its recipe in a nested study: all of it for the nested run, the rest of it for a plan that is cut."""
        if found.allocator == NESTED_RUN:
            return found
        return replace(found, recipe=scored_after(found.recipe, self._space.search.nested.fine_tuning))

    def _with_nested_weights(self, bench: Workbench) -> Workbench:
        """The workbench to propose from: `bench`, or once all nested runs are over, that of the best one's weights.

        Raises:
            PlaceError: the weights cannot be read.
        """
        if self._nested is None:
            runs = self._space.search.nested.runs
            scores = run_scores(self._study, runs)
            if len(scores) < runs or (best := best_run(scores, self._metric)) is None:
                return bench
            weights = read_weights(trial_folder(self._results, best) / NESTED)
            self._nested = best, with_weights(self._space, bench, weights, lambda text: None)
        return self._nested[1]

    def _take(self, trial: optuna.Trial, found: Suggestion, bench: Workbench) -> Candidate:
        key = self._key(found)
        seed = trial.user_attrs.get("seed", self._space.search.seed * 100_003 + trial.number)
        record = {
            "plan": found.plan.to_dict(), "recipe": found.recipe.to_dict(), "allocator": found.allocator, "seed": seed, "key": key,
        }  # fmt: skip
        trial.set_user_attr("candidate", record)
        self.keys.add(key)
        rungs = self._space.search.early_stopping
        latency = self._space.latency.as_setting() if self._space.has_latency else None
        return Candidate(
            trial.number, found.plan, found.recipe, seed, trial_folder(self._results, trial.number), self.checkpoint(key, seed),
            rungs=tuple(rungs.rungs) if rungs is not None else (), latency=latency,
            metric=cut_in(self._space), **self._nesting(found, bench),
        )  # fmt: skip

    def _nesting(self, found: Suggestion, bench: Workbench) -> dict[str, Any]:
        """What a candidate of a nested study has beside its plan: the levels of the nested run, or the weights that a plan is cut from."""
        if found.allocator == NESTED_RUN:
            return {
                "path": nested_path(self._space, bench.curves, bench.damage),
                "drawn": self._space.search.nested.drawn,
            }
        if self._nested is not None:
            weights = trial_folder(self._results, self._nested[0]) / NESTED
            return {"weights": weights, "shares": shares_tried(mix=self._space.search.nested.mix)}
        return {}

    def checkpoint(self, key: str, seed: int) -> Place:
        """The checkpoint of a plan, recipe and seed, in which a trial that is proposed again finds its state."""
        return self._results / CHECKPOINTS / f"{hashlib.sha256(f'{key} {seed}'.encode()).hexdigest()[:16]}.pt"

    def give_back(self, frozen: FrozenTrial, *, enqueue: bool, **attrs: int) -> None:
        """Ends a trial without a result; with `enqueue`, enqueues its parameters, plan and seed once more."""
        self._may_hold_returned |= enqueue
        with together(storage_of(self._study)):
            if enqueue:
                self._enqueue_again(frozen, attrs)
            storage_of(self._study).set_trial_user_attr(id_of(frozen), "outcome", INTERRUPTED)
            self._study.tell(frozen.number, state=TrialState.FAIL)

    def _enqueue_again(self, frozen: FrozenTrial, attrs: Mapping[str, int]) -> None:
        names = ("allocator", "given", "seed", "workers_lost", "nodes_lost")
        kept = {name: frozen.user_attrs[name] for name in names if name in frozen.user_attrs}
        if (candidate := frozen.user_attrs.get("candidate")) is not None:
            kept |= {"allocator": candidate["allocator"], "given": candidate["plan"], "seed": candidate["seed"]}
        params = {**frozen.system_attrs.get("fixed_params", {}), **frozen.params}
        kept |= {"brings": sorted(params)} if "given" in kept else {}
        self._study.enqueue_trial(params, user_attrs={**kept, **attrs, "retry_of": frozen.number})

    def _reject(self, trial: optuna.Trial, outcome: str, reason: str, values: list[float] | None = None) -> None:
        trial.set_user_attr("outcome", outcome)
        trial.set_user_attr("reason", reason)
        if values is not None:
            self._study.tell(trial, values)
        else:
            # TPE counts a pruned trial that violates a constraint among the bad ones; a duplicate is neither good nor bad
            self._study.tell(trial, state=TrialState.PRUNED if outcome == "infeasible" else TrialState.FAIL)
