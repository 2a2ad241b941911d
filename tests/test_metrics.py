"""The metrics against their definitions in exact fractions or plain loops."""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polarpack import metrics
from polarpack.errors import InputError

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
WIDE = Context(prec=50, Emin=-99999, Emax=99999)


@st.composite
def pairs(draw):
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    elements = st.floats(allow_nan=False, allow_infinity=False, width=np.dtype(dtype).itemsize * 8)
    x = draw(hnp.arrays(dtype, shape, elements=elements))
    y = draw(st.one_of(hnp.arrays(dtype, shape, elements=elements), st.just(x)))
    return x, y


def exact(values):
    return [Fraction(float(v)) for v in np.ravel(values)]


def energy(values):
    return sum((v * v for v in values), Fraction(0))


def decimal(fraction):
    return Decimal(fraction.numerator) / Decimal(fraction.denominator)


def log10(fraction):
    with localcontext(WIDE):
        return float(decimal(fraction).log10())


def root(fraction):
    """Square root as the nearest float, inf beyond the largest."""
    with localcontext(WIDE):
        return float(decimal(fraction).sqrt())


def differences(x, y):
    return [a - b for a, b in zip(exact(x), exact(y), strict=True)]


@given(pairs())
@example((np.full((2, 3), 1.7e308), np.full((2, 3), -1.7e308)))
@example((np.array([[1e-200, 5e-324]]), np.array([[2e-200, 0.0]])))
@example((np.array([[1e30, 1.0]], np.float32), np.array([[1e30, 2.0]], np.float32)))
def test_relative_error_is_its_definition(pair):
    x, y = pair
    got = metrics.relative_error(x, y)
    for i in range(len(x)):
        error, signal = energy(differences(x[i], y[i])), energy(exact(x[i]))
        if error == 0:
            assert got[i] == 0.0
        elif signal == 0:
            assert got[i] == math.inf
        else:
            # float64 x - y is rounded once, and the smallest results are denormals
            assert got[i] == pytest.approx(root(error / signal), rel=1e-12, abs=1e-322)


@given(pairs())
@example((np.full((2, 3), 1.7e308), np.full((2, 3), -1.7e308)))
@example((np.full((1, 3), 1e-200), np.full((1, 3), 1.01e-200)))
def test_snr_and_distortion_are_their_definitions(pair):
    x, y = pair
    error, signal = energy(differences(x, y)), energy(exact(x))
    if error == 0:
        assert metrics.snr_db(x, y) == math.inf
    elif signal == 0:
        assert metrics.snr_db(x, y) == -math.inf
    else:
        assert metrics.snr_db(x, y) == pytest.approx(10 * log10(signal / error), abs=1e-9)
    mean = error / x.size
    largest = Fraction(np.finfo(np.float64).max)
    expected = math.inf if mean > largest else float(mean)
    assert metrics.distortion(x, y) == pytest.approx(expected, rel=1e-12, abs=1e-322)


@given(pairs())
@example((np.full((1, 2), 1e300), np.array([[1e300, -1e300]])))
@example((np.array([[5e-324, 0.0]]), np.array([[0.0, 1e308]])))
def test_cosine_is_its_definition(pair):
    x, y = pair
    got = metrics.cosine(x, y)
    assert got.dtype == np.float64
    for i in range(len(x)):
        a, b = exact(x[i]), exact(y[i])
        if energy(a) == 0 or energy(b) == 0:
            assert got[i] == float(energy(a) == energy(b))
            continue
        dot = sum((p * q for p, q in zip(a, b, strict=True)), Fraction(0))
        expected = root(dot * dot / (energy(a) * energy(b))) * (1 if dot > 0 else -1)
        assert got[i] == pytest.approx(expected, abs=1e-12)


def test_blocks_agree_with_the_whole(monkeypatch):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 7)) * np.logspace(-200, 200, 50)[:, None]
    y = x + rng.standard_normal(x.shape) * 0.1 * np.abs(x)
    functions = (metrics.distortion, metrics.snr_db, metrics.cosine, metrics.relative_error)
    whole = [f(x, y) for f in functions]
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 20)
    for f, expected in zip(functions, whole, strict=True):
        np.testing.assert_allclose(f(x, y), expected, rtol=1e-12)


