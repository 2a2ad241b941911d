"""Entropy coding of signed integers whose magnitude is predictable: lattice indices, rotation entries.

Each row is a vector of integers k, one a field. Two things predict how large the next one is: its
*field* (in a KLT the leading components are larger; with classes, each class has its own profile)
and its *row* (some rows are stronger than others, which shows in what has been coded so far). The
product of the two picks one of forty static tables, half an octave apart; the table gives the
magnitude; the sign and the low bits of large magnitudes follow as they are. All in integers:

    e[field]  expected magnitude in quarter octaves                          (learned, a byte)
    seen     += min(|y| * gain[field], CAP) - seen / 32                      (running, from PRIOR)
    scale     = (e[field] - quarter_octaves(usual[field]) + quarter_octaves(seen)) / 2

``usual`` is what ``seen`` would be in a row that is just as expected. In a trellis the parity of k
drives a state machine; the state says which of two quantizers is in force, |y| is the lattice
magnitude 2|k| - quantizer, and each quantizer has its own tables.

A block of rows is coded by ``LANES`` interleaved range coders, row i by lane i mod ``LANES``. Tables
are static, so lanes do not wait for each other and the processor overlaps them. Layout of a block:

    LANES - 1 lengths, u24 LE | lane 0 | ... | lane LANES-1 | raw bits, in coding order

where each lane's stream is preceded by nothing and the last two are told apart by one more u24.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptDataError, InputError, LimitError
from .model import cdf_from_counts

Int = npt.NDArray[np.int64]

LANES = 4
N_SYMBOLS = 32  # 0..30 are magnitudes (less their low bits), 31 announces an escape
PRECISION = 15
STEPS = 4  # quarter octaves
E_ONE = 24  # e of an expected magnitude of one
MAX_E = 88  # 2**16: all a 16-bit lattice holds
N_TABLES = 20  # half octaves from 2**-6; beyond 2**4 the top two are reused on shifted magnitudes
N_SCALES = 46  # scale indices up to 2**17
UNIT = 1 << 16  # "just as expected" in the context's fixed-point numbers
PRIOR = 8 * UNIT  # a new row starts as if 8 components had been just as expected
CAP = 8 * UNIT  # one component counts at most as 8 times expected
MEMORY = 5  # seen forgets 1/32 a component
SEEN_SHIFT = 11  # resolution at which the running sum is looked up
MAX_INDEX = (1 << 15) - 1  # largest |k|
MAX_FIELDS = 1 << 16
MAX_CLASSES = 1 << 8
MAX_PROFILE = 1 << 22  # n_classes * n_fields
LEVELS = 8  # table entries are stored as eighths of an octave below certainty
MAX_LEVEL = LEVELS * PRECISION


def expected_magnitude(e: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The expected |y| that index e stands for."""
    return np.exp2((np.asarray(e, np.float64) - E_ONE) / STEPS)


