"""Whole files made to deceive, under checksums that are right: each ends soon and cheaply, in a
tensor of the shape it declares or in a FormatError."""

import json
import os
import struct
from functools import cache, partial

import numpy as np
import pytest
from forging import (
    cheap,
    or_error,
    outcome,
    part_of,
    read_everything,
    refused,
    reseal,
    seal,
    unpack,
    unseal,
    with_chunk,
    with_header,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import SETTINGS, D, correlated, fitted

import polarpack as pp
from polarpack import container
from polarpack.container import Kind
from polarpack.entropy.model import AdaptiveModel, StaticModel, UniformModel, model_to_bytes

N = 700
ROWS = correlated(N, D, seed=4)
EDITS = int(os.environ.get("POLARPACK_FUZZ", "60"))  # more find more

JUNK = [
    None, True, False, -1, 0, 1, 2, 3, 255, 256, 4096, 65536, 1 << 31, 1 << 63, 1 << 70, -(1 << 70), 0.5, -0.0,
    1e-320, 1e-46, 1e39, 1e308, float("nan"), float("inf"), "", "x", "klt", "none", "hadamard", "f8", "raw",
    "integers", [], [[]], [1], [1, 2], [[0, 12, [8]]], {}, {"a": 1}, {"common": {}},
]  # fmt: skip


def read_rows(blob, rows):
    return pp.open(blob)["x"][rows]


@cache
def good(name="trellis", **options):
    return pp.compress(ROWS, quantizer=fitted(name), **options)


@pytest.fixture(autouse=True, scope="module")
def warm_up():
    """Kernels compile on first use; that is nobody's fault here."""
    for name in SETTINGS:
        read_everything(good(name, layout="archive"))
    read_everything(good("pq"))


# -- the header of a tensor ------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["trellis", "pq"])
@pytest.mark.parametrize(
    "changes",
    [
        {"name": ...}, {"name": None}, {"name": 3}, {"name": ["x"]}, {"name": "x" * 4097},
        {"shape": ...}, {"shape": None}, {"shape": "700"}, {"shape": {}}, {"shape": 700}, {"shape": [700.0, 12]},
        {"shape": [True, 12]}, {"shape": ["700", 12]}, {"shape": [[700], 12]}, {"shape": [-2, 12]},
        {"shape": [700, -12]}, {"shape": [-700, -12]}, {"shape": [-1, -1]}, {"shape": [-1, -1, 12]},
        {"shape": []}, {"shape": [0]}, {"shape": [12]}, {"shape": [8400]}, {"shape": [0, 12]},
        {"shape": [699, 12]}, {"shape": [701, 12]}, {"shape": [700, 13]}, {"shape": [700, 1]},
        {"shape": [12, 700]}, {"shape": [-1]}, {"shape": [-1, 0, 12]}, {"shape": [-1, 3, 12]},
        {"shape": [-1, 13]}, {"shape": [1 << 31, 12]}, {"shape": [1, 1 << 31]}, {"shape": [-1, 1 << 24]},
        {"shape": [0, 1 << 40]}, {"shape": [700, 12] + [1] * 31}, {"shape": [700] + [1] * 30 + [13]},
        {"dtype": ...}, {"dtype": None}, {"dtype": "int8"}, {"dtype": "float128"}, {"dtype": 32},
        {"dtype": ["float32"]}, {"dtype": "O"}, {"dtype": {}},
        {"layout": None}, {"layout": "columns"}, {"layout": 0}, {"layout": []},
        {"library": None}, {"library": "jax"}, {"library": 1}, {"device": None}, {"device": 3},
        {"quantizer": None}, {"quantizer": -1}, {"quantizer": 1}, {"quantizer": 1.0}, {"quantizer": []},
        {"quantizer": {}}, {"quantizer": 1 << 70}, {"quantizer": ...},
        {"max_error": "0.1"}, {"max_error": -0.1}, {"max_error": float("nan")}, {"max_error": []},
    ],
    ids=str,
)  # fmt: skip
def test_lies_of_a_header(name, changes):
    refused(with_header(good(name), **changes))


@pytest.mark.parametrize(
    "shape", [[1 << 40, 1 << 40], [1 << 62] * 3, [-1, 1 << 62], [1 << 64], [10**4000, 1]]
)
def test_shapes_beyond_any_file(shape):
    refused(with_header(good(), shape=shape), pp.LimitError)


@pytest.mark.parametrize("changes", [{"layout": "rows"}, {"dtype": "float64"}, {"max_error": 3}])
def test_another_truth(changes):
    """What a header may say as well: it is read so, or found not to fit; never confused."""
    for name in ("trellis", "pq"):
        result = outcome(with_header(good(name), **changes))
        assert isinstance(result, dict | pp.CorruptDataError)
        if isinstance(result, dict):
            assert result["x"].shape == (N, D)


def test_members_of_a_later_version():
    """Left out, or, with a capital letter, refused."""
    assert isinstance(outcome(with_header(good(), later=[1])), dict)
    refused(with_header(good(), Later=None), pp.UnsupportedVersionError)


def test_shapes_that_hold_as_many_rows():
    for shape in (
        [350, 2, D],
        [1, 700, D],
        [-1, D],
        [-1, 7, D],
        [7, 10, 10, D],
        [700] + [1] * 30 + [D],
    ):
        result = outcome(with_header(good(), shape=shape))
        assert np.array_equal(result["x"].reshape(N, D), pp.decompress(good()))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"{}", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"\x00", b"{'name': 1}", b"[" * 100000, b'{"a":' * 50000,
     b"1" * 10000, b'{"name": "x"} trailing', b"\xef\xbb\xbf{}", b"NaN"],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_headers_that_are_no_objects(text):
    refused(with_chunk(good(), Kind.TENSOR_HEADER, [text]))


