"""compress, decompress and save: whole tensors to the smallest bytes that meet a target.

The planner proposes a quantizer from a sample; here the real bytes and the real quality of the
whole table close the loop, so that a size is never exceeded and a quality is met on the data given.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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

    def coding(
        self, spec: TensorSpec, q: PolarQuantizer, layout: Layout, bound: float | None = None
    ) -> TensorCoding:
        """Of the whole tensor by a quantizer that was fitted to its rows, divided if weighted."""
        q = q if self.scale is None else copy.copy(q).scaled_by(self.scale)
        weights = None if self.row_weights is None else np.asarray(self.row_weights)
        return TensorCoding(spec, q, layout, None, bound, self.nonfinite, row_weights=weights)

    def planning(self, paid_rows: int) -> dict[str, Any]:
        """What the planner is told besides rows and target, for a table of so many rows; the time
        allowed begins now."""
        deadline = None if self.time_budget is None else time.monotonic() + self.time_budget
        given = {"weights": self.weights, "seed": self.seed, "deadline": deadline}
        return given | {"paid_rows": paid_rows}


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
    if quantizer is not None:
        if spec.d != quantizer.d_:
            raise InputError(f"expected {name} with rows of {quantizer.d_}, got shape {spec.shape}")
        layout = options.layout or quantizer.layout
        if layout == "rows" and quantizer.own_model is not None:
            raise InputError(
                "layout='rows' needs a quantizer of fixed rate, this one ends in a trellis"
            )
        coding = options.coding(spec, quantizer, layout, targets.get("max_error"))
        return _chunks_of(name, tensor, coding, rows, embed, shared)
    limit = targets.get("size_bytes")
    if "bits" in targets:
        limit = targets["bits"] * rows.size / 8

    @cache
    def exact() -> list[Chunk]:
        bound = targets.get("max_error")
        coding = TensorCoding(spec, None, max_error=bound, nonfinite=options.nonfinite)
        return _chunks_of(name, tensor, coding, rows)

    if options.weights is not None and len(check_weights(options.weights)) != spec.d:
        raise InputError(f"{name}: expected {spec.d} weights, one for each dimension")
    finite = rows if options.nonfinite == "error" else rows[np.isfinite(rows).all(axis=1)]
    if options.row_weights is not None:
        target = Target(*next(iter(targets.items())))
        check_row_weighing(target, objective_of(target, options.optimize), options.layout)
        scale, factors = row_scale(options.row_weights, len(rows))
        options = replace(options, scale=scale)
        finite = finite / factors[_finite_rows(rows), None]
    plain = not finite.size or spec.d > MAX_D or targets.get("max_error") == 0
    if limit is not None:
        hopeful = plain or spec.nbytes < SMALL or limit > EXACT_SHARE * spec.nbytes
        if hopeful and (_size(exact()) <= limit or (plain and (or_raw or not rows.size))):
            return exact()
        if plain:
            raise InputError(
                f"{name}: expected a target of at least {_size(exact())} bytes, got {limit:.0f}"
            )
        try:
            return _chunks_within(name, tensor, spec, rows, finite, limit, exact, options)
        except InputError:
            if or_raw:
                return exact()
            raise
    if plain or spec.nbytes <= LEAST_QUANTIZER:
        return exact()
    try:
        chunks = _chunks_of_quality(name, tensor, spec, rows, finite, targets, options)
    except InputError:  # out of reach of any code: met by the rows themselves
        return exact()
    if spec.nbytes >= SMALL and _size(chunks) <= EXACT_SHARE * spec.nbytes:
        return chunks
    return min(exact(), chunks, key=_size)


def _size(chunks: Sequence[Chunk]) -> int:
    """Bytes of a file that holds these chunks alone; exact for a small one, else at most these."""
    if sum(sum(map(len, parts)) for _, _, _, parts in chunks) < SMALL:
        return len(container.pack(chunks))
    return 32 + sum(sum(map(len, parts)) + 9 * len(parts) + 32 for _, _, _, parts in chunks)


def _chunks_of(
    name: str,
    tensor: int,
    coding: TensorCoding,
    rows: Array,
    embed: bool = True,
    shared: bool = False,
) -> list[Chunk]:
    blocks = coding.encode_rows(rows)
    return tensor_chunks(name, tensor, coding, blocks, embed, shared)


def _chunks_within(
    name: str,
    tensor: int,
    spec: TensorSpec,
    rows: Array,
    finite: Array,
    limit: float,
    exact: Callable[[], list[Chunk]],
    options: _Options,
) -> list[Chunk]:
    """The best chunks whose file takes at most ``limit`` bytes: plan, encode, correct."""
    target = 8 * limit / rows.size
    overhead = 8 * 150 / rows.size
    if options.layout == "rows":
        return _rows_within(name, tensor, spec, rows, finite, limit, exact, options)
    objective = objective_of(Target("bits", target), options.optimize)
    planned, planning = max(target - overhead, 0.6 * target), options.planning(len(rows))
    q = best_chain(finite, planned, objective, codebooks=options.scale is None, **planning)
    table = (name, tensor, spec, rows, finite, limit)
    if q.fine != "codebook":
        return _trellis_within(*table, q, exact, options)[1]
    found = [_books_within(*table, q, options)]
    with contextlib.suppress(InputError):  # what was learned from samples is settled by the table
        q = best_chain(finite, planned, objective, **planning)
        found.append(_trellis_within(*table, q, exact, options))
    few = finite[:: max(1, len(finite) // JUDGE_ROWS)]

    def judged(coded: tuple[PolarQuantizer, list[Chunk]]) -> float:
        return quality(few, coded[0].decode_as(coded[0].encode(few), few.dtype), objective)

    inside = [coded for coded in found if coded is not None]
    if not inside:
        return _trellis_within(*table, q, exact, options)[1]
    return max(inside, key=judged)[1]


def _trellis_within(
    name: str,
    tensor: int,
    spec: TensorSpec,
    rows: Array,
    finite: Array,
    limit: float,
    q: PolarQuantizer,
    exact: Callable[[], list[Chunk]],
    options: _Options,
) -> tuple[PolarQuantizer, list[Chunk]]:
    """A chain at the trellis step whose file comes nearest to ``limit`` bytes from below, and its
    chunks. InputError if there is no such step."""
    target = 8 * limit / rows.size
    best: tuple[int, PolarQuantizer, list[Chunk]] | None = None
    tried: list[tuple[float, float]] = []
    log_step = float(np.log2(q.fine_.step_))
    for _ in range(MAX_FITS):
        coding = options.coding(spec, q, "archive")
        chunks = _chunks_of(name, tensor, coding, rows)
        size = len(container.pack(chunks))
        if size <= limit and (best is None or size > best[0]):
            best = (size, q, chunks)
        if best is not None and best[0] > 0.998 * limit:
            break
        tried.append((log_step, float(size)))
        log_step = next_log_step(tried, 0.9992 * limit, slope=-0.9 * limit / max(target, 0.5) / 2)
        q = q.with_step(finite, 2.0**log_step)
        log_step = float(np.log2(q.fine_.step_))
        if any(
            abs(log_step - step) < 1e-4 for step, _ in tried
        ):  # no finer step, or no nearer size
            break
    while best is None:  # far out of reach: coarser and coarser, down to all zeros
        least = min(size for _, size in tried)
        log_step = max(step for step, _ in tried) + 2
        q = q.with_step(finite, 2.0**log_step)
        chunks = _chunks_of(name, tensor, options.coding(spec, q, "archive"), rows)
        size = len(container.pack(chunks))
        tried.append((log_step, float(size)))
        if size <= limit:
            best = (size, q, chunks)
        elif size > 0.97 * least or len(tried) > 2 * MAX_FITS:
            least = min(size, least, _size(exact()))
            raise InputError(
                f"{name}: {limit:.0f} bytes are out of reach, the least found is {int(least)} "
                f"({8 * least / rows.size:.3g} bits per float)"
            )
    return best[1], best[2]


def _books_within(
    name: str,
    tensor: int,
    spec: TensorSpec,
    rows: Array,
    finite: Array,
    limit: float,
    q: PolarQuantizer,
    options: _Options,
) -> tuple[PolarQuantizer, list[Chunk]] | None:
    """A chain that ends in codebooks with as many bits a row as go into ``limit`` bytes, and its
    chunks; None if that is not one."""
    row_bits = round(float(np.log2(q.alphabet_sizes).sum()))
    most = q.stages * (q.n_codewords.bit_length() - 1)  # more would take another book a stage
    best: tuple[int, PolarQuantizer, list[Chunk]] | None = None
    tried: set[int] = set()
    while row_bits > 0 and row_bits not in tried and len(tried) < MAX_FITS:
        tried.add(row_bits)
        chunks = _chunks_of(name, tensor, options.coding(spec, q, "archive"), rows)
        room = 8 * (limit - len(container.pack(chunks))) / len(rows)  # bits a row
        if room >= 0 and (best is None or row_bits > best[0]):
            best = row_bits, q, chunks
        # codebooks grow with the bits, too: what is too much is taken back one by one
        row_bits += min(int(room), most - row_bits) if room >= 0 else -max(1, int(-room))
        if row_bits > 0 and row_bits not in tried:
            q = q.with_bits(finite, row_bits / spec.d)
    return None if best is None else best[1:]


def _rows_within(
    name: str,
    tensor: int,
    spec: TensorSpec,
    rows: Array,
    finite: Array,
    limit: float,
    exact: Callable[[], list[Chunk]],
    options: _Options,
) -> list[Chunk]:
    """Like ``_chunks_within`` for the rows layout, where rows take a whole number of bytes each and
    a size follows from the settings."""
    least = float(_size(exact()))
    bits, n = 8 * limit / rows.size, len(rows)
    objective = objective_of(Target("bits", bits), options.optimize)

    planning = options.planning(n)
    q = best_chain(finite, bits, objective, layout="rows", **planning)
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
            q = q.with_bits(finite, 8 * row_bytes / spec.d)
        coding = options.coding(spec, q, "rows")
        chunks = _chunks_of(name, tensor, coding, rows)
        size = len(container.pack(chunks))
        if size <= limit:
            return chunks
        least = min(least, size)
        if q.fine in SIZED:
            rest = size - n * row_bytes + 8.0  # tables of another rate may differ a little
        else:
            bits *= 0.98 * limit / size
            q = best_chain(finite, bits, objective, layout="rows", **planning)
    raise InputError(
        f"{name}: {limit:.0f} bytes are out of reach in layout 'rows', "
        f"the least found is {int(least)}"
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
    planning = options.planning(len(rows))
    if options.layout == "rows":
        q = rows_of_quality(finite, target, objective, **planning)
        while not meets(finite, q.decode_as(q.encode(finite), finite.dtype), target):
            if q.fine != "bitshift" or (q.bits or 0) > MOST_BITSHIFT_BITS:
                raise InputError(f"{name}: {kind}={value} is out of reach of codes of fixed rate")
            q = q.with_bits(finite, (q.bits or 0) + max(0.01, 8 / spec.d))
        coding = options.coding(spec, q, "rows", bound)
        return _chunks_of(name, tensor, coding, rows)
    q = best_chain(finite, guess_bits(finite, target), objective, **planning)
    q = meet_quality(q, finite, target)
    if bound is not None:
        return _cheapest_bounded(name, tensor, spec, rows, finite, q, bound, options)
    for _ in range(20):  # what was met on a sample is checked on all rows
        coding = options.coding(spec, q, "archive")
        codes = coding.encode_codes(rows)[_finite_rows(rows)]
        own = codes[:, 1:] if options.scale is not None else codes  # of the divided rows
        if meets(finite, q.decode_as(own, finite.dtype), target):
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

    trials = [q] + [
        q.with_step(finite, q.fine_.step_ * factor) for factor in (0.84, 0.92, 1.09, 1.19)
    ]
    best = min(trials, key=cost)
    coding = TensorCoding(spec, best, "archive", None, bound, options.nonfinite)
    return _chunks_of(name, tensor, coding, rows)


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
