"""Codes of a network's making to bytes, through the range coder, under a network's predictions.

A model predicts the next codes by logits, floats; the coder needs integers that both sides agree on
to the last bit. Two things make them agree:

- logits are rounded to multiples of 1/64 and turned into integer CDFs by a table, so no later step
  depends on floating point (0.0001 bit a symbol is what the rounding costs);
- encoder and decoder run *one and the same* procedure, ``run(coder)``: what the encoder is told,
  the decoder finds out. Every float operation then has the same operands in the same order and
  shapes (and on one thread), so on one machine the logits are equal to the bit. Another machine may
  round elsewhere: a CRC of the symbols names that, it is never shown as noise.

    encoder                                     decoder
    coder = Writer()                            coder = Reader(data)
    model.run(coder, codes)                     codes = model.run(coder, None)
    data = coder.finish()
"""

from __future__ import annotations

import math
import zlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from polarpack.entropy.range_coder import (
    advance,
    capacity,
    finish,
    kernel,
    peek,
    put,
    start_reading,
    start_writing,
    words_from_bytes,
    words_to_bytes,
)
from polarpack.errors import CorruptDataError, InputError

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

PRECISION = 24
LOGIT_UNIT = 64  # steps of a logit
LOWEST = 16 * LOGIT_UNIT  # logits further below the largest count as this: e^-16
MAX_ALPHABET = 1 << 16
# e^(-k / 64) as integers of 31 bits; rounding is far from any boundary that could move: a table of
# 1025 values, none within 1e-6 of a half
WEIGHTS = np.rint(np.exp(-np.arange(LOWEST + 1) / LOGIT_UNIT) * 2.0**31).astype(np.int64)


class Coder(Protocol):
    """What ``run`` codes with: a ``Writer`` or a ``Reader``."""

    def code(self, logits: Floats, symbols: Int64 | None) -> Int64:
        """Code one symbol for each row of logits (n, alphabet). Returns the symbols (n,): those
        given by an encoder, those found by a decoder (for which ``symbols`` is None)."""

    def code_by_row(self, table: Floats, rows: Int64, symbols: Int64 | None) -> Int64:
        """``code`` with the logits ``table[rows]``, for tables of few rows."""


@kernel
def _quantize(logits: Any, out: Any) -> None:
    """out = steps below the largest logit of each row, 0..LOWEST."""
    for i in range(logits.shape[0]):
        top = logits[i, 0]
        for k in range(logits.shape[1]):
            top = max(top, logits[i, k])
        for k in range(logits.shape[1]):
            steps = np.rint((top - logits[i, k]) * np.float32(LOGIT_UNIT))
            out[i, k] = np.int64(min(max(steps, np.float32(0)), np.float32(LOWEST)))


@kernel
def _cdfs(steps: Any, weights: Any, cdf: Any) -> None:
    """Integer CDFs (n, alphabet + 1) out of 2^PRECISION: every symbol has at least one."""
    n, size = steps.shape
    free = (1 << PRECISION) - size
    for i in range(n):
        total = np.int64(0)
        for k in range(size):
            total += weights[steps[i, k]]
        # sizes floor(free * running / total) + 1: the running sum ends at 2^PRECISION exactly.
        # total is below 2^31 * 2^16 = 2^47; shifting by 9 keeps the product within 63 bits
        shift = 9 if total >= (1 << 38) else 0
        running = np.int64(0)
        cdf[i, 0] = 0
        for k in range(size):
            running += weights[steps[i, k]]
            cdf[i, k + 1] = free * (running >> shift) // (total >> shift) + k + 1


@kernel
def _find(cdf: Any, rows: Any, words: Any, pos: Any, code: Any, range_: Any, out: Any) -> Any:
    """Read one symbol for each row index; returns the reader's state."""
    for i in range(rows.size):
        row = rows[i]
        value, scale = peek(code, range_, PRECISION)
        target = np.int64(value)
        low, high = 0, cdf.shape[1] - 2
        while low < high:  # the last symbol with cdf <= value
            middle = (low + high + 1) // 2
            if cdf[row, middle] <= target:
                low = middle
            else:
                high = middle - 1
        start = cdf[row, low]
        pos, code, range_ = advance(
            words, pos, code, range_, scale, start, cdf[row, low + 1] - start
        )
        out[i] = low
    return pos, code, range_


@kernel
def _write(starts: Any, sizes: Any, words: Any) -> int:
    pos, low, range_ = start_writing()
    for i in range(starts.size):
        pos, low, range_ = put(words, pos, low, range_, starts[i], sizes[i], PRECISION)
    return finish(words, pos, low, range_)


