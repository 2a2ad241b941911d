"""What a compressed table costs and how good it is: errors, similarity, recall, bits, bounds.

Everything compares an original ``x`` with its decoded ``y``. Sums run in float64 on values scaled
by powers of two, so tables of 1e30 or of denormals give the same answers as tables of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ._arrays import Array, as_matrix, check_finite, is_torch, to_numpy
from .errors import InputError

Float64 = npt.NDArray[np.float64]
Metric = Literal["ip", "l2", "cosine"]

# Squares and products of two of numbers within 2^-400..2^400 stay within float64 by a wide margin.
SAFE_EXPONENT = 400
# Entries of one block of work in float64: 8 MiB, which a cache or two can hold.
BLOCK_ENTRIES = 1 << 20
# Scores of one block of queries against all rows: 32 MiB of float32, with their order 160 MiB.
BLOCK_SCORES = 1 << 23


def distortion(x: Any, y: Any) -> float:
    """Mean squared error over all entries, mean((x - y)^2); 0 for empty arrays.

    x, y: arrays or tensors of one shape, any finite floats. O(entries) time, blocks of memory.
    inf or 0 only where the mean itself lies outside float64. InputError on unequal shapes or
    non-finite entries.

    >>> distortion(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    2.0
    """
    entries = 0
    energies = []
    for a, b in _blocks(x, y):
        entries += a.size
        energies.append(_energy(*_difference_norms(a, b)))
    total, exponent = _add(energies)
    with np.errstate(over="ignore"):
        return float(np.ldexp(total / max(1, entries), exponent))


def snr_db(x: Any, y: Any) -> float:
    """Signal-to-noise ratio in decibels, 10 log10(sum |x|^2 / sum |x - y|^2).

    x, y: arrays or tensors of one shape, any finite floats. inf where y equals x (also where both
    are empty), -inf where x is zero and y is not. O(entries) time, blocks of memory. InputError on
    unequal shapes or non-finite entries.

    >>> round(snr_db(np.array([3.0, 4.0]), np.array([3.0, 3.5])), 6)
    20.0
    """
    pairs = [(_energy(*_norms(a)), _energy(*_difference_norms(a, b))) for a, b in _blocks(x, y)]
    return _ratio_db(_add([pair[0] for pair in pairs]), _add([pair[1] for pair in pairs]))


def _ratio_db(signal_energy: tuple[float, int], noise_energy: tuple[float, int]) -> float:
    """The ratio of two energies, each a number times a power of two, in decibels."""
    (signal, signal_exponent), (noise, noise_exponent) = signal_energy, noise_energy
    if noise == 0.0:
        return math.inf
    if signal == 0.0:
        return -math.inf
    return 10 * math.log10(signal / noise) + 10 * math.log10(2) * (signal_exponent - noise_exponent)


def cosine(x: Any, y: Any) -> Float64:
    """Cosine of the angle between each row of x and the same row of y.

    x, y: (n, d) arrays or tensors, any finite floats; more leading axes are taken as one. Returns
    (n,) float64 within -1..1: 1 where both rows are zero, 0 where one of them is. O(n d).
    InputError as in ``snr_db``.

    >>> cosine(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[2.0, 2.0], [0.0, 0.0]])).round(3)
    array([0.707, 1.   ])
    """
    parts = [_block_cosine(a, b) for a, b in _blocks(x, y)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _block_cosine(a: Float64, b: Float64) -> Float64:
    (a, _), (b, _) = _scaled(a), _scaled(b)
    product = np.sqrt(np.einsum("nd,nd->n", a, a)) * np.sqrt(np.einsum("nd,nd->n", b, b))
    dot = np.einsum("nd,nd->n", a, b)
    result: Float64 = np.where(a.any(axis=1) | b.any(axis=1), 0.0, 1.0)
    np.divide(dot, product, out=result, where=product > 0)
    return np.clip(result, -1.0, 1.0, out=result)


def relative_error(x: Any, y: Any) -> Float64:
    """Euclidean error of each row relative to its norm, |x - y|_2 / |x|_2.

    x, y: (n, d) arrays or tensors, any finite floats, denormals and 1e300 included; more leading
    axes are taken as one. Returns (n,) float64: 0 where x and y agree (zero rows too), inf where x
    is zero and y is not, or where the ratio itself exceeds float64. This is the error that
    ``max_error=`` bounds. O(n d). InputError as in ``snr_db``.

    >>> relative_error(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]))
    array([0.1])
    """
    parts = [_block_error(a, b) for a, b in _blocks(x, y)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _block_error(a: Float64, b: Float64) -> Float64:
    error, error_exponent = _difference_norms(a, b)
    norm, norm_exponent = _norms(a)
    ratio: Float64 = np.where(error > 0, np.inf, 0.0)
    np.divide(error, norm, out=ratio, where=norm > 0)
    with np.errstate(over="ignore"):
        np.ldexp(ratio, error_exponent - norm_exponent, out=ratio)
    return ratio


class Closeness:
    """How close decoded rows are to rows that come batch by batch; rows of x that hold NaN or
    infinity are counted, and compared to the bit, apart.

    snr_db, mean_cosine, max_relative_error: of the finite rows so far, as the functions of these
    names would have it of all at once. nonfinite_rows; nonfinite_exact: whether y has them as they
    are. Each batch costs O(n d).
    """

    def __init__(self) -> None:
        self.n_rows = self.nonfinite_rows = 0
        self.nonfinite_exact = True
        self.max_relative_error = 0.0
        self._cosines = 0.0
        self._signal: tuple[float, int] = (0.0, 0)
        self._noise: tuple[float, int] = (0.0, 0)

    def add(self, x: Array, y: Array) -> None:
        """Compare rows x (n, d) with what they were decoded to."""
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            same = np.array_equal(x[~finite], y[~finite], equal_nan=True)
            self.nonfinite_rows += int((~finite).sum())
            self.nonfinite_exact = self.nonfinite_exact and same
            x, y = x[finite], y[finite]
        for a, b in _blocks(x, y):
            self._signal = _add([self._signal, _energy(*_norms(a))])
            self._noise = _add([self._noise, _energy(*_difference_norms(a, b))])
            self._cosines += float(_block_cosine(a, b).sum())
            worst = float(_block_error(a, b).max(initial=0.0))
            self.max_relative_error = max(self.max_relative_error, worst)
        self.n_rows += len(x)

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio; inf where nothing differs."""
        return _ratio_db(self._signal, self._noise)

    @property
    def mean_cosine(self) -> float:
        """Mean over the finite rows; 1 where there are none."""
        return self._cosines / self.n_rows if self.n_rows else 1.0


