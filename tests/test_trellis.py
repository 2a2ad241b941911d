"""Trellis quantization: its machines, its search against a plain Viterbi, and what it gains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import same_bits

from polarpack.entropy.magnitude import (
    ESCAPE,
    MAX_INDEX,
    N_SCALES,
    N_TABLES,
    PRIOR,
    MagnitudeModel,
    seen_table,
)
from polarpack.errors import CorruptDataError, InputError, NotFittedError
from polarpack.trellis import (
    FARTHEST,
    LOG_BIAS,
    MAX_STEP,
    MIN_STEP,
    PARITY_CHECKS,
    TrellisQuantizer,
    _turns,
    next_log_step,
    predecessors,
    state_machine,
    water_level,
)

STATES = sorted(PARITY_CHECKS)
F = np.float32


def coefficients(n: int, m: int, *, seed: int = 0) -> np.ndarray:
    """KLT-like: Gaussian columns of falling variance, rows of different strength."""
    rng = np.random.default_rng(seed)
    strength = rng.lognormal(0, 0.2, (n, 1))
    return (rng.standard_normal((n, m)) * 0.95 ** np.arange(m) * strength).astype(F)


def one_class(c: np.ndarray) -> np.ndarray:
    return np.zeros(len(c), np.int64)


def fitted(n_states: int = 8, step: float = 0.5, **given_: Any) -> tuple[TrellisQuantizer, Any]:
    c = coefficients(400, 24)
    q = TrellisQuantizer(n_states=n_states, step=step, **given_)
    return q.fit(c, one_class(c)), c


# -- machines -------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_states", STATES)
def test_machines_are_proper(n_states):
    next_state, quantizer = state_machine(n_states)
    assert next_state.shape == (n_states, 2)
    assert sorted(next_state.ravel().tolist()) == sorted(2 * list(range(n_states)))
    assert (next_state[:, 0] != next_state[:, 1]).all()
    assert quantizer.tolist() == [s & 1 for s in range(n_states)]
    # both ways into a state come from different states; into one state from states of one quantizer
    ways = predecessors(n_states)
    assert (ways[:, 0] != ways[:, 2]).all()
    for t, (s0, b0, s1, b1) in enumerate(ways):
        for s, b in ((s0, b0), (s1, b1)):
            assert quantizer[s] == b >> 1
            assert next_state[s, b & 1] == t
    # and the same as arithmetic on bits
    half, h0, h1, first, lift = (int(v) for v in _turns(n_states))
    assert lift == (16 if n_states == 4 else 1)  # fewer states than a byte has bits
    for t in range(n_states):
        for second in range(2):
            forced = t >= half
            u = t ^ h0 if forced else t
            parity = second ^ ((u & first) != 0)
            found = 2 * (u ^ h1 if parity else u) + forced, 2 * forced + parity
            assert found == tuple(ways[t, 2 * second : 2 * second + 2])
    # every state is reached from the first, in as many steps as it has bits
    reached = {0}
    for _ in range(n_states.bit_length() - 1):
        reached = {int(t) for s in reached for t in next_state[s]}
    assert reached == set(range(n_states))


@pytest.mark.parametrize("n_states", STATES)
def test_paths_that_part_stay_apart(n_states):
    """What the codes are good for: two paths that part and meet again differ by more than two
    neighbours in one quantizer do (4, squared, in units of delta)."""
    next_state, quantizer = state_machine(n_states)

    def between(s: int, a: int, t: int, b: int) -> float:
        """Least squared distance of the cosets that states s and t use for parities a and b."""
        # values 2k (Q0) and 2k - 1 (Q1, far from zero) by parity of k: residues modulo 4
        gap = (2 * a - int(quantizer[s]) - 2 * b + int(quantizer[t])) % 4
        return float(min(gap, 4 - gap) ** 2)

    best = {}
    for s in range(n_states):
        pair = (int(next_state[s, 0]), int(next_state[s, 1]))
        best[pair] = 4.0  # the two cosets of one quantizer
    met = np.inf
    for _ in range(20):
        longer: dict[tuple[int, int], float] = {}
        for (s, t), distance in best.items():
            for a in range(2):
                for b in range(2):
                    pair = (int(next_state[s, a]), int(next_state[t, b]))
                    total = distance + between(s, a, t, b)
                    if pair[0] == pair[1]:
                        met = min(met, total)
                    elif total < longer.get(pair, np.inf):
                        longer[pair] = total
        best = longer
    # squared free distances of Ungerboeck's codes, in units of the lattice's step
    assert met == {4: 9, 8: 10, 16: 11, 32: 13, 64: 14}[n_states]


# -- the search -----------------------------------------------------------------------------------
def context(q: TrellisQuantizer, row: np.ndarray, cls: int) -> list[tuple[float, int]]:
    """Magnitude and scale of each component, by the context's rules in float32."""
    base, gain, *_ = q.model.rules
    seen, out = F(PRIOR), []
    for j, x in enumerate(row):
        v = min(abs(x), FARTHEST)
        log = (int(np.frombuffer(seen.tobytes(), np.int32)[0]) + int(LOG_BIAS) >> 21) - 4 * 127
        out.append((v, min(max((log + int(base[cls, j])) >> 1, 0), N_SCALES - 1)))
        likely = np.floor(v + F(0.5)) if v >= F(1.1) else F(0)
        seen += min(likely * F(gain[cls, j]), F(8 << 16)) - seen * F(1 / 32)
    return out


