"""Hostile files kept in the tree: whatever reads ``.polar`` files must refuse each, as named here.

Every checksum in ``files/`` is right. ``POLARPACK_WRITE_GOLDEN=1 pytest tests/hostile`` writes them
anew, which a change of the format asks for; a missing one fails.
"""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from forging import outcome, pack, part_of, seal, unpack, unseal, with_chunk, with_header
from tables import D, correlated, fitted

import polarpack as pp
from polarpack.container import Kind
from polarpack.entropy._numbers import Reader, number
from polarpack.entropy.magnitude import integers_to_bytes
from polarpack.entropy.model import AdaptiveModel, UniformModel, model_to_bytes
from polarpack.errors import CorruptDataError, LimitError, UnsupportedVersionError

FILES = Path(__file__).resolve().parent / "files"
ROWS = correlated(40, D, seed=4)
WRITE = os.environ.get("POLARPACK_WRITE_GOLDEN") == "1"


def good(name="trellis", **options):
    return pp.compress(ROWS, quantizer=fitted(name), **options)


def exact():
    return pp.compress(correlated(200, D), max_error=0)


def with_settings(name, changes, blobs=None):
    """A file whose quantizer has other settings, and other bytes of its arrays."""
    config, listed, old = unseal(fitted(name).to_bytes())
    sealed = seal(config | changes, listed, old if blobs is None else blobs)
    return with_chunk(good(name), Kind.QUANTIZER, [sealed])


def with_table(blob, change):
    """A file whose table of chunks is another one."""
    size = struct.unpack("<I", blob[-8:-4])[0]
    table = change(blob[-8 - size : -8])
    tail = table + struct.pack("<I", len(table))
    return blob[: -8 - size] + tail + struct.pack("<I", zlib.crc32(blob[:10] + tail))


def borrowed(table):
    """A table whose second chunk reaches five bytes into the third."""
    reader = Reader(table, "table")
    numbers = [reader.number(1 << 34) for _ in range(1 + 4 * 3)]
    reader.end()
    numbers[8] += 5
    numbers[12] -= 5
    return b"".join(map(number, numbers))


def escapes(change):
    """A file with an escaped row, of which ``change`` makes another head and places."""
    rows = ROWS.copy()
    rows[[3, 9]] *= np.float32(1e20)
    blob = pp.compress(rows, quantizer=fitted("trellis"), max_error=0.9)
    block = part_of(blob, Kind.ROW_BLOCKS)
    count, size = struct.unpack_from("<HI", block, 1)
    places = list(struct.unpack_from(f"<{count}H", block, 7))
    count, size, places = change(count, size, places)
    head = b"\2" + struct.pack("<HI", count, size) + struct.pack(f"<{len(places)}H", *places)
    rest = block[7 + 2 * struct.unpack_from("<H", block, 1)[0] :]
    return with_chunk(blob, Kind.ROW_BLOCKS, [head + rest])


def references_in_a_circle():
    """Two tensors, each decoded by the other one's quantizer, which neither has."""
    chunks = [c for c in unpack(good()) if c[0] != Kind.QUANTIZER]
    header = json.loads(chunks[0][3][0])
    out = []
    for t in (0, 1):
        text = json.dumps(header | {"name": str(t), "quantizer": 1 - t}).encode()
        out += [[chunks[0][0], t, 0, [text]], [chunks[1][0], t, *chunks[1][2:]]]
    return pack(out)


def two_of(kind):
    chunks = unpack(good())
    return pack([*chunks, next(c for c in chunks if c[0] == kind)])


def two_of_one_name():
    chunks = unpack(good("pq"))
    return pack(chunks + [[kind, 1, *rest] for kind, _, *rest in chunks])


def rows_without_blocks():
    """65536 parts of no bytes in each of three chunks that claim 2^28 rows each."""
    chunks = unpack(exact())
    header = json.loads(chunks[0][3][0]) | {"shape": [3 << 28, D]}
    empty = [int(Kind.ROW_BLOCKS), 0, 1 << 28, [b""] * (1 << 12)]
    return pack([[1, 0, 0, [json.dumps(header).encode()]], chunks[1], empty, empty, empty])


def swelling_matrix():
    """2048 x 2048 zeros in a few bytes, declared as 30000 rows of them."""
    q = pp.PolarQuantizer(fine="float16", rotation="random", radius_bits=0, center=False)
    config, listed, _ = unseal(q.fit(ROWS).to_bytes())
    blob = integers_to_bytes(np.zeros((2048, 64), np.int16))
    lying = [[*listed[0][:3], [30000, 2048], "integers", len(blob)]]
    sealed = seal(config | {"d": 30000}, lying, blob)
    return with_chunk(good("pq"), Kind.QUANTIZER, [sealed])


def swelling_json():
    return with_chunk(good(), Kind.QUANTIZER, [seal(None, None, b"", text=b" " * (1 << 26))])


def model(of):
    sizes = fitted("polar-vq").alphabet_sizes
    return with_chunk(
        good("polar-vq", layout="archive"), Kind.ENTROPY_MODEL, [model_to_bytes(of(sizes))]
    )


def words(*fields):
    """A word model of these numbers, with tables of its own."""
    blob = exact()
    kept = pp.open(blob)["x"]._coding_at(0).words
    tables = kept.symbols.to_bytes()
    return with_chunk(blob, Kind.WORD_MODEL, [b"".join(map(number, fields)) + tables])


