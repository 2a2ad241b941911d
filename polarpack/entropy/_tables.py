"""Static tables: integer CDFs, how coarse a stored one may be, and which fields share one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ._numbers import Reader, fold, number, unfold

Int = npt.NDArray[np.int64]
Levels = npt.NDArray[np.uint8]
Symbols = npt.NDArray[Any]  # (n, n_fields), uint8 or uint16

MAX_PRECISION = 24  # range_coder's
LANES_FROM = 1 << 14  # symbols in a block from which four interleaved coders are worth 5 bytes

RESOLUTIONS = (1, 2, 4, 8, 16)  # levels per octave
MAX_LEVEL = 255
POOL_RESOLUTION = 4  # tables are pooled as if stored with it
MAX_CLUSTERS = 64  # more tables than this only if every field has its own


def precision_for(alphabet_size: int) -> int:
    """Precision of a static table: symbols that never occur own less than 1/256 of it together, and
    the coder loses less than 0.0001 bits a symbol to rounding (0.001 above 4096 symbols)."""
    return 20 if alphabet_size <= 1 << 12 else MAX_PRECISION


def cdf_from_counts(counts: npt.ArrayLike, precision: int) -> npt.NDArray[np.uint32]:
    """The CDF nearest to ``counts`` in which every symbol is possible.

    counts: (k,) integers >= 0, 1 <= k <= 2**precision; all zero means equally likely. Returns
    (k + 1,) uint32, strictly increasing from 0 to 2**precision. Symbols whose share is less than
    one get one; the others share the rest in proportion, rounded down, and the few units left over
    go to the largest remainders (ties: lowest symbol). Integer arithmetic only. O(k log k).
    Raises InputError.

    >>> cdf_from_counts([6, 0, 2], 4)
    array([ 0, 11, 12, 16], dtype=uint32)
    """
    c = np.asarray(counts)
    if c.dtype.kind not in "iu" or c.ndim != 1 or c.size == 0:
        raise InputError(f"expected counts as a vector of integers, got {c.dtype} {c.shape}")
    if not 0 <= precision <= MAX_PRECISION or c.size > 1 << precision:
        raise InputError(f"expected at most 2**{precision} counts, precision <= 24, got {c.size}")
    if (c < 0).any():
        raise InputError("expected counts >= 0")
    c = c.astype(np.uint64)
    # sums have to fit in 63 bits, and times 2**precision too: scale down to 39 bits, but not to 0
    excess = max(0, int(c.max()).bit_length() + c.size.bit_length() - 63)
    excess += max(0, int((c >> np.uint64(excess)).sum()).bit_length() - 38)
    weights = np.maximum(c >> np.uint64(excess), c > 0).astype(np.int64)
    if not weights.any():
        weights[:] = 1
    shares = np.ones(c.size, bool)  # the symbols that still share; the others own one
    while True:
        room = (1 << precision) - int((~shares).sum())
        total = int(weights[shares].sum())
        small = shares & (weights * room < total)
        if not small.any():
            break
        shares &= ~small
    part, remainder = np.divmod(weights[shares] * room, total)
    left = room - int(part.sum())
    part[np.argsort(-remainder, kind="stable")[:left]] += 1
    sizes = np.ones(c.size, np.int64)
    sizes[shares] = part
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32)


class Tables:
    """CDFs as the kernels want them, and the coding of blocks with them.

    alphabet_sizes: (n_fields,). weights: one vector of integers >= 0 per table. table_of:
    (n_fields,) which table each field uses.
    """

    BUCKETS_PER_SYMBOL = 16  # finding a symbol then rarely takes a second step
    MAX_BUCKET_BITS = 16

    def __init__(self, alphabet_sizes: Int, weights: Sequence[Int], table_of: Int) -> None:
        self.alphabet_sizes = alphabet_sizes
        self.table_of = table_of
        self._sizes = [len(w) for w in weights]
        self._precisions = [precision_for(k) for k in self._sizes]
        cdfs = [cdf_from_counts(w, p) for w, p in zip(weights, self._precisions, strict=True)]
        self._cdfs = cdfs
        self.precision = np.array(self._precisions, np.int64)[table_of]

    @cached_property
    def _shares(self) -> tuple[npt.NDArray[np.uint64], Int]:
        """start + 2**32 * size of each symbol, table by table; where each field's table starts."""
        parts = [
            cdf[:-1].astype(np.uint64) | np.diff(cdf).astype(np.uint64) << np.uint64(32)
            for cdf in self._cdfs
        ]
        return np.concatenate(parts), _starts(parts)[self.table_of]

    @cached_property
    def _lookup(self) -> tuple[Any, ...]:
        """To find the symbol that owns a value: all CDFs, where each field's starts; for each
        bucket of 2**width values the symbol that owns its first value, where each field's buckets
        start, and its width."""
        tables: list[npt.NDArray[np.uint16]] = []
        widths: list[int] = []
        for cdf, k, precision in zip(self._cdfs, self._sizes, self._precisions, strict=True):
            wanted = (self.BUCKETS_PER_SYMBOL * k - 1).bit_length()
            width = precision - min(precision, self.MAX_BUCKET_BITS, wanted)
            edges = cdf.astype(np.int64) + (1 << width) - 1 >> width
            tables.append(np.repeat(np.arange(k, dtype=np.uint16), np.diff(edges)))
            widths.append(width)
        of = self.table_of
        cdfs = np.concatenate(self._cdfs), _starts(self._cdfs)[of]
        return *cdfs, np.concatenate(tables), _starts(tables)[of], np.array(widths, np.int64)[of]

    def encode(self, symbols: Symbols) -> bytes:
        """One checked block -> bytes: one message, or (from LANES_FROM symbols on) the lengths of
        the first three messages and the four messages."""
        from . import _block_kernels as kernels
        from . import range_coder as rc

        n, n_fields = symbols.shape
        tables = (*self._shares, self.precision)
        if symbols.size < LANES_FROM or n < kernels.LANES:
            message = np.empty(rc.capacity(symbols.size), np.uint32)
            return rc.words_to_bytes(message, kernels.encode_static(symbols, *tables, message))
        q, rest = divmod(n, kernels.LANES)
        words = np.empty((kernels.LANES, rc.capacity((q + rest) * n_fields)), np.uint32)
        lengths = np.zeros(kernels.LANES, np.int64)
        kernels.encode_lanes(symbols, *tables, words, lengths)
        # the lanes are nearly of one length: the differences take a byte each
        steps = [fold(int(step)) for step in np.diff(lengths[:-1])]
        lanes = [rc.spelled(row, int(length)) for row, length in zip(words, lengths, strict=True)]
        head = number(int(lengths[0])) + b"".join(map(number, steps))
        return b"".join([head, *(lane.data for lane in lanes)])

    def decode(self, data: bytes | memoryview, symbols: Symbols) -> None:
        """Inverse of ``encode``, into ``symbols``. CorruptDataError where lengths do not fit."""
        from . import _block_kernels as kernels
        from . import range_coder as rc

        cdf, cdf_start, first, first_start, width = self._lookup
        tables = (cdf, cdf_start, first, first_start, self.precision, width)
        if symbols.size < LANES_FROM or len(symbols) < kernels.LANES:
            kernels.decode_static(rc.words_from_bytes(data), *tables, symbols)
            return
        reader = Reader(data, "block")
        lengths = [reader.number(1 << 35)]
        lengths += [unfold(reader.number(1 << 35)) for _ in range(kernels.LANES - 2)]
        lanes = [reader.take(int(length)) for length in np.cumsum(lengths)]
        rows = [rc.words_from_bytes(lane) for lane in [*lanes, reader.rest()]]
        words = np.zeros((kernels.LANES, max(row.size for row in rows)), np.uint32)
        for i, row in enumerate(rows):
            words[i, : row.size] = row
        kernels.decode_lanes(words, *tables, symbols)

    def rate_bits(self, symbols: Symbols) -> float:
        """Ideal length of ``encode(symbols)``."""
        bits = 0.0
        order = np.argsort(self.table_of, kind="stable")
        used, first = np.unique(self.table_of[order], return_index=True)
        for table, fields in zip(used, np.split(order, first[1:]), strict=True):
            counts = np.bincount(symbols[:, fields].ravel(), minlength=self._sizes[table])
            bits += _bits(counts, self._cdfs[table])
        return bits


