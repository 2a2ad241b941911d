"""A range coder in numba: integers and their integer CDFs to bytes, and back.

The message is one number in [0, 1), written in base 2**32. The encoder keeps the interval
``[low, low + range)`` of numbers that still mean the symbols seen so far, as two 64-bit integers
scaled by the words already written; a symbol that owns ``[start, start + size)`` out of
``2**precision`` replaces it by its part of that interval (Martin 1979; with carry propagation as
in Schindler 1998). One invariant carries everything:

    2**30 <= range < 2**62   before every symbol but the first, where range = 2**64 - 1    (I)

- ``scale = range >> precision`` is then at least 2**(30 - precision) >= 2**6, so a symbol of size
  one still gets a non-empty interval: every symbol with size >= 1 can be coded. The at most
  ``2**precision - 1`` parts in 2**30 or more that the shift drops are the coder's only loss.
- After a symbol ``range >= 2**6``, hence one shift by a word restores (I): at most one word leaves
  per symbol, and n symbols need at most n + 2 words.
- The interval stays inside [0, 1), so a carry out of ``low`` always finds a word below 2**32 - 1 to
  stop at. Words are final only once no carry can reach them: they stay in the caller's array until
  ``finish``. A carry is a branch that the processor cannot foresee; with range below 2**62 it is
  needed a quarter as often as with all 64 bits, which makes writing 10% faster.

The reader keeps ``code = message - low`` (not ``low`` itself), so it never sees a carry:
valid messages have ``0 <= code < range``. Behind the end of its bytes the reader sees zeros, so
``finish`` drops trailing zero bytes, and the caller has to know the length of every message. Words
are big-endian in the bytes, which makes the bytes one long big-endian fraction. Wrong bytes give
wrong symbols, never a symbol outside the alphabet or a read outside the array: the looked-up value
is clamped to ``2**precision - 1`` and the position to the last word.

Kernels of other modules build on the small functions here (they inline); a coder is three scalars
that live in the caller's local variables:

    words = np.empty(capacity(n_puts), np.uint32)
    pos, low, range_ = start_writing()
    pos, low, range_ = put(words, pos, low, range_, start, size, precision)
    pos, low, range_ = put_bit(words, pos, low, range_, probability, bit)
    pos, low, range_ = put_raw(words, pos, low, range_, value, n_bits)
    n_bytes = finish(words, pos, low, range_)               then words_to_bytes(words, n_bytes)

    words = words_from_bytes(data)
    pos, code, range_ = start_reading(words)
    value, scale = peek(code, range_, precision)            find start <= value < start + size
    pos, code, range_ = advance(words, pos, code, range_, scale, start, size)
    bit, pos, code, range_ = get_bit(words, pos, code, range_, probability)
    value, pos, code, range_ = get_raw(words, pos, code, range_, n_bits)

``pos`` is an int64, ``low``, ``code``, ``range_`` and ``scale`` are uint64; mind that numba turns a
sum of uint64 and int64 into a float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .._numba import njit

Words = npt.NDArray[np.uint32]
Integer: TypeAlias = int | np.integer[Any]
State: TypeAlias = tuple[Integer, np.uint64, np.uint64]  # (pos, low or code, range_)
F = TypeVar("F", bound=Callable[..., Any])

MAX_PRECISION = 24  # of one symbol; leaves scale >= 2**6
MAX_RAW_BITS = 24  # of one put_raw, likewise
BIT_PRECISION = 16  # probabilities of put_bit are out of 2**16

_U0 = np.uint64(0)
_U1 = np.uint64(1)
_U16 = np.uint64(16)
_U32 = np.uint64(32)
LEAST_RANGE = np.uint64(1 << 30)  # of range, (I)
_FULL = np.uint64(0xFFFFFFFFFFFFFFFF)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_ONES = np.uint32(0xFFFFFFFF)


def kernel(function: F) -> F:
    """numba's njit with the settings of every kernel here: compiled code is kept on disk, threads
    may run it in parallel, and divisions carry no check (all divisors are positive)."""
    return cast(F, njit(cache=True, nogil=True, error_model="numpy")(function))


def capacity(n_puts: int) -> int:
    """Words to allocate for a message of n_puts calls of put, put_bit or put_raw."""
    return n_puts + 3


def spelled(words: Words, n_bytes: int) -> npt.NDArray[np.uint8]:
    """The message, the first n_bytes of ``words`` in big-endian order, as an array of bytes."""
    return words[: (n_bytes + 3) // 4].astype(">u4").view(np.uint8)[:n_bytes]


def words_to_bytes(words: Words, n_bytes: int) -> bytes:
    """The message as bytes."""
    return spelled(words, n_bytes).tobytes()


def words_from_bytes(data: bytes | memoryview) -> Words:
    """The words of a message for ``start_reading``: zero-padded, and always with a last word that
    is zero, which is what a reader beyond the end keeps reading. Copies; length 2 at least."""
    padded = np.zeros(len(data) // 4 * 4 + 8, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return padded.view(">u4").astype(np.uint32)


@kernel
def start_writing() -> State:
    """State (pos, low, range_) of a writer that has written nothing."""
    return 0, _U0, _FULL


@kernel
def carry(words: Words, pos: Integer) -> None:
    """Add one to the number that words[:pos] spell. The sum of all intervals stays below one, so
    some word is below 2**32 - 1."""
    last = np.uint64(pos - 1)  # an unsigned index: no test for counting from the end
    while words[last] == _ONES:
        words[last] = 0
        last -= _U1
    words[last] += np.uint32(1)


@kernel
def push(words: Words, pos: Integer, low: np.uint64, range_: np.uint64) -> State:
    """Restore the invariant (I) after a symbol: one word leaves if range fell below 2**30."""
    if range_ < LEAST_RANGE:
        words[np.uint64(pos)] = np.uint32(low >> _U32)
        return pos + 1, low << _U32, range_ << _U32
    return pos, low, range_


@kernel
def put(
    words: Words,
    pos: Integer,
    low: np.uint64,
    range_: np.uint64,
    start: Integer,
    size: Integer,
    precision: Integer,
) -> State:
    """Write a symbol that owns [start, start + size) of 2**precision; size >= 1,
    precision <= MAX_PRECISION. Returns the new (pos, low, range_)."""
    scale = range_ >> np.uint64(precision)
    moved = low + scale * np.uint64(start)
    if moved < low:
        carry(words, pos)
    return push(words, pos, moved, scale * np.uint64(size))


@kernel
def put_bit(
    words: Words,
    pos: Integer,
    low: np.uint64,
    range_: np.uint64,
    probability: Integer,
    bit: Integer,
) -> State:
    """Write one bit; ``probability`` in 1..65535 is that of bit == 0, out of 65536. Returns the
    new (pos, low, range_). Bit 1 takes all that is left, so nothing is lost to rounding."""
    bound = (range_ >> _U16) * np.uint64(probability)
    if bit:
        moved = low + bound
        if moved < low:
            carry(words, pos)
        return push(words, pos, moved, range_ - bound)
    return push(words, pos, low, bound)


@kernel
def put_raw(
    words: Words, pos: Integer, low: np.uint64, range_: np.uint64, value: Integer, n_bits: Integer
) -> State:
    """Write n_bits <= MAX_RAW_BITS bits as they are; 0 <= value < 2**n_bits."""
    return put(words, pos, low, range_, value, 1, n_bits)


@kernel
def finish(words: Words, pos: Integer, low: np.uint64, range_: np.uint64) -> int:
    """Write what ``low`` still holds, in the fewest bytes; returns the length of the message in
    bytes. Any number in [low, low + range) would do: take the one with the most trailing zero
    bytes, and leave those out. Zero or more bytes; at most 8 behind the words written so far."""
    value = low
    for kept in range(9):
        below = _FULL >> np.uint64(8 * kept) if kept < 8 else _U0
        value = (low + below) & ~below
        if value - low < range_:  # modulo 2**64: value may be 2**64 itself, a carry
            break
    if value < low:
        carry(words, pos)
    words[pos] = np.uint32(value >> _U32)
    words[pos + 1] = np.uint32(value & _LOW_WORD)
    last = pos + 1
    while last >= 0 and words[last] == 0:
        last -= 1
    if last < 0:
        return 0
    n_bytes = 4 * (last + 1)
    word = words[last]
    while word & np.uint32(0xFF) == 0:
        word >>= np.uint32(8)
        n_bytes -= 1
    return n_bytes


@kernel
def start_reading(words: Words) -> State:
    """State (pos, code, range_) of a reader of ``words_from_bytes(data)``."""
    return 2, np.uint64(words[0]) << _U32 | np.uint64(words[1]), _FULL


@kernel
def pull(words: Words, pos: Integer, code: np.uint64, range_: np.uint64) -> State:
    """Restore the invariant (I) after a symbol; mirrors ``push``."""
    if range_ < LEAST_RANGE:
        word = words[np.uint64(min(pos, words.size - 1))]
        return pos + 1, code << _U32 | np.uint64(word), range_ << _U32
    return pos, code, range_


@kernel
def peek(code: np.uint64, range_: np.uint64, precision: Integer) -> tuple[np.uint64, np.uint64]:
    """(value, scale): the symbol with start <= value < start + size is next; value is always below
    2**precision. Pass its start and size, with scale, to ``advance``."""
    scale = range_ >> np.uint64(precision)
    return min(code // scale, (_U1 << np.uint64(precision)) - _U1), scale


@kernel
def advance(
    words: Words,
    pos: Integer,
    code: np.uint64,
    range_: np.uint64,
    scale: np.uint64,
    start: Integer,
    size: Integer,
) -> State:
    """Step over the symbol found after ``peek``; mirrors ``put``. Returns (pos, code, range_)."""
    return pull(words, pos, code - scale * np.uint64(start), scale * np.uint64(size))


@kernel
def get_bit(
    words: Words, pos: Integer, code: np.uint64, range_: np.uint64, probability: Integer
) -> tuple[Integer, Integer, np.uint64, np.uint64]:
    """Read one bit written by ``put_bit``: (bit, pos, code, range_). No division."""
    bound = (range_ >> _U16) * np.uint64(probability)
    if code < bound:
        pos, code, range_ = pull(words, pos, code, bound)
        return 0, pos, code, range_
    pos, code, range_ = pull(words, pos, code - bound, range_ - bound)
    return 1, pos, code, range_


@kernel
def get_raw(
    words: Words, pos: Integer, code: np.uint64, range_: np.uint64, n_bits: Integer
) -> tuple[Integer, Integer, np.uint64, np.uint64]:
    """Read n_bits written by ``put_raw``: (value, pos, code, range_)."""
    value, scale = peek(code, range_, n_bits)
    pos, code, range_ = advance(words, pos, code, range_, scale, np.int64(value), 1)
    return np.int64(value), pos, code, range_
