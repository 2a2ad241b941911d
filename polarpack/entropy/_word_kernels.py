"""The compiled loops of ``words``: keys, and the bits that stand beside the symbols.

The bits of a number come least significant first into words of 32 bits, filled from their lowest
bit; bytes are little endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .range_coder import Integer, kernel

Words = npt.NDArray[Any]  # uint16, uint32 or uint64
Symbols = npt.NDArray[Any]  # uint8 or uint16

_U1 = np.uint64(1)
_U5 = np.uint64(5)
_U31 = np.uint64(31)
_U32 = np.uint64(32)
_LOW_WORD = np.uint64(0xFFFFFFFF)


@kernel
def trailing_zeros(word: np.uint64, limit: int) -> int:
    """Zero bits at the low end of ``word``; ``limit`` at most."""
    n = 0
    while n < limit and not word >> np.uint64(n) & _U1:
        n += 1
    return n


@kernel
def common_zeros(words: Words, limit: int, zeros: npt.NDArray[np.int64]) -> None:
    """How many low bits are zero in all words of each row; ``limit`` at most. Into zeros (n,)."""
    for i in range(words.shape[0]):
        seen = np.uint64(0)
        for j in range(words.shape[1]):
            seen |= np.uint64(words[i, j])
        zeros[i] = trailing_zeros(seen, limit)


@kernel
def strengths(
    words: Words, n_bits: int, n_low: int, log2_unit: int, span: int, out: npt.NDArray[np.int64]
) -> None:
    """The mean of each row's magnitudes (leading bits), in units, rounded down. Magnitudes more
    than ``span`` units below the row's largest count as that: zeros tell nothing of its strength.
    """
    mask = (_U1 << np.uint64(n_bits - 1 - n_low)) - _U1
    low = np.uint64(n_low)
    for i in range(words.shape[0]):
        largest = 0
        for j in range(words.shape[1]):
            largest = max(largest, int(np.int64(np.uint64(words[i, j]) >> low & mask)))
        least = largest - (span << log2_unit)
        total = 0
        for j in range(words.shape[1]):
            total += max(least, int(np.int64(np.uint64(words[i, j]) >> low & mask)))
        out[i] = (total // words.shape[1]) >> log2_unit


@kernel
def keys_of(
    words: Words, n_bits: int, n_low: int, moves: npt.NDArray[np.int64], keys: Words
) -> None:
    """The key of each word: its sign in the lowest bit, above it the leading bits of its magnitude
    less what its row is moved by (modulo their range). Into keys (n, d) uint32."""
    mask = (_U1 << np.uint64(n_bits - 1 - n_low)) - _U1
    low, top = np.uint64(n_low), np.uint64(n_bits - 1)
    for i in range(words.shape[0]):
        move = np.uint64(moves[i])
        for j in range(words.shape[1]):
            word = np.uint64(words[i, j])
            magnitude = ((word >> low) - move) & mask
            keys[i, j] = np.uint32(magnitude << _U1 | word >> top)


@kernel
def write_bits(out: npt.NDArray[np.uint32], pos: int, value: np.uint64, n_bits: Integer) -> int:
    """Put the lowest n_bits <= 32 of a value at bit ``pos`` of ``out``, where zeros are."""
    value &= (_U1 << np.uint64(n_bits)) - _U1
    at, shift = np.uint64(pos) >> _U5, np.uint64(pos) & _U31
    spread = value << shift
    out[at] |= np.uint32(spread & _LOW_WORD)
    out[at + _U1] |= np.uint32(spread >> _U32)
    return pos + n_bits


@kernel
def read_bits(data: npt.NDArray[np.uint32], pos: int, n_bits: Integer) -> np.uint64:
    """Inverse of ``write_bits``: n_bits <= 32 from bit ``pos`` on."""
    at, shift = np.uint64(pos) >> _U5, np.uint64(pos) & _U31
    both = np.uint64(data[at]) | np.uint64(data[at + _U1]) << _U32
    return both >> shift & ((_U1 << np.uint64(n_bits)) - _U1)


@kernel
def n_plain_bits(
    symbols: Symbols, zeros: npt.NDArray[np.int64], escape: int, n_bits: int, n_low: int
) -> int:
    """How many bits stand beside these symbols (n, d)."""
    total = 0
    for i in range(symbols.shape[0]):
        escaped, repeated = 0, 0
        for j in range(symbols.shape[1]):
            escaped += symbols[i, j] == escape
            repeated += symbols[i, j] > escape
        kept = n_low - zeros[i]
        total += escaped * n_bits + (symbols.shape[1] - escaped - repeated) * kept
    return total


@kernel
def mark_repeats(
    words: Words, zeros: npt.NDArray[np.int64], n_low: int, repeat: Integer, symbols: Symbols
) -> None:
    """Put the symbol ``repeat`` where a word is that of the row above and has plain bits."""
    for i in range(1, words.shape[0]):
        if zeros[i] < n_low:
            for j in range(words.shape[1]):
                if words[i, j] == words[i - 1, j]:
                    symbols[i, j] = repeat


@kernel
def write_plain(
    words: Words,
    symbols: Symbols,
    zeros: npt.NDArray[np.int64],
    escape: int,
    n_bits: int,
    n_low: int,
    out: npt.NDArray[np.uint32],  # zeros; room for all bits and a word more
) -> None:
    """The low bits of every word, without those that are zero in its whole row; all bits of a word
    whose symbol is ``escape``, none where it is larger."""
    pos = 0
    for i in range(words.shape[0]):
        zero = np.uint64(zeros[i])
        kept = n_low - zeros[i]
        for j in range(words.shape[1]):
            value, n = np.uint64(words[i, j]) >> zero, kept
            if symbols[i, j] == escape:
                value, n = np.uint64(words[i, j]), n_bits
            elif symbols[i, j] > escape:
                n = 0
            if n > 32:
                pos = write_bits(out, pos, value, 32)
                value >>= _U32
                n -= 32
            pos = write_bits(out, pos, value, n)


@kernel
def read_plain(
    data: npt.NDArray[np.uint32],  # all bits and a word more
    symbols: Symbols,
    zeros: npt.NDArray[np.int64],
    moves: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint32],  # (escape,) of the symbols before ``escape``
    n_bits: int,
    n_low: int,
    words: Words,
) -> None:
    """Inverse of ``keys_of``, ``mark_repeats`` and ``write_plain``: symbols and bits -> words."""
    mask = (_U1 << np.uint64(n_bits - 1 - n_low)) - _U1
    low, top, escape = np.uint64(n_low), np.uint64(n_bits - 1), keys.size
    pos = 0
    for i in range(words.shape[0]):
        zero, move = np.uint64(zeros[i]), np.uint64(moves[i])
        kept = n_low - zeros[i]
        for j in range(words.shape[1]):
            symbol = np.int64(symbols[i, j])
            if symbol > escape:
                words[i, j] = words[i - 1, j] if i else words.dtype.type(0)
                continue
            escaped = symbol == escape
            n = n_bits if escaped else kept
            value, shift = np.uint64(0), np.uint64(0)
            if n > 32:
                value, shift = read_bits(data, pos, 32), _U32
                pos += 32
                n -= 32
            value |= read_bits(data, pos, n) << shift
            pos += n
            if not escaped:
                key = np.uint64(keys[np.uint64(symbol)])
                magnitude = ((key >> _U1) + move) & mask
                value = (key & _U1) << top | magnitude << low | value << zero
            words[i, j] = value
