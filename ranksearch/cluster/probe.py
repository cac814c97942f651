"""`resources.gpus_per_trial: auto`: measures, before the first trial, what one takes of a GPU and how many at once pay off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ranksearch.allocate import Curves
from ranksearch.cluster import pace
from ranksearch.cluster.packing import GIB, MARGIN, Machine, per_gpu, share_of
from ranksearch.cluster.shared import Shared, take
from ranksearch.compress import Net, RankPlan
from ranksearch.errors import StudyError
from ranksearch.search.workbench import Workbench
from ranksearch.space.recipe import RecipeSpace
from ranksearch.space.settings import numbers_of, values_of
from ranksearch.space.space import Space
from ranksearch.study.study import Study
from ranksearch.tasks.task import Task
from ranksearch.training.dense import State
from ranksearch.training.device import DeviceMemory, device_memory
from ranksearch.trial.checkpoint import CheckpointFile
from ranksearch.trial.recipe import Recipe, middle
from ranksearch.trial.trial import run_trial
from ranksearch.words import Log

FindMemory = Callable[[], DeviceMemory | None]
STEPS, BN_BATCHES, IMAGES = 8, 2, 1000
SLIVER = 0.01
"""The share of a GPU that a query of its size takes."""


@dataclass(frozen=True)
class Probed:
    """What a short trial took of a device, in bytes."""

    device: str
    peak: int


def probe_recipe(space: RecipeSpace) -> Recipe:
    """A recipe of a few steps that takes as much memory as the space's hungriest trial: teacher, average and factors if any has them."""
    recipe = Recipe.settled(space, middle)
    optimizer = "adamw" if "adamw" in values_of(space.optimizer) else recipe.optimizer  # it keeps two moments
    return replace(
        recipe, steps=STEPS, optimizer=optimizer, bn_batches=min(BN_BATCHES, recipe.bn_batches),
        factor_share=0.5 if max(numbers_of(space.factor_share)) > 0 else 0.0, ema=max(numbers_of(space.ema)),
        projection=replace(recipe.projection, period=2, start=0.0, until_end=1.0),
        distillation=replace(recipe.distillation, weight=max(numbers_of(space.distillation.weight))),
    )  # fmt: skip


def probe_plan(curves: Curves) -> RankPlan:
    """A plan with every layer that may be lowered at its largest useful rank: no trial holds more factors beside the dense net."""
    layers = {}
    for options in curves.layers:
        lowered = [name for name in options.lowerings if name != "dense"]
        if lowered and len(options.choices) > 1:
            layers[options.layer.name] = options.choices[options.ladder(lowered[0])[-1]]
    return RankPlan(layers)


def measure(task: Task, dense: State, net: Net, plan: RankPlan, recipe: Recipe, memory: DeviceMemory) -> Probed:
    """Runs a few steps of a real trial: training with its teacher, projections, BN re-estimation, evaluation, decomposition, factors."""
    memory.reset()
    few = replace(task, val=task.val.first(IMAGES))
    run_trial(
        few, dense, net, plan, recipe, seed=0, report=lambda entry: None, save_to=None, checkpoint=CheckpointFile(None, 1e9)
    )  # fmt: skip
    return Probed(memory.kind, memory.peak())


def _probe(shared: Shared, plan: RankPlan, recipe: Recipe, find: FindMemory) -> Probed:
    memory = find()
    if memory is None:
        raise RuntimeError("the worker has a GPU of Ray's, but its PyTorch sees none: is it a CPU-only build?")
    work, _ = take(shared)
    return measure(work.task, work.dense, work.net, plan, recipe, memory)


def _size(find: FindMemory) -> tuple[str, int]:
    memory = find()
    return (memory.kind, memory.total) if memory is not None else ("", 0)


def gpu_sizes(nodes: Sequence[dict[str, Any]], find: FindMemory) -> list[tuple[str, int]]:
    """(name, bytes) of one GPU per node that has any; a node's GPUs are taken to be alike."""
    look = ray.remote(num_cpus=0, num_gpus=SLIVER)(_size)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(find)
        for node in nodes
        if node["Resources"].get("GPU", 0) > 0
    ]
    return [found for found in ray.get(asked) if found[1] > 0]


