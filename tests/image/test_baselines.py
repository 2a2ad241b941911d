"""The baseline codecs: exact decoding, rates next to the cross-entropy, causality, resumable training,
the original signatures, hostile bytes and bad input. Networks are tiny and mostly untrained: what is
tested holds for any weights."""

from __future__ import annotations

import json
import math
import zlib
from contextlib import nullcontext

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from polarpack.errors import (
    CorruptDataError,
    FormatError,
    InputError,
    LimitError,
    UnsupportedVersionError,
)
from polarpack.nn import composed, finite, usage, vector
from polarpack_image.baselines import (
    FSQVAE,
    RQVAE,
    VQVAE,
    VQVAE2,
    BlockTransformer,
    HyperPrior,
    OriginalCodec,
    PixelSNAIL,
    TrainConfig,
    Trainer,
    load,
)
from polarpack_image.baselines.__main__ import main
from polarpack_image.baselines.base import HEADER, cut, join
from polarpack_image.baselines.coding import PRECISION, Reader, Writer, integer_cdfs
from polarpack_image.baselines.layers import fold_blocks, unfold_blocks
from polarpack_image.baselines.original import ms_ssim
from polarpack_image.baselines.priors import cross_entropy_bits
from polarpack_image.data import decode_pictures

SMALL = {"embedding_dim": 8, "num_embeddings": 32, "hidden_dims": [8, 16], "patch": 32}
MAKERS = {
    "vqvae": lambda: VQVAE(**SMALL),
    "rqvae": lambda: RQVAE(**SMALL, num_quantizers=3),
    "fsqvae": lambda: FSQVAE(5, 16, hidden=(4, 8, 8, 16)),
    "fsqvae-annealed": lambda: FSQVAE(3, 16, "annealed", hidden=(4, 8, 8, 16)),
    "fsqvae-adaptive": lambda: FSQVAE(9, 16, "adaptive", hidden=(4, 8, 8, 16)),
    "fsqvae-hierarchical": lambda: FSQVAE(5, 16, "hierarchical", hidden=(4, 8, 8, 16)),
    "vqvae2-pixelsnail": lambda: VQVAE2(1, "pixelsnail", 16, 16, patch=32),
    "vqvae2-vectors": lambda: VQVAE2(3, "pixelsnail", 16, 16, patch=32),
    "vqvae2-transformer": lambda: VQVAE2(3, "transformer", 16, 16, adaptive=True, patch=32),
    "vqvae2-histogram": lambda: VQVAE2(1, "histogram", 16, patch=32),
    "hyperprior": lambda: HyperPrior(8, 12, patch=32),
    "original": lambda: OriginalCodec(widths=(8, 12, 16), codewords=16, context=8, patch=32),
}


