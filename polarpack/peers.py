"""What a table would be stored with instead: faiss's codecs, each at a size; int8 and float16.

Those of ``PEERS`` take rows x (n, d) and a number of bytes, pick the best setting that fits, and
say what decoding would need: codes, and codebooks, rotations and ranges in float16, half of what
faiss itself stores. Nothing has a header.

| name | what | source |
|---|---|---|
| faiss PQ | product quantization, heads of 3 to 10 bits | Jegou et al., TPAMI 2011 |
| faiss OPQ | the same behind a learned rotation | Ge et al., CVPR 2013 |
| faiss RQ | residual stages of whole rows | Chen et al., Sensors 2010 |
| faiss PRQ | residual stages in each head | |
| faiss LSQ | additive codes, local search | Martinez et al., ECCV 2018 |
| faiss SQ | 4, 6 or 8 bits between each column's extremes | |
| faiss EDEN | rotation, Lloyd-Max levels (TurboQuant's equal) | Vargaftik et al., ICML 2022 |
| faiss RaBitQ | rotation, 1 to 8 bits; judged by its scores | Gao and Long, SIGMOD 2024 |
| int8 per row | 8-bit integers and a float32 scale for each row | |
| float16 | half precision | |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ._arrays import Array, Float32
from .errors import MissingDependencyError

MOST_CODES = {"RQ": 16, "PRQ": 96, "LSQ": 8}  # stages that train in minutes
LSQ_MAX_D = 128  # its search is a hundred times slower than theirs
LSQ_ROWS = 4096
OPQ_ROUNDS = 10
MANY_ROWS = 12_000  # from here on the largest codebooks are the best


@dataclass(frozen=True)
class Stored:
    """Rows as a peer would give them back, and the bytes it needs for that."""

    setting: str
    total_bytes: int
    decoded: Array | None  # None: it estimates scores and gives no rows back
    scores: Callable[[Float32], Array] | None = None  # then: queries (m, d) -> (m, n)


Peer = Callable[[Float32, float], Stored | None]  # None: no setting fits


def load_faiss() -> Any:
    """The module; MissingDependencyError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            'faiss\'s codecs need it: pip install "polarpack[faiss]"'
        ) from error
    return faiss


@contextmanager
def one_faiss_thread() -> Iterator[Any]:
    """faiss, held to one thread: where cores are busy its threads wait for each other, x 100."""
    faiss = load_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)


# -- without training ------------------------------------------------------------------------------
def float16(x: Float32) -> Stored | None:
    """Half precision; None where x exceeds its range."""
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    if not np.isfinite(halves).all():
        return None
    return Stored("", halves.nbytes, halves.astype(np.float32))


def int8_rows(x: Float32) -> Stored:
    """8-bit integers with one float32 scale a row."""
    scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
    codes = np.rint(x / np.where(scale > 0, scale, 1)).astype(np.int8)
    return Stored("", codes.nbytes + scale.nbytes, codes * scale)


