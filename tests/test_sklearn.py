"""RQKMeans: scikit-learn's own checks, and its error against a loop of scikit-learn's KMeans."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("faiss")

from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from polarpack.errors import InputError
from polarpack.integrations.sklearn import RQKMeans


@parametrize_with_checks([RQKMeans(n_clusters=4, n_stages=2)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def data(n: int = 3000, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((20, d))[rng.integers(20, size=n)] * 3 + rng.standard_normal((n, d))


def test_error_of_a_loop_of_kmeans():
    x = np.random.default_rng(0).standard_normal((6000, 4))
    rq = RQKMeans(n_clusters=32, n_stages=3, random_state=0).fit(x)
    residual = x
    for stage in range(3):
        model = KMeans(32, n_init=1, random_state=0).fit(residual)
        residual = residual - model.cluster_centers_[model.labels_]
        assert rq.stage_errors_[stage] < 1.02 * (residual**2).mean()


def test_codes_sum_to_the_transform():
    x = data(seed=1) + 1e4  # far from the origin: centring keeps float32's precision
    rq = RQKMeans(n_clusters=16, n_stages=3, random_state=0)
    quantized = rq.fit_transform(x)
    codes = rq.get_codes(x)
    assert [c.shape for c in codes] == [(3000,)] * 3
    assert all(c.min() >= 0 and c.max() < 16 for c in codes)
    total = sum(book[code] for book, code in zip(rq.codebooks_, codes, strict=True))
    assert np.allclose(total, quantized, rtol=1e-7)
    error = rq.calculate_reconstruction_error(x)
    assert np.isclose(error, ((x - quantized) ** 2).mean())
    assert np.isclose(error, rq.stage_errors_[-1], rtol=1e-5)


def test_analysis():
    x = data(seed=2)
    rq = RQKMeans(n_clusters=16, n_stages=4, random_state=0).fit(x)
    report = rq.analyze_quantization_quality(x)
    assert report["bits_per_vector"] == 16 and report["compression_ratio"] == 6 * 32 / 16
    assert np.allclose(report["mse_by_stage"], rq.stage_errors_, rtol=1e-4)
    assert (np.diff(report["mse_by_stage"]) < 0).all()
    for stage, codes in enumerate(rq.get_codes(x)):
        p = np.bincount(codes, minlength=16) / len(x)
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        assert np.isclose(report["perplexity"][stage], np.exp(entropy))
        assert report["unused"][stage] == (p == 0).sum()
    assert np.isclose(report["snr_db"], 10 * np.log10(x.var(axis=0).mean() / report["mse"]))


def test_growing_rounds_reach_the_end(monkeypatch):
    from polarpack.integrations import sklearn

    x = np.random.default_rng(0).standard_normal((8000, 4))
    errors = []
    for first in (8, 10_000):
        monkeypatch.setattr(sklearn, "FIRST_ROWS", first)
        errors.append(RQKMeans(n_clusters=20, n_stages=1, random_state=0).fit(x).stage_errors_[0])
    assert errors[0] < 1.02 * errors[1]


def test_tolerance_zero_goes_to_the_end():
    """Few rows for each centroid loosen the tolerance; zero stays zero, and costs iterations."""
    x = np.random.default_rng(1).standard_normal((2000, 6))
    loose, strict = (
        RQKMeans(n_clusters=40, n_stages=1, tol=tol, random_state=0).fit(x) for tol in (1e-4, 0.0)
    )
    assert strict.n_iter_ > loose.n_iter_
    assert strict.stage_errors_[0] < loose.stage_errors_[0] < 1.05 * strict.stage_errors_[0]
    # at the end every centroid is the mean of its rows
    codes = strict.get_codes(x)[0]
    for code in np.unique(codes):
        assert np.allclose(strict.codebooks_[0][code], x[codes == code].mean(axis=0), atol=0.02)


def test_in_a_pipeline():
    x = data(seed=3).astype(np.float32)
    model = make_pipeline(StandardScaler(), RQKMeans(n_clusters=8, n_stages=2, random_state=0))
    assert model.fit_transform(x).dtype == np.float32


def test_verbose_logs_stages(caplog):
    caplog.set_level("INFO")
    RQKMeans(n_clusters=4, n_stages=2, verbose=True).fit(data(n=50))
    assert [r.getMessage()[:12] for r in caplog.records] == ["stage 1 of 2", "stage 2 of 2"]


def test_bad_parameters():
    x = data(n=50)
    with pytest.raises(InputError, match="at least n_clusters=256 rows, got n_samples=50"):
        RQKMeans().fit(x)
    for bad in ({"n_clusters": 0}, {"n_stages": 1.5}, {"max_iter": True}, {"tol": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            RQKMeans(**bad).fit(x)
