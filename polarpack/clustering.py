"""k-means and spherical k-means, and the search for the nearest codeword.

Training needs faiss, for the search on a GPU and for large ones on every core; this is its door.
(Where torch has a GPU and faiss none, ``_cuda`` trains.)
``nearest``, which every encoder calls and small trainings too, needs the core dependencies alone,
so a fitted quantizer encodes and decodes without faiss.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Float32, enter, is_torch, returner
from ._numba import njit
from ._threads import in_threads
from .errors import InputError, MissingDependencyError

Int64 = npt.NDArray[np.int64]
Metric = Literal["l2", "ip"]
Device = Literal["auto", "cpu", "cuda"]
Search = Callable[[Float32, Float32], tuple[Int64, Float32]]
Grow = Callable[..., Float32]  # (rows, k, rng=) -> centroids

MAX_CENTROIDS = 1 << 16  # codes are at most 16 bits wide
DIRECT_MAX_D = 28  # up to here plain differences are faster than a matrix product, and exact
FAISS_WORK = 1 << 32  # n * k * d from where faiss's threads are worth waking, on a busy machine too
BLOCK_SCORES = 1 << 18  # float32 scores of a block of rows: 1 MiB, stays in the second-level cache
SPLIT = np.float32(0.2)  # how far towards one of its rows a centroid moves when split in two
CONVERGED = 1e-4  # stop once an iteration lowers the error by less, 0.0004 dB
SPLIT_COST = 0.5  # of the average: cheaper clusters stay whole, each being one group perhaps
SPLIT_PASSES = 2  # iterations before splitting again; more change nothing measurable
SPLIT_ROWS = 64  # for each centroid are enough for these, and halve the time of all
COMFORTABLE = 40  # powers of two within which squares neither overflow nor vanish in float32


def kmeans(
    x: Any,
    k: int,
    *,
    spherical: bool = False,
    device: Device = "auto",
    seed: int = 0,
    n_iter: int = 25,
    max_points_per_centroid: int = 256,
) -> tuple[Any, Any]:
    """Cluster the rows of x: k centroids, and the nearest of them for every row.

    Costly clusters are split in two until there are k, with a few of Lloyd's iterations each time.
    Where no more than k rows are distinct they become the centroids, exactly, and are repeated to
    fill up. An emptied cluster restarts at a row drawn in proportion to its error. The scale of x
    is of no concern.

    Parameters
    ----------
    x : (n, d) float array or tensor, any n >= 0.
    k : number of centroids, 1..65536.
    spherical : centroids of unit norm that maximise the sum over rows of <row, its centroid>: rows
        weigh by their norm (normalise them first for classical spherical k-means). A zero row
        belongs to centroid 0.
    device : "cuda" needs a faiss or a torch that sees a GPU; "auto" uses a GPU if faiss has one, or
        if torch has one and the work is worth it.
    seed : same seed, machine and versions: same result.
    n_iter : most iterations with all k centroids; stops once the error falls by less than 0.01%.
    max_points_per_centroid : train on at most k times this many rows, drawn without replacement.

    Returns
    -------
    centroids : (k, d) float32, never NaN.
    assignment : (n,) int64 for all rows of x, the lowest index among equals. Both in x's library.

    O(n_iter * min(n, k * max_points_per_centroid) * k * d + n * k * d) time; memory beyond the
    training rows is bounded by a block of rows.

    Raises InputError for a bad argument, or x not finite or not (n, d); MissingDependencyError
    without faiss.

    Source: Lloyd, "Least squares quantization in PCM", IEEE Trans. IT 1982; Linde, Buzo and Gray,
    "An algorithm for vector quantizer design", IEEE Trans. Communications 1980 (splitting);
    Dhillon and Modha, "Concept decompositions for large sparse text data", Machine Learning 2001.
    """
    rows, _ = enter(x)
    k = check_int("k", k, 1, MAX_CENTROIDS)
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"expected device auto, cpu or cuda, got {device!r}")
    metric: Metric = "ip" if spherical else "l2"
    n_iter = check_int("n_iter", n_iter, 1)
    max_rows = k * check_int("max_points_per_centroid", max_points_per_centroid, 1)
    grow, search, on_gpu = _ways(spherical, device, n_iter, rows.size * k)
    centroids = _train(
        rows,
        k,
        spherical=spherical,
        grow=grow,
        seed=check_int("seed", seed, 0),
        max_rows=max_rows,
    )
    if on_gpu:
        assignment = _blockwise(rows, centroids, search)
    else:
        assignment, _ = _nearest_in_threads(rows, centroids, metric)
    back = returner(x[:0].float()) if is_torch(x) else _identity  # float32 whatever x's dtype
    return back(centroids), back(assignment)


def train_centroids(
    x: Float32, k: int, *, spherical: bool = False, seed: int | Sequence[int] = 0, n_iter: int = 25
) -> Float32:
    """The centroids of ``kmeans`` alone, for checked (n, d) float32 rows: (k, d) float32."""
    grow, _, _ = _ways(spherical, "auto", n_iter, x.size * k)
    return _train(x, k, spherical=spherical, grow=grow, seed=seed, max_rows=256 * k)


def _identity(y: Array) -> Array:
    return y


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """value as an int in least..most, or InputError."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InputError(f"expected {name} to be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        limits = f"in {least}..{most}" if most is not None else f">= {least}"
        raise InputError(f"expected {name} {limits}, got {value}")
    return int(value)


