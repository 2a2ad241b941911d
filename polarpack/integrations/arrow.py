"""Columns of vectors in Arrow tables <-> columns of codes, batch by batch.

    list<float>[d] ── RowEncoder ── one binary value a row, its field labelled ── RowDecoder ── list

Any engine that hands over Arrow batches can call these: they hold a quantizer and a column's name,
keep nothing between batches, and travel between processes as the quantizer's bytes. A value stands
by itself, so rows may be filtered, sorted and shuffled between the two (docs/format.md, "Rows in
columns"). ``integrations.ray`` is this over Ray Data.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from .._arrays import Array, first_nonfinite_row
from ..entropy.packing import pack_rows, row_bytes, unpack_rows
from ..errors import CorruptDataError, InputError, MissingDependencyError
from ..polar import PolarQuantizer

try:
    import pyarrow as pa
    import pyarrow.compute as pc
except ImportError as error:
    raise MissingDependencyError(
        'Arrow columns need pyarrow: pip install "polarpack[arrow]"'
    ) from error

QUANTIZER_LABEL = b"polarpack.quantizer"  # metadata of a field of codes: the quantizer's hash
DTYPE_LABEL = b"polarpack.dtype"  # and the dtype of the vectors
DTYPES = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
MAX_VALUES_BYTES = (1 << 31) - 1  # an Arrow binary array's offsets are int32


class RowEncoder:
    """Replaces a column of vectors by their codes: Arrow table or record batch in, the same out.

    Parameters
    ----------
    quantizer : a fitted one, or its ``to_bytes()``.
    column : of lists of d floats each: list, large_list or fixed_size_list of float16, float32 or
        float64, or an extension type stored as one of these (fixed-shape tensors, Ray's tensors).
        Nulls stay null.
    into : name of a new column for the codes; by default they replace the vectors.
    dtype : the dtype all batches are to have; None: each batch as it comes.
    nonfinite : "error", or "null" for a null in place of a row that holds NaN or infinity.

    A quantizer of fixed rate gives fixed_size_binary values, one that ends in a trellis gives
    binary values, each an entropy-coded row (0.3 bytes longer than within a block of a file). The
    codes' field is labelled with the quantizer's hash and the vectors' dtype.

    Calling it raises InputError for a column that is missing or of another type, a row of another
    length or with a null inside, another dtype, and rows that are not finite; it names the first
    such row of the batch.
    """

    def __init__(
        self,
        quantizer: PolarQuantizer | bytes,
        column: str,
        *,
        into: str | None = None,
        dtype: str | None = None,
        nonfinite: Literal["error", "null"] = "error",
    ) -> None:
        self.quantizer = _fitted(quantizer)
        self.column, self.into, self.dtype = _checked(column, into, dtype)
        if nonfinite not in ("error", "null"):
            raise InputError(f"expected nonfinite 'error' or 'null', got {nonfinite!r}")
        self.nonfinite = nonfinite
        self._codec = _RowCodec(self.quantizer)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"into": self.into, "dtype": self.dtype, "nonfinite": self.nonfinite}
        return _remade, (type(self), self.quantizer.to_bytes(), self.column, options)

    def __call__(self, batch: Any) -> Any:
        """The batch with its column of vectors coded. O(encode); memory about that of the batch."""
        chunks = _chunks_of(batch, self.column)
        dtype = vector_dtype(batch.schema, self.column)
        if self.dtype not in (None, dtype):
            raise InputError(
                f"column {self.column!r}: expected vectors of {self.dtype}, got {dtype}"
            )
        first, coded = 0, []
        for chunk in chunks:
            coded.append(self._encode_chunk(chunk, first))
            first += len(chunk)
        labels = {QUANTIZER_LABEL: self.quantizer.hash, DTYPE_LABEL: dtype}
        field = pa.field(self.into or self.column, self._codec.type, metadata=labels)
        return _with_column(batch, self.column, field, coded)

    def _encode_chunk(self, chunk: Any, first: int) -> Any:
        rows, valid = vectors(chunk, self.quantizer.d_, f"column {self.column!r}", first)
        if self.nonfinite == "null":
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                valid[np.flatnonzero(valid)[~finite]] = False
                rows = rows[finite]
        bad = first_nonfinite_row(rows)
        if bad is not None:
            row = first + int(np.flatnonzero(valid)[bad])
            raise InputError(
                f"column {self.column!r}: expected finite vectors, got NaN or infinity first in "
                f"row {row}; nonfinite='null' puts a null there"
            )
        return self._codec.encode(rows, valid)


class RowDecoder:
    """Inverse of ``RowEncoder``: replaces a column of codes by a fixed-size list of d floats.

    quantizer, column, into: as there. dtype: of the vectors; None: what the codes' label says (or
    float32). require_label=False: decode also codes whose label an engine has lost; then nothing
    tells whether they were made with this quantizer.

    Calling it raises InputError for codes of another quantizer, without a label, or of another
    type, and CorruptDataError for values that are no codes. Nulls stay null.
    """

    def __init__(
        self,
        quantizer: PolarQuantizer | bytes,
        column: str,
        *,
        into: str | None = None,
        dtype: str | None = None,
        require_label: bool = True,
    ) -> None:
        self.quantizer = _fitted(quantizer)
        self.column, self.into, self.dtype = _checked(column, into, dtype)
        self.require_label = bool(require_label)
        self._codec = _RowCodec(self.quantizer)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"into": self.into, "dtype": self.dtype, "require_label": self.require_label}
        return _remade, (type(self), self.quantizer.to_bytes(), self.column, options)

    def __call__(self, batch: Any) -> Any:
        """The batch with its column of codes decoded. O(decode)."""
        chunks = _chunks_of(batch, self.column)
        dtype = self.dtype or self._labelled_dtype(batch.schema.field(self.column))
        decoded = [self._decode_chunk(chunk, dtype) for chunk in chunks]
        field = pa.field(self.into or self.column, pa.list_(DTYPES[dtype], self.quantizer.d_))
        return _with_column(batch, self.column, field, decoded)

    def _labelled_dtype(self, field: Any) -> str:
        """The dtype that the codes' label names, after the label was found to fit."""
        where, labels = f"column {self.column!r}", field.metadata or {}
        made_with = labels.get(QUANTIZER_LABEL, b"").decode("ascii", "replace")
        if made_with and made_with != self.quantizer.hash:
            raise InputError(
                f"{where}: codes of the quantizer {made_with[:16]}..., "
                f"got {self.quantizer.hash[:16]}..."
            )
        if not made_with and self.require_label:
            raise InputError(
                f"{where}: expected codes labelled with their quantizer, got none; "
                "require_label=False decodes them all the same"
            )
        dtype = labels.get(DTYPE_LABEL, b"float32").decode("ascii", "replace")
        if dtype not in DTYPES:
            raise InputError(f"{where}: label names the dtype {dtype!r:.40}")
        return str(dtype)

    def _decode_chunk(self, chunk: Any, dtype: str) -> Any:
        if chunk.type != self._codec.type:
            raise InputError(
                f"column {self.column!r}: expected codes of type {self._codec.type}, "
                f"got {chunk.type}"
            )
        rows = self._codec.decode(chunk, np.dtype(dtype))
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        whole = np.zeros((len(chunk), self.quantizer.d_), rows.dtype)
        whole[valid] = rows
        flat = pa.array(whole.reshape(-1), DTYPES[dtype])
        mask = None if valid.all() else pa.array(~valid)
        return pa.FixedSizeListArray.from_arrays(flat, self.quantizer.d_, mask=mask)


