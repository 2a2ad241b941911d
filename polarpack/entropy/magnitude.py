"""Entropy coding of signed integers whose magnitude is predictable: lattice indices, rotation
entries.

Each row is a vector of integers k, one a field. Two things predict how large the next one is: its
*field* (in a KLT the leading components are larger; with classes, each class has its own profile)
and its *row* (some rows are stronger than others, which shows in what has been coded so far). The
product of the two picks a *scale*, the expected magnitude in half octaves, and with it one of
twenty static tables for the magnitude. In a trellis the parity of k drives a state machine; the
state says which of two quantizers is in force, |y| is the lattice magnitude 2|k| - quantizer (zero
for k = 0), and each quantizer has tables of its own. All in integers:

    e[field]  expected |y| in quarter octaves                                (learned, a byte)
    seen     += min(|y| * gain[e[field]], CAP) - (seen >> MEMORY)            (running, from PRIOR)
    scale     = (e[field] - quarter_octaves(usual[field]) + quarter_octaves(seen)) >> 1

``gain`` makes an |y| that is just as expected count UNIT, and ``usual`` is what ``seen`` would be
in a row whose components all are.

The magnitude |k| is coded as a symbol, its low bits beyond the last table's reach as they are
(``shift`` of them), then the sign:

    scale < N_TABLES     table ``scale``, shift 0, symbol |k|
    above                the last two tables in turn, shift 1, 1, 2, 2, 3, ...
        quantizer 0      symbol |k| / 2**shift to the nearest, upwards from the middle; symbol 0,
                         half a cell, has a low bit less
        quantizer 1      symbol 1 + (|k| - 1 >> shift); 0 stays a symbol of its own
    symbol < ESCAPE      as it is
    else                 ESCAPE, then with r = symbol - ESCAPE + 1 floor(log2 r) in ESCAPE_BITS bits
                         and the bits of r behind its leading one

So a table sees the same cells of |y| at every shift, scaled. (Cells that begin at 0 in both
quantizers would put the zero that quantizer 1 hardly uses into one with its first neighbours, and
make those dear: 0.15 dB of all components above 5 bits.)

A block is one message of the range coder, all rows in order; from LANES_FROM integers on, it is
LANES messages, so that a reader can keep four at work at once. Lane l then has rows l q to
(l + 1) q - 1, where q = n // LANES, and lane 0 also the rows left over. In front of the four
messages stand the lengths of the first three: the first, then the differences from one to the next.
In a message a row is its class, where there are several, then for each field the symbol, what
follows an escape, the low bits, and, unless k is 0, the sign (1 is negative).
"""

from __future__ import annotations

import math
import zlib
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .._arrays import enter_codes
from ..errors import CorruptDataError, InputError, LimitError
from ._numbers import Reader, fold, number, unfold
from ._tables import LANES_FROM, cdf_from_counts, level_weights

Int = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Rules = tuple[Ints, Ints, Bytes, Bytes, Bytes]
Float64 = npt.NDArray[np.float64]

LANES = 4
N_SYMBOLS = 32  # 0..30 are magnitudes (less their low bits), 31 announces an escape
ESCAPE = N_SYMBOLS - 1
ESCAPE_BITS = 4
PRECISION = 15
BUCKET_BITS = 8  # a reader looks up the leading bits of a value, then rarely takes a second step
STEPS = 4  # quarter octaves
E_ONE = 24  # e of an expected magnitude of one
MAX_E = 88  # 2**16: all a 16-bit lattice holds
SMALLEST = 16  # an e below this one counts no more than it does: noise of rare ones
N_TABLES = 20  # half octaves from 2**-6 to 2**3.5; beyond, the top two on shifted magnitudes
N_SCALES = 46  # up to 2**16.5
UNIT = 1 << 16  # "just as expected" in the context's fixed-point numbers
PRIOR = 8 * UNIT  # a new row starts as if 8 components had been just as expected
CAP = 8 * UNIT  # one component counts at most as 8 times expected
MEMORY = 5  # seen forgets 1/32 a component
SEEN_SHIFT = 11  # resolution at which the running sum is looked up
MAX_INDEX = (1 << 15) - 1  # largest |k|
MAX_FIELDS = 1 << 16
MAX_CLASSES = 1 << 8
MAX_PROFILE = 1 << 22  # n_classes * n_fields
RESOLUTION = 8  # table entries are stored as eighths of an octave below certainty
MAX_LEVEL = RESOLUTION * PRECISION
DEFAULT_WEIGHT = 30  # a learned table leans on the default one as if by so many symbols
POOLED_WEIGHT = 8  # a class's profile leans on that of all rows as if by so many rows


