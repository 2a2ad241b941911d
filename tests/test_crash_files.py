"""Kills, full disks and read-only folders under ``save`` and ``create``: the old file or none."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tables import correlated

import polarpack as pp
from polarpack import writing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and users")

OLD = b"the file that was there before"
N_KILLS = 50
PAUSE = 0.001  # seconds after each chunk
ROWS = correlated(1500, 48).repeat(4, axis=0)

# Runs alone, so that there is but one thread to fork. Each child works until it is killed, and what
# it leaves is looked at before the next one starts.
KILL = """
import json, os, random, signal, sys, time
from pathlib import Path
import test_crash_files as t

path, work = Path(sys.argv[1]), {"save": t.save, "create": t.create}[sys.argv[2]]
work(path, 0.0)
new = path.read_bytes()
start = time.monotonic()
work(path, t.PAUSE)
longest = {"save": 1.2, "create": 0.3}[sys.argv[2]] * (time.monotonic() - start)
rng = random.Random(sys.argv[2])
left, n_kills = [], 0
path.write_bytes(t.OLD)
while n_kills < t.N_KILLS:
    if path.read_bytes() != t.OLD:
        path.write_bytes(t.OLD)
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say, b"!")
        work(path, t.PAUSE)
        os._exit(0)
    os.read(ready, 1)
    time.sleep(rng.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    n_kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    os.close(ready), os.close(say)
    left.append(t.what_is_left(path, new))
    assert left[-1][0] in ("old", "new"), left
work(path, 0.0)
print(json.dumps([left, path.read_bytes() == new]))
"""


@cache
def quantizer():
    """One of fixed rate, with blocks of 256 rows."""
    return pp.PolarQuantizer(fine="grid", scalar_bits=8, radius_bits=0, layout="rows").fit(ROWS)


def save(path, pause):
    """Two tensors; slowed down between chunks, so that kills fall between them as well."""
    add = writing.Writer.add

    def slow_add(self, *chunk):
        time.sleep(pause)
        add(self, *chunk)

    writing.Writer.add = slow_add
    try:
        writing.PARTS_PER_CHUNK = 1
        pp.save(path, {"a": ROWS, "b": ROWS[:50]}, quantizer=quantizer(), max_error=0.3)
    finally:
        writing.Writer.add = add


def create(path, pause):
    """A stream of blocks, less what an earlier writer has left of it."""
    writing.PARTS_PER_CHUNK = 1
    with pp.create(path, quantizer=quantizer(), max_error=0.9, resume=True) as f:
        for start in range(f.n_rows("t"), len(ROWS), 100):
            f.append("t", ROWS[start : start + 100])
            time.sleep(pause)


def partial_of(path):
    return path.with_name(f".{path.name}.partial")


def what_is_left(path, new):
    """The file in a word, and the bytes of the unfinished one beside it."""
    data = path.read_bytes() if path.exists() else None
    word = {None: "none", OLD: "old", new: "new"}.get(data, "damaged")
    beside = set(os.listdir(path.parent)) - {path.name}
    assert beside <= {partial_of(path).name}
    return word, partial_of(path).stat().st_size if beside else 0


@pytest.mark.parametrize("what", ["save", "create"])
def test_killed_at_fifty_random_moments(tmp_path, what):
    here = Path(__file__).resolve().parent
    search = os.pathsep.join([str(here.parent), str(here), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "t.polar"), what],
        env={**os.environ, "PYTHONPATH": search, "POLARPACK_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    left, same = json.loads(child.stdout)
    assert same  # whoever goes on completes to the bytes of an uninterrupted run
    counts = Counter(word for word, _ in left)
    assert counts["old"] >= N_KILLS / 2
    sizes = {size for _, size in left}
    assert len(sizes) > 5  # at different moments indeed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_file(small_disk):
    path = small_disk / "t.polar"
    path.write_bytes(OLD)
    large = np.random.default_rng(0).standard_normal((20_000, 8)).astype(np.float32)
    with pytest.raises(OSError, match="No space left"):
        pp.save(path, {"t": large}, max_error=0)
    assert path.read_bytes() == OLD
    assert os.listdir(small_disk) == ["t.polar"]
    pp.save(path, {"t": large[:100]}, max_error=0)
    with pp.open(path) as f:
        assert f["t"].shape == (100, 8)


def test_a_stream_goes_on_once_there_is_room(small_disk, tmp_path):
    path = small_disk / "t.polar"
    path.write_bytes(OLD)
    create(tmp_path / "whole.polar", 0.0)
    (small_disk / "filler").write_bytes(bytes((512 << 10) - 65536))
    with pytest.raises(OSError, match="No space left"):
        create(path, 0.0)
    assert path.read_bytes() == OLD
    assert partial_of(path).stat().st_size > 0
    (small_disk / "filler").unlink()
    create(path, 0.0)
    assert path.read_bytes() == (tmp_path / "whole.polar").read_bytes()
    assert os.listdir(small_disk) == ["t.polar"]


@pytest.fixture
def foreign_folder():
    """A folder with a file in it that the process may read but not write."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "t.polar"
    path.write_bytes(OLD)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:  # permission bits do not bind root
        os.seteuid(65534)
    yield path
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_keeps_its_file(foreign_folder):
    path = foreign_folder
    q = quantizer()
    for work in (
        lambda: pp.save(path, {"t": ROWS}, quantizer=q),
        lambda: pp.create(path, quantizer=q),
        lambda: pp.create(path.with_name("new.polar"), quantizer=q, resume=True),
    ):
        with pytest.raises(PermissionError):
            work()
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == ["t.polar"]
