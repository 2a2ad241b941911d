"""Stored files decode to the stored bits, on every machine and in every later version.

``POLARPACK_WRITE_GOLDEN=1 pytest tests/test_golden.py`` writes the files that are missing; none is ever
rewritten (delete it first, while the format is v0). A missing file fails.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import polarpack as pp

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("POLARPACK_WRITE_GOLDEN") == "1"


def table(n=300, d=24, seed=1):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * np.geomspace(2, 0.1, d)
    return mixed.astype(np.float32)


def quantized(**settings):
    return lambda path: pp.save(path, {"x": table()}, quantizer=pp.PolarQuantizer(**settings).fit(table()))


def streamed(path):
    q = pp.PolarQuantizer(fine="trellis", rotation="klt", radius_bits=0, bits=2).fit(table())
    with pp.create(path, quantizer=q) as f:
        for start in range(0, 300, 100):
            f.append("x", table()[start : start + 100])


CASES = {
    "trellis": quantized(fine="trellis", rotation="klt", radius_bits=0, bits=2.0),
    "classes": quantized(fine="trellis", rotation="klt", radius_bits=0, bits=2.0, n_classes=4, n_states=32),
    "polar-trellis": quantized(fine="trellis", rotation="hadamard", radius_bits=5, bits=3.0),
    "polar-vq": quantized(heads=3, stages=2, n_codewords=16, radius_bits=4),
    "allocated-rows": quantized(rotation="klt", radius_bits=0, bits=2.0, n_codewords=64, layout="rows"),
    "grid": quantized(fine="grid", radius_bits=0, scalar_bits=5, layout="rows"),
    "max-error": lambda path: pp.save(path, {"x": table()}, max_error=0.2),
    "raw": lambda path: pp.save(path, {"x": table(5).astype(np.float64)}, max_error=0.0),
    "two-dtypes": lambda path: pp.save(
        path,
        {"half": table().astype(np.float16), "brain": torch.from_numpy(table()).bfloat16()},
        snr_db=20.0,
    ),
    "streamed": streamed,
}


def decoded(path):
    with pp.open(path, library="numpy") as f:
        f.verify()
        return {name: np.asarray(f[name][...]) for name in f}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    folder = GOLDEN / f"{name}-v0"
    if WRITE and not folder.exists():
        folder.mkdir(parents=True)
        CASES[name](folder / "file.polar")
        np.savez(folder / "decoded.npz", **decoded(folder / "file.polar"))
    with np.load(folder / "decoded.npz") as expected:
        got = decoded(folder / "file.polar")
        assert sorted(got) == sorted(expected.files)
        for key in got:
            assert got[key].dtype == expected[key].dtype and got[key].shape == expected[key].shape
            assert got[key].tobytes() == expected[key].tobytes(), key
