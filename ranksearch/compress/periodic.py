"""Projection in somebody else's training loop: a hook on the optimizer counts its steps and projects the model every `period` of them.

Whatever calls `optimizer.step()` will do: a loop of one's own, Lightning, Accelerate, the Hugging Face Trainer. What counts is a step of
the optimizer, so accumulated gradients count once and a step that a GradScaler skips not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ranksearch.compress.projection import Projector
from ranksearch.compress.surgery import compress
from ranksearch.errors import UsageError
from ranksearch.lowering.weighting import Weighting
from ranksearch.model.bare import COMPILED, unwrapped
from ranksearch.model.plan import RankPlan
from ranksearch.model.slots import find_slots, settled_, slots_of

PREFIXES = (f"{COMPILED}.", "module.")
"""What names have in front in a wrapped model."""


class PeriodicProjection:
    """What `project_every` returns: projects until `finish`, which ends on a projection. As a context manager it finishes by itself."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, projector: Projector, period: int) -> None:
        self.model, self.replicas = unwrapped(model)
        """The model itself, without DDP and torch.compile around it."""
        projector.plan = _without_prefixes(projector.plan, self.model)
        self.projector, self.period = projector, period
        self.steps = self.projections = 0
        self.removed: dict[str, float] = {}
        """Layer -> share of its ||W||² that the last projection removed."""
        self._projected_at = -1
        self._hook = _bare(optimizer).register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler leaves it to fused optimizers to skip a step
        if found_inf is not None and float(found_inf) > 0:
            return
        self.steps += 1
        if self.steps % self.period == 0:
            self._project()

    def _project(self) -> None:
        self.removed = self.projector(self.model)
        if self.replicas is not None:  # a replica's own rounding must not set it apart from the others
            for slot, _ in slots_of(self.model, self.projector.plan).values():
                for parameter in slot.parameters:
                    dist.broadcast(parameter.detach(), group=self.replicas, group_src=0)
        self.projections, self._projected_at = self.projections + 1, self.steps

    def finish(self) -> dict[str, float]:
        """Projects once more, where the last step was not followed by a projection, and lets the optimizer go.

        Returns:
            Layer -> share of its ||W||² that the last projection removed.

        Raises:
            NonFiniteError: weights that are not finite; the text names the layer.
        """
        self.remove()
        if self._projected_at != self.steps:
            self._project()
        return self.removed

    def remove(self) -> None:
        """Lets the optimizer go without a projection."""
        self._hook.remove()

    def compress(self) -> nn.Module:
        """The decomposed net of the model as it is: after `finish` it computes what the model does."""
        return compress(self.model, self.projector.plan, warm=self.projector.warm)

    def state_dict(self) -> dict[str, Any]:
        """Steps so far and the projections' bases, for a loop that goes on from a checkpoint."""
        return {"steps": self.steps, "projections": self.projections, "bases": self.projector.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.projections = state["steps"], state["projections"]
        self.projector.load_state_dict(state["bases"])
        self._projected_at = -1

    def __enter__(self) -> PeriodicProjection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes; after an exception it only lets the optimizer go."""
        if kind is None:
            self.finish()
        else:
            self.remove()


def project_every(
    model: nn.Module,
    optimizer: Optimizer,
    plan: RankPlan,
    *,
    period: int,
    energy_transfer: bool = False,
    norms: Mapping[str, str] | None = None,
    weightings: Mapping[str, Weighting] | None = None,
) -> PeriodicProjection:
    """Projects the layers of `plan` after every `period`-th step of `optimizer`, whatever loop makes the steps.

        with ranksearch.project_every(model, optimizer, plan, period=100) as projection:
            train(model, optimizer)
        small = projection.compress()

    Args:
        model: may be wrapped by DistributedDataParallel, DataParallel or torch.compile; the plan's names are those of the model itself.
            Layers of the plan that make their weight by code of their own (standardised ones) become plain ones that compute the same.
        period: optimizer steps between two projections; ten projections or more pay.
        energy_transfer, norms, weightings: as for `Projector`; its `weigh` brings fresher weightings on the way.

    Raises:
        UsageError: a layer that is not there or is sharded, a rank outside its range, a period below 1, or an optimizer of other weights.
    """
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise UsageError(f"project_every: period is a whole number of optimizer steps, 1 or more, got {period!r}.")
    bare = unwrapped(model)[0]
    _check(bare, _bare(optimizer), _without_prefixes(plan, bare))
    settled_(bare, _without_prefixes(plan, bare))
    projector = Projector(plan, energy_transfer=energy_transfer, norms=norms, weightings=weightings)
    return PeriodicProjection(model, optimizer, projector, period)


def _without_prefixes(plan: RankPlan, model: nn.Module) -> RankPlan:
    """The plan with names as `model` has them, where it was made for the wrapped model."""
    slots, layers = find_slots(model), {}
    for name, choice in plan.layers.items():
        bare = name
        while bare not in slots and bare.startswith(PREFIXES):
            bare = bare.partition(".")[2]
        layers[bare if bare in slots else name] = choice
    return RankPlan(layers, plan.model, plan.gap)


def _bare(optimizer: Any) -> Optimizer:
    """The optimizer of torch inside those that Lightning and Accelerate put around it."""
    while not isinstance(getattr(optimizer, "_optimizer_step_post_hooks", None), dict) and hasattr(
        optimizer, "optimizer"
    ):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"project_every: expected a torch.optim.Optimizer, got a {type(optimizer).__name__}.")
    return optimizer


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check(model: nn.Module, optimizer: Optimizer, plan: RankPlan) -> None:
    """Raises UsageError where a weight of the plan is sharded, or is trained by another optimizer."""
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "placements")), None)
    if sharded is not None:
        raise UsageError(
            f"project_every: {sharded!r} is sharded (a DTensor, as FSDP makes them); whole weights are needed, as DDP has them."
        )
    with torch.no_grad():
        held = {_storage(p) for group in optimizer.param_groups for p in group["params"]}
        for name, (slot, _) in slots_of(model, plan).items():
            if slot.weight.requires_grad and _storage(slot.parameters[0]) not in held:
                raise UsageError(
                    f"project_every: the optimizer does not hold the weight of {name!r}: give the one that trains this model, "
                    f"made of this model's parameters and not of a copy's."
                )
