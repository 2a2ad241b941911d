"""Heads x stages of codebooks: fitting, searching, summing, storing, and allocating bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import check_quantizer, same_bits, vectors

from polarpack import residual
from polarpack.errors import CorruptDataError, InputError, NotFittedError
from polarpack.residual import ProductResidualQuantizer, ResidualQuantizer, allocate_bits

HEADS = [(0, 3, (4, 3)), (3, 4, ()), (4, 11, (5,)), (11, 40, (3, 4, 2)), (40, 41, (6, 6))]


def correlated(n: int = 700, d: int = 41, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / np.sqrt(d)
    return (x + rng.standard_normal(d)).astype(np.float32)


def squared_error(x: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    return np.square(x.astype(np.float64) - decoded).sum(axis=1)


def plain_decode(q: ProductResidualQuantizer, codes: np.ndarray, stages: int) -> np.ndarray:
    """The decoder in plain numpy, field by field."""
    out = np.broadcast_to(q.offset_, (codes.shape[0], q.offset_.size)).copy()
    for field, (stage, head) in enumerate(q._fields):
        part = slice(q.splits_[head], q.splits_[head + 1])
        words = q.codebooks_[field][codes[:, field]]
        if stage < stages:
            out[:, part] = words if stage == 0 else out[:, part] + words
    return out


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return correlated()


@pytest.fixture(scope="module")
def fitted(x) -> ProductResidualQuantizer:
    return ProductResidualQuantizer(HEADS, beam=3).fit(x)


# ------------------------------------------------------------------------------- properties


@settings(max_examples=40)
@given(vectors(max_d=30), st.sampled_from([1, 3]), st.booleans(), st.data())
def test_anything_can_be_fitted_and_coded(x, beam, spherical, data):
    d = x.shape[1]
    cut = data.draw(st.integers(1, d))
    heads = [(0, cut, (2, 1)), (cut, d, (3,) * data.draw(st.integers(0, 2)))][: 1 + (cut < d)]
    q = ProductResidualQuantizer(heads, beam=beam, spherical_first=spherical).fit(x)
    check_quantizer(q, x)
    check_quantizer(q, x[::2])


@settings(max_examples=20)
@given(vectors(min_n=1, max_n=30, max_d=8), st.integers(1, 3))
def test_added_stages_never_raise_the_training_error(x, beam):
    x = x.astype(np.float32)
    errors = []
    for n_stages in (1, 2, 3):
        q = ResidualQuantizer(n_stages, n_bits=2, beam=beam).fit(x)
        unit = np.abs(x).max() or 1.0
        errors.append(squared_error(x / unit, q.decode(q.encode(x)) / unit).sum())
    assert errors[1] <= errors[0] * (1 + 1e-5) + 1e-12
    assert errors[2] <= errors[1] * (1 + 1e-5) + 1e-12


def test_stages_do_not_depend_on_later_ones(x):
    books = ResidualQuantizer(3, n_bits=4, beam=2).fit(x).codebooks_
    shorter = ResidualQuantizer(2, n_bits=4, beam=2).fit(x).codebooks_
    assert all(same_bits(a, b) for a, b in zip(shorter, books, strict=False))


def test_the_beam_is_never_worse_than_greedy_in_any_row(x, fitted):
    greedy = ProductResidualQuantizer(HEADS, beam=1).load_arrays(fitted.arrays())
    fresh = correlated(seed=1)
    narrow = squared_error(fresh, greedy.decode(greedy.encode(fresh)))
    wide = squared_error(fresh, fitted.decode(fitted.encode(fresh)))
    assert (wide <= narrow * (1 + 1e-6)).all()
    assert wide.sum() < narrow.sum()


def test_a_wide_beam_finds_the_best_of_all_codes(x):
    q = ResidualQuantizer(3, n_bits=2, beam=16).fit(x)
    every = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    best = np.square(x[:, None].astype(np.float64) - q.decode(every)).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(squared_error(x, q.decode(q.encode(x))), best, rtol=1e-5)


@pytest.mark.parametrize("width", [5, 40])  # plain differences; matrix products
def test_extended_paths_are_the_best_of_all_extensions(width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, width)).astype(np.float32)
    books = [rng.standard_normal((16, width)).astype(np.float32) for _ in range(2)]
    paths = np.stack([rng.permutation(16)[:3] for _ in range(50)])[:, :, None].astype(np.uint16)
    out = residual._extend(x, books, paths, 6)
    for row, kept, before in zip(x.astype(np.float64), out, paths, strict=True):
        sums = books[0][before[:, 0]][:, None] + books[1][None]
        errors = np.square(row - sums).sum(axis=2)
        found = [errors[list(before[:, 0]).index(a), b] for a, b in kept]
        np.testing.assert_allclose(found, np.sort(errors.ravel())[:6], rtol=1e-4)
        assert len({tuple(path) for path in kept}) == 6


def test_more_bits_and_more_stages_mean_less_error(x):
    def error(*bits: int) -> float:
        q = ResidualQuantizer(len(bits), n_bits=bits).fit(x)
        return squared_error(x, q.decode(q.encode(x))).sum()

    assert error(2) > error(5) > error(5, 3) > error(5, 5) > error(5, 5, 5)


# ----------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_decoding_is_bit_for_bit_the_plain_sum(x, fitted, stages):
    codes = fitted.encode(x)
    decoded = fitted.decode(codes, stages=stages)
    assert same_bits(decoded, plain_decode(fitted, codes, stages))
    prefix = codes[:, : fitted.fields_of_stages(stages)]
    assert same_bits(fitted.decode(prefix, stages=stages), decoded)


def test_fields_come_stage_by_stage(fitted):
    assert fitted.n_fields == 8
    assert fitted.n_stages == 3
    assert fitted.alphabet_sizes.tolist() == [16, 32, 8, 64, 8, 16, 64, 4]
    assert [fitted.fields_of_stages(s) for s in range(4)] == [0, 4, 7, 8]
    assert [b.shape for b in fitted.codebooks_[:2]] == [(16, 3), (32, 7)]


def test_a_head_without_bits_decodes_to_its_mean(x, fitted):
    column = fitted.decode(fitted.encode(x))[:, 3]
    np.testing.assert_allclose(column, x[:, 3].mean(), rtol=1e-6)
    nothing = ProductResidualQuantizer([(0, 41, ())]).fit(x)
    codes = nothing.encode(x)
    assert codes.shape == (700, 0)
    assert nothing.n_stages == 0
    off = np.abs(nothing.decode(codes)[0] - x.mean(axis=0))
    assert (off <= x.std(axis=0) / 63).all()


def test_sixteen_bit_codes(x):
    q = ResidualQuantizer(2, n_bits=(9, 4)).fit(x)
    codes = q.encode(x)
    assert codes.dtype == np.uint16
    assert same_bits(q.decode(codes), plain_decode(q, codes, 2))


def test_torch(x, fitted):
    codes = fitted.encode(torch.from_numpy(x))
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes.numpy(), fitted.encode(x))
    assert same_bits(fitted.decode(codes).numpy(), fitted.decode(codes.numpy()))
    assert torch.equal(fitted.encode(torch.from_numpy(x).double()), codes)


def test_blocks_and_threads_change_nothing(x, fitted, monkeypatch):
    codes = fitted.encode(x)
    decoded = fitted.decode(codes)
    monkeypatch.setattr(residual, "BLOCK_ROWS", 33)
    for threads in ("1", "3"):
        monkeypatch.setenv("POLARPACK_THREADS", threads)
        assert same_bits(fitted.encode(x), codes)
        assert same_bits(fitted.decode(codes), decoded)


# ---------------------------------------------------------------------------------- codebooks


def test_spherical_codewords_share_one_radius_the_least_squares_one():
    x = correlated(d=8) - correlated(d=8).mean(axis=0)
    q = ProductResidualQuantizer([(0, 4, (4, 4)), (4, 8, (4,))], spherical_first=True).fit(x)
    for field, part in ((0, slice(0, 4)), (1, slice(4, 8))):
        radii = np.linalg.norm(q.codebooks_[field], axis=1)
        np.testing.assert_allclose(radii, radii[0], rtol=1e-3)
        words = q.codebooks_[field][q.encode(x)[:, field]] / radii[0]
        np.testing.assert_allclose(radii[0], (x[:, part] * words).sum(axis=1).mean(), rtol=1e-2)


@pytest.mark.parametrize("power", [-120, -60, 0, 60, 120])
def test_codes_do_not_depend_on_the_scale(x, fitted, power):
    scaled = np.ldexp(x, power)
    q = ProductResidualQuantizer(HEADS, beam=3).fit(scaled)
    assert np.array_equal(q.encode(scaled), fitted.encode(x))
    np.testing.assert_allclose(
        np.ldexp(q.decode(q.encode(scaled)), -power), fitted.decode(fitted.encode(x)), rtol=1e-6
    )


@pytest.mark.parametrize("largest", [3.4028235e38, 1e-44])
def test_ends_of_float32(largest):
    x = np.array([[1.0, -1.0], [-1.0, 0.5], [0.25, 0.0]]) * largest
    q = ResidualQuantizer(1, n_bits=2).fit(x.astype(np.float32))
    decoded = q.decode(q.encode(x.astype(np.float32)))
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded / largest, x / largest, atol=1e-3 if largest > 1 else 0.15)


def test_rows_far_outside_the_training_range(fitted):
    far = np.full((3, 41), 1e30, np.float32)
    far[1] *= -1
    decoded = fitted.decode(fitted.encode(far))
    assert np.isfinite(decoded).all()
    tiny = ProductResidualQuantizer(HEADS, beam=3).fit(correlated() * 1e-30)
    assert np.isfinite(tiny.decode(tiny.encode(far))).all()


def test_a_mean_far_from_zero_costs_no_precision():
    x = correlated(d=6)
    near, far = (ResidualQuantizer(2, n_bits=6).fit(x + shift) for shift in (0.0, 1e3))
    shifted = x + np.float32(1e3)
    plain = squared_error(x, near.decode(near.encode(x))).sum()
    assert squared_error(shifted, far.decode(far.encode(shifted))).sum() < 1.1 * plain
    assert "offset" in far.arrays()
    centred = ResidualQuantizer(2, n_bits=6).fit(x - x.mean(axis=0))
    assert set(centred.arrays()) == {"codebooks", "exponents"}


def test_fit_again_forgets_and_is_reproducible(x):
    q = ResidualQuantizer(2, n_bits=4, seed=3).fit(x[:, :5]).fit(x)
    again = ResidualQuantizer(2, n_bits=4, seed=3).fit(x)
    assert same_bits(q.arrays()["codebooks"], again.arrays()["codebooks"])
    other = ResidualQuantizer(2, n_bits=4, seed=4).fit(x)
    assert not same_bits(q.arrays()["codebooks"], other.arrays()["codebooks"])


def test_fit_on_a_sample_of_many_rows(monkeypatch, x):
    monkeypatch.setattr(residual, "ROWS_PER_CENTROID", 20)
    q = ResidualQuantizer(2, n_bits=4, beam=3).fit(x)
    full = x.var(axis=0).sum() * x.shape[0]
    assert squared_error(x, q.decode(q.encode(x))).sum() < 0.8 * full


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "heads",
    [
        [],
        [(1, 3, (2,))],
        [(0, 3, (2,)), (4, 5, (2,))],
        [(0, 3, (2,)), (2, 5, (2,))],
        [(0, 0, (2,))],
        [(0, 3, (0,))],
        [(0, 3, (17,))],
        [(0, 3, 8)],
        [(0, 3, (1,) * 65)],
        [(0, 2.5, (1,))],
    ],
)
def test_bad_heads(heads):
    with pytest.raises(InputError):
        ProductResidualQuantizer(heads)


def test_bad_arguments(x, fitted):
    for arguments in ({"beam": 0}, {"beam": 257}, {"seed": -1}, {"n_bits": [8, 8]}, {"n_bits": 0}):
        with pytest.raises(InputError):
            ResidualQuantizer(4, **arguments)
    with pytest.raises(InputError, match=r"\(n, 41\), got \(n, 40\)"):
        ProductResidualQuantizer(HEADS).fit(x[:, :40])
    with pytest.raises(InputError, match=r"\(n, 41\)"):
        fitted.encode(x[:, :40])
    codes = fitted.encode(x)
    for wrong in (codes[:, :-1], codes.astype(np.float32), np.full_like(codes, 255), codes[0]):
        with pytest.raises(InputError):
            fitted.decode(wrong)
    for stages in (0, 4, True):
        with pytest.raises(InputError):
            fitted.decode(codes, stages=stages)
    with pytest.raises(InputError, match="row 5"):
        fitted.encode(np.where(np.arange(700)[:, None] == 5, np.inf, x))
    for config in ({"n_layers": 3}, {"n_stages": "four"}):
        with pytest.raises(InputError):
            ResidualQuantizer.from_config(config)
    with pytest.raises(InputError):
        ProductResidualQuantizer.from_config({"heads": [[0, 3]]})


def test_before_fit():
    q = ResidualQuantizer(2)
    assert q.n_fields == 2
    assert not q.is_fitted
    for use in (
        lambda: q.encode(np.zeros((1, 2))),
        lambda: q.decode(np.zeros((1, 2), int)),
        q.arrays,
    ):
        with pytest.raises(NotFittedError):
            use()


def changed(arrays: dict, **changes: np.ndarray | None) -> dict:
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def test_corrupt_arrays(fitted):
    good = fitted.arrays()
    books, exponents, offset = good["codebooks"], good["exponents"], good["offset"]
    with_nan = books.copy()
    with_nan[-1] = np.nan
    with_inf = offset.copy()
    with_inf[0] = np.inf
    for bad in (
        {"codebooks": None},
        {"codebooks": books[:-1]},
        {"codebooks": books.astype(np.float32)},
        {"codebooks": with_nan},
        {"exponents": exponents[:-1]},
        {"exponents": exponents.astype(np.int32)},
        {"exponents": np.full_like(exponents, 32767)},
        {"exponents": np.full_like(exponents, -32768)},
        {"offset": offset[:-1]},
        {"offset": with_inf},
        {"more": offset},
    ):
        with pytest.raises(CorruptDataError):
            ProductResidualQuantizer(HEADS).load_arrays(changed(good, **bad))
    rq = ResidualQuantizer(2, n_bits=3).fit(correlated(d=5))
    for size in (0, 79):
        with pytest.raises(CorruptDataError):
            ResidualQuantizer(2, n_bits=3).load_arrays(
                changed(rq.arrays(), codebooks=np.zeros(size, np.float16), offset=None)
            )


# -------------------------------------------------------------------------------- allocation


@given(
    st.lists(st.floats(0, 1e30), min_size=1, max_size=60),
    st.integers(0, 400),
    st.integers(1, 16),
    st.integers(1, 4),
)
def test_allocated_heads_tile_the_row_within_the_budget(variances, total, max_bits, n_stages):
    variances = np.sort(variances)[::-1]
    heads = allocate_bits(variances, total, max_bits=max_bits, n_stages=n_stages)
    edges = [0, *(stop for _, stop, _ in heads)]
    assert [start for start, _, _ in heads] == edges[:-1]
    assert edges[-1] == len(variances)
    assert all(stop > start for start, stop, _ in heads)
    assert sum(sum(bits) for _, _, bits in heads) <= total
    assert all(1 <= b <= max_bits for _, _, bits in heads for b in bits)
    assert all(len(bits) <= n_stages for start, stop, bits in heads if stop - start > 1)


def test_allocation_spends_all_bits_where_they_are_deserved():
    variances = 0.97 ** np.arange(384)
    for total, n_stages in ((192, 1), (192, 4), (384, 2), (389, 3)):
        heads = allocate_bits(variances, total, n_stages=n_stages)
        assert sum(sum(bits) for _, _, bits in heads) == total
        widths = [stop - start for start, stop, bits in heads if bits]
        assert np.diff(widths).min() >= -1  # up to the rounding of cuts
    assert allocate_bits(np.array([4.0, 1e-9]), 8) == [(0, 1, (8,)), (1, 2, ())]
    assert allocate_bits(np.ones(8), 16, n_stages=1) == [(0, 4, (8,)), (4, 8, (8,))]
    assert allocate_bits(np.zeros(3), 16) == [(0, 3, ())]
    assert allocate_bits(np.ones(3), 0) == [(0, 3, ())]
    assert allocate_bits(np.ones(1), 20, n_stages=1) == [(0, 1, (7, 7, 6))]


def test_allocation_beats_equal_bits():
    rng = np.random.default_rng(0)
    deviations = 0.8 ** np.arange(16)
    x = (rng.standard_normal((2000, 16)) * deviations).astype(np.float32)
    errors = []
    for heads in (
        allocate_bits(deviations**2, 16, max_bits=4, n_stages=2),
        [(8 * i, 8 * i + 8, (4, 4)) for i in range(2)],
    ):
        q = ProductResidualQuantizer(heads, beam=4).fit(x)
        errors.append(squared_error(x, q.decode(q.encode(x))).sum())
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize("bad", [[], [[1.0]], [-1.0], [np.nan], [np.inf]])
def test_bad_variances(bad):
    with pytest.raises(InputError):
        allocate_bits(bad, 8)
