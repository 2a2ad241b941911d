"""VQ-VAE, RQ-VAE and FSQ-VAE: one latent map, one bottleneck each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from polarpack import nn as pnn
from polarpack.errors import InputError

from .base import CountedBaseline, Symbols
from .layers import down, residuals, up
from .priors import HistogramPrior

REVIVE = 0.5  # vectors a step below which a codeword restarts
Bottleneck = Literal["fsq", "annealed", "adaptive", "hierarchical"]


class _Autoencoder(CountedBaseline):
    """What VQVAE and RQVAE share: a ladder of convolutions down to one latent map, and up again.

    Each entry of ``hidden_dims`` halves the size once.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self._config = config | {"hidden_dims": list(config["hidden_dims"])}
        self.in_channels, dim = config["in_channels"], config["embedding_dim"]
        hidden, patch = self._config["hidden_dims"], config["patch"]
        self.patch, self.reduction = patch, 2 ** len(hidden)
        if not hidden or patch % self.reduction:
            raise InputError(f"expected a patch that {self.reduction} divides, got {patch}")
        wide = hidden[-1]
        n_residual, residual = config["num_residual_layers"], config["residual_hidden_dim"]
        self.encoder = nn.Sequential(
            *down([self.in_channels, *hidden])[:-1],
            nn.Conv2d(wide, wide, 3, padding=1),
            residuals(wide, residual, n_residual),
            nn.Conv2d(wide, dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, wide, 3, padding=1),
            residuals(wide, residual, n_residual),
            *up([*reversed(hidden), self.in_channels]),
        )

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> latent (B, D, h, w), not quantized. InputError for other channels or
        sizes that the ladder does not divide."""
        _check_images(x, self.in_channels, self.reduction)
        return cast(Tensor, self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, D, h, w) -> (B, C, H, W)."""
        return cast(Tensor, self.decoder(z))

    def _fields_shape(self) -> tuple[int, ...]:
        side = self.patch // self.reduction
        return (side, side, len(self.prior.counts))


