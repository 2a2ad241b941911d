"""Entropy coding of floating-point numbers as they are, to the bit.

A number is a *word* of n_bits: sign, exponent, mantissa. What can be predicted of it is its sign
and about how large it is; the low bits of its mantissa are noise. So a word is split:

    sign | exponent, leading bits of the mantissa | n_low bits
      1          n_bits - 1 - n_low                  written as they are, but for low ones that are
      └─────────────── key ───────────────┘          zero in the whole row

Read as an integer, the magnitude's leading bits are its logarithm, nearly (the exponent counts
octaves, the mantissa is a straight line between two). A row that is twice as strong as others has
all of them larger by the same: ``move``, a multiple of a unit, which is taken off and coded once a
row. The keys that occur are numbered, and their numbers are symbols under static tables, one for
each column or shared (``model.StaticModel``), so that a column's sign, scale and shape all count.
Two more symbols: a word whose key has no number is an *escape*, written as it is, and one that is
the same as in the row above, where that saves bits, a *repeat*.

Few numbers that occur over and over (pixels, counts) need no case of their own: the key is made so
long that nothing is left below.

A block of rows:  length of the symbols ─ symbols (n, 2 + d): zeros, move, keys ─ low bits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptDataError
from ._numbers import Reader, number, runs
from ._tables import entropy_bits
from .model import StaticModel

Int = npt.NDArray[np.int64]
Words = npt.NDArray[Any]  # (n, d) uint16, uint32 or uint64

MAX_KEY_BITS = 20  # a key is looked up in a table of so many bits while encoding
MAX_KEYS = (1 << 12) - 2  # with escape and repeat, alphabets of tables of 20 bits
MAX_MOVES = 64
UNITS = 4  # of moves to an octave
SPAN = 4 * UNITS  # a magnitude so far below its row's largest counts as that: zeros tell nothing
LEAST_ROWS = 64  # or a quarter of d: from so many on columns may have tables of their own,
MAX_COLUMNS = 1 << 13  # if there are not more of them than these
LEAST_ZEROS = 8  # of a row's bits
SEARCH_NUMBERS = 1 << 19  # the split is chosen by so many numbers,
FIT_NUMBERS = 1 << 22  # tables are fitted to so many
KEY_BITS = 64.0  # what one more key costs in the tables that columns share, nearly
MAX_FIELDS = 1 << 20  # of a StaticModel


@dataclass(frozen=True)
class Split:
    """Where words are cut. n_low: bits below the key. log2_unit: of what moves are multiples of,
    in steps of the key's magnitude; None if rows are not moved."""

    n_bits: int
    n_low: int
    log2_unit: int | None

    @property
    def rule(self) -> tuple[int, int]:
        """What kernels ask for."""
        return self.n_bits, self.n_low