def test_headers_cut_short_and_too_long():
    text = part_of(good(), Kind.TENSOR_HEADER)
    for length in range(len(text)):
        refused(with_chunk(good(), Kind.TENSOR_HEADER, [text[:length]]))
    refused(with_chunk(good(), Kind.TENSOR_HEADER, [text + b" " * (1 << 20)]), pp.LimitError)
    for parts in ([], [text, b""], [text, text]):
        refused(with_chunk(good(), Kind.TENSOR_HEADER, parts))


# -- chunks: missing, twice, of others -------------------------------------------------------------
def test_chunks_missing_twice_or_of_other_tensors():
    for name in ("trellis", "polar-vq"):
        chunks = [
            tuple(c) for c in unpack(pp.compress(ROWS, quantizer=fitted(name), layout="archive"))
        ]
        for i, chunk in enumerate(chunks):
            refused(container.pack(chunks[:i] + chunks[i + 1 :])) if i else None
            refused(container.pack([*chunks, chunk]))
            refused(container.pack([*chunks[:i], (chunk[0], 5, *chunk[2:]), *chunks[i + 1 :]]))
            if chunk[0] != Kind.ROW_BLOCKS:
                refused(
                    container.pack(
                        [*chunks[:i], (*chunk[:3], [*chunk[3], b"more"]), *chunks[i + 1 :]]
                    )
                )
        assert isinstance(outcome(container.pack(chunks[1:])), pp.CorruptDataError)  # no header
        assert outcome(container.pack([])) == {}
        header = chunks[0]
        refused(container.pack([header, *chunks[1:], (1, 1, 0, header[3])]))  # one name twice
        ancillary = container.pack([(200, 0, 9, [b"a later version's"]), *chunks, (255, 7, 0, [])])
        assert np.array_equal(outcome(ancillary)["x"], pp.decompress(container.pack(chunks)))