class _RowCodec:
    """Rows <-> one binary value each: leading code columns at fixed width, then, where the
    quantizer ends in a trellis, the row's message under its own model."""

    def __init__(self, quantizer: PolarQuantizer) -> None:
        self.quantizer, self.own = quantizer, quantizer.own_model
        sizes = quantizer.alphabet_sizes
        self.sizes = sizes if self.own is None else sizes[: len(sizes) - self.own.n_fields]
        self.width = row_bytes(self.sizes) if len(self.sizes) else 0
        self.type = pa.binary() if self.own is not None else pa.binary(self.width)

    def encode(self, rows: Array, valid: npt.NDArray[np.bool_]) -> Any:
        """Finite rows, one for each True of ``valid`` (n,) -> an array of n values."""
        codes = cast(Array, self.quantizer.encode(rows))
        k = len(self.sizes)
        packed = pack_rows(codes[:, :k], self.sizes) if self.width else None
        bits = None if valid.all() else pa.array(valid).buffers()[1]
        if self.own is None:
            whole = np.zeros((len(valid), self.width), np.uint8)
            if packed is not None:
                whole[valid] = packed
            buffers = [bits, pa.py_buffer(whole)]
            return pa.FixedSizeBinaryArray.from_buffers(self.type, len(valid), buffers)
        heads = [row.tobytes() for row in packed] if packed is not None else [b""] * len(rows)
        values = [head + self.own.encode(codes[i : i + 1, k:]) for i, head in enumerate(heads)]
        lengths = np.zeros(len(valid), np.int64)
        lengths[valid] = [len(value) for value in values]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        if ends[-1] > MAX_VALUES_BYTES:
            raise InputError(
                f"expected a batch whose codes stay below 2 GiB, got {len(valid)} rows"
            )
        buffers = [bits, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(values))]
        return pa.BinaryArray.from_buffers(self.type, len(valid), buffers)

    def decode(self, chunk: Any, dtype: np.dtype[Any]) -> Array:
        """Inverse of ``encode``: the rows of the values that are not null, (n_valid, d)."""
        values = chunk.drop_null()
        k, n = len(self.sizes), len(values)
        if self.own is None:
            data = values.buffers()[1] if n and self.width else b""
            start = values.offset * self.width
            packed = np.frombuffer(data, np.uint8)[start : start + n * self.width]
            codes = unpack_rows(packed.reshape(n, self.width), self.sizes)
            return self.quantizer.decode_as(codes, dtype)
        codes = np.empty((n, self.quantizer.n_fields), np.uint16)
        heads = np.empty((n, self.width), np.uint8)
        for i, value in enumerate(values):
            data = memoryview(value.as_buffer())
            if len(data) < self.width:
                raise CorruptDataError(f"a value of {len(data)} bytes is no coded row")
            heads[i] = np.frombuffer(data[: self.width], np.uint8)
            codes[i, k:] = self.own.decode(data[self.width :], 1)[0]
        codes[:, :k] = unpack_rows(heads, self.sizes) if self.width else 0
        return self.quantizer.decode_as(codes, dtype)


