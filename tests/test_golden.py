"""Files written once decode to the same bits ever after, on every machine.

``golden/<name>-v1/`` holds ``file.polar`` and ``decoded.npz``, the tensors in it by name. Encoding
may change (k-means and linear algebra differ between machines and versions), decoding may not.
The format is frozen: files are added, never rewritten. ``POLARPACK_WRITE_GOLDEN=1 pytest
tests/test_golden.py`` writes those that are missing.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import same_bits
from tables import SETTINGS, D, correlated, fitted

import polarpack as pp
from polarpack import container, writing
from polarpack._arrays import TensorSpec
from polarpack.blocks import TensorCoding
from polarpack.container import Kind
from polarpack.entropy.model import AdaptiveModel, StaticModel, UniformModel
from polarpack.polar import FINE_STAGES
from polarpack.writing import tensor_chunks

GOLDEN = Path(__file__).resolve().parent / "golden"
WRITE = os.environ.get("POLARPACK_WRITE_GOLDEN") == "1"
ROWS = correlated(120, D, seed=11)


# -- how they are written --------------------------------------------------------------------------
def of_rows(name, **options):
    """A file of ROWS in one of the chains of ``tables``."""
    return lambda path: pp.save(path, {"t": ROWS}, quantizer=fitted(name), **options)


def of_model(model_of):
    """A file of codes under an entropy model, which ``choose_model`` need not have chosen."""

    def write(path):
        rng = np.random.default_rng(0)
        x = np.repeat(np.round(rng.laplace(size=(150, 2)) * 3), 2, axis=1).astype(np.float32)
        x += rng.random(x.shape) < 0.1
        q = pp.PolarQuantizer(fine="grid", scalar_bits=6, radius_bits=0).fit(x)
        coding = TensorCoding(TensorSpec(x.shape, "float32"), q, "archive")
        coding.model = model_of(q.encode(x), q.alphabet_sizes)
        path.write_bytes(container.pack(tensor_chunks("t", 0, coding, coding.encode_rows(x))))

    return write


def write_blocks(path):
    """Several blocks of the archive layout, mostly zeros so that the file is small."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((150, 2048)) < 0.002, rng.normal(0, 20, (150, 2048)), 0).astype("f4")
    q = pp.PolarQuantizer(fine="trellis", step=1.0, radius_bits=0).fit(x)
    pp.save(path, {"t": x}, quantizer=q)


def write_walls(path):
    """Rows that decode to numbers below zero, where theirs end, and are held there."""
    x = np.maximum(ROWS, 0)
    q = pp.PolarQuantizer(fine="trellis", rotation="klt", radius_bits=0, bits=1.5)
    q.fit(np.maximum(correlated(600, D, seed=13), 0))
    assert q.low_ == 0
    pp.save(path, {"t": x}, quantizer=q)


def write_states(path):
    """Another machine, and a rotation that is stored by its seed."""
    q = pp.PolarQuantizer(
        fine="trellis", rotation="hadamard", n_states=32, bits=2.0, radius_bits=5, seed=7
    )
    pp.save(path, {"t": ROWS}, quantizer=q.fit(correlated(500, D)))


def write_raw(path):
    x = np.arange(70 * 64).reshape(70, 64) / 64
    x[3, 5], x[4, 4] = -0.0, 5e-324
    pp.save(path, {"t": x}, max_error=0)


def write_words(path):
    """Rows stored exactly: of unequal strength, in each dtype, rounded ones and odd words among
    them; one block has four messages."""
    rows = ROWS * np.exp2(np.random.default_rng(0).integers(-4, 5, (len(ROWS), 1)))
    rows[::3] = rows[::3].astype(np.float16)
    rows[5, 2:5] = np.nan, -0.0, 1e-42
    tensors = {
        "float32": rows.astype(np.float32),
        "float64": rows,
        "float16": ROWS.astype(np.float16),
        "bfloat16": torch.from_numpy(rows).bfloat16(),
        "lanes": np.round(correlated(1600, D, seed=13)).astype(np.float16),
    }
    pp.save(path, tensors, max_error=0, nonfinite="raw")


def write_escapes(path):
    """Rows that the code could not hold to the bound, and rows that are not finite."""
    x = ROWS.copy()
    x[[3, 50]] *= np.float32(1e20)
    x[7] *= np.float32(1e-25)
    x[20, 4], x[21] = np.nan, -np.inf
    tensors = {"archive": x, "half": ROWS[:20].astype(np.float16)}
    pp.save(path, tensors, quantizer=fitted("polar trellis"), max_error=0.3, nonfinite="raw")


