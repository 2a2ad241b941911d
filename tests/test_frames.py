"""Frames: classes of a planted mixture, exact inverses, and files that choose as the fitted do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import same_bits

from polarpack import frames as module
from polarpack.errors import CorruptDataError, InputError, LimitError
from polarpack.frames import Frames, exact_product
from polarpack.rotation import Rotation, trellis_order

pytest.importorskip("faiss")  # classes start from k-means


def mixture(
    n: int, d: int, k: int, *, seed: int = 0, apart: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of k classes, each with a mean and a spectrum in axes of its own; and their classes."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((k, d)) * apart / np.sqrt(d)
    shapes = [np.linalg.qr(rng.standard_normal((d, d)))[0] * 0.8 ** np.arange(d) for _ in range(k)]
    rows = rng.integers(0, k, n)
    x = means[rows] + np.stack([shapes[c] @ rng.standard_normal(d) for c in rows])
    return x.astype(np.float32), rows


def fit(x: np.ndarray, k: int, p: int | None = None, noise: float = 0.01, **given_: Any) -> Frames:
    return Frames(Rotation("klt", **given_).fit(x), n_classes=k, n_leading=p).fit(x, noise=noise)


def travelled(frames: Frames) -> Frames:
    return Frames.from_arrays(frames.get_config(), frames.arrays(), frames.d_)


def rotation_of(frames: Frames, k: int) -> Rotation:
    """Class k's rotation on its own."""
    return Rotation.of(frames.matrix_of(k), frames.common.exponent_, frames.means_[k])


def twin_costs(frames: Frames, x: np.ndarray) -> np.ndarray:
    """The cost as the module's text has it, in float64: (n, K)."""
    c = frames.common.forward(x).astype(np.float64)
    p, noise = frames.n_leading, frames.noise_
    variances = np.empty_like(frames.variances_)
    variances[:, trellis_order(frames.n_components_)] = frames.variances_
    costs = []
    for k in range(frames.n_classes):
        turn = frames.turns_[k] * 2.0**-frames.turn_exponent_
        own = (c[:, :p] - frames.offsets_[k] * 2.0**-frames.offset_exponent_) @ turn
        own = np.concatenate([own, c[:, p:]], axis=1)
        v = variances[k]
        bits = 0.5 * np.log2(1 + v / noise) + own**2 / (v + noise) / (2 * np.log(2))
        costs.append(bits.sum(axis=1) - np.log2(frames.weights_[k]))
    return np.stack(costs, axis=1)


# -- learning -------------------------------------------------------------------------------------
def test_planted_classes_are_found():
    x, planted = mixture(4000, 16, 3)
    found = fit(x, 3).choose(x)
    table = np.zeros((3, 3), int)
    np.add.at(table, (planted, found), 1)
    assert table.max(axis=1).sum() > 0.98 * len(x)
    assert sorted(table.argmax(axis=1)) == [0, 1, 2]


def test_frames_are_steeper_than_one_klt():
    """The rate of a Gaussian code at the noise fitted for, classes named: what frames are for."""
    x, _ = mixture(6000, 24, 4)
    train, test = x[:4000], x[4000:]
    noise = 0.01
    common = Rotation("klt").fit(train)
    alone = 0.5 * np.log2(1 + common.variances_ / noise).sum()
    frames = Frames(common, n_classes=4).fit(train, noise=noise)
    c = frames.forward(test, frames.choose(test))
    v = frames.variances_[frames.choose(test)]
    bits = 0.5 * np.log2(1 + v / noise) + c**2 / (v + noise) / (2 * np.log(2))
    spent = (bits.sum(axis=1) - np.log2(frames.weights_[frames.choose(test)])).mean()
    assert spent - 0.5 / np.log(2) * 24 < alone - 10


def test_variances_are_those_of_the_coefficients():
    x, _ = mixture(6000, 12, 2)
    frames = fit(x, 2, noise=0.01)
    rows = frames.choose(x)
    c = frames.forward(x, rows)
    for k in range(2):
        seen = np.square(c[rows == k], dtype=np.float64).mean(axis=0)
        large = seen > 0.01
        assert frames.variances_[k][large] == pytest.approx(seen[large], rel=0.3)
        assert frames.weights_[k] == pytest.approx((rows == k).mean(), rel=0.1)


