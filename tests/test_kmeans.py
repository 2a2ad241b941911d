"""k-means, and the search for the nearest codeword."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import same_bits, vectors

from polarpack.clustering import kmeans, nearest
from polarpack.errors import InputError, MissingDependencyError


def clustered(n: int = 600, d: int = 6, groups: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 4 * rng.standard_normal((groups, d))
    x = centres[rng.integers(0, groups, n)] + 0.3 * rng.standard_normal((n, d))
    return x.astype(np.float32)


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)[:, None] - centroids.astype(np.float64)
    return np.square(wide).sum(axis=2)


def error(x: np.ndarray, centroids: np.ndarray) -> float:
    return float(distances(x, centroids).min(axis=1).mean())


# ------------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("n", "d", "k"), [(50, 1, 7), (300, 3, 256), (90, 29, 40), (70, 200, 33)])
def test_nearest_is_the_plain_search(metric, n, d, k):
    rng = np.random.default_rng(n)
    x, c = (rng.standard_normal((m, d), dtype=np.float32) for m in (n, k))
    plain = distances(x, c) if metric == "l2" else -x.astype(np.float64) @ c.T.astype(np.float64)
    index, score = nearest(x, c, metric)
    assert index.dtype == np.int64
    assert np.array_equal(index, plain.argmin(axis=1))
    best = plain.min(axis=1)
    np.testing.assert_allclose(score, best if metric == "l2" else -best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [1, 4, 5, 28, 29, 64])
def test_nearest_ties_take_the_lowest_index(d):
    c = np.random.default_rng(0).standard_normal((9, d)).astype(np.float32)
    doubled = np.concatenate([c, c, c])
    for metric in ("l2", "ip"):
        assert nearest(c, doubled, metric)[0].max() < 9
    assert np.array_equal(nearest(c, doubled)[0], np.arange(9))


@pytest.mark.parametrize("d", [3, 50])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_nearest_finds_codewords_themselves_at_any_scale_and_place(d, offset, scale):
    c = np.random.default_rng(1).standard_normal((100, d)) + offset
    c = (c * scale).astype(np.float32)
    index, score = nearest(c, c)
    assert np.array_equal(index, np.arange(100))
    assert not score.any()


def test_nearest_does_not_depend_on_the_batch():
    rng = np.random.default_rng(2)
    x, c = rng.standard_normal((500, 40)).astype(np.float32), rng.standard_normal((64, 40))
    whole = nearest(x, c.astype(np.float32))
    for rows in (slice(0, 1), slice(3, 77), slice(499, 500)):
        part = nearest(np.ascontiguousarray(x[rows]), c.astype(np.float32))
        assert same_bits(part[0], whole[0][rows])
        assert same_bits(part[1], whole[1][rows])


def test_nearest_of_no_rows_and_beyond_float32():
    c = np.ones((3, 2), np.float32)
    assert nearest(np.zeros((0, 2), np.float32), c)[0].shape == (0,)
    index, score = nearest(np.full((1, 2), 3e38, np.float32), -c)
    assert index[0] in range(3)
    assert np.isinf(score[0])


# ------------------------------------------------------------------------------------- kmeans


@settings(max_examples=60)
@given(vectors(), st.integers(1, 20), st.booleans())
def test_kmeans_of_anything(x, k, spherical):
    centroids, assignment = kmeans(x, k, spherical=spherical, n_iter=5)
    assert centroids.shape == (k, x.shape[1])
    assert centroids.dtype == np.float32
    assert assignment.shape == (x.shape[0],)
    assert assignment.dtype == np.int64
    assert np.isfinite(centroids).all()
    assert ((assignment >= 0) & (assignment < k)).all()
    if spherical:
        norms = np.linalg.norm(centroids.astype(np.float64), axis=1)
        np.testing.assert_allclose(norms, 1.0, atol=1e-5)
    distinct = np.unique(x.astype(np.float32) + np.float32(0), axis=0)
    if not spherical and distinct.shape[0] <= k:
        assert np.array_equal(centroids[assignment], x.astype(np.float32))


def test_kmeans_finds_the_clusters():
    x = clustered()
    centroids, assignment = kmeans(x, 8)
    assert error(x, centroids) < 1.1 * 6 * 0.3**2
    assert np.array_equal(assignment, distances(x, centroids).argmin(axis=1))
    assert (np.bincount(assignment, minlength=8) > 0).all()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("d", [2, 40])
def test_centroids_are_the_means_of_their_rows(d, spherical):
    x = clustered(500, d)
    centroids, assignment = kmeans(x, 5, spherical=spherical, n_iter=100)
    means = np.stack([x[assignment == c].mean(axis=0, dtype=np.float64) for c in range(5)])
    if spherical:
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(centroids, means, atol=1e-5)


def test_no_worse_than_plain_lloyd_from_random_rows():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1000, 30)).astype(np.float32)
    plain = x[rng.choice(1000, 64, replace=False)].astype(np.float64)
    for _ in range(25):
        at = distances(x, plain).argmin(axis=1)
        plain = np.stack([x[at == c].mean(axis=0) for c in range(64)])
    assert error(x, kmeans(x, 64)[0]) < 1.01 * error(x, plain)


def test_error_falls_with_iterations():
    x = clustered(groups=100)
    errors = [error(x, kmeans(x, 60, n_iter=n)[0]) for n in (1, 4, 16, 64)]
    assert all(later <= before * 1.001 for before, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_empty_clusters_are_put_to_use():
    # All but a few rows are the same: halving clusters leaves most of the halves empty.
    x = np.zeros((1000, 3), np.float32)
    x[:40] = clustered(40, 3, 40)
    centroids, _ = kmeans(x, 32)
    assert np.unique(centroids, axis=0).shape[0] == 32
    assert error(x, centroids) < 0.02 * error(x, x.mean(axis=0, keepdims=True))


def test_same_seed_same_result_and_power_of_two_scales_with_it():
    x = clustered()
    a, at = kmeans(x, 20, seed=5)
    b, bt = kmeans(x, 20, seed=5)
    assert same_bits(a, b)
    assert same_bits(at, bt)
    assert not np.array_equal(a, kmeans(x, 20, seed=6)[0])
    for power in (-90, 90):
        scaled, _ = kmeans(np.ldexp(x, power), 20, seed=5)
        np.testing.assert_allclose(np.ldexp(scaled, -power), a, rtol=1e-5, atol=1e-6)


def test_trains_on_a_sample_but_assigns_every_row():
    x = clustered(5000)
    centroids, assignment = kmeans(x, 8, max_points_per_centroid=20)
    assert assignment.shape == (5000,)
    assert same_bits(centroids, kmeans(x, 8, max_points_per_centroid=20)[0])
    assert error(x, centroids) < 2 * 6 * 0.3**2


def test_zero_rows_belong_to_the_first_centroid_of_a_spherical_clustering():
    x = clustered(100)
    x[::3] = 0
    _, assignment = kmeans(x, 4, spherical=True)
    assert not assignment[::3].any()


def test_torch_in_torch_out():
    x = clustered(100)
    plain = kmeans(x, 4)
    for dtype in (torch.float32, torch.bfloat16):
        centroids, assignment = kmeans(torch.from_numpy(x).to(dtype), 4)
        assert centroids.dtype == torch.float32
        assert assignment.dtype == torch.int64
        if dtype == torch.float32:
            assert np.array_equal(centroids.numpy(), plain[0])
            assert np.array_equal(assignment.numpy(), plain[1])
    assert kmeans(x.astype(np.float16), 4)[0].dtype == np.float32


def test_prints_nothing(capfd):
    kmeans(clustered(300, 40), 200)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k in 1..65536, got 0"),
        ({"k": 2.0}, "k to be an integer"),
        ({"k": True}, "k to be an integer"),
        ({"k": 2, "seed": -1}, "seed >= 0"),
        ({"k": 2, "n_iter": 0}, "n_iter >= 1"),
        ({"k": 2, "max_points_per_centroid": 0}, "max_points_per_centroid >= 1"),
        ({"k": 2, "device": "tpu"}, "device auto, cpu or cuda"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        kmeans(clustered(20), **arguments)


def test_bad_rows():
    x = clustered(20)
    x[7, 1] = np.nan
    with pytest.raises(InputError, match="row 7"):
        kmeans(x, 2)
    with pytest.raises(InputError, match="shape"):
        kmeans(x[0], 2)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "polarpack\[faiss\]"'):
        kmeans(clustered(20), 2)
    assert nearest(clustered(5), clustered(3))[0].shape == (5,)  # encoding needs none


@pytest.fixture
def one_gpu(monkeypatch):
    """A faiss that says it has a GPU, and searches on the CPU all the same."""
    import faiss

    def knn_gpu(resources, x, centroids, k, metric):
        return faiss.knn(x, centroids, k, metric=metric)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu, raising=False)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.usefixtures("one_gpu")
def test_on_a_gpu_all_searches_go_there(scale):
    x = (clustered() * scale).astype(np.float32)
    for device in ("auto", "cuda"):
        centroids, assignment = kmeans(x, 8, device=device)
        assert np.array_equal(assignment, nearest(x, centroids)[0])
        assert error(x / scale, centroids / scale) < 1.1 * 6 * 0.3**2


def test_cuda_without_a_gpu(monkeypatch):
    import faiss

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(InputError, match="no GPU"):
        kmeans(clustered(20), 2, device="cuda")
