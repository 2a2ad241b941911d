"""The command line, in process: files, folders, targets, errors and exit codes."""

import json

import numpy as np
import pytest
from PIL import Image
from test_bands import scene
from test_pvq import photograph
from typer.testing import CliRunner

import polarpack_image as pvq
from polarpack_image.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate([(24, 40), (33, 17)]):
        Image.fromarray(photograph(*size, seed=i)).save(tmp_path / f"p{i}.png")
    return tmp_path


def test_a_folder_there_and_back(folder):
    packed, back = folder / "packed", folder / "back"
    result = run("compress", folder, "--out", packed, "--quality", 75)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in packed.iterdir()) == ["p0.pvq", "p1.pvq"]
    assert run("decompress", packed, "--out", back).exit_code == 0
    for name in ("p0", "p1"):
        expected = np.asarray(pvq.decompress((packed / f"{name}.pvq").read_bytes()))
        assert (np.asarray(Image.open(back / f"{name}.png")) == expected).all()


def test_info_adds_up(folder):
    target = folder / "x.pvq"
    assert run("compress", folder / "p0.png", "-o", target, "--bpp", "3", "-q").exit_code == 0
    row = json.loads(run("info", target, "--json").stdout)
    assert row["file_bytes"] == target.stat().st_size <= 3 * 24 * 40 / 8
    parts = ("icc", "exif", "alpha", "side", "pixel", "container")
    assert sum(row[f"{part}_bytes"] for part in parts) == row["file_bytes"]
    assert (row["width"], row["height"], row["mode"]) == (40, 24, "RGB")
    assert "quality" in run("info", target).stdout


def test_info_reads_no_pixels(folder):
    target = folder / "x.pvq"
    assert run("compress", folder / "p0.png", "-o", target, "-q").exit_code == 0
    data = bytearray(target.read_bytes())
    data[-3] ^= 255  # within the last tile
    target.write_bytes(data)
    assert run("info", target).exit_code == 0
    target.write_bytes(data[:-1])
    result = run("info", target)
    assert result.exit_code == 3
    assert "ends at byte" in result.output


def test_arrays_of_bands(folder):
    cube = scene(20, 30, 7)
    np.save(folder / "cube.npy", cube)
    result = run("compress", folder / "cube.npy", "--psnr", "40", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["file_bytes"] == (folder / "cube.pvq").stat().st_size < row["input_bytes"]
    facts = json.loads(run("info", folder / "cube.pvq", "--json").stdout)
    assert (facts["mode"], facts["bands"], facts["dtype"]) == ("BANDS", 7, "u2")
    assert run("decompress", folder / "cube.pvq", "-o", folder / "back.npy").exit_code == 0
    assert (
        np.load(folder / "back.npy") == pvq.decompress((folder / "cube.pvq").read_bytes())
    ).all()
    (folder / "wrong.npy").write_bytes(b"no array")
    assert run("compress", folder / "wrong.npy").exit_code == 1


def test_demo_shows_both_at_equal_bytes(tmp_path):
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    ours, jpeg = (
        (int(line.split()[-8].replace(",", "")), float(line.split()[-2]))
        for line in result.stdout.splitlines()[1:3]
    )
    assert 0.97 * jpeg[0] < ours[0] <= jpeg[0]
    assert ours[1] > jpeg[1] + 2
    with Image.open(tmp_path / "polarpack-demo-photograph.png") as drawing:
        assert drawing.width > 3 * 451
    assert (tmp_path / "polarpack-demo.pvq").stat().st_size == ours[0]


def test_cut_files_need_partial(folder):
    target = folder / "x.pvq"
    run("compress", folder / "p0.png", "-o", target, "--quality", "80")
    target.write_bytes(target.read_bytes()[:-9])
    assert run("decompress", target, "-o", folder / "y.png").exit_code == 3
    assert not (folder / "y.png").exists()
    assert run("decompress", target, "-o", folder / "y.png", "--partial").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compress", "missing.png"], 1, "no such file"),
        (["compress", "{}/p0.png", "--quality", "200"], 1, "0..100"),
        (["compress", "{}/p0.png", "--quality", "20", "--bpp", "1"], 1, "at most one"),
        (["compress", "{}/p0.png", "{}/p1.png", "-o", "{}/p0.png"], 1, "folder"),
        (["decompress", "{}/p0.png", "-o", "{}/q.png"], 3, "not a .pvq file"),
        (["decompress", "{}"], 1, "no pictures"),
        (["decompress", "{}/there/ok.pvq", "-o", "{}/q.xyz"], 1, "q.xyz"),
        (["info", "{}/p0.png"], 3, "not a .pvq file"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_errors(folder, arguments, code, message):
    (folder / "there").mkdir()
    (folder / "there" / "ok.pvq").write_bytes(pvq.compress(photograph(8, 8), 10))
    result = run(*(argument.format(folder) for argument in arguments))
    assert result.exit_code == code
    assert message in result.output


def test_compare(folder):
    result = run("compare", folder / "p0.png", "--bpp", "4", "--json")
    rows = {row["codec"]: row for row in json.loads(result.stdout)}
    assert {"polarpack", "jpeg"} <= set(rows)
    assert rows["polarpack"]["bytes"] <= 4 * 24 * 40 / 8
    assert rows["polarpack"]["psnr"] > 30