def test_any_shape_and_no_rows():
    x = np.arange(24.0).reshape(2, 3, 4) + 1
    assert metrics.cosine(x, -x).tolist() == [-1.0] * 6
    assert metrics.relative_error(x, 2 * x).tolist() == [1.0] * 6
    assert metrics.snr_db(np.array(3.0), np.array(1.0)) == pytest.approx(3.5218, abs=1e-4)
    none = np.zeros((0, 4), np.float32)
    assert metrics.distortion(none, none) == 0.0
    assert metrics.snr_db(none, none) == math.inf
    assert metrics.cosine(none, none).shape == metrics.relative_error(none, none).shape == (0,)
    assert metrics.recall_at_k(none, none) == 1.0


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    y = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.bfloat16)
    assert metrics.distortion(x, y) == 0.25
    assert metrics.entropy_bits(torch.tensor([1, 2])) == 1.0


@pytest.mark.parametrize(
    "function", [metrics.distortion, metrics.snr_db, metrics.cosine, metrics.relative_error]
)
def test_wrong_pairs_are_named(function):
    x = np.ones((3, 2))
    with pytest.raises(InputError, match=r"expected y of shape \(3, 2\) like x, got \(2, 3\)"):
        function(x, x.T)
    bad = x.copy()
    bad[2, 1] = np.nan
    with pytest.raises(InputError, match=r"expected y to be finite, .* row 2"):
        function(x, bad)
    with pytest.raises(InputError, match="expected x to be a numpy array"):
        function([1.0], x)


def plain_recall(x, y, queries, own, k, metric):
    """Share of the k nearest, by loops and sets; own[i] is left out of the results of query i."""

    def nearest(rows, q, skip):
        if metric == "cosine":
            q, rows = q / np.linalg.norm(q), rows / np.linalg.norm(rows, axis=1, keepdims=True)
        score = -((rows - q) ** 2).sum(axis=1) if metric == "l2" else rows @ q
        order = [i for i in np.argsort(-score) if i != skip]
        return set(order[:k])

    shares = [
        len(nearest(x, q, skip) & nearest(y, q, skip)) / k
        for q, skip in zip(queries, own, strict=True)
    ]
    return float(np.mean(shares))


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-200])
def test_recall_is_its_definition(metric, scale):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, 8)) + 3
    y = x + 0.5 * rng.standard_normal(x.shape)
    expected = plain_recall(x, y, x, range(60), 5, metric)
    assert 0.2 < expected < 0.95
    got = metrics.recall_at_k(x * scale, y * scale, k=5, metric=metric)
    assert got == pytest.approx(expected)
    queries = rng.standard_normal((9, 8))
    expected = plain_recall(x, y, queries, [None] * 9, 5, metric)
    got = metrics.recall_at_k(x * scale, y * scale, queries * scale, k=5, metric=metric)
    assert got == pytest.approx(expected)


def test_recall_blocks_samples_and_small_tables(monkeypatch):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 4)).astype(np.float16)
    y = (x + 0.3 * rng.standard_normal(x.shape)).astype(np.float16)
    whole = metrics.recall_at_k(x, y, n_queries=200)
    sampled = metrics.recall_at_k(x, y, n_queries=100, seed=4)
    assert sampled == metrics.recall_at_k(x, y, n_queries=100, seed=4)
    assert abs(sampled - whole) < 0.1
    monkeypatch.setattr(metrics, "BLOCK_SCORES", 1)
    assert metrics.recall_at_k(x, y, n_queries=200) == pytest.approx(whole)
    assert metrics.recall_at_k(x[:1], y[:1]) == 1.0  # a row has no neighbour but itself
    assert metrics.recall_at_k(x[:3], y[:3]) == 1.0  # both others are among the ten
    assert metrics.recall_at_k(x, y, x[:0]) == 1.0


def test_duplicates_stand_for_each_other():
    x = np.repeat(np.eye(4), 8, axis=0)
    y = np.repeat(np.eye(4), 8, axis=0) * np.linspace(1, 2, 32)[:, None]
    assert metrics.recall_at_k(x, y, k=3) == 1.0
    assert metrics.recall_at_k(x, x, k=3, metric="l2") == 1.0


def test_recall_names_wrong_arguments():
    x = np.ones((4, 3))
    with pytest.raises(InputError, match=r"expected y of shape \(4, 3\)"):
        metrics.recall_at_k(x, x[:2])
    with pytest.raises(InputError, match=r"expected queries of shape \(n, 3\)"):
        metrics.recall_at_k(x, x, np.ones((2, 2)))
    with pytest.raises(InputError, match="k and n_queries of at least 1"):
        metrics.recall_at_k(x, x, k=0)
    with pytest.raises(InputError, match="got 'dot'"):
        metrics.recall_at_k(x, x, metric="dot")


