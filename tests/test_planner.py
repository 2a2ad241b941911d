"""pp.fit: one target, met on rows like the training rows, at the settings that cost least."""

import json

import numpy as np
import pytest
import torch
from tables import correlated

import polarpack as pp
from polarpack.metrics import cosine, recall_at_k, relative_error, snr_db
from polarpack.planner import NEGLIGIBLE, TARGETS, Target, _quicker_equal

D = 16
TRAIN, TEST = correlated(1200, D), correlated(600, D, seed=1)


def coded(q, x):
    """Bits per float and decoded rows."""
    codes = q.encode(x)
    return q.rate_bits(codes) / x.size, q.decode(codes)


# -- the target ------------------------------------------------------------------------------------
def test_exactly_one_target():
    for given in (
        {},
        {"bits": 2.0, "snr_db": 10.0},
        {"cosine": 0.9, "max_error": 0.1, "recall": 0.5},
    ):
        with pytest.raises(pp.InputError, match="exactly one of bits, size_bytes"):
            Target.of(**given)
    with pytest.raises(pp.InputError, match="exactly one"):
        pp.fit(TRAIN)
    with pytest.raises(pp.InputError, match="bits=2.0, recall=0.9"):
        pp.fit(TRAIN, bits=2.0, recall=0.9)
    for kind in TARGETS:
        assert Target.of(**{kind: 0.5}) == Target(kind, 0.5)
    assert Target.of(max_error=0) == Target("max_error", 0.0)
    assert Target.of(bits=np.float32(2)).value == 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": -2.0},
        {"bits": float("nan")},
        {"bits": "2"},
        {"bits": True},
        {"bits": [2.0]},
        {"size_bytes": 0},
        {"snr_db": float("nan")},
        {"snr_db": float("inf")},
        {"cosine": 0.0},
        {"cosine": 1.01},
        {"cosine": -0.5},
        {"recall": 1.5},
        {"max_error": -0.1},
        {"max_error": float("nan")},
    ],
    ids=str,
)
def test_targets_out_of_range(wrong):
    with pytest.raises(pp.InputError, match=f"{next(iter(wrong))}"):
        Target.of(**wrong)
    if "size_bytes" not in wrong:
        with pytest.raises(pp.InputError):
            pp.fit(TRAIN, **wrong)
    with pytest.raises(pp.InputError):
        pp.compress(TRAIN, **wrong)


def test_other_arguments_are_checked():
    for wrong in ({"layout": "columns"}, {"optimize": "mse"}):
        with pytest.raises(pp.InputError, match="expected"):
            pp.fit(TRAIN, bits=2.0, **wrong)
    bad = TRAIN.copy()
    bad[42, 0] = np.nan
    for wrong, message in (
        (bad, "row 42"),
        (TRAIN[0], r"\(n, d\)"),
        (TRAIN[:0], "at least one row"),
        (TRAIN.astype(int), "dtype"),
        ([[1.0]], "array"),
    ):
        with pytest.raises(pp.InputError, match=message):
            pp.fit(wrong, bits=2.0)


# -- rates and qualities ---------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [0.5, 2.0, 5.0])
def test_code_bits_on_rows_like_the_training_rows(bits):
    q = pp.fit(TRAIN, bits=bits)
    rate, decoded = coded(q, TEST)
    assert rate == pytest.approx(bits, rel=0.07)
    plain, by_preset = coded(pp.preset("trellis", bits=bits).fit(TRAIN), TEST)
    gain = snr_db(TEST, decoded) - snr_db(TEST, by_preset)
    assert gain > 6.02 * (rate - plain) - 0.3  # never much worse than the plain choice


def test_snr():
    rate, decoded = coded(pp.fit(TRAIN, snr_db=15.0), TEST)
    assert snr_db(TEST, decoded) == pytest.approx(15.0, abs=0.6)
    assert rate < 3.2


def test_cosine():
    _, decoded = coded(pp.fit(TRAIN, cosine=0.97), TEST)
    assert np.mean(cosine(TEST, decoded)) == pytest.approx(0.97, abs=0.006)


def test_recall():
    _, decoded = coded(pp.fit(TRAIN, recall=0.8), TEST)
    assert recall_at_k(TEST, decoded) == pytest.approx(0.8, abs=0.06)


def test_max_error():
    _, decoded = coded(pp.fit(TRAIN, max_error=0.1), TEST)
    error = relative_error(TEST, decoded)
    assert np.mean(error > 0.1) < 0.03 and np.quantile(error, 0.99) > 0.07


