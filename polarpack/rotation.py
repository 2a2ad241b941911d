"""Centring and rotation: vectors <-> coefficients in a better frame.

The one convention, stated once: a rotation is stored by its *synthesis* matrix S of shape (d, m);
column j is the direction in space of coefficient j. Rows of data are row vectors, so

    decode:  x_hat = c @ S.T + mean        encode:  c = (x - mean) @ A,   A = S (S^T S)^-1

S is kept as small integers times a power of two, ``S = matrix_ * 2**-exponent_``. Rounding an
orthogonal matrix leaves it slightly oblique; because the encoder uses the exact (pseudo-)inverse of
what the decoder has, nothing is lost but a noise gain of about d * 4**-exponent_ / 12 (below 0.01
dB at the default precision), for 5 or 6 bits an entry instead of 32.

Why integers: the decoder's product ``c @ S.T`` is then a sum of integers. Carried in float32 it is
*exact in any order of summation* while ||row of S|| * ||c|| < 2^24, because by Cauchy-Schwarz every
partial sum stays below that too; where a batch exceeds it, float64 carries it (2^53). So any BLAS,
any number of threads and any machine give the same bits, at the speed of a matrix product.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ._arrays import Float32
from ._threads import in_threads, one_blas_thread, threads_for
from .errors import CorruptDataError, InputError, LimitError, NotFittedError

Int16 = npt.NDArray[np.int16]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Kind = Literal["none", "klt", "random", "hadamard"]
KINDS: tuple[str, ...] = ("none", "klt", "random", "hadamard")
EXACT_FLOAT32 = float(1 << 24)  # integers up to here, and their sums, are exact in float32
MAX_INTEGER = (1 << 15) - 1  # largest magnitude of a stored entry
MAX_EXPONENT = 14  # entries of magnitude one still fit
HADAMARD_EXPONENT = 10
TRELLIS_START = 8
FEW_ROWS = 1 << 12  # rows that tell the spread of coefficients where axes do not depend on them
MAX_HADAMARD = 1 << 11  # its (d, d) matrix is formed when a file is opened
BLOCK_ROWS = 1 << 11  # rows turned at a time, in each thread
COVARIANCE_ROWS = 1 << 16  # rows looked at for mean and covariance; more change nothing measurable


def covariance(x: Float32) -> tuple[Float64, Float64]:
    """Mean (d,) and covariance (d, d) of the rows of x in float64; zeros without rows. O(n d^2) on
    at most ``COVARIANCE_ROWS`` evenly spaced rows, in blocks."""
    x = x[:: max(1, -(-len(x) // COVARIANCE_ROWS))]
    n, d = x.shape
    mean = x.mean(axis=0, dtype=np.float64) if n else np.zeros(d)
    total = np.zeros((d, d))
    for start in range(0, n, 8192):
        block = x[start : start + 8192] - mean
        total += block.T @ block
    return mean, total / max(n, 1)


def principal_axes(cov: Float64) -> tuple[Float64, Float64]:
    """Eigenvalues (d,), decreasing and >= 0, and eigenvectors as columns (d, d), signs fixed so
    that the largest entry of each is positive (eigh leaves the sign to chance). O(d^3)."""
    values, vectors = np.linalg.eigh(cov)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)[0]
    return values, vectors * np.where(largest < 0, -1.0, 1.0)


def hadamard_matrix(d: int, seed: int = 0) -> Int16:
    """Random signs and order, then Hadamard blocks of the powers of two that sum to d: (d, d)
    integers, rows and columns nearly orthonormal after division by 2**HADAMARD_EXPONENT.

    Made of integer arithmetic only (splitmix64), so a file needs to store only the seed.
    Source: Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform", SIAM J. Comput. 2009.
    """
    with np.errstate(over="ignore"):
        z = (np.arange(2 * d, dtype=np.uint64) + np.uint64(2 * seed * d + 1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    order = np.argsort(z[:d], kind="stable")
    signs = np.where(z[d:] & np.uint64(1), 1, -1).astype(np.int64)
    matrix = np.zeros((d, d), np.int64)
    start = 0
    for bit in reversed(range(d.bit_length())):
        size = 1 << bit
        if d & size:
            block = np.ones((1, 1), np.int64)
            while len(block) < size:
                block = np.block([[block, block], [block, -block]])
            # sqrt is correctly rounded everywhere
            entry = int(np.rint(2**HADAMARD_EXPONENT / np.sqrt(size)))
            rows = order[start : start + size]
            matrix[rows, start : start + size] = block * signs[rows, None] * entry
            start += size
    return matrix.astype(np.int16)


def random_axes(d: int, seed: int) -> Float64:
    """A uniformly random orthogonal (d, d) matrix: QR of a Gaussian one, signs fixed. O(d^3)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))
    return cast(Float64, q * np.where(np.diag(r) < 0, -1.0, 1.0))


