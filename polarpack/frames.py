"""One rotation per class of rows: the frame is switched to what each row looks like.

A single KLT sees only the average spectrum. Real tables are mixtures: grouped well, each group has
a steeper spectrum of its own, and the rate-distortion bound itself moves by 0.4 to 1.9 dB. Rows are
grouped by the class in which they cost the fewest bits at the distortion D aimed at,

    cost(x, k) = sum_j  1/2 log2(1 + v_kj / D) + (c_kj^2 / (v_kj + D)) / (2 ln 2)  - log2 p_k

(the Gaussian code length of the coefficients plus uniform noise of power D, and of the class), and
each group's KLT is refitted, as in k-means. Covariances lean on the common one, so small groups stay
safe.

What a file pays: rotations. Therefore all classes share one KLT and turn only its ``n_leading``
first axes, where nearly all of the gain is. A turn is stored like the rotation itself, as small
integers, and the products of the two are formed and rounded in integers: every machine gets the
same synthesis matrices (``rotation``).

Sources: Effros and Chou, "Weighted universal transform coding", ICIP 1995; Tipping and Bishop,
"Mixtures of probabilistic principal component analysers", Neural Computation 1999.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arrays import Float32
from .errors import CorruptDataError, InputError, LimitError
from .clustering import kmeans
from .rotation import MAX_EXPONENT, Float64, Int16, Int64, Rotation, principal_axes, trellis_order

MAX_CLASSES = 256
SHRINKAGE = 1.5  # a class's covariance leans on the common one as if by this many more rows an axis
TRAINING_ROWS = 1 << 16
MAX_OFFSET = 60  # |exponent| of the class means
MAX_ENTRIES = 1 << 27  # entries of all classes' synthesis matrices together, formed on opening


class Frames:
    """``n_classes`` rotations around ``n_classes`` means, within the leading axes of a common KLT.

    common: a fitted ``Rotation`` of kind "klt". n_leading: how many of its first axes classes turn
    and shift (None: all). After ``fit``: ``turns_`` (K, p, p) int16 times 2**-turn_exponent_,
    ``offsets_`` (K, p) int16 in units of 2**-offset_exponent_, the class means in coefficients of
    the common KLT; ``variances_`` (K, m) and ``weights_`` (K,) of the training rows.
    """

    def __init__(self, common: Rotation, *, n_classes: int, n_leading: int | None = None, seed: int = 0) -> None:
        if not 2 <= n_classes <= MAX_CLASSES:
            raise InputError(f"expected n_classes in 2..{MAX_CLASSES}, got {n_classes}")
        if common.matrix_ is None:
            raise InputError("expected a common rotation of kind 'klt' that is fitted")
        self.common, self.n_classes, self.seed = common, n_classes, seed
        self.n_leading = min(n_leading or common.n_components_, common.n_components_)
        self.noise_ = 1.0

    @property
    def n_components_(self) -> int:
        """Number m of coefficients per vector."""
        return self.common.n_components_

    @property
    def d_(self) -> int:
        """Dimension of the vectors."""
        return self.common.d_

    def fit(self, x: Float32, *, noise: float, n_rounds: int = 6) -> Frames:
        """Learn classes from (n, d) rows for a distortion of ``noise`` per coefficient.

        O(n_rounds n (d m + K m p)) time on at most ``TRAINING_ROWS`` rows; k-means starts it.
        """
        p, k, self.noise_ = self.n_leading, self.n_classes, noise
        c = self.common.forward(x[:: max(1, -(-len(x) // TRAINING_ROWS))])
        common_variance = c.var(axis=0, dtype=np.float64) + 1e-30
        rows = kmeans(np.ascontiguousarray(c[:, :p]), k, seed=self.seed, n_iter=10)[1]
        means, turns = np.zeros((k, p)), np.zeros((k, p, p))
        shrinkage = SHRINKAGE * p
        self.variances_, self.weights_ = np.zeros((k, c.shape[1])), np.zeros(k)
        for _ in range(n_rounds):
            for i in range(k):
                mine = c[rows == i]
                n = len(mine)
                means[i] = mine[:, :p].sum(axis=0, dtype=np.float64) / (n + 2)
                centred = mine[:, :p] - means[i].astype(np.float32)
                cov = (centred.T @ centred).astype(np.float64)
                cov[np.diag_indices(p)] += shrinkage * common_variance[:p]
                values, turns[i] = principal_axes(cov / (n + shrinkage))
                tail = np.einsum("ij,ij->j", mine[:, p:], mine[:, p:], dtype=np.float64)
                tail = (tail + shrinkage * common_variance[p:]) / (n + shrinkage)
                self.variances_[i] = np.concatenate([values, tail])
                self.weights_[i] = (n + 0.5) / (len(c) + 0.5 * k)
            rows = cheapest_class(c, means, turns, self.variances_, self.weights_, noise)
        turn_exponent = int(np.ceil(np.log2(np.sqrt(p) / 0.15)))
        largest = max(float(np.abs(means).max()), 1e-30)
        offset_exponent = int(np.clip(10 - np.ceil(np.log2(largest)), -MAX_OFFSET, MAX_OFFSET))
        return self._set(
            np.rint(turns * 2.0**turn_exponent).astype(np.int16),
            turn_exponent,
            np.rint(means * 2.0**offset_exponent).astype(np.int16),
            offset_exponent,
        )

    def _set(self, turns: Int16, turn_exponent: int, offsets: Int16, offset_exponent: int) -> Frames:
        """Take stored integers and form each class's rotation from them, in integers."""
        self.turns_, self.turn_exponent_ = turns, turn_exponent
        self.offsets_, self.offset_exponent_ = offsets, offset_exponent
        axes = self.common.matrix_
        assert axes is not None
        p, shift = self.n_leading, turn_exponent
        lead = axes[:, :p].astype(np.int64)
        unit = np.float32(2.0 ** -(offset_exponent + self.common.exponent_))
        self.rotations: list[Rotation] = []
        order = trellis_order(self.n_components_)
        for turn, offset in zip(turns, offsets, strict=True):
            matrix = axes.copy()
            product = (exact_product(lead, turn) + (1 << shift >> 1)) >> shift
            matrix[:, :p] = np.clip(product, -32768, 32767)
            moved = exact_product(lead, offset[:, None])[:, 0].astype(np.float32) * unit
            mean = self.common.mean_ + moved
            self.rotations.append(Rotation.of(matrix[:, order], self.common.exponent_, mean))
        return self

    # -- vectors <-> coefficients --------------------------------------------------------------
    def choose(self, x: Float32) -> Int64:
        """Class of least cost for each row of x (n, d). O(n d m + n K p^2)."""
        means = self.offsets_ * 2.0**-self.offset_exponent_
        turns = self.turns_ * 2.0**-self.turn_exponent_
        c = self.common.forward(x)
        return cheapest_class(c, means, turns, self.variances_, self.weights_, self.noise_)

    def forward(self, x: Float32, row_class: Int64) -> Float32:
        """(n, d) rows -> (n, m) coefficients, each row in its class's frame. O(n d m)."""
        c = np.empty((len(x), self.n_components_), np.float32)
        for rows, rotation in self._groups(row_class):
            c[rows] = rotation.forward(x[rows])
        return c

    def inverse(self, lattice: npt.NDArray[Any], unit: float, row_class: Int64) -> Float32:
        """Integer coefficients (n, m), counted in ``unit``s, -> (n, d) rows; same bits everywhere."""
        x = np.empty((len(lattice), self.d_), np.float32)
        for rows, rotation in self._groups(row_class):
            x[rows] = rotation.inverse(lattice[rows], unit)
        return x

    def _groups(self, row_class: Int64) -> Iterator[tuple[Int64, Rotation]]:
        """Row numbers of each class that occurs, with its rotation."""
        order = np.argsort(row_class, kind="stable")
        ends = np.cumsum(np.bincount(row_class, minlength=self.n_classes))
        for rotation, start, end in zip(self.rotations, [0, *ends[:-1]], ends, strict=True):
            if end > start:
                yield order[start:end], rotation

    # -- what travels in a file ---------------------------------------------------------------
    def get_config(self) -> dict[str, Any]:
        """What the arrays do not say, as JSON values."""
        return {
            "common": self.common.get_config(),
            "turn_exponent": self.turn_exponent_,
            "offset_exponent": self.offset_exponent_,
        }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Learned arrays at stored precision: those of the common rotation, ``turns`` int16 (K p, p)
        and ``offsets`` int16 (K, p). What only an encoder needs is refitted or kept apart."""
        return {
            **self.common.arrays(),
            "turns": self.turns_.reshape(-1, self.n_leading),
            "offsets": self.offsets_,
            "spectra": self._spectra(),
        }

    def _spectra(self) -> npt.NDArray[np.uint8]:
        """Variances and weights in quarter octaves, relative to the noise: all an encoder needs to
        choose classes, (K, m + 1)."""
        relative = np.concatenate([self.variances_ / self.noise_, self.weights_[:, None]], axis=1)
        return np.clip(np.rint(4 * np.log2(relative + 1e-9)) + 128, 0, 255).astype(np.uint8)

    @classmethod
    def from_arrays(cls, config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], d: int) -> Frames:
        """Rebuild from ``get_config`` and ``arrays``; CorruptDataError where they do not fit d."""
        common_config = config.get("common")
        if not isinstance(common_config, dict):
            raise CorruptDataError("frames: expected the common rotation's configuration")
        common = Rotation.from_arrays(common_config, arrays, d)
        turns, offsets, spectra = (arrays.get(k) for k in ("turns", "offsets", "spectra"))
        if turns is None or offsets is None or spectra is None or common.matrix_ is None:
            raise CorruptDataError("frames: expected turns, offsets, spectra and a common matrix")
        k, p = offsets.shape if offsets.ndim == 2 else (0, 0)
        if not (2 <= k <= MAX_CLASSES and 1 <= p <= common.n_components_):
            raise CorruptDataError(f"frames: offsets of shape {offsets.shape} fit no classes")
        if k * d * common.n_components_ > MAX_ENTRIES:
            raise LimitError(f"frames: {k} matrices of {d} x {common.n_components_} exceed {MAX_ENTRIES}")
        if turns.shape != (k * p, p) or spectra.shape != (k, common.n_components_ + 1):
            raise CorruptDataError(f"frames: turns {turns.shape} do not fit {k} classes of {p} axes")
        if (turns.dtype, offsets.dtype, spectra.dtype) != (np.int16, np.int16, np.uint8):
            raise CorruptDataError("frames: expected int16 turns and offsets, uint8 spectra")
        exponents = config.get("turn_exponent"), config.get("offset_exponent")
        if not (type(exponents[0]) is int and 0 <= exponents[0] <= MAX_EXPONENT):
            raise CorruptDataError(f"frames: turn_exponent {exponents[0]!r} out of range")
        if not (type(exponents[1]) is int and abs(exponents[1]) <= MAX_OFFSET):
            raise CorruptDataError(f"frames: offset_exponent {exponents[1]!r} out of range")
        self = cls(common, n_classes=k, n_leading=p)
        relative = np.exp2((spectra.astype(np.float64) - 128) / 4)
        self.variances_, self.weights_ = relative[:, :-1], relative[:, -1]
        return self._set(turns.reshape(k, p, p), exponents[0], offsets, exponents[1])


def cheapest_class(
    c: Float32, means: Float64, turns: Float64, variances: Float64, weights: Float64, noise: float
) -> Int64:
    """Class of least cost (module's text) for each row of common coefficients c (n, m).

    means (K, p), turns (K, p, p), variances (K, m), weights (K,). O(n K (p^2 + m)).
    """
    p = means.shape[1]
    best, chosen = np.full(len(c), np.inf, np.float32), np.zeros(len(c), np.int64)
    tail = c[:, p:] * c[:, p:]
    for i in range(len(means)):
        scale = (0.5 / (np.log(2) * (variances[i] + noise))).astype(np.float32)
        own = (c[:, :p] - means[i].astype(np.float32)) @ turns[i].astype(np.float32)
        cost = (own * own) @ scale[:p] + tail @ scale[p:]
        cost += np.float32(0.5 * np.log2(1 + variances[i] / noise).sum() - np.log2(weights[i]))
        better = cost < best
        best[better], chosen[better] = cost[better], i
    return chosen


def exact_product(a: Int64, b: Int16) -> Int64:
    """Integer matrix product by way of float64 BLAS: exact, since |sums| stay below 2^53."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
