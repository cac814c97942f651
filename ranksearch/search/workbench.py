"""`Workbench`: what a study needs before its first trial: the task, the dense net, its layers, their rank curves and what they predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ranksearch.allocate import MEASURES, CurveCache, Curves, Damage, rank_curves, weigh_several
from ranksearch.allocate.curve_making import cost_curves
from ranksearch.allocate.latency import timed
from ranksearch.allocate.sensitivity import BALANCED
from ranksearch.calibration.weightings import WEIGHTS
from ranksearch.compress import Net, trace
from ranksearch.data.loaded import batch_text
from ranksearch.deploy.latency_table import LatencyTable
from ranksearch.errors import RanksearchError, UsageError, first_line
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.inputs import shape_of
from ranksearch.search.budgets import check_feasible_space
from ranksearch.search.predicting import Prediction, settle, usual
from ranksearch.space.recipe import RecipeSpace
from ranksearch.space.search import AUTO, RULES
from ranksearch.space.settings import numbers_of
from ranksearch.space.space import Space
from ranksearch.tasks import Task
from ranksearch.tasks.task_file import told_of_user_code
from ranksearch.training.dense import State, dense_state, read_checkpoint
from ranksearch.training.device import pick_device
from ranksearch.trial.calibration import metric_of, paired_batches
from ranksearch.words import Log

LABELS = 7919
"""Added to the seed for the labels that are drawn."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """Everything the driver asks with; workers get the task (without its test set), the dense weights and the net."""

    task: Task
    dense: State
    net: Net
    curves: Curves
    damage: Damage
    """What every option is predicted to cost."""
    rivals: Mapping[str, Damage] = field(default_factory=dict)
    """The same by the other sensitivities that compete, by name."""
    weightings: Mapping[str, Weighting] = field(default_factory=dict)
    """Layer -> the metric in which it is cut in the dense net; empty where that is the weights' own."""
    prediction: Prediction | None = None
    """What was settled by untrained scores, where the space left it open."""

    def settled(self, space: Space) -> Space:
        """The space with everything settled that plans are predicted by."""
        asked = space.search.sensitivity == AUTO and self.prediction is not None
        space = trained_alike(space, self.task)
        return self.prediction.settled(space) if asked else usual(space)  # type: ignore[union-attr]

    def dense_model(self) -> torch.nn.Module:
        """The dense net with its trained weights."""
        model = self.task.dense_model()
        model.load_state_dict(self.dense)
        return model.eval()

    def layer_facts(self) -> list[dict[str, Any]]:
        """The layers that may be lowered, in the net's order: name and the largest rank that is of use, by lowering."""
        return [
            {"name": o.layer.name, "largest_rank": {n: o.choices[o.ladder(n)[-1]].rank for n in o.lowerings}}
            for o in self.curves.layers
            if len(o.choices) > 1
        ]


def trained_alike(space: Space, task: Task) -> Space:
    """The space with the optimizer, learning rate and weight decay that the task's dense net was trained with, where its recipe names
    neither optimizer nor learning rate."""
    named = space.recipe.model_fields_set
    if not task.trained_with or {"optimizer", "lr"} & named:
        return space
    taken = {name: value for name, value in task.trained_with.items() if name not in named}
    return space.model_copy(update={"recipe": space.recipe.model_copy(update=taken)})


def with_latency(curves: Curves, model: torch.nn.Module, example: Any, table: LatencyTable | None, log: Log) -> Curves:
    """`curves` with the latencies of `table`, which is filled where it has to be; as they are without one."""
    return curves if table is None else timed(curves, model, example, table, log)


def open_net(space: Space) -> tuple[torch.nn.Module, Net]:
    """The untrained dense model of a space and its layers, the layer rules checked; needs no data.

    Raises:
        UsageError: an unknown task or model, or a layer rule that matches nothing.
    """
    kind = space.kind()
    if kind.own is not None:
        check_recipe(space.recipe, kind.own.make())
    model = kind.build_model(space.model or "")
    try:
        net = trace(model, kind.example_input)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        if isinstance(error, RanksearchError):
            raise
        raise UsageError(
            f"model: {space.model} does not take inputs {shape_of(kind.example_input)}: {first_line(error)}"
        ) from error
    space.layers.as_rules().check(net)
    return model, net


@told_of_user_code()
def prepare(
    space: Space,
    *,
    fallback: Path,
    log: Log,
    known: CurveCache | None = None,
    saved_dense: Path | None = None,
    table: LatencyTable | None = None,
) -> Workbench:
    """Loads the task, finds or trains the dense net (or reads `saved_dense`), traces it, computes its rank curves and weighs them.

    Args:
        fallback: folder for a newly trained dense net where the data folder cannot be written.
        known: curves of an earlier preview or of the interrupted study; new ones are added, the caller saves them.
        table: of a space with latency; what it lacks is measured first.

    Raises:
        UsageError: data or checkpoint missing, a layer rule that matches nothing, budgets that cannot be met.
    """
    model, net = open_net(space)
    rules, kind = space.layers.as_rules(), space.kind()
    example = kind.example_input
    if saved_dense is None:
        # costs depend on shapes alone: budgets that cannot be met fail here, before anything is loaded or trained
        check_feasible_space(space, with_latency(cost_curves(net, rules), model, example, table, log))
    workers = {"workers": space.resources.data_workers} if kind.reads_files else {}
    task = kind.make_task(
        space.model, data=space.data, validation=space.validation, split_seed=space.split_seed, **workers
    )
    if saved_dense is not None:
        dense = read_checkpoint(saved_dense)
    else:
        dense = dense_state(task, checkpoint=space.checkpoint, data=space.data, fallback=fallback, log=log)
    model.load_state_dict(dense)
    if saved_dense is None and (alike := trained_alike(space, task)) is not space:
        log(
            f"recipe: {alike.recipe.optimizer} at learning rate {alike.recipe.lr:g}, as the task's dense net was trained"
        )
    weightings = _weightings(space, task, model, net, log)
    found = rank_curves(model, net, rules, known, weightings, pick_device())
    curves = with_latency(found, model, example, table, log)
    damage, rivals, prediction = predicted_damage(space, task, model, curves, weightings, log)
    return Workbench(task, dense, net, curves, damage, rivals, weightings, prediction)


