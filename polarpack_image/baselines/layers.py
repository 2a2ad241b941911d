"""Layers that the baselines share: residual stacks, spatial attention, and strided ladders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + conv 1x1 (relu (conv 3x3 (relu x))), as in VQ-VAE."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        out: Tensor = x + self.body(x)
        return out


def residuals(channels: int, hidden: int, n: int) -> nn.Sequential:
    """n residual layers and a closing ReLU."""
    return nn.Sequential(*(Residual(channels, hidden) for _ in range(n)), nn.ReLU())


class SpatialAttention(nn.Module):
    """x + attention of every position to all others; for small maps, O((H W)^2 C)."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)  # starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(mixed.transpose(-1, -2).reshape(b, c, h, w))
        return out


def down(widths: Sequence[int]) -> list[nn.Module]:
    """Strided convolutions through the widths, each halving the size, with ReLU between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return layers


def up(widths: Sequence[int]) -> list[nn.Module]:
    """Transposed convolutions through the widths, each doubling the size, with ReLU between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return layers[:-1]


def unfold_blocks(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, blocks, size^2, C), blocks and positions in raster order."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, -1, size * size, c)


def fold_blocks(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """Inverse of ``unfold_blocks``."""
    b, _, _, c = x.shape
    x = x.view(b, height // size, width // size, size, size, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, c, height, width)


def to_unit(pixels: Tensor) -> Tensor:
    """(.., 0..255) float -> -0.5..0.5."""
    return pixels / 255 - 0.5


def to_pixels(x: Tensor) -> Tensor:
    """Inverse of ``to_unit``, rounded and held within 0..255, as uint8."""
    return ((x + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
