"""What SNR, cosine and recall@10 does each codec reach at equal code bits and at equal total bytes?

Two comparisons, for each table (``tables.py``) and rate:

heldout  codecs are fitted on training rows (at most 16384) and code others (at most 4096). The rate
         is *code* bits a float; codebooks and other side information are not counted: a quantizer
         made once for many files. Codes of fixed rate count as log2 of their alphabets, entropy
         coded ones as the bytes they take in a file. Where a chain ends in a trellis its step is
         moved until the held-out rows take the rate asked.
whole    the codec is fitted on the table it codes, and *every byte* counts. ``pp.compress`` gets
         the budget; the best of several settings of faiss PQ is taken, codebooks and rotations
         counted as float16. Peers have no header to pay. Each has few rates it can be had at, so
         ``pp.compress`` runs once more at the very bytes that the peer takes: ``ours_snr_db`` and
         ``ours_recall10`` beside the peer's own.

Peers are faiss's quantizers, int8 with a scale per row, float16, and float16 through zstd. faiss PQ
gets zero columns where the heads do not divide the row, and rates between two of its settings are
read off the line between them. RaBitQ's rows cannot be decoded as well as its own search estimates
them, so it is judged by recall alone. Of RQ, PRQ, LSQ and OPQ only settings that train in minutes
are tried (``LIMITS``); ``--fast`` leaves these four out.

Small tables (``tables.SMALL``) are compared whole alone.

``small_norms`` is the mean of |decoded| / |original| over the tenth of rows with the least norm.

``fit_seconds``, ``encode_seconds`` and ``decode_seconds`` are CPU seconds of all threads, which
other work on the machine does not change much.

    python benchmarks/vectors_rd.py --data FOLDER [--tables sift,tokens] [--codecs peers] [--quick]

Lines of tables and codecs that a run leaves out stay in the JSON, so runs can be spread;
``--resume`` goes on with what is not in it yet. What each link of our chain is worth:
``ablation.py``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tables import SMALL, Float32, Table, load_tables

import polarpack as pp
from polarpack import metrics

RESULTS = Path(__file__).parent / "results"
RATES = (0.5, 1.0, 2.0, 4.0)
SEED = 0
N_QUERIES = 500
QUICK_TABLES = ("glove_excerpt", "gaussian")
FAMILIES = ("ours", "presets", "peers")
LIMITS = {"RQ": 16, "PRQ": 96, "LSQ": 8}  # codes a row
LSQ_MAX_D = 128
LSQ_ROWS = 4096  # it is trained on: its search is a hundred times slower than theirs
MANY_ROWS = 12_000  # from here on codebooks of 8 bits are the best that peers can have
OPQ_ROUNDS = 10


@dataclass
class Coded:
    """Rows after coding and decoding, and what they cost."""

    decoded: Float32 | None
    code_bits: float  # a float
    side_bytes: float = 0.0
    setting: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)

    def total_bits(self, rows: Float32) -> float:
        """A float of these rows, side information included."""
        return self.code_bits + 8 * self.side_bytes / rows.size


Jobs = Iterator[tuple[str, float, Callable[[], Coded | None]]]  # codec, rate asked for, result


class Clock:
    """CPU seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """``work(*arguments)``, timed."""
        start = time.process_time()
        result = work(*arguments)
        self.seconds[f"{name}_seconds"] = time.process_time() - start
        return result


