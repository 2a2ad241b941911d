"""The compiled loops of ``magnitude``: contexts, counting, coding. Rules and names are explained
there.

Arrays that all kernels take, called the rules: ``base`` and ``gain`` (n_classes, m) int32, ``log``
from ``magnitude.seen_table``, and the machine, ``next_state`` (n_states, 2) and ``quantizer``
(n_states,) uint8. Indices are made unsigned where a signed one would cost a test for < 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .._numba import njit
from .magnitude import (
    BUCKET_BITS,
    CAP,
    ESCAPE,
    ESCAPE_BITS,
    LANES,
    MAX_INDEX,
    MEMORY,
    N_SCALES,
    N_SYMBOLS,
    N_TABLES,
    PRECISION,
    PRIOR,
    SEEN_SHIFT,
)
from .range_coder import (
    Integer,
    Words,
    advance,
    carry,
    finish,
    get_raw,
    kernel,
    peek,
    pull,
    push,
    put,
    put_raw,
    start_reading,
    start_writing,
)

F = TypeVar("F", bound=Callable[..., Any])
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_U1 = np.uint64(1)
_P = np.uint64(PRECISION)
_LAST_VALUE = np.uint64((1 << PRECISION) - 1)
_BUCKET_BITS = np.uint64(BUCKET_BITS)
_BUCKET = np.uint64(PRECISION - BUCKET_BITS)
_EDGES = np.uint64(N_SYMBOLS + 1)


def inlined(function: F) -> F:
    """``kernel`` for the bodies of loops: LLVM would call these (with every field of every array
    as an argument), which costs as much as they do."""
    return cast(F, njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(function))


@inlined
def signed(value: Integer) -> int:
    """value as an int64 whatever its type: numba takes uint64 and int64 together for float64."""
    return int(np.int64(value))


# -- context -----------------------------------------------------------------------------------


@inlined
def scale_of(base: Integer, seen: int, log: Bytes) -> int:
    """Which scale the next integer is coded at: 0..N_SCALES - 1."""
    scale = (signed(base) + signed(log[np.uint64(seen >> SEEN_SHIFT)])) >> 1
    return min(max(scale, 0), N_SCALES - 1)


@inlined
def shift_of(scale: int) -> int:
    """Number of low bits of a magnitude that go uncoded at this scale; the rest is coded with table
    ``scale - 2 * shift``."""
    return max(scale - (N_TABLES - 2), 0) >> 1


@inlined
def cut(magnitude: int, quantizer: int, shift: int) -> tuple[int, int, int]:
    """A magnitude's symbol, were there no escapes; its number of low bits; and these."""
    if shift == 0:
        return magnitude, 0, 0
    if quantizer == 1:  # whose zero is rare: a symbol of its own
        if magnitude == 0:
            return 0, 0, 0
        return (magnitude - 1 >> shift) + 1, shift, magnitude - 1 & (1 << shift) - 1
    moved = magnitude + (1 << shift >> 1)
    if moved >> shift == 0:  # half a cell, the other half is below zero
        return 0, shift - 1, magnitude
    return moved >> shift, shift, moved & (1 << shift) - 1


@inlined
def low_bits(symbol: int, quantizer: int, shift: int) -> int:
    """Number of low bits behind a symbol."""
    if symbol > 0 or shift == 0:
        return shift
    return 0 if quantizer == 1 else shift - 1


@inlined
def joined(symbol: int, low: int, quantizer: int, shift: int) -> int:
    """Inverse of ``cut``, for a shift: the magnitude, held at MAX_INDEX."""
    if symbol == 0:
        return low
    first = 1 - (1 << shift) if quantizer == 1 else -(1 << shift >> 1)
    return min((symbol << shift | low) + first, MAX_INDEX)


@inlined
def after(seen: int, magnitude: int, gain: Integer) -> int:
    """The running sum once a lattice magnitude has been seen."""
    return seen + min(magnitude * signed(gain), CAP) - (seen >> MEMORY)


