"""`Task`: what is trained on what. Tensors and functions; no trainer, no wrapper around the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] (uint8) and labels [N] (int64)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> Split:
        return Split(self.images[index], self.labels[index])


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
class Task:
    """A classification task: a model's architecture, data in memory, and how a batch becomes the model's input.

    `build_model(name)` makes an untrained model. `val` is carved from the training set; `test` is None in every trial, so that
    nothing can be chosen on it, and is read once, at the end, for the front.
    """

    name: str
    model: str
    build_model: Callable[[str], nn.Module]
    train: Split
    val: Split
    test: Split | None
    normalise: Normalise
    augment: Augment

    @property
    def example_input(self) -> Tensor:
        """A batch of one, as the model takes it: [1, C, H, W]."""
        return self.normalise(self.train.images[:1])

    def without_test(self) -> Task:
        return replace(self, test=None)

    def to(self, device: torch.device) -> Task:
        """The same task with its data resident on `device`."""
        test = self.test.to(device) if self.test is not None else None
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=test)


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """(rest, held out): `count` images drawn at random, the same for the same seed."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[count:].sort().values), split.take(order[:count].sort().values)
