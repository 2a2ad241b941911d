"""Bitshift trellis codes: the fine stage of fixed rate, any row of which is decoded by itself.

A row is one circle of B bits. Component j reads a window of L bits of it, its state, and stands
for an entry of a table; from one component to the next the window moves on by that component's bits
k_j. Neighbouring windows overlap, so a component of one bit still chooses among 2^L values: the
encoder looks for the circle whose windows all say nearly the right thing (Viterbi), the decoder
only shifts and looks up.

    circle   b0 b1 b2 b3 b4 b5 b6 b7 b8 ...          state_j = (state_{j-1} << k_j | next k_j bits)
    L = 4    [b0 b1 b2 b3]                            modulo 2^L
    k = 1       [b1 b2 b3 b4]                         value_j = scale_j * table[k_j][state_j]
    k = 2             [b3 b4 b5 b6]

The circle closes (tail-biting), so no bits are spent on a first state. Bits go to components by
their scales (reverse water-filling in whole bits), which a decoder works out from the scales alone.

Sources: Tseng et al., "QTIP: quantization with trellises and incoherence processing", NeurIPS 2024
(bitshift trellises and how to close them); Mao and Gray, "Rate-constrained trellis codes by random
permutation", 2010 (tables of random order are as good as any when L is large).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arrays import Float32
from ._threads import in_threads
from .clustering import check_int
from .entropy._magnitude_kernels import inlined
from .entropy.range_coder import kernel
from .errors import CorruptDataError, InputError, NotFittedError

Int16 = npt.NDArray[np.int16]
Int64 = npt.NDArray[np.int64]
Uint8 = npt.NDArray[np.uint8]

MAX_STATE_BITS = 12
MAX_BITS = 9  # of one component
MAX_COLUMNS = 1 << 16
ROWS = 64  # a thread encodes at a time
LEARN_NUMBERS = 1 << 18  # components from which tables are learned
N_ROUNDS = 2  # of encoding them and moving entries to the means of what chose them
PRIOR_WEIGHT = 2.0  # components that the first value of an entry counts for
JUNCTION = 6  # states' worth of bits on either side of the seam that decide how a circle closes
STEPS = 8  # of a scale to an octave
MAX_LOG_SCALE = 128 * STEPS
MANTISSA = 15  # bits of a scale within its octave; 2^(MANTISSA + i / STEPS), rounded:
MANTISSAS = np.array([32768, 35734, 38968, 42495, 46341, 50535, 55109, 60097], np.int64)
TABLE_BITS = 3  # entries of a table of k bits are multiples of 2^-(k + TABLE_BITS)
LATTICE_BITS = 15  # decoded coefficients are multiples of 2^-LATTICE_BITS of a row's usual norm

# log2, in 1/STEPS, of what a bit more takes from the error of a unit Gaussian component: codes of
# L = 10 leave 0.27 of its variance at 1 bit, 0.071 at 2, and about a quarter as much for each more.
GAINS = np.array([-4, -18] + [-34 - 16 * k for k in range(MAX_BITS - 2)], np.int64)


@inlined
def _reduce(cost: Float32, groups: int, least: Float32, back: Uint8) -> None:
    """Of the states that share what remains of the window, ``groups`` apart, the cheapest goes on:
    its cost into ``least``, the bits that leave its window into ``back``."""
    for g in range(groups):
        c0, c1 = cost[g], cost[groups + g]
        least[g] = c1 if c1 < c0 else c0
        back[g] = np.uint8(c1 < c0)
    for a in range(2, min(len(cost) // groups, 256)):
        others = cost[a * groups : (a + 1) * groups]
        for g in range(groups):
            better = others[g] < least[g]
            least[g] = others[g] if better else least[g]
            back[g] = np.uint8(a) if better else back[g]
    if len(cost) // groups > 256:  # nine bits: the highest stands behind the others
        for g in range(groups):
            back[groups + g] = 0
            for a in range(256, len(cost) // groups):
                if cost[a * groups + g] < least[g]:
                    least[g] = cost[a * groups + g]
                    back[g], back[groups + g] = a & 255, a >> 8


@inlined
def _extend(v: Any, width: Any, table: Float32, k: int, least: Float32, cost: Float32) -> None:
    """Each way on costs what its new window is off: loops of fixed length become vectors."""
    if k == 1:
        for g in range(len(cost) >> 1):
            d0, d1 = v - width * table[2 * g], v - width * table[2 * g + 1]
            cost[2 * g] = least[g] + d0 * d0
            cost[2 * g + 1] = least[g] + d1 * d1
    elif k == 2:
        for g in range(len(cost) >> 2):
            d0, d1 = v - width * table[4 * g], v - width * table[4 * g + 1]
            d2, d3 = v - width * table[4 * g + 2], v - width * table[4 * g + 3]
            cost[4 * g] = least[g] + d0 * d0
            cost[4 * g + 1] = least[g] + d1 * d1
            cost[4 * g + 2] = least[g] + d2 * d2
            cost[4 * g + 3] = least[g] + d3 * d3
    else:
        for start in range(0, len(cost), 8):
            fewest = least[start >> k]
            for i in range(8):
                d = v - width * table[start + i]
                cost[start + i] = fewest + d * d


@kernel
def _close(
    x: Float32,
    bits: Int64,
    kind: Int64,
    scale: Float32,
    tables: Float32,
    state_bits: int,
    first: int,
    last: int,
    start: Any,
    end: Any,
    cost: Float32,  # (2^L,) and the others: room to work in
    least: Float32,
    back: Uint8,  # (steps, 2^(L - 1))
    path: Int64,
) -> None:
    """Viterbi search over components first..last - 1 (counted round the circle) from state
    ``start`` (-1: any) to state ``end`` (-1: any): the states after each, into ``path``."""
    n_states = np.int64(1) << state_bits
    m = len(bits)
    if start < 0:
        for s in range(n_states):
            cost[s] = np.float32(0)
    else:
        for s in range(n_states):
            cost[s] = np.float32(np.inf)
        cost[start] = np.float32(0)
    for t in range(last - first):
        j = (first + t) % m  # first may be negative: before the seam
        k = bits[j]
        _reduce(cost, n_states >> k, least, back[t])
        _extend(x[j], scale[j], tables[kind[j]], k, least, cost)
    s = end
    if s < 0:
        s = 0
        for i in range(1, n_states):
            if cost[i] < cost[s]:
                s = i
    for t in range(last - first - 1, -1, -1):
        path[t] = s
        k = bits[(first + t) % m]
        g = s >> k
        left = np.int64(back[t, g])
        if k > 8:
            left |= np.int64(back[t, (n_states >> k) + g]) << 8
        s = (left << (state_bits - k)) | g


@kernel
def _search(
    x: Float32,
    bits: Int64,
    kind: Int64,
    scale: Float32,
    tables: Float32,
    state_bits: int,
    seam: tuple[int, int],
    states: npt.NDArray[np.uint16],
) -> None:
    """States (n, m) whose table entries are near the rows x (n, m): first a stretch around the
    seam of the circle decides the state there, then the whole row is searched from it to it.
    seam: components (before, after) it."""
    n, m = x.shape
    n_states = 1 << state_bits
    cost, least = np.empty(n_states, np.float32), np.empty(n_states, np.float32)
    back = np.empty((max(m, seam[0] + seam[1]), max(2, n_states // 2)), np.uint8)
    path = np.empty(max(m, seam[0] + seam[1]), np.int64)
    for r in range(n):
        _close(
            x[r], bits, kind, scale, tables, state_bits, -seam[0], seam[1], -1, -1,
            cost, least, back, path,
        )  # fmt: skip
        s = path[seam[0] - 1]
        _close(x[r], bits, kind, scale, tables, state_bits, 0, m, s, s, cost, least, back, path)
        for j in range(m):
            states[r, j] = path[j]


@kernel
def _write_circles(states: npt.NDArray[np.uint16], bits: Int64, out: Uint8) -> None:
    """The newest bits of each state (n, m), most significant first, into bytes (n, n_bytes)."""
    for r in range(states.shape[0]):
        word, held, at = np.int64(0), np.int64(0), 0
        for j in range(states.shape[1]):
            k = bits[j]
            word = (word << k) | (np.int64(states[r, j]) & ((np.int64(1) << k) - 1))
            held += k
            while held >= 8:
                held -= 8
                out[r, at] = (word >> held) & 255
                at += 1
            word &= (np.int64(1) << held) - 1
        if held:
            out[r, at] = word  # the last code has only as many values as bits are left


@kernel
def _read_circles(
    codes: Uint8,
    n_bits: int,
    columns: Int64,
    bits: Int64,
    shift: Int64,
    factor: Int64,
    tables: Int16,
    kind: Int64,
    state_bits: int,
    out: npt.NDArray[np.int32],
) -> None:
    """Inverse, and on to coefficients: columns (u,) of ``out`` (n, m) int32 get
    ``table[state] * factor >> shift``, rounded."""
    n_bytes = codes.shape[1]
    mask = (np.int64(1) << state_bits) - 1
    spare = 8 * n_bytes - n_bits
    for r in range(codes.shape[0]):
        state, seen = np.int64(0), np.int64(0)  # the last state_bits of the circle come before it
        for i in range(n_bytes - 1, -1, -1):
            width = 8 - spare if i == n_bytes - 1 else 8
            state |= np.int64(codes[r, i]) << seen
            seen += width
            if seen >= state_bits:
                break
        state &= mask
        word, held, at = np.int64(0), np.int64(0), 0
        for u in range(len(columns)):
            k = bits[u]
            while held < k:
                width = 8 - spare if at == n_bytes - 1 else 8
                word = (word << width) | np.int64(codes[r, at])
                held += width
                at += 1
            held -= k
            state = ((state << k) | (word >> held)) & mask
            word &= (np.int64(1) << held) - 1
            half = (np.int64(1) << shift[u]) >> 1
            out[r, columns[u]] = (np.int64(tables[kind[u], state]) * factor[u] + half) >> shift[u]


class _Circle(NamedTuple):
    """How one class's rows become bits: of the u components that get any, in order."""

    columns: Int64  # (u,)
    bits: Int64  # (u,)
    scale: Float32  # (u,)
    factor: Int64  # (u,) and shift: the same scale, from table entries to lattice points
    shift: Int64
    seam: tuple[int, int]


