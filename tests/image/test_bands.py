"""Arrays of many bands: every dtype and size, equal error in all bands, regions, damage."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polarpack_image as pvq
from polarpack.errors import CorruptDataError, FormatError, InputError, LimitError
from polarpack_image import bands, bitstream


def scene(height, width, n_bands, dtype=np.uint16, seed=0):
    """Four materials with smooth spectra, lit unevenly, and some noise: (H, W, C)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    fields = [np.sin(x / (5 + 4 * i) + y / (9 - i) + i) for i in range(4)]
    share = np.exp(2 * np.stack(fields, axis=2))
    share /= share.sum(axis=2, keepdims=True)
    along = np.linspace(0, 3, n_bands)
    spectra = np.stack([1 + np.sin(along * (i + 1) + i) for i in range(4)])
    light = (1 + 0.3 * np.sin(x / 31))[:, :, None]
    cube = light * (share @ spectra) + rng.normal(0, 0.01, (height, width, n_bands))
    if dtype in (np.uint8, np.uint16, np.int16):
        info = np.iinfo(dtype)
        cube = info.min + np.clip(cube / 3, 0, 1) * (info.max / 2 - info.min)
    return cube.astype(dtype)


def psnr(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 10 * np.log10(np.ptp(b) ** 2 / (np.mean((a - b) ** 2) + 1e-12))


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 13), st.sampled_from(bitstream.SAMPLES)
)
@settings(max_examples=20, deadline=None)
def test_any_size_and_dtype(height, width, n_bands, dtype):
    cube = scene(height, width, n_bands, np.dtype(dtype).type)
    data = pvq.compress(cube, 80, bands=True)
    decoded = pvq.decompress(data)
    assert decoded.shape == cube.shape
    assert decoded.dtype == cube.dtype
    exact = cube.astype(float)
    step = bitstream.read_header(data)[0].step / 256 * np.ptp(exact) / 255
    rounding = 0.5 if dtype in ("u1", "u2", "i2") else 0.0
    assert np.sqrt(np.mean((decoded - exact) ** 2)) <= 0.8 * step + rounding


def test_error_is_the_same_in_all_bands():
    """Bands of unequal strength, all above the step: one of their own would leave less in the weak
    ones."""
    mixed = np.random.default_rng(0).normal(size=(40, 40, 7)) @ np.tri(7)
    cube = mixed / mixed.std(axis=(0, 1)) * np.geomspace(1, 0.3, 7)
    decoded = pvq.decompress(pvq.compress(cube, 95))
    error = np.sqrt(np.mean((decoded - cube) ** 2, axis=(0, 1)))
    assert error.max() < 1.2 * error.min()


def test_targets():
    cube = scene(48, 56, 9)
    data = pvq.compress(cube, psnr=48.0)
    assert 48.0 <= psnr(pvq.decompress(data), cube) < 48.5
    data = pvq.compress(cube, bpp=3.0)
    assert 2.7 * 48 * 56 < 8 * len(data) <= 3.0 * 48 * 56
    with pytest.raises(InputError, match="cannot be reached"):
        pvq.compress(cube, psnr=150.0)


def test_fewer_bytes_than_each_band_by_itself():
    cube = scene(64, 64, 16, np.uint8)
    together = pvq.compress(cube, psnr=38.0)
    apart = sum(len(pvq.compress(cube[:, :, i], psnr=38.0)) for i in range(0, 16, 4)) * 4
    assert len(together) < apart / 2


def test_constant_and_small_arrays():
    for value in (0, 7, 65535):
        flat = np.full((5, 6, 7), value, np.uint16)
        data = pvq.compress(flat, 50)
        assert (pvq.decompress(data) == flat).all()
        assert bitstream.read_header(data)[0].n_groups == 0
    flat = np.full((3, 2, 5), 0.1)  # which no float32 is
    assert (pvq.decompress(pvq.compress(flat, 50)) == flat).all()
    none = np.zeros((1, 0), np.int16)  # no axis: the mean alone, rounded like everything else
    spectra = bands.Spectra(0.0, 9.0, np.array([2.75], np.float32), np.zeros(0, np.uint8), none)
    assert (spectra.samples(np.zeros((2, 3, 0), np.int32), np.dtype(np.uint8)) == 3).all()
    one = np.array([[[1.5, -2.0, 1e20, 0, 3]]])
    assert np.allclose(pvq.decompress(pvq.compress(one)), one)


def test_a_lone_bright_pixel_survives():
    """Its axis is too weak on average to look worth a bit."""
    cube = scene(96, 96, 8, np.float32)
    cube[50, 40, 3] += 40
    decoded = pvq.decompress(pvq.compress(cube, 60))
    assert decoded[50, 40, 3] > 10 > np.delete(decoded.reshape(-1, 8), 50 * 96 + 40, 0).max()


