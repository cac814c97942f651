"""Data that come from a torch Dataset or a loader, batch by batch, and what a user may give as a split."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset

from ranksearch.data.parallel import ALONE, Group
from ranksearch.data.resident import Resident
from ranksearch.data.source import Batch, Source, Stream
from ranksearch.data.targets import split_batch
from ranksearch.errors import UsageError
from ranksearch.model.inputs import batch_size, moved, shape_of, tensors

CPU = torch.device("cpu")
RANK_SEEDS = 1_000_003
"""Step from one rank's seed to the next."""
WANTED = (
    "expected a pair (inputs, targets) of tensors, a dict of tensors with `labels`, a Dataset of (input, target) pairs or of such dicts, "
    "or a DataLoader or another iterable of (inputs, targets) batches or of such dicts"
)


def as_source(value: Any, split: str, kept: tuple[str, ...] = ()) -> Source:
    """What a user gave as `split` ("train", "val", "test"), as a source.

    Args:
        kept: targets of a batch dict that the net takes too.

    Raises:
        UsageError: it is none of the forms, it is empty, or its halves differ in length.
    """
    if isinstance(value, Resident | LoadedDataset | Loaded):
        return value
    if isinstance(value, TensorDataset) and len(value.tensors) >= 2:
        value = split_batch(value.tensors, split, kept)
    if isinstance(value, Mapping) and value and tensors(value):
        value = split_batch(value, split, kept)
    if _is_pair(value):
        inputs, targets = value
        return _resident(inputs, targets, split)
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        return LoadedDataset(value, split, kept=kept)
    if isinstance(value, IterableDataset):
        raise UsageError(
            f"Task: {split} is a {type(value).__name__}: wrap it in a DataLoader, which makes its batches."
        )
    if isinstance(value, Iterator):
        raise UsageError(f"Task: {split} is a {type(value).__name__}, which ends after one pass: {WANTED}.")
    if not isinstance(value, Iterable) or isinstance(value, Tensor | str | dict):
        raise UsageError(f"Task: {split} is a {type(value).__name__}: {WANTED}.")
    return Loaded(value, split, kept=kept)


def _is_pair(value: Any) -> bool:
    """Whether it is (inputs, targets) of a whole split: the inputs a tensor, or a dict or tuple of tensors."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not isinstance(value[1], Tensor | Mapping | None):
        return False
    inputs, targets = value
    if isinstance(inputs, Tensor):
        return isinstance(targets, Tensor)
    if isinstance(inputs, Mapping):
        return isinstance(value, tuple)  # two dicts in a list are two batches
    return isinstance(targets, Tensor) and isinstance(inputs, tuple | list) and bool(tensors(inputs))


def _resident(inputs: Any, targets: Any, split: str) -> Resident:
    lengths = {tuple(x.shape[:1]) for x in tensors((inputs, targets))}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise UsageError(
            f"Task: {split} holds inputs {shape_of(inputs)} and targets {shape_of(targets)}: expected as many of one as of "
            f"the other, and at least one."
        )
    return Resident(inputs, targets)


@dataclass(frozen=True)
class Loaded:
    """A source of the batches of a user's loader, as they come; a trial that goes on after an interruption begins a new epoch."""

    loader: Any
    split: str
    device: torch.device = CPU
    kept: tuple[str, ...] = ()
    """Targets of a batch dict that the net takes too."""

    def __len__(self) -> int:
        dataset = getattr(self.loader, "dataset", None)
        if dataset is not None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            return len(dataset)
        if not hasattr(self, "_count"):  # one pass, once
            object.__setattr__(self, "_count", sum(batch_size(inputs) for inputs, _ in self.in_order(1)))
        return self._count  # type: ignore[attr-defined,no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Without worker processes, which cannot be sent."""
        state = dict(self.__dict__)
        if isinstance(self.loader, DataLoader):
            state["loader"] = copy.copy(self.loader)
            state["loader"]._iterator = None
        return state

    def to(self, device: torch.device) -> Loaded:
        return replace(self, device=device)

    def first(self, count: int) -> Loaded:
        """The first batches, until they hold `count` samples."""
        kept: list[Batch] = []
        for batch in self.in_order(1):
            kept.append(batch)
            if sum(batch_size(inputs) for inputs, _ in kept) >= count:
                break
        return Loaded(kept, self.split, self.device)

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """The loader's batches, in its own size; UsageError where there are none."""
        empty = True
        for found in self.loader:
            empty = False
            yield moved(split_batch(found, self.split, self.kept), self.device)
        if empty:
            raise UsageError(f"Task: {self.split} gives no batch.")

    def stream(self, batch_size: int, generator: torch.Generator, group: Group = ALONE) -> Stream:
        return LoaderStream(self, batch_size, group)


