"""Rotations: exact inverses whatever the order of summation, and what fitting owes any data."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import same_bits, vectors

from polarpack.errors import CorruptDataError, InputError, LimitError, NotFittedError
from polarpack.rotation import (
    EXACT_FLOAT32,
    HADAMARD_EXPONENT,
    KINDS,
    MAX_HADAMARD,
    Rotation,
    axes_exponent,
    covariance,
    hadamard_matrix,
    principal_axes,
    random_axes,
    trellis_order,
)

HADAMARD_4 = [
    [-512, 512, -512, 512],
    [512, 512, 512, 512],
    [512, 512, -512, -512],
    [512, -512, -512, 512],
]


def gaussian(n: int, d: int, *, seed: int = 0) -> np.ndarray:
    """Correlated rows with a falling spectrum and a mean, (n, d) float32."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((d, d)))[0] * 0.9 ** np.arange(d)
    return (rng.standard_normal((n, d)) @ axes.T + rng.standard_normal(d)).astype(np.float32)


def travelled(rotation: Rotation) -> Rotation:
    return Rotation.from_arrays(rotation.get_config(), rotation.arrays(), rotation.d_)


def twin_inverse(rotation: Rotation, lattice: np.ndarray, unit: float) -> np.ndarray:
    """The same in Python's integers, one rounding to float32 and one product and sum after it."""
    c = lattice.astype(object)
    if rotation.matrix_ is not None:
        c = c @ rotation.matrix_.astype(object).T
    y = c.astype(np.float64).astype(np.float32)  # |c| < 2^53
    y = y * np.float32(unit * 2.0**-rotation.exponent_)
    return y + rotation.mean_ if rotation.center else y


# -- exactness ------------------------------------------------------------------------------------
@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(0, 6),
    st.sampled_from([1, 40, 3000, 65534]),
    st.integers(0, 2**32 - 1),
)
def test_inverse_equals_integer_arithmetic(kind: Any, d: int, n: int, size: int, seed: int):
    rotation = Rotation(kind, seed=seed % 1000).fit(gaussian(2 * d + 3, d, seed=seed))
    lattice = np.random.default_rng(seed).integers(-size, size + 1, (n, d))
    y = rotation.inverse(lattice, 0.37)
    assert y.dtype == np.float32
    assert same_bits(y, twin_inverse(rotation, lattice, 0.37))
    for dtype in (np.int32, np.float32, np.float64):
        assert same_bits(rotation.inverse(lattice.astype(dtype), 0.37), y)


@pytest.mark.parametrize("d", [64, 200])
def test_inverse_is_the_same_in_any_order_of_summation(d):
    """Summed front to back, back to front, shuffled, in blocks; one row or many at once."""
    rotation = Rotation("klt").fit(gaussian(3 * d, d))
    rng = np.random.default_rng(0)
    lattice = rng.integers(-400, 401, (300, d)).astype(np.int32)
    assert rotation.matrix_ is not None
    norms = np.linalg.norm(rotation.matrix_.astype(float), axis=1).max()
    assert np.linalg.norm(lattice, axis=1).max() * norms < EXACT_FLOAT32  # float32 carries it
    y = rotation.inverse(lattice, 0.1)
    for order in (np.arange(d)[::-1], rng.permutation(d)):
        shuffled = Rotation.of(rotation.matrix_[:, order], rotation.exponent_, rotation.mean_)
        assert same_bits(shuffled.inverse(lattice[:, order], 0.1), y)
    c, s = lattice.astype(np.float32), rotation.matrix_.astype(np.float32)
    one_by_one = np.zeros((300, d), np.float32)
    for j in range(d):
        one_by_one += c[:, j, None] * s[:, j]
    scaled = one_by_one * np.float32(0.1 * 2.0**-rotation.exponent_) + rotation.mean_
    assert same_bits(scaled, y)
    for rows in (slice(0, 1), slice(7, 8), slice(0, 17), slice(100, 300)):
        assert same_bits(rotation.inverse(lattice[rows], 0.1), y[rows])


