"""The weights file: named arrays in one file that a .pvq header names by its hash.

The layout is that of safetensors (https://github.com/huggingface/safetensors): a length, a JSON
header, the arrays' bytes without holes, so that other tools can look inside.

    8 bytes   length of the header, little-endian
    header    {"name": {"dtype": "I16", "shape": [..], "data_offsets": [begin, end]}, ...}
    data      the arrays, little-endian, in C order
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polarpack.errors import CorruptDataError, InputError, LimitError

DTYPES = {"U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "I32": "<i4", "F16": "<f2",
          "F32": "<f4"}  # fmt: skip
MAX_HEADER_BYTES = 1 << 20
HASH_BYTES = 4
DEFAULT = Path(__file__).parent / "weights" / "default.safetensors"


def save(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write named arrays, sorted by name, so that equal arrays give equal files."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    end = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        kind = next((k for k, d in DTYPES.items() if np.dtype(d) == array.dtype), None)
        if kind is None:
            raise InputError(f"{name}: expected dtype in {sorted(DTYPES)}, got {array.dtype}")
        parts.append(array.astype(DTYPES[kind]).tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def from_bytes(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Inverse of ``save``'s bytes. CorruptDataError where the layout does not hold."""
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise LimitError(f"weights: header of {size} bytes, limit {MAX_HEADER_BYTES}")
    try:
        header = json.loads(data[8 : 8 + size])
        arrays = {}
        expected = 8 + size
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if name == "__metadata__":
                continue
            begin, end = (8 + size + int(offset) for offset in entry["data_offsets"])
            if begin != expected or end > len(data):
                raise CorruptDataError(f"weights: array {name!r} is not at byte {expected}")
            arrays[name] = (
                np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
                .reshape(entry["shape"])
                .copy()
            )
            expected = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CorruptDataError):
            raise
        raise CorruptDataError(f"weights: {error}") from error
    if expected != len(data):
        raise CorruptDataError(f"weights: expected {expected} bytes, got {len(data)}")
    return arrays


def load(path: str | os.PathLike[str] = DEFAULT) -> tuple[dict[str, npt.NDArray[Any]], bytes]:
    """The arrays of a weights file, and the hash by which .pvq headers name it: the first
    ``HASH_BYTES`` of its SHA-256."""
    path = Path(path)
    return _load(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load(path: Path, _changed: int) -> tuple[dict[str, npt.NDArray[Any]], bytes]:
    data = path.read_bytes()
    return from_bytes(data), hashlib.sha256(data).digest()[:HASH_BYTES]