def recall_at_k(
    x: Any,
    y: Any,
    queries: Any = None,
    k: int = 10,
    metric: Metric = "ip",
    n_queries: int = 1000,
    seed: int = 0,
) -> float:
    """Share of the true k nearest rows that a search of the decoded rows finds.

    x: (n, d) original rows; y: (n, d) decoded rows; queries: (n_queries, d), or None to take
    ``n_queries`` original rows drawn without replacement, each of which is left out of its own
    results. A row found counts if its original score is no worse than the k-th best original score,
    so duplicates can stand for each other. Scores ("ip" largest, "cosine" largest, "l2" nearest)
    are float32 matrix products of the unchanged query with x and with y.

    Returns the mean over queries, 1 where there is nothing to find. k above the number of
    candidates means all of them. O(n_queries n d) time; a float32 copy of x and y and 200 MiB.
    InputError on shapes that do not fit, k < 1 or an unknown metric.
    Source: Jégou, Douze, Schmid, "Product quantization for nearest neighbor search", TPAMI 2011
    (recall@k against exact neighbours).

    >>> rows = np.random.default_rng(0).standard_normal((100, 8))
    >>> recall_at_k(rows, rows)
    1.0
    """
    base, decoded = as_matrix(x), as_matrix(y, name="y")
    if base.shape != decoded.shape:
        raise InputError(f"expected y of shape {base.shape}, got {decoded.shape}")
    if k < 1 or n_queries < 1:
        raise InputError(f"expected k and n_queries of at least 1, got {k} and {n_queries}")
    n, d = base.shape
    if queries is None:
        own = np.random.default_rng(seed).permutation(n)[:n_queries]
        asked = base[own]
        k = min(k, n - 1)
    else:
        own = None
        asked = as_matrix(queries, d=d, name="queries")
        k = min(k, n)
    if k < 1 or len(asked) == 0:
        return 1.0
    base, decoded, asked = _comparable(base, decoded, asked, metric)
    original_score = _scorer(base, metric)
    decoded_score = _scorer(decoded, metric)
    hits = 0
    step = max(1, BLOCK_SCORES // n)
    for start in range(0, len(asked), step):
        q = asked[start : start + step]
        truth, found = original_score(q), decoded_score(q)
        if own is not None:
            here = np.arange(len(q)), own[start : start + step]
            truth[here] = found[here] = -np.inf
        threshold = np.partition(truth, n - k, axis=1)[:, n - k, None]
        ids = np.argpartition(found, n - k, axis=1)[:, n - k :]
        hits += int((np.take_along_axis(truth, ids, axis=1) >= threshold).sum())
    return hits / (len(asked) * k)


def _comparable(
    base: Array, decoded: Array, asked: Array, metric: Metric
) -> tuple[npt.NDArray[np.float32], ...]:
    """The three tables in float32, changed in ways that no ranking notices: unit rows for cosine,
    the same shift for l2 (less cancellation), powers of two that keep float32 in range."""
    if metric == "cosine":
        return tuple(_unit_rows(rows) for rows in (base, decoded, asked))
    if metric not in ("ip", "l2"):
        raise InputError(f'expected metric to be "ip", "l2" or "cosine", got {metric!r}')
    tops = [float(np.abs(rows).max(initial=0)) for rows in (base, decoded, asked)]
    if metric == "l2":
        tops = [max(tops)] * 3  # distances allow only one scale for all, inner products any
    tables = [_moderate(rows, top) for rows, top in zip((base, decoded, asked), tops, strict=True)]
    if metric == "l2":
        mean = tables[0].mean(axis=0, dtype=np.float64).astype(np.float32)
        tables = [rows - mean for rows in tables]
    return tuple(tables)


def _moderate(rows: Array, top: float) -> npt.NDArray[np.float32]:
    """Rows in float32, divided by the power of two above ``top`` unless it is harmless."""
    exponent = math.frexp(top)[1]
    if abs(exponent) > 40:  # else squares stay within 2^-80..2^80, float32 reaches 2^127
        rows = np.ldexp(rows.astype(np.float64), -exponent)
    return np.asarray(rows, np.float32)


def _unit_rows(rows: Array) -> npt.NDArray[np.float32]:
    """Rows of norm 1 in float32; zero rows stay zero."""
    out = np.empty(rows.shape, np.float32)
    for start, stop in _spans(rows):
        block, _ = _scaled(rows[start:stop].astype(np.float64))
        norm = np.sqrt(np.einsum("nd,nd->n", block, block))
        out[start:stop] = block / np.where(norm > 0, norm, 1.0)[:, None]
    return out


def _scorer(
    rows: npt.NDArray[np.float32], metric: Metric
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """A function from queries (m, d) to scores (m, n), larger is nearer."""
    if metric != "l2":
        return lambda q: q @ rows.T
    half_norm = np.einsum("nd,nd->n", rows, rows) / 2
    return lambda q: q @ rows.T - half_norm  # (|q|^2 - |q - row|^2) / 2


def entropy_bits(symbols: Any) -> float:
    """Empirical zeroth-order entropy in bits a symbol: -sum p log2 p over the values that occur.

    symbols: integers of any shape, taken as one string; one field of a code matrix is
    ``entropy_bits(codes[:, j])``. The least that any code without context can spend, its tables not
    counted. 0 for no symbols. O(n log n). InputError where the dtype is not an integer.
    Source: Shannon, "A mathematical theory of communication", 1948.

    >>> entropy_bits(np.array([0, 1, 2, 3]))
    2.0
    """
    values = np.asarray(symbols.detach().cpu().numpy() if is_torch(symbols) else symbols)
    if values.dtype.kind not in "iu":
        raise InputError(f"expected symbols of an integer dtype, got {values.dtype}")
    counts = np.unique(values, return_counts=True)[1]
    p = counts / max(1, values.size)
    return abs(float((p * np.log2(p)).sum()))


def bits_per_dimension(nbytes: int, shape: Sequence[int]) -> float:
    """Bits spent for each float of a tensor of this shape, 8 nbytes / product(shape).

    Whether headers and codebooks are in it is decided by what ``nbytes`` counts. For a tensor
    without entries: 0 if nbytes is 0, else inf.

    >>> bits_per_dimension(96, (4, 64))
    3.0
    """
    entries = math.prod(shape)
    if entries == 0:
        return math.inf if nbytes else 0.0
    return 8 * nbytes / entries


def gaussian_rd_bound(x: Any, bits: float) -> float:
    """SNR in dB that no code can exceed at this rate if the rows are Gaussian.

    x: (n, d) rows, from which mean and covariance are taken (the mean costs nothing, but its energy
    counts as signal, as in ``snr_db``), or (d,) variances of independent components of mean zero.
    bits: rate in bits per dimension. Data that is not Gaussian, clusters above all, can beat it.
    inf where the rows do not vary. O(n d^2 + d^3). InputError on another shape, negative variances
    or a negative rate.
    Source: reverse water-filling, Cover and Thomas, "Elements of Information Theory", 2nd edition,
    theorem 10.3.3, on the eigenvalues of the covariance.

    >>> round(gaussian_rd_bound(np.ones(16), 2.0), 3)
    12.041
    """
    return float(rate_distortion_bound(x, [bits])[0])


def rate_distortion_bound(x: Any, bits: Sequence[float] | Float64) -> Float64:
    """The curve of ``gaussian_rd_bound`` at several rates.

    x as there; bits: (n_rates,) bits per dimension. Returns (n_rates,) float64 SNR in dB, for one
    eigendecomposition. O(n d^2 + d^3 + n_rates d).

    >>> rate_distortion_bound(np.array([1.0, 0.0]), [0.0, 1.0]).round(3)
    array([ 0.   , 12.041])
    """
    rates = np.atleast_1d(np.asarray(bits, np.float64))
    if rates.ndim != 1 or not np.isfinite(rates).all() or (rates < 0).any():
        raise InputError(f"expected bits as finite rates of at least 0, got {bits!r}")
    spectrum, power = _spectrum(x)
    d = len(spectrum)
    varying = np.sort(spectrum[spectrum > 0])[::-1]
    if len(varying) == 0:
        return np.full(len(rates), np.inf)
    # With the m largest components above the water level theta,
    #   rate = sum_{i<=m} (log2 var_i - log2 theta) / 2, so log2 theta is known for every m; the
    # right m is the last whose smallest component is above its own level.
    log_variance = np.log2(varying)
    m = np.arange(1, len(varying) + 1)
    levels = (np.cumsum(log_variance) - 2 * d * rates[:, None]) / m  # (n_rates, m)
    # m = 1 always counts, also where rate 0 puts the level at the component itself
    active = 1 + (log_variance[1:] > levels[:, 1:]).sum(axis=1)
    level = levels[np.arange(len(rates)), active - 1]
    # below the level a component keeps its variance as error, above it the level. In logarithms:
    # at 200 bits 2^level would underflow.
    error = np.minimum(log_variance, level[:, None])
    top = error.max(axis=1)
    log_error = top + np.log2(np.exp2(error - top[:, None]).sum(axis=1))
    result: Float64 = 10 * math.log10(2) * (math.log2(power) - log_error)
    return result


def _spectrum(x: Any) -> tuple[Float64, float]:
    """Variances of the uncorrelated components (d,) and the mean energy of a row, both in units of
    some power of four (which a ratio does not notice)."""
    rows = to_numpy(x)
    if rows.ndim == 1:
        variances = rows.astype(np.float64)
        check_finite(variances[None])
        if len(variances) == 0 or (variances < 0).any():
            raise InputError("expected x as (d,) variances of at least 0")
        variances = np.ldexp(variances, -math.frexp(variances.max())[1])
        return variances, float(variances.sum())
    rows = as_matrix(x)
    n, d = rows.shape
    exponent = math.frexp(float(np.abs(rows).max(initial=0)))[1]

    def blocks() -> Iterator[Float64]:
        for start, stop in _spans(rows):
            yield np.ldexp(rows[start:stop].astype(np.float64), -exponent)

    mean = sum((block.sum(axis=0) for block in blocks()), np.zeros(d)) / max(1, n)
    covariance = np.zeros((d, d))
    for block in blocks():
        block -= mean
        covariance += block.T @ block
    variances = np.linalg.eigvalsh(covariance / max(1, n))
    # what eigvalsh leaves of an exact zero: d rounding errors of the largest
    variances[variances < variances[-1] * d * np.finfo(np.float64).eps] = 0.0
    return variances, float(variances.sum() + mean @ mean)


def _spans(rows: Array) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``BLOCK_ENTRIES`` entries each."""
    n, d = rows.shape
    step = max(1, BLOCK_ENTRIES // max(1, d))
    for start in range(0, n, step):
        yield start, min(n, start + step)


def _blocks(x: Any, y: Any) -> Iterator[tuple[Float64, Float64]]:
    """Both arrays as (rows, d) float64, block by block; InputError unless alike and finite."""
    a, b = to_numpy(x), to_numpy(y, "y")
    if a.shape != b.shape:
        raise InputError(f"expected y of shape {a.shape} like x, got {b.shape}")
    width = a.shape[-1] if a.ndim else 1
    a, b = (v.reshape(-1 if width else 0, width) for v in (a, b))
    for start, stop in _spans(a):
        check_finite(a[start:stop])
        check_finite(b[start:stop], "y")
        yield a[start:stop].astype(np.float64), b[start:stop].astype(np.float64)


def _scaled(rows: Float64) -> tuple[Float64, npt.NDArray[np.int32]]:
    """Rows times 2^-exponent, with exponents (n,) such that squares can be summed. Exact but for
    entries too small beside their row's largest to matter in any sum."""
    top = np.frexp(np.abs(rows).max(axis=1, initial=0.0))[1]
    exponent = np.where(np.abs(top) <= SAFE_EXPONENT, 0, top)
    if exponent.any():
        rows = np.ldexp(rows, -exponent[:, None])
    return rows, exponent


def _norms(rows: Float64) -> tuple[Float64, npt.NDArray[np.int32]]:
    """Euclidean norms of rows (n, d) as value * 2^exponent, so that none over- or underflows."""
    rows, exponent = _scaled(rows)
    return np.sqrt(np.einsum("nd,nd->n", rows, rows)), exponent


def _difference_norms(a: Float64, b: Float64) -> tuple[Float64, npt.NDArray[np.int32]]:
    """``_norms`` of a - b. Only the largest numbers can overflow it, and they can be halved."""
    largest = max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0))
    if largest < 2.0**1022:
        return _norms(a - b)
    halved = (np.abs(a).max(axis=1) >= 2.0**1022) | (np.abs(b).max(axis=1) >= 2.0**1022)
    half = np.where(halved, 0.5, 1.0)[:, None]
    norm, exponent = _norms(a * half - b * half)
    return norm, exponent + halved


def _energy(norm: Float64, exponent: npt.NDArray[np.int32]) -> tuple[float, int]:
    """Sum of squares of norms * 2^exponent, again as value * 2^exponent."""
    return _add([(float(v), 2 * int(e)) for v, e in _grouped(norm, exponent)])


def _grouped(norm: Float64, exponent: npt.NDArray[np.int32]) -> Iterator[tuple[float, int]]:
    """Sum of the squared norms for each exponent that occurs; nearly always that is 0 alone."""
    for e in np.unique(exponent):
        chosen = norm[exponent == e]
        yield float(chosen @ chosen), int(e)


def _add(terms: list[tuple[float, int]]) -> tuple[float, int]:
    """Sum of value * 2^exponent over the terms, in the same form."""
    terms = [(value, exponent) for value, exponent in terms if value > 0]
    if not terms:
        return 0.0, 0
    top = max(exponent for _, exponent in terms)
    return math.fsum(math.ldexp(value, exponent - top) for value, exponent in terms), top
