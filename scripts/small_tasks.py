"""Seven small tasks that are unlike each other, each trained within seconds on a CPU core: what `bench_tasks.py` searches on.

A task is a function of `width`, by which its net's channels are multiplied: 1 is the dense net, less a narrower one of the same kind. Data
are drawn from fixed seeds, or are scikit-learn's own. Test splits are read once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits, make_classification
from sklearn.metrics import average_precision_score, balanced_accuracy_score, root_mean_squared_error
from torch import Tensor, nn

import ranksearch

Split = tuple[Tensor, Tensor]


def channels(base: int, width: float) -> int:
    """`base` channels at a width, at least two."""
    return max(2, round(base * width))


def task(net: nn.Module, data: tuple[Split, Split, Split], **options: object) -> ranksearch.Task:
    """A task of a net that is to be trained, and its three splits."""
    train, val, test = data
    return ranksearch.Task(model=net, train=train, val=val, test=test, trained=False, **options)  # type: ignore[arg-type]


def split(inputs: Tensor, targets: Tensor, val: int, test: int) -> tuple[Split, Split, Split]:
    """(train, validation, test) in the data's order."""
    cuts = [slice(val + test, None), slice(0, val), slice(val, val + test)]
    return tuple((inputs[cut].contiguous(), targets[cut].contiguous()) for cut in cuts)  # type: ignore[return-value]


