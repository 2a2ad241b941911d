"""Presets: each is what its name says, at the rate it promises, as good as the original."""

import faiss
import numpy as np
import pytest
from strategies import same_bits
from tables import correlated

import polarpack as pp
from polarpack.metrics import cosine, snr_db
from polarpack.presets import NAMES, opq_rotation, radius_bits_for

D = 16
TRAIN, TEST = correlated(1500, D), correlated(500, D, seed=1)
FREE = ["polar_vq", "pq", "opq", "rq", "prq"]  # presets that take any number of bits, at fixed rate


def code_bits(q):
    """Bits a float of the codes, before any entropy coding."""
    return float(np.log2(q.alphabet_sizes).sum()) / q.d_


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_fits_and_travels(name):
    q = pp.preset(name).fit(TRAIN)
    codes = q.encode(TEST)
    decoded = q.decode(codes)
    again = pp.PolarQuantizer.from_bytes(q.to_bytes())
    assert again.hash == q.hash and same_bits(again.decode(codes), decoded)
    assert same_bits(again.encode(TEST), codes)
    assert q.layout == ("archive" if "trellis" in name else "rows")
    assert snr_db(TEST, decoded) > (30 if name in ("sq8", "int8_rows", "float16") else 7)
    blob = pp.compress(TEST, quantizer=q)
    assert same_bits(pp.decompress(blob), decoded)
    assert name in repr(pp.preset(name))


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 2.3, 4.0])
def test_code_bits_are_kept(name, bits):
    q = pp.preset(name, bits=bits).fit(TRAIN[:600])
    assert bits - 8 / D - 1e-9 < code_bits(q) <= bits + 1e-9  # rows take whole bytes


@pytest.mark.parametrize("name", ["trellis", "polar_trellis"])
@pytest.mark.parametrize("bits", [0.7, 1.5, 4.0])
def test_trellis_rates(name, bits):
    q = pp.preset(name, bits=bits).fit(TRAIN)
    assert q.rate_bits(q.encode(TRAIN)) / TRAIN.size == pytest.approx(bits, rel=0.03)
    assert q.rate_bits(q.encode(TEST)) / TEST.size == pytest.approx(bits, rel=0.08)


@pytest.mark.parametrize(("name", "bits"), [("sq8", 8), ("int8_rows", 8 + 10 / D), ("float16", 16)])
def test_fixed_presets(name, bits):
    assert code_bits(pp.preset(name).fit(TRAIN)) == bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_turboquant(bits):
    q = pp.preset("turboquant", bits=bits).fit(TRAIN)
    assert code_bits(q) == bits + 10 / D
    # Lloyd-Max of a Gaussian: 4.4, 9.3 and 20.2 dB; a direction of 16 dimensions is nearly one
    snr = snr_db(TEST, q.decode(q.encode(TEST)))
    assert snr == pytest.approx({1: 4.4, 2: 9.3, 4: 20.2}[bits], abs=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zip",), "expected a preset of trellis"),
        (("sq8", 4.0), "fixed rate of 8"),
        (("float16", 8), "fixed rate of 16"),
        (("pq", 0), r"in \(0, 32\]"),
        (("pq", -1), r"in \(0, 32\]"),
        (("pq", float("nan")), r"in \(0, 32\]"),
        (("pq", "two"), "bits"),
        ((3,), "expected a preset"),
    ],
)
def test_what_is_no_preset(arguments, message):
    with pytest.raises(pp.InputError, match=message):
        pp.preset(*arguments)


@pytest.mark.parametrize("name", ["trellis", "polar_trellis"])
def test_a_trellis_has_no_rows_layout(name):
    with pytest.raises(pp.InputError, match="layout"):
        pp.preset(name, layout="rows").fit(TRAIN)
    with pytest.raises(pp.InputError, match="layout"):
        pp.preset("pq", layout="columns").fit(TRAIN)


def test_presets_do_not_depend_on_chance():
    for name in ("polar_vq", "opq", "turboquant"):
        once, again = (pp.preset(name, seed=5).fit(TRAIN[:600]).to_bytes() for _ in range(2))
        assert once == again


