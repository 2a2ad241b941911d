"""The rows nearest to queries, found from codes and judged by decoded rows.

    codes ── coefficients or tables ── float32 scores of all rows, good to a known margin
                                           │  rows that could be among the k best
    decoded rows of these few ── float64 scores ── the k best

Where rows are coded by a quantizer, the first pass never decodes one (``scan``): its scores are
sums in float32, and what they may be off by is added in a row's favour. float64 then decides
among the few rows that remain, so the result is that of a search of all decoded rows, whatever the
BLAS, the threads and the groups of rows were. Other rows (raw ones, or with numbers held at walls)
are decoded group by group and searched in the same two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Float32, as_matrix, enter_codes, is_torch, returner
from ._threads import in_threads
from .entropy.range_coder import kernel
from .errors import InputError
from .polar import PolarQuantizer
from .scan import (
    FEW_QUERIES,
    SEGMENT_ROWS,
    ULP,
    Aim,
    Doubt,
    Heads,
    Scan,
    Segment,
    Turned,
    bounds_of,
    windows_of,
)

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Metric = Literal["ip", "l2", "cosine"]

GROUP_FLOATS = 1 << 22  # decoded numbers in work at a time
QUERIES = 64  # queries in work at a time, against decoded rows
SCAN_QUERIES = 256  # and against codes
TURNED_FLOATS = 1 << 23  # of queries in the frames of all classes
SCAN_ROWS = 1 << 15  # a thread reads and scores at a time
KEPT_BYTES = 1 << 29  # of codes made ready, which the next search finds in memory
FEW_ROWS = 0.02  # of the rows: so few are decoded rather than scanned for
LEAST_ROWS = 512  # that are worth a scan
MAX_EXPONENT = 60  # |log2| of what scales of rows and queries may differ by in a scan of distances
HEAD_QUERIES = 8  # so few are answered from the heads of rows
MANY_LEFT = 0.2  # of a group's codes looked up one by one: rather all of them, side by side
SEEDS = 4  # times as many rows as are wanted are scored first, to know what is good enough
SETTLED = 64  # rows found after which that is looked at again
SCREEN = 32  # scores looked at together for one that is good enough
ROUNDED = np.float32(4 * ULP)  # of a score, by the few operations after its sum
METRICS: tuple[str, ...] = ("ip", "l2", "cosine")


class Rows(Protocol):
    """What is searched, such as a ``Tensor`` of an open file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, the last axis holds the vectors."""
        ...

    def read_rows(self, rows: Array | range) -> Array:
        """Rows by number (leading axes flattened) -> (n, d)."""
        ...


class CodedRows(Rows, Protocol):
    """Rows whose codes can be had."""

    @property
    def scanned(self) -> PolarQuantizer | None:
        """The quantizer of the codes; None where rows are better decoded."""
        ...

    def read_codes(self, rows: range) -> tuple[Array, Int64]:
        """Codes (n, n_fields) of consecutive rows, and which of them, counted from 0, are stored
        in another way."""
        ...


class _Codes:
    """Codes in memory, as rows to be searched."""

    def __init__(self, quantizer: PolarQuantizer, codes: Array) -> None:
        self.scanned, self._codes = quantizer, codes
        self.shape = (len(codes), quantizer.d_)

    def read_rows(self, rows: Array | range) -> Array:
        """Rows by number -> (n, d) float32."""
        chosen = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        return self.scanned.decode_as(self._codes[chosen], np.dtype(np.float32))

    def read_codes(self, rows: range) -> tuple[Array, Int64]:
        """Codes of consecutive rows, all of them."""
        return self._codes[rows.start : rows.stop], np.zeros(0, np.int64)


def search_codes(
    quantizer: PolarQuantizer,
    codes: Any,
    queries: Any,
    k: int = 10,
    metric: Metric = "ip",
    **options: Any,
) -> tuple[Any, Any]:
    """The k best rows for each query among codes (n, n_fields) of a fitted quantizer, as
    ``Tensor.search`` finds them in a file; ``options`` are its ``ids``, ``exclude`` and
    ``shortlist``. Raises NotFittedError, or InputError for codes that fit no alphabet."""
    checked, _ = enter_codes(codes, quantizer.alphabet_sizes)
    return Searcher(_Codes(quantizer, checked)).search(queries, k, metric, **options)


class Searcher:
    """Searches one table; keeps what later searches can use: its codes made ready for scanning and,
    once few queries were asked, the heads of its rows, both together up to KEPT_BYTES; and, once
    distances or cosines were asked for, 4 bytes a row for its norm."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        shape = rows.shape
        self.d = int(shape[-1]) if shape else 1
        self.n = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        quantizer: PolarQuantizer | None = getattr(rows, "scanned", None)
        self._scan: Scan | None = None
        if quantizer is not None:
            self._scan = Scan(quantizer, getattr(rows, "dtype_name", "float32"))
        self._starts = range(0, self.n, SCAN_ROWS)
        self._kept: dict[int, _Group] = {}
        self._kept_bytes = 0
        self._norms: Float32 | None = None

    def search(
        self,
        queries: Any,
        k: int = 10,
        metric: Metric = "ip",
        *,
        ids: Any = None,
        exclude: Any = None,
        shortlist: int | None = None,
    ) -> tuple[Any, Any]:
        """See ``Tensor.search``."""
        if metric not in METRICS:
            raise InputError(f"expected metric to be one of {', '.join(METRICS)}, got {metric!r}")
        k = _positive("k", k)
        if shortlist is not None and _positive("shortlist", shortlist) < k:
            raise InputError(f"expected shortlist of at least k = {k}, got {shortlist}")
        if getattr(queries, "ndim", 2) == 1:
            queries = queries[None]
        q = as_matrix(queries, d=self.d, name="queries").astype(np.float64)
        q = _unit(q) if metric == "cosine" else q
        allowed = self._allowed(ids, exclude)
        best = _Best(len(q), min(k, self.n if allowed is None else int(allowed.sum())), self.n)
        if best.k and len(q):
            self._search(best, q, metric, allowed, shortlist)
        with np.errstate(over="ignore"):
            result = (-best.scores if metric == "l2" else best.scores).astype(np.float32)
        if not is_torch(queries):
            return result, best.ids
        return returner(queries[:0].float())(result), returner(queries)(best.ids)

    def _allowed(self, ids: Any, exclude: Any) -> Mask | None:
        """The rows to be searched, (n,) bool; None for all."""
        if ids is None and exclude is None:
            return None
        allowed = np.ones(self.n, bool) if ids is None else _mask("ids", ids, self.n)
        return allowed if exclude is None else allowed & ~_mask("exclude", exclude, self.n)

    def _search(
        self, best: _Best, q: Float64, metric: str, allowed: Mask | None, shortlist: int | None
    ) -> None:
        scan, few = self._scan, allowed is not None and allowed.sum() <= FEW_ROWS * self.n
        exactly = shortlist is None and scan is not None and not Scan.fits(scan.quantizer)
        if scan is None or few or exactly or self.n < LEAST_ROWS or not self._in_range(q, metric):
            self._decode(best, q, metric, None if allowed is None else np.flatnonzero(allowed))
        else:
            self._scan_codes(best, q, metric, allowed, shortlist)

    # -- decoded rows -------------------------------------------------------------------------
    def _decode(self, best: _Best, q: Float64, metric: str, chosen: Int64 | None) -> None:
        """Offer all rows, or those chosen, group by group."""
        n = self.n if chosen is None else len(chosen)
        step = max(best.k, GROUP_FLOATS // max(QUERIES, self.d))
        for start in range(0, n, step):
            some = range(start, min(n, start + step))
            numbers = np.arange(some.start, some.stop)
            if chosen is not None:
                numbers = chosen[start : some.stop]
            rows = self.rows.read_rows(some if chosen is None else numbers)
            for first in range(0, len(q), QUERIES):
                best.offer(slice(first, first + QUERIES), q, rows, numbers, metric)

    # -- codes --------------------------------------------------------------------------------
    def _in_range(self, q: Float64, metric: str) -> bool:
        """Whether scores of a scan stay clear of the ends of float32, and decoding of the ends of
        its dtype."""
        assert self._scan is not None
        e = self._scan.quantizer.exponent_
        if metric == "l2":
            t = np.frexp(np.abs(q).max(axis=1))[1]
            if np.abs(e - t[t != 0]).max(initial=0) > MAX_EXPONENT:
                return False
        return abs(e) <= MAX_EXPONENT

    def _scan_codes(
        self, best: _Best, q: Float64, metric: str, allowed: Mask | None, shortlist: int | None
    ) -> None:
        scan = self._scan
        assert scan is not None
        norms = None if metric == "ip" else self._row_norms()
        if norms is not None and not _comfortable(norms):
            return self._decode(
                best, q, metric, None if allowed is None else np.flatnonzero(allowed)
            )
        mask = np.zeros(0, bool) if allowed is None else allowed
        m = scan.quantizer.rotation_.n_components_
        step = max(1, min(SCAN_QUERIES, TURNED_FLOATS // (m * scan.n_frames)))
        for first in range(0, len(q), step):
            some = slice(first, first + step)
            asked = _Asked.of(scan, q[some], metric, best.k, shortlist)

            few = len(q[some]) <= HEAD_QUERIES and scan.n_heads is not None
            aims = [scan.aim(asked.turned, i) for i in range(len(q[some]))] if few else []

            def find(start: int, asked: _Asked = asked, aims: Any = aims) -> tuple[_Found, Int64]:
                group = self._group(start, heads=bool(aims))
                if aims and group.heads is not None:
                    return asked.best_by_heads(group, aims, norms, mask), group.others
                return asked.best_of(group.segments, norms, mask), group.others

            found = in_threads(find, self._starts)
            others = np.concatenate([numbers for _, numbers in found])
            others = others if allowed is None else others[allowed[others]]
            self._settle(best, first, q[some], metric, asked.joined([f for f, _ in found]))
            if len(others):
                self._decode_some(best, some, q, metric, others)

    def _settle(self, best: _Best, first: int, q: Float64, metric: str, found: list[Int64]) -> None:
        """Decode the rows found for each query, and offer them to it."""
        numbers = np.unique(np.concatenate(found))
        step = max(1, GROUP_FLOATS // self.d)
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            rows = self.rows.read_rows(some)
            for i, mine in enumerate(found):
                mine = mine[(mine >= some[0]) & (mine <= some[-1])]
                if len(mine):
                    best.add(first + i, q[i], rows[np.searchsorted(some, mine)], mine, metric)

    def _decode_some(
        self, best: _Best, queries: slice, q: Float64, metric: str, numbers: Int64
    ) -> None:
        """Offer rows that a scan leaves out."""
        step = max(best.k, GROUP_FLOATS // max(QUERIES, self.d))
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            rows = self.rows.read_rows(some)
            for first in range(queries.start, min(queries.stop, len(q)), QUERIES):
                part = slice(first, min(first + QUERIES, queries.stop))
                best.offer(part, q, rows, some, metric)

    def _group(self, start: int, heads: bool) -> _Group:
        """Segments of the rows from one of ``_starts`` on; kept while there is room. heads: made,
        too, where they can be kept."""
        group = self._plain_group(start)
        if not heads or group.heads is not None or start not in self._kept or not group.segments:
            return group
        assert self._scan is not None
        segments, made = self._scan.with_heads(group.segments)
        size = made.data.nbytes + made.tails.nbytes
        if self._kept_bytes + size > KEPT_BYTES:
            return group
        self._kept_bytes += size
        self._kept[start] = group = _Group(segments, group.others, made)
        return group

    def _plain_group(self, start: int) -> _Group:
        group = self._kept.get(start)
        if group is None:
            assert self._scan is not None
            some = range(start, min(self.n, start + SCAN_ROWS))
            codes, others = cast(CodedRows, self.rows).read_codes(some)
            group = _Group(list(self._scan.segments(codes, start, others)), others + start, None)
            size = sum(part.nbytes for part in group.segments)
            if self._kept_bytes + size <= KEPT_BYTES:
                self._kept[start] = group
                self._kept_bytes += size
        return group

    def _row_norms(self) -> Float32:
        """|row| / 2^e of all rows, (n,); 0 for rows that are not finite."""
        if self._norms is None:
            assert self._scan is not None
            e = self._scan.quantizer.exponent_
            norms = np.empty(self.n, np.float32)
            step = max(1, GROUP_FLOATS // self.d)
            for start in range(0, self.n, step):
                rows = self.rows.read_rows(range(start, min(self.n, start + step)))
                with np.errstate(invalid="ignore", over="ignore"):
                    x = np.ldexp(rows.astype(np.float64), -e)
                    norm = np.sqrt(np.einsum("ij,ij->i", x, x))
                norms[start : start + step] = np.where(np.isfinite(norm), norm, 0)
            self._norms = norms
        return self._norms


def _comfortable(norms: Float32) -> bool:
    """Whether float32 holds their squares and what is divided by them."""
    positive = norms[norms > 0]
    return not len(positive) or (positive.min() > 2.0**-100 and positive.max() < 2.0**30)


class _Group(NamedTuple):
    """Rows made ready: segments of those that are coded, and numbers of the others."""

    segments: list[Segment]
    others: Int64
    heads: Heads | None


# -- the k best so far -----------------------------------------------------------------------------
class _Best:
    """The k best rows of each query among those offered: scores (n_queries, k) float64, larger is
    better, and row numbers."""

    def __init__(self, n_queries: int, k: int, n: int) -> None:
        self.k = k
        self.scores, self.ids = (
            np.full((n_queries, k), -np.inf),
            np.full((n_queries, k), n, np.int64),
        )

    def offer(self, some: slice, q: Float64, rows: Array, numbers: Int64, metric: str) -> None:
        """Take what is better among rows for some of the queries."""
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        x = np.where(finite[:, None], rows, 0).astype(np.float64)
        x = _unit(x) if metric == "cosine" else x
        asked = q[some]
        every = len(x) <= self.k
        near = (
            np.ones((len(asked), len(x)), bool)
            if every
            else _near(asked, x, finite, self.k, metric)
        )
        for i in range(len(asked)):
            place = np.flatnonzero(near[i])
            exact = np.where(finite[place], _exact(asked[i], x[place], metric), -np.inf)
            self._merge(some.start + i, exact, numbers[place])

    def add(self, i: int, q: Float64, rows: Array, numbers: Int64, metric: str) -> None:
        """Take what is better among rows, all finite, for query i."""
        x = rows.astype(np.float64)
        self._merge(i, _exact(q, _unit(x) if metric == "cosine" else x, metric), numbers)

    def _merge(self, i: int, scores: Float64, numbers: Int64) -> None:
        all_scores = np.concatenate([self.scores[i], scores])
        all_ids = np.concatenate([self.ids[i], numbers])
        order = np.lexsort((all_ids, -all_scores))[: self.k]
        self.scores[i], self.ids[i] = all_scores[order], all_ids[order]


# -- the first pass over codes ---------------------------------------------------------------------
@kernel
def _take(
    scores: Float32,
    margin: Float32,
    half: Float32,
    scale: Float32,
    square: Float32,
    rows: Int64,
    allowed: Mask,
    enough: Float32,
    low: Float32,
    high: Float32,
    numbers: Int64,
    counts: Int64,
) -> None:
    """Keep those rows of a segment whose value could be ``enough`` (n_queries,): scores * scale -
    half * square, half of the query, scale and square of the row. Appends to low and high, between
    which the value lies, and to ``numbers`` (n_queries, room), of which ``counts`` are taken; there
    is room for all."""
    n = len(rows)
    for q in range(scores.shape[0]):
        mine, slack, weight, least, count = scores[q], margin[q], half[q], enough[q], counts[q]
        for start in range(0, n, SCREEN):
            stop = min(n, start + SCREEN)
            good = 0
            for i in range(start, stop):  # no branch in it: eight scores or more at a time
                value, shift = mine[i] * scale[i], weight * square[i]
                width = slack * scale[i] + (abs(value) + shift) * ROUNDED
                good += (value - shift) + width >= least
            if good == 0:
                continue
            for i in range(start, stop):
                value, shift = mine[i] * scale[i], weight * square[i]
                width = slack * scale[i] + (abs(value) + shift) * ROUNDED
                value -= shift
                if value + width >= least and (len(allowed) == 0 or allowed[rows[i]]):
                    low[q, count] = value - width
                    high[q, count] = value + width
                    numbers[q, count] = rows[i]
                    count += 1
        counts[q] = count


@kernel
def _drop(
    k: int, low: Float32, high: Float32, numbers: Int64, counts: Int64, enough: Float32
) -> None:
    """Raise ``enough`` to the k-th largest of ``low`` and forget rows that are not."""
    for q in range(len(counts)):
        count = counts[q]
        if count <= k:
            continue
        kth = np.partition(low[q, :count], count - k)[count - k]
        enough[q] = max(enough[q], kth)
        kept = 0
        for i in range(count):
            if high[q, i] >= enough[q]:
                low[q, kept], high[q, kept] = low[q, i], high[q, i]
                numbers[q, kept] = numbers[q, i]
                kept += 1
        counts[q] = kept


@kernel
def _upper(bound: Any, scale: Any, shift: Any) -> Any:
    """What a value is at most, of a sum that is at most ``bound``."""
    value = bound * scale
    return (value - shift) + np.float32(4) * (abs(value) + shift) * ROUNDED


@kernel
def _find(
    heads: Heads,
    aim: Aim,
    margin: Float32,
    slack: Float32,
    scale: Float32,
    square: Float32,
    half: Any,
    allowed: Mask,
    k: int,
    most: int,
    enough: Float32,
    bounds: Float32,  # (2, n) room to work in
    low: Float32,
    high: Float32,
    numbers: Int64,
    counts: Int64,
) -> bool:
    """``_take`` and ``_drop`` of a group for one query: rows whose value could be enough[0], which
    rises, into the first ``counts[0]`` of low, high, numbers (1, n). Only rows whose bounds allow
    it are scored; False if that takes more than ``most`` look-ups, and all had better be."""
    sums, values = bounds[0], bounds[1]
    bounds_of(heads, aim, slack, sums)
    for i in range(len(values)):
        values[i] = _upper(sums[i], scale[i], half * square[i])
        if len(allowed) > 0 and not allowed[heads.rows[i]]:
            values[i] = -np.inf
    counts[0] = 0
    seeds = SEEDS * k if enough[0] == -np.inf else 0
    scored, done = 0, 0
    # the rows of the largest bounds in each part say what is good enough; then all that could be
    while True:
        before = scored
        for s in range(len(heads.frames)):
            first, end, frame = heads.starts[s], heads.starts[s + 1], heads.frames[s]
            begin, n_heads, n_second = heads.starts[s], aim.n_heads[frame], aim.n_second[frame]
            if scored < seeds:
                best = first
                for i in range(first, end):
                    if values[i] > values[best]:
                        best = i
                first, end = best, best + 1
            for i in range(first, end):
                if values[i] < enough[0] or values[i] == -np.inf:
                    continue
                values[i] = -np.inf
                shift = half * square[i]
                if scored >= seeds:  # a second look
                    bound = sums[i] - heads.tails[0, i] * aim.beyond[0, frame]
                    bound += heads.tails[1, i] * aim.beyond[1, frame]
                    bound = windows_of(heads, aim, s, i - begin, n_heads, n_second, bound)
                    done += n_second - n_heads
                    if _upper(bound, scale[i], shift) < enough[0]:
                        continue
                end_of = aim.n_windows[frame]
                value = windows_of(heads, aim, s, i - begin, 0, end_of, aim.b[frame]) * scale[i]
                done += end_of
                scored += 1
                width = margin[s] * scale[i] + (abs(value) + shift) * ROUNDED
                value -= shift
                if value + width >= enough[0]:
                    count = counts[0]
                    low[0, count], high[0, count] = value - width, value + width
                    numbers[0, count] = heads.rows[i]
                    counts[0] = count + 1
                    if count % SETTLED == SETTLED - 1:
                        _drop(k, low, high, numbers, counts, enough)
            if done > most:
                return False
        _drop(k, low, high, numbers, counts, enough)
        if before >= seeds or scored == before:
            return True


class _Found(NamedTuple):
    """Rows of some groups that could be among the best of each query."""

    low: list[Float32]
    high: list[Float32]
    numbers: list[Int64]


class _Asked(NamedTuple):
    """Queries ready for a scan. They are divided by powers of two 2^t, rows by 2^e."""

    scan: Scan
    turned: list[Turned]
    metric: str
    k: int  # rows wanted from the scan
    exact: bool  # whether every row that could be among the k best is
    half: Float32  # (n_queries,) what |row|^2 counts in distances: 2^(e - t) / 2
    # (n_queries,) what k rows found so far reach, in any group: shared by threads, of which one may
    # undo what another raised; it then is lower than it could be, and what is found is the same
    enough: Float32

    @classmethod
    def of(cls, scan: Scan, q: Float64, metric: str, k: int, shortlist: int | None) -> _Asked:
        t = np.frexp(np.abs(q).max(axis=1))[1]
        turned = scan.turn(np.ldexp(q, -t[:, None]), few=len(q) <= FEW_QUERIES)
        half = np.ldexp(np.float32(0.5), scan.quantizer.exponent_ - t).astype(np.float32)
        enough = np.full(len(q), -np.inf, np.float32)
        return cls(scan, turned, metric, shortlist or k, shortlist is None, half, enough)

    def best_of(self, segments: Sequence[Segment], norms: Float32 | None, allowed: Mask) -> _Found:
        """The rows of segments that could be among the k best of each query."""
        n = len(self.half)
        room = 4 * max(self.k, 64) + SEGMENT_ROWS
        low, high = np.empty((n, room), np.float32), np.empty((n, room), np.float32)
        numbers, counts = np.empty((n, room), np.int64), np.zeros(n, np.int64)
        enough = self.enough
        for part in segments:
            turned = self.turned[part.frame]
            scores = self.scan.scores(part, turned, leading=not self.exact)
            margin = self.scan.margin(part, turned) if self.exact else np.zeros(n)
            scale, square = self._of_rows(part, norms)
            _take(
                scores, margin.astype(np.float32), self.half, scale, square, part.rows, allowed,
                enough, low, high, numbers, counts,
            )  # fmt: skip
            if counts.max() + SEGMENT_ROWS > room:
                _drop(self.k, low, high, numbers, counts, enough)
            if counts.max() + SEGMENT_ROWS > room:  # many rows are as good as the k-th
                low, high, numbers = (np.concatenate([a, a], axis=1) for a in (low, high, numbers))
                room *= 2
        _drop(self.k, low, high, numbers, counts, enough)
        cut = [slice(0, count) for count in counts]
        return _Found(
            [row[c].copy() for row, c in zip(low, cut, strict=True)],
            [row[c].copy() for row, c in zip(high, cut, strict=True)],
            [row[c].copy() for row, c in zip(numbers, cut, strict=True)],
        )

    def best_by_heads(
        self, group: _Group, aims: Sequence[tuple[Aim, Doubt]], norms: Float32 | None, allowed: Mask
    ) -> _Found:
        """``best_of`` a group that has heads."""
        assert group.heads is not None
        heads, n, found = group.heads, len(group.heads.rows), _Found([], [], [])
        scale, square = self._of_rows(heads, norms)
        bounds, count = np.empty((2, n), np.float32), np.zeros(1, np.int64)
        low, high = np.empty((1, n), np.float32), np.empty((1, n), np.float32)
        numbers = np.empty((1, n), np.int64)
        for i, (aim, doubt) in enumerate(aims):
            most = int(MANY_LEFT * n * aim.n_windows.mean())
            enough = self.enough[i : i + 1]
            if self.exact:
                margin, slack = self.scan.margins(heads, doubt)
                if not _find(
                    heads, aim, margin, slack, scale, square, self.half[i], allowed, self.k,
                    most, enough, bounds, low, high, numbers, count,
                ):  # fmt: skip
                    own = self._one(i).best_of(group.segments, norms, allowed)
                    found.low.extend(own.low)
                    found.high.extend(own.high)
                    found.numbers.extend(own.numbers)
                    continue
            else:
                nothing = np.zeros(len(heads.frames), np.float32)
                bounds_of(heads, aim._replace(beyond=np.zeros_like(aim.beyond)), nothing, bounds[0])
                count[:] = 0
                _take(
                    bounds[:1], nothing[:1], self.half[i : i + 1], scale, square, heads.rows,
                    allowed, enough, low, high, numbers, count,
                )  # fmt: skip
                _drop(self.k, low, high, numbers, count, enough)
            found.low.append(low[0, : count[0]].copy())
            found.high.append(high[0, : count[0]].copy())
            found.numbers.append(numbers[0, : count[0]].copy())
        return found

    def _one(self, i: int) -> _Asked:
        """Query i alone; what is good enough for it stays shared."""
        some = slice(i, i + 1)
        turned = [
            Turned(t.a[some], t.b[some], t.margin[some], t.fixed[some], t.least[some], None)
            for t in self.turned
        ]
        return self._replace(turned=turned, half=self.half[some], enough=self.enough[some])

    def _of_rows(self, part: Segment | Heads, norms: Float32 | None) -> tuple[Float32, Float32]:
        """What scores of a segment's rows are multiplied by, and squares where they count."""
        scale, nothing = part.radius, np.zeros(len(part.rows), np.float32)
        if norms is None:
            return scale, nothing
        norm = norms[part.rows]
        if self.metric == "l2":
            return scale, norm * norm
        return np.divide(scale, norm, out=nothing.copy(), where=norm > 0), nothing

    def joined(self, found: Sequence[_Found]) -> list[Int64]:
        """Of all groups together, for each query: numbers of the rows that remain, ascending."""
        out = []
        for i in range(len(self.half)):
            low = np.concatenate([f.low[i] for f in found])
            high = np.concatenate([f.high[i] for f in found])
            numbers = np.concatenate([f.numbers[i] for f in found])
            if len(low) > self.k:
                kept = high >= np.partition(low, len(low) - self.k)[len(low) - self.k]
                numbers = numbers[kept]
            out.append(np.sort(numbers))
        return out


# -- decoded rows, in two steps --------------------------------------------------------------------
def _near(q: Float64, x: Float64, finite: Array, k: int, metric: str) -> npt.NDArray[np.bool_]:
    """Which rows could be among the k best of each query: (n_queries, n).

    Scores here are <q, x>, for l2 less |x|^2 / 2, after a shift that leaves distances alone and a
    power of two for each query and for all rows that keeps float32 in range.
    """
    if metric == "l2":
        top = np.frexp(max(np.abs(q).max(), np.abs(x).max()))[1]
        q, x = np.ldexp(q, -top), np.ldexp(x, -top)
        centre = x.mean(axis=0)
        q, x = q - centre, x - centre
    scale = np.frexp(np.abs(x).max(initial=0.0))[1]
    x = np.ldexp(x, -scale)
    half = np.einsum("ij,ij->i", x, x) / 2
    q_scale = np.frexp(np.abs(q).max(axis=1))[1]
    if metric == "l2":  # the same power for q and x, then one that brings the score into range
        q_scale = np.maximum(q_scale - scale, 0) + scale
    q = np.ldexp(q, -q_scale[:, None])
    score = q.astype(np.float32) @ x.astype(np.float32).T
    if metric == "l2":
        score -= np.ldexp(half[None], (scale - q_scale)[:, None]).astype(np.float32)
    score[:, ~finite] = -np.inf
    largest = np.sqrt(2 * half.max(initial=0.0))
    # |fl(<q, x>) - <q, x>| <= d 2^-24 |q| |x|, rounding to float32 and the norm on both sides
    norms = np.sqrt(np.einsum("ij,ij->i", q, q)) * largest + largest**2
    slack = ((q.shape[1] + 8) * 2.0**-22 * norms).astype(np.float32)
    kth = np.partition(score, score.shape[1] - k, axis=1)[:, score.shape[1] - k]
    return np.asarray(score >= (kth - slack)[:, None])


def _exact(q: Float64, x: Float64, metric: str) -> Float64:
    """(n,) scores of rows x for one query, larger is better, with float32's 24 bits: rows that are
    equal have equal scores wherever they stand."""
    a, b = (int(np.frexp(np.abs(v).max(initial=0.0))[1]) for v in (q, x))
    if metric == "l2":
        a = b = max(a, b)
    q, x = np.ldexp(q, -a), np.ldexp(x, -b)
    if metric == "l2":
        x = x - q
        score = -np.einsum("ij,ij->i", x, x)
    else:
        score = np.einsum("ij,j->i", x, q)
    mantissa, exponent = np.frexp(score)
    with np.errstate(over="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(mantissa, 24)), exponent - 24 + a + b)
    return np.asarray(rounded)


def _unit(x: Float64) -> Float64:
    """Rows divided by their norms; zero rows stay."""
    x = np.ldexp(x, -np.frexp(np.abs(x).max(axis=1, initial=0.0))[1][:, None])
    norm = np.sqrt(np.einsum("ij,ij->i", x, x))
    return np.asarray(x / np.where(norm > 0, norm, 1)[:, None])


# -- what callers give -----------------------------------------------------------------------------
def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"expected {name} >= 1, got {value!r}")
    return int(value)


def _mask(name: str, rows: Any, n: int) -> Mask:
    """Rows given as numbers or as (n,) booleans -> (n,) booleans."""
    given = np.asarray(rows.detach().cpu().numpy() if is_torch(rows) else rows)
    if given.dtype == bool and given.shape == (n,):
        return given
    if given.size == 0 and given.ndim == 1:
        return np.zeros(n, bool)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise InputError(
            f"expected {name} as row numbers or {n} booleans, "
            f"got an array of {given.dtype} and shape {given.shape}"
        )
    if given.min() < 0 or given.max() >= n:
        bad = int(given[(given < 0) | (given >= n)][0])
        raise InputError(f"expected {name} to be row numbers in 0..{n - 1}, got {bad}")
    mask = np.zeros(n, bool)
    mask[given] = True
    return mask
