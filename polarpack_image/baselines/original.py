"""The first prototype: a convolutional autoencoder with a polar vector quantizer, as it was.

Kept to compare with, and as the preset ``original``. Its own list of limits: worse than JPEG, one
operating point for each trained model, a minimal network. What was at fault is the layout: 8 heads
x 4 stages x 10 bits at 1/8 resolution are 5.06 bits a pixel before entropy coding, spent on sky and
texture alike, and ten bits on a 32-dimensional sphere cannot say much.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, l1_loss, mse_loss

from polarpack import nn as pnn
from polarpack.errors import InputError

from .base import Baseline, Symbols
from .coding import Coder
from .layers import up

LATENT, WIDTHS = 256, (128, 192, 256)
HEADS, STAGES, CODEWORDS, RADII = 8, 4, 1024, 16
# of 100 epochs: A geometry 0-10, B rate-distortion 10-60 (the first 15 of it a ramp), C perceptual
PHASE_B, RAMP_END, PHASE_C = 0.10, 0.25, 0.60
GEOMETRY_WEIGHT = 1e-6
PERCEPTUAL_DIVISOR = 20.0
REVIVE = 0.1
CONTEXT_WEIGHT = 0.01
COMMITMENT_WEIGHT = 0.05


class OriginalCodec(Baseline):
    """3 -> 128 -> 192 -> 256 channels, 8x down, polar VQ, checkerboard context.

    ::

        x ── three strided convolutions, one refinement ── v (256, H/8, W/8)
        v ── radius |v|: 16 levels; direction: 8 heads x 4 stages of 1024 codewords ── v_hat
        v_hat ── mirror, transposed convolutions, sigmoid ── x_hat

        rate: anchors (i + j even) first, then the others with the anchors' v_hat as context;
              at each position the radius, then stage by stage, each knowing those before it

    The curriculum follows ``set_progress``: A (0-10%) geometry, MSE and a rate of weight 1e-6
    whose gradient reaches the context model only, with restarts of dead codewords; B (10-60%) MSE
    + weight x rate, the weight rising from 0 to ``target_lambda`` over the first 15%; C (60-100%)
    L1 and MS-SSIM with a twentieth of it.

    Parameters
    ----------
    target_lambda : weight of bits a pixel beside the distortion in a range of 1.
    widths, codewords : smaller ones for tests. patch : side of the patches, a multiple of 8.
    """

    kind: ClassVar[str] = "original"

    def __init__(
        self,
        target_lambda: float = 0.01,
        widths: tuple[int, int, int] = WIDTHS,
        codewords: int = CODEWORDS,
        context: int = 128,
        patch: int = 128,
    ) -> None:
        super().__init__()
        if patch % 8 or len(widths) != 3 or widths[-1] % HEADS:
            raise InputError(
                f"expected a patch that 8 divides and three widths, the last a multiple of "
                f"{HEADS}, got {patch} and {widths}"
            )
        self._config = {
            "target_lambda": target_lambda,
            "widths": list(widths),
            "codewords": codewords,
            "context": context,
            "patch": patch,
        }
        self.patch, self.target_lambda, self.dim = patch, target_lambda, widths[-1]
        a, b, c = widths
        self.encoder = nn.Sequential(
            nn.Conv2d(3, a, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(a, b, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(b, c, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(c, c, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.GELU(), *up([c, b, a, 3]), nn.Sigmoid()
        )
        self.quantizer = pnn.PolarVQ(
            c, codewords, HEADS, STAGES, radius_levels=RADII, initialisation="normal"
        )
        self.context = CheckerboardContext(c, codewords, context)
        self.set_progress(0.0)

    # -------------------------------------------------------------------------------- curriculum

    def set_progress(self, fraction: float) -> None:
        """How far training is, 0..1: decides phase, rate weight and restarts."""
        self.progress = fraction
        for module in self.quantizer.modules():
            if isinstance(module, pnn.Codebook):
                module.revive_below = REVIVE if self.phase == "A" else 0.0

    @property
    def phase(self) -> Literal["A", "B", "C"]:
        """A geometry, B rate-distortion, C perceptual."""
        if self.progress < PHASE_B:
            return "A"
        return "B" if self.progress < PHASE_C else "C"

    @property
    def rate_weight(self) -> float:
        """Weight of a bit a pixel at the present progress."""
        if self.phase == "A":
            return GEOMETRY_WEIGHT
        if self.phase == "C":
            return self.target_lambda / PERCEPTUAL_DIVISOR
        return self.target_lambda * min(1.0, (self.progress - PHASE_B) / (RAMP_END - PHASE_B))

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        v_hat, codes, commitment = self.quantizer(self._latent(x))
        x_hat = self._picture(v_hat)
        # The context model learns at one weight throughout (A is its pre-training); what reaches
        # the encoder through it is scaled to the rate weight of the phase, and nothing does in A.
        share = 0.0 if self.phase == "A" else self.rate_weight / CONTEXT_WEIGHT
        felt = share * v_hat + (1 - share) * v_hat.detach()
        bpp = self.context.bits(felt, codes, self.quantizer) / (x.numel() / x.shape[1])
        error = mse_loss(x_hat, x)
        distortion = error
        if self.phase == "C":
            distortion = l1_loss(x_hat, x) + 1 - ms_ssim(x_hat + 0.5, x + 0.5)
        loss = distortion + CONTEXT_WEIGHT * bpp + COMMITMENT_WEIGHT * commitment
        return loss, {"mse": error, "bpp": bpp, "commitment": commitment}

    # ----------------------------------------------------------------------------------- symbols

    def _latent(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(x)).permute(0, 2, 3, 1)

    def _picture(self, v_hat: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(v_hat.permute(0, 3, 1, 2))) - 0.5

    def symbols(self, x: Tensor) -> Symbols:
        """Codes (B, p/8, p/8, 33): the radius, then eight heads of each stage."""
        return [self.quantizer.encode(self._latent(x))]

    def image(self, symbols: Symbols) -> Tensor:
        """See ``Baseline``."""
        return self._picture(self.quantizer.decode(symbols[0]))

    @torch.inference_mode()
    def run(self, coder: Coder, n: int, symbols: Symbols | None) -> Symbols:
        """See ``Baseline``."""
        side = self.patch // 8
        given = None if symbols is None else symbols[0]
        codes = torch.zeros(n, side, side, 1 + HEADS * STAGES, dtype=torch.int64)
        v_hat = torch.zeros(n, side, side, self.dim)
        for anchors in (True, False):
            where = checkerboard(side, side) == anchors
            features = self.context.features(v_hat, anchors)[:, where].flatten(0, 1)
            known = self.context.empty(features)
            these = codes[:, where].flatten(0, 1)
            wanted = None if given is None else given[:, where].flatten(0, 1)
            for stage in range(-1, STAGES):
                logits = self.context.predict(stage, features, known)
                fields = (
                    slice(0, 1) if stage < 0 else slice(1 + stage * HEADS, 1 + (stage + 1) * HEADS)
                )
                symbols_here = None if wanted is None else wanted[:, fields].reshape(-1).numpy()
                found = coder.code(logits.flatten(0, 1).numpy(), symbols_here)
                these[:, fields] = torch.from_numpy(found).view(len(these), -1)
                known = self.context.add(stage, known, these[:, fields], self.quantizer)
            codes[:, where] = these.view(n, -1, these.shape[1])
            v_hat[:, where] = self.quantizer.decode(codes[:, where])
        return [codes]


class CheckerboardContext(nn.Module):
    """Predicts codes in two passes over a checkerboard.

    ::

        a . a .      a: anchors, coded first, from learned constants
        . a . a      .: the others, from a 5x5 convolution over the anchors' v_hat
        a . a .

    At a position: one MLP for the radius, then one for each stage, which sees the context, the
    radius and the sum of the stages so far.
    """

    def __init__(self, dim: int, codewords: int, width: int) -> None:
        super().__init__()
        self.dim, self.codewords = dim, codewords
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, width, 5, padding=2), nn.GELU(), nn.Conv2d(width, width, 1)
        )
        self.constant = nn.Parameter(torch.zeros(width))
        self.radius_embed = nn.Embedding(RADII, width)
        sizes = [RADII] + [HEADS * codewords] * STAGES
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width if not place else 2 * width + dim, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, size),
            )
            for place, size in enumerate(sizes)
        )

    def features(self, v_hat: Tensor, anchors: bool) -> Tensor:
        """(B, h, w, width) of decoded vectors (B, h, w, dim), of which anchors alone are used."""
        b, h, w, _ = v_hat.shape
        if anchors:
            return self.constant.expand(b, h, w, -1)
        seen = v_hat * checkerboard(h, w).to(v_hat.device)[..., None]
        # in units of the norm a latent of this width has
        context = self.spatial(seen.permute(0, 3, 1, 2) / self.dim**0.5)
        return cast(Tensor, context.permute(0, 2, 3, 1))

    def empty(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What is known of positions (n, width) before their radius: nothing."""
        return torch.zeros_like(features), features.new_zeros(len(features), self.dim)

    def predict(self, stage: int, features: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
        """Logits (n, 1, 16) of the radius for stage -1, else (n, heads, codewords)."""
        if stage < 0:
            return cast(Tensor, self.mlps[0](features))[:, None]
        out = self.mlps[1 + stage](torch.cat([features, *known], dim=-1))
        return cast(Tensor, out).view(len(features), HEADS, self.codewords)

    def add(
        self, stage: int, known: tuple[Tensor, Tensor], codes: Tensor, quantizer: pnn.PolarVQ
    ) -> tuple[Tensor, Tensor]:
        """``known`` with the codes (n, 1 or heads) of this stage taken in."""
        if stage < 0:
            return self.radius_embed(codes[:, 0]), known[1]
        book = cast(pnn.Codebook, quantizer.codebooks[stage])
        words = book.look_up(codes.T).transpose(0, 1).flatten(1).detach()
        return known[0], known[1] + words

    def bits(self, v_hat: Tensor, codes: Tensor, quantizer: pnn.PolarVQ) -> Tensor:
        """Cross-entropy in bits of codes (B, h, w, 33), with v_hat (B, h, w, dim) as context."""
        h, w = codes.shape[1:3]
        total = v_hat.new_zeros(())
        for anchors in (True, False):
            where = checkerboard(h, w).to(codes.device) == anchors
            features = self.features(v_hat, anchors)[:, where].flatten(0, 1)
            these = codes[:, where].flatten(0, 1)
            known = self.empty(features)
            for stage in range(-1, STAGES):
                first = 0 if stage < 0 else 1 + stage * HEADS
                fields = these[:, first : first + (1 if stage < 0 else HEADS)]
                logits = self.predict(stage, features, known).flatten(0, 1)
                nats = nn.functional.cross_entropy(logits, fields.flatten(), reduction="sum")
                total = total + nats / math.log(2)
                known = self.add(stage, known, fields, quantizer)
        return total


def checkerboard(h: int, w: int) -> Tensor:
    """(h, w) bool, True where row + column is even: the anchors."""
    return (torch.arange(h)[:, None] + torch.arange(w)) % 2 == 0


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity of pictures (B, C, H, W) in 0..1: a scalar, 1 if equal.

    Five scales, or as many as an 11 x 11 window fits, the weights then scaled to sum to 1. Negative
    contrasts count as 0. Source: Wang, Simoncelli and Bovik, Asilomar 2003.
    """
    side = min(x.shape[2:])
    n = max(1, min(5, int(math.log2(max(side, WINDOW) / WINDOW)) + 1))
    weights = [w / sum(MS_SSIM_WEIGHTS[:n]) for w in MS_SSIM_WEIGHTS[:n]]
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    g = torch.exp(-(at**2) / (2 * SIGMA**2))
    g = (g / g.sum()).repeat(x.shape[1], 1)

    def blur(z: Tensor) -> Tensor:
        z = conv2d(z, g[:, None, :, None], groups=z.shape[1])
        return conv2d(z, g[:, None, None, :], groups=z.shape[1])

    value = x.new_ones(())
    for scale, weight in enumerate(weights):
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        contrast = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
        if scale == n - 1:
            contrast = contrast * (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
        value = value * contrast.mean().clamp(min=1e-6) ** weight
        if scale < n - 1:
            x, y = (nn.functional.avg_pool2d(z, 2) for z in (x, y))
    return value
