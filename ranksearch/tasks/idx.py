"""Grey images in the idx format of MNIST, Fashion-MNIST, KMNIST and their like: 28 x 28, ten classes, gzipped or not.

The files keep the names that they are published under. Models: a small conv net, and CIFAR ResNets with one input channel.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.data.folder import data_folder
from ranksearch.data.resident import Augment, Normalise, Resident, hold_out
from ranksearch.errors import UsageError, nearest
from ranksearch.tasks.resnet import CifarResNet
from ranksearch.tasks.task import Task, untrained

SIDE, CLASSES = 28, 10
BLOCKS = {"resnet8": 1, "resnet20": 3}
MODELS = ("convnet", *BLOCKS)
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NORMALISE = Normalise(mean=(0.286,), std=(0.353,))
"""Fashion-MNIST's."""
BYTES = 0x08
"""The element type of images and labels: unsigned bytes."""


class ConvNet(nn.Module):
    """Three 3x3 convs with BN (32, 64, 128 channels; pooled before the last two), a hidden layer. Input [N, 1, 28, 28], output [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.hidden, self.linear = nn.Linear(128 * 7 * 7, 128), nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(nn.functional.max_pool2d(x, 2))))
        x = torch.relu(self.bn3(self.conv3(nn.functional.max_pool2d(x, 2))))
        return self.linear(torch.relu(self.hidden(x.flatten(1))))


def build_model(name: str) -> nn.Module:
    if name not in MODELS:
        raise UsageError(f"model: there is no {name!r} for idx. {nearest(name, MODELS)}")
    return ConvNet() if name == "convnet" else CifarResNet(BLOCKS[name], channels=1, classes=CLASSES)


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx file as an array of the shape in its head: two zeros, the type, the number of axes, then their extents.

    Raises:
        UsageError: it is no idx file of bytes, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}. Download it again.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != BYTES:
        raise UsageError(
            f"{path} is no idx file of bytes: it begins with {raw[:4].hex(' ')}, not 00 00 08. Download it again."
        )
    axes = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    if len(raw) != 4 + 4 * axes + prod(shape):
        raise UsageError(
            f"{path} is not whole: its head says {shape}, and {len(raw) - 4 - 4 * axes:,} bytes follow. Download it again."
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _split(folder: Path, names: tuple[str, str]) -> Resident:
    """uint8 images [N, 1, 28, 28] and their labels."""
    found = [next(p for p in (folder / name, folder / f"{name}.gz") if p.is_file()) for name in names]
    images, labels = (read_idx(path) for path in found)
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1] or len(labels) == 0:
        raise UsageError(
            f"{found[0]} holds images {images.shape} and {found[1].name} labels {labels.shape}: expected (N, 28, 28) and (N,)."
        )
    if labels.max() >= CLASSES:
        raise UsageError(f"{found[1]} holds labels up to {labels.max()}: this task has the classes 0 to {CLASSES - 1}.")
    return Resident(torch.tensor(images)[:, None], torch.tensor(labels, dtype=torch.int64), NORMALISE)


def make_task(model: str, *, data: str | None, validation: int, split_seed: int) -> Task:
    """The training images but `validation`, `validation` to choose by, the t10k images to report.

    Raises:
        UsageError: an unknown model, or files that are missing or damaged; the text says what to put where.
    """
    net, folder = untrained(build_model, model), data_folder(data)
    names = [name for pair in FILES.values() for name in pair]
    missing = [name for name in names if not any((folder / f"{name}{end}").is_file() for end in ("", ".gz"))]
    if missing:
        raise UsageError(
            f"The idx files are not in {folder}: {', '.join(missing)} missing. Put Fashion-MNIST's (or MNIST's) there, gzipped or not; "
            f"`data:` in the space or `--set data=DIR` name another folder."
        )
    full = _split(folder, FILES["train"])
    if not 1 <= validation < len(full):
        raise UsageError(f"validation: {validation} is outside 1..{len(full) - 1}.")
    train, val = hold_out(full, validation, split_seed)
    train = replace(train, augment=Augment(pad=2, flip=False))
    return Task(
        name="idx", model_name=model, model=net, trained=False, train=train, val=val, test=_split(folder, FILES["test"])
    )
