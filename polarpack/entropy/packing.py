"""Fixed-width packing of codes: every row takes the same bytes, so any row can be found at once.

A row is its fields' bits one after the other, most significant first, each field ceil(log2(alphabet))
bits wide, padded with zero bits to whole bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptDataError


def field_widths(alphabet_sizes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(n_fields,) bits of each field; an alphabet of one symbol takes none."""
    return np.array([int(size - 1).bit_length() for size in alphabet_sizes], np.int64)


def row_bytes(alphabet_sizes: npt.NDArray[Any]) -> int:
    """Bytes of one packed row."""
    return int(-(-field_widths(alphabet_sizes).sum() // 8))


def pack_rows(codes: npt.NDArray[Any], alphabet_sizes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Codes (n, n_fields) -> (n, row_bytes) uint8. O(bits); extra memory one byte a bit."""
    widths = field_widths(alphabet_sizes)
    if (widths == 8).all():
        return codes.astype(np.uint8)
    if (widths == 16).all():
        return codes.astype(">u2").view(np.uint8)
    field = np.repeat(np.arange(len(widths)), widths)
    shift = np.concatenate([np.arange(w - 1, -1, -1) for w in widths] or [np.zeros(0, int)])
    bits = (codes.astype(np.uint16)[:, field] >> shift.astype(np.uint16)) & np.uint16(1)
    return np.packbits(bits.astype(np.uint8), axis=1)


def unpack_rows(packed: npt.NDArray[np.uint8], alphabet_sizes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Inverse of ``pack_rows``: (n, row_bytes) -> (n, n_fields) uint8 or uint16.

    CorruptDataError if a field holds a value outside its alphabet.
    """
    widths = field_widths(alphabet_sizes)
    dtype = np.uint8 if widths.max(initial=0) <= 8 else np.uint16
    if (widths == 8).all():
        codes = packed
    elif (widths == 16).all():
        codes = np.ascontiguousarray(packed).view(">u2").astype(np.uint16)
    else:
        bits = np.unpackbits(packed, axis=1, count=int(widths.sum()))
        codes = np.zeros((len(packed), len(widths)), dtype)
        at = 0
        for field, width in enumerate(widths):
            for _ in range(width):
                codes[:, field] = (codes[:, field] << 1) | bits[:, at]
                at += 1
    if codes.size and (codes.max(axis=0).astype(np.int64) >= alphabet_sizes).any():
        field = int(np.argmax(codes.max(axis=0).astype(np.int64) >= alphabet_sizes))
        raise CorruptDataError(f"packed rows: field {field} outside its {alphabet_sizes[field]} values")
    return codes
