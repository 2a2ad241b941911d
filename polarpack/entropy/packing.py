"""Fixed-width packing of codes: every row takes the same bytes, so any row can be found at once.

A row is its fields' bits one after the other, most significant first, each field ceil(log2(alphabet
size)) bits wide, padded with zero bits to whole bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptDataError

Int = npt.NDArray[np.int64]

WINDOW = 24  # bits: a field of at most 16 bits lies in three bytes wherever it starts


def field_widths(alphabet_sizes: npt.NDArray[Any]) -> Int:
    """(n_fields,) bits of each field; an alphabet of one symbol takes none."""
    largest = np.asarray(alphabet_sizes, np.float64) - 1.0
    return np.frexp(largest)[1].astype(np.int64)  # the exponent of an integer is its bit length


def row_bytes(alphabet_sizes: npt.NDArray[Any]) -> int:
    """Bytes of one packed row."""
    return int(-(-field_widths(alphabet_sizes).sum() // 8))


def _places(widths: Int) -> tuple[Int, npt.NDArray[np.uint32]]:
    """Of each field: the byte where its window starts, and how far its last bit is from the
    window's end."""
    ends = np.cumsum(widths)
    first = (ends - widths) >> 3
    return first, (8 * first + WINDOW - ends).astype(np.uint32)


def pack_rows(codes: npt.NDArray[Any], alphabet_sizes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Codes (n, n_fields), each below its alphabet size -> (n, row_bytes) uint8. About 5 ns a
    field; extra memory 12 bytes a field."""
    widths = field_widths(alphabet_sizes)
    if (widths == 8).all():
        return codes.astype(np.uint8)
    if (widths == 16).all():
        return codes.astype(">u2").view(np.uint8)
    first, shift = _places(widths)
    windows = codes.astype(np.uint32) << shift
    # fields that start in the same byte have windows that start together: no bit is set twice
    starts = np.flatnonzero(np.diff(first, prepend=-1))
    windows = np.bitwise_or.reduceat(windows, starts, axis=1)
    n_bytes = row_bytes(alphabet_sizes)
    packed = np.zeros((len(codes), n_bytes + 3), np.uint8)  # the last windows reach beyond
    for byte in range(3):
        packed[:, first[starts] + byte] |= (windows >> np.uint32(16 - 8 * byte)).astype(np.uint8)
    return np.ascontiguousarray(packed[:, :n_bytes])


def unpack_rows(
    packed: npt.NDArray[np.uint8], alphabet_sizes: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Inverse of ``pack_rows``: (n, row_bytes) -> (n, n_fields) uint8, or uint16 where an alphabet
    is larger than 256. Padding is not looked at.

    CorruptDataError if a field holds a value outside its alphabet.
    """
    widths = field_widths(alphabet_sizes)
    dtype = np.uint8 if widths.max(initial=0) <= 8 else np.uint16
    if (widths == 8).all():
        codes: npt.NDArray[Any] = packed
    elif (widths == 16).all():
        codes = np.ascontiguousarray(packed).view(">u2").astype(np.uint16)
    else:
        first, shift = _places(widths)
        wide = np.zeros((len(packed), packed.shape[1] + 3), np.uint32)
        wide[:, :-3] = packed
        windows = wide[:, :-2] << np.uint32(16) | wide[:, 1:-1] << np.uint32(8) | wide[:, 2:]
        masks = (1 << widths).astype(np.uint32) - np.uint32(1)
        codes = (windows.take(first, axis=1) >> shift & masks).astype(dtype)
    if codes.size:
        wrong = codes.max(axis=0).astype(np.int64) >= alphabet_sizes
        if wrong.any():
            field = int(np.argmax(wrong))
            size = alphabet_sizes[field]
            raise CorruptDataError(f"packed rows: field {field} outside its {size} values")
    return codes
