"""The ``.polar`` container: chunks of bytes, checksummed part by part, found through one table.

::

    header | chunk 0 | chunk 1 | ... | table of chunks | footer
             └ head: kind, tensor, n_rows, n_parts, part lengths, part CRCs, CRC of the head
               part 0 | part 1 | ...

A part is the unit of reading, of checking and of damage; a chunk groups the parts of one append.
Offsets are never stored: chunks and parts lie back to back, so neither holes nor overlaps can be
expressed. Each chunk describes itself, so a killed writer can resume and a file that lost its end
can be read; the table repeats kind, rows and length, so that a file opens without a walk and a
damaged chunk does not hide the ones after it. What the bytes of a part mean is not known here.
docs/format.md is the normative text.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import operator
import os
import stat
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import chain, islice
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from .errors import CorruptDataError, FormatError, InputError, LimitError, UnsupportedVersionError

if sys.platform != "win32":
    import fcntl

VERSION = 1
MAGIC = b"\x89PLR\r\n\x1a\n"  # as PNG's: high bit, CR LF, ctrl-Z and LF each break in text transfer
HEADER = MAGIC + bytes([VERSION, 255 - VERSION])  # the complement tells a newer file from a flip
FOOTER_BYTES = 8  # bytes of the table, CRC-32 of header, table and that number
MIN_FILE_BYTES = len(HEADER) + 1 + FOOTER_BYTES
MIN_CHUNK_BYTES = 8  # four one-byte numbers and a CRC-32

# Limits, so that what a hostile file declares is refused before anything is allocated for it.
MAX_FILE_BYTES = 1 << 42  # with MAX_CHUNKS it keeps every running sum below 2^63
MAX_CHUNKS = 1 << 20
MAX_TABLE_BYTES = 1 << 25  # room for MAX_CHUNKS of the longest entries
MAX_TENSORS = 1 << 16
MAX_ROWS = (1 << 32) - 1  # in one chunk
MAX_PARTS = 1 << 16  # in one chunk: its part table is read and checked as a whole
MAX_PART_BYTES = 1 << 30
MAX_VARINT_BYTES = 9  # 63 bits
FIRST_ANCILLARY_KIND = 128  # a reader skips unknown kinds from here on, and refuses them below

_PYTHON_LOOP = 48  # numbers below which a Python loop decodes sooner than numpy
_DIAGNOSED_CHUNKS = 4096  # chunks walked to word an error


class Kind(IntEnum):
    """What a chunk holds. The numbers are the format's: never reused, never renumbered."""

    TENSOR_HEADER = 1
    QUANTIZER = 2
    ENTROPY_MODEL = 3
    ROW_BLOCKS = 4
    WORD_MODEL = 5


_KIND_NAMES = {int(kind): kind.name.lower().replace("_", " ") for kind in Kind}
_HEADER_CRC = zlib.crc32(HEADER)

Int64 = npt.NDArray[np.int64]
Bytes = bytes | bytearray | memoryview
Entry = tuple[int, int, int, int]  # kind, tensor, n_rows, bytes of the whole chunk

CHUNK_DTYPE = np.dtype(
    [("kind", "u1"), ("tensor", "u2"), ("n_rows", "i8"), ("offset", "i8"), ("n_bytes", "i8")]
)


class Parts(NamedTuple):
    """Where the parts of one chunk lie. All arrays have shape (n_parts,)."""

    offsets: Int64  # from the start of the file
    lengths: Int64  # bytes
    checksums: npt.NDArray[np.uint32]  # CRC-32 of each part's bytes


class _Head(NamedTuple):
    entry: Entry
    offset: int
    parts: Parts


# Numbers: LEB128, least significant seven bits first, always in their shortest form.


