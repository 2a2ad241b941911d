"""``max_error=`` holds for whatever finite rows there are, whoever fitted the quantizer."""

import os
import tempfile
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import same_bits
from tables import SETTINGS, correlated, fitted, plain_relative_error

import polarpack as pp
from polarpack import writing

torch = pytest.importorskip("torch")

MANY = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
DTYPES = ("float16", "bfloat16", "float32", "float64")
LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.7e308}
SMALLEST = {"float16": 6e-8, "bfloat16": 1e-40, "float32": 1.5e-45, "float64": 5e-324}
BOUNDS = st.sampled_from([0.0, 0.0, 1e-12, 1e-3, 0.05, 0.3, 0.999, 1.0, 2.0])
CORNERS = np.array([0.0, -0.0, 1.0, -1.0, 1.0000001, 1e-30, 1e30, 65504.0, 6e-8, 1e-38, 1e-45])


@st.composite
def rows(draw, d=None, max_n=10):
    """(n, d) finite rows that a code may well fail at, in any float dtype (bfloat16: a tensor)."""
    dtype = draw(st.sampled_from(DTYPES))
    n = draw(st.one_of(st.just(1), st.integers(1, max_n)))
    d = draw(st.integers(1, 5)) if d is None else d
    kind = draw(
        st.sampled_from(
            ["like training rows", "normal", "heavy tails", "zero rows", "duplicates", "corners",
             "constant columns", "one value", "one large number", "far from zero", "denormals",
             "spread over all magnitudes", "minus zeros", "beyond"]
        )
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((n, d))
    low, high = np.log10(SMALLEST[dtype]), np.log10(LARGEST[dtype])
    if kind == "like training rows":
        x = correlated(n, d, int(rng.integers(1000))).astype(np.float64)
    elif kind == "heavy tails":
        x = rng.standard_cauchy((n, d)) * np.exp(3 * rng.standard_cauchy((n, 1)).clip(-30, 30))
    elif kind == "zero rows":
        x *= rng.random((n, 1)) < 0.5
    elif kind == "duplicates":
        x = x[rng.integers(0, max(1, n // 3), n)]
    elif kind == "constant columns":
        x[:, rng.random(d) < 0.6] = rng.standard_normal()
    elif kind == "one value":
        x[:] = x[0, 0]
    elif kind == "one large number":
        x[rng.integers(n), rng.integers(d)] = 10.0 ** rng.uniform(0, high)
    elif kind == "far from zero":
        x += 10.0 ** rng.uniform(2, 6)
    elif kind == "denormals":
        x = rng.integers(-9, 10, (n, d)) * SMALLEST[dtype]
    elif kind == "spread over all magnitudes":
        x *= 10.0 ** rng.uniform(low, high, x.shape if rng.random() < 0.5 else (n, 1))
    elif kind == "minus zeros":
        x = np.where(rng.random((n, d)) < 0.5, -0.0, x)
    elif kind == "corners":
        x = rng.choice([*CORNERS, *-CORNERS, LARGEST[dtype], SMALLEST[dtype]], (n, d))
    elif kind == "beyond":
        x = np.where(rng.random((n, d)) < 0.5, LARGEST[dtype], -LARGEST[dtype])
    if kind in ("like training rows", "normal", "duplicates", "zero rows"):
        power = draw(st.sampled_from([0, 0, 0, -30, 30, -200]))
        x = x * 10.0 ** max(min(power, high - 3), low)
    x = np.clip(x, -LARGEST[dtype], LARGEST[dtype])
    if dtype == "bfloat16":
        return torch.from_numpy(x).to(torch.bfloat16)
    return x.astype(dtype)


def check(x, y, bound):
    """y is x within the bound; at 0 to the bit. Computed apart from the package's own measure."""
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    if isinstance(x, torch.Tensor):
        if bound == 0:
            assert same_bits(x.view(torch.int16).numpy(), y.view(torch.int16).numpy())
        x, y = x.double().numpy(), y.double().numpy()
    elif bound == 0:
        assert same_bits(y, x)
    assert np.isfinite(y).all()
    assert (plain_relative_error(x, y) <= bound * (1 + 1e-14)).all()


@MANY
@given(st.data(), st.sampled_from(list(SETTINGS)), st.sampled_from([3, 12]), BOUNDS)
def test_with_a_quantizer_fitted_on_other_rows(data, name, d, bound):
    d = 12 if name in ("classes", "bitshift classes", "leading axes", "pq", "polar-vq") else d
    x = data.draw(rows(d))
    layouts = ["archive"] if SETTINGS[name].get("fine") == "trellis" else ["archive", "rows"]
    layout = data.draw(st.sampled_from(layouts))
    blob = pp.compress(x, quantizer=fitted(name, d), max_error=bound, layout=layout)
    check(x, pp.decompress(blob), bound)


@cache
def of_one_column(name):
    return pp.PolarQuantizer(**SETTINGS[name]).fit(correlated(200, 1))


@MANY
@given(rows(1), st.sampled_from(["trellis", "native trellis", "float16", "int8 rows"]), BOUNDS)
def test_rows_of_one_number(x, name, bound):
    check(x, pp.decompress(pp.compress(x, quantizer=of_one_column(name), max_error=bound)), bound)


@MANY
@given(rows(), BOUNDS)
def test_with_a_quantizer_of_the_planner(x, bound):
    check(x, pp.decompress(pp.compress(x, max_error=bound)), bound)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@MANY
@given(
    st.lists(rows(12, max_n=6), min_size=1, max_size=4),
    st.sampled_from(["trellis", "polar trellis", "pq", "bitshift"]),
    BOUNDS,
    st.booleans(),
)
def test_rows_appended_later(folder, batches, name, bound, stop):
    """Each batch goes to a tensor of its dtype; the writer may be stopped and resumed."""
    path, q = folder / "t.polar", fitted(name)
    fsync, parts = os.fsync, writing.PARTS_PER_CHUNK
    os.fsync, writing.PARTS_PER_CHUNK = lambda fd: None, 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of drift: rows may be like no others
            f = pp.create(path, quantizer=q, max_error=bound)
            wanted = {}
            for batch in batches:
                key = str(batch.dtype)
                wanted.setdefault(key, []).append(batch)
                f.append(key, batch)
            if stop:
                f.__exit__(KeyboardInterrupt, None, None)
                f = pp.create(path, quantizer=q, max_error=bound, resume=True)
                for key, some in wanted.items():
                    kept = f.n_rows(key)
                    whole = torch.cat(some) if "torch" in key else np.concatenate(some)
                    f.append(key, whole[kept:])
            f.close()
        with pp.open(path) as file:
            for key, some in wanted.items():
                whole = torch.cat(some) if "torch" in key else np.concatenate(some)
                check(whole, file[key][...], bound)
    finally:
        os.fsync, writing.PARTS_PER_CHUNK = fsync, parts


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(v, marks=pytest.mark.slow) for v in ("float16", "float64"))]
)
def test_a_bound_is_useful(dtype):
    """Rows are coded, not stored: of a mixture of Gaussians 5% of error take 45% of the bytes at
    most, in float32 far less."""
    rng = np.random.default_rng(0)
    means = 2 * rng.standard_normal((20, 64))
    x = (means[rng.integers(20, size=5000)] + rng.standard_normal((5000, 64))).astype(dtype)
    blob = pp.compress(x, max_error=0.05)
    assert len(blob) <= 0.45 * x.nbytes
    assert len(blob) <= {"float16": 0.35, "float32": 0.18, "float64": 0.09}[dtype] * x.nbytes
    check(x, pp.decompress(blob), 0.05)


def test_exact_rows_are_coded_too():
    """A quantizer that holds no row to the bound costs no more than storing the rows exactly."""
    x = correlated(3000, 12, seed=5)
    alone = len(pp.compress(x, max_error=0))
    with_quantizer = len(pp.compress(x, quantizer=fitted("pq"), max_error=1e-9))
    assert with_quantizer <= alone + len(fitted("pq").to_bytes()) + 100
    half = x.copy()
    half[::2] *= np.float32(1e10)  # these escape
    blob = pp.compress(half, quantizer=fitted("trellis"), max_error=0.3)
    assert len(blob) < 0.65 * alone + len(fitted("trellis").to_bytes())
    check(half, pp.decompress(blob), 0.3)


@pytest.mark.parametrize("name", [None, "trellis", "pq"])
def test_every_pattern_of_16_bits_is_kept(name):
    """NaN payloads (signalling ones too), infinities, denormals and both zeros, to the bit."""
    patterns = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16)
    patterns = np.append(patterns, patterns[:8]).reshape(-1, 12)
    options = {"max_error": 0, "nonfinite": "raw"}
    if name is not None:
        options["quantizer"] = fitted(name)
    half = patterns.view(np.float16)
    assert same_bits(pp.decompress(pp.compress(half, **options)), half)
    brain = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)
    back = pp.decompress(pp.compress(brain, **options))
    assert back.dtype == torch.bfloat16
    assert same_bits(back.view(torch.int16).numpy(), brain.view(torch.int16).numpy())
