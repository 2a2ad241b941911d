"""Search in a file equals brute force over its decoded rows."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import SETTINGS, D, correlated, fitted

import polarpack as pp
from polarpack import search
from polarpack.scan import Scan, add_from_tables, bounds_of, windows_of

ROWS = correlated(700, D, seed=2)
QUERIES = correlated(9, D, seed=3)
METRICS = ("ip", "l2", "cosine")


def opened(x, **options):
    options = options or {"max_error": 0}
    return pp.open(pp.compress(x, **options))["x"]


def plain_scores(q, x, metric):
    """(n_queries, n) scores in float64, larger is better."""
    q, x = q.astype(np.float64), x.astype(np.float64)
    if metric == "l2":
        return -((q[:, None] - x[None]) ** 2).sum(axis=2)
    if metric == "cosine":
        q, x = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (q, x))
    return q @ x.T


def check(found, q, x, k, metric, tolerance=1e-5):
    """Scores are those of the rows named, in order, and no other row is better."""
    scores, ids = found
    truth = plain_scores(q, x, metric)
    k = min(k, len(x))
    assert scores.shape == ids.shape == (len(q), k)
    assert scores.dtype == np.float32 and ids.dtype == np.int64
    assert all(len(set(row)) == k for row in ids.tolist())
    better = -scores if metric == "l2" else scores
    slack = tolerance * max(1e-30, float(np.abs(truth).max(initial=0)))
    assert np.abs(np.take_along_axis(truth, ids, axis=1) - better).max(initial=0) <= slack
    assert (np.diff(better, axis=1) <= 0).all()
    best = -np.sort(-truth, axis=1)[:, :k]
    assert np.abs(best - np.take_along_axis(truth, ids, axis=1)).max(initial=0) <= slack
    if metric == "l2":
        assert (scores >= 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 700, 5000])
def test_equals_brute_force(metric, k):
    t = opened(ROWS)
    check(t.search(QUERIES, k=k, metric=metric), QUERIES, ROWS, k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["trellis", "pq"])
def test_of_coded_rows(metric, name):
    t = opened(ROWS, quantizer=fitted(name))
    check(t.search(QUERIES, k=20, metric=metric), QUERIES, t[...], 20, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_groups_of_rows_do_not_show(metric, monkeypatch):
    t = opened(ROWS)
    whole = t.search(QUERIES, k=25, metric=metric)
    monkeypatch.setattr(search, "GROUP_FLOATS", 40 * D)
    some = t.search(QUERIES, k=25, metric=metric)
    assert np.array_equal(whole[1], some[1])
    assert np.allclose(whole[0], some[0], rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lower_row(metric, monkeypatch):
    x = np.tile(np.eye(4, dtype=np.float32), (50, 1))
    q = np.array([[1.0, 0, 0, 0], [0, 1.0, 0.5, 0], [0, 0, 0, 0]], np.float32)
    for floats in (1 << 22, 4 * 30):
        monkeypatch.setattr(search, "GROUP_FLOATS", floats)
        scores, ids = opened(x).search(q, k=60, metric=metric)
        for i in range(len(q)):
            order = np.lexsort((ids[i], scores[i] if metric == "l2" else -scores[i]))
            assert np.array_equal(order, np.arange(60))
        assert ids[0, :50].tolist() == list(range(0, 200, 4))
        assert ids[1, :50].tolist() == list(range(1, 200, 4))
        assert ids[2].tolist() == list(range(60))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(METRICS))
def test_small_integers(seed, k, metric):
    """Scores that are exact in float32, with many ties: equal to a stable sort."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (30, 3)).astype(np.float32)
    q = rng.integers(-2, 3, (4, 3)).astype(np.float32)
    scores, ids = opened(x).search(q, k=k, metric=metric)
    if metric == "cosine":
        check((scores, ids), q, x, k, metric)
        return
    truth = plain_scores(q, x, metric)
    order = np.argsort(-truth, axis=1, kind="stable")[:, :k]
    assert np.array_equal(ids, order)
    sign = -1 if metric == "l2" else 1
    assert np.array_equal(scores, (sign * np.take_along_axis(truth, order, axis=1)).astype("f4"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_queries_of_any_dtype(metric, dtype):
    t = opened(ROWS)
    q = QUERIES.astype(dtype)
    scores, ids = t.search(q, k=5, metric=metric)
    check((scores, ids), q, ROWS, 5, metric)
    from_torch = t.search(torch.from_numpy(q), k=5, metric=metric)
    assert from_torch[0].dtype == torch.float32 and from_torch[1].dtype == torch.int64
    assert np.array_equal(from_torch[0].numpy(), scores)
    assert np.array_equal(from_torch[1].numpy(), ids)
    one = t.search(q[0], k=5, metric=metric)
    assert one[0].shape == (1, 5) and np.array_equal(one[1][0], ids[0])


def test_bfloat16_queries():
    q = torch.from_numpy(QUERIES).bfloat16()
    check([v.numpy() for v in opened(ROWS).search(q, k=5)], q.float().numpy(), ROWS, 5, "ip")


@pytest.mark.parametrize("metric", METRICS)
def test_rows_far_from_the_origin(metric):
    """Distances between rows that share a large mean are small differences of large numbers."""
    x, q = ROWS + np.float32(300), QUERIES + np.float32(300)
    scores, ids = opened(x).search(q, k=5, metric=metric)
    truth = plain_scores(q, x, metric)
    best = -np.sort(-truth, axis=1)[:, :5]
    found = np.take_along_axis(truth, ids, axis=1)
    scale = np.abs(best).max() if metric == "l2" else np.ptp(truth)
    assert np.abs(found - best).max() < 0.01 * scale
    assert (np.diff(-scores if metric == "l2" else scores, axis=1) <= 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(metric, scale):
    x, q = (ROWS * np.float32(scale)), (QUERIES * np.float32(scale))
    _, ids = opened(x).search(q, k=3, metric=metric)
    _, expected = opened(ROWS).search(QUERIES, k=3, metric=metric)
    assert np.array_equal(ids, expected)


def test_float64_rows_beyond_float32():
    x = ROWS.astype(np.float64) * 1e200
    _, ids = opened(x).search(QUERIES, k=3, metric="cosine")
    _, expected = opened(ROWS).search(QUERIES, k=3, metric="cosine")
    assert np.array_equal(ids, expected)


def test_large_queries_of_small_rows():
    t = opened(ROWS.astype(np.float64) * 1e-200)
    scores, ids = t.search(QUERIES.astype(np.float64) * 1e200, k=3)
    check((scores, ids), QUERIES, ROWS, 3, "ip")
    for scale in (1e307, 1e-320):
        x, q = ROWS.astype(np.float64), QUERIES.astype(np.float64)
        _, ids = opened(x / 20 * scale).search(q / 20 * scale, k=1, metric="l2")
        expected = (x[:, None] - q[None]).astype("f4")
        assert scale < 1 or (ids[:, 0] == (expected**2).sum(axis=2).argmin(axis=0)).all()


def test_zero_rows_and_zero_queries():
    x = ROWS.copy()
    x[::3] = 0
    for metric in METRICS:
        q = np.concatenate([QUERIES, np.zeros((1, D), np.float32)])
        check(opened(x).search(q, k=8, metric=metric), q, x, 8, metric)


def test_rows_that_are_not_finite_come_last():
    x = ROWS[:20].copy()
    x[4] = np.nan
    t = opened(x, max_error=0, nonfinite="raw")
    for metric in METRICS:
        _, ids = t.search(QUERIES, k=19, metric=metric)
        assert 4 not in ids


def test_no_rows_no_queries_and_other_shapes():
    t = opened(np.zeros((0, D), np.float32))
    scores, ids = t.search(QUERIES, k=3)
    assert scores.shape == ids.shape == (9, 0)
    t = opened(ROWS)
    scores, ids = t.search(QUERIES[:0], k=3)
    assert scores.shape == ids.shape == (0, 3)
    t = opened(ROWS.reshape(70, 10, D))  # leading axes count as rows
    assert np.array_equal(t.search(QUERIES, k=3)[1], opened(ROWS).search(QUERIES, k=3)[1])
    t = opened(ROWS[0])  # one row
    assert t.search(QUERIES, k=3)[1].tolist() == [[0]] * 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"queries": np.zeros((2, D + 1), np.float32)}, r"queries of shape \(n, 12\)"),
        ({"queries": np.zeros((2, 2, D), np.float32)}, "queries"),
        ({"queries": np.full((2, D), np.nan)}, "row 0"),
        ({"queries": np.zeros((2, D), int)}, "dtype"),
        ({"queries": [[0.0] * D]}, "array"),
        ({"k": 0}, "k >= 1"),
        ({"k": -1}, "k >= 1"),
        ({"k": 2.5}, "k >= 1"),
        ({"k": True}, "k >= 1"),
        ({"metric": "hamming"}, "expected metric"),
        ({"metric": None}, "expected metric"),
        ({"shortlist": 5}, "shortlist of at least k = 10"),
        ({"shortlist": 0}, "shortlist >= 1"),
        ({"ids": [700]}, r"ids to be row numbers in 0..699, got 700"),
        ({"exclude": [3, -1]}, "exclude to be row numbers .* got -1"),
        ({"ids": [0.5]}, "ids as row numbers or 700 booleans"),
        ({"ids": np.ones(699, bool)}, "700 booleans, got an array of bool"),
        ({"exclude": [[1]]}, "exclude as row numbers"),
    ],
)
def test_misuse(wrong, message):
    with pytest.raises(pp.InputError, match=message):
        opened(ROWS).search(**({"queries": QUERIES} | wrong))


