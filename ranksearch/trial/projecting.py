"""Projections in the course of a training: when, at which rank, and what each of them did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

from torch import nn

from ranksearch.compress import LayerPlan, Net, Projector, RankPlan
from ranksearch.lowering import lowering_named
from ranksearch.lowering.weighting import Weighting
from ranksearch.training.device import Spans, clock
from ranksearch.training.train import Training
from ranksearch.trial.recipe import ProjectionRecipe

RECORDED = 10
"""About so many projections of a trial are recorded, evenly spread and the last one always: each costs two forward passes."""
ADAPTED = 4
"""The schedule by removed energy keeps the period within this factor of the recipe's."""


class Projecting:
    """Projects a model under training as its recipe says; `finish` makes the last projection, which the plan's ranks always end on."""

    def __init__(
        self,
        plan: RankPlan,
        net: Net,
        recipe: ProjectionRecipe,
        rates: Sequence[float],
        measure: Callable[[nn.Module], Mapping[str, Weighting]] | None = None,
        refresh: int | None = None,
        starts: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            rates: learning rate of every step before the decomposition.
            measure: finds the metric of the data as a model sees them, at the first projection and then at every `refresh`-th one;
                without `refresh` layers are cut in the weights' own metric.
            starts: layer -> what its first projection starts from; left out, it starts anew.
        """
        self.plan, self.recipe = plan, recipe
        self.projector = Projector(
            plan,
            energy_transfer=recipe.energy_transfer,
            norms=net.norms() if recipe.bn_rectification else None,
        )
        self.projector.warm.update(starts or {})
        self.count, self.seconds = 0, 0.0
        self._timed = Spans()
        self.metric_seconds = 0.0
        """Those of `seconds` that measuring the metric took."""
        self._measure, self._refresh = measure, refresh
        self._specs = {layer.name: layer.spec for layer in net.layers}
        self._steps = len(rates)
        self._window = round(recipe.start * self._steps), round(recipe.until_end * self._steps)
        inside = rates[slice(*self._window)]
        mean = sum(inside) / len(inside) if inside else 1.0
        self._pace = [rate / mean for rate in rates] if recipe.schedule == "learning_rate" and mean > 0 else None
        self._period = float(recipe.period)
        self._since = 0.0
        self.records: list[dict[str, Any]] = []
        self._every = max(1, len(inside) // (RECORDED * recipe.period))

    def after_step(self, training: Training) -> None:
        """Projects the weights where a projection is due after the step just made."""
        start, stop = self._window
        if not start < training.done <= stop or training.done == self._steps:
            return
        self._since += self._pace[training.done - 1] if self._pace is not None else 1.0
        if self._since < self._period - 1e-9:
            return
        self._since -= self._period
        removed = self._project(training, training.done, recorded=self.count % self._every == 0)
        if self.recipe.schedule == "removed_energy":
            self._adapt(removed)
        if self.recipe.momentum == "reset":
            training.forget_momentum_()

    def finish(self, training: Training) -> None:
        """The projection that the training ends on, at the plan's ranks."""
        self._project(training, self._steps, recorded=True)

    def summary(self) -> dict[str, float]:
        """What the last projection did, for the trial's metrics; removed energy as shares of ||W||² over the plan's layers."""
        last = self.records[-1]
        removed = last["removed_energy"].values()
        figures = {
            "loss_before_projection": last["loss_before"],
            "loss_after_projection": last["loss_after"],
            "removed_energy_max": max(removed, default=0.0),
            "removed_energy_mean": sum(removed) / max(1, len(removed)),
        }
        if self._refresh is not None:
            figures["metric_seconds"] = self.metric_seconds
        return {name: value for name, value in figures.items() if value is not None}

    def _project(self, training: Training, step: int, *, recorded: bool) -> Mapping[str, float]:
        if self._may_be_later(training, recorded):
            with self._timed.span(next(training.model.parameters()).device):
                self.projector.later(training.model, training.replay)
            self.count += 1
            return {}
        before = training.probe() if recorded else None
        device = next(training.model.parameters()).device
        started = clock(device)
        # rank 0's projection is everybody's: whatever the hardware, all go on from the same bits
        removed = training.group.on_rank_0(lambda: self._projected(training.model, step))
        training.group.same_(training.model)
        self.seconds += clock(device) - started + self._timed.taken()
        self.count += 1
        if recorded:
            after = training.probe()
            self.records.append({"step": step, "loss_before": before, "loss_after": after, "removed_energy": removed})
        return removed

    def _may_be_later(self, training: Training, recorded: bool) -> bool:
        """Whether nobody asks for what this projection does, so that a GPU need not be waited for."""
        watched = recorded or self.recipe.schedule == "removed_energy" or self.recipe.rank_annealing > 0
        return not (watched or self._refresh is not None or training.group.world > 1) and training.is_replayed

    def _projected(self, model: nn.Module, step: int) -> Mapping[str, float]:
        due = self._refresh is not None and (self.count % self._refresh == 0 or not self.projector.weightings)
        if self._measure is not None and due:
            device = next(model.parameters()).device
            started = clock(device)
            self.projector.weigh(self._measure(model))
            self.metric_seconds += clock(device) - started
        return self.projector(model, self._plan_at(step))

    def _adapt(self, removed: Mapping[str, float]) -> None:
        """Projects more often where more than the wanted share of energy was removed, less often where less (it grows as steps²)."""
        mean = sum(removed.values()) / max(1, len(removed))
        change = sqrt(self.recipe.removed_energy / mean) if mean > 0 else 2.0
        low, high = max(1.0, self.recipe.period / ADAPTED), self.recipe.period * ADAPTED
        self._period = min(high, max(low, self._period * min(2.0, max(0.5, change))))

    def _plan_at(self, step: int) -> RankPlan:
        """The plan, at ranks that come down from full to its own as (1 - t)³ over the annealed share of the steps.

        Formats whose decomposition is no projection (`cp`) are not annealed: each new rank would be a search of its own.

        Reference: the cubic schedule of Zhu & Gupta 2017, arXiv 1710.01878.
        """
        first = self._window[0]
        annealed = self.recipe.rank_annealing * (self._steps - first)
        left = 1 - (step - first) / annealed if annealed > 0 else 0.0
        if left <= 0 or step >= self._steps:
            return self.plan
        layers = {name: self._annealed(name, choice, left**3) for name, choice in self.plan.lowered()}
        return replace(self.plan, layers=layers)

    def _annealed(self, name: str, choice: LayerPlan, share: float) -> LayerPlan:
        lowering = lowering_named(choice.lowering)
        if not lowering.is_projection:
            return choice
        return replace(choice, rank=_between(choice.rank, lowering.full_rank(self._specs[name]), share))

    def state_dict(self) -> dict[str, Any]:
        return {
            "warm": self.projector.state_dict(), "period": self._period, "since": self._since,
            "count": self.count, "seconds": self.seconds, "records": self.records,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.projector.load_state_dict(state["warm"])
        self._period, self._since = state["period"], state["since"]
        self.count, self.seconds, self.records = state["count"], state["seconds"], list(state["records"])


def _between(rank: Any, full: Any, share: float) -> Any:
    """`rank` raised by `share` of what is missing to `full`, side by side."""
    if isinstance(rank, tuple):
        return tuple(_between(r, f, share) for r, f in zip(rank, full, strict=True))
    return rank + round(share * (full - rank))
