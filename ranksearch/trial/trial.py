"""The trial: the method from beginning to end. It knows neither Ray nor MLflow; it takes `report`, a plain function.

The same trial runs in-process and on Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from torch import nn

from ranksearch.compress import Net, RankPlan, plan_cost, save_net
from ranksearch.compress.surgery import compress, restructure_
from ranksearch.data.parallel import ALONE, Group
from ranksearch.deploy.stopwatch import LatencySetting
from ranksearch.errors import NonFiniteError
from ranksearch.places.place import PAUSES, Place, filling
from ranksearch.tasks.task import Task
from ranksearch.training.dense import State
from ranksearch.training.train import Diverged
from ranksearch.trial.candidate import MetricSetting
from ranksearch.trial.checkpoint import CheckpointFile, is_full
from ranksearch.trial.nested import learn_all_levels, save_weights
from ranksearch.trial.projecting import Projecting
from ranksearch.trial.recipe import Recipe
from ranksearch.trial.reporting import Report, Stopped, Watch, unwatched
from ranksearch.trial.result import Status, TrialResult
from ranksearch.trial.session import Session


def learn_low_rank(session: Session, plan: RankPlan) -> nn.Module:
    """The method: from the dense net to the trained low-rank net of `plan`, the best of those that were scored on the way.

    Reference: Lee, Kwon, Kim & Wei 2019, arXiv 1905.10145 (projection training); fine-tuning the factors after it is ours.
    """
    recipe, goes_on = session.recipe, session.resumes_at("factors")  # the factors' weights are in the checkpoint then
    small = restructure_(session.dense_net(), plan) if goes_on else train_and_decompose(session, plan)
    if recipe.dense_steps < recipe.steps:
        _, stats = session.train_("factors", small, range(recipe.dense_steps, recipe.steps), plan)
        session.reestimate_bn_(small)
        session.scores.add("factors", small, recipe.steps, candidate=True, train_loss=stats.loss)
    return session.scores.best_of_trial_(small)


def train_and_decompose(session: Session, plan: RankPlan) -> nn.Module:
    """Trains the dense net under projections, ends on one, so that decomposing changes nothing, and decomposes."""
    recipe, steps = session.recipe, range(session.recipe.dense_steps)
    if not steps:  # decomposed first: the dense net as it is has no score of its own
        small, score, run_share = session.decomposed(plan)
        session.scores.add("decomposed", small, 0, score, candidate=True, run_share=run_share)
        return small
    model = session.starting_net(plan)
    session.score_untrained(model, plan)
    rates = [session.settings.lr_at(step) for step in steps]
    measure = partial(session.weightings, plan)
    projecting = Projecting(
        plan, session.net, recipe.projection, rates, measure, session.metric_refresh, session.starts
    )
    training, stats = session.train_("dense", model, steps, plan, projecting)
    session.reestimate_bn_(model)
    session.scores.add("trained", model, len(steps), train_loss=stats.loss)
    session.project_at_last_(projecting, training)
    session.reestimate_bn_(model)
    found = projecting.summary() | {"projections": projecting.count}
    session.scores.add("projected", model, len(steps), candidate=False, **found)
    # computes the same, so BN's fresh statistics fit
    example, warm = session.task.example_input, projecting.projector.warm
    small = session.group.same_(compress(model, plan, example_input=example, warm=warm))
    session.scores.add("decomposed", small, len(steps), candidate=True)
    return small


def run_trial(
    task: Task,
    dense: State,
    net: Net,
    plan: RankPlan,
    recipe: Recipe,
    *,
    seed: int,
    report: Report,
    save_to: Place | None,
    checkpoint: CheckpointFile,
    rungs: Sequence[float] = (),
    latency: LatencySetting | None = None,
    metric: MetricSetting | None = None,
    group: Group = ALONE,
    watch: Watch = unwatched,
    path: Sequence[RankPlan] = (),
    drawn: int = 1,
    start: State | None = None,
    shares: Sequence[float] = (1.0,),
    last: bool = False,
) -> TrialResult:
    """Runs the method under `plan` and returns its validation score and costs; the compressed net is written to `save_to`.

    `report` is called with the metrics of each phase, and at `rungs` (shares of the steps) with those of a copy that is projected
    there; it may raise `Stopped`. With `latency` the net is timed under that setting, in turn with the dense one. `checkpoint`, which must
    be this trial's own, keeps its state, and the trial goes on from there where it stopped. The state stays once the trial has ended, since
    a result that is lost on the way is found again from it; whoever takes the result removes it. Divergence is a result: a loss or weights
    that are not finite end the trial with status "diverged" and the metrics so far.

    With `metric` the layers are cut in the metric of the data.
    `watch` is called with the number of steps done, after each of them, for whoever shows it.

    With a `path` it is a nested run: all of these plans are trained at once, `drawn` of them at every step, and the dense weights are
    written beside the net. `start` holds weights of such a run to begin with, or their mixture with `dense` at the best of `shares`
    (`mixture.py`); `dense` is still the teacher.

    The net is the best candidate by the validation metric; with `last` it is that of the last step, for measurements whose dense net has
    seen the validation images.

    In a `group` every process runs the trial, each on its part of every batch; rank 0 alone evaluates and writes, and all report alike.
    """
    cost = plan_cost(net, plan)
    status, reason = Status.COMPLETE, None
    measured: tuple[float, float] | tuple[None, None] = (None, None)
    session = Session(
        task,
        dense,
        net,
        recipe,
        seed=seed,
        report=report,
        checkpoint=checkpoint,
        rungs=rungs,
        group=group,
        metric=metric,
        watch=watch,
        drawn=drawn,
        start=start,
        shares=shares,
        last=last,
    )
    try:
        session.scores.report_rungs()
        small, nested = learn_all_levels(session, plan, path) if path else (learn_low_rank(session, plan), None)
    except Stopped as stopped:
        status, reason = Status.STOPPED, str(stopped)
    except (Diverged, NonFiniteError) as error:
        status, reason = Status.DIVERGED, str(error)
    else:
        if save_to is not None:
            group.on_rank_0(lambda: _write_net(small, plan, save_to, nested))
        if latency is not None:
            measured = group.on_rank_0(lambda: session.time(small, latency))
    seconds, kept = session.seconds, session.scores.kept if status is Status.COMPLETE else None
    final = vars(kept) if kept is not None else session.scores.history[-1] if session.scores.history else {}
    return TrialResult(
        status, seed, session.images / len(task.train), reason=reason,
        history=session.scores.history, projections=session.projections, losses=session.losses,
        val_accuracy=final.get("val_accuracy"), val_loss=final.get("val_loss"), kept=kept.facts() if kept is not None else None,
        macs=cost.macs, params=cost.params, size_bytes=cost.size_bytes, latency_ms=measured[0], latency_ratio=measured[1],
        images_per_second=session.images / seconds if session.images else None,
        projection_share=session.projecting_seconds / seconds if session.images else None,
        seconds=session.elapsed, eager=session.eager,
    )  # fmt: skip


def _write_net(model: nn.Module, plan: RankPlan, save_to: Place, nested: nn.Module | None) -> None:
    """Writes what the trial leaves; a disk that is full is tried again for most of a minute, since the training took longer."""
    for pause in (*PAUSES, None):
        try:
            with filling(save_to) as folder:
                if nested is not None:
                    save_weights(nested, folder)
                save_net(model, plan, folder)
            return
        except Exception as error:
            if pause is None or not is_full(error):
                raise
            time.sleep(pause)