def test_small_classes_lean_on_the_others():
    """Classes that are all alike, with hardly more rows than axes: their spectra stay flat, as the
    rows' is, instead of following chance."""
    x = np.random.default_rng(0).standard_normal((700, 40)).astype(np.float32)
    frames = fit(x, 10, noise=0.05)
    assert frames.variances_.max() < 2.5
    assert frames.variances_.min() > 0.3


@pytest.mark.parametrize("p", [1, 4, None, 99])
@pytest.mark.parametrize("m", [None, 9])
def test_leading_axes(p, m):
    x, _ = mixture(500, 12, 3)
    frames = fit(x, 3, p, n_components=m)
    width = m or 12
    assert frames.n_leading == min(p or width, width)
    assert frames.turns_.shape == (3, frames.n_leading, frames.n_leading)
    rows = frames.choose(x)
    c = frames.forward(x, rows)
    assert c.shape == (500, width)
    y = frames.inverse(np.rint(c * 256), 1 / 256, rows)
    if m is None:
        assert np.abs(x - y).max() < 0.05


# -- vectors <-> coefficients ---------------------------------------------------------------------
@settings(max_examples=25)
@given(
    st.integers(1, 20),
    st.integers(2, 6),
    st.integers(2, 120),
    st.floats(-4, 2),
    st.integers(0, 999),
)
def test_choose_takes_the_least_cost(d, k, n, log_noise, seed):
    x, _ = mixture(n, d, k, seed=seed)
    frames = fit(x, k, 1 + seed % d, noise=10.0**log_noise)
    costs = twin_costs(frames, x)
    chosen = frames.choose(x)
    least = costs.min(axis=1)
    taken = np.take_along_axis(costs, chosen[:, None], axis=1)[:, 0]
    assert (taken <= least + 1e-3 * (1 + np.abs(least))).all()


@settings(max_examples=25)
@given(st.integers(1, 24), st.integers(2, 5), st.booleans(), st.integers(0, 999))
def test_forward_and_inverse_are_consistent(d, k, center, seed):
    x, rows = mixture(60, d, k, seed=seed)
    frames = fit(x, k, 1 + seed % d, center=center)
    c = frames.forward(x, rows)
    lattice = np.rint(c * 100).astype(np.int32)
    y = frames.inverse(lattice, 0.01, rows)
    for i in range(0, 60, 7):
        one = rotation_of(frames, rows[i])
        assert c[i] == pytest.approx(one.forward(x[i : i + 1])[0], abs=1e-4)
        assert same_bits(y[i : i + 1], one.inverse(lattice[i : i + 1], 0.01))
    assert np.abs(y - x).max() < 0.01 * d + 1e-3
    shuffled = np.random.default_rng(seed).permutation(60)
    assert same_bits(frames.inverse(lattice[shuffled], 0.01, rows[shuffled]), y[shuffled])
    assert same_bits(frames.inverse(lattice[:0], 0.01, rows[:0]), y[:0])


def test_class_matrices_are_integer_products():
    x, _ = mixture(800, 10, 3)
    frames = fit(x, 3, 6)
    axes = frames.common.matrix_
    assert axes is not None
    half = 1 << frames.turn_exponent_ >> 1
    order = trellis_order(10)
    for k in range(3):
        rotation = rotation_of(frames, k)
        product = axes[:, :6].astype(object) @ frames.turns_[k].astype(object)
        matrix = axes.astype(int)
        matrix[:, :6] = (product + half) >> frames.turn_exponent_
        assert np.array_equal(rotation.matrix_, matrix[:, order])
        moved = axes[:, :6].astype(object) @ frames.offsets_[k].astype(object)
        scale = 2.0 ** -(frames.offset_exponent_ + frames.common.exponent_)
        mean = frames.common.mean_ + moved.astype(np.float32) * np.float32(scale)
        assert same_bits(rotation.mean_, mean)


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_exact_product(n: int, p: int, seed: int):
    rng = np.random.default_rng(seed)
    a = rng.choice([-32767, 32767, 5], (n, p)).astype(np.int64)
    b = rng.choice([-32767, 32767, -3], (p, n)).astype(np.int16)
    assert np.array_equal(exact_product(a, b), a.astype(object) @ b.astype(object))