# -- codebooks -------------------------------------------------------------------------------------
def code_bytes(bits: int) -> int:
    """Bytes of a row of so many bits of codes: faiss keeps rows on whole bytes."""
    return -(-bits // 8)


def pq_of(x: Float32, heads: int, n_bits: int, seed: int = 1234) -> Stored:
    """faiss PQ of one setting; rows are widened by zero columns until the heads divide them. The
    codebooks are used as stored, in float16."""
    n, d = x.shape
    wide = np.pad(x, ((0, 0), (0, -d % heads)))
    with one_faiss_thread() as faiss:
        pq: Any = faiss.ProductQuantizer(wide.shape[1], heads, n_bits)
        pq.cp.min_points_per_centroid = 1
        pq.cp.seed = seed
        pq.train(wide)
        codebooks = faiss.vector_to_array(pq.centroids).astype(np.float16)
        faiss.copy_array_to_vector(codebooks.astype(np.float32), pq.centroids)
        decoded = pq.decode(pq.compute_codes(wide))[:, :d]
    side = 2 * d << n_bits
    return Stored(f"{heads}x{n_bits}", n * code_bytes(heads * n_bits) + side, decoded)


def pq(x: Float32, most: float) -> Stored | None:
    """The best faiss PQ: as many heads as fit, for several sizes of codebook."""
    n, d = x.shape
    found = []
    for n_bits in (10, 8, 6, 5, 4, 3) if n < MANY_ROWS else (8, 6):
        room = 8 * int((most - (2 * d << n_bits)) / n) // n_bits
        possible = [m for m in range(1, min(room, d) + 1) if m == 1 or (m - 1) * -(-d // m) < d]
        if n > 1 << n_bits and possible:
            found.append(pq_of(x, possible[-1], n_bits))
    return _best(x, found)


def opq(x: Float32, most: float) -> Stored | None:
    """faiss OPQ with heads of 8 bits; the rotation counts as float16."""
    n, d = x.shape
    side = (2 * d << 8) + 2 * d * d
    heads = min(int((most - side) / n), d)
    while heads > 0 and d % heads:
        heads -= 1
    if heads < 1 or n < max(2 * d, 1 << 8):  # with fewer rows than columns faiss crashes
        return None
    with one_faiss_thread() as faiss:
        rotation, pq = faiss.OPQMatrix(d, heads), faiss.ProductQuantizer(d, heads, 8)
        rotation.niter, rotation.pq = OPQ_ROUNDS, pq
        pq.cp.min_points_per_centroid = 1  # fewer than it would like are no reason to warn
        rotation.train(x)
        turned = rotation.apply(x)
        pq.train(turned)
        decoded = rotation.reverse_transform(pq.decode(pq.compute_codes(turned)))
    return Stored(f"{heads}x8", n * heads + side, decoded)


def residual(kind: str, x: Float32, most: float) -> Stored | None:
    """RQ, PRQ (as few heads as give at most 12 stages each) or LSQ, for several sizes of codebook
    where rows are few."""
    found = []
    for n_bits in (8, 6, 4) if len(x) < MANY_ROWS else (8,):
        setting = _stages_within(kind, x, most, n_bits)
        if setting is not None and len(x) >= 1 << n_bits:
            found.append(_residual_of(kind, x, *setting, n_bits))
    return _best(x, found)


def _stages_within(kind: str, x: Float32, most: float, n_bits: int) -> tuple[int, int] | None:
    """The most (heads, stages) that fit."""
    n, d = x.shape
    if kind == "LSQ" and d > LSQ_MAX_D:
        return None
    for codes in range(min(MOST_CODES[kind], int(8 * most / n / n_bits)), 0, -1):
        heads = 1
        if kind == "PRQ":
            heads = max(2, -(-codes // 12))
            while heads < codes and (codes % heads or d % heads):
                heads += 1
            if heads >= codes:
                continue  # is PQ
        side = (2 * d << n_bits) * (codes // heads)
        if n * code_bytes(codes * n_bits) + side <= most:
            return heads, codes // heads
    return None


def _residual_of(kind: str, x: Float32, heads: int, stages: int, n_bits: int) -> Stored:
    n, d = x.shape
    few = x[:: max(1, n // LSQ_ROWS)] if kind == "LSQ" else x
    with one_faiss_thread() as faiss:
        if kind == "PRQ":
            q: Any = faiss.ProductResidualQuantizer(d, heads, stages, n_bits)
            parts = [faiss.downcast_AdditiveQuantizer(q.subquantizer(i)) for i in range(heads)]
        elif kind == "RQ":
            q = faiss.ResidualQuantizer(d, stages, n_bits)
            parts = [q]
        else:
            q, parts = faiss.LocalSearchQuantizer(d, stages, n_bits), []
        for part in parts:
            part.cp.min_points_per_centroid = 1
        q.train(few)
        decoded = q.decode(q.compute_codes(x))
    setting = f"{heads}x{stages}x{n_bits}" if heads > 1 else f"{stages}x{n_bits}"
    total = n * code_bytes(heads * stages * n_bits) + (2 * d << n_bits) * stages
    return Stored(setting, total, decoded)


def _best(x: Float32, found: list[Stored]) -> Stored | None:
    def error(stored: Stored) -> float:
        assert stored.decoded is not None
        return float(np.square(x - stored.decoded, dtype=np.float64).sum())

    return min(found, key=error, default=None)


# -- scalar codes ----------------------------------------------------------------------------------
def sq(x: Float32, most: float) -> Stored | None:
    """faiss's ScalarQuantizer, of the most bits that fit."""
    n, d = x.shape
    for bits in (8, 6, 4):
        total = n * code_bytes(d * bits) + 4 * d
        if total <= most:
            with one_faiss_thread() as faiss:
                q = faiss.ScalarQuantizer(d, getattr(faiss.ScalarQuantizer, f"QT_{bits}bit"))
                q.train(x)
                return Stored(f"{bits} bits", total, q.decode(q.compute_codes(x)))
    return None


def eden(x: Float32, most: float) -> Stored | None:
    """EDEN behind a random rotation (made from a seed), of the most bits that fit."""
    for bits in (8, 4, 3, 2, 1):
        found = _behind_rotation(f"EDEN{bits}", bits, x, most)
        if found is not None:
            return found
    return None


def rabitq(x: Float32, most: float) -> Stored | None:
    """RaBitQ behind a random rotation, of the most bits that fit: its own estimates of scores."""
    for bits in range(8, 0, -1):
        found = _behind_rotation(f"RaBitQ{bits if bits > 1 else ''}", bits, x, most)
        if found is not None:
            return found
    return None


def _behind_rotation(name: str, bits: int, x: Float32, most: float) -> Stored | None:
    n, d = x.shape
    if n * code_bytes(bits * d) > most:
        return None
    with one_faiss_thread() as faiss:
        try:
            index = faiss.index_factory(d, f"RR{d},{name}", faiss.METRIC_INNER_PRODUCT)
        except RuntimeError:  # an older faiss, or a number of bits it has not
            return None
        total = n * index.sa_code_size() + 4 * d
        if total > most:
            return None
        scored = name.startswith("RaBitQ")
        if not scored:
            faiss.downcast_index(index.index).scale_type = faiss.EDENScaleType_BIASED
        index.train(x)
        if not scored:
            return Stored(f"{bits} bits", total, index.sa_decode(index.sa_encode(x)))
        index.add(x)

    def scores(queries: Float32) -> Array:
        with one_faiss_thread():
            found, ids = index.search(queries, n)
        out = np.full((len(queries), n), -np.inf, np.float32)
        kept = ids >= 0
        out[np.nonzero(kept)[0], ids[kept]] = found[kept]
        return out

    return Stored(f"{bits} bits", total, None, scores)


PEERS: dict[str, Peer] = {
    "faiss PQ": pq,
    "faiss OPQ": opq,
    "faiss RQ": partial(residual, "RQ"),
    "faiss PRQ": partial(residual, "PRQ"),
    "faiss LSQ": partial(residual, "LSQ"),
    "faiss SQ": sq,
    "faiss EDEN": eden,
    "faiss RaBitQ": rabitq,
}