def _ways(spherical: bool, device: Device, n_iter: int, work: int) -> tuple[Grow, Search, bool]:
    """How centroids are grown and found, and whether on a GPU: faiss's if it has one, else
    torch's if it is asked for or ``work`` (n * k * d) is worth it, else the CPU."""
    metric: Metric = "ip" if spherical else "l2"
    with_faiss = _faiss_gpu()
    if device != "cpu" and not with_faiss and (device == "cuda" or work >= FAISS_WORK):
        if _torch_gpu():
            from . import _cuda

            grow = partial(_cuda.grow_rows, spherical=spherical, n_iter=n_iter)
            return grow, _cuda.search(metric), True
        if device == "cuda":
            raise InputError(
                'device="cuda": no GPU that faiss or torch could use; use device="auto" or "cpu"'
            )
    search, on_gpu = _faiss_search(metric, device)
    return partial(_grow, search=search, spherical=spherical, n_iter=n_iter), search, on_gpu


def _torch_gpu() -> bool:
    """Whether torch sees a GPU; it is loaded only where it has been already, or a driver is."""
    if "torch" not in sys.modules and not os.path.exists("/proc/driver/nvidia/version"):
        return False
    try:
        from . import _cuda
    except ImportError:
        return False
    return _cuda.is_available()


def _faiss_gpu() -> bool:
    """Whether there is a faiss that sees a GPU."""
    try:
        import faiss
    except ImportError:
        return False
    return bool(hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0)