def test_a_quantizer_by_its_hash_is_for_the_caller():
    blob = with_header(good(), quantizer="no such hash")
    with pytest.raises(pp.InputError, match="no such hash"):
        pp.open(blob)["x"][0]


@pytest.mark.parametrize("n_rows", [1, 699, 701, 4096, 1 << 17, 1 << 24, (1 << 32) - 1])
@pytest.mark.parametrize("d", [1, D])
def test_chunks_that_lie_about_rows(n_rows, d):
    """Exact or fixed-width rows tell; a block of an entropy coder holds as many as it is told."""
    blob = pp.compress(ROWS[:, :d], max_error=0)
    for shape in ([N, d], [n_rows, d], [-1, d]):
        refused(with_chunk(with_header(blob, shape=shape), Kind.ROW_BLOCKS, n_rows=n_rows))
    for name in ("pq", "trellis"):
        blob = good(name)
        for shape in ([n_rows, D], [-1, D]):
            lying = with_chunk(with_header(blob, shape=shape), Kind.ROW_BLOCKS, n_rows=n_rows)
            if n_rows <= 4096 and name == "trellis":
                result = outcome(lying)
                assert isinstance(result, pp.CorruptDataError) or result["x"].shape == (n_rows, D)
            else:
                refused(lying)


def test_many_empty_blocks_declare_no_room():
    """A megabyte of blocks of nothing may not make a reader clear room for billions of rows."""
    chunks = [tuple(c) for c in unpack(pp.compress(ROWS[:, :1], max_error=0))]
    text = json.loads(chunks[0][3][0]) | {"shape": [(1 << 28) * 3, 1]}
    empty = (int(Kind.ROW_BLOCKS), 0, 1 << 28, [b""] * (1 << 16))
    header = (1, 0, 0, [json.dumps(text).encode()])
    assert chunks[1][0] == Kind.WORD_MODEL
    for side in ([header], [header, chunks[1]]):
        blob = container.pack([*side, empty, empty, empty])
        for read in (5, [5, 1 << 29], slice(None)):
            error = cheap(partial(or_error, read_rows, blob, read))
            assert isinstance(error, pp.CorruptDataError)


# -- blocks ----------------------------------------------------------------------------------------
def blocks_to_break():
    for name in (
        "trellis",
        "polar trellis",
        "classes",
        "polar-vq",
        "pq",
        "float16",
        "hadamard grid",
    ):
        yield name, good(name)
    with_escapes = ROWS.copy()
    with_escapes[[3, 600]] *= np.float32(1e20)
    for name in ("trellis", "pq"):
        yield f"{name} escapes", pp.compress(with_escapes, quantizer=fitted(name), max_error=0.9)
    yield "words", pp.compress(ROWS, max_error=0)
    noise = np.random.default_rng(0).integers(0, 1 << 16, (N, D), np.uint16).view(np.float16)
    yield "raw", pp.compress(noise, max_error=0, nonfinite="raw")


BROKEN = dict(blocks_to_break())


