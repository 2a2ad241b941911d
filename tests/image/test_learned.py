"""The learned codec in files: latents bit for bit the same however they are computed, no seams,
damage named, other weights refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_pvq import photograph, psnr
from typer.testing import CliRunner

import polarpack_image as pvq
from polarpack.errors import (
    CorruptDataError,
    FormatError,
    InputError,
    UnsupportedVersionError,
)
from polarpack_image import bitstream, codec, fitting_learned, learned, picture_codec, weights
from polarpack_image.bitstream import Coding
from polarpack_image.cli import app
from polarpack_image.coder import blank
from polarpack_image.lapped import karhunen_loeve
from polarpack_image.networks import Codec, CodecConfig
from polarpack_image.training_codec import CodecTask, mean_taps

SIZES = {
    16: CodecConfig(64, 16, 16, 1, 1, 8, 16, (0, 2, 8)),
    8: CodecConfig(192, 8, 16, 1, 0, 8, 16, (0, 1, 24)),
}


def built(stride):
    """Networks that say something without having been trained: what starts at zero gets noise."""
    torch.manual_seed(stride)
    crops = np.stack([photograph(64, 64, seed=i) for i in range(20)]).astype(np.float32)
    network = Codec(SIZES[stride], karhunen_loeve(crops))
    network.fit_merge(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous())
    task = CodecTask(network)
    with torch.no_grad():
        for name, parameter in task.module.named_parameters():
            if "leave" in name or "second" in name:
                parameter += 0.003 * torch.randn_like(parameter)
            if "linear.weight" in name:
                parameter += 0.03 * torch.randn_like(parameter)
            if "log_gain" in name:
                parameter += 0.05 * torch.randn_like(parameter)
        task.prior["log_scale"].fill_(3.0)
    arrays = task.export()
    coder = blank(SIZES[stride].channels) | {"mean_taps": arrays["coder.mean_taps"]}
    return arrays | {f"coder.{name}": array for name, array in coder.items()}


@pytest.fixture(scope="module", params=[16, 8])
def stride(request):
    return request.param


@pytest.fixture(scope="module")
def file(stride, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / f"stride{stride}.safetensors"
    weights.save(path, built(stride))
    return path


IMAGE = photograph(75, 90)


@pytest.fixture(scope="module")
def data(file):
    return pvq.compress(IMAGE, 70, weights=file)


def latent_of(data, file):
    """All reconstructed coefficients of a file."""
    reader = codec.Reader(data, weights=file)
    rows, columns = reader.header.positions
    return reader._latent(0, rows, 0, columns, 0)


def test_a_picture_there_and_back(stride, file, data):
    header, position = bitstream.read_header(data)
    assert header.coding == (Coding.LEARNED_16 if stride == 16 else Coding.LEARNED_8)
    assert header.weights == weights.load(file)[1]
    assert bitstream.read_sections(data, header, position).n_bytes["HYPER"] > 10
    decoded = pvq.decompress(data, weights=file)
    assert decoded.size == (90, 75)
    assert psnr(decoded, IMAGE) > 27
    assert pvq.compress(IMAGE, 70, weights=file) == data
    better = pvq.compress(IMAGE, psnr=31, weights=file)
    assert 31 <= psnr(pvq.decompress(better, weights=file), IMAGE) < 31.6
    rgba = np.dstack([IMAGE[:9, :7], IMAGE[:9, :7, :1]])
    small = pvq.decompress(pvq.compress(rgba, 70, weights=file), weights=file)
    assert (np.asarray(small)[:, :, 3] == rgba[:, :, 3]).all()


def test_latents_are_the_same_bit_for_bit(monkeypatch, file, data):
    """Threads, oneDNN, the order of tiles, the size of windows: none of it reaches the latents."""
    monkeypatch.setattr(bitstream, "TILE", 4)
    monkeypatch.setattr(codec, "TILE", 4)
    tiled = pvq.compress(IMAGE, 70, weights=file)
    assert bitstream.read_header(tiled)[0].tiles != (1, 1)
    expected = latent_of(tiled, file)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            monkeypatch.setenv("POLARPACK_THREADS", str(threads))
            for onednn in (True, False):
                with torch.backends.mkldnn.flags(enabled=onednn, allow_tf32=None):
                    codec._codec_from.cache_clear()
                    assert (latent_of(tiled, file) == expected).all()
    finally:
        torch.set_num_threads(before)
    reader = codec.Reader(tiled, weights=file)
    rows, columns = reader.header.positions
    backwards = [reader._latent(y, y + 1, x, x + 1, 0) for y in reversed(range(rows))
                 for x in reversed(range(columns))]  # fmt: skip
    assert (np.concatenate(backwards[::-1]).reshape(expected.shape) == expected).all()


def test_integer_networks_keep_their_bound(file):
    """All sums of the entropy network stay where float32 is exact."""
    found = codec.codec_from(file)
    layers = [*found.network.hyper, *(layer for group in found.network.layers for layer in group)]
    assert len(layers) > 5
    assert all(0 < layer.bound() < 2**24 for layer in layers)


def test_windows_leave_no_seams(monkeypatch, file):
    """Windows of 4 positions instead of one for all: the same up to the rounding of floats."""
    found = codec.codec_from(file)
    whole = picture_codec.whole_blocks(photograph(200, 170, seed=3), found.stride)
    step = 20 << 8
    y, z = found.analysis(whole, step)
    recon = np.rint(16 * y).astype(np.int32)
    pixels = found.values(recon, (0, 0, 0, 0), step)
    monkeypatch.setattr(learned, "WINDOW", 4)
    y_parts, z_parts = found.analysis(whole, step)
    assert np.abs(y_parts - y).max() < 1e-3 * np.abs(y).max()
    assert (z_parts != z).mean() < 0.01
    parts = found.values(recon, (0, 0, 0, 0), step)
    assert np.abs(parts - pixels).max() <= 1  # of 1/64 grey level
    inner = found.values(recon[2:], (found.halo, 0, 0, 0), step)
    assert np.abs(inner[2 * found.stride :] - pixels[(4 + found.halo) * found.stride :]).max() <= 1


def test_regions_are_parts_of_the_picture(monkeypatch, file):
    monkeypatch.setattr(bitstream, "TILE", 4)
    monkeypatch.setattr(codec, "TILE", 4)
    data = pvq.compress(IMAGE, 60, weights=file)
    whole = np.asarray(pvq.decompress(data, weights=file)).astype(int)
    for left, top, right, bottom in ((0, 0, 90, 75), (33, 40, 70, 75), (64, 8, 90, 9)):
        part = pvq.decompress(data, region=(left, top, right, bottom), weights=file)
        assert np.abs(np.asarray(part) - whole[top:bottom, left:right]).max() <= 1


def test_other_weights_are_refused_by_name(stride, file, data, tmp_path):
    name = weights.load(file)[1].hex()
    with pytest.raises(UnsupportedVersionError, match=name):
        pvq.decompress(data)
    changed = dict(weights.load(file)[0])
    changed["codec.log_gain"] = changed["codec.log_gain"] + np.float16(0.01)
    other = tmp_path / "other.safetensors"
    weights.save(other, changed)
    with pytest.raises(UnsupportedVersionError, match=f"{name}.*{weights.load(other)[1].hex()}"):
        pvq.decompress(data, weights=other)
    ours = pvq.compress(IMAGE, 50)
    assert pvq.decompress(ours, weights=file).size == (90, 75)  # the package's are always there
    with pytest.raises(InputError, match="quantizer"):
        pvq.compress(IMAGE, weights=file, quantizer="scalar")
    with pytest.raises(InputError, match="bands"):
        pvq.compress(np.zeros((4, 4, 9)), weights=file)
    for missing in ("coder.mean_taps", "codec.z_levels"):
        weights.save(other, {k: v for k, v in changed.items() if k != missing})
        with pytest.raises(FormatError, match="coder|z_levels"):
            pvq.compress(IMAGE, weights=other)


def test_damage_is_an_error(file, data):
    for length in range(0, len(data), max(1, len(data) // 60)):
        with pytest.raises(FormatError):
            pvq.decompress(data[:length], weights=file)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(data), 60):
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(FormatError):
            pvq.decompress(bytes(broken), weights=file)


def hyper_replaced(data, change):
    """The file with another section HYPER, whose checksum in the file is right."""
    header, position = bitstream.read_header(data)
    sections = bitstream.read_sections(data, header, position)
    sections.hyper = change(sections.hyper)
    return bitstream.write(header, sections)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: [(h[0][0][:-2], h[0][1])], "."),
        (lambda h: [(b"", h[0][1])], "."),
        (lambda h: [(h[0][0][:1] + b"\x55" + h[0][0][2:], h[0][1])], "."),
        (lambda h: [(h[0][0], h[0][1] ^ 1)], "hyper-latent"),
        (lambda h: [], "expected 1 sections HYPER"),
        (lambda h: h * 2, "more than 1 sections HYPER"),
    ],
)
def test_a_lying_hyper_latent_is_named(file, data, change, message):
    with pytest.raises(CorruptDataError, match=message):
        pvq.decompress(hyper_replaced(data, change), weights=file)


def test_partial_files_and_layers(file, data):
    position = bitstream.read_header(data)[1]
    assert pvq.decompress(data[:position], partial=True, weights=file).size == (90, 75)
    cut = pvq.decompress(data[:-5], partial=True, weights=file)
    assert psnr(cut, IMAGE) > 15


def test_a_header_of_another_coding_is_refused(data, file):
    raw = bytearray(data)
    raw[7] = 2  # linear transform
    position = bitstream.read_header(data)[1]
    sealed = bytes(raw[: position - 4])
    broken = sealed + bitstream.zlib.crc32(sealed).to_bytes(4, "little") + bytes(raw[position:])
    with pytest.raises(FormatError):
        pvq.decompress(broken, weights=file)


def test_tables_of_z_follow_their_law():
    mean, log_scale = torch.tensor([0.0, 10.0, -3.3]), torch.tensor([-2.0, 4.0, 1.0])
    levels = learned.z_levels(mean, log_scale).astype(float)
    assert levels.min() == 1
    p = np.exp2(-(levels - 1) / learned.Z_RESOLUTION)
    p /= p.sum(axis=1, keepdims=True)
    z = np.arange(-127, 128)
    assert np.allclose((p * z).sum(axis=1), mean, atol=0.1)
    spread = np.sqrt((p * (z - mean.numpy()[:, None]) ** 2).sum(axis=1))
    expected = np.pi / np.sqrt(3) * np.exp2(log_scale.numpy())
    assert np.allclose(spread[1:], np.sqrt(expected[1:] ** 2 + 1 / 12), rtol=0.03)


def test_exported_taps_predict_what_training_predicted():
    """Where all taps are few enough to be kept, up to their rounding."""
    torch.manual_seed(0)
    task = CodecTask(Codec(SIZES[16], karhunen_loeve(np.full((2, 64, 64, 3), 9, np.float32))))
    with torch.no_grad():
        task.linear.weight[5, 2] = torch.randn(3, 3)
        task.linear.weight[20, [1, 9]] = torch.randn(2, 3, 3)
    y = torch.randn(1, 64, 9, 8)
    expected = task.linear(y)[0].detach().numpy()
    found = np.zeros_like(expected)
    padded = np.pad(y[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    for target, source, dy, dx, w in mean_taps(task.linear).tolist():
        found[target] += w / 4096 * padded[source, 1 + dy : 10 + dy, 1 + dx : 9 + dx]
    assert np.abs(found - expected).max() < 0.02


def test_fitting_saves_bytes_and_the_command_line_uses_them(tmp_path):
    arrays = built(16)
    crops = [photograph(96, 112, seed=i) for i in range(20, 24)]
    fitted = fitting_learned.build(arrays, crops)
    sizes = {}
    for name, found in (("blank", arrays), ("fitted", fitted)):
        path = tmp_path / f"{name}.safetensors"
        weights.save(path, found)
        sizes[name] = len(pvq.compress(IMAGE, 60, weights=path))
    assert sizes["fitted"] < 0.95 * sizes["blank"]
    Image.fromarray(IMAGE).save(tmp_path / "p.png")

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    path = tmp_path / "fitted.safetensors"
    assert run("compress", tmp_path / "p.png", "--weights", path).exit_code == 0
    facts = json.loads(run("info", tmp_path / "p.pvq", "--json").stdout)
    assert facts["coding"] == "LEARNED_16"
    assert facts["side_bytes"] > 0
    result = run("decompress", tmp_path / "p.pvq", "-o", tmp_path / "q.png")
    assert result.exit_code == 3
    assert "--weights" in result.output
    assert run(
        "decompress", tmp_path / "p.pvq", "-o", tmp_path / "q.png", "--weights", path
    ).exit_code == 0  # fmt: skip
    assert psnr(Image.open(tmp_path / "q.png"), IMAGE) > 25
