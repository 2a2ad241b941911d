"""What is trained around the lapped linear transform: it, its entropy network, its post-filter.

**The transform** is trained for rate and distortion, all qualities at once. The rate is that of a
stand-in for the coder: every coefficient has a logistic law whose mean is linear and whose
log-scale is linear in log-magnitudes, both of what a decoder that goes head by head, row by row,
already has. It is learned along and thrown away; the codec's own coder is fitted to the finished
transform.

The step Delta is drawn log-uniformly for each crop. The rate sees uniform noise in place of
rounding; the distortion sees rounding with a dead zone, its derivative taken as 1 (the mixture of
Minnen and Singh, "Channel-wise autoregressive entropy models", ICIP 2020). The loss is

    Delta / 36 * (bits per pixel + KAPPA * squared error per pixel / Delta^2)

where KAPPA / Delta^2 is the slope of the rate-distortion curve of a uniform quantizer, 6 / ln 2 at
high rate and less where most coefficients are zero, and the factor in front keeps coarse and fine
steps equally important.

**The post-filter and the entropy network** are trained behind the finished transform. Their layers
round like the integer ones they become from a half of the schedule on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lapped import BLOCK, N_CHANNELS, LappedKernels
from .networks import HEAD, ContextModel, LappedTransform, PostFilter, set_integer

KAPPA = 6.0
MIN_STEP, MAX_STEP = 6.0, 140.0  # grey levels
STEPS = (16.0, 36.0, 84.0, 130.0)  # at which validation measures
INTEGER_FROM = 0.5  # of the schedule
ROUNDING = 0.4  # of a step is added before truncation: the dead zone of a rate-aware quantizer
LATTICE = 0.6  # of a scalar quantizer's step is that of the trellis with as much noise
TRELLIS_ZERO = 1.25  # lattice steps below which the trellis's search mostly decides for zero
TRELLIS_NOISE = 1.55  # width of uniform noise that, with rounding, has the variance of its errors
FLOOR = 0.3  # of a step: magnitudes below it look alike


def earlier_cross() -> tuple[Tensor, Tensor]:
    """Places of a 3 x 3 kernel that the linear stand-ins look at: of earlier heads, the centre and
    its four neighbours; of the same head, those above and to the left."""
    cross = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).float()
    before = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).float()
    return cross, before


def causal_mask(channels: int) -> Tensor:
    """(channels, channels, 3, 3): what channel c of head i may see when heads are decoded one
    after the other, each in raster order."""
    head = torch.arange(channels) // HEAD
    cross, before = earlier_cross()
    earlier = (head[None, :] < head[:, None]).float()[..., None, None]
    same = (head[None, :] == head[:, None]).float()[..., None, None]
    return earlier * cross + same * before


class CausalMeans(nn.Module):
    """Linear prediction of the first n channels from those decoded before; zero for the others."""

    mask: Tensor

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("mask", causal_mask(n))
        self.weight = nn.Parameter(torch.zeros(n, n, 3, 3))

    def forward(self, y_hat: Tensor) -> Tensor:
        """(n, C, h, w) in steps to means of the same shape."""
        n = len(self.weight)
        mean = F.conv2d(F.pad(y_hat[:, :n], (1, 1, 1, 1)), self.weight * self.mask)
        rest = y_hat.new_zeros(len(y_hat), y_hat.shape[1] - n, *y_hat.shape[2:])
        return torch.cat([mean.float(), rest], 1)


class CausalLaws(nn.Module):
    """Means and log-scales of all coefficients from those decoded before them.

    ::

        y / Delta ──┬── linear, lowest channels ───────────────── mean
                    └── log2(|.| + FLOOR) ── linear ───────────── log2 scale
    """

    mask: Tensor

    def __init__(self, n_mean: int = 24):
        super().__init__()
        self.register_buffer("mask", causal_mask(N_CHANNELS))
        self.mean = CausalMeans(n_mean)
        self.scale = nn.Parameter(torch.zeros(N_CHANNELS, N_CHANNELS, 3, 3))
        own = torch.arange(N_CHANNELS)
        with torch.no_grad():
            self.scale[own, own, 0, 1] = self.scale[own, own, 1, 0] = 0.2
        self.bias = nn.Parameter(torch.zeros(N_CHANNELS))
        self.slope = nn.Parameter(torch.full((N_CHANNELS,), -0.3))

    def forward(self, y: Tensor, log_step: Tensor) -> tuple[Tensor, Tensor]:
        """y (n, C, h, w) in steps, log2 of the step (n,): means and log2 scales in steps."""
        padded = F.pad(y, (1, 1, 1, 1))
        scale = F.conv2d((padded.abs() + FLOOR).log2(), self.scale * self.mask)
        offset = self.bias + self.slope * (log_step[:, None] - 5.0)
        return self.mean(y), scale + offset[..., None, None]


def bits(y: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Information in each y (in steps, rounded or with uniform noise) under logistic laws."""
    scale = torch.exp2(log_scale.clamp(-6.0, 12.0))
    distance = (y - mean).abs()
    upper = torch.sigmoid((0.5 - distance) / scale)
    lower = torch.sigmoid((-0.5 - distance) / scale)
    return -(upper - lower).clamp_min(1e-7).log2()


