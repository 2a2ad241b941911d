"""The codec's networks in torch: transforms g_a and g_s, hyper-transforms h_a and h_s, contexts.

Names are those of the literature: x picture, y latent, z hyper-latent, ``_hat`` what the decoder
has. Training needs this module; so does a decoder of a set of weights with convolutional
synthesis. The entropy networks run as integers in ``exact``, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polarpack.errors import InputError

from .exact import (
    EXACT_FLOAT32,
    FEATURE_BITS,
    LEVELS_PER_OCTAVE,
    MAX_FEATURE,
    IntegerLayer,
    companding_thresholds,
    stacked,
)
from .exact import PostFilter as ExactPostFilter
from .lapped import BLOCK, LappedKernels

HEAD = 8
ACTIVATION_BITS = 5  # fraction of an activation behind a ReLU, 0..255 / 32
WEIGHT_LIMIT = 127
MAX_WEIGHT_BITS = 12
MEAN_LIMIT = 1 << 15


def mirror(x: Tensor, margin: int) -> Tensor:
    """Continue (n, c, h, w) on all sides by its mirror image, edge pixels repeated (which torch's
    own "reflect" padding does not do)."""
    x = torch.cat([x[:, :, :margin].flip(2), x, x[:, :, -margin:].flip(2)], 2)
    return torch.cat([x[..., :margin].flip(3), x, x[..., -margin:].flip(3)], 3)


def repeated(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Continue (n, c, h, w) by its edges, as torch's "replicate" padding does, whose derivative
    torch.compile (2.13) gets wrong for channels-last tensors."""
    if top or bottom:
        x = torch.cat([x[:, :, :1]] * top + [x] + [x[:, :, -1:]] * bottom, 2)
    if left or right:
        x = torch.cat([x[..., :1]] * left + [x] + [x[..., -1:]] * right, 3)
    return x


class LappedTransform(nn.Module):
    """Linear analysis and synthesis with overlapping atoms of definite parity (see ``lapped``).

    ::

        x (n, 3, H, W) ── mirror, conv k x k, stride 8 ──> y (n, C, H/8, W/8)
        x_hat          <── transposed conv, stride 8 ──── y_hat, one mirrored ring around

    Kernels are averaged over the flips in ``kernels`` so that the parity holds; synthesis atoms are
    scaled to norm 1, so that an error in y_hat costs as much in the picture whatever its channel,
    and one quantizer step serves all. Where ``tied``, analysis is the adjoint of synthesis: the
    error of the reconstruction then keeps both near an orthonormal transform, for which the squared
    errors of coefficients add up to the picture's, as a rate-distortion search takes for granted.
    """

    parity: Tensor

    def __init__(self, start: LappedKernels, tied: bool = False):
        super().__init__()
        self.tied = tied
        self.g_a = nn.Parameter(torch.from_numpy(start.analysis).permute(3, 2, 0, 1).contiguous())
        self.g_s = nn.Parameter(torch.from_numpy(start.synthesis).permute(3, 2, 0, 1).contiguous())
        self.register_buffer("parity", torch.from_numpy(start.parity).float())
        self.margin = (self.g_a.shape[2] - BLOCK) // 2

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Analysis and synthesis (C, 3, k, k) as they are applied."""
        vertical, horizontal = (sign[:, None, None, None] for sign in self.parity.unbind(1))

        def symmetric(w: Tensor) -> Tensor:
            w = 0.5 * (w + vertical * w.flip(2))
            return 0.5 * (w + horizontal * w.flip(3))

        g_s = symmetric(self.g_s)
        norm = g_s.square().sum((1, 2, 3), keepdim=True).sqrt()
        g_s = g_s / norm.clamp_min(1e-6)  # channels may be empty
        return g_s if self.tied else symmetric(self.g_a), g_s

    def analysis(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) in 0..255, sides multiples of 8, to y (n, C, H/8, W/8)."""
        return F.conv2d(mirror(x - 128.0, self.margin), self.kernels()[0], stride=BLOCK)

    def synthesis(self, y_hat: Tensor) -> Tensor:
        """The way back; not clamped."""
        vertical, horizontal = (sign[:, None, None] for sign in self.parity.unbind(1))
        y = torch.cat([y_hat[:, :, :1] * vertical, y_hat, y_hat[:, :, -1:] * vertical], 2)
        y = torch.cat([y[..., :1] * horizontal, y, y[..., -1:] * horizontal], 3)
        return F.conv_transpose2d(
            y, self.kernels()[1], stride=BLOCK, padding=self.margin + BLOCK
        ).add(128.0)

    def export(self) -> LappedKernels:
        """As numpy arrays, layout as in ``LappedKernels``."""
        g_a, g_s = (w.detach().permute(2, 3, 1, 0).contiguous().cpu() for w in self.kernels())
        parity = self.parity.cpu().numpy().astype("int8")
        return LappedKernels(g_a.float().numpy(), g_s.float().numpy(), parity)