@pytest.mark.parametrize("p", [5, 30, 32])
def test_a_short_list_of_classes_is_enough(p):
    """Of many classes a few are tried: what a row costs more for that is next to nothing."""
    x, _ = mixture(3000, 32, 20)
    frames = fit(x, 20, p)
    costs = twin_costs(frames, x)
    taken = np.take_along_axis(costs, frames.choose(x)[:, None], axis=1)[:, 0]
    assert (taken - costs.min(axis=1)).mean() < 0.05


@pytest.mark.parametrize(("p", "k"), [(80, 12), (96, 4)])
def test_some_of_many_axes_tell_most_classes_apart(p, k):
    """Finalists are found by half of the axes."""
    x, _ = mixture(3000, 96, k, apart=1.0)
    frames = fit(x, k, p)
    chosen = frames.choose(x)
    costs = twin_costs(frames, x)
    assert frames._costs is not None
    assert frames._costs.first < p
    taken = np.take_along_axis(costs, chosen[:, None], axis=1)[:, 0]
    assert (taken - costs.min(axis=1)).mean() < 0.3
    assert np.array_equal(frames.choose(x[2500:]), chosen[2500:])


def test_coarse_axes_are_inverted_as_they_are():
    """Entries of 2 bits: coefficients make up for what rounding did to the common axes and to
    those of each class."""
    x, _ = mixture(2000, 12, 3)
    frames = fit(x, 3, 6, exponent=2)
    row_class, c = frames.analyse(x)
    y = frames.inverse(np.rint(c * 4096), 1 / 4096, row_class)
    assert np.abs(x - y).max() < 0.01


def test_large_lattices_are_carried_in_float64():
    x, rows = mixture(40, 12, 3)
    frames = fit(x, 3, 6)
    lattice = np.random.default_rng(0).integers(-(2**22), 2**22, (40, 12)).astype(np.int32)
    y = frames.inverse(lattice, 1e-6, rows)
    for i in range(40):
        one = rotation_of(frames, rows[i])
        exact = lattice[i].astype(object) @ one.matrix_.T.astype(object)
        row = exact.astype(np.float64).astype(np.float32)
        row = row * np.float32(1e-6 * 2.0**-one.exponent_) + frames.means_[rows[i]]
        assert same_bits(y[i], row)


# -- any rows -------------------------------------------------------------------------------------
@pytest.mark.parametrize("noise", [1e-30, 1e-3, 1e6])
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((5, 7)),
        np.ones((1, 7)),
        np.full((40, 7), 1.001),
        np.eye(7)[:2],
        np.outer(np.arange(9.0), np.ones(7)),
        np.full((4, 1), 3.0),
        np.outer(np.random.default_rng(0).standard_normal(300), np.eye(7)[0]) * 1e6,
    ],
    ids=["zero", "one row", "constant", "rank 2", "rank 1", "one column", "one axis"],
)
def test_fit_on_degenerate_rows(x, noise):
    x = x.astype(np.float32)
    frames = fit(x, 3, noise=noise)
    for f in (frames, travelled(frames)):
        rows = f.choose(x)
        assert ((rows >= 0) & (rows < 3)).all()
        c = f.forward(x, rows)
        assert np.isfinite(c).all()
        assert np.isfinite(f.variances_).all()
        unit = 1e-3 * (1 + float(np.abs(x).max()))
        assert np.isfinite(f.inverse(np.rint(c / unit), unit, rows)).all()


