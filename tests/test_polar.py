"""PolarQuantizer: every chain of stages encodes, decodes, travels, and refuses what is not for it."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import same_bits, vectors
from tables import FIXED_RATE, SETTINGS, TRELLISES, D, correlated, fitted

import polarpack as pp
from polarpack import PolarQuantizer
from polarpack.entropy.packing import field_widths
from polarpack.metrics import cosine, snr_db
from polarpack.rotation import BLOCK_ROWS

EVERY = pytest.mark.parametrize("name", SETTINGS)
TEST_ROWS = correlated(300, D, seed=1)


def twin(q):
    return PolarQuantizer.from_bytes(q.to_bytes())


# -- every chain -----------------------------------------------------------------------------------
@EVERY
def test_codes_and_decoded_rows(name):
    q, before = fitted(name), TEST_ROWS.copy()
    codes = q.encode(TEST_ROWS)
    assert same_bits(TEST_ROWS, before)
    assert codes.shape == (len(TEST_ROWS), q.n_fields) and codes.dtype in (np.uint8, np.uint16)
    assert q.alphabet_sizes.shape == (q.n_fields,) and q.alphabet_sizes.dtype == np.int64
    assert (codes < q.alphabet_sizes).all()
    decoded = q.decode(codes)
    assert decoded.shape == TEST_ROWS.shape and decoded.dtype == np.float32
    floor = {"polar-vq": 4, "pq": 5, "leading axes": 4, "allocated": 6, "bitshift classes": 7}.get(
        name, 10
    )
    assert snr_db(TEST_ROWS, decoded) > floor
    assert same_bits(q.decode(codes.astype(np.int64)), decoded)
    assert same_bits(q.decode(torch.from_numpy(codes.astype(np.int32))).numpy(), decoded)


@EVERY
def test_rows_do_not_depend_on_their_neighbours(name):
    q = fitted(name)
    codes = q.encode(TEST_ROWS)
    decoded = q.decode(codes)
    for some in (slice(0, 1), slice(7, 50), slice(299, 300), slice(0, 0)):
        assert same_bits(q.encode(TEST_ROWS[some]), codes[some])
        assert same_bits(q.decode(codes[some]), decoded[some])


@EVERY
def test_bytes_restore_the_quantizer(name):
    q = fitted(name)
    data = q.to_bytes()
    again = PolarQuantizer.from_bytes(data)
    assert again.to_bytes() == data and again.hash == q.hash and len(q.hash) == 64
    assert repr(again) == repr(q) and again.layout == q.layout
    codes = q.encode(TEST_ROWS)
    assert same_bits(again.decode(codes), q.decode(codes))
    assert same_bits(again.encode(TEST_ROWS), codes)
    assert again.drift(TEST_ROWS) == q.drift(TEST_ROWS)
    assert again.report()["side_bytes"] == len(data)
    assert PolarQuantizer.from_bytes(memoryview(data)).hash == q.hash


@EVERY
def test_same_seed_same_bytes_and_fit_twice(name):
    rows = correlated(500, D)
    once = PolarQuantizer(**SETTINGS[name]).fit(rows)
    assert once.to_bytes() == fitted(name).to_bytes()
    other = correlated(200, 7, seed=3)
    assert PolarQuantizer(**SETTINGS[name]).fit(other).fit(rows).to_bytes() == once.to_bytes()


@EVERY
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_and_layouts(name, dtype):
    q = fitted(name)
    x = TEST_ROWS.astype(dtype)
    codes = q.encode(x)
    strided = np.repeat(x, 2, axis=1)[:, ::2]
    assert same_bits(q.encode(strided), codes)
    assert same_bits(q.encode(np.asfortranarray(x)), codes)
    assert same_bits(q.encode(x.astype(x.dtype.newbyteorder())), codes)
    tensor = q.encode(torch.from_numpy(x))
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), codes)
    assert q.encode(torch.from_numpy(x).bfloat16()).shape == codes.shape


@EVERY
def test_no_rows(name):
    q = fitted(name)
    codes = q.encode(np.zeros((0, D), np.float32))
    assert codes.shape == (0, q.n_fields)
    assert q.decode(codes).shape == (0, D)
    assert q.drift(np.zeros((0, D), np.float32)) == 1.0


@EVERY
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((5, D)),
        np.full((5, D), 3.0),
        np.full((1, D), -2.5),
        np.full((40, D), 1e30),
        np.linspace(-1, 1, 3 * D).reshape(3, D) * 1e-30,
        np.full((4, D), np.float32(1e-45), np.float32),
        np.eye(D, dtype=np.float16) * np.float16(65504),
        np.array([[1e300] * D, [-1e-300] * D]),
    ],
    ids=["zeros", "constant", "one row", "1e30", "1e-30", "denormal", "float16 max", "1e300"],
)
def test_odd_training_rows(name, x):
    settings = dict(SETTINGS[name])
    if settings.get("n_classes"):
        settings["n_classes"] = 2
    q = PolarQuantizer(**settings).fit(x)
    codes = q.encode(x)
    decoded = q.decode_as(codes, x.dtype)
    assert np.isfinite(decoded).all() and decoded.dtype == x.dtype
    assert same_bits(twin(q).decode_as(codes, x.dtype), decoded)
    if not x.any():
        assert not decoded.any()


@pytest.mark.parametrize("name", ["trellis", "polar trellis", "polar-vq", "int8 rows", "float16"])
def test_one_dimension(name):
    settings = SETTINGS[name] | {"bits": 12.0} if "bits" in SETTINGS[name] else SETTINGS[name]
    x = correlated(200, 1)
    q = PolarQuantizer(**settings).fit(x)
    decoded = q.decode(q.encode(x))
    assert decoded.shape == (200, 1) and snr_db(x, decoded) > 5
    assert same_bits(twin(q).decode(q.encode(x)), decoded)


@pytest.mark.parametrize("name", ["trellis", "polar trellis", "classes", "pq", "random lloyd"])
@settings(max_examples=25)
@given(x=vectors(min_d=D, max_d=D))
def test_any_rows_with_a_quantizer_of_others(name, x):
    q = fitted(name)
    codes = q.encode(x)
    assert (codes < q.alphabet_sizes).all()
    decoded = q.decode_as(codes, x.dtype)
    assert np.isfinite(decoded).all() and decoded.shape == x.shape and decoded.dtype == x.dtype
    assert q.drift(x) >= 0


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("exponent", [-100, -20, 15, 90])
def test_scale_is_of_no_concern(name, exponent):
    """Rows times a power of two: the same codes, decoded rows times the same."""
    x = np.ldexp(correlated(500, D), exponent)
    q = PolarQuantizer(**SETTINGS[name]).fit(x)
    decoded = q.decode(q.encode(x))
    reference = fitted(name).decode(fitted(name).encode(correlated(500, D)))
    if SETTINGS[name].get("step") is None:  # a step is in units of the scaled rows
        assert abs(snr_db(x, decoded) - snr_db(correlated(500, D), reference)) < 0.3


def test_outliers_do_not_spoil_the_others():
    """A row 1e30 times as large is held at the clip; it is for the codec to escape it."""
    q = fitted("trellis")
    x = TEST_ROWS.copy()
    x[3] *= 1e30
    codes = q.encode(x)
    others = np.arange(len(x)) != 3
    assert same_bits(codes[others], q.encode(TEST_ROWS)[others])
    assert np.isfinite(q.decode(codes)).all()


FIT_AND_MEASURE = """
import numpy as np
import polarpack as pp
from polarpack.metrics import snr_db
from tables import correlated
tables = {
    "rows": correlated(300, 12),
    "one direction": np.outer(correlated(300, 1), np.ones(12)),
    "one column": correlated(300, 12) * np.eye(12)[0] + 3.0,
}
for name, rate in [
    ("rows", {"bits": 20.0}), ("rows", {"bits": 32.0}), ("rows", {"step": 1e-12}), ("rows", {"step": 1e-40}),
    ("one direction", {"bits": 8.0}), ("one column", {"bits": 4.0}), ("one column", {"bits": 16.0}),
]:
    x = tables[name]
    print(name, rate, flush=True)
    q = pp.PolarQuantizer(fine="trellis", rotation="klt", radius_bits=0, **rate).fit(x)
    assert snr_db(x, q.decode(q.encode(x))) > 70
