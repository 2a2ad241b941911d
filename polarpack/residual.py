"""Codebook quantizers: heads (slices of a row) x residual stages (each codes what the last left).

``ProductResidualQuantizer`` is the general case: every head has its own slice and its own number of
bits in each stage. ``ResidualQuantizer`` is the case of one head, ``product.ProductQuantizer`` that
of one stage. A row of codes has one field for each codebook, stage by stage::

    row x     |  head 0  | head 1 |    head 2    |  head 3, no bits: decodes to its mean
    stage 1   |  field 0 | field 1|   field 2    |
    stage 2   |  field 3 |        |   field 4    |      the first fields are the first stages

Codebooks are rounded to float16 times a power of two of their own as soon as they are learned, so
the next stage corrects the rounding too, and what is stored decodes exactly as what was fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Float32, enter, enter_codes
from ._numba import njit
from ._threads import in_threads
from .clustering import (
    BLOCK_SCORES,
    DIRECT_MAX_D,
    Int64,
    check_int,
    comfortable_scale,
    exponent,
    inner_products,
    nearest,
    squared_distances,
    train_centroids,
)
from .errors import CorruptDataError, InputError, NotFittedError

Half = npt.NDArray[np.float16]
Uint16 = npt.NDArray[np.uint16]
Bits = tuple[int, ...]  # of the stages of one head
Head = tuple[int, int, Bits]  # first column, column after the last, bits

MAX_BITS = 16
MAX_STAGES = 64
MAX_BEAM = 256
ROWS_PER_CENTROID = 256  # training rows; more change nothing measurable
BLOCK_ROWS = 1 << 13  # rows encoded at a time
LARGEST = np.finfo(np.float32).max
MAX_EXPONENT = 200  # of codebooks; those of float32 values lie in -164..115
CLIP = np.float32(2.0**50)  # search compares squares: rows this far out are all equally far


class ProductResidualQuantizer:
    """Heads x stages of k-means codebooks.

    Parameters
    ----------
    heads : (start, stop, bits of each stage) for consecutive slices of the row, from column 0 on.
        Bits are 1..16; a head with no stages costs nothing and decodes to its mean.
    beam : partial codes kept while searching the stages; 1 is greedy. The error of a row is never
        larger than with beam 1; time grows in proportion.
    spherical_first : codebooks of the first stage are unit directions times one radius for each
        head (the least-squares one), as suits heads of a unit vector, whose norm is near
        1 / sqrt(heads).
    seed : same seed, machine and versions: same codebooks. A stage does not depend on later ones.

    Attributes
    ----------
    codebooks_ : one (2^bits, stop - start) float32 array for each field, exact in float16 times
        2^exponent (plus the head's offset in its first stage).
    splits_ : (n_heads + 1,) int64, the columns at which heads begin and the last ends.
    offset_ : (d,) float32, zero in columns whose mean does not matter.
    largest_ : largest magnitude of any codeword or offset (1 without codewords).

    Source: Chen, Guan and Wang, "Approximate nearest neighbor search by residual vector
    quantization", Sensors 2010; Babenko and Lempitsky, "Additive quantization", CVPR 2014 (beam).
    """

    codebooks_: list[Float32]
    splits_: Int64
    offset_: Float32
    largest_: float

    def __init__(
        self,
        heads: Sequence[tuple[int, int, Sequence[int]]],
        *,
        beam: int = 1,
        spherical_first: bool = False,
        seed: int = 0,
    ) -> None:
        self.heads: list[Head] = [
            (check_int("start", a, 0), check_int("stop", b, 1), _check_bits(bits))
            for a, b, bits in heads
        ]
        splits = [0, *(b for _, b, _ in self.heads)]
        if not self.heads or any(
            a != before or b <= a for before, (a, b, _) in zip(splits[:-1], self.heads, strict=True)
        ):
            raise InputError(
                f"expected heads to follow each other from column 0, got {self.heads[:4]}"
            )
        self._configure([bits for _, _, bits in self.heads], beam, spherical_first, seed)

    def _configure(self, bits: Sequence[Bits], beam: int, spherical_first: bool, seed: int) -> None:
        self.beam = check_int("beam", beam, 1, MAX_BEAM)
        self.spherical_first = bool(spherical_first)
        self.seed = check_int("seed", seed, 0)
        self._bits = list(bits)
        self._n_stages = max(len(b) for b in bits)
        fields = [(s, h) for s in range(self._n_stages) for h, b in enumerate(bits) if len(b) > s]
        self._fields = fields  # (stage, head) of each column of codes
        self._sizes = np.array([1 << bits[h][s] for s, h in fields], np.int64)
        self._field_of = np.full((self._n_stages, len(bits)), -1, np.int64)
        for field, (stage, head) in enumerate(fields):
            self._field_of[stage, head] = field

    def _boundaries(self, d: int) -> Int64:
        """The splits for rows of d columns; subclasses only learn d from the data."""
        splits = np.array([0, *(b for _, b, _ in self.heads)], np.int64)
        if splits[-1] != d:
            raise InputError(f"expected x of shape (n, {splits[-1]}), got (n, {d})")
        return splits

    # -------------------------------------------------------------------------- codes' shape

    @property
    def n_stages(self) -> int:
        """Stages of the deepest head."""
        return self._n_stages

    @property
    def n_fields(self) -> int:
        """Columns of the code matrix: one for each codebook, stage by stage."""
        return len(self._fields)

    @property
    def alphabet_sizes(self) -> Int64:
        """(n_fields,) int64: codewords of each field's codebook."""
        return self._sizes

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` or ``load_arrays`` was called."""
        return hasattr(self, "codebooks_")

    @property
    def columns(self) -> Int64:
        """(n_fields,) the column at which each field's codewords begin."""
        self._check_fitted()
        return self._column

    def fields_of_stages(self, stages: int) -> int:
        """How many leading fields the first ``stages`` stages have."""
        return sum(stage < stages for stage, _ in self._fields)

    # ------------------------------------------------------------------------------- fitting

    def fit(self, x: Any) -> Self:
        """Learn all codebooks from the rows of x, (n, d); returns self.

        k-means for each head and stage on the residual that encoding leaves; at most 65536 rows
        (256 for each codeword, if those are more) are used, drawn by ``seed``. An added stage never
        raises the training error. Raises InputError for x not (n, d) or not finite,
        MissingDependencyError without faiss.
        """
        rows, _ = enter(x)
        splits = self._boundaries(rows.shape[1])
        most = ROWS_PER_CENTROID * int(self.alphabet_sizes.max(initial=256))
        if rows.shape[0] > most:
            rng = np.random.default_rng([self.seed, 0])
            rows = rows[np.sort(rng.choice(rows.shape[0], most, replace=False))]
        e = exponent(rows)
        rows = np.ldexp(rows, -e)  # of order 1 from here on
        offset = _offset(rows)
        books: dict[tuple[int, int], tuple[Half, int]] = {}
        for head, bits in enumerate(self._bits):
            part = slice(splits[head], splits[head + 1])
            if self.spherical_first and bits:
                offset[part] = 0.0  # directions are seen from the origin
            x_head = np.ascontiguousarray(rows[:, part] - offset[part])
            for stage, book in enumerate(self._fit_head(x_head, bits, head)):
                books[stage, head] = book
        self._set(
            splits,
            np.ldexp(offset, e),
            [books[field][0] for field in self._fields],
            np.array([books[field][1] + e for field in self._fields], np.int16),
        )
        return self

    def _fit_head(self, x: Float32, bits: Bits, head: int) -> list[tuple[Half, int]]:
        halves: list[tuple[Half, int]] = []
        books: list[Float32] = []
        greedy = np.zeros((x.shape[0], 1, 0), np.uint16)
        paths, residual = greedy, x
        for stage, n_bits in enumerate(bits):
            seed = (self.seed, 1 + head, stage)
            if self.spherical_first and stage == 0:
                book = train_centroids(x, 1 << n_bits, spherical=True, seed=seed)
                book *= nearest(x, book, "ip")[1].mean(dtype=np.float64) if x.shape[0] else 1.0
            else:  # from what all paths leave, not the best alone: more rows, and more typical
                sample = _sample_residuals(x, books, paths, ROWS_PER_CENTROID << n_bits, seed)
                book = train_centroids(sample, 1 << n_bits, seed=seed)
            half, e = _keep_useful(residual, *_to_half(book))
            halves.append((half, e))
            books.append(_from_half(half, e))
            if stage + 1 < len(bits):
                greedy = _extend_greedy(x, books, greedy)
                paths = _extend(x, books, paths, self.beam) if self.beam > 1 else greedy
                residual = _residuals_of(x, books, _better(x, books, greedy, paths))
        return halves

    def _set(self, splits: Int64, offset: Float32, halves: list[Half], exponents: Array) -> None:
        """Take over what was learned or loaded, and lay it out for the decoder."""
        self.splits_, self.offset_ = splits, offset
        self._halves, self._exponents = halves, exponents
        self.codebooks_ = []
        for (stage, head), half, e in zip(self._fields, halves, exponents, strict=True):
            book = np.ldexp(half.astype(np.float64), int(e))
            if stage == 0:
                book += offset[splits[head] : splits[head + 1]]
            self.codebooks_.append(np.clip(book, -LARGEST, LARGEST).astype(np.float32))
        self._table = np.concatenate(
            [np.empty(0, np.float32), *(b.ravel() for b in self.codebooks_)]
        )
        sizes = np.array([0, *(b.size for b in self.codebooks_)], np.int64)
        self._begin = np.cumsum(sizes)[:-1]
        self._column = np.array([splits[head] for _, head in self._fields], np.int64)
        self.largest_ = float(np.abs(self._table).max()) if len(self._table) else 1.0
        self.largest_ = max(self.largest_, float(np.abs(offset).max(initial=0.0)))
        self._widths = np.array([book.shape[1] for book in self.codebooks_], np.int64)
        self._added = np.array([stage > 0 for stage, _ in self._fields])
        edges = zip(self._bits, splits[:-1], splits[1:], strict=True)
        self._empty = [slice(int(start), int(stop)) for bits, start, stop in edges if not bits]

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError(f"call fit before using this {type(self).__name__}")

    # -------------------------------------------------------------------- encode and decode

    def encode(self, x: Any) -> Any:
        """Map each row to one code for each codebook.

        x: (n, d) float array or tensor, any scale. Returns (n, n_fields) uint8 (uint16 if a
        codebook has more than 256 codewords; int32 for those in torch), in x's library. Ties take
        the lowest index. O(n * beam * sum over fields of 2^bits * width) time; memory bounded by a
        block of rows. Raises NotFittedError before ``fit``; InputError if x is not (n, d) or not
        finite.
        """
        self._check_fitted()
        rows, back = enter(x, d=int(self.splits_[-1]))
        codes = np.empty((rows.shape[0], self.n_fields), self._code_dtype())

        def encode_block(start: int) -> None:
            block = slice(start, start + BLOCK_ROWS)
            for head, bits in enumerate(self._bits):
                fields = self._field_of[: len(bits), head]
                x_head = np.ascontiguousarray(
                    rows[block, self.splits_[head] : self.splits_[head + 1]]
                )
                if bits:
                    books = [self.codebooks_[field] for field in fields]
                    codes[block, fields] = _encode_head(x_head, books, self.beam)

        in_threads(encode_block, range(0, rows.shape[0], BLOCK_ROWS))
        return back(codes)

    def decode(self, codes: Any, *, stages: int | None = None) -> Any:
        """The float32 sum of the codewords, added in the order of the stages.

        codes: (n, n_fields) integers, array or tensor. ``stages`` decodes the first stages only;
        codes may then have just their leading fields. Returns (n, d) float32 in the library of
        codes, the same bits on every machine. O(n * d * stages). Raises NotFittedError before
        ``fit``; InputError for another shape or a code that is too large.
        """
        self._check_fitted()
        n_stages = (
            self.n_stages if stages is None else check_int("stages", stages, 1, self.n_stages)
        )
        n_used = self.fields_of_stages(n_stages)
        width = np.shape(codes)[1] if np.ndim(codes) == 2 else -1
        sizes = self.alphabet_sizes
        c, back = enter_codes(codes, sizes[:n_used] if width == n_used else sizes)
        return back(self.sum_codewords(c.astype(self._code_dtype(), copy=False), n_used))

    def sum_codewords(self, codes: Array, n_used: int) -> Float32:
        """``decode`` for checked codes, C-ordered, of the dtype that ``encode`` gives: their first
        ``n_used`` fields."""
        out = np.empty((len(codes), int(self.splits_[-1])), np.float32)
        for part in self._empty:
            out[:, part] = self.offset_[part]
        fields = (self._column[:n_used], self._widths, self._begin, self._added, self._table)
        if len(codes) <= BLOCK_ROWS:
            _sum_codewords(codes, *fields, out)
            return out

        def decode_block(start: int) -> None:
            block = slice(start, start + BLOCK_ROWS)
            _sum_codewords(codes[block], *fields, out[block])

        in_threads(decode_block, range(0, len(codes), BLOCK_ROWS))
        return out

    def _code_dtype(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if self.alphabet_sizes.max(initial=1) <= 256 else np.uint16

    # ------------------------------------------------------------------- config and storage

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {
            "heads": [[a, b, list(bits)] for a, b, bits in self.heads],
            "beam": self.beam,
            "spherical_first": self.spherical_first,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Inverse of ``get_config``; InputError for what the constructor does not take."""
        try:
            return cls(**config)
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"not a configuration of {cls.__name__}: {error}") from error

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    def arrays(self) -> dict[str, Array]:
        """What ``fit`` learned, at stored precision.

        ``codebooks`` float16, all fields' codebooks (2^bits, width) one after the other;
        ``exponents`` (n_fields,) int16, the power of two each is to be multiplied by; and where
        any is nonzero ``offset`` (d,) float32, added to the first stage of its head.
        """
        self._check_fitted()
        halves = [half.ravel() for half in self._halves]
        stored: dict[str, Array] = {
            "codebooks": np.concatenate([np.empty(0, np.float16), *halves]),
            "exponents": self._exponents,
        }
        if self.offset_.any():
            stored["offset"] = self.offset_
        return stored

    def load_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Inverse of ``arrays``; CorruptDataError for what ``arrays`` cannot have returned."""
        splits = self._stored_splits(arrays)
        d, widths = int(splits[-1]), np.diff(splits)
        shapes = [(1 << self._bits[h][s], int(widths[h])) for s, h in self._fields]
        sizes = [k * width for k, width in shapes]
        flat = stored_array(arrays, "codebooks", np.float16, (sum(sizes),))
        exponents = stored_array(arrays, "exponents", np.int16, (self.n_fields,))
        offset = np.zeros(d, np.float32)
        if "offset" in arrays:
            offset = stored_array(arrays, "offset", np.float32, (d,))
        if unknown := set(arrays) - self._stored_names():
            raise CorruptDataError(f"unexpected arrays {sorted(unknown)}")
        ends = np.cumsum(sizes, dtype=np.int64)
        halves = [
            flat[end - size : end].reshape(shape)
            for end, size, shape in zip(ends, sizes, shapes, strict=True)
        ]
        finite = np.isfinite(flat).all() and np.isfinite(offset).all()
        if not finite or np.abs(exponents.astype(np.int32)).max(initial=0) > MAX_EXPONENT:
            raise CorruptDataError("codebooks or offset are not finite")
        self._set(splits, offset, halves, exponents)
        return self

    def _stored_splits(self, arrays: Mapping[str, Array]) -> Int64:
        return self._boundaries(self.heads[-1][1])

    def _stored_names(self) -> set[str]:
        return {"codebooks", "exponents", "offset"}


class ResidualQuantizer(ProductResidualQuantizer):
    """Residual quantization of whole rows: each stage codes what the stages before left.

    Parameters
    ----------
    n_stages : number of stages.
    n_bits : bits of each stage, one number or one for each stage, 1..16.
    beam, spherical_first, seed : as for ``ProductResidualQuantizer``.
    """

    def __init__(
        self,
        n_stages: int = 4,
        *,
        n_bits: int | Sequence[int] = 8,
        beam: int = 1,
        spherical_first: bool = False,
        seed: int = 0,
    ) -> None:
        count = check_int("n_stages", n_stages, 1, MAX_STAGES)
        self._configure([bits_list("n_bits", n_bits, count)], beam, spherical_first, seed)
        self.n_bits = n_bits if isinstance(n_bits, int) else list(self._bits[0])

    def _boundaries(self, d: int) -> Int64:
        return np.array([0, d], np.int64)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {
            "n_stages": self.n_stages,
            "n_bits": self.n_bits,
            "beam": self.beam,
            "spherical_first": self.spherical_first,
            "seed": self.seed,
        }

    def _stored_splits(self, arrays: Mapping[str, Array]) -> Int64:
        size = stored_array(arrays, "codebooks", np.float16, None).size
        d, rest = divmod(size, int(self.alphabet_sizes.sum()))
        if rest or d == 0:
            raise CorruptDataError(f"codebooks of {size} floats fit no row of whole length")
        return self._boundaries(d)


# ----------------------------------------------------------------------------- argument checks


def _check_bits(bits: Any) -> Bits:
    if not isinstance(bits, (Sequence, np.ndarray)) or len(bits) > MAX_STAGES:
        raise InputError(f"expected at most {MAX_STAGES} stages of bits, got {bits!r}")
    return tuple(check_int("bits", b, 1, MAX_BITS) for b in bits)


def bits_list(name: str, n_bits: Any, count: int) -> Bits:
    """One number of bits for each of ``count`` codebooks, from one number or a sequence."""
    if isinstance(n_bits, (int, np.integer)):
        return (check_int(name, n_bits, 1, MAX_BITS),) * count
    if not isinstance(n_bits, (Sequence, np.ndarray)) or len(n_bits) != count:
        raise InputError(f"expected {name} to be one number or {count} of them, got {n_bits!r}")
    return tuple(check_int(name, b, 1, MAX_BITS) for b in n_bits)


def stored_array(
    arrays: Mapping[str, Array], name: str, dtype: type[Any], shape: tuple[int, ...] | None
) -> Array:
    """The named array if it has this dtype and shape (None: any of rank 1), or CorruptDataError."""
    if name not in arrays:
        raise CorruptDataError(f"array {name!r} is missing")
    array = arrays[name]
    if array.dtype != dtype or (array.ndim != 1 if shape is None else array.shape != shape):
        raise CorruptDataError(
            f"expected array {name!r} of {np.dtype(dtype).name} {shape or '(n,)'}, "
            f"got {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array)


# -------------------------------------------------------------------------- stored precision


def _to_half(book: Float32) -> tuple[Half, int]:
    """book as float16 times 2^e, the largest entry in [2^14, 2^15]: 11 bits for all entries down to
    2^-28 of it."""
    e = exponent(book) - 15
    return np.ldexp(book, -e).astype(np.float16), e


def _from_half(half: Half, e: int) -> Float32:
    return np.ldexp(half.astype(np.float32), e)


def _offset(x: Float32) -> Float32:
    """Column means where they matter: beyond 1/64 of the standard deviation, 0.001 dB."""
    if not x.shape[0]:
        return np.zeros(x.shape[1], np.float32)
    mean = x.mean(axis=0, dtype=np.float64)
    mean = np.where(np.abs(mean) > x.std(axis=0, dtype=np.float64) / 64, mean, 0.0)
    return mean.astype(np.float32)


def _sample_residuals(
    x: Float32, books: list[Float32], paths: Uint16, most: int, seed: Sequence[int]
) -> Float32:
    """What paths (n, beam, stages) leave of their rows of x: all, or ``most`` drawn at random."""
    n, beam, n_stages = paths.shape
    paths = paths.reshape(n * beam, 1, n_stages)
    picked = np.arange(n * beam)
    if n * beam > most:
        picked = np.sort(np.random.default_rng(seed).choice(n * beam, most, replace=False))
    return _residuals_of(x[picked // beam], books, paths[picked])


def _keep_useful(residual: Float32, half: Half, e: int) -> tuple[Half, int]:
    """The codebook, unless coding with it would raise the error (a residual that is rounding
    noise): then its least used codeword becomes zero, with which it cannot."""
    index, score = nearest(residual, _from_half(half, e))
    before = np.einsum("ij,ij->", residual, residual, dtype=np.float64)
    if score.sum(dtype=np.float64) > before:
        half = half.copy()
        half[np.bincount(index, minlength=half.shape[0]).argmin()] = 0.0
    return half, e


# ------------------------------------------------------------------ searching one head's codes


def _encode_head(x: Float32, books: list[Float32], beam: int) -> Array:
    """Codes (n, len(books)) of the rows of one head, x (n, width)."""
    e = comfortable_scale(books[0])
    if e:
        with np.errstate(over="ignore"):
            x = np.clip(np.ldexp(x, -e), -CLIP, CLIP)
        books = [np.ldexp(book, -e) for book in books]
    greedy = np.zeros((x.shape[0], 1, 0), np.uint16)
    for stage in range(len(books)):
        greedy = _extend_greedy(x, books[: stage + 1], greedy)
    if beam == 1 or len(books) == 1:
        return greedy[:, 0]
    paths = np.zeros((x.shape[0], 1, 0), np.uint16)
    for stage in range(len(books)):
        kept = beam if stage + 1 < len(books) else 1
        paths = _extend(x, books[: stage + 1], paths, kept)
    return _better(x, books, greedy, paths)[:, 0]


def _extend_greedy(x: Float32, books: list[Float32], paths: Uint16) -> Uint16:
    """paths (n, 1, stages) with the codeword nearest to what they leave of x appended."""
    index, _ = nearest(_residuals_of(x, books[:-1], paths), books[-1])
    return np.concatenate([paths, index.astype(np.uint16)[:, None, None]], axis=2)


def _extend(x: Float32, books: list[Float32], paths: Uint16, kept: int) -> Uint16:
    """The best ``kept`` of all extensions of paths (n, beam, stages) by one stage, best first."""
    (n, beam, n_stages), (k, width) = paths.shape, books[-1].shape
    out = np.empty((n, min(kept, beam * k), n_stages + 1), np.uint16)
    mean = books[-1].mean(axis=0)  # smaller numbers, smaller rounding errors
    book = books[-1] - mean
    columns = np.ascontiguousarray(book.T)
    energy = np.einsum("ij,ij->i", book, book)
    step = max(1, BLOCK_SCORES // (beam * k))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        residual = np.clip(_residuals_of(x[rows], books[:-1], paths[rows]) - mean, -CLIP, CLIP)
        if width <= DIRECT_MAX_D:
            distances = np.empty((residual.shape[0], k), np.float32)
            _all_distances(residual, columns, distances)
        else:
            distances = inner_products(residual, columns)
            _finish_distances(distances, np.einsum("ij,ij->i", residual, residual), energy)
        _select(distances.reshape(-1, beam, k), paths[rows], out[rows])
    return out


def _better(x: Float32, books: list[Float32], greedy: Uint16, paths: Uint16) -> Uint16:
    """For each row the first of its paths, or the greedy one where that leaves less. (n, 1, s)"""
    if paths is greedy:
        return greedy
    first = np.ascontiguousarray(paths[:, :1])
    errors = [
        np.einsum("ij,ij->i", r, r, dtype=np.float64)
        for r in (_residuals_of(x, books, first), _residuals_of(x, books, greedy))
    ]
    return np.where((errors[0] <= errors[1])[:, None, None], first, greedy)


def _residuals_of(x: Float32, books: list[Float32], paths: Uint16) -> Float32:
    """What each path leaves of its row: (n * beam, width) float32."""
    n, beam, n_stages = paths.shape
    if n_stages == 0:
        return x  # beam is 1
    out = np.empty((n * beam, x.shape[1]), np.float32)
    begin = np.cumsum([0, *(book.size for book in books)], dtype=np.int64)
    _residuals(x, np.concatenate([book.ravel() for book in books]), begin, paths, out)
    return out


@njit(cache=True, nogil=True)
def _residuals(x, table, begin, paths, out):  # type: ignore[no-untyped-def]
    """out[i * beam + b] = x[i] - (sum of the codewords of path b of row i, as the decoder adds)."""
    n, beam, n_stages = paths.shape
    width = x.shape[1]
    for i in range(n):
        for b in range(beam):
            r = out[i * beam + b]
            at = begin[0] + np.int64(paths[i, b, 0]) * width
            for j in range(width):
                r[j] = table[at + j]
            for s in range(1, n_stages):
                at = begin[s] + np.int64(paths[i, b, s]) * width
                for j in range(width):
                    r[j] += table[at + j]
            for j in range(width):
                r[j] = x[i, j] - r[j]


@njit(cache=True, nogil=True)
def _all_distances(x, columns, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        squared_distances(x[i], columns, out[i])


@njit(cache=True, nogil=True)
def _finish_distances(products, norms, energies):  # type: ignore[no-untyped-def]
    """In place <r, c> -> |r|^2 + |c|^2 - 2 <r, c>, at least 0."""
    for i in range(products.shape[0]):
        for c in range(products.shape[1]):
            value = norms[i] + energies[c] - np.float32(2) * products[i, c]
            products[i, c] = value if value > np.float32(0) else np.float32(0)


@njit(cache=True, nogil=True)
def _select(distances, paths, out):  # type: ignore[no-untyped-def]
    """For each row the paths of least distance, extended; ties take the lowest path, then code.

    Distances (n, beam, k), >= 0 and used up, are compared as integers: see
    clustering._nearest_direct.
    The least of each path is kept, so one more winner costs two passes over one path's k.
    """
    n, beam, k = distances.shape
    n_stages = paths.shape[2]
    bits = distances.view(np.int32)
    least = np.empty(beam, np.int32)
    used = np.int32(0x7FFFFFFF)  # above the pattern of any float
    for i in range(n):
        for b in range(beam):
            low = used
            for c in range(k):
                low = min(low, bits[i, b, c])
            least[b] = low
        for place in range(out.shape[1]):
            b = 0
            for other in range(1, beam):
                if least[other] < least[b]:
                    b = other
            low = least[b]
            at = np.int32(k)
            for c in range(k):
                at = min(at, np.int32(c) if bits[i, b, c] == low else np.int32(k))
            for s in range(n_stages):
                out[i, place, s] = paths[i, b, s]
            out[i, place, n_stages] = at
            bits[i, b, at] = used
            low = used
            for c in range(k):
                low = min(low, bits[i, b, c])
            least[b] = low


# ------------------------------------------------------------------------------------ decoding


@njit(cache=True, nogil=True)
def _sum_codewords(codes, columns, widths, begins, added, table, out):  # type: ignore[no-untyped-def]
    """out[i, head] = ((stage 1 + stage 2) + stage 3) ..., field by field for a few rows at a time.

    Loops of exactly eight turn into one SIMD move each; without them narrow heads take twice as
    long.
    """
    for start in range(0, codes.shape[0], 64):
        for f in range(columns.size):
            column, width, begin, adds = columns[f], widths[f], begins[f], added[f]
            for i in range(start, min(start + 64, codes.shape[0])):
                at = begin + np.int64(codes[i, f]) * width
                j = 0
                while j + 8 <= width:
                    if adds:
                        for e in range(8):
                            out[i, column + j + e] += table[at + j + e]
                    else:
                        for e in range(8):
                            out[i, column + j + e] = table[at + j + e]
                    j += 8
                while j < width:
                    value = table[at + j]
                    out[i, column + j] = out[i, column + j] + value if adds else value
                    j += 1


# ---------------------------------------------------------------------------------- allocation


def allocate_bits(
    variances: npt.ArrayLike, total_bits: int, *, max_bits: int = 8, n_stages: int = 4
) -> list[Head]:
    """Cut components into heads that deserve about n_stages * max_bits bits each, by reverse
    water-filling.

    variances: (d,) of the components in their order, decreasing for a KLT. total_bits: for all
    components together. A component of variance v deserves max(0, log2(v / water) / 2) bits, the
    water level being the one that spends them all (Gaussian, high-rate theory); heads are runs of
    components, closed where the sum passes the next multiple of their share. Components under
    water at the end form a head without bits. More stages make wider heads: better codes, but
    n_stages times the codebook entries.

    Returns heads for ``ProductResidualQuantizer``, (start, stop, bits of each stage), bits summing
    to at most total_bits. O(d log d). Raises InputError for variances not finite, negative or not
    (d,).

    Source: Cover and Thomas, "Elements of Information Theory", section 10.3.3 (reverse
    water-filling).
    """
    v = np.asarray(variances, np.float64)
    if v.ndim != 1 or not v.size or not np.isfinite(v).all() or (v < 0).any():
        raise InputError("expected variances (d,), finite and not negative")
    total = check_int("total_bits", total_bits, 0)
    max_bits = check_int("max_bits", max_bits, 1, MAX_BITS)
    share = max_bits * check_int("n_stages", n_stages, 1, MAX_STAGES)
    deserved = np.cumsum(_water_filling(v, total))
    n_heads = -(-total // share)
    if n_heads == 0 or deserved[-1] == 0:
        return [(0, v.size, ())]
    goals = np.arange(1, n_heads + 1) * (deserved[-1] / n_heads)
    middles = (deserved[:-1] + deserved[1:]) / 2
    edges = np.unique([0, *(np.searchsorted(middles, goals) + 1)])  # cuts nearest to the goals
    ideal = np.diff(deserved[edges[1:] - 1], prepend=0.0)
    # A lone component may take more than a share; a wider head rather leaves bits to the others.
    most = np.where(np.diff(edges) == 1, total, share)
    bits = np.minimum(ideal, most).astype(np.int64)
    for _ in range(total - int(bits.sum())):
        wanting = np.where(bits < most, ideal - bits, -np.inf)
        if wanting.max() == -np.inf:
            break
        bits[wanting.argmax()] += 1
    heads = [
        (int(a), int(b), even_stages(int(n), max_bits))
        for a, b, n in zip(edges[:-1], edges[1:], bits, strict=True)
    ]
    return heads if edges[-1] == v.size else [*heads, (int(edges[-1]), v.size, ())]


def even_stages(bits: int, max_bits: int) -> Bits:
    """bits in as few stages as possible, as even as possible, the larger ones first."""
    n = -(-bits // max_bits)
    return tuple(bits // n + (stage < bits % n) for stage in range(n))


def _water_filling(v: npt.NDArray[np.float64], total: float) -> npt.NDArray[np.float64]:
    """Bits for each component, summing to total (0 if no component varies)."""
    log_v = np.log2(np.sort(v[v > 0])[::-1]) / 2
    if not log_v.size:
        return np.zeros_like(v)
    # With the m largest above water, log2(water) / 2 = (sum of their log_v - total) / m.
    levels = (np.cumsum(log_v) - total) / np.arange(1, log_v.size + 1)
    m = int(np.flatnonzero(log_v >= levels)[-1])
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(np.log2(v) / 2 - levels[m], 0.0), np.float64)
