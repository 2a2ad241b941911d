"""Arrays of any number of bands as pictures of three channels each, and back in exact integers.

    x (H, W, C) ─ mean, range ─ principal axes over the bands ─ groups of three ─ turned ─ pictures

Bands of one scene resemble each other, so nearly all of an array lies in a few directions of the
C-dimensional space of spectra (its Karhunen-Loève transform). Three of them at a time, strongest
first, become the channels of a picture, turned such that the first one is its brightness and the
others are its colours: then what the codec has learned about photographs holds. The basis is
orthonormal but for its rounding, so one step for all pictures is one error for all bands.

Everything a decoder does is a sum of products of integers below 2**53 and two roundings of float64:
the same numbers on every machine.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polarpack.entropy.magnitude import integers_from_bytes, integers_to_bytes
from polarpack.errors import CorruptDataError, InputError

from .bitstream import MAX_BANDS, MAX_SAMPLES, MAX_SIDE, SAMPLES

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]

LEVELS = 255.0  # grey levels that the range of the numbers becomes
VALUE_BITS = 6  # fraction of pictures' values, see ``transform``
BASIS_BITS = 14  # most of the fraction of the basis
WEAKEST = 1 / 16  # deviation in steps of the weakest axis that may be worth a bit: 8 x 8 of it are
# half a step in the mean of a block
RELATIVE_ERROR = 0.1  # of a rounded axis at most, in steps
LARGEST = 1e30  # magnitude of numbers
MAX_COEFFICIENT = 60000  # in steps; beyond, indices and reconstructions have no room
STRIP = 64  # rows that are turned at a time
# brightness and two colours, each of norm 1, as R, G, B
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def checked(array: Array) -> Array:
    """An array (H, W, C) of bands in native byte order; InputError says what it should be."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"expected an array (H, W, C) of bands, got {array.shape}")
    height, width, n = array.shape
    if n > MAX_BANDS or max(height, width) > MAX_SIDE or array.size > MAX_SAMPLES:
        raise InputError(
            f"expected up to {MAX_BANDS} bands, {MAX_SIDE} pixels a side and {MAX_SAMPLES} numbers "
            f"in all, got {array.shape}: cut it into parts"
        )
    if array.dtype.newbyteorder("=").str[1:] not in SAMPLES:
        raise InputError(
            f"expected bands of uint8, uint16, int16, float16, float32 or float64, got "
            f"{array.dtype}"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def sample_dtype(number: int) -> np.dtype[Any]:
    """The dtype that a header's number stands for."""
    return np.dtype("=" + SAMPLES[number])


def sample_number(dtype: np.dtype[Any]) -> int:
    """The inverse of ``sample_dtype``."""
    return SAMPLES.index(dtype.str[1:])


@dataclass(frozen=True)
class Statistics:
    """Of an array of bands: range, means (C,) float32, and its principal axes, columns of ``axes``
    (C, C) by falling deviation (C,), in grey levels. ``radius``: the largest distance of a pixel
    from the mean, likewise."""

    low: float
    high: float
    mean: Float32
    axes: Float64
    deviation: Float64
    radius: float

    @property
    def unit(self) -> float:
        """What a grey level is worth."""
        return (self.high - self.low) / LEVELS

    @property
    def finest_step(self) -> float:
        """The finest step, in grey levels, at which all indices have room."""
        return 8 * math.sqrt(3) * self.radius / MAX_COEFFICIENT


def statistics(array: Array) -> Statistics:
    """Two passes over the array, O(H W C^2) and O(C^3). InputError where numbers are not finite, or
    beyond 1e30."""
    n = array.shape[0] * array.shape[1]
    total = np.zeros(array.shape[2])
    low, high = math.inf, -math.inf
    for part in _strips(array):
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        if not (np.isfinite(part).all() and low >= -LARGEST and high <= LARGEST):
            raise InputError(
                f"expected finite numbers up to {LARGEST:g}, got {low} to {high}: fill gaps, or "
                "scale"
            )
        total += part.sum(axis=0)
    mean = (total / n).astype(np.float32)
    unit = (high - low) / LEVELS
    if unit == 0:
        flat = np.zeros(len(mean))
        return Statistics(low, high, mean, np.eye(len(mean)), flat, 0.0)
    covariance = np.zeros((len(mean), len(mean)))
    radius = 0.0
    for part in _strips(array):
        centred = (part - mean) / unit
        covariance += centred.T @ centred
        radius = max(radius, float((centred * centred).sum(axis=1).max()))
    values, axes = np.linalg.eigh(covariance / n)
    deviation = np.sqrt(np.maximum(values[::-1], 0))
    return Statistics(low, high, mean, axes[:, ::-1], deviation, math.sqrt(radius))


def _strips(array: Array) -> Iterator[Float64]:
    """The pixels (n, C) in float64, a few rows at a time."""
    for first in range(0, len(array), STRIP):
        yield array[first : first + STRIP].reshape(-1, array.shape[2]).astype(np.float64)


class Spectra:
    """A basis of spectra, as a file holds it.

    low, high: range of the numbers. mean: (C,) float32. bits: (G,) uint8, fraction of each group's
    part of the basis. basis: (C, 3 G) int16; columns 3 g .. 3 g + 2 belong to the channels of
    picture g.
    """

    def __init__(
        self,
        low: float,
        high: float,
        mean: Float32,
        bits: npt.NDArray[np.uint8],
        basis: npt.NDArray[np.int16],
    ) -> None:
        self.low, self.high, self.mean, self.bits, self.basis = low, high, mean, bits, basis
        self.unit = (high - low) / LEVELS
        shift = BASIS_BITS - np.repeat(bits.astype(np.int64), 3)
        self._whole = (basis.astype(np.int64) << shift).astype(np.float64)  # in 2**-BASIS_BITS

    @property
    def n_groups(self) -> int:
        """Pictures."""
        return len(self.bits)

    @classmethod
    def of(cls, stats: Statistics, step: float) -> Spectra:
        """The basis for a step in grey levels: axes that are worth a bit, rounded as finely as they
        are strong."""
        n = len(stats.mean)
        n_axes = int(np.searchsorted(-stats.deviation, -WEAKEST * step))
        n_groups = -(-n_axes // 3)
        basis = np.zeros((n, 3 * n_groups), np.int16)
        bits = np.zeros(n_groups, np.uint8)
        for group in range(n_groups):
            axes = stats.axes[:, 3 * group : 3 * group + 3]
            strength = stats.deviation[3 * group] / (RELATIVE_ERROR * step)
            # the entries of an axis are some 1 / sqrt(n), which must not vanish
            least = math.ceil(math.log2(n) / 2) + 4
            wanted = max(math.ceil(math.log2(strength)), least)
            bits[group] = min(wanted, BASIS_BITS)
            turned = axes @ COLOURS[: axes.shape[1]]
            basis[:, 3 * group : 3 * group + 3] = np.rint(turned * 2.0 ** int(bits[group]))
        return cls(stats.low, stats.high, stats.mean, bits, basis)

    def first(self, n_groups: int) -> Spectra:
        """The same with the first so many groups alone."""
        return Spectra(
            self.low, self.high, self.mean, self.bits[:n_groups], self.basis[:, : 3 * n_groups]
        )

    def pictures(self, array: Array) -> Iterator[Float32]:
        """The pictures (H, W, 3) float32 around 128 of an array (H, W, C), least squares for the
        rounded basis."""
        inverse = np.linalg.pinv(self._whole * 2.0**-BASIS_BITS, rcond=1e-3)  # (3 G, C)
        for group in range(self.n_groups):
            part = inverse[3 * group : 3 * group + 3].T / self.unit
            picture = np.empty((*array.shape[:2], 3), np.float32)
            at = 0
            for pixels in _strips(array):
                rows = len(pixels) // array.shape[1]
                values = (pixels - self.mean) @ part + 128
                picture[at : at + rows] = values.reshape(rows, -1, 3)
                at += rows
            yield picture

    def samples(self, values: Int32, dtype: np.dtype[Any]) -> Array:
        """(h, w, C) of values (h, w, 3 G) int32 in 1/64 grey level around 0."""
        out = np.empty((*values.shape[:2], len(self.mean)), dtype)
        scale = self.unit * 2.0 ** -(VALUE_BITS + BASIS_BITS)
        for first in range(0, len(values), STRIP):
            part = values[first : first + STRIP]
            # integers: sums of at most 4096 products below 2**20 * 2**14 * 1.01
            flat = part.reshape(part.shape[0] * part.shape[1], values.shape[2])
            sums = flat.astype(np.float64) @ self._whole.T
            numbers = np.clip(sums * scale + self.mean, self.low, self.high)
            if dtype.kind in "ui":
                numbers = np.rint(numbers)
            out[first : first + STRIP] = numbers.reshape(*part.shape[:2], -1)
        return out

    def to_bytes(self) -> bytes:
        """Low and high float64, means float32, bits of each group, basis."""
        head = struct.pack("<dd", self.low, self.high) + self.mean.astype("<f4").tobytes()
        basis = integers_to_bytes(self.basis) if self.n_groups else b""
        return head + self.bits.tobytes() + basis

    @classmethod
    def from_bytes(cls, data: bytes, n_bands: int, n_groups: int, dtype: np.dtype[Any]) -> Spectra:
        """The inverse of ``to_bytes``. CorruptDataError where the bytes do not fit the header."""
        size = 16 + 4 * n_bands + n_groups
        if len(data) < size:
            raise CorruptDataError(f"bands: {len(data)} bytes, expected {size} at least")
        low, high = struct.unpack_from("<dd", data)
        mean = np.frombuffer(data, "<f4", n_bands, 16).astype(np.float32)
        bits = np.frombuffer(data, np.uint8, n_groups, 16 + 4 * n_bands).copy()
        limits = (-LARGEST, LARGEST)
        if dtype.kind in "ui":
            info = np.iinfo(dtype)
            limits = float(info.min), float(info.max)
        elif dtype == np.float16:
            limits = -65504.0, 65504.0
        ordered = limits[0] <= low <= high <= limits[1] and bool(np.isfinite(mean).all())
        if not ordered or int(bits.max(initial=0)) > BASIS_BITS:
            raise CorruptDataError(f"bands: range {low} to {high}, bits {bits.tolist()[:8]}")
        if not n_groups:
            if len(data) > size:
                raise CorruptDataError(f"bands: {len(data)} bytes, expected {size}")
            return cls(low, high, mean, bits, np.zeros((n_bands, 0), np.int16))
        basis = integers_from_bytes(data[size:], (n_bands, 3 * n_groups))
        if (np.abs(basis.astype(np.int64)).max(axis=0) > np.repeat(1 << bits.astype(int), 3)).any():
            raise CorruptDataError("bands: entries of the basis exceed 1")
        return cls(low, high, mean, bits, basis)