"""


def test_steps_finer_than_indices_reach():
    """Where the rate asks for a step at which 16-bit indices would saturate, the finest step that
    they can hold is taken. In a process of its own, since it used to end in a crash."""
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", FIT_AND_MEASURE]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("trained", "given_"), [(1e-300, 1e300), (1e300, 1e-300), (1e300, 1e300)])
def test_float64_of_any_scale(name, trained, given_):
    x = correlated(300, D).astype(np.float64)
    q = PolarQuantizer(**SETTINGS[name]).fit(x * trained)
    codes = q.encode(x * given_)
    for dtype in ("float64", "float32", "float16"):
        assert np.isfinite(q.decode_as(codes, np.dtype(dtype))).all()
    if trained == given_:
        y = q.decode_as(codes, np.dtype(np.float64))
        plain = PolarQuantizer(**SETTINGS[name]).fit(x)
        reference = plain.decode(plain.encode(x))
        if "step" not in SETTINGS[name]:
            assert abs(snr_db(x * given_, y) - snr_db(x, reference)) < 1


# -- single stages ---------------------------------------------------------------------------------
def test_first_stages_alone():
    q = PolarQuantizer(heads=2, stages=3, n_codewords=16, radius_bits=4).fit(correlated(500, D))
    codes = q.encode(TEST_ROWS)
    by_stages = [q.decode(codes, stages=s) for s in (1, 2, 3)]
    assert same_bits(by_stages[2], q.decode(codes)) and same_bits(
        q.decode(codes, stages=9), by_stages[2]
    )
    errors = [snr_db(TEST_ROWS, y) for y in by_stages]
    assert errors[0] + 1 < errors[1] and errors[1] + 1 < errors[2]
    assert same_bits(fitted("trellis").decode(fitted("trellis").encode(TEST_ROWS), stages=1),
                     fitted("trellis").decode(fitted("trellis").encode(TEST_ROWS)))  # fmt: skip


def test_the_radius_is_a_column_of_its_own():
    q = fitted("polar-vq")
    x = TEST_ROWS
    codes = q.encode(x)
    assert q.alphabet_sizes[0] == 16 and q.n_fields == 1 + 3 * 2
    doubled = q.encode(2 * x)
    assert np.array_equal(doubled[:, 1:], codes[:, 1:])
    assert (doubled[:, 0] >= codes[:, 0]).all() and (doubled[:, 0] > codes[:, 0]).any()
    y = q.decode(codes)
    ratio = np.linalg.norm(y, axis=1) / np.linalg.norm(x, axis=1)
    assert 0.7 < np.median(ratio) < 1.1  # a codeword of few bits is shorter than its direction
    zero = q.encode(np.zeros((1, D), np.float32))
    assert zero[0, 0] == 0 and not q.decode(zero).any()


def test_a_rotation_of_the_callers():
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0]
    q = PolarQuantizer(fine="grid", scalar_bits=8, rotation=axes, radius_bits=0).fit(
        correlated(500, D)
    )
    y = q.decode(q.encode(TEST_ROWS))
    assert snr_db(TEST_ROWS, y) > 25
    assert same_bits(twin(q).decode(q.encode(TEST_ROWS)), y)
    for bad in (np.ones((D, D)), np.eye(D + 1), np.full((D, D), np.nan), np.eye(D)[0]):
        with pytest.raises(pp.InputError, match="orthogonal"):
            PolarQuantizer(rotation=bad, radius_bits=0).fit(correlated(100, D))


@pytest.mark.parametrize("name", FIXED_RATE)
def test_fixed_rates(name):
    q = fitted(name)
    bits = q.report()["fixed_bits_per_row"]
    assert bits == pytest.approx(np.log2(q.alphabet_sizes).sum())
    assert q.rate_bits(q.encode(TEST_ROWS)) == pytest.approx(bits * len(TEST_ROWS))


@pytest.mark.parametrize("name", ["trellis", "polar trellis", "classes", "leading axes"])
def test_a_trellis_has_the_rate_asked_for(name):
    q = fitted(name)
    x = correlated(500, D)
    rate = q.rate_bits(q.encode(x)) / x.size
    assert rate == pytest.approx(SETTINGS[name]["bits"], rel=0.03)
    assert q.rate_bits(q.encode(TEST_ROWS)) / TEST_ROWS.size < 1.1 * rate


def test_bytes_kept_are_those_of_this_rotation():
    """Which is stored once for all rates, and anew once it is another."""
    x = correlated(500, D)
    q = pp.PolarQuantizer(**SETTINGS["classes"]).fit(x)
    first = q.to_bytes()
    other = q.with_step(x, q.fine_.step_ * 2)
    assert q.to_bytes() == first
    assert PolarQuantizer.from_bytes(other.to_bytes()).to_bytes() == other.to_bytes() != first
    turned = x[:, ::-1]
    assert (
        q.fit(turned).to_bytes() == pp.PolarQuantizer(**SETTINGS["classes"]).fit(turned).to_bytes()
    )


@pytest.mark.parametrize("name", ["trellis", "classes"])
def test_many_rows_are_encoded_as_few(name, monkeypatch):
    x = correlated(BLOCK_ROWS * 2 + 77, D, seed=3)
    codes = fitted(name).encode(x)
    parts = [fitted(name).encode(x[s : s + BLOCK_ROWS]) for s in range(0, len(x), BLOCK_ROWS)]
    assert np.array_equal(codes, np.concatenate(parts))
    monkeypatch.setenv("POLARPACK_THREADS", "3")
    assert np.array_equal(fitted(name).encode(x), codes)


def test_with_step():
    q, x = fitted("trellis"), correlated(500, D)
    finer = q.with_step(x, q.fine_.step_ / 4)
    coarse = snr_db(x, q.decode(q.encode(x)))
    fine = snr_db(x, finer.decode(finer.encode(x)))
    assert 10 < fine - coarse < 14  # two bits are 12 dB
    assert finer.rate_bits(finer.encode(x)) / x.size == pytest.approx(5.0, abs=0.2)
    assert q.to_bytes() == fitted("trellis").to_bytes() and finer.hash != q.hash
    with pytest.raises(pp.InputError, match="trellis"):
        fitted("pq").with_step(x, 0.1)
    with pytest.raises(pp.InputError, match="any rate"):
        fitted("float16").with_bits(x, 2.0)
    with pytest.raises(pp.InputError, match="bits in"):
        fitted("pq").with_bits(x, 0)


def test_decoded_numbers_stay_within_walls():
    """Of rows that end at zero (ReLU's, histograms), what decodes below it is held there."""
    x = np.maximum(correlated(2000, D), 0)
    q = PolarQuantizer(fine="trellis", rotation="klt", radius_bits=0, bits=2.0).fit(x)
    assert (q.low_, q.high_) == (0, None)
    codes = q.encode(x)
    held = q.decode(codes)
    assert held.min() == 0
    assert same_bits(twin(q).decode(codes), held)
    q.low_ = None
    free = q.decode(codes)
    assert free.min() < -0.1 and snr_db(x, held) > snr_db(x, free) + 0.3
    assert same_bits(held, np.where(free < 0, np.float32(0), free))
    assert fitted("trellis").low_ is None  # Gaussian numbers have an extreme, but no wall


def test_drift():
    q = fitted("trellis")
    assert 0.7 < q.drift(TEST_ROWS) < 1.4
    assert q.drift(np.random.default_rng(0).standard_normal((500, D)) * 30) != pytest.approx(
        1, abs=0.3
    )
    assert q.drift(TEST_ROWS * np.float32(1e-4)) > 2


def test_the_report_and_repr():
    q = fitted("polar-vq")
    report = q.report()
    assert report["d"] == D and report["n_fields"] == q.n_fields
    assert report["side_bytes"] == len(q.to_bytes())
    json.dumps(report)
    assert "4-bit radius" in repr(q) and "not fitted" in repr(PolarQuantizer())


# -- misuse ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 0},
        {"heads": 2.5},
        {"stages": 0},
        {"n_codewords": 1000},
        {"n_codewords": 1},
        {"n_codewords": 1 << 17},
        {"radius_bits": -1},
        {"radius_bits": 17},
        {"radius_norm": "l1"},
        {"fine": "wavelet"},
        {"fine": "trellis"},
        {"scalar_bits": 0, "fine": "grid"},
        {"scalar_bits": 17, "fine": "grid"},
        {"rotation": "pca"},
        {"bits": 0},
        {"bits": -1.0},
        {"bits": float("nan")},
        {"bits": 33},
        {"bits": "2"},
        {"layout": "columns"},
        {"layout": "rows", "fine": "trellis", "bits": 2.0},
        {"seed": -1},
        {"seed": 0.5},
        {"beam": 0},
        {"beam": "5"},
        {"n_components": 0, "rotation": "klt"},
        {"n_components": -3, "rotation": "klt"},
        {"n_components": 1.5, "rotation": "klt"},
        {"n_classes": 2},
        {"n_classes": 0, "fine": "trellis", "bits": 2.0, "rotation": "klt"},
        {"n_classes": 257, "fine": "trellis", "bits": 2.0, "rotation": "klt"},
        {"n_classes": 2, "n_leading": 0, "fine": "trellis", "bits": 2.0, "rotation": "klt"},
        {"n_states": 7, "fine": "trellis", "bits": 2.0},
        {"step": 0.0, "fine": "trellis"},
        {"step": float("inf"), "fine": "trellis"},
        {"step": "x", "fine": "trellis"},
        {"rate_weight": -1.0, "fine": "trellis", "bits": 2.0},
        {"rate_weight": float("nan"), "fine": "trellis", "bits": 2.0},
    ],
    ids=str,
)
def test_settings_are_checked_at_once(wrong):
    with pytest.raises(pp.InputError, match=r"expected|needs"):
        PolarQuantizer(**wrong)