def expected_magnitude(e: npt.NDArray[Any]) -> Float64:
    """The expected |y| that index e stands for."""
    return np.exp2((np.asarray(e, np.float64) - E_ONE) / STEPS)


def magnitude_index(mean_magnitude: npt.NDArray[Any]) -> Bytes:
    """Inverse of ``expected_magnitude``: mean |y| of a field -> its index e in 0..MAX_E."""
    e = np.rint(STEPS * np.log2(np.maximum(mean_magnitude, 1e-9))) + E_ONE
    return cast(Bytes, np.clip(e, 0, MAX_E).astype(np.uint8))


# What a decoder computes from a stored model is integer arithmetic, hence the same everywhere.
# Fourth roots take the place of powers of 2**(1/4).


def _fourth_root(x: int, exponent: int) -> int:
    """The integer nearest to the fourth root of x / 2**exponent."""
    return math.isqrt(math.isqrt(x << 4 >> exponent)) + 1 >> 1


@cache
def seen_table() -> Bytes:
    """``seen >> SEEN_SHIFT`` -> log2(seen) in quarter octaves, rounded, at the middle of each step:
    for every value that seen can take (it stays below ``CAP << MEMORY`` plus one step)."""
    n = ((CAP + UNIT) << MEMORY) >> SEEN_SHIFT
    middles = ((2 * i + 1) << (SEEN_SHIFT - 1) for i in range(n))
    # 2**(q - 1/2) <= v**4 < 2**(q + 1/2), that is, 2**(2q - 1) <= v**8 < 2**(2q + 1)
    return np.array([(v**8).bit_length() // 2 for v in middles], np.uint8)


@cache
def field_rules() -> tuple[Ints, Ints]:
    """For each index e: ``gain``, UNIT over the expected |y| (that of SMALLEST at least), and what
    an |y| as expected adds to the running sum. Both (MAX_E + 1,) int32."""
    gains, counted = [], []
    for e in range(MAX_E + 1):
        # the fourth powers of UNIT / 2**((e - E_ONE) / 4) and of gain * 2**((e - E_ONE) / 4)
        gains.append(_fourth_root(UNIT**4 << E_ONE, max(e, SMALLEST)))
        counted.append(_fourth_root(gains[-1] ** 4 << e, E_ONE))
    return np.array(gains, np.int32), np.array(counted, np.int32)


@cache
def default_frequencies() -> Float64:
    """Tables for data not seen: (2, N_TABLES, N_SYMBOLS) relative frequencies of |k|.

    A generalised Gaussian of exponent 1.3 around each expected magnitude, integrated over the cells
    of the two quantizers. The zero of quantizer 1 has no cell: it is nearer to both its neighbours
    than any other point, and a trellis does best that takes it only where tables learned from the
    data say so (by up to 0.5 dB).
    """
    y = np.arange(1 << 12) / 16.0  # fine grid of magnitudes
    out = np.empty((2, N_TABLES, N_SYMBOLS))
    for scale in range(N_TABLES):
        expected = 2.0 ** ((scale + 0.75) / 2 - E_ONE / STEPS)
        density = np.exp(-np.power(y / (1.25 * (expected + 0.25)), 1.3))
        for q in range(2):
            edges = [2 * k - q + 1.0 for k in range(N_SYMBOLS - 1)]
            cells = np.searchsorted(edges, y, side="right")
            out[q, scale] = np.bincount(cells, density, minlength=N_SYMBOLS)
    return cast(Float64, out / out.sum(axis=2, keepdims=True))


@cache
def default_levels() -> Bytes:
    """The same as stored levels. None is so near to a rounding boundary that another machine's
    exponential could tip it over."""
    return _levels(default_frequencies())


def _levels(frequencies: npt.NDArray[Any]) -> Bytes:
    """Relative frequencies along the last axis -> their negative log2 in eighths of an octave."""
    p = np.maximum(frequencies / frequencies.sum(axis=-1, keepdims=True), 2.0**-PRECISION)
    return cast(Bytes, np.rint(-RESOLUTION * np.log2(p)).astype(np.uint8))


def _weights() -> Int:
    """(MAX_LEVEL + 1,) integer weight of each level, in proportion to 2**(-level / RESOLUTION)."""
    return level_weights(RESOLUTION)[1 : MAX_LEVEL + 2]


def _cdfs(levels: Bytes) -> npt.NDArray[np.uint32]:
    """Levels (..., k) -> CDFs (..., k + 1)."""
    rows = _weights()[levels].reshape(-1, levels.shape[-1])
    cdfs = np.stack([cdf_from_counts(row, PRECISION) for row in rows])
    return cdfs.reshape(*levels.shape[:-1], levels.shape[-1] + 1)


def _bits(levels: Bytes) -> Float64:
    """Levels (..., k) -> bits of each symbol under the CDFs made of them, to 0.01% or so."""
    weights = _weights()[levels].astype(np.float64)
    total = weights.sum(axis=-1, keepdims=True)
    return cast(Float64, np.log2(total) - np.log2(weights))


@cache
def _default_cdfs() -> npt.NDArray[np.uint32]:
    return _cdfs(default_levels())


class MagnitudeModel:
    """Static tables, field profiles and the rules above, for rows of m integers.

    expected: (n_classes, m) uint8 indices e. next_state (n_states, 2) and quantizer (n_states,):
    the machine; one state that uses quantizer 0 stands for plain integers (``PLAIN``).
    table_levels: (2, N_TABLES, N_SYMBOLS) and class_levels: (n_classes,), uint8: how rare each
    symbol and class is, in eighths of an octave; None for the default tables and for classes
    equally frequent.

    Symbols are (n, n_fields) uint16 codes, the zigzag map of k: 0, 1, -1, 2, -2 ... -> 0, 1, 2, 3,
    4; with more than one class, field 0 is the row's class and the integers follow. The members of
    ``model.SymbolModel`` are here too.
    """

    def __init__(
        self,
        expected: Bytes,
        next_state: Bytes,
        quantizer: Bytes,
        table_levels: Bytes | None = None,
        class_levels: Bytes | None = None,
    ) -> None:
        self.expected = np.ascontiguousarray(expected, np.uint8)
        self.next_state = np.ascontiguousarray(next_state, np.uint8)
        self.quantizer = np.ascontiguousarray(quantizer, np.uint8)
        self.table_levels = table_levels
        if class_levels is None:
            class_levels = np.zeros(self.n_classes, np.uint8)
        self.class_levels = class_levels

    # -- shapes -------------------------------------------------------------------------------
    @property
    def n_classes(self) -> int:
        """Number of row classes, each with its own profile of expected magnitudes."""
        return len(self.expected)

    @property
    def n_fields(self) -> int:
        """Symbols a row: the class, where there are several, and the integers."""
        return int(self.expected.shape[1]) + (self.n_classes > 1)

    @property
    def alphabet_sizes(self) -> Int:
        """(n_fields,) number of values of each symbol."""
        sizes = np.full(self.n_fields, 2 * MAX_INDEX + 1, np.int64)
        if self.n_classes > 1:
            sizes[0] = self.n_classes
        return sizes

    # -- what kernels read ----------------------------------------------------------------------
    @cached_property
    def rules(self) -> Rules:
        """The context's rules, in the kernels' order: ``base`` = e less the quarter octaves of
        ``usual``, and ``gain``, both (n_classes, m) int32; the log table; the machine."""
        from . import _magnitude_kernels as kernels

        base = np.empty(self.expected.shape, np.int32)
        gain = np.empty(self.expected.shape, np.int32)
        kernels.profile(self.expected, *field_rules(), seen_table(), base, gain)
        return base, gain, seen_table(), self.next_state, self.quantizer

    @cached_property
    def _coding_tables(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """CDF of the classes, and all CDFs of magnitudes one behind the other."""
        levels = self.table_levels
        return _cdfs(self.class_levels), (
            _default_cdfs() if levels is None else _cdfs(levels)
        ).ravel()

    @cached_property
    def _lookup(self) -> Bytes:
        """For each table and bucket of values, the symbol that owns the bucket's first value."""
        width = PRECISION - BUCKET_BITS
        cdfs = self._coding_tables[1].reshape(-1, N_SYMBOLS + 1).astype(np.int64)
        edges = cdfs + (1 << width) - 1 >> width
        symbols = np.arange(N_SYMBOLS, dtype=np.uint8)
        return np.concatenate([np.repeat(symbols, np.diff(row)) for row in edges])

    # -- learning -----------------------------------------------------------------------------
    @classmethod
    def fit(
        cls,
        k: npt.NDArray[np.int16],
        next_state: Bytes,
        quantizer: Bytes,
        *,
        row_class: Int | None = None,
        n_classes: int = 1,
    ) -> MagnitudeModel:
        """Learn profiles and tables from (n, m) integers in -MAX_INDEX..MAX_INDEX. O(n m).

        A class with few rows leans on the profile of all rows (as if it had POOLED_WEIGHT more of
        those). row_class: (n,) in 0..n_classes - 1; None: all 0.
        """
        from . import _magnitude_kernels as kernels

        k = np.ascontiguousarray(k, np.int16)
        rows = np.zeros(len(k), np.int64) if row_class is None else row_class
        rows = np.ascontiguousarray(rows, np.int64)
        sums = np.zeros((n_classes, k.shape[1]), np.int64)
        machine = np.asarray(next_state, np.uint8), np.asarray(quantizer, np.uint8)
        kernels.totals(k, rows, *machine, sums)
        counts = np.bincount(rows, minlength=n_classes)
        pooled = sums.sum(axis=0) / max(1, len(k))
        means = (sums + POOLED_WEIGHT * pooled) / (counts[:, None] + POOLED_WEIGHT)
        model = cls(magnitude_index(means), *machine, class_levels=_levels(counts + 0.5))
        return model.with_counts(model.histogram(rows, k)[0])

    def histogram(self, row_class: Int, k: npt.NDArray[np.int16]) -> tuple[Int, int]:
        """How often each symbol of each table occurs, (2, N_TABLES, N_SYMBOLS), and the bits that
        are stored as they are, for rows of integers (n, m). O(n m)."""
        from . import _magnitude_kernels as kernels

        counts = np.zeros((2, N_TABLES, N_SYMBOLS), np.int64)
        return counts, kernels.count(k, row_class, *self.rules, counts)

    def with_counts(self, counts: npt.NDArray[Any]) -> MagnitudeModel:
        """The same model with tables made from (2, N_TABLES, N_SYMBOLS) counts, each leaning on the
        default table as if DEFAULT_WEIGHT symbols had been seen of it."""
        levels = _levels(counts + DEFAULT_WEIGHT * default_frequencies())
        model = MagnitudeModel(
            self.expected, self.next_state, self.quantizer, levels, self.class_levels
        )
        model.rules = self.rules  # they depend on the profile alone
        return model

    def _symbol_bits(self) -> Float64:
        """Bits of each symbol of each table, (2, N_TABLES, N_SYMBOLS)."""
        return _bits(default_levels() if self.table_levels is None else self.table_levels)

    def rates(self) -> tuple[npt.NDArray[np.float32], Int]:
        """For a search: bits of a magnitude at each scale, (2, N_SCALES, N_SYMBOLS + 1) float32,
        and the number of low bits of each scale (N_SCALES,). Column 0 is for 0, column 1 + symbol
        for other magnitudes, low bits and sign included, what follows an escape left out."""
        scale = np.arange(N_SCALES)
        shift = np.maximum(0, scale - (N_TABLES - 2)) >> 1
        bits = self._symbol_bits()[:, scale - 2 * shift]
        bits[:, :, 1:] += shift[:, None]
        bits[0, :, 0] += np.maximum(shift - 1, 0)
        return np.concatenate([bits[:, :, :1], bits + 1], axis=2, dtype=np.float32), shift

    def rate_bits(self, symbols: npt.NDArray[Any]) -> float:
        """Ideal code length of (n, n_fields) symbols in bits. O(n m)."""
        rows, k = self.split(symbols)
        counts, raw = self.histogram(rows, k)
        bits = float((counts * self._symbol_bits()).sum()) + raw
        return bits + float(_bits(self.class_levels)[rows].sum())

    # -- symbols <-> bytes --------------------------------------------------------------------
    def split(self, symbols: npt.NDArray[Any]) -> tuple[Int, npt.NDArray[np.int16]]:
        """(n, n_fields) symbols -> row classes (n,) and integers k (n, m)."""
        rows = np.zeros(len(symbols), np.int64)
        if self.n_classes > 1:
            rows, symbols = symbols[:, 0].astype(np.int64), symbols[:, 1:]
        code = np.ascontiguousarray(symbols, np.uint16)
        odd = code & np.uint16(1)
        magnitude = ((code >> np.uint16(1)) + odd).view(np.int16)
        even = odd.view(np.int16) - np.int16(1)  # -1 where k is negative or zero
        return rows, (magnitude ^ even) - even

    def join(self, row_class: Int, k: npt.NDArray[np.int16]) -> npt.NDArray[np.uint16]:
        """Inverse of ``split``."""
        symbols = np.empty((len(k), self.n_fields), np.uint16)
        code = symbols[:, 1:] if self.n_classes > 1 else symbols
        np.left_shift(np.abs(k).view(np.uint16), np.uint16(1), out=code)
        code -= k > 0
        if self.n_classes > 1:
            symbols[:, 0] = row_class
        return symbols

    def encode(self, symbols: npt.NDArray[Any]) -> bytes:
        """(n, n_fields) symbols -> one block. O(n m); the decoder needs n. InputError where one is
        outside its alphabet."""
        from . import _magnitude_kernels as kernels
        from . import range_coder as rc

        codes = np.asarray(enter_codes(symbols, self.alphabet_sizes)[0], np.uint16)
        n, m = len(codes), self.expected.shape[1]
        q = _lane_rows(n, m)
        # the lanes' rows, and for each row its class and at most five puts an integer
        words = np.empty(rc.capacity((n - (LANES - 1) * q) * (1 + 5 * m)), np.uint32)
        class_cdf, cdf = self._coding_tables
        lanes = []
        for lane in range(LANES if q else 1):
            begin, rest = lane * q, n if lane else LANES * q
            size = kernels.encode_lane(
                codes, begin, begin + q, rest, class_cdf, cdf, words, *self.rules
            )
            lanes.append(rc.words_to_bytes(words, size))
        if not q:
            return lanes[0]
        lengths = [len(lane) for lane in lanes[:-1]]
        steps = [fold(int(step)) for step in np.diff(lengths)]
        return b"".join([number(lengths[0]), *map(number, steps), *lanes])

    def decode(self, data: bytes | memoryview, n: int) -> npt.NDArray[np.uint16]:
        """Inverse of ``encode``: (n, n_fields). Wrong bytes give wrong symbols, each within its
        alphabet (integrity is the container's checksums' business), or CorruptDataError."""
        from . import _magnitude_kernels as kernels
        from . import range_coder as rc

        q = _lane_rows(n, self.expected.shape[1])
        lanes = [memoryview(data)]
        if q:
            reader = Reader(data, "block")
            lengths = [reader.number(1 << 35)]
            lengths += [unfold(reader.number(1 << 35)) for _ in range(LANES - 2)]
            lanes = [reader.take(int(length)) for length in np.cumsum(lengths)]
            lanes.append(reader.rest())
        rows = [rc.words_from_bytes(lane) for lane in lanes]
        words = np.zeros((LANES, max(row.size for row in rows)), np.uint32)
        for i, row in enumerate(rows):
            words[i, : row.size] = row
        symbols = np.empty((n, self.n_fields), np.uint16)
        class_cdf, cdf = self._coding_tables
        kernels.decode_lanes(words, q, symbols, class_cdf, cdf, self._lookup, *self.rules)
        return symbols

    # -- side information ---------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """Profiles, class sizes and tables; the machine is the caller's to remember.

        number n_classes | number m | 1 if there are tables, else 0 | deflated: class levels
        (n_classes), profile (n_classes, m) as differences along each row modulo 256, table levels
        """
        steps = np.diff(self.expected, axis=1, prepend=np.uint8(0))
        payload = self.class_levels.tobytes() + steps.tobytes()
        if self.table_levels is not None:
            payload += self.table_levels.tobytes()
        head = number(self.n_classes) + number(self.expected.shape[1])
        return head + bytes([self.table_levels is not None]) + zlib.compress(payload, 9)

    @classmethod
    def from_bytes(cls, data: bytes, next_state: Bytes, quantizer: Bytes) -> MagnitudeModel:
        """Inverse of ``to_bytes``; CorruptDataError or LimitError on anything else."""
        name = "magnitude model"
        reader = Reader(data, name)
        n_classes, m = reader.number(MAX_CLASSES), reader.number(MAX_FIELDS)
        if n_classes * m > MAX_PROFILE:
            raise LimitError(f"{name}: {n_classes} classes of {m} fields exceed {MAX_PROFILE}")
        if not n_classes * m:
            raise CorruptDataError(f"{name}: {n_classes} classes of {m} fields")
        table_bytes = 2 * N_TABLES * N_SYMBOLS * reader.choice(2, "whether there are tables")
        size = n_classes + n_classes * m + table_bytes
        unpack = zlib.decompressobj()
        try:
            payload = unpack.decompress(reader.rest(), size + 1)
        except zlib.error as error:
            raise CorruptDataError(f"{name}: {error}") from None
        if len(payload) != size or not unpack.eof or unpack.unused_data:
            raise CorruptDataError(f"{name}: expected {size} bytes of tables")
        values = np.frombuffer(payload, np.uint8)
        class_levels, steps, tables = np.split(values, [n_classes, n_classes + n_classes * m])
        expected = np.cumsum(steps.reshape(n_classes, m), axis=1, dtype=np.uint8)
        if expected.max() > MAX_E:
            raise CorruptDataError(f"{name}: expected magnitude out of range")
        if max(class_levels.max(), tables.max(initial=0)) > MAX_LEVEL:
            raise CorruptDataError(f"{name}: table entry out of range")
        shaped = tables.reshape(2, N_TABLES, N_SYMBOLS) if table_bytes else None
        return cls(expected, next_state, quantizer, shaped, class_levels)


def _lane_rows(n: int, m: int) -> int:
    """Rows of a lane; 0 where the block is one message."""
    return n // LANES if n * m >= LANES_FROM else 0


# One state that always uses quantizer 0: plain integers, |y| = 2|k|.
PLAIN = (np.zeros((1, 2), np.uint8), np.zeros(1, np.uint8))


def integers_to_bytes(a: npt.NDArray[np.int16]) -> bytes:
    """A matrix (n, m) of integers, columns of similar size -> bytes, e.g. a rotation. O(size).

    number: length of the model | the model | a block. InputError for -32768, which has no code.
    """
    if a.size and int(a.min()) < -MAX_INDEX:
        raise InputError(f"expected integers of at least {-MAX_INDEX}, got {int(a.min())}")
    model = MagnitudeModel.fit(a, *PLAIN)
    plain = MagnitudeModel(model.expected, *PLAIN)
    coded = []
    for m in (model, plain):  # own tables pay only for larger matrices
        head = m.to_bytes()
        coded.append(number(len(head)) + head + m.encode(m.join(np.zeros(len(a), np.int64), a)))
    return min(coded, key=len)


def integers_from_bytes(data: bytes, shape: tuple[int, int]) -> npt.NDArray[np.int16]:
    """Inverse of ``integers_to_bytes``. CorruptDataError or LimitError where the bytes do not fit
    the shape, wrong integers where they are wrong otherwise."""
    reader = Reader(data, "integers")
    model = MagnitudeModel.from_bytes(bytes(reader.take(reader.number(1 << 35))), *PLAIN)
    if model.n_classes != 1 or model.n_fields != shape[1]:
        raise CorruptDataError(f"integers: model of {model.n_fields} columns for shape {shape}")
    return model.split(model.decode(reader.rest(), shape[0]))[1]
