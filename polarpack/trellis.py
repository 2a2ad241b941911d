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

from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ._arrays import Float32, largest
from ._threads import in_threads
from .entropy._magnitude_kernels import inlined, lattice
from .entropy.magnitude import (
    CAP,
    MEMORY,
    N_SCALES,
    N_TABLES,
    PRIOR,
    MagnitudeModel,
    magnitude_index,
)
from .entropy.range_coder import kernel
from .errors import CorruptDataError, InputError, NotFittedError

Int16 = npt.NDArray[np.int16]
Int64 = npt.NDArray[np.int64]

STEP_ROWS = 4096  # rows on which a step is searched for
MODEL_ROWS = 1 << 15  # rows from which a model is learned; more change nothing measurable
SEARCH_ROWS = 1024  # rows a thread takes at a time
N_ROUNDS = 2  # of searching and learning; more change rates by 1%, not what they buy
LANES = 128  # rows searched side by side: vectors of 16-bit costs, long enough to hide the loops

FARTHEST = np.float32(65532.0)  # larger coefficients are held at it, so that |k| <= 2**15 - 1
MIN_STEP, MAX_STEP = 2.0**-100, 2.0**100  # in float32 both have an inverse
DEAD_ZONE = np.float32(1.1)  # smaller coefficients nearly always end as zero

ZERO, ONE, BYTE = np.int32(0), np.int32(1), np.int32(255)
LAST_SCALE = np.int32(N_SCALES - 1)
FIRST_SHIFTED = np.int32(N_TABLES - 2)  # scales from two above on leave out low bits
LOG_SHIFT = np.int32(21)  # of a float32's bits: leaves quarter octaves
LOG_BIAS = np.int32((1 << 20) + int(0.0573 * (1 << 23)))
LOG_ZERO = np.int32(4 * 127 + 128)  # the exponent's offset, and that of a profile's base
ZERO_BITS = np.uint64(62)  # of a word say of which quantizers zero costs less than what is near;
WITHOUT_ZEROS = np.int16(0x3FFF)  # its last 16 bits without these
TILE = 32  # columns turned from rows to lanes at a time

# What the search looks up: costs of the four cosets, (Q0 even, Q0 odd, Q1 even, Q1 odd), as 16-bit
# integers in one 64-bit word.
CELL_BITS = 5  # magnitudes are told apart to 2**-CELL_BITS of delta
NEAR = 16 << CELL_BITS  # cells of smaller magnitudes: distance and rate in one table a scale
WAVE = 4 << CELL_BITS  # beyond: distances, which repeat every 4 delta, plus rates,
FAR = 1024  # which depend on the whole part of |y| alone, from scale 28 on on its upper bits
COARSE_FROM = 4  # low bits of an index from which that is so
TOP = 1792  # largest cost of distance, and of rate: eight steps stay within 16 bits
UNREACHED = np.int16(28000)  # a state no path has come to yet; more than six steps cost
FARTHEST_PATH = 12288  # paths that cost so much more than the best are all the same
LEVEL_EVERY = 4  # steps after which the best path's cost is taken off all: 16 bits hold the rest

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


class _Costs(NamedTuple):
    """Tables for ``_search`` (see the constants above)."""

    words: Int64  # (N_TABLES * NEAR + WAVE,) near costs by scale and cell, then distances
    rates: Int64  # (N_SCALES * FAR + 1,) rates of what is not near, then a word of zeros