def integer_cdfs(logits: Floats) -> Int64:
    """Logits (n, alphabet) -> CDFs (n, alphabet + 1) int64 from 0 to 2^24, strictly increasing.

    O(n alphabet). Raises InputError for another shape, more than 65536 symbols, or NaN.
    """
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_ALPHABET:
        raise InputError(f"expected logits of shape (n, 1..{MAX_ALPHABET}), got {logits.shape}")
    if not np.isfinite(logits).all():
        raise InputError("expected logits to be finite: the model's weights are not usable")
    steps = np.empty(logits.shape, np.int64)
    _quantize(np.ascontiguousarray(logits, np.float32), steps)
    cdf = np.empty((logits.shape[0], logits.shape[1] + 1), np.int64)
    _cdfs(steps, WEIGHTS, cdf)
    return cdf


class _Coding:
    """What writer and reader share: logits become CDFs, symbols are remembered."""

    def __init__(self) -> None:
        self.symbols: list[Int64] = []

    def code(self, logits: Floats, symbols: Int64 | None) -> Int64:
        """See ``Coder``."""
        return self.code_by_row(logits, np.arange(len(logits)), symbols)

    def code_by_row(self, table: Floats, rows: Int64, symbols: Int64 | None) -> Int64:
        """See ``Coder``."""
        rows = np.ascontiguousarray(rows, np.int64)
        if symbols is not None:
            symbols = np.ascontiguousarray(symbols, np.int64)
            if symbols.shape != rows.shape:
                raise InputError(f"expected {rows.shape} symbols, got {symbols.shape}")
            if symbols.size and not 0 <= symbols.min() <= symbols.max() < table.shape[1]:
                raise InputError(f"expected symbols in 0..{table.shape[1] - 1}")
        found = self._code(table, rows, symbols)
        self.symbols.append(found)
        return found

    def _code(self, table: Floats, rows: Int64, symbols: Int64 | None) -> Int64:
        raise NotImplementedError

    @property
    def n_symbols(self) -> int:
        """How many symbols have been coded."""
        return sum(part.size for part in self.symbols)

    @property
    def crc(self) -> int:
        """CRC-32 of all symbols so far as little-endian int32."""
        value = 0
        for part in self.symbols:
            value = zlib.crc32(part.astype("<i4").tobytes(), value)
        return value


class Writer(_Coding):
    """Collects symbols with their intervals; ``finish`` makes the bytes.

    ``bits`` is the cross-entropy of the symbols under the *unrounded* logits: what the bytes are to
    be compared with.
    """

    def __init__(self) -> None:
        super().__init__()
        self._starts: list[Int64] = []
        self._sizes: list[Int64] = []
        self.bits = 0.0

    def _code(self, table: Floats, rows: Int64, symbols: Int64 | None) -> Int64:
        if symbols is None:
            raise InputError("expected symbols to write")
        cdf = integer_cdfs(table)
        starts = cdf[rows, symbols]
        self._starts.append(starts)
        self._sizes.append(cdf[rows, symbols + 1] - starts)
        wide = table.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        nats = np.log(np.exp(wide).sum(axis=1))[rows] - wide[rows, symbols]
        self.bits += float(nats.sum()) / math.log(2)
        return symbols

    def finish(self) -> bytes:
        """The message."""
        empty = [np.zeros(0, np.int64)]
        starts, sizes = (np.concatenate(empty + part) for part in (self._starts, self._sizes))
        words = np.empty(capacity(starts.size), np.uint32)
        return words_to_bytes(words, _write(starts, sizes, words))


class Reader(_Coding):
    """Finds the symbols that a ``Writer`` was given."""

    def __init__(self, data: bytes | memoryview) -> None:
        super().__init__()
        self._words = words_from_bytes(data)
        self._position, self._range = 0, (np.uint64(0), np.uint64(0))
        self._keep(start_reading(self._words))

    def _code(self, table: Floats, rows: Int64, symbols: Int64 | None) -> Int64:
        out = np.empty(rows.size, np.int64)
        cdf = integer_cdfs(table)
        self._keep(_find(cdf, rows, self._words, self._position, *self._range, out))
        return out

    def _keep(self, state: Any) -> None:
        # numba hands uint64 back as Python's int, which it would take for an int64
        pos, code, range_ = state
        self._position, self._range = int(pos), (np.uint64(code), np.uint64(range_))

    def check(self, crc: int) -> None:
        """CorruptDataError unless the symbols read have this CRC-32."""
        if self.crc != crc:
            raise CorruptDataError(
                f"symbols have checksum {self.crc:08x}, the file says {crc:08x}: it is damaged, or "
                "this machine's arithmetic predicts other probabilities than the writer's did"
            )
