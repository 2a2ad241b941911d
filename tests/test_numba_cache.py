"""Compiled kernels: kept for the next start where they can be, and no condition for this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

COUNT = """
import sys
import numpy as np
from numba.core import event

compiled = event.RecordingListener()
event.register("numba:compile", compiled)
import polarpack as pp

x = (np.random.default_rng(0).standard_normal((600, 9)) * np.linspace(1, 0.1, 9)).astype("f4")
for settings in (
    {"fine": "trellis", "rotation": "klt", "bits": 2.0, "radius_bits": 5},
    {"fine": "grid", "scalar_bits": 4, "radius_bits": 0, "layout": "archive"},
):
    q = pp.PolarQuantizer(**settings).fit(x)
    y = pp.decompress(pp.compress(x, quantizer=q, max_error=0.1))
    assert np.array_equal(q.decode(q.encode(x[:5])), y[:5]) or len(y) == 600
print(sum(1 for _, e in compiled.buffer if e.is_start))
"""

IN_MEMORY = """
import numpy as np
import polarpack as pp
from polarpack import _numba, clustering

assert pp.__file__.startswith({folder!r}), pp.__file__
x = np.arange(12, dtype=np.float32).reshape(6, 2)
out = np.empty(6, np.float32)
clustering.squared_distances(x[0], np.ascontiguousarray(x.T), out)
assert out.tolist() == [0, 8, 32, 72, 128, 200]
print(clustering.squared_distances.stats.cache_path)
"""


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd=env.get("PYTHONPATH", ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_second_start_compiles_nothing():
    run(COUNT)
    assert run(COUNT) == "0"


@pytest.fixture
def copied(tmp_path):
    """The package where nothing can be written beside a module, and a user without a folder for
    caches; files stand in their places, which holds root back, too."""
    (tmp_path / "home").touch()
    for path in (ROOT / "polarpack").rglob("*.py"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        (target.parent / "__pycache__").touch()
    home = str(tmp_path / "home")
    env = {"PYTHONPATH": str(tmp_path), "HOME": home, "XDG_CACHE_HOME": home, "TMPDIR": home}
    return {**env, "NUMBA_CACHE_DIR": "", "PYTHONDONTWRITEBYTECODE": "1", "USERPROFILE": home}


def test_no_folder_for_a_cache(copied):
    assert run(IN_MEMORY.format(folder=copied["PYTHONPATH"]), **copied) == "None"


def test_a_cache_that_is_damaged_or_cannot_be_written(copied, tmp_path):
    code = IN_MEMORY.format(folder=copied["PYTHONPATH"])
    cache = tmp_path / "cache"
    copied["NUMBA_CACHE_DIR"] = str(cache)
    assert run(code, **copied).startswith(str(cache))
    files = [p for p in cache.rglob("squared_distances*") if p.is_file()] or [
        p for p in cache.rglob("*squared_distances*") if p.is_file()
    ]
    assert len(files) == 2  # index and code
    for path in files:
        path.write_bytes(b"damaged")
    run(code, **copied)
    for path in files:  # a folder in its place can be neither read nor written
        path.unlink()
        path.mkdir()
        (path / "kept").touch()
    run(code, **copied)