def _branch_costs(rates: Float32, shifts: Int64) -> _Costs:
    """From the model's rates (2, n_scales, 1 + n_symbols), times lambda, and low bits (n_scales,).

    Of a coset only the index nearest to the coefficient and, where that can be cheaper, zero
    compete. Costs are kept relative to the cheapest coset's: paths differ by no more.
    """
    top = rates.shape[2] - 1
    wide, shift = rates.astype(np.float64), shifts[:, None]
    near, zeros = np.zeros((N_TABLES, NEAR, 4)), np.zeros((N_TABLES, NEAR, 2), np.int64)
    wave, far = np.zeros((WAVE, 4)), np.zeros((len(shifts), FAR, 4))
    y = (np.arange(NEAR) + 0.5) / (1 << CELL_BITS)
    around = (np.arange(WAVE) + 0.5) / (1 << CELL_BITS) + 4  # zero is no value of Q1 there
    group, low = np.divmod(np.arange(FAR), 4)  # the whole part of |y|; its two lowest bits matter
    coarse = np.maximum(shift - COARSE_FROM, 0)
    whole = ((group << coarse) + (1 << coarse >> 1)) * 4 + low
    for q in range(2):
        for next_one in range(2):
            k = np.floor((y + q) / 2).astype(np.int64) + next_one
            rate = wide[q, :N_TABLES][:, np.minimum(k + (k > 0), top)]
            _deal(near, q, k, np.square(y - np.where(k > 0, 2 * k - q, 0)) + rate)
            k = np.floor((around + q) / 2).astype(np.int64) + next_one
            _deal(wave, q, k, np.square(around - (2 * k - q)))
            k = (whole + q >> 1) + next_one
            # symbols of large magnitudes: entropy.magnitude
            symbol = k + (1 << shift >> 1) >> shift if q == 0 else (k - 1 >> shift) + 1
            column = np.where(k > 0, np.minimum(symbol + 1, top), 0)
            _deal(far, q, k, np.take_along_axis(wide[q], column, axis=1))
        zero = np.square(y) + wide[q, :N_TABLES, :1]
        better = zero < near[:, :, 2 * q]
        near[:, :, 2 * q][better], zeros[:, :, q] = zero[better], better
    costs = np.concatenate([near.reshape(-1, 4), wave])
    costs -= costs.min(axis=1, keepdims=True)
    far -= far.min(axis=2, keepdims=True)
    unit = TOP / max(float(costs.max()), float(far.max()))
    words = _words(costs * unit)
    with_zeros = zeros.reshape(-1, 2).astype(np.uint64)
    words[: len(with_zeros)] |= (
        (with_zeros[:, 0] | with_zeros[:, 1] << np.uint64(1)) << ZERO_BITS
    ).view(np.int64)
    return _Costs(
        words,
        np.append(_words(far.reshape(-1, 4) * unit), np.int64(0)),
    )


def _deal(out: npt.NDArray[Any], q: int, k: Int64, values: npt.NDArray[Any]) -> None:
    """Put values (.., n) of indices k of quantizer q where their cosets stand in out (.., n, 4)."""
    for parity in range(2):
        place = out[..., 2 * q + parity]
        place[...] = np.where((k & 1) == parity, values, place)


def _words(costs: npt.NDArray[Any]) -> Int64:
    """Rows of four costs, rounded, as 64-bit words: the lowest 16 bits are the first."""
    whole = np.rint(costs).astype(np.int64)
    return cast(Int64, whole[:, 0] | whole[:, 1] << 16 | whole[:, 2] << 32 | whole[:, 3] << 48)


