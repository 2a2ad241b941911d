"""Inner products of queries with coded rows, from the codes: no row is decoded or rotated back.

A decoded row is x = 2^e f * r (S_k c + mean_k), with radius r, class k, synthesis matrix S_k,
column factors f and coefficients c (docs/architecture.md). So

    <q, x> = 2^e r (<S_k^T (f q), c> + <mean_k, f q>)

and it is the queries that are rotated, once for each class. What is left for a row is to look its
coefficients up and to multiply: 2 m operations a query in a matrix product, or, where codewords
are few and queries too, one look-up a code in tables of their products (ADC).

Sums are float32, so they are good to a known margin, and ``search`` decides within it.

Source: Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", IEEE TPAMI 2011
(asymmetric distances).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Float32
from .bitshift import BitshiftQuantizer
from .entropy.range_coder import kernel
from .frames import Frames
from .polar import SEARCHED, PolarQuantizer
from .rotation import Rotation

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Uint8 = npt.NDArray[np.uint8]

SEGMENT_ROWS = 512  # rows scored at a time: their coefficients stay in the second cache
HEAD_BITS = 16  # of a circle that are repeated before its start; windows have at most 12
FEW_QUERIES = 16  # for so many, tables are faster than coefficients and their matrix product
FUSED_QUERIES = 4  # so few are multiplied with entries of tables as they are looked up
LEADING_SHARE = 0.8  # of the variance is in the leading coefficients
ULP = 2.0**-23  # of float32, and twice what a rounding loses
# What rounding decoded numbers to a dtype changes: by a share of them, or by so much at least; and
# the largest that are certainly not held at a limit.
NARROW = {"float16": (2.0**-11, 2.0**-25, 2.0**15), "bfloat16": (2.0**-9, 2.0**-134, 2.0**126)}


@kernel
def _windows(
    data: Uint8, starts: Int64, kinds: Int64, tables: Float32, state_bits: int, out: Float32
) -> None:
    """Table entries of bitshift codes. data: (n_bytes, n) circles of n rows, byte by byte, each
    behind HEAD_BITS bits of its end. The states of component u are the windows of ``state_bits``
    bits from bit starts[u] on; they choose out[u] (n,) from tables[kinds[u]]."""
    mask = (np.uint32(1) << np.uint32(state_bits)) - np.uint32(1)
    for u in range(len(starts)):
        at = starts[u] >> 3
        shift = np.uint32(24 - (starts[u] & 7) - state_bits)
        first, second, third = data[at], data[at + 1], data[at + 2]
        table, values = tables[kinds[u]], out[u]
        for i in range(len(values)):
            word = np.uint32(first[i]) << np.uint32(16) | np.uint32(second[i]) << np.uint32(8)
            values[i] = table[((word | np.uint32(third[i])) >> shift) & mask]


@kernel
def _add_windows(
    data: Uint8,
    starts: Int64,
    kinds: Int64,
    tables: Float32,
    state_bits: int,
    weights: Float32,
    entries: Float32,
    out: Float32,
) -> None:
    """``_windows`` for few queries: out[q] += weights[q, u] * entries of component u, for all u one
    after the other. entries: (n,), room to work in."""
    mask = (np.uint32(1) << np.uint32(state_bits)) - np.uint32(1)
    for u in range(len(starts)):
        at = starts[u] >> 3
        shift = np.uint32(24 - (starts[u] & 7) - state_bits)
        first, second, third = data[at], data[at + 1], data[at + 2]
        table = tables[kinds[u]]
        for i in range(len(entries)):
            word = np.uint32(first[i]) << np.uint32(16) | np.uint32(second[i]) << np.uint32(8)
            entries[i] = table[((word | np.uint32(third[i])) >> shift) & mask]
        for q in range(len(out)):
            weight, sums = weights[q, u], out[q]
            for i in range(len(entries)):
                sums[i] += weight * entries[i]


@kernel
def _circles(codes: Uint8, rows: Int64, n_bits: int, state_bits: int, out: Uint8) -> None:
    """Circles of chosen rows of codes (n, n_bytes), the last of which is short, -> (2 + n_bytes +
    2, n_rows): their last ``state_bits`` bits, themselves, and zeros, all aligned to the left."""
    n_bytes = codes.shape[1]
    spare = 8 * n_bytes - n_bits
    for i in range(len(rows)):
        row = codes[rows[i]]
        tail, seen = np.int64(row[n_bytes - 1]), 8 - spare
        at = n_bytes - 2
        while seen < state_bits:
            tail |= np.int64(row[at]) << seen
            seen += 8
            at -= 1
        out[0, i] = (tail >> 8) & 255
        out[1, i] = tail & 255
        for b in range(n_bytes - 1):
            out[2 + b, i] = row[b]
        out[1 + n_bytes, i] = (np.int64(row[n_bytes - 1]) << spare) & 255
        out[2 + n_bytes, i] = 0
        out[3 + n_bytes, i] = 0


@kernel
def add_from_tables(tables: Float32, codes: Array, out: Float32) -> None:
    """out[q, i] += tables[q, 0, codes[0, i]] + tables[q, 1, codes[1, i]] + ..., one term after the
    other in float32. tables: (n_queries, n_fields, most codewords); codes: (n_fields, n)."""
    for q in range(tables.shape[0]):
        sums = out[q]
        for f in range(codes.shape[0]):
            table, field = tables[q, f], codes[f]
            for i in range(len(sums)):
                sums[i] += table[field[i]]


class Segment(NamedTuple):
    """Rows of one class, ready to be scored: at most SEGMENT_ROWS of them."""

    rows: Int64  # (n,) their numbers
    frame: int
    data: Array  # (.., n): circles, lattice points or codes
    radius: Float32  # (n,), all 1 where rows have none
    reach: float  # largest norm of the coefficients of a row
    least: float  # radius that is not zero

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.rows.nbytes + self.data.nbytes + self.radius.nbytes)


class _Frame(NamedTuple):
    """How coefficients of one class become rows."""

    matrix: Float32 | None  # (d, m)
    mean: Float32  # (d,)
    norm: float  # no row is longer than this times its coefficients, but for the mean


class Turned(NamedTuple):
    """Queries in the frame of one class."""

    a: Float32  # (n_queries, m): <q, x> = <a, c> + b
    b: Float32  # (n_queries, 1)
    margin: Float64  # (n_queries,) of that sum, for coefficients of norm 1
    fixed: Float64  # (n_queries,) and whatever they are
    least: Float64  # (n_queries,) and whatever the radius is
    tables: Float32 | None  # (n_queries, n_fields, codewords)


class Scan:
    """What scores need of one quantizer. ``n_leading``: coefficients that hold most of the variance
    (in the order of codes; of codebooks, the fields of the first stage)."""

    def __init__(self, quantizer: PolarQuantizer, dtype: str) -> None:
        self.quantizer, fine = quantizer, quantizer.fine_
        e = quantizer.exponent_
        unit, smallest, largest = NARROW.get(dtype, (0.0, 0.0, 2.0**127))
        self._narrow = unit
        self._smallest = float(np.ldexp(smallest * np.sqrt(quantizer.d_), -e))
        self._largest = float(np.ldexp(largest, -e))
        self._frames = _frames_of(quantizer.rotation_)
        self._m = quantizer.rotation_.n_components_
        self._bitshift: BitshiftQuantizer | None = fine if quantizer.fine == "bitshift" else None
        self.grain = 0.0  # coefficients are this far from those decoded, at most, all together
        if self._bitshift is not None:
            self.grain = 0.5 * self._bitshift.step_ * np.sqrt(self._m)
        elif quantizer.fine == "codebook" and self._frames[0].matrix is not None:
            self.grain = 0.5 * quantizer.grid_unit() * np.sqrt(self._m)

    @staticmethod
    def fits(quantizer: PolarQuantizer) -> bool:
        """Whether rows are just what the formula says: not where numbers are held at walls."""
        return quantizer.low_ is None and quantizer.high_ is None

    @property
    def n_frames(self) -> int:
        """Number of classes of rows."""
        return len(self._frames)

    # -- rows ---------------------------------------------------------------------------------
    def segments(self, codes: Array, first: int, left_out: Int64) -> Iterator[Segment]:
        """Codes (n, n_fields) of the rows from number ``first`` on, as segments; without those
        numbered ``left_out``, counted from 0."""
        wanted = np.ones(len(codes), bool)
        wanted[left_out] = False
        row_class, radius, data = self._parts(codes)
        order = np.flatnonzero(wanted)
        order = order[np.argsort(row_class[order], kind="stable")]
        cuts = np.flatnonzero(np.diff(row_class[order])) + 1
        for mine in np.split(order, cuts):
            for start in range(0, len(mine), SEGMENT_ROWS):
                some = mine[start : start + SEGMENT_ROWS]
                yield self._segment(some, first, int(row_class[some[0]]), radius, data)

    def _parts(self, codes: Array) -> tuple[Int64, Float32, Array]:
        """Class and radius of each row, and what its coefficients are made of."""
        quantizer = self.quantizer
        row_class, radius = np.zeros(len(codes), np.int64), np.ones(len(codes), np.float32)
        if quantizer.radius_ is not None:
            radius, codes = quantizer.radius_.decode(codes[:, 0]).astype(np.float32), codes[:, 1:]
        if self._bitshift is None and quantizer.fine in SEARCHED:
            row_class, data = quantizer.fine_.decode(codes)
        elif self._bitshift is not None and len(self._frames) > 1:
            row_class, data = codes[:, 0].astype(np.int64), np.ascontiguousarray(codes[:, 1:])
        else:
            data = codes
        return row_class, radius, data

    def _segment(
        self, some: Int64, first: int, frame: int, radius: Float32, data: Array
    ) -> Segment:
        if self._bitshift is not None:
            own = np.empty((4 + data.shape[1], len(some)), np.uint8)
            _circles(data, some, self._bitshift.row_bits_, _state_bits(self._bitshift), own)
        else:
            own = np.ascontiguousarray(data[some].T)
            if own.dtype == np.int32 and own.size and max(own.max(), -own.min()) < 128:
                own = own.astype(np.int8)
        strength = radius[some]
        least = float(strength.min(initial=1.0, where=strength > 0))
        part = Segment(some + first, frame, own, strength, 0.0, least)
        c = self.coefficients(part, self._m)
        square = np.einsum("ij,ij->j", c, c, dtype=np.float64)
        return part._replace(reach=float(np.sqrt(square.max(initial=0.0))))

    def n_leading(self, frame: int) -> int:
        """How many of its coefficients hold LEADING_SHARE of the variance of a class."""
        if self.quantizer.fine == "codebook":
            return self._m
        if self._bitshift is not None:
            variance = np.square(self._bitshift.circle(frame).scale.astype(np.float64))
        elif self._frames[0].matrix is None:
            return self._m
        else:
            variance = np.atleast_2d(self.quantizer.rotation_.variances_)[frame]
        share = np.cumsum(variance) / max(float(variance.sum()), 1e-300)
        return min(len(share), int(np.searchsorted(share, LEADING_SHARE)) + 1)

    def columns(self, frame: int, n_leading: int) -> slice | Int64:
        """Which coefficients ``coefficients`` has: all but those that a class has no bits for."""
        if self._bitshift is not None:
            return self._bitshift.circle(frame).columns[:n_leading]
        return slice(0, n_leading)

    def coefficients(self, part: Segment, n_leading: int) -> Float32:
        """The first so many coefficients of a segment's rows, one a line: (.., n) float32."""
        if self._bitshift is not None:
            starts, kinds, scale = self._places(part.frame, n_leading)
            out = np.empty((len(starts), part.data.shape[1]), np.float32)
            tables, state_bits = self._bitshift.values, _state_bits(self._bitshift)
            _windows(part.data, starts, kinds, tables, state_bits, out)
            out *= scale[:, None]
            return out
        if self.quantizer.fine in SEARCHED:
            step = np.float32(self.quantizer.fine_.step_)
            return part.data[:n_leading].astype(np.float32) * step
        c = self.quantizer.decode_fine(np.ascontiguousarray(part.data.T), None)
        return np.ascontiguousarray(c.T[:n_leading])

    def _places(self, frame: int, n_leading: int) -> tuple[Int64, Int64, Float32]:
        """Of the first components of a class with bits: where their windows start, which table
        they look at, and their scales."""
        assert self._bitshift is not None
        circle = self._bitshift.circle(frame)
        bits = circle.bits[:n_leading]
        starts = HEAD_BITS + np.cumsum(bits) - _state_bits(self._bitshift)
        return starts, bits - 1, circle.scale[:n_leading]

    # -- queries ------------------------------------------------------------------------------
    def turn(self, queries: Float64, few: bool) -> list[Turned]:
        """Queries (n_queries, d) in the frame of each class. few: with tables, where they help."""
        weighted = self.quantizer.columns_ is not None
        q = queries * self.quantizer.column_factors() if weighted else queries
        return [self._turn(q, frame, few) for frame in range(len(self._frames))]

    def _turn(self, q: Float64, number: int, few: bool) -> Turned:
        frame = self._frames[number]
        narrow = q.astype(np.float32)
        a = narrow if frame.matrix is None else narrow @ frame.matrix
        b = q @ frame.mean.astype(np.float64)
        size = np.sqrt(np.einsum("ij,ij->i", q, q))
        turned = np.sqrt(np.einsum("ij,ij->i", a, a, dtype=np.float64))
        mean = float(np.sqrt(np.square(frame.mean, dtype=np.float64).sum()))
        # of the matrix product, of the rotation of queries, and of decoding itself
        terms = max(a.shape[1], self.quantizer.d_) + 16
        loss = 16 * ULP + self._narrow
        margin = terms * ULP * (turned + size) + loss * size * frame.norm
        fixed = turned * self.grain + loss * size * mean
        tables = None
        if few and self.quantizer.fine == "codebook":
            tables, without = self._tables(a)
            b += without
        least = self._smallest * size
        return Turned(a, b.astype(np.float32)[:, None], margin, fixed, least, tables)

    def _tables(self, a: Float32) -> tuple[Float32, Float32]:
        """Products with all codewords, and those of columns that no codeword covers."""
        fine = self.quantizer.fine_
        without = np.zeros(len(a), np.float32)
        for start, stop, bits in fine.heads:
            if not bits:
                without += a[:, start:stop] @ fine.offset_[start:stop]
        tables = np.zeros((len(a), fine.n_fields, int(fine.alphabet_sizes.max())), np.float32)
        for f, (book, column) in enumerate(zip(fine.codebooks_, fine.columns, strict=True)):
            part = a[:, column : column + book.shape[1]]
            tables[:, f, : len(book)] = part @ book.T
        return tables, without

    def margin(self, part: Segment, turned: Turned) -> Float64:
        """(n_queries,) by how much ``scores`` of a segment may differ from those of decoded rows,
        for a radius of 1."""
        frame = self._frames[part.frame]
        length = frame.norm * part.reach + float(np.linalg.norm(frame.mean))
        if length * float(part.radius.max(initial=0.0)) >= self._largest:
            return np.full(len(turned.b), np.inf)
        return turned.margin * part.reach + turned.fixed + turned.least / part.least

    def scores(self, part: Segment, turned: Turned, leading: bool) -> Float32:
        """(n_queries, n) float32 <q, x> for the rows of a segment before their radius."""
        if turned.tables is not None:
            fields = len(part.data)
            if leading:
                fields = self.quantizer.fine_.fields_of_stages(1)
            out = np.repeat(turned.b, part.data.shape[1], axis=1)
            add_from_tables(turned.tables[:, :fields], part.data[:fields], out)
            return out
        count = self.n_leading(part.frame) if leading else self._m
        a = turned.a[:, self.columns(part.frame, count)]
        if self._bitshift is None or len(a) > FUSED_QUERIES:
            out = a @ self.coefficients(part, count)
            out += turned.b
            return out
        starts, kinds, scale = self._places(part.frame, count)
        out = np.repeat(turned.b, part.data.shape[1], axis=1)
        tables, state_bits = self._bitshift.values, _state_bits(self._bitshift)
        room = np.empty(part.data.shape[1], np.float32)
        _add_windows(part.data, starts, kinds, tables, state_bits, a * scale, room, out)
        return out


def _state_bits(fine: BitshiftQuantizer) -> int:
    return int(fine.tables_.shape[1]).bit_length() - 1


def _frames_of(rotation: Rotation | Frames) -> list[_Frame]:
    if isinstance(rotation, Frames):
        unit = np.float32(2.0**-rotation.common.exponent_)
        matrices = [rotation.matrix_of(k) * unit for k in range(rotation.n_classes)]
        return [
            _Frame(matrix, mean, float(np.linalg.norm(matrix)))
            for matrix, mean in zip(matrices, rotation.means_, strict=True)
        ]
    mean = rotation.mean_ if rotation.center else np.zeros(rotation.d_, np.float32)
    if rotation.matrix_ is None:
        return [_Frame(None, mean, 1.0)]
    matrix = rotation.matrix_ * np.float32(2.0**-rotation.exponent_)
    return [_Frame(matrix, mean, float(np.linalg.norm(matrix)))]