# -- scores from codes -----------------------------------------------------------------------------
MANY = correlated(1100, D, seed=4)
ASKED = correlated(search.FEW_QUERIES + 9, D, seed=5)  # more than tables are made for


@pytest.fixture
def small_groups(monkeypatch):
    """Several groups and segments of so few rows."""
    monkeypatch.setattr(search, "SCAN_ROWS", 300)
    monkeypatch.setattr(search, "SCAN_QUERIES", 20)
    monkeypatch.setattr(search, "FEW_ROWS", 0.0)
    monkeypatch.setattr(search, "LEAST_ROWS", 8)


def decoding(t):
    """A searcher that decodes every row."""
    searcher = search.Searcher(t)
    searcher._scan = None
    return searcher


def same(found, expected):
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("name", SETTINGS)
def test_from_codes_as_from_decoded_rows(name):
    t = opened(MANY, quantizer=fitted(name))
    assert t._searcher._scan is not None
    for metric in METRICS:
        for queries, k in ((ASKED, 10), (ASKED[:3], 400)):
            expected = decoding(t).search(queries, k, metric)
            assert same(t.search(queries, k, metric), expected)
    assert same(search.search_codes(t.quantizer, t.quantizer.encode(MANY), ASKED),
                t.search(ASKED))  # fmt: skip


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_from_codes_in_other_dtypes(dtype, scale):
    x = torch.from_numpy(MANY * np.float32(scale)).to(getattr(torch, dtype))
    q = pp.PolarQuantizer(**SETTINGS["bitshift classes"]).fit(MANY * np.float32(scale))
    t = opened(x, quantizer=q)
    for metric in METRICS:
        assert same(t.search(ASKED, 10, metric), decoding(t).search(ASKED, 10, metric))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("metric", METRICS)