# -- settings and what travels --------------------------------------------------------------------
@settings(max_examples=25)
@given(
    st.integers(1, 16),
    st.integers(2, 5),
    st.integers(1, 200),
    st.floats(-20, 3),
    st.integers(0, 99),
)
def test_frames_travel(d, k, n, log_noise, seed):
    """Read back, they choose, encode and decode as they did when fitted."""
    x, _ = mixture(n, d, k, seed=seed)
    frames = fit(x, k, 1 + seed % d, noise=10.0**log_noise)
    again = travelled(frames)
    rows = frames.choose(x)
    assert np.array_equal(again.choose(x), rows)
    assert same_bits(again.forward(x, rows), frames.forward(x, rows))
    lattice = np.rint(frames.forward(x, rows) * 50)
    assert same_bits(again.inverse(lattice, 0.02, rows), frames.inverse(lattice, 0.02, rows))
    assert again.get_config() == frames.get_config()
    for name, array in frames.arrays().items():
        assert same_bits(again.arrays()[name], array)
    assert again.noise_ == frames.noise_
    assert same_bits(again.variances_, frames.variances_)


@pytest.mark.parametrize("wrong", [{"n_classes": 1}, {"n_classes": 257}, {"n_leading": 0}])
def test_wrong_settings_are_refused(wrong):
    common = Rotation("klt").fit(np.eye(4, dtype=np.float32))
    with pytest.raises(InputError, match="expected"):
        Frames(common, **{"n_classes": 2, **wrong})
    with pytest.raises(InputError, match="klt"):
        Frames(Rotation("none"), n_classes=2)


def test_more_than_a_reader_takes_is_refused(monkeypatch):
    x, _ = mixture(50, 8, 2)
    frames = fit(x, 2)
    monkeypatch.setattr(module, "MAX_ENTRIES", 2 * 8 * 8 - 1)
    with pytest.raises(InputError, match="entries"):
        fit(x, 2)
    with pytest.raises(LimitError, match="entries"):
        travelled(frames)


@pytest.mark.parametrize(
    ("config", "arrays"),
    [
        ({"common": None}, {}),
        ({"common": {"kind": "none", "center": True}}, {}),
        ({"common": {"kind": "klt", "center": 3}}, {}),
        ({"turn_exponent": -1}, {}),
        ({"turn_exponent": 15}, {}),
        ({"turn_exponent": 1.0}, {}),
        ({"offset_exponent": 61}, {}),
        ({"offset_exponent": "0"}, {}),
        ({"noise": 513}, {}),
        ({"noise": None}, {}),
        ({}, {"turns": None}),
        ({}, {"offsets": None}),
        ({}, {"spectra": None}),
        ({}, {"turns": np.zeros((6, 4), np.int16)}),
        ({}, {"turns": np.zeros((12, 4), np.float32)}),
        ({}, {"turns": np.full((12, 4), -32768, np.int16)}),
        ({}, {"offsets": np.zeros((1, 4), np.int16)}),
        ({}, {"offsets": np.zeros((3, 9), np.int16)}),
        ({}, {"offsets": np.zeros((3, 0), np.int16)}),
        ({}, {"offsets": np.zeros(3, np.int16)}),
        ({}, {"offsets": np.zeros((3, 4), np.int64)}),
        ({}, {"offsets": np.full((3, 4), -32768, np.int16)}),
        ({}, {"spectra": np.zeros((3, 8), np.int16)}),
        ({}, {"spectra": np.zeros((3, 9), np.uint8)}),
        ({}, {"spectra": np.full((3, 9), 40, np.int16)}),
        ({}, {"spectra": np.full((3, 9), -20, np.int16)}),
    ],
)
def test_wrong_parts_are_refused(config, arrays):
    x, _ = mixture(200, 8, 3)
    frames = fit(x, 3, 4)
    travelled(frames)
    parts = {k: v for k, v in {**frames.arrays(), **arrays}.items() if v is not None}
    with pytest.raises(CorruptDataError, match="frames|rotation"):
        Frames.from_arrays({**frames.get_config(), **config}, parts, 8)


def test_products_are_exact_however_they_are_carried():
    """Both sides of the bound below which float32 does: the same as integers."""
    rng = np.random.default_rng(0)
    for largest in (3, 300, 2**15 - 1):
        a = rng.integers(-largest, largest, (70, 50), endpoint=True)
        b = rng.integers(-largest, largest, (50, 60), endpoint=True).astype(np.int16)
        assert (exact_product(a, b) == a @ b.astype(np.int64)).all()
