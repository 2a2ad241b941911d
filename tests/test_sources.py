"""Tables read in batches: the same rows from every source, a uniform sample, and clear errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import same_bits
from tables import correlated

import polarpack as pp
from polarpack import sources
from polarpack.batches import Reservoir
from polarpack.integrations import files
from polarpack.sources import draw_rows, rows_of

N, D = 900, 7
X = correlated(N, D)


def cut(x, *sizes):
    """Batches of these sizes, in turn."""
    at, i = 0, 0
    while at < len(x):
        yield x[at : at + sizes[i % len(sizes)]]
        at, i = at + sizes[i % len(sizes)], i + 1


def plain_sample(n, size, seed):
    """The rows with the smallest of n random numbers."""
    keys = np.random.Generator(np.random.PCG64(seed)).random(n)
    return np.sort(np.argsort(keys)[:size])


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any),
    size=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_the_sample_does_not_depend_on_the_batches(sizes, size, seed):
    reservoir = Reservoir(size, seed)
    for batch in cut(X[:200], *sizes):
        reservoir.add(batch)
    kept = plain_sample(200, size, seed)
    assert np.array_equal(reservoir.rows, X[:200][kept])
    assert np.array_equal(reservoir.numbers, kept)


def test_rows_are_drawn_uniformly():
    """Each of 40 rows is in 10 of 40 with the same chance: chi-square over 4000 seeds."""
    numbers = np.arange(40.0)[:, None]
    counts = np.zeros(40)
    for seed in range(4000):
        reservoir = Reservoir(10, seed)
        for batch in cut(numbers, 7):
            reservoir.add(batch)
        counts[reservoir.numbers] += 1
    chi = ((counts - 1000) ** 2 / 1000).sum() / (1 - 10 / 40)
    assert chi < 73  # 39 degrees of freedom: exceeded once in 1000 times


# -- the same rows from everything -----------------------------------------------------------------
def write_fvecs(path, x):
    lengths = np.full((len(x), 1), x.shape[1], "<i4")
    np.hstack([lengths, x.astype("<f4").view("<i4")]).tofile(path)


def written(folder, kind):
    """X in a file of this kind."""
    path = folder / f"x.{kind}"
    if kind == "npy":
        np.save(path, X)
    elif kind == "npz":
        np.savez_compressed(path, x=X)
    elif kind == "fvecs":
        write_fvecs(path, X)
    elif kind == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file({"x": X}, path)
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow_table(), path, row_group_size=250)
    elif kind == "vec":
        lines = (" ".join(["w", *(repr(float(v)) for v in row)]) for row in X)
        path.write_text("\n".join(lines))
    return path


def arrow_table():
    pa = pytest.importorskip("pyarrow")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), D)
    return pa.table({"id": list(range(N)), "x": vectors, "name": ["n"] * N})


@pytest.fixture
def small_batches(monkeypatch):
    """Files come in batches of some 100 rows."""
    monkeypatch.setattr("polarpack.batches.BATCH_BYTES", 100 * D * 4)
    monkeypatch.setattr(files, "ARROW_ROWS", 100)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("kind", ["npy", "npz", "fvecs", "safetensors", "parquet", "vec"])
def test_files_come_in_batches(tmp_path, kind):
    path = written(tmp_path, kind)
    rows = rows_of(path)
    assert (rows.n_rows, rows.name, rows.again) == (N, "x", True)
    batches = list(rows.batches())
    assert same_bits(np.concatenate(batches), X)
    assert len(batches) > 8 or kind == "vec"
    for start in (1, 99, 100, 251, 500, N - 1, N):
        rest = [np.zeros((0, D), "f4"), *rows.batches(start)]
        assert same_bits(np.concatenate(rest), X[start:]), start
    both = rows_of([path, str(path)])
    assert both.n_rows == 2 * N
    assert same_bits(np.concatenate(list(both.batches(N - 10))), np.concatenate([X[-10:], X]))


@pytest.mark.usefixtures("small_batches")
def test_bfloat16_of_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    x = torch.from_numpy(X).bfloat16()
    save_file({"x": x, "y": x[:, :2].float().contiguous()}, tmp_path / "x.safetensors")
    rows = rows_of(tmp_path / "x.safetensors", key="x")
    assert rows.spec.dtype == "bfloat16" and torch.equal(torch.cat(list(rows.batches())), x)
    assert same_bits(draw_rows(rows, size=50, seed=3), x.float().numpy()[plain_sample(N, 50, 3)])
    with pytest.raises(pp.InputError, match="choose one of '[xy]', '[xy]'"):
        rows_of(tmp_path / "x.safetensors")


def of_arrow(how):
    pa, dataset = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.dataset")
    table = arrow_table()
    return {
        "table": lambda: table,
        "batch": lambda: pa.record_batch(table.combine_chunks().to_batches()[0]),
        "reader": lambda: table.to_reader(110),
        "dataset": lambda: dataset.dataset(table),
        "scanner": lambda: dataset.dataset(table).scanner(columns=["x"], batch_size=80),
        "batches": lambda: table.to_batches(130),
        "tensors": lambda: pa.table(
            {"x": pa.FixedShapeTensorArray.from_numpy_ndarray(X.copy()), "y": [1.0] * N}
        ),
    }[how]()


def plain(how):
    return {
        "array": lambda: X,
        "torch": lambda: pytest.importorskip("torch").from_numpy(X),
        "list": lambda: list(cut(X, 100, 0, 3)),
        "generator": lambda: cut(X, 211),
        "dicts": lambda: [{"x": x, "id": np.arange(len(x))} for x in cut(X, 100)],
    }[how]()


ARROW = ["table", "batch", "reader", "dataset", "scanner", "batches", "tensors"]


@pytest.mark.parametrize("how", ["array", "torch", "list", "generator", "dicts", *ARROW])
def test_objects_come_in_batches(how):
    source = (of_arrow if how in ARROW else plain)(how)
    rows = rows_of(source)
    assert rows.again == (how not in ("generator", "reader"))
    assert same_bits(np.concatenate([np.asarray(x) for x in rows.batches(33)]), X[33:])
    if rows.again:
        expected = X if how in ("array", "torch") else X[plain_sample(N, 64, 5)]
        size = None if how in ("array", "torch") else 64
        assert same_bits(draw_rows(source, size=size, seed=5), expected)


def test_a_memory_map_is_asked_for_the_rows_drawn_alone(tmp_path, monkeypatch):
    path = written(tmp_path, "npy")
    mapped = np.load(path, mmap_mode="r")
    assert same_bits(draw_rows(mapped, seed=2), X)  # small enough to be taken whole
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 4 * D * 200)
    monkeypatch.setattr(sources, "LEAST_SAMPLE", 10)
    assert same_bits(draw_rows(mapped, seed=2), X[plain_sample(N, 200, 2)])
    assert same_bits(draw_rows(path, seed=2), X[plain_sample(N, 200, 2)])
    bad = X.copy()
    bad[[300, plain_sample(N, 200, 2)[9]]] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(pp.InputError, match=f"infinity in row {plain_sample(N, 200, 2)[9]}"):
        draw_rows(np.load(tmp_path / "bad.npy", mmap_mode="r"), seed=2)


# -- fit -------------------------------------------------------------------------------------------
def test_fit_does_not_mind_where_rows_come_from(tmp_path):
    hashes = {
        pp.fit(source, bits=2.0).hash
        for source in (X, list(cut(X, 100)), cut(X, 1, 77), written(tmp_path, "npy"))
    }
    assert len(hashes) == 1
    sampled = pp.fit(cut(X, 100), bits=2.0, sample_rows=500, seed=4)
    expected = pp.fit(X[plain_sample(N, 500, 4)], bits=2.0, seed=4)
    assert sampled.hash == expected.hash


def test_memory_is_that_of_the_sample():
    """48 MB of rows in batches of 480 kB, of which 1000 are kept."""
    block = np.random.default_rng(0).standard_normal((5000, 24), dtype=np.float32)
    tracemalloc.start()
    try:
        rows = draw_rows((block for _ in range(100)), size=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.shape == (1000, 24)
    assert peak < 1 << 20, f"{peak >> 10} KiB"


def bad_batches():
    wide, half, nan = X[:5, :3], X[:5].astype(np.float16), X[:5].copy()
    nan[2] = np.inf
    return {
        r"batch 2 of train \(row 30 on\): expected \(n, 7\) float32 as before, got \(5, 3\)": wide,
        "batch 2 of train .*, got .5, 7. float16": half,
        "batch 2 of train of shape .n, d., got .5, 1, 7.": X[:5, None],
        "batch 2 of train of dtype float16": X[:5].astype(int),
        "batch 2 of train to be a numpy array": [[1.0] * D],
        "finite, got NaN or infinity first in row 32": nan,
        "batch 2 of train: choose a column": {"a": X, "b": X},
    }


@pytest.mark.parametrize("message", bad_batches())
def test_a_bad_batch_is_named(message):
    batches = [X[:20], X[:10], bad_batches()[message], X]
    with pytest.raises(pp.InputError, match=message):
        pp.fit(iter(batches), bits=2.0)


def test_no_rows_and_no_source(tmp_path):
    for nothing in (iter([]), [X[:0]], X[:0], []):
        with pytest.raises(pp.InputError, match="expected at least one row"):
            pp.fit(nothing, bits=2.0)
    for wrong, message in (
        (3, "iterable of batches, got int"),
        ({"x": X}, "got dict"),
        (tmp_path / "x.exe", "expected a file to read"),
        ([tmp_path / "x.exe"], "expected a file to read"),
    ):
        with pytest.raises(pp.InputError, match=message):
            pp.fit(wrong, bits=2.0)
    with pytest.raises(FileNotFoundError):
        pp.fit(tmp_path / "x.npy", bits=2.0)
    for size in (0, True, 1.5):
        with pytest.raises(pp.InputError, match="sample_rows >= 1"):
            pp.fit(X, bits=2.0, sample_rows=size)


@pytest.mark.parametrize("kind", ["npy", "npz", "fvecs", "safetensors", "parquet"])
def test_a_file_that_is_cut_short(tmp_path, kind):
    path = written(tmp_path, kind)
    whole = path.read_bytes()
    for length in (0, 3, 9, 40, len(whole) // 2 + 1, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(pp.InputError):
            draw_rows(path)


def test_an_arrow_column_that_holds_no_vectors():
    pa = pytest.importorskip("pyarrow")
    lists = pa.table({"a": [[1.0, 2.0], [3.0]], "b": [[1.0], None], "c": [1.0, 2.0]})
    for key, message in (
        (None, "choose one column of lists of floats"),
        ("c", "expected lists of floats in 'c', got double"),
        ("d", "no tensor 'd'"),
        ("a", "column 'a': expected lists of one length, got 1 to 2"),
        ("b", "column 'b': expected a list of numbers in every row, got null"),
    ):
        with pytest.raises(pp.InputError, match=message):
            pp.fit(lists, bits=2.0, key=key)


def test_time_budget_ends_the_reading():
    def endless():
        while True:
            yield X

    with pytest.warns(UserWarning, match="the sample is of the first [0-9]+ rows alone"):
        q = pp.fit(endless(), bits=2.0, time_budget=0.05, sample_rows=300)
    assert q.d_ == D


# -- resuming --------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
import numpy as np
from polarpack import sources
sources.CHECKPOINT_SECONDS = 0.0
x = np.load(sys.argv[1])

def batches():
    for i in range(0, len(x), 100):
        if i == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x[i : i + 100]

sources.draw_rows(batches(), size=64, seed=9, checkpoint=sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_pass_goes_on_from_its_checkpoint(tmp_path):
    path, checkpoint = written(tmp_path, "npy"), tmp_path / "kept"
    child = subprocess.run([sys.executable, "-c", KILLED, path, checkpoint], check=False)
    assert child.returncode == -signal.SIGKILL
    looked_at = []

    def counted(rows):
        looked_at.append(len(rows))
        return rows

    again = (counted(x) for x in cut(X, 100))
    expected = X[plain_sample(N, 64, 9)]
    assert same_bits(draw_rows(again, size=64, seed=9, checkpoint=checkpoint), expected)
    assert Reservoir.load(checkpoint).n_seen == N
    assert same_bits(draw_rows(path, size=64, seed=9, checkpoint=checkpoint), expected)
    for wrong in ({"seed": 1}, {"seed": 9, "size": 65}):
        with pytest.raises(pp.InputError, match="a sample of 64 rows with seed 9"):
            draw_rows(path, checkpoint=checkpoint, **wrong)
    with pytest.raises(pp.InputError, match="expected rows of 7 float32 as in the sample so far"):
        draw_rows([np.zeros((2 * N, 2))], seed=9, checkpoint=checkpoint)
    q = pp.fit(path, bits=2.0, sample_rows=64, seed=9, checkpoint=checkpoint)
    assert not checkpoint.exists()
    assert q.hash == pp.fit(expected, bits=2.0, seed=9).hash
    for junk in (b"", b"junk", path.read_bytes()):
        checkpoint.write_bytes(junk)
        with pytest.raises(pp.InputError, match="no checkpoint of a sample"):
            draw_rows(cut(X, 100), checkpoint=checkpoint)
    assert sorted(os.listdir(tmp_path)) == ["kept", "x.npy"]