def test_one_large_row_does_not_change_its_neighbours():
    """A batch that float32 cannot carry goes through float64, with the same bits."""
    d = 96
    rotation = Rotation("klt").fit(gaussian(3 * d, d))
    lattice = np.random.default_rng(0).integers(-50, 51, (40, d))
    y = rotation.inverse(lattice, 0.1)
    lattice[3] = 65534
    assert rotation._row_norm * np.linalg.norm(lattice[3]) > EXACT_FLOAT32
    wide = rotation.inverse(lattice, 0.1)
    assert same_bits(np.delete(wide, 3, axis=0), np.delete(y, 3, axis=0))
    assert same_bits(wide, twin_inverse(rotation, lattice, 0.1))


def test_extreme_integers_stay_exact():
    """The largest matrix a file may hold, times the largest lattice points."""
    d = 300
    rng = np.random.default_rng(0)
    matrix = rng.integers(-32767, 32768, (d, d)).astype(np.int16)
    rotation = Rotation.of(matrix, 14, np.zeros(d, np.float32))
    lattice = rng.choice([-65534, 65534], (5, d))
    assert same_bits(rotation.inverse(lattice, 1.0), twin_inverse(rotation, lattice, 1.0))
    aligned = np.sign(matrix[:5].astype(np.int64)) * 65534  # sums as large as they get
    assert same_bits(rotation.inverse(aligned, 1.0), twin_inverse(rotation, aligned, 1.0))


def test_threads_of_the_matrix_product_do_not_matter():
    script = (
        "import hashlib, numpy as np\n"
        "from polarpack.rotation import Rotation, hadamard_matrix\n"
        "r = Rotation.of(hadamard_matrix(384, 5), 10, np.linspace(-1, 1, 384, dtype=np.float32))\n"
        "c = np.random.default_rng(0).integers(-300, 301, (2000, 384))\n"
        "print(hashlib.sha256(r.inverse(c, 0.013).tobytes()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        child = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **dict.fromkeys(names, threads)},
        )
        found.add(child.stdout)
    assert len(found) == 1


# -- geometry -------------------------------------------------------------------------------------
@settings(max_examples=60)
@given(st.sampled_from(KINDS), vectors(min_n=1, dtypes=("float32",), log10_scale=(-3.0, 3.0)))
def test_forward_then_inverse_is_the_identity(kind: Any, x: np.ndarray):
    rotation = Rotation(kind).fit(x)
    c = rotation.forward(x)
    assert c.shape == x.shape
    assert rotation.variances_.shape == (x.shape[1],)
    assert np.isfinite(rotation.variances_).all()
    assert (rotation.variances_ >= 0).all()
    size = np.abs(x).max() + np.abs(rotation.mean_).max() + 1e-30
    unit = float(np.float32(size * 2.0**-14))
    y = rotation.inverse(np.rint(c / np.float32(unit)), unit)
    assert y == pytest.approx(x, abs=unit * np.sqrt(x.shape[1]) + 1e-5 * size)


@pytest.mark.parametrize("kind", ["klt", "random", "hadamard"])
@pytest.mark.parametrize("d", [1, 2, 3, 31, 64, 100])
def test_axes_are_nearly_orthonormal(kind, d):
    rotation = Rotation(kind).fit(gaussian(3 * d, d))
    assert rotation.matrix_ is not None
    s = rotation.matrix_ * 2.0**-rotation.exponent_
    assert np.abs(s.T @ s - np.eye(d)).max() < 0.05
    assert s.T @ rotation.analysis == pytest.approx(np.eye(d), abs=1e-5)
    x = gaussian(50, d, seed=1)
    norm = np.linalg.norm(x - rotation.mean_, axis=1)
    assert np.linalg.norm(rotation.forward(x), axis=1) == pytest.approx(norm, rel=0.15)


@pytest.mark.parametrize("d", [48, 384])
def test_rounding_costs_little(d):
    """White noise of the coefficients grows by d 4^-exponent / 12 on its way to the rows."""
    gains = []
    for seed in range(20):
        rotation = Rotation("random", seed=seed).fit(np.zeros((1, d), np.float32))
        assert rotation.exponent_ == axes_exponent(d)
        gains.append(np.square(rotation.matrix_ * 2.0**-rotation.exponent_).sum() / d - 1)
    assert np.mean(gains) == pytest.approx(d * 4.0**-rotation.exponent_ / 12, abs=5e-4)
    assert 10 * np.log10(1 + np.mean(gains)) < 0.01


