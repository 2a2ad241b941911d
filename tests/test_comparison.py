"""compare: every method within its size, judged the same way, shown three ways."""

from __future__ import annotations

import json

import numpy as np
import pytest

import polarpack as pp
from polarpack import comparison, metrics, peers

D = 12
RNG = np.random.default_rng(3)
X = (RNG.standard_normal((900, D)) @ RNG.standard_normal((D, D))).astype(np.float32)
QUICK = ("polarpack", "trellis", "polar_trellis", "sq8", "float16")


@pytest.fixture(scope="module")
def quick():
    return pp.compare(X, bits=[2.0, 4.0], methods=QUICK, name="some")


def test_no_method_exceeds_a_size(quick):
    assert {r.method for r in quick.rows} == set(QUICK)
    for r in quick.rows:
        assert r.bits_per_float == pytest.approx(8 * r.total_bytes / X.size)
        if r.method not in ("sq8", "float16"):
            assert r.bits_per_float <= 4.0
    ours = [r for r in quick.rows if r.method == "polarpack"]
    assert [r.bits_per_float <= b for r, b in zip(ours, (2.0, 4.0), strict=True)] == [True, True]
    assert ours[0].snr_db < ours[1].snr_db
    assert all(r.cosine_p01 <= r.cosine <= 1 and 0 <= r.recall_at_10 <= 1 for r in quick.rows)
    assert quick.shape == X.shape and len(quick.bound_bits) == len(quick.bound_db)


def test_shown_as_text_json_and_picture(quick, tmp_path):
    text = quick.table()
    assert all(f"{r.total_bytes:,}" in text and r.method in text for r in quick.rows)
    facts = json.loads(quick.to_json())
    assert [r["total_bytes"] for r in facts["results"]] == [r.total_bytes for r in quick.rows]
    assert facts["shape"] == [900, D] and facts["title"].startswith("some")
    pytest.importorskip("matplotlib")
    quick.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_results_come_as_they_are_made():
    seen = []
    result = pp.compare(X[:200], bits=[6.0], methods=["sq8", "polarpack"], on_result=seen.append)
    assert seen == result.rows and len(seen) == 2


@pytest.mark.parametrize("method", [m for m in peers.PEERS if m != "faiss LSQ"])
def test_peers_keep_to_their_size(method):
    pytest.importorskip("faiss")
    result = pp.compare(X, bits=[9.0], methods=[method])
    assert not result.left_out
    for r in result.rows:
        assert r.total_bytes <= 9 * X.size / 8
        assert 0.3 < r.recall_at_10 <= 1
        assert np.isnan(r.snr_db) == (method == "faiss RaBitQ")
    assert result.rows or method in ("faiss OPQ",)
    assert "null" not in json.dumps(json.loads(result.to_json())["results"]) or "RaBitQ" in method


def test_without_faiss_its_codecs_are_named(monkeypatch):
    def missing():
        raise pp.MissingDependencyError('install it: pip install "polarpack[faiss]"')

    monkeypatch.setattr(peers, "load_faiss", missing)
    result = pp.compare(X[:200], bits=[6.0], methods=["faiss PQ", "faiss SQ", "sq8"])
    assert [r.method for r in result.rows] == ["sq8"]
    ((why, names),) = result.left_out.items()
    assert names == ["faiss PQ", "faiss SQ"] and 'pip install "polarpack[faiss]"' in why
    assert "left out: faiss PQ, faiss SQ" in result.table()


def test_recall_of_scores_is_that_of_the_rows_they_come_from():
    y = X + np.float32(0.5) * RNG.standard_normal(X.shape, dtype=np.float32)
    ours = comparison._recall_of_scores(X, lambda queries: queries @ y.T)
    assert ours == pytest.approx(metrics.recall_at_k(X, y, k=10), abs=1e-3)


def test_bad_input():
    with pytest.raises(pp.InputError, match="expected methods of"):
        pp.compare(X, methods=["zip"])
    with pytest.raises(pp.InputError, match="bits"):
        pp.compare(X, bits=[0.0])
    with pytest.raises(pp.InputError, match="rows"):
        pp.compare(X[:0])
    with pytest.raises(pp.InputError, match="finite"):
        pp.compare(np.full((3, 4), np.nan, np.float32))


@pytest.mark.parametrize(
    "options", [{"bits": 2.0}, {"bits": 2.0, "layout": "rows"}, {"bits": 2.0, "optimize": "cosine"}]
)
def test_a_report_as_a_picture(options, tmp_path):
    pytest.importorskip("matplotlib")
    report = pp.fit(X[:400], **options).report()
    assert sum(line["chosen"] for line in report["candidates"]) == 1
    assert all(line["asked_bits"] == 2.0 for line in report["candidates"])
    comparison.plot_report(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_without_candidates():
    with pytest.raises(pp.InputError, match="candidates"):
        comparison.plot_report(pp.preset("sq8").fit(X).report(), "never.png")