class LoaderStream(Iterator[Batch]):
    """A loader's batches, epoch after epoch."""

    def __init__(self, source: Loaded, batch_size: int, group: Group) -> None:
        self._source, self._size, self._group = source, batch_size, group
        self._epoch: Iterator[Batch] = iter(())

    def __next__(self) -> Batch:
        batch = next(self._epoch, None)
        if batch is None:
            self._epoch = self._source.in_order(self._size)
            batch = next(self._epoch)
        return self._group.shard(batch)  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class LoadedDataset:
    """A source of a Dataset's (input, target) pairs, collated as torch does it, by `workers` processes where there are any."""

    dataset: Any
    split: str
    workers: int = 0
    device: torch.device = CPU
    kept: tuple[str, ...] = ()
    """Targets of a sample that is a dict, which the net takes too."""

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise UsageError(f"Task: {self.split} is an empty {type(self.dataset).__name__}.")

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device) -> LoadedDataset:
        return replace(self, device=device)

    def first(self, count: int) -> LoadedDataset:
        return replace(self, dataset=Subset(self.dataset, range(min(count, len(self)))))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        return map(self.on_device, DataLoader(self.dataset, batch_size, num_workers=self.workers))

    def stream(self, batch_size: int, generator: torch.Generator, group: Group = ALONE) -> Stream:
        return DatasetStream(self, min(batch_size, len(self)), generator, group)

    def on_device(self, found: Any) -> Batch:
        return moved(split_batch(found, self.split, self.kept), self.device)  # type: ignore[no-any-return]


class _Order(Sampler[int]):
    """A rank's part of every batch of an epoch, whose order is decided by seed and number alone; `skip` samples are left out."""

    def __init__(self, count: int, batch_size: int, group: Group) -> None:
        self._count, self.seed, self.epoch, self.skip = count, 0, 0, 0
        self._batch_size, self._group = batch_size, group

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self._count, generator=generator)[self.skip :]
        whole = len(order) // self._batch_size * self._batch_size
        for batch in order[:whole].split(self._batch_size):
            yield from self._group.shard(batch).tolist()

    def __len__(self) -> int:
        return (self._count - self.skip) // self._group.world


class DatasetStream(Iterator[Batch]):
    """Endless shuffled batches of a Dataset; taken up again from its state, it goes on in the same order."""

    def __init__(self, source: LoadedDataset, batch_size: int, generator: torch.Generator, group: Group) -> None:
        self._source, self._size, self._group = source, batch_size, group
        self._order = _Order(len(source), batch_size, group)
        self._order.seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        self._randomness = torch.Generator()
        self._loader = DataLoader(
            source.dataset, max(1, batch_size // group.world), sampler=self._order, drop_last=True, num_workers=source.workers,
            generator=self._randomness, persistent_workers=source.workers > 0, pin_memory=source.device.type == "cuda",
        )  # fmt: skip
        self._epoch: Iterator[Any] | None = None
        self._taken = 0

    def __next__(self) -> Batch:
        epoch = self._begin() if self._epoch is None else self._epoch
        found = next(epoch, None)
        if found is None:
            self._order.epoch, self._order.skip, self._taken = self._order.epoch + 1, 0, 0
            found = next(self._begin())
        self._taken += 1
        return self._source.on_device(found)

    def _begin(self) -> Iterator[Any]:
        seed = self._order.seed + self._order.epoch + RANK_SEEDS * self._group.rank
        self._randomness.manual_seed(seed)  # of the loader's processes, which augment: other crops on other ranks
        self._epoch = iter(self._loader)
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._order.seed, "epoch": self._order.epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.seed, self._order.epoch, self._taken = state["seed"], state["epoch"], state["taken"]
        self._order.skip, self._epoch = self._taken * self._size, None


def batch_text(source: Source, size: int) -> str:
    """In words, how large training batches are where `size` is asked for: a loader of the user's keeps its own size."""
    if not isinstance(source, Loaded):
        return str(min(size, len(source)))
    own = getattr(source.loader, "batch_size", None) or getattr(
        getattr(source.loader, "batch_sampler", None), "batch_size", None
    )
    if own is None and isinstance(source.loader, Sequence) and source.loader:
        own = batch_size(split_batch(source.loader[0], source.split, source.kept)[0])
    return f"{own}, as the task's loader makes them" if isinstance(own, int) else "the loader's own size"


def loader_processes(task: Any) -> int:
    """Processes that read and prepare a task's training batches while it trains, beside the one that trains."""
    source = task.train
    return (
        source.workers
        if isinstance(source, LoadedDataset)
        else getattr(getattr(source, "loader", None), "num_workers", 0)
    )
