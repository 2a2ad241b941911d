"""Conv-HyperPrior: continuous latents, rounded, with Gaussians whose scale is sent beside them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from polarpack.errors import InputError

from .base import Baseline, Symbols
from .coding import Coder, Floats
from .layers import down, up

MOST = 96  # latents beyond +-MOST are held there; they are rare, and cost the picture a little
SCALES = torch.exp(torch.linspace(math.log(0.11), math.log(32.0), 64))  # sigma, 64 steps


class HyperPrior(Baseline):
    """Scale hyperprior with plain convolutions.

    ::

        x ── g_a ── y ── round ── y_hat ── g_s ── x_hat
                    └ h_a(|y|) ── z ── round ── z_hat ── h_s ── sigma of every y

        p(y_hat) = N(0, sigma^2) * U(-1/2, 1/2),   p(z_hat): one logistic a channel
        loss = R + lambda D,  R in bits a pixel, D the MSE in units of a grey value squared

    Rounding is replaced by uniform noise in training (Ballé et al. 2017); afterwards the entropy
    model alone is tuned on rounded latents, which noise only stands in for.

    Parameters
    ----------
    channels : of the transforms and of z; latent : channels of y; weight : lambda.
    patch : side of the patches, a multiple of 32.

    Source: Ballé et al., "Variational image compression with a scale hyperprior", ICLR 2018.
    """

    kind: ClassVar[str] = "hyperprior"

    def __init__(
        self, channels: int = 64, latent: int = 96, weight: float = 0.01, patch: int = 128
    ) -> None:
        super().__init__()
        if patch % 32:
            raise InputError(f"expected a patch that 32 divides, got {patch}")
        self._config = {"channels": channels, "latent": latent, "weight": weight, "patch": patch}
        self.patch, self.weight, self.latent, self.channels = patch, weight, latent, channels
        c = channels
        self.g_a = nn.Sequential(*down([3, c, c, latent])[:-1])
        self.g_s = nn.Sequential(*up([latent, c, c, 3]))
        self.h_a = nn.Sequential(
            nn.Conv2d(latent, c, 3, padding=1), nn.ReLU(), *down([c, c, c])[:-1]
        )
        self.h_s = nn.Sequential(*up([c, c, c]), nn.ReLU(), nn.Conv2d(c, latent, 3, padding=1))
        self.z_mean = nn.Parameter(torch.zeros(c))
        self.z_scale = nn.Parameter(torch.zeros(c))
        self.y_gain = nn.Parameter(torch.tensor(16.0))  # y begins in units of some 1/16 of a range

    def _analysis(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.g_a(x) * self.y_gain
        return y, self.h_a(y.abs() / self.y_gain)

    def _synthesis(self, y_hat: Tensor) -> Tensor:
        return cast(Tensor, self.g_s(y_hat / self.y_gain))

    def _sigma(self, z_hat: Tensor) -> Tensor:
        return softplus(self.h_s(z_hat)).clamp(float(SCALES[0]), float(SCALES[-1]))

    def _bits_z(self, z: Tensor) -> Tensor:
        """Bits of each z: a logistic for each channel, over a unit."""
        centred = z - self.z_mean[:, None, None]
        s = softplus(self.z_scale)[:, None, None] + 0.05
        p = torch.sigmoid((centred + 0.5) / s) - torch.sigmoid((centred - 0.5) / s)
        return -torch.log2(p.clamp(min=1e-9))

    def forward(self, x: Tensor, *, noise: bool | None = None) -> dict[str, Tensor]:
        """``reconstructed`` like x (B, 3, H, W), and ``bits`` (scalar: all latents of the batch).
        noise: add uniform noise instead of rounding; by default in training."""
        noisy = self.training if noise is None else noise
        y, z = self._analysis(x)
        if noisy:
            z_hat, y_hat = (v + torch.rand_like(v) - 0.5 for v in (z, y))
        else:
            z_hat, y_hat = z.round(), y.round()
        bits = self._bits_z(z_hat).sum() + gaussian_bits(y_hat, self._sigma(z_hat)).sum()
        return {"reconstructed": self._synthesis(y_hat), "bits": bits}

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        out = self(x)
        error = mse_loss(out["reconstructed"], x)
        bpp = out["bits"] / (x.shape[0] * x.shape[2] * x.shape[3])
        return bpp + self.weight * 255**2 * error, {"mse": error, "bpp": bpp}

    def prior_parameters(self) -> list[nn.Parameter]:
        """What may change once pictures are final: h_s and the density of z."""
        return [*self.h_a.parameters(), *self.h_s.parameters(), self.z_mean, self.z_scale]

    def prior_loss(self, symbols: Symbols, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        y, z = self._analysis(x)
        z_hat = z + (z.round() - z).detach()
        bits = self._bits_z(z_hat).sum() + gaussian_bits(y.round(), self._sigma(z_hat)).sum()
        bpp = bits / (x.shape[0] * x.shape[2] * x.shape[3])
        return bpp, {"bpp": bpp}

    def symbols(self, x: Tensor) -> Symbols:
        """z (B, C, p/32, p/32) and y (B, latent, p/8, p/8), as integers."""
        y, z = self._analysis(x)
        return [v.round().clamp(-MOST, MOST).long() for v in (z, y)]

    def image(self, symbols: Symbols) -> Tensor:
        """See ``Baseline``."""
        return self._synthesis(symbols[1].float())

    @torch.inference_mode()
    def run(self, coder: Coder, n: int, symbols: Symbols | None) -> Symbols:
        """See ``Baseline``."""
        side = self.patch // 32
        shape_z, shape_y = (n, self.channels, side, side), (n, self.latent, 4 * side, 4 * side)
        given_z, given_y = (None, None) if symbols is None else symbols
        values = torch.arange(-MOST, MOST + 1.0)
        table_z = -self._bits_z(values.expand(1, self.channels, 1, -1))[0, :, 0] * math.log(2)
        channel = np.broadcast_to(np.arange(self.channels)[:, None, None], shape_z).ravel()
        z = _code(coder, table_z.numpy(), channel, given_z, shape_z)
        # sigma falls to one of 64 steps: the table, not the network, is what both sides must share
        sigma = self._sigma(z.float())
        middles = (SCALES[1:] * SCALES[:-1]).sqrt()
        step = torch.bucketize(sigma, middles).numpy().ravel()
        y = _code(coder, gaussian_table(), step, given_y, shape_y)
        return [z, y]


def _code(
    coder: Coder, table: Floats, rows: Any, given: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    symbols = None if given is None else given.numpy().ravel() + MOST
    return torch.from_numpy(coder.code_by_row(table, rows, symbols) - MOST).view(shape)


def gaussian_bits(y: Tensor, sigma: Tensor) -> Tensor:
    """-log2 of N(0, sigma^2) over y +- 1/2. Both tails are taken from the side where they are
    small, which keeps what float32 holds of them."""
    y = y.abs()
    scale = 1 / (sigma * math.sqrt(2))
    p = 0.5 * (torch.erfc((y - 0.5) * scale) - torch.erfc((y + 0.5) * scale))
    return -torch.log2(p.clamp(min=1e-9))


def gaussian_table() -> Floats:
    """Logits (64, 2 MOST + 1) of every value under every step of sigma, float32."""
    values = torch.arange(-MOST, MOST + 1.0, dtype=torch.float64)
    bits = gaussian_bits(values[None], SCALES.double()[:, None])
    return (-bits * math.log(2)).float().numpy()
