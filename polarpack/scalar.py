"""Scalar quantizers: a table of learned levels for all values, or an even grid for each column."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Float32, enter, enter_codes, to_numpy
from ._numba import njit
from .errors import CorruptDataError, InputError, NotFittedError

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

MAX_BITS = 16
EXACT_LEVELS = 256  # up to here levels come from the exact optimum over a histogram
EXACT_BINS = 2048
LLOYD_PASSES = 100
CLIP_ROWS = 1 << 15  # rows looked at for a clipping range: its error is in the rare values
N_FRACTIONS = 48  # 5% apart: finer changes less than 0.02 dB
MAX_COLUMNS = 1 << 24


# ---------------------------------------------------------------------------- learned levels


def lloyd_max(
    values: npt.ArrayLike, n_levels: int, weights: npt.ArrayLike | None = None
) -> Float64:
    """The n_levels levels of least (weighted) squared error for one-dimensional values.

    values: (n,) finite; weights: (n,) >= 0, or None for equal ones. Returns (n_levels,) float64,
    sorted. With at most n_levels distinct values they are the levels, the last repeated; without
    values all are 0. Up to 256 levels: dynamic programming finds the optimum over a histogram of
    2048 bins, then Lloyd's iterations refine it on the values; beyond, these start from levels as
    dense as the cube root of the density. O(n log n).

    Source: Lloyd, "Least squares quantization in PCM", and Max, "Quantizing for minimum
    distortion", IRE Trans. IT 1960; Panter and Dite, Proc. IRE 1951 (cube root).
    """
    v, at = np.unique(np.asarray(values, np.float64), return_inverse=True)
    each = np.ones(at.size) if weights is None else np.asarray(weights, np.float64)
    w: Float64 = np.bincount(at, each, v.size).astype(np.float64)
    v, w = v[w > 0], w[w > 0]
    if v.size == 0:
        return np.zeros(n_levels)
    if v.size <= n_levels:
        return np.concatenate([v, np.full(n_levels - v.size, v[-1])])
    middle, unit = v.mean(), max(v[-1] - v.mean(), v.mean() - v[0])
    v = (v - middle) / unit  # so that no square over- or underflows
    levels = _best_levels(v, w, n_levels) if n_levels <= EXACT_LEVELS else _dense(v, w, n_levels)
    return np.asarray(np.sort(_refine(v, w, levels)) * unit + middle, np.float64)


def _best_levels(v: Float64, w: Float64, n_levels: int) -> Float64:
    """Optimal levels for the sorted values v in -1..1; if many, gathered in bins first."""
    first = np.arange(v.size)
    if v.size > EXACT_BINS:  # even counts where values are dense, cuts at the widest gaps elsewhere
        half = EXACT_BINS // 2
        widest = 1 + np.argpartition(np.diff(v), -half)[-half:]
        first = np.unique(np.concatenate([np.arange(half) * v.size // half, widest]))
    sums = [np.add.reduceat(a, first) for a in (w, w * v, w * v * v)]
    moments = np.concatenate([np.zeros((3, 1)), np.cumsum(sums, axis=1)], axis=1)
    cuts = _optimal_cuts(moments, n_levels)
    total = moments[:, cuts[1:]] - moments[:, cuts[:-1]]
    return np.asarray(total[1] / total[0])


@njit(cache=True, nogil=True)
def _optimal_cuts(moments, n_groups):  # type: ignore[no-untyped-def]
    """Cuts 0 = c_0 < ... < c_k = m of m weighted points into groups of least squared error.

    moments: (3, m + 1) running sums of w, w v, w v^2; n_groups <= m. The best last cut grows with
    the number of points, so those of every second point bound the search for the ones between:
    O(n_groups * m log m).
    """
    m = moments.shape[1] - 1
    cost = np.full(m + 1, np.inf)
    cost[0] = 0.0
    last = np.zeros((n_groups + 1, m + 1), np.int32)
    for g in range(1, n_groups + 1):
        new = np.full(m + 1, np.inf)
        stride = 1
        while stride * 2 <= m:
            stride *= 2
        while stride > 0:
            for j in range(stride, m + 1, 2 * stride):
                if j < g:
                    last[g, j] = j - 1
                    continue
                low = max(last[g, j - stride], g - 1)
                high = j - 1
                if j + stride <= m:
                    high = min(high, max(last[g, j + stride], low))
                for i in range(low, high + 1):
                    weight = moments[0, j] - moments[0, i]
                    s = moments[1, j] - moments[1, i]
                    value = cost[i] + max(moments[2, j] - moments[2, i] - s * s / weight, 0.0)
                    if value < new[j]:
                        new[j] = value
                        last[g, j] = i
            stride //= 2
        cost = new
    cuts = np.zeros(n_groups + 1, np.int64)
    cuts[n_groups] = m
    for g in range(n_groups, 0, -1):
        cuts[g - 1] = last[g, cuts[g]]
    return cuts


def _dense(v: Float64, w: Float64, n_levels: int) -> Float64:
    """Levels spread like the cube root of the density of the sorted values v in -1..1."""
    mass, edges = np.histogram(v, bins=256, range=(-1.0, 1.0), weights=w)
    spread = np.concatenate([[0.0], np.cumsum(np.cbrt(mass))])
    places = (np.arange(n_levels) + 0.5) / n_levels * spread[-1]
    return np.asarray(np.interp(places, spread, edges), np.float64)


def _refine(v: Float64, w: Float64, levels: Float64) -> Float64:
    """Lloyd's iterations on sorted values v; an empty cell keeps its level."""
    weight, moment = (np.concatenate([[0.0], np.cumsum(a)]) for a in (w, w * v))
    for _ in range(LLOYD_PASSES):
        cuts = np.searchsorted(v, (levels[1:] + levels[:-1]) / 2, side="right")
        cuts = np.concatenate([[0], cuts, [v.size]])
        mass = weight[cuts[1:]] - weight[cuts[:-1]]
        means = (moment[cuts[1:]] - moment[cuts[:-1]]) / np.where(mass > 0, mass, 1.0)
        new = np.where(mass > 0, means, levels)
        if np.array_equal(new, levels):
            break
        levels = new
    return levels


