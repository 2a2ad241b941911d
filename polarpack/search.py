"""Exact search over the decoded rows of a tensor, without holding them all.

Rows are decoded group by group. A matrix product in float32 finds all rows of a group that could be
among the k best within its rounding error, and float64 decides among them, so the result depends
neither on the BLAS nor on the groups. (Faiss is the tool for approximate search at scale; this
answers from the file itself.)
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ._arrays import Array, as_matrix, is_torch, returner
from .errors import InputError

Float64 = npt.NDArray[np.float64]

GROUP_FLOATS = 1 << 22  # decoded numbers in work at a time
QUERIES = 64  # queries in work at a time
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


def top_k(
    tensor: Rows, queries: Any, k: int = 10, metric: Literal["ip", "l2", "cosine"] = "ip"
) -> tuple[Any, Any]:
    """The k best rows of ``tensor`` for each query; see ``Tensor.search``.

    queries: (n_queries, d) float array or tensor, or one vector (d,). Returns scores
    (n_queries, k) float32 and row numbers int64 in the queries' library, best first, where scores
    are equal in float32 the lower row number first; k is cut to the number of rows. Rows that hold
    NaN or infinity come last. Raises InputError for another width, k < 1, an unknown metric, or
    queries that are not finite.
    """
    if metric not in METRICS:
        raise InputError(f"expected metric to be one of {', '.join(METRICS)}, got {metric!r}")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"expected k >= 1, got {k!r}")
    d = tensor.shape[-1] if tensor.shape else 1
    if getattr(queries, "ndim", 2) == 1:
        queries = queries[None]
    q = as_matrix(queries, d=d, name="queries").astype(np.float64)
    q = _unit(q) if metric == "cosine" else q
    n = int(np.prod(tensor.shape[:-1])) if len(tensor.shape) > 1 else 1
    k = min(int(k), n)
    scores, ids = np.full((len(q), k), -np.inf), np.full((len(q), k), n, np.int64)
    step = max(k, GROUP_FLOATS // max(QUERIES, d))
    for start in range(0, n, step):
        rows = tensor.read_rows(range(start, min(n, start + step)))
        for first in range(0, len(q), QUERIES):
            some = slice(first, first + QUERIES)
            _merge(scores[some], ids[some], q[some], rows, metric, start)
    with np.errstate(over="ignore"):
        result = (-scores if metric == "l2" else scores).astype(np.float32)
    if not is_torch(queries):
        return result, ids
    return returner(queries[:0].float())(result), returner(queries)(ids)


def _merge(scores: Float64, ids: Array, q: Float64, rows: Array, metric: str, start: int) -> None:
    """Put what is better among rows, the first of which is row ``start``, into scores and ids."""
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    x = np.where(finite[:, None], rows, 0).astype(np.float64)
    x = _unit(x) if metric == "cosine" else x
    k = scores.shape[1]
    near = np.ones((len(q), len(x)), bool) if len(x) <= k else _near(q, x, finite, k, metric)
    for i in range(len(q)):
        place = np.flatnonzero(near[i])
        exact = np.where(finite[place], _exact(q[i], x[place], metric), -np.inf)
        all_scores = np.concatenate([scores[i], exact])
        all_ids = np.concatenate([ids[i], place + start])
        order = np.lexsort((all_ids, -all_scores))[:k]
        scores[i], ids[i] = all_scores[order], all_ids[order]


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