def test_rows_stored_in_another_way_are_found(metric):
    """Escapes for a bound, rows that are not finite, and blocks of exact rows."""
    x = MANY.copy()
    x[::7] *= 40  # far from what the quantizer knows
    x[5] = np.nan
    t = opened(x, quantizer=fitted("bitshift"), max_error=0.4, nonfinite="raw")
    _, other = t.read_codes(range(len(x)))
    assert 50 < len(other) < len(x)
    assert same(t.search(ASKED, 10, metric), decoding(t).search(ASKED, 10, metric))
    raw = opened(x, quantizer=fitted("pq"), max_error=0, nonfinite="raw")
    assert len(raw.read_codes(range(len(x)))[1]) == len(x)
    assert same(raw.search(ASKED, 10, metric), decoding(raw).search(ASKED, 10, metric))


@pytest.mark.usefixtures("small_groups")
def test_what_no_scan_fits_is_decoded():
    x = np.abs(MANY)
    x[x < 0.2] = 0
    q = pp.PolarQuantizer(**SETTINGS["trellis"]).fit(x)
    assert q.low_ is not None
    t = opened(x, quantizer=q)
    for metric in METRICS:
        check(t.search(ASKED, 10, metric), ASKED, t[...], 10, metric)
        assert not t._searcher._kept
    _, ids = t.search(ASKED, 10, "l2", shortlist=400)  # which may leave walls out of its first pass
    assert t._searcher._kept
    truth = t.search(ASKED, 10, "l2")[1]
    shared = [len(set(a) & set(b)) for a, b in zip(ids.tolist(), truth.tolist(), strict=True)]
    assert np.mean(shared) > 8
    blob = pp.compress(MANY, quantizer=fitted("polar-vq"))
    first = pp.open(blob, stages=1)["x"]
    assert first.scanned is None
    check(first.search(ASKED, 10), ASKED, first[...], 10, "ip")
    huge = correlated(1100, D, seed=4) * np.float32(1e30)
    t = opened(huge, quantizer=pp.PolarQuantizer(**SETTINGS["pq"]).fit(huge))
    for metric in METRICS:
        assert same(t.search(ASKED, 5, metric), decoding(t).search(ASKED, 5, metric))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["bitshift classes", "pq"])