def magnitude_index(mean_magnitude: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Inverse of ``expected_magnitude``: mean |y| of a field -> its index e in 0..MAX_E."""
    e = np.rint(STEPS * np.log2(np.maximum(mean_magnitude, 1e-9))) + E_ONE
    return np.clip(e, 0, MAX_E).astype(np.uint8)


def seen_table() -> npt.NDArray[np.uint8]:
    """``seen >> SEEN_SHIFT`` -> log2(seen) in quarter octaves, for every value seen can take."""
    n = ((CAP << MEMORY) + (UNIT << MEMORY)) >> SEEN_SHIFT
    return np.rint(STEPS * np.log2((np.arange(n) + 0.5) * (1 << SEEN_SHIFT))).astype(np.uint8)


def default_counts() -> npt.NDArray[np.float64]:
    """Tables for data not seen: (2, N_TABLES, N_SYMBOLS) relative frequencies of |k|.

    A generalised Gaussian of exponent 1.3 around each expected magnitude, integrated over the cells
    of the two quantizers: what the real tables of embeddings look like, within 1% of their rate.
    """
    y = np.arange(1 << 12) / 16.0  # fine grid of magnitudes
    out = np.empty((2, N_TABLES, N_SYMBOLS))
    for scale in range(N_TABLES):
        expected = 2.0 ** ((scale + 0.75) / 2 - E_ONE / STEPS)
        density = np.exp(-np.power(y / (1.25 * (expected + 0.25)), 1.3))
        for q in range(2):
            cells = np.searchsorted([2 * k - q + 1.0 for k in range(N_SYMBOLS - 1)], y, side="right")
            out[q, scale] = np.bincount(cells, density, minlength=N_SYMBOLS)
    return out / out.sum(axis=2, keepdims=True)


class MagnitudeModel:
    """Static tables, field profiles and the rules above, for rows of ``n_fields`` integers.

    expected: (n_classes, m) uint8 indices e. next_state (n_states, 2) and quantizer (n_states,): the
    machine; one state that uses quantizer 0 stands for plain integers. table_levels: (2, N_TABLES,
    N_SYMBOLS) and class_levels: (n_classes,), uint8: how rare each symbol and class is, in eighths of
    an octave; None for the default tables and for classes equally frequent.

    Symbols are (n, n_fields) uint16 codes, the zigzag map of k: 0, 1, -1, 2, -2 ... -> 0, 1, 2, 3, 4;
    with more than one class, field 0 is the row's class and the integers follow.
    """

    def __init__(
        self,
        expected: npt.NDArray[np.uint8],
        next_state: npt.NDArray[np.uint8],
        quantizer: npt.NDArray[np.uint8],
        table_levels: npt.NDArray[np.uint8] | None = None,
        class_levels: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.expected = np.ascontiguousarray(expected, np.uint8)
        self.next_state = np.ascontiguousarray(next_state, np.int64)
        self.quantizer = np.ascontiguousarray(quantizer, np.int64)
        self.table_levels = table_levels
        self.tables = _cdfs(_levels(default_counts()) if table_levels is None else table_levels)
        self.class_levels = (
            np.zeros(self.n_classes, np.uint8) if class_levels is None else class_levels
        )
        self.class_cdf = _cdfs(self.class_levels)
        self.gain, self.base = self._profile()

    # -- shapes -------------------------------------------------------------------------------
    @property
    def n_classes(self) -> int:
        """Number of row classes, each with its own profile of expected magnitudes."""
        return self.expected.shape[0]

    @property
    def n_fields(self) -> int:
        """Symbols a row: the class, where there are several, and the integers."""
        return self.expected.shape[1] + (self.n_classes > 1)

    @property
    def alphabet_sizes(self) -> Int:
        """(n_fields,) number of values of each symbol."""
        sizes = np.full(self.n_fields, 2 * MAX_INDEX + 1, np.int64)
        if self.n_classes > 1:
            sizes[0] = self.n_classes
        return sizes

    def _profile(self) -> tuple[Int, Int]:
        """What the running context needs of each field: ``gain`` and ``base`` = e less the quarter
        octaves of ``usual``, both (n_classes, m) int64."""
        magnitude = np.maximum(expected_magnitude(self.expected), 0.25)
        gain = np.rint(UNIT / magnitude).astype(np.int64)
        counted = np.rint(expected_magnitude(self.expected) * gain).astype(np.int64)
        usual = np.full(self.n_classes, PRIOR, np.int64)
        base = np.empty(self.expected.shape, np.int64)
        log = seen_table()
        for j in range(self.expected.shape[1]):
            base[:, j] = self.expected[:, j].astype(np.int64) - log[usual >> SEEN_SHIFT]
            usual += counted[:, j] - (usual >> MEMORY)
        return gain, base

    # -- learning -----------------------------------------------------------------------------
    @classmethod
    def fit(
        cls,
        k: npt.NDArray[np.int16],
        next_state: npt.NDArray[np.uint8],
        quantizer: npt.NDArray[np.uint8],
        *,
        row_class: Int | None = None,
        n_classes: int = 1,
    ) -> MagnitudeModel:
        """Learn profiles and tables from (n, m) integers. O(n m).

        A class with few rows leans on the profile of all rows (as if it had 8 more of those).
        """
        from . import _magnitude_kernels as kernels

        rows = np.zeros(len(k), np.int64) if row_class is None else np.asarray(row_class, np.int64)
        y = kernels.lattice(k, np.asarray(next_state, np.int64), np.asarray(quantizer, np.int64))
        magnitude = np.abs(y)
        pooled = magnitude.mean(axis=0, dtype=np.float64) if len(k) else np.zeros(k.shape[1])
        expected = np.empty((n_classes, k.shape[1]), np.uint8)
        counts = np.bincount(rows, minlength=n_classes)
        for c in range(n_classes):
            mine = magnitude[rows == c] if n_classes > 1 else magnitude
            total = mine.sum(axis=0, dtype=np.float64)
            expected[c] = magnitude_index((total + 8 * pooled) / (len(mine) + 8))
        model = cls(expected, next_state, quantizer, class_levels=_levels(counts + 0.5))
        histogram = np.zeros((2, N_SCALES, N_SYMBOLS), np.int64)
        kernels.count(k, rows, *model.rules(), histogram)
        # scales beyond the last table were coded shifted, with the top two tables in turn
        folded = histogram[:, :N_TABLES].astype(np.float64)
        for scale in range(N_TABLES, N_SCALES):
            folded[:, N_TABLES - 2 + (scale & 1)] += histogram[:, scale]
        return model.with_counts(folded)

    def with_counts(self, counts: npt.NDArray[np.float64]) -> MagnitudeModel:
        """The same model with tables made from (2, N_TABLES, N_SYMBOLS) counts, each leaning on the
        default table as if 30 symbols had been seen of it."""
        mixed = counts + 30 * default_counts()
        return MagnitudeModel(
            self.expected, self.next_state, self.quantizer, _levels(mixed), self.class_levels
        )

    def rules(self) -> tuple[npt.NDArray[Any], ...]:
        """Everything the kernels read, in their order."""
        return self.base, self.gain, seen_table(), self.next_state, self.quantizer

    def rates(self) -> tuple[npt.NDArray[np.float32], Int]:
        """For a search: bits of each coded magnitude, sign and low bits included, as
        (2, N_SCALES, N_SYMBOLS) float32, and the number of low bits of each scale (N_SCALES,)."""
        scale = np.arange(N_SCALES)
        table = np.where(scale < N_TABLES, scale, N_TABLES - 2 + (scale & 1))
        shift = np.maximum(0, (scale - N_TABLES) // 2 + 1)
        bits = PRECISION - np.log2(np.diff(self.tables.astype(np.int64), axis=2))
        bits = bits[:, table] + shift[:, None]
        bits[:, :, 1:] += 1
        return np.ascontiguousarray(bits, np.float32), shift.astype(np.int64)

    def rate_bits(self, symbols: npt.NDArray[Any]) -> float:
        """Ideal code length of (n, n_fields) symbols in bits, escapes counted at 8 bits more."""
        from . import _magnitude_kernels as kernels

        rows, k = self.split(symbols)
        histogram = np.zeros((2, N_SCALES, N_SYMBOLS), np.int64)
        kernels.count(k, rows, *self.rules(), histogram)
        rates, _ = self.rates()
        bits = float((histogram * rates.astype(np.float64)).sum()) + 8.0 * histogram[:, :, -1].sum()
        class_bits = PRECISION - np.log2(np.diff(self.class_cdf.astype(np.int64)))
        return bits + float(class_bits[rows].sum())

    # -- symbols <-> bytes --------------------------------------------------------------------
    def split(self, symbols: npt.NDArray[Any]) -> tuple[Int, npt.NDArray[np.int16]]:
        """(n, n_fields) symbols -> row classes (n,) and integers k (n, m)."""
        rows = np.zeros(len(symbols), np.int64)
        if self.n_classes > 1:
            rows, symbols = symbols[:, 0].astype(np.int64), symbols[:, 1:]
        code = symbols.astype(np.int32)
        return rows, np.where(code & 1, (code + 1) >> 1, -(code >> 1)).astype(np.int16)

    def join(self, row_class: Int, k: npt.NDArray[np.int16]) -> npt.NDArray[np.uint16]:
        """Inverse of ``split``."""
        wide = k.astype(np.int32)
        code = np.where(wide > 0, 2 * wide - 1, -2 * wide).astype(np.uint16)
        if self.n_classes == 1:
            return code
        return np.concatenate([row_class.astype(np.uint16)[:, None], code], axis=1)

    def encode(self, symbols: npt.NDArray[Any]) -> bytes:
        """(n, n_fields) symbols -> one block. O(n m); the decoder needs n."""
        from . import _magnitude_kernels as kernels

        if symbols.ndim != 2 or symbols.shape[1] != self.n_fields:
            raise InputError(f"expected symbols of shape (n, {self.n_fields}), got {symbols.shape}")
        rows, k = self.split(symbols)
        return kernels.encode(k, rows, self.class_cdf, self.tables, *self.rules())

    def decode(self, data: bytes | memoryview, n: int) -> npt.NDArray[np.uint16]:
        """Inverse of ``encode``. Any bytes decode to something within the alphabets: integrity is
        the container's checksums' business."""
        from . import _magnitude_kernels as kernels

        rows, k = kernels.decode(data, n, self.class_cdf, self.tables, *self.rules())
        return self.join(rows, k)

    # -- side information ---------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """Profiles, class sizes and tables; the machine is the caller's to remember."""
        steps = np.diff(self.expected.astype(np.int16), axis=1, prepend=0).astype(np.int8)
        payload = self.class_levels.tobytes() + steps.tobytes()
        if self.table_levels is not None:
            payload += self.table_levels.tobytes()
        head = np.array([self.n_classes, self.expected.shape[1]], "<u4").tobytes()
        return head + bytes([self.table_levels is not None]) + zlib.compress(payload, 9)

    @classmethod
    def from_bytes(
        cls, data: bytes, next_state: npt.NDArray[np.uint8], quantizer: npt.NDArray[np.uint8]
    ) -> MagnitudeModel:
        """Inverse of ``to_bytes``; CorruptDataError or LimitError on anything else."""
        if len(data) < 9 or data[8] > 1:
            raise CorruptDataError("magnitude model: truncated or unknown header")
        n_classes, m = (int(v) for v in np.frombuffer(data[:8], "<u4"))
        if not (1 <= n_classes <= MAX_CLASSES and 1 <= m <= MAX_FIELDS):
            raise LimitError(f"magnitude model: {n_classes} classes of {m} fields")
        if n_classes * m > MAX_PROFILE:
            raise LimitError(f"magnitude model: {n_classes} x {m} exceeds {MAX_PROFILE}")
        table_bytes = 2 * N_TABLES * N_SYMBOLS if data[8] else 0
        size = n_classes + n_classes * m + table_bytes
        unpack = zlib.decompressobj()
        try:
            payload = unpack.decompress(bytes(data[9:]), size + 1)
        except zlib.error as error:
            raise CorruptDataError(f"magnitude model: {error}") from None
        if len(payload) != size or not unpack.eof or unpack.unused_data:
            raise CorruptDataError(f"magnitude model: expected {size} bytes of tables")
        levels = np.frombuffer(payload, np.uint8)
        steps = np.frombuffer(payload, np.int8, n_classes * m, n_classes).reshape(n_classes, m)
        expected = np.cumsum(steps, axis=1, dtype=np.int64)
        if expected.min() < 0 or expected.max() > MAX_E:
            raise CorruptDataError("magnitude model: expected magnitude out of range")
        tables = levels[size - table_bytes :].reshape(2, N_TABLES, N_SYMBOLS) if data[8] else None
        if levels[: n_classes].max() > MAX_LEVEL or (tables is not None and tables.max() > MAX_LEVEL):
            raise CorruptDataError("magnitude model: table entry out of range")
        profile = expected.astype(np.uint8)
        return cls(profile, next_state, quantizer, tables, levels[:n_classes])


def _levels(counts: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Relative frequencies along the last axis -> their negative log2 in eighths of an octave."""
    p = np.maximum(counts / counts.sum(axis=-1, keepdims=True), 2.0**-PRECISION)
    return np.rint(-LEVELS * np.log2(p)).astype(np.uint8)


def _cdfs(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Inverse of ``_levels``, as CDFs: integers the same on every machine (2^30 times a power of two
    at an eighth of an octave is never near a rounding boundary)."""
    weights = np.rint(np.exp2(30 - levels.astype(np.float64) / LEVELS)).astype(np.int64)
    flat = weights.reshape(-1, weights.shape[-1])
    cdfs = np.stack([cdf_from_counts(row, PRECISION) for row in flat])
    return cdfs.reshape(*weights.shape[:-1], weights.shape[-1] + 1)


# One state that always uses quantizer 0: plain integers, |y| = 2|k|.
PLAIN = (np.zeros((1, 2), np.uint8), np.zeros(1, np.uint8))


def integers_to_bytes(a: npt.NDArray[np.int16]) -> bytes:
    """A matrix of integers, columns of similar size -> bytes, e.g. a rotation. O(size)."""
    model = MagnitudeModel.fit(a, *PLAIN)
    plain = MagnitudeModel(model.expected, *PLAIN)
    coded = []
    for m in (model, plain):  # own tables pay only for larger matrices
        head, body = m.to_bytes(), m.encode(m.join(np.zeros(len(a), np.int64), a))
        coded.append(len(head).to_bytes(4, "little") + head + body)
    return min(coded, key=len)


def integers_from_bytes(data: bytes, shape: tuple[int, int]) -> npt.NDArray[np.int16]:
    """Inverse of ``integers_to_bytes``."""
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 + size:
        raise CorruptDataError("integers: truncated model")
    model = MagnitudeModel.from_bytes(data[4 : 4 + size], *PLAIN)
    if model.n_classes != 1 or model.n_fields != shape[1]:
        raise CorruptDataError(f"integers: model of {model.n_fields} columns for shape {shape}")
    return model.split(model.decode(data[4 + size :], shape[0]))[1]
