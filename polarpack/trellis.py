"""Dependent (trellis-coded) scalar quantization: the fine stage nearest to the Shannon bound.

Two scalar quantizers share one fine lattice of step delta. Q0 holds its even multiples, Q1 its odd
multiples and zero:

    Q0:  ... -4  -2   0   2   4 ...        value = 2k
    Q1:  ... -3  -1   0   1   3 ...        value = 2k - sign(k)

Which of the two codes the next component follows from a small state machine driven by the parity of
the indices k so far, so a decoder knows it for free. The encoder looks for the whole path through
the machine that costs least, J = distortion + lambda * bits (Viterbi). Vectors are thereby packed
more densely in d dimensions than any scalar quantizer can: of Gaussian components 0.9 dB less error
than scalar quantization at equal entropy with 8 states, 1.0 dB with 64, from 2 bits a component on
(with 8 states 0.7 dB at one bit, 0.2 dB at half a bit), while the decoder costs the same.

Sources: Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov
sources", IEEE Trans. Comm. 1990 (the state machines are Ungerboeck's); Joshi et al., "Comparison
of generalized trellis coded quantization", 1995; Schwarz et al., "Hybrid video coding with
trellis-coded quantization", DCC 2019 (the union quantizers with zero in both).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._arrays import Float32
from ._threads import in_threads
from .entropy._magnitude_kernels import Ints, after, inlined, lattice, scale_of
from .entropy.magnitude import PRIOR, MagnitudeModel, magnitude_index
from .entropy.range_coder import kernel
from .errors import CorruptDataError, InputError, NotFittedError

Int64 = npt.NDArray[np.int64]

STEP_ROWS = 4096  # rows on which a step is searched for
MODEL_ROWS = 1 << 15  # rows from which a model is learned; more change nothing measurable
SEARCH_ROWS = 1024  # rows a thread takes at a time
N_ROUNDS = 2  # of searching and learning; more change rates by 1%, not what they buy
LANES = 32  # rows searched side by side: four AVX2 registers of float32

FARTHEST = np.float32(65532.0)  # larger coefficients are held at it, so that |k| <= 2**15 - 1
MIN_STEP, MAX_STEP = 2.0**-100, 2.0**100  # in float32 both have an inverse
DEAD_ZONE = np.float32(1.1)  # smaller coefficients nearly always end as zero

# Parity-check polynomials of Ungerboeck's best rate-1/2 codes for one-dimensional signal sets,
# states -> (h0, h1): "Channel coding with multilevel/phase signals", IEEE Trans. IT 1982, table I.
PARITY_CHECKS = {
    4: (0o5, 0o2),
    8: (0o13, 0o04),
    16: (0o23, 0o04),
    32: (0o45, 0o10),
    64: (0o103, 0o024),
}


def state_machine(n_states: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The trellis as tables: ``next_state`` (S, 2), indexed by state and parity of the index just
    coded, and ``quantizer`` (S,), 0 or 1: which of Q0 and Q1 a state uses.

    This is the systematic feedback encoder in observer form: the lowest bit of the state is the
    coset bit that the code forces, the parity of k the free one.
    """
    h0, h1 = PARITY_CHECKS[n_states]
    state = np.arange(n_states)
    forced = state & 1
    shifted = (state >> 1) ^ (forced * (h0 >> 1))
    return (
        np.stack([shifted, shifted ^ (h1 >> 1)], axis=1).astype(np.uint8),
        forced.astype(np.uint8),
    )


def predecessors(n_states: int) -> npt.NDArray[np.int64]:
    """The same machine read backwards, for the search: row t holds, for each of the two ways into
    state t, the state it comes from and ``2 * quantizer + parity``: (S, 4)."""
    next_state, quantizer = state_machine(n_states)
    ways: list[list[int]] = [[] for _ in range(n_states)]
    for state in range(n_states):
        for parity in range(2):
            ways[next_state[state, parity]] += [state, 2 * int(quantizer[state]) + parity]
    return np.array(ways, np.int64)