def _encode_varints(values: Iterable[int]) -> bytes:
    out = bytearray()
    for value in values:
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _decode_varints(data: memoryview, count: int, where: str) -> tuple[Int64, int]:
    """The first ``count`` numbers of data, (count,) int64, and the number of bytes they take.

    O(count) time and memory whatever the bytes are. CorruptDataError if data ends before, or a
    number is longer than 63 bits or not in its shortest form.
    """
    if count > _PYTHON_LOOP:
        return _decode_many_varints(data, count, where)
    values = np.empty(count, np.int64)
    at = 0
    for i in range(count):
        value = shift = 0
        while True:
            if at >= len(data):
                raise CorruptDataError(f"{where}: ends inside number {i} of {count}")
            byte = data[at]
            at += 1
            if shift >= 7 * MAX_VARINT_BYTES or (byte == 0 and shift):
                raise CorruptDataError(f"{where}: number {i} of {count} is not in shortest form")
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        values[i] = value
    return values, at


def _decode_many_varints(data: memoryview, count: int, where: str) -> tuple[Int64, int]:
    raw = np.frombuffer(data[: count * MAX_VARINT_BYTES], np.uint8)
    ends = np.flatnonzero(raw < 0x80)[:count]
    if len(ends) < count:
        raise CorruptDataError(f"{where}: ends inside number {len(ends)} of {count}")
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
    sizes = ends - starts + 1
    wrong = (sizes > MAX_VARINT_BYTES) | ((sizes > 1) & (raw[ends] == 0))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise CorruptDataError(f"{where}: number {first} of {count} is not in shortest form")
    values = np.zeros(count, np.int64)
    for k in range(int(sizes.max())):
        reaches = np.flatnonzero(sizes > k)
        values[reaches] |= (raw[starts[reaches] + k] & 0x7F).astype(np.int64) << (7 * k)
    return values, int(ends[-1]) + 1


# One chunk: head and parts.


def _encode_head(
    kind: int, tensor: int, n_rows: int, parts: Sequence[Bytes]
) -> tuple[bytes, Entry]:
    """The head that goes before the parts, and the chunk's entry in the table."""
    kind, tensor, n_rows = operator.index(kind), operator.index(tensor), operator.index(n_rows)
    if not (kind in _KIND_NAMES or FIRST_ANCILLARY_KIND <= kind <= 255):
        raise InputError(f"expected a known chunk kind or an ancillary one (128..255), got {kind}")
    if not 0 <= tensor < MAX_TENSORS:
        raise InputError(f"expected a tensor index in 0..{MAX_TENSORS - 1}, got {tensor}")
    if not 0 <= n_rows <= MAX_ROWS:
        raise InputError(f"expected at most {MAX_ROWS} rows in a chunk, got {n_rows}")
    if isinstance(parts, bytes | bytearray | memoryview):
        raise InputError("expected a sequence of parts, got one bytes object: wrap it in a list")
    if len(parts) > MAX_PARTS:
        raise InputError(f"expected at most {MAX_PARTS} parts in a chunk, got {len(parts)}")
    for j, part in enumerate(parts):
        if not isinstance(part, bytes | bytearray | memoryview):
            raise InputError(f"expected part {j} to be bytes, got {type(part).__name__}")
        if isinstance(part, memoryview) and not (part.ndim == 1 and part.format == "B"):
            raise InputError(f"expected part {j} as a flat view of bytes: use view.cast('B')")
        if len(part) > MAX_PART_BYTES:
            raise InputError(f"expected at most {MAX_PART_BYTES} bytes a part, got {len(part)}")
    head = _encode_varints((kind, tensor, n_rows, len(parts), *map(len, parts)))
    head += struct.pack(f"<{len(parts)}I", *map(zlib.crc32, parts))
    head += struct.pack("<I", zlib.crc32(head))
    return head, (kind, tensor, n_rows, len(head) + sum(map(len, parts)))


