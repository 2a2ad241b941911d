"""Writing ``.polar`` files: the chunks of a tensor, and appending to tensors row by row."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from ._arrays import Array
from ._threads import in_threads
from .blocks import (
    NonFinite,
    TensorCoding,
    check_max_error,
    check_name,
    check_rows,
    header_to_bytes,
    native_rows,
    word_model,
    work_dtype,
)
from .container import Kind, Reader, Writer, partial_path
from .entropy.model import model_from_bytes, model_to_bytes
from .errors import InputError
from .polar import PolarQuantizer
from .reading import Index
from .sources import rows_of

Chunk = tuple[int, int, int, list[bytes]]  # kind, tensor, rows, parts
PARTS_PER_CHUNK = 256  # blocks that share a chunk: damage to its head loses them all
GROUP_FLOATS = 1 << 22  # numbers that are coded at a time, about: what a stream takes of memory


@dataclass
class _Stream:
    """One tensor that rows are being appended to."""

    coding: TensorCoding
    number: int | None = None  # in the file, once its first chunk is written
    n_rows: int = 0  # in the file
    blocks: list[bytes] = field(default_factory=list)  # coded, of a chunk that is not whole yet
    n_coded: int = 0  # their rows
    waiting: list[Array] = field(default_factory=list)  # rows not coded yet
    n_waiting: int = 0

    @property
    def n_next(self) -> int:
        """Rows that are to be coded next, when they are there: a fixed cut of a chunk, so that the
        bytes do not depend on how rows come."""
        step = self.coding.block_rows
        group = 1 << max(1, GROUP_FLOATS // max(1, step * self.coding.spec.d)).bit_length() - 1
        left = PARTS_PER_CHUNK - len(self.blocks) % PARTS_PER_CHUNK
        return step * min(group, left)

    def first(self, n: int) -> tuple[Array, list[Array]]:
        """The first n waiting rows, and the others."""
        taken, rest = [], list(self.waiting)
        while n > 0:
            rows = rest.pop(0)
            taken.append(rows[:n])
            if len(rows) > n:
                rest.insert(0, rows[n:])
            n -= len(taken[-1])
        if len(taken) == 1:
            return taken[0], rest
        empty = np.zeros((0, self.coding.spec.d), work_dtype(self.coding.spec.dtype))
        return np.concatenate([empty, *taken]), rest


class StreamWriter:
    """Appends rows to the tensors of a ``.polar`` file, block by block; made by ``create``.

    quantizer: None stores rows exactly. max_error, nonfinite: as in ``compress``, for every row.
    embed_quantizer=False stores the quantizer's hash only. Memory beyond the batch: some 2^22
    numbers at work, and one chunk of coded blocks. A killed process
    leaves a partial file that ``create(..., resume=True)`` continues: ``n_rows(name)`` says how
    many rows are safe, feed the rest in the same order, and the finished file has the bytes of an
    uninterrupted run. After an OSError (a full disk) nothing is lost: ``close`` once more.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        quantizer: PolarQuantizer | None,
        *,
        max_error: float | None = None,
        nonfinite: NonFinite = "error",
        embed_quantizer: bool = True,
        resume: bool = False,
    ) -> None:
        if not (quantizer is None or isinstance(quantizer, PolarQuantizer)):
            raise InputError(f"expected a PolarQuantizer or None, got {type(quantizer).__name__}")
        if quantizer is not None:
            quantizer.alphabet_sizes  # noqa: B018  raises NotFittedError
        if nonfinite not in ("error", "raw"):
            raise InputError(f"expected nonfinite 'error' or 'raw', got {nonfinite!r}")
        self._quantizer, self._embed = quantizer, embed_quantizer
        self._max_error, self._nonfinite = check_max_error(max_error), nonfinite
        self._streams: dict[str, _Stream] = {}
        self._present: set[tuple[int, int]] = set()  # (tensor, kind) of side chunks in the file
        self._closed = False
        self._compared: Callable[[Array, Array], None] | None = None
        self._writer = Writer(path, resume=resume, keep_partial=True)
        if resume and len(self._writer.chunks):
            try:
                self._restore(path)
            except BaseException:
                self._writer.abort()
                raise

    def _restore(self, path: str | os.PathLike[str]) -> None:
        """Take over names, models and row counts of what an interrupted run has written."""
        with Reader(partial_path(path), recover=True) as reader:
            index = Index(reader, len(self._writer.chunks))
        mine = None if self._quantizer is None else self._quantizer.hash
        for i, header in index.headers.items():
            not_yet = type(header.quantizer) is int and header.quantizer not in index.quantizers
            if not (not_yet and mine is not None) and mine != index.quantizer_hash(header):
                raise InputError(f"{path}: the interrupted file was written with another quantizer")
            model = index.models[i].before() if i in index.models else None
            words = index.words[i].before() if i in index.words else None
            coding = TensorCoding(
                header.spec,
                self._quantizer,
                header.layout,
                None if model is None else model_from_bytes(model),
                header.max_error,
                self._nonfinite,
                word_model(words, header.spec),
                words_settled=index.n_rows.get(i, 0) > 0 or i in index.words,
            )
            self._streams[header.name] = _Stream(coding, i, index.n_rows.get(i, 0))
            self._present.add((i, Kind.TENSOR_HEADER))
        self._present.update((i, Kind.QUANTIZER) for i in index.quantizers)
        self._present.update((i, Kind.ENTROPY_MODEL) for i in index.models)
        self._present.update((i, Kind.WORD_MODEL) for i in index.words)

    def n_rows(self, name: str) -> int:
        """Rows of a tensor that the file holds already, without those waiting for their chunk."""
        return self._streams[name].n_rows if name in self._streams else 0

    def append(self, name: str, batch: Any) -> None:
        """Add rows (n, d) to the tensor ``name``; the first batch fixes its dtype.

        Warns where the error of rows is far above that of the training rows (``drift``).
        Raises InputError for another width or dtype, or rows that are not finite.
        """
        if self._closed:
            raise InputError("the writer is closed")
        check_name(name)
        spec, rows = native_rows(batch, name)
        stream = self._streams.get(name)
        d = stream.coding.spec.d if stream is not None else spec.d
        d = d if self._quantizer is None else self._quantizer.d_
        if len(spec.shape) != 2 or spec.d != d:
            raise InputError(f"expected batches of shape (n, {d}) for {name!r}, got {spec.shape}")
        check_rows(rows, name, self._nonfinite)
        if stream is None:
            layout = "archive" if self._quantizer is None else self._quantizer.layout
            bound = self._max_error
            coding = TensorCoding(spec, self._quantizer, layout, None, bound, self._nonfinite)
            stream = self._streams[name] = _Stream(coding)
        elif spec.dtype != stream.coding.spec.dtype:
            raise InputError(
                f"expected batches of {name!r} in {stream.coding.spec.dtype}, got {spec.dtype}"
            )
        if not len(rows):
            return
        stream.waiting.append(rows)
        stream.n_waiting += len(rows)
        try:
            while stream.n_waiting >= (n := stream.n_next):
                self._encode(name, stream, n)
        finally:
            if stream.waiting:  # the last ones are the caller's, who may change them
                stream.waiting[-1] = stream.waiting[-1].copy()

    def _encode(self, name: str, stream: _Stream, n: int) -> None:
        """Turn the first n waiting rows of a tensor into blocks, and blocks that fill a chunk into
        one of the file."""
        if len(stream.blocks) >= PARTS_PER_CHUNK:  # when writing them failed
            self._write_chunk(name, stream)
        rows, rest = stream.first(n)
        if not stream.blocks:
            self._warn_of_drift(name, rows)
        blocks = stream.coding.encode_rows(rows)
        if self._compared is not None:
            self._compared(rows, _decoded(stream.coding, blocks, len(rows)))
        stream.waiting, stream.n_waiting = rest, stream.n_waiting - n
        stream.blocks, stream.n_coded = stream.blocks + blocks, stream.n_coded + n
        if len(stream.blocks) >= PARTS_PER_CHUNK:
            self._write_chunk(name, stream)

    def _write_chunk(self, name: str, stream: _Stream) -> None:
        """Move the blocks of a tensor to the file, its side chunks before them."""
        number = stream.number
        if number is None:  # tensors are numbered in the order in which they reach the file
            number = sum(s.number is not None for s in self._streams.values())
        shared = number > 0
        for chunk in _side_chunks(name, number, stream.coding, self._embed, shared, streamed=True):
            if (number, chunk[0]) not in self._present:
                self._writer.add(*chunk)
                self._present.add((number, chunk[0]))
                stream.number = number
        self._writer.add(Kind.ROW_BLOCKS, number, stream.n_coded, stream.blocks)
        stream.n_rows += stream.n_coded
        stream.blocks, stream.n_coded = [], 0

    def _warn_of_drift(self, name: str, rows: Array) -> None:
        if self._quantizer is None:
            return
        few = rows[:: max(1, len(rows) // 512)]
        few = few[np.isfinite(few).all(axis=1)]
        if len(few) and self._quantizer.drift(few) > DRIFT_WARNING:
            warnings.warn(
                f"rows appended to {name!r} are coded with over {DRIFT_WARNING} times the error of "
                "the training rows; consider fitting a new quantizer",
                stacklevel=5,
            )

    def sync(self) -> None:
        """Wait until the chunks written so far are on the disk."""
        self._writer.sync()

    def extend(self, name: str, source: Any, *, key: str | None = None) -> None:
        """Append all rows of a source: whatever ``fit`` takes, read in batches. With ``resume``
        those that the file holds already are left out (of a generator: passed over)."""
        n_done = self.n_rows(name) + self.n_waiting(name)
        for batch in rows_of(source, key=key, name=name).batches(n_done):
            self.append(name, batch)

    def n_waiting(self, name: str) -> int:
        """Rows of a tensor that were appended and wait for their chunk: a kill would lose them."""
        stream = self._streams.get(name)
        return 0 if stream is None else stream.n_coded + stream.n_waiting

    def flush(self) -> int:
        """Write what is waiting, in a chunk that may be shorter than others; the bytes the file
        would have if it were closed now. Rows appended later make it differ from an uninterrupted
        run's."""
        begun = sorted(
            self._streams.items(), key=lambda item: (item[1].number is None, item[1].number or 0)
        )
        for name, stream in begun:
            while stream.n_waiting:
                self._encode(name, stream, min(stream.n_next, stream.n_waiting))
            if stream.blocks or stream.number is None:
                self._write_chunk(name, stream)
        return self._writer.size_bytes

    def close(self) -> None:
        """Write what is waiting, and let the file appear under its name."""
        self.flush()
        self._writer.close()
        self._closed = True

    def discard(self) -> None:
        """Stop, and keep nothing: neither a file nor what a resume could go on from."""
        if not self._closed:
            self._closed = True
            self._writer.abort(keep=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not self._closed:  # what is written is kept for a resume
                self._closed = True
                self._writer.abort()


def _decoded(coding: TensorCoding, blocks: Sequence[bytes], n: int) -> Array:
    """The rows that blocks just made will be read as: (n, d)."""
    step = coding.block_rows
    parts = in_threads(
        lambda i: coding.decode_block(memoryview(blocks[i]), min(step, n - i * step)),
        range(len(blocks)),
    )
    return np.concatenate(parts)


DRIFT_WARNING = 4.0  # times the squared error on training rows, relative to the rows' energy


def create(
    path: str | os.PathLike[str], quantizer: PolarQuantizer | None, **options: Any
) -> StreamWriter:
    """Open a ``.polar`` file for streaming; see ``StreamWriter`` for the options.

    >>> with pp.create("big.polar", quantizer=q) as f:  # doctest: +SKIP
    ...     f.append("embedding", batch)
    """
    return StreamWriter(path, quantizer, **options)


def _side_chunks(
    name: str, tensor: int, coding: TensorCoding, embed: bool, shared: bool, *, streamed: bool
) -> Iterator[Chunk]:
    """The chunks that go before the rows of a tensor. ``shared``: its quantizer is tensor 0's."""
    reference: int | str | None = None
    if coding.quantizer is not None:
        reference = (0 if shared else tensor) if embed else coding.quantizer.hash
    yield Kind.TENSOR_HEADER, tensor, 0, [header_to_bytes(name, coding, reference, streamed)]
    if coding.quantizer is not None and embed and not shared:
        yield Kind.QUANTIZER, tensor, 0, [coding.quantizer.to_bytes()]
    if coding.model is not None:
        yield Kind.ENTROPY_MODEL, tensor, 0, [model_to_bytes(cast(Any, coding.model))]
    if coding.words is not None:
        yield Kind.WORD_MODEL, tensor, 0, [coding.words.to_bytes()]


def tensor_chunks(
    name: str,
    tensor: int,
    coding: TensorCoding,
    blocks: Sequence[bytes],
    embed: bool = True,
    shared: bool = False,
) -> list[Chunk]:
    """All chunks of one tensor whose blocks are already coded."""
    chunks = list(_side_chunks(name, tensor, coding, embed, shared, streamed=False))
    n, step = coding.spec.n_rows, coding.block_rows
    for start in range(0, len(blocks), PARTS_PER_CHUNK):
        some = list(blocks[start : start + PARTS_PER_CHUNK])
        rows = min(n, (start + len(some)) * step) - start * step
        chunks.append((Kind.ROW_BLOCKS, tensor, rows, some))
    return chunks