@inlined
def _nearest(
    v: Any,  # |coefficient|, and all else: float32
    k: Any,  # an index and the next one, between whose values v lies
    below: Any,
    above: Any,
    rate_below: Any,
    rate_above: Any,
    rate_zero: Any,
) -> tuple[Any, Any, Any, Any]:
    """Of one quantizer's two cosets the cheapest indices near v: cost and index of the even one (or
    of zero, if that is cheaper), cost and index of the odd one."""
    one, two = np.float32(1.0), np.float32(2.0)
    odd = k - two * np.floor(k * np.float32(0.5))
    cost_below = (v - below) * (v - below) + rate_below
    cost_above = (v - above) * (v - above) + rate_above
    even_cost = cost_above if odd > 0 else cost_below
    odd_cost = cost_below if odd > 0 else cost_above
    zero_cost = v * v + rate_zero
    zero = zero_cost < even_cost
    return (
        zero_cost if zero else even_cost,
        np.float32(0.0) if zero else k + odd,
        odd_cost,
        k + one - odd,
    )


@kernel
def _search(
    x: Float32,  # (n, m) coefficients in units of delta
    row_class: Int64,  # (n,)
    base: Ints,  # (K, m), with gain and log: the context's rules (entropy.magnitude)
    gain: Ints,
    log: npt.NDArray[np.uint8],
    rates: Float32,  # (2, n_scales, 1 + n_symbols) from the model, times lambda
    shifts: Int64,
    ways: Int64,  # (S, 4) from ``predecessors``
    out: npt.NDArray[np.int16],  # (n, m) result: indices k
) -> None:
    """Viterbi search of the cheapest path, ``LANES`` rows at a time.

    Two approximations make it fast, neither seen by the decoder: a component's rate is read in the
    context that its *unquantized* predecessors suggest (so all survivors share it), and of each
    coset only the nearest index and zero compete. Loops over lanes without table look-ups and
    branches become vector instructions.
    """
    n, m = x.shape
    n_states = ways.shape[0]
    top = rates.shape[2] - 1
    half, one, two = np.float32(0.5), np.float32(1.0), np.float32(2.0)
    cost = np.empty((2, n_states, LANES), np.float32)
    branch = np.empty((4, LANES), np.float32)
    chosen = np.empty((m, 4, LANES), np.int16)
    way = np.empty((m, n_states, LANES), np.uint8)
    a = np.zeros(LANES, np.float32)
    rate = np.zeros((6, LANES), np.float32)
    seen = np.empty(LANES, np.int64)
    state = np.empty(LANES, np.int64)
    for first in range(0, n, LANES):
        lanes = min(LANES, n - first)
        seen[:] = PRIOR
        cost[0] = np.float32(np.inf)
        cost[0, 0] = np.float32(0.0)
        now = 0
        for j in range(m):
            for lane in range(lanes):
                c = row_class[first + lane]
                v = abs(x[first + lane, j])
                v = v if v < FARTHEST else FARTHEST
                a[lane] = v
                scale = np.uint64(scale_of(base[c, j], seen[lane], log))
                shift = shifts[scale]
                k = int(v * half)
                rate[0, lane] = rates[0, scale, np.uint64(min((k >> shift) + (k > 0), top))]
                rate[1, lane] = rates[0, scale, np.uint64(min((k + 1 >> shift) + 1, top))]
                rate[2, lane] = rates[0, scale, 0]
                k = int((v + one) * half)
                rate[3, lane] = rates[1, scale, np.uint64(min((k >> shift) + (k > 0), top))]
                rate[4, lane] = rates[1, scale, np.uint64(min((k + 1 >> shift) + 1, top))]
                rate[5, lane] = rates[1, scale, 0]
                likely = int(v + half) if v >= DEAD_ZONE else 0
                seen[lane] = after(seen[lane], likely, gain[c, j])
            for lane in range(LANES):
                v = a[lane]
                index = np.floor(v * half)  # of Q0: floor(v / 2) and the next
                even_cost, even, odd_cost, odd = _nearest(
                    v, index, two * index, two * index + two,
                    rate[0, lane], rate[1, lane], rate[2, lane],
                )  # fmt: skip
                branch[0, lane], branch[1, lane] = even_cost, odd_cost
                chosen[j, 0, lane], chosen[j, 1, lane] = np.int32(even), np.int32(odd)
            for lane in range(LANES):
                v = a[lane]
                index = np.floor((v + one) * half)  # of Q1, whose 0 stands for the value 0, not -1
                below = max(two * index - one, np.float32(0.0))
                even_cost, even, odd_cost, odd = _nearest(
                    v, index, below, two * index + one,
                    rate[3, lane], rate[4, lane], rate[5, lane],
                )  # fmt: skip
                branch[2, lane], branch[3, lane] = even_cost, odd_cost
                chosen[j, 2, lane], chosen[j, 3, lane] = np.int32(even), np.int32(odd)
            for t in range(n_states):
                s0, b0, s1, b1 = ways[t, 0], ways[t, 1], ways[t, 2], ways[t, 3]
                for lane in range(LANES):
                    c0 = cost[now, s0, lane] + branch[b0, lane]
                    c1 = cost[now, s1, lane] + branch[b1, lane]
                    second = c1 < c0
                    cost[1 - now, t, lane] = c1 if second else c0
                    way[j, t, lane] = 1 if second else 0
            now = 1 - now
        for lane in range(lanes):
            best = 0
            for t in range(1, n_states):
                if cost[now, t, lane] < cost[now, best, lane]:
                    best = t
            state[lane] = best
        for j in range(m - 1, -1, -1):
            for lane in range(lanes):
                s = state[lane]
                w = 2 * np.int64(way[j, s, lane])
                k = chosen[j, ways[s, w + 1], lane]
                out[first + lane, j] = -k if x[first + lane, j] < 0 else k
                state[lane] = ways[s, w]


