"""Processes that train one net together: each takes its part of every batch, gradients are averaged, rank 0 decides.

`ALONE` is the group of one process, in which all of this does nothing. Nothing here starts processes: whoever does makes the process group
of `torch.distributed`, and gives `Distributed()` to the trial.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ranksearch.errors import RanksearchError, UsageError, first_line
from ranksearch.model.inputs import batch_size, cut

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
SYNCHRONISED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""BN layers that are swapped for synchronised ones; a subclass, which may compute more than BN, stays as it is."""


class PeerLost(RanksearchError):
    """Another process of the group is gone, so that nothing can be computed with it any more: no fault of the trial's own."""


class Group:
    """The group of one process."""

    rank, world = 0, 1

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes its mean over the ranks, the same bits on each."""

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes rank 0's, the same bits on each."""

    def same_(self, model: M) -> M:
        """The model with rank 0's weights and buffers on every rank."""
        self.broadcast_([*model.parameters(), *model.buffers()])
        return model

    def on_rank_0(self, action: Callable[[], T]) -> T:
        """Rank 0 does `action`; what it returns, or raises, comes out on every rank."""
        return action()

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        return [value]

    def agree(self, action: Callable[[], None]) -> None:
        """Every rank does `action`; what it raises on rank 0 is raised on all."""
        action()

    def shard(self, batch: Any) -> Any:
        """This rank's share of a batch: its batched tensors, cut along their first dimension."""
        return batch


ALONE = Group()


class Distributed(Group):
    """The group of `torch.distributed`: gloo on CPUs, NCCL on GPUs.

    Raises:
        PeerLost: from every method, where another process of the group has gone.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """One all-reduce in fp32 over all of them, laid end to end."""
        if not tensors:
            return
        flat = torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])
        with _with_peers():
            dist.all_reduce(flat)
        _lay_back(flat.div_(self.world), tensors)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """One broadcast per type of number; layouts such as channels_last stay as they are."""
        by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_type[tensor.dtype].append(tensor)
        for same in by_type.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
            with _with_peers():
                dist.broadcast(flat, src=0)
            _lay_back(flat, same)

    def on_rank_0(self, action: Callable[[], T]) -> T:
        value, raised = None, None
        if self.rank == 0:
            try:
                value = action()
            except Exception as error:
                raised = error
        sent: list[Any] = [value, _sendable(raised)]
        with _with_peers():
            dist.broadcast_object_list(sent, src=0)
        if raised is not None:
            raise raised
        if sent[1] is not None:
            raise sent[1]
        return sent[0]  # type: ignore[no-any-return]

    def all_gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world
        with _with_peers():
            dist.all_gather_object(found, value)
        return found

    def agree(self, action: Callable[[], None]) -> None:
        raised: list[Exception] = []
        try:
            action()
        except Exception as error:
            raised.append(error)

        def outcome() -> None:
            if raised:
                raise raised[0]

        self.on_rank_0(outcome)

    def shard(self, batch: Any) -> Any:
        count = batch_size(batch)
        size = count // self.world
        if size == 0:
            raise UsageError(
                f"A batch of {count} cannot be split over {self.world} workers: take a larger one (recipe.batch_size, or the task's own "
                f"loader), or fewer resources.workers_per_trial."
            )
        return cut(batch, self.rank * size, (self.rank + 1) * size)


def _lay_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Writes what was laid end to end back where it came from."""
    with torch.no_grad():
        for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
            tensor.copy_(part.view(tensor.shape))


@contextmanager
def _with_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of every backend
        raise PeerLost(f"a worker of the trial is gone: {first_line(error)}") from error


def _sendable(error: Exception | None) -> Exception | None:
    """An exception as other ranks can be told of it."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # an exception's own reduction may raise anything
        return PeerLost(f"rank 0 failed: {type(error).__name__}: {error}")


@contextmanager
def synchronised(model: nn.Module, group: Group) -> Iterator[None]:
    """Within, the BN layers of a model on a GPU take their statistics over the whole batch, as one process would.

    The layers in their place share their parameters and buffers. On a CPU, for which torch has no such layer, a rank's statistics are those
    of its own part; scores do not see them, because BN is re-estimated before each, on the same batches on every rank.
    """
    swapped = []
    if group.world > 1 and next(model.parameters()).is_cuda:
        swapped = swap_bn_(model)
    try:
        yield
    finally:
        for parent, name, norm, synchronous in swapped:
            norm.train(synchronous.training)
            setattr(parent, name, norm)


def swap_bn_(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """Puts synchronised layers in the place of BN layers; (parent, name, the layer as it was, the one in its place)."""
    swapped: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) not in SYNCHRONISED:
                continue
            assert isinstance(norm, _NormBase)
            other = nn.SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
            other._parameters, other._buffers = norm._parameters, norm._buffers
            other.train(norm.training)
            setattr(parent, name, other)
            swapped.append((parent, name, norm, other))
    return swapped