def _decode_head(view: memoryview, offset: int, end: int, where: str) -> _Head:
    """The verified head at ``offset``, which has to lie before ``end``; the parts may lie beyond.

    LimitError before anything is allocated for the number of parts declared.
    """
    four, used = _decode_varints(view[offset : min(end, offset + 4 * MAX_VARINT_BYTES)], 4, where)
    kind, tensor, n_rows, n_parts = four.tolist()
    if n_parts > MAX_PARTS:
        raise LimitError(f"{where}: declares {n_parts} parts, the limit is {MAX_PARTS}")
    if offset + used + 5 * n_parts + 4 > end:
        raise CorruptDataError(f"{where}: its {n_parts} parts do not fit before byte {end}")
    lengths, more = _decode_varints(view[offset + used : end], n_parts, where)
    crcs_at = offset + used + more
    crc_at = crcs_at + 4 * n_parts
    if crc_at + 4 > end:
        raise CorruptDataError(f"{where}: its part table does not fit before byte {end}")
    _compare_crc(view[offset:crc_at], _uint32(view, crc_at), f"{where}: head")
    if n_parts and int(lengths.max()) > MAX_PART_BYTES:
        raise LimitError(
            f"{where}: declares a part of {lengths.max()} bytes, the limit is {MAX_PART_BYTES}"
        )
    ends = crc_at + 4 + np.cumsum(lengths)
    # Copied, so that no array keeps the mapped file open.
    checksums = np.frombuffer(view[crcs_at:crc_at], "<u4").astype(np.uint32)
    n_bytes = (int(ends[-1]) if n_parts else crc_at + 4) - offset
    return _Head((kind, tensor, n_rows, n_bytes), offset, Parts(ends - lengths, lengths, checksums))


def _uint32(view: memoryview, at: int) -> int:
    return int.from_bytes(view[at : at + 4], "little")


def _compare_crc(data: memoryview, expected: int, where: str, start: int = 0) -> None:
    actual = zlib.crc32(data, start)
    if actual != expected:
        raise CorruptDataError(f"{where}: checksum {actual:08x} does not match {expected:08x}")


def _read_part(view: memoryview, parts: Parts, j: int, where: str) -> memoryview:
    """Part j after its checksum was found right; ``where`` names the chunk."""
    start, length = int(parts.offsets[j]), int(parts.lengths[j])
    where = f"{where} part {j} at byte {start}"
    if start + length > len(view):
        there = max(0, len(view) - start)
        raise CorruptDataError(f"{where}: truncated, {there} of {length} bytes are there")
    data = view[start : start + length]
    _compare_crc(data, int(parts.checksums[j]), where)
    return data


def _walk(view: memoryview) -> Iterator[_Head]:
    """Heads in file order, until one is damaged or the table begins; the last may be cut short."""
    offset = len(HEADER)
    for i in range(MAX_CHUNKS):
        try:
            head = _decode_head(view, offset, len(view), f"chunk {i} at byte {offset}")
        except FormatError:
            return
        yield head
        offset += head.entry[3]
        if offset >= len(view):
            return


# The table of chunks and the footer.


def _encode_tail(entries: Sequence[Entry]) -> bytes:
    table = _encode_varints(chain((len(entries),), *entries))
    table += struct.pack("<I", len(table))
    return table + struct.pack("<I", zlib.crc32(table, _HEADER_CRC))