class TrellisQuantizer:
    """Entropy-coded dependent quantization of coefficients, with the model that codes its indices.

    n_states: 4, 8, 16, 32 or 64; more states search longer and pack denser, decoding costs the
    same. step: distance delta of the lattice; None: found by ``fit`` from a rate. Either way no
    finer than indices of 16 bits can express for the coefficients learned from.
    rate_weight: lambda of J = D + lambda * bits, in units of delta^2. 0.5 is best for SNR at all
    rates, and for recall (flat from 0.3 to 0.7); less keeps more small components.

    After ``fit``: ``step_`` (a float32 value) and ``model_``, the ``MagnitudeModel`` of the
    indices. Codes are (n, m) uint16 with, where rows have classes, the class in front: (n, 1 + m).
    """

    def __init__(
        self, *, n_states: int = 8, step: float | None = None, rate_weight: float = 0.5
    ) -> None:
        if n_states not in PARITY_CHECKS:
            raise InputError(f"expected n_states in {sorted(PARITY_CHECKS)}, got {n_states}")
        if step is not None and not 0 < step < np.inf:
            raise InputError(f"expected step > 0, got {step}")
        if not 0 <= rate_weight < np.inf:
            raise InputError(f"expected rate_weight >= 0, got {rate_weight}")
        self.n_states, self.step, self.rate_weight = n_states, step, rate_weight
        self.next_state, self.quantizer = state_machine(n_states)
        self.step_ = 0.0
        self.model_: MagnitudeModel | None = None

    # -- learning -----------------------------------------------------------------------------
    def fit(
        self, c: Float32, row_class: Int64, n_classes: int = 1, *, row_bits: float | None = None
    ) -> TrellisQuantizer:
        """Learn the model from coefficients (n, m), and the step where it was not given.

        row_bits: rate to reach, in bits a row; the rate falls by about one bit for each component
        in use when the step doubles, which a secant search exploits on ``STEP_ROWS`` rows.
        O(n m n_states), a few times over.
        """
        finest = max(MIN_STEP, float(np.abs(c).max(initial=0.0)) / float(FARTHEST))
        if self.step is not None:
            self._learn(c, row_class, n_classes, np.clip(self.step, finest, MAX_STEP))
            return self
        if row_bits is None:
            raise InputError("expected a step or row_bits")
        few, few_class = _some(c, STEP_ROWS), _some(row_class, STEP_ROWS)
        # noise of the lattice is about step^2 / 3.6; start where the Gaussian bound would put it
        variance = np.einsum("ij,ij->j", few, few, dtype=np.float64) / max(1, len(few)) + 1e-30
        least, most = np.log2(finest), np.log2(MAX_STEP)
        log_step = np.clip(0.5 * np.log2(3.6 * water_level(variance, row_bits)), least, most)
        tried: list[tuple[float, float]] = []
        for _ in range(8):
            self._learn(few, few_class, n_classes, 2.0**log_step)
            rate = self._rate(few, few_class)
            tried.append((float(log_step), rate))
            if abs(rate - row_bits) < 0.002 * row_bits or (log_step == least and rate < row_bits):
                break
            slope = -max(0.3 * min(c.shape[1], rate), 1e-6)
            log_step = np.clip(next_log_step(tried, row_bits, slope), least, most)
        best = min(tried, key=lambda pair: abs(pair[1] - row_bits))
        self._learn(c, row_class, n_classes, 2.0 ** best[0])
        return self

    def _learn(self, c: Float32, row_class: Int64, n_classes: int, step: float) -> None:
        """Alternate between searching with the model and fitting the model to what was found.

        The start matters: tables counted on plain rounding make the zero of Q1 too cheap, and the
        alternation never recovers (0.5 dB). The default tables know the cells' sizes.
        """
        self.step_ = float(np.float32(step))
        few, few_class = _some(c, MODEL_ROWS), _some(row_class, MODEL_ROWS)
        mean = np.abs(few).mean(axis=0) if len(few) else np.zeros(c.shape[1])
        expected = magnitude_index(np.maximum(mean / self.step_ - 0.3, 0.02))
        self.model_ = MagnitudeModel(
            np.repeat(expected[None], n_classes, axis=0), self.next_state, self.quantizer
        )
        for _ in range(N_ROUNDS):
            k = self._search(few, few_class)
            self.model_ = MagnitudeModel.fit(
                k, self.next_state, self.quantizer, row_class=few_class, n_classes=n_classes
            )
        if len(few) == len(c):  # a small table may not pay for tables of its own
            own = self.model_
            plain = MagnitudeModel(
                own.expected, self.next_state, self.quantizer, class_levels=own.class_levels
            )
            codes = own.join(few_class, k)
            cost = [8 * len(m.to_bytes()) + m.rate_bits(codes) for m in (own, plain)]
            self.model_ = own if cost[0] <= cost[1] else plain

    def _rate(self, c: Float32, row_class: Int64) -> float:
        """Bits a row that coefficients cost under the model."""
        model = self.model
        return model.rate_bits(model.join(row_class, self._search(c, row_class))) / max(1, len(c))

    @property
    def model(self) -> MagnitudeModel:
        """The entropy model of the codes; NotFittedError before ``fit``."""
        if self.model_ is None:
            raise NotFittedError("TrellisQuantizer is not fitted: call fit first")
        return self.model_

    # -- coefficients <-> codes ---------------------------------------------------------------
    def encode(self, c: Float32, row_class: Int64) -> npt.NDArray[np.uint16]:
        """Coefficients (n, m) -> codes. O(n m n_states): about 15 ns a component with 8 states."""
        return self.model.join(row_class, self._search(c, row_class))

    def decode(self, codes: npt.NDArray[Any]) -> tuple[Int64, npt.NDArray[np.int32]]:
        """Codes -> row classes (n,) and lattice points (n, m), to be multiplied by ``step_``."""
        row_class, k = self.model.split(codes)
        return row_class, lattice(k, self.next_state, self.quantizer)

    def _search(self, c: Float32, row_class: Int64) -> npt.NDArray[np.int16]:
        """Indices (n, m) of the cheapest paths, blocks of rows side by side on all cores."""
        base, gain, log, *_ = self.model.rules
        rates, shifts = self.model.rates()
        rates *= np.float32(self.rate_weight)
        ways = predecessors(self.n_states)
        out = np.empty(c.shape, np.int16)
        inverse = np.float32(1.0 / self.step_)

        def search_block(start: int) -> None:
            rows = slice(start, start + SEARCH_ROWS)
            with np.errstate(over="ignore"):  # the search holds what is out of reach at FARTHEST
                x = c[rows] * inverse
            _search(x, row_class[rows], base, gain, log, rates, shifts, ways, out[rows])

        in_threads(search_block, range(0, len(c), SEARCH_ROWS))
        return out

    # -- what travels in a file ---------------------------------------------------------------
    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, with the step found."""
        return {"n_states": self.n_states, "step": self.step_, "rate_weight": self.rate_weight}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The model's bytes, as an array."""
        return {"model": np.frombuffer(self.model.to_bytes(), np.uint8)}

    @classmethod
    def from_arrays(
        cls, config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]
    ) -> TrellisQuantizer:
        """Rebuild from ``get_config`` and ``arrays``; CorruptDataError where they make no sense."""
        n_states, step, weight = (config.get(k) for k in ("n_states", "step", "rate_weight"))
        model = arrays.get("model")
        if type(n_states) is not int or n_states not in PARITY_CHECKS:
            raise CorruptDataError(
                f"trellis: expected n_states in {sorted(PARITY_CHECKS)}, got {n_states!r}"
            )
        if not (isinstance(step, float) and MIN_STEP <= step <= MAX_STEP):
            raise CorruptDataError(
                f"trellis: expected step in {MIN_STEP:.3g}..{MAX_STEP:.3g}, got {step!r}"
            )
        if not (isinstance(weight, int | float) and 0 <= weight < np.inf):
            raise CorruptDataError(f"trellis: expected rate_weight >= 0, got {weight!r}")
        if model is None or model.dtype != np.uint8 or model.ndim != 1:
            raise CorruptDataError("trellis: expected the model's bytes")
        self = cls(n_states=n_states, step=step, rate_weight=weight)
        self.step_ = float(np.float32(step))
        self.model_ = MagnitudeModel.from_bytes(model.tobytes(), self.next_state, self.quantizer)
        return self


