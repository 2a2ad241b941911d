"""Tensors <-> ``.polar`` files and blobs: the quantizer, the entropy coder and the container together.

A tensor becomes a header chunk, its quantizer, the model of its codes and chunks of row blocks:

    rows ── quantizer ── codes ── entropy model, or fixed-width rows ── block ── part of a chunk

Every block starts with a byte that says how it is coded, so any block can fall back to its rows as
they are, and a coded block can carry *escapes*: rows stored exactly because the code could not hold
them to a promised error, or because they are not finite. docs/format.md is the normative text.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from . import container
from ._arrays import (
    FLOAT_DTYPES,
    ITEM_BYTES,
    Array,
    TensorSpec,
    bfloat16_bits,
    bfloat16_values,
    describe,
    first_nonfinite_row,
    is_torch,
)
from ._threads import in_threads
from .container import Kind, Reader, Writer
from .entropy.model import SymbolModel, choose_model, model_from_bytes, model_to_bytes
from .entropy.packing import pack_rows, row_bytes, unpack_rows
from .errors import (
    CorruptDataError,
    FormatError,
    InputError,
    LimitError,
    MissingDependencyError,
)
from .metrics import relative_error
from .planner import Target, best_archive, fit, guess_bits, meet_quality, meets, objective_of
from .polar import MAX_D, PolarQuantizer
from .trellis import next_log_step

Layout = Literal["archive", "rows"]
NonFinite = Literal["error", "raw"]
LAYOUTS: tuple[str, ...] = ("archive", "rows")

RAW, CODED, ESCAPED = 0, 1, 2  # first byte of a block
BLOCK_FLOATS = 1 << 17  # a block of the archive layout holds about so many numbers
ROWS_PART_BYTES = 1 << 14  # and one of the rows layout about so many bytes
PARTS_PER_CHUNK = 256  # blocks that share a chunk: damage to its head loses them all
MAX_HEADER = 1 << 20  # bytes of a tensor's header
MAX_NAME = 1 << 12
MAX_NDIM = 32
MODEL_ROWS = 1 << 15  # rows from which the model of the codes is chosen


# -- numbers <-> bytes of a dtype that numpy may not know ------------------------------------------
def native_rows(x: Any, name: str = "x") -> tuple[TensorSpec, Array]:
    """A caller's tensor -> its spec and its rows (n, d), in its own dtype (bfloat16 as float32).

    A tensor of one axis is one row; a scalar is a row of one number.
    """
    spec = describe(x, name)
    if spec.library == "torch":
        x = x.detach()
        x = (x.float() if spec.dtype == "bfloat16" else x).cpu().numpy()
    elif spec.dtype == "bfloat16":
        x = x.astype(np.float32)
    return spec, np.asarray(x).reshape(spec.n_rows, spec.d)


def rows_to_bytes(rows: Array, dtype: str) -> bytes:
    """Rows as little-endian numbers of ``dtype``, exactly."""
    if dtype == "bfloat16":
        return bfloat16_bits(rows).astype("<u2").tobytes()
    return np.ascontiguousarray(rows, np.dtype(dtype).newbyteorder("<")).tobytes()


def rows_from_bytes(data: bytes | memoryview, dtype: str, d: int) -> Array:
    """Inverse of ``rows_to_bytes``: (n, d); bfloat16 as float32."""
    if len(data) % (d * ITEM_BYTES[dtype]):
        raise CorruptDataError(f"{len(data)} bytes are no whole rows of {d} {dtype}")
    if dtype == "bfloat16":
        return bfloat16_values(np.frombuffer(data, "<u2").astype(np.uint16)).reshape(-1, d)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(-1, d)


def work_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype in which rows of ``dtype`` are held."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


# -- one tensor's coding ---------------------------------------------------------------------------
@dataclass
class TensorCoding:
    """How the rows of one tensor become blocks: everything a block's bytes depend on."""

    spec: TensorSpec
    quantizer: PolarQuantizer | None  # None: rows are stored raw
    layout: Layout = "archive"
    model: SymbolModel | None = None  # of the code columns that the quantizer has no model of
    max_error: float | None = None
    nonfinite: NonFinite = "error"

    @property
    def block_rows(self) -> int:
        """Rows of a full block: a fixed function of the header, so that any row can be found."""
        d = max(1, self.spec.d)
        if self.quantizer is None or self.layout == "rows":
            size = d * ITEM_BYTES[self.spec.dtype]
            if self.quantizer is not None:
                size = max(1, row_bytes(self.quantizer.alphabet_sizes))
            return 1 << int(np.clip(np.log2(max(1, ROWS_PART_BYTES // size)), 4, 12))
        return 1 << int(np.clip(np.rint(np.log2(BLOCK_FLOATS / d)), 6, 12))

    @property
    def n_chosen(self) -> int:
        """Leading code columns that ``model`` codes; the quantizer's own model codes the rest."""
        assert self.quantizer is not None
        own = self.quantizer.own_model
        return self.quantizer.n_fields - (own.n_fields if own is not None else 0)

    def choose_model(self, codes: Array) -> None:
        """Pick the model of the code columns that the quantizer has none of."""
        assert self.quantizer is not None
        if self.layout == "archive" and self.n_chosen:
            sizes = self.quantizer.alphabet_sizes[: self.n_chosen]
            few = codes[: max(MODEL_ROWS, self.block_rows), : self.n_chosen]
            self.model = choose_model(few, sizes, self.block_rows)

    # A block and its inverse.
    def encode_block(self, rows: Array, codes: Array | None) -> bytes:
        """Rows (n, d) and their codes -> the bytes of one block, raw where that is smaller."""
        raw = bytes([RAW]) + rows_to_bytes(rows, self.spec.dtype)
        if codes is None:
            return raw
        escapes = self._escapes(rows, codes)
        coded = self._codes_to_bytes(codes)
        if len(escapes):
            exact = rows_to_bytes(rows[escapes], self.spec.dtype)
            head = struct.pack("<HI", len(escapes), len(coded))
            block = bytes([ESCAPED]) + head + escapes.astype("<u2").tobytes() + exact + coded
        else:
            block = bytes([CODED]) + coded
        return block if len(block) < len(raw) else raw

    def decode_block(self, data: memoryview, n: int, *, stages: int | None = None) -> Array:
        """Bytes of a block of n rows -> (n, d) in the work dtype."""
        kind, codes, escapes, exact = self._open_block(data, n)
        if kind == RAW:
            return exact
        assert self.quantizer is not None and codes is not None
        rows = self.quantizer.decode_as(codes, work_dtype(self.spec.dtype), stages=stages)
        if self.spec.dtype == "bfloat16":
            rows = bfloat16_values(bfloat16_bits(rows))
        rows[escapes] = exact
        return rows

    def decode_rows(self, data: memoryview, n: int, wanted: Array, *, stages: int | None = None) -> Array:
        """Like ``decode_block`` for the rows numbered ``wanted`` alone: in the rows layout the cost
        is theirs alone."""
        if self.layout == "archive" or data[:1] == bytes([RAW]) or self.quantizer is None:
            return self.decode_block(data, n, stages=stages)[wanted]
        _, codes, escapes, exact = self._open_block(data, n, wanted)
        assert codes is not None
        rows = self.quantizer.decode_as(codes, work_dtype(self.spec.dtype), stages=stages)
        if self.spec.dtype == "bfloat16":
            rows = bfloat16_values(bfloat16_bits(rows))
        place = np.full(n, -1)
        place[escapes] = np.arange(len(escapes))
        hit = place[wanted] >= 0
        rows[hit] = exact[place[wanted][hit]]
        return rows

    def _escapes(self, rows: Array, codes: Array) -> Array:
        """Numbers of the rows that have to be stored exactly."""
        assert self.quantizer is not None
        escaped = ~np.isfinite(rows).all(axis=1)
        if self.max_error is not None:
            decoded = self.quantizer.decode_as(codes, work_dtype(self.spec.dtype))
            if self.spec.dtype == "bfloat16":
                decoded = bfloat16_values(bfloat16_bits(decoded))
            safe = np.where(escaped[:, None], 0, rows)
            with np.errstate(invalid="ignore", over="ignore"):
                escaped |= ~(relative_error(safe, np.where(escaped[:, None], 0, decoded)) <= self.max_error)
            if self.max_error == 0:  # to the bit: -0.0 is not 0.0
                same = np.signbit(decoded) == np.signbit(rows)
                escaped |= ~same.all(axis=1)
        return np.flatnonzero(escaped)

    def _codes_to_bytes(self, codes: Array) -> bytes:
        assert self.quantizer is not None
        if self.layout == "rows":
            return pack_rows(codes, self.quantizer.alphabet_sizes).tobytes()
        own, k = self.quantizer.own_model, self.n_chosen
        if own is None:
            return cast(SymbolModel, self.model).encode(codes)
        if not k:
            return own.encode(codes)
        head = cast(SymbolModel, self.model).encode(codes[:, :k])
        return struct.pack("<I", len(head)) + head + own.encode(codes[:, k:])

    def _codes_from_bytes(self, data: memoryview, n: int) -> Array:
        assert self.quantizer is not None
        own, k = self.quantizer.own_model, self.n_chosen
        if own is None:
            return cast(SymbolModel, self.model).decode(data, n)
        if not k:
            return own.decode(data, n)
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else len(data)
        if 4 + size > len(data):
            raise CorruptDataError(f"block of {len(data)} bytes declares {size} of leading columns")
        head = cast(SymbolModel, self.model).decode(data[4 : 4 + size], n)
        tail = own.decode(data[4 + size :], n)
        return np.concatenate([head.astype(tail.dtype), tail], axis=1)

    def _open_block(
        self, data: memoryview, n: int, wanted: Array | None = None
    ) -> tuple[int, Array | None, Array, Array]:
        """Bytes of a block -> kind, codes, numbers of exact rows, exact rows."""
        d, dtype = self.spec.d, self.spec.dtype
        kind = data[0] if len(data) else -1
        none = np.zeros(0, np.int64)
        if kind == RAW:
            rows = rows_from_bytes(data[1:], dtype, d)
            if len(rows) != n:
                raise CorruptDataError(f"raw block holds {len(rows)} rows, expected {n}")
            return kind, None, none, rows
        if kind not in (CODED, ESCAPED) or self.quantizer is None:
            raise CorruptDataError(f"block of kind {kind}, expected {RAW}, {CODED} or {ESCAPED}")
        escapes, exact = none, np.zeros((0, d), work_dtype(dtype))
        coded = data[1:]
        if kind == ESCAPED:
            count, size = struct.unpack_from("<HI", data, 1) if len(data) >= 7 else (0, 0)
            at = 7 + 2 * count
            end = at + count * d * ITEM_BYTES[dtype]
            if not count or end + size != len(data):
                raise CorruptDataError(f"block of {len(data)} bytes does not hold its {count} escapes")
            escapes = np.frombuffer(data[7:at], "<u2").astype(np.int64)
            if escapes[-1] >= n or (np.diff(escapes) <= 0).any():
                raise CorruptDataError("escaped rows are not ascending within the block")
            exact = rows_from_bytes(data[at:end], dtype, d)
            coded = data[end:]
        if self.layout == "archive":
            return kind, self._codes_from_bytes(coded, n), escapes, exact
        sizes = self.quantizer.alphabet_sizes
        width = row_bytes(sizes)
        if len(coded) != n * width:
            raise CorruptDataError(f"{len(coded)} bytes of packed rows, expected {n} x {width}")
        packed = np.frombuffer(coded, np.uint8).reshape(n, width)
        return kind, unpack_rows(packed if wanted is None else packed[wanted], sizes), escapes, exact

    # Blocks of many rows.
    def encode_rows(self, rows: Array) -> list[bytes]:
        """Rows (n, d) -> blocks, each of ``block_rows`` rows but the last. Blocks in parallel.

        Memory beyond rows and result: the codes of all rows (2 bytes a number at most).
        """
        step = self.block_rows
        starts = range(0, len(rows), step)
        if self.quantizer is None:
            return [self.encode_block(rows[s : s + step], None) for s in starts]
        codes = self.encode_codes(rows)
        if self.layout == "archive" and self.n_chosen and self.model is None:
            self.choose_model(codes)
        return in_threads(lambda s: self.encode_block(rows[s : s + step], codes[s : s + step]), starts)

    def encode_codes(self, rows: Array) -> Array:
        """Codes of rows (n, d); rows that are not finite are coded as zeros, to be escaped."""
        assert self.quantizer is not None
        if self.nonfinite == "raw":
            bad = ~np.isfinite(rows).all(axis=1)
            if bad.any():
                rows = np.where(bad[:, None], np.zeros((), rows.dtype), rows)
        return cast(Array, self.quantizer.encode(rows))


# -- header of a tensor ----------------------------------------------------------------------------
def header_to_bytes(name: str, coding: TensorCoding, quantizer: int | str | None, streamed: bool) -> bytes:
    """The header chunk: JSON. ``quantizer``: number of its chunk, its hash if kept elsewhere."""
    spec = coding.spec
    shape = [-1, *spec.shape[1:]] if streamed else list(spec.shape)
    fields: dict[str, Any] = {"name": name, "shape": shape, "dtype": spec.dtype}
    if coding.layout != "archive":
        fields["layout"] = coding.layout
    if spec.library != "numpy":
        fields["library"], fields["device"] = spec.library, spec.device
    if quantizer is not None:
        fields["quantizer"] = quantizer
    if coding.max_error is not None:
        fields["max_error"] = coding.max_error
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class TensorHeader:
    """What ``header_to_bytes`` wrote, checked."""

    name: str
    spec: TensorSpec
    layout: Layout
    quantizer: int | str | None
    max_error: float | None

    @classmethod
    def from_bytes(cls, data: bytes) -> TensorHeader:
        """Inverse of ``header_to_bytes``; CorruptDataError or LimitError on anything else."""
        if len(data) > MAX_HEADER:
            raise LimitError(f"tensor header of {len(data)} bytes exceeds {MAX_HEADER}")
        try:
            fields = json.loads(bytes(data).decode())
            if not isinstance(fields, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise CorruptDataError(f"tensor header: {error}") from None
        get = fields.get
        name, shape, dtype = get("name"), get("shape"), get("dtype")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise CorruptDataError(f"tensor header: expected a name, got {name!r:.60}")
        if dtype not in FLOAT_DTYPES:
            raise CorruptDataError(f"tensor {name!r}: dtype {dtype!r:.60} unknown")
        if not isinstance(shape, list) or len(shape) > MAX_NDIM or not all(type(v) is int for v in shape):
            raise CorruptDataError(f"tensor {name!r}: expected a shape, got {shape!r:.60}")
        if any(v < 0 for v in shape[1:]) or (shape and shape[0] < -1):
            raise CorruptDataError(f"tensor {name!r}: negative size in shape {shape}")
        size = 1
        for v in shape:
            size *= max(abs(v), 1)
        if size * 8 > container.MAX_FILE_BYTES * 64:
            raise LimitError(f"tensor {name!r}: shape {shape} holds more than any file can")
        layout, library, device = get("layout", "archive"), get("library", "numpy"), get("device", "cpu")
        if layout not in LAYOUTS or library not in ("numpy", "torch") or not isinstance(device, str):
            raise CorruptDataError(f"tensor {name!r}: layout {layout!r}, library {library!r}, device {device!r}")
        quantizer, max_error = get("quantizer"), get("max_error")
        if not (quantizer is None or isinstance(quantizer, str) or type(quantizer) is int):
            raise CorruptDataError(f"tensor {name!r}: quantizer {quantizer!r:.60}")
        if not (max_error is None or (isinstance(max_error, int | float) and max_error >= 0)):
            raise CorruptDataError(f"tensor {name!r}: max_error {max_error!r:.60}")
        spec = TensorSpec(tuple(shape), dtype, library, device)
        return cls(name, spec, layout, quantizer, max_error)


# -- writing ---------------------------------------------------------------------------------------
class StreamWriter:
    """Appends rows to the tensors of a ``.polar`` file, block by block; made by ``create``.

    Memory is bounded by one batch and one chunk of blocks. A killed process leaves a partial file
    that ``create(..., resume=True)`` continues: ``n_rows(name)`` says how many rows are safe, feed
    the rest, and the finished file has the bytes of an uninterrupted run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        quantizer: PolarQuantizer,
        *,
        max_error: float | None = None,
        nonfinite: NonFinite = "error",
        embed_quantizer: bool = True,
        resume: bool = False,
    ) -> None:
        quantizer.alphabet_sizes  # noqa: B018  raises NotFittedError
        self._quantizer, self._embed = quantizer, embed_quantizer
        self._max_error, self._nonfinite = check_max_error(max_error), nonfinite
        self._codings: dict[str, TensorCoding] = {}
        self._waiting: dict[str, list[Array]] = {}
        self._rows: dict[str, int] = {}
        self._writer = Writer(path, resume=resume, keep_partial=True)
        self._usual_error: float | None = None
        if resume and len(self._writer.chunks):
            self._restore(path)

    def _restore(self, path: str | os.PathLike[str]) -> None:
        """Take over names, models and row counts of what an interrupted run has written."""
        folder, name = os.path.split(os.path.realpath(os.fsdecode(path)))
        with Reader(os.path.join(folder, f".{name}.partial"), recover=True) as reader:
            kept = len(self._writer.chunks)
            index = _Index(reader, kept)
            if index.quantizers and self._quantizer.to_bytes() not in index.quantizers.values():
                self._writer.abort()
                raise InputError(f"{path}: the interrupted file was written with another quantizer")
            for i, header in index.headers.items():
                model = index.models.get(i)
                if model is None and self._needs_model(header):
                    continue  # cut between header and model: the tensor starts anew
                self._codings[header.name] = TensorCoding(
                    header.spec,
                    self._quantizer,
                    header.layout,
                    model_from_bytes(model) if model is not None else None,
                    header.max_error,
                    self._nonfinite,
                )
                self._rows[header.name] = index.n_rows.get(i, 0)
                self._waiting[header.name] = []

    def _needs_model(self, header: TensorHeader) -> bool:
        coding = TensorCoding(header.spec, self._quantizer, header.layout)
        return header.layout == "archive" and coding.n_chosen > 0

    def n_rows(self, name: str) -> int:
        """Rows of a tensor that the file holds already, not counting those waiting for their chunk."""
        return self._rows.get(name, 0)

    def append(self, name: str, batch: Any) -> None:
        """Add rows (n, d) to the tensor ``name``; the first batch fixes its dtype.

        Warns where the error of a batch is far above that of the training rows (``drift``).
        Raises InputError for another width or dtype, or rows that are not finite.
        """
        spec, rows = native_rows(batch, name)
        if len(spec.shape) != 2:
            raise InputError(f"expected a batch of shape (n, {self._quantizer.d_}), got {spec.shape}")
        coding = self._codings.get(name)
        if coding is None:
            coding = self._start(name, spec)
        if spec.d != coding.spec.d or spec.dtype != coding.spec.dtype:
            raise InputError(
                f"expected batches of {name!r} as (n, {coding.spec.d}) {coding.spec.dtype}, "
                f"got {spec.shape} {spec.dtype}"
            )
        _check_rows(rows, name, self._nonfinite)
        self._warn_of_drift(name, rows)
        self._waiting[name].append(rows.copy())
        full = coding.block_rows * PARTS_PER_CHUNK
        if sum(map(len, self._waiting[name])) >= full:
            waiting = np.concatenate(self._waiting[name])
            whole = len(waiting) // full * full
            for start in range(0, whole, full):
                self._add_chunk(name, waiting[start : start + full])
            self._waiting[name] = [waiting[whole:]]

    def _start(self, name: str, spec: TensorSpec) -> TensorCoding:
        if spec.d != self._quantizer.d_:
            raise InputError(f"expected rows of {self._quantizer.d_}, got {spec.d} ({name!r})")
        coding = TensorCoding(
            spec,
            self._quantizer,
            cast(Layout, self._quantizer.layout),
            max_error=self._max_error,
            nonfinite=self._nonfinite,
        )
        self._codings[name], self._waiting[name], self._rows[name] = coding, [], 0
        return coding

    def _add_chunk(self, name: str, rows: Array) -> None:
        tensor = list(self._codings).index(name)
        coding = self._codings[name]
        blocks = coding.encode_rows(rows)
        if not self._rows[name]:
            for chunk in _side_chunks(name, tensor, coding, self._embed, tensor > 0, streamed=True):
                self._writer.add(*chunk)
        self._writer.add(Kind.ROW_BLOCKS, tensor, len(rows), blocks)
        self._rows[name] += len(rows)

    def _warn_of_drift(self, name: str, rows: Array) -> None:
        few = rows[:: max(1, len(rows) // 512)]
        few = few[np.isfinite(few).all(axis=1)]
        if len(few) and self._quantizer.drift(few) > DRIFT_WARNING:
            warnings.warn(
                f"rows appended to {name!r} are coded with over {DRIFT_WARNING} times the error of the "
                "training rows; consider fitting a new quantizer",
                stacklevel=3,
            )

    def sync(self) -> None:
        """Wait until the chunks written so far are on the disk."""
        self._writer.sync()

    def close(self) -> None:
        """Write what is waiting, and let the file appear under its name."""
        for name, waiting in self._waiting.items():
            rows = np.concatenate(waiting) if waiting else np.zeros((0, self._codings[name].spec.d))
            if len(rows) or not self._rows[name]:
                self._add_chunk(name, rows.astype(work_dtype(self._codings[name].spec.dtype)))
            self._waiting[name] = []
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.abort()


DRIFT_WARNING = 2.0  # times the squared error on training rows, relative to the rows' energy


def create(path: str | os.PathLike[str], quantizer: PolarQuantizer, **options: Any) -> StreamWriter:
    """Open a ``.polar`` file for streaming; see ``StreamWriter`` for the options.

    >>> with pp.create("big.polar", quantizer=q) as f:  # doctest: +SKIP
    ...     f.append("embedding", batch)
    """
    return StreamWriter(path, quantizer, **options)


def _side_chunks(
    name: str, tensor: int, coding: TensorCoding, embed: bool, shared: bool, *, streamed: bool
) -> Iterator[tuple[int, int, int, list[bytes]]]:
    """The chunks that go before the rows of a tensor. ``shared``: its quantizer is tensor 0's."""
    reference: int | str | None = None
    if coding.quantizer is not None:
        reference = (0 if shared else tensor) if embed else coding.quantizer.hash
    yield Kind.TENSOR_HEADER, tensor, 0, [header_to_bytes(name, coding, reference, streamed)]
    if coding.quantizer is not None and embed and not shared:
        yield Kind.QUANTIZER, tensor, 0, [coding.quantizer.to_bytes()]
    if coding.model is not None:
        yield Kind.ENTROPY_MODEL, tensor, 0, [model_to_bytes(cast(Any, coding.model))]


def tensor_chunks(
    name: str,
    tensor: int,
    coding: TensorCoding,
    blocks: Sequence[bytes],
    embed: bool = True,
    shared: bool = False,
) -> list[tuple[int, int, int, list[bytes]]]:
    """All chunks of one tensor whose blocks are already coded."""
    chunks = list(_side_chunks(name, tensor, coding, embed, shared, streamed=False))
    n, step = coding.spec.n_rows, coding.block_rows
    for start in range(0, len(blocks), PARTS_PER_CHUNK):
        some = list(blocks[start : start + PARTS_PER_CHUNK])
        rows = min(n, (start + len(some)) * step) - start * step
        chunks.append((Kind.ROW_BLOCKS, tensor, rows, some))
    return chunks


def check_max_error(max_error: float | None) -> float | None:
    """The bound as a float; InputError unless it is None or >= 0."""
    if max_error is None:
        return None
    if not (isinstance(max_error, int | float | np.floating | np.integer) and max_error >= 0):
        raise InputError(f"expected max_error >= 0, got {max_error!r}")
    return float(max_error)


def _check_rows(rows: Array, name: str, nonfinite: NonFinite) -> None:
    if nonfinite not in ("error", "raw"):
        raise InputError(f"expected nonfinite 'error' or 'raw', got {nonfinite!r}")
    if nonfinite == "error":
        bad = first_nonfinite_row(rows) if rows.size else None
        if bad is not None:
            raise InputError(
                f"expected {name} to be finite, got NaN or infinity first in row {bad}; "
                "nonfinite='raw' stores such rows exactly"
            )


# -- whole tensors -----------------------------------------------------------------------------------
Chunk = tuple[int, int, int, list[bytes]]


def compress(
    x: Any,
    *,
    bits: float | None = None,
    size_bytes: float | None = None,
    snr_db: float | None = None,
    cosine: float | None = None,
    recall: float | None = None,
    max_error: float | None = None,
    quantizer: PolarQuantizer | None = None,
    layout: Layout | None = None,
    optimize: Literal["snr", "cosine", "recall"] | None = None,
    nonfinite: NonFinite = "error",
    seed: int = 0,
    time_budget: float | None = None,
    progress: bool = False,
) -> bytes:
    """Compress a tensor to the smallest blob that meets exactly one target.

    x: numpy array or torch tensor of any float dtype and shape; its last axis holds the vectors.
    bits: the whole blob per float, side information included, never exceeded. size_bytes: likewise
    in bytes. snr_db, cosine (mean over rows), recall (recall@10, inner product, sampled rows): met on
    x itself. max_error: for every row |x - x_hat| <= max_error |x| (Euclidean norms), a guarantee;
    0 is lossless to the bit. quantizer: a fitted one instead of a target (max_error may be added).
    optimize: what a size should be spent on (default "snr"). nonfinite="raw" stores rows that hold
    NaN or infinity exactly instead of raising. Same seed, machine and versions: same bytes, unless
    ``time_budget`` (seconds for trying candidates) cuts the search short.

    Time: planning on at most 32768 rows, then two to four encodings of all. Memory: about 3 times x.
    Raises InputError for impossible targets (stating the least possible) and for rows that are not
    finite.
    """
    targets = _targets(bits, size_bytes, snr_db, cosine, recall, max_error, quantizer)
    options = _Options(layout, optimize, nonfinite, seed, time_budget)
    spec, rows = native_rows(x)
    with _bar(progress, "compress", 1) as step:
        chunks = _tensor_to_chunks("x", 0, spec, rows, targets, quantizer, options, embed=True)
        step()
    return container.pack(chunks)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    bits: float | None = None,
    size_bytes: float | None = None,
    snr_db: float | None = None,
    cosine: float | None = None,
    recall: float | None = None,
    max_error: float | None = None,
    quantizer: PolarQuantizer | None = None,
    embed_quantizer: bool = True,
    layout: Layout | None = None,
    optimize: Literal["snr", "cosine", "recall"] | None = None,
    nonfinite: NonFinite = "error",
    seed: int = 0,
    time_budget: float | None = None,
    progress: bool = False,
) -> None:
    """Write named tensors to a ``.polar`` file; options as in ``compress``.

    bits and size_bytes bound the whole file; each tensor gets its share by number of floats.
    embed_quantizer=False leaves a given quantizer out: the file then holds its hash, and
    ``open(..., quantizer=q)`` is needed. The file appears under its name only when it is complete
    and on the disk; an old file of that name stays until then.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) for k in tensors):
        raise InputError(f"expected tensors as a dict of names to arrays, got {type(tensors).__name__}")
    long_name = next((k for k in tensors if len(k) > MAX_NAME), None)
    if long_name is not None:
        raise InputError(f"expected names of at most {MAX_NAME} characters, got {len(long_name)}")
    targets = _targets(bits, size_bytes, snr_db, cosine, recall, max_error, quantizer)
    options = _Options(layout, optimize, nonfinite, seed, time_budget)
    described = {name: native_rows(x, name) for name, x in tensors.items()}
    total = sum(rows.size for _, rows in described.values())
    with Writer(path) as writer, _bar(progress, "save", len(described)) as step:
        for tensor, (name, (spec, rows)) in enumerate(described.items()):
            mine = dict(targets)
            if "size_bytes" in mine and total:
                mine["size_bytes"] = mine["size_bytes"] * rows.size / total
            shared = quantizer is not None and tensor > 0
            chunks = _tensor_to_chunks(
                name, tensor, spec, rows, mine, quantizer, options, embed=embed_quantizer, shared=shared
            )
            for chunk in chunks:
                writer.add(*chunk)
            step()


@dataclass(frozen=True)
class _Options:
    layout: Layout | None
    optimize: Literal["snr", "cosine", "recall"] | None
    nonfinite: NonFinite
    seed: int
    time_budget: float | None

    def __post_init__(self) -> None:
        if self.layout not in (None, *LAYOUTS):
            raise InputError(f"expected layout 'archive' or 'rows', got {self.layout!r}")
        if self.nonfinite not in ("error", "raw"):
            raise InputError(f"expected nonfinite 'error' or 'raw', got {self.nonfinite!r}")


def _targets(
    bits: float | None,
    size_bytes: float | None,
    snr_db: float | None,
    cosine: float | None,
    recall: float | None,
    max_error: float | None,
    quantizer: PolarQuantizer | None,
) -> dict[str, float]:
    """The targets given, checked: exactly one, or a quantizer with at most ``max_error``."""
    if quantizer is not None:
        if not isinstance(quantizer, PolarQuantizer):
            raise InputError(f"expected a PolarQuantizer, got {type(quantizer).__name__}")
        quantizer.alphabet_sizes  # noqa: B018  raises NotFittedError
        others = [bits, size_bytes, snr_db, cosine, recall]
        if any(v is not None for v in others):
            raise InputError("a quantizer fixes the rate: of the targets only max_error= goes with it")
        bound = check_max_error(max_error)
        return {} if bound is None else {"max_error": bound}
    target = Target.of(
        bits=bits, size_bytes=size_bytes, snr_db=snr_db, cosine=cosine, recall=recall, max_error=max_error
    )
    return {target.kind: target.value}


def _tensor_to_chunks(
    name: str,
    tensor: int,
    spec: TensorSpec,
    rows: Array,
    targets: dict[str, float],
    quantizer: PolarQuantizer | None,
    options: _Options,
    *,
    embed: bool,
    shared: bool = False,
) -> list[Chunk]:
    """All chunks of one tensor that meets its target."""
    _check_rows(rows, name, options.nonfinite)
    raw = TensorCoding(spec, None, max_error=targets.get("max_error"), nonfinite=options.nonfinite)
    if quantizer is not None:
        if spec.d != quantizer.d_:
            raise InputError(f"expected {name} with rows of {quantizer.d_}, got shape {spec.shape}")
        layout = options.layout or cast(Layout, quantizer.layout)
        if layout == "rows" and quantizer.own_model is not None:
            raise InputError("layout='rows' needs a quantizer of fixed rate, this one ends in a trellis")
        coding = TensorCoding(
            spec, quantizer, layout, None, targets.get("max_error"), options.nonfinite
        )
        return _chunks_of(name, tensor, coding, rows, embed, shared)
    limit = targets.get("size_bytes")
    if "bits" in targets:
        limit = targets["bits"] * rows.size / 8
    raw_chunks = _chunks_of(name, tensor, raw, rows)
    raw_size = len(container.pack(raw_chunks)) if rows.nbytes < SMALL else rows.nbytes + SMALL
    finite = rows if options.nonfinite == "error" else rows[np.isfinite(rows).all(axis=1)]
    plain = not finite.size or spec.d > MAX_D or targets.get("max_error") == 0
    if limit is not None:
        if raw_size <= limit or (plain and not rows.size):
            return raw_chunks
        if plain:
            raise InputError(f"{name}: expected a target of at least {raw_size} bytes, got {limit:.0f}")
        return _chunks_within(name, tensor, spec, rows, finite, limit, options)
    if plain:
        return raw_chunks
    chunks = _chunks_of_quality(name, tensor, spec, rows, finite, targets, options)
    return raw_chunks if _size(raw_chunks) <= _size(chunks) else chunks


SMALL = 1 << 16
MAX_FITS = 6  # encodings of the whole table while closing in on a size


def _size(chunks: Sequence[Chunk]) -> int:
    """Bytes of a file that holds these chunks alone, to within a few for each part."""
    return sum(sum(map(len, parts)) + 9 * len(parts) + 24 for _, _, _, parts in chunks)


def _chunks_of(
    name: str, tensor: int, coding: TensorCoding, rows: Array, embed: bool = True, shared: bool = False
) -> list[Chunk]:
    blocks = coding.encode_rows(rows)
    return tensor_chunks(name, tensor, coding, blocks, embed, shared)


def _chunks_within(
    name: str, tensor: int, spec: TensorSpec, rows: Array, finite: Array, limit: float, options: _Options
) -> list[Chunk]:
    """The best chunks whose file takes at most ``limit`` bytes: plan, encode, correct the step."""
    target = 8 * limit / rows.size
    overhead = 8 * 150 / rows.size
    if options.layout == "rows":
        return _rows_within(name, tensor, spec, rows, finite, limit, options)
    deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
    objective = objective_of(Target("bits", target), options.optimize)
    q = best_archive(
        finite,
        max(target - overhead, 0.6 * target),
        objective,
        paid_rows=len(rows),
        seed=options.seed,
        deadline=deadline,
    )
    best: tuple[int, list[Chunk]] | None = None
    tried: list[tuple[float, float]] = []
    log_step = float(np.log2(q.fine_.step_))
    for _ in range(MAX_FITS):
        coding = TensorCoding(spec, q, "archive", nonfinite=options.nonfinite)
        chunks = _chunks_of(name, tensor, coding, rows)
        size = len(container.pack(chunks))
        if size <= limit and (best is None or size > best[0]):
            best = (size, chunks)
        if best is not None and best[0] > 0.998 * limit:
            break
        tried.append((log_step, float(size)))
        log_step = next_log_step(tried, 0.9992 * limit, slope=-0.9 * limit / max(target, 0.5) / 2)
        q = q.with_step(finite, 2.0**log_step)
    while best is None:  # far out of reach: coarser and coarser, down to all zeros
        least = min(size for _, size in tried)
        log_step = max(step for step, _ in tried) + 2
        q = q.with_step(finite, 2.0**log_step)
        chunks = _chunks_of(name, tensor, TensorCoding(spec, q, "archive", nonfinite=options.nonfinite), rows)
        size = len(container.pack(chunks))
        tried.append((log_step, float(size)))
        if size <= limit:
            best = (size, chunks)
        elif size > 0.97 * least or len(tried) > 2 * MAX_FITS:
            raise InputError(
                f"{name}: {limit:.0f} bytes are out of reach, the least found is {int(min(size, least))} "
                f"({8 * min(size, least) / rows.size:.3g} bits per float)"
            )
    return best[1]


def _rows_within(
    name: str, tensor: int, spec: TensorSpec, rows: Array, finite: Array, limit: float, options: _Options
) -> list[Chunk]:
    """Like ``_chunks_within`` for the rows layout: the code rate falls until all fits."""
    bits = 8 * limit / rows.size
    least = np.inf
    for _ in range(12):
        q = fit(finite, bits=max(bits, 1.01 / spec.d), layout="rows", optimize=options.optimize, seed=options.seed)
        coding = TensorCoding(spec, q, "rows", nonfinite=options.nonfinite)
        chunks = _chunks_of(name, tensor, coding, rows)
        size = len(container.pack(chunks))
        least = min(least, size)
        if size <= limit:
            return chunks
        bits = min(0.9 * bits, bits - 8 * (size - limit) / rows.size)
        if bits * spec.d < 1:
            break
    raise InputError(
        f"{name}: {limit:.0f} bytes are out of reach in layout 'rows', the least found is {int(least)}"
    )


def _chunks_of_quality(
    name: str,
    tensor: int,
    spec: TensorSpec,
    rows: Array,
    finite: Array,
    targets: dict[str, float],
    options: _Options,
) -> list[Chunk]:
    """The smallest chunks found that meet a quality target on the rows themselves."""
    kind, value = next(iter(targets.items()))
    target = Target(kind, value)
    bound = value if kind == "max_error" else None
    objective = objective_of(target, options.optimize)
    deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
    if options.layout == "rows":
        q = fit(finite, layout="rows", optimize=options.optimize, seed=options.seed, **cast(Any, targets))
        coding = TensorCoding(spec, q, "rows", None, bound, options.nonfinite)
        return _chunks_of(name, tensor, coding, rows)
    q = best_archive(
        finite,
        guess_bits(finite, target),
        objective,
        paid_rows=len(rows),
        seed=options.seed,
        deadline=deadline,
    )
    q = meet_quality(q, finite, target)
    if bound is not None:
        return _cheapest_bounded(name, tensor, spec, rows, finite, q, bound, options)
    for _ in range(20):  # what was met on a sample is checked on all rows
        coding = TensorCoding(spec, q, "archive", nonfinite=options.nonfinite)
        codes = coding.encode_codes(rows)
        if meets(finite, q.decode_as(codes[_finite_rows(rows)], work_dtype(spec.dtype)), target):
            return tensor_chunks(name, tensor, coding, coding.encode_rows(rows))
        q = q.with_step(finite, 0.985 * q.fine_.step_)
    raise InputError(f"{name}: {kind}={value} is out of reach")


def _finite_rows(rows: Array) -> Array:
    return cast(Array, np.isfinite(rows).all(axis=1))


def _cheapest_bounded(
    name: str,
    tensor: int,
    spec: TensorSpec,
    rows: Array,
    finite: Array,
    q: PolarQuantizer,
    bound: float,
    options: _Options,
) -> list[Chunk]:
    """A smaller step costs rate, a larger one escapes: the cheapest of a few, tried on a sample."""
    few = finite[:: max(1, len(finite) // 4096)]

    def cost(trial: PolarQuantizer) -> int:
        sample = TensorSpec((len(few), spec.d), spec.dtype)
        coding = TensorCoding(sample, trial, "archive", None, bound)
        return sum(map(len, coding.encode_rows(few)))

    trials = [q] + [q.with_step(finite, q.fine_.step_ * factor) for factor in (0.84, 0.92, 1.09, 1.19)]
    best = min(trials, key=cost)
    coding = TensorCoding(spec, best, "archive", None, bound, options.nonfinite)
    return _chunks_of(name, tensor, coding, rows)


@contextlib.contextmanager
def _bar(shown: bool, title: str, total: int) -> Iterator[Any]:
    """A progress bar with time left, where asked for; yields what to call after each step."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


# -- reading ---------------------------------------------------------------------------------------
class _Index:
    """The chunks of a file sorted by what they are."""

    def __init__(self, reader: Reader, n_chunks: int | None = None) -> None:
        self.headers: dict[int, TensorHeader] = {}
        self.quantizers: dict[int, bytes] = {}
        self.models: dict[int, bytes] = {}
        self.blocks: dict[int, list[int]] = {}
        self.n_rows: dict[int, int] = {}
        chunks = reader.chunks[:n_chunks]
        kinds = chunks["kind"]
        for i in np.flatnonzero(kinds != Kind.ROW_BLOCKS).tolist():
            kind, tensor = int(kinds[i]), int(chunks["tensor"][i])
            if kind == Kind.TENSOR_HEADER:
                if tensor in self.headers:
                    raise CorruptDataError(f"chunk {i}: a second header for tensor {tensor}")
                self.headers[tensor] = TensorHeader.from_bytes(bytes(reader.part(i, 0)))
            elif kind == Kind.QUANTIZER:
                self.quantizers[tensor] = bytes(reader.part(i, 0))
            elif kind == Kind.ENTROPY_MODEL:
                self.models[tensor] = bytes(reader.part(i, 0))
        rows = chunks["n_rows"]
        for i in np.flatnonzero(kinds == Kind.ROW_BLOCKS).tolist():
            self.blocks.setdefault(int(chunks["tensor"][i]), []).append(i)
        for tensor, numbers in self.blocks.items():
            if tensor not in self.headers:
                raise CorruptDataError(f"chunk {numbers[0]}: rows of tensor {tensor}, which has no header")
            self.n_rows[tensor] = int(rows[numbers].sum())
        names = [header.name for header in self.headers.values()]
        if len(set(names)) != len(names):
            raise CorruptDataError("two tensors of one name")


class Tensor:
    """One tensor of an open file: decoded where it is indexed, block by block.

    ``shape``, ``dtype`` (a name such as "float32"), ``nbytes`` (decoded), ``len``; ``t[3]``,
    ``t[10:20]``, ``t[[5, 7]]``, ``t[...]`` index the first axis and return arrays of the library the
    tensor came from. ``damaged_rows``: with on_error="skip", numbers of the rows (flattened leading
    axes) that could not be read so far; they read as zeros.
    """

    def __init__(self, file: File, tensor: int) -> None:
        self._file, self._tensor = file, tensor
        header, index = file._index.headers[tensor], file._index
        n = index.n_rows.get(tensor, 0)
        shape = header.spec.shape
        if shape and shape[0] == -1:
            per_item = int(np.prod(shape[1:-1])) if len(shape) > 2 else 1
            shape = (n // max(1, per_item), *shape[1:])
        self._spec = replace(header.spec, shape=shape)
        if self._spec.n_rows != n and not file.recovered:
            raise CorruptDataError(
                f"tensor {header.name!r}: chunks hold {n} rows, its shape {list(shape)} has {self._spec.n_rows}"
            )
        self._n = min(n, self._spec.n_rows)
        self.name = header.name
        self._coding = file._coding(tensor, self._spec)
        chunks = index.blocks.get(tensor, [])
        rows = file._reader.chunks["n_rows"][chunks] if chunks else np.zeros(0, np.int64)
        self._chunks = np.array(chunks, np.int64)
        self._ends = np.cumsum(rows)
        if (rows[:-1] % self._coding.block_rows).any():
            raise CorruptDataError(f"tensor {self.name!r}: a chunk ends within a block")
        self.damaged_rows: list[int] = []

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded tensor."""
        return self._spec.shape

    @property
    def dtype(self) -> str:
        """Name of its dtype: float16, bfloat16, float32 or float64."""
        return self._spec.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self._spec.nbytes

    @property
    def layout(self) -> str:
        """ "archive" or "rows"."""
        return self._coding.layout

    @property
    def quantizer(self) -> PolarQuantizer | None:
        """The quantizer its rows were coded with; None where they are stored as they are."""
        return self._coding.quantizer

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __getitem__(self, item: Any) -> Any:
        """Decode what ``item`` selects: an integer, a slice, a list or array of integers or booleans
        along the first axis, or ``...``. Only the blocks touched are read."""
        if item is Ellipsis or not self.shape:
            return self._deliver(self.read_rows(np.arange(self._n)), self.shape)
        axis = self.shape[0]
        if isinstance(item, slice):
            chosen = np.arange(axis)[item]
        elif isinstance(item, int | np.integer):
            chosen = np.array([item])
        else:
            chosen = np.asarray(item.tolist() if is_torch(item) else item)
            if chosen.dtype == bool and chosen.shape == (axis,):
                chosen = np.flatnonzero(chosen)
            if chosen.size == 0:
                chosen = np.zeros(0, np.int64)
            if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
                raise InputError(f"expected an integer, a slice or a list of integers, got {item!r:.80}")
        if chosen.size and (chosen.min() < -axis or chosen.max() >= axis):
            bad = int(chosen[(chosen < -axis) | (chosen >= axis)][0])
            raise InputError(f"expected rows of {self.name!r} in -{axis}..{axis - 1}, got {bad}")
        chosen = np.where(chosen < 0, chosen + axis, chosen).astype(np.int64)
        tail = self.shape[1:]
        if len(self.shape) == 1:  # one row: index within it
            whole = self.read_rows(np.arange(self._n)).reshape(-1)
            values = whole[chosen]
            return self._deliver(values[0] if isinstance(item, int | np.integer) else values, None)
        per_item = int(np.prod(tail[:-1]))
        rows = (chosen[:, None] * per_item + np.arange(per_item)).ravel()
        values = self.read_rows(rows)
        single = isinstance(item, int | np.integer)
        return self._deliver(values, tail if single else (len(chosen), *tail))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self.read_rows(np.arange(self._n)).reshape(self.shape)
        return whole if dtype is None else whole.astype(dtype)

    def read_rows(self, rows: Array) -> Array:
        """Rows by number (leading axes flattened) -> (n, d) numpy array; bfloat16 as float32."""
        out = np.zeros((len(rows), self._spec.d), work_dtype(self.dtype))
        if not len(rows) or not self._spec.d:
            return out
        order = np.argsort(rows, kind="stable")
        step = self._coding.block_rows
        chunk = np.searchsorted(self._ends, rows[order], side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        block = (rows[order] - starts[np.minimum(chunk, len(starts) - 1)]) // step
        new = np.flatnonzero(np.diff(chunk) | np.diff(block)) + 1
        groups = np.split(order, new)

        def read(group: Array) -> FormatError | None:
            first = int(rows[group[0]])
            c = int(np.searchsorted(self._ends, first, side="right"))
            if c >= len(starts):
                return CorruptDataError(f"tensor {self.name!r}: row {first} is missing")
            b = (first - int(starts[c])) // step
            begin = int(starts[c]) + b * step
            n = min(step, int(self._ends[c]) - begin)
            try:
                part = self._file._reader.part(int(self._chunks[c]), b)
                stages = self._file._stages
                wanted = rows[group] - begin
                if len(wanted) == n and wanted[0] == 0 and (np.diff(wanted) == 1).all():
                    out[group] = self._coding.decode_block(part, n, stages=stages)
                else:
                    out[group] = self._coding.decode_rows(part, n, wanted, stages=stages)
            except FormatError as error:
                return error
            return None

        for group, error in zip(groups, in_threads(read, groups), strict=True):
            if error is not None:
                if self._file._on_error == "raise":
                    raise error
                self.damaged_rows = sorted({*self.damaged_rows, *rows[group].tolist()})
        return out

    def _deliver(self, values: Array, shape: tuple[int, ...] | None) -> Any:
        """In the library the tensor came from, where that is to be had."""
        values = values if shape is None else values.reshape(shape)
        return self._file._deliver(values, self._spec)

    def search(self, queries: Any, k: int = 10, metric: Literal["ip", "l2", "cosine"] = "ip") -> tuple[Any, Any]:
        """The k best rows for each query: scores (n_queries, k) float32, row numbers int64.

        "ip" and "cosine": larger is better; "l2": squared distances, smaller is better. Exact on the
        decoded rows, block by block: O(n d) decoding and O(n d n_queries) products, memory bounded by
        one group of blocks and the scores of its rows.
        """
        from .search import top_k

        return top_k(self, queries, k, metric)


class File:
    """An open ``.polar`` file or blob: a mapping from names to ``Tensor``; made by ``open``."""

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        stages: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        quantizer: PolarQuantizer | None = None,
        library: Literal["numpy", "torch"] | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise InputError(f"expected on_error 'raise' or 'skip', got {on_error!r}")
        if stages is not None and (not isinstance(stages, int) or stages < 1):
            raise InputError(f"expected stages >= 1, got {stages!r}")
        self._stages, self._on_error, self._library = stages, on_error, library
        self._given = quantizer
        self._quantizers: dict[int, PolarQuantizer] = {}
        self._tensors: dict[str, Tensor] = {}
        self._reader = Reader(source, recover=on_error == "skip")
        try:
            self._index = _Index(self._reader)
        except BaseException:
            self._reader.close()
            raise
        self._numbers = {header.name: i for i, header in self._index.headers.items()}

    @property
    def recovered(self) -> bool:
        """Whether the file's end was lost and its chunks were found by walking (on_error="skip")."""
        return self._reader.problem is not None

    def keys(self) -> list[str]:
        """Names of the tensors, in file order."""
        return list(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name; InputError (also a KeyError's meaning) lists the names there are."""
        if name not in self._numbers:
            known = ", ".join(map(repr, self.keys()[:20]))
            raise InputError(f"no tensor {name!r} in this file; it holds {known or 'none'}")
        if name not in self._tensors:
            self._tensors[name] = Tensor(self, self._numbers[name])
        return self._tensors[name]

    def _coding(self, tensor: int, spec: TensorSpec) -> TensorCoding:
        header = self._index.headers[tensor]
        quantizer = self._quantizer_of(header)
        if quantizer is not None and quantizer.d_ != spec.d:
            raise CorruptDataError(f"tensor {header.name!r}: quantizer of {quantizer.d_} for rows of {spec.d}")
        model = self._index.models.get(tensor)
        coding = TensorCoding(
            spec,
            quantizer,
            header.layout,
            model_from_bytes(model) if model is not None else None,
            header.max_error,
        )
        if quantizer is not None and header.layout == "archive" and coding.n_chosen:
            sizes = quantizer.alphabet_sizes[: coding.n_chosen]
            if coding.model is None or not np.array_equal(coding.model.alphabet_sizes, sizes):
                raise CorruptDataError(f"tensor {header.name!r}: entropy model does not fit the codes")
        return coding

    def _quantizer_of(self, header: TensorHeader) -> PolarQuantizer | None:
        reference = header.quantizer
        if reference is None:
            return None
        if isinstance(reference, str):
            if self._given is None:
                raise InputError(
                    f"tensor {header.name!r} was written without its quantizer; "
                    f"pass quantizer= with hash {reference[:16]}..."
                )
            if self._given.hash != reference:
                raise InputError(
                    f"tensor {header.name!r} needs the quantizer {reference[:16]}..., "
                    f"got {self._given.hash[:16]}..."
                )
            return self._given
        if reference not in self._index.quantizers:
            raise CorruptDataError(f"tensor {header.name!r}: quantizer {reference} is not in the file")
        if reference not in self._quantizers:
            stored = self._index.quantizers[reference]
            self._quantizers[reference] = PolarQuantizer.from_bytes(stored)
        return self._quantizers[reference]

    def _deliver(self, values: Array, spec: TensorSpec) -> Any:
        library = self._library or spec.library
        if library == "numpy":
            return values
        try:
            import torch
        except ImportError:
            if self._library == "torch":
                raise MissingDependencyError(
                    'library="torch" needs torch: pip install "polarpack[torch]"'
                ) from None
            warnings.warn("torch is not installed: decoding to numpy", stacklevel=4)
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if spec.dtype == "bfloat16":
            tensor = tensor.to(torch.bfloat16)
        try:
            return tensor.to(spec.device)
        except (RuntimeError, AssertionError):
            warnings.warn(f"device {spec.device!r} is not available: decoding to the CPU", stacklevel=4)
            return tensor

    def verify(self) -> None:
        """Check every byte and decode every row; raises the first FormatError."""
        self._reader.verify()
        for name in self:
            tensor = self[name]
            for start in range(0, tensor._n, 1 << 14):
                tensor.read_rows(np.arange(start, min(tensor._n, start + (1 << 14))))

    def info(self) -> dict[str, Any]:
        """Where the bytes are: {"file_bytes", "container_bytes", "tensors": {name: {...}}}.

        A tensor's ``codes_bytes`` grow with its rows (codes, escapes, block index, checks), its
        ``side_bytes`` do not (header, quantizer, entropy model). All sums to ``file_bytes``.
        """
        chunks = self._reader.chunks
        tensors: dict[str, Any] = {}
        for name in self:
            number, tensor = self._numbers[name], self[name]
            mine = chunks[chunks["tensor"] == number]
            by_kind = {kind: int(mine["n_bytes"][mine["kind"] == kind].sum()) for kind in Kind}
            codes = by_kind.pop(Kind.ROW_BLOCKS)
            tensors[name] = {
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "layout": tensor.layout,
                "quantizer": repr(tensor.quantizer) if tensor.quantizer is not None else None,
                "codes_bytes": codes,
                "side_bytes": sum(by_kind.values()),
                "side": {kind.name.lower(): size for kind, size in by_kind.items()},
                "raw_bytes": tensor.nbytes,
            }
        counted = sum(t["codes_bytes"] + t["side_bytes"] for t in tensors.values())
        return {
            "file_bytes": self._reader.size_bytes,
            "container_bytes": self._reader.size_bytes - counted,
            "tensors": tensors,
        }

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open(source: str | os.PathLike[str] | bytes | bytearray | memoryview, **options: Any) -> File:
    """Open a ``.polar`` file (memory-mapped) or blob; nothing is decoded before it is indexed.

    stages: decode only the first residual stages. on_error="skip": rows in damaged blocks read as
    zeros and are listed in ``Tensor.damaged_rows``. quantizer: the one a file written with
    ``embed_quantizer=False`` needs. library: "numpy" or "torch", whatever the tensor came from.

    Raises FormatError (its subclasses) for bytes that are no sound file, OSError for the path.
    """
    return File(source, **options)


def decompress(blob: bytes | bytearray | memoryview, *, library: Literal["numpy", "torch"] | None = None) -> Any:
    """The tensor in a blob of ``compress``: same shape, dtype and library. Checks every byte."""
    if not isinstance(blob, bytes | bytearray | memoryview):
        raise InputError(f"expected bytes, got {type(blob).__name__}; use open for a path")
    with File(blob, library=library) as file:
        file._reader.verify()
        if len(file) != 1:
            raise InputError(f"expected one tensor, the blob holds {len(file)}: use polarpack.open")
        return file[file.keys()[0]][...]