def vector_dtype(schema: Any, column: str) -> str:
    """The dtype of a column of vectors; InputError where there is none of that name and kind."""
    kind = _field(schema, column).type
    inner = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    types = pa.types
    is_list = types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner)
    for name, dtype in DTYPES.items():
        if is_list and inner.value_type == dtype:
            return name
    raise InputError(f"column {column!r}: expected lists of {', '.join(DTYPES)}, got {kind}")


def vectors(chunk: Any, d: int, where: str, first: int = 0) -> tuple[Array, npt.NDArray[np.bool_]]:
    """An Arrow array of lists of d floats -> its rows that are not null, (n_valid, d), and which
    rows those are, (n,). No copy where possible.

    InputError for a row of another length or with a null inside; it says ``where``, and numbers
    rows from ``first``.
    """
    if isinstance(chunk.type, pa.BaseExtensionType):
        chunk = chunk.storage
    valid = np.array(chunk.is_valid())
    lengths = pc.list_value_length(chunk).drop_null().to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(lengths != d)
    if odd.size:
        row = first + int(np.flatnonzero(valid)[odd[0]])
        raise InputError(
            f"{where}: expected vectors of {d} numbers, row {row} has {lengths[odd[0]]}"
        )
    flat = chunk.flatten()  # of the rows that are not null
    if flat.null_count:
        at = int(np.flatnonzero(~np.array(flat.is_valid()))[0]) // d
        row = first + int(np.flatnonzero(valid)[at])
        raise InputError(f"{where}: expected numbers, row {row} has a null among them")
    return flat.to_numpy(zero_copy_only=False).reshape(-1, d), valid


def _field(schema: Any, column: str) -> Any:
    found = schema.get_all_field_indices(column)
    if len(found) != 1:
        names = ", ".join(map(repr, schema.names[:20]))
        raise InputError(
            f"expected one column {column!r}, got {len(found)} among {names or 'none'}"
        )
    return schema.field(found[0])


def _chunks_of(batch: Any, column: str) -> list[Any]:
    """The Arrow arrays of one column of a table or record batch."""
    if not isinstance(batch, pa.Table | pa.RecordBatch):
        raise InputError(f"expected an Arrow table or record batch, got {type(batch).__name__}")
    _field(batch.schema, column)
    values = batch.column(column)
    return list(values.chunks) if isinstance(values, pa.ChunkedArray) else [values]


def _with_column(batch: Any, column: str, field: Any, chunks: list[Any]) -> Any:
    """The batch with new values in place of ``column``, or in a column of the field's name."""
    if isinstance(batch, pa.Table):
        values: Any = pa.chunked_array(chunks, type=field.type)
    else:
        (values,) = chunks
    if field.name == column:
        return batch.set_column(batch.schema.get_field_index(column), field, values)
    if field.name in batch.schema.names:
        raise InputError(f"expected into= to name a new column, {field.name!r} is there already")
    return batch.append_column(field, values)


def _fitted(quantizer: PolarQuantizer | bytes) -> PolarQuantizer:
    if isinstance(quantizer, bytes):
        return PolarQuantizer.from_bytes(quantizer)
    if not isinstance(quantizer, PolarQuantizer):
        raise InputError(f"expected a PolarQuantizer, got {type(quantizer).__name__}")
    quantizer.alphabet_sizes  # noqa: B018  raises NotFittedError
    return quantizer


def _checked(
    column: str, into: str | None, dtype: str | None
) -> tuple[str, str | None, str | None]:
    """What both take: names of columns, and a dtype of vectors."""
    for what, name in (("column", column), ("into", into)):
        if not (isinstance(name, str) or (what == "into" and name is None)):
            raise InputError(f"expected {what} to be a name, got {name!r:.80}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    return column, into, dtype


def _remade(kind: Any, quantizer: bytes, column: str, options: dict[str, Any]) -> Any:
    """What pickle calls: a RowEncoder or RowDecoder from the quantizer's bytes."""
    return kind(quantizer, column, **options)