class WordModel:
    """How likely the leading bits of each column's numbers are.

    split: where words are cut. keys: (k,) uint32, ascending, those that have a symbol. symbols: the
    tables of zeros, moves and keys: 2 + d fields, of alphabets n_low + 1, at most MAX_MOVES, and
    k + 2 for the others. weakest: strength of a row that is not moved, for the encoder.
    """

    def __init__(
        self,
        split: Split,
        keys: npt.NDArray[np.uint32],
        symbols: StaticModel,
        weakest: int = 0,
    ) -> None:
        self.split, self.keys, self.symbols, self.weakest = split, keys, symbols, weakest
        self.d = symbols.n_fields - 2
        self._dtype = np.dtype(f"u{split.n_bits // 8}")

    @classmethod
    def fit(cls, words: Words, n_exponent: int, total_rows: int | None = None) -> WordModel | None:
        """The model that codes words like these in the fewest bytes, its own included.

        words: (n, d) unsigned integers of 16, 32 or 64 bits. n_exponent: how many of the bits are
        the exponent. total_rows: how many rows will be coded, if these are only a sample of them.
        None where no model of their width can be had (d beyond 2^20). Time: that of coding
        SEARCH_NUMBERS some six times and FIT_NUMBERS once.
        """
        n, d = words.shape
        if not 1 <= d <= MAX_FIELDS - 2 or not n:
            return None
        total = max(n, total_rows or n)
        some = words[:: max(1, words.size // SEARCH_NUMBERS)]
        best: tuple[float, Split] | None = None
        for split in _splits(some, n_exponent, total):
            model = cls._of_split(some, split, total)
            bits = model.rate_bits(some) * total / len(some) + 8 * len(model.to_bytes())
            if best is None or bits < best[0]:
                best = bits, split
        assert best is not None
        return cls._of_split(words[:: max(1, words.size // FIT_NUMBERS)], best[1], total)

    @classmethod
    def _of_split(cls, words: Words, split: Split, total_rows: int) -> WordModel:
        strengths = _strengths(words, split)
        # outliers are not worth an alphabet: most rows are within MAX_MOVES units of the median
        weakest = max(int(strengths.min()), int(np.median(strengths)) - MAX_MOVES // 2)
        moves = np.clip(strengths - weakest, 0, MAX_MOVES - 1)
        keys = _keys(words, split, moves)
        known = np.flatnonzero(np.bincount(keys.ravel()))[:MAX_KEYS].astype(np.uint32)
        sizes = np.full(2 + words.shape[1], known.size + 2)
        sizes[:2] = split.n_low + 1, int(moves.max()) + 1
        symbols = _symbols(words, split, known, moves)
        n, d = words.shape
        apart = None if n >= max(LEAST_ROWS, d // 4) and d <= MAX_COLUMNS else False
        tables = StaticModel.fit(symbols, sizes, per_field=apart, total_rows=total_rows)
        return cls(split, known, tables, weakest)

    def _symbols(self, words: Words) -> npt.NDArray[np.uint16]:
        """(n, d) words -> (n, 2 + d) symbols."""
        n_moves = int(self.symbols.alphabet_sizes[1])
        moves = np.clip(_strengths(words, self.split) - self.weakest, 0, n_moves - 1)
        return _symbols(words, self.split, self.keys, moves)

    def _n_plain(self, symbols: npt.NDArray[Any]) -> int:
        """Bits that stand beside (n, 2 + d) symbols."""
        from . import _word_kernels as kernels

        zeros = symbols[:, 0].astype(np.int64)
        return kernels.n_plain_bits(symbols[:, 2:], zeros, self.keys.size, *self.split.rule)

    # A block and its inverse.
    def encode(self, words: Words) -> bytes:
        """(n, d) words -> bytes. Any words: those unlike the fitted ones only take more bytes."""
        from . import _word_kernels as kernels

        symbols = self._symbols(words)
        coded = self.symbols.encode(symbols)
        n_plain = self._n_plain(symbols)
        plain = np.zeros(n_plain // 32 + 2, np.uint32)
        zeros = symbols[:, 0].astype(np.int64)
        kernels.write_plain(words, symbols[:, 2:], zeros, self.keys.size, *self.split.rule, plain)
        low = plain.astype("<u4").view(np.uint8)[: -(-n_plain // 8)]
        return b"".join([number(len(coded)), coded, low.data])

    def decode(self, data: bytes | memoryview, n: int) -> Words:
        """Inverse of ``encode``: (n, d) words. Wrong bytes: CorruptDataError, or wrong words."""
        from . import _word_kernels as kernels

        reader, split = Reader(data, "block of words"), self.split
        symbols = self.symbols.decode(reader.take(reader.number(1 << 35)), n)
        low = reader.rest()
        n_plain = self._n_plain(symbols)
        if len(low) != -(-n_plain // 8):
            raise CorruptDataError(f"{len(low)} bytes of low bits, expected {-(-n_plain // 8)}")
        plain = np.zeros((n_plain // 32 + 2) * 4, np.uint8)
        plain[: len(low)] = np.frombuffer(low, np.uint8)
        words = np.empty((n, self.d), self._dtype)
        kernels.read_plain(
            plain.view("<u4").astype(np.uint32, copy=False),
            symbols[:, 2:],
            symbols[:, 0].astype(np.int64),
            symbols[:, 1].astype(np.int64) << (split.log2_unit or 0),
            self.keys,
            *split.rule,
            words,
        )
        return words

    def rate_bits(self, words: Words) -> float:
        """The ideal length of ``encode(words)`` in bits, nearly. O(n d)."""
        symbols = self._symbols(words)
        return self.symbols.rate_bits(symbols) + self._n_plain(symbols)

    # The model and its inverse.
    def to_bytes(self) -> bytes:
        """n_low; 1 + log2_unit, or 0 for none; the weakest strength; number of keys; runs of the
        differences between them (the first as it is); the tables."""
        unit = self.split.log2_unit
        head = number(self.split.n_low) + number(0 if unit is None else unit + 1)
        head += number(self.weakest)
        steps: Int = np.diff(self.keys, prepend=np.uint32(0)).astype(np.int64)
        return head + number(self.keys.size) + runs(steps) + self.symbols.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, n_bits: int, d: int) -> WordModel:
        """Inverse of ``to_bytes`` for rows of d words of n_bits. CorruptDataError, LimitError."""
        reader = Reader(data, "word model")
        n_low = reader.choice(n_bits - 1, "number of low bits")
        n_key = n_bits - n_low
        if n_key > MAX_KEY_BITS:
            raise CorruptDataError(f"word model: key of {n_key} bits, limit {MAX_KEY_BITS}")
        unit = reader.choice(n_key, "unit of the moves")
        weakest = reader.number(1 << MAX_KEY_BITS)
        n_keys = reader.number(MAX_KEYS)
        steps = reader.runs(n_keys, 1 << n_key)
        keys = np.cumsum(steps)
        if n_keys and (int(keys[-1]) >= 1 << n_key or (steps[1:] == 0).any()):
            raise CorruptDataError(f"word model: keys are not ascending below 2^{n_key}")
        symbols = StaticModel.from_bytes(reader.rest())
        sizes = symbols.alphabet_sizes
        if sizes.size != d + 2 or sizes[0] != n_low + 1 or (sizes[2:] != n_keys + 2).any():
            raise CorruptDataError(f"word model: alphabets that do not fit rows of {d}")
        if sizes[1] > (MAX_MOVES if unit else 1):
            raise CorruptDataError(f"word model: {sizes[1]} moves")
        split = Split(n_bits, n_low, unit - 1 if unit else None)
        return cls(split, keys.astype(np.uint32), symbols, weakest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordModel) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        return f"WordModel({self.split}, n_keys={self.keys.size}, symbols={self.symbols})"


def _strengths(words: Words, split: Split) -> Int:
    """(n,) how strong each row is, in units; zeros where rows are not moved."""
    from . import _word_kernels as kernels

    out = np.zeros(len(words), np.int64)
    if split.log2_unit is not None:
        kernels.strengths(words, *split.rule, split.log2_unit, SPAN, out)
    return out


def _keys(words: Words, split: Split, moves: Int) -> npt.NDArray[np.uint32]:
    """(n, d) the key of each word."""
    from . import _word_kernels as kernels

    keys = np.empty(words.shape, np.uint32)
    kernels.keys_of(words, *split.rule, moves << (split.log2_unit or 0), keys)
    return keys


def _symbols(
    words: Words, split: Split, known: npt.NDArray[np.uint32], moves: Int
) -> npt.NDArray[np.uint16]:
    """(n, 2 + d): how many low bits of a row are zero, its move, and the number of each key."""
    from . import _word_kernels as kernels

    number_of = np.full(1 << (split.n_bits - split.n_low), known.size, np.uint16)
    number_of[known] = np.arange(known.size)
    zeros = np.empty(len(words), np.int64)
    kernels.common_zeros(words, split.n_low, zeros)
    zeros[zeros * words.shape[1] < LEAST_ZEROS] = 0  # by chance, and not worth saying
    symbols = np.empty((len(words), 2 + words.shape[1]), np.uint16)
    symbols[:, 0], symbols[:, 1] = zeros, moves
    symbols[:, 2:] = number_of[_keys(words, split, moves)]
    kernels.mark_repeats(words, zeros, split.n_low, known.size + 1, symbols[:, 2:])
    return symbols


def _splits(words: Words, n_exponent: int, total_rows: int) -> list[Split]:
    """Cuts worth fitting tables for: that of the fewest bits if all columns shared a table, and
    somewhat shorter keys; and with moves."""
    from . import _word_kernels as kernels

    n, d = words.shape
    n_bits = 8 * words.itemsize
    longest = min(MAX_KEY_BITS, n_bits, 8 + words.size.bit_length())
    zeros = np.empty(n, np.int64)
    kernels.common_zeros(words, n_bits, zeros)
    whole = Split(n_bits, n_bits - longest, None)
    new = np.ones(words.shape, bool)
    new[1:] = words[1:] != words[:-1]
    keys = _keys(words, whole, np.zeros(n, np.int64))
    counts = np.bincount(keys[new], minlength=1 << longest)
    # the sign is the lowest bit of a key: keep it apart while the magnitude is cut shorter
    counts = counts.reshape(-1, 2)
    costs: dict[int, float] = {}
    for n_key in range(longest, 1, -1):
        n_keys = np.count_nonzero(counts)
        if n_keys <= MAX_KEYS:
            low = n_bits - n_key
            plain = float(new.sum(axis=1) @ (low - np.minimum(zeros, low)))
            coded = (entropy_bits(counts.ravel()) + plain) * total_rows / n
            costs[n_key] = coded + KEY_BITS * n_keys
        counts = counts.reshape(-1, 2, 2).sum(axis=1)
    best = min(costs, key=lambda n_key: costs[n_key])
    quarters = 1 + n_exponent + 2  # a key that tells quarters of an octave, as moves are
    long = max(best, quarters)
    still = sorted({best - 2, best, long} & costs.keys())
    splits = [Split(n_bits, n_bits - k, None) for k in still]
    if d > 1:
        moved = [k for k in (long - 2, long) if k >= quarters]
        splits += [Split(n_bits, n_bits - k, k - quarters) for k in moved]
    return splits
