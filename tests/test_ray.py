"""Ray Data on a real local cluster of two workers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import polarpack as pp

if importlib.util.find_spec("ray") is None:
    pytest.skip(
        f"no wheel of ray for Python {sys.version_info[0]}.{sys.version_info[1]}",
        allow_module_level=True,
    )

import ray
import ray.data

from polarpack.integrations.arrow import RowEncoder
from polarpack.integrations.ray import (
    MANIFEST,
    decode_dataset,
    encode_dataset,
    fit_dataset,
    open_shards,
    read_shards,
    write_shards,
)

# Ray warns of settings of its own that it is about to rename.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
D, BLOCKS, ROWS = 8, 6, 200
N = BLOCKS * ROWS


@pytest.fixture(scope="module")
def cluster():
    """Two workers, for all tests of this file."""
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 << 20,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    yield
    ray.shutdown()


def made(n: int = N, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    spread = np.arange(1, D + 1) ** -0.5
    return (np.random.default_rng(seed).standard_normal((n, D)) * spread).astype(dtype)


def table(x: np.ndarray, first: int = 0) -> pa.Table:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    return pa.table({"id": np.arange(first, first + len(x)), "v": lists})


def tables(x: np.ndarray) -> list[pa.Table]:
    return [table(x[i : i + ROWS], i) for i in range(0, len(x), ROWS)]


def dataset(x: np.ndarray) -> ray.data.Dataset:
    return ray.data.from_arrow(tables(x))


def dying(ds: ray.data.Dataset, marker: Path) -> ray.data.Dataset:
    """The dataset, whose middle block kills the process it is first handed to. Ray runs this in the
    process of the step that follows; the marker is left with that process's title."""

    def kill_once(block: pa.Table) -> pa.Table:
        if N // 2 in block.column("id").to_pylist() and not marker.exists():
            marker.write_bytes(Path("/proc/self/cmdline").read_bytes())
            os.kill(os.getpid(), signal.SIGKILL)
        return block

    return ds.map_batches(kill_once, batch_format="pyarrow", batch_size=None)


def quantizer() -> pp.PolarQuantizer:
    return pp.preset("trellis", 3.0).fit(made(1000, 9))


def rows_of(paths: list[str], q: pp.PolarQuantizer) -> np.ndarray:
    return np.concatenate([pp.open(path, quantizer=q)["v"][...] for path in paths])


def test_codes_there_and_back(cluster):
    q, x = quantizer(), made()
    coded = encode_dataset(dataset(x), q, "v", into="codes", workers=1, num_cpus=0.5)
    decoded = decode_dataset(coded, q, "codes", into="v_hat", workers=1, num_cpus=0.5)
    batch = next(iter(decoded.iter_batches(batch_size=2 * N, batch_format="numpy")))
    order = np.argsort(batch["id"])
    np.testing.assert_array_equal(batch["v_hat"][order], q.decode(q.encode(x)))
    assert set(batch) == {"id", "v", "codes", "v_hat"}


@pytest.mark.slow
def test_codes_in_parquet_though_a_worker_is_killed(cluster, tmp_path):
    q, x, marker = quantizer(), made(), tmp_path / "killed"
    coded = encode_dataset(dying(dataset(x), marker), q, "v", workers=2)
    coded.write_parquet(str(tmp_path / "coded"))
    title = marker.read_bytes()  # it was an encoder's actor that died
    assert b"MapWorker" in title and b"_Coder" in title
    stored = pyarrow.parquet.read_table(tmp_path / "coded").sort_by("id")
    assert stored.equals(RowEncoder(q, "v")(table(x)), check_metadata=True)