@given(st.integers(1, 70), st.integers(0, 2**31 - 1))
def test_hadamard_of_any_size(d: int, seed: int):
    matrix = hadamard_matrix(d, seed).astype(np.int64)
    gram = matrix.T @ matrix
    assert np.array_equal(gram, np.diag(np.diag(gram)))  # columns exactly orthogonal
    assert np.diag(gram) == pytest.approx(4.0**HADAMARD_EXPONENT, rel=0.02)
    assert np.array_equal(hadamard_matrix(d, seed), matrix)
    sizes = sorted({int((column != 0).sum()) for column in matrix.T})
    assert sizes == [1 << b for b in range(d.bit_length()) if d >> b & 1]


def test_hadamard_is_made_of_integers_alone():
    """Pinned: files store the seed, not the matrix."""
    assert hadamard_matrix(3, 7).tolist() == [[724, 724, 0], [724, -724, 0], [0, 0, 1024]]
    assert hadamard_matrix(4, 2**31 - 1).tolist() == HADAMARD_4
    assert (hadamard_matrix(64, 1) != hadamard_matrix(64, 2)).any()


def test_random_axes_are_uniform_and_reproducible():
    axes = random_axes(30, 4)
    assert axes.T @ axes == pytest.approx(np.eye(30), abs=1e-12)
    assert np.array_equal(axes, random_axes(30, 4))
    assert not np.array_equal(axes, random_axes(30, 5))
    assert abs(np.mean([random_axes(3, seed)[0, 0] for seed in range(400)])) < 0.1


@given(st.integers(1, 300))
def test_trellis_order_is_a_permutation_with_weak_components_first(m: int):
    order = trellis_order(m)
    assert sorted(order.tolist()) == list(range(m))
    few = min(8, m // 2)
    assert order[few:].tolist() == list(range(m - few))
    assert order[:few].tolist() == list(range(m - 1, m - 1 - few, -1))


# -- fitting --------------------------------------------------------------------------------------
def test_klt_decorrelates_and_sorts():
    x = gaussian(4000, 24)
    rotation = Rotation("klt").fit(x)
    cov = np.cov(rotation.forward(x).T, bias=True)
    assert np.diag(cov) == pytest.approx(rotation.variances_, rel=0.02)
    scale = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    assert np.abs(cov / scale - np.eye(24)).max() < 0.1  # the axes are rounded
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    assert rotation.variances_ == pytest.approx(values, rel=0.05)
    assert rotation.mean_ == pytest.approx(x.mean(axis=0), abs=2e-3)
    in_order = Rotation("klt", for_trellis=True).fit(x)
    order = trellis_order(24)
    assert np.array_equal(in_order.matrix_, rotation.matrix_[:, order])
    assert in_order.variances_ == pytest.approx(rotation.variances_[order], rel=1e-6)


def test_without_a_centre_axes_follow_second_moments():
    x = gaussian(2000, 6) * 0.1 + np.float32(3)
    rotation = Rotation("klt", center=False).fit(x)
    assert not rotation.mean_.any()
    assert "mean" not in rotation.arrays()
    c = rotation.forward(x)
    assert np.square(c[:, 0]).mean() > 0.99 * np.square(c).mean() * 6
    assert rotation.variances_ == pytest.approx(np.square(c, dtype=float).mean(axis=0), rel=1e-3)


@pytest.mark.parametrize("m", [1, 5, 12, 40])
def test_leading_components(m):
    x = gaussian(500, 12)
    rotation = Rotation("klt", n_components=m).fit(x)
    kept = min(m, 12)
    assert rotation.n_components_ == kept
    c = rotation.forward(x)
    assert c.shape == (500, kept)
    y = rotation.inverse(np.rint(c * 1024), 2.0**-10)
    lost = np.linalg.eigvalsh(np.cov(x.T, bias=True))[: 12 - kept].sum()
    assert np.square(x - y).sum() / 500 == pytest.approx(lost, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [None, 0, 1, 4])
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((5, 7)),
        np.ones((1, 7)),
        np.eye(7)[:2],
        np.arange(21.0).reshape(3, 7),
        np.outer(np.arange(9.0), np.ones(7)),
        np.full((4, 1), 3.0),
        np.zeros((0, 7)),
    ],
    ids=["zero", "one row", "rank 2", "rank 1", "one axis", "d = 1", "no rows"],
)
def test_fit_on_degenerate_rows(kind, exponent, x):
    x = x.astype(np.float32)
    rotation = Rotation(kind, exponent=exponent).fit(x)
    c = rotation.forward(x)
    assert np.isfinite(c).all()
    assert np.isfinite(rotation.variances_).all()
    assert np.isfinite(rotation.inverse(np.rint(c), 1.0)).all()


