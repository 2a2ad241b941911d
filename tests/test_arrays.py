"""The border: what callers bring in, what they get back, and what they are told when it is wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import same_bits, vectors

import polarpack as pp
from polarpack import _arrays as arrays

FLOATS = ["float16", "float32", "float64"]
TORCH_FLOATS = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 4, 3), (0, 3), (4, 0)])
def test_describe_numpy(dtype, shape):
    spec = arrays.describe(np.zeros(shape, dtype))
    assert (spec.shape, spec.dtype, spec.library) == (shape, dtype, "numpy")
    assert spec.n_rows * spec.d == np.zeros(shape).size
    assert spec.nbytes == np.zeros(shape, dtype).nbytes


@pytest.mark.parametrize("dtype", TORCH_FLOATS)
def test_describe_torch(dtype):
    t = torch.zeros(2, 3, dtype=getattr(torch, dtype))
    spec = arrays.describe(t)
    assert (spec.shape, spec.dtype, spec.library, spec.device) == ((2, 3), dtype, "torch", "cpu")
    assert spec.nbytes == t.nelement() * t.element_size()


@pytest.mark.parametrize(
    "x",
    [
        [[1.0, 2.0]],
        "rows",
        None,
        3.5,
        np.zeros((2, 2), np.int32),
        np.zeros((2, 2), bool),
        np.zeros((2, 2), np.complex64),
        np.zeros((2, 2), np.longdouble),
        np.array([["a"]]),
        np.array([[None]]),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.complex64),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_what_is_no_float_array_is_refused(x):
    with pytest.raises(pp.InputError, match="expected x"):
        arrays.as_float32(x)


def test_messages_name_what_was_got_and_where():
    with pytest.raises(pp.InputError, match=r"of shape \(n, 128\), got \(10, 64\)"):
        arrays.as_matrix(np.zeros((10, 64), np.float32), d=128)
    with pytest.raises(pp.InputError, match=r"of shape \(n, d\), got \(2, 3, 4\)"):
        arrays.as_matrix(np.zeros((2, 3, 4)))
    x = np.zeros((40, 3), np.float64)
    x[17, 1], x[30, 0] = np.nan, np.inf
    with pytest.raises(pp.InputError, match="NaN or infinity first in row 17"):
        arrays.as_matrix(x)
    x = np.zeros((40, 3), np.float64)
    x[7, 2] = 1e39
    with pytest.raises(pp.InputError, match="row 7 overflows"):
        arrays.as_float32(x)


def test_the_first_bad_row_is_found_beyond_one_block():
    x = np.zeros(((1 << 20) + 5, 2), np.float16)
    assert arrays.first_nonfinite_row(x) is None
    x[-2, 1] = np.inf
    assert arrays.first_nonfinite_row(x) == len(x) - 2
    assert arrays.first_nonfinite_row(np.zeros((0, 3))) is None


@given(vectors())
def test_enter_and_back_numpy(x):
    if np.abs(x.astype(np.float64)).max(initial=0) > np.finfo(np.float32).max:
        return
    rows, back = arrays.enter(x)
    assert rows.dtype == np.float32 and rows.flags.c_contiguous
    with np.errstate(under="ignore"):
        assert np.array_equal(rows, x.astype(np.float32))
    returned = back(rows)
    assert returned.dtype == x.dtype and returned.shape == x.shape
    assert back(np.zeros(3, np.uint16)).dtype == np.uint16  # integers stay as they are


@pytest.mark.parametrize("dtype", TORCH_FLOATS)
def test_enter_and_back_torch(dtype):
    t = torch.randn(6, 4, requires_grad=True).to(getattr(torch, dtype)).t()[::2]  # strided
    rows, back = arrays.enter(t)
    assert np.array_equal(rows, t.detach().float().numpy())
    returned = back(rows)
    assert isinstance(returned, torch.Tensor) and returned.dtype == t.dtype
    assert torch.equal(returned, t.detach())
    assert back(np.array([[1, 65535]], np.uint16)).tolist() == [[1, 65535]]


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_bfloat16_rounds_as_torch_does(values):
    x = np.array(values, np.float32)
    bits = arrays.bfloat16_bits(x)
    expected = torch.from_numpy(x).to(torch.bfloat16)
    assert np.array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    assert same_bits(arrays.bfloat16_values(bits), expected.float().numpy())


def test_every_bfloat16_comes_back():
    bits = np.arange(1 << 16).astype(np.uint16)
    values = arrays.bfloat16_values(bits)
    again = arrays.bfloat16_bits(values)
    nan = np.isnan(values)
    assert np.array_equal(again[~nan], bits[~nan])
    assert np.isnan(arrays.bfloat16_values(again[nan])).all()


def test_codes_are_checked():
    sizes = np.array([4, 300])
    good = np.array([[3, 299], [0, 0]])
    codes, _ = arrays.enter_codes(good, sizes)
    assert codes.tolist() == good.tolist()
    for bad, message in [
        (np.zeros((2, 2)), "integer dtype, got float64"),
        (np.zeros((2, 3), int), r"shape \(n, 2\), got \(2, 3\)"),
        (np.zeros(2, int), r"shape \(n, 2\), got \(2,\)"),
        (np.array([[4, 0]]), "field 0 in 0..3, got 4..4"),
        (np.array([[0, 300]]), "field 1 in 0..299"),
        (np.array([[0, -1]], np.int8), "field 1 in 0..299, got -1"),
    ]:
        with pytest.raises(pp.InputError, match=message):
            arrays.enter_codes(bad, sizes)
    codes, back = arrays.enter_codes(torch.tensor(good), sizes)
    assert codes.tolist() == good.tolist()
    assert isinstance(back(np.zeros((2, 2), np.float32)), torch.Tensor)