def test_shards_though_a_worker_is_killed(cluster, tmp_path):
    q, x, marker = quantizer(), made(), tmp_path / "killed"
    done = write_shards(dataset(x), q, tmp_path / "plain", "v", max_error=0.5)
    again = write_shards(dying(dataset(x), marker), q, tmp_path / "dying", "v", max_error=0.5)
    assert marker.exists()
    assert [Path(p).name for p in done.paths] == [f"shard-{i:06d}.polar" for i in range(BLOCKS)]
    assert done.n_rows == [ROWS] * BLOCKS and (done.column, done.quantizer.hash) == ("v", q.hash)
    for one, other in zip(done.paths, again.paths, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()
    expected = [
        pp.decompress(pp.compress(t, quantizer=q, max_error=0.5)) for t in np.split(x, BLOCKS)
    ]
    np.testing.assert_array_equal(rows_of(done.paths, q), np.concatenate(expected))
    with pp.open(done.paths[0]) as shard:  # its quantizer is named, not stored
        assert shard.info()["tensors"]["v"]["quantizer"] == q.hash
        with pytest.raises(pp.InputError, match="written without its quantizer"):
            shard["v"][0]
    pp.merge(done.paths, tmp_path / "all.polar", quantizer=q)
    with pp.open(tmp_path / "all.polar") as merged:
        np.testing.assert_array_equal(merged["v"][...], np.concatenate(expected))
    batches = read_shards(tmp_path / "plain").iter_batches(batch_size=2 * N)
    got = next(iter(batches))["v"]
    assert sorted(map(bytes, got)) == sorted(map(bytes, rows_of(done.paths, q)))


def test_shards_go_on_where_a_run_ended(cluster, tmp_path):
    q, x = quantizer(), made()
    x[N - 1, 0] = np.nan
    bad = (
        f"block {BLOCKS - 1}: expected v to be finite, got NaN or infinity first in row {ROWS - 1}"
    )
    with pytest.raises(pp.InputError, match=bad):
        write_shards(dataset(x), q, tmp_path, "v", workers=1)
    with pytest.raises(pp.InputError, match="not finished"):
        open_shards(tmp_path)
    with pytest.raises(pp.InputError, match="holds shards already"):
        write_shards(dataset(x), q, tmp_path, "v")
    with pytest.raises(pp.InputError, match="begun with another nonfinite"):
        write_shards(dataset(x), q, tmp_path, "v", nonfinite="raw", resume=True)
    x[N - 1, 0] = 0
    first = tmp_path / "shard-000000.polar"
    before = first.stat()
    done = write_shards(dataset(x), q, tmp_path, "v", resume=True)
    assert first.stat().st_mtime_ns == before.st_mtime_ns and sum(done.n_rows) == N
    np.testing.assert_array_equal(rows_of(done.paths, q), q.decode(q.encode(x)))
    assert not list(tmp_path.glob(".*"))
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(pp.InputError, match="no shards.json that says of what"):
        write_shards(dataset(x), q, tmp_path, "v", resume=True)


def test_blocks_that_do_not_fit(cluster, tmp_path):
    q, x = quantizer(), made(3 * ROWS)
    null = pa.table({"id": [0, 1], "v": pa.array([[0.0] * D, None], pa.list_(pa.float32(), D))})
    half = table(made(ROWS, dtype="float16"))
    ragged = pa.table({"id": [0, 1], "v": pa.array([[0.0] * D, [0.0]], pa.list_(pa.float32()))})
    whole = pa.table({"id": [0], "v": pa.array([[0.0] * D], pa.list_(pa.float32()))})
    for i, (blocks, message) in enumerate(
        [
            ([*tables(x), null], "block 3: column 'v': row 1 is null"),
            ([*tables(x), half], "block 3: column 'v': expected vectors of float32, got float16"),
            ([whole, ragged], "block 1: column 'v': expected vectors of 8 numbers, row 1 has 1"),
        ]
    ):
        with pytest.raises(pp.InputError, match=message):
            write_shards(ray.data.from_arrow(blocks), q, tmp_path / str(i), "v")
    empty = table(x[:0])
    done = write_shards(
        ray.data.from_arrow([*tables(x)[:2], empty, table(x[-7:])]), q, tmp_path / "e", "v"
    )
    assert sorted(done.n_rows) == [7, ROWS, ROWS]
    np.testing.assert_array_equal(
        rows_of(done.paths, q), q.decode(q.encode(np.concatenate([x[: 2 * ROWS], x[-7:]])))
    )
    assert write_shards(ray.data.from_arrow(empty), q, tmp_path / "none", "v").paths == []
    for call in (encode_dataset, lambda ds, q, column: write_shards(ds, q, tmp_path / "w", column)):
        with pytest.raises(pp.InputError, match="one column 'w', got 0 among 'id', 'v'"):
            call(dataset(x), q, "w")


def test_fit_on_a_sample(cluster):
    x = made()
    x[::50] = np.nan
    first, again, other = (
        fit_dataset(dataset(x), "v", bits=2.0, sample_rows=500, seed=seed) for seed in (0, 0, 1)
    )
    assert first.hash == again.hash != other.hash
    shuffled = ray.data.from_arrow(tables(x)[::-1])
    assert fit_dataset(shuffled, "v", bits=2.0, sample_rows=500, n_rows=N).hash == first.hash
    finite = x[np.isfinite(x).all(axis=1)]
    whole = fit_dataset(dataset(x), "v", bits=2.0)
    assert whole.drift(finite) == pytest.approx(1.0, abs=0.2) == first.drift(finite)
    for ds, message in [(dataset(x[:1]), "none is finite"), (dataset(x[:0]), "none is finite")]:
        with pytest.raises(pp.InputError, match=message):
            fit_dataset(ds, "v", bits=2.0)
    with pytest.raises(pp.InputError, match="expected exactly one of"):
        fit_dataset(dataset(x), "v")


def test_damaged_lists(tmp_path):
    q = quantizer()
    sound = {"version": 0, "quantizer": q.hash, "column": "v", "shards": [["a.polar", 3]]}
    (tmp_path / f"quantizer-{q.hash}.bin").write_bytes(q.to_bytes())
    for change in [
        {"version": 1},
        {"column": 3},
        {"quantizer": "zz"},
        {"quantizer": "../" + q.hash},
        {"shards": [["../a.polar", 3]]},
        {"shards": [["/a.polar", 3]]},
        {"shards": [["a.polar", -3]]},
        {"shards": [["a.polar"]]},
        {"shards": 3},
    ]:
        (tmp_path / MANIFEST).write_text(json.dumps(sound | change))
        with pytest.raises(pp.CorruptDataError, match="no list of shards"):
            open_shards(tmp_path)
    for text in ["", "[]", "[" * 100_000, "\x00"]:
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(pp.CorruptDataError, match="no list of shards"):
            open_shards(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(sound))
    assert open_shards(tmp_path).n_rows == [3]
    other = pp.preset("trellis", 2.0).fit(made(300))
    (tmp_path / f"quantizer-{q.hash}.bin").write_bytes(other.to_bytes())
    with pytest.raises(pp.CorruptDataError, match="in place of"):
        open_shards(tmp_path)
