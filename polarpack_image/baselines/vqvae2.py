"""VQ-VAE-2 as an image codec: two latent maps, the upper one the hyperprior of the lower one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

from polarpack import nn as pnn
from polarpack.errors import InputError

from .autoencoders import ERROR_SCALE, REVIVE
from .base import Baseline, Symbols
from .coding import Coder
from .layers import SpatialAttention, down, residuals, up
from .priors import (
    BlockTransformer,
    CodeEmbedding,
    Feed,
    HistogramPrior,
    PixelSNAIL,
    cross_entropy_bits,
)

PriorKind = Literal["pixelsnail", "transformer", "histogram"]
# codewords, latent dimension, what the entropy model is fed
VARIANTS: dict[int, tuple[int, int, Feed]] = {
    1: (512, 64, "one_hot"),
    2: (2048, 256, "vectors"),
    3: (512, 64, "vectors"),
}
SIDE_FIELDS, SIDE_LEVELS = 8, 17


class VQVAE2(Baseline):
    """Two levels of vector quantization.

    ::

        x ── 4x down ── b ────────────────┬── [b, up t_hat] ── VQ ── bottom codes (p/4, p/4)
                        └─ 2x down ── VQ ─┴── t_hat            top codes (p/8, p/8)
        bottom, up t_hat ── decoder ── x_hat

        rate:  p(top), autoregressive;  p(bottom | top), autoregressive: top is side information
               that also draws, as a hyperprior's is side information that does not

    Codebooks are learned by running means, the autoencoder first, then the entropy models.

    Parameters
    ----------
    variant : 1: 512 codewords of 64, one-hot codes fed to the entropy model; 2: 2048 of 256, fed as
        vectors; 3: as 1, fed as vectors.
    prior : "pixelsnail", "transformer" (block-autoregressive), or "histogram" (order 0).
    channels : width of the autoencoder; prior_channels : of the entropy models.
    adaptive : adapt the codewords to each patch: 8 numbers of 17 levels (FSQ) are sent for it, from
        which a linear map makes a scale and a shift of every latent channel. "Most data as
        quantized vectors, plus a little continuous side data."
    patch : side of the patches in pixels, a multiple of 8.

    Source: Razavi, van den Oord and Vinyals, "Generating diverse high-fidelity images with
    VQ-VAE-2", 2019.
    """

    kind: ClassVar[str] = "vqvae2"

    def __init__(
        self,
        variant: int = 1,
        prior: PriorKind = "pixelsnail",
        channels: int = 64,
        prior_channels: int = 64,
        adaptive: bool = False,
        patch: int = 128,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"expected variant 1, 2 or 3, got {variant!r}")
        if prior not in ("pixelsnail", "transformer", "histogram"):
            raise InputError(f"expected prior pixelsnail, transformer or histogram, got {prior!r}")
        if patch % 8:
            raise InputError(f"expected a patch that 8 divides, got {patch}")
        size, dim, feed = VARIANTS[variant]
        self._config = {
            "variant": variant,
            "prior": prior,
            "channels": channels,
            "prior_channels": prior_channels,
            "adaptive": adaptive,
            "patch": patch,
        }
        self.patch, self.adaptive, self.size = patch, adaptive, size
        c, hidden = channels, max(8, channels // 2)
        self.encode_bottom = nn.Sequential(
            *down([3, hidden, c]), nn.Conv2d(c, c, 3, padding=1), residuals(c, hidden, 2)
        )
        self.encode_top = nn.Sequential(
            *down([c, c]), nn.Conv2d(c, c, 3, padding=1), residuals(c, hidden, 2)
        )
        self.to_top = nn.Sequential(SpatialAttention(c), nn.Conv2d(c, dim, 1))
        self.from_top = nn.Sequential(
            nn.Conv2d(dim, c, 3, padding=1), residuals(c, hidden, 1), *up([c, c])
        )
        self.to_bottom = nn.Conv2d(2 * c, dim, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim + c, c, 3, padding=1), residuals(c, hidden, 2), *up([c, hidden, 3])
        )
        options: dict[str, Any] = {"layout": "channels_first", "revive_below": REVIVE}
        self.quantize_top = pnn.VectorQuantizer(size, dim, **options)
        self.quantize_bottom = pnn.VectorQuantizer(size, dim, **options)
        if adaptive:
            self.to_side = nn.Linear(c, SIDE_FIELDS)
            self.side = pnn.FSQ(SIDE_LEVELS, SIDE_FIELDS)
            self.from_side = nn.Linear(SIDE_FIELDS, 4 * dim)
            nn.init.zeros_(self.from_side.weight)
            nn.init.zeros_(self.from_side.bias)
            self.side_prior = HistogramPrior(SIDE_FIELDS, SIDE_LEVELS)
        self._make_priors(prior, feed, prior_channels)

    def _make_priors(self, prior: str, feed: Feed, width: int) -> None:
        words = self.quantize_top.embedding, self.quantize_bottom.embedding
        if prior == "histogram":
            self.prior_top: nn.Module = HistogramPrior(1, self.size)
            self.prior_bottom: nn.Module = HistogramPrior(1, self.size)
            return
        if prior == "pixelsnail":
            self.prior_top = PixelSNAIL(words[0], channels=width, feed=feed)
            self.prior_bottom = PixelSNAIL(words[1], channels=width, condition=width, feed=feed)
        else:
            self.prior_top = BlockTransformer(words[0], width=2 * width, feed=feed)
            self.prior_bottom = BlockTransformer(
                words[1], width=2 * width, condition=width, feed=feed
            )
        self.condition_embed = CodeEmbedding(words[0], width, feed)
        self.condition_net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), residuals(width, width, 2)
        )

    # -------------------------------------------------------------------------- the autoencoder

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``reconstructed`` like x (B, 3, H, W); ``vq_loss``; ``perplexity_top``, ``_bottom``."""
        b = self.encode_bottom(x)
        t = self.encode_top(b)
        top, loss_top, perplexity_top = self.quantize_top(self.to_top(t))
        side = self.side(self._side_of(b))[0] if self.adaptive else None
        above = self.from_top(self._adapt(top, side, 0))
        joined = self.to_bottom(torch.cat([b, above], dim=1))
        bottom, loss_bottom, perplexity_bottom = self.quantize_bottom(joined)
        x_hat = self.decoder(torch.cat([self._adapt(bottom, side, 1), above], dim=1))
        return {
            "reconstructed": x_hat,
            "vq_loss": loss_top + loss_bottom,
            "perplexity_top": perplexity_top,
            "perplexity_bottom": perplexity_bottom,
        }

    def _side_of(self, b: Tensor) -> Tensor:
        return cast(Tensor, self.to_side(b.mean(dim=(2, 3))))

    def _adapt(self, q: Tensor, side: Tensor | None, which: int) -> Tensor:
        if side is None:
            return q
        scale, shift = self.from_side(side).chunk(2, dim=1)[which].chunk(2, dim=1)
        return cast(Tensor, q * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        out = self(x)
        error = mse_loss(out["reconstructed"], x)
        figures = {
            "mse": error,
            "perplexity_top": out["perplexity_top"],
            "perplexity_bottom": out["perplexity_bottom"],
        }
        return error + ERROR_SCALE * out["vq_loss"], figures

    def symbols(self, x: Tensor) -> Symbols:
        """Top codes (B, p/8, p/8), bottom codes (B, p/4, p/4), and side data (B, 8) if adaptive."""
        b = self.encode_bottom(x)
        top = self.quantize_top.encode(self.to_top(self.encode_top(b)))
        side = [self.side.encode(self._side_of(b))] if self.adaptive else []
        above = self._above(top, side)
        bottom = self.quantize_bottom.encode(self.to_bottom(torch.cat([b, above], dim=1)))
        return [top, bottom, *side]

    def _above(self, top: Tensor, side: Symbols) -> Tensor:
        adapt = self.side.decode(side[0]) if side else None
        return cast(Tensor, self.from_top(self._adapt(self.quantize_top.decode(top), adapt, 0)))

    def image(self, symbols: Symbols) -> Tensor:
        """See ``Baseline``."""
        top, bottom, *side = symbols
        adapt = self.side.decode(side[0]) if side else None
        words = self._adapt(self.quantize_bottom.decode(bottom), adapt, 1)
        return cast(Tensor, self.decoder(torch.cat([words, self._above(top, side)], dim=1)))

    # -------------------------------------------------------------------------- the entropy model

    def start_prior(self) -> None:
        """Hand the codebooks, now final, to the entropy models that are fed vectors."""
        pairs: list[tuple[Any, Tensor]] = []
        if not isinstance(self.prior_top, HistogramPrior):
            top, bottom = self.quantize_top.embedding, self.quantize_bottom.embedding
            pairs = [
                (cast(Any, self.prior_top).embed, top),
                (cast(Any, self.prior_bottom).embed, bottom),
                (self.condition_embed, top),
            ]
        with torch.no_grad():
            for embed, words in pairs:
                # in units of their spread, as a network likes its inputs
                embed.words.copy_(words / words.std().clamp(min=1e-6))

    def prior_parameters(self) -> list[nn.Parameter]:
        """See ``Baseline``."""
        if isinstance(self.prior_top, HistogramPrior):
            return []
        parts = (self.prior_top, self.prior_bottom, self.condition_embed, self.condition_net)
        return [p for part in parts for p in part.parameters()]

    def learn_counts(self, symbols: Symbols) -> None:
        """See ``Baseline``."""
        for prior, codes in ((self.prior_top, symbols[0]), (self.prior_bottom, symbols[1])):
            if isinstance(prior, HistogramPrior):
                prior.learn(codes[..., None])
        if self.adaptive:
            self.side_prior.learn(symbols[2])

    def _condition(self, top: Tensor) -> Tensor:
        """Features of the top codes at the bottom's size: (B, C, p/4, p/4)."""
        e = self.condition_embed(top).permute(0, 3, 1, 2)
        return interpolate(self.condition_net(e), scale_factor=2, mode="nearest")

    def prior_loss(self, symbols: Symbols, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        top, bottom = symbols[:2]
        bits_top = cross_entropy_bits(cast(Any, self.prior_top).logits(top), top)
        condition = self._condition(top)
        logits = cast(Any, self.prior_bottom).logits(bottom, condition)
        bits_bottom = cross_entropy_bits(logits, bottom)
        bpp = (bits_top * top[0].numel() + bits_bottom * bottom[0].numel()) / self.patch**2
        figures = {"bpp": bpp, "bits_top": bits_top, "bits_bottom": bits_bottom}
        return bits_top + bits_bottom, figures

    @torch.inference_mode()
    def run(self, coder: Coder, n: int, symbols: Symbols | None) -> Symbols:
        """See ``Baseline``."""
        given: list[Tensor | None] = [None] * 3
        if symbols is not None:
            given[: len(symbols)] = symbols
        side = []
        if self.adaptive:
            side = [self.side_prior.run(coder, n, given[2])]
        half, whole = self.patch // 8, self.patch // 4
        if isinstance(self.prior_top, HistogramPrior):
            top = self.prior_top.run(coder, n * half * half, given[0]).view(n, half, half)
            prior = cast(HistogramPrior, self.prior_bottom)
            bottom = prior.run(coder, n * whole * whole, given[1]).view(n, whole, whole)
        else:
            prior_top, prior_bottom = cast(Any, self.prior_top), cast(Any, self.prior_bottom)
            top = prior_top.run(coder, (n, half, half), None, given[0])
            bottom = prior_bottom.run(coder, (n, whole, whole), self._condition(top), given[1])
        return [top, bottom, *side]
