"""The benchmark: measures against known cases, the yardstick, and what the command leaves."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from test_pvq import photograph
from typer.testing import CliRunner

from polarpack_image import benchmark, report, standin
from polarpack_image.cli import app


def test_psnr_and_msssim_of_known_pictures():
    image = photograph(180, 190)
    assert benchmark.psnr(image, image) == 100
    assert math.isclose(benchmark.psnr(np.zeros((4, 4)), np.full((4, 4), 255)), 0, abs_tol=1e-9)
    assert benchmark.msssim(image, image) == pytest.approx(1, abs=1e-6)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, image.shape)
    scores = [benchmark.msssim(image, np.clip(image + s * noise, 0, 255)) for s in (2, 8, 30)]
    assert 1 > scores[0] > scores[1] > scores[2] > 0


def test_bd_rate_of_known_curves():
    base = [(0.1 * 2**i, 28 + 3 * i) for i in range(6)]
    assert benchmark.bd_rate(base, base) == pytest.approx(0, abs=1e-9)
    half = [(rate / 2, quality) for rate, quality in base]
    assert benchmark.bd_rate(base, half) == pytest.approx(-50)
    assert math.isnan(benchmark.bd_rate(base, [(rate, q + 90) for rate, q in base]))


def test_the_yardstick_has_the_size_of_its_model():
    """CompressAI's mbt2018-mean at its lower qualities has 7.0 million parameters."""
    timing = standin.measure(64, 64, repeats=1)
    assert timing.encode_seconds > 0
    assert timing.decode_seconds > 0
    assert round(timing.kmac_per_pixel) == 91
    n_parameters = sum(p.numel() for p in standin.StandIn().parameters())
    assert 6.5e6 < n_parameters < 7.5e6
    assert standin.ratio([(1, 2), (3, 4)], standin.Timing(4, 6, 91)) == {
        "encode": 0.5, "decode": 0.5
    }  # fmt: skip


def test_benchmark_leaves_figures_and_a_page_that_needs_nothing(tmp_path, monkeypatch):
    """Few settings of few codecs."""
    found = benchmark.codecs()
    few = {name: (found[name][0], found[name][1][2::3]) for name in ("polarpack", "jpeg", "png")}
    few["png"] = found["png"]
    monkeypatch.setattr(report, "codecs", lambda: few)
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(2):
        Image.fromarray(photograph(64, 72, seed=i)).save(pictures / f"p{i}.png")
    result = CliRunner().invoke(app, ["benchmark", str(pictures), "--out", str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "lossless" in result.stdout
    assert "times that" in result.stdout
    facts = json.loads((out / "kodak.json").read_text("utf-8"))
    assert {row["codec"] for row in facts["rows"]} == {"polarpack", "jpeg", "png"}
    assert facts["bd_rates"][0]["codec"] == "polarpack"
    assert facts["yardstick"]["our_decode"] > 0
    assert (out / "kodak_psnr.png").stat().st_size > 10_000
    page = (out / "kodak.html").read_text("utf-8")
    assert "@" not in re.sub(r"@media", "", page.split("<script>")[0])  # all places are filled
    assert not re.search(r"(src|href)=[\"']?(http|/|\w+\.)", page)
    # two pictures at each rate: the original, ours and JPEG
    assert len(re.findall("data:image/(webp|png);base64,", page)) == 2 * len(report.CROP_BPP) * 3
