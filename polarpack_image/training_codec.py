"""Trains the learned codec (``networks.Codec``) at all qualities at once, in three phases.

One run has one schedule of steps; the phase follows from how far it has come:

=====  ================  ==========================================================================
phase  from, of steps    what happens
=====  ================  ==========================================================================
A      0                 all learns; the rate sees uniform noise in place of rounding, synthesis
                         and context see rounding with a dead zone
B      ``ROUNDED_FROM``  the rate sees rounded values too, and the entropy network computes in
                         integers as it will in the decoder
C      ``REFINED_FROM``  encoder frozen (g_a, h_a, gains): synthesis and entropy network are refined
                         on exactly the values they will be given
=====  ================  ==========================================================================

The loss is ``step / 36 * (bits + KAPPA * squared error / step^2)`` per pixel: quality enters by the
step alone, drawn log-uniformly for each crop, and the slope between rate and distortion goes with
its square, lambda ~ step^-2. Laws are logistic. A linear prediction from decoded neighbours stands
in for that of the coder; the coder's own contexts come on top and are fitted afterwards.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ._coder_kernels import MEAN_BITS
from .fitting import MEAN_TAPS
from .learned import PREFIX, codec_arrays, z_levels
from .networks import HEAD, Codec, set_integer
from .training_lapped import KAPPA, STEPS, CausalMeans, bits, dead_zone, draw_log_steps

ROUNDED_FROM, REFINED_FROM = 0.6, 0.85
Z_LIMIT = 127.0
LEAST_TAP = 20  # of a tap's weight in 2**-12; smaller ones are left out


class CodecTask:
    """Task of the whole codec. ``codec`` has been given its linear start (``Codec.fit_merge``)."""

    def __init__(self, codec: Codec):
        self.codec = codec
        channels = codec.config.channels
        self.linear = CausalMeans(min(64, channels))
        self.prior = nn.ParameterDict(
            {
                "mean": nn.Parameter(torch.zeros(codec.config.hyper)),
                "log_scale": nn.Parameter(torch.ones(codec.config.hyper)),
            }
        )
        self.first = HEAD * codec.config.starts[0]
        # law of the heads in front of the first group, where there are any
        self.lowest = nn.Parameter(torch.full((self.first,), 2.0))
        self.module: nn.Module = nn.ModuleDict(
            {"codec": codec, "linear": self.linear, "prior": self.prior}
        )
        self.module.register_parameter("lowest", self.lowest)
        self.rounded = False

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Linear parts start from what is nearly right, and move more slowly."""
        slow = {"lapped.g_a", "lapped.g_s", "merge", "split"}
        named = list(self.codec.named_parameters())
        rest = [self.lowest, *self.linear.parameters(), *self.prior.values()]
        return [
            ([p for name, p in named if name in slow], 0.1),
            ([p for name, p in named if name not in slow] + rest, 1.0),
        ]

    def enter(self, progress: float) -> None:
        """See ``Task``."""
        self.rounded = progress >= ROUNDED_FROM
        set_integer(self.codec.context, self.rounded)
        encoder = [self.codec.lapped.g_a, self.codec.log_gain]
        if self.codec.factor > 1:
            encoder.append(self.codec.merge)
        for name in ("g_a", "h_a"):
            if hasattr(self.codec, name):
                encoder += getattr(self.codec, name).parameters()
        for parameter in encoder:
            parameter.requires_grad_(progress < REFINED_FROM)

    def draw(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """See ``Task``."""
        config = self.codec.config
        n, rows, columns = len(x), x.shape[2] // config.stride, x.shape[3] // config.stride
        noise = torch.rand(
            (n, config.channels, rows, columns), generator=generator, device=x.device
        )
        z_shape = (n, max(config.hyper, 1), -(-rows // 4), -(-columns // 4))
        z_noise = torch.rand(z_shape, generator=generator, device=x.device)
        return draw_log_steps(n, generator), noise - 0.5, z_noise - 0.5

    def loss(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """See ``Task``."""
        log_step, noise, z_noise = drawn
        rate, error = self._rate_and_error(x, log_step, noise, z_noise)
        step = log_step.exp2()
        cost = rate + KAPPA * error / step.square()
        return (step / 36.0 * cost).mean() / (x.shape[2] * x.shape[3])

    def _rate_and_error(
        self, x: Tensor, log_step: Tensor, noise: Tensor | None, z_noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Bits and squared error of each picture; rounded values where there is no noise or the
        phase asks for them."""
        codec = self.codec
        step = log_step.exp2()[:, None, None, None]
        gain = codec.gain(log_step)
        y = codec.analysis(x, log_step) * (gain / step)
        z_hat, rate = None, torch.zeros(len(x), device=x.device)
        if codec.config.hyper:
            z = codec.hyper(y).float().clamp(-Z_LIMIT, Z_LIMIT)
            z_hat = z + (z.round() - z).detach()
            seen = z_hat if z_noise is None or self.rounded else z + z_noise
            mean, log_scale = (self.prior[k][:, None, None] for k in ("mean", "log_scale"))
            rate = bits(seen, mean, log_scale.expand_as(seen)).sum((1, 2, 3))
        with torch.no_grad():
            center = self.linear(y.round())
        y_hat = center + y - center + (dead_zone(y - center) - (y - center)).detach()
        linear = self.linear(y_hat)
        mean, log_scale = codec.laws(y_hat, z_hat, log_step)
        if self.first:
            mean = torch.cat([mean.new_zeros(len(x), self.first, *mean.shape[2:]), mean], 1)
            low = self.lowest[:, None, None].expand(len(x), -1, *mean.shape[2:])
            log_scale = torch.cat([low, log_scale], 1)
        coded = y_hat if noise is None or self.rounded else y + noise
        rate = rate + bits(coded, mean.float() + linear, log_scale.float()).sum((1, 2, 3))
        x_hat = codec.synthesis(y_hat * (step / gain), log_step)
        return rate, (x_hat - x).square().sum((1, 2, 3))

    def evaluate(self, x: Tensor) -> dict[str, Any]:
        """With rounded latents and the integer entropy network; rates include z."""
        before = self.rounded
        set_integer(self.codec.context, True)
        curve = []
        for step in STEPS[::-1]:
            points = []
            for part in torch.split(x, 8):
                log_step = torch.full((len(part),), math.log2(step), device=x.device)
                rate, error = self._rate_and_error(part, log_step, None, None)
                mse = error / part[0].numel()
                points.append(torch.stack([rate, 10 * (255**2 / mse.clamp_min(1e-3)).log10()]))
            rate, quality = torch.cat(points, 1).mean(1).tolist()
            curve.append((rate / (x.shape[2] * x.shape[3]), quality))
        set_integer(self.codec.context, before)
        return {"curve": curve}

    def export(self) -> dict[str, npt.NDArray[Any]]:
        """See ``learned.codec_arrays``; with the laws of z and the taps of the linear prediction
        that the entropy network counts on."""
        arrays = codec_arrays(self.codec)
        if self.codec.config.hyper:
            arrays[f"{PREFIX}z_levels"] = z_levels(self.prior["mean"], self.prior["log_scale"])
        arrays["coder.mean_taps"] = mean_taps(self.linear)
        return arrays


def mean_taps(linear: CausalMeans) -> npt.NDArray[np.int16]:
    """The prediction's strongest taps as a ``LatentCoder`` takes them: (n, 5) int16."""
    weight = (linear.weight * linear.mask).detach().cpu().numpy()
    taps = []
    for target, kernel in enumerate(weight):
        strongest = np.argsort(-np.abs(kernel), axis=None)[:MEAN_TAPS]
        for source, row, column in zip(*np.unravel_index(strongest, kernel.shape), strict=True):
            integer = round(float(kernel[source, row, column]) * (1 << MEAN_BITS))
            if abs(integer) >= LEAST_TAP:
                taps.append((target, source, row - 1, column - 1, np.clip(integer, -32767, 32767)))
    return np.array(taps, np.int16).reshape(-1, 5)