def test_filters(name, metric):
    t = opened(MANY, quantizer=fitted(name))
    rng = np.random.default_rng(1)
    mine = np.sort(rng.permutation(len(MANY))[:400])
    part = opened(t[mine])
    scores, ids = part.search(ASKED, 10, metric)
    expected = scores, mine[ids]
    assert same(t.search(ASKED, 10, metric, ids=mine), expected)
    assert same(t.search(ASKED, 10, metric, ids=torch.from_numpy(mine)), expected)
    mask = np.isin(np.arange(len(MANY)), mine)
    assert same(t.search(ASKED, 10, metric, ids=mask), expected)
    assert same(t.search(ASKED, 10, metric, exclude=np.flatnonzero(~mask)), expected)
    assert same(t.search(ASKED, 10, metric, exclude=~mask), expected)
    assert same(decoding(t).search(ASKED, 10, metric, ids=mine), expected)
    _, found = t.search(ASKED, 10, metric, ids=mine, exclude=mine[3:])
    assert np.array_equal(np.sort(found, axis=1), np.tile(mine[:3], (len(ASKED), 1)))
    assert t.search(ASKED, 10, metric, ids=[])[1].shape == (len(ASKED), 0)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("name", ["bitshift classes", "trellis", "polar-vq", "hadamard grid"])
def test_a_shortlist_gives_scores_of_decoded_rows(name):
    t = opened(MANY, quantizer=fitted(name))
    for queries in (ASKED, ASKED[:2]):
        exact, best = t.search(queries, 5)
        scores, ids = t.search(queries, 5, shortlist=60)
        rows = t[...].astype(np.float64)
        truth = np.take_along_axis(queries.astype(np.float64) @ rows.T, ids, axis=1)
        assert np.allclose(scores, truth, rtol=1e-5, atol=1e-6)
        assert (scores <= exact).all()
        shared = [len(set(a) & set(b)) for a, b in zip(ids.tolist(), best.tolist(), strict=True)]
        assert np.mean(shared) > 4
        assert same(t.search(queries, 5, shortlist=len(MANY)), (exact, best))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kept", [0, 10_000])