@kernel
def profile(
    expected: Bytes, gain_of: Ints, counted_of: Ints, log: Bytes, base: Ints, gain: Ints
) -> None:
    """``base`` and ``gain`` (n_classes, m) of these expected magnitudes (n_classes, m)."""
    n_classes, m = expected.shape
    for c in range(n_classes):
        usual = PRIOR
        for j in range(m):
            e = signed(expected[c, j])
            gain[c, j] = gain_of[e]
            base[c, j] = e - signed(log[usual >> SEEN_SHIFT])
            usual += signed(counted_of[e]) - (usual >> MEMORY)


# -- learning ----------------------------------------------------------------------------------


@kernel
def lattice(k: npt.NDArray[np.int16], next_state: Bytes, quantizer: Bytes) -> npt.NDArray[np.int32]:
    """Indices (n, m) -> lattice values y (n, m) int32, following the machine along each row."""
    n, m = k.shape
    y = np.empty((n, m), np.int32)
    for i in range(n):
        state = np.uint64(0)
        for j in range(m):
            v = signed(k[i, j])
            sign = signed(v > 0) - signed(v < 0)
            y[i, j] = 2 * v - sign * signed(quantizer[state])
            state = np.uint64(next_state[state, np.uint64(v & 1)])
    return y


@kernel
def totals(
    k: npt.NDArray[np.int16],
    row_class: npt.NDArray[np.int64],
    next_state: Bytes,
    quantizer: Bytes,
    sums: npt.NDArray[np.int64],  # (n_classes, m) result
) -> None:
    """Add up the lattice magnitudes |y| of each class and field."""
    n, m = k.shape
    for i in range(n):
        c = row_class[i]
        state = np.uint64(0)
        for j in range(m):
            v = abs(signed(k[i, j]))
            sums[c, j] += 2 * v - signed(v > 0) * signed(quantizer[state])
            state = np.uint64(next_state[state, np.uint64(v & 1)])


@kernel
def count(
    k: npt.NDArray[np.int16],
    row_class: npt.NDArray[np.int64],
    base: Ints,
    gain: Ints,
    log: Bytes,
    next_state: Bytes,
    quantizer: Bytes,
    histogram: npt.NDArray[np.int64],  # (2, N_TABLES, N_SYMBOLS) result
) -> int:
    """Add how often each (quantizer, table, symbol) occurs in k to ``histogram``. Returns the
    number of bits that are stored as they are: signs, low bits and what follows escapes."""
    n, m = k.shape
    raw = 0
    for i in range(n):
        c = row_class[i]
        state = np.uint64(0)
        seen = PRIOR
        for j in range(m):
            v = abs(signed(k[i, j]))
            some = signed(v > 0)
            q = signed(quantizer[state])
            scale = scale_of(base[c, j], seen, log)
            shift = shift_of(scale)
            full, n_low, _ = cut(v, q, shift)
            symbol = min(full, ESCAPE)
            histogram[q, scale - 2 * shift, symbol] += 1
            raw += n_low + some
            if symbol == ESCAPE:
                raw += ESCAPE_BITS + _length(full - ESCAPE + 1)
            seen = after(seen, 2 * v - q * some, gain[c, j])
            state = np.uint64(next_state[state, np.uint64(v & 1)])
    return raw


@kernel
def _length(value: int) -> int:
    """Number of bits behind the leading one of value >= 1."""
    length = 0
    while value >> length > 1:
        length += 1
    return length


# -- coding ------------------------------------------------------------------------------------


@inlined
def _put(
    words: Words,
    pos: Integer,
    low: np.uint64,
    range_: np.uint64,
    code: int,
    seen: int,
    state: int,
    base: Integer,  # of the field at hand
    gain: Integer,
    log: Bytes,
    next_state: Bytes,
    quantizer: Bytes,
    cdf: npt.NDArray[np.uint32],  # 2 * N_TABLES CDFs, one behind the other
) -> tuple[Integer, np.uint64, np.uint64, int, int]:
    """Write one integer, given by its code: (pos, low, range_, seen, state) behind it."""
    q = signed(quantizer[np.uint64(state)])
    scale = scale_of(base, seen, log)
    shift = shift_of(scale)
    v = (code + 1) >> 1
    some = np.uint64(v > 0)
    full, n_low, rest = cut(v, q, shift)
    symbol = min(full, ESCAPE)
    at = np.uint64(q * N_TABLES + scale - 2 * shift) * _EDGES + np.uint64(symbol)
    start = np.uint64(cdf[at])
    size = np.uint64(cdf[at + _U1]) - start
    pos, low, range_ = put(words, pos, low, range_, start, size, PRECISION)
    if symbol == ESCAPE:
        beyond = full - ESCAPE + 1
        length = _length(beyond)
        pos, low, range_ = put_raw(words, pos, low, range_, length, ESCAPE_BITS)
        pos, low, range_ = put_raw(words, pos, low, range_, beyond - (1 << length), length)
    if n_low > 0:
        pos, low, range_ = put_raw(words, pos, low, range_, rest, n_low)
    # the sign, without a branch that nobody can foresee: put_raw of one bit, or of none for zero
    half = range_ >> some
    moved = low + half * (some & ~np.uint64(code))
    if moved < low:
        carry(words, pos)
    pos, low, range_ = push(words, pos, moved, half)
    seen = after(seen, 2 * v - q * signed(some), gain)
    return pos, low, range_, seen, signed(next_state[np.uint64(state), np.uint64(v & 1)])