def _starts(parts: Sequence[npt.NDArray[Any]]) -> Int:
    """Where each part starts when they stand one behind the other."""
    sizes = np.array([part.size for part in parts], np.int64)
    return np.asarray(np.cumsum(sizes) - sizes)


def _bits(counts: npt.NDArray[Any], cdf: npt.NDArray[np.uint32]) -> float:
    """Bits of symbols that occur ``counts`` times, coded with this CDF."""
    sizes = np.diff(cdf.astype(np.int64))
    return float(counts @ (math.log2(int(cdf[-1])) - np.log2(sizes)))


def entropy_bits(counts: npt.NDArray[Any]) -> float:
    """Symbols that occur ``counts`` times: their number times their empirical entropy, in bits."""
    c = counts[counts > 0].astype(np.float64)
    return float(c.sum() * np.log2(max(1.0, c.sum())) - c @ np.log2(c))


# Levels. A stored table says for each symbol how rare it is: level v >= 1 is a weight of
# 2**(-(v - 1) / resolution), level 0 is "not expected". A finer resolution costs bytes in the table
# and saves some in the blocks: 2.5% of a bit a symbol at 1, 0.01% at 16.


def levels_from_counts(counts: npt.NDArray[Any], resolution: int) -> Levels:
    """(k,) counts (not all zero, fractions allowed) -> (k,) levels, 1 for the most frequent."""
    octaves = math.log2(max(1e-9, counts.max())) - np.log2(np.maximum(counts, 1e-9))
    level = np.minimum(np.rint(octaves * resolution), MAX_LEVEL - 1) + 1
    return np.where(counts > 0, level, 0).astype(np.uint8)