def test_codes_that_are_not_kept_are_read_again(kept, monkeypatch):
    t = opened(MANY, quantizer=fitted("bitshift"))
    expected = t.search(ASKED, 10)
    monkeypatch.setattr(search, "KEPT_BYTES", kept)
    again = search.Searcher(t)
    for _ in range(2):
        assert same(again.search(ASKED, 10), expected)
    assert again._kept_bytes <= kept
    assert len(again._kept) in ((1, 2, 3) if kept else (0,))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_rank_by_number(metric):
    t = opened(np.tile(MANY[:20], (50, 1)), quantizer=fitted("bitshift"))
    scores, ids = t.search(ASKED, 120, metric)
    for values, found in zip(scores, ids, strict=True):
        order = np.lexsort((found, values if metric == "l2" else -values))
        assert np.array_equal(order, np.arange(120))
        assert np.array_equal(found[:50], np.arange(found[0], 1000, 20))


# -- few queries, by the heads of rows -------------------------------------------------------------
STEEP = correlated(900, 40, seed=7) * (0.85 ** np.arange(40)).astype(np.float32)
ASKED_STEEP = correlated(search.HEAD_QUERIES, 40, seed=8) * (0.85 ** np.arange(40)).astype(
    np.float32
)


@cache
def steep_quantizer(n_classes, radius_bits):
    """Bitshift codes whose variance is mostly in the first coefficients."""
    return pp.PolarQuantizer(
        fine="bitshift", rotation="klt", bits=1.5, radius_bits=radius_bits, n_classes=n_classes,
        n_leading=20, state_bits=6, layout="rows",
    ).fit(STEEP)  # fmt: skip


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n_classes", "radius_bits"), [(1, 0), (1, 3), (3, 0)])
@pytest.mark.parametrize("many_left", [0.0, 0.2, 9.0])
def test_few_queries_find_what_many_find(metric, n_classes, radius_bits, many_left, monkeypatch):
    monkeypatch.setattr(search, "MANY_LEFT", many_left)  # score all; some; only those let through
    t = opened(STEEP, quantizer=steep_quantizer(n_classes, radius_bits))
    chosen = np.random.default_rng(0).permutation(len(STEEP))[:300]
    for q, k in ((ASKED_STEEP, 10), (ASKED_STEEP[:1], 3), (ASKED_STEEP[:2], 150)):
        for options in ({}, {"ids": chosen}):
            expected = decoding(t).search(q, k, metric, **options)
            assert same(t.search(q, k, metric, **options), expected)
            assert same(t.search(q, k, metric, shortlist=len(STEEP), **options), expected)
    groups = t._searcher._kept.values()
    assert len(groups) == 3 and all(group.heads is not None for group in groups)
    sizes = [part.nbytes for group in groups for part in group.segments]
    sizes += [group.heads.data.nbytes + group.heads.tails.nbytes for group in groups]
    assert t._searcher._kept_bytes == sum(sizes)


@pytest.mark.usefixtures("small_groups")
def test_a_shortlist_of_few_queries_is_near_the_best():
    t = opened(STEEP, quantizer=steep_quantizer(1, 0))
    best, found = t.search(ASKED_STEEP, 5)[1], t.search(ASKED_STEEP, 5, shortlist=60)[1]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(best, found, strict=True)]) > 4.5


@pytest.mark.usefixtures("small_groups")
def test_heads_are_not_kept_beyond_the_limit(monkeypatch):
    q = steep_quantizer(1, 0)
    t, other = opened(STEEP, quantizer=q), opened(STEEP, quantizer=q)
    asked = np.concatenate([ASKED_STEEP, ASKED_STEEP])  # so many that heads are not made
    expected = t.search(asked, 5)
    monkeypatch.setattr(search, "KEPT_BYTES", t._searcher._kept_bytes + 300 * 20)
    found = other.search(asked[:1], 5)
    assert same(found, tuple(a[:1] for a in expected))
    searcher = other._searcher
    assert searcher._kept_bytes <= search.KEPT_BYTES
    assert 0 < sum(group.heads is not None for group in searcher._kept.values()) < 3


