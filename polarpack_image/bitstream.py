"""The layout of a .pvq file: header and sections of bytes. Normative text: docs/pvq.md.

    magic 89 50 56 51 0D 0A · version · header · CRC-32 | section | section | ...
    section = kind · length · CRC-32 of the payload · payload

Numbers are little-endian, or varints where they are mostly small. Metadata comes first, then the
coefficients, coarse layers of all tiles before fine ones: a file cut short still holds a picture.
An array of many bands is several pictures' coefficients, one behind the other, under one header.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import IO

from polarpack.entropy._numbers import number as varint
from polarpack.errors import CorruptDataError, FormatError, LimitError, UnsupportedVersionError

MAGIC = b"\x89PVQ\r\n"
VERSION = 1
HASH_BYTES = 4
MAX_SIDE = 1 << 16  # pixels
MAX_PIXELS = 1 << 29
MAX_LAYERS = 16
MAX_METADATA_BYTES = 1 << 26  # of one ICC profile or EXIF block
MAX_BANDS = 1 << 12
MAX_SAMPLES = 1 << 29  # pixels times bands
TILE = 128  # positions of a tile in each direction
BLOCK = 8  # pixels of a position, but for LEARNED_16
SAMPLES = ("u1", "u2", "i2", "f2", "f4", "f8")  # dtypes of bands, by their number in the header


Message = tuple[bytes, int]  # of the range coder, and the checksum of what it says


class Mode(IntEnum):
    """What the pixels are once decoded; Pillow's names."""

    L = 1
    RGB = 2
    LA = 3
    RGBA = 4
    BANDS = 5  # no picture: an array of any number of bands


class Quantizer(IntEnum):
    """How heads become integers: the low four bits are the number of states of the trellis that
    indices are chosen by (one alone is a scalar quantizer), 16 is added where heads may be polar:
    radius and codewords, with indices for what is left only where there is a trellis."""

    SCALAR = 1
    DQ4 = 4
    DQ8 = 8
    POLAR = 16
    POLAR_DQ8 = 24

    @property
    def n_states(self) -> int:
        """States of the trellis; 0 where there are no indices."""
        return self & 15

    @property
    def is_polar(self) -> bool:
        """Whether heads may be polar."""
        return bool(self & 16)


class Coding(IntEnum):
    """How pixels became coefficients, and so what its weights must hold."""

    LAPPED = 0  # the linear transform; pixels are exact
    LEARNED_8 = 1  # networks with a hyper-latent, a position of the latent for 8 x 8 pixels
    LEARNED_16 = 2  # .. for 16 x 16
    ORIGINAL = 3  # the first prototype: a message for each tile


class Kind(IntEnum):
    """What a section holds."""

    ICC = 1
    EXIF = 2
    ALPHA = 3
    TILE = 4
    BANDS = 5
    HYPER = 6


ORDER = (Kind.ICC, Kind.EXIF, Kind.ALPHA, Kind.BANDS, Kind.HYPER, Kind.TILE)
MANY = (Kind.HYPER, Kind.TILE)  # the others stand once at most


