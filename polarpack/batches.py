"""Tables that come in batches of rows, and a uniform sample of one.

    Rows ── batches (n_i, d), checked ── Reservoir ── (k, d)

Whatever is larger than memory is read from front to back, a batch at a time. A row enters the
sample by a random number of its own, which depends on the seed and on its place alone: the k rows
of the smallest numbers are the sample, so that it is uniform, the same however rows are cut into
batches, and can be continued from a checkpoint. Source of the idea: Vitter, "Random sampling with a
reservoir", ACM TOMS 1985; with a number for each row, Efraimidis and Spirakis, "Weighted random
sampling with a reservoir", 2006.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._arrays import ITEM_BYTES, Array, TensorSpec, describe
from .errors import InputError

BATCH_BYTES = 1 << 24  # about, of a batch read from a file


@dataclass(frozen=True)
class Rows:
    """A table that is read from front to back: ``batches`` from any row on, if ``again``."""

    name: str  # in messages, and of the tensor it becomes
    read: Callable[[int], Iterator[Any]]  # unchecked batches from a row on
    n_rows: int | None = None  # None: nobody knows before the end
    spec: TensorSpec | None = None  # shape and dtype, where they are known before
    again: bool = True  # whether it can be read more than once

    def batches(self, start: int = 0) -> Iterator[Any]:
        """Arrays or tensors (n_i, d) of one dtype and width, from row ``start`` on.

        Empty batches are passed over. InputError, naming the batch and its first row, for what is
        no matrix of floats, and for a dtype or width other than before.
        """
        first, row = None, start
        for i, x in enumerate(self.read(start)):
            where = f"batch {i} of {self.name}"
            spec = describe(x, where)
            if len(spec.shape) != 2:
                raise InputError(f"expected {where} of shape (n, d), got {spec.shape}")
            first = first or spec
            if (spec.d, spec.dtype) != (first.d, first.dtype):
                raise InputError(
                    f"{where} (row {row} on): expected (n, {first.d}) {first.dtype} as before, "
                    f"got {spec.shape} {spec.dtype}"
                )
            if len(x):
                yield x
            row += len(x)


def batch_rows(spec: TensorSpec) -> int:
    """Rows of a batch of some BATCH_BYTES."""
    return max(1, BATCH_BYTES // max(1, spec.d * ITEM_BYTES[spec.dtype]))


def forget(x: Any) -> None:
    """Let go of the pages of a memory-mapped array read so far; they stay with the system."""
    mapped = map_of(x)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(ValueError, OSError):  # closed, or not of a file
            mapped.madvise(mmap.MADV_DONTNEED)


def map_of(x: Any) -> mmap.mmap | None:
    """The map of a file that an array lies in and does not write to, if it lies in one."""
    if not isinstance(x, np.ndarray) or x.flags.writeable:
        return None
    base: Any = x
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


class Reservoir:
    """The ``size`` rows of the smallest random numbers among all added so far, each row having one.

    Memory: size rows, and 16 bytes for each. Adding n rows costs O(n), and copies some
    size * log(n / size) of them.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.n_seen = 0
        self._n = 0  # rows held
        self._rows: Array | None = None
        self._keys = np.full(size, np.inf)
        self._numbers = np.zeros(size, np.int64)

    def add(self, rows: Array) -> None:
        """Look at rows (n, d), which follow those added before."""
        n = len(rows)
        if self._rows is None:
            self._rows = np.empty((self.size, *rows.shape[1:]), rows.dtype)
        held = self._rows
        if (held.shape[1:], held.dtype) != (rows.shape[1:], rows.dtype):
            raise InputError(
                f"expected rows of {held.shape[1]} {held.dtype} as in the sample so far, "
                f"got {rows.shape[1]} {rows.dtype}"
            )
        # one draw of 64 bits a row: whoever has seen n rows stands at draw n
        bits = np.random.PCG64(self.seed)
        keys = np.random.Generator(bits.advance(self.n_seen)).random(n)
        limit = self._keys.max() if self._n == self.size else np.inf
        new = np.flatnonzero(keys < limit)
        both = np.concatenate([self._keys[: self._n], keys[new]])
        if len(both) > self.size:
            kept = np.zeros(len(both), bool)
            kept[np.argpartition(both, self.size - 1)[: self.size]] = True
            new = new[kept[self._n :]]
            free = np.flatnonzero(~kept[: self._n])
        else:
            free = np.zeros(0, np.int64)
        places = np.concatenate([free, np.arange(self._n, self.size)])[: len(new)]
        self._rows[places], self._keys[places] = rows[new], keys[new]
        self._numbers[places] = self.n_seen + new
        self._n += len(places) - len(free)
        self.n_seen += n

    @property
    def numbers(self) -> Array:
        """Places of the sampled rows in all that were added, ascending: (k,) int64."""
        return np.sort(self._numbers[: self._n])

    @property
    def rows(self) -> Array:
        """The sampled rows in the order in which they came: (k, d)."""
        if self._rows is None:
            raise InputError("expected at least one row to sample")
        order = np.argsort(self._numbers[: self._n])
        if np.array_equal(order, np.arange(self._n)):
            return self._rows[: self._n]
        return self._rows[: self._n][order]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what is here to path, from where ``load`` goes on."""
        state = {"size": self.size, "seed": self.seed, "n_seen": self.n_seen}
        rows = self._rows[: self._n] if self._rows is not None else np.zeros((0, 0))
        keys, numbers = self._keys[: self._n], self._numbers[: self._n]
        with open(path, "wb") as file:
            np.savez(file, state=json.dumps(state), rows=rows, keys=keys, numbers=numbers)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reservoir:
        """Inverse of ``save``. InputError where the file is none of that."""
        try:
            with np.load(path, allow_pickle=False) as held:
                state = json.loads(str(held["state"]))
                rows, keys, numbers = held["rows"], held["keys"], held["numbers"]
            self = cls(int(state["size"]), int(state["seed"]))
            self.n_seen, self._n = int(state["n_seen"]), len(rows)
            self._keys[: self._n], self._numbers[: self._n] = keys, numbers
            if self._n != min(self.size, self.n_seen) or rows.ndim != 2:
                raise ValueError(f"{rows.shape} of {self.n_seen} rows")
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{os.fspath(path)}: no checkpoint of a sample: {error}") from None
        if self._n:
            self._rows = np.empty((self.size, rows.shape[1]), rows.dtype)
            self._rows[: self._n] = rows
        return self
