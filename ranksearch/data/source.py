"""`Source`: where batches come from. Two implementations: `resident.py` (tensors on the device) and `loaded.py` (loaders)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ranksearch.data.parallel import ALONE, Group

Batch = tuple[Any, Any]
"""(inputs as the model takes them, a tensor [N, ...] or arguments as `compress.inputs` says; targets as the loss takes them)."""


class Stream(Protocol):
    """Endless training batches, whose place can be saved and taken up again."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Source(Protocol):
    """A split of a task's data; its batches lie on the device that it was sent to."""

    def __len__(self) -> int:
        """Samples."""

    def to(self, device: torch.device) -> Source:
        """The same source with its batches on `device`."""

    def first(self, count: int) -> Source:
        """About the first `count` samples, at least one batch."""

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once, as it is; batches that a loader of the user's makes keep their size."""

    def stream(self, batch_size: int, generator: torch.Generator, group: Group = ALONE) -> Stream:
        """Training batches of `batch_size` without end; several workers all draw the same ones, and each takes its part."""


def calibration_batches(train: Source, count: int, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
    """`count` batches of training inputs, augmented as in training, as BN re-estimation wants them.

    The statistics must be those that the weights were trained under. Random crops fill with zeros, and without them the dense
    ResNet-20 itself falls from 99.8 to 95.9 % of 2,000 validation images (20 batches of 128, CPU), a plan at half the FLOPs from
    92.8 to 85.5 %.
    """
    stream = train.stream(batch_size, generator)
    return (next(stream)[0] for _ in range(count))