@cache
def level_weights(resolution: int) -> Int:
    """(256,) integer weight of each level: 2**37 * 2**(-(v - 1) / resolution), rounded down. Exact
    integer square roots, four for a sixteenth of an octave: the same on every machine."""
    weights = [0]
    for level in range(MAX_LEVEL):
        octave, part = divmod(level * (16 // resolution), 16)
        root = 1 << 16 * 38 - part
        for _ in range(4):
            root = math.isqrt(root)
        weights.append(root >> octave + 1)
    table = np.array(weights, np.int64)
    table.setflags(write=False)  # all callers get this one
    return table


def table_bits(counts: npt.NDArray[Any], levels: Levels, resolution: int) -> float:
    """Bits of symbols that occur ``counts`` times, coded with the table that ``levels`` store."""
    weights = level_weights(resolution)[levels]
    return _bits(counts, cdf_from_counts(weights, precision_for(weights.size)))


# Sharing.


def histograms(symbols: Symbols, fields: Int, k: int, *, pooled: bool) -> Int:
    """(len(fields), k) counts of each field's symbols; (1, k) of all of them together if pooled."""
    if pooled:
        return np.bincount(symbols[:, fields].ravel(), minlength=k)[None, :]
    return np.stack([np.bincount(symbols[:, field], minlength=k) for field in fields])


def merge(counts: npt.NDArray[Any], group: Int) -> npt.NDArray[Any]:
    """Sum of the rows of ``counts`` in each group: (n_groups, k)."""
    merged = np.zeros((int(group.max()) + 1, counts.shape[1]), counts.dtype)
    np.add.at(merged, group, counts)
    return merged


def unseen_bits(counts: npt.NDArray[Any], copies: float) -> float:
    """What a table fitted on a sample costs beyond the entropy of that sample, on ``copies`` times
    as many symbols of which the sample is one: 1/(2 ln 2) bits per free count too optimistic in the
    sample, and as much too bad outside it."""
    return max(0.0, copies - 1.0) * (np.count_nonzero(counts) - 1) / math.log(2)


def pool(counts: Int, copies: float) -> Int:
    """Which of the fields with these (n_fields, k) counts had better share a table: (n_fields,)
    table numbers. Tries 1, 2, 4 ... tables found by k-means in the Kullback-Leibler sense, and one
    each; compares the bits of the symbols (``copies`` times those counted) plus the bits of the
    tables. O(rounds * n_fields * tables * k)."""
    n_fields = len(counts)
    options = [np.zeros(n_fields, np.int64)]
    n_tables = 2
    while n_tables < n_fields and n_tables <= MAX_CLUSTERS:
        options.append(_cluster(counts, n_tables))
        n_tables *= 2
    options.append(np.arange(n_fields))
    return options[int(np.argmin([_pooled_bits(counts, group, copies) for group in options]))]


def _pooled_bits(counts: Int, group: Int, copies: float) -> float:
    """Total bits: symbols, tables (as if coded by their own entropy), map of fields to tables."""
    merged = merge(counts, group)
    merged[merged.sum(axis=1) == 0] += 1
    levels = [levels_from_counts(c, POOL_RESOLUTION) for c in merged]
    parts = list(zip(merged, levels, strict=True))
    symbols = sum(copies * table_bits(c, v, POOL_RESOLUTION) for c, v in parts)
    unseen = sum(unseen_bits(c, copies) for c in merged)
    stored = np.bincount(np.concatenate(levels), minlength=MAX_LEVEL + 1)
    shape = 0.5 * math.log2(1 + stored.sum()) * np.count_nonzero(stored)
    mapped = entropy_bits(np.bincount(group)) if len(merged) < len(group) else 0.0
    return float(symbols + unseen + entropy_bits(stored) + shape + mapped)


def _cluster(counts: Int, n_tables: int) -> Int:
    """Lloyd's iteration on histograms: each field goes to the table that codes it in the fewest
    bits, each table is the sum of its fields. Starts from the fields sorted by entropy."""
    entropy = np.array([entropy_bits(c) / max(1, int(c.sum())) for c in counts])
    group = np.empty(len(counts), np.int64)
    group[np.argsort(entropy, kind="stable")] = np.arange(len(counts)) * n_tables // len(counts)
    for _ in range(8):
        merged = merge(counts, group) + 0.5
        bits = np.log2(merged.sum(axis=1, keepdims=True)) - np.log2(merged)
        closest = np.unique(np.argmin(counts @ bits.T, axis=1), return_inverse=True)[1]
        if (closest == group).all():
            break
        group = closest
    return group


# Levels are stored as they are, or as differences to the symbol before, or to the same symbol of
# the table before. Differences are modulo 256, folded: 0, -1, 1, -2, 2 -> 0, 1, 2, 3, 4.

PREDICTIONS = ("none", "symbol before", "table before")


def differences(tables: Sequence[Levels], prediction: str) -> Levels:
    """All levels of all tables in one row, less what ``prediction`` says they would be."""
    rows = []
    previous = np.zeros(0, np.uint8)
    for table in tables:
        if prediction == "none":
            rows.append(table)
            continue
        expected = np.zeros_like(table)
        if prediction == "symbol before":
            expected[1:] = table[:-1]
        elif previous.size == table.size:
            expected = previous
        signed = (table - expected).view(np.int8).astype(np.int16)
        rows.append(((signed << 1) ^ (signed >> 15)).astype(np.uint8))
        previous = table
    return np.concatenate(rows)


def levels_from_differences(row: Levels, sizes: Int, prediction: str) -> list[Levels]:
    """Inverse of ``differences`` for tables of these sizes."""
    tables: list[Levels] = []
    for part in np.split(row, np.cumsum(sizes)[:-1]):
        table = part.copy()
        if prediction != "none":
            folded = part.astype(np.int16)
            table = ((folded >> 1) ^ -(folded & 1)).astype(np.uint8)
        if prediction == "symbol before":
            table = np.cumsum(table, dtype=np.uint8)
        elif prediction == "table before" and tables and tables[-1].size == table.size:
            table = table + tables[-1]
        tables.append(table)
    return tables