def rounded(x: Tensor) -> Tensor:
    """Halves up, as integer layers round; the derivative is taken as 1."""
    return x + ((x + 0.5).floor() - x).detach()


class IntegerConv(nn.Module):
    """A convolution trained to become an ``exact.IntegerLayer``.

    Weights are a power of two times integers up to 127, one power for each output channel, so that
    requantization is a shift. With ``integer`` set, the forward pass rounds weights and outputs
    exactly as the integer layer does (derivatives pass straight through); without, it is an
    ordinary convolution with the same clipping, which learns faster.

    n_in, n_out, k: channels and odd kernel size. in_bits, out_bits: fraction of inputs and outputs.
    low, high: range of the output in its own integers. largest: bound of the input's integers.
    precise: compute in float32 also where bfloat16 is in force, whose 8 bits are few for a mean.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        k: int,
        *,
        in_bits: int,
        largest: int,
        out_bits: int | Tensor = ACTIVATION_BITS,
        low: int = 0,
        high: int = 255,
        precise: bool = False,
    ):
        super().__init__()
        self.precise = precise
        self.conv = nn.Conv2d(n_in, n_out, k)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        out = torch.as_tensor(out_bits, dtype=torch.float32).expand(n_out).clone()
        self.register_buffer("out_bits", out)
        self.in_bits, self.largest, self.low, self.high = in_bits, largest, low, high
        self.margin = k // 2
        self.integer = False

    out_bits: Tensor

    def weight_bits(self) -> Tensor:
        """Fraction bits of each output channel's weights: as many as 127 allows, as the shift to
        the output's fraction needs, and as keeps sums exact."""
        weight = self.conv.weight.detach()
        top = weight.abs().amax((1, 2, 3)).clamp_min(1e-9)
        bits = (WEIGHT_LIMIT / top).log2().floor()
        # half of the range is left for the bias, and for rounding each weight up
        room = 0.45 * EXACT_FLOAT32 / self.largest
        total = weight.abs().sum((1, 2, 3)).clamp_min(1e-9)
        bits = torch.minimum(bits, (room / total).log2().floor()).clamp_max(MAX_WEIGHT_BITS)
        return torch.maximum(bits, self.out_bits - self.in_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs are integers / 2**in_bits, outputs integers / 2**out_bits (where ``integer``)."""
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        if self.margin:
            x = repeated(x, *(self.margin,) * 4)
        scale = self.out_bits.exp2()[:, None, None]
        if not self.integer:
            if self.precise:
                with torch.autocast(x.device.type, enabled=False):
                    y = F.conv2d(x.float(), weight, bias)
            else:
                y = F.conv2d(x, weight, bias)
            return torch.minimum(torch.maximum(y, self.low / scale), self.high / scale)
        unit = self.weight_bits().exp2()
        weight = rounded(weight * unit[:, None, None, None]) / unit[:, None, None, None]
        finest = unit * 2.0**self.in_bits
        bias = rounded(bias * finest) / finest
        with torch.autocast(x.device.type, enabled=False):
            y = rounded(F.conv2d(x.float(), weight.float(), bias.float()) * scale)
        return y.clamp(self.low, self.high) / scale

    @torch.no_grad()
    def export(self) -> IntegerLayer:
        """The integer layer; raises FormatError where its sums would not be exact."""
        bits = self.weight_bits()
        unit = bits.exp2()
        weight = (self.conv.weight * unit[:, None, None, None] + 0.5).floor()
        assert self.conv.bias is not None
        bias = (self.conv.bias * unit * 2.0**self.in_bits + 0.5).floor()
        shift = bits + self.in_bits - self.out_bits
        return IntegerLayer(
            weight.permute(2, 3, 1, 0)
            .contiguous()
            .cpu()
            .numpy()
            .astype(np.int8 if weight.abs().max() <= WEIGHT_LIMIT else np.int16),
            bias.cpu().numpy().astype(np.int32),
            shift.cpu().numpy().astype(np.uint8),
            self.low,
            self.high,
            self.largest,
        )


def exported(module: nn.Module) -> list[IntegerLayer]:
    """The integer layers of all integer convolutions inside ``module``, in order."""
    return [part.export() for part in module.modules() if isinstance(part, IntegerConv)]


def set_integer(module: nn.Module, integer: bool) -> None:
    """Whether the integer convolutions inside ``module`` round."""
    for part in module.modules():
        if isinstance(part, IntegerConv):
            part.integer = integer


def companded(y: Tensor, integer: bool) -> Tensor:
    """Features of coefficients in steps, and of their magnitudes: (n, 2 C, h, w); in eighths."""
    size = (1 + 2 * y.abs()).log2().clamp_max(MAX_FEATURE / 2**FEATURE_BITS)
    if integer:
        size = rounded(size * 2**FEATURE_BITS) / 2**FEATURE_BITS
    return torch.cat([size * y.sign(), size], 1)


class ContextModel(nn.Module):
    """Laws of the latent, head group by head group: h_s and the context networks.

    ::

        z_hat ─ 3x3 ─ shuffle 2 ─ 3x3 ─ shuffle 2 ──┐
        y_hat of the groups before ─ companded ─────┴─ 3x3 ─ 3x3 ─ 1x1 ── mean, log2 scale

    starts : first head of each group, then the number of heads. Heads before ``starts[0]``, which
        nothing precedes, have no law here where there is no hyper-latent.
    n_hyper : channels of z, or 0.
    means : whether the network predicts them; else they are zero, and left to the coder's own
        linear taps. Both together do not add up: where most coefficients are zero, what is decoded
        *is* the mean, and an error of one goes into the other.
    """

    def __init__(self, starts: Sequence[int], width: int, n_hyper: int = 0, *, means: bool = True):
        super().__init__()
        self.starts, self.n_hyper, self.means = tuple(starts), n_hyper, means
        groups = zip(self.starts[:-1], self.starts[1:], strict=True)
        inside: dict[str, Any] = {"in_bits": ACTIVATION_BITS, "largest": 255}
        feature: dict[str, Any] = {
            "in_bits": FEATURE_BITS,
            "largest": 255 if n_hyper else MAX_FEATURE,
        }
        self.h_s = nn.ModuleList()
        self.groups = nn.ModuleList()
        if n_hyper:
            self.h_s.append(IntegerConv(n_hyper, 4 * width, 3, in_bits=0, largest=MAX_FEATURE))
            # the second one's outputs stand beside companded coefficients and share their fraction
            self.h_s.append(IntegerConv(width, 4 * width, 3, out_bits=FEATURE_BITS, **inside))
        for first, after in groups:
            n = HEAD * (after - first)
            out_bits = torch.tensor([4.0] * n * means + [np.log2(LEVELS_PER_OCTAVE)] * n)
            n_in = 2 * HEAD * first + 1 + (width if n_hyper else 0)
            last_layer = IntegerConv(
                width,
                len(out_bits),
                1,
                out_bits=out_bits,
                low=-MEAN_LIMIT,
                high=MEAN_LIMIT,
                precise=True,
                **inside,
            )
            with torch.no_grad():
                last_layer.conv.weight.mul_(0.1)
            self.groups.append(
                nn.Sequential(
                    IntegerConv(n_in, width, 3, **feature),
                    IntegerConv(width, width, 3, **inside),
                    last_layer,
                )
            )

    @property
    def integer(self) -> bool:
        """Whether the layers round."""
        return next(part.integer for part in self.modules() if isinstance(part, IntegerConv))

    def hyper_features(self, z_hat: Tensor) -> Tensor:
        """(n, n_z, h, w) to (n, width, 4 h, 4 w)."""
        x = z_hat.clamp(-MAX_FEATURE, MAX_FEATURE)
        for layer in self.h_s:
            x = F.pixel_shuffle(layer(x), 2)
        return x

    def forward(
        self, y_hat: Tensor, log_step: Tensor, z_hat: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means and log2 scales, in steps, of the channels from ``8 starts[0]`` on.

        y_hat (n, C, h, w) in steps, log_step (n,) log2 of the step in grey levels.
        """
        seen = companded(y_hat[:, : HEAD * self.starts[-2]], self.integer)
        n, both, rows, columns = seen.shape
        half = both // 2
        quality = log_step.clamp(0, MAX_FEATURE / 8)
        quality = rounded(quality * 8) / 8
        constant = quality[:, None, None, None].expand(n, 1, rows, columns)
        hyper = [] if z_hat is None else [self.hyper_features(z_hat)]
        means, scales = [], []
        for first, group in zip(self.starts, self.groups, strict=False):
            known = HEAD * first
            parts = [seen[:, :known], seen[:, half : half + known], constant, *hyper]
            scale = group(torch.cat(parts, 1))
            mean = torch.zeros_like(scale)
            if self.means:
                mean, scale = scale.chunk(2, 1)
            means.append(mean)
            scales.append(scale)
        return torch.cat(means, 1), torch.cat(scales, 1)

    def export(self, prefix: str = "net") -> dict[str, npt.NDArray[Any]]:
        """Arrays of an ``exact.ContextNetwork``."""
        arrays: dict[str, npt.NDArray[Any]] = {
            f"{prefix}.starts": np.array(self.starts, np.int32),
            f"{prefix}.thresholds": companding_thresholds(),
        }
        for i, layer in enumerate(self.h_s):
            assert isinstance(layer, IntegerConv)
            arrays |= layer.export().arrays(f"{prefix}.hyper.{i}")
        for i, group in enumerate(self.groups):
            arrays |= stacked(exported(group), f"{prefix}.{i}")
        return arrays


class PostFilter(nn.Module):
    """Trains ``exact.PostFilter``: ``depth`` convolutions on 4 x 4 pixels, in units of
    the step.

    ::

        x_hat ─ (x - 128) / step ─ unshuffle 4 ─ 3x3 ─ .. ─ 3x3 ─ shuffle 4 ─ * step ─ + x_hat
    """

    GAIN_BITS = 8  # fraction of the change in steps

    def __init__(self, width: int = 64, depth: int = 4):
        super().__init__()
        patch = 3 * ExactPostFilter.FACTOR**2
        in_bits, largest = ExactPostFilter.INPUT_BITS, ExactPostFilter.LARGEST
        inside: dict[str, Any] = {"in_bits": ACTIVATION_BITS, "largest": 255}
        last = IntegerConv(width, patch, 3, out_bits=self.GAIN_BITS, low=-1024, high=1023, **inside)
        nn.init.zeros_(last.conv.weight)
        first = IntegerConv(patch + 1, width, 3, in_bits=in_bits, largest=largest)
        with torch.no_grad():  # what tells noise from texture is contrast, not brightness
            first.conv.weight -= first.conv.weight.mean((1, 2, 3), keepdim=True)
        self.layers = nn.Sequential(
            first,
            *(IntegerConv(width, width, 3, **inside) for _ in range(depth - 2)),
            last,
        )

    def forward(self, x_hat: Tensor, log_step: Tensor) -> Tensor:
        """(n, 3, H, W) decoded pictures, not rounded, and log2 of their steps (n,): filtered."""
        step = log_step.exp2()[:, None, None, None]
        bound = ExactPostFilter.LARGEST / 2**ExactPostFilter.INPUT_BITS
        u = ((x_hat - 128.0) / step).clamp(-bound, bound)
        u = F.pixel_unshuffle(u, ExactPostFilter.FACTOR)
        if self.layers[0].integer:
            u = rounded(u * 2**ExactPostFilter.INPUT_BITS) / 2**ExactPostFilter.INPUT_BITS
        # the step's feature is eighths in integers of in_bits = 6: log2(step) / 8
        feature = rounded(log_step.clamp(0, MAX_FEATURE / 8) * 8) / 2**ExactPostFilter.INPUT_BITS
        constant = feature[:, None, None, None].expand(len(u), 1, *u.shape[2:])
        change = self.layers(torch.cat([u, constant], 1))
        return x_hat + step * F.pixel_shuffle(change, ExactPostFilter.FACTOR)

    def export(self, prefix: str = "post") -> dict[str, npt.NDArray[Any]]:
        """Arrays of an ``exact.PostFilter``."""
        arrays = stacked(exported(self.layers), prefix)
        arrays[f"{prefix}.gain_bits"] = np.array(self.GAIN_BITS, np.int32)
        return arrays


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a ``Codec``.

    channels, stride : of the latent y; 192 at stride 8 (all of the lapped transform), or fewer
        than 768 at stride 16.
    width : channels of the residual blocks at 1/8 of the picture's size.
    analysis_blocks, synthesis_blocks : residual blocks of two dense 3 x 3 convolutions each. Zero
        leave the linear part alone.
    hyper : channels of z, at 1/4 of y's size, or 0.
    context_width, starts : see ``ContextModel``.
    """

    channels: int = 320
    stride: int = 16
    width: int = 192
    analysis_blocks: int = 6
    synthesis_blocks: int = 4
    hyper: int = 128
    context_width: int = 128
    starts: tuple[int, ...] = (0, 1, 3, 8, 20, 40)

    def __post_init__(self) -> None:
        merged = (self.stride // BLOCK) ** 2
        if self.stride not in (8, 16) or not 0 < self.channels <= 192 * merged:
            raise InputError(
                f"expected stride 8 with 192 or 16 with up to 768 channels, got {self.stride} "
                f"with {self.channels}"
            )
        if self.channels % HEAD or self.starts[-1] * HEAD != self.channels:
            raise InputError(f"starts {self.starts} do not end at {self.channels} / {HEAD} heads")
        if self.starts[0] == 0 and not self.hyper:
            raise InputError("the first heads can only be predicted from a hyper-latent")


PRESETS = {
    "full": CodecConfig(),
    # what two CPU cores can train
    "small": CodecConfig(192, 8, 96, 1, 0, 32, 64, (0, 1, 2, 4, 8, 24)),
    # for tests
    "tiny": CodecConfig(64, 16, 16, 1, 1, 8, 16, (0, 2, 8)),
}
N_GAINS = 8  # knots of the gains over log2 of the step
GAIN_STEPS = (2.0, 8.0)  # log2 of the step at the first and the last knot
TEXTURE = 32.0  # grey levels that count as one inside the networks


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), dense 3 x 3: on CPUs twice the speed per multiplication of
    depthwise blocks. Starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to the same."""
        out: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return out


class Trunk(nn.Module):
    """Residual blocks between two convolutions, told the quality by a gain and an offset for each
    channel. The last convolution starts at zero: what stands beside it is what training starts
    from."""

    def __init__(self, n_in: int, width: int, blocks: int, n_out: int):
        super().__init__()
        self.enter = nn.Conv2d(n_in, width, 3, padding=1)
        self.quality = nn.Linear(2, 2 * width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.leave = nn.Conv2d(width, n_out, 3, padding=1)
        with torch.no_grad():
            for part in (*self.quality.parameters(), *self.leave.parameters()):
                part.zero_()

    def forward(self, x: Tensor, log_step: Tensor) -> Tensor:
        """(n, n_in, h, w) and log2 of the step (n,) to (n, n_out, h, w)."""
        at = (log_step - 5.0) / 2.0
        gain, offset = self.quality(torch.stack([at, at * at], 1))[..., None, None].chunk(2, 1)
        x = self.enter(x) * (1 + gain) + offset
        out: Tensor = self.leave(F.relu(self.blocks(x)))
        return out


class HyperAnalysis(nn.Module):
    """h_a: companded y to z, at a quarter of its size; the encoder's alone, in floating point."""

    def __init__(self, channels: int, width: int, n_hyper: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1),
            nn.ReLU(),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * width, n_hyper, 1),
        )

    def forward(self, y: Tensor) -> Tensor:
        """y (n, C, h, w) in steps, any size, to z (n, n_z, ceil(h / 4), ceil(w / 4))."""
        bottom, right = -y.shape[2] % 4, -y.shape[3] % 4
        out: Tensor = self.layers(companded(repeated(y, 0, bottom, 0, right), False))
        return out