def photograph(h: int = 70, w: int = 101, seed: int = 0) -> np.ndarray:
    """A smooth picture with an edge, (h, w, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    waves = [np.sin(x / rng.uniform(5, 30) + y / rng.uniform(5, 30) + c) for c in range(3)]
    picture = 128 + 60 * np.stack(waves, axis=-1) + 40 * (x > w // 2)[..., None]
    return (picture + rng.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)


def patches(model, n: int = 6) -> torch.Tensor:
    whole = cut(photograph(model.patch * 2, model.patch * 3), model.patch)
    return (whole[:n].float() / 255 - 0.5).contiguous()


_READY: dict[str, object] = {}


def ready(name: str):
    """A model of a few training steps with its statistics taken, made once."""
    if name not in _READY:
        torch.manual_seed(0)
        model = MAKERS[name]()
        x = patches(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(8):
            optimizer.zero_grad()
            model.loss(x)[0].backward()
            optimizer.step()
        if hasattr(model, "set_progress"):
            model.set_progress(1.0)
        model.eval().start_prior()
        with torch.no_grad():
            model.learn_counts(model.symbols(x))
        _READY[name] = model
    return _READY[name]


# ------------------------------------------------------------------------------------ coding


def test_cdfs_are_close_to_the_softmax():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (50, 300)).astype(np.float32)
    cdf = integer_cdfs(logits)
    assert (cdf[:, 0] == 0).all() and (cdf[:, -1] == 1 << PRECISION).all()
    sizes = np.diff(cdf, axis=1)
    assert sizes.min() >= 1
    p = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
    p /= p.sum(1, keepdims=True)
    loss = (p * (np.log2(p) - np.log2(sizes / 2.0**PRECISION))).sum(1)
    assert loss.max() < 2e-4  # bits a symbol
    plain = np.floor((1 << PRECISION) * p)  # what exact arithmetic would give, but for logit steps
    assert np.abs(sizes - plain).max() < 0.01 * (1 << PRECISION)
    extreme = np.array([[0, -1e30, 3e38], [5, 5, 5]], np.float32)
    assert (np.diff(integer_cdfs(extreme), axis=1) >= 1).all()
    wide = integer_cdfs(np.zeros((1, 1 << 16), np.float32))  # the product must not overflow
    assert (np.diff(wide) == 256).all()


def test_writer_and_reader_mirror_each_other():
    rng = np.random.default_rng(1)
    steps = [
        (rng.normal(0, 2, (7, 40)).astype(np.float32), rng.integers(40, size=7)) for _ in range(9)
    ]
    table, rows = rng.normal(0, 2, (5, 12)).astype(np.float32), rng.integers(5, size=200)
    symbols = rng.integers(12, size=200)
    writer = Writer()
    for logits, given in steps:
        writer.code(logits, given)
    writer.code_by_row(table, rows, symbols)
    data = writer.finish()
    reader = Reader(data)
    for logits, given in steps:
        assert np.array_equal(reader.code(logits, None), given)
    assert np.array_equal(reader.code_by_row(table, rows, None), symbols)
    reader.check(writer.crc)
    assert 8 * len(data) <= writer.bits * 1.001 + 16
    with pytest.raises(CorruptDataError, match="checksum"):
        Reader(data).check(writer.crc)
    with pytest.raises(InputError, match="symbols in 0..39"):
        Writer().code(steps[0][0], np.full(7, 40))
    with pytest.raises(InputError, match="finite"):
        integer_cdfs(np.full((1, 3), np.nan, np.float32))


def test_blocks_fold_back():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    blocks = unfold_blocks(x, 2)
    assert torch.equal(blocks[0, 1, 3], x[0, :, 1, 3])  # block (0, 1), position (1, 1)
    assert torch.equal(fold_blocks(blocks, 2, 4, 6), x)


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 65), (70, 31)])
def test_pictures_come_back_from_patches(shape):
    picture = photograph(*shape)
    assert np.array_equal(join(cut(picture, 32), *shape), picture)


@pytest.mark.parametrize("feed", ["one_hot", "vectors"])
@pytest.mark.parametrize("kind", [PixelSNAIL, BlockTransformer])
def test_stepwise_is_the_network(kind, feed):
    """``run`` predicts what ``logits`` does, and a prediction knows no later code."""
    torch.manual_seed(0)
    prior = kind(
        torch.randn(20, 6),
        condition=5,
        feed=feed,
        **({"channels": 12} if kind is PixelSNAIL else {"width": 16}),
    )
    codes, condition = torch.randint(20, (3, 6, 4)), torch.randn(3, 5, 6, 4)
    with torch.no_grad():
        logits = prior.logits(codes, condition)
    writer = Writer()
    prior.run(writer, codes.shape, condition, codes)
    assert math.isclose(writer.bits, float(cross_entropy_bits(logits, codes)) * 72, rel_tol=1e-5)
    found = prior.run(Reader(writer.finish()), codes.shape, condition, None)
    assert torch.equal(found, codes)
    later = codes.clone()
    later[:, 2:] = (later[:, 2:] + 1) % 20  # rows 2.. change: blocks and positions before do not
    with torch.no_grad():
        moved = (prior.logits(later, condition) - logits).abs().amax(dim=(0, 3))
    assert moved[:2].max() == 0 or moved[:2].max() < 1e-5
    assert moved[2:].max() > 1e-3
    assert moved[2, 0] < 1e-5  # its own code is not among what it sees


# ------------------------------------------------------------------------------- real pictures


@pytest.mark.parametrize("name", MAKERS)
def test_compress_and_decompress(name):
    """Bytes decode to exactly the picture the codes stand for, at the cross-entropy's rate."""
    model = ready(name)
    picture = photograph()
    measured = model.measure(picture)  # raises if decoding gives another picture
    n = picture.shape[0] * picture.shape[1]
    slack = 8 * 4 / n  # the last bytes of a message
    assert measured["payload_bpp"] <= 1.01 * measured["entropy_bpp"] + slack
    assert measured["payload_bpp"] >= 0.99 * measured["entropy_bpp"] - slack
    data = model.compress(Image.fromarray(picture))
    decoded = model.decompress(data)
    assert decoded.shape == picture.shape and decoded.dtype == np.uint8
    assert measured["bpp"] == 8 * len(data) / n
    error = np.mean((decoded.astype(float) - picture) ** 2)
    assert np.isclose(measured["psnr"], 10 * np.log10(255**2 / error))
    with torch.inference_mode():
        symbols = model.symbols(cut(picture, model.patch).float() / 255 - 0.5)
    raw = b"".join(s.numpy().astype("<i2").tobytes() for s in symbols)
    assert measured["zlib_bpp"] == 8 * len(zlib.compress(raw, 9)) / n


