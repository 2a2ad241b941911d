"""docs/format.md says enough: a reader made from it alone decodes files to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from format_reader import Model, read

import polarpack as pp
from polarpack.entropy import AdaptiveModel, StaticModel, UniformModel, model_to_bytes


def mixture(n, d, seed=0):
    """Rows of a few groups, in correlated and unequal columns."""
    rng = np.random.default_rng(seed)
    rows = (
        rng.standard_normal((n, d)) * np.geomspace(1, 0.1, d)
        + 2 * rng.standard_normal((5, d))[rng.integers(5, size=n)]
    )
    return (rows @ np.linalg.qr(rng.standard_normal((d, d)))[0]).astype(np.float32)


def same(blob):
    """Both readers agree on every tensor of a blob, to the bit."""
    ours = {name: pp.open(blob, library="numpy")[name][...] for name in pp.open(blob)}
    theirs = read(blob)
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name].view(np.uint8), theirs[name].view(np.uint8))


CHAINS = {
    "trellis": {"fine": "trellis", "rotation": "klt", "bits": 3.0, "radius_bits": 0},
    "trellis, native order": {"fine": "trellis", "bits": 2.0, "radius_bits": 0, "center": True},
    "trellis, polar": {"fine": "trellis", "rotation": "klt", "bits": 2.0, "radius_bits": 5},
    "trellis, 64 states": {
        "fine": "trellis",
        "rotation": "klt",
        "bits": 9.0,
        "radius_bits": 0,
        "n_states": 64,
    },
    "classes": {
        "fine": "trellis",
        "rotation": "klt",
        "bits": 2.0,
        "radius_bits": 0,
        "n_classes": 3,
        "n_leading": 4,
    },
    "classes, polar": {"fine": "trellis", "rotation": "klt", "bits": 1.0, "n_classes": 2},
    "weighted": {
        "fine": "trellis",
        "rotation": "klt",
        "bits": 3.0,
        "radius_bits": 0,
        "weights": np.linspace(0, 30, 9),
    },
    "bitshift": {"fine": "bitshift", "rotation": "klt", "bits": 2.0, "state_bits": 5},
    "bitshift, native": {"fine": "bitshift", "bits": 0.8, "radius_bits": 0, "center": True},
    "bitshift, classes": {
        "fine": "bitshift",
        "rotation": "klt",
        "bits": 3.0,
        "radius_bits": 0,
        "n_classes": 3,
        "n_leading": 4,
    },
    "codebooks": {"heads": 3, "stages": 2, "n_codewords": 16, "radius_bits": 4},
    "codebooks, hadamard": {
        "heads": 2,
        "stages": 3,
        "n_codewords": 8,
        "rotation": "hadamard",
        "seed": 3,
    },
    "codebooks, allocated": {"bits": 1.5, "n_codewords": 64, "rotation": "klt", "spherical": False},
    "grid": {"fine": "grid", "scalar_bits": 5, "radius_bits": 0},
    "grid, largest magnitude": {
        "fine": "grid",
        "scalar_bits": 8,
        "radius_bits": 16,
        "radius_norm": "max",
    },
    "lloyd, random": {"fine": "lloyd", "scalar_bits": 3, "rotation": "random", "radius_bits": 8},
    "float16, klt": {"fine": "float16", "rotation": "klt", "radius_bits": 0},
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("layout", ["archive", "rows"])
def test_chains(chain, layout):
    settings = CHAINS[chain]
    if layout == "rows" and settings.get("fine") == "trellis":
        pytest.skip("a trellis has no fixed rate")
    x = mixture(300, 9)
    q = pp.PolarQuantizer(**settings).fit(x)
    same(pp.compress(x, quantizer=q, layout=layout))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_scales_and_escapes(dtype):
    x = mixture(200, 5).astype(dtype) * np.asarray(2000, dtype)
    x[7] = 0
    x[8] *= np.asarray(1e-3, dtype)
    same(pp.compress(x, max_error=0.05))
    same(pp.compress(x.reshape(10, 4, 5, 5), max_error=0))


def test_bfloat16():
    torch = pytest.importorskip("torch")
    same(pp.compress(torch.from_numpy(mixture(200, 5)).to(torch.bfloat16), max_error=0.1))


def test_several_tensors_streamed(tmp_path):
    x = mixture(700, 6)
    q = pp.PolarQuantizer(fine="trellis", rotation="klt", bits=3.0).fit(x)
    with pp.create(tmp_path / "s.polar", quantizer=q) as f:
        f.append("a", x[:400])
        f.append("a", x[400:])
        f.append("b", x[:10])
    same((tmp_path / "s.polar").read_bytes())


def test_blocks_of_four_messages():
    """From 2^14 numbers on a block is four messages: of the trellis, of static tables, of words."""
    x = mixture(2100, 9)
    same(pp.compress(x * np.exp2(np.arange(2100) % 7)[:, None].astype("f4"), max_error=0))
    for settings in (CHAINS["trellis"], CHAINS["grid"]):
        same(pp.compress(x, quantizer=pp.PolarQuantizer(**settings).fit(x), layout="archive"))


def test_planned():
    x = mixture(1500, 12)
    same(pp.compress(x, bits=2.5))


def skewed(n, sizes, seed=0):
    """Symbols that small ones are most of; each field follows the one before now and then."""
    rng = np.random.default_rng(seed)
    columns = [np.minimum(rng.geometric(0.3, n) - 1, k - 1) for k in sizes]
    for f in range(1, len(sizes)):
        follows = rng.random(n) < 0.7
        columns[f] = np.where(follows, np.minimum(columns[f - 1], sizes[f] - 1), columns[f])
    return np.stack(columns, axis=1)


SIZES = [3, 300, 3, 300, 17, 1, 5000, 3]


@pytest.mark.parametrize("n", [0, 3, 200, 2100])
def test_models(n):
    x = skewed(n, SIZES)
    models = [
        UniformModel(SIZES),
        StaticModel.fit(x, SIZES),
        StaticModel.fit(x, SIZES, per_field=True),
        StaticModel.fit(x, SIZES, per_field=False),
        AdaptiveModel(SIZES),
        AdaptiveModel(SIZES, [-1, 0, -1, 1, 3, -1, 3, 2]),
        AdaptiveModel(SIZES, [-1, 0, 0, 1, 3, -1, 3, 2], pooled=True),
    ]
    for model in models:
        theirs = Model(model_to_bytes(model)).decode(model.encode(x), n)
        np.testing.assert_array_equal(np.reshape(theirs, x.shape), x, err_msg=repr(model))


@pytest.mark.parametrize("prediction", [0, 1, 2])
def test_every_prediction_of_levels(prediction):
    """Tables that are flat, that slope, and that resemble each other: each has its prediction."""
    k, ramp = 64, np.arange(64, dtype=np.uint8)
    noise = np.random.default_rng(1).integers(1, 200, 64).astype(np.uint8)
    levels = [[noise, noise[::-1].copy()], [1 + ramp, 1 + 2 * ramp], [noise, noise + 1]][prediction]
    model = StaticModel([k, k], levels, [0, 1], resolution=4)
    x = skewed(50, [k, k])
    theirs = Model(model_to_bytes(model)).decode(model.encode(x), 50)
    np.testing.assert_array_equal(theirs, x)
