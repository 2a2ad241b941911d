"""Bytes made to deceive the container: each ends in the right FormatError, soon and cheaply."""

import os
import struct
import time
import tracemalloc
import zlib
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarpack import container
from polarpack.container import Reader, Writer, pack
from polarpack.errors import (
    CorruptDataError,
    FormatError,
    LimitError,
    PolarPackError,
    UnsupportedVersionError,
)

HEADER = bytes.fromhex("89504c520d0a1a0a01fe")
CHUNKS = [
    (1, 0, 0, [b'{"name": "embedding"}']),
    (2, 0, 0, [b"codebooks" * 4, b""]),
    (4, 0, 300, [b"the first block", b"the second", b""]),
    (4, 0, 9, []),
    (130, 3, 0, [b"ancillary"]),
]
GOOD = pack(CHUNKS)


def varint(value, width=0):
    out = bytearray()
    while value > 0x7F or len(out) + 1 < width:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def varints(*values):
    return b"".join(map(varint, values))


def chunk(kind=4, tensor=0, n_rows=10, parts=(b"abc",), *, n_parts=None, lengths=None, crcs=None):
    """One chunk whose head may lie, under a checksum that is right."""
    n_parts = len(parts) if n_parts is None else n_parts
    lengths = [len(p) for p in parts] if lengths is None else lengths
    crcs = [zlib.crc32(p) for p in parts] if crcs is None else crcs
    head = varints(kind, tensor, n_rows, n_parts, *lengths)
    head += struct.pack(f"<{len(crcs)}I", *crcs)
    return head + struct.pack("<I", zlib.crc32(head)) + b"".join(parts)


def seal(chunks, table, table_bytes=None):
    """A file of these chunk bytes and table bytes, with a footer whose checksum is right."""
    tail = table + struct.pack("<I", len(table) if table_bytes is None else table_bytes)
    return HEADER + chunks + tail + struct.pack("<I", zlib.crc32(HEADER + tail))


def listed(body, kind=4, tensor=0, n_rows=10, n_bytes=None):
    """A file of one chunk, listed as told."""
    n_bytes = len(body) if n_bytes is None else n_bytes
    return seal(body, varints(1, kind, tensor, n_rows, n_bytes))


def read_all(data, recover=False):
    with Reader(data, recover=recover) as reader:
        reader.verify()
        return [
            (
                *entry.tolist()[:3],
                [bytes(reader.part(i, j)) for j in range(len(reader.parts(i)[1]))],
            )
            for i, entry in enumerate(reader.chunks)
        ]


@contextmanager
def bounded(memory=1 << 20):
    """Within one second of this process and so many bytes."""
    start = time.process_time()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1


def test_the_builders_above_build_good_files():
    body = chunk()
    assert listed(body) == pack([(4, 0, 10, [b"abc"])])
    assert read_all(GOOD) == CHUNKS


def test_cut_at_every_byte():
    for length in range(len(GOOD)):
        with pytest.raises(CorruptDataError):
            Reader(GOOD[:length])
        try:
            with Reader(GOOD[:length], recover=True) as reader:
                assert len(list(reader.problems())) >= 1
                assert len(reader.chunks) <= len(CHUNKS)
        except CorruptDataError:
            assert length < 60  # before the end of the first head nothing is there to recover


def test_flip_every_bit():
    for bit in range(8 * len(GOOD)):
        data = bytearray(GOOD)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError) as caught:
            read_all(bytes(data))
        at = bit // 8
        if at < 8:
            assert caught.type is FormatError  # the magic: could be anything else
        else:
            assert caught.type in (CorruptDataError, LimitError), (bit, caught.value)
        # With recover every chunk but the damaged one is as it was, and the damage is known.
        with Reader(bytes(data), recover=True) as reader:
            assert len(list(reader.problems())) == 1
            assert len(reader.chunks) == len(CHUNKS)
            for i, (kind, tensor, n_rows, parts) in enumerate(CHUNKS):
                assert reader.chunks[i].tolist()[:3] == (kind, tensor, n_rows)
                start, n_bytes = int(reader.chunks["offset"][i]), int(reader.chunks["n_bytes"][i])
                if not start <= at < start + n_bytes:
                    assert [bytes(reader.part(i, j)) for j in range(len(parts))] == parts