def test_threads_do_not_matter():
    model, picture = ready("vqvae2-pixelsnail"), photograph(33, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        data = model.compress(picture)
        torch.set_num_threads(2)
        assert model.decompress(data).shape == picture.shape  # the symbols' CRC has agreed
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", MAKERS)
def test_saved_models_read_each_others_bytes(name, tmp_path):
    model = ready(name)
    data = model.compress(photograph(40, 50))
    model.save(tmp_path / "model.pt")
    again = load(tmp_path / "model.pt")
    assert again.get_config() == model.get_config() and again.weights_crc == model.weights_crc
    assert np.array_equal(again.decompress(data), model.decompress(data))


def test_hostile_bytes():
    """Every way to be wrong has its error, and no truncation or flip gives another picture."""
    model = ready("vqvae2-histogram")
    picture = photograph(33, 40)
    data = model.compress(picture)
    whole = model.decompress(data)
    other = VQVAE2(1, "histogram", 16, patch=32)
    with pytest.raises(FormatError, match="written with weights"):
        other.decompress(data)
    with pytest.raises(FormatError, match="bytes of a 'vqvae2' model"):
        ready("vqvae").decompress(data)
    with pytest.raises(UnsupportedVersionError):
        model.decompress(data[:4] + b"\x01" + data[5:])
    fields = list(HEADER.unpack_from(data))
    fields[4:6] = 65535, 65535
    with pytest.raises(LimitError, match="exceed the limit"):
        model.decompress(HEADER.pack(*fields))
    fields[4:6] = 0, 5
    with pytest.raises(CorruptDataError):
        model.decompress(HEADER.pack(*fields))
    for end in (0, 3, HEADER.size - 1, HEADER.size, len(data) // 2):
        with pytest.raises(FormatError):
            model.decompress(data[:end])
    rng = np.random.default_rng(0)
    for at in [*range(HEADER.size), *rng.integers(HEADER.size, len(data), 6)]:
        bad = bytearray(data)
        bad[at] ^= 1 << int(rng.integers(8))
        try:
            decoded = model.decompress(bytes(bad))
        except FormatError:
            continue
        assert np.array_equal(decoded, whole) or decoded.shape != whole.shape


def test_bad_pictures():
    model = ready("vqvae")
    with pytest.raises(InputError, match=r"shape \(H, W, 3\), got \(5, 5\)"):
        model.compress(np.zeros((5, 5), np.uint8))
    with pytest.raises(InputError, match="uint8 pixels, got float64"):
        model.compress(np.zeros((5, 5, 3)))
    with pytest.raises(InputError, match="got list"):
        model.compress([1, 2])
    with pytest.raises(InputError, match=r"expected pictures \(B, 3, 4 m, 4 n\)"):
        model(torch.zeros(1, 4, 32, 32))
    with pytest.raises(InputError, match="expected pictures"):
        model(torch.zeros(1, 3, 30, 32))
    with pytest.raises(InputError, match="float tensor, got torch.uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(InputError, match="codes of field 0 in 0..31"):
        model.decode_from_indices(torch.full((1, 8, 8), 32))
    with pytest.raises(InputError, match="variant 1, 2 or 3"):
        VQVAE2(4)
    with pytest.raises(InputError, match="bottleneck"):
        FSQVAE(5, 8, "lfq")
    with pytest.raises(InputError, match="patch"):
        VQVAE(patch=30)


# ------------------------------------------------------------------------- original signatures


def test_vqvae_signature():
    model = ready("vqvae")
    x = patches(model, 2)
    out = model(x)
    assert set(out) == {"reconstructed", "vq_loss", "perplexity"}
    assert out["reconstructed"].shape == x.shape and out["vq_loss"].ndim == 0
    z = model.encode(x)
    indices = model.encode_to_indices(x)
    assert z.shape == (2, 8, 8, 8) and indices.shape == (2, 8, 8)
    quantized = model.quantizer.get_codebook_entry(indices)
    torch.testing.assert_close(model.decode(quantized), model.decode_from_indices(indices))
    torch.testing.assert_close(out["reconstructed"], model.decode_from_indices(indices))
    assert VQVAE().quantizer.embedding.shape == (512, 64)


def test_rqvae_signature():
    model = ready("rqvae")
    x = patches(model, 2)
    out = model(x)
    assert set(out) == {"reconstructed", "rq_loss", "perplexity_list", "quantized_list"}
    assert len(out["perplexity_list"]) == len(out["quantized_list"]) == 3
    codes = model.get_codes(x)
    assert [c.shape for c in codes] == [(2, 8, 8)] * 3
    torch.testing.assert_close(
        model.decode(sum(out["quantized_list"])), out["reconstructed"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        model.decode_from_codes(codes), out["reconstructed"], rtol=1e-4, atol=1e-5
    )
    report = model.analyze_quantization_levels(x)
    assert {len(v) for v in report.values()} == {3}
    coarse = model.decode_from_codes(codes[:1])
    assert np.isclose(report["image_mse"][0], (coarse - x).square().mean().item(), rtol=1e-3)
    assert RQVAE(**SMALL, shared_codebook=True).quantizer.shared_codebook


def test_fsqvae_levels_are_used():
    model = FSQVAE(5, 16, hidden=(4, 8, 8, 16))
    out = model(patches(model) + 0.5)
    assert set(out) == {"reconstructed", "logits", "codes", "loss"}
    assert out["reconstructed"].min() >= 0 and out["reconstructed"].max() <= 1
    assert usage(model).codebooks[0].size == 5
    with pytest.raises(InputError, match="32, 32"):
        model(torch.zeros(1, 3, 64, 64))


def test_adaptive_codewords_change_the_picture():
    torch.manual_seed(0)
    model = VQVAE2(3, "histogram", 16, adaptive=True, patch=32)
    torch.nn.init.normal_(model.from_side.weight, std=0.3)
    x = patches(model)
    top, bottom, side = model.eval().symbols(x)
    assert side.shape == (6, 8) and side.max() < 17
    changed = model.image([top, bottom, 16 - side])
    assert not torch.allclose(changed, model.image([top, bottom, side]))
    plain = VQVAE2(3, "histogram", 16, patch=32)
    assert len(plain.symbols(x)) == 2


# ------------------------------------------------------------------------------ the prototype


def test_original_curriculum():
    model = OriginalCodec(widths=(8, 12, 16), codewords=16, context=8, patch=32)
    x = patches(model)
    weights, phases = [], []
    for progress in (0.0, 0.09, 0.1, 0.175, 0.25, 0.59, 0.6, 1.0):
        model.set_progress(progress)
        weights.append(model.rate_weight)
        phases.append(model.phase)
        revives = {book.revive_below > 0 for book in model.quantizer.codebooks}
        assert revives == {progress < 0.1}
        model.zero_grad()
        loss, figures = model.loss(x)
        assert loss.isfinite() and figures["bpp"] > 0
    assert phases == ["A", "A", "B", "B", "B", "B", "C", "C"]
    assert np.allclose(weights, [1e-6, 1e-6, 0, 0.005, 0.01, 0.01, 0.0005, 0.0005])


def test_rate_reaches_the_encoder_only_after_phase_a(monkeypatch):
    """In A the rate's gradient stays in the context model."""
    from polarpack_image.baselines import original

    monkeypatch.setattr(original, "COMMITMENT_WEIGHT", 0.0)
    model = OriginalCodec(widths=(8, 12, 16), codewords=16, context=8, patch=32)
    x = patches(model)
    model.loss(x)  # first levels of the radius, from data
    model.eval()
    for progress, felt in ((0.0, False), (0.4, True)):
        model.set_progress(progress)
        gradients = []
        for weight in (0.01, 0.0):
            monkeypatch.setattr(original, "CONTEXT_WEIGHT", weight if weight else 1e-30)
            model.zero_grad()
            torch.manual_seed(0)
            loss, figures = model.loss(x)
            (loss - figures["mse"]).backward()
            gradients.append(model.encoder[0].weight.grad.abs().sum().item())
        # what is left besides the MSE is the rate: weight x bits
        assert (gradients[0] > 1e-12) == felt


def test_ms_ssim():
    x = torch.from_numpy(photograph(128, 128)).permute(2, 0, 1)[None].double() / 255
    assert np.isclose(ms_ssim(x, x).item(), 1)
    noisy = [
        (x + s * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        for s in (0.02, 0.1)
    ]
    values = [ms_ssim(x, n).item() for n in noisy]
    assert 1 > values[0] > values[1] > 0.3
    flat = torch.zeros(1, 1, 16, 16).double()
    c = 0.01**2  # one scale of constant pictures: luminance alone
    assert np.isclose(ms_ssim(flat, flat + 0.5).item(), c / (0.25 + c), rtol=1e-6)


# ---------------------------------------------------------------------- training, command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.fromarray(photograph(80, 96, seed=i)).save(path / f"photo-{i}.png")
    return path


QUICK = {
    "steps": 6,
    "batch": 4,
    "prior_steps": 4,
    "prior_batch": 4,
    "prior_patches": 8,
    "log_every": 2,
}


@pytest.mark.parametrize(
    "name", ["vqvae2-transformer", "hyperprior", "fsqvae-annealed", "original"]
)
def test_training_resumes_exactly(name, folder, tmp_path):
    """Stopped in either stage and resumed: the same weights as in one go."""
    pictures = decode_pictures([folder])
    torch.manual_seed(0)
    first = MAKERS[name]()
    whole = first.clone()
    assert Trainer(whole, pictures, tmp_path / "whole", TrainConfig(**QUICK)).run()
    stops = iter([3, 8, 10**9])
    limit = next(stops)
    model = first

    class Stopping(Trainer):
        def _set_progress(self, fraction):
            super()._set_progress(fraction)
            if self.stage == 0 and fraction * 6 >= limit:
                self._deadline = -1.0

    assert not Stopping(model, pictures, tmp_path / "parts", TrainConfig(**QUICK)).run()
    torch.manual_seed(7)
    model = MAKERS[name]()
    trainer = Trainer(model, pictures, tmp_path / "parts", TrainConfig(**QUICK))
    assert trainer.run(resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if e["stage"] == "transform"] == [2, 4, 6]
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 1000
    assert np.array_equal(
        load(tmp_path / "parts" / "model.pt").decompress(model.compress(photograph())),
        whole.decompress(whole.compress(photograph())),
    )


def test_training_lowers_the_loss(folder, tmp_path):
    model = VQVAE(**SMALL)
    config = TrainConfig(steps=60, batch=8, rate=3e-3, prior_patches=16, log_every=10)
    Trainer(model, decode_pictures([folder]), tmp_path / "run", config).run()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["mse"] < 0.7 * log[0]["mse"]


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16_training(name, folder, tmp_path):
    model = MAKERS[name]()
    config = TrainConfig(steps=2, batch=2, prior_steps=0, prior_patches=2, amp=True)
    assert Trainer(model, decode_pictures([folder], limit=1), tmp_path, config).run()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_device_and_precision_are_decided_together(monkeypatch):
    for has_gpu, device, amp, expected in [
        (False, "auto", None, ("cpu", False)),
        (False, "cpu", True, ("cpu", True)),
        (True, "auto", None, ("cuda", True)),
        (True, "cuda", False, ("cuda", False)),
        (True, "cpu", None, ("cpu", False)),
    ]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        config = TrainConfig(device=device, amp=amp)
        assert (config.torch_device.type, config.uses_bfloat16) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no GPU"):
        TrainConfig(device="cuda")
    with pytest.raises(InputError, match="auto, cpu or cuda, got 'tpu'"):
        TrainConfig(device="tpu")


class OneDevice(TorchDispatchMode):
    """Fails where an operation gets tensors of two devices (a number may be anywhere)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_flatten((args, kwargs or {}))[0]
        devices = {t.device.type for t in leaves if isinstance(t, torch.Tensor) and t.ndim}
        assert len(devices) <= 1, f"{func} of tensors on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "original"])
def test_training_leaves_nothing_on_the_cpu(name, monkeypatch):
    """The device "meta" computes nothing, but refuses to meet another: as good as a GPU here.
    (Not the original: its checkerboard picks by a mask, which needs values.)"""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    for module in (vector, composed, finite):
        monkeypatch.setattr(module, "check_codes", lambda *args: None)
    monkeypatch.setattr(
        torch, "bincount", lambda x, minlength: x.new_zeros(minlength, dtype=torch.int64)
    )
    model = MAKERS[name]()
    for module in model.modules():
        if hasattr(module, "_is_ready"):
            module._is_ready = True
    model.to("meta")
    x = torch.zeros(2, 3, model.patch, model.patch, device="meta")
    with OneDevice():
        model.loss(x)[0].backward()
        model.eval().start_prior()
        with torch.no_grad():
            symbols = model.symbols(x)
        model.learn_counts(symbols)
        if model.prior_parameters():
            model.prior_loss(symbols, x)[0].backward()


def test_wrong_resumes(folder, tmp_path):
    pictures = decode_pictures([folder])
    config = TrainConfig(**QUICK)
    with pytest.raises(InputError, match="nothing to resume"):
        Trainer(MAKERS["vqvae"](), pictures, tmp_path, config).run(resume=True)
    Trainer(MAKERS["vqvae"](), pictures, tmp_path, config).run()
    with pytest.raises(InputError, match="exists"):
        Trainer(MAKERS["vqvae"](), pictures, tmp_path, config).run()
    with pytest.raises(InputError, match="is of another model"):
        Trainer(MAKERS["rqvae"](), pictures, tmp_path, config).run(resume=True)
    (tmp_path / "model.pt").write_bytes(b"no model")
    with pytest.raises(CorruptDataError, match="holds no baseline model"):
        load(tmp_path / "model.pt")
    with pytest.raises(InputError, match="batch"):
        TrainConfig(batch=0)


def test_command_line(folder, tmp_path, capsys):
    run = tmp_path / "run"
    config = json.dumps({**SMALL, "num_quantizers": 2})
    common = ["train", "rqvae", "--data", str(folder), "--out", str(run), "--config", config]
    assert (
        main([*common, "--steps", "3", "--batch", "2", "--prior-patches", "4", "--minutes", "0"])
        == 3
    )
    assert main([*common, "--steps", "3", "--batch", "2", "--prior-patches", "4"]) == 1
    assert "exists: resume that run" in capsys.readouterr().err
    assert main([*common, "--steps", "3", "--batch", "2", "--prior-patches", "4", "--resume"]) == 0
    model = str(run / "model.pt")
    assert (
        main(["compress", "--model", model, str(folder / "photo-0.png"), str(tmp_path / "0.pvqb")])
        == 0
    )
    assert (
        main(["decompress", "--model", model, str(tmp_path / "0.pvqb"), str(tmp_path / "0.png")])
        == 0
    )
    with Image.open(tmp_path / "0.png") as decoded:
        expected = load(model).decompress((tmp_path / "0.pvqb").read_bytes())
        assert np.array_equal(np.asarray(decoded), expected)
    capsys.readouterr()
    assert main(["measure", "--model", model, str(folder), "--limit", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["photo-0.png", "photo-1.png", "mean"]
    assert main(["measure", "--model", model, str(folder)]) == 0
    assert "zlib_bpp" in capsys.readouterr().out
    assert (
        main(["decompress", "--model", model, str(folder / "photo-0.png"), str(tmp_path / "x.png")])
        == 1
    )
    assert "not the bytes of a baseline codec" in capsys.readouterr().err