def _faiss_search(metric: Metric, device: Device) -> tuple[Search, bool]:
    """Nearest-centroid search on all cores or faiss's GPU, and whether it is the GPU."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            'k-means needs faiss: pip install "polarpack[faiss]" (or [gpu] for CUDA)'
        ) from error
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    on_gpu = device != "cpu" and _faiss_gpu()
    find = partial(faiss.knn_gpu, faiss.StandardGpuResources()) if on_gpu else faiss.knn

    def search(x: Float32, centroids: Float32) -> tuple[Int64, Float32]:
        small = x.shape[1] <= DIRECT_MAX_D or x.size * centroids.shape[0] < FAISS_WORK
        if small and not on_gpu:
            return _nearest_in_threads(x, centroids, metric)
        score, index = find(x, centroids, 1, metric=kind)
        return np.asarray(index, np.int64)[:, 0], np.asarray(score, np.float32)[:, 0]

    return search, on_gpu


def _nearest_in_threads(x: Float32, centroids: Float32, metric: Metric) -> tuple[Int64, Float32]:
    index, score = np.empty(x.shape[0], np.int64), np.empty(x.shape[0], np.float32)

    def work(start: int) -> None:
        rows = slice(start, start + (1 << 14))
        index[rows], score[rows] = nearest(x[rows], centroids, metric)

    in_threads(work, range(0, x.shape[0], 1 << 14))
    return index, score


def _blockwise(x: Float32, centroids: Float32, search: Search) -> Int64:
    """``search`` over all rows of x, in blocks and at a harmless scale."""
    e = -exponent(centroids)
    centroids = np.ldexp(centroids, e)
    out = np.empty(x.shape[0], np.int64)
    for start in range(0, x.shape[0], 1 << 16):
        rows = slice(start, start + (1 << 16))
        out[rows] = search(np.ldexp(x[rows], e), centroids)[0]
    return out


# ------------------------------------------------------------------------------------- training


def _train(
    x: Float32,
    k: int,
    *,
    spherical: bool,
    grow: Grow,
    seed: int | Sequence[int],
    max_rows: int,
) -> Float32:
    rng = np.random.default_rng(seed)
    if x.shape[0] > max_rows:  # sorted: a memory map is read in order
        x = x[np.sort(rng.choice(x.shape[0], max_rows, replace=False))]
    e = comfortable_scale(x)
    scaled = np.ldexp(x, -e) if e else x
    if spherical:
        scaled = scaled[scaled.any(axis=1)]  # a zero row has no direction
        units = _unit(scaled)
        few = _few_distinct(units, k, np.eye(1, x.shape[1], dtype=np.float32))
        return few if few is not None else grow(scaled, k, rng=rng)
    few = _few_distinct(x, k, np.zeros((1, x.shape[1]), np.float32))
    if few is not None:
        return few
    # Centred: faiss expands |x - c|^2, which would cancel where the rows are far from the origin.
    mean = scaled.mean(axis=0, dtype=np.float64).astype(np.float32)
    centroids = grow(scaled - mean, k, rng=rng)
    return cast(Float32, np.ldexp(centroids + mean, e))


def _few_distinct(x: Float32, k: int, default: Float32) -> Float32 | None:
    """The distinct rows of x repeated to k of them, or None if more than k are distinct.

    Without rows: ``default``. O(k d) for all but odd data.
    """
    for rows in (x[: 4 * k], x):  # the first few mostly tell already
        keys = np.ascontiguousarray(rows + np.float32(0))  # -0.0 counts as 0.0
        keys = keys.view(np.dtype((np.void, keys.itemsize * keys.shape[1])))[:, 0]
        first = np.unique(keys, return_index=True)[1]
        if first.size > k:
            return None
    distinct = x[np.sort(first)] if first.size else default
    return np.resize(distinct, (k, x.shape[1]))


def _unit(x: Float32) -> Float32:
    """Nonzero rows divided by their norms."""
    norms = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
    return cast(Float32, (x / norms[:, None]).astype(np.float32))


def _grow(
    x: Float32, k: int, *, search: Search, spherical: bool, n_iter: int, rng: np.random.Generator
) -> Float32:
    """k centroids by splitting the costly clusters, with a few of Lloyd's iterations each time.

    Random rows as start leave hundreds of clusters of one row in noise of many dimensions, which
    Lloyd's iterations never fill, and miss whole groups of rows; splitting does neither. Until
    there are k centroids, evenly spaced rows stand for all.
    """
    all_norms = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))

    def rows_for(n: int) -> tuple[Float32, npt.NDArray[np.float64]]:
        """Rows, and their norms, that n centroids are to settle on."""
        step = max(1, len(x) // (SPLIT_ROWS * n))
        return np.ascontiguousarray(x[::step]), all_norms[::step]

    centroids: Float32 = x.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    if spherical:
        centroids = _unit(centroids if centroids.any() else x[:1])
    few, norms = rows_for(1)
    index = np.zeros(len(few), np.int64)
    error = norms if spherical else norms * norms
    while centroids.shape[0] < k:
        cost = np.bincount(index, error, centroids.shape[0])
        costly = max(np.count_nonzero(cost > SPLIT_COST * cost.mean()), centroids.shape[0] // 4)
        n_split = int(min(costly, np.count_nonzero(cost), k - centroids.shape[0]))
        if n_split == 0 and len(few) < len(x):  # what is left to tell apart is in other rows
            few, norms = x, all_norms
            index, error = _assign(few, centroids, norms, search, spherical)
            continue
        if n_split == 0:  # distances vanish in float32
            return np.resize(centroids, (k, x.shape[1]))
        split = np.argsort(-cost, kind="stable")[:n_split]
        member = np.zeros(centroids.shape[0], np.int64)
        order = rng.permutation(len(few))
        member[index[order]] = order  # a random row of each cluster gives the direction
        towards = _unit(few[member[split]]) if spherical else few[member[split]]
        delta = SPLIT * (towards - centroids[split])
        centroids[split] -= delta
        centroids = np.concatenate([centroids, centroids[split] + 2 * delta])
        centroids = _unit(centroids) if spherical else centroids
        if centroids.shape[0] < k:
            few, norms = rows_for(centroids.shape[0])
            centroids = _lloyd(few, centroids, norms, search, spherical, SPLIT_PASSES, rng)
            index, error = _assign(few, centroids, norms, search, spherical)
    if k > 1:
        return _lloyd(x, centroids, all_norms, search, spherical, n_iter, rng)
    return centroids


def _assign(
    x: Float32,
    centroids: Float32,
    norms: npt.NDArray[np.float64],
    search: Search,
    spherical: bool,
) -> tuple[Int64, npt.NDArray[np.float64]]:
    """Nearest centroid and error of each row: squared distance, or norm less inner product."""
    index, score = search(x, centroids)
    return index, np.maximum(norms - score if spherical else score.astype(np.float64), 0.0)


def _lloyd(
    x: Float32,
    centroids: Float32,
    norms: npt.NDArray[np.float64],
    search: Search,
    spherical: bool,
    n_iter: int,
    rng: np.random.Generator,
) -> Float32:
    k, d = centroids.shape
    cost = np.inf
    for _ in range(n_iter):
        index, error = _assign(x, centroids, norms, search, spherical)
        before, cost = cost, float(error.sum())
        if cost >= (1 - CONVERGED) * before:
            break
        sums = np.zeros((k, d))
        _add_rows(x, index, sums)
        size = np.linalg.norm(sums, axis=1) if spherical else np.bincount(index, minlength=k)
        filled = size > 0
        centroids = (sums / np.where(filled, size, 1)[:, None]).astype(np.float32)
        if not filled.all():
            _restart_empty(centroids, filled, x, error, spherical, rng)
    return centroids


def _restart_empty(
    centroids: Float32,
    filled: npt.NDArray[np.bool_],
    x: Float32,
    error: npt.NDArray[np.float64],
    spherical: bool,
    rng: np.random.Generator,
) -> None:
    """Move the centroids of empty clusters to rows drawn in proportion to their error."""
    empty = np.flatnonzero(~filled)
    n_drawn = min(empty.size, int(np.count_nonzero(error)))
    if n_drawn:
        drawn = x[rng.choice(x.shape[0], n_drawn, replace=False, p=error / error.sum())]
        centroids[empty[:n_drawn]] = _unit(drawn) if spherical else drawn
    if n_drawn < empty.size:  # no error left to remove
        centroids[empty[n_drawn:]] = centroids[np.flatnonzero(filled)[0]]


@njit(cache=True, nogil=True)
def _add_rows(x, index, sums):  # type: ignore[no-untyped-def]
    """sums[index[i]] += x[i], in float64 and in the order of the rows."""
    for i in range(x.shape[0]):
        total = sums[index[i]]
        for j in range(x.shape[1]):
            total[j] += x[i, j]


# --------------------------------------------------------------------------------------- search


def exponent(*arrays: Float32) -> int:
    """The e for which the largest absolute value lies in [2^(e-1), 2^e); 0 if all are zero."""
    largest = max((float(max(a.max(), -a.min())) for a in arrays if a.size), default=0.0)
    return int(np.frexp(largest)[1])


def comfortable_scale(*arrays: Float32) -> int:
    """``exponent`` where squares could leave float32's range, else 0 (no scaling, no copy)."""
    e = exponent(*arrays)
    return e if abs(e) > COMFORTABLE else 0