def test_bad_training_rows():
    bad = TRAIN.copy()
    bad[6] = np.inf
    for name in NAMES:
        with pytest.raises(pp.InputError, match="row 6"):
            pp.preset(name).fit(bad)
        with pytest.raises(pp.InputError):
            pp.preset(name).fit(TRAIN[:0])


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("name", FREE)
def test_few_rows_of_other_dtypes(name, dtype):
    x = TRAIN[:20].astype(dtype)
    q = pp.preset(name).fit(x)
    assert snr_db(x, q.decode(q.encode(x))) > 5


@pytest.mark.parametrize("bits", [1, 2])
def test_pq_is_as_good_as_faiss(bits):
    m = bits * D // 8
    q = pp.preset("pq", bits=bits).fit(TRAIN)
    reference = faiss.ProductQuantizer(D, m, 8)
    reference.train(TRAIN)
    theirs = reference.decode(reference.compute_codes(TEST))
    ours = q.decode(q.encode(TEST))
    assert code_bits(q) == 8 * m / D
    assert snr_db(TEST, ours) > snr_db(TEST, theirs) - 0.1


def test_order_of_the_presets():
    """At equal code bits: a learned rotation helps PQ, residual stages help, the trellis is best."""
    snr = {}
    for name in ("pq", "opq", "rq", "prq", "trellis", "turboquant"):
        q = pp.preset(name, bits=2.0).fit(TRAIN)
        snr[name] = snr_db(TEST, q.decode(q.encode(TEST)))
    assert snr["opq"] > snr["pq"] - 0.05 and snr["rq"] > snr["pq"] and snr["prq"] > snr["pq"]
    assert snr["trellis"] > max(snr["pq"], snr["opq"], snr["prq"], snr["turboquant"])


def test_codebooks_of_eight_bits():
    """RQ and PRQ have as few stages as 8 bits each allow."""
    for name, bits, n_stages in (("rq", 1.0, 2), ("rq", 4.0, 8), ("prq", 1.0, 2), ("prq", 4.0, 4)):
        q = pp.preset(name, bits=bits).fit(TRAIN[:600])
        assert q.fine_.n_stages == n_stages
        assert q.alphabet_sizes.tolist() == [256] * int(bits * D / 8)


def test_opq_rotation_is_orthogonal():
    settings = pp.preset("opq", bits=2.0).settings()
    axes = opq_rotation(TRAIN[:300], settings)
    assert np.allclose(axes.T @ axes, np.eye(D), atol=1e-5)


def test_radius_bits_follow_the_spread():
    same = TRAIN / np.linalg.norm(TRAIN, axis=1, keepdims=True)
    spread = same * np.exp(2 * np.random.default_rng(0).standard_normal((len(same), 1)))
    bits = [radius_bits_for(rows.astype(np.float32), 2.0) for rows in (same, TRAIN, spread)]
    assert bits[0] == 1 and bits[0] < bits[1] <= bits[2] <= 8
    assert radius_bits_for(TRAIN, 4.0) > radius_bits_for(TRAIN, 1.0)
    assert radius_bits_for(np.zeros((3, 4), np.float32), 2.0) == 1


def test_a_radius_protects_small_rows():
    """Rows of very different length: coded raw, the small ones drown; as directions they do not."""
    rng = np.random.default_rng(0)
    length = np.exp(1.5 * rng.standard_normal((2000, 1)))
    x = (correlated(2000, D) * length).astype(np.float32)
    low = {}
    for name in ("trellis", "polar_trellis"):
        q = pp.preset(name, bits=1.5).fit(x)
        low[name] = float(np.quantile(cosine(x, q.decode(q.encode(x))), 0.01))
    assert low["polar_trellis"] > low["trellis"] + 0.2


@pytest.mark.slow
def test_the_original_configuration_on_few_rows():
    """8 heads of 32 dimensions, 4 stages of 1024 codewords, a 4-bit radius: the defaults."""
    x = correlated(1100, 256)
    q = pp.PolarQuantizer().fit(x)
    assert q.alphabet_sizes.tolist() == [16] + [1024] * 32
    assert code_bits(q) == (4 + 320) / 256
    codes = q.encode(x[:50])
    again = pp.PolarQuantizer.from_bytes(q.to_bytes())
    assert same_bits(again.decode(codes), q.decode(codes))
    assert snr_db(x[:50], q.decode(codes)) > 8
    assert snr_db(x[:50], q.decode(codes, stages=1)) > 2