@pytest.mark.parametrize(
    "target", [{"bits": 2.0}, {"bits": 8.0}, {"snr_db": 10.0}, {"cosine": 0.9}]
)
def test_rows_layout(target):
    q = pp.fit(TRAIN, layout="rows", **target)
    rate, decoded = coded(q, TEST)
    assert q.layout == "rows" and q.own_model is None
    if "bits" in target:
        assert rate <= target["bits"]
    elif "snr_db" in target:
        assert snr_db(TEST, decoded) > target["snr_db"] - 0.5
    else:
        assert np.mean(cosine(TEST, decoded)) > target["cosine"] - 0.01


@pytest.mark.parametrize("target", [{"snr_db": 300.0}, {"max_error": 1e-12}])
def test_what_cannot_be_reached_says_what_can(target):
    with pytest.raises(pp.InputError, match=r"out of reach: the best found is [-0-9.e]+"):
        pp.fit(TRAIN, **target)


def test_optimize_for_cosine_goes_polar():
    """Rows of very different length: what directions lose counts, whatever their length."""
    length = np.exp(1.5 * np.random.default_rng(0).standard_normal((len(TRAIN), 1)))
    x = (TRAIN * length).astype(np.float32)
    by = {o: coded(pp.fit(x, bits=1.5, optimize=o), x)[1] for o in ("snr", "cosine")}
    mean = {o: np.mean(cosine(x, y)) for o, y in by.items()}
    assert mean["cosine"] > mean["snr"] + 0.02
    assert snr_db(x, by["snr"]) > snr_db(x, by["cosine"])


# -- and the rest ----------------------------------------------------------------------------------
def test_same_seed_same_bytes():
    once, again = (pp.fit(TRAIN, bits=2.0, seed=3).to_bytes() for _ in range(2))
    assert once == again


def test_report_lists_the_candidates():
    q = pp.fit(TRAIN, bits=2.0)
    candidates = q.report()["candidates"]
    assert len(candidates) >= 2
    assert all({"settings", "code_bits", "snr"} <= set(line) for line in candidates)
    json.dumps(q.report())


def test_no_time_means_the_first_candidate():
    q = pp.fit(TRAIN, bits=2.0, time_budget=0.0)
    assert len(q.report()["candidates"]) == 1
    assert coded(q, TEST)[0] == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((1, 1), np.float32),
        np.ones((1, 5)),
        correlated(3, 4).astype(np.float16),
        np.full((50, 4), 7.0),
        np.eye(6) * 1e30,
        correlated(64, 1),
        torch.from_numpy(correlated(40, 3)).bfloat16(),
    ],
    ids=lambda x: f"{x.dtype}{tuple(x.shape)}",
)
def test_odd_training_rows(x):
    q = pp.fit(x, bits=3.0)
    assert q.decode(q.encode(x)).shape == tuple(x.shape)
    assert pp.PolarQuantizer.from_bytes(q.to_bytes()).hash == q.hash


# -- rows of unequal importance --------------------------------------------------------------------
def weighted_snr(x, y, w):
    error = np.square(x.astype(np.float64) - y).sum(axis=1)
    return 10 * np.log10((w * np.square(x, dtype=np.float64).sum(axis=1)).sum() / (w @ error))


WEIGHTED = correlated(900, 16, seed=3)
ROW_WEIGHTS = np.where(np.arange(900) % 5 == 0, 16.0, 1.0)


def test_row_weights_spend_the_bytes_where_errors_count():
    x, w = WEIGHTED, ROW_WEIGHTS
    plain = pp.decompress(pp.compress(x, bits=6.0))
    blob = pp.compress(x, row_weights=w, bits=6.0)
    assert len(blob) <= 6.0 * x.size / 8
    y = pp.decompress(blob)
    assert weighted_snr(x, y, w) > weighted_snr(x, plain, w) + 1.0
    error = np.square(x - y).mean(axis=1)
    assert error[w == 16].mean() < 0.2 * error[w == 1].mean()


def test_a_quality_of_weighted_rows():
    x, w = WEIGHTED, ROW_WEIGHTS
    y = pp.decompress(pp.compress(x, snr_db=20.0, row_weights=w))
    assert 20.0 <= weighted_snr(x, y, w) < 21.5