def test_set_every_byte_to_the_extremes():
    for at in range(len(GOOD)):
        for value in (0x00, 0x7F, 0x80, 0xFF):
            if GOOD[at] != value:
                with pytest.raises(FormatError):
                    read_all(GOOD[:at] + bytes([value]) + GOOD[at + 1 :])


@pytest.mark.parametrize("extra", [b"\0", b"x" * 1000, GOOD])
def test_trailing_bytes(extra):
    with pytest.raises(
        CorruptDataError,
        match=rf"{len(extra)} trailing bytes after the end of the file at byte {len(GOOD)}"
        if extra != GOOD
        else "the chunks it lists end at byte",
    ):
        Reader(GOOD + extra)


def test_bytes_between_and_before():
    for at in (10, 60, len(GOOD) - 8):
        with pytest.raises(CorruptDataError):
            read_all(GOOD[:at] + b"\0" + GOOD[at:])
    with pytest.raises(FormatError):
        Reader(b"\0" + GOOD)


ABC = chunk()
LIES = {
    "table one byte too long": (
        seal(ABC, varints(1, 4, 0, 10, len(ABC)) + b"\0"),
        CorruptDataError,
    ),
    "table ends inside an entry": (seal(ABC, varints(1, 4, 0, 10)), CorruptDataError),
    "table ends inside a number": (seal(ABC, varints(1, 4, 0, 10) + b"\x80"), CorruptDataError),
    "table empty": (seal(b"", b""), CorruptDataError),
    "table number not in shortest form": (
        seal(ABC, varints(1, 4, 0, 10) + varint(len(ABC), 3)),
        CorruptDataError,
    ),
    "table number of ten bytes": (
        seal(ABC, varints(1, 4, 0) + b"\x80" * 9 + b"\x01" + varint(len(ABC))),
        CorruptDataError,
    ),
    "table begins inside a chunk": (
        seal(ABC, varints(1, 4, 0, 10, len(ABC)), table_bytes=20),
        CorruptDataError,
    ),
    "table before the header's end": (
        seal(ABC, varints(1, 4, 0, 10, len(ABC)), table_bytes=len(ABC) + 7),
        CorruptDataError,
    ),
    "table of 4 GiB": (seal(ABC, b"\0", table_bytes=2**32 - 1), CorruptDataError),
    "more chunks than bytes": (seal(ABC, varints(1000, 4, 0, 10, 18)), CorruptDataError),
    "2^20 chunks in an empty table": (seal(ABC, varints(2**20)), CorruptDataError),
    "2^20 + 1 chunks": (seal(ABC, varints(2**20 + 1)), LimitError),
    "2^63 - 1 chunks": (seal(ABC, varints(2**63 - 1)), LimitError),
    "a chunk missing from the table": (
        seal(ABC + ABC, varints(1, 4, 0, 10, len(ABC))),
        CorruptDataError,
    ),
    "no chunk listed": (seal(ABC, varints(0)), CorruptDataError),
    "a chunk listed twice": (
        seal(ABC, varints(2, *(4, 0, 10, len(ABC)) * 2)),
        CorruptDataError,
    ),
    "listed one byte short": (listed(ABC, n_bytes=len(ABC) - 1), CorruptDataError),
    "listed one byte long": (listed(ABC, n_bytes=len(ABC) + 1), CorruptDataError),
    "boundary moved between two chunks": (
        seal(
            ABC + ABC,
            varints(2, 4, 0, 10, len(ABC) + 1, 4, 0, 10, len(ABC) - 1),
        ),
        CorruptDataError,
    ),
    "lengths that overflow to the right sum": (
        seal(
            ABC, varints(5, *(4, 0, 10, 2**62) * 4, 4, 0, 10, len(ABC))
        ),  # 4 * 2^62 is 0 in 64 bits
        CorruptDataError,
    ),
    "chunk of 2^63 - 1 bytes": (listed(ABC, n_bytes=2**63 - 1), CorruptDataError),
    "chunk of no bytes": (seal(ABC, varints(2, 4, 0, 10, len(ABC), 4, 0, 0, 0)), CorruptDataError),
    "kind differs": (listed(chunk(kind=1)), CorruptDataError),
    "tensor differs": (listed(chunk(tensor=1)), CorruptDataError),
    "rows differ": (listed(chunk(n_rows=11)), CorruptDataError),
    "tensor 65536": (listed(chunk(tensor=2**16), tensor=2**16), LimitError),
    "2^32 rows": (listed(chunk(n_rows=2**32), n_rows=2**32), LimitError),
    "2^63 - 1 rows": (listed(chunk(n_rows=2**63 - 1), n_rows=2**63 - 1), LimitError),
    "kind 256": (listed(chunk(kind=256), kind=256), LimitError),
    "kind 0": (listed(chunk(kind=0), kind=0), UnsupportedVersionError),
    "kind 127": (listed(chunk(kind=127), kind=127), UnsupportedVersionError),
    "65537 parts": (listed(chunk(n_parts=2**16 + 1)), LimitError),
    "2^63 - 1 parts": (listed(chunk(n_parts=2**63 - 1)), LimitError),
    "65536 parts in 18 bytes": (listed(chunk(n_parts=2**16)), CorruptDataError),
    "one part more than there is": (listed(chunk(n_parts=2)), CorruptDataError),
    "one part fewer than there is": (listed(chunk(n_parts=0)), CorruptDataError),
    "part one byte short": (listed(chunk(lengths=[2])), CorruptDataError),
    "part one byte long": (listed(chunk(lengths=[4])), CorruptDataError),
    "part of 2^30 bytes": (listed(chunk(lengths=[2**30])), CorruptDataError),
    "part of 2^30 + 1 bytes": (listed(chunk(lengths=[2**30 + 1])), LimitError),
    "part of 2^63 - 1 bytes": (listed(chunk(lengths=[2**63 - 1])), LimitError),
    "part length borrowed from the next": (
        listed(chunk(parts=(b"abc", b"defg"), lengths=[4, 3])),
        CorruptDataError,
    ),
    "lengths not in shortest form": (
        listed(chunk(lengths=[]).replace(varints(1), varints(1) + b"\x83\x00", 1)),
        CorruptDataError,
    ),
    "part checksum wrong": (listed(chunk(crcs=[7])), CorruptDataError),
    "head checksum missing": (listed(varints(4, 0, 10, 0) + b"1234"), CorruptDataError),
    "head longer than its chunk": (
        seal(ABC + ABC, varints(2, 4, 0, 10, 8, 4, 0, 10, 2 * len(ABC) - 8)),
        CorruptDataError,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_under_right_checksums(lie, tmp_path):
    data, error = LIES[lie]
    with bounded(), pytest.raises(FormatError) as caught:
        read_all(data)
    assert caught.type is error, caught.value
    path = tmp_path / "lie.polar"
    path.write_bytes(data)
    with bounded(), pytest.raises(error):
        read_all(path)
    # To recover from it is no way around the checks.
    with bounded():
        try:
            with Reader(data, recover=True) as reader:
                list(reader.problems())
        except FormatError:
            pass


def test_unknown_ancillary_kinds_are_skipped():
    data = listed(chunk(kind=255), kind=255)
    assert read_all(data) == [(255, 0, 10, [b"abc"])]


def test_versions():
    newer = bytearray(GOOD)
    newer[8:10] = bytes([2, 253])
    for recover in (False, True):
        with pytest.raises(UnsupportedVersionError, match="format version 2, this reader knows 1"):
            Reader(bytes(newer), recover=recover)
    older = bytes(GOOD[:8]) + bytes([0, 255]) + bytes(GOOD[10:])
    with pytest.raises(UnsupportedVersionError, match="a draft"):
        Reader(older)
    newer[9] = 255
    with pytest.raises(CorruptDataError, match="version bytes 02ff are damaged"):
        Reader(bytes(newer))
    for length in (8, 9):
        with pytest.raises(CorruptDataError, match="truncated"):
            Reader(GOOD[:length])


@pytest.mark.parametrize(
    ("mangle", "guess"),
    [
        (lambda b: b.replace(b"\r\n", b"\n"), "text-mode transfer"),
        (lambda b: b.replace(b"\n", b"\r\n"), "text-mode transfer"),
        (lambda b: bytes(x & 0x7F for x in b), "text-mode transfer"),
        (lambda b: b.decode("latin-1").encode("utf-8"), "text-mode transfer"),
        (lambda b: b.decode("utf-8", "replace").encode("utf-8"), "text-mode transfer"),
        (lambda b: b"\x93NUMPY\x01\x00" + bytes(100), "a .npy array"),
        (lambda b: b"PK\x03\x04" + bytes(100), "zip archive"),
        (lambda b: b"PAR1" + bytes(100), "Parquet"),
        (lambda b: b"\x1f\x8b\x08\x00" + b, "gzip"),
        (lambda b: b"\x28\xb5\x2f\xfd" + b, "zstd"),
        (lambda b: struct.pack("<Q", 60) + b'{"a":{"dtype":"F32"', "safetensors"),
        (lambda b: bytes(100), "not a .polar file"),
        (lambda b: b"hello", "not a .polar file"),
    ],
)
def test_other_files_are_recognised(mangle, guess):
    with pytest.raises(FormatError, match=guess) as caught:
        Reader(mangle(GOOD))
    assert caught.type is FormatError


def test_empty_and_tiny():
    for data in (b"", b"\x89", HEADER, HEADER + bytes(8)):
        with pytest.raises(CorruptDataError, match="truncated"):
            Reader(data)


def test_an_empty_file_and_a_folder(tmp_path):
    (tmp_path / "empty.polar").touch()
    with pytest.raises(CorruptDataError, match="truncated"):
        Reader(tmp_path / "empty.polar")
    with pytest.raises(IsADirectoryError):
        Reader(tmp_path)


def test_a_file_beyond_the_size_limit(monkeypatch):
    monkeypatch.setattr(container, "MAX_FILE_BYTES", len(GOOD) - 1)
    with pytest.raises(LimitError, match="the limit is"):
        Reader(GOOD)


def test_declared_sizes_in_a_large_sparse_file(tmp_path):
    """A gigabyte of zeros on no disk: memory is bounded by the parts a head may have at most."""
    path = tmp_path / "sparse.polar"
    tail = seal(b"", varints(1, 4, 0, 10, 2**30))[10:]
    with path.open("wb") as file:
        file.write(HEADER + varints(4, 0, 10, 2**16))
        file.seek(10 + 2**30)
        file.write(tail)
    with (
        bounded(16 << 20),
        Reader(path) as reader,
        pytest.raises(CorruptDataError, match="head: checksum"),
    ):
        reader.parts(0)


def test_many_tiny_chunks_walk_within_a_second():
    """A small file cannot make a reader walk or word an error for long."""
    data = HEADER + chunk(parts=()) * 30_000
    start = time.process_time()
    with pytest.raises(CorruptDataError):
        Reader(data)
    with Reader(data, recover=True) as reader:
        assert len(reader.chunks) == 30_000
    assert time.process_time() - start < 3


def test_a_hostile_partial_file(tmp_path):
    """What resume finds is checked like any file."""
    path, partial = tmp_path / "t.polar", tmp_path / ".t.polar.partial"
    for lie in (*(data for data, _ in LIES.values()), GOOD, b"", os.urandom(100), HEADER[:5]):
        partial.write_bytes(lie)
        try:
            with Writer(path, resume=True) as writer:
                kept = len(writer.chunks)
                writer.add(1, 0, 0, [b"went on"])
        except FormatError:
            assert partial.read_bytes() == lie
        else:
            assert len(read_all(path)) == kept + 1
    partial.write_bytes(HEADER[:8] + bytes([2, 253]))
    with pytest.raises(UnsupportedVersionError):
        Writer(path, resume=True)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_random_bytes(data):
    for prefix in (b"", HEADER):
        with pytest.raises(FormatError):
            read_all(prefix + data)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_random_edits_under_right_footers(data):
    """Edit anything, then make the footer's checksum right again: an error or a sound file."""
    body = bytearray(GOOD[10:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not body:
            break
    table_bytes = int.from_bytes(body[-4:], "little")
    table = bytes(body[-4 - table_bytes :]) if table_bytes <= len(body) - 4 else bytes(body)
    edited = HEADER + bytes(body) + struct.pack("<I", zlib.crc32(HEADER + table))
    for recover in (False, True):
        try:
            with Reader(edited, recover=recover) as reader:
                list(reader.problems())
        except PolarPackError as error:
            assert isinstance(error, FormatError)