def nearest(x: Float32, centroids: Float32, metric: Metric = "l2") -> tuple[Int64, Float32]:
    """Index of the nearest centroid (metric "ip": of the largest inner product) of each row.

    Parameters
    ----------
    x : (n, d) float32, C-ordered and finite (checked by the caller), any scale.
    centroids : (k, d) float32, k >= 1.

    Returns
    -------
    index : (n,) int64; the lowest among equals.
    score : (n,) float32; squared distance, or inner product. Infinite where beyond float32.

    Up to d = 28 distances are plain sums of squared differences. Above, inner products in float32
    find all centroids that could be nearest within their rounding error, and float64 differences
    decide among them. O(n * k * d) time, one block of scores (1 MiB, or 16 k floats) of memory
    beyond the result. Needs no faiss, and is as fast on one core.
    """
    n, d = x.shape
    k = centroids.shape[0]
    index, score = np.empty(n, np.int64), np.empty(n, np.float32)
    e = comfortable_scale(x, centroids)
    x, centroids = (np.ldexp(x, -e), np.ldexp(centroids, -e)) if e else (x, centroids)
    if metric == "l2" and d <= DIRECT_MAX_D:
        _nearest_direct(x, np.ascontiguousarray(centroids.T), np.empty(k, np.float32), index, score)
    else:
        l2 = metric == "l2"
        mean = centroids.mean(axis=0) if l2 else np.zeros(d, np.float32)
        centred = centroids - mean  # smaller numbers, smaller rounding errors, fewer doubtful cases
        columns = np.ascontiguousarray(centred.T)
        energy = np.einsum("ij,ij->i", centred, centred, dtype=np.float64)
        bias = (energy / 2 if l2 else 0 * energy).astype(np.float32)
        largest = np.sqrt(energy.max())
        rounding = (d + 8) * 2.0**-23  # |fl(<x, c>) - <x, c>| <= d 2^-24 |x| |c|, and both sides
        step = max(16, BLOCK_SCORES // k)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            block = x[rows] - mean if l2 else x[rows]
            norms = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64))
            slack = (rounding * largest * (norms + (largest if l2 else 0.0))).astype(np.float32)
            products = inner_products(block, columns)
            _nearest_of_products(
                products, bias, slack, x[rows], centroids, l2, index[rows], score[rows]
            )
    with np.errstate(over="ignore", under="ignore"):
        return index, np.ldexp(score, 2 * e) if e else score