def write_rows_escapes(path):
    x = ROWS.copy()
    x[[0, 64, 119]] *= np.float32(1e20)
    pp.save(path, {"t": x}, quantizer=fitted("hadamard grid"), max_error=0.5)


def write_dtypes(path):
    x = torch.from_numpy(ROWS)
    tensors = {
        "float16": ROWS.astype(np.float16),
        "float64": ROWS.astype(np.float64) * 1e100,
        "bfloat16 torch": x.bfloat16(),
        "float16 torch": x.half(),
        "three axes": ROWS.reshape(4, 30, D),
        "one axis": ROWS[0],
        "no rows": ROWS[:0],
    }
    pp.save(path, tensors, quantizer=fitted("polar trellis"))


def write_shapes(path):
    tensors = {
        "scalar": np.asarray(np.float32(2.5)),
        "Größe / 大": np.asarray([1.0, -2.0, 3.0], np.float16),
        "empty": np.zeros((3, 0, 2)),
        "": torch.zeros(2, 1, dtype=torch.bfloat16),
    }
    pp.save(path, tensors, max_error=0)


def write_tensors(path):
    tensors = {"a": ROWS, "b": -ROWS[:40]}
    pp.save(path, tensors, quantizer=fitted("polar-vq"), layout="archive")


def write_targets(path):
    """What the planner makes of a small table."""
    pp.save(path, {"large": correlated(200, D, seed=12), "small": ROWS[:40]}, bits=7.0)


def write_streamed(path):
    """Chunks of one block each, of two tensors in turn."""
    whole, writing.PARTS_PER_CHUNK = writing.PARTS_PER_CHUNK, 1
    try:
        x = np.round(4 * ROWS).repeat(12, axis=1)
        q = pp.PolarQuantizer(fine="float16", radius_bits=0, layout="rows").fit(x)
        with pp.create(path, quantizer=q) as f:
            for start in range(0, 120, 30):
                f.append("a", x[start : start + 15])
                f.append("b", x[start : start + 30])
    finally:
        writing.PARTS_PER_CHUNK = whole


def write_merged(path):
    """Chunks of two files, each ending in part of a block and with a model of its own."""
    shards = [path.with_name(f"{i}.polar") for i in range(2)]
    for shard, rows in zip(shards, (ROWS[:50], np.round(ROWS[50:])), strict=True):
        pp.save(shard, {"t": rows}, quantizer=fitted("allocated"), max_error=0.3)
    pp.merge(shards, path)
    for shard in shards:
        shard.unlink()


def write_chains(path):
    """Every fine stage behind every rotation, in each layout it can have; weighted columns, a
    rotation of its own axes, axes left out."""
    given = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))[0]
    chunks, number, rows = [], 0, correlated(20, D, seed=12)
    for fine in FINE_STAGES:
        for kind in ("none", "klt", "random", "hadamard", "given"):
            for layout in ("archive", "rows")[: 1 + (fine != "trellis")]:
                q = pp.PolarQuantizer(
                    fine=fine, rotation=given if kind == "given" else kind, bits=2.5, scalar_bits=3, stages=2,
                    n_codewords=16, state_bits=5, radius_bits=3 * (fine == "lloyd"),
                    layout=layout, seed=5, weights=1 + np.arange(D) if fine == "grid" else None,
                    n_components=8 if kind == "random" and layout == "rows" else None,
                    center=kind == "klt",
                )  # fmt: skip
                q.fit(correlated(300, D))
                coding = TensorCoding(TensorSpec(rows.shape, "float32"), q, layout)
                blocks = coding.encode_rows(rows)
                chunks += tensor_chunks(f"{fine} {kind} {layout}", number, coding, blocks)
                number += 1
    path.write_bytes(container.pack(chunks))


