"""The code for GPUs, on torch's CPU device against the numpy core, and on a GPU where there is one.

Everything but the choice of the device is the same there and here.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import polarpack as pp
from polarpack import _cuda, clustering
from polarpack.clustering import nearest

D = 24


def made(n: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Six groups with falling spectra of their own."""
    rng = np.random.default_rng(seed)
    shape = np.random.default_rng(99)
    means = shape.standard_normal((6, D))
    spread = np.arange(1, D + 1) ** -0.7 * np.exp(0.7 * shape.standard_normal((6, D)))
    group = rng.integers(0, 6, n)
    return (means[group] + rng.standard_normal((n, D)) * spread[group]).astype(dtype)


CHAINS = {
    "pq": lambda x: pp.preset("pq", 2.0).fit(x),
    "prq": lambda x: pp.preset("prq", 4.0).fit(x),
    "polar_vq": lambda x: pp.preset("polar_vq", 2.0).fit(x),
    "opq": lambda x: pp.preset("opq", 1.0).fit(x),
    "trellis": lambda x: pp.preset("trellis", 2.0).fit(x),
    "polar_trellis": lambda x: pp.preset("polar_trellis", 2.0).fit(x),
    "classes": lambda x: pp.PolarQuantizer(
        fine="trellis", bits=2.0, rotation="klt", n_classes=3, n_leading=10, radius_bits=0
    ).fit(x),
    "bitshift": lambda x: pp.preset("bitshift", 2.0).fit(x),
    "turboquant": lambda x: pp.preset("turboquant", 2.0).fit(x),
    "sq8": lambda x: pp.preset("sq8").fit(x),
    "int8_rows": lambda x: pp.preset("int8_rows").fit(x),
    "float16": lambda x: pp.preset("float16").fit(x),
    "hadamard": lambda x: pp.PolarQuantizer(fine="grid", rotation="hadamard").fit(x),
    "walls": lambda x: pp.preset("trellis", 3.0).fit(np.maximum(x, 0)),
    "weights": lambda x: pp.PolarQuantizer(
        fine="trellis", bits=2.0, rotation="klt", radius_bits=0, weights=np.arange(1, D + 1)
    ).fit(x),
    "huge": lambda x: pp.preset("trellis", 2.0).fit(1e30 * x),
    "tiny": lambda x: pp.preset("polar_vq", 2.0).fit(1e-30 * x),
    "far beyond float32": lambda x: pp.preset("pq", 2.0).fit(1e200 * x.astype(np.float64)),
}


@functools.cache
def chain(name: str) -> pp.PolarQuantizer:
    return CHAINS[name](made(600))


@pytest.mark.parametrize("name", CHAINS)
def test_decodes_to_the_same_bits(name):
    q = chain(name)
    codes = q.encode(np.ldexp(made(100, 1, "float64"), q.exponent_))
    for some in (codes, codes[:1], codes[:0]):
        decoded = _cuda.decode(q, torch.from_numpy(some.astype(np.int32)))
        assert decoded.dtype == torch.float32
        np.testing.assert_array_equal(
            decoded.numpy().view(np.uint32), q.decode(some).view(np.uint32)
        )
    if name == "prq":
        first = _cuda.decode(q, torch.from_numpy(codes.astype(np.int32)), stages=1)
        np.testing.assert_array_equal(first.numpy(), q.decode(codes, stages=1))


def test_cases_mean_what_they_say():
    assert chain("walls").low_ is not None
    assert chain("huge").exponent_ and chain("tiny").exponent_
    # the largest codes of a trellis leave the integers that a float32 product holds
    q = chain("trellis")
    lattice = q.fine_.decode((q.alphabet_sizes - 1)[None])[1]
    assert np.linalg.norm(lattice) * q.rotation_._row_norm > 2**24