def _turns(n_states: int) -> Int16:
    """``predecessors`` as arithmetic on the bits of a state t: (5,) S / 2, h0, h1, highest bit of
    h1, and by what ways have to be multiplied to fill a byte.

    The state before has the coset bit that the highest bit of t says, and above it t, less what
    that bit and the parity of the index added. Its two ways differ by h1, and that which lacks the
    highest bit of h1 comes first."""
    h0, h1 = (h >> 1 for h in PARITY_CHECKS[n_states])
    highest = 1 << h1.bit_length() - 1
    return np.array([n_states // 2, h0, h1, highest, 1 << max(0, 8 - n_states)], np.int16)


def _reached(ways: Int64) -> npt.NDArray[np.bool_]:
    """Whether there is a path from state 0 to each state in 1, 2, ... steps, until there always is:
    (log2 S, S)."""
    steps = [np.arange(len(ways)) == 0]
    for _ in range(len(ways).bit_length() - 1):
        steps.append(steps[-1][ways[:, 0]] | steps[-1][ways[:, 2]])
    return np.array(steps[1:])


@inlined
def _look(
    magnitude: Float32,  # (LANES,) of one component, as all here
    profile: npt.NDArray[np.int32],  # gain << 8 | base + 128
    seen: Float32,  # running sums, moved on
    seen_bits: npt.NDArray[np.int32],  # the same memory, as integers
    place: npt.NDArray[np.int32],  # results: where costs stand in _Costs.words
    further: npt.NDArray[np.int32],  # and in _Costs.rates
) -> None:
    """The context's rules (entropy.magnitude) in float32, for rows side by side."""
    n_rates = N_SCALES * FAR
    for lane in range(LANES):
        # exponent and leading bits of a float32 are four times its binary logarithm, but for what
        # a chord lies below the curve; LOG_BIAS is that on average, and rounds
        log = np.int32((seen_bits[lane] + LOG_BIAS) >> LOG_SHIFT)
        scale = np.int32((log + (profile[lane] & BYTE) - LOG_ZERO) >> ONE)
        scale = min(max(scale, ZERO), LAST_SCALE)
        shift = np.int32(max(np.int32(scale - FIRST_SHIFTED), ZERO) >> ONE)
        cell = np.int32(magnitude[lane] * np.float32(1 << CELL_BITS))
        whole = np.int32(cell >> np.int32(CELL_BITS))
        coarse = max(np.int32(shift - np.int32(COARSE_FROM)), ZERO)
        high = min(np.int32(whole >> np.int32(2 + coarse)), np.int32(FAR // 4 - 1))
        is_near = (scale < np.int32(N_TABLES)) & (cell < np.int32(NEAR))
        near = np.int32(scale * np.int32(NEAR) + cell)
        wave = np.int32(np.int32(N_TABLES * NEAR) + (cell & np.int32(WAVE - 1)))
        far = np.int32(scale * np.int32(FAR) + high * np.int32(4) + (whole & np.int32(3)))
        place[lane] = near if is_near else wave
        further[lane] = np.int32(n_rates) if is_near else far
    for lane in range(LANES):
        v = magnitude[lane]
        likely = np.floor(v + np.float32(0.5)) if v >= DEAD_ZONE else np.float32(0)
        counted = likely * np.float32(profile[lane] >> np.int32(8))
        counted = counted if counted < np.float32(CAP) else np.float32(CAP)
        seen[lane] += counted - seen[lane] * np.float32(1 / (1 << MEMORY))


@inlined
def _unpack(word: Int64, branch: Int16, zeros: npt.NDArray[np.uint8]) -> None:
    """Words (LANES,) of ``_Costs`` -> costs of the four cosets (4, LANES), and which quantizers'
    zeros are better than what is near."""
    for lane in range(LANES):
        w = np.uint64(word[lane])
        branch[0, lane], branch[1, lane] = np.int16(w), np.int16(w >> np.uint64(16))
        branch[2, lane] = np.int16(w >> np.uint64(32))
        branch[3, lane] = np.int16(w >> np.uint64(48)) & WITHOUT_ZEROS
        zeros[lane] = np.uint8(w >> ZERO_BITS)


@inlined
def _advance(
    old: Int16,  # (S, LANES) cost of the best path into each state
    new: Int16,  # result
    branch: Int16,  # (4, LANES) costs of the cosets
    ways: Int64,
    way: npt.NDArray[np.uint8],  # (S / 8, LANES) result: a bit for each state, which way was better
) -> None:
    """One component further."""
    for t in range(ways.shape[0]):
        s0, b0 = np.uint64(ways[t, 0]), np.uint64(ways[t, 1])
        s1, b1 = np.uint64(ways[t, 2]), np.uint64(ways[t, 3])
        group = t >> 3
        for lane in range(LANES):
            c0 = np.int16(old[s0, lane] + branch[b0, lane])
            c1 = np.int16(old[s1, lane] + branch[b1, lane])
            new[t, lane] = min(c0, c1)
            way[group, lane] = np.uint8(np.uint8(way[group, lane] * 2) + np.uint8(c1 < c0))


@inlined
def _level(cost: Int16, least: Int16) -> None:
    """Take the best path's cost off all, (S, LANES)."""
    least[:] = cost[0]
    for t in range(1, cost.shape[0]):
        for lane in range(LANES):
            least[lane] = min(least[lane], cost[t, lane])
    for t in range(cost.shape[0]):
        for lane in range(LANES):
            cost[t, lane] = min(np.int16(cost[t, lane] - least[lane]), np.int16(FARTHEST_PATH))


@inlined
def _magnitudes(x: Float32, magnitude: Float32) -> None:
    """|x| (lanes, m) held at FARTHEST, the other way round, (m, LANES), a few columns at a time:
    these stay in the first cache."""
    m = x.shape[1]
    for start in range(0, m, TILE):
        for lane in range(len(x)):
            for j in range(start, min(m, start + TILE)):
                v = abs(x[lane, j])
                magnitude[j, lane] = v if v < FARTHEST else FARTHEST


@inlined
def _signed(k: Int16, x: Float32, out: Int16) -> None:
    """Magnitudes k (m, LANES) with the signs of x (lanes, m), into out (lanes, m)."""
    m = x.shape[1]
    for start in range(0, m, TILE):
        for lane in range(len(x)):
            for j in range(start, min(m, start + TILE)):
                out[lane, j] = -k[j, lane] if x[lane, j] < 0 else k[j, lane]


@inlined
def _step_back(
    state: Int16,  # (LANES,) moved to the states before
    way: npt.NDArray[np.uint8],
    turns: Int16,  # see ``_turns``
    chosen: Int16,  # (LANES,) and the next: room, then the quantizer and the parity of the index
    parity: Int16,
) -> None:
    """Follow the best paths one component back: arithmetic on bits, for rows side by side."""
    half, h0, h1, first, lift = turns[0], turns[1], turns[2], turns[3], turns[4]
    seven, one = np.int16(7), np.int16(1)
    for lane in range(LANES):
        chosen[lane] = way[0, lane]
    for group in range(1, way.shape[0]):
        for lane in range(LANES):
            here = np.int16(state[lane] >> np.int16(3)) == np.int16(group)
            chosen[lane] = np.int16(way[group, lane]) if here else chosen[lane]
    for lane in range(LANES):
        s = state[lane]
        second = np.int16(np.int16(chosen[lane] * lift) >> np.int16((s ^ seven) & seven)) & one
        forced = s >= half
        u = np.int16(s ^ h0) if forced else s
        odd = second ^ one if (u & first) != 0 else second
        before = np.int16(u ^ h1) if odd != 0 else u
        chosen[lane], parity[lane] = np.int16(forced), np.int16(odd)
        state[lane] = np.int16(np.int16(before * np.int16(2)) + np.int16(forced))


@inlined
def _indices(
    magnitude: Float32,
    zeros: npt.NDArray[np.uint8],
    quantizer: Int16,
    parity: Int16,
    k: Int16,  # (LANES,) as all here: result
) -> None:
    """Of the cosets that the paths went by, the index nearest to the magnitude, or zero where that
    costs less."""
    for lane in range(LANES):
        q, odd = np.int32(quantizer[lane]), np.int32(parity[lane])
        near = np.int32(np.int32(np.int32(magnitude[lane]) + q) >> ONE)
        near = np.int32(near + np.int32(np.int32(near ^ odd) & ONE))
        none = np.int32(zeros[lane]) & np.int32(q + ONE)  # bit 0 for Q0, bit 1 for Q1
        k[lane] = np.int16(near) if (odd != ZERO) | (none == ZERO) else np.int16(0)


@kernel
def _search(
    x: Float32,  # (n, m) coefficients in units of delta
    row_class: Int64,  # (n,)
    profiles: npt.NDArray[np.int32],  # (m, K) gain << 8 | base + 128: the context's rules
    words: Int64,  # and rates: ``_Costs``
    rates: Int64,
    ways: Int64,  # (S, 4) from ``predecessors``
    turns: Int16,  # the same as arithmetic: ``_turns``
    reached: npt.NDArray[np.bool_],  # (log2 S, S) whether paths come to a state in 1, 2, ... steps
    out: Int16,  # (n, m) result: indices k
) -> None:
    """Viterbi search of the cheapest path, ``LANES`` rows at a time.

    Approximations make it fast, none seen by the decoder: a component's rate is read in the context
    that its *unquantized* predecessors suggest (so all survivors share it); of each coset only the
    nearest index and zero compete; costs are 16-bit integers from tables. Together they cost less
    than 0.005 dB (0.02 at 7 bits). Loops over lanes without branches become vector instructions.
    """
    n, m = x.shape
    n_states = ways.shape[0]
    cost = np.empty((2, n_states, LANES), np.int16)
    way = np.zeros((m, (n_states + 7) // 8, LANES), np.uint8)
    place, further = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    magnitude = np.zeros((m, LANES), np.float32)
    zeros = np.empty((m, LANES), np.uint8)
    k = np.empty((m, LANES), np.int16)
    profile = np.zeros(LANES, np.int32)
    seen = np.empty(LANES, np.float32)
    seen_bits = seen.view(np.int32)
    word = np.empty(LANES, np.int64)
    branch = np.empty((4, LANES), np.int16)
    least = np.empty(LANES, np.int16)
    state, quantizer = np.zeros(LANES, np.int16), np.empty(LANES, np.int16)
    parity = np.empty(LANES, np.int16)
    for first in range(0, n, LANES):
        lanes = min(LANES, n - first)
        _magnitudes(x[first : first + lanes], magnitude)
        seen[:] = np.float32(PRIOR)
        cost[0] = UNREACHED
        cost[0, 0] = np.int16(0)
        now = 0
        for j in range(m):
            for lane in range(lanes):
                profile[lane] = profiles[j, row_class[first + lane]]
            _look(magnitude[j], profile, seen, seen_bits, place, further)
            for lane in range(LANES):
                word[lane] = words[np.uint64(place[lane])] + rates[np.uint64(further[lane])]
            _unpack(word, branch, zeros[j])
            _advance(cost[now], cost[1 - now], branch, ways, way[j])
            now = 1 - now
            if j < reached.shape[0]:
                for t in range(n_states):
                    if not reached[j, t]:
                        cost[now, t] = UNREACHED
            elif j % LEVEL_EVERY == LEVEL_EVERY - 1:
                _level(cost[now], least)
        for lane in range(lanes):
            best = 0
            for t in range(1, n_states):
                if cost[now, t, lane] < cost[now, best, lane]:
                    best = t
            state[lane] = best
        for j in range(m - 1, -1, -1):
            _step_back(state, way[j], turns, quantizer, parity)
            _indices(magnitude[j], zeros[j], quantizer, parity, k[j])
        _signed(k, x[first : first + lanes], out[first : first + lanes])


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
        self._tables: tuple[MagnitudeModel, npt.NDArray[np.int32], _Costs] | None = None

    # -- learning -----------------------------------------------------------------------------
    def fit(
        self, c: Float32, row_class: Int64, n_classes: int = 1, *, row_bits: float | None = None
    ) -> TrellisQuantizer:
        """Learn the model from coefficients (n, m), and the step where it was not given.

        row_bits: rate to reach, in bits a row; the rate falls by about one bit for each component
        in use when the step doubles, which a secant search exploits on ``STEP_ROWS`` rows.
        O(n m n_states), a few times over.
        """
        finest = max(MIN_STEP, largest(c) / float(FARTHEST))
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
        mean = np.zeros(c.shape[1])
        for start in range(0, len(few), STEP_ROWS):  # of magnitudes, never all of them at once
            mean += np.abs(few[start : start + STEP_ROWS]).sum(axis=0, dtype=np.float64) / len(few)
        expected = magnitude_index(np.maximum(mean / self.step_ - 0.3, 0.02))
        self.model_ = MagnitudeModel(
            np.repeat(expected[None], n_classes, axis=0), self.next_state, self.quantizer
        )
        k = np.empty(few.shape, np.int16)
        for _ in range(N_ROUNDS):
            self._search(few, few_class, k)
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
        """Coefficients (n, m) -> codes. O(n m n_states): about 4 ns a component with 8
        states, 7 ns with 32."""
        return self.model.join(row_class, self._search(c, row_class))

    def decode(self, codes: npt.NDArray[Any]) -> tuple[Int64, npt.NDArray[np.int32]]:
        """Codes -> row classes (n,) and lattice points (n, m), to be multiplied by ``step_``."""
        row_class, k = self.model.split(codes)
        return row_class, lattice(k, self.next_state, self.quantizer)

    def _search(
        self, c: Float32, row_class: Int64, out: npt.NDArray[np.int16] | None = None
    ) -> npt.NDArray[np.int16]:
        """Indices (n, m) of the cheapest paths, in ``out`` or an array of their own; blocks of rows
        side by side on all cores."""
        profiles, costs = self._search_tables()
        ways, turns = predecessors(self.n_states), _turns(self.n_states)
        reached = _reached(ways)
        out = np.empty(c.shape, np.int16) if out is None else out
        inverse = np.float32(1.0 / self.step_)

        def search_block(start: int) -> None:
            rows = slice(start, start + SEARCH_ROWS)
            with np.errstate(over="ignore"):  # the search holds what is out of reach at FARTHEST
                x = c[rows] * inverse
            _search(x, row_class[rows], profiles, *costs, ways, turns, reached, out[rows])

        in_threads(search_block, range(0, len(c), SEARCH_ROWS))
        return out

    def _search_tables(self) -> tuple[npt.NDArray[np.int32], _Costs]:
        """What the search looks up, made once for a model."""
        if self._tables is None or self._tables[0] is not self.model:
            base, gain, *_ = self.model.rules
            rates, shifts = self.model.rates()
            costs = _branch_costs(rates * np.float32(self.rate_weight), shifts)
            profiles = np.ascontiguousarray((gain << 8 | base + 128).T)
            self._tables = self.model, profiles, costs
        return self._tables[1:]

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
    edge = 0.05 * (coarser - finer)
    if np.isfinite(edge) and not finer + edge < guess < coarser - edge:
        guess = (finer + coarser) / 2
    return guess
