"""Codes handed to faiss: the same rows, distances and ranks as our own search finds."""

import numpy as np
import pytest
from tables import correlated

import polarpack as pp
from polarpack.search import search_codes
from polarpack.to_faiss import to_faiss

faiss = pytest.importorskip("faiss")
D = 12
ROWS, QUERIES = correlated(700, D, seed=1), correlated(6, D, seed=2)
PLAIN = {"radius_bits": 0, "layout": "rows"}
MAPPED = {
    "IndexPQ": {"heads": 3, "stages": 1, "n_codewords": 256, **PLAIN},
    "IndexPQ 5": {"heads": 4, "stages": 1, "n_codewords": 32, "center": True, **PLAIN},
    "IndexResidualQuantizer": {"heads": 1, "stages": 3, "n_codewords": 32, **PLAIN},
    "IndexProductResidualQuantizer": {"heads": 3, "stages": 2, "n_codewords": 16, **PLAIN},
    "IndexScalarQuantizer": {"fine": "grid", "scalar_bits": 8, **PLAIN},
    "IndexScalarQuantizer 4": {"fine": "grid", "scalar_bits": 4, "center": True, **PLAIN},
    "IndexPreTransform": {"heads": 4, "stages": 2, "n_codewords": 16, "rotation": "klt",
                          "rotation_exponent": 14, **PLAIN},
}  # fmt: skip


def check(index, searched, queries, tolerance):
    """Distances alike in order, and each row's alike; ranks of equal distances may differ."""
    found, ids = index.search(queries, 10)
    scores, ours = searched
    scale = np.abs(scores).max()
    assert np.abs(found - scores).max() <= tolerance * scale
    for a, b, s in zip(ids, ours, scores, strict=True):
        apart = np.abs(np.diff(s)).min() > 2 * tolerance * scale
        assert not apart or np.array_equal(a[:-1], b[:-1])


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("scale", [1.0, 3e4])
def test_distances_are_those_of_our_search(name, scale):
    x, queries = ROWS * np.float32(scale), QUERIES * np.float32(scale)
    q = pp.PolarQuantizer(**MAPPED[name]).fit(x)
    t = pp.open(pp.compress(x, quantizer=q))["x"]
    for metric in ("ip", "l2"):
        index = t.to_faiss(metric)
        assert type(index).__name__ == name.split()[0] and index.ntotal == len(x)
        tolerance = 2e-6
        if name == "IndexPreTransform":  # where coefficients are put on a grid to be rotated
            tolerance = 2e-5 if metric == "ip" else 2e-3
        check(index, t.search(queries, 10, metric), queries, tolerance)
        again = faiss.deserialize_index(faiss.serialize_index(index))
        check(again, t.search(queries, 10, metric), queries, tolerance)


@pytest.mark.parametrize("name", ["IndexPQ", "IndexResidualQuantizer", "IndexScalarQuantizer"])
def test_faiss_decodes_the_same_rows(name):
    q = pp.PolarQuantizer(**MAPPED[name]).fit(ROWS)
    codes = q.encode(ROWS)
    decoded = to_faiss(q, codes).reconstruct_n(0, len(ROWS))
    assert np.abs(decoded - q.decode(codes)).max() <= 1e-6 * np.abs(ROWS).max()


def test_halves():
    q = pp.PolarQuantizer(fine="float16", radius_bits=0).fit(ROWS)
    codes = q.encode(ROWS)
    check(to_faiss(q, codes), search_codes(q, codes, QUERIES, 10, "l2"), QUERIES, 2e-6)


def test_opq_by_inner_products():
    q = pp.preset("opq", bits=2.0).fit(ROWS)
    codes = q.encode(ROWS)
    check(to_faiss(q, codes, "ip"), search_codes(q, codes, QUERIES), QUERIES, 2e-5)
    with pytest.raises(pp.InputError, match="rotation would be off"):
        to_faiss(q, codes, "l2")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fine": "trellis", "bits": 2.0, "radius_bits": 0}, "trellis codes"),
        ({"fine": "bitshift", "bits": 2.0, "radius_bits": 0}, "bitshift codes"),
        ({"heads": 3, "stages": 1, "n_codewords": 16}, "radius and direction"),
        ({"heads": 5, "stages": 1, "n_codewords": 16, "radius_bits": 0}, "equal widths"),
        ({"fine": "grid", "scalar_bits": 6, "radius_bits": 0}, "8 and 4 bits, this one has 6"),
        ({"fine": "grid", "rotation": "klt", "radius_bits": 0}, "grid codes behind a rotation"),
        ({"heads": 3, "stages": 1, "n_codewords": 16, "radius_bits": 0, "rotation": "klt",
          "n_components": 6}, "leading axes"),
        ({"heads": 3, "stages": 1, "n_codewords": 16, "radius_bits": 0,
          "weights": np.arange(1.0, 13.0)}, "weighted columns"),
    ],
)  # fmt: skip
def test_what_faiss_has_no_counterpart_of(wrong, message):
    q = pp.PolarQuantizer(**wrong).fit(ROWS)
    with pytest.raises(pp.InputError, match=message):
        to_faiss(q, q.encode(ROWS))


def test_rows_that_are_no_codes():
    q = pp.PolarQuantizer(**MAPPED["IndexPQ"]).fit(ROWS)
    x = ROWS.copy()
    x[5] *= 100
    with pytest.raises(pp.InputError, match=r"\d+ rows, the first \d+, are stored exactly"):
        pp.open(pp.compress(x, quantizer=q, max_error=0.999))["x"].to_faiss()
    with pytest.raises(pp.InputError, match="no codes"):
        pp.open(pp.compress(ROWS, max_error=0))["x"].to_faiss()
    with pytest.raises(pp.InputError, match="expected metric"):
        to_faiss(q, q.encode(ROWS), "cosine")
