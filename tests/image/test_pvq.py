"""Pictures to files and back: every size and mode, targets, regions, damage."""

import io
import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import polarpack_image as pvq
from polarpack.errors import (
    CorruptDataError,
    FormatError,
    InputError,
    LimitError,
    UnsupportedVersionError,
)
from polarpack_image import bitstream, codec, pixels
from polarpack_image.benchmark import msssim
from polarpack_image.demo import PHOTOGRAPH
from polarpack_image.transform import MAX_RECON, LinearTransform, mirrored, to_pixels

N_HEADS = codec.default_codec().transform.n_channels // 8


def photograph(height, width, seed=0):
    """Smooth light, edges and some grain: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    light = 120 + 50 * np.sin(x / 17 + y / 29) + 30 * (x + 2 * y > (width + height) / 2)
    colour = np.stack([light, light * 0.9 + 10, 200 - light * 0.5], axis=2)
    return np.clip(colour + rng.normal(0, 3, colour.shape), 0, 255).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / (np.mean((np.asarray(a).astype(float) - b) ** 2) + 1e-9))


@pytest.fixture(scope="module")
def small():
    return photograph(40, 56)


@pytest.fixture(scope="module")
def data(small):
    return pvq.compress(small, 80)


@given(st.integers(1, 34), st.integers(1, 34), st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=25)
def test_any_size_and_mode(height, width, n):
    rgb = photograph(height, width)
    image = np.dstack([rgb, rgb[:, :, :1]])[:, :, :n] if n > 2 else rgb[:, :, :n]
    decoded = pvq.decompress(pvq.compress(image, 70))
    assert decoded.size == (width, height)
    assert decoded.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[n]
    if n in (2, 4):
        assert (np.asarray(decoded)[:, :, -1] == image[:, :, -1]).all()
    assert psnr(np.asarray(decoded).reshape(image.shape), image) > 28


def test_quality_is_monotone_and_spans(small):
    sizes, qualities = [], []
    for quality in (0, 25, 50, 75, 100):
        data = pvq.compress(small, quality)
        sizes.append(len(data))
        qualities.append(psnr(pvq.decompress(data), small))
        assert bitstream.read_header(data)[0].quality == quality
    assert sizes == sorted(sizes) and qualities == sorted(qualities)
    assert qualities[-1] > 41 and sizes[0] < sizes[-1] / 10


def test_targets(small):
    data = pvq.compress(small, psnr=35.0)
    assert 35.0 <= psnr(pvq.decompress(data), small) < 35.4
    data = pvq.compress(small, bpp=2.0)
    assert 1.8 * small.shape[0] * small.shape[1] <= 8 * len(data) <= 2.0 * 40 * 56
    with pytest.raises(InputError, match="cannot be reached"):
        pvq.compress(small, bpp=0.01)
    assert psnr(pvq.decompress(pvq.compress(small, psnr=60.0)), small) >= 60


def test_same_bytes_and_pixels_every_time(small, data):
    assert pvq.compress(small, 80) == data
    assert (np.asarray(pvq.decompress(data)) == np.asarray(pvq.decompress(data))).all()


def test_threads_and_tiles_change_nothing(monkeypatch):
    """Tiles much smaller than in real files, so that there are many; seams would show as error."""
    monkeypatch.setattr(bitstream, "TILE", 4)
    monkeypatch.setattr(codec, "TILE", 4)
    image = photograph(75, 90)
    decoded = []
    for threads in ("1", "2"):
        monkeypatch.setenv("POLARPACK_THREADS", threads)
        data = pvq.compress(image, 60)
        decoded.append(np.asarray(pvq.decompress(data)))
    assert (decoded[0] == decoded[1]).all()
    whole = decoded[0]
    for box in ((0, 0, 90, 75), (31, 32, 33, 65), (64, 8, 90, 9), (0, 74, 1, 75), (29, 0, 90, 41)):
        left, top, right, bottom = box
        part = np.asarray(pvq.decompress(data, region=box))
        assert (part == whole[top:bottom, left:right]).all(), box
    error = ((whole.astype(float) - image) ** 2).mean(axis=2)
    edges = np.zeros((75, 90), bool)
    for at in (32, 64):
        edges[at - 1 : at + 1] = edges[:, at - 1 : at + 1] = True
    assert error[edges].mean() < 1.3 * error[~edges].mean()


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 57, 5), (5, 5, 4, 9)])
def test_wrong_regions(data, box):
    with pytest.raises(InputError, match="region"):
        pvq.decompress(data, region=box)


def test_metadata_and_conversions(small):
    image = Image.fromarray(small)
    exif = Image.Exif()
    exif[0x010E] = "a title"
    icc = bytes(range(256)) * 3
    data = pvq.compress(image, 50, icc_profile=icc, exif=exif.tobytes())
    decoded = pvq.decompress(data)
    assert decoded.info["icc_profile"] == icc
    assert decoded.info["exif"] == exif.tobytes()
    assert decoded.getexif()[0x010E] == "a title"

    palette = image.quantize(16)
    assert pvq.decompress(pvq.compress(palette)).mode == "RGB"
    palette.info["transparency"] = 0
    assert pvq.decompress(pvq.compress(palette)).mode == "RGBA"
    assert pvq.decompress(pvq.compress(image.convert("1"))).mode == "L"
    with pytest.warns(UserWarning, match="CMYK"):
        assert pvq.decompress(pvq.compress(image.convert("CMYK"))).mode == "RGB"
    deep = small.astype(np.uint16) * 257
    with pytest.warns(UserWarning, match="16-bit"):
        assert pvq.compress(deep, 80) == pvq.compress(small, 80)
    with pytest.warns(UserWarning, match="16-bit"):
        assert pvq.decompress(pvq.compress(Image.fromarray(deep[:, :, 0]))).mode == "L"


def test_tune_says_what_bytes_are_spent_on():
    """In files of at most as many bytes, each is ahead by its own measure, and readers
    need not know."""
    image = np.asarray(Image.open(PHOTOGRAPH).convert("RGB"))[:256, :384]
    decoded = {
        tune: np.asarray(pvq.decompress(pvq.compress(image, bpp=0.4, tune=tune)))
        for tune in ("psnr", "msssim")
    }
    assert psnr(decoded["psnr"], image) > psnr(decoded["msssim"], image) + 0.05
    similar = {tune: 1 - msssim(image, pixels) for tune, pixels in decoded.items()}
    assert similar["msssim"] < 0.95 * similar["psnr"]


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), {"bands": False}, "1..4"),
        (np.zeros((4,), np.uint8), {}, "1..4"),
        (np.zeros((0, 4, 3), np.uint8), {}, "pixels"),
        (np.zeros((4, 4, 3)), {"bands": False}, "float64"),
        (np.zeros((4, 4, 3), np.int32), {}, "int32"),
        (np.full((4, 4, 3), np.nan), {}, "finite"),
        (np.full((4, 4, 5), 1e31), {}, "finite"),
        (np.zeros((4, 0, 5)), {}, "(H, W, C)"),
        (Image.new("L", (4, 4)), {"bands": True}, "array of bands"),
        (np.zeros((4, 4, 5)), {"exif": b"x"}, "EXIF"),
        ("text", {}, "No such file"),
        (7, {}, "expected a Pillow image"),
        (Image.new("F", (4, 4)), {}, "mode F"),
        (np.zeros((4, 4), np.uint8), {"quality": 101}, "0..100"),
        (np.zeros((4, 4), np.uint8), {"quality": float("nan")}, "0..100"),
        (np.zeros((4, 4), np.uint8), {"quality": 5, "bpp": 1}, "at most one"),
        (np.zeros((4, 4), np.uint8), {"bpp": -1}, "above 0"),
        (np.zeros((4, 4), np.uint8), {"effort": 0}, "effort"),
        (np.zeros((4, 4), np.uint8), {"tune": "vmaf"}, "tune"),
        (np.zeros((4, 4), np.uint8), {"tune": ["psnr"]}, "tune"),
        (np.zeros((4, 4), np.uint8), {"quantizer": ["dq8"]}, "quantizer"),
        (np.zeros((4, 4, 5), np.uint8), {"tune": "msssim"}, "tune"),
        (np.zeros((4, 4), np.uint8), {"quantizer": "dq9"}, "quantizer"),
        (np.zeros((4, 4), np.uint8), {"exif": "x"}, "exif"),
    ],
)
def test_wrong_arguments(image, options, message):
    with pytest.raises((InputError, FileNotFoundError), match=message):
        pvq.compress(image, **options)


# -- layers and cut files ------------------------------------------------------------------------
def test_layers_refine_and_a_cut_file_opens_when_asked(small, data):
    header, position = bitstream.read_header(data)
    assert len(header.layers) == 3
    errors = [psnr(pvq.decompress(data, layers=n), small) for n in (1, 2, 3)]
    assert errors[0] < errors[1] < errors[2]
    with pytest.raises(CorruptDataError):
        pvq.decompress(data[:-1])
    cut = pvq.decompress(data[:-1], partial=True)
    assert psnr(cut, small) == pytest.approx(errors[1])
    assert pvq.decompress(data[:position], partial=True).size == (56, 40)
    with pytest.raises(InputError, match="layers"):
        pvq.decompress(data, layers=4)


def test_the_more_of_a_file_the_better_the_picture(monkeypatch):
    """Coarse layers of all tiles come first; a part of a file gives what it holds and no more."""
    for module in (bitstream, codec):
        monkeypatch.setattr(module, "TILE", 4)
    image = photograph(40, 70)
    data = pvq.compress(image, 85)
    header, position = bitstream.read_header(data)
    assert header.tiles == (2, 3) and len(header.layers) == 3
    ends = [position]
    for _, payload in bitstream._pieces(data, position, True):
        ends.append(ends[-1] + 5 + len(bitstream.varint(len(payload))) + len(payload))
    assert ends[-1] == len(data)
    quality = [psnr(pvq.decompress(data[:end], partial=True), image) for end in ends]
    assert quality == sorted(quality)
    assert quality[6] > quality[0] + 8 and quality[12] > quality[6] + 2  # mean colours; a quarter
    assert psnr(pvq.decompress(data[: ends[6]], partial=True), image) == quality[6]
    within = pvq.decompress(
        data[: ends[7] - 1], partial=True
    )  # a section cut short counts for none
    assert psnr(within, image) == quality[6]
    assert psnr(pvq.decompress(data, layers=1), image) == quality[6]
    for end in ends[:-1]:
        with pytest.raises(CorruptDataError):
            pvq.decompress(data[:end])


def test_every_cut_is_an_error(data):
    for length in (*range(60), *range(60, len(data), 37)):
        with pytest.raises(FormatError):
            pvq.decompress(data[:length])
    with pytest.raises(FormatError):
        pvq.decompress(data + b"\0")


def test_every_flipped_header_bit_and_many_others_are_errors(data):
    end = bitstream.read_header(data)[1]
    rng = random.Random(0)
    places = [*range(8 * end), *(rng.randrange(8 * end, 8 * len(data)) for _ in range(150))]
    for place in places:
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(FormatError):
            pvq.decompress(bytes(broken))


def sealed(fields):
    """A header of these fields with a checksum that holds."""
    start = bitstream.MAGIC + bytes([bitstream.VERSION]) + fields
    return start + zlib.crc32(start).to_bytes(4, "little")


def fields(
    mode=2, quantizer=8, quality=50, step=4000, weights=None, width=56, height=40, layers=None
):
    name = codec.default_codec().weights_hash if weights is None else weights
    layers = (N_HEADS,) if layers is None else layers
    out = bytes([mode, quantizer, quality]) + step.to_bytes(2, "little") + name
    return out + bitstream.varint(width) + bitstream.varint(height) + bytes([len(layers), *layers])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": 9}, UnsupportedVersionError),
        ({"mode": 2 + 16 * 9}, UnsupportedVersionError),
        ({"mode": 2 + 16 * 3}, CorruptDataError),
        ({"quantizer": 3}, UnsupportedVersionError),
        ({"quality": 101}, CorruptDataError),
        ({"step": 0}, CorruptDataError),
        ({"width": 0}, CorruptDataError),
        ({"width": 1 << 17}, LimitError),
        ({"width": 1 << 16, "height": 1 << 16}, LimitError),
        ({"layers": ()}, CorruptDataError),
        ({"layers": (5, 5, N_HEADS)}, CorruptDataError),
        ({"layers": (N_HEADS - 1,)}, CorruptDataError),
        ({"layers": (N_HEADS + 1,)}, CorruptDataError),
        ({"weights": b"abcd"}, UnsupportedVersionError),
        ({}, CorruptDataError),  # no sections
        ({"mode": 4}, CorruptDataError),
    ],
)
def test_lying_headers(options, error):
    with pytest.raises(error):
        pvq.decompress(sealed(fields(**options)))


@pytest.mark.parametrize("version", [0, 7])  # the drafts, and what is to come
def test_another_version_is_named(version):
    start = bitstream.MAGIC + bytes([version]) + fields()
    with pytest.raises(UnsupportedVersionError, match=f"version {version}"):
        pvq.decompress(start + zlib.crc32(start).to_bytes(4, "little"))


def test_sections_in_the_wrong_order_or_damaged(small):
    rgba = np.dstack([small, small[:, :, 0]])
    data = pvq.compress(rgba, 30, icc_profile=b"icc", exif=b"exif")
    header, position = bitstream.read_header(data)
    pieces = [bitstream._section(k, p) for k, p in bitstream._pieces(data, position, True)]
    assert data == header.to_bytes() + b"".join(pieces)
    swapped = [*pieces[1::-1], *pieces[2:]]
    for wrong in (swapped, pieces[:2] + pieces[3:], [*pieces, pieces[-1]], [pieces[0], *pieces]):
        with pytest.raises(CorruptDataError):
            pvq.decompress(header.to_bytes() + b"".join(wrong))
    for kind, bomb in ((1, b"\x00" * 9), (3, b"\0" + zlib.compress(bytes(1 << 22)))):
        section = bitstream._section(bitstream.Kind(kind), bomb)
        with pytest.raises(FormatError):
            wrong = [section if p[0] == kind else p for p in pieces]
            pvq.decompress(header.to_bytes() + b"".join(wrong))


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_noise_behind_a_good_header(noise):
    with pytest.raises(FormatError):
        pvq.decompress(sealed(fields()) + noise)


# -- alpha, transform --------------------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_alpha_is_exact(height, width, seed):
    rng = np.random.default_rng(seed)
    alpha = rng.integers(0, 256, (height, width)).astype(np.uint8) // rng.integers(1, 200)
    alpha = alpha.astype(np.uint8)
    assert (pixels.unpack_alpha(pixels.pack_alpha(alpha), height, width) == alpha).all()


def test_mirrored_positions():
    assert mirrored(np.arange(-5, 8), 3).tolist() == [1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1]
    assert mirrored(np.arange(-2, 3), 1).tolist() == [0] * 5


@pytest.fixture(scope="module")
def transform():
    return codec.default_codec().transform


def test_synthesis_against_its_definition(transform):
    """A plain twin: every atom added where it belongs, mirrored at the borders by brute force."""
    rng = np.random.default_rng(0)
    recon = rng.integers(-4000, 4000, (3, 4, transform.n_channels)).astype(np.int32)
    size = 8 * transform.cells
    atoms = transform._synthesis.reshape(transform.cells, transform.cells, 8, 8, 3, -1)
    atoms = atoms.transpose(0, 2, 1, 3, 4, 5).reshape(size, size, 3, -1)
    ringed = transform.surrounded(recon, (True,) * 4)
    step, halo = 777, transform.halo
    height, width = ringed.shape[:2]
    margin = (size - 8) // 2
    plane = np.zeros((8 * height + 2 * margin, 8 * width + 2 * margin, 3))
    for i in range(height):
        for j in range(width):
            plane[8 * i : 8 * i + size, 8 * j : 8 * j + size] += atoms @ ringed[i, j]
    inner = plane[margin + 8 * halo :, margin + 8 * halo :][:24, :32]
    expected = np.floor(inner * step / 2**18 + 0.5).astype(np.int64) + (128 << 6)
    assert (transform.synthesis(ringed, step) == expected).all()


def test_transform_is_nearly_its_own_inverse(transform):
    image = photograph(48, 40)
    y = transform.analysis(image)
    recon = np.rint(y * 16).astype(np.int32)
    back = to_pixels(transform.synthesis(transform.surrounded(recon, (True,) * 4), 256))
    assert psnr(back, image) > 40


def test_synthesis_is_exact_for_the_largest_coefficients(transform):
    """Partial sums stay below 2**53, so float64 holds them exactly in any order."""
    largest = np.abs(transform._synthesis).sum(axis=3).max() * transform.cells**2
    assert largest * MAX_RECON < 2**53


def test_kernels_of_another_size_are_refused():
    with pytest.raises(InputError, match="8 or 16"):
        LinearTransform({k: np.zeros((4, 4, 3, 8)) for k in ("analysis", "synthesis", "parity")})


# -- Pillow --------------------------------------------------------------------------------------
def test_plugin(tmp_path, small, data):
    path = tmp_path / "x.pvq"
    image = Image.fromarray(small)
    image.save(path, quality=80, icc_profile=b"profile", exif=b"Exif\0\0data")
    opened = Image.open(path)
    assert (opened.format, opened.size, opened.mode) == ("PVQ", (56, 40), "RGB")
    assert opened.info["icc_profile"] == b"profile" and opened.info["exif"] == b"Exif\0\0data"
    assert (np.asarray(opened) == np.asarray(pvq.decompress(data))).all()
    again = Image.open(io.BytesIO(data)).convert("L")
    assert again.size == (56, 40)


def test_plugin_opens_without_pixels(data):
    """The header is enough: the pixels may be damaged or missing."""
    position = bitstream.read_header(data)[1]
    image = Image.open(io.BytesIO(data[:position]))
    assert image.size == (56, 40)
    with pytest.raises(FormatError):
        image.load()
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(b"\x89PVQ"))
