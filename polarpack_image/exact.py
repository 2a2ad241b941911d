"""Networks in integers that every machine computes alike, at the speed of floating point.

A decoder whose probabilities differ in one bit from the encoder's reads noise. So whatever decides
how bytes are read is computed in integers: weights, activations, biases and shifts. The products
and sums run in float32 matrix multiplications all the same, because those are exact, in any order
of summation, with or without fused multiply-add, on any library and device, while

    largest |activation| * sum |weights| + |bias| + rounding  <  2**24          for each output

and float64 ones while it stays below 2**53. ``IntegerLayer`` checks the bound when it is made, so
no input can break it. TF32 and bfloat16 multiplications, and Winograd or FFT convolutions, are not
exact: the torch form therefore unfolds and multiplies with TF32 off.

Layers are requantized by powers of two, with halves rounded up:

    y = clip(floor((sum w x + bias + 2**(shift - 1)) / 2**shift), low, high)

Arrays are position-major, (rows, columns, channels), float32 holding integers.

Source: Ballé, Johnston and Minnen, "Integer networks for data compression with latent-variable
models", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from polarpack.errors import FormatError

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Arrays = Mapping[str, npt.NDArray[Any]]

EXACT_FLOAT32 = 1 << 24
STEP_BITS = 8  # fraction of a step in grey levels
FEATURE_BITS = 3  # fraction of companded coefficients
MAX_FEATURE = 127
LARGEST_REC = 1 << 21  # of coefficients, in 1/16 step
ROWS_AT_A_TIME = 8  # of a convolution
LEVELS = 64
LEVELS_PER_OCTAVE = 4
LEVEL_OFFSET = 16  # level of a scale of one step


@dataclass(frozen=True)
class IntegerLayer:
    """A convolution with integer weights, odd kernel, stride 1, edges repeated.

    Attributes
    ----------
    weight : (k, k, n_in, n_out) int16 or int8.
    bias : (n_out,) int32.
    shift : (n_out,) uint8, 0..30.
    low, high : int, the range outputs are clipped to.
    largest : int, bound of |input|; inputs beyond it are a caller's mistake.

    Raises FormatError where sums could leave the range in which float32 is exact.
    """

    weight: npt.NDArray[Any]
    bias: Int32
    shift: npt.NDArray[np.uint8]
    low: int
    high: int
    largest: int

    def __post_init__(self) -> None:
        k, k2, _, n_out = self.weight.shape
        fits = k == k2 and k % 2 == 1 and self.bias.shape == self.shift.shape == (n_out,)
        if not fits or int(self.shift.max(initial=0)) > 30:
            raise FormatError(
                f"integer layer: weights {self.weight.shape}, bias {self.bias.shape} and shift "
                f"{self.shift.shape} do not fit together"
            )
        worst = self.bound()
        if worst >= EXACT_FLOAT32:
            raise FormatError(
                f"integer layer: sums of up to {worst} are not exact in float32 "
                f"(limit {EXACT_FLOAT32})"
            )

    def bound(self) -> int:
        """The largest magnitude that any partial sum can reach."""
        weights = np.abs(self.weight.astype(np.int64)).sum((0, 1, 2))
        half = (1 << self.shift.astype(np.int64)) >> 1
        return int((self.largest * weights + np.abs(self.bias.astype(np.int64)) + half).max())

    def __call__(self, x: Float32) -> Float32:
        """(h, w, n_in) to (h, w, n_out), integers in float32. A few rows at a time, so that their
        windows, side by side for one matrix product, stay in the cache."""
        k, _, n_in, n_out = self.weight.shape
        rows, columns, _ = x.shape
        padded = np.pad(x, ((k // 2,) * 2, (k // 2,) * 2, (0, 0)), "edge") if k > 1 else x
        windows = sliding_window_view(padded, (k, k), (0, 1)).transpose(0, 1, 3, 4, 2)
        weight = self._float_weight.reshape(-1, n_out)
        out = np.empty((rows, columns, n_out), np.float32)
        for first in range(0, rows, ROWS_AT_A_TIME):
            part = windows[first : first + ROWS_AT_A_TIME].reshape(-1, k * k * n_in) @ weight
            part += self.bias
            requantized(part, self.shift, self.low, self.high)
            out[first : first + ROWS_AT_A_TIME] = part.reshape(-1, columns, n_out)
        return out

    @property
    def _float_weight(self) -> Float32:
        return self.weight.astype(np.float32)

    def in_torch(self, x: torch.Tensor) -> torch.Tensor:
        """The same for (n, n_in, h, w) tensors on any device. Needs
        ``torch.backends.cuda.matmul.allow_tf32`` to be off, torch's default."""
        import torch
        import torch.nn.functional as F

        k, _, n_in, n_out = self.weight.shape
        n, _, rows, columns = x.shape
        padded = F.pad(x, (k // 2,) * 4, mode="replicate") if k > 1 else x
        unfolded = F.unfold(padded, k)  # (n, n_in k k, h w), channel first
        weight = torch.from_numpy(
            np.ascontiguousarray(
                self._float_weight.transpose(3, 2, 0, 1).reshape(n_out, n_in * k * k)
            )
        )
        bias, scale = (
            torch.from_numpy(a.astype(np.float32))[:, None].to(x.device)
            for a in (self.bias, 0.5 ** self.shift.astype(np.float64))
        )
        half = torch.where(scale < 1, 0.5 / scale, 0.0)
        total = weight.to(x.device) @ unfolded + (bias + half)
        return (total * scale).floor().clamp(self.low, self.high).reshape(n, n_out, rows, columns)

    def arrays(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """For the weights file."""
        limits = np.array([self.low, self.high, self.largest], np.int32)
        return {
            f"{prefix}.weight": self.weight,
            f"{prefix}.bias": self.bias,
            f"{prefix}.shift": self.shift,
            f"{prefix}.limits": limits,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, prefix: str) -> IntegerLayer:
        """The inverse of ``arrays``."""
        low, high, largest = (int(v) for v in arrays[f"{prefix}.limits"])
        return cls(
            arrays[f"{prefix}.weight"],
            arrays[f"{prefix}.bias"],
            arrays[f"{prefix}.shift"],
            low,
            high,
            largest,
        )


def requantized(sums: Float32, shift: npt.NDArray[np.uint8], low: int, high: int) -> Float32:
    """``sums`` (.., n) divided by 2**shift, halves up, clipped. In place."""
    scale = np.ldexp(np.float32(1.0), -shift.astype(np.int32)).astype(np.float32)
    sums += np.where(shift > 0, np.float32(0.5) / scale, np.float32(0.0))
    sums *= scale  # a power of two: exact
    np.floor(sums, out=sums)
    return np.clip(sums, low, high, out=sums)


def shuffled(x: Float32, factor: int) -> Float32:
    """Pixel shuffle: (h, w, c f f) to (h f, w f, c), channels ordered as in torch."""
    rows, columns, channels = x.shape
    c = channels // factor**2
    parts = x.reshape(rows, columns, c, factor, factor).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(parts).reshape(rows * factor, columns * factor, c)


def unshuffled(x: Float32, factor: int) -> Float32:
    """The inverse of ``shuffled``: (h f, w f, c) to (h, w, c f f)."""
    rows, columns, c = x.shape
    parts = x.reshape(rows // factor, factor, columns // factor, factor, c)
    parts = parts.transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(parts).reshape(rows // factor, columns // factor, -1)


def companding_thresholds() -> Int32:
    """|rec| from which on a coefficient's feature is 1, 2, ..: (127,) int32, stored with the
    weights. The feature is log2(1 + 2 |y|) in eighths, |y| = |rec| / 16 in steps."""
    k = np.arange(1, MAX_FEATURE + 1)
    found: Int32 = np.ceil(8 * (np.exp2((k - 0.5) / (1 << FEATURE_BITS)) - 1)).astype(np.int32)
    return found


def companding_table(thresholds: Int32) -> Float32:
    """Features of |rec| = 0, 1, .. up to where they are the largest, for ``features``."""
    sizes = np.arange(min(max(int(thresholds[-1]), 0), LARGEST_REC) + 1)
    return np.searchsorted(thresholds, sizes, "right").astype(np.float32)


def features(rec: Int32, table: Float32, step_feature: int) -> Float32:
    """What the entropy network sees of decoded coefficients, (h, w, C) int32 in 1/16 step: their
    companded values, the magnitudes of these, and the step: (h, w, 2 C + 1) in -127..127."""
    size = table[np.minimum(np.abs(rec), len(table) - 1)]
    out = np.empty((*rec.shape[:2], 2 * rec.shape[2] + 1), np.float32)
    out[..., : rec.shape[2]] = np.copysign(size, rec.astype(np.float32))
    out[..., rec.shape[2] : -1] = size
    out[..., -1] = step_feature
    return out


def step_feature(step: int) -> int:
    """The quality as a feature: log2 of the step in grey levels, in eighths, rounded, held in
    0..127; ``step`` in 1/256 grey level. In integers: f - 1/2 <= 8 log2(step / 256) means
    2**(2 f + 127) <= step**16, that is 2 f + 128 <= the bits of step**16."""
    return min(max((int(step) ** 16).bit_length() - 16 * STEP_BITS >> 1, 0), MAX_FEATURE)


class ContextNetwork:
    """Means and levels of groups of heads from the groups before them, and from the hyper-latent
    where there is one.

    ::

        rec of earlier heads ─ features ─┐
        hyper-features (h, w, n) ────────┴─ 3x3 ─ 3x3 ─ 1x1 ── mean in 1/16 step, level

    starts : first head of each group, ascending, and the end of the last one; heads outside have no
        prediction.
    """

    def __init__(self, arrays: Arrays, prefix: str = "net"):
        self.starts = tuple(int(v) for v in arrays[f"{prefix}.starts"])
        self.table = companding_table(arrays[f"{prefix}.thresholds"].astype(np.int32))
        groups = range(len(self.starts) - 1)
        self.layers = [
            [IntegerLayer.from_arrays(arrays, f"{prefix}.{g}.{i}") for i in range(3)]
            for g in groups
        ]
        self.hyper = [
            IntegerLayer.from_arrays(arrays, f"{prefix}.hyper.{i}")
            for i in range(2)
            if f"{prefix}.hyper.{i}.weight" in arrays
        ]
        self._check()

    def _check(self) -> None:
        width = self.hyper[-1].weight.shape[3] // 4 if self.hyper else 0
        pairs = zip(self.starts[:-1], self.starts[1:], self.layers, strict=True)
        for first, after, (one, two, three) in pairs:
            sizes = [layer.weight.shape for layer in (one, two, three)]
            wanted = 16 * first + 1 + width
            if (
                not 0 <= first < after
                or sizes[0][2] != wanted
                or sizes[0][3] != sizes[1][2]
                or sizes[1][3] != sizes[2][2]
                or sizes[2][3] not in (8 * (after - first), 16 * (after - first))
            ):
                raise FormatError(f"entropy network: layers {sizes} for heads {first}..{after}")

    def hyper_features(self, z_hat: Int32) -> Float32:
        """(h, w, n_z) integers of the hyper-latent to features (4 h, 4 w, n) of the latent."""
        x = np.clip(z_hat, -MAX_FEATURE, MAX_FEATURE).astype(np.float32)
        for layer in self.hyper:
            x = shuffled(layer(x), 2)
        return x

    def predict(
        self, rec: Int32, group: int, step: int, hyper: Float32 | None = None
    ) -> tuple[Int32, npt.NDArray[np.uint8]]:
        """Means (h, w, n) int32 in 1/16 step and levels (h, w, n) uint8 of the n channels of a
        group, from rec (h, w, C) int32, of which only earlier heads are looked at. ``step`` is
        ``step_feature(..)``."""
        first, after = self.starts[group], self.starts[group + 1]
        x = features(rec[..., : 8 * first], self.table, step)
        if hyper is not None:
            x = np.concatenate([x, hyper], 2)
        for layer in self.layers[group]:
            x = layer(x)
        n = 8 * (after - first)
        level = np.clip(x[..., -n:] + LEVEL_OFFSET, 0, LEVELS - 1)
        mean = x[..., :n] if x.shape[2] > n else np.zeros_like(level)
        return mean.astype(np.int32), level.astype(np.uint8)


class HeadPredictor:
    """A ``coder.Predictor`` for one tile: asks the network once for each group of heads, when the
    first of them is about to be coded, and hands out its answer head by head."""

    def __init__(self, network: ContextNetwork, step: int, hyper: Float32 | None = None):
        self.network, self.step, self.hyper = network, step_feature(step), hyper
        self._group = -1
        self._means: npt.NDArray[Any] = np.empty(0)
        self._levels: npt.NDArray[Any] = np.empty(0)

    def wants(self, head: int) -> bool:
        """Whether a group of heads begins, or has not been asked for."""
        starts = self.network.starts
        if not starts[0] <= head < starts[-1]:
            return False
        return head in starts or self._group_of(head) != self._group

    def _group_of(self, head: int) -> int:
        return sum(head >= start for start in self.network.starts[1:])

    def __call__(
        self, recon: Int32, head: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Means and levels (h, w, 8) of a head; zeros for one that has no prediction."""
        starts = self.network.starts
        if not starts[0] <= head < starts[-1]:
            shape = (*recon.shape[:2], 8)
            return np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
        group = self._group_of(head)
        if self.wants(head):
            self._means, self._levels = self.network.predict(recon, group, self.step, self.hyper)
            self._group = group
        part = slice(8 * (head - starts[group]), 8 * (head - starts[group] + 1))
        return self._means[..., part], self._levels[..., part]


class PostFilter:
    """Takes quantization noise out of a decoded picture: a chain of convolutions on 4 x 4
    pixels at a time, whose input and output are in units of the step, so that one set of
    weights serves all qualities. In integers from pixels to pixels."""

    FACTOR = 4
    INPUT_BITS = 6  # fraction of (pixel - 128) / step, and of the picture handed in
    LARGEST = 2047

    def __init__(self, arrays: Arrays, prefix: str = "post"):
        n = sum(f"{prefix}.{i}.weight" in arrays for i in range(16))
        self.layers = [IntegerLayer.from_arrays(arrays, f"{prefix}.{i}") for i in range(n)]
        patch = 3 * self.FACTOR**2
        if (
            not n
            or self.layers[0].weight.shape[2] != patch + 1
            or self.layers[-1].weight.shape[3] != patch
        ):
            raise FormatError(f"post-filter: expected layers from {patch + 1} to {patch} channels")
        self.gain_bits = int(arrays[f"{prefix}.gain_bits"])
        self.halo = self.FACTOR * sum(layer.weight.shape[0] // 2 for layer in self.layers)

    def __call__(self, fixed: Int32, step: int) -> Int32:
        """(H, W, 3) int32 in 1/64 grey level, sides multiples of 4, to the same, filtered. ``step``
        in 1/256 grey level. What a pixel becomes depends on ``halo`` pixels around it."""
        wide = fixed.astype(np.int64) - (128 << self.INPUT_BITS)
        u = (wide * (2 << STEP_BITS) + step) // (2 * step)
        x = unshuffled(np.clip(u, -self.LARGEST, self.LARGEST).astype(np.float32), self.FACTOR)
        constant = np.full((*x.shape[:2], 1), step_feature(step), np.float32)
        x = np.concatenate([x, constant], 2)
        for layer in self.layers:
            x = layer(x)
        change = shuffled(x, self.FACTOR).astype(np.int64) * step
        shift = STEP_BITS + self.gain_bits - self.INPUT_BITS
        change += 1 << (shift - 1)
        filtered: Int32 = (fixed + (change >> shift)).astype(np.int32)
        return filtered


def stacked(layers: Sequence[IntegerLayer], prefix: str) -> dict[str, npt.NDArray[Any]]:
    """Arrays of a chain of layers for the weights file."""
    found: dict[str, npt.NDArray[Any]] = {}
    for i, layer in enumerate(layers):
        found |= layer.arrays(f"{prefix}.{i}")
    return found