class VQVAE(_Autoencoder):
    """Vector-quantized autoencoder.

    ::

        x (B, C, H, W) ── encoder ── z (B, D, h, w) ── nearest codeword ── decoder ── x_hat

        loss = |x - D(q(E(x)))|^2 + |sg[E(x)] - q|^2 + beta |E(x) - sg[q]|^2

    The middle term is done by running means (see ``polarpack.nn``). Each entry of ``hidden_dims``
    halves the size once.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", 2017.

    >>> import torch
    >>> model = VQVAE(embedding_dim=8, num_embeddings=16, hidden_dims=[8, 16])
    >>> sorted(model(torch.zeros(1, 3, 32, 32)))
    ['perplexity', 'reconstructed', 'vq_loss']
    """

    kind: ClassVar[str] = "vqvae"

    def __init__(
        self,
        in_channels: int = 3,
        embedding_dim: int = 64,
        num_embeddings: int = 512,
        hidden_dims: Sequence[int] = (128, 256),
        num_residual_layers: int = 2,
        residual_hidden_dim: int = 32,
        commitment_cost: float = 0.25,
        *,
        patch: int = 128,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            embedding_dim=embedding_dim,
            num_embeddings=num_embeddings,
            hidden_dims=hidden_dims,
            num_residual_layers=num_residual_layers,
            residual_hidden_dim=residual_hidden_dim,
            commitment_cost=commitment_cost,
            patch=patch,
        )
        self.quantizer = pnn.VectorQuantizer(
            num_embeddings,
            embedding_dim,
            commitment_cost,
            layout="channels_first",
            revive_below=REVIVE,
        )
        self.prior = HistogramPrior(1, num_embeddings)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``reconstructed`` like x (B, C, H, W); ``vq_loss`` and ``perplexity``, scalars."""
        quantized, loss, perplexity = self.quantizer(self.encode(x))
        return {"reconstructed": self.decode(quantized), "vq_loss": loss, "perplexity": perplexity}

    def encode_to_indices(self, x: Tensor) -> Tensor:
        """(B, h, w) int64 codes."""
        return self.quantizer.encode(self.encode(x))

    def decode_from_indices(self, indices: Tensor) -> Tensor:
        """Pictures of (B, h, w) codes. InputError for one out of range."""
        return self.decode(self.quantizer.decode(indices))

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        out = self(x)
        error = mse_loss(out["reconstructed"], x)
        figures = {"mse": error, "perplexity": out["perplexity"]}
        return error + ERROR_SCALE * out["vq_loss"], figures

    def symbols(self, x: Tensor) -> Symbols:
        """See ``Baseline``."""
        return [self.encode_to_indices(x)[..., None]]

    def image(self, symbols: Symbols) -> Tensor:
        """See ``Baseline``."""
        return self.decode_from_indices(symbols[0][..., 0])


ERROR_SCALE = 0.1  # of the bottleneck's loss: the variance of pixels in -0.5..0.5 is about that


class RQVAE(_Autoencoder):
    """VQ-VAE with a residual quantizer: each position has ``num_quantizers`` codes, coarse to fine.

    Source: Lee et al., "Autoregressive image generation using residual quantization", CVPR 2022.
    """

    kind: ClassVar[str] = "rqvae"

    def __init__(
        self,
        in_channels: int = 3,
        embedding_dim: int = 64,
        num_embeddings: int = 512,
        hidden_dims: Sequence[int] = (128, 256),
        num_residual_layers: int = 2,
        residual_hidden_dim: int = 32,
        commitment_cost: float = 0.25,
        num_quantizers: int = 4,
        shared_codebook: bool = False,
        *,
        patch: int = 128,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            embedding_dim=embedding_dim,
            num_embeddings=num_embeddings,
            hidden_dims=hidden_dims,
            num_residual_layers=num_residual_layers,
            residual_hidden_dim=residual_hidden_dim,
            commitment_cost=commitment_cost,
            num_quantizers=num_quantizers,
            shared_codebook=shared_codebook,
            patch=patch,
        )
        self.quantizer = pnn.ResidualVQ(
            embedding_dim,
            num_embeddings,
            num_quantizers,
            shared_codebook=shared_codebook,
            commitment_cost=commitment_cost,
            revive_below=REVIVE,
        )
        self.prior = HistogramPrior(num_quantizers, num_embeddings)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """``reconstructed`` like x; ``rq_loss``; ``perplexity_list``, one scalar a level;
        ``quantized_list``, what each level adds, (B, D, h, w) each."""
        z = self.encode(x)
        quantized, codes, loss = self.quantizer(z.movedim(1, -1))
        parts = self.quantizer.decode_stages(codes).movedim(-1, 2)
        return {
            "reconstructed": self.decode(quantized.movedim(-1, 1)),
            "rq_loss": loss,
            "perplexity_list": [self._perplexity(c) for c in codes.unbind(-1)],
            "quantized_list": list(parts.unbind(0)),
        }

    def _perplexity(self, codes: Tensor) -> Tensor:
        p = torch.bincount(codes.flatten(), minlength=self.quantizer.codebook_size) / codes.numel()
        return torch.exp(-torch.special.xlogy(p, p).sum())

    def get_codes(self, x: Tensor) -> list[Tensor]:
        """One (B, h, w) int64 map of codes for each level."""
        return list(self.quantizer.encode(self.encode(x).movedim(1, -1)).unbind(-1))

    def decode_from_codes(self, codes: Sequence[Tensor]) -> Tensor:
        """Pictures of one map of codes for each level; fewer levels give a coarser picture."""
        given = torch.stack(list(codes), dim=-1)
        missing = self.quantizer.num_quantizers - given.shape[-1]
        whole = torch.nn.functional.pad(given, (0, missing), value=-1)
        return self.decode(self.quantizer.decode(whole).movedim(-1, 1))

    @torch.no_grad()
    def analyze_quantization_levels(self, x: Tensor) -> dict[str, list[float]]:
        """With 1, 2, .. levels: ``latent_mse``, ``image_mse``, ``psnr`` in dB of x in a range of 1,
        and each level's ``perplexity``."""
        z, codes = self.encode(x), self.get_codes(x)
        sums = self.quantizer.decode_stages(torch.stack(codes, dim=-1)).cumsum(0).movedim(-1, 2)
        latent = [float(mse_loss(part, z)) for part in sums]
        image = [float(mse_loss(self.decode(part), x)) for part in sums]
        return {
            "latent_mse": latent,
            "image_mse": image,
            "psnr": [float(-10 * torch.log10(torch.tensor(max(e, 1e-12)))) for e in image],
            "perplexity": [float(self._perplexity(c)) for c in codes],
        }

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        out = self(x)
        error = mse_loss(out["reconstructed"], x)
        mean = torch.stack(out["perplexity_list"]).mean()
        return error + ERROR_SCALE * out["rq_loss"], {"mse": error, "perplexity": mean}

    def symbols(self, x: Tensor) -> Symbols:
        """See ``Baseline``."""
        return [self.quantizer.encode(self.encode(x).movedim(1, -1))]

    def image(self, symbols: Symbols) -> Tensor:
        """See ``Baseline``."""
        return self.decode(self.quantizer.decode(symbols[0]).movedim(-1, 1))


