"""Rows from whatever holds them: arrays, maps, files, Arrow tables and datasets, iterators.

array, map, files, Arrow, iterator ── Rows ── a sample that fits in memory
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ._arrays import ITEM_BYTES, Array, as_matrix, describe, first_nonfinite_row, is_torch, to_numpy
from .batches import Reservoir, Rows, batch_rows, forget, map_of
from .errors import InputError
from .integrations.files import arrow_batches, column_rows, open_rows, replacing, vector_column

SAMPLE_ROWS = 1 << 16  # of a sample, and at most
SAMPLE_BYTES = 1 << 28  # of them
LEAST_SAMPLE = 1 << 10  # rows, however long they are
CHECKPOINT_SECONDS = 60.0

Path = str | os.PathLike[str]


# -- from whatever holds them ----------------------------------------------------------------------
def rows_of(source: Any, *, key: str | None = None, name: str = "x") -> Rows:
    """The rows of a source:

    - a numpy array (also memory-mapped) or torch tensor (n, d);
    - a path, or a list of paths of one kind of rows: .npy, .npz, .parquet, .fvecs, .safetensors
      (read batch by batch), and what ``polarpack compress`` reads besides (whole);
    - a pyarrow Table, RecordBatch, RecordBatchReader, Dataset or Scanner;
    - an iterable of batches, each an array, a tensor, an Arrow batch or a dict of arrays; a
      generator is read once.

    key: the tensor of a file, or the column of Arrow batches and dicts; it may be left out where
    there is but one of floats. InputError for anything else; MissingDependencyError, OSError.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | os.PathLike):
        return _rows_of_files([source], key)
    if isinstance(source, np.ndarray) or is_torch(source):
        return _rows_of_array(source, name)
    if isinstance(source, Sequence) and source and isinstance(source[0], str | os.PathLike):
        return _rows_of_files(source, key)
    if _is_arrow(source):
        return _rows_of_arrow(source, key, name)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise InputError(
            f"expected {name} to be an array, a path, a list of paths, an Arrow table or dataset, "
            f"or an iterable of batches, got {type(source).__name__}"
        )
    again = iter(source) is not source
    return Rows(name, lambda start: _from_row(start, source, key, name), again=again)


def _rows_of_array(x: Any, name: str) -> Rows:
    spec = describe(x, name)
    step = batch_rows(spec)

    def read(start: int) -> Iterator[Any]:
        for at in range(start, len(x), step):
            yield x[at : at + step]
            forget(x)

    return Rows(name, read, spec.shape[0] if spec.shape else None, spec)


def _rows_of_files(paths: Sequence[Path], key: str | None) -> Rows:
    tables = [open_rows(path, key) for path in paths]
    if len(tables) == 1:
        return tables[0]
    counts = [table.n_rows for table in tables]

    def read(start: int) -> Iterator[Any]:
        for table in tables:
            n = table.n_rows or 0
            if start < n or table.n_rows is None:
                yield from table.batches(start)
            start = max(0, start - n)

    known = None if None in counts else sum(n or 0 for n in counts)
    return Rows(f"{len(paths)} files", read, known, again=all(table.again for table in tables))


def _is_arrow(x: Any) -> bool:
    """Whether x is a table of pyarrow's or gives batches of one; who has one has loaded it."""
    return type(x).__module__.split(".")[0] == "pyarrow" and (
        hasattr(x, "schema") or hasattr(x, "dataset_schema")
    )


def _rows_of_arrow(x: Any, key: str | None, name: str) -> Rows:
    schema = x.dataset_schema if hasattr(x, "dataset_schema") else x.schema
    column = vector_column(schema, key, name)
    again = not hasattr(x, "read_next_batch")
    n_rows = x.num_rows if hasattr(x, "num_rows") else None
    return Rows(
        name,
        lambda start: _from_row(start, arrow_batches(x, column), column, name),
        n_rows,
        again=again,
    )


def _array_of(batch: Any, key: str | None, where: str) -> Any:
    """What of a batch holds the rows."""
    if _is_arrow(batch):
        return column_rows(batch, vector_column(batch.schema, key, where), where)
    if isinstance(batch, Mapping):
        names = [key] if key is not None else [k for k, v in batch.items() if np.ndim(v) == 2]
        if len(names) != 1 or names[0] not in batch:
            known = ", ".join(map(repr, list(batch)[:20]))
            raise InputError(f"{where}: choose a column by key=, it holds {known or 'none'}")
        return batch[names[0]]
    return batch


def _from_row(start: int, batches: Iterable[Any], key: str | None, name: str) -> Iterator[Any]:
    """What of batches holds the rows, less the first ``start`` of them."""
    for i, batch in enumerate(batches):
        x = _array_of(batch, key, f"batch {i} of {name}")
        if start:
            n = describe(x, f"batch {i} of {name}").shape[0]
            x, start = x[start:], max(0, start - n)
        yield x