def test_unfitted_use():
    q = PolarQuantizer()
    x = np.zeros((2, 256), np.float32)
    for call in (
        lambda: q.encode(x),
        lambda: q.decode(np.zeros((2, 5), int)),
        lambda: q.to_bytes(),
        lambda: q.hash,
        lambda: q.alphabet_sizes,
        lambda: q.n_fields,
        lambda: q.report(),
        lambda: q.drift(x),
        lambda: q.get_config(),
        lambda: PolarQuantizer(fine="trellis", bits=2.0).with_step(x, 0.1),
    ):
        with pytest.raises(pp.NotFittedError, match="fit first"):
            call()
    assert not q.is_fitted and fitted("pq").is_fitted


@EVERY
def test_rows_that_are_not_for_it(name):
    q = fitted(name)
    bad = np.zeros((30, D), np.float32)
    bad[11, 3] = np.nan
    for use in (q.encode, q.drift, PolarQuantizer(**SETTINGS[name]).fit):
        with pytest.raises(pp.InputError, match="row 11"):
            use(bad)
        for x in (np.zeros((3, D), int), bad[0], np.zeros((2, 2, D)), [[0.0] * D]):
            with pytest.raises(pp.InputError):
                use(x)
    with pytest.raises(pp.InputError, match=rf"\(n, {D}\), got \(30, {D - 1}\)"):
        q.encode(np.zeros((30, D - 1)))
    with pytest.raises(pp.InputError, match="at least one row"):
        PolarQuantizer(**SETTINGS[name]).fit(np.zeros((0, D)))
    with pytest.raises(pp.InputError):
        PolarQuantizer(**SETTINGS[name]).fit(np.zeros((3, 0)))


