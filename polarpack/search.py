"""Exact search over the decoded rows of a tensor, without holding them all.

Rows are decoded group by group, scored by one matrix product, and only the k best of each query are
kept. (Faiss is the tool for approximate search at scale; this answers from the file itself.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._arrays import Array, Float32, enter
from .errors import InputError

if TYPE_CHECKING:
    from .codec import Tensor

GROUP_FLOATS = 1 << 22  # decoded numbers in work at a time
METRICS: tuple[str, ...] = ("ip", "l2", "cosine")


def top_k(
    tensor: Tensor, queries: Any, k: int = 10, metric: Literal["ip", "l2", "cosine"] = "ip"
) -> tuple[Any, Any]:
    """The k best rows of ``tensor`` for each query; see ``Tensor.search``.

    queries: (n_queries, d) float array or tensor, or one vector (d,). Returns scores
    (n_queries, k) float32 and row numbers int64 in the queries' library, best first, ties by lower
    row number; k is cut to the number of rows.
    Raises InputError for another width, k < 1, an unknown metric, or queries that are not finite.
    """
    if metric not in METRICS:
        raise InputError(f"expected metric to be one of {', '.join(METRICS)}, got {metric!r}")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"expected k >= 1, got {k!r}")
    d = tensor.shape[-1] if tensor.shape else 1
    if getattr(queries, "ndim", 2) == 1:
        queries = queries[None]
    q, back = enter(queries, d=d, name="queries")
    if metric == "cosine":
        q = _unit(q)
    n = int(np.prod(tensor.shape[:-1])) if len(tensor.shape) > 1 else 1
    k = min(int(k), n)
    scores = np.full((len(q), k), -np.inf, np.float32)
    ids = np.full((len(q), k), n, np.int64)
    step = max(k, GROUP_FLOATS // max(1, d))
    for start in range(0, n, step):
        rows = tensor.read_rows(np.arange(start, min(n, start + step))).astype(np.float32)
        scores, ids = _merge(scores, ids, _scores(q, rows, metric), start, k)
    if metric == "l2":
        scores = np.maximum(-scores, 0)
    return _as_float32(back, scores), back(ids)


def _scores(q: Float32, rows: Float32, metric: str) -> Float32:
    """(n_queries, n) scores, larger is better."""
    if metric == "cosine":
        rows = _unit(rows)
    products = q @ rows.T
    if metric != "l2":
        return products
    lengths = np.einsum("ij,ij->i", rows, rows)
    return 2 * products - lengths - np.einsum("ij,ij->i", q, q)[:, None]


def _merge(
    scores: Float32, ids: Array, new: Float32, first: int, k: int
) -> tuple[Float32, Array]:
    """The k best of those known and of a new group whose rows start at ``first``."""
    if new.shape[1] > k:
        place = np.argpartition(-new, k - 1, axis=1)[:, :k]
        # argpartition breaks ties at the edge arbitrarily: of equal scores the lowest rows count
        edge = np.take_along_axis(new, place, axis=1).min(axis=1)
        for i in np.flatnonzero((new >= edge[:, None]).sum(axis=1) > k):
            place[i] = np.lexsort((np.arange(new.shape[1]), -new[i]))[:k]
    else:
        place = np.broadcast_to(np.arange(new.shape[1]), new.shape)
    all_scores = np.concatenate([scores, np.take_along_axis(new, place, axis=1)], axis=1)
    all_ids = np.concatenate([ids, place + first], axis=1)
    order = np.lexsort((all_ids, -all_scores), axis=1)[:, :k]
    return np.take_along_axis(all_scores, order, axis=1), np.take_along_axis(all_ids, order, axis=1)


def _unit(x: Float32) -> Float32:
    norm = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
    return (x / np.where(norm > 0, norm, 1)[:, None]).astype(np.float32)


def _as_float32(back: Any, scores: Float32) -> Any:
    """Scores stay float32 whatever the queries' dtype."""
    result = back(scores)
    return result.float() if hasattr(result, "float") else result.astype(np.float32)
