"""Product quantization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import check_quantizer, same_bits, vectors

from polarpack.errors import CorruptDataError, InputError, NotFittedError
from polarpack.product import ProductQuantizer


def gaussian(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> ProductQuantizer:
    return ProductQuantizer(3, n_bits=(4, 5, 3)).fit(gaussian(400, 11))


@settings(max_examples=50)
@given(vectors(max_d=24), st.data())
def test_anything_can_be_fitted_and_coded(x, data):
    m = data.draw(st.integers(1, x.shape[1]))
    q = ProductQuantizer(m, n_bits=data.draw(st.integers(1, 4))).fit(x)
    codes = check_quantizer(q, x)
    decoded = q.decode(codes)
    # Coding what was decoded loses nothing more.
    assert same_bits(q.decode(q.encode(decoded)), decoded)


@pytest.mark.parametrize("n_bits", range(1, 11))
def test_known_codewords_come_back_exactly(n_bits):
    words = np.round(gaussian(1 << n_bits, 6) * 64) / 64  # of few bits, so exact in float16
    words -= words.mean(axis=0)
    words = np.round(words * 64) / 64
    q = ProductQuantizer(2, n_bits=n_bits).fit(words.astype(np.float32))
    rng = np.random.default_rng(1)
    mixed = np.concatenate([rng.permutation(words[:, :3]), rng.permutation(words[:, 3:])], axis=1)
    mixed = mixed.astype(np.float32)
    np.testing.assert_allclose(q.decode(q.encode(mixed)), mixed, atol=2e-3)


@pytest.mark.parametrize(
    ("d", "m", "sizes"), [(12, 4, [3] * 4), (11, 3, [4, 4, 3]), (5, 5, [1] * 5)]
)
def test_slices_are_those_of_array_split(d, m, sizes):
    q = ProductQuantizer(m, n_bits=2).fit(gaussian(50, d))
    assert np.diff(q.splits_).tolist() == sizes
    assert [len(part) for part in np.array_split(np.arange(d), m)] == sizes


def test_given_splits():
    q = ProductQuantizer(3, n_bits=2, splits=[0, 1, 7, 8]).fit(gaussian(50, 8))
    assert [book.shape for book in q.codebooks_] == [(4, 1), (4, 6), (4, 1)]
    check_quantizer(q, gaussian(9, 8, 1))


@pytest.mark.parametrize(
    ("d", "m", "n_bits"), [(5, 5, 3), (21, 7, 4), (32, 4, 8), (34, 2, 5), (60, 2, 5), (10, 2, 9)]
)
def test_encode_is_the_plain_search_and_decode_the_plain_lookup(d, m, n_bits):
    x, fresh = gaussian(600, d), gaussian(100, d, 1)
    q = ProductQuantizer(m, n_bits=n_bits).fit(x)
    codes = q.encode(fresh)
    assert codes.dtype == (np.uint8 if n_bits <= 8 else np.uint16)
    for i, part in enumerate(np.array_split(fresh.astype(np.float64), m, axis=1)):
        plain = np.square(part[:, None] - q.codebooks_[i]).sum(axis=2)
        chosen = np.take_along_axis(plain, codes[:, i : i + 1].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, plain.min(axis=1), rtol=1e-5)
    words = [book[codes[:, i]] for i, book in enumerate(q.codebooks_)]
    assert same_bits(q.decode(codes), np.concatenate(words, axis=1))


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_adc_is_the_distance_to_the_decoded(fitted, metric):
    queries, codes = gaussian(7, 11, 2), fitted.encode(gaussian(30, 11, 3))
    tables = fitted.adc_tables(queries, metric)
    assert tables.shape == (7, 3, 32)
    assert tables.dtype == np.float32
    summed = tables[:, np.arange(3), codes].sum(axis=2, dtype=np.float64)
    decoded = fitted.decode(codes).astype(np.float64)
    if metric == "l2":
        plain = np.square(queries[:, None] - decoded).sum(axis=2)
    else:
        plain = queries.astype(np.float64) @ decoded.T
    np.testing.assert_allclose(summed, plain, rtol=1e-5, atol=1e-5)
    assert np.isinf(tables[:, 0, 16:]).all()
    assert np.isfinite(tables[:, 1]).all()
    from_torch = fitted.adc_tables(torch.from_numpy(queries), metric)
    assert same_bits(from_torch, tables)


def test_adc_of_bad_queries(fitted):
    for queries, metric in ((gaussian(2, 10), "l2"), (gaussian(2, 11), "cosine")):
        with pytest.raises(InputError):
            fitted.adc_tables(queries, metric)
    with pytest.raises(NotFittedError):
        ProductQuantizer(3).adc_tables(gaussian(2, 11))


def test_as_good_as_faiss():
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    x = (gaussian(6000, 16) @ rng.standard_normal((16, 16))).astype(np.float32)
    train, fresh = x[:5000], x[5000:]
    ours = ProductQuantizer(4, n_bits=6).fit(train)
    theirs = faiss.ProductQuantizer(16, 4, 6)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # its threads spin where others want the cores
    theirs.train(train)
    faiss.omp_set_num_threads(threads)
    errors = [
        np.square(fresh - decoded).sum()
        for decoded in (
            ours.decode(ours.encode(fresh)),
            theirs.decode(theirs.compute_codes(fresh)),
        )
    ]
    assert errors[0] < 1.02 * errors[1]


def test_spherical():
    x = gaussian(500, 8)
    q = ProductQuantizer(2, n_bits=4, spherical=True).fit(x)
    radii = np.linalg.norm(q.codebooks_[0], axis=1)
    np.testing.assert_allclose(radii, radii[0], rtol=1e-3)
    check_quantizer(q, x)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_subquantizers": 0},
        {"n_bits": 17},
        {"n_bits": (8, 8)},
        {"n_bits": "8"},
        {"splits": [0, 2, 4]},
        {"splits": [1, 2, 3, 4]},
        {"splits": [0, 2, 2, 4]},
        {"seed": -1},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(InputError):
        ProductQuantizer(**{"n_subquantizers": 3, **arguments})


def test_bad_widths(fitted):
    with pytest.raises(InputError, match="at least 5 columns"):
        ProductQuantizer(5).fit(gaussian(9, 4))
    with pytest.raises(InputError, match=r"\(n, 8\)"):
        ProductQuantizer(2, splits=[0, 3, 8]).fit(gaussian(9, 7))
    with pytest.raises(InputError):
        fitted.encode(gaussian(9, 10))


def test_corrupt_splits(fitted):
    good = fitted.arrays()
    assert good["splits"].tolist() == [0, 4, 8, 11]
    for splits in ([0, 4, 7, 11], [0, 4, 8], [0, 1, 1, 2], [0, 0, 0, -3], [0, 0, 0, 0]):
        bad = {**good, "splits": np.array(splits, np.int32)}
        with pytest.raises(CorruptDataError):
            ProductQuantizer.from_config(fitted.get_config()).load_arrays(bad)
    del good["splits"]
    with pytest.raises(CorruptDataError, match="'splits' is missing"):
        ProductQuantizer.from_config(fitted.get_config()).load_arrays(good)