@dataclass(frozen=True)
class Header:
    """What is known of a picture without decoding it.

    step: of the lattice, in 1/256 of a grey level.
    layers: the heads at which each layer of a tile ends, increasing. dtype, n_bands, n_groups: of
    an array of bands (place in SAMPLES; pictures that its bands are coded as).
    """

    width: int
    height: int
    mode: Mode
    quality: int
    step: int
    quantizer: Quantizer
    layers: tuple[int, ...]
    weights: bytes
    coding: Coding = Coding.LAPPED
    dtype: int = 0
    n_bands: int = 0
    n_groups: int = 1

    @property
    def block(self) -> int:
        """Pixels of a position in each direction."""
        return 2 * BLOCK if self.coding == Coding.LEARNED_16 else BLOCK

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of the latent."""
        return -(-self.height // self.block), -(-self.width // self.block)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        rows, columns = self.positions
        return -(-rows // TILE), -(-columns // TILE)

    def tile_shape(self, row: int, column: int) -> tuple[int, int]:
        """Positions of a tile: full ones but at the right and at the bottom."""
        rows, columns = self.positions
        return min(TILE, rows - row * TILE), min(TILE, columns - column * TILE)

    def to_bytes(self) -> bytes:
        """Magic, version, fields, CRC."""
        fields = bytes([self.coding << 4 | self.mode, self.quantizer, self.quality])
        fields += self.step.to_bytes(2, "little") + self.weights
        fields += varint(self.width) + varint(self.height)
        fields += bytes([len(self.layers), *self.layers])
        if self.mode == Mode.BANDS:
            fields += bytes([self.dtype]) + varint(self.n_bands) + varint(self.n_groups)
        data = MAGIC + bytes([VERSION]) + fields
        return data + zlib.crc32(data).to_bytes(4, "little")


@dataclass
class Sections:
    """The payloads of a file. tiles[group * layers + layer][i] belongs to tile i, counted row by
    row: (message, checksum of its indices); None where the file ends before it (in partial
    reading). hyper[i] likewise, of learned codings."""

    icc: bytes = b""
    exif: bytes = b""
    alpha: bytes = b""
    bands: bytes = b""
    hyper: list[Message | None] = field(default_factory=list)
    tiles: list[list[Message | None]] = field(default_factory=list)
    n_bytes: dict[str, int] = field(default_factory=dict)


class _Reader:
    """Bytes from front to back; CorruptDataError at their end."""

    def __init__(self, data: bytes | memoryview, position: int = 0) -> None:
        self.data = memoryview(data)
        self.position = position

    def take(self, n: int, what: str) -> bytes:
        left = len(self.data) - self.position
        if n > left:
            raise CorruptDataError(
                f"{what} at byte {self.position}: expected {n} bytes, {left} are left"
            )
        self.position += n
        return bytes(self.data[self.position - n : self.position])

    def number(self, n: int, what: str) -> int:
        return int.from_bytes(self.take(n, what), "little")

    def varint(self, what: str) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.number(1, what)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                return value
        raise CorruptDataError(f"{what} before byte {self.position}: number is too long")


def read_header(data: bytes | memoryview) -> tuple[Header, int]:
    """The header and the position behind it. Reads no more than the header."""
    start = bytes(data[: len(MAGIC)])
    if start != MAGIC:
        raise CorruptDataError(f"not a .pvq file: starts with {start!r}, expected {MAGIC!r}")
    reader = _Reader(data, len(MAGIC))
    version = reader.number(1, "version")
    if version != VERSION:
        raise UnsupportedVersionError(f"version {version}, this reader knows version {VERSION}")
    mode, quantizer, quality = (reader.number(1, name) for name in ("mode", "quantizer", "quality"))
    step = reader.number(2, "step")
    weights = reader.take(HASH_BYTES, "hash of the weights")
    width, height = reader.varint("width"), reader.varint("height")
    layers = tuple(reader.take(reader.number(1, "layers"), "layers"))
    coding, mode = divmod(mode, 16)
    bands = 0, 0, 1
    if mode == Mode.BANDS:
        dtype, n_bands = reader.number(1, "dtype"), reader.varint("number of bands")
        bands = dtype, n_bands, reader.varint("number of groups")
    end = reader.position
    checksum = reader.number(4, "checksum of the header")
    if checksum != zlib.crc32(bytes(data[:end])):
        raise CorruptDataError(f"header: checksum {checksum:08x} does not match its bytes")
    # the checksum holds, so somebody meant these values: a writer of another version
    if mode not in list(Mode):
        raise UnsupportedVersionError(f"mode {mode} is not known to this reader")
    if coding not in list(Coding):
        raise UnsupportedVersionError(f"coding {coding} is not known to this reader")
    if quantizer not in list(Quantizer):
        raise UnsupportedVersionError(f"quantizer {quantizer} is not known to this reader")
    if quality > 100 or step == 0:
        raise CorruptDataError(f"header: quality {quality}, step {step}")
    if width == 0 or height == 0:
        raise CorruptDataError(f"header: a picture of {width} x {height} pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise LimitError(
            f"a picture of {width} x {height} pixels; limits {MAX_SIDE} a side, {MAX_PIXELS} in all"
        )
    increasing = all(a < b for a, b in zip((0, *layers), layers, strict=False))
    if not 1 <= len(layers) <= MAX_LAYERS or not increasing:
        raise CorruptDataError(f"header: layers {layers} do not increase")
    header = Header(
        width, height, Mode(mode), quality, step, Quantizer(quantizer), layers, weights,
        Coding(coding), *bands,
    )  # fmt: skip
    if mode == Mode.BANDS:
        _check_bands(header)
    return header, end + 4


def _check_bands(header: Header) -> None:
    """What the fields of an array of bands must say."""
    n, groups = header.n_bands, header.n_groups
    if header.dtype >= len(SAMPLES) or header.coding != Coding.LAPPED:
        raise CorruptDataError(f"header: bands of dtype {header.dtype}, coding {header.coding}")
    if n == 0 or groups > -(-n // 3):
        raise CorruptDataError(f"header: {groups} groups of {n} bands")
    if n > MAX_BANDS or n * header.width * header.height > MAX_SAMPLES:
        raise LimitError(f"{n} bands; limits {MAX_BANDS} bands, {MAX_SAMPLES} numbers in all")


def _section(kind: Kind, payload: bytes) -> bytes:
    check = zlib.crc32(payload).to_bytes(4, "little")
    return bytes([kind]) + varint(len(payload)) + check + payload


def write(header: Header, sections: Sections) -> bytes:
    """A whole file."""
    parts = [header.to_bytes()]
    for kind, payload in (
        (Kind.ICC, sections.icc),
        (Kind.EXIF, sections.exif),
        (Kind.ALPHA, sections.alpha),
        (Kind.BANDS, sections.bands),
    ):
        if payload:
            parts.append(_section(kind, payload))
    for kind, messages in [(Kind.HYPER, sections.hyper), *((Kind.TILE, t) for t in sections.tiles)]:
        for message in messages:
            if message is None:
                raise FormatError("a file is written with all of its tiles")
            parts.append(_section(kind, message[1].to_bytes(4, "little") + message[0]))
    return b"".join(parts)


def _pieces(data: bytes | memoryview, position: int, check: bool) -> Iterator[tuple[Kind, bytes]]:
    """Sections from a position on; their checksums hold."""
    reader = _Reader(data, position)
    while reader.position < len(reader.data):
        at = reader.position
        kind = reader.number(1, "kind of a section")
        if kind not in list(Kind):
            raise CorruptDataError(f"section at byte {at}: unknown kind {kind}")
        name = f"section {Kind(kind).name}"
        length = reader.varint(f"length of {name}")
        checksum = reader.number(4, f"checksum of {name}")
        payload = reader.take(length, name)
        if check and zlib.crc32(payload) != checksum:
            raise CorruptDataError(
                f"{name} at byte {at}: checksum {checksum:08x} does not match its bytes"
            )
        yield Kind(kind), payload


def read_metadata(file: IO[bytes]) -> tuple[bytes, bytes]:
    """ICC profile and EXIF, still compressed, from a file that stands behind its header; stops at
    the first section of another kind. Reads no more than their bytes."""
    found = {Kind.ICC: b"", Kind.EXIF: b""}
    while True:
        head = file.read(10)  # kind, length, checksum
        if not head or head[0] not in found:
            return found[Kind.ICC], found[Kind.EXIF]
        reader = _Reader(head)
        kind = Kind(reader.number(1, "kind of a section"))
        length = reader.varint(f"length of section {kind.name}")
        checksum = reader.number(4, f"checksum of section {kind.name}")
        if length > MAX_METADATA_BYTES:
            raise LimitError(f"{kind.name}: {length} bytes, limit {MAX_METADATA_BYTES}")
        file.seek(reader.position - len(head), 1)
        payload = file.read(length)
        if zlib.crc32(payload) != checksum:
            raise CorruptDataError(f"section {kind.name}: checksum does not match its bytes")
        found[kind] = payload


def section_bytes(file: IO[bytes]) -> dict[str, int]:
    """Bytes of the payloads of each kind, from a file that stands behind its header; looks at the
    sections' first bytes only. CorruptDataError where the last one does not end with the file."""
    found = {kind.name: 0 for kind in Kind}
    at = file.tell()
    end = file.seek(0, 2)
    while at < end:
        file.seek(at)
        reader = _Reader(file.read(10))
        kind = reader.number(1, "kind of a section")
        if kind not in list(Kind):
            raise CorruptDataError(f"section at byte {at}: unknown kind {kind}")
        length = reader.varint("length of a section")
        at += reader.position + 4 + length
        found[Kind(kind).name] += length
    if at > end:
        raise CorruptDataError(f"the last section ends at byte {at}, the file at {end}")
    return found