@EVERY
def test_codes_that_are_not_for_it(name):
    q = fitted(name)
    codes = q.encode(TEST_ROWS[:4]).astype(np.int64)
    for bad in (codes[:, :-1], codes.astype(float), codes[0], codes - 70000, codes + 70000):
        with pytest.raises(pp.InputError, match="expected codes"):
            q.decode(bad)


def test_more_dimensions_than_a_file_can_say():
    with pytest.raises(pp.InputError, match="65536"):
        PolarQuantizer(fine="float16", radius_bits=0).fit(np.zeros((1, (1 << 16) + 1), np.float16))


# -- the bytes -------------------------------------------------------------------------------------
def test_wrong_bytes():
    good = fitted("pq").to_bytes()
    for bad in (b"", b"PQ", good[:20], b"XX" + good[2:], good[:-1], good + b"\0"):
        with pytest.raises(pp.CorruptDataError):
            PolarQuantizer.from_bytes(bad)
    with pytest.raises(pp.UnsupportedVersionError, match="version 7"):
        PolarQuantizer.from_bytes(good[:2] + b"\x07" + good[3:])
    for i in range(len(good)):
        flipped = bytearray(good)
        flipped[i] ^= 1 << (i % 8)
        with pytest.raises(pp.FormatError):
            PolarQuantizer.from_bytes(bytes(flipped))
    assert zlib.crc32(good[7:]).to_bytes(4, "little") == good[3:7]


