"""Nets for any budget from the weights of a nested run: a plan is solved for, cut, given BN statistics and scored. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ranksearch.allocate import CurveCache, allocate_plan, parse_budget
from ranksearch.allocate.budget import Budgets, assignments
from ranksearch.compress import Cost, RankPlan, reestimate_bn_
from ranksearch.data.source import calibration_batches
from ranksearch.errors import UsageError
from ranksearch.search.path import is_nested, with_weights
from ranksearch.search.workbench import Workbench, prepare
from ranksearch.space.space import Space
from ranksearch.store.latency_file import open_table
from ranksearch.store.where import CURVES, DENSE_WEIGHTS, trial_folder
from ranksearch.tasks import model_reference
from ranksearch.training.dense import State
from ranksearch.training.device import pick_device
from ranksearch.training.evaluate import evaluate
from ranksearch.trial.calibration import Calibration
from ranksearch.trial.mixture import best_cut, shares_tried
from ranksearch.trial.nested import NESTED, read_weights
from ranksearch.trial.recipe import Recipe, middle


@dataclass(frozen=True, eq=False)
class Cut:
    """A net within some budgets, cut from a nested run's weights."""

    model: nn.Module
    """The net itself, in evaluation mode, on the CPU."""
    plan: RankPlan
    budgets: tuple[str, ...]
    """The budgets as they were asked for, such as `flops=37%`."""
    cost: Cost
    dense: Cost
    """The cost of the dense net."""
    val_accuracy: float
    """The task's metric on the validation set."""
    val_loss: float
    run_share: float
    """Share of the nested run's weights in what it was cut from; the rest is the dense net's (`trial/mixture.py`)."""

    @property
    def macs_ratio(self) -> float:
        """MACs as a share of the dense net's."""
        return self.cost.macs / self.dense.macs

    @property
    def params_ratio(self) -> float:
        """Parameters as a share of the dense net's."""
        return self.cost.params / self.dense.params


class Cutter:
    """Cuts nets from the weights of one study; what plans are predicted by is computed once."""

    def __init__(self, space: Space, folder: Path, trial: int | None, latency_key: str | None) -> None:
        """
        Args:
            trial: the nested run, if it is over.
            latency_key: the key of the study's times, if latency counts.

        Raises:
            UsageError: there is no nested run, or it is not over.
        """
        if not is_nested(space):
            raise UsageError(
                f"{space.name!r} trained every plan on its own (search.strategy separate): take one of its trials, or search with "
                f"`--set search.strategy=nested`, whose one run serves every budget."
            )
        if trial is None:
            raise UsageError(
                f"The nested run of {space.name!r} is not over: `ranksearch resume {space.name}` continues it."
            )
        self._space, self._folder, self._key = space, folder, latency_key
        self._weights = trial_folder(folder, trial) / NESTED
        self._opened: tuple[Workbench, State] | None = None

    def _open(self) -> tuple[Workbench, State]:
        """The workbench of the run's weights, and the dense net's."""
        if self._opened is None:
            table = open_table(self._space, self._folder, self._key)
            bench = prepare(
                self._space, fallback=self._folder, log=lambda text: None, known=CurveCache(self._folder / CURVES),
                saved_dense=self._folder / DENSE_WEIGHTS, table=table,
            )  # fmt: skip
            trained = with_weights(self._space, bench, read_weights(self._weights), lambda text: None)
            self._opened = trained, bench.dense
        return self._opened

    def __call__(self, budgets: Budgets) -> Cut:
        """The net within all of `budgets`.

        Raises:
            UsageError: there is no budget, or one that cannot be read or met.
        """
        texts = tuple(assignments(budgets))
        if not texts:
            raise UsageError("No budget was named: give one, such as flops=37%, or several that hold at once.")
        parsed = [parse_budget(*text.partition("=")[::2]) for text in texts]
        bench, dense = self._open()
        plan = allocate_plan(
            bench.curves, parsed, damage=bench.damage, model=model_reference(self._space.task, self._space.model)
        ).plan
        recipe, device = Recipe.settled(self._space.recipe, middle), pick_device()
        task, seed = bench.task.to(device), self._space.search.seed
        calibration = Calibration(task, bench.net, recipe, seed)

        def cut(weights: State) -> nn.Module:
            model = bench.task.dense_model()
            model.load_state_dict(weights)
            small = calibration.decomposed(model.to(device), plan, {})
            generator = torch.Generator(device).manual_seed(seed)
            reestimate_bn_(small, calibration_batches(task.train, recipe.bn_batches, recipe.batch_size, generator))
            return small

        shares = shares_tried(mix=self._space.search.nested.mix)
        net, score, run_share = best_cut(
            cut, lambda net: evaluate(net, task.val, task), bench.dense, dense, task.direction, shares
        )
        cost, whole = bench.curves.cost(plan), bench.curves.dense
        return Cut(net.cpu().eval(), plan, texts, cost, whole, score.accuracy, score.loss, run_share)