HADAMARD = {"kind": "hadamard", "center": False, "seed": 1}
LIES = {
    "shape-beyond-any-file": (LimitError, lambda: with_header(good(), shape=[1 << 40, 1 << 40])),
    "shape-of-more-rows": (CorruptDataError, lambda: with_header(good(), shape=[41, D])),
    "shape-of-other-width": (CorruptDataError, lambda: with_header(good(), shape=[40, D + 1])),
    "shape-negative": (CorruptDataError, lambda: with_header(good(), shape=[-2, -20, -1])),
    "dtype-of-objects": (CorruptDataError, lambda: with_header(good(), dtype="O")),
    "header-nested-deep": (
        CorruptDataError,
        lambda: with_chunk(good(), Kind.TENSOR_HEADER, [b"[" * 100_000]),
    ),
    "rows-of-a-chunk": (
        CorruptDataError,
        lambda: with_chunk(
            with_header(good("pq"), shape=[-1, D]), Kind.ROW_BLOCKS, n_rows=(1 << 32) - 1
        ),
    ),
    "rows-without-blocks": (CorruptDataError, rows_without_blocks),
    "quantizers-in-a-circle": (CorruptDataError, references_in_a_circle),
    "quantizer-missing": (CorruptDataError, lambda: with_header(good(), quantizer=7)),
    "quantizer-twice": (CorruptDataError, lambda: two_of(Kind.QUANTIZER)),
    "name-twice": (CorruptDataError, two_of_one_name),
    "quantizer-newer": (
        UnsupportedVersionError,
        lambda: with_chunk(good(), Kind.QUANTIZER, [b"PQ\2" + fitted("trellis").to_bytes()[3:]]),
    ),
    "quantizer-of-hadamard-65536": (
        LimitError,
        lambda: with_settings("float16", {"d": 65536, "rotation": HADAMARD}, b""),
    ),
    "quantizer-json-of-64-mib": (CorruptDataError, swelling_json),
    "quantizer-matrix-that-swells": (CorruptDataError, swelling_matrix),
    "quantizer-arrays-shorter": (CorruptDataError, lambda: with_settings("trellis", {}, b"\1")),
    "escapes-65535": (CorruptDataError, lambda: escapes(lambda c, s, p: (65535, s, p))),
    "escapes-of-4-gib": (CorruptDataError, lambda: escapes(lambda c, s, p: (c, 2**32 - 1, p))),
    "escapes-descending": (CorruptDataError, lambda: escapes(lambda c, s, p: (c, s, p[::-1]))),
    "escapes-beyond-the-block": (
        CorruptDataError,
        lambda: escapes(lambda c, s, p: (c, s, [0, 65535])),
    ),
    "block-of-no-kind": (CorruptDataError, lambda: with_chunk(good(), Kind.ROW_BLOCKS, [b"\x09"])),
    "block-of-words-without-model": (
        CorruptDataError,
        lambda: with_chunk(good(), Kind.ROW_BLOCKS, [b"\3" + bytes(60)]),
    ),
    "alphabets-of-other-codes": (CorruptDataError, lambda: model(lambda k: UniformModel(k + 1))),
    "alphabets-2-to-the-36": (
        LimitError,
        lambda: with_chunk(
            good("polar-vq", layout="archive"),
            Kind.ENTROPY_MODEL,
            [b"\1" + number(1 << 20) + b"".join(number(65536 - i) + number(1) for i in range(999))
             + number(1) + number((1 << 20) - 999)],
        ),
    ),
    "alphabets-counted-100-times": (
        CorruptDataError,
        lambda: model(lambda k: AdaptiveModel(np.full(100, 65536), pooled=True)),
    ),
    "words-of-27-bit-keys": (CorruptDataError, lambda: words(5, 0, 0, 0)),
    "words-of-too-many-keys": (LimitError, lambda: words(20, 0, 0, 1 << 20)),
    "words-of-keys-beyond": (CorruptDataError, lambda: words(20, 0, 0, 2, 4095, 1, 1, 1)),
    "words-of-other-alphabets": (CorruptDataError, lambda: words(20, 0, 0, 2, 5, 1, 4, 1)),
    "chunks-that-overlap": (
        CorruptDataError,
        lambda: with_table(good(), borrowed),
    ),
    "chunks-of-2-to-the-20": (
        CorruptDataError,
        lambda: with_table(good(), lambda table: number(1 << 20) + table[1:]),
    ),
    "chunk-of-unknown-kind": (
        UnsupportedVersionError,
        lambda: with_table(good(), lambda table: table[:1] + b"\x4d" + table[2:]),
    ),
}  # fmt: skip


@pytest.mark.skipif(not WRITE, reason="POLARPACK_WRITE_GOLDEN=1 writes the files anew")
@pytest.mark.parametrize("name", LIES)
def test_write(name):
    FILES.mkdir(exist_ok=True)
    (FILES / f"{name}.polar").write_bytes(LIES[name][1]())


def test_all_are_there_and_small():
    assert {path.stem for path in FILES.iterdir()} == set(LIES)
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 300 << 10


@pytest.mark.parametrize("name", LIES)
def test_refused(name):
    data = (FILES / f"{name}.polar").read_bytes()
    error = LIES[name][0]
    result = outcome(data)
    assert type(result) is error, result
    # what is refused is the lie: no checksum is wrong
    assert str(result)
    assert "checksum" not in str(result)
    size, checksum = struct.unpack("<II", data[-8:])
    assert checksum == zlib.crc32(data[:10] + data[-8 - size : -4])