# -- a uniform sample ------------------------------------------------------------------------------
def sample_size(d: int, dtype: str, most: int | None) -> int:
    """Rows of a sample of rows of d numbers: SAMPLE_ROWS, or what SAMPLE_BYTES hold."""
    if most is not None:
        return most
    fitting = SAMPLE_BYTES // max(1, d * ITEM_BYTES[dtype])
    return int(np.clip(fitting, LEAST_SAMPLE, SAMPLE_ROWS))


def draw_rows(
    source: Any,
    *,
    size: int | None = None,
    seed: int = 0,
    key: str | None = None,
    name: str = "x",
    stop: float | None = None,
    checkpoint: Path | None = None,
) -> Array:
    """A uniform sample of the rows of a source, in their order: (k, d), bfloat16 as float32.

    source, key: as for ``rows_of``. An array in memory is handed back whole unless ``size`` is
    given. size: rows of the sample (default: 65536, or as many as take 256 MiB). Arrays are asked
    for these rows alone; everything else is read once, all of its rows are looked at, and memory is
    that of the sample and a batch. stop: time (``time.monotonic``) at which to make do with what
    was read, with a warning. checkpoint: a file that keeps the sample every minute, from which a
    call with the same source, size and seed goes on.

    InputError for rows that are not finite, batches that do not go together, and no rows at all.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"expected sample_rows >= 1, got {size!r}")
    is_array = isinstance(source, np.ndarray) or is_torch(source)
    if is_array and checkpoint is not None:
        raise InputError("an array is sampled at once: a checkpoint is for what is read in batches")
    if is_array and size is None and (map_of(source) is None or source.nbytes <= SAMPLE_BYTES):
        rows = as_matrix(source, name=name)
    elif is_array:
        rows = _sample_of_array(source, size, seed, name)
    else:
        table = rows_of(source, key=key, name=name)
        rows = _sample_of_stream(table, size, seed, stop, checkpoint)
    if not len(rows):
        raise InputError(f"expected at least one row to fit on, got shape {rows.shape}")
    return rows


def _sample_of_array(x: Any, size: int | None, seed: int, name: str) -> Array:
    """The rows that a stream of all would be sampled at, and no others read."""
    spec = describe(x, name)
    if len(spec.shape) != 2 or not spec.d:
        raise InputError(f"expected {name} of shape (n, d), got {spec.shape}")
    reservoir = Reservoir(sample_size(spec.d, spec.dtype, size), seed)
    for start in range(0, len(x), 1 << 20):
        reservoir.add(np.zeros((min(1 << 20, len(x) - start), 0)))
    numbers, pieces = reservoir.numbers, []
    for start in range(0, len(numbers), 1 << 10):  # pages around each row are mapped, too
        pieces.append(to_numpy(x[numbers[start : start + (1 << 10)]], name))
        forget(x)
    rows = np.concatenate(pieces) if pieces else to_numpy(x, name)
    bad = first_nonfinite_row(rows)
    if bad is not None:
        raise InputError(f"expected {name} to be finite, got NaN or infinity in row {numbers[bad]}")
    return rows


def _sample_of_stream(
    table: Rows, size: int | None, seed: int, stop: float | None, checkpoint: Path | None
) -> Array:
    held = None
    if checkpoint is not None and os.path.exists(checkpoint):
        held = Reservoir.load(checkpoint)
        if held.seed != seed or size not in (None, held.size):
            raise InputError(
                f"{os.fspath(checkpoint)}: a sample of {held.size} rows with seed {held.seed}, "
                f"expected {size or held.size} and {seed}"
            )
    saved = time.monotonic()
    for batch in table.batches(held.n_seen if held is not None else 0):
        rows = to_numpy(batch, table.name)
        if held is None:
            held = Reservoir(sample_size(rows.shape[1], rows.dtype.name, size), seed)
        bad = first_nonfinite_row(rows)
        if bad is not None:
            raise InputError(
                f"expected {table.name} to be finite, got NaN or infinity first in row "
                f"{held.n_seen + bad}"
            )
        held.add(rows)
        now = time.monotonic()
        if checkpoint is not None and now - saved > CHECKPOINT_SECONDS:
            _save(held, checkpoint)
            saved = now
        if stop is not None and now > stop:
            warnings.warn(
                f"time_budget: the sample is of the first {held.n_seen} rows alone", stacklevel=4
            )
            break
    if held is None:
        raise InputError(f"expected at least one row of {table.name}, got none")
    if checkpoint is not None:
        _save(held, checkpoint)
    return held.rows


def _save(held: Reservoir, checkpoint: Path) -> None:
    """An old checkpoint stays until the new one is whole."""
    with replacing(checkpoint) as partial:
        held.save(partial)