def _some(rows: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """About ``most`` of the rows, evenly spaced, or all: C-ordered."""
    return np.ascontiguousarray(rows[:: max(1, len(rows) // most)])


def water_level(variances: npt.NDArray[np.float64], total_bits: float) -> float:
    """Distortion D at which reverse water-filling spends ``total_bits`` on components of these
    variances: sum of max(0, log2(v / D) / 2). O(m log m).
    Source: Cover and Thomas, "Elements of information theory", section 10.3.3."""
    v = np.log2(np.sort(np.maximum(variances, 1e-30))[::-1])
    count = np.arange(1, len(v) + 1)
    level = (
        np.cumsum(v) - 2 * total_bits
    ) / count  # log2 D if exactly the first ``count`` are in use
    in_use = int(np.flatnonzero(np.append(v[1:], -np.inf) <= level)[0])
    return float(2.0 ** level[in_use])


def next_log_step(tried: list[tuple[float, float]], target: float, slope: float) -> float:
    """Next log2(step) to try, from (log2 step, size) pairs: the secant through the two nearest to
    the target size, or the ``slope`` theory expects; kept between the best known bounds."""
    ordered = sorted(tried, key=lambda pair: abs(pair[1] - target))
    log_step, size = ordered[0]
    if len(ordered) > 1 and abs(ordered[1][0] - log_step) > 1e-6:
        secant = (ordered[1][1] - size) / (ordered[1][0] - log_step)
        slope = secant if secant < 0 else slope
    guess = log_step + float(np.clip((target - size) / slope, -3, 3))
    finer = max((s for s, size in tried if size > target), default=-np.inf)
    coarser = min((s for s, size in tried if size <= target), default=np.inf)
    if not finer < guess < coarser and np.isfinite(finer + coarser):
        guess = (finer + coarser) / 2
    return guess
