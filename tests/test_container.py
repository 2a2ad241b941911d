"""The container: what goes in comes out, exactly as docs/format.md says."""

import os
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarpack import container
from polarpack.container import Kind, Reader, Writer, pack
from polarpack.errors import CorruptDataError, FormatError, InputError

FORMAT = Path(__file__).parents[1] / "docs" / "format.md"

KINDS = st.sampled_from([*map(int, Kind), 128, 200, 255])
PARTS = st.lists(st.binary(max_size=300), max_size=6) | st.integers(0, 80).map(
    lambda n: [bytes([i]) * (i * i % 400) for i in range(n)]  # beyond the scalar varint loop
)
CHUNKS = st.lists(
    st.tuples(KINDS, st.integers(0, 65535), st.integers(0, 2**32 - 1), PARTS), max_size=5
)
SMALL = [
    (Kind.TENSOR_HEADER, 0, 0, [b"{}"]),
    (Kind.QUANTIZER, 0, 0, []),
    (Kind.ROW_BLOCKS, 0, 300, [b"first block", b"", b"last"]),
    (200, 7, 0, [b"unknown, skipped"]),
]


def read_by_the_book(data):
    """A second reader, from docs/format.md alone: [(kind, tensor, n_rows, parts)]."""

    def varint(at):
        value = shift = 0
        while data[at] >= 0x80:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
        return value | data[at] << shift, at + 1

    def varints(at, count):
        values = []
        for _ in range(count):
            value, at = varint(at)
            values.append(value)
        return values, at

    def u32(at):
        return struct.unpack_from("<I", data, at)[0]

    assert data[:10] == bytes.fromhex("89504c520d0a1a0a01fe")
    table = len(data) - 8 - u32(len(data) - 8)
    assert u32(len(data) - 4) == zlib.crc32(data[:10] + data[table : len(data) - 4])
    count, at = varint(table)
    entries, at = varints(at, 4 * count)
    assert at == len(data) - 8
    chunks, start = [], 10
    for kind, tensor, n_rows, n_bytes in zip(*[iter(entries)] * 4, strict=True):
        head, at = varints(start, 4)
        lengths, at = varints(at, head[3])
        checksums = [u32(at + 4 * j) for j in range(head[3])]
        at += 4 * head[3]
        assert u32(at) == zlib.crc32(data[start:at])
        assert head[:3] == [kind, tensor, n_rows]
        parts, at = [], at + 4
        for length, checksum in zip(lengths, checksums, strict=True):
            parts.append(data[at : at + length])
            assert zlib.crc32(parts[-1]) == checksum
            at += length
        assert at == start + n_bytes
        chunks.append((kind, tensor, n_rows, parts))
        start = at
    assert start == table
    return chunks


def contents(reader):
    return [
        (
            int(chunk["kind"]),
            int(chunk["tensor"]),
            int(chunk["n_rows"]),
            [bytes(reader.part(i, j)) for j in range(len(reader.parts(i).lengths))],
        )
        for i, chunk in enumerate(reader.chunks)
    ]


@given(CHUNKS)
@settings(deadline=None, max_examples=150)
def test_what_goes_in_comes_out_and_matches_the_document(chunks):
    data = pack(chunks)
    assert read_by_the_book(data) == chunks
    with Reader(data) as reader:
        reader.verify()
        assert contents(reader) == chunks
        payload = sum(len(part) for *_, parts in chunks for part in parts)
        assert reader.overhead_bytes + payload == reader.size_bytes == len(data)
        ends = reader.chunks["offset"] + reader.chunks["n_bytes"]
        assert reader.chunks["offset"].tolist() == [10, *ends.tolist()][: len(chunks)]


@given(CHUNKS)
@settings(deadline=None, max_examples=30)
def test_a_walk_over_the_chunks_finds_what_the_table_lists(chunks):
    data = pack(chunks)
    with Reader(data) as by_table:
        if chunks:
            with Reader(data[:-1], recover=True) as by_walk:
                assert isinstance(by_walk.problem, CorruptDataError)
                assert (by_walk.chunks == by_table.chunks).all()
                assert contents(by_walk) == chunks
        else:
            with pytest.raises(CorruptDataError):
                Reader(data[:-1], recover=True)


def test_writer_and_pack_give_the_same_bytes(tmp_path):
    path = tmp_path / "t.polar"
    with Writer(path) as writer:
        for chunk in SMALL:
            writer.add(*chunk)
        assert writer.chunks["n_rows"].tolist() == [0, 0, 300, 0]
        assert not path.exists()
    assert path.read_bytes() == pack(iter(SMALL))
    assert os.listdir(tmp_path) == ["t.polar"]
    with Reader(path) as reader:
        assert contents(reader) == SMALL


def test_the_example_of_the_document_to_the_byte():
    example = re.search(r"### Example\n.*?```\n(.*?)```", FORMAT.read_text("utf-8"), re.DOTALL)
    stated = "".join(line[:31] for line in example[1].splitlines())
    assert bytes.fromhex(stated) == pack([(Kind.ROW_BLOCKS, 0, 300, [b"ab", b""])])


