"""Product quantization: one codebook for each slice of the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ._arrays import Array, Float32, as_float32
from .clustering import Int64, check_int
from .errors import CorruptDataError, InputError
from .residual import ProductResidualQuantizer, bits_list, stored_array

MAX_SUBQUANTIZERS = 1 << 16


class ProductQuantizer(ProductResidualQuantizer):
    """One k-means codebook for each of M slices of the row.

    Parameters
    ----------
    n_subquantizers : M. d need not be a multiple: the first d mod M slices are one wider.
    n_bits : bits of every code, one number or one for each subquantizer, 1..16.
    splits : (M + 1,) columns 0 = s_0 < s_1 < ... < s_M = d at which to cut instead.
    spherical : codewords of a slice are unit directions times one radius.
    seed : same seed, machine and versions: same codebooks.

    Attributes
    ----------
    codebooks_ : M float32 arrays; ``codebooks_[m][c]`` stands for code c in slice m.

    Source: Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", IEEE TPAMI
    2011.

    >>> x = np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32)
    >>> pq = ProductQuantizer(4, n_bits=6).fit(x)
    >>> pq.encode(x[:2]).shape, pq.decode(pq.encode(x)).shape
    ((2, 4), (1000, 16))
    """

    def __init__(
        self,
        n_subquantizers: int = 8,
        *,
        n_bits: int | Sequence[int] = 8,
        splits: Sequence[int] | None = None,
        spherical: bool = False,
        seed: int = 0,
    ) -> None:
        m = self.n_subquantizers = check_int(
            "n_subquantizers", n_subquantizers, 1, MAX_SUBQUANTIZERS
        )
        bits = bits_list("n_bits", n_bits, m)
        self._configure([(b,) for b in bits], 1, spherical, seed)
        self.n_bits = n_bits if isinstance(n_bits, int) else list(bits)
        self.splits = None if splits is None else [check_int("splits", s, 0) for s in splits]
        if self.splits is not None and (
            len(self.splits) != m + 1 or self.splits[0] != 0 or min(np.diff(self.splits)) < 1
        ):
            raise InputError(f"expected {m + 1} increasing splits from 0 on, got {self.splits}")

    def _boundaries(self, d: int) -> Int64:
        if self.splits is not None:
            if self.splits[-1] != d:
                raise InputError(f"expected x of shape (n, {self.splits[-1]}), got (n, {d})")
            return np.array(self.splits, np.int64)
        m = self.n_subquantizers
        if d < m:
            raise InputError(f"expected at least {m} columns for {m} subquantizers, got {d}")
        return np.arange(m + 1) * (d // m) + np.minimum(np.arange(m + 1), d % m)

    def adc_tables(self, queries: Any, metric: Literal["l2", "ip"] = "l2") -> Float32:
        """Distances from float queries to all codewords, (n_queries, M, most codewords) float32.

        Summed over m at a row's codes, ``tables[q, m, codes[m]]`` is the squared distance (metric
        "ip": the inner product) of query q and the decoded row. Where slices have fewer codewords
        than the most, the rest is infinite (-infinite). Computed in float64;
        O(n_queries * d * codewords). numpy in either case. Raises NotFittedError before ``fit``;
        InputError for queries not (n, d).
        """
        self._check_fitted()
        if metric not in ("l2", "ip"):
            raise InputError(f'expected metric "l2" or "ip", got {metric!r}')
        q = as_float32(queries, d=int(self.splits_[-1]), name="queries").astype(np.float64)
        shape = (q.shape[0], self.n_fields, int(self.alphabet_sizes.max()))
        tables = np.full(shape, np.inf if metric == "l2" else -np.inf, np.float32)
        for m, book in enumerate(self.codebooks_):
            part = q[:, self.splits_[m] : self.splits_[m + 1]]
            products = part @ book.T.astype(np.float64)
            if metric == "l2":
                energy = np.square(book, dtype=np.float64).sum(axis=1)
                products = np.square(part).sum(axis=1)[:, None] + energy - 2.0 * products
                products = np.maximum(products, 0.0)
            with np.errstate(over="ignore"):
                tables[:, m, : book.shape[0]] = products
        return tables

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {
            "n_subquantizers": self.n_subquantizers,
            "n_bits": self.n_bits,
            "splits": self.splits,
            "spherical": self.spherical_first,
            "seed": self.seed,
        }

    def arrays(self) -> dict[str, Array]:
        """What ``ProductResidualQuantizer.arrays`` has, and ``splits`` (M + 1,) int32."""
        return {**super().arrays(), "splits": self.splits_.astype(np.int32)}

    def _stored_splits(self, arrays: Mapping[str, Array]) -> Int64:
        stored = stored_array(arrays, "splits", np.int32, (self.n_subquantizers + 1,))
        splits = stored.astype(np.int64)
        try:
            expected = self._boundaries(int(splits[-1]))
        except InputError as error:
            raise CorruptDataError(f"stored splits: {error}") from error
        if not np.array_equal(splits, expected):
            raise CorruptDataError("stored splits are not those of the configuration")
        return splits

    def _stored_names(self) -> set[str]:
        return super()._stored_names() | {"splits"}