@njit(cache=True, nogil=True)
def _nearest_direct(x, columns, distance, index, score):  # type: ignore[no-untyped-def]
    """Squared differences, four columns a pass; columns is (d, k), distance a buffer of k.

    Distances are compared as integers: for floats >= 0 the order is the same, and an integer
    minimum needs no care for NaN, so that it runs in SIMD without fastmath.
    """
    k = columns.shape[1]
    bits = distance.view(np.int32)
    for i in range(x.shape[0]):
        squared_distances(x[i], columns, distance)
        low = bits[0]
        for c in range(k):
            low = min(low, bits[c])
        at = np.int32(k)
        for c in range(k):
            at = min(at, np.int32(c) if bits[c] == low else np.int32(k))
        index[i] = at
        score[i] = distance[at]


@njit(cache=True, nogil=True)
def squared_distances(v, columns, out):  # type: ignore[no-untyped-def]
    """out[c] = |v - columns[:, c]|^2 in float32, four dimensions a pass over out."""
    d, k = columns.shape
    out[:] = np.float32(0)
    j = 0
    while j + 4 <= d:
        a, b, c, e = v[j], v[j + 1], v[j + 2], v[j + 3]
        for i in range(k):
            p, q = a - columns[j, i], b - columns[j + 1, i]
            r, s = c - columns[j + 2, i], e - columns[j + 3, i]
            out[i] += (p * p + q * q) + (r * r + s * s)
        j += 4
    while j < d:
        a = v[j]
        for i in range(k):
            p = a - columns[j, i]
            out[i] += p * p
        j += 1