def test_the_document_states_kinds_and_limits():
    text = FORMAT.read_text("utf-8")
    for kind in Kind:
        assert f"| {kind.value} | {kind.name.lower().replace('_', ' ')} |" in text
    assert container.MAX_PARTS == 65536
    assert container.MAX_TENSORS == 65536
    assert container.MAX_ROWS == 2**32 - 1
    assert container.MAX_CHUNKS == 2**20
    assert container.MAX_PART_BYTES == 2**30
    assert container.MAX_FILE_BYTES == 2**42


def test_overhead_of_a_small_file_stays_small():
    chunks = [(1, 0, 0, [b"h" * 40]), (2, 0, 0, [b"q" * 900]), (4, 0, 500, [b"r" * 2000] * 2)]
    with Reader(pack(chunks)) as reader:
        assert reader.overhead_bytes == 19 + sum(chunk_overhead(*c) for c in chunks)
        assert reader.overhead_bytes <= 86


def chunk_overhead(kind, tensor, n_rows, parts):
    def digits(value):
        return max(1, -(-int(value).bit_length() // 7))

    head = 3 + digits(n_rows) + sum(digits(len(p)) for p in parts) + 4 * len(parts) + 4
    return head + 2 + digits(n_rows) + digits(head + sum(map(len, parts)))


@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300), min_size=1, max_size=120))
@settings(deadline=None)
def test_numbers_decode_the_same_by_loop_and_by_numpy(values):
    data = memoryview(container._encode_varints(values))
    many, many_bytes = container._decode_many_varints(data, len(values), "")
    assert many.tolist() == values
    assert many_bytes == len(data)
    read, at = [], 0
    for _ in values:
        one, used = container._decode_varints(data[at:], 1, "")
        read.append(int(one[0]))
        at += used
    assert read == values
    assert at == len(data)


@given(st.binary(max_size=400), st.integers(1, 100))
@settings(deadline=None)
def test_hostile_numbers_end_alike_by_loop_and_by_numpy(data, count):
    def outcome(decode):
        try:
            values, used = decode()
        except CorruptDataError:
            return "corrupt"
        return values.tolist(), used

    def by_loop():
        values, at = [], 0
        for _ in range(count):
            one, used = container._decode_varints(view[at:], 1, "")
            values.append(int(one[0]))
            at += used
        return np.array(values), at

    view = memoryview(data)
    assert outcome(lambda: container._decode_many_varints(view, count, "")) == outcome(by_loop)


def test_reading_one_part_touches_no_other(tmp_path):
    data = bytearray(pack([(4, 0, 512, [b"good" * 50, b"evil" * 50]), (4, 0, 9, [b"fine"])]))
    data[data.index(b"evil")] ^= 1
    with Reader(bytes(data)) as reader:
        assert bytes(reader.part(0, 0)) == b"good" * 50
        assert bytes(reader.part(1, 0)) == b"fine"
        message = r'chunk 0 "row blocks" part 1 at byte \d+: checksum \w{8} does not match \w{8}'
        with pytest.raises(CorruptDataError, match=message):
            reader.part(0, 1)
        assert len(list(reader.problems())) == 1


def test_a_damaged_head_does_not_hide_other_chunks():
    data = bytearray(pack(SMALL))
    with Reader(bytes(data)) as reader:
        start = int(reader.chunks["offset"][2])
    data[start + 5] ^= 0x01
    with Reader(bytes(data)) as reader:
        with pytest.raises(CorruptDataError, match='chunk 2 "row blocks" at byte'):
            reader.part(2, 0)
        assert bytes(reader.part(3, 0)) == b"unknown, skipped"
        assert bytes(reader.part(0, 0)) == b"{}"
        assert int(reader.chunks["n_rows"][2]) == 300  # so that later rows keep their numbers


def test_recover_reads_what_is_left_of_a_cut_file():
    data = pack(SMALL)
    cut = data.index(b"last")
    with pytest.raises(CorruptDataError, match="cut short or damaged after byte"):
        Reader(data[:cut])
    with Reader(data[:cut], recover=True) as reader:
        assert reader.chunks["n_rows"].tolist() == [0, 0, 300]
        assert bytes(reader.part(2, 0)) == b"first block"
        with pytest.raises(CorruptDataError, match="part 2 at byte .* truncated, 0 of 4"):
            reader.part(2, 2)
        assert [type(p) for p in reader.problems()] == [CorruptDataError, CorruptDataError]


@pytest.mark.parametrize("byte", range(10))
def test_recover_passes_over_a_damaged_header(byte):
    data = bytearray(pack(SMALL))
    data[byte] ^= 0x10
    with Reader(bytes(data), recover=True) as reader:
        assert contents(reader) == SMALL
        assert isinstance(reader.problem, FormatError)
        with pytest.raises(FormatError):
            reader.verify()


def test_recover_leaves_a_sound_file_alone_and_refuses_what_is_none():
    with Reader(pack(SMALL), recover=True) as reader:
        assert reader.problem is None
        reader.verify()
    with pytest.raises(FormatError, match="not a .polar file"):
        Reader(b"\x93NUMPY" + bytes(200), recover=True)