def allocate(log_scales: npt.NDArray[Any], total: int, most: int = MAX_BITS) -> Int64:
    """Bits (m,) of components with these scales, in 1/STEPS octaves: ``total`` in all, each where
    it takes most from the error, the first of equals first; at most ``most`` each. Integers only,
    for decoders repeat it. O(m log m)."""
    gain = 2 * np.asarray(log_scales, np.int64)[:, None] + GAINS[:most]
    order = np.argsort(-gain.ravel(), kind="stable")[:total]
    return np.bincount(order // gain.shape[1], minlength=len(gain)).astype(np.int64)


def gaussian_tables(state_bits: int, n_kinds: int, seed: int) -> Float32:
    """Quantiles of the unit Gaussian, (n_kinds, 2^L), each row in a random order of its own."""
    from statistics import NormalDist

    size = 1 << state_bits
    quantiles = [NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)]
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(quantiles) for _ in range(n_kinds)]).astype(np.float32)


class BitshiftQuantizer:
    """Trellis-coded quantization of coefficients at a fixed rate (see the module's text).

    state_bits: L, 4..12. One more doubles the time to encode and gains about 0.1 dB at L = 10;
    decoding costs the same. Components take at most L bits, and at most MAX_BITS; a rate that
    needs more than L a component is given a wider window.

    After ``fit``: ``row_bits_`` B; ``log_scales_`` (K, m) int16, of each class of rows, in eighths
    of an octave; ``tables_`` (n_kinds, 2^L) int16, row k - 1 for components of k bits, in units of
    2^-(k + 3). Codes are (n, ceil(B / 8)) uint8 with, where rows have classes, the class in front.
    """

    def __init__(self, *, state_bits: int = 10) -> None:
        self.state_bits = check_int("state_bits", state_bits, 4, MAX_STATE_BITS)
        self.row_bits_ = 0
        self.tables_: Int16 = np.zeros((0, 0), np.int16)
        self.log_scales_: Int16 = np.zeros((0, 0), np.int16)
        self.unit_exponent_ = 0
        self._circles: list[_Circle] = []

    # -- learning -----------------------------------------------------------------------------
    def fit(
        self,
        c: Float32,
        row_class: Int64,
        n_classes: int = 1,
        *,
        row_bits: float,
        seed: int = 0,
    ) -> BitshiftQuantizer:
        """Learn scales and tables from coefficients (n, m), n >= 1. row_bits: bits of a row's
        codes, all in; rounded down to a whole number, but one for the components.

        Tables start as Gaussian quantiles in random order and move to the means of the components
        that chose their entries (Lloyd). Time: a few encodings of LEARN_NUMBERS components.
        InputError where the rate is beyond MAX_BITS a component.
        """
        n, m = c.shape
        total = max(1, int(np.floor(row_bits - self._class_bits(n_classes) + 1e-9)))
        if total > MAX_BITS * m:
            raise InputError(
                f"expected at most {MAX_BITS * m} bits for {m} components, got {row_bits:.6g}"
            )
        # a component sees no more bits than the window holds: the rate may need a wider one
        state_bits = min(max(self.state_bits, -(-total // m)), total)
        variance = np.einsum("ij,ij->j", c, c, dtype=np.float64) / n
        scales = np.empty((n_classes, m))
        for i in range(n_classes):
            mine = c[row_class == i]
            own = np.einsum("ij,ij->j", mine, mine, dtype=np.float64)
            scales[i] = 0.5 * np.log2(np.maximum((own + 4 * variance) / (len(mine) + 4), 1e-38))
        log_scales = np.clip(np.rint(STEPS * scales), -MAX_LOG_SCALE, MAX_LOG_SCALE)
        log_scales = np.maximum(log_scales, log_scales.max() - 40 * STEPS)
        norm = float(np.sqrt(variance.sum())) or 1.0
        unit = int(np.ceil(np.log2(norm))) - LATTICE_BITS
        limit = min(MAX_BITS, state_bits)
        most = max(int(allocate(row, total, limit).max()) for row in log_scales)
        values = gaussian_tables(state_bits, most, seed)
        few = slice(None, None, max(1, n // max(1, LEARN_NUMBERS // m)))
        for rounds_left in range(N_ROUNDS, -1, -1):
            fine = 2.0 ** (np.arange(1, most + 1) + TABLE_BITS)[:, None]
            tables = np.clip(np.rint(values * fine), -32767, 32767).astype(np.int16)
            self._set(tables, log_scales.astype(np.int16), total, unit)
            if rounds_left:
                values = self._moved(values, c[few], row_class[few])
        return self

    def _moved(self, values: npt.NDArray[Any], c: Float32, row_class: Int64) -> Float32:
        """Table entries moved to the mean of the components that chose them, in units of their
        scales, each weighted by what it is worth."""
        kinds, size = values.shape
        total = np.zeros(kinds * size)
        count = np.zeros(kinds * size)
        for i, circle in enumerate(self._circles):
            mine = np.ascontiguousarray(c[row_class == i][:, circle.columns])
            if not len(mine):
                continue
            place = ((circle.bits - 1) * size + self._states(mine, circle)).ravel()
            weight = np.broadcast_to((circle.scale**2).astype(np.float64), mine.shape)
            total += np.bincount(place, (weight * mine / circle.scale).ravel(), kinds * size)
            count += np.bincount(place, weight.ravel(), kinds * size)
        mean_weight = count.sum() / max(1, len(c) * len(self._circles[0].bits))
        prior = PRIOR_WEIGHT * mean_weight + 1e-300
        return np.asarray((total + prior * values.ravel()) / (count + prior), np.float32).reshape(
            values.shape
        )

    def _set(
        self, tables: Int16, log_scales: Int16, row_bits: int, unit_exponent: int
    ) -> BitshiftQuantizer:
        """Take what is stored and work out the allocation from it, in integers."""
        self.tables_, self.log_scales_ = tables, log_scales
        self.row_bits_, self.unit_exponent_ = row_bits, unit_exponent
        self._values = tables * (2.0 ** -(np.arange(len(tables)) + 1 + TABLE_BITS))[:, None]
        self._values = np.ascontiguousarray(self._values, np.float32)
        self._circles = []
        for row in log_scales.astype(np.int64):
            bits = allocate(row, row_bits, min(MAX_BITS, self._state_bits))
            columns = np.flatnonzero(bits)
            bits, octave = bits[columns], row[columns] // STEPS
            factor = MANTISSAS[row[columns] % STEPS]
            shift = MANTISSA + bits + TABLE_BITS - octave + unit_exponent
            scale = np.ldexp(factor.astype(np.float64), octave - MANTISSA).astype(np.float32)
            # beyond 62 nothing is left of a product of 31 bits; never negative, see ``from_arrays``
            self._circles.append(
                _Circle(columns, bits, scale, factor, np.minimum(shift, 62), self._seam(bits))
            )
        return self

    def _seam(self, bits: Int64) -> tuple[int, int]:
        """Components before and after the seam whose bits make up JUNCTION states."""
        wanted = JUNCTION * self._state_bits
        rounds = -(-wanted // int(bits.sum()))  # a short circle is gone round more than once
        before = np.searchsorted(np.cumsum(np.tile(bits[::-1], rounds)), wanted)
        after = np.searchsorted(np.cumsum(np.tile(bits, rounds)), wanted)
        return int(before) + 1, int(after) + 1

    @property
    def _state_bits(self) -> int:
        return int(self.tables_.shape[1]).bit_length() - 1

    @staticmethod
    def _class_bits(n_classes: int) -> int:
        return (n_classes - 1).bit_length()

    # -- shapes -------------------------------------------------------------------------------
    @property
    def alphabet_sizes(self) -> Int64:
        """(n_fields,) number of values of each code column."""
        if not self.row_bits_:
            raise NotFittedError("BitshiftQuantizer is not fitted: call fit first")
        n_bytes = -(-self.row_bits_ // 8)
        sizes = np.full(n_bytes, 256, np.int64)
        sizes[-1] = 1 << (self.row_bits_ - 8 * (n_bytes - 1))
        k = len(self.log_scales_)
        return np.append(np.int64(k), sizes) if k > 1 else sizes

    # -- coefficients <-> codes ---------------------------------------------------------------
    def encode(self, c: Float32, row_class: Int64) -> Uint8:
        """Coefficients (n, m) -> codes (n, n_fields). O(n u 2^L) for the u components that get
        bits: about half a microsecond each at L = 10."""
        n_bytes = -(-self.row_bits_ // 8)
        codes = np.zeros((len(c), n_bytes), np.uint8)
        for i, circle in enumerate(self._circles):
            mine = np.flatnonzero(row_class == i)
            states = self._states(np.ascontiguousarray(c[mine][:, circle.columns]), circle)
            circles = np.zeros((len(mine), n_bytes), np.uint8)
            _write_circles(states, circle.bits, circles)
            codes[mine] = circles
        if len(self._circles) == 1:
            return codes
        return np.concatenate([row_class.astype(np.uint8)[:, None], codes], axis=1)

    def decode(self, codes: npt.NDArray[Any]) -> tuple[Int64, npt.NDArray[np.int32]]:
        """Codes -> row classes (n,) and lattice points (n, m), to be multiplied by ``step_``.
        O(n m): about 2 ns a component."""
        row_class = np.zeros(len(codes), np.int64)
        if len(self._circles) > 1:
            row_class, codes = codes[:, 0].astype(np.int64), codes[:, 1:]
        out = np.zeros((len(codes), self.log_scales_.shape[1]), np.int32)
        there = [int(c) for c in row_class[:1]]
        if len(codes) > 1 and len(self._circles) > 1:
            there = np.flatnonzero(np.bincount(row_class, minlength=len(self._circles))).tolist()
        one = len(there) == 1
        for i in there:
            circle = self._circles[i]
            mine = slice(None) if one else np.flatnonzero(row_class == i)
            circles = np.ascontiguousarray(codes[mine], np.uint8)
            points = out[mine]  # of one class: out itself
            _read_circles(
                circles, self.row_bits_, circle.columns, circle.bits, circle.shift, circle.factor,
                self.tables_, circle.bits - 1, self._state_bits, points,
            )  # fmt: skip
            if not one:
                out[mine] = points
        return row_class, out

    def circle(self, row_class: int) -> _Circle:
        """How the bits of rows of one class are dealt out, and their scales."""
        return self._circles[row_class]

    @property
    def values(self) -> Float32:
        """Tables (n_kinds, 2^L) in units of a component's scale."""
        return self._values

    @property
    def step_(self) -> float:
        """Distance of lattice points: a power of two."""
        return float(2.0**self.unit_exponent_)

    def _states(self, c: Float32, circle: _Circle) -> npt.NDArray[np.uint16]:
        """States (n, u) of the best circles found for the components (n, u) that get bits."""
        states = np.empty(c.shape, np.uint16)

        def search(start: int) -> None:
            rows = slice(start, start + ROWS)
            _search(
                c[rows], circle.bits, circle.bits - 1, circle.scale, self._values,
                self._state_bits, circle.seam, states[rows],
            )  # fmt: skip

        in_threads(search, range(0, len(c), ROWS))
        return states

    # -- what travels in a file ---------------------------------------------------------------
    def get_config(self) -> dict[str, Any]:
        """What the arrays do not say, as JSON values."""
        return {"row_bits": self.row_bits_, "unit": self.unit_exponent_}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Learned arrays at stored precision: ``tables`` (n_kinds, 2^L) int16 and ``scales`` (K, m)
        int16, each row as differences from one to the next, the first from 0."""
        return {
            "tables": self.tables_,
            "scales": np.diff(self.log_scales_, axis=1, prepend=np.int16(0)),
        }

    @classmethod
    def from_arrays(
        cls, config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]
    ) -> BitshiftQuantizer:
        """Rebuild from ``get_config`` and ``arrays``; CorruptDataError where they make no sense."""
        tables, scales = arrays.get("tables"), arrays.get("scales")
        row_bits, unit = config.get("row_bits"), config.get("unit")
        for name, a in (("tables", tables), ("scales", scales)):
            if a is None or a.dtype != np.int16 or a.ndim != 2 or not a.size:
                raise CorruptDataError(f"bitshift: expected {name} of int16")
        assert tables is not None
        assert scales is not None
        n_kinds, size = tables.shape
        state_bits = size.bit_length() - 1
        k, m = scales.shape
        if size != 1 << state_bits or state_bits > MAX_STATE_BITS or n_kinds > MAX_BITS:
            raise CorruptDataError(f"bitshift: tables of shape {tables.shape}")
        if k > 256 or m > MAX_COLUMNS:
            raise CorruptDataError(f"bitshift: scales of shape {scales.shape}")
        limit = min(MAX_BITS, state_bits)
        if type(row_bits) is not int or not max(1, state_bits) <= row_bits <= limit * m:
            raise CorruptDataError(f"bitshift: {row_bits!r} bits for {m} components")
        log_scales = np.cumsum(scales.astype(np.int64), axis=1)
        if np.abs(log_scales).max() > MAX_LOG_SCALE or int(tables.min()) < -32767:
            raise CorruptDataError("bitshift: scales or tables out of range")
        most = max(int(allocate(row, row_bits, limit).max()) for row in log_scales)
        if most != n_kinds:
            raise CorruptDataError(f"bitshift: {n_kinds} tables where components take {most} bits")
        if type(unit) is not int or not -126 <= unit <= 126:
            raise CorruptDataError(f"bitshift: unit 2^{unit!r}")
        if int(log_scales.max()) // STEPS - unit > MANTISSA + 1 + TABLE_BITS:
            raise CorruptDataError("bitshift: scales too large for the unit")
        self = cls(state_bits=max(4, state_bits))
        return self._set(tables, log_scales.astype(np.int16), row_bits, unit)