def conv(dims: int, taken: int, given: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A conv of `dims` axes with BN and ReLU."""
    made, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dims - 1]
    return nn.Sequential(
        made(taken, given, kernel, stride=stride, padding=kernel // 2, bias=False), norm(given), nn.ReLU()
    )


# Keyword spotting ----------------------------------------------------------------------------------------------------


def balanced(outputs: Tensor, targets: Tensor) -> float:
    """Balanced accuracy in percent: every class counts alike."""
    return 100 * float(balanced_accuracy_score(targets.numpy(), outputs.argmax(1).numpy()))


@lru_cache
def _words() -> tuple[Split, Split, Split]:
    """Two tones that glide after each other, in noise: twelve words, the last six rare."""
    rng = np.random.default_rng(1)
    shares = np.array([6.0] * 6 + [1.0] * 6)
    labels = rng.choice(12, size=5200, p=shares / shares.sum())
    time = np.arange(640) / 640
    first, second = 20 + 12 * (np.arange(12) % 4), 24 + 14 * (np.arange(12) // 4)
    glide = rng.uniform(0.9, 1.1, (5200, 1)) * (1 + 0.3 * np.where(np.arange(12) % 2, 1, -1)[labels][:, None] * time)
    meet = rng.uniform(0.35, 0.65, (5200, 1))
    tones = [np.sin(2 * np.pi * (f[labels][:, None] * glide * time + rng.random((5200, 1)))) for f in (first, second)]
    sound = np.where(time < meet, tones[0], tones[1]) * rng.uniform(0.5, 1.5, (5200, 1))
    sound = sound + 0.9 * rng.standard_normal(sound.shape)
    return split(torch.tensor(sound, dtype=torch.float32)[:, None], torch.tensor(labels), 1000, 2000)


def keywords(width: float = 1.0) -> ranksearch.Task:
    """Keyword spotting in 1-D with unequal classes; balanced accuracy."""
    a, b = channels(24, width), channels(48, width)
    net = nn.Sequential(
        conv(1, 1, a, 33, 4), conv(1, a, b, 9, 4), conv(1, b, b, 5, 2), conv(1, b, b, 5, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(b, 12),
    )  # fmt: skip
    return task(net, _words(), metric=balanced, metric_name="balanced accuracy", unit="%")


# Segmentation --------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two levels down and up."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a, b, c = (channels(base, width) for base in (10, 20, 32))
        self.down1, self.down2, self.middle = conv(2, 1, a, 3), conv(2, a, b, 3), conv(2, b, c, 3)
        self.up2, self.up1 = conv(2, c + b, b, 3), conv(2, b + a, a, 3)
        self.head = nn.Conv2d(a, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = self.middle(F.max_pool2d(two, 2))
        two = self.up2(torch.cat([F.interpolate(low, scale_factor=2), two], 1))
        return self.head(self.up1(torch.cat([F.interpolate(two, scale_factor=2), one], 1)))


def dice(outputs: Tensor, targets: Tensor) -> float:
    """Dice of the drawn pixels, in percent."""
    found = outputs > 0
    return 200 * float((found & (targets > 0.5)).sum()) / max(1.0, float(found.sum() + targets.sum()))


@lru_cache
def _shapes() -> tuple[Split, Split, Split]:
    """Discs to be found among rings and squares, in noise, 16 x 16."""
    rng, size, count = np.random.default_rng(2), 16, 1650
    y, x = np.mgrid[:size, :size]
    images, masks = rng.normal(0, 0.4, (count, size, size)), np.zeros((count, size, size))
    for image, mask in zip(images, masks, strict=True):
        for kind in rng.integers(0, 3, size=2):
            cy, cx, radius = *rng.uniform(4, size - 4, 2), rng.uniform(2, 4)
            away = np.hypot(y - cy, x - cx)
            if kind == 0:
                image[away < radius] += 1
                mask[away < radius] = 1
            elif kind == 1:
                image[np.abs(away - radius) < 1] += 1
            else:
                image[(np.abs(y - cy) < radius * 0.8) & (np.abs(x - cx) < radius * 0.8)] += 1
    arrays = (torch.tensor(a, dtype=torch.float32)[:, None] for a in (images, masks))
    return split(*arrays, 250, 400)


def shapes(width: float = 1.0) -> ranksearch.Task:
    """A U-Net that finds drawn discs; Dice."""
    return task(UNet(width), _shapes(), loss=nn.BCEWithLogitsLoss(), metric=dice, unit="%")


# Tokens --------------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Two transformer blocks over tokens -> classes [N, classes, tokens]."""

    def __init__(self, width: float, tokens: int = 40, length: int = 24, classes: int = 6) -> None:
        super().__init__()
        d = 4 * max(1, round(channels(40, width) / 4))
        self.word, self.place = nn.Embedding(tokens, d), nn.Parameter(0.1 * torch.randn(length, d))
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.word(x) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(h).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.rise, self.fall = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)

    def forward(self, h: Tensor) -> Tensor:
        n = self.norm1(h)
        q, k, v = (part(n).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = h + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return h + self.fall(F.gelu(self.rise(self.norm2(h))))


@lru_cache
def _sentences() -> tuple[Split, Split, Split]:
    """A token's class follows from its own kind, the kind before it, and how often its kind has come already."""
    rng = np.random.default_rng(3)
    words = rng.integers(0, 40, size=(3400, 24))
    kind = words % 5
    before = np.concatenate([np.zeros((len(kind), 1), dtype=int), kind[:, :-1]], axis=1)
    often = np.stack([(kind[:, : i + 1] == kind[:, i : i + 1]).sum(1) for i in range(24)], axis=1)
    tags = (kind + 2 * (before > kind) + 3 * (often > 2)) % 6
    return split(torch.tensor(words), torch.tensor(tags), 400, 800)


def tokens(width: float = 1.0) -> ranksearch.Task:
    """Token classification by a small transformer; accuracy."""
    return task(Tagger(width), _sentences())


# Tables --------------------------------------------------------------------------------------------------------------


def mlp(inputs: int, width: float, base: int) -> nn.Sequential:
    w = channels(base, width)
    return nn.Sequential(
        nn.Linear(inputs, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 1)
    )


def rmse(outputs: Tensor, targets: Tensor) -> float:
    """In the units of the disease's progression."""
    return 77.0 * float(root_mean_squared_error(targets.numpy(), outputs.numpy()))


@lru_cache
def _patients() -> tuple[Split, Split, Split]:
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(4).permutation(len(x))
    inputs = torch.tensor(x[order] * 21, dtype=torch.float32)
    return split(inputs, torch.tensor((y[order] - 152) / 77, dtype=torch.float32)[:, None], 90, 120)


def regression(width: float = 1.0) -> ranksearch.Task:
    """Diabetes progression of 442 patients by an MLP; RMSE."""
    return task(
        mlp(10, width, 64), _patients(), loss=nn.MSELoss(), metric=rmse, metric_name="RMSE", direction="minimize"
    )


def precision(outputs: Tensor, targets: Tensor) -> float:
    """Average precision in percent."""
    return 100 * float(average_precision_score(targets.numpy().ravel(), outputs.numpy().ravel()))


@lru_cache
def _rare() -> tuple[Split, Split, Split]:
    x, y = make_classification(
        6000, 24, n_informative=10, n_redundant=6, n_clusters_per_class=6, weights=[0.92], class_sep=1.2, random_state=5
    )
    return split(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None], 1500, 2500)