def _decode_tail(view: memoryview) -> Int64:
    """The entries (n_chunks, 4) of a file's table; they fill the file from header to table."""
    size = len(view)
    if size < MIN_FILE_BYTES:
        raise CorruptDataError(
            f"truncated: {size} bytes, the shortest file has {MIN_FILE_BYTES} bytes"
        )
    table_bytes = _uint32(view, size - FOOTER_BYTES)
    table_at = size - FOOTER_BYTES - table_bytes
    if size > MAX_FILE_BYTES:
        raise LimitError(f"file of {size} bytes, the limit is {MAX_FILE_BYTES}")
    if table_at < len(HEADER) or table_bytes > MAX_TABLE_BYTES:
        raise CorruptDataError(
            f"footer at byte {size - FOOTER_BYTES}: declares a table of {table_bytes} bytes "
            f"in a file of {size} bytes"
        )
    where = f"table of chunks at byte {table_at}"
    _compare_crc(view[table_at : size - 4], _uint32(view, size - 4), where, _HEADER_CRC)
    table = view[table_at : size - FOOTER_BYTES]
    count, used = _decode_varints(table, 1, where)
    n_chunks = int(count[0])
    if n_chunks > MAX_CHUNKS:
        raise LimitError(f"{where}: declares {n_chunks} chunks, the limit is {MAX_CHUNKS}")
    values, more = _decode_varints(table[used:], 4 * n_chunks, where)
    if used + more != table_bytes:
        raise CorruptDataError(f"{where}: {table_bytes - used - more} bytes too long")
    entries = values.reshape(n_chunks, 4)
    lengths = entries[:, 3]
    # Each length is bounded first, so that the sum cannot overflow: 2^20 chunks of 2^42 bytes.
    if n_chunks and (int(lengths.min()) < MIN_CHUNK_BYTES or int(lengths.max()) > size):
        raise CorruptDataError(f"{where}: lists a chunk that cannot be in a file of {size} bytes")
    listed = len(HEADER) + int(lengths.sum())
    if listed != table_at:
        raise CorruptDataError(f"{where}: the chunks it lists end at byte {listed}")
    return entries


def _chunk_array(entries: Int64, where: str) -> npt.NDArray[np.void]:
    """Entries as a read-only array of CHUNK_DTYPE, once their numbers are within the limits."""
    for column, (name, limit) in enumerate(
        (("kind", 255), ("tensor index", MAX_TENSORS - 1), ("row count", MAX_ROWS))
    ):
        if len(entries) and int(entries[:, column].max()) > limit:
            raise LimitError(
                f"{where}: declares a {name} of {entries[:, column].max()}, the limit is {limit}"
            )
    kinds = entries[:, 0]
    unknown = (kinds < FIRST_ANCILLARY_KIND) & ~np.isin(kinds, list(_KIND_NAMES))
    if unknown.any():
        i = int(np.argmax(unknown))
        raise UnsupportedVersionError(
            f"{where}: chunk {i} is of kind {kinds[i]}, which this reader does not know: "
            "the file needs a newer polarpack"
        )
    chunks = np.empty(len(entries), CHUNK_DTYPE)
    chunks["kind"], chunks["tensor"], chunks["n_rows"] = entries[:, 0], entries[:, 1], entries[:, 2]
    chunks["n_bytes"] = entries[:, 3]
    chunks["offset"] = len(HEADER) + np.cumsum(entries[:, 3]) - entries[:, 3]
    chunks.flags.writeable = False
    return chunks


def _name(i: int, kind: int) -> str:
    return f'chunk {i} "{_KIND_NAMES.get(kind, f"ancillary {kind}")}"'