class FSQVAE(CountedBaseline):
    """A 32 x 32 picture in one vector of ``dim`` numbers of ``levels`` values each.

    Encoder: four strided convolutions with batch norm and ReLU, then a linear map to the latent;
    decoder: a linear map to (hidden, 2, 2) and four transposed convolutions. Binary cross-entropy
    of the pixels, as if each were a probability, summed over a picture.

    Parameters
    ----------
    levels, dim : of the latent. bottleneck : "fsq" (Mentzer et al. 2023), or the variants of
        ``polarpack.nn``: "annealed" (``set_progress`` follows training), "adaptive" (up to
        ``levels``), "hierarchical" (two of them).
    hidden : widths of the four convolutions.
    """

    kind: ClassVar[str] = "fsqvae"

    def __init__(
        self,
        levels: int = 8,
        dim: int = 64,
        bottleneck: Bottleneck = "fsq",
        hidden: Sequence[int] = (32, 64, 128, 256),
    ) -> None:
        super().__init__()
        if len(hidden) != 4:
            raise InputError(f"expected four widths, got {list(hidden)}")
        self.patch = 32
        self._config = {
            "levels": levels,
            "dim": dim,
            "bottleneck": bottleneck,
            "hidden": list(hidden),
        }
        layers: list[nn.Module] = []
        for before, after in zip([3, *hidden], hidden, strict=False):
            convolution = nn.Conv2d(before, after, 4, stride=2, padding=1)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * hidden[-1], dim))
        self.widen = nn.Linear(dim, 4 * hidden[-1])
        self.decoder = nn.Sequential(nn.ReLU(), *up([*reversed(hidden), 3]))
        self.quantizer = _bottleneck(bottleneck, levels, dim)
        sizes = self._final_sizes()
        self.prior = HistogramPrior(len(sizes), max(sizes))

    def _final_sizes(self) -> list[int]:
        if isinstance(self.quantizer, pnn.AnnealedFSQ):
            self.quantizer.set_progress(1.0)
            sizes = self.quantizer.alphabet_sizes
            self.quantizer.set_progress(0.0)
            return sizes
        return list(self.quantizer.alphabet_sizes)

    def set_progress(self, fraction: float) -> None:
        """Tell an annealed bottleneck how far training is, 0..1."""
        if isinstance(self.quantizer, pnn.AnnealedFSQ):
            self.quantizer.set_progress(fraction)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``reconstructed`` (B, 3, 32, 32) in 0..1, its ``logits``, ``codes`` and ``loss`` of the
        bottleneck, for x in 0..1."""
        _check_images(x, 3, 32, exactly=True)
        quantized, codes, loss = self.quantizer(self.encoder(x))
        logits = self.decode_logits(quantized)
        return {
            "reconstructed": torch.sigmoid(logits),
            "logits": logits,
            "codes": codes,
            "loss": loss,
        }

    def decode_logits(self, z: Tensor) -> Tensor:
        """Latents (B, dim) -> pixel logits (B, 3, 32, 32)."""
        return cast(Tensor, self.decoder(self.widen(z).view(len(z), -1, 2, 2)))

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Baseline``."""
        target = (x + 0.5).clamp(0, 1)
        out = self(target)
        nats = binary_cross_entropy_with_logits(out["logits"], target, reduction="sum") / len(x)
        error = mse_loss(out["reconstructed"], target)
        return nats + BOTTLENECK_SCALE * out["loss"], {"mse": error, "bce": nats}

    def symbols(self, x: Tensor) -> Symbols:
        """See ``Baseline``."""
        return [self.quantizer.encode(self.encoder((x + 0.5).clamp(0, 1)))]

    def image(self, symbols: Symbols) -> Tensor:
        """See ``Baseline``."""
        return torch.sigmoid(self.decode_logits(self.quantizer.decode(symbols[0]))) - 0.5

    def _fields_shape(self) -> tuple[int, ...]:
        return (len(self.prior.counts),)


# Of the bottleneck's loss, beside nats summed over a picture. With much more of it an annealed
# latent is driven to where its tanh is flat, and little but signs is left.
BOTTLENECK_SCALE = 0.1


def _bottleneck(kind: str, levels: int, dim: int) -> Any:
    if kind == "fsq":
        return pnn.FSQ(levels, dim)
    if kind == "annealed":
        return pnn.AnnealedFSQ(levels, dim)
    if kind == "adaptive":
        return pnn.AdaptiveFSQ((2, levels), dim)
    if kind == "hierarchical":
        return pnn.HierarchicalFSQ(levels, dim, 2)
    raise InputError(f"expected bottleneck fsq, annealed, adaptive or hierarchical, got {kind!r}")


def _check_images(x: Tensor, channels: int, divisor: int, *, exactly: bool = False) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"expected pictures as a float tensor, got {kind}")
    fits = x.ndim == 4 and x.shape[1] == channels
    if fits and exactly:
        fits = tuple(x.shape[2:]) == (divisor, divisor)
    elif fits:
        fits = x.shape[2] % divisor == 0 and x.shape[3] % divisor == 0 and 0 not in x.shape
    if not fits:
        size = f"{divisor}, {divisor}" if exactly else f"{divisor} m, {divisor} n"
        raise InputError(f"expected pictures (B, {channels}, {size}), got {tuple(x.shape)}")