class ScalarQuantizer:
    """One sorted table of levels for all values, as for the radius of each row.

    Parameters
    ----------
    n_bits : 2^n_bits levels, 1..16.
    domain : "linear": least squared error, nearest level. "log", for values >= 0: least squared
        error of the logarithm, which is nearly least relative error, and nearest by ratio. Level 0
        is then exactly 0: zeros stay zero, and so do values below half the next level, for which
        that would be the greater relative error.

    Attributes
    ----------
    levels_ : (2^n_bits,) float32, not decreasing.
    """

    levels_: Float32

    def __init__(self, n_bits: int = 4, *, domain: Literal["linear", "log"] = "linear") -> None:
        if domain not in ("linear", "log"):
            raise InputError(f"expected domain 'linear' or 'log', got {domain!r}")
        self.n_bits, self.domain = _check_bits(n_bits), domain

    @property
    def n_fields(self) -> int:
        """1: a value has one code."""
        return 1

    @property
    def alphabet_sizes(self) -> Int64:
        """(1,) int64: the number of levels."""
        return np.array([1 << self.n_bits], np.int64)

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` or ``load_arrays`` was called."""
        return hasattr(self, "levels_")

    def fit(self, values: Any) -> Self:
        """Learn the levels from values of any shape; returns self. O(n log n).

        Raises InputError for values that are not finite, or negative in the log domain.
        """
        v = self._enter(values)[0].astype(np.float64)
        n_levels = 1 << self.n_bits
        if self.domain == "linear":
            levels = lloyd_max(v, n_levels)
        else:
            positive = lloyd_max(np.log(v[v > 0]), n_levels - 1)
            levels = np.concatenate([[0.0], np.exp(positive) if v.any() else 0.0 * positive])
        self._set(levels.astype(np.float32))
        return self

    def encode(self, values: Any) -> Any:
        """Index of each value's level, uint8 (uint16 for more than 8 bits), in values' shape and
        library. Ties take the lowest. NotFittedError before ``fit``; InputError as for ``fit``."""
        self._check_fitted()
        v, back = self._enter(values)
        codes = np.searchsorted(self._thresholds, v.astype(np.float64))
        return back(codes.astype(_code_dtype(self.n_bits)).reshape(np.shape(values)))

    def decode(self, codes: Any) -> Any:
        """The float32 levels of codes, in their shape and library. InputError for a code that is
        too large; NotFittedError before ``fit``."""
        self._check_fitted()
        if not hasattr(codes, "reshape"):
            raise InputError(f"expected codes to be an array or tensor, got {type(codes).__name__}")
        c, back = enter_codes(codes.reshape(-1, 1), self.alphabet_sizes)
        return back(self.levels_[c].reshape(np.shape(codes)))

    def _enter(self, values: Any) -> tuple[Float32, Any]:
        to_numpy(values, "values")  # says what is wrong with anything but a float array
        v, back = enter(values.reshape(-1, 1), name="values")
        if self.domain == "log" and (v < 0).any():
            raise InputError("expected values >= 0 in the log domain")
        return v[:, 0], back

    def _set(self, levels: Float32) -> None:
        self.levels_ = levels
        a, b = levels[:-1].astype(np.float64), levels[1:].astype(np.float64)
        self._thresholds = (a + b) / 2
        if self.domain == "log":
            self._thresholds = np.where(a > 0, np.sqrt(a * b), b / 2)

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("call fit before using this ScalarQuantizer")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {"n_bits": self.n_bits, "domain": self.domain}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Inverse of ``get_config``; InputError where something is missing or makes no sense."""
        return cast(Self, _from_config(cls, config))

    def __repr__(self) -> str:
        return f"ScalarQuantizer(n_bits={self.n_bits}, domain={self.domain!r})"

    def arrays(self) -> dict[str, Array]:
        """What ``fit`` learned: ``levels`` (2^n_bits,) float32."""
        self._check_fitted()
        return {"levels": self.levels_}

    def load_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Inverse of ``arrays``; CorruptDataError for what ``arrays`` cannot have returned."""
        (levels,) = _stored(arrays, {"levels": (np.float32, (1 << self.n_bits,))})
        if (np.diff(levels) < 0).any() or (self.domain == "log" and levels[0] != 0):
            raise CorruptDataError("levels are not sorted, or do not start at 0")
        self._set(levels)
        return self


# ------------------------------------------------------------------------------- even grids


class GridQuantizer:
    """2^n_bits evenly spaced levels for each column: minimum + code * step.

    Parameters
    ----------
    n_bits : 1..16.
    shared : one grid for all columns.
    clip : "minmax": from the least to the largest value seen. "mse": the range of least squared
        error, narrower where few bits meet long tails. Values beyond are held at the ends.

    Attributes
    ----------
    minimum_, step_ : (d,) float32, or (1,) if shared. A step of 0 marks a constant column.
    """

    minimum_: Float32
    step_: Float32

    def __init__(
        self, n_bits: int = 8, *, shared: bool = False, clip: Literal["minmax", "mse"] = "minmax"
    ) -> None:
        if clip not in ("minmax", "mse"):
            raise InputError(f"expected clip 'minmax' or 'mse', got {clip!r}")
        self.n_bits, self.shared, self.clip = _check_bits(n_bits), bool(shared), clip

    @property
    def n_fields(self) -> int:
        """Columns of the rows that were fitted."""
        self._check_fitted()
        return self._d

    @property
    def alphabet_sizes(self) -> Int64:
        """(d,) int64: the number of levels of each column."""
        return np.full(self.n_fields, 1 << self.n_bits, np.int64)

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` or ``load_arrays`` was called."""
        return hasattr(self, "minimum_")

    def fit(self, x: Any) -> Self:
        """Learn the grids from rows (n, d); returns self. O(n d), or O(d) passes over at most 32768
        rows more for clip "mse". InputError for x not (n, d) or not finite."""
        rows, _ = enter(x)
        d = rows.shape[1]
        columns = rows.reshape(-1, 1) if self.shared else rows
        if rows.shape[0]:
            low, high = columns.min(axis=0), columns.max(axis=0)
        else:
            low = high = np.zeros(columns.shape[1], np.float32)
        low, high = low.astype(np.float64), high.astype(np.float64)
        if self.clip == "mse":
            most = CLIP_ROWS * (d if self.shared else 1)
            sample = columns[:: max(1, -(-columns.shape[0] // most))]
            low, high = _best_range(sample, low, high, (1 << self.n_bits) - 1)
        self._set(low.astype(np.float32), ((high - low) / ((1 << self.n_bits) - 1)), d)
        return self

    def _set(self, minimum: Float32, step: Array, d: int) -> None:
        self.minimum_, self.step_, self._d = minimum, step.astype(np.float32), d

    def encode(self, x: Any) -> Any:
        """The nearest level of each entry: (n, d) uint8 (uint16 for more than 8 bits), in x's
        library; ties take the lowest. NotFittedError before ``fit``; InputError for x not (n, d) or
        not finite. O(n d)."""
        self._check_fitted()
        rows, back = enter(x, d=self._d)
        codes = np.empty(rows.shape, _code_dtype(self.n_bits))
        _to_grid(rows, *self._wide(), (1 << self.n_bits) - 1, codes)
        return back(codes)

    def decode(self, codes: Any) -> Any:
        """Codes (n, d) to float32 levels, in the library of codes; the same bits on every machine.
        NotFittedError before ``fit``; InputError for codes of another shape or too large."""
        c, back = enter_codes(codes, self.alphabet_sizes)
        out = np.empty(c.shape, np.float32)
        _from_grid(c.astype(_code_dtype(self.n_bits), copy=False), *self._wide(), out)
        return back(out)

    def _wide(self) -> tuple[Float64, Float64]:
        """minimum and step for each column in float64, where their products are exact."""
        return (
            np.broadcast_to(self.minimum_, self._d).astype(np.float64),
            np.broadcast_to(self.step_, self._d).astype(np.float64),
        )

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("call fit before using this GridQuantizer")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {"n_bits": self.n_bits, "shared": self.shared, "clip": self.clip}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Inverse of ``get_config``; InputError where something is missing or makes no sense."""
        return cast(Self, _from_config(cls, config))

    def __repr__(self) -> str:
        return f"GridQuantizer(n_bits={self.n_bits}, shared={self.shared}, clip={self.clip!r})"

    def arrays(self) -> dict[str, Array]:
        """What ``fit`` learned: ``minimum`` and ``step``, (d,) float32; if shared both (1,), and
        ``columns`` (1,) int32, which is d."""
        self._check_fitted()
        stored: dict[str, Array] = {"minimum": self.minimum_, "step": self.step_}
        return stored | ({"columns": np.array([self._d], np.int32)} if self.shared else {})

    def load_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Inverse of ``arrays``; CorruptDataError for what ``arrays`` cannot have returned."""
        size = (1,) if self.shared else (np.size(arrays.get("minimum", ())),)
        layout: dict[str, tuple[type[Any], tuple[int, ...]]] = {
            "minimum": (np.float32, size),
            "step": (np.float32, size),
        }
        if self.shared:
            layout["columns"] = (np.int32, (1,))
        minimum, step, *columns = _stored(arrays, layout)
        d = int(columns[0][0]) if columns else minimum.size
        top = np.abs(minimum.astype(np.float64)) + step.astype(np.float64) * (
            (1 << self.n_bits) - 1
        )
        if not 1 <= d <= MAX_COLUMNS or (step < 0).any() or (top > np.finfo(np.float32).max).any():
            raise CorruptDataError("a grid without columns, of negative step, or beyond float32")
        self._set(minimum, step, d)
        return self


def _best_range(x: Float32, low: Float64, high: Float64, top: int) -> tuple[Float64, Float64]:
    """For each column of x the range whose grid of top + 1 levels has the least squared error.

    First both ends together at fractions of the way out from the mean, then either end alone.
    """
    if not x.shape[0]:
        return low, high
    mean = x.mean(axis=0, dtype=np.float64)
    best = [np.ones(x.shape[1]), np.ones(x.shape[1])]
    error = np.full(x.shape[1], np.inf)

    def attempt(down: Float64, up: Float64) -> None:
        start, new = mean + (low - mean) * down, np.zeros(x.shape[1])
        _grid_error(x, start, (mean + (high - mean) * up - start) / top, top, new)
        better = new < error
        error[better] = new[better]
        best[0][better], best[1][better] = down[better], up[better]

    for fraction in np.geomspace(1.0, 0.1, N_FRACTIONS):
        attempt(np.full(x.shape[1], fraction), np.full(x.shape[1], fraction))
    for factor in (0.9, 1.1, 0.97, 1.03):
        attempt(np.minimum(best[0] * factor, 1.0), best[1].copy())
        attempt(best[0].copy(), np.minimum(best[1] * factor, 1.0))
    return mean + (low - mean) * best[0], mean + (high - mean) * best[1]


@njit(cache=True, nogil=True)
def _to_grid(x, minimum, step, top, codes):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            place = (np.float64(x[i, j]) - minimum[j]) / step[j] if step[j] > 0 else 0.0
            codes[i, j] = min(max(np.ceil(place - 0.5), 0.0), float(top))


@njit(cache=True, nogil=True)
def _from_grid(codes, minimum, step, out):  # type: ignore[no-untyped-def]
    """Two roundings, of the float64 sum and to float32; the product of 16 and 24 bits is exact."""
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] = minimum[j] + codes[i, j] * step[j]


@njit(cache=True, nogil=True)
def _grid_error(x, minimum, step, top, error):  # type: ignore[no-untyped-def]
    """error[j] += the squared error of column j."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            place = (x[i, j] - minimum[j]) / step[j] if step[j] > 0 else 0.0
            level = minimum[j] + min(max(np.ceil(place - 0.5), 0.0), float(top)) * step[j]
            error[j] += (x[i, j] - level) ** 2