def test_quantizers_of_weighted_rows(tmp_path):
    """Fitted once, given the weights of each table to be coded; told by files; 1 where not given."""
    x, w = WEIGHTED, ROW_WEIGHTS
    q = pp.fit(x, bits=2.0, row_weights=w)
    again = pp.PolarQuantizer.from_bytes(q.to_bytes())
    codes = q.encode(x, row_weights=w)
    assert np.array_equal(again.encode(x, row_weights=w), codes)
    assert weighted_snr(x, q.decode(codes), w) > weighted_snr(x, q.decode(q.encode(x)), w) + 0.5
    pp.save(tmp_path / "t.polar", {"a": x, "b": x[:90]}, quantizer=q, row_weights={"a": w})
    f = pp.open(tmp_path / "t.polar")
    assert np.array_equal(f["a"][...], q.decode(codes))
    assert np.array_equal(f["b"][...], q.decode(q.encode(x[:90])))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_only_ratios_of_row_weights_count(scale):
    x, w = WEIGHTED[:200], ROW_WEIGHTS[:200] * scale
    q = pp.PolarQuantizer(fine="trellis", step=0.2, radius_bits=0, rotation="klt")
    codes = q.fit(x, row_weights=w).encode(x, row_weights=w)
    assert np.array_equal(np.unique(codes[:, 0]), [1, 2])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: pp.compress(x, bits=4.0, row_weights=w[1:]),
        lambda x, w: pp.compress(x, bits=4.0, row_weights=-w),
        lambda x, w: pp.compress(x, bits=4.0, row_weights=w * np.nan),
        lambda x, w: pp.compress(x, bits=4.0, row_weights=w[None]),
        lambda x, w: pp.compress(x, cosine=0.9, row_weights=w),
        lambda x, w: pp.compress(x, bits=3.0, layout="rows", row_weights=w),
        lambda x, w: pp.compress(x, max_error=0.1, row_weights=w),
        lambda x, w: pp.fit(x, bits=2.0, optimize="cosine", row_weights=w),
        lambda x, w: pp.fit(x, bits=2.0).encode(x, row_weights=w),
        lambda x, w: pp.PolarQuantizer(radius_bits=4).fit(x, row_weights=w),
        lambda x, w: pp.save("never.polar", {"a": x}, bits=4.0, row_weights=w),
    ],
)
def test_wrong_row_weights(call):
    with pytest.raises(pp.InputError, match="row_weights"):
        call(WEIGHTED[:200], ROW_WEIGHTS[:200])


@pytest.mark.parametrize(("n", "d", "bits"), [(200, 16, 5.0), (900, 64, 6.5), (400, 8, 7.0)])
def test_small_tables_take_high_rates_in_the_rows_layout(n: int, d: int, bits: float):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((n, d)) * np.geomspace(1, 0.1, d)).astype(np.float32)
    blob = pp.compress(x, bits=bits, layout="rows")
    assert len(blob) <= bits * x.size / 8
    assert snr_db(x, pp.decompress(blob)) > 10


def test_rows_out_of_reach_name_a_size_that_is_within():
    x = np.random.default_rng(0).standard_normal((2000, 4)).astype(np.float32)
    with pytest.raises(pp.InputError, match=r"the least found is \d+") as error:
        pp.compress(x, bits=1.0, layout="rows")
    least = int(str(error.value).split()[-1])
    assert 2000 < least < 4000  # a byte a row, and what does not grow with the rows
    assert len(pp.compress(x, size_bytes=least, layout="rows")) <= least


def test_of_equal_chains_the_quick_one_is_taken():
    plain = {"fine": "trellis", "rotation": "klt"}
    some = plain | {"n_classes": 8, "n_leading": 64}
    every = plain | {"n_classes": 8, "n_leading": 384}
    little = 0.9 * NEGLIGIBLE
    assert _quicker_equal([(16.0, every), (16.0 - little, some)], 0, 384) == 1
    assert _quicker_equal([(16.0, every), (16.0 - 3 * little, some)], 0, 384) == 0
    assert _quicker_equal([(16.0 - little, some), (16.0, every), (15.99, plain)], 1, 384) == 2
    # next to nothing is to be had from fewer classes of few axes
    assert _quicker_equal([(16.0, some), (16.0 - little, plain)], 0, 384) == 0
    book = {"fine": "codebook", "n_codewords": 256}
    shift = {"fine": "bitshift", "rotation": "klt", "n_classes": 8, "n_leading": 384}
    assert _quicker_equal([(16.0, shift), (16.0, book)], 0, 384) == 0