def dead_zone(y: Tensor) -> Tensor:
    """y in steps, quantized."""
    return y.sign() * (y.abs() + ROUNDING).floor()


def draw_log_steps(n: int, generator: torch.Generator) -> Tensor:
    """log2 of n quality steps, uniform between MIN_STEP and MAX_STEP."""
    low, high = math.log2(MIN_STEP), math.log2(MAX_STEP)
    device = generator.device
    return low + torch.rand(n, generator=generator, device=device) * (high - low)


def psnr(x_hat: Tensor, x: Tensor) -> float:
    """Mean over pictures of the PSNR in dB of x_hat, rounded to 8 bits."""
    mse = (x_hat.round().clamp(0, 255) - x).square().mean((1, 2, 3))
    return float((10 * (255**2 / mse.clamp_min(1e-3)).log10()).mean())


class LappedTask:
    """Trains transform and stand-in together; with ``frozen`` the stand-in alone, which tells the
    rate of a transform as it is."""

    def __init__(self, start: LappedKernels, frozen: bool = False, tied: bool = True):
        self.transform, self.laws, self.frozen = LappedTransform(start, tied), CausalLaws(), frozen
        self.module: nn.Module = nn.ModuleList([self.transform, self.laws])

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """See ``Task``."""
        groups = [(list(self.laws.parameters()), 1.0)]
        if not self.frozen:
            kernels = [self.transform.g_s] if self.transform.tied else self.transform.parameters()
            groups.append((list(kernels), 0.15))
        return groups

    def enter(self, progress: float) -> None:
        """One phase only."""

    def draw(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """See ``Task``."""
        n, _, height, width = x.shape
        shape = (n, N_CHANNELS, height // BLOCK, width // BLOCK)
        noise = torch.rand(shape, generator=generator, device=x.device) - 0.5
        return draw_log_steps(n, generator), noise

    def loss(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """See ``Task``."""
        log_step, noise = drawn
        step = log_step.exp2()[:, None, None, None]
        with torch.set_grad_enabled(not self.frozen):
            y = self.transform.analysis(x) / step
            y_hat = y + (dead_zone(y) - y).detach()
            error = (self.transform.synthesis(y_hat * step) - x).square().sum((1, 2, 3))
        noisy = y + noise
        rate = bits(noisy, *self.laws(noisy, log_step)).sum((1, 2, 3))
        cost = rate + KAPPA * error / step.square().flatten()
        return (step.flatten() / 36.0 * cost).mean() / (x.shape[2] * x.shape[3])

    def evaluate(self, x: Tensor) -> dict[str, Any]:
        """See ``Task``."""
        return {"curve": [self._point(x, step) for step in STEPS[::-1]]}

    def _point(self, x: Tensor, step: float) -> tuple[float, float]:
        y_hat = dead_zone(self.transform.analysis(x) / step)
        log_step = torch.full((len(x),), math.log2(step), device=x.device)
        rate = bits(y_hat, *self.laws(y_hat, log_step)).sum() / (len(x) * x.shape[2] * x.shape[3])
        return float(rate), psnr(self.transform.synthesis(y_hat * step), x)

    def export(self) -> dict[str, npt.NDArray[Any]]:
        """See ``Task``."""
        kernels = self.transform.export()
        return {
            "transform.analysis": kernels.analysis,
            "transform.synthesis": kernels.synthesis,
            "transform.parity": kernels.parity,
        }


class PostFilterTask:
    """Trains the post-filter behind a fixed transform. The loss is the squared error relative to
    that without the filter, crop by crop, so that fine steps count as much as coarse ones: 0.95 are
    0.22 dB."""

    def __init__(self, kernels: LappedKernels, width: int = 64, depth: int = 4):
        self.transform, self.filter = LappedTransform(kernels), PostFilter(width, depth)
        self.module: nn.Module = nn.ModuleList([self.transform, self.filter])

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """See ``Task``."""
        return [(list(self.filter.parameters()), 1.0)]

    def decoded(self, x: Tensor, log_step: Tensor) -> Tensor:
        """What a decoder has before the filter."""
        step = log_step.exp2()[:, None, None, None]
        with torch.no_grad():
            return self.transform.synthesis(dead_zone(self.transform.analysis(x) / step) * step)

    def enter(self, progress: float) -> None:
        """See ``Task``."""
        set_integer(self.filter, progress >= INTEGER_FROM)

    def draw(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """See ``Task``."""
        return (draw_log_steps(len(x), generator),)

    def loss(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """See ``Task``."""
        (log_step,) = drawn
        x_hat = self.decoded(x, log_step)
        after = (self.filter(x_hat, log_step) - x).square().mean((1, 2, 3))
        before = (x_hat - x).square().mean((1, 2, 3))
        floor = 0.005 * (2 * log_step).exp2()  # of flat crops nothing can be learned
        weight = 1 / (before + floor)
        ratio: Tensor = (weight * after).sum() / (weight * before).sum()
        return ratio

    def evaluate(self, x: Tensor) -> dict[str, Any]:
        """See ``Task``."""
        set_integer(self.filter, True)
        before, after = [], []
        for step in STEPS[::-1]:
            log_step = torch.full((len(x),), math.log2(step), device=x.device)
            x_hat = self.decoded(x, log_step)
            before.append(psnr(x_hat, x))
            after.append(psnr(self.filter(x_hat, log_step), x))
        return {"psnr_before": before, "psnr_after": after}

    def export(self) -> dict[str, npt.NDArray[Any]]:
        """See ``Task``."""
        return self.filter.export()


class ContextTask:
    """Trains the entropy network of a fixed transform: levels of all heads but the first ones.

    It sees coefficients as the trellis leaves them, in steps of its lattice: small ones zero, the
    others with its noise. Beside the network stands a linear prediction of the mean from what is
    decoded, as the coder has one.
    """

    def __init__(self, kernels: LappedKernels, starts: tuple[int, ...], width: int = 64):
        self.transform, self.linear = LappedTransform(kernels), CausalMeans(64)
        self.n_channels = kernels.synthesis.shape[3]
        self.context = ContextModel(starts, width, means=False)
        self.first, self.last = HEAD * starts[0], HEAD * starts[-1]
        self.module: nn.Module = nn.ModuleList([self.transform, self.linear, self.context])

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """See ``Task``."""
        return [(list(self.context.parameters()), 1.0), (list(self.linear.parameters()), 1.0)]

    def _bits(self, x: Tensor, log_step: Tensor, noise: Tensor) -> Tensor:
        """(n,) information in the channels that the network speaks of; ``log_step`` of the
        lattice, noise uniform in -0.5..0.5."""
        with torch.no_grad():
            y = self.transform.analysis(x) / log_step.exp2()[:, None, None, None]
            noisy = (y + TRELLIS_NOISE * noise).round()
            y_hat = torch.where(y.abs() < TRELLIS_ZERO, 0.0, noisy)
        _, log_scale = self.context(y_hat, log_step)
        asked = slice(self.first, self.last)
        # each of the trellis's two quantizers has cells of two lattice steps
        y, mean = y_hat[:, asked] / 2, self.linear(y_hat)[:, asked] / 2
        return bits(y, mean, log_scale - 1).sum((1, 2, 3))

    def enter(self, progress: float) -> None:
        """See ``Task``."""
        set_integer(self.context, progress >= INTEGER_FROM)

    def draw(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """See ``Task``."""
        n, _, height, width = x.shape
        shape = (n, self.n_channels, height // BLOCK, width // BLOCK)
        noise = torch.rand(shape, generator=generator, device=x.device) - 0.5
        return draw_log_steps(n, generator) + math.log2(LATTICE), noise

    def loss(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """See ``Task``."""
        log_step, noise = drawn
        weight = log_step.exp2() / (36.0 * LATTICE)
        return (weight * self._bits(x, log_step, noise)).mean() / (x.shape[2] * x.shape[3])

    def evaluate(self, x: Tensor) -> dict[str, Any]:
        """Bits per pixel of these channels by the network alone."""
        set_integer(self.context, True)
        generator = torch.Generator(x.device).manual_seed(0)
        noise = self.draw(x, generator)[1]
        rates = []
        for step in STEPS[::-1]:
            log_step = torch.full((len(x),), math.log2(LATTICE * step), device=x.device)
            rate = float(self._bits(x, log_step, noise).sum())
            rates.append(rate / (len(x) * x.shape[2] * x.shape[3]))
        return {"bits_per_pixel": rates}

    def export(self) -> dict[str, npt.NDArray[Any]]:
        """See ``Task``."""
        return self.context.export()
