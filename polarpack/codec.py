"""compress, decompress and save: whole tensors to the smallest bytes that meet a target.

The planner proposes a quantizer from a sample; here the real bytes and the real quality of the
whole table close the loop, so that a size is never exceeded and a quality is met on the data given.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from . import container
from ._arrays import Array, TensorSpec
from .bitshift import MAX_BITS
from .blocks import (
    LAYOUTS,
    Layout,
    NonFinite,
    TensorCoding,
    check_max_error,
    check_name,
    check_rows,
    native_rows,
)
from .container import Writer
from .errors import InputError
from .planner import (
    JUDGE_ROWS,
    MOST_BITSHIFT_BITS,
    Target,
    best_chain,
    check_row_weighing,
    guess_bits,
    meet_quality,
    meets,
    objective_of,
    quality,
    rows_of_quality,
)
from .polar import MAX_D, SIZED, PolarQuantizer, check_weights, row_scale
from .reading import File
from .scalar import ScalarQuantizer
from .trellis import next_log_step
from .writing import Chunk, tensor_chunks

SMALL = 1 << 16
LEAST_QUANTIZER = 128  # bytes that any of them takes
EXACT_SHARE = 1 / 8  # of a table's bytes: below that there is no hope of storing it exactly
MAX_FITS = 6  # encodings of the whole table while closing in on a size


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
    weights: npt.ArrayLike | None = None,
    row_weights: npt.ArrayLike | None = None,
    nonfinite: NonFinite = "error",
    seed: int = 0,
    time_budget: float | None = None,
    progress: bool = False,
) -> bytes:
    """Compress a tensor to the smallest blob that meets exactly one target.

    x: numpy array or torch tensor of any float dtype and shape; its last axis holds the vectors.
    bits: the whole blob per float, side information included, never exceeded. size_bytes: likewise
    in bytes. snr_db, cosine (mean over rows), recall (recall@10, inner product, sampled rows): met
    on x itself. max_error: for every row |x - x_hat| <= max_error |x| (Euclidean norms), a
    guarantee; 0 is lossless to the bit. quantizer: a fitted one instead of a target (max_error may
    be added). optimize: what a size should be spent on (default "snr"). weights: (d,) importance of
    each dimension: where errors count more. row_weights: (n,) importance of each row, for targets
    of size and SNR, which is then that of the weighted rows, or for a quantizer that was fitted
    with them. nonfinite="raw" stores rows that hold NaN or infinity
    exactly instead of raising. Same seed, machine and versions: same
    bytes, unless ``time_budget`` (seconds for trying candidates) cuts the search short.

    Time: planning on at most 32768 rows, then 2 to 4 encodings of all. Memory: about 3 times x.
    Raises InputError for impossible targets (stating the least possible) and for rows that are not
    finite.
    """
    targets = _targets(bits, size_bytes, snr_db, cosine, recall, max_error, quantizer)
    options = _Options(layout, optimize, weights, row_weights, nonfinite, seed, time_budget)
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
    weights: Mapping[str, npt.ArrayLike] | None = None,
    row_weights: Mapping[str, npt.ArrayLike] | None = None,
    nonfinite: NonFinite = "error",
    seed: int = 0,
    time_budget: float | None = None,
    progress: bool = False,
) -> None:
    """Write named tensors to a ``.polar`` file; options as in ``compress``.

    bits and size_bytes bound the whole file; each tensor gets its share by number of floats.
    weights, row_weights: of the dimensions and of the rows of tensors, by name.
    embed_quantizer=False leaves a given quantizer out: the file then holds its hash, and
    ``open(..., quantizer=q)`` is needed. The file appears under its name only when it is complete
    and on the disk; an old file of that name stays until then.
    """
    if not isinstance(tensors, Mapping):
        raise InputError(
            f"expected tensors as a dict of names to arrays, got {type(tensors).__name__}"
        )
    for name in tensors:
        check_name(name)
    targets = _targets(bits, size_bytes, snr_db, cosine, recall, max_error, quantizer)
    options = _Options(layout, optimize, None, None, nonfinite, seed, time_budget)
    for what, given in (("weights", weights), ("row_weights", row_weights)):
        if given is not None and not (isinstance(given, Mapping) and set(given) <= set(tensors)):
            raise InputError(f"expected {what} as a dict of names among {list(tensors)}")
    described = {name: native_rows(x, name) for name, x in tensors.items()}
    total = sum(rows.size for _, rows in described.values())
    sized = "bits" in targets or "size_bytes" in targets
    limit = targets.pop("bits", 0.0) * total / 8 or targets.pop("size_bytes", 0.0)
    if sized:  # tensors without numbers have no share, but take a header
        limit -= sum(len(k.encode()) + 128 for k, (_, rows) in described.items() if not rows.size)
    coded: dict[str, list[Chunk]] = {}
    numbers = {name: i for i, name in enumerate(described)}
    with Writer(path) as writer, _bar(progress, "save", len(described)) as step:
        # of a size, smaller tensors take their share first: what they cannot do with, or leave
        # over, is the larger ones' to make good
        for name in sorted(described, key=lambda k: described[k][1].size) if sized else described:
            spec, rows = described[name]
            mine = dict(targets)
            if sized:
                mine["size_bytes"] = limit * rows.size / max(1, total)
            coded[name] = _tensor_to_chunks(
                name,
                numbers[name],
                spec,
                rows,
                mine,
                quantizer,
                replace(
                    options,
                    weights=(weights or {}).get(name),
                    row_weights=(row_weights or {}).get(name),
                ),
                embed=embed_quantizer,
                shared=quantizer is not None and numbers[name] > 0,
                or_raw=rows.size < total / 2,
            )
            if sized:
                limit -= _size(coded[name]) if rows.size else 0
                total -= rows.size
            else:
                for chunk in coded.pop(name):
                    writer.add(*chunk)
            step()
        for name in described if sized else ():
            for chunk in coded[name]:
                writer.add(*chunk)


@dataclass(frozen=True)
class _Options:
    layout: Layout | None
    optimize: Literal["snr", "cosine", "recall"] | None
    weights: npt.ArrayLike | None
    row_weights: npt.ArrayLike | None
    nonfinite: NonFinite
    seed: int
    time_budget: float | None
    scale: ScalarQuantizer | None = None  # of weighted rows

    def __post_init__(self) -> None:
        if self.layout not in (None, *LAYOUTS):
            raise InputError(f"expected layout 'archive' or 'rows', got {self.layout!r}")
        if self.nonfinite not in ("error", "raw"):
            raise InputError(f"expected nonfinite 'error' or 'raw', got {self.nonfinite!r}")
        objective_of(Target("bits", 1.0), self.optimize)


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
            raise InputError(
                "a quantizer fixes the rate: of the targets only max_error= goes with it"
            )
        bound = check_max_error(max_error)
        return {} if bound is None else {"max_error": bound}
    target = Target.of(
        bits=bits,
        size_bytes=size_bytes,
        snr_db=snr_db,
        cosine=cosine,
        recall=recall,
        max_error=max_error,
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
    or_raw: bool = False,
) -> list[Chunk]:
    """All chunks of one tensor that meets its target. ``or_raw``: rather its rows as they are than
    an error for a size out of reach."""
    check_rows(rows, name, options.nonfinite)
    bound = targets.get("max_error")
    if quantizer is not None:
        if spec.d != quantizer.d_:
            raise InputError(f"expected {name} with rows of {quantizer.d_}, got shape {spec.shape}")
        layout = options.layout or quantizer.layout
        if layout == "rows" and quantizer.own_model is not None:
            raise InputError(
                "layout='rows' needs a quantizer of fixed rate, this one ends in a trellis"
            )
        table = _Table(name, tensor, spec, rows, rows, bound, options)
        return table.chunks(table.coding(quantizer, layout), embed, shared)
    limit = targets.get("size_bytes")
    if "bits" in targets:
        limit = targets["bits"] * rows.size / 8
    if options.weights is not None and len(check_weights(options.weights)) != spec.d:
        raise InputError(f"{name}: expected {spec.d} weights, one for each dimension")
    finite = rows if options.nonfinite == "error" else rows[_finite_rows(rows)]
    if options.row_weights is not None:
        target = Target(*next(iter(targets.items())))
        check_row_weighing(target, objective_of(target, options.optimize), options.layout)
        scale, factors = row_scale(options.row_weights, len(rows))
        options = replace(options, scale=scale)
        finite = finite / factors[_finite_rows(rows), None]
    table = _Table(name, tensor, spec, rows, finite, bound, options)
    plain = not finite.size or spec.d > MAX_D or bound == 0
    if limit is not None:
        hopeful = plain or spec.nbytes < SMALL or limit > EXACT_SHARE * spec.nbytes
        if hopeful and (_size(table.exact) <= limit or (plain and (or_raw or not rows.size))):
            return table.exact
        if plain:
            raise InputError(
                f"{name}: expected a target of at least {_size(table.exact)} bytes, got {limit:.0f}"
            )
        try:
            return _chunks_within(table, limit)
        except InputError:
            if or_raw:
                return table.exact
            raise
    if plain or spec.nbytes <= LEAST_QUANTIZER:
        return table.exact
    try:
        chunks = _chunks_of_quality(table, Target(*next(iter(targets.items()))))
    except InputError:  # out of reach of any code: met by the rows themselves
        return table.exact
    if spec.nbytes >= SMALL and _size(chunks) <= EXACT_SHARE * spec.nbytes:
        return chunks
    return min(table.exact, chunks, key=_size)


@dataclass(frozen=True)
class _Table:
    """One tensor to code, and what each way of meeting a target asks of it."""

    name: str
    tensor: int  # its number in the file
    spec: TensorSpec
    rows: Array  # (n, d), as they are stored
    finite: Array  # those that a quantizer is fitted on, divided by their weights
    bound: float | None  # on the relative error of every row
    options: _Options

    def coding(self, q: PolarQuantizer, layout: Layout = "archive") -> TensorCoding:
        """Of all rows by a quantizer that was fitted to ``finite``."""
        options = self.options
        q = q if options.scale is None else copy.copy(q).scaled_by(options.scale)
        weights = None if options.row_weights is None else np.asarray(options.row_weights)
        return TensorCoding(
            self.spec, q, layout, None, self.bound, options.nonfinite, row_weights=weights
        )

    def chunks(self, coding: TensorCoding, embed: bool = True, shared: bool = False) -> list[Chunk]:
        blocks = coding.encode_rows(self.rows)
        return tensor_chunks(self.name, self.tensor, coding, blocks, embed, shared)

    def sized(self, q: PolarQuantizer, layout: Layout = "archive") -> tuple[list[Chunk], int]:
        """Chunks, and bytes of the file that holds them alone."""
        chunks = self.chunks(self.coding(q, layout))
        return chunks, len(container.pack(chunks))

    @cached_property
    def exact(self) -> list[Chunk]:
        """The rows to the bit."""
        return self.chunks(
            TensorCoding(self.spec, None, max_error=self.bound, nonfinite=self.options.nonfinite)
        )

    def planning(self) -> dict[str, Any]:
        """What the planner is told besides rows and target; the time allowed begins now."""
        options = self.options
        allowed = options.time_budget
        return {
            "weights": options.weights,
            "seed": options.seed,
            "deadline": None if allowed is None else time.monotonic() + allowed,
            "paid_rows": len(self.rows),
        }

    def objective(self, target: Target) -> Literal["snr", "cosine", "recall"]:
        return objective_of(target, self.options.optimize)


def _size(chunks: Sequence[Chunk]) -> int:
    """Bytes of a file that holds these chunks alone; exact for a small one, else at most these."""
    if sum(sum(map(len, parts)) for _, _, _, parts in chunks) < SMALL:
        return len(container.pack(chunks))
    return 32 + sum(sum(map(len, parts)) + 9 * len(parts) + 32 for _, _, _, parts in chunks)


def _chunks_within(table: _Table, limit: float) -> list[Chunk]:
    """The best chunks whose file takes at most ``limit`` bytes: plan, encode, correct."""
    if table.options.layout == "rows":
        return _rows_within(table, limit)
    target = 8 * limit / table.rows.size
    overhead = 8 * 150 / table.rows.size
    objective = table.objective(Target("bits", target))
    planned, planning = max(target - overhead, 0.6 * target), table.planning()
    unweighted = table.options.scale is None
    q = best_chain(table.finite, planned, objective, codebooks=unweighted, **planning)
    if q.fine != "codebook":
        return _trellis_within(table, limit, q)[1]
    books = _books_within(table, limit, q)
    try:  # what was learned from samples is settled by the table
        q = best_chain(table.finite, planned, objective, **planning)
        trellis = _trellis_within(table, limit, q)
    except InputError:
        if books is None:
            raise
        return books[1]
    if books is None:
        return trellis[1]
    few = table.finite[:: max(1, len(table.finite) // JUDGE_ROWS)]

    def judged(coded: tuple[PolarQuantizer, list[Chunk]]) -> float:
        return quality(few, coded[0].decode_as(coded[0].encode(few), few.dtype), objective)

    return max(books, trellis, key=judged)[1]


def _trellis_within(
    table: _Table, limit: float, q: PolarQuantizer
) -> tuple[PolarQuantizer, list[Chunk]]:
    """A chain at the trellis step whose file comes nearest to ``limit`` bytes from below, and its
    chunks. InputError if there is no such step."""
    target = 8 * limit / table.rows.size
    best: tuple[int, PolarQuantizer, list[Chunk]] | None = None
    tried: list[tuple[float, float]] = []
    log_step = float(np.log2(q.fine_.step_))
    for _ in range(MAX_FITS):
        chunks, size = table.sized(q)
        if size <= limit and (best is None or size > best[0]):
            best = (size, q, chunks)
        if best is not None and best[0] > 0.998 * limit:
            break
        tried.append((log_step, float(size)))
        log_step = next_log_step(tried, 0.9992 * limit, slope=-0.9 * limit / max(target, 0.5) / 2)
        q = q.with_step(table.finite, 2.0**log_step)
        log_step = float(np.log2(q.fine_.step_))
        if any(abs(log_step - step) < 1e-4 for step, _ in tried):
            break  # no finer step, or no nearer size
    while best is None:  # far out of reach: coarser and coarser, down to all zeros
        least = min(size for _, size in tried)
        log_step = max(step for step, _ in tried) + 2
        q = q.with_step(table.finite, 2.0**log_step)
        chunks, size = table.sized(q)
        tried.append((log_step, float(size)))
        if size <= limit:
            best = (size, q, chunks)
        elif size > 0.97 * least or len(tried) > 2 * MAX_FITS:
            least = min(size, least, _size(table.exact))
            raise InputError(
                f"{table.name}: {limit:.0f} bytes are out of reach, "
                f"the least found is {int(least)} "
                f"({8 * least / table.rows.size:.3g} bits per float)"
            )
    return best[1], best[2]


def _books_within(
    table: _Table, limit: float, q: PolarQuantizer
) -> tuple[PolarQuantizer, list[Chunk]] | None:
    """A chain that ends in codebooks with as many bits a row as go into ``limit`` bytes, and its
    chunks; None if that is not one."""
    row_bits = round(float(np.log2(q.alphabet_sizes).sum()))
    most = q.stages * (q.n_codewords.bit_length() - 1)  # more would take another book a stage
    best: tuple[int, PolarQuantizer, list[Chunk]] | None = None
    tried: set[int] = set()
    while row_bits > 0 and row_bits not in tried and len(tried) < MAX_FITS:
        tried.add(row_bits)
        chunks, size = table.sized(q)
        room = 8 * (limit - size) / len(table.rows)  # bits a row
        if room >= 0 and (best is None or row_bits > best[0]):
            best = row_bits, q, chunks
        # codebooks grow with the bits, too: what is too much is taken back one by one
        row_bits += min(int(room), most - row_bits) if room >= 0 else -max(1, int(-room))
        if row_bits > 0 and row_bits not in tried:
            q = q.with_bits(table.finite, row_bits / table.spec.d)
    return None if best is None else best[1:]


def _rows_within(table: _Table, limit: float) -> list[Chunk]:
    """Like ``_chunks_within`` for the rows layout, where rows take a whole number of bytes each and
    a size follows from the settings."""
    least = float(_size(table.exact))
    bits, n = 8 * limit / table.rows.size, len(table.rows)
    objective, planning = table.objective(Target("bits", bits)), table.planning()
    q = best_chain(table.finite, bits, objective, layout="rows", **planning)
    rest = len(q.to_bytes()) + 300.0  # what does not grow with the rows
    before = 0
    for _ in range(MAX_FITS):
        row_bytes = max(1, int((limit - rest) / n))
        if q.fine in SIZED:
            if row_bytes == before:
                break
            before = row_bytes
            if q.fine == "bitshift":
                row_bytes = min(row_bytes, max(1, MAX_BITS * q.rotation_.n_components_ // 8))
            q = q.with_bits(table.finite, 8 * row_bytes / table.spec.d)
        chunks, size = table.sized(q, "rows")
        if size <= limit:
            return chunks
        least = min(least, size)
        if q.fine in SIZED:
            rest = size - n * row_bytes + 8.0  # tables of another rate may differ a little
        else:
            bits *= 0.98 * limit / size
            q = best_chain(table.finite, bits, objective, layout="rows", **planning)
    raise InputError(
        f"{table.name}: {limit:.0f} bytes are out of reach in layout 'rows', "
        f"the least found is {int(least)}"
    )


def _chunks_of_quality(table: _Table, target: Target) -> list[Chunk]:
    """The smallest chunks found that meet a quality target on the rows themselves."""
    finite, d = table.finite, table.spec.d
    out_of_reach = f"{table.name}: {target.kind}={target.value} is out of reach"
    objective, planning = table.objective(target), table.planning()
    if table.options.layout == "rows":
        q = rows_of_quality(finite, target, objective, **planning)
        while not meets(finite, q.decode_as(q.encode(finite), finite.dtype), target):
            if q.fine != "bitshift" or (q.bits or 0) > MOST_BITSHIFT_BITS:
                raise InputError(f"{out_of_reach} of codes of fixed rate")
            q = q.with_bits(finite, (q.bits or 0) + max(0.01, 8 / d))
        return table.chunks(table.coding(q, "rows"))
    q = best_chain(finite, guess_bits(finite, target), objective, **planning)
    q = meet_quality(q, finite, target)
    if table.bound is not None:
        return table.chunks(table.coding(_cheapest_bounded(table, q)))
    for _ in range(20):  # what was met on a sample is checked on all rows
        coding = table.coding(q)
        codes = coding.encode_codes(table.rows)
        own = codes[_finite_rows(table.rows)]
        own = own[:, 1:] if table.options.scale is not None else own  # of the divided rows
        if meets(finite, q.decode_as(own, finite.dtype), target):
            blocks = coding.encode_rows(table.rows, codes)
            return tensor_chunks(table.name, table.tensor, coding, blocks)
        q = q.with_step(finite, 0.985 * q.fine_.step_)
    raise InputError(out_of_reach)


def _finite_rows(rows: Array) -> Array:
    return cast(Array, np.isfinite(rows).all(axis=1))


def _cheapest_bounded(table: _Table, q: PolarQuantizer) -> PolarQuantizer:
    """A smaller step costs rate, a larger one escapes: the cheapest of a few, tried on a sample."""
    few = table.finite[:: max(1, len(table.finite) // 4096)]

    def cost(trial: PolarQuantizer) -> int:
        sample = TensorSpec((len(few), table.spec.d), table.spec.dtype)
        coding = TensorCoding(sample, trial, "archive", None, table.bound)
        return sum(map(len, coding.encode_rows(few)))

    factors = (0.84, 0.92, 1.09, 1.19)
    steps = [q.with_step(table.finite, q.fine_.step_ * factor) for factor in factors]
    return min([q, *steps], key=cost)


@contextlib.contextmanager
def _bar(shown: bool, title: str, total: int) -> Iterator[Any]:
    """A progress bar with time left, where asked for; yields what to call after each step."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def decompress(
    blob: bytes | bytearray | memoryview, *, library: Literal["numpy", "torch"] | None = None
) -> Any:
    """The tensor in a blob of ``compress``: same shape, dtype and library. Checks every byte."""
    if not isinstance(blob, bytes | bytearray | memoryview):
        raise InputError(f"expected bytes, got {type(blob).__name__}; use open for a path")
    with File(blob, library=library) as file:
        file._reader.verify()
        if len(file) != 1:
            raise InputError(f"expected one tensor, the blob holds {len(file)}: use polarpack.open")
        return file[file.keys()[0]][...]
