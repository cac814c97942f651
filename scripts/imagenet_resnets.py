"""The ImageNet ResNets of He et al. 2016 (arXiv 1512.03385) with random weights, for measurements that need their shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A residual block: two 3x3 convs, or where `width` is given a bottleneck of that width."""

    def __init__(self, inputs: int, outputs: int, stride: int, width: int | None = None) -> None:
        super().__init__()
        if width is None:
            convs = [_conv(inputs, outputs, 3, stride), _conv(outputs, outputs, 3)]
        else:
            convs = [_conv(inputs, width, 1), _conv(width, width, 3, stride), _conv(width, outputs, 1)]
        self.convs = nn.ModuleList(convs)
        self.shortcut = _conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv in self.convs[:-1]:
            out = torch.relu(conv(out))
        return torch.relu(self.convs[-1](out) + self.shortcut(x))


def _resnet(counts: tuple[int, ...], expansion: int, *, bottleneck: bool, first: int = 64) -> nn.Module:
    layers: list[nn.Module] = [_conv(3, first, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = first
    for stage, count in enumerate(counts):
        width = first * 2**stage
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            layers.append(Block(inputs, expansion * width, stride, width if bottleneck else None))
            inputs = expansion * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def resnet18(width: int = 64) -> nn.Module:
    """11.7 million parameters, 1.8 GMACs at 224 x 224; thinner where its first stage has another width."""
    return _resnet((2, 2, 2, 2), 1, bottleneck=False, first=width)


def resnet50() -> nn.Module:
    """25.6 million parameters, 4.1 GMACs at 224 x 224."""
    return _resnet((3, 4, 6, 3), 4, bottleneck=True)