FILES = {
    "archive-trellis": of_rows("trellis"),
    "archive-polar-trellis": of_rows("polar trellis"),
    "archive-classes": of_rows("classes"),
    "archive-leading-axes": of_rows("leading axes"),
    "archive-blocks": write_blocks,
    "archive-states": write_states,
    "archive-walls": write_walls,
    "archive-stages": of_rows("polar-vq", layout="archive"),
    "archive-allocated": of_rows("allocated", layout="archive"),
    "archive-random-lloyd": of_rows("random lloyd", layout="archive"),
    "chains": write_chains,
    "archive-uniform": of_model(lambda codes, sizes: UniformModel(sizes)),
    "archive-static": of_model(lambda codes, sizes: StaticModel.fit(codes, sizes, per_field=True)),
    "archive-adaptive": of_model(lambda codes, sizes: AdaptiveModel(sizes, [-1, 0, 0, 2])),
    "archive-pooled": of_model(lambda codes, sizes: AdaptiveModel(sizes, pooled=True)),
    "rows-pq": of_rows("pq"),
    "rows-bitshift": of_rows("bitshift"),
    "rows-bitshift-classes": of_rows("bitshift classes"),
    "rows-stages": of_rows("polar-vq", layout="rows"),
    "rows-hadamard": of_rows("hadamard grid"),
    "rows-int8": of_rows("int8 rows", layout="rows"),
    "rows-escapes": write_rows_escapes,
    "escapes": write_escapes,
    "raw": write_raw,
    "words": write_words,
    "dtypes": write_dtypes,
    "shapes": write_shapes,
    "tensors": write_tensors,
    "targets": write_targets,
    "streamed": write_streamed,
    "merged": write_merged,
}


def folder(name):
    return GOLDEN / f"{name}-v{container.VERSION}"


def read(path):
    """All tensors of a file as numpy arrays."""
    with pp.open(path, library="numpy") as f:
        f.verify()
        return {name: np.asarray(f[name][...]) for name in f}


@pytest.mark.skipif(not WRITE, reason="POLARPACK_WRITE_GOLDEN=1 writes those that are missing")
@pytest.mark.parametrize("name", [name for name in FILES if not folder(name).exists()])
def test_write(name):
    folder(name).mkdir(parents=True)
    FILES[name](folder(name) / "file.polar")
    np.savez_compressed(folder(name) / "decoded.npz", **read(folder(name) / "file.polar"))


# -- what they promise -----------------------------------------------------------------------------
def test_all_are_there_and_small():
    assert {path.name for path in GOLDEN.iterdir()} == {folder(name).name for name in FILES}
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 400 << 10


@pytest.mark.parametrize("name", FILES)
def test_decodes_to_the_same_bits(name):
    path = folder(name) / "file.polar"
    stored = np.load(folder(name) / "decoded.npz", allow_pickle=False)
    decoded = read(path)
    assert sorted(decoded) == sorted(stored.files)
    for key in stored.files:
        assert same_bits(decoded[key], stored[key]), key


@pytest.mark.parametrize("name", FILES)
def test_pieces_decode_to_the_same_bits(name):
    stored = np.load(folder(name) / "decoded.npz", allow_pickle=False)
    with pp.open(folder(name) / "file.polar", library="numpy") as f:
        for key in f:
            if f[key].shape and len(f[key]):
                n = len(f[key])
                for index in (0, n - 1, slice(n // 2, n // 2 + 3), [n - 1, 0]):
                    assert same_bits(np.asarray(f[key][index]), np.asarray(stored[key][index])), key
        info = f.info()
        tensors = info["tensors"].values()
        parts = sum(t["codes_bytes"] + t["side_bytes"] for t in tensors)
        assert info["container_bytes"] + parts == (folder(name) / "file.polar").stat().st_size


@pytest.mark.parametrize("name", FILES)
def test_quantizers_in_them_are_written_alike(name):
    """What is read of a quantizer is all there is: its bytes come back, and so its hash."""
    with container.Reader((folder(name) / "file.polar").read_bytes()) as reader:
        for i in np.flatnonzero(reader.chunks["kind"] == Kind.QUANTIZER).tolist():
            data = bytes(reader.part(i, 0))
            assert pp.PolarQuantizer.from_bytes(data).to_bytes() == data


def test_every_kind_of_model_and_block_is_among_them():
    models, blocks = set(), set()
    for name in FILES:
        with container.Reader((folder(name) / "file.polar").read_bytes()) as reader:
            for i, kind in enumerate(reader.chunks["kind"].tolist()):
                for j in range(len(reader.parts(i).lengths)):
                    part = bytes(reader.part(i, j))
                    if kind == Kind.ENTROPY_MODEL:
                        models.add(part[0])
                    elif kind == Kind.ROW_BLOCKS and part:
                        blocks.add(part[0])
    assert models >= {1, 3} and blocks == {0, 1, 2, 3}
    assert set(SETTINGS) >= {"trellis", "classes", "polar-vq"}
