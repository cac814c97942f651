"""scikit-learn's handwritten digits: 1,797 grey images of 8x8, embedded in the package, nothing to download.

Models are CIFAR ResNets with one input channel. The set has no official split: a fifth is held out as the test set, always the same.
"""

from __future__ import annotations

from importlib.metadata import distribution

import numpy as np
import torch
from torch import Tensor

from ranksearch.data.resident import Augment, Normalise, Resident, hold_out
from ranksearch.errors import UsageError, nearest
from ranksearch.tasks.resnet import CifarResNet
from ranksearch.tasks.task import Task, untrained

BLOCKS = {"resnet8": 1, "resnet14": 2, "resnet20": 3}
TEST_IMAGES, TEST_SEED = 360, 1797
NORMALISE = Normalise(mean=(0.305,), std=(0.376,), scale=16.0)


def build_model(name: str) -> CifarResNet:
    if name not in BLOCKS:
        raise UsageError(f"model: there is no {name!r} for digits. {nearest(name, BLOCKS)}")
    return CifarResNet(BLOCKS[name], channels=1, classes=10)


def make_task(model: str, *, data: str | None, validation: int, split_seed: int) -> Task:
    """1,437 - `validation` images to train on, `validation` to choose by, 360 to report. `data` is not needed."""
    images, targets = _read()
    full = Resident(images, targets, NORMALISE, Augment(pad=1, flip=False))
    rest, test = hold_out(full, TEST_IMAGES, TEST_SEED)
    if not 1 <= validation <= len(rest) - 128:
        raise UsageError(f"validation: {validation} is outside 1..{len(rest) - 128}, what digits can spare.")
    train, val = hold_out(rest, validation, split_seed)
    return Task(
        name="digits",
        model_name=model,
        model=untrained(build_model, model),
        trained=False,
        train=train,
        val=val,
        test=test,
    )


def _read() -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8] of whole numbers 0..16, their digits [1797]), as `sklearn.datasets.load_digits` has them.

    They are read from scikit-learn's file, because importing the library, with pandas and scipy.stats, takes a process another second.
    """
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(path), delimiter=",", dtype=np.uint8))
    return table[:, :64].unflatten(1, (1, 8, 8)).contiguous(), table[:, 64].long()