# ---------------------------------------------------------------------------------- checks


def _check_bits(n_bits: Any) -> int:
    if isinstance(n_bits, bool) or not isinstance(n_bits, (int, np.integer)):
        raise InputError(f"expected n_bits to be an integer, got {n_bits!r}")
    if not 1 <= n_bits <= MAX_BITS:
        raise InputError(f"expected n_bits in 1..{MAX_BITS}, got {n_bits}")
    return int(n_bits)


def _code_dtype(n_bits: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if n_bits <= 8 else np.uint16


def _from_config(cls: type[Any], config: Mapping[str, Any]) -> Any:
    """What ``get_config`` gave; a later version may say more, but not less."""
    names = list(inspect.signature(cls).parameters)
    missing = [name for name in names if name not in config]
    if missing:
        raise InputError(f"not a configuration of {cls.__name__}: no {', '.join(missing)}")
    return cls(**{name: config[name] for name in names})


def _stored(
    arrays: Mapping[str, Array], layout: Mapping[str, tuple[type[Any], tuple[int, ...]]]
) -> list[Array]:
    """The arrays of these names, dtypes and shapes, finite, in order; else CorruptDataError."""
    if set(arrays) != set(layout):
        raise CorruptDataError(f"expected arrays {sorted(layout)}, got {sorted(arrays)}")
    for name, (dtype, shape) in layout.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
            raise CorruptDataError(
                f"expected array {name!r} of {np.dtype(dtype).name} {shape}, finite, "
                f"got {array.dtype} {array.shape}"
            )
    return [np.ascontiguousarray(arrays[name]) for name in layout]
