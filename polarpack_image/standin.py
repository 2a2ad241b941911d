"""A yardstick of time: the layers of a learned codec of 2018, with random weights.

Learned codecs are usually timed on GPUs of many kinds. What one costs *here* is measured in the
same process as everything else: the convolutions of mbt2018-mean with N = 128 channels, M = 192,
and its symbols through our own range coder. Random weights give no picture, but take the same time.

::

    x ─ g_a: 4 convolutions 5x5, stride 2, GDN between ─ y (192, H/16, W/16)
    y ─ h_a: 3 convolutions ─ z (128, H/64, W/64)
    y, z ─ range coder, y under Gaussians whose means and scales are h_s of z ─ bytes
    x_hat ─ g_s: 4 transposed convolutions, inverse GDN between ─ y_hat

Source: Minnen, Ballé and Toderici, "Joint autoregressive and hierarchical priors for learned image
compression", NeurIPS 2018 (the variant without autoregression; sizes as in CompressAI).
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baselines.coding import Reader, Writer
from .baselines.hyperprior import MOST, SCALES, gaussian_table

N, M = 128, 192


class Timing(NamedTuple):
    """CPU seconds of one picture on one thread; multiplications a pixel in thousands, both ways
    together."""

    encode_seconds: float
    decode_seconds: float
    kmac_per_pixel: float


class GDN(nn.Module):
    """Generalized divisive normalization, or its inverse: one 1x1 convolution of squares."""

    def __init__(self, channels: int, inverse: bool = False):
        super().__init__()
        self.inverse = inverse
        self.gamma = nn.Parameter(0.1 * torch.eye(channels)[..., None, None])
        self.beta = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to the same."""
        norm = F.conv2d(x * x, self.gamma, self.beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


def _conv(n_in: int, n_out: int, kernel: int = 5, stride: int = 2) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2)


def _up(n_in: int, n_out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(n_in, n_out, 5, 2, 2, output_padding=1)


class StandIn(nn.Module):
    """The four networks."""

    def __init__(self) -> None:
        super().__init__()
        self.g_a = nn.Sequential(
            _conv(3, N), GDN(N), _conv(N, N), GDN(N), _conv(N, N), GDN(N), _conv(N, M)
        )
        self.g_s = nn.Sequential(
            _up(M, N), GDN(N, True), _up(N, N), GDN(N, True), _up(N, N), GDN(N, True), _up(N, 3)
        )
        self.h_a = nn.Sequential(
            _conv(M, N, 3, 1), nn.LeakyReLU(), _conv(N, N), nn.LeakyReLU(), _conv(N, N)
        )
        self.h_s = nn.Sequential(
            _up(N, M), nn.LeakyReLU(), _up(M, M * 3 // 2), nn.LeakyReLU(),
            _conv(M * 3 // 2, 2 * M, 3, 1),
        )  # fmt: skip

    def kmac_per_pixel(self, height: int, width: int) -> float:
        """Thousands of multiplications a pixel of all four networks."""
        total = 0

        def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            nonlocal total
            if isinstance(layer, GDN):
                total += output.numel() * output.shape[1]
            elif isinstance(layer, nn.Conv2d):
                total += output.numel() * layer.weight[0].numel()
            elif isinstance(layer, nn.ConvTranspose2d):
                total += inputs[0].numel() * layer.weight[0].numel()

        hooks = [layer.register_forward_hook(count) for layer in self.modules()]
        y = self.g_a(torch.zeros(1, 3, height, width))
        self.h_s(self.h_a(y))
        self.g_s(y)
        for hook in hooks:
            hook.remove()
        return total / (height * width) / 1000


@torch.inference_mode()
def measure(height: int = 512, width: int = 768, repeats: int = 3) -> Timing:
    """The least of some repeats. height, width: multiples of 64. Checks that the symbols return."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = StandIn().eval()
        x = torch.rand(1, 3, height, width)
        # random weights shrink everything: brought to the spread that trained ones have
        gain = 1.5 / model.g_a(x).std()
        times = [_once(model, x, gain) for _ in range(1 + repeats)][1:]
        both = [min(column) for column in zip(*times, strict=True)]
        return Timing(both[0], both[1], model.kmac_per_pixel(height, width))
    finally:
        torch.set_num_threads(threads)


def _once(model: StandIn, x: Tensor, gain: Tensor) -> tuple[float, float]:
    """Seconds there and back."""
    table = gaussian_table()
    flat = np.zeros((N, 2 * MOST + 1), np.float32)  # z: its law costs the same time, whatever it is
    began = time.process_time()
    y = model.g_a(x) * gain
    z = model.h_a(y).round()
    mean, rows = _laws(model, z)
    writer = Writer()
    channel = np.broadcast_to(np.arange(N)[:, None, None], z.shape[1:]).ravel()
    writer.code_by_row(flat, channel, _symbols(z))
    writer.code_by_row(table, rows, _symbols((y - mean).round()))
    data = writer.finish()
    between = time.process_time()
    reader = Reader(data)
    found = reader.code_by_row(flat, channel, None) - MOST
    z_hat = torch.from_numpy(found).view(z.shape).float()
    mean_hat, rows_hat = _laws(model, z_hat)
    residual = torch.from_numpy(reader.code_by_row(table, rows_hat, None) - MOST)
    model.g_s((residual.view(y.shape) + mean_hat) / gain)
    ended = time.process_time()
    reader.check(writer.crc)
    return between - began, ended - between


def _laws(model: StandIn, z: Tensor) -> tuple[Tensor, Any]:
    """Means, and the rows of the table of Gaussians, spread over scales as pictures spread them:
    most of them small."""
    mean, scale = model.h_s(z).chunk(2, 1)
    sigma = SCALES[0] * (8 * scale / scale.std().clamp_min(1e-9)).exp().clamp(1, 100)
    middles = (SCALES[1:] * SCALES[:-1]).sqrt()
    return mean, torch.bucketize(sigma, middles).numpy().ravel()


def _symbols(values: Tensor) -> Any:
    return values.clamp(-MOST, MOST).long().numpy().ravel() + MOST


def ratio(ours: list[tuple[float, float]], other: Timing) -> dict[str, float]:
    """Ours, pairs of mean seconds there and back, as multiples of the yardstick's."""
    there, back = (math.fsum(column) / len(ours) for column in zip(*ours, strict=True))
    return {"encode": there / other.encode_seconds, "decode": back / other.decode_seconds}