def binary(width: float = 1.0) -> ranksearch.Task:
    """A rare yes among many no, one logit, class weights in the loss; average precision."""
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([4.0]))
    return task(mlp(24, width, 96), _rare(), loss=loss, metric=precision, metric_name="average precision", unit="%")


# Images --------------------------------------------------------------------------------------------------------------


@lru_cache
def _scenes() -> tuple[Split, Split, Split]:
    """Eight kinds of textured figures in colour, in noise, 16 x 16."""
    rng, size, count = np.random.default_rng(6), 16, 3600
    y, x = np.mgrid[:size, :size]
    labels = rng.integers(0, 8, size=count)
    images = rng.normal(0, 0.5, (count, 3, size, size))
    for image, label in zip(images, labels, strict=True):
        cy, cx, radius = *rng.uniform(5, size - 5, 2), rng.uniform(3, 5)
        away = (np.hypot if label & 1 else np.maximum)(np.abs(y - cy), np.abs(x - cx))
        figure = away < radius if label & 2 else np.abs(away - radius) < 1.2
        stripes = np.sin((x + y if label & 4 else x - y) * 1.3 + rng.uniform(0, 6))
        image += rng.uniform(0.3, 1, (3, 1, 1)) * (figure + 0.5 * stripes * figure)
    return split(torch.tensor(images, dtype=torch.float32), torch.tensor(labels), 600, 1000)


def convnet(inputs: int, width: float, classes: int) -> nn.Sequential:
    a, b, c = (channels(base, width) for base in (12, 24, 40))
    return nn.Sequential(
        conv(2, inputs, a, 3), conv(2, a, a, 3), conv(2, a, b, 3, 2), conv(2, b, b, 3), conv(2, b, c, 3, 2), conv(2, c, c, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes),
    )  # fmt: skip


def vision(width: float = 1.0) -> ranksearch.Task:
    """Small colour images of drawn figures; accuracy."""
    return task(convnet(3, width, 8), _scenes())


@lru_cache
def _digits() -> tuple[Split, Split, Split]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(7).permutation(len(x))
    inputs = torch.tensor(x[order].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    return split(inputs, torch.tensor(y[order]), 300, 500)


def digits(width: float = 1.0) -> ranksearch.Task:
    """scikit-learn's handwritten digits; accuracy."""
    return task(convnet(1, width, 10), _digits())


STEPS = {
    "keywords": (400, 100), "shapes": (400, 100), "tokens": (900, 120), "regression": (100, 40), "binary": (1500, 200),
    "vision": (400, 100), "digits": (300, 60),
}  # fmt: skip
"""Task -> optimizer steps of the dense net, and of a trial."""
TASKS: dict[str, Callable[..., ranksearch.Task]] = {
    made.__name__: made for made in (keywords, shapes, tokens, regression, binary, vision, digits)
}
