"""Data that fit into memory: whole tensors on the device, augmentation and normalisation of whole batches, no Python per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ranksearch.data.batches import Batches
from ranksearch.data.parallel import ALONE, Group
from ranksearch.data.source import Batch
from ranksearch.model.inputs import batch_size as samples_of
from ranksearch.model.inputs import cut, moved, picked, tensors


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[1, C, 1, 1] on the device; made once, because every copy to a GPU would make it wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Normalise:
    """uint8 images [N, C, H, W] -> floats (x / scale - mean) / std, per channel, channels_last."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return ((images.float() / self.scale - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Augment:
    """Random shifts by up to `pad` pixels (zero-filled) and, where `flip`, mirroring, drawn per image; all as one gather."""

    pad: int
    flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, h, w = images.shape

        def draw(high: int) -> Tensor:
            return torch.randint(high, (n, 1), generator=generator, device=images.device)

        rows = draw(2 * self.pad + 1) + torch.arange(h, device=images.device)
        columns = draw(2 * self.pad + 1) + torch.arange(w, device=images.device)
        if self.flip:
            columns = torch.where(draw(2) == 1, columns.flip(1), columns)
        padded = F.pad(images, [self.pad] * 4)
        index = torch.arange(n, device=images.device)[:, None, None]
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Resident:
    """A source of inputs [N, ...] (images of the built-in tasks: uint8 [N, C, H, W]) and targets [N, ...], one per input.

    Both may be tuples or dicts of such tensors, the inputs as the net is called with them.
    """

    inputs: Any
    targets: Any
    normalise: Normalise | None = None
    """Makes of stored inputs what the model takes; None where they are that already."""
    augment: Augment | None = None
    """How training batches are augmented; validation and test batches never are."""

    def __len__(self) -> int:
        return samples_of(self.inputs)

    def to(self, device: torch.device) -> Resident:
        """The same data on `device`."""
        return replace(self, inputs=moved(self.inputs, device), targets=moved(self.targets, device))

    def take(self, index: Tensor) -> Resident:
        return replace(self, **self._halves(lambda half: picked(half, index)))

    def first(self, count: int) -> Resident:
        """The first `count` samples, or all where there are fewer."""
        return replace(self, **self._halves(lambda half: cut(half, 0, count)))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once, not augmented."""
        for start in range(0, len(self), batch_size):
            part = self._halves(lambda half, start=start: cut(half, start, start + batch_size))  # type: ignore[misc]
            yield self._made(part["inputs"]), part["targets"]

    def _halves(self, function: Callable[[Any], Any]) -> dict[str, Any]:
        halves = {"inputs": self.inputs, "targets": self.targets}
        return {name: function(half) if tensors(half) else half for name, half in halves.items()}

    def stream(self, batch_size: int, generator: torch.Generator, group: Group = ALONE) -> ResidentStream:
        """Endless training batches; the generator, on the data's device, draws their order and their augmentation."""
        return ResidentStream(self, batch_size, generator, group)

    def training_batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        part = self._halves(lambda half: picked(half, index))
        inputs = part["inputs"]
        if self.augment is not None:
            inputs = self.augment(inputs, generator)
        return self._made(inputs), part["targets"]

    def _made(self, inputs: Any) -> Any:
        return self.normalise(inputs) if self.normalise is not None else inputs


class ResidentStream(Iterator[Batch]):
    """Endless shuffled, augmented batches of a resident source; taken up again from its state, it goes on as if it had not stopped."""

    def __init__(self, source: Resident, batch_size: int, generator: torch.Generator, group: Group) -> None:
        self._source, self._generator, self._group = source, generator, group
        self._batches = Batches(len(source), batch_size, generator)

    def __next__(self) -> Batch:
        return self.made(self.draw())

    def draw(self) -> Tensor:
        """Index of the next batch [batch_size], on the data's device."""
        return next(self._batches)

    def made(self, index: Tensor) -> Batch:
        """The batch of an index; nothing in it waits for the device."""
        # augmented whole, then cut: every rank draws what a single process would
        return self._group.shard(self._source.training_batch(index, self._generator))  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, object]:
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._batches.load_state_dict(state)


def hold_out(source: Resident, count: int, seed: int) -> tuple[Resident, Resident]:
    """(rest, held out): `count` samples drawn at random, the same for the same seed; what is held out is not augmented."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    held_out = source.take(order[:count].sort().values)
    return source.take(order[count:].sort().values), replace(held_out, augment=None)
