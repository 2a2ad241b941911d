"""Training: data, the lapped transform, exact resume, and a tiny codec from photographs to bytes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import polarpack_image as pvq
from polarpack.errors import FormatError, InputError
from polarpack_image import lapped, training, training_presets, weights
from polarpack_image.coder import blank
from polarpack_image.data import (
    CropSampler,
    Pictures,
    decode_pictures,
    is_held_out,
    load_pictures,
    validation_crops,
)
from polarpack_image.learned import LearnedCodec
from polarpack_image.networks import LappedTransform, mirror
from polarpack_image.training import Run, Settings, bd_rate, jpeg_curve, read_log, train
from polarpack_image.training_lapped import ContextTask, LappedTask, PostFilterTask, dead_zone
from polarpack_image.training_presets import SETTINGS, kernels_from, make_task, run_preset


def photograph(rng, height, width):
    """Smooth light, an edge and grain."""
    y, x = np.mgrid[:height, :width] / 40.0
    a, b, c = rng.uniform(-2, 2, 3)
    light = 120 + 60 * np.sin(a * x + b * y) + 40 * (y > x * c)
    colour = light[..., None] * rng.uniform(0.6, 1, 3) + rng.normal(0, 4, (height, width, 1))
    return np.clip(colour, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", autouse=True)
def few_crops():
    """Karhunen-Loeve transforms of a few crops: quick, and good enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_presets, "N_START", 40)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Picture files, a few of them held out."""
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    names = [f"test__{i}__0.png" for i in range(120)]
    held = [name for name in names if is_held_out(name)][:3]
    for name in [n for n in names if not is_held_out(n)][:12] + held:
        Image.fromarray(photograph(rng, 144, 160)).save(path / name)
    return path


@pytest.fixture(scope="module")
def pictures(folder):
    return load_pictures([folder])


def test_pictures_are_the_files_and_survive_saving(folder, pictures, tmp_path):
    assert len(pictures) == 15
    for i, name in enumerate(pictures.names):
        np.testing.assert_array_equal(pictures[i], np.asarray(Image.open(folder / name)))
    chosen = pictures.select([3, 1])
    chosen.save(tmp_path / "pack")
    back = load_pictures([tmp_path / "pack"])
    assert back.names == chosen.names
    np.testing.assert_array_equal(back[1], pictures[1])
    cached = load_pictures([folder], tmp_path / "cache")
    again = load_pictures([tmp_path / "nothing"], tmp_path / "cache")
    assert again.names == cached.names == pictures.names
    rows = json.loads((tmp_path / "pack" / "index.json").read_text())
    rows[1][2] = 100_000
    (tmp_path / "pack" / "index.json").write_text(json.dumps(rows))
    with pytest.raises(FormatError, match="outside"):
        Pictures.load(tmp_path / "pack")


def test_tiles_of_one_photograph_stay_together(pictures):
    for i in range(50):
        assert len({is_held_out(f"source__photo{i}__{tile}.avif") for tile in range(5)}) == 1
    training_, held = pictures.split()
    assert len(training_) == 12
    assert len(held) == 3
    many = [is_held_out(f"{i}.png") for i in range(4000)]
    assert 0.03 < np.mean(many) < 0.07


def test_crops_are_pieces_of_the_pictures(pictures):
    sampler = CropSampler(pictures, 64)
    x = sampler.draw(4, np.random.default_rng(0))
    assert x.shape == (4, 3, 64, 64)
    same = sampler.draw(4, np.random.default_rng(0))
    assert torch.equal(x, same)
    # gathering as on a GPU gives the same crops as copying rows
    start, stride = np.array([300, 4 * 3 + 1440]), np.array([480, 480])
    copied = sampler._gather(start, stride, 32)
    sampler._pixels = torch.from_numpy(pictures.pixels)
    assert torch.equal(sampler._gather(start, stride, 32), copied)
    scaled = CropSampler(pictures, 64, min_scale=0.5)
    shapes = {scaled.draw(2, np.random.default_rng(seed)).shape for seed in range(8)}
    assert shapes == {torch.Size([2, 3, 64, 64])}
    with pytest.raises(InputError, match="no picture of at least"):
        CropSampler(pictures, 512)
    with pytest.raises(InputError, match="min_scale"):
        CropSampler(pictures, 64, min_scale=2.0)
    with pytest.raises(InputError, match="no picture files"):
        decode_pictures([])


@pytest.fixture(scope="module")
def kernels(pictures):
    crops = validation_crops(pictures.split()[0], 40, 64, 1).astype(np.float32)
    return lapped.karhunen_loeve(crops)


def test_the_lapped_transform_reconstructs_and_has_its_parity(kernels, pictures):
    transform = LappedTransform(kernels)
    x = torch.from_numpy(validation_crops(pictures, 2, 64)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        y = transform.analysis(x)
        assert (transform.synthesis(y) - x).abs().max() < 0.02
        around = transform.analysis(mirror(x, 16))
        signs = transform.parity[:, 0, None]
        assert (around[:, :, 1, 2:-2] - y[:, :, 0] * signs).abs().max() < 0.02
        assert (around[:, :, 2:-2, 2:-2] - y).abs().max() < 0.02
    norms = (kernels.synthesis.astype(float) ** 2).sum((0, 1, 2))
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_overlap_gains_over_blocks(pictures):
    """Coding gain: mean log variance of the coefficients, in dB."""
    crops = validation_crops(pictures.split()[0], 40, 64, 1).astype(np.float32)
    x = torch.from_numpy(crops).permute(0, 3, 1, 2)

    def level(kernels):
        with torch.no_grad():
            y = LappedTransform(kernels).analysis(x)
        return float(10 * y.square().mean((0, 2, 3)).log10().mean())

    overlapping = level(lapped.karhunen_loeve(crops))
    assert overlapping < level(lapped.karhunen_loeve(crops, lapped.BLOCKS_ONLY)) - 0.03
    # and a little more where the transform need not be orthonormal
    assert level(lapped.karhunen_loeve(crops, 1.6)) < overlapping + 0.05


def test_the_start_is_orthonormal_and_a_tied_transform_stays_near_it(kernels, pictures):
    np.testing.assert_allclose(kernels.analysis, kernels.synthesis, atol=1e-6)
    run = Run(LappedTask(kernels), Settings(steps=50, batch=2, crop=64, peak=1e-3, warm_up=5))
    sampler = CropSampler(pictures, 64)
    for _ in range(20):
        run.advance(sampler)
    found = run.task.transform.export()
    np.testing.assert_array_equal(found.analysis, found.synthesis)
    atoms = found.synthesis.reshape(-1, 192).astype(float)
    gram = atoms.T @ atoms
    assert 1e-4 < np.abs(gram - np.eye(192)).max() < 0.05


def weights_of(task):
    return [p.detach().clone() for parameters, _ in task.parameter_groups() for p in parameters]


@pytest.mark.parametrize("name", ["lapped", "tiny"])
def test_a_resumed_run_is_the_uninterrupted_one(name, kernels, pictures, tmp_path):
    """Bit for bit, across the phases, from a checkpoint in several pieces."""
    settings = Settings(steps=8, batch=2, crop=64, peak=1e-3, warm_up=2, validation_crops=2)

    def task():
        return (
            LappedTask(kernels) if name == "lapped" else make_task(name, pictures, None, settings)
        )

    sampler = CropSampler(pictures, 64, min_scale=0.5)
    whole = Run(task(), settings)
    for _ in range(8):
        whole.advance(sampler)
    first = Run(task(), settings)
    for _ in range(5):
        first.advance(sampler)
    before = training.PIECE_BYTES
    try:
        training.PIECE_BYTES = 100_000
        first.save(tmp_path)
    finally:
        training.PIECE_BYTES = before
    pieces = sorted(tmp_path.glob("*.piece*"))
    assert len(pieces) > 4
    assert max(p.stat().st_size for p in pieces) <= 100_000
    second = Run(task(), settings)
    assert second.restore(tmp_path)
    assert second.step == 5
    for _ in range(3):
        second.advance(sampler)
    for a, b in zip(weights_of(whole.task), weights_of(second.task), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.average, second.average, strict=True):
        assert torch.equal(a, b)
    # without the moments the run goes on, warming up; without the weights it says so
    for piece in tmp_path.glob("moments*"):
        piece.unlink()
    third = Run(task(), settings)
    assert third.restore(tmp_path)
    assert third.fresh_at == 5
    pieces[-1].write_bytes(pieces[-1].read_bytes()[:100])
    with pytest.raises(FormatError, match="cannot be read"):
        Run(task(), settings).restore(tmp_path)


def test_training_the_transform_lowers_its_loss(kernels, pictures, tmp_path):
    settings = Settings(steps=30, batch=2, crop=64, peak=2e-3, warm_up=5, validation_crops=2)
    assert train(LappedTask(kernels), pictures, tmp_path, settings)
    lines = read_log(tmp_path)
    curves = [line for line in lines if "curve" in line]
    assert [line["step"] for line in curves] == [0, 30]
    assert curves[1]["bd_rate_jpeg"] < curves[0]["bd_rate_jpeg"]
    assert any("images_per_second" in line for line in lines)
    found = kernels_from(tmp_path / "arrays.npz")
    assert np.abs(found.synthesis - kernels.synthesis).max() > 1e-4
    np.testing.assert_array_equal(found.parity, kernels.parity)
    assert (tmp_path / "checkpoint.json").is_file()


def test_a_run_ends_in_time(kernels, pictures, tmp_path):
    settings = Settings(steps=10**6, seconds=0.5, batch=2, crop=64, validation_crops=1)
    assert not train(LappedTask(kernels, frozen=True), pictures, tmp_path, settings)
    step = json.loads((tmp_path / "checkpoint.json").read_text())["step"]
    assert not train(LappedTask(kernels, frozen=True), pictures, tmp_path, settings)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] > step


@pytest.mark.parametrize("kind", [PostFilterTask, ContextTask])
def test_networks_of_the_linear_codec_learn_in_integers(kind, kernels, pictures):
    """In the integer phase, on two crops that can be learned by heart."""
    torch.manual_seed(0)
    task = kind(kernels, *([(1, 2, 6)] if kind is ContextTask else [16, 3]))
    x = torch.from_numpy(validation_crops(pictures, 2, 64)).permute(0, 3, 1, 2).float()
    task.enter(1.0)
    drawn = task.draw(x, torch.Generator().manual_seed(0))
    parameters = [p for group, _ in task.parameter_groups() for p in group]
    optimizer = torch.optim.Adam(parameters, 1e-3)
    losses = []
    for _ in range(40):
        loss = task.loss(x, *drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(isinstance(v, np.ndarray) for v in task.export().values())


@pytest.fixture(scope="module")
def tiny(folder, tmp_path_factory):
    """A tiny codec trained by the public function, in two calls."""
    out = tmp_path_factory.mktemp("tiny")
    run_preset("tiny", [folder], out, device="cpu", seconds=0.01)
    while not run_preset("tiny", [folder], out, device="cpu"):
        pass
    with np.load(out / "arrays.npz") as arrays:
        return dict(arrays)


def test_what_training_leaves_makes_a_codec(tiny, pictures, tmp_path):
    """From pixels to a file and back; more in test_learned.py."""
    coder = blank(64) | {"mean_taps": tiny["coder.mean_taps"]}
    path = tmp_path / "tiny.safetensors"
    weights.save(path, tiny | {f"coder.{name}": array for name, array in coder.items()})
    pixels = pictures[0][:80, :112]
    data = pvq.compress(pixels, 50, weights=path)
    error = np.asarray(pvq.decompress(data, weights=path)).astype(float) - pixels
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 20
    learned = LearnedCodec(tiny)
    y, z = learned.analysis(pixels, 24 << 8)
    assert y.shape == (5, 7, 64)
    assert z.shape == (2, 2, 8)
    with pytest.raises(FormatError, match="hyper-latent"):
        learned.predictor(24 << 8, (9, 7), z)


def test_wrong_arrays_of_a_learned_codec_are_refused(tiny):
    with pytest.raises(FormatError, match="no sizes"):
        LearnedCodec({k: v for k, v in tiny.items() if k != "codec.config"})
    with pytest.raises(FormatError, match="merge has shape None"):
        LearnedCodec({k: v for k, v in tiny.items() if k != "codec.merge"})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "full"])
def test_the_real_sizes_train_and_export(preset, folder, tmp_path):
    settings = Settings(steps=4, batch=1, crop=64, warm_up=1, validation_crops=1)
    pictures = load_pictures([folder])
    train(make_task(preset, pictures, None, settings), pictures, tmp_path, settings)
    with np.load(tmp_path / "arrays.npz") as arrays:
        found = dict(arrays)
    assert sum(a.nbytes for a in found.values()) < 20e6
    learned = LearnedCodec(found)
    y, z = learned.analysis(pictures[0][:64, :64], 30 << 8)
    mean, level = learned.predictor(30 << 8, y.shape[:2], z)(
        np.rint(16 * y).astype(np.int32), y.shape[2] // 8 - 1
    )
    assert mean.shape == level.shape == (*y.shape[:2], 8)


def test_bd_rate_of_known_curves():
    anchor = [(0.5, 30.0), (1.0, 33.0), (2.0, 36.0)]
    assert bd_rate(anchor, anchor) == pytest.approx(0)
    assert bd_rate(anchor, [(r * 0.8, p) for r, p in anchor]) == pytest.approx(-20)
    assert np.isnan(bd_rate(anchor, [(0.1, 10.0), (0.2, 12.0)]))


def test_jpegs_curve_rises(pictures):
    curve = jpeg_curve(validation_crops(pictures, 2, 64))
    assert [list(part) for part in zip(*curve, strict=True)] == [
        sorted(part) for part in zip(*curve, strict=True)
    ]


def test_dead_zone():
    y = torch.tensor([-1.7, -0.55, 0.0, 0.59, 0.61, 1.59, 2.7])
    assert dead_zone(y).tolist() == [-2.0, 0.0, 0.0, 0.0, 1.0, 1.0, 3.0]


def test_wrong_settings_are_named(folder, tmp_path):
    for wrong in ({"steps": 0}, {"steps": 5, "crop": 100}, {"steps": 5, "ema": 1.0}):
        with pytest.raises(InputError):
            Settings(**wrong)
    with pytest.raises(InputError, match="no preset 'huge'"):
        run_preset("huge", [folder], tmp_path)
    with pytest.raises(InputError, match="needs start"):
        run_preset("post", [folder], tmp_path)
    with pytest.raises(InputError, match="no such"):
        run_preset("lapped", [tmp_path / "absent"], tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="not available"):
            run_preset("full", [folder], tmp_path)
    assert SETTINGS["full"].bfloat16