@given(st.lists(st.integers(-3, 3), max_size=30))
def test_entropy_is_its_definition(symbols):
    counts = [symbols.count(v) for v in set(symbols)]
    expected = -sum(c / len(symbols) * math.log2(c / len(symbols)) for c in counts)
    got = metrics.entropy_bits(np.array(symbols, np.int64))
    assert got == pytest.approx(expected, abs=1e-12)
    assert math.copysign(1, got) == 1


def test_bits():
    assert metrics.bits_per_dimension(100, (10, 8)) == 10.0
    assert metrics.bits_per_dimension(0, (0, 8)) == 0.0
    assert metrics.bits_per_dimension(1, (0, 8)) == math.inf
    with pytest.raises(InputError, match="integer dtype, got float64"):
        metrics.entropy_bits(np.ones(3))


def water_filling(variances, bits):
    """SNR at this rate by bisection on the water level, the textbook's own form."""
    variances = np.asarray(variances, np.float64)
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        level = (low + high) / 2
        kept = variances[variances > level]
        rate = 0.5 * np.log2(kept / level).sum() / len(variances)
        low, high = (level, high) if rate > bits else (low, level)
    return 10 * math.log10(variances.sum() / np.minimum(variances, level).sum())


@given(
    st.lists(st.floats(0.001, 1000), min_size=1, max_size=12),
    st.lists(st.floats(0.01, 12), min_size=1, max_size=4),
    st.sampled_from([1.0, 2.0**900, 2.0**-900]),
)
def test_bound_is_reverse_water_filling(variances, bits, scale):
    got = metrics.rate_distortion_bound(np.array(variances) * scale, bits)
    np.testing.assert_allclose(got, [water_filling(variances, b) for b in bits], atol=1e-6)


def test_bound_of_data():
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((6, 6)) * np.logspace(0, -2, 6)
    x = rng.standard_normal((5000, 6)) @ mixing.T
    x -= x.mean(axis=0)
    variances = np.linalg.eigvalsh(x.T @ x / len(x))
    for bits in (0.0, 0.5, 3.0, 300.0):
        expected = metrics.gaussian_rd_bound(variances, bits)
        for scale in (1.0, 1e30, 1e-200):
            assert metrics.gaussian_rd_bound(x * scale, bits) == pytest.approx(expected, abs=1e-6)
    assert metrics.gaussian_rd_bound(x, 0.0) == pytest.approx(0.0, abs=1e-9)
    assert metrics.gaussian_rd_bound(x, 301.0) - metrics.gaussian_rd_bound(x, 300.0) == (
        pytest.approx(20 * math.log10(2))
    )
    # the mean is signal that costs nothing: here it holds as much energy as the variations
    moved = x + math.sqrt(variances.sum() / 6)
    gained = metrics.gaussian_rd_bound(moved, 1.0) - metrics.gaussian_rd_bound(x, 1.0)
    assert gained == pytest.approx(10 * math.log10(2), abs=1e-9)


def test_bound_where_little_or_nothing_varies(monkeypatch):
    assert metrics.gaussian_rd_bound(np.ones((5, 3)), 1.0) == math.inf
    assert metrics.gaussian_rd_bound(np.zeros((0, 3)), 1.0) == math.inf
    rng = np.random.default_rng(6)
    line = rng.standard_normal((100, 1)) * np.ones(4)  # 1 of 4 dimensions takes all the bits
    assert metrics.gaussian_rd_bound(line, 1.0) > 24.0
    expected = metrics.rate_distortion_bound(line, [1.0, 2.0])
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 12)
    np.testing.assert_allclose(metrics.rate_distortion_bound(line, [1.0, 2.0]), expected)


@pytest.mark.parametrize("bits", [-1.0, math.nan, math.inf])
def test_bound_names_wrong_arguments(bits):
    with pytest.raises(InputError, match="finite rates of at least 0"):
        metrics.gaussian_rd_bound(np.ones(3), bits)
    with pytest.raises(InputError, match="variances of at least 0"):
        metrics.gaussian_rd_bound(np.array([1.0, -1.0]), 1.0)