class Codec(nn.Module):
    """The learned codec: analysis, synthesis, hyperprior, context, gains.

    ::

        x ─┬─ lapped, stride 8 ─ (merge 2 x 2 to C) ─┬─ + ─ y * gain / step ─ quantize ─ y_hat
           └─ unshuffle 8 ─ Trunk ───────────────────┘       │                    │
                                                             h_a ─ z ─ z_hat ─ ContextModel ─ laws
        x_hat ─┬─ lapped ─ (split) ──────────────────── y_hat * step / gain ─┐
               └─ * step ─ shuffle 8 ─ Trunk ─ (shuffle 2, conv) ────────────┘

    Linear parts start from Karhunen-Loeve transforms and the networks beside them from zero, so
    that an untrained codec already is one. The linear parts stay in float32 also under autocast:
    bfloat16 has 8 bits, a coefficient needs more.
    """

    def __init__(self, config: CodecConfig, start: LappedKernels):
        super().__init__()
        self.config = config
        self.lapped = LappedTransform(start)
        self.factor = config.stride // BLOCK
        n_blocks = 192 * self.factor**2
        if self.factor > 1:
            eye = torch.eye(n_blocks)[: config.channels]
            self.merge = nn.Parameter(eye.clone())
            self.split = nn.Parameter(eye.clone())
        pixels = 3 * BLOCK * BLOCK
        if config.analysis_blocks:
            out = config.channels // self.factor**2 if self.factor > 1 else config.channels
            self.g_a = Trunk(pixels, config.width, config.analysis_blocks, out)
        if config.synthesis_blocks:
            seen = 2 * config.channels
            self.unfold = nn.Conv2d(seen, config.width * self.factor**2, 1)
            self.g_s = Trunk(config.width, config.width, config.synthesis_blocks, pixels)
        if config.hyper:
            self.h_a = HyperAnalysis(config.channels, config.context_width, config.hyper)
        self.context = ContextModel(config.starts, config.context_width, config.hyper)
        self.log_gain = nn.Parameter(torch.zeros(N_GAINS, config.channels))

    @torch.no_grad()
    def fit_merge(self, x: Tensor) -> None:
        """Set the linear merge to the Karhunen-Loeve transform of 2 x 2 neighbouring blocks of
        pictures x, its channels by falling variance (stride 16 only)."""
        if self.factor == 1:
            return
        y = F.pixel_unshuffle(self.lapped.analysis(x), self.factor)
        flat = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
        _, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        chosen = vectors.flip(1)[:, : self.config.channels].T
        self.merge.copy_(chosen)
        self.split.copy_(chosen)

    def gain(self, log_step: Tensor) -> Tensor:
        """(n, C, 1, 1) gains, log-linear between their knots."""
        low, high = GAIN_STEPS
        at = ((log_step - low) / (high - low) * (N_GAINS - 1)).clamp(0, N_GAINS - 1)
        below = at.floor().clamp_max(N_GAINS - 2)
        part = (at - below)[:, None]
        i = below.long()
        return (self.log_gain[i] * (1 - part) + self.log_gain[i + 1] * part).exp()[..., None, None]

    def analysis(self, x: Tensor, log_step: Tensor) -> Tensor:
        """(n, 3, H, W) in 0..255, sides multiples of the stride, to y in grey levels."""
        with torch.autocast(x.device.type, enabled=False):
            y = self.lapped.analysis(x.float())
            if self.factor > 1:
                y = F.conv2d(F.pixel_unshuffle(y, self.factor), self.merge[..., None, None])
        if self.config.analysis_blocks:
            change = self.g_a(F.pixel_unshuffle((x - 128.0) / TEXTURE, BLOCK), log_step)
            if self.factor > 1:
                change = F.pixel_unshuffle(change, self.factor)
            y = y + TEXTURE * change.float()
        return y

    def synthesis(self, y_hat: Tensor, log_step: Tensor) -> Tensor:
        """The way back; not clamped."""
        step = log_step.exp2()[:, None, None, None]
        with torch.autocast(y_hat.device.type, enabled=False):
            y = y_hat.float()
            if self.factor > 1:
                y = F.conv2d(y, self.split.T[..., None, None])
                y = F.pixel_shuffle(y, self.factor)
            x = self.lapped.synthesis(y)
        if self.config.synthesis_blocks:
            seen = torch.cat([y_hat / (4 * TEXTURE), (y_hat / step).clamp(-4, 4)], 1)
            inner = self.unfold(seen)
            if self.factor > 1:
                inner = F.pixel_shuffle(inner, self.factor)
            x = x + step * F.pixel_shuffle(self.g_s(inner, log_step), BLOCK).float()
        return x

    def hyper(self, y: Tensor) -> Tensor:
        """z of y in steps, not rounded."""
        out: Tensor = self.h_a(y)
        return out

    def laws(self, y_hat: Tensor, z_hat: Tensor | None, log_step: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log2 scales of y in steps (see ``ContextModel``), cropped to y's size."""
        if z_hat is None:
            return self.context(y_hat, log_step)  # type: ignore[no-any-return]
        bottom, right = -y_hat.shape[2] % 4, -y_hat.shape[3] % 4
        padded = repeated(y_hat, 0, bottom, 0, right)
        mean, scale = self.context(padded, log_step, z_hat)
        rows, columns = y_hat.shape[2:]
        return mean[..., :rows, :columns], scale[..., :rows, :columns]
