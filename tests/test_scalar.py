"""Scalar quantizers: learned levels, and even grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import check_quantizer, same_bits, vectors

from polarpack.errors import CorruptDataError, InputError, NotFittedError
from polarpack.scalar import GridQuantizer, ScalarQuantizer, lloyd_max


def least_error(values: np.ndarray, weights: np.ndarray, n_levels: int) -> float:
    """Squared error of the best levels, by trying all last groups for all prefixes."""
    order = np.argsort(values)
    v, w = values[order], weights[order]

    def cost(i: int, j: int) -> float:
        mean = np.average(v[i:j], weights=w[i:j])
        return float((w[i:j] * (v[i:j] - mean) ** 2).sum())

    best = [0.0] + [np.inf] * v.size
    for _ in range(n_levels):
        best = [best[0]] + [
            min(best[i] + cost(i, j) for i in range(j)) for j in range(1, v.size + 1)
        ]
    return best[-1]


def error_of(levels: np.ndarray, values: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    return float((weights * np.square(values[:, None] - levels).min(axis=1)).sum())


# ------------------------------------------------------------------------------- lloyd_max


@settings(max_examples=40)
@given(st.integers(1, 25), st.integers(1, 8), st.floats(1, 4), st.integers(0, 2**32 - 1))
def test_levels_of_few_values_are_optimal(n, n_levels, tail, seed):
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(n)
    v, w = np.sign(v) * np.abs(v) ** tail, rng.random(n) + 0.1
    levels = lloyd_max(v, n_levels, w)
    assert levels.shape == (n_levels,)
    assert (np.diff(levels) >= 0).all()
    assert error_of(levels, v, w) <= least_error(v, w, n_levels) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    ("n_levels", "distortion"),  # of a unit Gaussian: Max 1960, table 1
    [(2, 0.3634), (3, 0.1902), (4, 0.1175), (8, 0.03454), (16, 0.009497), (32, 0.002499)],
)
def test_levels_of_a_gaussian_are_those_of_max(n_levels, distortion):
    v = np.random.default_rng(0).standard_normal(100_000)
    levels = lloyd_max(v, n_levels)
    assert error_of(levels, v) / v.size == pytest.approx(distortion, rel=0.02)


def test_many_levels_follow_the_high_rate_law():
    v = np.random.default_rng(0).standard_normal(300_000)
    levels = lloyd_max(v, 1 << 10)
    at = np.searchsorted((levels[1:] + levels[:-1]) / 2, v)
    distortion = np.square(v - levels[at]).mean()
    assert distortion == pytest.approx(np.sqrt(3) * np.pi / 2 / 4**10, rel=0.1)


@pytest.mark.parametrize("n", [3000, 5000])  # more than the bins
def test_outliers_and_clumps_survive_the_histogram(n):
    v = np.concatenate([np.linspace(0, 1e-6, n), [1.0, 2.0, 1e6]])
    levels = lloyd_max(v, 8)
    for wanted in (1.0, 2.0, 1e6):
        assert np.abs(levels / wanted - 1).min() < 1e-6


def test_few_or_no_values():
    assert lloyd_max([], 3).tolist() == [0, 0, 0]
    assert lloyd_max([5.0], 3).tolist() == [5, 5, 5]
    assert lloyd_max([2.0, 1.0, 2.0], 2).tolist() == [1, 2]
    assert lloyd_max([1.0, 2.0, 9.0], 2, weights=[1.0, 1.0, 0.0]).tolist() == [1, 2]
    assert lloyd_max([1.0, 2.0], 1, weights=[3.0, 1.0]).tolist() == [1.25]


# ------------------------------------------------------------------------- ScalarQuantizer


@settings(max_examples=80)
@given(vectors(), st.integers(1, 9), st.sampled_from(["linear", "log"]))
def test_any_values(x, n_bits, domain):
    values = np.abs(x) if domain == "log" else x
    q = ScalarQuantizer(n_bits, domain=domain).fit(values)
    assert q.levels_.shape == (1 << n_bits,)
    assert q.levels_.dtype == np.float32
    assert (np.diff(q.levels_) >= 0).all()
    assert np.isfinite(q.levels_).all()
    codes = q.encode(values)
    decoded = q.decode(codes)
    assert codes.shape == decoded.shape == values.shape
    assert codes.dtype == (np.uint8 if n_bits <= 8 else np.uint16)
    assert same_bits(q.encode(decoded), codes) or same_bits(q.decode(q.encode(decoded)), decoded)
    distinct = np.unique(values.astype(np.float32)[values != 0])
    if distinct.size < 1 << n_bits:
        np.testing.assert_allclose(decoded, values.astype(np.float32), rtol=1e-5)
    if domain == "log":
        assert not decoded[values == 0].any()
    twin = ScalarQuantizer.from_config(q.get_config()).load_arrays(q.arrays())
    assert repr(twin) == repr(q)
    assert same_bits(twin.encode(values), codes)


@pytest.mark.parametrize("n_bits", [1, 3, 9])
def test_linear_codes_are_the_nearest_level(n_bits):
    v = np.random.default_rng(0).standard_normal(2000)
    q = ScalarQuantizer(n_bits).fit(v)
    wide = v.astype(np.float32).astype(np.float64)
    plain = np.abs(wide[:, None] - q.levels_.astype(np.float64)).argmin(axis=1)
    assert np.array_equal(q.encode(v), plain)


def test_log_codes_are_nearest_by_ratio_and_levels_suit_relative_error():
    v = np.exp(2 * np.random.default_rng(0).standard_normal(5000))
    q = ScalarQuantizer(4, domain="log").fit(v)
    assert q.levels_[0] == 0
    assert q.levels_[1] > 0
    kept = v[v > q.levels_[1] / 2]
    ratio = np.abs(np.log(kept)[:, None] - np.log(q.levels_[1:].astype(np.float64)))
    assert (q.encode(kept) == 1 + ratio.argmin(axis=1)).mean() > 0.999  # float32 of v aside
    linear = ScalarQuantizer(4).fit(v)
    relative = [np.square(1 - p.decode(p.encode(v)) / v).mean() for p in (q, linear)]
    assert relative[0] < 0.1 * relative[1]


def test_zero_and_what_is_near_it():
    q = ScalarQuantizer(3, domain="log").fit(np.linspace(1.0, 2.0, 100))  # no zeros seen
    low = q.levels_[1]
    values = np.array([0.0, 1e-30, low * 0.499, low * 0.501, 1e30])
    assert q.decode(q.encode(values)).tolist() == [0, 0, 0, low, q.levels_[-1]]
    only_zeros = ScalarQuantizer(3, domain="log").fit(np.zeros(4))
    assert not only_zeros.decode(only_zeros.encode(np.array([0.0, 5.0]))).any()


def test_shapes_and_torch():
    v = torch.rand(4, 5, 6)
    q = ScalarQuantizer(5).fit(v)
    codes = q.encode(v)
    assert codes.shape == v.shape
    assert codes.dtype == torch.uint8
    decoded = q.decode(codes)
    assert decoded.shape == v.shape
    assert decoded.dtype == torch.float32
    assert np.array_equal(decoded.numpy(), q.decode(q.encode(v.numpy())))
    assert q.alphabet_sizes.tolist() == [32]
    assert q.n_fields == 1


def test_bad_scalar_arguments():
    for arguments in ({"n_bits": 0}, {"n_bits": 17}, {"n_bits": 4.0}, {"n_bits": True}):
        with pytest.raises(InputError):
            ScalarQuantizer(**arguments)
    with pytest.raises(InputError, match="domain"):
        ScalarQuantizer(domain="root")
    with pytest.raises(InputError, match=">= 0"):
        ScalarQuantizer(domain="log").fit(np.array([1.0, -1.0]))
    with pytest.raises(NotFittedError):
        ScalarQuantizer().encode(np.ones(3))
    q = ScalarQuantizer(2).fit(np.arange(9.0))
    for codes in (np.array([4]), np.array([-1]), np.array([1.0]), [1]):
        with pytest.raises(InputError):
            q.decode(codes)
    for values in ([1.0], np.array([1]), np.array([np.inf])):
        with pytest.raises(InputError):
            q.encode(values)
    with pytest.raises(InputError):
        ScalarQuantizer.from_config({"bits": 3})


def test_corrupt_levels():
    q = ScalarQuantizer(2, domain="log").fit(np.arange(9.0))
    levels = q.arrays()["levels"]
    for bad in (
        {},
        {"levels": levels[:-1]},
        {"levels": levels.astype(np.float64)},
        {"levels": levels[::-1]},
        {"levels": levels + 1},
        {"levels": np.array([0, 1, 2, np.nan], np.float32)},
        {"levels": levels, "more": levels},
    ):
        with pytest.raises(CorruptDataError):
            ScalarQuantizer(2, domain="log").load_arrays(bad)


# --------------------------------------------------------------------------- GridQuantizer


@settings(max_examples=80)
@given(vectors(), st.integers(1, 16), st.booleans(), st.sampled_from(["minmax", "mse"]))
def test_any_grid(x, n_bits, shared, clip):
    q = GridQuantizer(n_bits, shared=shared, clip=clip).fit(x)
    codes = check_quantizer(q, x)
    decoded = q.decode(codes)
    assert same_bits(q.decode(q.encode(decoded)), decoded)
    if clip == "minmax":
        wide = x.astype(np.float32).astype(np.float64)
        half_step = np.broadcast_to(q.step_, x.shape).astype(np.float64) / 2
        slack = np.abs(wide).max(initial=0) * 1e-6 + 1e-44
        assert (np.abs(decoded - wide) <= half_step * (1 + 1e-6) + slack).all()


def test_grid_is_the_plain_formula():
    x = np.random.default_rng(0).standard_normal((200, 7)).astype(np.float32)
    for n_bits in (1, 5, 12):
        q = GridQuantizer(n_bits).fit(x)
        low, step = q.minimum_.astype(np.float64), q.step_.astype(np.float64)
        plain = np.clip(np.ceil((x - low) / step - 0.5), 0, (1 << n_bits) - 1)
        assert np.array_equal(q.encode(x), plain)
        assert same_bits(q.decode(plain.astype(int)), (low + plain * step).astype(np.float32))


def test_values_outside_the_range_are_held_at_its_ends():
    q = GridQuantizer(4).fit(np.array([[0.0, 5.0], [15.0, 5.0]]))
    codes = q.encode(np.array([[-1e30, -7.0], [1e30, 7.0], [7.5, 5.0]]))
    assert codes.tolist() == [[0, 0], [15, 0], [7, 0]]  # a tie takes the lower
    assert q.decode(codes).tolist() == [[0, 5], [15, 5], [7, 5]]


def test_whole_range_of_float32():
    x = np.array([[-3.4e38], [3.4e38], [1e-45]], np.float32)
    q = GridQuantizer(8).fit(x)
    np.testing.assert_allclose(q.decode(q.encode(x)), x, atol=3.4e38 / 255)


@pytest.mark.parametrize(("n_bits", "decibels"), [(1, 4.40), (2, 9.25), (3, 14.27), (4, 19.38)])
def test_clipping_reaches_the_best_uniform_gaussian_quantizer(n_bits, decibels):
    # Max 1960, table 2: equally spaced levels.
    x = np.random.default_rng(0).standard_normal((20_000, 2)).astype(np.float32)
    q = GridQuantizer(n_bits, clip="mse").fit(x)
    snr = 10 * np.log10(np.square(x).mean() / np.square(x - q.decode(q.encode(x))).mean())
    assert snr == pytest.approx(decibels, abs=0.1)


def test_shared_grid():
    x = np.random.default_rng(0).standard_normal((50, 3)) * [1, 10, 100]
    q = GridQuantizer(6, shared=True).fit(x)
    assert q.step_.shape == (1,)
    assert q.alphabet_sizes.tolist() == [64] * 3
    check_quantizer(q, x)


def test_bad_grid_arguments():
    for arguments in ({"n_bits": 0}, {"n_bits": 17}, {"clip": "percentile"}):
        with pytest.raises(InputError):
            GridQuantizer(**arguments)
    for use in (lambda q: q.encode(np.ones((1, 2))), lambda q: q.n_fields, lambda q: q.arrays()):
        with pytest.raises(NotFittedError):
            use(GridQuantizer())
    q = GridQuantizer(2).fit(np.random.default_rng(0).standard_normal((9, 3)))
    for wrong in (np.full((2, 3), 4), np.zeros((2, 2), int), np.zeros((2, 3))):
        with pytest.raises(InputError):
            q.decode(wrong)
    with pytest.raises(InputError):
        q.encode(np.ones((2, 4)))


def test_corrupt_grids():
    q = GridQuantizer(2, shared=True).fit(np.random.default_rng(0).standard_normal((9, 3)))
    good = q.arrays()
    assert sorted(good) == ["columns", "minimum", "step"]
    for bad in (
        {"columns": np.array([0], np.int32)},
        {"columns": np.array([1 << 30], np.int32)},
        {"step": -good["step"]},
        {"step": np.array([3e38], np.float32)},
        {"step": np.array([np.nan], np.float32)},
        {"minimum": good["minimum"].astype(np.float64)},
        {"minimum": np.zeros((1, 1), np.float32)},
    ):
        with pytest.raises(CorruptDataError):
            GridQuantizer(2, shared=True).load_arrays({**good, **bad})
    del good["columns"]
    with pytest.raises(CorruptDataError):
        GridQuantizer(2, shared=True).load_arrays(good)
    GridQuantizer(2).load_arrays(good)
    with pytest.raises(CorruptDataError):
        GridQuantizer(2).load_arrays({"step": good["step"]})
