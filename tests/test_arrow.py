"""Columns of vectors and of codes in Arrow tables."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polarpack as pp
from polarpack.integrations.arrow import (
    DTYPE_LABEL,
    QUANTIZER_LABEL,
    RowDecoder,
    RowEncoder,
)

D = 6
# of fixed rate; ends in a trellis; a radius before the trellis
PRESETS = {"pq": 4.0, "trellis": 3.0, "polar_trellis": 3.0, "int8_rows": None}


def made(n: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    spread = np.arange(1, D + 1) ** -0.5
    return (np.random.default_rng(seed).standard_normal((n, D)) * spread).astype(dtype)


@functools.cache
def quantizer(name: str) -> pp.PolarQuantizer:
    return pp.preset(name, PRESETS[name]).fit(made(400))


def table(x: np.ndarray, kind: str = "fixed", **others: list) -> pa.Table:
    flat = pa.array(x.reshape(-1))
    if kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    elif kind == "tensor":
        storage = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
        column = pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(flat.type, [x.shape[1]]), storage
        )
    else:
        offsets = np.arange(0, x.size + 1, x.shape[1])
        column = pa.LargeListArray.from_arrays(pa.array(offsets), flat)
        column = column if kind == "large" else column.cast(pa.list_(flat.type))
    return pa.table({"id": pa.array(np.arange(len(x))), "v": column, **others})


def rows_of(t: pa.Table, column: str = "v") -> np.ndarray:
    values = t.column(column).combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, D)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_decodes_as_the_quantizer_does(name, dtype):
    q, x = quantizer(name), made(90, 1, dtype)
    t = table(x, text=[str(i) for i in range(90)])
    coded = RowEncoder(q, "v")(t)
    assert coded.column_names == ["id", "v", "text"]
    labels = coded.schema.field("v").metadata
    assert labels == {QUANTIZER_LABEL: q.hash.encode(), DTYPE_LABEL: dtype.encode()}
    back = RowDecoder(q, "v")(coded)
    assert back.schema.field("v").type == pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), D)
    expected = q.decode_as(q.encode(x), np.dtype(dtype))
    np.testing.assert_array_equal(rows_of(back), expected)
    assert back.drop(["v"]) == t.drop(["v"])
    as_float32 = RowDecoder(q, "v", dtype="float32")(coded)
    np.testing.assert_array_equal(rows_of(as_float32), q.decode(q.encode(x)))


@pytest.mark.parametrize("kind", ["fixed", "large", "list", "tensor"])
def test_every_list_type(kind):
    q, x = quantizer("pq"), made(20, 2)
    coded = RowEncoder(q, "v")(table(x, kind))
    assert coded.column("v").type == pa.binary(D * 4 // 8)
    np.testing.assert_array_equal(rows_of(RowDecoder(q, "v")(coded)), q.decode(q.encode(x)))


@pytest.mark.parametrize("name", ["pq", "trellis"])
@settings(max_examples=30)
@given(
    n=st.integers(0, 30),
    cut=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    null=st.sets(st.integers(0, 29)),
    order_seed=st.integers(0, 9),
)
def test_rows_stand_by_themselves(name, n, cut, null, order_seed):
    """Slices, nulls, chunks, and any order of the coded rows."""
    q, x = quantizer(name), made(n, 3)
    lists = pa.array(
        [None if i in null else row.tolist() for i, row in enumerate(x)], pa.list_(pa.float32(), D)
    )
    begin, end = sorted(cut)
    whole = pa.table({"v": pa.chunked_array([lists[:begin], lists[begin:end], lists[end:]])})
    coded = RowEncoder(q, "v")(whole)
    order = np.random.default_rng(order_seed).permutation(n)
    back = RowDecoder(q, "v")(coded.take(pa.array(order)).slice(1))
    expected = q.decode(q.encode(x))
    got = back.column("v").to_pylist()
    assert len(got) == max(0, n - 1)
    for i, row in zip(order[1:], got, strict=True):
        assert (row is None) == (int(i) in null)
        if row is not None:
            np.testing.assert_array_equal(np.float32(row), expected[i])


def test_record_batches_and_a_column_beside():
    q, x = quantizer("trellis"), made(10, 4)
    (batch,) = table(x).to_batches()
    coded = RowEncoder(q, "v", into="codes")(batch)
    assert isinstance(coded, pa.RecordBatch)
    assert coded.schema.names == ["id", "v", "codes"]
    assert coded.column("v") == batch.column("v")
    back = RowDecoder(q, "codes", into="v_hat")(coded)
    np.testing.assert_array_equal(
        back.column("v_hat").flatten().to_numpy(), q.decode(q.encode(x)).ravel()
    )
    with pytest.raises(pp.InputError, match="'id' is there already"):
        RowEncoder(q, "v", into="id")(batch)


def test_trellis_rows_are_hardly_longer_than_in_a_block():
    q, x = quantizer("trellis"), made(2000, 5)
    coded = RowEncoder(q, "v")(table(x)).column("v")
    ideal = q.rate_bits(q.encode(x)) / 8
    assert sum(len(value.as_py()) for value in coded) < ideal + 1.0 * len(x)


def test_travels_as_bytes():
    q, x = quantizer("polar_trellis"), made(12, 6)
    encoder = pickle.loads(pickle.dumps(RowEncoder(q, "v", into="c", dtype="float32")))
    assert encoder.quantizer.hash == q.hash
    decoder = pickle.loads(pickle.dumps(RowDecoder(q.to_bytes(), "c", into="w", dtype="float64")))
    back = decoder(encoder(table(x)))
    np.testing.assert_array_equal(rows_of(back, "w"), q.decode_as(q.encode(x), np.dtype("float64")))


def test_through_parquet(tmp_path):
    import pyarrow.parquet as pq

    q, x = quantizer("trellis"), made(50, 7, "float16")
    pq.write_table(RowEncoder(q, "v")(table(x)), tmp_path / "t.parquet")
    back = RowDecoder(q, "v")(pq.read_table(tmp_path / "t.parquet"))
    np.testing.assert_array_equal(rows_of(back), q.decode_as(q.encode(x), np.dtype("float16")))


def test_bad_columns():
    q, x = quantizer("pq"), made(5)
    encode = RowEncoder(q, "v")
    for bad, message in [
        ({"w": [[0.0] * D]}, "one column 'v', got 0 among 'w'"),
        ({"v": [1.0, 2.0]}, "'v': expected lists of float16, float32, float64, got double"),
        ({"v": [[1, 2]]}, "expected lists of .*, got list<.*int64>"),
        ({"v": [[0.0] * D, [0.0] * 5]}, "expected vectors of 6 numbers, row 1 has 5"),
        ({"v": [None, [0.0] * D, [0.0] * 5]}, "row 2 has 5"),
        ({"v": [[0.0] * D, [0.0, None, *[0.0] * 4]]}, "row 1 has a null among them"),
        ({"v": [[0.0] * D, None, [0.0, np.nan, *[0.0] * 4]]}, "NaN or infinity first in row 2"),
    ]:
        with pytest.raises(pp.InputError, match=message):
            encode(pa.table(bad))
    with pytest.raises(pp.InputError, match="an Arrow table or record batch, got ndarray"):
        encode(x)
    with pytest.raises(pp.InputError, match="expected vectors of float16, got float32"):
        RowEncoder(q, "v", dtype="float16")(table(x))
    two = pa.table([pa.array([[0.0] * D])] * 2, names=["v", "v"])
    with pytest.raises(pp.InputError, match="one column 'v', got 2"):
        encode(two)


def test_rows_that_are_not_finite_can_become_null():
    q, x = quantizer("trellis"), made(5, 8)
    x[3, 1], x[4, 0] = np.inf, np.nan
    back = RowDecoder(q, "v")(RowEncoder(q, "v", nonfinite="null")(table(x)))
    assert back.column("v").is_valid().to_pylist() == [True, True, True, False, False]
    np.testing.assert_array_equal(rows_of(back.slice(0, 3)), q.decode(q.encode(x[:3])))


def test_bad_codes():
    q, other = quantizer("trellis"), quantizer("polar_trellis")
    coded = RowEncoder(q, "v")(table(made(5)))
    with pytest.raises(pp.InputError, match=f"codes of the quantizer {q.hash[:16]}..., got"):
        RowDecoder(other, "v")(coded)
    plain = pa.table({"v": coded.column("v").cast(pa.binary())})
    with pytest.raises(pp.InputError, match="labelled with their quantizer, got none"):
        RowDecoder(q, "v")(plain)
    trusted = RowDecoder(q, "v", require_label=False)(plain)
    np.testing.assert_array_equal(rows_of(trusted), rows_of(RowDecoder(q, "v")(coded)))
    with pytest.raises(pp.InputError, match="expected codes of type binary, got fixed_size"):
        RowDecoder(q, "v", require_label=False)(table(made(5)))
    short = pa.table({"v": pa.array([b""])})
    with pytest.raises(pp.CorruptDataError, match="0 bytes is no coded row"):
        RowDecoder(other, "v", require_label=False)(short)
    labels = {QUANTIZER_LABEL: q.hash, DTYPE_LABEL: "int8"}
    lying = coded.cast(
        pa.schema([coded.schema.field("id"), pa.field("v", pa.binary(), metadata=labels)])
    )
    with pytest.raises(pp.InputError, match="label names the dtype 'int8'"):
        RowDecoder(q, "v")(lying)


@given(st.binary(max_size=40))
def test_any_bytes_end_in_rows_or_a_format_error(data):
    for name in ("trellis", "polar_trellis"):
        t = pa.table({"v": pa.array([data], pa.binary())})
        try:
            back = RowDecoder(quantizer(name), "v", require_label=False)(t)
        except pp.FormatError:
            continue
        assert np.isfinite(rows_of(back)).all()


def test_bad_arguments():
    q = quantizer("pq")
    for call, message in [
        (lambda: RowEncoder("q", "v"), "expected a PolarQuantizer, got str"),
        (lambda: RowEncoder(q, 3), "expected column to be a name"),
        (lambda: RowEncoder(q, "v", into=3), "expected into to be a name"),
        (lambda: RowEncoder(q, "v", dtype="int8"), "expected dtype to be one of"),
        (lambda: RowEncoder(q, "v", nonfinite="raw"), "'error' or 'null', got 'raw'"),
        (lambda: RowDecoder(q, "v", dtype="int8"), "expected dtype to be one of"),
    ]:
        with pytest.raises(pp.InputError, match=message):
            call()
    with pytest.raises(pp.NotFittedError):
        RowEncoder(pp.PolarQuantizer(), "v")
    with pytest.raises(pp.CorruptDataError):
        RowEncoder(b"no quantizer", "v")
