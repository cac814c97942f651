"""Which prediction suits this net and this metric: settled by a few untrained scores on the task's own metric before the first trial.

Candidates are the solver under every sensitivity, and the classic rules that know no data. Each plans at two levels of the study's range;
the plans are decomposed, get fresh BN statistics and are scored on validation images, as `preview` does. The usual prediction (K-FAC)
leads unless another is better by more than chance; what is likely better, or close to another that leads, competes with it in the search
(`allocated.py`), where trained scores decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import Any, TypeVar

from torch import nn

from ranksearch.allocate import BASELINES, MEASURES, Curves, Damage, allocate_plan
from ranksearch.allocate.damage import USUAL_MEASURE
from ranksearch.allocate.sensitivity import ABSOLUTE, BALANCED, USUAL_SENSITIVITY
from ranksearch.compress import RankPlan
from ranksearch.errors import UsageError
from ranksearch.lowering.weighting import Weighting
from ranksearch.search.budgets import at_level, budgets_of, has_levels, lowest_level
from ranksearch.search.scorer import Scorer
from ranksearch.space.search import AUTO, RULES
from ranksearch.space.settings import Range
from ranksearch.space.space import Space
from ranksearch.tasks.scores import Accuracy
from ranksearch.tasks.task import Task
from ranksearch.training.evaluate import Evaluation
from ranksearch.trial.metric import Metric
from ranksearch.words import Log

SENSITIVE = (USUAL_SENSITIVITY, "activation", "none", BALANCED)
LEVELS = (0.25, 0.7)
"""Where plans are scored, as shares of the way from the study's lowest level to its budgets; every candidate is tried at the first."""
IMAGES, WORK = (100, 500), 1e11
"""A plan is scored on as many images as take `WORK` MACs of the dense net, within these bounds."""
BN_BATCHES = 3
BEHIND = 0.1
"""A candidate that is behind the best by more than this at the first level is not tried at another."""
MARGIN, ERRORS = 0.005, 2
"""A candidate takes the place of the usual prediction where it is better by more than this share, and by more than so many standard errors
of a score."""
CLOSE, MOST, TRIALS_EACH = 0.03, 3, 8
"""What competes with the leader in the search. Where the usual prediction leads: whatever is better by half of what may be chance. Where
another leads: the usual one, unless it was far behind, since training may turn what untrained scores say; then whatever is within the share
`CLOSE` of the leader. At most `MOST` in all, and at most one rival for every `TRIALS_EACH` trials."""

Name = TypeVar("Name")
Weigh = Callable[[Sequence[str]], Mapping[str, Damage]]


@dataclass(frozen=True)
class Prediction:
    """What a study predicts by, once that is settled."""

    predictions: tuple[str, ...]
    """Sensitivities of the solver, and rules, that compete; the best first."""
    sensitivity: str
    measure: str
    trust: float | None
    """The exponent on the layers' scales to begin with; None leaves the space's."""
    scores: Mapping[str, float]
    """Candidate -> mean metric of its untrained plans, of those that kept up at every level."""

    def settled(self, space: Space) -> Space:
        """The space with what was settled in place of `auto`."""
        changes: dict[str, Any] = {
            "sensitivity": self.sensitivity, "measure": self.measure,
            "predictions": list(self.predictions) if len(self.predictions) > 1 else None,
        }  # fmt: skip
        if self.trust is not None and isinstance(space.search.trust, Range):
            changes["trust"] = space.search.trust.model_copy(update={"default": self.trust})
        return space.model_copy(update={"search": space.search.model_copy(update=changes)})


def _may_weigh_classes(task: Task) -> bool:
    """Whether there are classes, and a metric that may count them otherwise than by their share, as accuracy does."""
    return (task.classifies or isinstance(task.loss, nn.BCEWithLogitsLoss)) and not isinstance(task.metric, Accuracy)


def usual(space: Space) -> Space:
    """The space with the usual prediction in place of `auto`, where nothing is scored."""
    search = space.search
    changes = {"sensitivity": USUAL_SENSITIVITY} if search.sensitivity == AUTO else {}
    changes |= {"measure": USUAL_MEASURE} if search.measure == AUTO else {}
    return space.model_copy(update={"search": search.model_copy(update=changes)}) if changes else space


def chance(share: float, samples: int) -> float:
    """What a lead over a share may be by chance: `ERRORS` standard errors of a mean over samples, as if each were right or wrong, which no
    mean of values in [0, 1] exceeds; at least `MARGIN`."""
    p = min(1.0, max(0.0, share))
    return max(MARGIN, ERRORS * sqrt(p * (1 - p) / samples))


def leading(shares: Mapping[Name, float], usual: Name, samples: int) -> Name:
    """The best; the usual one where the best is not better by more than chance."""
    best = max(shares, key=lambda name: shares[name])
    if usual in shares and shares[best] <= shares[usual] + chance(shares[usual], samples):
        return usual
    return best


Planner = Callable[[list[Any]], RankPlan]
"""Budgets -> a plan within them; UsageError where there is none."""


