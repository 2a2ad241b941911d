"""Models: how likely each symbol is, in integers, and the bytes of symbols under a model.

A model is anything with the members of ``SymbolModel``. It codes *blocks*: matrices (n, n_fields)
of integers, column f below ``alphabet_sizes[f]``, each block by itself:

    UniformModel    every symbol equally likely; stores the alphabet sizes only
    StaticModel     stored tables, each used by one or more fields
    AdaptiveModel   learns from the symbols of the block as they pass; stores nothing learned,
                    may look at an earlier field of the same row (its context)

``choose_model`` picks the one that costs the fewest bytes in total. Whatever a decoder computes
from a stored model is integer arithmetic, so it decodes alike on every machine. Tables are CDFs: k
symbols own [cdf[s], cdf[s + 1]) of 2**precision, and each owns at least one, so every symbol of the
alphabet can be coded whatever the table.

The kernels (numba) are in ``range_coder`` and ``_block_kernels``, loaded when the first block is
coded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .._arrays import enter_codes
from .._threads import in_threads
from ..errors import CorruptDataError, InputError, LimitError
from ._numbers import Reader, number, runs
from ._tables import (
    LANES_FROM,
    PREDICTIONS,
    RESOLUTIONS,
    Tables,
    cdf_from_counts,
    differences,
    entropy_bits,
    histograms,
    level_weights,
    levels_from_counts,
    levels_from_differences,
    merge,
    pool,
    table_bits,
    unseen_bits,
)
from ._trees import Trees, context_shift, n_contexts

__all__ = [
    "AdaptiveModel",
    "StaticModel",
    "SymbolModel",
    "UniformModel",
    "cdf_from_counts",
    "choose_model",
    "decode_blocks",
    "encode_blocks",
    "model_from_bytes",
    "model_to_bytes",
    "symbol_dtype",
]

Int = npt.NDArray[np.int64]
Symbols = npt.NDArray[Any]  # (n, n_fields), uint8 or uint16
Data = bytes | memoryview

MAX_ALPHABET = 1 << 16  # symbols are at most uint16
MAX_FIELDS = 1 << 20
MAX_TABLES = 1 << 16  # table numbers are symbols themselves
MAX_TABLE_ENTRIES = 1 << 22  # of all tables together: 16 MiB of CDFs, 256 MiB to look them up
MAX_NODES = 1 << 20  # of all adaptive trees together: 40 MiB
MAX_BLOCK_SYMBOLS = 1 << 28


class SymbolModel(Protocol):
    """What every model offers. ``encode`` and ``decode`` are inverse, one block a call."""

    @property
    def alphabet_sizes(self) -> Int:
        """(n_fields,) number of symbols of each field."""

    @property
    def n_fields(self) -> int:
        """Number of columns."""

    def encode(self, symbols: npt.NDArray[Any]) -> bytes:
        """(n, n_fields) integers -> bytes. InputError if one is outside its alphabet."""

    def decode(self, data: Data, n: int) -> Symbols:
        """Bytes -> (n, n_fields), the smallest of uint8 and uint16 that holds the alphabets. Wrong
        bytes: CorruptDataError, or wrong symbols, each inside its alphabet."""

    def rate_bits(self, symbols: npt.NDArray[Any]) -> float:
        """The ideal length of ``encode(symbols)`` in bits."""

    def to_bytes(self) -> bytes:
        """The model itself (``model_to_bytes`` adds its kind)."""


class UniformModel:
    """Every symbol of a field is equally likely: for codes that nothing predicts.

    alphabet_sizes: (n_fields,) integers in 1..65536.
    """

    def __init__(self, alphabet_sizes: npt.ArrayLike) -> None:
        self.alphabet_sizes = _checked_sizes(alphabet_sizes)
        self.n_fields = self.alphabet_sizes.size
        n_entries = int(np.unique(self.alphabet_sizes).sum())
        if n_entries > MAX_TABLE_ENTRIES:
            raise LimitError(f"uniform model: {n_entries} entries, limit {MAX_TABLE_ENTRIES}")

    @cached_property
    def _tables(self) -> Tables:
        sizes, table_of = np.unique(self.alphabet_sizes, return_inverse=True)
        return Tables(self.alphabet_sizes, [np.ones(k, np.int64) for k in sizes], table_of)

    def encode(self, symbols: npt.NDArray[Any]) -> bytes:
        """See ``SymbolModel``."""
        return self._tables.encode(_checked(symbols, self.alphabet_sizes))

    def decode(self, data: Data, n: int) -> Symbols:
        """See ``SymbolModel``."""
        symbols = _empty(n, self.alphabet_sizes)
        self._tables.decode(data, symbols)
        return symbols

    def rate_bits(self, symbols: npt.NDArray[Any]) -> float:
        """See ``SymbolModel``."""
        return self._tables.rate_bits(_checked(symbols, self.alphabet_sizes))

    def to_bytes(self) -> bytes:
        """The alphabet sizes: number of fields, runs."""
        return number(self.n_fields) + runs(self.alphabet_sizes)

    @classmethod
    def from_bytes(cls, data: Data) -> UniformModel:
        """Inverse of ``to_bytes``. CorruptDataError, LimitError."""
        reader = Reader(data, "uniform model")
        sizes = _read_sizes(reader)
        reader.end()
        return cls(sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UniformModel) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        return f"UniformModel(n_fields={self.n_fields})"


class StaticModel:
    """Stored tables: field f is coded with table ``table_of[f]``.

    A table says for each symbol how rare it is: level v >= 1 stands for a probability in proportion
    to ``2 ** (-(v - 1) / resolution)``, level 0 for a symbol that is not expected; it keeps the
    least share, 2**-20 (2**-24 in alphabets of more than 4096 symbols).

    alphabet_sizes: (n_fields,) in 1..65536.
    levels: one uint8 vector per table, of the alphabet size of the fields that use it.
    table_of: (n_fields,) table numbers, each first used after all lower ones: 0, then 0 or 1 ...
    resolution: 1, 2, 4, 8 or 16.
    """

    def __init__(
        self,
        alphabet_sizes: npt.ArrayLike,
        levels: Sequence[npt.ArrayLike],
        table_of: npt.ArrayLike,
        *,
        resolution: int = 8,
    ) -> None:
        self.alphabet_sizes = _checked_sizes(alphabet_sizes)
        self.n_fields = self.alphabet_sizes.size
        self.levels = [np.asarray(table, np.uint8) for table in levels]
        self.table_of = np.asarray(table_of, np.int64)
        self.resolution = resolution
        if resolution not in RESOLUTIONS:
            raise InputError(f"expected resolution in {RESOLUTIONS}, got {resolution}")
        sizes = _table_sizes(self.alphabet_sizes, self.table_of)
        if sizes is None:
            raise InputError(
                f"expected ({self.n_fields},) table numbers in order of first use, the same only "
                "for fields of one alphabet size"
            )
        if [table.shape for table in self.levels] != [(k,) for k in sizes]:
            raise InputError(f"expected {len(sizes)} tables with one level per symbol")
        if len(sizes) > MAX_TABLES or int(sizes.sum()) > MAX_TABLE_ENTRIES:
            raise LimitError(
                f"static model: {len(sizes)} tables of {sizes.sum()} entries together, limits "
                f"{MAX_TABLES} and {MAX_TABLE_ENTRIES}"
            )

    @classmethod
    def fit(
        cls,
        symbols: npt.NDArray[Any],
        alphabet_sizes: npt.ArrayLike,
        *,
        per_field: bool | None = None,
        total_rows: int | None = None,
    ) -> StaticModel:
        """The tables that code symbols like these in the fewest bytes, tables included.

        symbols: (n, n_fields) integers. per_field: True gives each field its table, False each
        alphabet size, None (default) pools fields where that is cheaper in total. total_rows: how
        many rows will be coded, if these are only a sample of them (default: these are all); then
        symbols that the sample lacks keep a small probability. O(n n_fields), and the pooling.
        """
        sizes = _checked_sizes(alphabet_sizes)
        symbols = _checked(symbols, sizes)
        copies = _copies(symbols, total_rows)
        table_of = np.empty(sizes.size, np.int64)
        tables: list[npt.NDArray[Any]] = []
        for k in np.unique(sizes):
            fields = np.flatnonzero(sizes == k)
            alone = len(fields) * int(k) <= MAX_TABLE_ENTRIES and per_field is not False
            counts = histograms(symbols, fields, int(k), pooled=not alone)
            group = np.zeros(len(fields), np.int64)
            if alone:
                group = np.arange(len(fields)) if per_field else pool(counts, copies)
                counts = merge(counts, group)
            table_of[fields] = len(tables) + group
            tables += [c if c.any() else c + 1 for c in counts]
        _, first, table_of = np.unique(table_of, return_index=True, return_inverse=True)
        order = np.argsort(first)
        table_of = np.argsort(order)[table_of]
        prior = 0.5 if copies > 1 else 0.0
        counts_of = [tables[i] + prior for i in order]
        models = []
        costs = []
        for resolution in RESOLUTIONS:
            levels = [levels_from_counts(c, resolution) for c in counts_of]
            models.append(cls(sizes, levels, table_of, resolution=resolution))
            parts = zip(counts_of, levels, strict=True)
            bits = sum(table_bits(c, v, resolution) for c, v in parts)
            costs.append(copies * bits + 8 * len(models[-1].to_bytes()))
        return models[int(np.argmin(costs))]

    @cached_property
    def _tables(self) -> Tables:
        weights = level_weights(self.resolution)
        return Tables(self.alphabet_sizes, [weights[t] for t in self.levels], self.table_of)

    def encode(self, symbols: npt.NDArray[Any]) -> bytes:
        """See ``SymbolModel``."""
        return self._tables.encode(_checked(symbols, self.alphabet_sizes))

    def decode(self, data: Data, n: int) -> Symbols:
        """See ``SymbolModel``."""
        symbols = _empty(n, self.alphabet_sizes)
        self._tables.decode(data, symbols)
        return symbols

    def rate_bits(self, symbols: npt.NDArray[Any]) -> float:
        """See ``SymbolModel``."""
        return self._tables.rate_bits(_checked(symbols, self.alphabet_sizes))

    def to_bytes(self) -> bytes:
        """Alphabet sizes; place of the resolution in RESOLUTIONS; number of tables; unless it is 1
        or n_fields, the map of fields to tables; place of the prediction in PREDICTIONS; levels.
        Map (with its length in front) and levels are coded by an AdaptiveModel."""
        n_tables = len(self.levels)
        head = number(self.n_fields) + runs(self.alphabet_sizes)
        head += number(RESOLUTIONS.index(self.resolution)) + number(n_tables)
        if 1 < n_tables < self.n_fields:
            coded = AdaptiveModel([n_tables]).encode(self.table_of[:, None])
            head += number(len(coded)) + coded
        coder = AdaptiveModel([256])
        rows = [differences(self.levels, prediction) for prediction in PREDICTIONS]
        ways = [number(i) + coder.encode(row[:, None]) for i, row in enumerate(rows)]
        return head + min(ways, key=len)

    @classmethod
    def from_bytes(cls, data: Data) -> StaticModel:
        """Inverse of ``to_bytes``. CorruptDataError, LimitError."""
        reader = Reader(data, "static model")
        sizes = _read_sizes(reader)
        resolution = RESOLUTIONS[reader.choice(len(RESOLUTIONS), "resolution")]
        n_tables = reader.number(MAX_TABLES)
        if not 0 < n_tables <= sizes.size:
            raise CorruptDataError(f"static model: {n_tables} tables for {sizes.size} fields")
        table_of = np.arange(sizes.size) if n_tables > 1 else np.zeros(sizes.size, np.int64)
        if 1 < n_tables < sizes.size:
            coded = reader.take(reader.number(1 << 35))
            table_of = AdaptiveModel([n_tables]).decode(coded, sizes.size)[:, 0].astype(np.int64)
        table_sizes = _table_sizes(sizes, table_of)
        if table_sizes is None or table_sizes.size != n_tables:
            raise CorruptDataError("static model: table unused, or used by unequal fields")
        n_entries = int(table_sizes.sum())
        if n_entries > MAX_TABLE_ENTRIES:
            raise LimitError(f"static model: {n_entries} entries, limit {MAX_TABLE_ENTRIES}")
        prediction = PREDICTIONS[reader.choice(len(PREDICTIONS), "prediction")]
        row = AdaptiveModel([256]).decode(reader.rest(), n_entries)[:, 0]
        levels = levels_from_differences(row, table_sizes, prediction)
        return cls(sizes, levels, table_of, resolution=resolution)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticModel) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        n_entries = sum(table.size for table in self.levels)
        return (
            f"StaticModel(n_fields={self.n_fields}, n_tables={len(self.levels)}, "
            f"n_entries={n_entries}, resolution={self.resolution})"
        )


class AdaptiveModel:
    """Counts symbols as they pass, anew in each block; nothing is stored but the shape.

    A symbol of b bits is coded four bits at a time, each part by counts of what came before it
    (``_block_kernels.encode_adaptive``), so even 65536 symbols need no table to start from.

    alphabet_sizes: (n_fields,) in 1..65536.
    context_of: (n_fields,) for each field an earlier field of the row, whose symbol (its top four
        bits) selects the counts to use; -1 for none, the default.
    pooled: fields of equal alphabet size and number of contexts share their counts.
    """

    def __init__(
        self,
        alphabet_sizes: npt.ArrayLike,
        context_of: npt.ArrayLike | None = None,
        *,
        pooled: bool = False,
    ) -> None:
        self.alphabet_sizes = _checked_sizes(alphabet_sizes)
        n_fields = self.n_fields = self.alphabet_sizes.size
        none = np.full(n_fields, -1, np.int64)
        self.context_of = none if context_of is None else np.asarray(context_of, np.int64)
        self.pooled = bool(pooled)
        if self.context_of.shape != (n_fields,):
            raise InputError(f"expected context_of of shape ({n_fields},)")
        if ((self.context_of < -1) | (self.context_of >= np.arange(n_fields))).any():
            raise InputError("expected context_of to name earlier fields, or -1")
        self._trees = Trees(self.alphabet_sizes, self.context_of, pooled=self.pooled)
        if self._trees.n_nodes > MAX_NODES:
            raise LimitError(f"adaptive model: {self._trees.n_nodes} nodes, limit {MAX_NODES}")

    def encode(self, symbols: npt.NDArray[Any]) -> bytes:
        """See ``SymbolModel``."""
        return self._trees.encode(_checked(symbols, self.alphabet_sizes))

    def decode(self, data: Data, n: int) -> Symbols:
        """See ``SymbolModel``."""
        symbols = _empty(n, self.alphabet_sizes)
        self._trees.decode(data, symbols)
        return symbols

    def rate_bits(self, symbols: npt.NDArray[Any]) -> float:
        """See ``SymbolModel``."""
        return self._trees.rate_bits(_checked(symbols, self.alphabet_sizes))

    def to_bytes(self) -> bytes:
        """Alphabet sizes; whether counts are pooled; runs of how many fields back the context is, 0
        for none."""
        back = np.where(self.context_of < 0, 0, np.arange(self.n_fields) - self.context_of)
        sizes = number(self.n_fields) + runs(self.alphabet_sizes)
        return sizes + number(int(self.pooled)) + runs(back)

    @classmethod
    def from_bytes(cls, data: Data) -> AdaptiveModel:
        """Inverse of ``to_bytes``. CorruptDataError, LimitError."""
        reader = Reader(data, "adaptive model")
        sizes = _read_sizes(reader)
        pooled = bool(reader.choice(2, "pooling"))
        back = reader.runs(sizes.size, MAX_FIELDS)
        reader.end()
        fields = np.arange(sizes.size)
        if (back > fields).any():
            raise CorruptDataError("adaptive model: context before the first field")
        return cls(sizes, np.where(back == 0, -1, fields - back), pooled=pooled)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdaptiveModel) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        n_contexts = int((self.context_of >= 0).sum())
        return (
            f"AdaptiveModel(n_fields={self.n_fields}, n_contexts={n_contexts}, "
            f"pooled={self.pooled})"
        )


Model = UniformModel | StaticModel | AdaptiveModel

# Ids are promises: one of them means "this class decodes it", in every version.
KINDS: dict[int, type[UniformModel] | type[StaticModel] | type[AdaptiveModel]] = {
    1: UniformModel,
    2: StaticModel,
    3: AdaptiveModel,
}


def model_to_bytes(model: SymbolModel) -> bytes:
    """One of the models here with its kind in front: one byte, then ``model.to_bytes()``.
    InputError for a model of another kind."""
    for kind, known in KINDS.items():
        if type(model) is known:
            return bytes([kind]) + model.to_bytes()
    raise InputError(f"expected a model of a kind in KINDS, got {type(model).__name__}")


def model_from_bytes(data: Data) -> Model:
    """Inverse of ``model_to_bytes``. CorruptDataError, LimitError (before allocating)."""
    if len(data) == 0 or data[0] not in KINDS:
        got = f"kind {data[0]}" if len(data) else "no bytes"
        raise CorruptDataError(f"model: expected a kind in {sorted(KINDS)}, got {got}")
    return KINDS[data[0]].from_bytes(memoryview(data)[1:])


# Choosing

MAX_TRIED_SYMBOLS = 1 << 21  # adaptive models are tried on evenly spaced blocks of so many symbols
MAX_CONTEXT_FIELDS = 64  # pairs of fields grow with the square
CONTEXT_ROWS = 1 << 14  # rows in which contexts are sought


def choose_model(
    symbols: npt.NDArray[Any],
    alphabet_sizes: npt.ArrayLike,
    block_rows: int,
    *,
    total_rows: int | None = None,
) -> Model:
    """The model with the fewest bytes in total: its own, and those of all blocks.

    symbols: (n, n_fields) integers, to be coded in blocks of ``block_rows`` rows. total_rows: how
    many rows will be coded, if these are only a sample of them. Ties go to the simpler model. Takes
    about as long as coding the symbols three times.
    """
    if block_rows < 1:
        raise InputError(f"expected block_rows >= 1, got {block_rows}")
    sizes = _checked_sizes(alphabet_sizes)
    symbols = _checked(symbols, sizes)
    uniform = UniformModel(sizes)
    if symbols.size == 0:
        return uniform
    copies = _copies(symbols, total_rows)
    static = StaticModel.fit(symbols, sizes, total_rows=total_rows)
    unseen = sum(unseen_bits(table, copies) for table in static.levels) / 8
    candidates: list[Model] = [uniform, static]
    extra = [0.0, unseen]
    contexts = _contexts(symbols, sizes, block_rows)
    for context_of, pooled in ((None, False), (None, True), (contexts, False)):
        repeats = pooled and np.unique(sizes).size == sizes.size
        if repeats or (context_of is not None and (context_of < 0).all()):
            continue
        try:
            candidates.append(AdaptiveModel(sizes, context_of, pooled=pooled))
        except LimitError:  # so many symbols that a block would not teach much about them
            continue
        extra.append(0.0)
    costs = [
        len(model.to_bytes()) + copies * _coded_bytes(model, symbols, block_rows) + more
        for model, more in zip(candidates, extra, strict=True)
    ]
    return candidates[int(np.argmin(costs))]


def _copies(symbols: Symbols, total_rows: int | None) -> float:
    """How many times as many rows as these will be coded; at least 1."""
    return max(1.0, (total_rows or 0) / max(1, len(symbols)))


def _coded_bytes(model: Model, symbols: Symbols, block_rows: int) -> float:
    """Bytes of all blocks under the model, nearly."""
    n, n_fields = symbols.shape
    n_blocks = -(-n // block_rows)
    if not isinstance(model, AdaptiveModel):
        ends = 5 if min(n, block_rows) * n_fields >= LANES_FROM else 1
        return float(model.rate_bits(symbols) / 8 + ends * n_blocks)
    n_tried = max(1, MAX_TRIED_SYMBOLS // (block_rows * n_fields))
    starts = range(0, n, block_rows * -(-n_blocks // n_tried))
    blocks = [symbols[start : start + block_rows] for start in starts]
    scale = n / sum(len(block) for block in blocks)
    return float(sum(model.rate_bits(block) for block in blocks) / 8 * scale + n_blocks)


def _contexts(symbols: Symbols, sizes: Int, block_rows: int) -> Int:
    """For each field the earlier field that tells most about it, where that is more than a block
    has to spend on learning one more table per context; -1 elsewhere."""
    context_of = np.full(sizes.size, -1, np.int64)
    if sizes.size > MAX_CONTEXT_FIELDS:
        return context_of
    in_block = min(block_rows, len(symbols))
    rows = symbols[:: -(-len(symbols) // CONTEXT_ROWS)].astype(np.int64)
    for field in range(1, sizes.size):
        k = int(sizes[field])
        learning = 0.5 * math.log2(in_block) * (k - 1) / in_block  # bits a row, for each tree
        alone = entropy_bits(np.bincount(rows[:, field], minlength=k)) / len(rows)
        if learning > alone:
            continue
        best = 0.0
        for other in range(field):
            seen = int(sizes[other])
            context = rows[:, other] >> context_shift(seen)
            given = entropy_bits(np.bincount(context * k + rows[:, field]))
            given = (given - entropy_bits(np.bincount(context))) / len(rows)
            gain = alone - given - learning * (n_contexts(seen) - 1)
            if gain > best:
                best, context_of[field] = gain, other
    return context_of


# Blocks


def encode_blocks(
    model: SymbolModel,
    symbols: npt.NDArray[Any],
    starts: Iterable[int],
    *,
    threads: int | None = None,
) -> list[bytes]:
    """Code blocks of rows, each by itself, in parallel.

    symbols: (n, n_fields). starts: first row of each block, ascending from 0; each block ends where
    the next starts, the last with the rows. The bytes do not depend on ``threads``.
    """
    edges = [*(int(start) for start in starts), len(symbols)]
    if edges[0] != 0 or any(a > b for a, b in pairwise(edges)):
        raise InputError(f"expected block starts ascending from 0 within {len(symbols)} rows")
    return in_threads(model.encode, [symbols[a:b] for a, b in pairwise(edges)], threads)


def decode_blocks(
    model: SymbolModel,
    parts: Sequence[Data],
    counts: Sequence[int],
    *,
    threads: int | None = None,
) -> Symbols:
    """Inverse of ``encode_blocks``: parts[i] holds counts[i] rows. (sum(counts), n_fields)."""
    if len(parts) != len(counts):
        raise InputError(f"expected as many counts as parts, got {len(counts)} and {len(parts)}")
    jobs = list(zip(parts, counts, strict=True))
    blocks = in_threads(lambda job: model.decode(job[0], int(job[1])), jobs, threads)
    return np.concatenate([_empty(0, model.alphabet_sizes), *blocks])


# Checks


def symbol_dtype(alphabet_sizes: npt.NDArray[Any]) -> np.dtype[Any]:
    """uint8 if all symbols fit, else uint16."""
    return np.dtype(np.uint8 if int(alphabet_sizes.max()) <= 256 else np.uint16)


def _checked_sizes(alphabet_sizes: npt.ArrayLike) -> Int:
    sizes = np.asarray(alphabet_sizes)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or not 1 <= sizes.size <= MAX_FIELDS:
        got = f"{sizes.dtype} {sizes.shape}"
        raise InputError(f"expected 1..{MAX_FIELDS} integer alphabet sizes, got {got}")
    if (sizes < 1).any() or (sizes > MAX_ALPHABET).any():
        raise InputError(f"expected alphabet sizes in 1..{MAX_ALPHABET}")
    return sizes.astype(np.int64)


def _checked(symbols: npt.NDArray[Any], sizes: Int) -> Symbols:
    """The block C-ordered in its own dtype; InputError if it is not (n, n_fields) in range."""
    block, _ = enter_codes(symbols, sizes)
    if block.size > MAX_BLOCK_SYMBOLS:
        raise InputError(f"expected at most {MAX_BLOCK_SYMBOLS} symbols, got {block.size}")
    return block.astype(symbol_dtype(sizes), copy=False)


def _empty(n: int, sizes: Int) -> Symbols:
    """Room for a block of n rows."""
    if not 0 <= n <= MAX_BLOCK_SYMBOLS // sizes.size:
        raise LimitError(f"block of {n} rows of {sizes.size}: limit {MAX_BLOCK_SYMBOLS} symbols")
    return np.empty((n, sizes.size), symbol_dtype(sizes))


def _table_sizes(sizes: Int, table_of: Int) -> Int | None:
    """Alphabet size of each table, or None if tables are not numbered by first use, or shared by
    fields of unequal alphabets."""
    if table_of.shape != sizes.shape:
        return None
    numbers, first = np.unique(table_of, return_index=True)
    ordered = (numbers == np.arange(numbers.size)).all() and (np.diff(first) > 0).all()
    equal = ordered and (sizes[first][table_of] == sizes).all()
    return sizes[first] if equal else None


def _read_sizes(reader: Reader) -> Int:
    """Inverse of ``number(n_fields) + runs(alphabet_sizes)``."""
    n = reader.number(MAX_FIELDS)
    sizes = reader.runs(n, MAX_ALPHABET)
    if n == 0 or (sizes == 0).any():
        raise CorruptDataError(f"{reader.name}: no fields, or an empty alphabet")
    return sizes
