"""Files taken apart and put together again under checksums that are right, whatever they say; and
what reading them may come to."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np

import polarpack as pp
from polarpack import container
from polarpack.container import Kind

Chunk = list[Any]  # kind, tensor, n_rows, parts
OPEN_CAP = 96 << 20  # bytes that opening a file of a few kB may take, whatever it says
READ_CAP = 64 << 20  # and reading it, beyond 8 times the tensor it holds
SECONDS = 1.0


def unpack(blob: bytes) -> list[Chunk]:
    """A file as the chunks that ``pack`` takes."""
    with container.Reader(blob) as reader:
        return [
            [
                *chunk.tolist()[:3],
                [bytes(reader.part(i, j)) for j in range(len(reader.parts(i).lengths))],
            ]
            for i, chunk in enumerate(reader.chunks)
        ]


def pack(chunks: list[Chunk]) -> bytes:
    """Inverse of ``unpack``."""
    return container.pack([tuple(chunk) for chunk in chunks])


def unseal(data: bytes) -> tuple[Any, Any, bytes]:
    """A quantizer's bytes -> its two pieces of JSON, and the bytes of its arrays."""
    size = int.from_bytes(data[7:11], "little")
    config, listed = json.loads(zlib.decompress(data[11 : 11 + size]))
    return config, listed, data[11 + size :]


def seal(
    config: Any, listed: Any, blobs: bytes, text: bytes | None = None, size: int | None = None
) -> bytes:
    """Inverse of ``unseal``. text: in place of the JSON; size: a lie about its compressed bytes."""
    text = json.dumps([config, listed]).encode() if text is None else text
    head = zlib.compress(text)
    body = struct.pack("<I", len(head) if size is None else size) + head + blobs
    return b"PQ\1" + zlib.crc32(body).to_bytes(4, "little") + body


def reseal(data: bytes, body: bytes) -> bytes:
    """The quantizer ``data`` with another body, under the right checksum."""
    return data[:3] + zlib.crc32(body).to_bytes(4, "little") + body


def with_chunk(blob, kind, parts=None, n_rows=None, tensor=None):
    """The file with the first chunk of a kind replaced."""
    chunks = unpack(blob)
    chunk = next(c for c in chunks if c[0] == kind)
    chunk[1] = chunk[1] if tensor is None else tensor
    chunk[2] = chunk[2] if n_rows is None else n_rows
    chunk[3] = chunk[3] if parts is None else parts
    return pack(chunks)


def part_of(blob, kind):
    return next(c for c in unpack(blob) if c[0] == kind)[3][0]


def with_header(blob, **changes):
    """The file with fields of the tensor's header changed; ``...`` takes one away."""
    fields = json.loads(part_of(blob, Kind.TENSOR_HEADER)) | changes
    fields = {k: v for k, v in fields.items() if v is not ...}
    return with_chunk(blob, Kind.TENSOR_HEADER, [json.dumps(fields).encode()])


# -- reading them ----------------------------------------------------------------------------------
def cheap(work, cap=OPEN_CAP):
    """What the work returns, which takes at most a second of one core and this much memory.

    Work that took longer is done once more: the first time may have compiled a kernel.
    """
    for last in (False, True):
        tracemalloc.start()
        start = time.process_time()
        try:
            result = work()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            seconds = time.process_time() - start
            tracemalloc.stop()
        assert peak < cap, f"{peak >> 20} MiB"
        if seconds < SECONDS:
            return result
        assert not last, f"{seconds:.2f} s"


def or_error(work, *arguments, **options):
    """The work's result, or the FormatError that it ended in."""
    try:
        return work(*arguments, **options)
    except pp.FormatError as error:
        return error


def read_everything(blob, **options):
    """All there is to read in a file: names and arrays, each of the shape it declares."""
    out = {}
    with pp.open(blob, **options) as f:
        for name in f:
            t = f[name]
            _ = t.quantizer  # refuses what declares too much
            assert t.nbytes < 1 << 26, "declares too much to be read here"
            whole = np.asarray(t)
            assert whole.shape == t.shape and whole.dtype == np.dtype(t.dtype_name)
            if len(t.shape) == 2 and len(t) > 3:
                assert np.array_equal(np.asarray(t[1:3]), whole[1:3], equal_nan=True)
            out[name] = whole
        f.info()
        if not options:
            f.verify()
    return out


def declared_bytes(blob):
    with pp.open(blob) as f:
        return sum(f[name].nbytes for name in f)


def outcome(blob):
    """What reading a hostile file comes to: its tensors, or the FormatError. Anything else fails."""
    size = cheap(lambda: or_error(declared_bytes, blob))
    if isinstance(size, pp.FormatError):
        return size
    cap = READ_CAP + 8 * size
    result = cheap(lambda: or_error(read_everything, blob), cap)
    rest = cheap(lambda: or_error(read_everything, blob, on_error="skip"), cap)
    assert not isinstance(rest, pp.FormatError) or isinstance(result, pp.FormatError), rest
    return result


def refused(blob, error=pp.CorruptDataError):
    result = outcome(blob)
    assert type(result) is error, result
    assert str(result)
