"""Reading ``.polar`` files: tensors that are decoded where they are indexed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast

import numpy as np

from ._arrays import ITEM_BYTES, Array, TensorSpec, bfloat16_bits, is_torch
from ._threads import in_threads, threads_for
from .blocks import TensorCoding, TensorHeader, word_model, work_dtype
from .clustering import check_int
from .container import Kind, Reader
from .entropy.model import model_from_bytes
from .errors import CorruptDataError, FormatError, InputError, MissingDependencyError
from .polar import PolarQuantizer

if TYPE_CHECKING:
    from .search import Searcher

BLOCKS_KEPT = 1 << 14  # of the rows layout, opened: 200 bytes each beside what the system maps
GATHERED_ROWS = 1 << 10  # rows of many blocks that are decoded together
MODELS_KEPT = 8  # of a tensor with many, as a merged file may have


class Index:
    """The chunks of a file sorted by what they are. ``skip``: leave out those that are damaged."""

    def __init__(self, reader: Reader, n_chunks: int | None = None, *, skip: bool = False) -> None:
        self.headers: dict[int, TensorHeader] = {}
        self.quantizers: dict[int, bytes] = {}
        self.models: dict[int, Models] = {}
        self.words: dict[int, Models] = {}
        self.blocks: dict[int, list[int]] = {}
        self.n_rows: dict[int, int] = {}
        chunks = reader.chunks[:n_chunks]
        kinds = chunks["kind"]
        for i in np.flatnonzero(kinds != Kind.ROW_BLOCKS).tolist():
            kind, tensor = int(kinds[i]), int(chunks["tensor"][i])
            try:
                self._take(reader, i, kind, tensor)
            except FormatError as error:
                if not skip:
                    raise
                if kind in (Kind.ENTROPY_MODEL, Kind.WORD_MODEL):
                    self._models_of(kind).setdefault(tensor, Models()).add(i, error)
        rows = chunks["n_rows"]
        for i in np.flatnonzero(kinds == Kind.ROW_BLOCKS).tolist():
            self.blocks.setdefault(int(chunks["tensor"][i]), []).append(i)
        for tensor, numbers in self.blocks.items():
            if tensor not in self.headers and not skip:
                raise CorruptDataError(
                    f"chunk {numbers[0]}: rows of tensor {tensor}, which has no header"
                )
            self.n_rows[tensor] = int(rows[numbers].sum())
        if not skip:
            for kind in (Kind.ENTROPY_MODEL, Kind.WORD_MODEL):
                for tensor, models in self._models_of(kind).items():
                    models.check_used(self.blocks.get(tensor, []))
        names = [header.name for header in self.headers.values()]
        if len(set(names)) != len(names):
            raise CorruptDataError("two tensors of one name")

    def _take(self, reader: Reader, i: int, kind: int, tensor: int) -> None:
        """Read chunk i if it is one that goes before the rows of its tensor."""
        if kind not in (Kind.TENSOR_HEADER, Kind.QUANTIZER, Kind.ENTROPY_MODEL, Kind.WORD_MODEL):
            return
        if len(reader.parts(i).lengths) != 1:
            raise CorruptDataError(f"chunk {i}: expected one part of a chunk of kind {kind}")
        data = bytes(reader.part(i, 0))
        if kind in (Kind.ENTROPY_MODEL, Kind.WORD_MODEL):
            self._models_of(kind).setdefault(tensor, Models()).add(i, data)
            return
        if tensor in (self.headers if kind == Kind.TENSOR_HEADER else self.quantizers):
            raise CorruptDataError(f"chunk {i}: a second one of kind {kind} for tensor {tensor}")
        if kind == Kind.TENSOR_HEADER:
            self.headers[tensor] = TensorHeader.from_bytes(data)
        else:
            self.quantizers[tensor] = data

    def _models_of(self, kind: int) -> dict[int, Models]:
        return self.models if kind == Kind.ENTROPY_MODEL else self.words

    def model_at(self, kind: int, tensor: int, chunk: int) -> bytes | None:
        """The model of one kind that chunk ``chunk`` of a tensor is coded under, if there is one;
        the FormatError of reading it, if that was passed over."""
        models = self._models_of(kind).get(tensor)
        return None if models is None else models.before(chunk)

    def quantizer_hash(self, header: TensorHeader) -> str | None:
        """SHA-256 of the quantizer of a tensor, hexadecimal; None where it has none.
        CorruptDataError for one that is not there."""
        reference = header.quantizer
        if not isinstance(reference, int):
            return reference
        if reference not in self.quantizers:
            raise CorruptDataError(f"tensor {header.name!r}: no quantizer {reference} in the file")
        return hashlib.sha256(self.quantizers[reference]).hexdigest()

    def sections(self, tensor: int) -> list[int]:
        """The chunks of a tensor, by number, from which other models hold than before."""
        both = [self.models.get(tensor), self.words.get(tensor)]
        return sorted({i for models in both if models is not None for i in models.chunks})


class Models:
    """The chunks of one tensor that hold models of one kind: each holds from its place in the file
    to the next."""

    def __init__(self) -> None:
        self.chunks: list[int] = []  # ascending
        self._found: list[bytes | FormatError] = []

    def add(self, chunk: int, found: bytes | FormatError) -> None:
        """Take note of a model, or of why it cannot be read."""
        self.chunks.append(chunk)
        self._found.append(found)

    def check_used(self, blocks: list[int]) -> None:
        """CorruptDataError if one of several holds for none of the chunks of rows, ``blocks``."""
        starts = [bisect_left(blocks, chunk) for chunk in self.chunks] + [len(blocks)]
        for i, (start, stop) in enumerate(pairwise(starts)):
            if len(self.chunks) > 1 and start == stop:
                raise CorruptDataError(f"chunk {self.chunks[i]}: a model of no rows")

    def before(self, chunk: int | None = None) -> bytes | None:
        """The last model before a chunk, of all if None; None if there is none before it."""
        at = len(self.chunks) if chunk is None else bisect_left(self.chunks, chunk)
        found = self._found[at - 1] if at else None
        if isinstance(found, FormatError):
            raise found
        return found


class _Piece(NamedTuple):
    """What of one block goes where."""

    chunk: int  # place among the chunks of the tensor
    block: int  # within it
    begin: int  # first row of the block, of the tensor's
    n: int  # rows of the block
    wanted: Array | range  # rows, counted within the block
    places: Array | slice  # rows of the result


class _Plain(NamedTuple):
    """A block of the rows layout, opened and its checksum compared."""

    packed: Array | None  # (n, row_bytes); None where not all of its rows are coded
    end: int  # where it ends in the file


class Tensor:
    """One tensor of an open file: decoded where it is indexed, block by block.

    ``shape``, ``dtype``, ``nbytes`` (decoded), ``len``; ``t[3]``,
    ``t[10:20]``, ``t[[5, 7]]``, ``t[...]`` index the first axis and return arrays of the library
    the tensor came from. ``damaged_rows``: with on_error="skip", numbers of the rows (flattened
    leading axes) that could not be read so far; they read as zeros.
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
                f"tensor {header.name!r}: chunks hold {n} rows, "
                f"its shape {list(shape)} has {self._spec.n_rows}"
            )
        self._n = self._spec.n_rows
        self.name = header.name
        chunks = index.blocks.get(tensor, [])
        rows = file._reader.chunks["n_rows"][chunks] if chunks else np.zeros(0, np.int64)
        self._chunks = np.array(chunks, np.int64)
        self._ends = np.cumsum(rows)
        self._end_list: list[int] = self._ends.tolist()
        self._sections = index.sections(tensor)
        self._codings: dict[int, TensorCoding] = {}  # by section, the last few used
        self._plain: dict[int, _Plain] = {}  # by first row, the blocks last used of the rows layout
        self.damaged_rows: list[int] = []

    @cached_property
    def _coding(self) -> TensorCoding:
        """How blocks are to be read, but for the models of what is in them; made when first needed,
        since sizes need no quantizer."""
        coding = self._file._coding(self._tensor, self._spec)
        rows, step = np.diff(self._ends, prepend=0), coding.block_rows
        # A block takes six bytes at least (length, checksum, kind), so a lie about rows is found
        # before room is made.
        least = -(-rows // step) * 6
        if coding.quantizer is None and self._tensor not in self._file._index.words:
            least = rows * float(self._spec.d * ITEM_BYTES[self._spec.dtype])
        if (least > self._file._reader.chunks["n_bytes"][self._chunks]).any():
            raise CorruptDataError(f"tensor {self.name!r}: a chunk too short for the rows it names")
        return coding

    def _coding_at(self, place: int) -> TensorCoding:
        """How the blocks of a chunk, by its place among the tensor's, are to be read: under the
        last models before it."""
        chunk = int(self._chunks[place])
        section = bisect_left(self._sections, chunk)
        coding = self._codings.get(section)
        if coding is None:
            coding = self._file._coding_at(self._tensor, self._coding, chunk)
            if len(self._codings) >= MODELS_KEPT:
                self._codings = {}
            self._codings[section] = coding
        return coding

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded tensor."""
        return self._spec.shape

    @property
    def dtype(self) -> Any:
        """The dtype of what indexing returns: numpy's, or torch's for a tensor from there."""
        return self._deliver(np.zeros((0, self._spec.d), work_dtype(self._spec.dtype)), None).dtype

    @property
    def dtype_name(self) -> str:
        """Its dtype as files name it: "float16", "bfloat16", "float32" or "float64"."""
        return self._spec.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self._spec.nbytes

    @property
    def layout(self) -> str:
        """ "archive" or "rows"."""
        return self._file._index.headers[self._tensor].layout

    @property
    def quantizer(self) -> PolarQuantizer | None:
        """The quantizer its rows were coded with; None where they are stored as they are."""
        return self._coding.quantizer

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __getitem__(self, item: Any) -> Any:
        """Decode what ``item`` selects: an integer, a slice, a list or array of integers or
        booleans along the first axis, or ``...``. Only the blocks touched are read."""
        if type(item) is int and len(self.shape) == 2 and -self._n <= item < self._n:
            return self._deliver(self._row(item % self._n), None)
        if item is Ellipsis or not self.shape:
            return self._deliver(self.read_rows(range(self._n)), self.shape)
        chosen, tail = self._chosen(item), self.shape[1:]
        single = isinstance(item, int | np.integer)
        if not tail:  # one row: index within it
            values = self.read_rows(range(self._n)).reshape(-1)[np.asarray(chosen)]
            return self._deliver(values[0] if single else values, None)
        per_item = int(np.prod(tail[:-1]))
        if isinstance(chosen, range):
            rows: Array | range = range(chosen.start * per_item, chosen.stop * per_item)
        else:
            rows = (chosen[:, None] * per_item + np.arange(per_item)).ravel()
        return self._deliver(self.read_rows(rows), tail if single else (len(chosen), *tail))

    def _chosen(self, item: Any) -> Array | range:
        """Places along the first axis that an index selects: (n,) int64, or a range of step 1."""
        axis = self.shape[0]
        wrong = f"expected an integer, a slice or a list of integers, got {item!r:.80}"
        try:
            if isinstance(item, slice):
                places = range(*item.indices(axis))
                return places if places.step == 1 else np.array(places, np.int64)
            if isinstance(item, int | np.integer):
                chosen = np.array([item])
            else:
                chosen = np.asarray(item.tolist() if is_torch(item) else item)
        except (TypeError, ValueError) as error:
            raise InputError(wrong) from error
        if chosen.dtype == bool and chosen.shape == (axis,):
            chosen = np.flatnonzero(chosen)
        if chosen.size == 0 and chosen.ndim == 1:
            chosen = np.zeros(0, np.int64)
        if isinstance(item, tuple | bool) or chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise InputError(wrong)
        if chosen.size and (chosen.min() < -axis or chosen.max() >= axis):
            bad = int(chosen[(chosen < -axis) | (chosen >= axis)][0])
            raise InputError(f"expected rows of {self.name!r} in -{axis}..{axis - 1}, got {bad}")
        chosen = chosen.astype(np.int64)
        return np.where(chosen < 0, chosen + axis, chosen)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self.read_rows(range(self._n)).reshape(self.shape)
        return whole if dtype is None else whole.astype(dtype)

    def read_rows(self, rows: Array | range) -> Array:
        """Rows by number (leading axes flattened) -> (n, d) numpy array; bfloat16 as float32.

        A range (of step 1) takes no memory for row numbers."""
        layout, d = self._coding.layout, self._spec.d
        out = np.zeros((len(rows), d), work_dtype(self._spec.dtype))
        if not out.size:
            return out
        pieces = self._of_range(rows) if isinstance(rows, range) else self._of_array(rows)
        if layout == "rows" and self._file._on_error == "raise":
            pieces = self._read_plain(pieces, out)

        def read(piece: _Piece) -> FormatError | None:
            if piece.chunk == len(self._chunks):
                return CorruptDataError(f"tensor {self.name!r}: row {piece.begin} is missing")
            stages = self._file._stages
            try:
                coding = self._coding_at(piece.chunk)
                part = self._file._reader.part(int(self._chunks[piece.chunk]), piece.block)
                wanted = piece.wanted
                if len(wanted) == piece.n and np.array_equal(wanted, np.arange(piece.n)):
                    out[piece.places] = coding.decode_block(part, piece.n, stages=stages)
                else:
                    wanted = np.asarray(wanted)
                    out[piece.places] = coding.decode_rows(part, piece.n, wanted, stages=stages)
            except FormatError as error:
                return error
            return None

        damaged: list[Array] = []
        few = threads_for(len(rows)) if layout == "rows" else None
        for piece, error in zip(pieces, in_threads(read, pieces, few), strict=True):
            if error is not None:
                if self._file._on_error == "raise":
                    raise error
                damaged.append(piece.begin + np.asarray(piece.wanted))
        if damaged:
            known = np.array(self.damaged_rows, np.int64)
            self.damaged_rows = np.unique(np.concatenate([known, *damaged])).tolist()
        return out

    def _row(self, row: int) -> Array:
        """One row, (d,)."""
        if self._coding.layout == "rows" and self._file._on_error == "raise":
            chunk, block, begin, n = self._place(row)
            packed = self._opened(chunk, block, begin, n)
            if packed is not None:
                own = packed[row - begin : row - begin + 1]
                return cast(Array, self._coding.decode_packed(own, stages=self._file._stages)[0])
        return cast(Array, self.read_rows(range(row, row + 1))[0])

    def _read_plain(self, pieces: list[_Piece], out: Array) -> list[_Piece]:
        """Rows of blocks all of whose rows are coded, gathered and decoded together; returns the
        pieces of other blocks."""
        others, packed, places = [], [], []
        for piece in pieces:
            found = self._opened(piece.chunk, piece.block, piece.begin, piece.n)
            if found is None:
                others.append(piece)
                continue
            wanted, place = piece.wanted, piece.places
            if isinstance(wanted, range):
                packed.append(found[wanted.start : wanted.stop])
            else:
                packed.append(found[wanted])
            places.append(np.arange(place.start, place.stop) if isinstance(place, slice) else place)
        if not packed:
            return others
        gathered, where = np.concatenate(packed), np.concatenate(places)
        stages = self._file._stages

        def decode(start: int) -> None:
            some = slice(start, start + GATHERED_ROWS)
            out[where[some]] = self._coding.decode_packed(gathered[some], stages=stages)

        in_threads(decode, range(0, len(where), GATHERED_ROWS), threads_for(len(where)))
        return others

    def _opened(self, place: int, block: int, begin: int, n: int) -> Array | None:
        """The packed rows of a block of the rows layout, whose checksum is compared when it is
        opened and not again while it is among the last used. None where there are others in it."""
        plain = self._plain.get(begin)
        reader = self._file._reader
        if plain is None:
            if place == len(self._chunks):
                raise CorruptDataError(f"tensor {self.name!r}: row {begin} is missing")
            chunk = int(self._chunks[place])
            part, parts = reader.part(chunk, block), reader.parts(chunk)
            end = int(parts.offsets[block] + parts.lengths[block])
            plain = _Plain(self._coding.packed_rows(part, n), end)
            if len(self._plain) >= BLOCKS_KEPT:
                self._plain = {}
            self._plain[begin] = plain
        elif reader.available() < plain.end:
            raise CorruptDataError(f"tensor {self.name!r}: the file was cut short")
        return plain.packed

    def forget(self) -> None:
        """Let go of the pages of the file that were read so far: memory that the system keeps, and
        gives back if they are read again."""
        self._file._reader.forget()

    def _of_range(self, rows: range) -> list[_Piece]:
        """The parts of blocks that hold consecutive rows."""
        pieces, at = [], rows.start
        while at < rows.stop:
            c, b, begin, n = self._place(at)
            stop = min(rows.stop, begin + n)
            places = slice(at - rows.start, stop - rows.start)
            pieces.append(_Piece(c, b, begin, n, range(at - begin, stop - begin), places))
            at = stop
        return pieces

    def _of_array(self, rows: Array) -> list[_Piece]:
        """The parts of blocks that hold rows, in any order."""
        order, pieces, first = np.argsort(rows, kind="stable"), [], 0
        ordered = rows[order]
        while first < len(rows):
            c, b, begin, n = self._place(int(ordered[first]))
            last = int(np.searchsorted(ordered, begin + n))
            places = order[first:last]
            pieces.append(_Piece(c, b, begin, n, rows[places] - begin, places))
            first = last
        return pieces

    def _place(self, row: int) -> tuple[int, int, int, int]:
        """Chunk (its place among the tensor's) and block that hold a row, the block's first row and
        its number of rows. Rows that no chunk holds make one block more."""
        step, ends = self._coding.block_rows, self._end_list
        c = bisect_right(ends, row)
        start = ends[c - 1] if c else 0
        if c == len(ends):
            return c, 0, start, self._n - start
        begin = start + (row - start) // step * step
        return c, (begin - start) // step, begin, min(step, ends[c] - begin)

    def _deliver(self, values: Array, shape: tuple[int, ...] | None) -> Any:
        """In the library the tensor came from, where that is to be had."""
        values = values if shape is None else values.reshape(shape)
        return self._file._deliver(values, self._spec)

    def search(
        self,
        queries: Any,
        k: int = 10,
        metric: Literal["ip", "l2", "cosine"] = "ip",
        *,
        ids: Any = None,
        exclude: Any = None,
        shortlist: int | None = None,
    ) -> tuple[Any, Any]:
        """The k best rows for each query: scores (n_queries, k) float32, row numbers int64, in the
        queries' library; where scores are equal in float32 the lower row number comes first.

        queries: (n_queries, d) float array or tensor, or one vector (d,). "ip" and "cosine": larger
        is better; "l2": squared distances, smaller is better. k is cut to the number of rows
        searched. Rows that hold NaN or infinity come last. ids, exclude: search only these rows, or
        not these, given as row numbers or as one boolean for each row.

        The result is that of float64 scores of all decoded rows, found from the codes: scores of
        all rows in float32, and decoding only those that may be among the k best. shortlist: look
        at the leading coefficients or stages alone, and decode the ``shortlist`` rows (k or more)
        that look best by them: faster where queries are few, and rows may be missed.

        Cost: 2 m n operations for each query of m coefficients, in batches of queries, after codes
        were unpacked once; these are kept in memory with the tensor up to 512 MB. The first search
        by "l2" or "cosine" decodes all rows, and keeps 4 bytes for each. InputError for another
        width, k < 1, a shortlist below k, an unknown metric, row numbers that are not there, or
        queries that are not finite.
        """
        return self._searcher.search(
            queries, k, metric, ids=ids, exclude=exclude, shortlist=shortlist
        )

    def to_faiss(self, metric: Literal["ip", "l2"] = "l2") -> Any:
        """The rows as a faiss index of the same codes, which gives the distances that ``search``
        does: of the presets pq, opq (by "ip"), rq, prq, sq8 and float16. O(n) memory.
        MissingDependencyError without faiss; InputError naming what no index of faiss can hold."""
        from .to_faiss import to_faiss

        quantizer = self.scanned
        if quantizer is None:
            raise InputError(f"tensor {self.name!r} has no codes that faiss could search")
        codes, other = self.read_codes(range(self._n))
        if len(other):
            raise InputError(
                f"tensor {self.name!r}: {len(other)} rows, the first {other[0]}, are stored "
                "exactly, which faiss's index cannot hold"
            )
        return to_faiss(quantizer, codes, metric)

    @cached_property
    def _searcher(self) -> Searcher:
        from .search import Searcher  # its kernels load numba

        return Searcher(self)

    @property
    def scanned(self) -> PolarQuantizer | None:
        """The quantizer that all of ``read_codes`` were made with, where rows decode by it alone:
        not with ``stages=`` or ``on_error="skip"``."""
        plain = self._file._stages is None and self._file._on_error == "raise"
        return self.quantizer if plain else None

    def read_codes(self, rows: range) -> tuple[Array, Array]:
        """Codes (n, n_fields) of consecutive rows, and which of them, counted from 0, are stored in
        another way. CorruptDataError where they cannot be read."""
        quantizer = self._coding.quantizer
        if quantizer is None:
            raise InputError(f"tensor {self.name!r} has no codes: its rows are stored as they are")
        sizes = quantizer.alphabet_sizes
        dtype = np.uint8 if sizes.max(initial=1) <= 256 else np.uint16
        codes, other = np.zeros((len(rows), len(sizes)), dtype), np.zeros(len(rows), bool)

        def read(piece: _Piece) -> None:
            if piece.chunk == len(self._chunks):
                raise CorruptDataError(f"tensor {self.name!r}: row {piece.begin} is missing")
            part = self._file._reader.part(int(self._chunks[piece.chunk]), piece.block)
            found, exact = self._coding_at(piece.chunk).codes_of_block(part, piece.n)
            wanted = slice(piece.wanted[0], piece.wanted[-1] + 1)
            codes[piece.places] = found[wanted]
            marks = np.zeros(piece.n, bool)
            marks[exact] = True
            other[piece.places] = marks[wanted]

        in_threads(read, self._of_range(rows))
        return codes, np.flatnonzero(other)


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
        if stages is not None:
            check_int("stages", stages, 1)
        if library not in (None, "numpy", "torch"):
            raise InputError(f"expected library 'numpy' or 'torch', got {library!r}")
        if not (quantizer is None or isinstance(quantizer, PolarQuantizer)):
            raise InputError(f"expected a PolarQuantizer, got {type(quantizer).__name__}")
        self._stages, self._on_error, self._library = stages, on_error, library
        self._given = quantizer
        self._quantizers: dict[int, PolarQuantizer] = {}
        self._tensors: dict[str, Tensor] = {}
        self._reader = Reader(source, recover=on_error == "skip")
        try:
            self._index = Index(self._reader, skip=on_error == "skip")
        except BaseException:
            self._reader.close()
            raise
        self._numbers = {header.name: i for i, header in self._index.headers.items()}

    @property
    def recovered(self) -> bool:
        """Whether the file's end was lost and its chunks found by walking (on_error="skip")."""
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
        """The tensor of that name; InputError (in KeyError's place) lists the names there are."""
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
            raise CorruptDataError(
                f"tensor {header.name!r}: quantizer of {quantizer.d_} for rows of {spec.d}"
            )
        return TensorCoding(spec, quantizer, header.layout, None, header.max_error)

    def _coding_at(self, tensor: int, coding: TensorCoding, chunk: int) -> TensorCoding:
        """A tensor's coding with the models that hold for one of its chunks."""
        model = self._index.model_at(Kind.ENTROPY_MODEL, tensor, chunk)
        words = self._index.model_at(Kind.WORD_MODEL, tensor, chunk)
        coding = replace(
            coding,
            model=None if model is None else model_from_bytes(model),
            words=word_model(words, coding.spec),
        )
        quantizer = coding.quantizer
        if quantizer is not None and coding.layout == "archive" and coding.n_chosen:
            sizes = quantizer.alphabet_sizes[: coding.n_chosen]
            if coding.model is None or not np.array_equal(coding.model.alphabet_sizes, sizes):
                name = self._index.headers[tensor].name
                raise CorruptDataError(f"tensor {name!r}: entropy model does not fit the codes")
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
            raise CorruptDataError(
                f"tensor {header.name!r}: quantizer {reference} is not in the file"
            )
        if reference not in self._quantizers:
            stored = self._index.quantizers[reference]
            self._quantizers[reference] = PolarQuantizer.from_bytes(stored)
        return self._quantizers[reference]

    def _deliver(self, values: Array, spec: TensorSpec) -> Any:
        library = self._library or spec.library
        if library == "numpy":
            if spec.dtype == "bfloat16" and spec.library == "numpy":
                with contextlib.suppress(ImportError):  # numpy itself has no such dtype
                    from ml_dtypes import bfloat16

                    return values.astype(bfloat16)
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
        tensor = torch.from_numpy(np.require(values, requirements="C"))
        if spec.dtype == "bfloat16":  # by its bits: NaN payloads stay too
            bits = bfloat16_bits(values).view(np.int16).reshape(values.shape)
            tensor = torch.from_numpy(bits).view(torch.bfloat16)
        try:
            if spec.device == "meta":  # where tensors have no values
                raise RuntimeError
            return tensor.to(spec.device)
        except (RuntimeError, AssertionError, ImportError):
            warnings.warn(
                f"device {spec.device!r} is not available: decoding to the CPU", stacklevel=4
            )
            return tensor

    def verify(self) -> None:
        """Check every byte and decode every row; raises the first FormatError."""
        self._reader.verify()
        for name in self:
            tensor = self[name]
            for start in range(0, tensor._n, 1 << 14):
                tensor.read_rows(range(start, min(tensor._n, start + (1 << 14))))

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
                "dtype": tensor.dtype_name,
                "layout": tensor.layout,
                "quantizer": self._index.headers[number].quantizer,
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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
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
