"""Inner products of queries with coded rows, from the codes: no row is decoded or rotated back.

A decoded row is x = 2^e f * r (S_k c + mean_k), with radius r, class k, synthesis matrix S_k,
column factors f and coefficients c (docs/architecture.md). So

    <q, x> = 2^e r (<S_k^T (f q), c> + <mean_k, f q>)

and it is the queries that are rotated, once for each class. What is left for a row is to look its
coefficients up and to multiply: 2 m operations a query in a matrix product, or, where codewords
are few and queries too, one look-up a code in tables of their products (ADC).

Sums are float32, so they are good to a known margin, and ``search`` decides within it.

A few queries are answered from ``Heads``: the leading coefficients of each row as bytes, and the
norm of the others. What these add to <a, c> is at most the product of both norms (Cauchy-Schwarz),
and only rows that this lets through are scored in full.

Source: Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", IEEE TPAMI 2011
(asymmetric distances).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

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
Int8 = npt.NDArray[np.int8]
Uint8 = npt.NDArray[np.uint8]

SEGMENT_ROWS = 512  # rows scored at a time: their coefficients stay in the second cache
HEAD_BITS = 16  # of a circle that are repeated before its start; windows have at most 12
FEW_QUERIES = 16  # for so many, tables are faster than coefficients and their matrix product
FUSED_QUERIES = 4  # so few are multiplied with entries of tables as these are looked up
LEADING_SHARE = 0.8  # of the variance is in the leading coefficients
HEAD_SHARE = 0.88  # and in those kept as bytes for few queries,
SECOND_SHARE = 0.97  # and in those that are looked up first where bytes do not tell enough
MOST_HEADS = 0.6  # which are no more than this share of a row's
HEADS_AT_ONCE = 4  # a kernel adds; their number is a multiple of it
HEAD_LIMIT = 127  # of a byte
UPWARDS = np.float32(1 + 2.0**-20)  # times a bound in float32 is certainly one
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
def bounds_of(heads: Heads, aim: Aim, slack: Float32, out: Float32) -> None:
    """Upper bounds (n,) of <a, c> + b for the rows of a group and one query, whose parts' sums may
    be off by ``slack`` (n_parts,)."""
    for s in range(len(heads.frames)):
        first, frame = heads.starts[s], heads.frames[s]
        n = heads.starts[s + 1] - first
        sums, tail = out[first : first + n], heads.tails[0, first : first + n]
        least, more = aim.b[frame] + slack[s], aim.beyond[0, frame]
        for i in range(n):
            sums[i] = least + tail[i] * more
        weights, place = aim.heads[frame], heads.at[s]
        for u in range(0, aim.n_heads[frame], HEADS_AT_ONCE):
            w0, w1, w2, w3 = weights[u], weights[u + 1], weights[u + 2], weights[u + 3]
            q0 = heads.data[place : place + n]
            q1 = heads.data[place + n : place + 2 * n]
            q2 = heads.data[place + 2 * n : place + 3 * n]
            q3 = heads.data[place + 3 * n : place + 4 * n]
            for i in range(n):
                sums[i] += (w0 * np.float32(q0[i]) + w1 * np.float32(q1[i])) + (
                    w2 * np.float32(q2[i]) + w3 * np.float32(q3[i])
                )
            place += HEADS_AT_ONCE * n


@kernel
def windows_of(heads: Heads, aim: Aim, s: int, i: int, begin: int, end: int, total: Any) -> Any:
    """``total`` plus what components ``begin`` to ``end`` of row i of part s add to <a, c>, one
    after the other; from b and of all components: the sum that ``_add_windows`` forms."""
    first, frame = heads.starts[s], heads.frames[s]
    n = heads.starts[s + 1] - first
    base = heads.n_lines * first + i
    mask = (np.uint32(1) << np.uint32(aim.state_bits)) - np.uint32(1)
    for u in range(begin, end):
        start = aim.starts[frame, u]
        place = base + (start >> 3) * n
        word = np.uint32(heads.circles[place]) << np.uint32(16)
        word |= np.uint32(heads.circles[place + n]) << np.uint32(8)
        word |= np.uint32(heads.circles[place + 2 * n])
        shift = np.uint32(24 - (start & 7) - aim.state_bits)
        total += aim.weights[frame, u] * aim.tables[aim.kinds[frame, u], (word >> shift) & mask]
    return total


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


class Heads(NamedTuple):
    """Leading coefficients of a group of bitshift rows, part by part; what kernels read for a few
    queries. Beside the codes, they take a byte for each of them, and 8 for what is beyond."""

    data: Int8  # of part s (n_heads, n), from at[s] on, in units of Scan.head_units
    at: Int64  # (n_parts,)
    tails: Float32  # (2, n) norm of the coefficients beyond these, and beyond SECOND_SHARE
    circles: Uint8  # of part s (n_lines, n), from n_lines * starts[s] on
    n_lines: int
    rows: Int64  # (n,) numbers of rows, and radius: those of all parts
    radius: Float32
    starts: Int64  # (n_parts + 1,) where parts begin among them
    frames: Int64  # (n_parts,)
    reach: Float64  # (n_parts,) and the next two: as of segments; largest radius
    least: Float64
    most: Float64


class Doubt(NamedTuple):
    """What sums of one query may be off by, (K,): see ``Turned``; and for rounding heads."""

    margin: Float64
    fixed: Float64
    least: Float64
    heads: Float64


class Aim(NamedTuple):
    """One query, as kernels read it: K classes, u components with bits, most of them h."""

    b: Float32  # (K,)
    heads: Float32  # (K, most heads) what units of heads count
    n_heads: Int64  # (K,)
    n_second: Int64  # (K,)
    beyond: Float32  # (2, K) norm of the query where ``Heads.tails`` has that of rows
    weights: Float32  # (K, most components) what table entries count
    starts: Int64  # (K, most components) where windows start, and which table they look at
    kinds: Int64
    n_windows: Int64  # (K,)
    tables: Float32
    state_bits: int


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

    # -- few queries --------------------------------------------------------------------------
    @cached_property
    def n_heads(self) -> Int64 | None:
        """Of each class, how many components ``Heads`` have; None where that is no help: where they
        would be most of a row, or its codes are of another kind."""
        if self._bitshift is None:
            return None
        counts = self._n_holding(HEAD_SHARE)
        counts = -(-counts // HEADS_AT_ONCE) * HEADS_AT_ONCE
        most = [MOST_HEADS * len(self._bitshift.circle(k).bits) for k in range(self.n_frames)]
        return counts if (counts <= most).all() else None

    def _n_holding(self, share: float) -> Int64:
        """How many first components with bits hold so much of the variance of each class."""
        assert self._bitshift is not None
        counts = []
        for frame in range(self.n_frames):
            variance = np.square(self._bitshift.circle(frame).scale.astype(np.float64))
            held = np.cumsum(variance) / max(float(variance.sum()), 1e-300)
            counts.append(min(int(np.searchsorted(held, share)) + 1, len(held)))
        return np.array(counts, np.int64)

    def _head_units(self, frame: int) -> Float32:
        """What a unit of each of a class's heads is: (n_heads,)."""
        assert self.n_heads is not None
        _, kinds, scale = self._places(frame, int(self.n_heads[frame]))
        assert self._bitshift is not None
        largest = np.abs(self._bitshift.values).max(axis=1)[kinds]
        units = scale * largest * np.float32(1.001 / HEAD_LIMIT)
        return np.asarray(np.maximum(units, 1e-30), np.float32)

    def with_heads(self, parts: list[Segment]) -> tuple[list[Segment], Heads]:
        """Heads of the rows of segments, and these segments as views of what heads hold. O(n m)."""
        assert self.n_heads is not None
        sizes = np.array([len(part.rows) for part in parts], np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        frames = np.array([part.frame for part in parts], np.int64)
        at = np.concatenate([[0], np.cumsum(sizes * self.n_heads[frames])])
        n_lines = parts[0].data.shape[0] if parts else 0
        circles = np.empty(n_lines * int(starts[-1]), np.uint8)
        data, tails = np.empty(int(at[-1]), np.int8), np.empty((2, int(starts[-1])), np.float32)
        n_second = self._n_holding(SECOND_SHARE)
        rows = np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)])
        radius = np.concatenate([np.zeros(0, np.float32), *(part.radius for part in parts)])
        views = []
        for s, part in enumerate(parts):
            n, mine = int(sizes[s]), slice(int(starts[s]), int(starts[s + 1]))
            own = circles[n_lines * mine.start : n_lines * mine.stop].reshape(n_lines, n)
            own[:] = part.data
            c, count = self.coefficients(part, self._m), int(self.n_heads[part.frame])
            units = self._head_units(part.frame)[:, None]
            heads = data[at[s] : at[s + 1]].reshape(count, n)
            np.rint(c[:count] / units, out=heads, casting="unsafe")
            for tail, begin in zip(tails, (count, int(n_second[part.frame])), strict=True):
                rest = c[begin:]
                square = np.einsum("ij,ij->j", rest, rest, dtype=np.float64)
                tail[mine] = np.sqrt(square) * UPWARDS
            views.append(part._replace(rows=rows[mine], radius=radius[mine], data=own))
        reach, least = np.array([(part.reach, part.least) for part in parts]).reshape(-1, 2).T
        most = np.array([float(part.radius.max(initial=0.0)) for part in parts])
        return views, Heads(
            data, at[:-1], tails, circles, n_lines, rows, radius, starts, frames, reach, least, most
        )

    def aim(self, turned: list[Turned], i: int) -> tuple[Aim, Doubt]:
        """Query i of those turned, for kernels, and what its sums may be off by."""
        assert self.n_heads is not None
        assert self._bitshift is not None
        places = [self._places(frame, self._m) for frame in range(self.n_frames)]
        shape = len(places), max(len(starts) for starts, _, _ in places)
        weights, starts = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        kinds, heads = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        beyond, off = np.zeros((2, len(places)), np.float32), np.zeros(len(places))
        n_second = self._n_holding(SECOND_SHARE)
        for frame, (start, kind, scale) in enumerate(places):
            u, h = len(start), int(self.n_heads[frame])
            a = turned[frame].a[i, self.columns(frame, self._m)]
            weights[frame, :u], starts[frame, :u], kinds[frame, :u] = a * scale, start, kind
            units = self._head_units(frame)
            heads[frame, :h] = a[:h] * units
            off[frame] = 0.501 * float(np.abs(a[:h]).astype(np.float64) @ units)
            for line, begin in zip(beyond, (h, int(n_second[frame])), strict=True):
                line[frame] = np.linalg.norm(a[begin:].astype(np.float64)) * UPWARDS
        b = np.array([one.b[i, 0] for one in turned], np.float32)
        n_windows = np.array([len(starts) for starts, _, _ in places], np.int64)
        aim = Aim(
            b, heads, self.n_heads, n_second, beyond, weights, starts, kinds, n_windows,
            self._bitshift.values, _state_bits(self._bitshift),
        )  # fmt: skip
        margin, fixed, least = np.array([(t.margin[i], t.fixed[i], t.least[i]) for t in turned]).T
        return aim, Doubt(margin, fixed, least, off)

    def margins(self, heads: Heads, doubt: Doubt) -> tuple[Float32, Float32]:
        """What ``margin`` is for the parts of a group, and what bounds from heads allow for: both
        (n_parts,)."""
        frames = heads.frames
        norm = np.array([frame.norm for frame in self._frames])
        mean = np.array([float(np.linalg.norm(frame.mean)) for frame in self._frames])
        margin = doubt.margin[frames] * heads.reach + doubt.fixed[frames]
        margin += doubt.least[frames] / heads.least
        held = (norm[frames] * heads.reach + mean[frames]) * heads.most >= self._largest
        margin[held] = np.inf
        slack = UPWARDS * (2 * margin + doubt.heads[frames])
        return margin.astype(np.float32), slack.astype(np.float32)

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