def test_any_codes_decode_to_the_same_bits():
    rng = np.random.default_rng(3)
    for name in ("trellis", "classes", "prq", "polar_vq"):
        q = chain(name)
        codes = np.stack([rng.integers(0, k, 50) for k in q.alphabet_sizes], axis=1)
        codes[0] = q.alphabet_sizes - 1
        decoded = _cuda.decode(q, torch.from_numpy(codes)).numpy()
        np.testing.assert_array_equal(decoded, q.decode(codes))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("pq", "float16"),
        ("pq", "float64"),
        ("prq", "float32"),
        ("polar_vq", "float32"),
        ("opq", "float32"),
        ("tiny", "float16"),
    ],
)
def test_encodes_like_the_core(name, dtype, monkeypatch):
    monkeypatch.setattr(_cuda, "BLOCK_ROWS", 100)
    monkeypatch.setattr(_cuda, "MAX_SCORES", 1 << 14)
    q, x = chain(name), made(500, 1, dtype)
    x = x * x.dtype.type(1e-3 if name == "tiny" and dtype == "float16" else 1)
    codes, expected = _cuda.encode(q, torch.from_numpy(x)), q.encode(x)
    assert codes.dtype == (torch.uint8 if expected.dtype == np.uint8 else torch.int32)
    differ = (codes.numpy() != expected).any(axis=1)
    assert differ.mean() < 0.01
    errors = [
        np.square(q.decode(c) - x.astype(np.float64)).sum(axis=1) for c in (codes.numpy(), expected)
    ]
    # where codes differ, one is as good as the other
    np.testing.assert_allclose(errors[0][differ].sum(), errors[1][differ].sum(), rtol=0.05)
    np.testing.assert_allclose(errors[0].sum(), errors[1].sum(), rtol=1e-3)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("n", "k", "d"), [(200, 1, 3), (300, 3, 40), (500, 64, 8)])
def test_nearest_is_the_cores(metric, n, k, d, monkeypatch):
    monkeypatch.setattr(_cuda, "MAX_SCORES", 1 << 12)
    rng = np.random.default_rng(n)
    x = rng.standard_normal((2, n, d), dtype=np.float32) + 5
    centroids = rng.standard_normal((2, k, d), dtype=np.float32) + 5
    centroids[1, -1] = centroids[1, 0]  # equals: the first
    index, score = _cuda.nearest(torch.from_numpy(x), torch.from_numpy(centroids), metric)
    for head in range(2):
        expected = nearest(x[head], centroids[head], metric)
        np.testing.assert_array_equal(index[head].numpy(), expected[0])
        np.testing.assert_allclose(score[head].numpy(), expected[1], rtol=1e-6)
    loose, _ = _cuda.nearest(torch.from_numpy(x), torch.from_numpy(centroids), metric, exact=False)
    assert (loose != index).float().mean() < 0.01


def error_of(x: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.square(x[:, None] - centroids[None]).sum(axis=2).min(axis=1).sum())


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_is_as_good_as_the_cores(spherical):
    x = np.stack([made(1500, 5), made(1500, 6)]) - np.float32(0.0 if spherical else 0.3)
    grow = {"spherical": spherical, "n_iter": 25}
    found = _cuda.grow(torch.from_numpy(x), 40, rng=np.random.default_rng(0), **grow)
    again = _cuda.grow(torch.from_numpy(x), 40, rng=np.random.default_rng(0), **grow)
    assert found.shape == (2, 40, D) and torch.equal(found, again)
    for rows, centroids in zip(x, found.numpy(), strict=True):
        ours = pp.kmeans(rows, 40, spherical=spherical, device="cpu")[0]
        if spherical:
            np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
            gains = [(rows @ c.T).max(axis=1).sum() for c in (centroids, ours)]
            assert gains[0] > 0.99 * gains[1]
        else:
            assert error_of(rows, centroids) < 1.05 * error_of(rows, ours)


