"""Images in class folders, `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, as ImageNet comes; nets of torchvision and timm by name.

The usual preparation: training images are cropped at random (8 to 100 % of the area, sides 3:4 to 4:3) to 224 x 224 and mirrored, others
are scaled to a short side of 256 and cropped from the middle; then ImageNet's mean and deviation. PIL and torch alone, no torchvision.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ranksearch.data.folder import data_folder
from ranksearch.data.loaded import LoadedDataset
from ranksearch.data.resident import Normalise
from ranksearch.errors import UsageError
from ranksearch.tasks.nets import build_named, is_named
from ranksearch.tasks.task import Task, untrained

SIZE, SHORT_SIDE, CLASSES = 224, 256, 1000
NORMALISE = Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
AREA, SIDES = (0.08, 1.0), (3 / 4, 4 / 3)


def build_model(name: str) -> nn.Module:
    if not is_named(name):
        raise UsageError(
            f"model: imagefolder takes torchvision:NAME or timm:NAME, such as torchvision:resnet18, got {name!r}. A net of your own goes "
            f"into a task of your own with ranksearch.ImageFolder as its data (docs/own_task.md)."
        )
    return build_named(name, CLASSES)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """(image [3, size, size], class number) of every file; classes are numbered in the order of their names.

    For a net of your own in a task of your own: `Task(model=net, train=ImageFolder(root / "train", training=True), val=…)`.

    Raises:
        UsageError: no class folders, or one without images.
    """

    def __init__(self, root: str | Path, *, training: bool, size: int = SIZE) -> None:
        root, self.size = Path(root), size
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        self.training = training
        self.files: list[tuple[Path, int]] = []
        for number, name in enumerate(self.classes):
            found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in ENDINGS)
            if not found:
                raise UsageError(f"{root / name} holds no image ({', '.join(ENDINGS)}).")
            self.files += [(path, number) for path in found]
        if not self.classes:
            raise UsageError(
                f"{root} holds no class folders with images: put {root}/CLASS/*.jpg there, or name another one by `data:`."
            )

    def __len__(self) -> int:
        return len(self.files)

    def moved(self, place: Callable[[Path], Path]) -> ImageFolder:
        """The same images, each read from `place(its path)`."""
        other = copy.copy(self)
        other.files = [(place(path), number) for path, number in self.files]
        return other

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, number = self.files[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"{path} is no readable image: {error}") from error
        left, top, width, height = random_crop(*image.size) if self.training else middle_crop(*image.size)
        box = (left, top, left + width, top + height)
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box), dtype=np.float32)
        if self.training and torch.rand(()) < 0.5:
            pixels = pixels[:, ::-1]
        mean, std = (np.asarray(values, dtype=np.float32) for values in (NORMALISE.mean, NORMALISE.std))
        pixels = (pixels / np.float32(NORMALISE.scale) - mean) / std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), number


def random_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a random part of an image, within it; the whole image's middle where ten draws do not fit."""
    for _ in range(10):
        area = width * height * float(torch.empty(()).uniform_(*AREA))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(SIDES[0]), math.log(SIDES[1]))))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            return left, top, w, h
    return middle_crop(width, height)


def middle_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, width, height) of the part that 224 x 224 pixels show once the short side is 256."""
    side = min(width, height) * SIZE / SHORT_SIDE
    return (width - side) / 2, (height - side) / 2, side, side


def make_task(model: str, *, data: str | None, validation: int | None, split_seed: int, workers: int) -> Task:
    """Images of the folder `data`: train/ to train on; val/ to choose by and test/, where there is one, to report.

    With `validation`, that many images of train/ are to choose by, and val/ to report.

    Raises:
        UsageError: folders or images are missing, or the net has another number of outputs than there are classes.
    """
    net, root = untrained(build_model, model), data_folder(data)
    train, val = ImageFolder(root / "train", training=True), ImageFolder(root / "val", training=False)
    others = {"val": val.classes}
    if has_test := validation is None and (root / "test").is_dir():
        others["test"] = (test := ImageFolder(root / "test", training=False)).classes
    for name, classes in others.items():
        if classes != train.classes:
            odd = sorted(set(classes) ^ set(train.classes))
            raise UsageError(f"{root}: train/ and {name}/ do not have the same classes: {', '.join(odd[:5])}.")
    outputs = _outputs(net)
    if outputs != len(train.classes):
        named = ":".join(model.split(":")[:2])
        raise UsageError(
            f"model: {model} has {outputs} outputs, and {root / 'train'} has {len(train.classes)} classes: write "
            f"model: {named}:{len(train.classes)}."
        )
    if validation is None:
        reported = LoadedDataset(test, "test", workers) if has_test else None
        splits = LoadedDataset(train, "train", workers), LoadedDataset(val, "val", workers), reported
    else:
        splits = _carved(root, train, validation, split_seed, workers, LoadedDataset(val, "test", workers))
    return Task(
        name="imagefolder", model_name=model, model=net, trained=False, train=splits[0], val=splits[1], test=splits[2],
        example_input=torch.zeros(1, 3, SIZE, SIZE),
    )  # fmt: skip


def _carved(
    root: Path, train: ImageFolder, validation: int, seed: int, workers: int, test: LoadedDataset
) -> tuple[LoadedDataset, LoadedDataset, LoadedDataset]:
    if not validation < len(train):
        raise UsageError(f"validation: {validation} is outside 1..{len(train) - 1}.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = Subset(ImageFolder(root / "train", training=False), sorted(order[:validation]))
    kept = Subset(train, sorted(order[validation:]))
    return LoadedDataset(kept, "train", workers), LoadedDataset(held_out, "val", workers), test


@torch.inference_mode()
def _outputs(net: nn.Module) -> int:
    training = net.training
    found = net.eval()(torch.zeros(1, 3, SIZE, SIZE)).shape[1]
    net.train(training)
    return int(found)