def twin_costs(q: TrellisQuantizer, v: float, scale: int) -> list[tuple[int, int]]:
    """What the tables say of a coefficient: cost and index of each coset."""
    costs = q._search_tables()[1]
    cell = int(v * F(32))
    near = scale < N_TABLES and v < 16
    place = scale * 512 + cell if near else N_TABLES * 512 + cell % 128
    word = int(costs.words[place]) % (1 << 64)
    zeros, word = word >> 62, word & ~(3 << 62)
    assert near or not zeros
    if not near:
        shift = max(0, (scale - N_TABLES + 2) // 2)
        high = min(cell // 32 // 4 >> max(0, shift - 4), 255)
        word += int(costs.rates[scale * 1024 + 4 * high + cell // 32 % 4])
    out = []
    for b in range(4):
        k = int((v + F(b // 2)) * F(0.5))
        k = 0 if b % 2 == 0 and zeros >> b // 2 & 1 else k + (k ^ b) % 2
        out.append((word >> 16 * b & 0xFFFF, k))
    return out


def twin_search(q: TrellisQuantizer, c: np.ndarray, row_class: np.ndarray) -> np.ndarray:
    """Viterbi over one row at a time, over the costs the search looks up."""
    out = np.zeros(c.shape, np.int64)
    for i, (row, cls) in enumerate(zip(c * F(1 / q.step_), row_class, strict=True)):
        paths: dict[int, tuple[int, list[int]]] = {0: (0, [])}
        for v, scale in context(q, row, cls):
            choices = twin_costs(q, v, scale)
            extended: dict[int, tuple[int, list[int]]] = {}
            for s in range(q.n_states):
                if s not in paths:
                    continue
                for parity in range(2):
                    step, k = choices[2 * int(q.quantizer[s]) + parity]
                    total, t = paths[s][0] + step, int(q.next_state[s, parity])
                    if t not in extended or total < extended[t][0]:
                        extended[t] = (total, [*paths[s][1], k])
            paths = extended
        best = min(sorted(paths), key=lambda s: paths[s][0])
        out[i] = np.where(row < 0, -1, 1) * np.array(paths[best][1])
    return out


@settings(max_examples=40)
@given(
    st.sampled_from(STATES),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from([0.01, 0.3, 3.0, 300.0, 1e6]),
    st.sampled_from([0.0, 0.25, 0.5, 4.0, 1e6]),
    st.integers(0, 2**32 - 1),
)
def test_search_equals_a_plain_viterbi(n_states, m, n, size, weight, seed):
    rng = np.random.default_rng(seed)
    c = (rng.standard_normal((n, m)) * size * rng.choice([0.0, 0.1, 1.0], (n, m))).astype(F)
    row_class = rng.integers(0, 2, n)
    q = TrellisQuantizer(n_states=n_states, step=1.0, rate_weight=weight)
    q.step_ = 1.0
    expected = rng.integers(0, 89, (2, m)).astype(np.uint8)
    q.model_ = MagnitudeModel(expected, q.next_state, q.quantizer)
    found = q._search(c, row_class)
    assert np.array_equal(found, twin_search(q, c, row_class))


@pytest.mark.parametrize("weight", [0.0, 0.5, 4.0])
def test_costs_are_those_of_the_nearest_indices_and_zero(weight):
    """The tables beside distance plus rate, both less that of the cheapest coset."""
    q, _ = fitted(8, 0.5)
    q.rate_weight = weight
    rates, shifts = q.model.rates()
    size = 1 << shifts
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(2000):
        scale = int(rng.integers(0, N_SCALES))
        v = F(min(rng.exponential(2.0 ** rng.integers(-2, 9)), 480))
        near = scale < N_TABLES and v < 16
        if not near and v < 4:  # next to nothing at such a scale: zero may be taken for -1
            continue

        def cost(b: int, k: int, v: Any = v, scale: int = scale) -> float:
            cell = int(size[scale])
            moved = k + cell // 2 if b < 2 else k - 1 + cell
            symbol = min(moved // cell if k else 0, ESCAPE)
            value = 2 * k - b // 2 if k else 0
            return float((v - value) ** 2 + weight * rates[b // 2, scale, symbol + (k > 0)])

        looked = twin_costs(q, v, scale)
        true = [cost(b, k) for b, (_, k) in enumerate(looked)]
        for b in range(4):
            first = int((v + b // 2) / 2)
            around = [k for k in (first, first + 1) if (k ^ b) % 2 == 0]
            least = min(cost(b, k) for k in (*around, *([0] if b % 2 == 0 and near else [])))
            assert true[b] == pytest.approx(least, abs=0.3)  # a cell of 1/32 between two choices
        least = min(true)
        pairs += [(looked[b][0] - min(looked)[0], true[b] - least) for b in range(4)]
    found, real = np.array(pairs, float).T
    unit = (found @ real) / (real @ real)
    # a cell off, and a symbol at large scales
    assert np.abs(found / unit - real).max() < 0.3 + 0.3 * weight + 2 / unit
    assert np.abs(found / unit - real).mean() < 0.05 + 1 / unit


def path_cost(q: TrellisQuantizer, c: np.ndarray, codes: np.ndarray) -> float:
    """J = D + lambda * bits in units of step^2, the bits being those really spent."""
    _, y = q.decode(codes)
    distortion = np.square(c / q.step_ - y, dtype=np.float64).sum()
    return float(distortion + q.rate_weight * q.model.rate_bits(codes))


@pytest.mark.parametrize("n_states", STATES)
@pytest.mark.parametrize("step", [0.05, 0.5, 2.0])
def test_search_beats_plain_rounding(n_states, step):
    q, c = fitted(n_states, step)
    codes = q.encode(c, one_class(c))
    rounded = np.zeros(c.shape, np.int16)
    state = np.zeros(len(c), np.int64)
    for j in range(c.shape[1]):
        v = np.abs(c[:, j] / q.step_)
        quant = q.quantizer[state]
        k = np.where(quant == 0, np.rint(v / 2), np.where(v < 0.5, 0, np.rint((v + 1) / 2)))
        rounded[:, j] = k * np.sign(c[:, j])
        state = q.next_state[state, k.astype(int) & 1]
    plain = q.model.join(one_class(c), rounded)
    assert path_cost(q, c, codes) < 0.96 * path_cost(q, c, plain)


def test_more_states_pack_denser():
    x = np.random.default_rng(0).standard_normal((1000, 128)).astype(F)
    gains = []
    for n_states in (4, 8, 64):
        q = TrellisQuantizer(n_states=n_states, step=0.5).fit(x, one_class(x))
        codes = q.encode(x, one_class(x))
        error = np.square(x - q.decode(codes)[1] * F(q.step_)).mean()
        gains.append(-10 * np.log10(error) - 6.02 * q.model.rate_bits(codes) / x.size)
    assert gains[1] > gains[0] + 0.02
    assert gains[2] > gains[1] + 0.05


@pytest.mark.parametrize(("bits", "gain"), [(1.0, 0.55), (2.0, 0.75), (4.0, 0.8)])
def test_gain_over_scalar_quantization_of_gaussians(bits, gain):
    """Against a uniform scalar quantizer with centroids and ideal entropy coding."""
    x = np.random.default_rng(0).standard_normal((2000, 64)).astype(F)
    q = TrellisQuantizer().fit(x, one_class(x), row_bits=64 * bits)
    codes = q.encode(x, one_class(x))
    rate = q.model.rate_bits(codes) / x.size
    assert rate == pytest.approx(bits, rel=0.02)
    error = np.square(x - q.decode(codes)[1] * F(q.step_)).mean()

    def scalar(step: float) -> tuple[float, float]:
        cells = np.rint(x / step).astype(int).ravel()
        cells -= cells.min()
        counts = np.bincount(cells)
        centroids = np.bincount(cells, x.ravel()) / np.maximum(counts, 1)
        p = counts[counts > 0] / x.size
        return float(-(p * np.log2(p)).sum()), float(np.square(x.ravel() - centroids[cells]).mean())

    steps = 2.0 ** np.arange(-6, 2, 0.05)
    points = sorted(scalar(step) for step in steps)
    rates, errors = zip(*points, strict=True)
    at_rate = np.exp(np.interp(rate, rates, np.log(errors)))
    assert 10 * np.log10(at_rate / error) > gain


# -- codes ----------------------------------------------------------------------------------------
@settings(max_examples=40)
@given(st.sampled_from(STATES), st.integers(1, 20), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_codes_travel_and_decode_along_the_machine(n_states, m, n, seed):
    rng = np.random.default_rng(seed)
    c = coefficients(n, m, seed=seed)
    row_class = rng.integers(0, 3, n)
    q = TrellisQuantizer(n_states=n_states, step=float(2.0 ** rng.uniform(-8, 2)))
    q.fit(c, row_class, 3)
    codes = q.encode(c, row_class)
    assert codes.dtype == np.uint16
    assert codes.shape == (n, m + 1)
    again = TrellisQuantizer.from_arrays(q.get_config(), q.arrays())
    assert again.step_ == q.step_
    assert same_bits(again.encode(c, row_class), codes)
    for quantizer in (q, again):
        found_class, y = quantizer.decode(codes)
        assert np.array_equal(found_class, row_class)
        assert y.dtype == np.int32
    state = np.zeros(n, np.int64)
    _, k = q.model.split(codes)
    for j in range(m):
        quant = q.quantizer[state].astype(int)
        assert np.array_equal(y[:, j], 2 * k[:, j].astype(int) - quant * np.sign(k[:, j]))
        state = q.next_state[state, k[:, j] & 1].astype(np.int64)
    # no point is farther off than rate makes worth while: 2 steps from rounding, and the dead zone
    assert np.abs(c / q.step_ - y).max(initial=0) < 8
    block = q.model.encode(codes)
    assert np.array_equal(q.model.decode(block, n), codes)


@pytest.mark.parametrize("n", [0, 1, 31, 33, 1025, 2500])
def test_threads_and_neighbours_do_not_matter(n, monkeypatch):
    q, _ = fitted()
    c = coefficients(n, 24, seed=1)
    monkeypatch.setenv("POLARPACK_THREADS", "1")
    codes = q.encode(c, one_class(c))
    monkeypatch.setenv("POLARPACK_THREADS", "3")
    assert same_bits(q.encode(c, one_class(c)), codes)
    few = slice(n // 3, n // 3 + 7)
    assert same_bits(q.encode(c[few], one_class(c[few])), codes[few])


def test_coefficients_out_of_reach_are_held():
    q, c = fitted()
    c = c[:40].copy()
    c[3, 2], c[3, 5], c[4] = F(1e38), F(-3e38), F(1e30)
    codes = q.encode(c, one_class(c))
    _, y = q.decode(codes)
    assert np.abs(y).max() <= 2 * MAX_INDEX
    assert y[3, 2] > 65500
    assert y[3, 5] < -65500
    others = np.delete(np.arange(40), [3, 4])
    assert same_bits(codes[others], q.encode(c[others], one_class(c[others])))


# -- fitting --------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [0.3, 1.0, 3.0, 8.0])
def test_the_rate_asked_for(bits):
    c = coefficients(1500, 32)
    q = TrellisQuantizer().fit(c, one_class(c), row_bits=32 * bits)
    assert q.model.rate_bits(q.encode(c, one_class(c))) / c.size == pytest.approx(bits, rel=0.01)


def test_the_finest_step_that_indices_reach():
    c = coefficients(300, 8)
    largest = float(np.abs(c).max())
    for q in (
        TrellisQuantizer(step=1e-12).fit(c, one_class(c)),
        TrellisQuantizer().fit(c, one_class(c), row_bits=8 * 30.0),
    ):
        assert q.step_ == pytest.approx(largest / 65532, rel=1e-6)
        _, y = q.decode(q.encode(c, one_class(c)))
        assert np.abs(c - y * F(q.step_)).max() < 2 * q.step_


@pytest.mark.parametrize("arguments", [{"row_bits": 12.0}, {"step": 0.5}, {"step": 1e-60}])
@pytest.mark.parametrize(
    "c",
    [np.zeros((0, 6)), np.zeros((5, 6)), np.ones((1, 6)), np.eye(6)[:2], np.full((40, 1), 7.0)],
    ids=["no rows", "zeros", "one row", "two rows", "one column"],
)
def test_fit_on_degenerate_coefficients(c, arguments):
    c = c.astype(F)
    q = TrellisQuantizer(step=arguments.get("step"))
    q.fit(c, one_class(c), 2, row_bits=arguments.get("row_bits"))
    assert MIN_STEP <= q.step_ <= MAX_STEP
    codes = q.encode(c, one_class(c))
    assert np.array_equal(q.model.decode(q.model.encode(codes), len(c)), codes)


def test_models_are_learned_from_rows_all_over():
    """A table sorted by size must not be judged by its first rows."""
    c = coefficients(1 << 16, 4) * np.linspace(0.01, 10, 1 << 16, dtype=F)[:, None]
    q = TrellisQuantizer(step=0.2).fit(c, one_class(c))
    few, last = c[::64], c[-1024:]
    rate = q.model.rate_bits(q.encode(few, one_class(few))) / few.size
    own = TrellisQuantizer(step=0.2).fit(few, one_class(few))
    assert rate == pytest.approx(
        own.model.rate_bits(own.encode(few, one_class(few))) / few.size, rel=0.02
    )
    assert np.isfinite(q.model.rate_bits(q.encode(last, one_class(last))))


# -- helpers --------------------------------------------------------------------------------------
@given(
    st.lists(st.floats(-40.0, 40.0), min_size=1, max_size=30),
    st.floats(0.01, 200.0),
)
def test_water_level_meets_its_definition(logs, bits):
    v = 2.0 ** np.array(logs)
    level = water_level(v, bits)
    spent = np.maximum(0, np.log2(np.maximum(v, 1e-30) / level) / 2).sum()
    assert spent == pytest.approx(bits, rel=1e-6, abs=1e-6)


def test_water_level_without_bits_or_variance():
    assert water_level(np.array([2.0, 1.0]), 0.0) == pytest.approx(2.0)
    assert 0 < water_level(np.zeros(5), 10.0) < 1e-30


@given(st.floats(-5, 5), st.floats(0.2, 4.0), st.floats(0.0, 0.3), st.floats(-8, 8))
def test_next_log_step_closes_in(start, slope, bend, wanted):
    """On any falling curve, a few steps from anywhere come near."""

    def size(log_step: float) -> float:
        return float(100 - 10 * slope * log_step - bend * log_step**3)

    target = size(wanted)
    tried: list[tuple[float, float]] = []
    log_step = start
    for _ in range(12):
        tried.append((log_step, size(log_step)))
        log_step = next_log_step(tried, target, slope=-7.0)
    assert min(abs(s - target) for _, s in tried) < 0.5


def test_the_logarithms_cover_what_the_search_sees():
    """The search feeds its own magnitudes, up to 65532, to the running sum."""
    q = TrellisQuantizer(step=1.0)
    q.step_ = 1.0
    q.model_ = MagnitudeModel(np.zeros((1, 500), np.uint8), q.next_state, q.quantizer)
    c = np.full((2, 500), 1e6, F)
    assert (np.abs(q._search(c, one_class(c))) > 32000).all()
    assert len(seen_table()) == 9216


# -- settings and what travels --------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"n_states": 2},
        {"n_states": 12},
        {"step": 0.0},
        {"step": -1.0},
        {"step": np.inf},
        {"step": np.nan},
        {"rate_weight": -0.1},
        {"rate_weight": np.inf},
        {"rate_weight": np.nan},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match="expected"):
        TrellisQuantizer(**wrong)


def test_a_rate_or_a_step_is_needed():
    c = coefficients(3, 3)
    with pytest.raises(InputError, match="row_bits"):
        TrellisQuantizer().fit(c, one_class(c))
    with pytest.raises(NotFittedError):
        TrellisQuantizer(step=1.0).encode(c, one_class(c))


@pytest.mark.parametrize(
    ("config", "arrays"),
    [
        ({"n_states": 3}, {}),
        ({"n_states": 8.0}, {}),
        ({"n_states": None}, {}),
        ({"step": 0.0}, {}),
        ({"step": 1}, {}),
        ({"step": float("nan")}, {}),
        ({"step": 1e-40}, {}),
        ({"step": 1e40}, {}),
        ({"rate_weight": -1}, {}),
        ({"rate_weight": float("nan")}, {}),
        ({"rate_weight": "x"}, {}),
        ({}, {"model": None}),
        ({}, {"model": np.zeros(5, np.int16)}),
        ({}, {"model": np.zeros((5, 5), np.uint8)}),
        ({}, {"model": np.zeros(5, np.uint8)}),
    ],
)
def test_wrong_parts_are_refused(config, arrays):
    q, _ = fitted()
    given_ = {**q.arrays(), **arrays}
    given_ = {k: v for k, v in given_.items() if v is not None}
    TrellisQuantizer.from_arrays(q.get_config(), q.arrays())
    with pytest.raises(CorruptDataError):
        TrellisQuantizer.from_arrays({**q.get_config(), **config}, given_)


def test_a_guess_beside_a_known_bound_is_replaced_by_the_middle():
    """Two tries that came out alike make a secant that leads to the third again and again."""
    tried = [(-0.52, 100.11), (-0.515, 100.1), (-0.41, 90.0)]
    assert -0.49 < next_log_step(tried, 99.9, slope=-1.0) < -0.43