class _Trial:
    """Untrained mean shares of candidates, scored level by level as long as they keep up; equal plans once."""

    def __init__(
        self, space: Space, task: Task, model: nn.Module, curves: Curves, weightings: Mapping[str, Weighting]
    ) -> None:
        low = lowest_level(space, curves)
        levels = [low + share * (1 - low) for share in LEVELS] if has_levels(space) else [1.0]
        self.levels = [at_level(budgets_of(space, curves), level, curves) for level in levels]
        least, most = IMAGES
        images = int(min(most, max(least, WORK / max(curves.dense.macs, 1)), len(task.val)))
        self._score = Scorer(
            task,
            model,
            task.val.first(images),
            bn_batches=BN_BATCHES,
            batch_size=space.recipe.batch_size,
            weightings=weightings,
        )
        self.curves, self.images = curves, images
        self.metric = Metric.of(task, self._score(RankPlan()).accuracy)
        self._known: dict[str, Evaluation] = {}
        self.found: dict[str, list[float]] = {}
        """Candidate -> its metric at every level; at the first alone where it was behind there."""

    def add(self, candidates: Mapping[str, Planner]) -> None:
        """Scores candidates, all at the first level before any at the next."""
        for number, budgets in enumerate(self.levels):
            names = [name for name in candidates if number == 0 or (name in self.found and self._keeps_up(name))]
            for name in names:
                try:
                    plan = candidates[name](budgets)
                except UsageError:  # a rule without a plan there
                    self.found.pop(name, None)
                    continue
                if plan.digest() not in self._known:
                    self._known[plan.digest()] = self._score(plan)
                self.found.setdefault(name, []).append(self._known[plan.digest()].accuracy)

    def _share_at(self, name: str, level: int) -> float:
        """A metric that is no number counts as worst."""
        share = self.metric.share(self.found[name][level])
        return share if share == share else 0.0

    def _keeps_up(self, name: str) -> bool:
        return self._share_at(name, 0) >= max(self._share_at(other, 0) for other in self.found) - BEHIND

    def share(self, name: str) -> float:
        """Mean share; a candidate that was not tried at every level counts as equally far behind the best at the others."""
        behind = max(self._share_at(other, 0) for other in self.found) - self._share_at(name, 0)
        known = [self._share_at(name, level) for level in range(len(self.found[name]))]
        for level in range(len(known), len(self.levels)):
            best = max((self._share_at(n, level) for n, v in self.found.items() if len(v) > level), default=0.0)
            known.append(best - behind)
        return fmean(known)

    @property
    def scored(self) -> int:
        return len(self._known)

    def best_of(self, names: Iterable[str], usual: str) -> str:
        """The best; the usual one where the best is not better by more than chance."""
        return leading({name: self.share(name) for name in names}, usual, self.samples)

    @property
    def samples(self) -> int:
        """Scores of single images that a share is the mean of."""
        return self.images * len(self.levels)


def settle(
    space: Space,
    task: Task,
    model: nn.Module,
    curves: Curves,
    weigh_by: Weigh,
    log: Log,
    weightings: Mapping[str, Weighting],
) -> Prediction:
    """Scores the candidates and settles what the study predicts by.

    Args:
        weigh_by: sensitivities -> the damage that each predicts, under the usual measure.
        weightings: layer -> the metric in which it is decomposed.
    """
    trial = _Trial(space, task, model, curves, weightings)
    names = [name for name in SENSITIVE if name != BALANCED or _may_weigh_classes(task)]
    damages = {name: weigh_by(names)[name] for name in names}

    def solver(damage: Damage, trust: float) -> Planner:
        weights = {name: scale ** (trust - 1) for name, scale in damage.scales.items() if scale > 0}
        return lambda budgets: allocate_plan(curves, budgets, damage=damage, weights=weights).plan

    def ruled(rule: str) -> Planner:
        return lambda budgets: BASELINES[rule](curves, budgets)

    trial.add({name: solver(damage, 1.0) for name, damage in damages.items()} | {rule: ruled(rule) for rule in RULES})
    sensitivity = trial.best_of(damages, USUAL_SENSITIVITY)
    damage, trust, measure = damages[sensitivity], None, USUAL_MEASURE
    best = sensitivity
    if sensitivity in ABSOLUTE:
        trial.add({f"{sensitivity}, trust 0": solver(damage, 0.0)})
        best = trial.best_of((sensitivity, f"{sensitivity}, trust 0"), sensitivity)
        trust = 1.0 if best == sensitivity else 0.0
    for other in MEASURES:
        if other != USUAL_MEASURE:
            name = f"{best}, {other}"
            otherwise = Damage(MEASURES[other], damage.shares, damage.scales)
            trial.add({name: solver(otherwise, 1.0 if trust is None else trust)})
            if trial.best_of((best, name), best) == name:
                measure, best = other, name
    own = {name: trial.share(name) for name in (*damages, *RULES) if name in trial.found} | {
        sensitivity: trial.share(best)
    }
    leader = trial.best_of(own, sensitivity)
    least = (
        own[leader] + chance(trial.share(leader), trial.samples) / 2
        if leader == USUAL_SENSITIVITY
        else own[leader] - CLOSE
    )
    rivals = sorted((n for n in own if own[n] > least and n != leader), key=lambda n: -own[n])
    if leader != USUAL_SENSITIVITY and len(trial.found.get(USUAL_SENSITIVITY, ())) == len(trial.levels):
        rivals = [USUAL_SENSITIVITY, *(name for name in rivals if name != USUAL_SENSITIVITY)]
    ranked = [leader, *rivals[: min(MOST - 1, space.search.trials // TRIALS_EACH)]]
    tried = {name: values for name, values in trial.found.items() if len(values) == len(trial.levels)}
    scores = {name: fmean(values) for name, values in tried.items()}
    first = best if ranked[0] == sensitivity else ranked[0]
    others = [f"{name} {trial.metric.text(value)}" for name, value in scores.items() if name != first]
    others += [f"{name} far behind at the lower of two budgets" for name in trial.found if name not in scores]
    log(
        f"prediction: {trial.scored} plans without training on {trial.images} validation images: {first} is best with "
        f"{trial.metric.text(scores[first])} ({', '.join(others)})"
    )
    return Prediction(tuple(ranked), sensitivity, measure, trust, scores)