def trellis_order(m: int) -> Int64:
    """Order in which coefficients of decreasing variance go through a trellis: a few of the weakest
    first, then from the strongest on. A path starts in one given state, so its first components
    have less choice; that should not cost the strongest ones (0.3 dB at d = 50)."""
    few = min(TRELLIS_START, m // 2)
    return np.concatenate([np.arange(m - 1, m - 1 - few, -1), np.arange(m - few)])


def axes_exponent(d: int) -> int:
    """Precision at which axes of d dimensions lose nothing worth its bits: steps of 2**-exponent,
    at most 0.15 / sqrt(d)."""
    return min(MAX_EXPONENT, int(np.ceil(np.log2(np.sqrt(d) / 0.15))))


def rounded_integers(a: Float64, exponent: int) -> Int16:
    """a in units of 2**-exponent, rounded."""
    return np.clip(np.rint(a * 2.0**exponent), -MAX_INTEGER, MAX_INTEGER).astype(np.int16)


def fits_float32(lattice: npt.NDArray[Any], row_norm: float) -> bool:
    """Whether the products of these rows of integers (n, m) with a matrix whose rows have at most
    this norm are exact in float32 (module's text). O(n m)."""
    c = lattice.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        square = float(np.einsum("ij,ij->i", c, c).max(initial=0.0))
    return bool(np.sqrt(square) * row_norm < 0.999 * EXACT_FLOAT32)  # sums of squares are rounded


class Rotation:
    """Subtract a mean and rotate; the inverse is exact integer arithmetic (see the module's text).

    kind: "klt" (principal axes, decreasing variance), "random" (uniform orthogonal), "hadamard"
    (structured, no side information) or "none". center: subtract the mean of the training rows.
    n_components: keep only the first m axes ("klt", "random"). exponent: S is rounded to multiples
    of 2**-exponent; None: ``axes_exponent``. for_trellis: axes in ``trellis_order``.

    After ``fit``: ``matrix_`` (d, m) int16, or None for "none"; ``mean_`` (d,) float32, rounded to
    float16's precision; ``variances_`` (m,) float64, of the training coefficients (second moments
    where there is no centre).
    """

    n_classes = 1

    def __init__(
        self,
        kind: Kind = "klt",
        *,
        center: bool = True,
        n_components: int | None = None,
        exponent: int | None = None,
        for_trellis: bool = False,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"expected rotation to be one of {', '.join(KINDS)}, got {kind!r}")
        if n_components is not None and n_components < 1:
            raise InputError(f"expected n_components >= 1, got {n_components}")
        if exponent is not None and not 0 <= exponent <= MAX_EXPONENT:
            raise InputError(f"expected exponent in 0..{MAX_EXPONENT}, got {exponent}")
        if not 0 <= seed < 1 << 31:
            raise InputError(f"expected seed in 0..2^31 - 1, got {seed}")
        self.kind, self.center, self.seed = kind, bool(center), int(seed)
        self.n_components, self.exponent, self.for_trellis = n_components, exponent, for_trellis
        self.d_ = 0
        self.mean_: Float32 = np.zeros(0, np.float32)
        self.matrix_: Int16 | None = None
        self.exponent_ = 0
        self.variances_: Float64 = np.zeros(0)
        self._analysis: Float32 | None = None  # (d, m), made when first asked for: readers never do
        self._synthesis: Float32 | None = None  # (m, d): the integers of matrix_, transposed
        self._row_norm = 1.0

    @property
    def n_components_(self) -> int:
        """Number m of coefficients per vector."""
        return self.d_ if self.matrix_ is None else int(self.matrix_.shape[1])

    # -- learning -----------------------------------------------------------------------------
    def fit(self, x: Float32) -> Rotation:
        """Learn mean and axes from (n, d) rows. O(n d^2 + d^3) time, O(d^2) extra memory.

        InputError for a Hadamard matrix of more than MAX_HADAMARD dimensions.
        """
        d = x.shape[1]
        if self.kind == "hadamard" and d > MAX_HADAMARD:
            raise InputError(f"expected at most {MAX_HADAMARD} dimensions, got {d}")
        with one_blas_thread(d):
            return self._fit(x)

    def _fit(self, x: Float32) -> Rotation:
        d = x.shape[1]
        mean, cov = covariance(x if self.kind == "klt" else x[:: max(1, len(x) // FEW_ROWS)])
        rounded = np.zeros(d, np.float32)
        if self.center:
            rounded = np.clip(mean, -65504, 65504).astype(np.float16).astype(np.float32)
        else:
            cov += np.outer(mean, mean)
        if self.kind == "none":
            self.d_, self.mean_, self.matrix_ = d, rounded, None
            self.variances_ = np.diag(cov).copy()
            return self
        if self.kind == "hadamard":
            self._set(hadamard_matrix(d, self.seed), HADAMARD_EXPONENT, rounded)
        else:
            axes = principal_axes(cov)[1] if self.kind == "klt" else random_axes(d, self.seed)
            axes = axes[:, : self.n_components]
            axes = axes[:, trellis_order(axes.shape[1])] if self.for_trellis else axes
            exponent = axes_exponent(d) if self.exponent is None else self.exponent
            self._set(rounded_integers(axes, exponent), exponent, rounded)
        a = self.analysis.astype(np.float64)
        self.variances_ = np.einsum("ij,ij->j", a, cov @ a)
        return self

    @classmethod
    def of(cls, matrix: Int16, exponent: int, mean: Float32) -> Rotation:
        """The rotation with synthesis matrix ``matrix * 2**-exponent`` around a given mean."""
        self = cls("klt")
        self._set(matrix, exponent, mean)
        return self

    def _set(self, matrix: Int16, exponent: int, mean: Float32) -> None:
        self.d_, self.mean_, self.matrix_, self.exponent_ = len(mean), mean, matrix, exponent
        self._analysis = None
        self._synthesis = np.ascontiguousarray(matrix.T, np.float32)
        square = np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64)
        self._row_norm = max(1.0, float(np.sqrt(square.max())))

    @property
    def analysis(self) -> Float32:
        """A = S (S^T S)^-1 as (d, m) float32: exact counterpart of the rounded S; where S was
        rounded so coarsely that its columns depend on each other, the pseudo-inverse. O(d m^2)
        once, O(d m) for "hadamard", whose columns are orthogonal."""
        if self._analysis is None:
            assert self.matrix_ is not None
            s = self.matrix_.astype(np.float64) * 2.0**-self.exponent_
            if self.kind == "hadamard":
                a = s / np.einsum("ij,ij->j", s, s)
            else:
                with one_blas_thread(self.d_):
                    try:
                        a = np.linalg.solve(s.T @ s, s.T).T
                    except np.linalg.LinAlgError:
                        a = np.linalg.pinv(s).T
            self._analysis = np.ascontiguousarray(a, np.float32)
        return self._analysis

    # -- vectors <-> coefficients --------------------------------------------------------------
    def analyse(self, x: Float32) -> tuple[Int64, Float32]:
        """Class of each row (there is one only; ``frames.Frames`` has several) and ``forward``."""
        return np.zeros(len(x), np.int64), self.forward(x)

    def forward(self, x: Float32, row_class: Int64 | None = None) -> Float32:
        """(n, d) rows -> (n, m) coefficients, float32. O(n d m)."""
        if not self.d_:
            raise NotFittedError("Rotation is not fitted: call fit first")
        if self.matrix_ is None:
            return x - self.mean_ if self.center else x
        analysis, c = self.analysis, np.empty((len(x), self.n_components_), np.float32)

        def turn(start: int) -> None:
            block = x[start : start + BLOCK_ROWS]
            centred = block - self.mean_ if self.center else block
            np.matmul(centred, analysis, out=c[start : start + BLOCK_ROWS])

        in_threads(turn, range(0, len(x), BLOCK_ROWS))
        return c

    def inverse(
        self, lattice: npt.NDArray[Any], unit: float, row_class: Int64 | None = None
    ) -> Float32:
        """Integer coefficients (n, m), counted in ``unit``s, -> (n, d) rows.

        ``lattice`` holds integers in any numeric dtype. The same bits on every machine (module's
        text). O(n d m); memory beyond the result is bounded by a block of rows.
        """
        y = np.empty((len(lattice), self.d_), np.float32)

        def turn_back(start: int) -> None:
            rows = slice(start, start + BLOCK_ROWS)
            y[rows] = self._multiply(lattice[rows])
            y[rows] *= np.float32(unit * 2.0**-self.exponent_)
            if self.center:
                y[rows] += self.mean_

        in_threads(turn_back, range(0, len(lattice), BLOCK_ROWS), threads_for(len(lattice)))
        return y

    def _multiply(self, lattice: npt.NDArray[Any]) -> Float32:
        if self._synthesis is None:
            return lattice.astype(np.float32)
        if fits_float32(lattice, self._row_norm):
            return cast(Float32, np.ascontiguousarray(lattice, np.float32) @ self._synthesis)
        wide = lattice.astype(np.float64) @ self._synthesis.astype(np.float64)
        return cast(Float32, wide.astype(np.float32))

    # -- what travels in a file ---------------------------------------------------------------
    def get_config(self) -> dict[str, Any]:
        """What the arrays do not say, as JSON values."""
        config: dict[str, Any] = {"kind": self.kind, "center": self.center}
        if self.kind == "hadamard":
            config["seed"] = self.seed
        elif self.matrix_ is not None:
            config["exponent"] = self.exponent_
        return config

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Learned arrays at stored precision: ``mean`` float16 (d,), ``matrix`` int16 (d, m)."""
        out: dict[str, npt.NDArray[Any]] = {}
        if self.center:
            out["mean"] = self.mean_.astype(np.float16)
        if self.matrix_ is not None and self.kind != "hadamard":
            out["matrix"] = self.matrix_
        return out

    @classmethod
    def from_arrays(
        cls, config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], d: int
    ) -> Rotation:
        """Rebuild from ``get_config`` and ``arrays``; CorruptDataError where they do not fit d,
        LimitError for a Hadamard matrix of more than MAX_HADAMARD dimensions."""
        kind, center = config.get("kind"), config.get("center")
        if kind not in KINDS or not isinstance(center, bool):
            raise CorruptDataError(f"rotation: unknown kind {kind!r} or center {center!r}")
        seed, exponent = config.get("seed", 0), config.get("exponent", 0)
        if type(seed) is not int or not 0 <= seed < 1 << 31:
            raise CorruptDataError(f"rotation: expected seed in 0..2^31 - 1, got {seed!r}")
        if type(exponent) is not int or not 0 <= exponent <= MAX_EXPONENT:
            raise CorruptDataError(
                f"rotation: expected exponent in 0..{MAX_EXPONENT}, got {exponent!r}"
            )
        self = cls(cast(Kind, kind), center=center, seed=seed)
        mean = arrays.get("mean", np.zeros(d, np.float16))
        if mean.dtype != np.float16 or mean.shape != (d,) or not np.isfinite(mean).all():
            raise CorruptDataError(f"rotation: expected a finite float16 mean of shape ({d},)")
        wide = mean.astype(np.float32)
        if kind == "none":
            self.d_, self.mean_ = d, wide
        elif kind == "hadamard":
            if d > MAX_HADAMARD:
                raise LimitError(f"rotation: a Hadamard matrix of {d} exceeds {MAX_HADAMARD}")
            self._set(hadamard_matrix(d, seed), HADAMARD_EXPONENT, wide)
        else:
            matrix = arrays.get("matrix")
            if matrix is None or matrix.dtype != np.int16 or matrix.ndim != 2:
                raise CorruptDataError("rotation: expected an int16 matrix")
            if matrix.shape[0] != d or not 1 <= matrix.shape[1] <= d:
                raise CorruptDataError(f"rotation: matrix {matrix.shape} does not fit d = {d}")
            if int(matrix.min()) < -MAX_INTEGER:
                raise CorruptDataError(f"rotation: expected integers of at least {-MAX_INTEGER}")
            self._set(matrix, exponent, wide)
        return self
