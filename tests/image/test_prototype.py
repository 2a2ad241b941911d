"""The preset ``original``: trained, resumed, and in .pvq files."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from test_pvq import photograph, psnr
from typer.testing import CliRunner

import polarpack_image as pvq
from polarpack.errors import CorruptDataError, FormatError, InputError, UnsupportedVersionError
from polarpack_image import bitstream, codec, picture_codec, training_presets
from polarpack_image.baselines.original import OriginalCodec
from polarpack_image.bitstream import Coding
from polarpack_image.cli import app

SMALL = {"widths": (8, 8, 16), "codewords": 16, "context": 8, "patch": 32}
IMAGE = photograph(70, 90)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    OriginalCodec(**SMALL).save(path)
    return path


@pytest.fixture(scope="module")
def data(file):
    return pvq.compress(IMAGE, weights=file)


def test_a_picture_there_and_back(file, data):
    """Against the model itself, which codes the picture continued to whole blocks."""
    header = bitstream.read_header(data)[0]
    assert header.coding == Coding.ORIGINAL
    decoded = np.asarray(pvq.decompress(data, weights=file))
    model = codec.codec_from(file).coder().model
    whole = picture_codec.whole_blocks(IMAGE, 8)
    assert (decoded == model.decompress(model.compress(whole))[:70, :90]).all()
    gray = np.dstack([IMAGE[:9, :7, 0], IMAGE[:9, :7, 1]])
    small = pvq.decompress(pvq.compress(gray, weights=file), weights=file)
    assert small.mode == "LA"
    assert (np.asarray(small)[:, :, 1] == gray[:, :, 1]).all()


def test_tiles_and_regions(monkeypatch, file):
    monkeypatch.setattr(bitstream, "TILE", 4)
    monkeypatch.setattr(codec, "TILE", 4)
    data = pvq.compress(IMAGE, weights=file)
    assert bitstream.read_header(data)[0].tiles == (3, 3)
    whole = np.asarray(pvq.decompress(data, weights=file))
    part = np.asarray(pvq.decompress(data, region=(30, 5, 66, 60), weights=file))
    assert (part == whole[5:60, 30:66]).all()


def test_what_is_refused(file, data, tmp_path):
    with pytest.raises(InputError, match="one operating point"):
        pvq.compress(IMAGE, 50, weights=file)
    name = bitstream.read_header(data)[0].weights.hex()
    with pytest.raises(UnsupportedVersionError, match=name):
        pvq.decompress(data)
    torch.manual_seed(1)
    OriginalCodec(**SMALL).save(tmp_path / "other.pt")
    with pytest.raises(UnsupportedVersionError, match=name):
        pvq.decompress(data, weights=tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CorruptDataError, match="baseline"):
        pvq.decompress(data, weights=tmp_path / "broken.pt")


def test_damage_is_an_error(file, data):
    for length in range(0, len(data), max(1, len(data) // 40)):
        with pytest.raises(FormatError):
            pvq.decompress(data[:length], weights=file)
    rng = np.random.default_rng(0)
    header, position = bitstream.read_header(data)
    for _ in range(10):  # with a checksum of the section that holds
        sections = bitstream.read_sections(data, header, position)
        message, checksum = sections.tiles[0][0]
        broken = bytearray(message)
        broken[rng.integers(len(broken) // 2)] ^= 1 << rng.integers(8)
        sections.tiles[0][0] = bytes(broken), checksum
        with pytest.raises(FormatError):
            pvq.decompress(bitstream.write(header, sections), weights=file)


def test_train_resume_compress_on_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(
        training_presets, "OriginalCodec", functools.partial(OriginalCodec, **SMALL)
    )
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        Image.fromarray(photograph(64, 64, seed=i)).save(pictures / f"p{i}.png")

    def run(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    out = tmp_path / "run"
    train = ("train", "original", pictures, "--out", out, "--steps", 30, "--batch", 2)
    assert "stopped" in run(*train, "--seconds", 0.01)
    assert "finished" in run(*train)
    target = tmp_path / "x.pvq"
    run("compress", pictures / "p0.png", "--weights", out / "model.pt", "-o", target)
    run("decompress", target, "--weights", out / "model.pt", "-o", tmp_path / "x.png")
    assert psnr(Image.open(tmp_path / "x.png"), photograph(64, 64, seed=0)) > 10