def auto_share(
    study: Study, bench: Workbench, shared: Shared, nodes: Sequence[dict[str, Any]], log: Log, find: FindMemory = device_memory,
    pipes: str | None = None,
) -> float:  # fmt: skip
    """The part of a GPU that `auto` gives to a trial, measured now or, on such a device, by an earlier run of the study.

    A GPU gets as many trials as fit by memory, or fewer if more are no faster together.

    Args:
        pipes: where the measured processes look for MPS.

    Raises:
        StudyError: the probe failed, as every trial would.
    """
    machines = [Machine.of(node["Resources"]) for node in nodes]
    with_gpus = [machine for machine in machines if machine.gpus > 0]
    if not with_gpus:
        log("resources.gpus_per_trial: auto: the cluster has no GPU, trials run on its CPUs")
        return 0.0
    sizes = gpu_sizes(nodes, find)
    known = study.info.get("gpu_probe")
    if known is None or known["device"] not in [kind for kind, _ in sizes]:
        known = _measured(study, bench.curves, shared, study.space, find)
    count = per_gpu(
        known["peak_bytes"], [size for _, size in sizes], cpus=study.space.resources.cpus_per_trial,
        cpus_per_gpu=min(machine.cpus / machine.gpus for machine in with_gpus),
    )  # fmt: skip
    log(_told(known, sizes, count))
    if count > 1:
        count = _as_useful(study, bench.curves, shared, count, known, log, pipes)
    return share_of(count)


def _as_useful(
    study: Study, curves: Curves, shared: Shared, most: int, known: dict[str, Any], log: Log, pipes: str | None
) -> int:
    """How many trials one GPU gets: as many, up to `most`, as are faster together; `most` if that cannot be measured."""
    rates = pace.read(known)
    plan, recipe = probe_plan(curves), Recipe.settled(study.space.recipe, middle)

    def rate_of(count: int) -> float:
        if count not in rates:
            try:
                rates[count] = pace.together(count, shared, plan, recipe, pipes, share_of(count))
            except StudyError as error:
                if count == 1:
                    raise
                log(f"resources.gpus_per_trial: auto: {error}")
                rates[count] = 0.0
        return rates[count]

    try:
        count, measured = pace.useful(most, rate_of)
    except StudyError as error:
        log(f"resources.gpus_per_trial: auto: how fast trials are together was not measured ({error})")
        return most
    study.note_probe(known | {"rates": {str(number): rate for number, rate in rates.items()}})
    log(f"resources.gpus_per_trial: auto: {count} at once on a GPU ({pace.told(measured)})")
    return count


def _measured(study: Study, curves: Curves, shared: Shared, space: Space, find: FindMemory) -> dict[str, Any]:
    probe = ray.remote(num_cpus=space.resources.cpus_per_trial, num_gpus=1, max_retries=1)(_probe)
    try:
        found = ray.get(probe.remote(shared, probe_plan(curves), probe_recipe(space.recipe), find))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        last = str(cause).strip().splitlines()[-1:] or [type(cause).__name__]
        raise StudyError(
            f"resources.gpus_per_trial: auto: a trial of a few steps failed on a GPU ({type(cause).__name__}: {last[0]}); give a number "
            f"of your own, or take a smaller batch (recipe.batch_size, or the task's own loader)."
        ) from error
    known = {"device": found.device, "peak_bytes": found.peak}
    study.note_probe(known)
    return known


def _told(known: dict[str, Any], sizes: Sequence[tuple[str, int]], count: int) -> str:
    peak, (kind, smallest) = known["peak_bytes"], min(sizes, key=lambda found: found[1])
    text = (
        f"resources.gpus_per_trial: auto: a trial takes {peak / GIB:.2f} GiB at its peak ({known['device']}), {100 * MARGIN:.0f} % more "
        f"allowed for: {count} on a GPU of {smallest / GIB:.1f} GiB, {share_of(count):g} each"
    )
    if len({size for _, size in sizes}) > 1:
        text += f"; the cluster's GPUs differ, and the smallest ({kind}) decides for all"
    if peak * (1 + MARGIN) > smallest:
        text += "; that may not fit: a smaller batch (recipe.batch_size, or the task's own loader) needs less"
    return text