def read_sections(
    data: bytes | memoryview, header: Header, position: int, *, partial: bool = False
) -> Sections:
    """Everything behind the header. CorruptDataError where a section is missing, damaged, out of
    order or superfluous; partial=True takes what stands before the first such place."""
    n_tiles = header.tiles[0] * header.tiles[1]
    learned = header.coding in (Coding.LEARNED_8, Coding.LEARNED_16)
    sections = Sections(
        hyper=[None] * (n_tiles * learned),
        tiles=[[None] * n_tiles for _ in range(header.n_groups * len(header.layers))],
    )
    places = {Kind.HYPER: [sections.hyper], Kind.TILE: sections.tiles}
    found = dict.fromkeys(Kind, 0)
    last = Kind.ICC
    try:
        for kind, payload in _pieces(data, position, True):
            if ORDER.index(kind) < ORDER.index(last) or (found[kind] and kind not in MANY):
                raise CorruptDataError(f"section {kind.name} after {last.name}")
            last = kind
            sections.n_bytes[kind.name] = sections.n_bytes.get(kind.name, 0) + len(payload)
            if kind in MANY:
                part, tile = divmod(found[kind], n_tiles)
                if part >= len(places[kind]) or not places[kind][part]:
                    raise CorruptDataError(f"more than {found[kind]} sections {kind.name}")
                if len(payload) < 4:
                    raise CorruptDataError(f"section {kind.name} without its checksum")
                message = payload[4:], int.from_bytes(payload[:4], "little")
                places[kind][part][tile] = message
            else:
                setattr(sections, kind.name.lower(), payload)
            found[kind] += 1
        for kind in MANY:
            wanted = n_tiles * sum(map(bool, places[kind]))
            if found[kind] < wanted:
                raise CorruptDataError(f"expected {wanted} sections {kind.name}, got {found[kind]}")
        if bool(sections.alpha) != (header.mode in (Mode.LA, Mode.RGBA)):
            raise CorruptDataError(f"mode {header.mode.name} and alpha do not agree")
        if bool(sections.bands) != (header.mode == Mode.BANDS):
            raise CorruptDataError(f"mode {header.mode.name} and the bands do not agree")
    except CorruptDataError:
        if not partial:
            raise
    return sections