@pytest.mark.parametrize("name", BROKEN)
def test_blocks_of_other_bytes(name):
    blob = BROKEN[name]
    block = part_of(blob, Kind.ROW_BLOCKS)
    rng = np.random.default_rng(0)
    others = [
        b"",
        b"\0",
        b"\1",
        b"\2",
        b"\3",
        b"\xff",
        b"\2" * 7,
        b"\2" + b"\xff" * 50,
        b"\1" + bytes(3),
        b"\1" + b"\xff" * 9,
    ]
    others += [block[:length] for length in (1, 2, 3, 6, 7, 8, 20, len(block) // 2, len(block) - 1)]
    others += [
        block + b"\0",
        block + block,
        b"\0" + block[1:],
        b"\1" + block[1:],
        b"\2" + block[1:],
        b"\3" + block[1:],
    ]
    others += [
        bytes([k]) + rng.bytes(int(n)) for k in (0, 1, 2, 3) for n in rng.integers(0, 3000, 4)
    ]
    for other in others:
        result = outcome(with_chunk(blob, Kind.ROW_BLOCKS, [other, *unpack(blob)[-1][3][1:]]))
        assert isinstance(result, pp.CorruptDataError) or result["x"].shape == (N, D)


@pytest.mark.parametrize("name", ["trellis escapes", "pq escapes"])
def test_lies_about_escapes(name):
    blob = BROKEN[name]
    chunk = next(c for c in unpack(blob) if c[0] == Kind.ROW_BLOCKS)
    j = next(j for j, part in enumerate(chunk[3]) if part[0] == 2)
    block = chunk[3][j]
    count, size = struct.unpack_from("<HI", block, 1)
    exact, coded = block[7 + 2 * count : len(block) - size], block[len(block) - size :]
    places = list(struct.unpack_from(f"<{count}H", block, 7))

    def lying(count=count, size=size, places=places, exact=exact, coded=coded):
        data = b"\2" + struct.pack("<HI", count, size)
        return data + struct.pack(f"<{len(places)}H", *places) + exact + coded

    def told(part):
        return with_chunk(blob, Kind.ROW_BLOCKS, [*chunk[3][:j], part, *chunk[3][j + 1 :]])

    assert lying() == block and isinstance(outcome(told(block)), dict)
    for lie in (
        {"count": 0}, {"count": count + 1}, {"count": 65535}, {"size": 0}, {"size": size + 1},
        {"size": (1 << 32) - 1}, {"size": size - 1}, {"places": [65535] * count}, {"places": [4096] * count},
        {"places": places[::-1]} if count > 1 else {"places": [N] * count}, {"exact": exact[:-1]},
        {"exact": exact + exact}, {"coded": b""}, {"coded": coded + b"\0"},
        {"places": [], "count": 0, "exact": b""},
    ):  # fmt: skip
        refused(told(lying(**lie)))
    twice = {"count": 2 * count, "places": sorted(places * 2), "exact": exact + exact}
    refused(told(lying(**twice)))


# -- the quantizer ---------------------------------------------------------------------------------
def use_quantizer(data):
    """from_bytes and all that can be done then."""
    q = pp.PolarQuantizer.from_bytes(data)
    assert q.d_ <= 65536 and q.n_fields >= 0
    if q.d_ <= 4096 and q.n_fields <= 1 << 16:
        for codes in (
            np.zeros((2, q.n_fields), np.uint16),
            np.tile(q.alphabet_sizes - 1, (2, 1)),
        ):
            y = q.decode(codes)
            assert y.shape == (2, q.d_) and y.dtype == np.float32
        q.report()
        repr(q)
    return q


def try_quantizer(data, memory=True):
    """A quantizer that works, or a FormatError."""
    work = partial(or_error, use_quantizer, data)
    return cheap(work) if memory else work()


def paths(value, path=()):
    """All places in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from paths(inner, (*path, i))


def changed(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize("name", SETTINGS)
def test_quantizers_whose_settings_lie(name):
    config, listed, blobs = unseal(fitted(name).to_bytes())
    assert isinstance(try_quantizer(seal(config, listed, blobs)), pp.PolarQuantizer)
    few = name not in ("polar trellis", "classes", "polar-vq", "int8 rows")
    for path in list(paths([config, listed])):
        for new in JUNK[:: 4 if few else 1]:
            lying = changed([config, listed], path, new)
            text = json.dumps(lying).encode()
            try:
                try_quantizer(seal(None, None, blobs, text=text), memory=False)
            except Exception as error:
                raise AssertionError(
                    f"{path} = {new!r}: {type(error).__name__}: {error}"
                ) from error


@pytest.mark.parametrize("name", SETTINGS)
def test_quantizers_with_keys_missing(name):
    config, listed, blobs = unseal(fitted(name).to_bytes())
    for path in paths(config):
        if path and isinstance(path[-1], str):
            inner = config
            for key in path[:-1]:
                inner = inner[key]
            without = {k: v for k, v in inner.items() if k != path[-1]}
            try_quantizer(seal(changed(config, path[:-1], without), listed, blobs))
    for i in range(len(listed)):
        length = sum(entry[5] for entry in listed[:i])
        rest = blobs[:length] + blobs[length + listed[i][5] :]
        result = try_quantizer(seal(config, listed[:i] + listed[i + 1 :], rest))
        if listed[i][1] not in ("offset", "mean"):
            assert isinstance(result, pp.CorruptDataError), listed[i]
        doubled = blobs[: length + listed[i][5]] + blobs[length:]
        try_quantizer(seal(config, [*listed[: i + 1], listed[i], *listed[i + 1 :]], doubled))


@pytest.mark.parametrize("name", SETTINGS)
def test_quantizers_whose_arrays_lie(name):
    config, listed, blobs = unseal(fitted(name).to_bytes())
    at = 0
    rng = np.random.default_rng(0)
    for i, entry in enumerate(listed):
        stage, key, dtype, shape, coding, length = entry
        blob = blobs[at : at + length]
        others = [
            bytes(length),
            b"\xff" * length,
            blob[::-1],
            rng.bytes(length),
            b"\x7f\x80" * (length // 2) + b"\0" * (length % 2),
        ]
        others += [b"", blob[:-1], blob + b"\0", blob * 2]
        for other in others:
            new = [*listed[:i], [stage, key, dtype, shape, coding, len(other)], *listed[i + 1 :]]
            data = seal(config, new, blobs[:at] + other + blobs[at + length :])
            try:
                try_quantizer(data)
            except Exception as error:
                raise AssertionError(
                    f"{stage}.{key} {other[:9]!r}: {type(error).__name__}: {error}"
                ) from error
        for other in (
            [],
            [0],
            [*shape, 1],
            [*shape, 0],
            shape[::-1],
            [1 << 31],
            [1 << 20, 1 << 20],
            [-1, *shape[1:]],
        ):
            try_quantizer(seal(config, changed(listed, (i, 3), other), blobs))
        at += length


def test_bytes_of_a_quantizer_that_lie_about_their_lengths():
    config, listed, blobs = unseal(fitted("pq").to_bytes())
    for size in (0, 1, 1 << 20, (1 << 32) - 1):
        assert isinstance(try_quantizer(seal(config, listed, blobs, size=size)), pp.FormatError)
    for text in (
        b"",
        b"[]",
        b"[1]",
        b"[[],[]]",
        b"{}",
        b"[{}, []]",
        b"[" * 200000,
        b"\xff",
        b"[{}, [[]]]",
        b"[{}, {}]",
    ):
        assert isinstance(try_quantizer(seal(None, None, b"", text=text)), pp.CorruptDataError)
    assert isinstance(try_quantizer(seal(config, listed, blobs + b"\0")), pp.CorruptDataError)
    for version in (b"PQ\0", b"PQ\2"):
        other = version + fitted("pq").to_bytes()[3:]
        assert isinstance(try_quantizer(other), pp.UnsupportedVersionError)


def test_small_bytes_that_swell():
    """Deflated JSON, coded matrices and structured rotations may not become gigabytes."""
    for text in (
        b"[{}, [" + b"[]," * 5_000_000 + b"[]]]",
        b" " * (1 << 26),
        b'["' + b"x" * (1 << 26) + b'"]',
    ):
        assert isinstance(try_quantizer(seal(None, None, b"", text=text)), pp.FormatError)
    heads = {
        "heads": [[i, i + 1, []] for i in range(65536)],
        "beam": 1,
        "spherical_first": False,
        "seed": 0,
    }
    config = {
        "d": 65536,
        "fine_kind": "codebook",
        "exponent": 0,
        "rotation": {"kind": "none", "center": False},
    }
    try_quantizer(seal(config | {"fine": heads}, [], b""))


@pytest.mark.parametrize("d", [4096, 8192, 65536])
def test_a_structured_rotation_that_swells(d):
    """It takes no bytes in a file, but a (d, d) matrix of small integers in memory."""
    config = {
        "d": d,
        "fine_kind": "float16",
        "exponent": 0,
        "rotation": {"kind": "hadamard", "center": False, "seed": 1},
    }
    try_quantizer(seal(config, [], b""))


def test_a_zero_matrix_that_swells():
    from polarpack.entropy.magnitude import integers_to_bytes

    config, listed, _ = unseal(pp.PolarQuantizer(fine="float16", rotation="random", radius_bits=0, center=False)
                               .fit(ROWS).to_bytes())  # fmt: skip
    blob = integers_to_bytes(np.zeros((2048, 2048), np.int16))
    for d in (2048, 30000):
        lying = [[*listed[0][:3], [d, 2048], "integers", len(blob)]]
        try_quantizer(seal(config | {"d": d}, lying, blob))


def test_a_quantizer_of_another_width():
    other = pp.PolarQuantizer(**SETTINGS["trellis"]).fit(correlated(100, 5))
    refused(with_chunk(good(), Kind.QUANTIZER, [other.to_bytes()]))
    for junk in (b"", b"PQ", b"PQ\1" + bytes(40), fitted("trellis").to_bytes()[:-1]):
        refused(with_chunk(good(), Kind.QUANTIZER, [junk]))
    newer = fitted("trellis").to_bytes()
    refused(
        with_chunk(good(), Kind.QUANTIZER, [newer[:2] + b"\x02" + newer[3:]]),
        pp.UnsupportedVersionError,
    )


# -- the entropy model -----------------------------------------------------------------------------
def test_models_that_do_not_fit():
    blob = good("polar-vq")
    sizes = fitted("polar-vq").alphabet_sizes
    for model in (
        UniformModel(sizes[:-1]),
        UniformModel(np.append(sizes, 2)),
        UniformModel(sizes + 1),
        AdaptiveModel(sizes[::-1] * 2),
        UniformModel(np.full(1 << 20, 2)),
        UniformModel(np.full(1 << 20, 65536)),
        AdaptiveModel(np.full(100, 65536), pooled=True),
    ):
        refused(with_chunk(blob, Kind.ENTROPY_MODEL, [model_to_bytes(model)]))
    for model in (
        UniformModel(sizes),
        AdaptiveModel(sizes),
        StaticModel.fit(np.zeros((1, 7), int), sizes),
    ):
        result = outcome(with_chunk(blob, Kind.ENTROPY_MODEL, [model_to_bytes(model)]))
        assert isinstance(result, pp.CorruptDataError) or result["x"].shape == (N, D)
    for junk in (b"", b"\0", b"\1", b"\2" * 40, b"\3" + b"\xff" * 40, b"\x09" + bytes(9)):
        assert isinstance(outcome(with_chunk(blob, Kind.ENTROPY_MODEL, [junk])), pp.FormatError)


def test_tables_that_swell():
    sizes = np.full(64, 65536)
    model = StaticModel(sizes, [np.ones(65536, np.uint8)] * 64, np.arange(64))
    x = correlated(200, 64)
    q = pp.PolarQuantizer(fine="float16", radius_bits=0).fit(x)
    blob = pp.compress(x, quantizer=q, layout="archive")
    header, quantizer, _, rows = unpack(blob)
    chunks = [
        header,
        quantizer,
        [3, 0, 0, [model_to_bytes(model)]],
        [*rows[:3], [b"\1" + bytes(64)] * len(rows[3])],
    ]
    result = outcome(container.pack([tuple(c) for c in chunks]))
    assert isinstance(result, pp.CorruptDataError) or result["x"].shape == (200, 64)


# -- anything --------------------------------------------------------------------------------------
@st.composite
def edited(draw, data):
    """Bytes after a few edits."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "set", "insert", "delete", "cut", "repeat"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set" and data:
            data[at] = draw(st.sampled_from([0, 1, 2, 127, 128, 255]))
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif how == "delete":
            del data[at : at + draw(st.integers(1, 8))]
        elif how == "cut":
            del data[at:]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


@pytest.mark.parametrize("name", BROKEN)
@settings(max_examples=EDITS)
@given(data=st.data())
def test_random_edits_under_right_checksums(name, data):
    chunks = unpack(BROKEN[name])
    count = data.draw(st.integers(1, 2))
    places = st.integers(0, len(chunks) - 1)
    for i in data.draw(st.lists(places, min_size=count, max_size=count, unique=True)):
        chunk = chunks[i]
        if data.draw(st.integers(0, 9)) == 0:
            chunk[data.draw(st.integers(1, 2))] = data.draw(
                st.sampled_from([0, 1, 2, N - 1, N + 1, 65535])
            )
            continue
        j = data.draw(st.integers(0, len(chunk[3]) - 1))
        part = chunk[3][j]
        if chunk[0] == Kind.QUANTIZER and data.draw(st.booleans()):
            config, listed, blobs = unseal(part)
            text = data.draw(edited(json.dumps([config, listed]).encode()))
            part = seal(None, None, blobs, text=text)
        elif chunk[0] == Kind.QUANTIZER:
            part = reseal(part, data.draw(edited(part[7:])))
        else:
            part = data.draw(edited(part))
        chunk[3][j] = part
    try:
        blob = container.pack([tuple(c) for c in chunks])
    except pp.InputError:  # a lie that even the container refuses to write
        return
    result = outcome(blob)
    if isinstance(result, dict):
        assert all(isinstance(x, np.ndarray) for x in result.values())


# -- every byte and every bit ----------------------------------------------------------------------
def tiny_files():
    """Small files of each way of storing rows."""
    rows = correlated(24, D, seed=1)
    with_escape = rows.copy()
    with_escape[5] *= np.float32(1e20)
    yield "trellis", pp.compress(rows, quantizer=fitted("native trellis"))
    yield "escapes", pp.compress(with_escape, quantizer=fitted("hadamard grid"), max_error=0.5)
    yield "words", pp.compress(np.tile(np.round(8 * rows), (3, 1)), max_error=0)


TINY = dict(tiny_files())


@pytest.mark.parametrize("name", TINY)
def test_cut_at_every_byte(name):
    blob = TINY[name]
    for length in range(len(blob)):
        with pytest.raises(pp.FormatError):
            pp.decompress(blob[:length])
        rest = or_error(read_everything, blob[:length], on_error="skip")
        assert isinstance(rest, dict | pp.FormatError)


@pytest.mark.parametrize("name", TINY)
def test_every_bit_flipped(name):
    """Header, tables and thousands of bits of payload: none goes unnoticed."""
    blob = TINY[name]
    assert len(blob) * 8 > 3000
    for bit in range(8 * len(blob)):
        wrong = bytearray(blob)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(pp.FormatError):
            pp.decompress(wrong)


def test_flips_beside_what_is_read_do_no_harm():
    """Damage to one block is found where it is read, and leaves the others as they were."""
    rows = correlated(6000, D, seed=1)
    blob = pp.compress(rows, max_error=0)
    whole = pp.decompress(blob)
    rng = np.random.default_rng(0)
    for at in rng.integers(len(blob) // 3, len(blob) - 100, 20):
        wrong = bytearray(blob)
        wrong[at] ^= 16
        with pp.open(bytes(wrong), on_error="skip") as f:
            t = f["x"]
            y = t[...]
            assert 0 < len(t.damaged_rows) < len(rows)
            kept = np.setdiff1d(np.arange(len(rows)), t.damaged_rows)
            assert np.array_equal(y[kept], whole[kept])
            assert not y[t.damaged_rows].any()
