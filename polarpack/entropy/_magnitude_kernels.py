"""The compiled loops of ``magnitude``: contexts, counting, coding. Rules and names are explained there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from ..errors import CorruptDataError
from .magnitude import CAP, LANES, MAX_INDEX, MEMORY, N_SCALES, N_SYMBOLS, N_TABLES, PRECISION, PRIOR, SEEN_SHIFT

ESCAPE = N_SYMBOLS - 1
MAX_ESCAPE_BITS = 15
Int = npt.NDArray[np.int64]

_LOW32 = np.uint64(0xFFFFFFFF)
_TOP = np.uint64(0xFFFFFFFFFFFFFFFF)
_RENORM = np.uint64(1 << 32)
_WORD = np.uint64(32)
_P = np.uint64(PRECISION)
_MAX_VALUE = np.uint64((1 << PRECISION) - 1)


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def scale_of(base, seen, log):  # type: ignore[no-untyped-def]
    """Which scale the next integer is coded at."""
    return min(max((base + log[seen >> SEEN_SHIFT]) >> 1, 0), N_SCALES - 1)


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def after(seen, magnitude, gain):  # type: ignore[no-untyped-def]
    """The running sum once a lattice magnitude has been seen."""
    return seen + min(magnitude * gain, CAP) - (seen >> MEMORY)


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def table_of(scale):  # type: ignore[no-untyped-def]
    """Table and number of low bits of a scale."""
    if scale < N_TABLES:
        return scale, 0
    return N_TABLES - 2 + (scale & 1), ((scale - N_TABLES) >> 1) + 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def lattice(k, next_state, quantizer):  # type: ignore[no-untyped-def]
    """Indices (n, m) -> lattice values y (n, m) int32, following the machine along each row."""
    n, m = k.shape
    y = np.empty((n, m), np.int32)
    for i in range(n):
        state = 0
        for j in range(m):
            v = np.int64(k[i, j])
            q = quantizer[state]
            y[i, j] = 2 * v - (q if v > 0 else (-q if v < 0 else 0))
            state = next_state[state, v & 1]
    return y


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def count(k, row_class, base, gain, log, next_state, quantizer, histogram):  # type: ignore[no-untyped-def]
    """Add how often each (quantizer, scale, symbol) occurs in k to ``histogram``."""
    n, m = k.shape
    for i in range(n):
        c = row_class[i]
        state = 0
        seen = np.int64(PRIOR)
        for j in range(m):
            v = abs(np.int64(k[i, j]))
            q = quantizer[state]
            scale = scale_of(base[c, j], seen, log)
            histogram[q, scale, min(v >> table_of(scale)[1], ESCAPE)] += 1
            seen = after(seen, 2 * v - (q if v > 0 else 0), gain[c, j])
            state = next_state[state, v & 1]


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _put(words, lane, position, low, span, start, size):  # type: ignore[no-untyped-def]
    step = span[lane] >> _P
    bottom = low[lane] + step * start
    if bottom < low[lane]:  # carry into the words already written
        back = position[lane] - 1
        while words[lane, back] == _LOW32:
            words[lane, back] = 0
            back -= 1
        words[lane, back] += np.uint32(1)
    width = step * size
    if width < _RENORM:
        words[lane, position[lane]] = bottom >> _WORD
        position[lane] += 1
        bottom <<= _WORD
        width <<= _WORD
    low[lane] = bottom
    span[lane] = width


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _encode(k, row_class, class_cdf, tables, base, gain, log, next_state, quantizer, words, position, raw):  # type: ignore[no-untyped-def]
    n, m = k.shape
    low = np.zeros(LANES, np.uint64)
    span = np.full(LANES, _TOP)
    seen = np.zeros(LANES, np.int64)
    state = np.zeros(LANES, np.int64)
    n_classes = class_cdf.shape[0] - 1
    bits = np.uint64(0)
    n_bits = 0
    n_raw = 0
    for first in range(0, n, LANES):
        lanes = min(LANES, n - first)
        for lane in range(lanes):
            seen[lane] = PRIOR
            state[lane] = 0
            if n_classes > 1:
                c = row_class[first + lane]
                start = np.uint64(class_cdf[c])
                _put(words, lane, position, low, span, start, np.uint64(class_cdf[c + 1]) - start)
        for j in range(m):
            for lane in range(lanes):
                c = row_class[first + lane]
                signed = np.int64(k[first + lane, j])
                v = abs(signed)
                q = quantizer[state[lane]]
                table, shift = table_of(scale_of(base[c, j], seen[lane], log))
                symbol = min(v >> shift, ESCAPE)
                start = np.uint64(tables[q, table, symbol])
                _put(words, lane, position, low, span, start, np.uint64(tables[q, table, symbol + 1]) - start)
                # raw bits: escape length and rest, low bits, sign; fewer than 50 together
                tail = np.uint64(0)
                n_tail = 0
                if symbol == ESCAPE:
                    rest = (v >> shift) - ESCAPE + 1
                    length = 0
                    while (rest >> length) > 1:
                        length += 1
                    tail = np.uint64(length) | (np.uint64(rest - (1 << length)) << np.uint64(4))
                    n_tail = 4 + length
                tail |= np.uint64(v & ((1 << shift) - 1)) << np.uint64(n_tail)
                n_tail += shift
                if v > 0:
                    tail |= np.uint64(signed < 0) << np.uint64(n_tail)
                    n_tail += 1
                while n_tail > 0:
                    take = min(n_tail, 32 - n_bits)
                    bits |= (tail & ((np.uint64(1) << np.uint64(take)) - np.uint64(1))) << np.uint64(n_bits)
                    tail >>= np.uint64(take)
                    n_bits += take
                    n_tail -= take
                    if n_bits == 32:
                        raw[n_raw] = bits
                        n_raw += 1
                        bits = np.uint64(0)
                        n_bits = 0
                seen[lane] = after(seen[lane], 2 * v - (q if v > 0 else 0), gain[c, j])
                state[lane] = next_state[state[lane], v & 1]
    raw[n_raw] = bits
    for lane in range(LANES):
        # of all values in [low, low + span) the one with the most trailing zero bytes
        for zeros in range(56, 24, -8):
            mask = (np.uint64(1) << np.uint64(zeros)) - np.uint64(1)
            value = (low[lane] + mask) & ~mask
            if value - low[lane] < span[lane]:
                break
        if value < low[lane]:
            back = position[lane] - 1
            while words[lane, back] == _LOW32:
                words[lane, back] = 0
                back -= 1
            words[lane, back] += np.uint32(1)
        words[lane, position[lane]] = value >> _WORD
        position[lane] += 1
    return n_raw * 32 + n_bits


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _decode(words, ends, raw, class_cdf, tables, base, gain, log, next_state, quantizer, rows, k):  # type: ignore[no-untyped-def]
    n, m = k.shape
    value = np.zeros(LANES, np.uint64)
    span = np.full(LANES, _TOP)
    position = np.zeros(LANES, np.int64)
    seen = np.zeros(LANES, np.int64)
    state = np.zeros(LANES, np.int64)
    n_classes = class_cdf.shape[0] - 1
    last_window = raw.shape[0] - 2
    bit = 0
    for lane in range(LANES):
        value[lane] = (np.uint64(words[lane, 0]) << _WORD) | np.uint64(words[lane, 1])
        position[lane] = 2
    for first in range(0, n, LANES):
        lanes = min(LANES, n - first)
        for lane in range(lanes):
            seen[lane] = PRIOR
            state[lane] = 0
            c = 0
            if n_classes > 1:
                step = span[lane] >> _P
                v = np.int64(min(value[lane] // step, _MAX_VALUE))
                for other in range(1, n_classes):
                    c += np.int64(class_cdf[other]) <= v
                value[lane] -= step * np.uint64(class_cdf[c])
                span[lane] = step * np.uint64(class_cdf[c + 1] - class_cdf[c])
                if span[lane] < _RENORM:
                    value[lane] = (value[lane] << _WORD) | np.uint64(words[lane, position[lane]])
                    position[lane] = min(position[lane] + 1, ends[lane])
                    span[lane] <<= _WORD
            rows[first + lane] = c
        for j in range(m):
            for lane in range(lanes):
                c = rows[first + lane]
                q = quantizer[state[lane]]
                table, shift = table_of(scale_of(base[c, j], seen[lane], log))
                step = span[lane] >> _P
                target = np.uint32(min(value[lane] // step, _MAX_VALUE))
                symbol = 0
                for other in range(1, N_SYMBOLS):
                    symbol += tables[q, table, other] <= target
                value[lane] -= step * np.uint64(tables[q, table, symbol])
                span[lane] = step * np.uint64(tables[q, table, symbol + 1] - tables[q, table, symbol])
                if span[lane] < _RENORM:
                    value[lane] = (value[lane] << _WORD) | np.uint64(words[lane, position[lane]])
                    position[lane] = min(position[lane] + 1, ends[lane])
                    span[lane] <<= _WORD
                v = np.int64(symbol)
                window = min(bit >> 5, last_window)
                tail = (np.uint64(raw[window]) | (np.uint64(raw[window + 1]) << _WORD)) >> np.uint64(bit & 31)
                if symbol == ESCAPE:
                    length = np.int64(tail & np.uint64(15))
                    v += (1 << length) - 1 + np.int64((tail >> np.uint64(4)) & np.uint64((1 << length) - 1))
                    bit += 4 + length
                    window = min(bit >> 5, last_window)
                    tail = (np.uint64(raw[window]) | (np.uint64(raw[window + 1]) << _WORD)) >> np.uint64(bit & 31)
                v = min((v << shift) | np.int64(tail & np.uint64((1 << shift) - 1)), MAX_INDEX)
                bit += shift
                tail >>= np.uint64(shift)
                if v > 0:
                    bit += 1
                    k[first + lane, j] = -v if tail & np.uint64(1) else v
                else:
                    k[first + lane, j] = 0
                seen[lane] = after(seen[lane], 2 * v - (q if v > 0 else 0), gain[c, j])
                state[lane] = next_state[state[lane], v & 1]


def encode(k: npt.NDArray[np.int16], row_class: Int, class_cdf: Any, tables: Any, *rules: Any) -> bytes:
    """One block of rows -> bytes (layout: ``magnitude``)."""
    n, m = k.shape
    symbols = -(-n // LANES) * (m + 1)
    words = np.zeros((LANES, symbols * (PRECISION + 1) // 32 + 4), np.uint32)
    position = np.zeros(LANES, np.int64)
    raw = np.zeros(n * m * 2 + 2, np.uint32)
    raw_bits = _encode(k, row_class, class_cdf, tables, *rules, words, position, raw)
    lanes = [words[i, : position[i]].astype(">u4").tobytes().rstrip(b"\0") for i in range(LANES)]
    head = b"".join(len(lane).to_bytes(3, "little") for lane in lanes)
    return head + b"".join(lanes) + raw.astype("<u4").tobytes()[: -(-raw_bits // 8)]


def decode(
    data: bytes | memoryview, n: int, class_cdf: Any, tables: Any, *rules: Any
) -> tuple[Int, npt.NDArray[np.int16]]:
    """Inverse of ``encode``: classes (n,) and integers (n, m)."""
    m = rules[0].shape[1]
    view = memoryview(data)
    if len(view) < 3 * LANES:
        raise CorruptDataError(f"block of {len(view)} bytes is shorter than its {3 * LANES} of lengths")
    lengths = [int.from_bytes(view[3 * i : 3 * i + 3], "little") for i in range(LANES)]
    starts = 3 * LANES + np.concatenate([[0], np.cumsum(lengths)])
    if starts[-1] > len(view):
        raise CorruptDataError(f"block of {len(view)} bytes declares {int(starts[-1])} of lanes")
    width = max(lengths) // 4 + 4
    words = np.zeros((LANES, width), np.uint32)
    for lane in range(LANES):
        part = bytes(view[starts[lane] : starts[lane + 1]])
        padded = part + bytes(-len(part) % 4)
        words[lane, : len(padded) // 4] = np.frombuffer(padded, ">u4")
    ends = np.full(LANES, width - 1)
    tail = bytes(view[starts[-1] :])
    raw = np.frombuffer(tail + bytes(-len(tail) % 4 + 16), "<u4").astype(np.uint32)
    rows = np.zeros(n, np.int64)
    k = np.empty((n, m), np.int16)
    _decode(words, ends, raw, class_cdf, tables, *rules, rows, k)
    return rows, k