# -- peers: (train, rows, ...) -> Coded ------------------------------------------------------------
def padded(x: Float32, heads: int) -> Float32:
    """x with zero columns until ``heads`` divides its width."""
    width = -(-x.shape[1] // heads) * heads
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


def faiss_quantizer(q: Any, train: Float32, rows: Float32, heads: int, setting: str) -> Coded:
    """Train one of faiss's codebook quantizers and code rows with it."""
    clock, d = Clock(), rows.shape[1]
    train, rows = padded(train, heads), padded(rows, heads)
    clock.time("fit", lambda: q.train(train))
    codes = clock.time("encode", lambda: q.compute_codes(rows))
    decoded = clock.time("decode", lambda: q.decode(codes))[:, :d]
    return Coded(decoded, 0.0, setting=setting, seconds=clock.seconds)


def faiss_pq(train: Float32, rows: Float32, heads: int, nbits: int) -> Coded:
    """Product quantization (Jegou et al. 2011), as faiss trains it by default."""
    d = rows.shape[1]
    q = faiss.ProductQuantizer(padded(rows[:1], heads).shape[1], heads, nbits)
    q.cp.min_points_per_centroid = 1  # no warnings about small tables
    out = faiss_quantizer(q, train, rows, heads, f"{heads}x{nbits}")
    out.code_bits, out.side_bytes = heads * nbits / d, pq_side_bytes(d, nbits)
    return out


def pq_side_bytes(d: int, nbits: int) -> float:
    """float16 bytes of the codebooks of all heads together; padding is not counted."""
    return 2.0 * d * (1 << nbits)


def best_pq(train: Float32, rows: Float32, bits: float, *, paid: bool) -> Coded | None:
    """faiss PQ at ``bits`` a float; ``paid``: codebooks are inside it.

    Few rates can be had exactly, so quality is read off the line between the two neighbouring
    numbers of heads, for each size of codebook, and the best of these is taken.
    """
    n, d = rows.shape
    trials = []
    for nbits in (10, 8, 6, 5) if d < 64 else (8, 6, 5, 4, 3):
        side = 8 * pq_side_bytes(d, nbits) / (n * d) if paid else 0.0
        possible = [m for m in range(1, d + 1) if m == 1 or (m - 1) * -(-d // m) < d]  # none empty
        totals = np.array([m * nbits / d + side for m in possible])
        above = int(np.searchsorted(totals, bits - 1e-9))
        if above == len(possible) or (above == 0 and totals[0] > bits):
            continue
        high = faiss_pq(train, rows, possible[above], nbits)
        if totals[above] <= bits + 1e-9:
            trials.append(judged(rows, high))
            if not paid and nbits == 8:
                break  # smaller codebooks have nothing to offer where they cost nothing
        else:
            low = faiss_pq(train, rows, possible[above - 1], nbits)
            share = (bits - totals[above - 1]) / (totals[above] - totals[above - 1])
            trials.append(between(judged(rows, low), judged(rows, high), share))
    return max(trials, key=lambda c: c.quality["snr_db"], default=None)


def between(low: Coded, high: Coded, share: float) -> Coded:
    """A point on the line between two."""
    out = Coded(None, 0.0, high.side_bytes, f"between {low.setting} and {high.setting}")
    out.code_bits = low.code_bits + share * (high.code_bits - low.code_bits)
    out.quality = {k: (1 - share) * v + share * high.quality[k] for k, v in low.quality.items()}
    out.seconds = {k: (1 - share) * v + share * high.seconds[k] for k, v in low.seconds.items()}
    return out


def faiss_opq(train: Float32, rows: Float32, bits: float, *, paid: bool = False) -> Coded | None:
    """OPQ (Ge et al. 2013) with 8-bit heads; the rotation counts as float16."""
    n, d = rows.shape
    side = pq_side_bytes(d, 8) + 2.0 * d * d
    heads = int((bits * d if not paid else bits * d - 8 * side / n) / 8)
    while heads > 0 and d % heads:
        heads = heads - 1 if paid else 0
    if heads < 1 or len(train) < 2 * d:  # with fewer rows than columns faiss crashes
        return None
    clock = Clock()
    rotation, q = faiss.OPQMatrix(d, heads), faiss.ProductQuantizer(d, heads, 8)
    rotation.niter = OPQ_ROUNDS
    q.cp.min_points_per_centroid = 1

    def fit() -> None:
        rotation.train(train)
        q.train(rotation.apply(train))

    clock.time("fit", fit)
    codes = clock.time("encode", lambda: q.compute_codes(rotation.apply(rows)))
    decoded = clock.time("decode", lambda: rotation.reverse_transform(q.decode(codes)))
    return Coded(decoded, heads * 8 / d, side, f"{heads}x8", clock.seconds)


def faiss_residual(
    kind: str, train: Float32, rows: Float32, bits: float, *, paid: bool = False
) -> Coded | None:
    """RQ (all stages on the whole row), PRQ (as few heads as give at most 12 stages each) or LSQ;
    ``paid``: codebooks are inside ``bits``, and where rows are few smaller ones are tried too."""
    trials = []
    for nbits in (8, 6, 4) if paid and len(rows) < MANY_ROWS else (8,):
        setting = residual_setting(kind, rows, bits, nbits, paid)
        if setting is None or len(train) < 1 << nbits:
            continue
        splits, stages = setting
        d, codes = rows.shape[1], splits * stages
        if kind == "PRQ":
            q = faiss.ProductResidualQuantizer(d, splits, stages, nbits)
        else:
            one = {"RQ": faiss.ResidualQuantizer, "LSQ": faiss.LocalSearchQuantizer}[kind]
            q = one(d, codes, nbits)
        few = train[:: max(1, len(train) // LSQ_ROWS)] if kind == "LSQ" else train
        out = faiss_quantizer(q, few, rows, 1, f"{splits}x{stages}x{nbits}")
        out.code_bits = codes * nbits / d
        out.side_bytes = 2.0 * (1 << nbits) * d * codes / splits
        trials.append(judged(rows, out))
    # settings differ in size: 6 dB a bit
    return max(trials, key=lambda c: c.quality["snr_db"] - 6.02 * c.total_bits(rows), default=None)


def residual_setting(
    kind: str, rows: Float32, bits: float, nbits: int, paid: bool
) -> tuple[int, int] | None:
    """The most (heads, stages) that ``bits`` a float allow."""
    n, d = rows.shape
    for codes in range(min(LIMITS[kind], int(bits * d / nbits)), 0, -1):
        splits = 1
        if kind == "PRQ":
            splits = max(2, -(-codes // 12))
            while splits < codes and (codes % splits or d % splits):
                splits += 1
            if splits >= codes:
                continue  # is PQ
        side = 8 * 2.0 * (1 << nbits) * codes / splits / n if paid else 0.0
        if codes * nbits / d + side <= bits:
            return splits, codes // splits
        if not paid:
            return None
    return None


def faiss_scalar(train: Float32, rows: Float32, bits: int) -> Coded:
    """faiss's ScalarQuantizer: uniform levels between each column's extremes."""
    d = rows.shape[1]
    kind = {
        4: faiss.ScalarQuantizer.QT_4bit,
        6: faiss.ScalarQuantizer.QT_6bit,
        8: faiss.ScalarQuantizer.QT_8bit,
    }
    q = faiss.ScalarQuantizer(d, kind[bits])
    out = faiss_quantizer(q, train, rows, 1, f"{bits} bits")
    out.code_bits, out.side_bytes = bits, 2.0 * 2 * d
    return out


def faiss_eden(train: Float32, rows: Float32, bits: int) -> Coded:
    """EDEN (Vargaftik et al. 2022), which TurboQuant equals: centred, random rotation, Lloyd-Max
    levels and the scale of least error, kept as a float a row."""
    d = rows.shape[1]
    clock = Clock()
    index = faiss.index_factory(d, f"RR{d},EDEN{bits}")
    faiss.downcast_index(index.index).scale_type = faiss.EDENScaleType_BIASED
    clock.time("fit", lambda: index.train(train))
    codes = clock.time("encode", lambda: index.sa_encode(rows))
    decoded = clock.time("decode", lambda: index.sa_decode(codes))
    return Coded(decoded, 8 * codes.shape[1] / d, 4.0 * d, f"{bits} bits + factors", clock.seconds)


def faiss_rabitq(train: Float32, rows: Float32, bits: int) -> Coded:
    """RaBitQ (Gao and Long 2024) behind a random rotation: recall of its own estimates."""
    n, d = rows.shape
    clock = Clock()
    index = faiss.index_factory(
        d, f"RR{d},RaBitQ{bits if bits > 1 else ''}", faiss.METRIC_INNER_PRODUCT
    )
    clock.time("fit", lambda: index.train(train))
    clock.time("encode", lambda: index.add(rows))
    own = np.random.default_rng(0).permutation(n)[:N_QUERIES]  # as metrics.recall_at_k draws them
    found = clock.time("search", lambda: index.search(rows[own], 11)[1])
    truth = rows[own] @ rows.T
    truth[np.arange(len(own)), own] = -np.inf
    threshold = np.partition(truth, n - 10, axis=1)[:, n - 10]
    hits = 0
    for i, ids in enumerate(found):
        others = ids[ids != own[i]][:10]
        hits += int((truth[i, others[others >= 0]] >= threshold[i]).sum())
    size = index.sa_code_size() * 8 / d
    return Coded(
        None,
        size,
        4.0 * d,
        f"{bits} bits + factors",
        clock.seconds,
        {"recall10": hits / (10 * len(own))},
    )


def int8_rows(rows: Float32) -> Coded:
    """Eight bits a number and a float16 scale a row."""
    scale = (np.abs(rows).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    whole = np.clip(np.rint(rows / np.where(scale > 0, scale, 1)), -127, 127)
    return Coded(
        (whole * scale).astype(np.float32), 8 + 16 / rows.shape[1], setting="8 bits + scale"
    )


def float16(rows: Float32) -> Coded:
    """Half precision."""
    return Coded(rows.astype(np.float16).astype(np.float32), 16.0)


def float16_zstd(rows: Float32) -> Coded | None:
    """Half precision through zstd 19, bytes grouped by significance; None without zstandard."""
    try:
        import zstandard
    except ImportError:
        return None
    halves = rows.astype(np.float16)
    planes = np.ascontiguousarray(halves.view(np.uint8).reshape(-1, 2).T)
    size = len(zstandard.ZstdCompressor(level=19).compress(planes.tobytes()))
    return Coded(halves.astype(np.float32), 8 * size / rows.size, setting="level 19")


def peers(t: Table, rates: list[float], fast: bool, *, paid: bool) -> Jobs:
    """All peers, on held-out rows, or (``paid``) on the whole table with every byte counted."""
    train, rows = (t.x, t.x) if paid else (t.train, t.test)
    for bits in rates:
        yield "faiss PQ", bits, partial(best_pq, train, rows, bits, paid=paid)
        if not fast and bits <= 2:
            yield "faiss OPQ", bits, partial(faiss_opq, train, rows, bits, paid=paid)
            for kind in ("RQ", "PRQ", "LSQ"):
                if kind != "LSQ" or rows.shape[1] <= LSQ_MAX_D:
                    work = partial(faiss_residual, kind, train, rows, bits, paid=paid)
                    yield f"faiss {kind}", bits, work
        if bits in (1, 2, 4):
            yield "faiss EDEN", bits, partial(faiss_eden, train, rows, int(bits))
            yield "faiss RaBitQ", bits, partial(faiss_rabitq, train, rows, int(bits))
    for wide in (4, 6, 8):
        yield "faiss SQ", wide, partial(faiss_scalar, train, rows, wide)
    yield "int8 rows", 8, partial(int8_rows, rows)
    if paid:
        yield "float16", 16, partial(float16, rows)
        yield "float16 + zstd", 16, partial(float16_zstd, rows)


# -- ours ------------------------------------------------------------------------------------------
def fitted(clock: Clock, q: pp.PolarQuantizer, rows: Float32, setting: str) -> Coded:
    """Rows through a fitted quantizer and a file of theirs alone; the file decodes to the same."""
    blob = clock.time("encode", lambda: pp.compress(rows, quantizer=q))
    decoded = clock.time("decode", lambda: pp.decompress(blob))
    if not np.array_equal(decoded, q.decode(q.encode(rows))):
        raise SystemExit(f"{setting}: the file does not decode as the quantizer does")
    codes_bytes = pp.open(blob).info()["tensors"]["x"]["codes_bytes"]
    bits = 8 * codes_bytes / rows.size
    if q.layout == "rows":
        bits = float(np.log2(q.alphabet_sizes).sum()) / q.d_
    return Coded(decoded, bits, len(q.to_bytes()), setting, clock.seconds)


def pp_fit(train: Float32, rows: Float32, bits: float, **options: Any) -> Coded | None:
    """``pp.fit`` at ``bits`` a float of the held-out rows; None where no fixed rate is so low."""
    clock = Clock()
    try:
        q = clock.time("fit", lambda: pp.fit(train, bits=bits, seed=SEED, **options))
    except pp.InputError:
        return None
    if q.layout == "rows":
        return fitted(clock, q, rows, describe(q))
    return at_rate(clock, q, train, rows, bits)


def at_rate(
    clock: Clock, q: pp.PolarQuantizer, train: Float32, rows: Float32, bits: float
) -> Coded:
    """Rows through a chain that ends in a trellis, its step moved until they take ``bits`` a float
    to within 0.3%."""
    setting, log_step = describe(q), math.log2(q.fine_.step_)
    tried: list[tuple[float, float]] = []
    while True:
        out = fitted(clock, q, rows, setting)
        tried.append((log_step, out.code_bits))
        if abs(out.code_bits / bits - 1) < 0.003 or len(tried) == 6:
            break
        slope = -0.8 * min(1.0, bits)
        if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
            slope = (tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0])
        log_step += (bits - out.code_bits) / slope
        q = q.with_step(train, 2.0**log_step)
    out.setting = f"{setting}; {tried[0][1]:.4f} at the step fitted"
    return out


def describe(q: pp.PolarQuantizer) -> str:
    """The chain in a few words."""
    words = [f"radius {q.radius_.n_bits}"] if q.radius_ is not None else []
    words += [f"{q.rotation_.n_classes} classes"] if q.rotation_.n_classes > 1 else []
    kind = getattr(q.rotation_, "common", q.rotation_).kind
    name = {"none": "native order", "klt": "KLT"}.get(kind, f"{kind} rotation")
    words += [f"{name} {q.rotation_.n_components_} of {q.d_}" if kind == "klt" else name]
    return ", ".join([*words, q.fine])


def pp_compress(rows: Float32, total_bytes: float, **options: Any) -> Coded | None:
    """``pp.compress`` to a budget, side information and header included; None where it is out of
    reach."""
    clock = Clock()
    try:
        blob = clock.time(
            "fit", lambda: pp.compress(rows, size_bytes=total_bytes, seed=SEED, **options)
        )
    except pp.InputError:
        return None
    decoded = clock.time("decode", lambda: pp.decompress(blob))
    if len(blob) > total_bytes:
        raise SystemExit(f"{len(blob)} bytes exceed {total_bytes}")
    file = pp.open(blob)
    codes_bytes = file.info()["tensors"]["x"]["codes_bytes"]
    q = file["x"].quantizer
    setting = "raw" if q is None else describe(q)
    return Coded(
        decoded, 8 * codes_bytes / rows.size, len(blob) - codes_bytes, setting, clock.seconds
    )


OBJECTIVES = ("recall", "cosine")


def ours_heldout(t: Table, rates: list[float]) -> Jobs:
    """``pp.fit`` for an SNR, for recall and for cosine, and in the layout of fixed rate."""
    for bits in rates:
        yield "pp.fit", bits, partial(pp_fit, t.train, t.test, bits)
        for objective in OBJECTIVES if bits >= 1 else ():
            work = partial(pp_fit, t.train, t.test, bits, optimize=objective)
            yield f"pp.fit {objective}", bits, work
        yield "pp.fit rows", bits, partial(pp_fit, t.train, t.test, bits, layout="rows")


def ours_whole(t: Table, rates: list[float]) -> Jobs:
    """``pp.compress`` at budgets, in both layouts."""
    for bits in rates:
        budget = bits * t.x.size / 8
        yield "pp.compress", bits, partial(pp_compress, t.x, budget)
        yield "pp.compress rows", bits, partial(pp_compress, t.x, budget, layout="rows")


def presets_heldout(t: Table, rates: list[float], fast: bool) -> Jobs:
    """Our named settings on held-out rows."""
    d = t.x.shape[1]
    for bits in rates:
        names = ["trellis", "polar_trellis", "pq", "polar_vq"]
        names += ["turboquant"] if bits in (1, 2, 4) else []
        names += ["prq", "opq"] if not fast and bits <= 2 else []
        names += ["rq"] if not fast and bits * d <= 8 * LIMITS["RQ"] else []
        for name in names:
            yield f"preset {name}", bits, partial(pp_preset, name, t.train, t.test, bits)
    for name, bits in (("sq8", 8.0), ("int8_rows", 8.0), ("float16", 16.0)):
        yield f"preset {name}", bits, partial(pp_preset, name, t.train, t.test, None)


def pp_preset(name: str, train: Float32, rows: Float32, bits: float | None) -> Coded:
    """A preset, fitted and applied."""
    clock = Clock()
    q = clock.time("fit", lambda: pp.preset(name, bits, seed=SEED).fit(train))
    return fitted(clock, q, rows, describe(q))


# -- runs ------------------------------------------------------------------------------------------
def run(
    t: Table,
    rates: list[float],
    families: list[str],
    fast: bool,
    only: set[str],
    done: set[tuple[Any, ...]],
) -> Iterator[dict[str, Any]]:
    """One line of results for each codec, comparison and rate that is wanted and not done."""
    heldout: list[Jobs] = []
    whole: list[Jobs] = []
    if "ours" in families:
        heldout.append(ours_heldout(t, rates))
        whole.append(ours_whole(t, rates))
    if "presets" in families:
        heldout.append(presets_heldout(t, rates, fast))
    if "peers" in families:
        heldout.append(peers(t, rates, fast, paid=False))
        whole.append(peers(t, rates, fast, paid=True))
    matched: dict[int, dict[str, float]] = {}
    if t.name in SMALL:
        heldout = []
    for comparison, rows, families_of_jobs in (("heldout", t.test, heldout), ("whole", t.x, whole)):
        for codec, rate, work in chain.from_iterable(families_of_jobs):
            wanted = not only or f"{comparison} {codec}" in only
            if not wanted or (t.name, comparison, codec, float(rate)) in done:
                continue
            coded = work()
            if coded is None:
                continue
            out = line(t, comparison, codec, rate, rows, coded)
            if comparison == "whole" and not codec.startswith("pp."):
                out |= equal_bytes(rows, coded, matched)
            yield out


def equal_bytes(
    rows: Float32, peer: Coded, matched: dict[int, dict[str, float]]
) -> dict[str, float]:
    """What ``pp.compress`` reaches at the very bytes a peer takes; ``matched``: known already."""
    total_bytes = int(peer.total_bits(rows) * rows.size / 8)
    if total_bytes not in matched:
        ours = pp_compress(rows, total_bytes)
        matched[total_bytes] = {} if ours is None else judged(rows, ours).quality
    found = matched[total_bytes]
    snr = found.get("snr_db", -math.inf)
    out = {} if not found else {"ours_recall10": round(found["recall10"], 4)}
    return out | ({"ours_snr_db": round(snr, 3)} if math.isfinite(snr) else {})


def line(
    t: Table, comparison: str, codec: str, rate: float, rows: Float32, c: Coded
) -> dict[str, Any]:
    """What was coded, judged, as one object of the JSON."""
    out: dict[str, Any] = {"table": t.name, "comparison": comparison, "codec": codec, "rate": rate}
    out["setting"] = c.setting
    out["code_bits"] = round(c.code_bits, 4)
    out["side_bytes"] = round(c.side_bytes)
    out["total_bits"] = round(c.total_bits(rows), 4)
    quality = (c if c.quality else judged(rows, c)).quality
    digits = {"snr_db": 3, "cosine": 5, "cosine_p01": 5, "recall10": 4, "small_norms": 4}
    for name, value in quality.items():  # an SNR of None: exact
        out[name] = round(value, digits[name]) if math.isfinite(value) else None
    return out | {name: round(value, 2) for name, value in c.seconds.items()}


def judged(rows: Float32, c: Coded) -> Coded:
    """The same with its quality filled in, after checking that it can be judged."""
    if c.decoded is None or c.decoded.shape != rows.shape or c.decoded.dtype != np.float32:
        raise SystemExit(
            f"{c.setting}: decoded to {None if c.decoded is None else c.decoded.shape}"
        )
    cosines = metrics.cosine(rows, c.decoded)
    c.quality = {
        "snr_db": metrics.snr_db(rows, c.decoded),
        "cosine": float(cosines.mean()),
        "cosine_p01": float(np.quantile(cosines, 0.01)),
        "recall10": metrics.recall_at_k(rows, c.decoded, k=10, n_queries=N_QUERIES),
        "small_norms": small_norms(rows, c.decoded),
    }
    return c


def small_norms(rows: Float32, decoded: Float32) -> float:
    """Mean of |decoded| / |original| over the tenth of rows with the least norm but zero."""
    norms, kept = (np.linalg.norm(v.astype(np.float64), axis=1) for v in (rows, decoded))
    small = np.argsort(np.where(norms > 0, norms, np.inf))[: max(1, len(rows) // 10)]
    return float(np.mean(kept[small] / np.maximum(norms[small], 1e-300)))


def show(row: dict[str, Any]) -> None:
    """One line of the printed table."""
    snr = row.get("snr_db")
    quality = "exact".rjust(24) if "snr_db" in row else "-".rjust(24)
    if snr is not None:
        quality = f"{snr:8.2f}{row['cosine']:8.4f}{row['cosine_p01']:8.4f}"
    print(
        f"{row['table']:14}{row['comparison']:8}{row['codec']:21}{row['rate']:5.4g}"
        f"{row['code_bits']:9.4f}{row['total_bits']:9.4f}{quality}"
        f"{row['recall10']:7.3f}{row.get('fit_seconds', 0):8.1f}  {row['setting']}"
        + (f"; ours {row['ours_snr_db']:.2f}" if "ours_snr_db" in row else ""),
        flush=True,
    )


HEADER = (
    f"{'table':14}{'':8}{'codec':21}{'rate':>5}{'code':>9}{'total':>9}{'SNR':>8}{'cosine':>8}"
    f"{'p01':>8}{'recall':>7}{'fit s':>8}  setting"
)


def provenance() -> dict[str, Any]:
    """How and with what this run was made."""
    names = ("polarpack", "numpy", "numba", "faiss-cpu", "zstandard")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = pp.__version__ if name == "polarpack" else None
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        "cpu": cpu_name(),
        "versions": versions,
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def merge(path: Path, made: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put lines into the results on disk, in the place of older ones of the same name."""
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = {key(row): row for row in old.get("rows", [])} | {key(row): row for row in rows}
    merged = {"question": (__doc__ or "").splitlines()[0]} | made
    merged["data"] = old.get("data", {}) | made["data"]
    order = list(merged["data"])
    merged["rows"] = sorted(kept.values(), key=lambda r: (order.index(r["table"]), *key(r)[1:]))
    path.parent.mkdir(exist_ok=True)
    tables = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in merged["data"].items())
    lines = ",\n".join("  " + json.dumps(row) for row in merged["rows"])
    text = json.dumps(merged | {"data": {}, "rows": []}, indent=1)
    text = text.replace('"data": {}', f'"data": {{\n{tables}\n }}')
    path.write_text(text.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n")


def key(row: dict[str, Any]) -> tuple[str, str, str, float]:
    """What names a line of results."""
    return row["table"], row["comparison"], row["codec"], float(row["rate"])


def main() -> None:
    """Parse arguments, run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    env = [Path(p) for p in os.environ.get("POLARPACK_DATA", "").split(os.pathsep) if p]
    parser.add_argument(
        "--data", type=Path, action="append", help="folder with tables, or a .npy file; repeatable"
    )
    parser.add_argument("--tables", type=lambda s: s.split(","), help="names (all by default)")
    parser.add_argument(
        "--rates", type=lambda s: [float(v) for v in s.split(",")], default=list(RATES)
    )
    parser.add_argument(
        "--codecs", type=lambda s: s.split(","), default=list(FAMILIES), help=", ".join(FAMILIES)
    )
    parser.add_argument(
        "--only",
        type=lambda s: set(s.split(",")),
        default=set(),
        help='of these families, as "whole faiss PQ,heldout pp.fit"',
    )
    parser.add_argument("--fast", action="store_true", help="without OPQ, PRQ, RQ and LSQ")
    parser.add_argument("--resume", action="store_true", help="only what is not in the JSON yet")
    parser.add_argument("--quick", action="store_true", help="two small tables at 1 and 2 bits")
    parser.add_argument("--out", type=Path, default=RESULTS / "vectors_rd.json")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        help="run nothing: take over the lines of other --out files",
    )
    args = parser.parse_args()
    if wrong := set(args.codecs) - set(FAMILIES):
        parser.error(f"expected codecs of {', '.join(FAMILIES)}, got {', '.join(wrong)}")
    names, rates = args.tables, args.rates
    args.fast |= args.quick
    if args.quick:
        names, rates = names or list(QUICK_TABLES), [1.0, 2.0]
    if args.merge:
        for other in args.merge:
            results = json.loads(other.read_text())
            merge(args.out, results, results["rows"])
    else:
        print(HEADER)
        for table in load_tables(names, args.data or env):
            data = {
                table.name: {
                    "shape": list(table.x.shape),
                    "dtype": "float32",
                    "train_rows": len(table.train),
                    "test_rows": len(table.test),
                    "bound_rates": list(BOUND_RATES),
                    "bound_db": np.round(
                        metrics.rate_distortion_bound(table.x, BOUND_RATES), 3
                    ).tolist(),
                }
            }
            old = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
            done = {key(row) for row in old} if args.resume else set()
            rows = []
            for row in run(table, rates, args.codecs, args.fast, args.only, done):
                show(row)
                rows.append(row)
                merge(args.out, provenance() | {"data": data}, rows)
    draw(json.loads(args.out.read_text()), args.out.parent, names)


# -- figures ---------------------------------------------------------------------------------------
BOUND_RATES = tuple(float(v) for v in np.round(np.geomspace(0.25, 8, 31), 4))  # with 0.5, 1, 2, 4
STYLES = {
    "pp.fit": ("#c02020", "o", 2.2),
    "pp.compress": ("#c02020", "o", 2.2),
    "preset polar_vq": ("#e08030", "s", 1.3),
    "preset pq": ("#d0b020", "D", 1.0),
    "faiss PQ": ("#2060b0", "^", 1.3),
    "faiss OPQ": ("#40a0d0", "v", 1.3),
    "faiss PRQ": ("#208060", "<", 1.3),
    "faiss RQ": ("#60b060", ">", 1.3),
    "faiss LSQ": ("#90a030", "p", 1.3),
    "faiss EDEN": ("#8050a0", "x", 1.3),
    "faiss SQ": ("#808080", "+", 1.3),
    "int8 rows": ("#404040", "*", 1.0),
}


def draw(results: dict[str, Any], folder: Path, names: list[str] | None) -> None:
    """One figure a table: how far the SNR is from the bound, over code bits of held-out rows and
    over all bytes of the table. (SNR itself would be one steep line for all.)"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, data in results["data"].items():
        if names and name not in names:
            continue
        n, d = data["shape"]
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
        panels = (
            ("heldout", "code_bits", "code bits a float", f"{data['test_rows']} held-out rows"),
            ("whole", "total_bits", "bits a float, every byte counted", f"all of {n} x {d}"),
        )
        for axis, (comparison, measure, label, title) in zip(axes, panels, strict=True):
            axis.axhline(0, color="black", lw=1, ls="--", label="Gaussian bound of one KLT")
            for codec, (color, marker, width) in STYLES.items():
                chosen = [
                    (r[measure], r["snr_db"])
                    for r in results["rows"]
                    if (r["table"], r["comparison"], r["codec"]) == (name, comparison, codec)
                    and r.get("snr_db")
                    and r[measure] < 9
                ]
                if chosen:
                    bits, snr = np.array(sorted(chosen)).T
                    grid = np.log2(data["bound_rates"])
                    gap = snr - np.interp(np.log2(bits), grid, data["bound_db"])
                    axis.plot(bits, gap, color=color, marker=marker, lw=width, ms=5, label=codec)
            axis.set_xscale("log", base=2)
            axis.set_xlim(0.4, 9.5)
            ticks = [0.5, 1, 2, 4, 8]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, loc="lower left")
            axis.set(xlabel=label, title=f"{name}: {title}")
        axes[0].set_ylabel("SNR less the bound's, dB")
        figure.savefig(folder / f"vectors_rd_{name}.png", dpi=110)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