def test_kmeans_of_few_or_equal_rows():
    rng = np.random.default_rng(0)
    x = torch.zeros(1, 50, 3)
    assert _cuda.grow(x, 4, spherical=False, n_iter=3, rng=rng).shape == (1, 4, 3)
    x[0, :25] = 1.0
    found = _cuda.grow(x, 4, spherical=False, n_iter=9, rng=rng)
    assert torch.cdist(x[0], found[0]).amin(dim=1).max() < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_goes_where_torch_has_a_gpu(scale, spherical, monkeypatch):
    monkeypatch.setattr(_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(_cuda, "is_available", lambda: True)
    monkeypatch.setattr(clustering, "_faiss_gpu", lambda: False)
    x = (made(2000) * scale).astype(np.float32)
    centroids, assignment = pp.kmeans(x, 16, spherical=spherical, device="cuda")
    expected = nearest(x, centroids, "ip" if spherical else "l2")[0]
    assert (assignment == expected).mean() > 0.999
    ours = pp.kmeans(x, 16, spherical=spherical, device="cpu")[0]
    if not spherical:
        assert error_of(x / scale, centroids / scale) < 1.1 * error_of(x / scale, ours / scale)
    monkeypatch.setattr(clustering, "FAISS_WORK", x.size * 16)
    again, _ = pp.kmeans(x, 16, spherical=spherical)  # "auto": the work is worth it
    np.testing.assert_array_equal(again, centroids)
    monkeypatch.setattr(clustering, "FAISS_WORK", x.size * 16 + 1)
    np.testing.assert_array_equal(pp.kmeans(x, 16, spherical=spherical)[0], ours)


def test_sums_do_not_depend_on_the_order():
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.standard_normal((5000, 7)) * 10.0 ** rng.uniform(-6, 6, (5000, 1)))
    index = torch.from_numpy(rng.integers(0, 9, 5000))
    order = torch.from_numpy(rng.permutation(5000))
    sums = _cuda._sums_of(x, index, 9)
    assert torch.equal(sums, _cuda._sums_of(x[order], index[order], 9))
    plain = torch.zeros(9, 7, dtype=torch.float64).index_add_(0, index, x)
    assert (sums - plain).abs().max() < 1e-9 * 5000 * x.abs().max()


def test_products_stay_float32_under_autocast_and_tf32():
    q = chain("trellis")
    codes = q.encode(made(50, 1))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = _cuda.decode(q, torch.from_numpy(codes.astype(np.int32)))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    np.testing.assert_array_equal(decoded.numpy(), q.decode(codes))


def test_bad_input():
    q = chain("pq")
    rows = torch.from_numpy(made(4))
    bad = rows.clone()
    bad[2, 3] = torch.nan
    n, top = q.n_fields, int(q.alphabet_sizes[0])
    for call, message in [
        (lambda: _cuda.encode(q, rows[:, :3]), f"shape \\(n, {D}\\), got \\(4, 3\\)"),
        (lambda: _cuda.encode(q, bad), "NaN or infinity first in row 2"),
        (lambda: _cuda.encode(q, rows.long()), "of dtype float16, .*, got int64"),
        (lambda: _cuda.decode(q, rows), "integer dtype, got torch.float32"),
        (lambda: _cuda.decode(q, torch.zeros(2, n + 1, dtype=torch.int32)), f"\\(n, {n}\\)"),
        (lambda: _cuda.decode(q, torch.full((2, n), top)), f"field 0 in 0..{top - 1}, got {top}"),
        (lambda: _cuda.decode(q, torch.full((2, n), -1)), "got -1..-1"),
    ]:
        with pytest.raises(pp.InputError, match=message):
            call()


# -- on a GPU -----------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", CHAINS)
def test_gpu_decodes_to_the_same_bits(name):
    q = chain(name)
    codes = q.encode(made(100, 1))
    decoded = q.decode(torch.from_numpy(codes.astype(np.int32)).cuda())
    assert decoded.is_cuda
    np.testing.assert_array_equal(decoded.cpu().numpy(), q.decode(codes))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pq", "prq", "trellis"])
def test_gpu_tensors_encode(name):
    q, x = chain(name), made(500, 1)
    codes = q.encode(torch.from_numpy(x).cuda())
    assert codes.is_cuda
    assert (codes.cpu().numpy() != q.encode(x)).any(axis=1).mean() < 0.01


@pytest.mark.gpu
def test_gpu_kmeans():
    x = made(20_000)
    first, assigned = pp.kmeans(x, 64, device="cuda")
    again, _ = pp.kmeans(x, 64, device="cuda")
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(assigned, nearest(x, first)[0])
    assert error_of(x, first) < 1.05 * error_of(x, pp.kmeans(x, 64, device="cpu")[0])