@pytest.mark.parametrize(("n_classes", "radius_bits"), [(1, 3), (3, 0)])
def test_bounds_from_heads_hold(n_classes, radius_bits):
    q = steep_quantizer(n_classes, radius_bits)
    scan = Scan(q, "float32")
    codes = q.encode(STEEP)
    parts, heads = scan.with_heads(list(scan.segments(codes, 0, np.zeros(0, np.int64))))
    turned = scan.turn(ASKED_STEEP[:3].astype(np.float64), few=True)
    rows = q.decode(codes).astype(np.float64)
    bounds = np.empty(len(rows), np.float32)
    for i in range(3):
        aim, doubt = scan.aim(turned, i)
        margin, slack = scan.margins(heads, doubt)
        bounds_of(heads, aim, slack, bounds)
        exact = (rows @ ASKED_STEEP[i].astype(np.float64))[heads.rows] / heads.radius
        assert (bounds >= exact).all()
        assert (bounds - exact).mean() < 0.5 * exact.std()  # and tell something
        for s, part in enumerate(parts):
            assert margin[s] == np.float32(scan.margin(part, turned[part.frame])[i])
            one = turned[part.frame]._replace(a=turned[part.frame].a[i : i + 1],
                                              b=turned[part.frame].b[i : i + 1])  # fmt: skip
            sums = scan.scores(part, one, leading=False)[0]
            n = int(aim.n_windows[part.frame])
            for row in range(0, len(part.rows), 7):
                total = windows_of(heads, aim, s, row, 0, n, aim.b[part.frame])
                assert np.float32(total) == sums[row]


def test_rows_without_a_head_are_scored_as_ever():
    flat = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    q = pp.PolarQuantizer(
        fine="bitshift", rotation="random", bits=2.0, radius_bits=0, state_bits=6, layout="rows"
    ).fit(flat)
    t = opened(flat, quantizer=q)
    assert t._searcher._scan.n_heads is None
    assert same(t.search(flat[:2], 5), decoding(t).search(flat[:2], 5))


def test_damage_is_found_by_a_search():
    blob = bytearray(pp.compress(MANY, quantizer=fitted("bitshift")))
    blob[len(blob) // 2] ^= 1
    with pytest.raises(pp.CorruptDataError, match="checksum"):
        pp.open(bytes(blob))["x"].search(ASKED)


@pytest.mark.parametrize("name", SETTINGS)
def test_coefficients_are_those_that_are_decoded(name):
    q = fitted(name)
    codes = q.encode(MANY)
    left_out = np.array([0, 7, 1099])
    scan, seen = Scan(q, "float32"), []
    for part in scan.segments(codes, 100, left_out):
        c = scan.coefficients(part, q.d_)
        frame = scan._frames[part.frame]
        axes = np.eye(D, dtype="f4") if frame.matrix is None else frame.matrix
        rows = c.T @ axes[:, scan.columns(part.frame, q.d_)].T
        rows = (rows + frame.mean) * part.radius[:, None]
        expected = q.decode(codes[part.rows - 100])
        assert np.abs(rows - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.isclose(np.linalg.norm(c, axis=0).max(), part.reach, rtol=1e-5)
        few = scan.n_leading(part.frame)
        assert 1 <= few <= len(c)
        assert np.array_equal(scan.coefficients(part, few), c[:few])
        seen.append(part.rows - 100)
    assert np.array_equal(np.sort(np.concatenate(seen)), np.setdiff1d(np.arange(1100), left_out))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.uint16]))
def test_sums_from_tables_are_those_of_a_loop(seed, dtype):
    rng = np.random.default_rng(seed)
    q, fields, n = rng.integers(0, 20, 3)
    tables = rng.standard_normal((q, fields, 7)).astype(np.float32)
    codes = rng.integers(0, 7, (fields, n)).astype(dtype)
    out = rng.standard_normal((q, n)).astype(np.float32)
    expected = out.copy()
    for f in range(fields):
        expected += tables[:, f, codes[f]]
    add_from_tables(tables, codes, out)
    assert np.array_equal(out, expected)