def test_regions_threads_and_layers(monkeypatch):
    cube = scene(70, 50, 7)
    data = pvq.compress(cube, 85)
    whole = pvq.decompress(data)
    monkeypatch.setenv("POLARPACK_THREADS", "2")
    assert (pvq.decompress(data) == whole).all()
    assert (pvq.decompress(data, region=(9, 3, 31, 64)) == whole[3:64, 9:31]).all()
    assert psnr(pvq.decompress(data, layers=1), cube) < psnr(whole, cube)
    with pytest.raises(InputError, match="region"):
        pvq.decompress(data, region=(0, 0, 51, 10))
    cut = pvq.decompress(data[: len(data) * 3 // 4], partial=True)
    assert 15 < psnr(cut, cube) < psnr(whole, cube)


def test_byte_order_and_strides_do_not_matter():
    cube = scene(20, 24, 6)
    data = pvq.compress(cube, 70)
    assert pvq.compress(cube.astype(">u2"), 70) == data
    assert pvq.compress(np.asfortranarray(cube), 70) == data
    wide = np.zeros((20, 48, 6), np.uint16)
    wide[:, ::2] = cube
    assert pvq.compress(wide[:, ::2], 70) == data


# -- what a decoder must refuse --------------------------------------------------------------------
@pytest.fixture(scope="module")
def data():
    return pvq.compress(scene(12, 10, 5), 60)


def test_every_cut_and_flip_is_an_error(data):
    for length in (*range(70), *range(70, len(data), 11)):
        with pytest.raises(FormatError):
            pvq.decompress(data[:length])
    rng = np.random.default_rng(0)
    for place in (*range(8 * 60), *rng.integers(8 * 60, 8 * len(data), 60)):
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(FormatError):
            pvq.decompress(bytes(broken))


def rewritten(data, header=None, section=None):
    """The file with other header fields, or with another section BANDS."""
    old, position = bitstream.read_header(data)
    sections = bitstream.read_sections(data, old, position)
    if section is not None:
        sections.bands = section(sections.bands)
    return bitstream.write(replace(old, **header) if header else old, sections)


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ({"n_bands": 0}, CorruptDataError),
        ({"n_bands": 6}, CorruptDataError),
        ({"n_bands": 5000}, LimitError),
        ({"n_bands": 4000, "width": 1000, "height": 1000}, LimitError),
        ({"n_groups": 3}, CorruptDataError),
        ({"dtype": 0}, CorruptDataError),
        ({"dtype": 6}, CorruptDataError),
        ({"coding": bitstream.Coding.LEARNED_8}, CorruptDataError),
        ({"mode": bitstream.Mode.RGB}, CorruptDataError),
    ],
)
def test_lying_headers(data, header, error):
    with pytest.raises(error):
        pvq.decompress(rewritten(data, header))


@pytest.mark.parametrize(
    "section",
    [
        lambda b: b[:15],
        lambda b: b[8:16] + b[:8] + b[16:],  # high below low
        lambda b: b[:16] + b"\xff" * 20 + b[36:],  # means that are no numbers
        lambda b: b[:36] + b"\xff" + b[37:],  # 255 bits
        lambda b: b[:37] + b"\xff" * len(b[37:]),
        lambda b: b"",
    ],
)
def test_lying_spectra(data, section):
    with pytest.raises(FormatError):
        pvq.decompress(rewritten(data, section=section))


def test_pillow_says_what_it_is(data, tmp_path):
    from PIL import Image

    (tmp_path / "x.pvq").write_bytes(data)
    with pytest.raises(InputError, match="5 bands"):
        Image.open(tmp_path / "x.pvq")


# -- the transform over bands ----------------------------------------------------------------------
def test_pictures_give_the_samples_back():
    """Against a few lines of plain linear algebra, without the codec between."""
    cube = scene(30, 20, 9, np.float64)
    stats = bands.statistics(cube)
    spectra = bands.Spectra.of(stats, 0.01)
    pictures = np.concatenate(list(spectra.pictures(cube)), axis=2)
    values = np.rint((pictures - 128) * 64).astype(np.int32)
    decoded = spectra.samples(values, cube.dtype)
    assert np.abs(decoded - cube).max() < stats.unit * 0.05
    plain = values.astype(float) @ spectra._whole.T / 2**20 * stats.unit + stats.mean
    assert np.allclose(decoded, np.clip(plain, cube.min(), cube.max()), atol=1e-12)
    # squared errors of pictures are those of the array: the basis is nearly orthonormal
    noise = np.random.default_rng(0).normal(0, 64, values.shape)
    noisy = spectra.samples((values + noise).astype(np.int32), cube.dtype)
    ratio = np.sum((noisy - decoded) ** 2) / stats.unit**2 / np.sum((noise / 64) ** 2)
    assert 0.9 < ratio < 1.05


def test_bytes_of_spectra_return():
    spectra = bands.Spectra.of(bands.statistics(scene(20, 20, 11)), 4.0)
    same = bands.Spectra.from_bytes(spectra.to_bytes(), 11, spectra.n_groups, np.dtype(np.uint16))
    assert (same.basis == spectra.basis).all()
    assert (same.mean == spectra.mean).all()
    assert (same.low, same.high, same.bits.tolist()) == (
        spectra.low, spectra.high, spectra.bits.tolist()
    )  # fmt: skip