@inlined
def _get(
    words: Words,
    pos: Integer,
    code: np.uint64,
    range_: np.uint64,
    seen: int,
    state: int,
    base: Integer,  # of the field at hand
    gain: Integer,
    log: Bytes,
    next_state: Bytes,
    quantizer: Bytes,
    cdf: npt.NDArray[np.uint32],
    first: Bytes,  # 2 * N_TABLES bucket tables, one behind the other
) -> tuple[int, Integer, np.uint64, np.uint64, int, int]:
    """Inverse of ``_put``: the integer's code, then (pos, code, range_, seen, state)."""
    q = signed(quantizer[np.uint64(state)])
    scale = scale_of(base, seen, log)
    shift = shift_of(scale)
    table = np.uint64(q * N_TABLES + scale - 2 * shift)
    unit = range_ >> _P
    value = min(code // unit, _LAST_VALUE)
    at = table * _EDGES + np.uint64(first[(table << _BUCKET_BITS) + (value >> _BUCKET)])
    while np.uint64(cdf[at + _U1]) <= value:
        at += _U1
    start = np.uint64(cdf[at])
    size = np.uint64(cdf[at + _U1]) - start
    pos, code, range_ = pull(words, pos, code - unit * start, unit * size)
    v = signed(at - table * _EDGES)
    if v == ESCAPE:
        length, pos, code, range_ = get_raw(words, pos, code, range_, ESCAPE_BITS)
        rest, pos, code, range_ = get_raw(words, pos, code, range_, length)
        v += (1 << signed(length)) - 1 + signed(rest)
    if shift > 0:
        low, pos, code, range_ = get_raw(words, pos, code, range_, low_bits(v, q, shift))
        v = joined(v, signed(low), q, shift)
    v = min(v, MAX_INDEX)
    some = np.uint64(v > 0)
    half = range_ >> some
    negative = some & np.uint64(code >= half)
    pos, code, range_ = pull(words, pos, code - half * negative, half)
    seen = after(seen, 2 * v - q * signed(some), gain)
    state = signed(next_state[np.uint64(state), np.uint64(v & 1)])
    return 2 * v - signed(some & ~negative), pos, code, range_, seen, state


@kernel
def encode_lane(
    symbols: npt.NDArray[np.uint16],  # (n, front + m), each below its alphabet size
    begin: int,  # the lane's rows: begin to end, and from ``rest`` on
    end: int,
    rest: int,
    class_cdf: npt.NDArray[np.uint32],  # (n_classes + 1,)
    cdf: npt.NDArray[np.uint32],
    words: Words,  # capacity(rows * (1 + 5 m))
    base: Ints,
    gain: Ints,
    log: Bytes,
    next_state: Bytes,
    quantizer: Bytes,
) -> int:
    """The message of one lane; returns its length in bytes. About 8 ns an integer."""
    m = base.shape[1]
    front = symbols.shape[1] - m
    pos, low, range_ = start_writing()
    for i in range(end - begin + symbols.shape[0] - rest):
        row = begin + i if begin + i < end else rest + i - (end - begin)
        c = 0
        if front:
            c = signed(symbols[row, 0])
            start = class_cdf[c]
            pos, low, range_ = put(
                words, pos, low, range_, start, class_cdf[c + 1] - start, PRECISION
            )
        seen, state = PRIOR, 0
        for j in range(m):
            code, b, g = signed(symbols[row, front + j]), signed(base[c, j]), signed(gain[c, j])
            pos, low, range_, seen, state = _put(
                words, pos, low, range_, code, seen, state, b, g,
                log, next_state, quantizer, cdf,
            )  # fmt: skip
    return finish(words, pos, low, range_)


@kernel
def _get_class(
    words: Words,
    pos: Integer,
    code: np.uint64,
    range_: np.uint64,
    class_cdf: npt.NDArray[np.uint32],
) -> tuple[int, Integer, np.uint64, np.uint64]:
    """A row's class, then (pos, code, range_)."""
    if class_cdf.size == 2:  # a single class is not stored
        return 0, pos, code, range_
    value, unit = peek(code, range_, PRECISION)
    c = 0
    while np.uint64(class_cdf[c + 1]) <= value:
        c += 1
    start = class_cdf[c]
    pos, code, range_ = advance(words, pos, code, range_, unit, start, class_cdf[c + 1] - start)
    return c, pos, code, range_


@kernel
def decode_lanes(
    words: Words,  # (LANES, n_words), the last word of each lane zero
    q: int,  # rows of a lane; lane 0 also has those behind LANES q
    symbols: npt.NDArray[np.uint16],  # (n, front + m) result
    class_cdf: npt.NDArray[np.uint32],
    cdf: npt.NDArray[np.uint32],
    first: Bytes,
    base: Ints,
    gain: Ints,
    log: Bytes,
    next_state: Bytes,
    quantizer: Bytes,
) -> None:
    """Inverse of ``encode_lane`` for all lanes, side by side: each is one long chain of dependent
    operations, and four of them overlap. About 12 ns an integer."""
    n = symbols.shape[0]
    m = base.shape[1]
    front = symbols.shape[1] - m
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    p0, c0, r0 = start_reading(w0)
    p1, c1, r1 = start_reading(w1)
    p2, c2, r2 = start_reading(w2)
    p3, c3, r3 = start_reading(w3)
    for row in range(q):
        k0, p0, c0, r0 = _get_class(w0, p0, c0, r0, class_cdf)
        k1, p1, c1, r1 = _get_class(w1, p1, c1, r1, class_cdf)
        k2, p2, c2, r2 = _get_class(w2, p2, c2, r2, class_cdf)
        k3, p3, c3, r3 = _get_class(w3, p3, c3, r3, class_cdf)
        row1, row2, row3 = row + q, row + 2 * q, row + 3 * q
        if front:
            symbols[row, 0], symbols[row1, 0] = k0, k1
            symbols[row2, 0], symbols[row3, 0] = k2, k3
        s0 = s1 = s2 = s3 = PRIOR
        t0 = t1 = t2 = t3 = 0
        for j in range(m):
            b, g = base[k0, j], gain[k0, j]
            symbols[row, front + j], p0, c0, r0, s0, t0 = _get(
                w0, p0, c0, r0, s0, t0, b, g, log, next_state, quantizer, cdf, first
            )
            b, g = base[k1, j], gain[k1, j]
            symbols[row1, front + j], p1, c1, r1, s1, t1 = _get(
                w1, p1, c1, r1, s1, t1, b, g, log, next_state, quantizer, cdf, first
            )
            b, g = base[k2, j], gain[k2, j]
            symbols[row2, front + j], p2, c2, r2, s2, t2 = _get(
                w2, p2, c2, r2, s2, t2, b, g, log, next_state, quantizer, cdf, first
            )
            b, g = base[k3, j], gain[k3, j]
            symbols[row3, front + j], p3, c3, r3, s3, t3 = _get(
                w3, p3, c3, r3, s3, t3, b, g, log, next_state, quantizer, cdf, first
            )
    for row in range(LANES * q, n):
        k0, p0, c0, r0 = _get_class(w0, p0, c0, r0, class_cdf)
        if front:
            symbols[row, 0] = k0
        s0 = PRIOR
        t0 = 0
        for j in range(m):
            b, g = base[k0, j], gain[k0, j]
            symbols[row, front + j], p0, c0, r0, s0, t0 = _get(
                w0, p0, c0, r0, s0, t0, b, g, log, next_state, quantizer, cdf, first
            )
