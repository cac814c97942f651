"""CIFAR-10 from the official python batches, with the CIFAR ResNets and their public checkpoints.

The batches are pickles, so they are read by an unpickler that builds NumPy arrays and nothing else.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ranksearch.data.folder import data_folder
from ranksearch.data.resident import Augment, Normalise, Resident, hold_out
from ranksearch.errors import UsageError, nearest
from ranksearch.tasks.nets import build_named, is_named
from ranksearch.tasks.resnet import CifarResNet
from ranksearch.tasks.task import Task, untrained

BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
CLASSES = 10
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)
NORMALISE = Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""The statistics that the public checkpoints were trained with (ImageNet's), not CIFAR-10's own."""
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # bytes, as Python 3 writes them in the old protocol
}


class _ArraysOnly(pickle.Unpickler):
    """Refuses every global but NumPy's array constructors: a tampered batch cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read(path: Path) -> tuple[np.ndarray, list[int]]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"], dtype=np.uint8), list(batch[b"labels"])
        return images.reshape(-1, 3, 32, 32), labels
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no CIFAR-10 python batch: {error}. Download it again.") from error


def _split(folder: Path, names: tuple[str, ...]) -> Resident:
    images, labels = zip(*(_read(folder / name) for name in names), strict=True)
    merged = np.concatenate(images)
    targets = torch.tensor([x for part in labels for x in part], dtype=torch.int64)
    return Resident(torch.from_numpy(merged), targets, NORMALISE)


def build_model(name: str) -> nn.Module:
    if is_named(name):
        return build_named(name, CLASSES)
    if name not in BLOCKS:
        raise UsageError(
            f"model: there is no {name!r} for cifar10. {nearest(name, BLOCKS)} Or torchvision:NAME, timm:NAME."
        )
    return CifarResNet(BLOCKS[name], channels=3, classes=CLASSES)


def make_task(model: str, *, data: str | None, validation: int, split_seed: int) -> Task:
    """50,000 - `validation` images to train on, `validation` to choose by, the official 10,000 to report.

    Raises:
        UsageError: an unknown model, or batches that are missing or damaged; the text says what to put where.
    """
    net = untrained(build_model, model)
    folder = data_folder(data) / FOLDER
    missing = [name for name in TRAIN_FILES + TEST_FILES if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            f"CIFAR-10 is not in {folder}: {', '.join(missing)} missing. Put the official python batches (the content of "
            f"cifar-10-python.tar.gz) there, or run `python scripts/download_cifar10.py` on a machine with internet; "
            f"RANKSEARCH_DATA, `data:` in the space or `--set data=DIR` name another folder."
        )
    full = _split(folder, TRAIN_FILES)
    if not 1 <= validation <= len(full) - 128:
        raise UsageError(f"validation: {validation} is outside 1..{len(full) - 128}.")
    train, val = hold_out(full, validation, split_seed)
    train = replace(train, augment=Augment(pad=4, flip=True))
    return Task(
        name="cifar10",
        model_name=model,
        model=net,
        trained=False,
        train=train,
        val=val,
        test=_split(folder, TEST_FILES),
    )
