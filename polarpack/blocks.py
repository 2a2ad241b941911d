"""Rows of one tensor <-> blocks of bytes, and the header that says how.

    rows ── quantizer ── codes ── entropy model, or fixed-width rows ── block ── part of a chunk

Every block starts with a byte that says how it is coded, so any block can fall back to exact rows,
and a coded block can carry *escapes*: rows stored exactly because the code could not hold
them to a promised error, or because they are not finite. Exact rows are coded by a model of their
words (``entropy.words``) where the tensor has one, else stored as they are. docs/format.md is the
normative text.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np

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
)
from ._threads import in_threads
from .entropy.model import SymbolModel, choose_model
from .entropy.packing import pack_rows, row_bytes, unpack_rows
from .entropy.words import FIT_NUMBERS, WordModel
from .errors import CorruptDataError, InputError, LimitError
from .metrics import relative_error
from .polar import PolarQuantizer, refuse_critical

Layout = Literal["archive", "rows"]
NonFinite = Literal["error", "raw"]
LAYOUTS: tuple[str, ...] = ("archive", "rows")

RAW, CODED, ESCAPED, WORDS = 0, 1, 2, 3  # first byte of a block
CODED_KINDS = (bytes([CODED]), bytes([ESCAPED]))
BLOCK_FLOATS = 1 << 17  # a block of the archive layout holds about so many numbers
ROWS_PART_BYTES = 1 << 14  # one of the rows layout about so many bytes
EXACT_PART_BYTES = 1 << 17  # and one of exact rows about so many, before they are coded
LEAST_EXACT = 1 << 11  # bytes of exact rows for which a model of their words is tried
EXPONENT_BITS = {"float16": 5, "bfloat16": 8, "float32": 8, "float64": 11}
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


def rows_to_words(rows: Array, dtype: str) -> Array:
    """Rows as unsigned integers of the same bits: (n, d) uint16, uint32 or uint64."""
    if dtype == "bfloat16":
        return bfloat16_bits(rows)
    return np.ascontiguousarray(rows).view(f"u{ITEM_BYTES[dtype]}")


def rows_from_words(words: Array, dtype: str) -> Array:
    """Inverse of ``rows_to_words``; bfloat16 as float32."""
    return bfloat16_values(words) if dtype == "bfloat16" else words.view(dtype)


def work_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype in which rows of ``dtype`` are held."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


def word_model(data: bytes | None, spec: TensorSpec) -> WordModel | None:
    """The model of a tensor's words from its chunk, if it has one. CorruptDataError, LimitError."""
    if data is None:
        return None
    return WordModel.from_bytes(data, 8 * ITEM_BYTES[spec.dtype], spec.d)


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
    words: WordModel | None = None  # of rows that are stored exactly; None: as they are
    row_weights: Array | None = None  # (n,) of the rows to be coded, all at once
    words_settled: bool = False  # whether ``words`` stays as it is, a file having rows already

    @cached_property
    def sizes(self) -> Array:
        """(n_fields,) alphabet sizes of the codes."""
        assert self.quantizer is not None
        return self.quantizer.alphabet_sizes

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return work_dtype(self.spec.dtype)

    @cached_property
    def block_rows(self) -> int:
        """Rows of a full block: a fixed function of the header, so that any row can be found."""
        d = max(1, self.spec.d)
        if self.quantizer is None:
            size = d * ITEM_BYTES[self.spec.dtype]
            return 1 << int(np.clip(np.log2(max(1, EXACT_PART_BYTES // size)), 0, 12))
        if self.layout == "rows":
            size = max(1, row_bytes(self.sizes))
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

    def choose_words(self, rows: Array, total_rows: int) -> None:
        """Model the words of rows (n, d) that are to be stored exactly, if that pays.

        total_rows: how many there will be, of which these are a sample.
        """
        self.words_settled = True
        dtype = self.spec.dtype
        size = self.spec.d * ITEM_BYTES[dtype]
        if total_rows * size < LEAST_EXACT:
            return
        words = rows_to_words(rows[:: max(1, rows.size // FIT_NUMBERS)], dtype)
        model = WordModel.fit(words, EXPONENT_BITS[dtype], total_rows)
        if model is not None:
            coded = model.rate_bits(words) / 8 / len(words) * total_rows
            if coded + len(model.to_bytes()) < 0.99 * total_rows * size:
                self.words = model

    # Rows stored exactly, and back.
    def encode_exact(self, rows: Array) -> bytes:
        """Rows (n, d) -> a block of them as they are, or of their words where that is smaller."""
        raw = rows_to_bytes(rows, self.spec.dtype)
        if self.words is not None:
            coded = self.words.encode(rows_to_words(rows, self.spec.dtype))
            if len(coded) < len(raw):
                return bytes([WORDS]) + coded
        return bytes([RAW]) + raw

    def decode_exact(self, data: memoryview, n: int) -> Array:
        """Inverse of ``encode_exact``: (n, d) in the work dtype."""
        kind = data[0] if len(data) else -1
        if kind == WORDS and self.words is not None:
            return rows_from_words(self.words.decode(data[1:], n), self.spec.dtype)
        if kind != RAW:
            raise CorruptDataError(f"block of kind {kind}, expected exact rows")
        rows = rows_from_bytes(data[1:], self.spec.dtype, self.spec.d)
        if len(rows) != n:
            raise CorruptDataError(f"raw block holds {len(rows)} rows, expected {n}")
        return rows

    # A block and its inverse.
    def encode_block(self, rows: Array, codes: Array, escapes: Array) -> bytes:
        """Rows (n, d), their codes and the numbers of those to be stored exactly -> the bytes of
        one block, all rows exact where that is smaller."""
        coded = self._codes_to_bytes(codes)
        if len(escapes):
            head = struct.pack("<HI", len(escapes), len(coded)) + escapes.astype("<u2").tobytes()
            block = bytes([ESCAPED]) + head + self.encode_exact(rows[escapes]) + coded
        else:
            block = bytes([CODED]) + coded
        if len(block) <= rows.size * ITEM_BYTES[self.spec.dtype] // 2:
            return block
        return min(block, self.encode_exact(rows), key=len)

    def decode_block(self, data: memoryview, n: int, *, stages: int | None = None) -> Array:
        """Bytes of a block of n rows -> (n, d) in the work dtype."""
        if self.quantizer is None or data[:1] not in CODED_KINDS:
            return self.decode_exact(data, n)
        codes, escapes, exact = self._open_block(data, n)
        rows = self.quantizer.decode_as(codes, work_dtype(self.spec.dtype), stages=stages)
        if self.spec.dtype == "bfloat16":
            rows = bfloat16_values(bfloat16_bits(rows))
        rows[escapes] = exact
        return rows

    def decode_rows(
        self, data: memoryview, n: int, wanted: Array, *, stages: int | None = None
    ) -> Array:
        """Like ``decode_block`` for the rows numbered ``wanted`` alone: in the rows layout the cost
        is theirs alone."""
        coded = self.quantizer is not None and data[:1] in CODED_KINDS
        if self.layout == "archive" or not coded or self.quantizer is None:
            return self.decode_block(data, n, stages=stages)[wanted]
        codes, escapes, exact = self._open_block(data, n, wanted)
        rows = self.quantizer.decode_as(codes, work_dtype(self.spec.dtype), stages=stages)
        if self.spec.dtype == "bfloat16":
            rows = bfloat16_values(bfloat16_bits(rows))
        if not len(escapes):
            return rows
        place = np.full(n, -1)
        place[escapes] = np.arange(len(escapes))
        hit = place[wanted] >= 0
        rows[hit] = exact[place[wanted][hit]]
        return rows

    def packed_rows(self, data: memoryview, n: int) -> Array | None:
        """The packed rows (n, row_bytes) of a block of the rows layout, not copied; None where not
        all of its rows are coded."""
        if self.quantizer is None or data[:1] != CODED_KINDS[0]:
            return None
        width = row_bytes(self.sizes)
        if len(data) - 1 != n * width:
            raise CorruptDataError(f"{len(data) - 1} bytes of packed rows, expected {n} x {width}")
        return np.frombuffer(data, np.uint8, offset=1).reshape(n, width)

    def decode_packed(self, packed: Array, *, stages: int | None = None) -> Array:
        """Packed rows (n, row_bytes) -> (n, d) in the work dtype."""
        assert self.quantizer is not None
        codes = unpack_rows(packed, self.sizes)
        rows = self.quantizer.decode_as(codes, self._dtype, stages=stages)
        return bfloat16_values(bfloat16_bits(rows)) if self.spec.dtype == "bfloat16" else rows

    def codes_of_block(self, data: memoryview, n: int) -> tuple[Array, Array]:
        """Bytes of a block of n rows -> codes (n, n_fields) and the numbers of the rows that are
        stored exactly, whose codes mean nothing."""
        assert self.quantizer is not None
        if data[:1] in CODED_KINDS:
            codes, escapes, _ = self._open_block(data, n)
            return codes, escapes
        return np.zeros((n, self.quantizer.n_fields), np.uint8), np.arange(n)

    def _escapes(self, rows: Array, codes: Array) -> Array:
        """Numbers of the rows that have to be stored exactly."""
        assert self.quantizer is not None
        escaped = ~cast(Array, np.isfinite(rows).all(axis=1))
        if self.max_error is not None:
            decoded = self.quantizer.decode_as(codes, work_dtype(self.spec.dtype))
            if self.spec.dtype == "bfloat16":
                decoded = bfloat16_values(bfloat16_bits(decoded))
            safe = np.where(escaped[:, None], 0, rows)
            with np.errstate(invalid="ignore", over="ignore"):
                escaped |= ~(
                    relative_error(safe, np.where(escaped[:, None], 0, decoded)) <= self.max_error
                )
            if self.max_error == 0:  # to the bit: -0.0 is not 0.0
                same = np.signbit(decoded) == np.signbit(rows)
                escaped |= ~same.all(axis=1)
        return np.flatnonzero(escaped)

    def _codes_to_bytes(self, codes: Array) -> bytes:
        assert self.quantizer is not None
        if self.layout == "rows":
            return pack_rows(codes, self.sizes).tobytes()
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
    ) -> tuple[Array, Array, Array]:
        """Bytes of a block with codes -> codes, numbers of exact rows, exact rows."""
        assert self.quantizer is not None
        escapes = np.zeros(0, np.int64)
        exact = np.zeros((0, self.spec.d), work_dtype(self.spec.dtype))
        coded = data[1:]
        if data[0] == ESCAPED:
            count, size = struct.unpack_from("<HI", data, 1) if len(data) >= 7 else (0, 0)
            at, end = 7 + 2 * count, len(data) - size
            if not count or end < at:
                raise CorruptDataError(
                    f"block of {len(data)} bytes does not hold its {count} escapes"
                )
            escapes = np.frombuffer(data[7:at], "<u2").astype(np.int64)
            if escapes[-1] >= n or (np.diff(escapes) <= 0).any():
                raise CorruptDataError("escaped rows are not ascending within the block")
            exact = self.decode_exact(data[at:end], count)
            coded = data[end:]
        if self.layout == "archive":
            return self._codes_from_bytes(coded, n), escapes, exact
        sizes = self.sizes
        width = row_bytes(sizes)
        if len(coded) != n * width:
            raise CorruptDataError(f"{len(coded)} bytes of packed rows, expected {n} x {width}")
        packed = np.frombuffer(coded, np.uint8).reshape(n, width)
        return unpack_rows(packed if wanted is None else packed[wanted], sizes), escapes, exact

    # Blocks of many rows.
    def encode_rows(self, rows: Array, codes: Array | None = None) -> list[bytes]:
        """Rows (n, d) -> blocks, each of ``block_rows`` rows but the last. Blocks in parallel.

        codes: what ``encode_codes`` gave for these rows, where that is known; overwritten.
        Memory beyond rows and result: the codes of all rows (2 bytes a number at most).
        """
        step = self.block_rows
        cuts = [slice(s, s + step) for s in range(0, len(rows), step)]
        if self.quantizer is None:
            if not self.words_settled:
                self.choose_words(rows, len(rows))
            return self._encode_exact_blocks(rows, cuts)
        codes = self.encode_codes(rows) if codes is None else codes
        escapes = in_threads(lambda cut: self._escapes(rows[cut], codes[cut]), cuts)
        numbers = np.concatenate(
            [np.zeros(0, int), *(cut.start + e for cut, e in zip(cuts, escapes, strict=True))]
        )
        codes[numbers] = 0  # nobody will look at them: the cheapest ones
        if self.layout == "archive" and self.n_chosen and self.model is None:
            self.choose_model(codes)
        if not self.words_settled:
            sample = numbers[:: max(1, len(numbers) * self.spec.d // FIT_NUMBERS)]
            self.choose_words(rows[sample], len(numbers))
        return in_threads(
            lambda i: self.encode_block(rows[cuts[i]], codes[cuts[i]], escapes[i]),
            range(len(cuts)),
        )

    def _encode_exact_blocks(self, rows: Array, cuts: list[slice]) -> list[bytes]:
        """All rows as exact blocks; without the model if, after all, it does not pay for itself."""
        blocks = in_threads(lambda cut: self.encode_exact(rows[cut]), cuts)
        if self.words is not None:
            size = rows.size * ITEM_BYTES[self.spec.dtype] + len(blocks)
            if sum(map(len, blocks)) + len(self.words.to_bytes()) > size:
                self.words = None
                return self._encode_exact_blocks(rows, cuts)
        return blocks

    def encode_codes(self, rows: Array) -> Array:
        """Codes of rows (n, d); rows that are not finite are coded as zeros, to be escaped."""
        assert self.quantizer is not None
        if self.nonfinite == "raw":
            bad = ~cast(Array, np.isfinite(rows).all(axis=1))
            if bad.any():
                rows = np.where(bad[:, None], np.zeros((), rows.dtype), rows)
        return cast(Array, self.quantizer.encode(rows, row_weights=self.row_weights))


def check_max_error(max_error: float | None) -> float | None:
    """The bound as a float; InputError unless it is None or >= 0."""
    if max_error is None:
        return None
    if not (isinstance(max_error, int | float | np.floating | np.integer) and max_error >= 0):
        raise InputError(f"expected max_error >= 0, got {max_error!r}")
    return float(max_error)


def check_rows(rows: Array, name: str, nonfinite: NonFinite) -> None:
    """InputError for rows that hold NaN or infinity, unless ``nonfinite`` is "raw". O(n d)."""
    if nonfinite not in ("error", "raw"):
        raise InputError(f"expected nonfinite 'error' or 'raw', got {nonfinite!r}")
    if nonfinite == "error":
        bad = first_nonfinite_row(rows) if rows.size else None
        if bad is not None:
            raise InputError(
                f"expected {name} to be finite, got NaN or infinity first in row {bad}; "
                "nonfinite='raw' stores such rows exactly"
            )


# -- header of a tensor ----------------------------------------------------------------------------
def check_name(name: Any) -> None:
    """InputError unless a tensor can go by this name in a file."""
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise InputError(f"expected a name of at most {MAX_NAME} characters, got {name!r:.80}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"expected a name without lone surrogates, got {name!r:.80}") from None


def header_to_bytes(
    name: str, coding: TensorCoding, quantizer: int | str | None, streamed: bool
) -> bytes:
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
        refuse_critical(dict.fromkeys(fields), "tensor header")
        get = fields.get
        name, shape, dtype = get("name"), get("shape"), get("dtype")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise CorruptDataError(f"tensor header: expected a name, got {name!r:.60}")
        if dtype not in FLOAT_DTYPES:
            raise CorruptDataError(f"tensor {name!r}: dtype {dtype!r:.60} unknown")
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_NDIM
            or not all(type(v) is int for v in shape)
        ):
            raise CorruptDataError(f"tensor {name!r}: expected a shape, got {shape!r:.60}")
        if any(v < 0 for v in shape[1:]) or (shape and shape[0] < -1):
            raise CorruptDataError(f"tensor {name!r}: negative size in shape {shape}")
        size = 1
        for v in shape:
            size *= max(abs(v), 1)
        if size * 8 > container.MAX_FILE_BYTES * 64:
            raise LimitError(f"tensor {name!r}: shape {shape} holds more than any file can")
        layout, library, device = (
            get("layout", "archive"),
            get("library", "numpy"),
            get("device", "cpu"),
        )
        if (
            layout not in LAYOUTS
            or library not in ("numpy", "torch")
            or not isinstance(device, str)
        ):
            raise CorruptDataError(
                f"tensor {name!r}: layout {layout!r}, library {library!r}, device {device!r}"
            )
        quantizer, max_error = get("quantizer"), get("max_error")
        if not (quantizer is None or isinstance(quantizer, str) or type(quantizer) is int):
            raise CorruptDataError(f"tensor {name!r}: quantizer {quantizer!r:.60}")
        if not (max_error is None or (isinstance(max_error, int | float) and max_error >= 0)):
            raise CorruptDataError(f"tensor {name!r}: max_error {max_error!r:.60}")
        spec = TensorSpec(tuple(shape), dtype, library, device)
        return cls(name, spec, layout, quantizer, max_error)