def predicted_damage(
    space: Space, task: Task, model: torch.nn.Module, curves: Curves, weightings: Mapping[str, Weighting], log: Log
) -> tuple[Damage, Mapping[str, Damage], Prediction | None]:
    """(the damage that plans are made by, that of rival sensitivities, what was settled)."""
    known: dict[str, Damage] = {}

    def weigh_by(names: Sequence[str]) -> Mapping[str, Damage]:
        if new := [name for name in dict.fromkeys(names) if name not in known]:
            known.update(_damages(usual(space), new, task, model, curves, weightings, log))
        return known

    prediction, open_ = None, space.search.sensitivity == AUTO
    if open_ and space.search.parametrization == "allocated" and any(len(o.choices) > 1 for o in curves.layers):
        prediction = settle(space, task, model, curves, weigh_by, log, weightings)
    settled = prediction.settled(space) if prediction is not None else usual(space)
    measure = MEASURES[settled.search.measure]
    names = list(
        dict.fromkeys([settled.search.sensitivity, *(n for n in settled.search.predictions or () if n not in RULES)])
    )
    weighed = weigh_by(names)
    found = {n: Damage(measure, weighed[n].shares, weighed[n].scales) for n in names}
    return found[settled.search.sensitivity], found if settled.search.predictions else {}, prediction


def _damages(
    space: Space, names: Sequence[str], task: Task, model: torch.nn.Module, curves: Curves,
    weightings: Mapping[str, Weighting], log: Log,
) -> dict[str, Damage]:  # fmt: skip
    """What sensitivities predict, from augmented training inputs, always the same ones; what shares a loss shares the pass over them."""
    found: dict[str, Damage] = {}
    for balanced in (False, True):
        together = [name for name in names if (name == BALANCED) is balanced]
        if together:
            found |= _weighed(space, together, task, model, curves, weightings, log)
    return found


def _weighed(
    space: Space, names: Sequence[str], task: Task, model: torch.nn.Module, curves: Curves,
    weightings: Mapping[str, Weighting], log: Log,
) -> dict[str, Damage]:  # fmt: skip
    """What sensitivities of one loss predict; each as it would be found alone."""
    count, size, seed = space.search.calibration_batches, space.recipe.batch_size, space.search.seed
    if told := [name for name in names if name != "none"]:
        text = f"sensitivity {' and '.join(told)} of {len(curves.layers)} layers"
        log(f"{text} on {count} batches of {batch_text(task.train, size)}")
    device = pick_device()
    # labels have a generator of their own: which positions are drawn does not depend on what else is measured
    labels = torch.Generator().manual_seed(seed + LABELS)
    paired = paired_batches(task.to(device), count, size, seed, device, labels, balanced=BALANCED in names)
    return weigh_several(
        curves, model.to(device).eval(), paired, names, MEASURES[space.search.measure],
        seed=seed, generator=torch.Generator().manual_seed(seed), loss=paired.loss,
        weightings=weightings,
    )  # fmt: skip


def _weightings(space: Space, task: Task, model: torch.nn.Module, net: Net, log: Log) -> dict[str, Weighting]:
    """The metric that the space asks for, of the dense net's layers that may be lowered."""
    metric, search = space.layers.metric, space.search
    if metric == WEIGHTS:
        return {}
    rules, device = space.layers.as_rules(), pick_device()
    layers = tuple(layer for layer in net.layers if rules.for_layer(layer.name).lowerings)
    log(f"metric {metric} of the layers on {search.calibration_batches} batches")
    found = metric_of(
        task.to(device), model.to(device).eval(), replace(net, layers=layers), metric,
        count=search.calibration_batches, batch_size=space.recipe.batch_size, seed=search.seed, device=device,
    )  # fmt: skip
    model.cpu()
    return found


def check_recipe(recipe: RecipeSpace, task: Task) -> None:
    """Raises UsageError where a setting of the recipe means nothing under the task's loss."""
    if max(numbers_of(recipe.label_smoothing)) > 0 and not task.cross_entropy:
        raise UsageError(
            "recipe.label_smoothing goes with the default loss, cross-entropy: smooth in your own loss, and leave it 0 here."
        )
    if max(numbers_of(recipe.distillation.weight)) > 0 and not (task.classifies or task.nets_loss):
        raise UsageError(
            "recipe.distillation compares softened class probabilities, which the outputs of a task with a loss of its own need not be: "
            "leave recipe.distillation.weight at 0."
        )
