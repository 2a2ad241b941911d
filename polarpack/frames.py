"""One rotation per class of rows: the frame is switched to what each row looks like.

A single KLT sees only the average spectrum. Real tables are mixtures: grouped well, each group has
a steeper spectrum of its own, and the rate-distortion bound itself moves by 0.4 to 1.9 dB. Rows are
grouped by the class in which they cost the fewest bits at the distortion D aimed at,

    cost(x, k) = sum_j  1/2 log2(1 + v_kj / D) + (c_kj^2 / (v_kj + D)) / (2 ln 2)  - log2 p_k

(the Gaussian code length of the coefficients plus uniform noise of power D, and of the class), and
each group's KLT is refitted, as in k-means. Covariances lean on their mean, so small groups stay
safe.

What a file pays: rotations. Therefore all classes share one KLT and turn only its ``n_leading``
first axes, where nearly all of the gain is. A turn is stored like the rotation itself, as small
integers, and the products of the two are formed and rounded in integers: every machine gets the
same synthesis matrices (``rotation``). What classes share is computed once for all rows: the common
coefficients on the way in, the axes that nobody turns on the way out.

Sources: Effros and Chou, "Weighted universal transform coding", ICIP 1995; Tipping and Bishop,
"Mixtures of probabilistic principal component analysers", Neural Computation 1999.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Float32
from ._threads import in_threads, one_blas_thread, threads_for
from .clustering import kmeans
from .errors import CorruptDataError, InputError, LimitError
from .rotation import (
    BLOCK_ROWS,
    EXACT_FLOAT32,
    MAX_EXPONENT,
    MAX_INTEGER,
    Float64,
    Int16,
    Int64,
    Rotation,
    axes_exponent,
    fits_float32,
    principal_axes,
    rounded_integers,
    trellis_order,
)

Spectra = npt.NDArray[np.uint8]
Moments = tuple[Float64, Float64, Float64, Float64]

MAX_CLASSES = 256
LEAST_LEAN = 0.1  # a class's covariance leans on the mean one by this many rows an axis, or more
TRAINING_ROWS = 1 << 16
ROUND_ROWS = 1 << 13  # rows (4 for each axis of each class, if more) on which classes settle
SETTLED = 0.03  # they have when no larger share of the rows changes class
# Classes whose cost a row is told: at most so many, and none whose rough cost is so many bits above
# the least. More of them gain less than 0.3 bits a row.
SHORTLIST, FINALISTS, WITHIN = 6, 3, 15.0
FIRST_AXES = 128  # or half of the leading axes tell finalists from the others,
FEW_AXES = 64  # or so few all of them
MAX_OFFSET = 60  # |exponent| of the class means
MAX_NOISE = 512  # |quarter octaves| of the noise
MAX_ENTRIES = 1 << 27  # entries of all classes' leading axes together, formed on opening
STEPS = 4  # variances and noise are kept in quarter octaves
ZERO = 128  # stored for a variance as large as the noise, and for a weight of one


class _Turning(NamedTuple):
    """What makes class coefficients of common ones, both in trellis order; q of them depend on the
    class: head = (common head - offset) @ heads[k], rest = common rest - head @ leaks[k]."""

    common: Float32  # (d, m) analysis of the common rotation
    offsets: Float32  # (K, q)
    heads: Float32  # (K, q, q)
    leaks: Float32  # (K, q, m - q): what rounding a class's axes makes them share with the others


class Frames:
    """``n_classes`` rotations around ``n_classes`` means, within the leading axes of a common KLT.

    common: a fitted ``Rotation`` of kind "klt", axes by decreasing variance. n_leading: how many of
    its first axes classes turn and shift (None: all). After ``fit``: ``turns_`` (K, p, p) int16
    times 2**-turn_exponent_; ``offsets_`` (K, p) int16 times 2**-offset_exponent_, the class means
    in coefficients of the common KLT, and ``means_`` (K, d) what they are in space; ``noise_``,
    ``variances_`` (K, m) of the coefficients that ``forward`` returns, and ``weights_`` (K,), the
    classes' shares, all as rounded for storage.
    """

    def __init__(
        self,
        common: Rotation,
        *,
        n_classes: int,
        n_leading: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 2 <= n_classes <= MAX_CLASSES:
            raise InputError(f"expected n_classes in 2..{MAX_CLASSES}, got {n_classes}")
        if n_leading is not None and n_leading < 1:
            raise InputError(f"expected n_leading >= 1, got {n_leading}")
        if common.matrix_ is None:
            raise InputError("expected a common rotation of kind 'klt' that is fitted")
        self.common, self.n_classes, self.seed = common, n_classes, seed
        m = common.n_components_
        self.n_leading = p = min(n_leading or m, m)
        if n_classes * common.d_ * p > MAX_ENTRIES:
            raise InputError(f"{n_classes} x {p} axes of {common.d_} exceed {MAX_ENTRIES} entries")
        self._order = trellis_order(m)
        place = np.argsort(self._order)[:p]  # of the leading axes among the coefficients
        first = int(place[0])
        self._lead: slice | Int64 = place if place[-1] < first else slice(first, first + p)
        self._n_turned = int(place.max()) + 1  # first coefficients that depend on the class

    @property
    def n_components_(self) -> int:
        """Number m of coefficients per vector."""
        return self.common.n_components_

    @property
    def d_(self) -> int:
        """Dimension of the vectors."""
        return self.common.d_

    # -- learning -----------------------------------------------------------------------------
    def fit(self, x: Float32, *, noise: float, n_rounds: int = 6) -> Frames:
        """Learn classes from (n, d) rows for a distortion of ``noise`` > 0 per coefficient.

        Classes settle on some ROUND_ROWS rows in at most ``n_rounds`` >= 1 rounds; then frames are
        made from at most TRAINING_ROWS, evenly spaced. k-means, then O(n (d m + K p^2) + K p^3).
        """
        with one_blas_thread(self.n_leading):
            return self._fit(x, noise, n_rounds)

    def _fit(self, x: Float32, noise: float, n_rounds: int) -> Frames:
        p, k = self.n_leading, self.n_classes
        c = self.common.forward(x[:: max(1, -(-len(x) // TRAINING_ROWS))])
        power = np.einsum("ij,ij->j", c, c, dtype=np.float64) / max(1, len(c))
        few = np.ascontiguousarray(c[:: max(1, len(c) // max(ROUND_ROWS, 4 * k * p))])
        rows = kmeans(np.ascontiguousarray(few[:, :p]), k, seed=self.seed, n_iter=10)[1]
        # noise far below what float32 can tell apart would not change the choice
        level = max(noise, 1e-6 * float(power.max()), 1e-36)
        for _ in range(max(1, n_rounds)):
            before, costs = rows, _Costs.of_moments(_moments(few, rows, k, p, level), level)
            rows = costs.cheapest(few)
            if np.count_nonzero(rows != before) <= SETTLED * len(rows):
                break
        rows = costs.cheapest(c) if len(few) < len(c) else rows
        means, covariances, tails, weights = _moments(c, rows, k, p, level)
        found = in_threads(principal_axes, list(covariances))
        leading = np.stack([values for values, _ in found])
        turn_exponent = axes_exponent(p)
        turns = np.stack([rounded_integers(axes, turn_exponent) for _, axes in found])
        largest = max(float(np.abs(means).max()), 1e-30)
        offset_exponent = int(np.clip(10 - np.ceil(np.log2(largest)), -MAX_OFFSET, MAX_OFFSET))
        noise_steps = int(np.clip(np.rint(STEPS * np.log2(noise)), -MAX_NOISE, MAX_NOISE))
        relative = np.concatenate([leading, tails], axis=1) * 2.0 ** (-noise_steps / STEPS)
        spectra = np.concatenate([relative, weights[:, None]], axis=1)
        steps = np.rint(STEPS * np.log2(np.maximum(spectra, 1e-30))) + ZERO
        return self._set(
            turns,
            turn_exponent,
            rounded_integers(means, offset_exponent),
            offset_exponent,
            np.clip(steps, 0, 255).astype(np.uint8),
            noise_steps,
        )

    def _set(
        self,
        turns: Int16,
        turn_exponent: int,
        offsets: Int16,
        offset_exponent: int,
        spectra: Spectra,
        noise_steps: int,
    ) -> Frames:
        """Take what is stored and form each class's rotation from it, in integers."""
        self.turns_, self.turn_exponent_ = turns, turn_exponent
        self.offsets_, self.offset_exponent_ = offsets, offset_exponent
        self.spectra_, self.noise_steps_ = spectra, noise_steps
        self.noise_ = float(2.0 ** (noise_steps / STEPS))
        values = np.exp2((spectra.astype(np.float64) - ZERO) / STEPS)
        self.weights_ = values[:, -1]
        self.variances_ = self.noise_ * values[:, self._order]
        self._costs: _Costs | None = None  # these two are made when first asked for: readers never
        self._turning: _Turning | None = None
        axes = self.common.matrix_
        assert axes is not None
        p, q, shift = self.n_leading, self._n_turned, turn_exponent
        lead = axes[:, :p].astype(np.int64)
        unit = np.float32(2.0 ** -(offset_exponent + self.common.exponent_))
        ordered = np.ascontiguousarray(axes.T[self._order], np.float32)
        self._rest = ordered[q:]
        self._turned = np.repeat(ordered[None, :q], len(turns), axis=0)
        self.means_ = np.empty((len(turns), self.d_), np.float32)
        for k, (turn, offset) in enumerate(zip(turns, offsets, strict=True)):
            product = (exact_product(lead, turn) + (1 << shift >> 1)) >> shift
            self._turned[k, self._lead] = np.clip(product, -MAX_INTEGER, MAX_INTEGER).T
            moved = exact_product(lead, offset[:, None])[:, 0].astype(np.float32) * unit
            self.means_[k] = self.common.mean_ + moved
        square = np.einsum("kij,kij->kj", self._turned, self._turned, dtype=np.float64)
        square += np.einsum("ij,ij->j", self._rest, self._rest, dtype=np.float64)
        self._row_norm = max(1.0, float(np.sqrt(square.max())))
        return self

    def matrix_of(self, k: int) -> Int16:
        """The synthesis matrix (d, m) of class k, in units of 2**-common.exponent_."""
        return np.concatenate([self._turned[k], self._rest]).T.astype(np.int16)

    # -- vectors <-> coefficients --------------------------------------------------------------
    def analyse(self, x: Float32, row_class: Int64 | None = None) -> tuple[Int64, Float32]:
        """Rows (n, d) -> the class of least cost of each (or those given) and coefficients (n, m),
        each row in its class's frame. O(n (d m + K m + p^2 + m p))."""
        if self._costs is None:
            values = np.exp2((self.spectra_[:, :-1].astype(np.float64) - ZERO) / STEPS)
            self._costs = _Costs.of_frames(
                self.offsets_.astype(np.float64) * 2.0**-self.offset_exponent_,
                self.turns_.astype(np.float64) * 2.0**-self.turn_exponent_,
                self.noise_ * values,
                self.weights_,
                self.noise_,
            ).in_order(self._order, self._lead)
        if self._turning is None:
            with one_blas_thread(self.d_):
                self._turning = self._make_turning()
        costs, turning = self._costs, self._turning
        chosen = np.empty(len(x), np.int64) if row_class is None else row_class
        c = np.empty((len(x), self.n_components_), np.float32)

        def turn(start: int) -> None:
            rows = slice(start, start + BLOCK_ROWS)
            block = np.asarray((x[rows] - self.common.mean_) @ turning.common, np.float32)
            if row_class is None:
                chosen[rows] = costs.cheapest(block)
            order, groups = self._groups(chosen[rows])
            block = block[order]
            for k, mine in groups:
                head, rest = block[mine, : self._n_turned], block[mine, self._n_turned :]
                np.matmul(head - turning.offsets[k], turning.heads[k], out=head)
                np.subtract(rest, head @ turning.leaks[k], out=rest)
            c[rows][order] = block

        in_threads(turn, range(0, len(x), BLOCK_ROWS))
        return chosen, c

    def _make_turning(self) -> _Turning:
        """With A the analysis of the common S and M = A^T S_k, the inverse of S_k is M^-1 A^T where
        S is square, and else a left inverse that is as good. M is the identity but for the columns
        of the leading axes, so only these have to be solved for."""
        q = self._n_turned
        common = np.ascontiguousarray(self.common.analysis[:, self._order])
        heads, leaks = [], []
        for turned in self._turned:
            mixed = (turned @ common).astype(np.float64) * 2.0**-self.common.exponent_
            try:
                heads.append(np.linalg.inv(mixed[:, :q]))
            except np.linalg.LinAlgError:
                heads.append(np.linalg.pinv(mixed[:, :q]))
            leaks.append(mixed[:, q:])
        offsets = (self.means_ - self.common.mean_) @ common[:, :q]
        return _Turning(
            common,
            np.asarray(offsets, np.float32),
            np.asarray(heads, np.float32),
            np.asarray(leaks, np.float32),
        )

    def choose(self, x: Float32) -> Int64:
        """Class of least cost for each row of x (n, d)."""
        return self.analyse(x)[0]

    def forward(self, x: Float32, row_class: Int64) -> Float32:
        """(n, d) rows -> (n, m) coefficients, each row in its class's frame."""
        return self.analyse(x, row_class)[1]

    def inverse(self, lattice: npt.NDArray[Any], unit: float, row_class: Int64) -> Float32:
        """Integer coefficients (n, m), counted in ``unit``s, -> (n, d) rows; the same bits on every
        machine. O(n d m)."""
        x = np.empty((len(lattice), self.d_), np.float32)
        factor = np.float32(unit * 2.0**-self.common.exponent_)
        q = self._n_turned

        def turn_back(start: int) -> None:
            rows = slice(start, start + BLOCK_ROWS)
            y, out = lattice[rows], x[rows]
            order, groups = None, [(int(row_class[start]), slice(None))]
            if len(y) > 1:
                order, groups = self._groups(row_class[rows])
                y = y[order]
            kind = np.dtype(np.float32 if fits_float32(y, self._row_norm) else np.float64)
            y = y.astype(kind, copy=False)
            rest = y[:, q:] @ self._rest.astype(kind, copy=False)
            for k, mine in groups:
                sums = rest[mine] + y[mine, :q] @ self._turned[k].astype(kind, copy=False)
                block = sums.astype(np.float32, copy=False)
                block *= factor
                block += self.means_[k]
                out[slice(None) if order is None else order[mine]] = block

        in_threads(turn_back, range(0, len(lattice), BLOCK_ROWS), threads_for(len(lattice)))
        return x

    def _groups(self, row_class: Int64) -> tuple[Int64, list[tuple[int, slice]]]:
        """Rows in order of their classes, and the stretch of it for each class that occurs."""
        order = np.argsort(row_class, kind="stable")
        ends = np.cumsum(np.bincount(row_class, minlength=self.n_classes)).tolist()
        cuts = [slice(a, b) for a, b in pairwise([0, *ends])]
        return order, [(k, cut) for k, cut in enumerate(cuts) if cut.stop > cut.start]

    # -- what travels in a file ---------------------------------------------------------------
    def get_config(self) -> dict[str, Any]:
        """What the arrays do not say, as JSON values."""
        return {
            "common": self.common.get_config(),
            "turn_exponent": self.turn_exponent_,
            "offset_exponent": self.offset_exponent_,
            "noise": self.noise_steps_,
        }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Learned arrays at stored precision: those of the common rotation, ``turns`` (K p, p) and
        ``offsets`` (K, p), int16. For encoders alone, who choose classes by it: ``spectra`` (K,
        m + 1) int16, variances relative to the noise, and weights, in quarter octaves above 2**-32,
        as differences along each row (the first from ZERO)."""
        return {
            **self.common.arrays(),
            "turns": self.turns_.reshape(-1, self.n_leading),
            "offsets": self.offsets_,
            "spectra": np.diff(self.spectra_.astype(np.int16), axis=1, prepend=np.int16(ZERO)),
        }

    @classmethod
    def from_arrays(
        cls, config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], d: int
    ) -> Frames:
        """Rebuild from ``get_config`` and ``arrays``; CorruptDataError or LimitError where they do
        not fit d or each other."""
        common_config = config.get("common")
        if not isinstance(common_config, dict):
            raise CorruptDataError("frames: expected the common rotation's configuration")
        common = Rotation.from_arrays(common_config, arrays, d)
        turns, offsets, spectra = (arrays.get(k) for k in ("turns", "offsets", "spectra"))
        if turns is None or offsets is None or spectra is None or common.matrix_ is None:
            raise CorruptDataError("frames: expected turns, offsets, spectra and a common matrix")
        k, p = offsets.shape if offsets.ndim == 2 else (0, 0)
        m = common.n_components_
        if not (2 <= k <= MAX_CLASSES and 1 <= p <= m):
            raise CorruptDataError(f"frames: offsets of shape {offsets.shape} fit no classes")
        if k * d * p > MAX_ENTRIES:
            raise LimitError(f"frames: {k} x {p} axes of {d} exceed {MAX_ENTRIES} entries")
        if turns.shape != (k * p, p) or spectra.shape != (k, m + 1):
            raise CorruptDataError(
                f"frames: turns {turns.shape} do not fit {k} classes of {p} axes"
            )
        if any(a.dtype != np.int16 for a in (turns, offsets, spectra)):
            raise CorruptDataError("frames: expected turns, offsets and spectra of int16")
        values = ZERO + np.cumsum(spectra, axis=1, dtype=np.int64)
        if values.min() < 0 or values.max() > 255:
            raise CorruptDataError("frames: spectra out of range")
        if min(int(turns.min()), int(offsets.min())) < -MAX_INTEGER:
            raise CorruptDataError(f"frames: expected integers of at least {-MAX_INTEGER}")
        limits = {
            "turn_exponent": (0, MAX_EXPONENT),
            "offset_exponent": (-MAX_OFFSET, MAX_OFFSET),
            "noise": (-MAX_NOISE, MAX_NOISE),
        }
        for name, (low, high) in limits.items():
            value = config.get(name)
            if type(value) is not int or not low <= value <= high:
                raise CorruptDataError(f"frames: expected {name} in {low}..{high}, got {value!r}")
        self = cls(common, n_classes=k, n_leading=p)
        return self._set(
            turns.reshape(k, p, p),
            config["turn_exponent"],
            offsets,
            config["offset_exponent"],
            values.astype(np.uint8),
            config["noise"],
        )


def _moments(c: Float32, rows: Int64, k: int, p: int, noise: float) -> Moments:
    """Of each of k classes: mean (K, p) and covariance (K, p, p) of the leading coefficients,
    second moments of the others (K, m - p), share of the rows (K,). O(n (p^2 + m)).

    Covariances lean on the mean one of all classes, each as much as makes the expected error least:
    the noise of its entries over their squared difference from the mean one, entries measured by
    the spread (with ``noise``) of their coefficients.
    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", J. Multivariate Analysis 2004.
    """
    means, covariances = np.empty((k, p)), np.empty((k, p, p))
    tails, counts = np.empty((k, c.shape[1] - p)), np.bincount(rows, minlength=k)
    fourth = np.zeros(k)
    order = np.argsort(rows, kind="stable")
    scale = 1 / np.sqrt(c[:, :p].var(axis=0, dtype=np.float64) + noise)
    for i, mine in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        lead, tail = c[mine, :p].astype(np.float64), c[mine, p:]
        means[i] = lead.sum(axis=0) / (len(mine) + 2)
        lead -= means[i]
        covariances[i] = lead.T @ lead
        tails[i] = np.einsum("ij,ij->j", tail, tail, dtype=np.float64)
        lead *= scale
        fourth[i] = np.square(np.einsum("ij,ij->i", lead, lead)).sum()
    total, n = max(1, len(c)), np.maximum(counts, 1)
    common = covariances.sum(axis=0) / total
    common_tail = tails.sum(axis=0) / total
    covariances /= n[:, None, None]
    square = np.outer(scale, scale)
    spread = np.square(covariances * square).sum(axis=(1, 2))
    apart = np.square((covariances - common) * square).sum(axis=(1, 2))
    lean = np.clip((fourth / n - spread) / n / np.maximum(apart, 1e-30), 0, 1)
    lean = np.maximum(lean, LEAST_LEAN * p / (counts + LEAST_LEAN * p))[:, None]
    covariances += lean[:, :, None] * (common - covariances)
    tails = (1 - lean) * tails / n[:, None] + lean * common_tail
    return means, covariances, tails, np.asarray((counts + 0.5) / (total + 0.5 * k))


class _Costs:
    """The cost (module's text) in float32, of common coefficients c (n, m) of which p lead:

        |c_lead @ whiten[k] - shift[k]|^2 + c^2 @ tail[:, k] + fixed[k]

    Of many classes most are out of the question, which a rough cost tells that takes the leading
    coefficients for independent: matrix products for all classes together. ``whiten`` is upper
    triangular, so the first L whitened coefficients depend on the first L of c alone: with these in
    the place of their rough cost, two classes or fewer are left to be looked at in full.
    """

    lead: slice | Int64  # which of the coefficients the leading ones are

    def __init__(
        self,
        whiten: Float64,
        means: Float64,
        spread: Float64,
        tail: Float64,
        fixed: Float64,
        volume: Float64 | None = None,
    ) -> None:
        """whiten (K, p, p), of which |c @ whiten - means @ whiten|^2 has the variances ``spread``
        (K, p) of leading coefficients; tail (K, m - p) of the others; fixed (K,) without
        log2 of the volume that whitening takes, which is ``volume`` (K,) where axes that are not
        quite orthogonal would tell a wrong one."""
        k, p = means.shape
        bits = 0.5 / np.log(2)
        self.first = first = p if p <= FEW_AXES else min(FIRST_AXES, p // 2)
        own_volume = -np.log2(np.einsum("kpp->kp", whiten))
        whiten = whiten * np.sqrt(bits)
        self.whiten = whiten.astype(np.float32)
        self.shift = np.einsum("kp,kpq->kq", means, whiten).astype(np.float32)
        square = np.concatenate([np.zeros((k, p)), bits / tail], axis=1)
        self.square = np.ascontiguousarray(square.T, np.float32)  # (m, K)
        self.has_tail = tail.shape[1] > 0
        self.fixed = fixed.astype(np.float32)
        self.volumes = _halves(own_volume, first)
        more = np.zeros(k) if volume is None else volume - own_volume.sum(axis=1)
        self.last = more.astype(np.float32)  # what only the final comparison looks at
        # the rough cost, as squares and products: log determinants differ, too
        self.rough_square = np.ascontiguousarray((bits / spread).T, np.float32)
        self.rough_lead = np.ascontiguousarray((-2 * bits * means / spread).T, np.float32)
        rough = bits * means**2 / spread + 0.5 * np.log2(spread)
        self.rough_fixed = _halves(rough, first)
        self.lead = slice(0, p)

    @classmethod
    def of_moments(cls, moments: Moments, noise: float) -> _Costs:
        """From ``_moments``: a Cholesky factor of covariance plus noise whitens as well as axes do,
        at a tenth of their cost."""
        means, covariances, tails, weights = moments
        relative = covariances / noise
        # rounding may leave an eigenvalue of -1e-16 times the largest, which one need not outweigh
        floor = 1 + 1e-12 * np.abs(relative).max(initial=0.0)
        factor = np.linalg.cholesky(relative + floor * np.eye(means.shape[1]))
        whiten = np.linalg.inv(factor).transpose(0, 2, 1) / np.sqrt(noise)
        fixed = 0.5 * np.log2(1 + tails / noise).sum(axis=1) - np.log2(weights)
        spread = np.einsum("kpp->kp", covariances) + floor * noise
        return cls(whiten, means, spread, tails + noise, fixed)

    @classmethod
    def of_frames(
        cls, means: Float64, turns: Float64, variances: Float64, weights: Float64, noise: float
    ) -> _Costs:
        """From classes in whose axes, (K, p, p), the coefficients have ``variances`` (K, m)."""
        p, total = means.shape[1], variances + noise
        scaled = turns / np.sqrt(total[:, None, :p])
        # turns of few bits may leave out an axis altogether
        precision = scaled @ scaled.transpose(0, 2, 1)
        floor = 1e-9 * np.einsum("kpp->kp", precision).mean(axis=1)
        precision += floor[:, None, None] * np.eye(p)
        spread = np.einsum("kij,kj->ki", turns**2, total[:, :p]) + 1e-9 * total[:, :p]
        upper = np.asarray(np.linalg.cholesky(precision[:, ::-1, ::-1])[:, ::-1, ::-1], np.float64)
        fixed = 0.5 * np.log2(total[:, p:] / noise).sum(axis=1) - np.log2(weights)
        volume = 0.5 * np.log2(total[:, :p]).sum(axis=1)
        return cls(upper, means, spread, total[:, p:], fixed, volume)

    def in_order(self, order: Int64, lead: slice | Int64) -> _Costs:
        """For coefficients in another order, of which those at ``lead`` are the leading ones."""
        self.square, self.lead = self.square[order], lead
        return self

    def cheapest(self, c: Float32) -> Int64:
        """Class of least cost for each row of c (n, m), the first of equals, but for what
        SHORTLIST says. O(n (K m + p^2)), a few times over."""
        chosen = np.empty(len(c), np.int64)

        def choose(start: int) -> None:
            rows = slice(start, start + BLOCK_ROWS)
            chosen[rows] = self._cheapest(c[rows])

        in_threads(choose, range(0, len(c), BLOCK_ROWS))
        return chosen

    def _cheapest(self, c: Float32) -> Int64:
        if isinstance(self.lead, slice):
            lead = np.ascontiguousarray(c[:, self.lead])
        else:
            lead = np.take(c, self.lead, axis=1)
        sure = np.square(c) @ self.square + self.fixed if self.has_tail else self.fixed
        rough_last = sure + self._rough(lead, 1)
        likely = _least(self._rough(lead, 0) + rough_last, SHORTLIST)
        own = self._own(lead, 0, likely)
        if self.first == lead.shape[1]:
            return np.asarray((own + (rough_last + self.last)).argmin(axis=1), np.int64)
        likely &= _least(own + rough_last, FINALISTS)
        own += self._own(lead, 1, likely)
        return np.asarray((own + (sure + self.last)).argmin(axis=1), np.int64)

    def _part(self, part: int) -> slice:
        """Which leading coefficients are the first (part 0), and which the others (1)."""
        return slice(0, self.first) if part == 0 else slice(self.first, self.whiten.shape[1])

    def _rough(self, lead: Float32, part: int) -> Float32:
        """What a part of the leading coefficients costs roughly: (n, K)."""
        some = self._part(part)
        x = lead[:, some]
        cost = np.square(x) @ self.rough_square[some]
        cost += x @ self.rough_lead[some]
        cost += self.rough_fixed[part]
        return np.asarray(cost)

    def _own(self, lead: Float32, part: int, likely: Array) -> Float32:
        """What a part of the whitened coefficients costs in the classes that are likely (n, K);
        infinity in others, and 0 where a row has one that is likely."""
        some = self._part(part)
        cost = np.where(likely, np.float32(0), np.float32(np.inf))
        undecided = np.count_nonzero(likely, axis=1) > 1
        for i in range(likely.shape[1]):
            rows = np.flatnonzero(likely[:, i] & undecided)
            if len(rows):
                own = lead[rows, : some.stop] @ self.whiten[i, : some.stop, some]
                own -= self.shift[i, some]
                cost[rows, i] = np.einsum("ij,ij->i", own, own) + self.volumes[part, i]
        return cost


def _halves(values: Float64, first: int) -> Float32:
    """Sums of the first columns of (K, p) values, and of the others: (2, K)."""
    halves = [values[:, :first].sum(axis=1), values[:, first:].sum(axis=1)]
    return np.asarray(halves, np.float32)


def _least(cost: Float32, most: int) -> Array:
    """Which classes of each row, (n, K), are among the ``most`` of least cost and within WITHIN
    bits of the least."""
    limit = cost.min(axis=1) + np.float32(WITHIN)
    if most < cost.shape[1]:
        limit = np.minimum(limit, np.partition(cost, most - 1, axis=1)[:, most - 1])
    return np.asarray(cost <= limit[:, None])


def exact_product(a: Int64, b: Int16) -> Int64:
    """Integer matrix product by way of BLAS: exact in float32 while |row of a| |column of b|, which
    no partial sum exceeds, stays below 2^24, and in float64, since |sums| are below 2^53."""
    rows = np.einsum("ij,ij->i", a, a, dtype=np.float64).max(initial=0.0)
    columns = np.einsum("ij,ij->j", b, b, dtype=np.float64).max(initial=0.0)
    kind = np.dtype(np.float32 if rows * columns < EXACT_FLOAT32**2 else np.float64)
    product: npt.NDArray[Any] = a.astype(kind) @ b.astype(kind)
    return product.astype(np.int64)
