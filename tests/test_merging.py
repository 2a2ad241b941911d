"""Files put together as they are: the rows of all, byte for byte, or an error and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from format_reader import read as second_reader
from strategies import same_bits
from tables import D, correlated, fitted
from test_crash_safety import FullDisk

import polarpack as pp
from polarpack import merging, writing
from polarpack.container import Kind, Reader

OLD = b"the file that was there before"
PARTS = (300, 0, 17, 90)  # rows of each file; their last blocks are cut short


def tables(seed=3):
    x = correlated(sum(PARTS), D, seed=seed)
    return np.split(x, np.cumsum(PARTS)[:-1])


def write_shards(folder, q, names=("t",), **options):
    paths = []
    for i, rows in enumerate(tables()):
        paths.append(folder / f"{i}.polar")
        with pp.create(paths[-1], quantizer=q, **options) as f:
            for j, name in enumerate(names):
                f.append(name, rows * np.float32(1 + j))
    return paths


def contents(path, **options):
    with pp.open(path, library="numpy", **options) as f:
        f.verify()
        return {name: np.asarray(f[name][...]) for name in f}


def blocks(path):
    """The bytes of all blocks of a file, in order, and of how many chunks of each kind it is."""
    found, kinds = [], []
    with Reader(path) as reader:
        for i, kind in enumerate(reader.chunks["kind"].tolist()):
            kinds.append(kind)
            if kind == Kind.ROW_BLOCKS:
                found += [bytes(reader.part(i, j)) for j in range(len(reader.parts(i).lengths))]
    return found, kinds


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(writing, "PARTS_PER_CHUNK", 1)


@pytest.mark.parametrize("name", ["trellis", "polar trellis", "polar-vq", "pq", "bitshift classes"])
@pytest.mark.parametrize("embed", [True, False])
def test_rows_of_all_files_in_their_order(tmp_path, name, embed):
    q = fitted(name)
    paths = write_shards(tmp_path, q, ("a", "b"), embed_quantizer=embed)
    pp.merge(paths, tmp_path / "all.polar", quantizer=None if embed else q)
    alone = [contents(path, quantizer=None if embed else q) for path in paths]
    with pp.open(tmp_path / "all.polar") as f:
        assert f.keys() == ["a", "b"]
        for key in f:
            whole = np.concatenate([rows[key] for rows in alone])
            assert same_bits(f[key][...], whole)
            assert f[key].shape == (sum(PARTS), D)
            for index in (slice(295, 320), [406, 300, 299, 316, 317], 300):
                assert same_bits(f[key][index], whole[index])
    found, kinds = blocks(tmp_path / "all.polar")
    assert sorted(found) == sorted(block for path in paths for block in blocks(path)[0])
    assert kinds.count(Kind.QUANTIZER) == 1 and kinds.count(Kind.TENSOR_HEADER) == 2
    if name == "polar-vq" and q.layout == "archive":  # each file chose a model for its own codes
        assert kinds.count(Kind.ENTROPY_MODEL) > 2
    theirs = second_reader((tmp_path / "all.polar").read_bytes())
    np.testing.assert_allclose(theirs["a"], np.concatenate([rows["a"] for rows in alone]), 1e-5)


@pytest.mark.filterwarnings("ignore:rows appended")
def test_models_change_where_the_rows_come_from_another_file(tmp_path, small_chunks):
    """Codes of unlike statistics, and rows that only some files store exactly."""
    q = pp.PolarQuantizer(fine="grid", scalar_bits=5, radius_bits=0, layout="archive")
    rng = np.random.default_rng(0)
    q.fit(rng.standard_normal((500, D), dtype=np.float32))
    paths, expected = [], []
    for i, scale in enumerate((1.0, 0.05, 1e5, 0.4)):
        rows = rng.standard_normal((5000, D), dtype=np.float32) * np.float32(scale)
        paths.append(tmp_path / f"{i}.polar")
        with pp.create(paths[-1], quantizer=q, max_error=0.5 + i) as f:
            f.append("t", rows)
        expected.append(contents(paths[-1])["t"])
    pp.merge(paths, tmp_path / "all.polar")
    kinds = blocks(tmp_path / "all.polar")[1]
    assert kinds.count(Kind.ENTROPY_MODEL) >= 3 and kinds.count(Kind.WORD_MODEL) >= 1
    assert same_bits(contents(tmp_path / "all.polar")["t"], np.concatenate(expected))
    with pp.open(tmp_path / "all.polar") as f:
        assert f._index.headers[0].max_error == 3.5
    pp.merge([tmp_path / "all.polar", paths[0]], tmp_path / "again.polar")
    twice = np.concatenate([*expected, expected[0]])
    assert same_bits(contents(tmp_path / "again.polar")["t"], twice)
    # a damaged model takes the rows under it along, and no others
    n_first = len(expected[0])
    blob = bytearray((tmp_path / "all.polar").read_bytes())
    with Reader(bytes(blob)) as reader:
        second = np.flatnonzero(reader.chunks["kind"] == Kind.ENTROPY_MODEL)[1]
        blob[int(reader.parts(second).offsets[0]) + 3] ^= 1
    with pytest.raises(pp.CorruptDataError, match="entropy model"):
        pp.open(bytes(blob))
    with pp.open(bytes(blob), on_error="skip") as f:
        rows = f["t"][...]
        assert same_bits(rows[:n_first], expected[0])
        assert same_bits(rows[2 * n_first :], np.concatenate(expected[2:]))
        assert f["t"].damaged_rows == list(range(n_first, 2 * n_first))


def test_files_of_save_and_files_without_rows(tmp_path):
    rows = [r.reshape(-1, 1, D).astype(np.float16) for r in tables()]
    for i, r in enumerate(rows):
        pp.save(tmp_path / f"{i}.polar", {"t": r}, max_error=0)
    with pp.create(tmp_path / "empty.polar", quantizer=fitted("pq")):
        pass
    paths = [tmp_path / f"{i}.polar" for i in (1, 0, 1, 2, 3)]
    pp.merge([tmp_path / "empty.polar", *paths, tmp_path / "empty.polar"], tmp_path / "all.polar")
    assert same_bits(contents(tmp_path / "all.polar")["t"], np.concatenate(rows))
    pp.merge([tmp_path / "1.polar"], tmp_path / "none.polar")
    assert contents(tmp_path / "none.polar")["t"].shape == (0, 1, D)
    pp.merge([tmp_path / "empty.polar"] * 2, tmp_path / "none.polar")
    assert contents(tmp_path / "none.polar") == {}


def test_a_result_in_the_place_of_one_of_the_files(tmp_path):
    paths = write_shards(tmp_path, fitted("trellis"))
    alone = [contents(path)["t"] for path in paths]
    pp.merge(paths, paths[0])
    assert same_bits(contents(paths[0])["t"], np.concatenate(alone))


def test_a_quantizer_that_nobody_has(tmp_path):
    q = fitted("trellis")
    paths = write_shards(tmp_path, q, embed_quantizer=False)
    pp.merge(paths, tmp_path / "all.polar")
    with pytest.raises(pp.InputError, match="without its quantizer"):
        contents(tmp_path / "all.polar")
    assert len(contents(tmp_path / "all.polar", quantizer=q)["t"]) == sum(PARTS)
    pp.merge([tmp_path / "all.polar"], tmp_path / "with.polar", quantizer=q)
    assert len(contents(tmp_path / "with.polar")["t"]) == sum(PARTS)
    pp.merge([tmp_path / "with.polar"], tmp_path / "without.polar", embed_quantizer=False)
    assert (tmp_path / "without.polar").read_bytes() == (tmp_path / "all.polar").read_bytes()
    with pytest.raises(pp.InputError, match="no tensor was coded with the quantizer"):
        pp.merge(paths, tmp_path / "other.polar", quantizer=fitted("pq"))


# -- what does not go together ---------------------------------------------------------------------
def unlike(folder):
    """Files of one row each that differ from the first in one thing, and the word for it."""
    x, q = correlated(40, D), fitted("polar-vq")
    pp.save(folder / "good.polar", {"t": x}, quantizer=q)
    pp.save(folder / "half.polar", {"t": x.astype(np.float16)}, quantizer=q)
    pp.save(folder / "layout.polar", {"t": x}, quantizer=q, layout="rows")
    pp.save(folder / "codebooks.polar", {"t": x}, quantizer=fitted("allocated"))
    pp.save(folder / "wide.polar", {"t": correlated(40, 5)}, quantizer=fitted("polar-vq", 5))
    pp.save(folder / "axes.polar", {"t": x.reshape(10, 4, D)}, quantizer=q)
    pp.save(folder / "name.polar", {"u": x}, quantizer=q)
    pp.save(folder / "more.polar", {"t": x, "u": x}, quantizer=q)
    pp.save(folder / "exact.polar", {"t": x}, max_error=0)
    pp.save(folder / "row.polar", {"t": x[0]}, quantizer=q)


UNLIKE = {
    "half": "dtype float16",
    "layout": "layout rows",
    "codebooks": "quantizer",
    "wide": "shape n x 5",
    "axes": "shape n x 4 x 12",
    "name": r"holds \['u'\]",
    "more": r"holds \['t', 'u'\]",
    "exact": "quantizer none",
    "row": "is one row",
}


def test_files_that_do_not_go_together(tmp_path):
    unlike(tmp_path)
    out = tmp_path / "out" / "all.polar"
    out.parent.mkdir()
    out.write_bytes(OLD)
    for name, message in UNLIKE.items():
        with pytest.raises(pp.InputError, match=f"{name}.polar: .*{message}"):
            pp.merge([tmp_path / "good.polar", tmp_path / f"{name}.polar"], out)
    for wrong in ([], "a.polar", tmp_path / "good.polar"):
        with pytest.raises(pp.InputError, match="expected a list of files"):
            pp.merge(wrong, out)
    with pytest.raises(pp.InputError, match="expected a PolarQuantizer, got str"):
        pp.merge([tmp_path / "good.polar"], out, quantizer="q")
    assert os.listdir(out.parent) == ["all.polar"] and out.read_bytes() == OLD


def test_any_flipped_bit_is_found_and_costs_nothing_but_time(tmp_path):
    paths = write_shards(tmp_path, fitted("polar trellis"), max_error=0.2)
    out = tmp_path / "out" / "all.polar"
    out.parent.mkdir()
    out.write_bytes(OLD)
    sound = paths[2].read_bytes()
    for at in np.random.default_rng(0).integers(0, len(sound), 60).tolist():
        paths[2].write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
        with pytest.raises(pp.FormatError, match=r"2\.polar: "):
            pp.merge(paths, out)
    paths[2].write_bytes(sound[:-30])
    with pytest.raises(pp.CorruptDataError, match=r"2\.polar: cut short"):
        pp.merge(paths, out)
    paths[2].write_bytes(b"")
    with pytest.raises(pp.FormatError, match=r"2\.polar: "):
        pp.merge(paths, out)
    assert os.listdir(out.parent) == ["all.polar"] and out.read_bytes() == OLD


def test_a_file_that_is_still_being_written(tmp_path):
    paths = write_shards(tmp_path, fitted("trellis"))
    paths[1].unlink()
    with pp.create(paths[1], quantizer=fitted("trellis")) as f:
        f.append("t", tables()[0])
        for read in (lambda: pp.merge(paths, tmp_path / "all.polar"), lambda: pp.open(paths[1])):
            with pytest.raises(FileNotFoundError, match="still being written"):
                read()
    pp.merge(paths, tmp_path / "all.polar")
    with pytest.raises(FileNotFoundError, match="No such file"):
        pp.merge([tmp_path / "never.polar"], tmp_path / "all.polar")


def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    paths = write_shards(tmp_path, fitted("trellis"))
    agreed = merging._agreed

    def meanwhile(shards):
        pp.save(paths[2], {"t": tables()[0]}, quantizer=fitted("trellis"))
        return agreed(shards)

    monkeypatch.setattr(merging, "_agreed", meanwhile)
    with pytest.raises(pp.InputError, match=r"2\.polar: changed while"):
        pp.merge(paths, tmp_path / "all.polar")
    assert not (tmp_path / "all.polar").exists()


def test_disk_full(tmp_path, monkeypatch):
    paths = write_shards(tmp_path, fitted("trellis"))
    pp.merge(paths, tmp_path / "all.polar")
    whole = (tmp_path / "all.polar").read_bytes()
    out = tmp_path / "out" / "all.polar"
    out.parent.mkdir()
    out.write_bytes(OLD)
    for room in (0, 100, len(whole) // 2, len(whole) - 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(room))
            with pytest.raises(OSError, match="No space left"):
                pp.merge(paths, out)
        assert os.listdir(out.parent) == ["all.polar"] and out.read_bytes() == OLD
    pp.merge(paths, out)
    assert out.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_at_random_moments(tmp_path):
    """Fifty times; run in a process of its own, since one with threads should not fork."""
    paths = write_shards(tmp_path, fitted("trellis"))
    pp.merge(paths, tmp_path / "all.polar")
    whole = (tmp_path / "all.polar").read_bytes()
    out = tmp_path / "out" / "all.polar"
    out.parent.mkdir()
    out.write_bytes(OLD)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        capture_output=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr.decode()
    killed, finished = map(int, child.stdout.split())
    assert killed > 5 and killed + finished == 50
    pp.merge(paths, out)
    assert out.read_bytes() == whole
    assert os.listdir(out.parent) == ["all.polar"]


KILLED = """
import os, random, signal, sys, time
import polarpack as pp
from pathlib import Path
from test_merging import OLD

out, paths, rng, killed = Path(sys.argv[1]), sys.argv[2:], random.Random(0), 0
start = time.perf_counter()
pp.merge(paths, out)
took, whole = time.perf_counter() - start, out.read_bytes()
for _ in range(50):
    out.write_bytes(OLD)
    child = os.fork()
    if child == 0:
        pp.merge(paths, out)
        os._exit(0)
    time.sleep(rng.uniform(0, 1.2 * took))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert out.read_bytes() in (OLD, whole)
print(killed, 50 - killed)
"""