def inner_products(x: Float32, columns: Float32) -> Float32:
    """out[i, c] = <x[i], columns[:, c]>, (n, k) float32 for columns (d, k), as fast as a BLAS.

    A BLAS has threads of its own, which spin while the machine is busy: in many small products
    they cost several times what they save. The last bits depend on the machine.
    """
    n = x.shape[0]
    pairs = np.concatenate([x, x[-1:]]) if n % 2 else x
    out = np.zeros((n + n % 2, columns.shape[1]), np.float32)
    _products_of_pairs(pairs, columns, out)
    return out[:n]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _products_of_pairs(x, columns, out):  # type: ignore[no-untyped-def]
    """out += x @ columns, two rows and four dimensions a pass to keep the multipliers fed;
    "contract" lets them be fused with the additions."""
    d, k = columns.shape
    for i in range(0, x.shape[0], 2):
        p, q = out[i], out[i + 1]
        j = 0
        while j + 4 <= d:
            a0, a1, a2, a3 = x[i, j], x[i, j + 1], x[i, j + 2], x[i, j + 3]
            b0, b1, b2, b3 = x[i + 1, j], x[i + 1, j + 1], x[i + 1, j + 2], x[i + 1, j + 3]
            for c in range(k):
                c0, c1, c2, c3 = (
                    columns[j, c],
                    columns[j + 1, c],
                    columns[j + 2, c],
                    columns[j + 3, c],
                )
                p[c] += a0 * c0 + a1 * c1 + a2 * c2 + a3 * c3
                q[c] += b0 * c0 + b1 * c1 + b2 * c2 + b3 * c3
            j += 4
        while j < d:
            a0, b0 = x[i, j], x[i + 1, j]
            for c in range(k):
                p[c] += a0 * columns[j, c]
                q[c] += b0 * columns[j, c]
            j += 1


@njit(cache=True, nogil=True)
def _nearest_of_products(g, bias, slack, x, centroids, l2, index, score):  # type: ignore[no-untyped-def]
    """Least bias[c] - g[i, c], decided in float64 among all within slack[i] of the least."""
    n, k = g.shape
    bits = g.view(np.int32)
    most, sign = np.int32(0x7FFFFFFF), np.int32(31)
    for i in range(n):
        low = most
        for c in range(k):
            g[i, c] = bias[c] - g[i, c]
        for c in range(k):  # as integers, see _nearest_direct; the mask orders the negative ones
            low = min(low, bits[i, c] ^ ((bits[i, c] >> sign) & most))
        at = np.int32(k)
        for c in range(k):
            key = bits[i, c] ^ ((bits[i, c] >> sign) & most)
            at = min(at, np.int32(c) if key == low else np.int32(k))
        limit = g[i, at] + slack[i]
        near = np.int32(0)
        for c in range(k):
            near += np.int32(g[i, c] <= limit)
        best = _exact(x[i], centroids[at], l2)
        if near > 1:
            for c in range(k):
                if g[i, c] <= limit:
                    value = _exact(x[i], centroids[c], l2)
                    if value < best or (value == best and c < at):
                        best, at = value, np.int32(c)
        index[i] = at
        score[i] = best if l2 else -best


@njit(cache=True, nogil=True)
def _exact(a, b, l2):  # type: ignore[no-untyped-def]
    """|a - b|^2, or -<a, b>, in float64; four sums, so that one addition need not await another."""
    s0 = s1 = s2 = s3 = 0.0
    j = 0
    while j + 4 <= a.size:
        s0 += _term(a[j], b[j], l2)
        s1 += _term(a[j + 1], b[j + 1], l2)
        s2 += _term(a[j + 2], b[j + 2], l2)
        s3 += _term(a[j + 3], b[j + 3], l2)
        j += 4
    while j < a.size:
        s0 += _term(a[j], b[j], l2)
        j += 1
    return (s0 + s1) + (s2 + s3)


@njit(cache=True, nogil=True)
def _term(p, q, l2):  # type: ignore[no-untyped-def]
    p, q = np.float64(p), np.float64(q)
    return (p - q) * (p - q) if l2 else -p * q