DECODE = """
import hashlib, sys
import numpy as np
import polarpack as pp
q = pp.PolarQuantizer.from_bytes(open(sys.argv[1], "rb").read())
codes = np.load(sys.argv[2])
print(hashlib.sha256(q.decode(codes).tobytes()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trellis", "classes", "polar-vq", "random lloyd"])
def test_decoding_does_not_depend_on_threads(name, tmp_path):
    x = correlated(9000, 64)
    q = PolarQuantizer(**SETTINGS[name]).fit(x[:2000])
    (tmp_path / "q").write_bytes(q.to_bytes())
    np.save(tmp_path / "codes.npy", q.encode(x))
    seen = set()
    for threads in ("1", "2", "5"):
        names = ("POLARPACK_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env = os.environ | dict.fromkeys(names, threads)
        out = subprocess.run(
            [sys.executable, "-c", DECODE, tmp_path / "q", tmp_path / "codes.npy"],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        seen.add(out.stdout.strip())
    assert len(seen) == 1


def test_trellis_names():
    assert set(TRELLISES) | set(FIXED_RATE) == set(SETTINGS)
    assert cosine(TEST_ROWS, TEST_ROWS).min() > 0.999999


# -- weights ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("fine", ["trellis", "bitshift"])
def test_weights_move_errors_where_they_count_less(fine):
    x = correlated(1500, D)
    weights = np.where(np.arange(D) < 4, 25.0, 1.0)
    common = {"fine": fine, "rotation": "klt", "bits": 2.0, "radius_bits": 0}
    plain, weighted = (PolarQuantizer(**common, weights=w).fit(x[:1000]) for w in (None, weights))
    test = x[1000:]
    errors = [((q.decode(q.encode(test)) - test) ** 2).mean(axis=0) for q in (plain, weighted)]
    assert (errors[1] @ weights) < 0.8 * (errors[0] @ weights)
    assert errors[1][:4].sum() < errors[0][:4].sum()
    again = PolarQuantizer.from_bytes(weighted.to_bytes())
    assert same_bits(again.decode(again.encode(test)), weighted.decode(weighted.encode(test)))


def test_weights_by_the_planner():
    x = correlated(900, D)
    weights = 4.0 ** -np.arange(D)
    error = [
        ((pp.decompress(pp.compress(x, bits=3.0, weights=w)) - x) ** 2).mean(axis=0) @ weights
        for w in (None, weights)
    ]
    assert error[1] < 0.5 * error[0]
    q = pp.fit(x, bits=2.0, weights=weights)
    assert q.columns_ is not None and q.report()["candidates"][0]["interval"] > 0


@pytest.mark.parametrize(
    "weights", [np.ones(D + 1), np.ones((D, 1)), -np.ones(D), np.zeros(D), [np.nan] * D, ["a"] * D]
)
def test_bad_weights(weights):
    x = correlated(50, D)
    for use in (
        lambda: PolarQuantizer(weights=weights, fine="grid").fit(x),
        lambda: pp.compress(x, bits=2.0, weights=weights),
        lambda: pp.fit(x, bits=2.0, weights=weights),
    ):
        with pytest.raises(pp.InputError, match="weights"):
            use()


@pytest.mark.parametrize(
    "settings_",
    [
        {"fine": "trellis", "n_states": 16, "rate_weight": 0.3, "rotation": "klt"},
        {"fine": "bitshift", "state_bits": 8, "rotation": "klt", "layout": "rows"},
        {"fine": "codebook", "n_codewords": 16, "stages": 2, "beam": 3, "spherical": False},
        {"fine": "codebook", "n_codewords": 16, "stages": 1, "rotation": "klt", "layout": "rows"},
    ],
    ids=["trellis", "bitshift", "stages", "allocated"],
)
def test_another_rate_of_a_quantizer_from_a_file(settings_):
    """It has the settings of the one that was written: the same codes at another rate."""
    x = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
    x *= 0.8 ** np.arange(16, dtype=np.float32)
    q = PolarQuantizer(**{"radius_bits": 0, "bits": 2.0, **settings_}).fit(x)
    again = PolarQuantizer.from_bytes(q.to_bytes())
    here, there = q.with_bits(x, 1.5), again.with_bits(x, 1.5)
    assert there.alphabet_sizes.tolist() == here.alphabet_sizes.tolist()
    config, wanted = there.get_config()["fine"], here.get_config()["fine"]
    for name in wanted.keys() - {"step"}:
        assert config[name] == wanted[name]
    error = np.square(x - there.decode(there.encode(x))).sum()
    assert error < 1.03 * np.square(x - here.decode(here.encode(x))).sum()


@pytest.mark.parametrize("d", [3, 7, 50])
@pytest.mark.parametrize("fine", ["bitshift", "codebook"])
def test_rows_take_whole_bytes(d, fine):
    """No bit of a packed row is left unused, and none more than asked for but in the first byte."""
    x = np.random.default_rng(0).standard_normal((300, d)).astype(np.float32)
    for bits in (0.5, 1.0, 2.3):
        q = PolarQuantizer(
            fine=fine, bits=bits, radius_bits=0, rotation="klt", n_codewords=256, stages=1,
            layout="rows",
        ).fit(x)  # fmt: skip
        taken = int(field_widths(q.alphabet_sizes).sum())
        assert taken == max(8, int(bits * d + 1e-9) // 8 * 8)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_groups_and_threads_decode_alike(name, monkeypatch):
    q = fitted(name)
    codes = q.encode(correlated(BLOCK_ROWS + 300, D, seed=5))
    parts = [q.decode(codes[start : start + 500]) for start in range(0, len(codes), 500)]
    for threads in ("1", "2"):
        monkeypatch.setenv("POLARPACK_THREADS", threads)
        assert same_bits(q.decode(codes), np.concatenate(parts))
        halves = q.decode_as(codes, np.dtype(np.float16))
        assert same_bits(halves, np.concatenate(parts).astype(np.float16))


@pytest.mark.parametrize("place", [(), ("rotation",), ("fine",)])
def test_what_a_later_version_could_not_do_without_is_refused(place):
    """Members with a capital letter; others that are new are ignored."""
    q = PolarQuantizer(fine="grid", radius_bits=0).fit(np.eye(4, dtype=np.float32))
    data = q.to_bytes()
    size = int.from_bytes(data[7:11], "little")

    def with_member(name: str) -> bytes:
        config, listed = json.loads(zlib.decompress(data[11 : 11 + size]))
        at = config
        for key in place:
            at = at[key]
        at[name] = {"any": [1]}
        head = zlib.compress(json.dumps([config, listed]).encode())
        body = len(head).to_bytes(4, "little") + head + data[11 + size :]
        return data[:3] + zlib.crc32(body).to_bytes(4, "little") + body

    assert PolarQuantizer.from_bytes(with_member("new")).to_bytes() == data
    with pytest.raises(pp.UnsupportedVersionError, match="New"):
        PolarQuantizer.from_bytes(with_member("New"))
