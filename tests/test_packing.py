"""Fixed-width packing of codes against bits written out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import codes as code_matrices

from polarpack.entropy.packing import field_widths, pack_rows, row_bytes, unpack_rows
from polarpack.errors import CorruptDataError


@st.composite
def any_alphabets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Codes of alphabets of any size from 1 to 65536."""
    sizes = st.one_of(st.integers(1, 1 << 16), st.sampled_from([1, 2, 128, 256, 1 << 15, 1 << 16]))
    alphabet_sizes = np.array(draw(st.lists(sizes, max_size=20)), np.int64)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(0, 9))
    codes = np.floor(rng.random((n, len(alphabet_sizes))) * alphabet_sizes)
    small = alphabet_sizes.max(initial=1) <= 256
    return codes.astype(np.uint8 if small else np.uint16), alphabet_sizes


def twin(row: np.ndarray, alphabet_sizes: np.ndarray) -> bytes:
    bits = ""
    for code, size in zip(row.tolist(), alphabet_sizes.tolist(), strict=True):
        width = (size - 1).bit_length()
        bits += f"{code:0{width}b}" if width else ""
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


@given(st.one_of(any_alphabets(), code_matrices()))
def test_round_trip_and_twin(drawn):
    codes, sizes = drawn
    packed = pack_rows(codes, sizes)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(codes), row_bytes(sizes))
    assert packed.tobytes() == b"".join(twin(row, sizes) for row in codes)
    unpacked = unpack_rows(packed, sizes)
    assert unpacked.dtype == (np.uint8 if sizes.max(initial=1) <= 256 else np.uint16)
    assert np.array_equal(unpacked, codes)
    # any row by itself, whatever is stored around it
    for i in range(0, len(codes), 3):
        assert np.array_equal(unpack_rows(packed[i : i + 1], sizes), codes[i : i + 1])
    assert np.array_equal(unpack_rows(packed[::-2], sizes), codes[::-2])


@given(any_alphabets(), st.integers(0, 2**32 - 1))
def test_any_bytes_are_codes_or_refused(drawn, seed: int):
    _, sizes = drawn
    packed = np.random.default_rng(seed).integers(0, 256, (3, row_bytes(sizes)), np.uint8)
    before = packed.copy()
    try:
        codes = unpack_rows(packed, sizes)
    except CorruptDataError:
        assert not np.array_equal(1 << field_widths(sizes), sizes)
        return
    assert (codes < sizes).all()
    assert np.array_equal(packed, before)
    padding = -int(field_widths(sizes).sum()) % 8
    kept = packed.copy()
    kept[:, -1:] &= np.uint8(0xFF << padding & 0xFF)
    assert np.array_equal(pack_rows(codes, sizes), kept)


@pytest.mark.parametrize("sizes", [[3, 5], [200], [1, 40000]])
def test_values_outside_their_alphabet_are_named(sizes):
    sizes = np.array(sizes)
    ones = np.full((2, row_bytes(sizes)), 0xFF, np.uint8)
    field = 0 if sizes[0] > 1 else 1
    with pytest.raises(CorruptDataError, match=f"field {field} outside its {sizes[field]} values"):
        unpack_rows(ones, sizes)


def test_widths():
    sizes = np.array([1, 2, 3, 4, 5, 256, 257, 1 << 16])
    assert field_widths(sizes).tolist() == [0, 1, 2, 2, 3, 8, 9, 16]
    assert row_bytes(sizes) == 6  # 41 bits
    assert row_bytes(np.zeros(0, np.int64)) == 0