def test_axes_rounded_to_dependence_give_the_least_squares_coefficients():
    matrix = np.array([[1, 1], [0, 0], [0, 0]], np.int16)
    rotation = Rotation.of(matrix, 0, np.zeros(3, np.float32))
    c = rotation.forward(np.array([[2.0, 5.0, 5.0]], np.float32))
    assert c @ matrix.T == pytest.approx(np.array([[2.0, 0.0, 0.0]]), abs=1e-5)


def test_covariance_in_blocks():
    x = gaussian(20000, 5)
    mean, cov = covariance(x)
    assert mean == pytest.approx(x.mean(axis=0, dtype=np.float64))
    assert cov == pytest.approx(np.cov(x.T.astype(np.float64), bias=True))
    values, axes = principal_axes(cov)
    assert (np.diff(values) <= 0).all()
    assert axes * values @ axes.T == pytest.approx(cov)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) > 0).all()


# -- settings and what travels --------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "pca"},
        {"n_components": 0},
        {"exponent": -1},
        {"exponent": 15},
        {"seed": -1},
        {"seed": 1 << 31},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match="expected"):
        Rotation(**wrong)


def test_use_before_fit():
    with pytest.raises(NotFittedError):
        Rotation().forward(np.zeros((1, 2), np.float32))


def test_huge_hadamard_matrices_are_refused():
    with pytest.raises(InputError, match="dimensions"):
        Rotation("hadamard").fit(np.zeros((1, MAX_HADAMARD + 1), np.float32))
    with pytest.raises(LimitError):
        Rotation.from_arrays({"kind": "hadamard", "center": False}, {}, MAX_HADAMARD + 1)


@given(st.sampled_from(KINDS), st.booleans(), st.integers(1, 20), st.integers(0, 1000))
def test_rotations_travel(kind: Any, center: bool, d: int, seed: int):
    x = gaussian(30, d, seed=seed)
    rotation = Rotation(kind, center=center, seed=seed).fit(x)
    again = travelled(rotation)
    assert same_bits(again.forward(x), rotation.forward(x))
    lattice = np.random.default_rng(seed).integers(-99, 100, (4, d))
    assert same_bits(again.inverse(lattice, 0.1), rotation.inverse(lattice, 0.1))
    assert again.get_config() == rotation.get_config()


GOOD = {
    "mean": np.zeros(3, np.float16),
    "matrix": np.eye(3, dtype=np.int16),
}


@pytest.mark.parametrize(
    ("config", "arrays"),
    [
        ({"kind": "pca"}, {}),
        ({"kind": None}, {}),
        ({"center": 1}, {}),
        ({"exponent": 15}, {}),
        ({"exponent": -1}, {}),
        ({"exponent": 1.0}, {}),
        ({"exponent": True}, {}),
        ({"seed": -1}, {}),
        ({"seed": "1"}, {}),
        ({}, {"mean": np.zeros(3, np.float32)}),
        ({}, {"mean": np.zeros(4, np.float16)}),
        ({}, {"mean": np.array([0, np.nan, 0], np.float16)}),
        ({}, {"mean": np.array([0, np.inf, 0], np.float16)}),
        ({}, {"matrix": None}),
        ({}, {"matrix": np.eye(3)}),
        ({}, {"matrix": np.eye(4, dtype=np.int16)}),
        ({}, {"matrix": np.zeros(3, np.int16)}),
        ({}, {"matrix": np.zeros((3, 0), np.int16)}),
        ({}, {"matrix": np.zeros((3, 4), np.int16)}),
        ({}, {"matrix": np.full((3, 3), -32768, np.int16)}),
    ],
)
def test_wrong_arrays_are_refused(config, arrays):
    good = {"kind": "klt", "center": True, "exponent": 0}
    Rotation.from_arrays(good, GOOD, 3)
    given = {k: v for k, v in {**GOOD, **arrays}.items() if v is not None}
    with pytest.raises(CorruptDataError, match="rotation"):
        Rotation.from_arrays({**good, **config}, given, 3)
