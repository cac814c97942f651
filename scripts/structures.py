"""Small nets with the structures of the known architectures, for checks where torchvision and timm do not load.

Every net takes a map [N, 3, 32, 32] and returns logits (`UNet`: [N, 4, 32, 32]); weights are random.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from imagenet_resnets import resnet18
from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Hu et al. 2018 (arXiv 1709.01507): the map's mean scales its channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    """MobileNetV2 and V3, EfficientNet: 1x1 conv, depthwise conv, squeeze-excitation, 1x1 conv."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        width, self.joins = 4 * inputs, stride == 1 and inputs == outputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False), nn.BatchNorm2d(width), nn.SiLU()
        )  # fmt: skip
        self.se = SqueezeExcitation(width, inputs)
        self.project = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.se(self.depthwise(self.expand(x))))
        return x + out if self.joins else out


def mobile() -> nn.Module:
    """Depthwise-separable blocks with squeeze-excitation."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
    blocks = [InvertedResidual(16, 24, 3, 2), InvertedResidual(24, 24, 5, 1), InvertedResidual(24, 40, 3, 2)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(40, 10))


class Dense(nn.Module):
    """DenseNet's layer: BN and ReLU before each conv, its output put behind its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))
        return torch.cat([x, out], dim=1)


def densenet() -> nn.Module:
    """Two dense blocks with a transition between them (Huang et al. 2017, arXiv 1608.06993)."""
    first, second = [Dense(16 + 12 * i, 12) for i in range(3)], [Dense(26 + 12 * i, 12) for i in range(3)]
    transition = nn.Sequential(nn.BatchNorm2d(52), nn.ReLU(), nn.Conv2d(52, 26, 1, bias=False), nn.AvgPool2d(2))
    head = [nn.BatchNorm2d(62), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(62, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), *first, transition, *second, *head)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map, as ConvNeXt's stem and downsampling have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 conv, then LayerNorm and two Linears with the channels last, and a layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.layer_scale * self.down(F.gelu(self.up(out))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Two stages of blocks with a patch conv before each (Liu et al. 2022, arXiv 2201.03545)."""
    stem, down = nn.Conv2d(3, 24, 4, 4), nn.Sequential(LayerNorm2d(24), nn.Conv2d(24, 48, 2, 2))
    body = [stem, LayerNorm2d(24), ConvNextBlock(24), ConvNextBlock(24), down, ConvNextBlock(48)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 10))


class FusedAttention(nn.Module):
    """Attention as timm has it: one Linear for query, key and value, and torch's scaled dot product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(samples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(samples, tokens, width))


class PackedAttention(nn.Module):
    """Self-attention by `nn.MultiheadAttention`, as torchvision's ViT has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class VisionBlock(nn.Module):
    """A transformer's block, the norms before attention and MLP."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, one block of each kind of attention (arXiv 2010.11929)."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(
            VisionBlock(width, FusedAttention(width, heads)), VisionBlock(width, PackedAttention(width, heads))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class UNet(nn.Module):
    """Down by strided convs, up by transposed ones, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
        self.leave = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(torch.cat([x, self.up(self.deep(self.down(x)))], dim=1))


STRUCTURES = {
    "resnet18": partial(resnet18, width=16),
    "mobile": mobile,
    "densenet": densenet,
    "convnext": convnext,
    "vit": VisionTransformer,
    "unet": UNet,
}
"""Name -> a function that makes the net."""
INPUT = (3, 32, 32)