_OTHER_FORMATS = (  # (offset, bytes there, what it is)
    (0, b"\x93NUMPY", "a .npy array"),
    (0, b"PK\x03\x04", "a zip archive (.npz, .pt)"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (8, b"{", "a safetensors file"),
)


def _check_header(view: memoryview) -> None:
    """FormatError with a guess at what the bytes are, unless they begin as a file of VERSION."""
    start = bytes(view[: len(HEADER)])
    if start == HEADER:
        return
    if HEADER.startswith(start):
        raise CorruptDataError(f"truncated: {len(start)} bytes, the header has {len(HEADER)} bytes")
    if start.startswith(MAGIC):
        version = start[len(MAGIC)]
        if len(start) < len(HEADER) or start[-1] != 255 - version:
            raise CorruptDataError(
                f"header at byte {len(MAGIC)}: version bytes {start[len(MAGIC) :].hex()} "
                f"are damaged, expected {HEADER[len(MAGIC) :].hex()}"
            )
        raise UnsupportedVersionError(
            f"file of format version {version}, this reader knows {VERSION}: "
            + ("it needs a newer polarpack" if version > VERSION else "a draft of before it froze")
        )
    guess = ""
    for at, mark, what in _OTHER_FORMATS:
        if start[at:].startswith(mark):
            guess = f"; it looks like {what}"
    if b"PLR" in start[:6]:
        guess = "; it looks like a .polar file damaged by a text-mode transfer: copy it as binary"
    raise FormatError(
        f"not a .polar file: begins with {start[: len(MAGIC)].hex(' ')}, "
        f"expected {MAGIC.hex(' ')}{guess}"
    )


# Writing.


def pack(chunks: Iterable[tuple[int, int, int, Sequence[Bytes]]]) -> bytes:
    """A whole file in memory: chunks are (kind, tensor, n_rows, parts), as for ``Writer.add``.

    Returns exactly the bytes that ``Writer`` puts in a file. InputError as ``Writer.add``.

    >>> with Reader(pack([(Kind.ROW_BLOCKS, 0, 300, [b"one block", b"another"])])) as reader:
    ...     bytes(reader.part(0, 1))
    b'another'
    """
    pieces: list[Bytes] = [HEADER]
    entries: list[Entry] = []
    for kind, tensor, n_rows, parts in chunks:
        head, entry = _encode_head(kind, tensor, n_rows, parts)
        pieces += [head, *parts]
        entries.append(entry)
    _check_room(len(entries), sum(entry[3] for entry in entries))
    pieces.append(_encode_tail(entries))
    return b"".join(pieces)


def _check_room(n_chunks: int, n_bytes: int) -> None:
    if n_chunks > MAX_CHUNKS:
        raise InputError(f"expected at most {MAX_CHUNKS} chunks in a file: write fewer, larger")
    if n_bytes > MAX_FILE_BYTES - MAX_TABLE_BYTES:
        raise InputError(f"expected a file of at most {MAX_FILE_BYTES} bytes: write several")


def partial_path(path: str | os.PathLike[str]) -> str:
    """The name under which ``Writer`` keeps what is to become the file at path."""
    folder, name = os.path.split(os.path.realpath(os.fsdecode(path)))
    return os.path.join(folder, f".{name}.partial")


class Writer:
    """Writes a file under a temporary name beside it, and gives it its own name when whole.

    ``path`` holds the old file, if any, until ``close`` has put every byte of the new one on the
    disk; a killed process leaves ``.NAME.partial``. A symbolic link is followed. Used in a
    ``with`` block, an exception discards what was written, or keeps it for a later ``resume`` if
    ``keep_partial``. ``resume=True`` continues such a partial file after its last whole chunk
    (``chunks`` says what was kept), and starts anew where there is none; it implies
    ``keep_partial``. Finishing gives the bytes of a run without interruption.

    InputError if another writer holds the same file, or path is no regular file; OSError from the
    system as it comes (disk full, no such folder, no permission). Not for use by two threads.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, keep_partial: bool = False
    ) -> None:
        self._path = os.path.realpath(os.fsdecode(path))
        # os.replace would put a file in the place of a device or a pipe.
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                raise InputError(f"expected a file path, got {path}, which is no regular file")
        self._partial = partial_path(path)
        self._keep_partial = keep_partial or resume
        # One list, so that an interrupt cannot come between an entry and the end of its bytes.
        self._written: list[tuple[Entry, int]] = []
        self._file = _open_locked(self._partial, self._path)
        try:
            if resume:
                self._keep_whole_chunks()
            os.ftruncate(self._file.fileno(), self._end if self._written else 0)
            if not self._written:
                self._write(0, HEADER)
        except BaseException:
            self.abort()
            raise

    def _keep_whole_chunks(self) -> None:
        """Take over the chunks of the partial file up to the first that does not verify."""
        view, mapped = _map(self._file.fileno())
        try:
            try:
                _check_header(view)
            except UnsupportedVersionError:
                raise
            except FormatError:  # a power cut before the first sync loses even the header
                return
            for i, head in enumerate(_walk(view)):
                try:
                    for j in range(len(head.parts.lengths)):
                        _read_part(view, head.parts, j, f"chunk {i}")
                except CorruptDataError:
                    break
                self._written.append((head.entry, head.offset + head.entry[3]))
                _forget(mapped)
            _ = self.chunks  # refuses what this version could not have written
        finally:
            _unmap(view, mapped)

    @property
    def chunks(self) -> npt.NDArray[np.void]:
        """The chunks written so far, (n_chunks,) of CHUNK_DTYPE, those kept by resume included."""
        entries = np.array([entry for entry, _ in self._written], np.int64).reshape(-1, 4)
        return _chunk_array(entries, self._partial)

    @property
    def _end(self) -> int:
        """Where the next chunk goes; what a failed write left beyond it does not count."""
        return self._written[-1][1] if self._written else len(HEADER)

    @property
    def size_bytes(self) -> int:
        """Bytes of the file if it were closed now."""
        return self._end + len(_encode_tail([entry for entry, _ in self._written]))

    def add(self, kind: int, tensor: int, n_rows: int, parts: Sequence[Bytes]) -> None:
        """Append one chunk of parts (each bytes, possibly empty) that carry n_rows rows.

        O(bytes), nothing kept. InputError for anything beyond the limits above. After an OSError
        or an interrupt the writer is as it was before, so the same chunk may be added again.
        """
        head, entry = _encode_head(kind, tensor, n_rows, parts)
        end = self._end + entry[3]
        _check_room(len(self._written) + 1, end)
        self._write(self._end, head, *parts)
        self._written.append((entry, end))

    def _write(self, at: int, *pieces: Bytes) -> None:
        """Put pieces from byte ``at`` on; if that fails, the file ends there again."""
        if self._file.closed:
            raise InputError(f"{self._path}: the writer is closed")
        fd = self._file.fileno()
        os.lseek(fd, at, os.SEEK_SET)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(fd, rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, at)
            raise

    def sync(self) -> None:
        """Wait until all chunks added so far are on the disk, where ``resume`` finds them even
        after a power cut. (A kill alone loses nothing of what ``add`` has returned from.)"""
        if self._file.closed:
            raise InputError(f"{self._path}: the writer is closed")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the table, wait for the disk, and let the file appear under its name.

        After an OSError the writer is still open: call again, or ``abort``.
        """
        if self._file.closed:
            return
        tail = _encode_tail([entry for entry, _ in self._written])
        self._write(self._end, tail)
        fd = self._file.fileno()
        os.ftruncate(fd, self._end + len(tail))
        os.fsync(fd)
        if sys.platform == "win32":
            self._file.close()  # an open file cannot be renamed there
        os.replace(self._partial, self._path)
        self._file.close()
        _sync_folder(os.path.dirname(self._path))

    def abort(self, *, keep: bool | None = None) -> None:
        """Stop without touching the file at path; the partial file goes unless it is to stay, which
        ``keep`` decides anew."""
        if self._file.closed:
            return
        if sys.platform == "win32":
            self._file.close()  # an open file cannot be removed there
        if not (self._keep_partial if keep is None else keep):
            # While the lock is held: afterwards the name could be another writer's.
            with contextlib.suppress(OSError):
                os.unlink(self._partial)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self.abort()


def _open_locked(partial: str, path: str) -> io.FileIO:
    """The partial file, created if need be and opened for this writer alone."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        # By descriptor, since no mode of open() creates without cutting or appending.
        file = io.FileIO(os.open(partial, flags, 0o666), "r+")
        try:
            _lock(file.fileno(), partial, path)
            # The writer before us may have renamed or removed the file between the two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(partial), os.fstat(file.fileno())):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(fd: int, partial: str, path: str) -> None:
    """The lock goes with its process, so what a killed writer left never blocks the next one."""
    if sys.platform != "win32":
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path} is being written by another writer, which holds {partial}"
            ) from None
        except OSError as error:  # some network file systems know no locks
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise


def _sync_folder(folder: str) -> None:
    """Make a rename last through a power cut. Without it the old file may come back, whole, so a
    file system that refuses is no reason to fail."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


# Reading.


def _map(fd: int) -> tuple[memoryview, mmap.mmap | None]:
    if os.fstat(fd).st_size == 0:  # which cannot be mapped
        return memoryview(b""), None
    mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    return memoryview(mapped), mapped


def _forget(mapped: mmap.mmap | None) -> None:
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _unmap(view: memoryview, mapped: mmap.mmap | None) -> None:
    # Parts still held by callers (or by a traceback) keep the mapping until they go.
    with contextlib.suppress(BufferError):
        view.release()
        if mapped is not None:
            mapped.close()


class Reader:
    """Reads a file or its bytes part by part; nothing is read that is not asked for.

    ``source`` is a path (memory-mapped, read-only) or a bytes-like object. Opening reads header
    and table alone, O(n_chunks). Use it in a ``with`` block or call ``close``; parts handed out
    stay valid. Threads may share a reader.

    ``recover=True`` opens also a file that lost its header or its end (truncated, table damaged):
    chunks are then found by walking their heads from the start, as far as these are sound, and
    ``problem`` says what was wrong. The last chunk found may be cut short.

    Attributes: ``chunks``, a read-only (n_chunks,) array of CHUNK_DTYPE in file order, ancillary
    kinds included (skip those you do not know); ``size_bytes``; ``problem``, None or the
    FormatError that ``recover`` passed over.

    FormatError if the bytes are no such file, CorruptDataError if they are a damaged one,
    UnsupportedVersionError if a newer one, LimitError if they declare more than a limit;
    OSError if the path cannot be read; FileNotFoundError says if the file is still being written.
    """

    def __init__(self, source: str | os.PathLike[str] | Bytes, *, recover: bool = False) -> None:
        self._mapped: mmap.mmap | None = None
        self._closed = False
        if isinstance(source, bytes | bytearray | memoryview):
            if not memoryview(source).c_contiguous:
                raise InputError("expected contiguous bytes, got a strided memoryview")
            self._view = memoryview(source).cast("B").toreadonly()
        elif isinstance(source, str | os.PathLike):
            try:
                with open(source, "rb") as file:
                    self._view, self._mapped = _map(file.fileno())
            except FileNotFoundError as error:
                if not os.path.exists(partial := partial_path(source)):
                    raise
                raise FileNotFoundError(
                    error.errno,
                    f"still being written, or its writer was stopped: {partial}",
                    source,
                ) from None
        else:
            raise InputError(f"expected a path or bytes, got {type(source).__name__}")
        self._parts: dict[int, Parts] = {}
        self.problem: FormatError | None = None
        self.size_bytes = len(self._view)
        try:
            self.chunks = _chunk_array(self._entries(recover), "table of chunks")
        except BaseException:
            self.close()
            raise

    def _entries(self, recover: bool) -> Int64:
        """The table's entries, or those of a walk over the chunks if the table is lost."""
        try:
            _check_header(self._view)
        except UnsupportedVersionError:
            raise
        except FormatError as error:
            if not recover:
                raise
            self.problem = error
        try:
            return _decode_tail(self._view)
        except FormatError as error:
            self.problem = self.problem or error
            if not recover:
                raise type(error)(f"{_diagnose(self._view)}: {error}") from None
        found = [head.entry for head in _walk(self._view)]
        if not found:
            raise self.problem
        return np.array(found, np.int64)

    def parts(self, i: int) -> Parts:
        """Where the parts of chunk i lie. Reads and checks the chunk's head, once.

        CorruptDataError if the head is damaged or disagrees with the table, LimitError if it
        declares too much: the parts of this chunk are then lost, other chunks are not.
        """
        if i not in self._parts:
            available = self.available()
            if not 0 <= i < len(self.chunks):
                raise InputError(f"expected a chunk in 0..{len(self.chunks) - 1}, got {i}")
            kind, tensor, n_rows, offset, n_bytes = self.chunks[i].tolist()
            where = f"{_name(i, kind)} at byte {offset}"
            head = _decode_head(self._view, offset, min(offset + n_bytes, available), where)
            if head.entry != (kind, tensor, n_rows, n_bytes):
                raise CorruptDataError(
                    f"{where}: kind, tensor, rows, bytes {head.entry} in its head, "
                    f"{(kind, tensor, n_rows, n_bytes)} in the table of chunks"
                )
            self._parts[i] = head.parts
        return self._parts[i]

    def part(self, i: int, j: int) -> memoryview:
        """Part j of chunk i, read-only and not copied; its checksum is compared on every call.

        CorruptDataError, with the place, if it does not match, if the file ends before, or if the
        chunk has no part j (so that a reader may ask for what a damaged header promised).
        """
        parts, available = self.parts(i), self.available()
        where = _name(i, int(self.chunks["kind"][i]))
        if not 0 <= j < len(parts.lengths):
            raise CorruptDataError(
                f"{where} at byte {self.chunks['offset'][i]}: "
                f"part {j} expected, it has {len(parts.lengths)} parts"
            )
        return _read_part(self._view[:available], parts, j, where)

    def available(self) -> int:
        """Bytes that may be touched now: beyond the end of a mapped file that others have cut
        short since it was opened lies not an exception but SIGBUS."""
        if self._closed:
            raise InputError("the reader is closed")
        return (
            self.size_bytes if self._mapped is None else min(self.size_bytes, self._mapped.size())
        )

    def problems(self) -> Iterator[FormatError]:
        """Every damage in the file, as the error that reading there would raise. Reads it all."""
        if self.problem is not None:
            yield self.problem
        for i in range(len(self.chunks)):
            try:
                n_parts = len(self.parts(i).lengths)
            except FormatError as error:
                yield error
                continue
            for j in range(n_parts):
                try:
                    self.part(i, j)
                except FormatError as error:
                    yield error

    def verify(self) -> None:
        """Raise the first of ``problems``, if there is one."""
        for problem in self.problems():
            raise problem

    def forget(self) -> None:
        """Let go of what was read so far: it stays with the system, where reading it again finds
        it, and no longer counts as memory of this process."""
        if not self._closed:
            _forget(self._mapped)

    @property
    def overhead_bytes(self) -> int:
        """Bytes that are not part of any part: header, chunk heads, table, footer. With the
        lengths in ``parts`` of all chunks it sums to ``size_bytes``. Reads every chunk's head."""
        n_chunks = len(self.chunks)
        return self.size_bytes - sum(int(self.parts(i).lengths.sum()) for i in range(n_chunks))

    def close(self) -> None:
        """Let go of the file. ``chunks`` stays."""
        self._closed = True
        _unmap(self._view, self._mapped)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _diagnose(view: memoryview) -> str:
    """What a file without a sound end has to offer, for its error message."""
    heads = list(islice(_walk(view), _DIAGNOSED_CHUNKS))
    whole = [head for head in heads if head.offset + head.entry[3] <= len(view)]
    end = len(HEADER) + sum(head.entry[3] for head in whole)
    tail = _encode_tail([head.entry for head in whole])
    if view[end : end + len(tail)] == tail:
        beyond = end + len(tail)
        return f"{len(view) - beyond} trailing bytes after the end of the file at byte {beyond}"
    return f"cut short or damaged after byte {end} (chunks up to there: {len(whole)})"
