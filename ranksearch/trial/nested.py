"""The nested run: one training of one dense weight under all levels of a path, from which nets of any budget are cut afterwards.

It is a trial like any other: its own net is that of its plan. Beside that net it leaves the trained dense weights (`NESTED`), from which
a plan's net follows by decomposition and BN re-estimation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import nn

from ranksearch.compress import RankPlan, plan_cost
from ranksearch.compress.surgery import compress
from ranksearch.errors import UsageError
from ranksearch.places.files import make_folder, partly_written
from ranksearch.places.place import Place, PlaceError, Remote
from ranksearch.training.dense import State, read_checkpoint
from ranksearch.trial.levels import Levels
from ranksearch.trial.session import Session

NESTED = "nested.safetensors"
"""The trained dense weights, beside the net of the trial that trained them."""
LOOKS = 4
"""How often, the end included, the front is looked at while it trains: the smallest, the middle and the largest level are scored."""


def learn_all_levels(session: Session, plan: RankPlan, path: Sequence[RankPlan]) -> tuple[nn.Module, nn.Module]:
    """(the net of `plan`, the dense net that was trained under every plan of `path`).

    Reference: Cai et al. 2020, arXiv 1908.09791 (Once-for-all: one training, many nets); the projections are those of Lee et al. 2019.
    """
    recipe, model = session.recipe, session.dense_net()
    levels = Levels(model, path, period=recipe.projection.period, drawn=session.drawn, seed=session.seed)
    due = {round(look * recipe.steps / LOOKS) for look in range(1, LOOKS)}
    dense = plan_cost(session.net, RankPlan()).macs

    def look(step: int) -> None:
        for level in sorted({0, len(path) // 2, len(path) - 1}):
            share = plan_cost(session.net, path[level]).macs / dense
            session.look_at(f"level {level + 1} of {len(path)}", model, step, path[level], macs_ratio=share)

    session.train_(
        "nested", model, range(recipe.steps), plan, levels, passes=levels.passes,
        look=lambda training: look(training.done) if training.done in due else None,
    )  # fmt: skip
    look(recipe.steps)
    small = session.group.same_(compress(model, plan))
    session.reestimate_bn_(small)
    session.scores.add("decomposed", small, recipe.steps, candidate=True)
    return small, model


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes the trained dense weights as `NESTED`; never half of them, and on the disk once this returns."""
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    make_folder(folder)
    with partly_written(folder / NESTED) as partial:
        safetensors.torch.save_file(weights, partial)


def read_weights(place: Place) -> State:
    """What `save_weights` wrote.

    Raises:
        PlaceError: it is not there, or cannot be read.
    """
    if isinstance(place, Remote):
        held = place.read()
        if held is None:
            raise PlaceError(f"{place} is not there: the weights of the nested run")
        return safetensors.torch.load(held)
    try:
        return read_checkpoint(place)
    except UsageError as error:
        raise PlaceError(f"the weights of the nested run: {error}") from error