def test_a_reader_keeps_working_on_a_file_replaced_meanwhile(tmp_path):
    path = tmp_path / "t.polar"
    path.write_bytes(pack(SMALL))
    with Reader(path) as reader:
        with Writer(path) as writer:
            writer.add(1, 0, 0, [b"new"])
        assert contents(reader) == SMALL
    with Reader(path) as reader:
        assert contents(reader) == [(1, 0, 0, [b"new"])]


def test_a_file_truncated_while_open_is_an_error_not_a_signal(tmp_path):
    path = tmp_path / "t.polar"
    block = os.urandom(10000)
    path.write_bytes(pack([(4, 0, 256, [block]), (4, 0, 256, [block] * 2)]))
    with Reader(path) as reader:
        reader.parts(1)
        os.truncate(path, 15000)
        assert bytes(reader.part(0, 0)) == block
        with pytest.raises(CorruptDataError, match="truncated"):
            reader.part(1, 1)
        os.truncate(path, 0)
        with pytest.raises(CorruptDataError, match="truncated"):
            reader.part(0, 0)
    with Reader(pack([(4, 0, 1, [block])])) as reader:
        assert bytes(reader.part(0, 0)) == block


def test_parts_stay_valid_after_close(tmp_path):
    path = tmp_path / "t.polar"
    path.write_bytes(pack(SMALL))
    with Reader(path) as reader:
        part = reader.part(2, 0)
        array = np.frombuffer(part, np.uint8)
    assert bytes(part) == array.tobytes() == b"first block"
    assert part.readonly
    with pytest.raises(InputError, match="closed"):
        reader.part(2, 0)
    reader.close()


def test_sources_other_than_bytes():
    data = pack(SMALL)
    for source in (bytearray(data), memoryview(data), memoryview(np.frombuffer(data, np.uint8))):
        with Reader(source) as reader:
            assert contents(reader) == SMALL
    with pytest.raises(InputError, match="expected a path or bytes, got int"):
        Reader(3)
    with pytest.raises(InputError, match="contiguous"):
        Reader(memoryview(data)[::2])
    with pytest.raises(FileNotFoundError):
        Reader("no/such/file.polar")


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ((0, 0, 0, []), "known chunk kind"),
        ((77, 0, 0, []), "known chunk kind"),
        ((256, 0, 0, []), "known chunk kind"),
        ((1, -1, 0, []), "tensor index in 0..65535, got -1"),
        ((1, 65536, 0, []), "tensor index"),
        ((4, 0, -1, []), "rows"),
        ((4, 0, 2**32, []), "rows"),
        ((1, 0, 0, b"not a list"), "wrap it in a list"),
        ((1, 0, 0, [3]), "part 0 to be bytes, got int"),
        ((1, 0, 0, [memoryview(b"12345678").cast("I")]), "cast"),
        ((1, 0, 0, [b""] * 65537), "at most 65536 parts"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, chunk, message):
    with pytest.raises(InputError, match=message):
        pack([chunk])
    with Writer(tmp_path / "t.polar") as writer:
        with pytest.raises(InputError, match=message):
            writer.add(*chunk)
        writer.add(1, 0, 0, [b"still usable"])
    with Reader(tmp_path / "t.polar") as reader:
        assert len(reader.chunks) == 1


def test_limits_of_a_whole_file_are_checked_on_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "MAX_CHUNKS", 3)
    with pytest.raises(InputError, match="at most 3 chunks"):
        pack(SMALL)
    monkeypatch.setattr(container, "MAX_FILE_BYTES", container.MAX_TABLE_BYTES + 100)
    with pytest.raises(InputError, match="file of at most"):
        pack([(1, 0, 0, [bytes(100)])])
    with Writer(tmp_path / "t.polar") as writer, pytest.raises(InputError, match="file of at most"):
        writer.add(1, 0, 0, [bytes(100)])


def test_asking_for_what_is_not_there():
    with Reader(pack(SMALL)) as reader:
        for i in (-1, 4):
            with pytest.raises(InputError, match=r"chunk in 0..3"):
                reader.parts(i)
        for j in (-1, 3):  # a damaged header may promise it, so this is the file's fault
            with pytest.raises(CorruptDataError, match="expected, it has 3 parts"):
                reader.part(2, j)


@pytest.mark.parametrize(("n_chunks", "n_parts"), [(100, 1000), (20_000, 5), (2, 50_000)])
def test_a_file_of_100k_parts_opens_at_once(tmp_path, n_chunks, n_parts):
    path = tmp_path / "t.polar"
    path.write_bytes(pack([(4, 0, n_parts * 256, [b"x"] * n_parts)] * n_chunks))
    times = []
    for _ in range(3):
        start = time.process_time()
        with Reader(path) as reader:
            part = bytes(reader.part(n_chunks - 1, n_parts - 1))
        times.append(time.process_time() - start)
    assert part == b"x"
    assert min(times) < 0.1
