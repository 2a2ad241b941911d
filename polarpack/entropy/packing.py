"""Fixed-width packing of codes: every row takes the same bytes, so any row can be found at once.

A row is its fields' bits one after the other, most significant first, each field ceil(log2(alphabet
size)) bits wide, padded with zero bits to whole bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CorruptDataError
from .range_coder import kernel

Int = npt.NDArray[np.int64]
Uint32 = npt.NDArray[np.uint32]

WINDOW = 24  # bits: a field of at most 16 bits lies in three bytes wherever it starts


def field_widths(alphabet_sizes: npt.NDArray[Any]) -> Int:
    """(n_fields,) bits of each field; an alphabet of one symbol takes none."""
    largest = np.asarray(alphabet_sizes, np.float64) - 1.0
    return np.frexp(largest)[1].astype(np.int64)  # the exponent of an integer is its bit length


def row_bytes(alphabet_sizes: npt.NDArray[Any]) -> int:
    """Bytes of one packed row."""
    return _fields_of(alphabet_sizes).n_bytes


class _Fields(NamedTuple):
    """Where the fields of a row lie."""

    widths: Int
    first: Int  # byte where a field's window starts
    shift: Uint32  # how far its last bit is from the window's end
    masks: Uint32
    largest: Int  # (n_fields,) values below the alphabet sizes
    n_bytes: int
    uniform: int  # width of all fields, 0 if they differ
    full: bool  # whether every pattern is a value


@lru_cache(maxsize=16)
def _fields(alphabet_sizes: bytes) -> _Fields:
    sizes = np.frombuffer(alphabet_sizes, np.int64)
    widths = field_widths(sizes)
    ends = np.cumsum(widths)
    first = (ends - widths) >> 3
    shift = (8 * first + WINDOW - ends).astype(np.uint32)
    masks = (1 << widths).astype(np.uint32) - np.uint32(1)
    uniform = int(widths[0]) if len(widths) and (widths == widths[0]).all() else 0
    full = bool((1 << widths == sizes).all())
    n_bytes = int(-(-widths.sum() // 8))
    return _Fields(widths, first, shift, masks, sizes - 1, n_bytes, uniform, full)


def _fields_of(alphabet_sizes: npt.NDArray[Any]) -> _Fields:
    return _fields(np.ascontiguousarray(alphabet_sizes, np.int64).tobytes())


@kernel
def _read_fields(packed: Any, first: Int, shift: Uint32, masks: Uint32, out: Any) -> None:
    """Fields of rows (n, row_bytes), behind whose end stand zeros, into out (n, n_fields)."""
    n_bytes = packed.shape[1]
    for i in range(packed.shape[0]):
        row = packed[i]
        for f in range(len(first)):
            window = np.uint32(0)
            for b in range(first[f], first[f] + 3):
                window = window << np.uint32(8)
                if b < n_bytes:
                    window |= np.uint32(row[b])
            out[i, f] = (window >> shift[f]) & masks[f]


def pack_rows(codes: npt.NDArray[Any], alphabet_sizes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Codes (n, n_fields), each below its alphabet size -> (n, row_bytes) uint8. About 5 ns a
    field; extra memory 12 bytes a field."""
    fields = _fields_of(alphabet_sizes)
    if fields.uniform == 8:
        return codes.astype(np.uint8)
    if fields.uniform == 16:
        return codes.astype(">u2").view(np.uint8)
    first, shift, n_bytes = fields.first, fields.shift, fields.n_bytes
    windows = codes.astype(np.uint32) << shift
    # fields that start in the same byte have windows that start together: no bit is set twice
    starts = np.flatnonzero(np.diff(first, prepend=-1))
    windows = np.bitwise_or.reduceat(windows, starts, axis=1)
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
    fields = _fields_of(alphabet_sizes)
    if fields.uniform == 8:
        codes: npt.NDArray[Any] = packed
    elif fields.uniform == 16:
        codes = np.ascontiguousarray(packed).view(">u2").astype(np.uint16)
    else:
        dtype = np.uint8 if fields.widths.max(initial=0) <= 8 else np.uint16
        codes = np.empty((len(packed), len(fields.widths)), dtype)
        _read_fields(packed, fields.first, fields.shift, fields.masks, codes)
    if codes.size and not fields.full:
        largest = codes[0] if len(codes) == 1 else codes.max(axis=0)
        wrong = largest > fields.largest
        if wrong.any():
            field = int(np.argmax(wrong))
            size = alphabet_sizes[field]
            raise CorruptDataError(f"packed rows: field {field} outside its {size} values")
    return codes
