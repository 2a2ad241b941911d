"""polarpack.nn: every quantizer's forward against a plain twin, gradients, training aids, checkpoints,
the numpy core, other precisions, compilation, two processes, and bad input."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import polarpack as pp  # noqa: E402
from polarpack import nn  # noqa: E402
from polarpack.errors import InputError, NotFittedError  # noqa: E402

DIM = 8

MAKERS = {
    "vq": lambda: nn.VectorQuantizer(16, DIM),
    "vq-gradient": lambda: nn.VectorQuantizer(16, DIM, learning="gradient"),
    "vq-cosine": lambda: nn.VectorQuantizer(16, DIM, cosine=True),
    "vq-rotation": lambda: nn.VectorQuantizer(16, DIM, gradient="rotation"),
    "vq-simvq": lambda: nn.VectorQuantizer(16, DIM, learning="gradient", transform="linear"),
    "residual": lambda: nn.ResidualVQ(DIM, 16, 3, initialisation="normal"),
    "residual-shared": lambda: nn.ResidualVQ(DIM, 16, 3, shared_codebook=True),
    "residual-gradient": lambda: nn.ResidualVQ(DIM, 16, 3, learning="gradient"),
    "product": lambda: nn.ProductVQ(DIM, 16, 4, initialisation="normal"),
    "polar": lambda: nn.PolarVQ(DIM, 16, 2, 3, initialisation="normal"),
    "polar-depth": lambda: nn.PolarVQ(DIM, 16, 2, 3, depth_unit=0.4, initialisation="normal"),
    "polar-gradient": lambda: nn.PolarVQ(DIM, 16, 2, 3, learning="gradient"),
    "fsq": lambda: nn.FSQ([8, 5, 5], DIM),
    "fsq-plain": lambda: nn.FSQ(5, DIM),
    "fsq-annealed": lambda: nn.AnnealedFSQ(5, DIM),
    "fsq-adaptive": lambda: nn.AdaptiveFSQ((3, 9), DIM),
    "fsq-hierarchical": lambda: nn.HierarchicalFSQ(5, DIM, 3),
    "lfq": lambda: nn.LFQ(6, DIM),
}
TO_CORE = [name for name in MAKERS if name.split("-")[0] in ("vq", "residual", "product", "polar")]
TO_CORE.remove("vq-simvq")


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(module, x, *args):
    """(quantized, codes, loss) of any module."""
    if isinstance(module, nn.VectorQuantizer):
        return module.quantize(x, *args)[:3]
    return module(x, *args)


def make(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return MAKERS[name]()


@pytest.mark.parametrize("name", MAKERS)
def test_forward_and_gradient(name):
    """Shapes, a loss that counts, and a gradient that is the one the method promises."""
    module = make(name)
    x = rows(3, 40, DIM).requires_grad_()
    quantized, codes, loss = run(module, x)
    assert quantized.shape == x.shape and quantized.dtype == x.dtype
    assert codes.shape[:2] == x.shape[:2] and codes.dtype == torch.int64
    assert loss.shape == () and loss.isfinite()
    weight = rows(3, 40, DIM, seed=1)
    (quantized * weight).sum().backward(retain_graph=True)
    passed = x.grad.clone()
    assert passed.isfinite().all() and passed.abs().sum() > 0
    if name in ("vq", "vq-gradient", "vq-simvq") or name.split("-")[0] in ("residual", "product"):
        torch.testing.assert_close(passed, weight)  # straight through: the identity
    if loss.requires_grad:
        loss.backward()
        for parameter in module.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
    learned = [p for p in module.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert learned or not list(module.parameters()), "no parameter has a gradient"


@pytest.mark.parametrize("name", MAKERS)
def test_extreme_inputs_have_finite_gradients(name):
    """Zero rows, and values that saturate every tanh, sigmoid and softmax."""
    module = make(name)
    x = torch.stack(
        [torch.zeros(DIM), torch.full((DIM,), 1e4), *rows(20, DIM) * 100]
    ).requires_grad_()
    if isinstance(module, nn.AnnealedFSQ):
        module.set_progress(1.0)
    quantized, _, loss = run(module, x)
    (quantized.sum() + loss).backward()
    assert quantized.isfinite().all() and loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("name", MAKERS)
def test_codes_alone_say_the_same(name):
    module = make(name)
    for step in range(3):
        run(module, rows(2, 50, DIM, seed=step))
    module.eval()
    x = rows(5, 30, DIM, seed=9)
    quantized, codes, _ = run(module, x)
    assert torch.equal(module.encode(x), codes)
    torch.testing.assert_close(module.decode(codes), quantized.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_checkpoint_is_complete(name):
    """A copy from a checkpoint goes on exactly as the original would, statistics and all."""
    one, other = make(name), make(name, seed=1)
    for step in range(3):
        run(one, rows(2, 50, DIM, seed=step))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 5):
        x = rows(2, 50, DIM, seed=step)
        for a, b in zip(run(one, x), run(other, x), strict=True):
            assert torch.equal(a, b)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16(name):
    """A model cast to bfloat16 keeps codebooks and means in float32, and trains."""
    module = make(name).bfloat16()
    codebooks = [m for m in module.modules() if isinstance(m, nn.Codebook | nn.RadiusLevels)]
    for book in codebooks:
        assert all(b.dtype != torch.bfloat16 for b in book.buffers())
        assert all(p.dtype == torch.float32 for p in book.parameters())
    x = rows(2, 50, DIM).bfloat16().requires_grad_()
    quantized, _, loss = run(module, x)
    assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (quantized.float().square().sum() + loss).backward()
    assert x.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(module, rows(2, 50, DIM))


@pytest.mark.parametrize("name", TO_CORE)
def test_to_and_from_the_core(name):
    module = make(name)
    for step in range(5):
        run(module, rows(4, 200, DIM, seed=step))
    quantizer = module.to_quantizer()
    x = rows(3000, DIM, seed=9)
    x = torch.nn.functional.normalize(x, dim=-1) if "cosine" in name else x
    codes = module.encode(x)
    flat = codes.reshape(len(x), -1)
    if "depth" not in name:
        assert np.array_equal(quantizer.encode(x.numpy()), flat.numpy())
    decoded = quantizer.decode(flat.numpy())
    assert np.array_equal(decoded, module.decode(codes).detach().numpy())
    stored = pp.PolarQuantizer.from_bytes(quantizer.to_bytes())
    assert np.array_equal(stored.decode(flat.numpy()), decoded)
    back = type(module).from_quantizer(quantizer)
    assert torch.equal(back.decode(codes), module.decode(codes))
    if "depth" not in name:
        assert torch.equal(back.encode(x), codes)


def test_from_a_quantizer_the_core_has_fitted():
    pytest.importorskip("faiss")
    x = rows(2000, DIM) * torch.rand(2000, 1) * 4
    fitted = pp.PolarQuantizer(heads=2, stages=2, n_codewords=16, radius_bits=3, beam=1).fit(
        x.numpy()
    )
    module = nn.PolarVQ.from_quantizer(fitted)
    codes = fitted.encode(x.numpy())
    assert np.array_equal(module.encode(x).numpy(), codes)
    assert np.array_equal(module.decode(torch.from_numpy(codes)).numpy(), fitted.decode(codes))
    module(x)  # trains on
    with pytest.raises(InputError, match="codeword 0"):
        nn.PolarVQ.from_quantizer(fitted, depth_unit=0.1)


def test_fsq_to_the_core():
    fsq = nn.FSQ([8, 5, 3, 2])
    x = rows(500, 4)
    q = fsq.to_quantizer()
    codes = q.encode((fsq.bound(x) / fsq.width).numpy())
    assert np.array_equal(codes, fsq.encode(x).numpy())
    assert np.array_equal(q.decode(codes), fsq.decode(fsq.encode(x)).numpy())
    with pytest.raises(InputError, match="field 0 has 7"):
        nn.FSQ([7, 5]).to_quantizer()


def test_quantizer_of_another_kind_is_refused():
    x = np.random.default_rng(0).standard_normal((300, DIM), dtype=np.float32)
    fitted = pp.PolarQuantizer(fine="grid", radius_bits=0).fit(x)
    with pytest.raises(InputError, match="expected a fitted PolarQuantizer of codebooks"):
        nn.VectorQuantizer.from_quantizer(fitted)
    product = nn.ProductVQ(DIM, 16, 4).to_quantizer()
    with pytest.raises(InputError, match="expected 1 heads"):
        nn.VectorQuantizer.from_quantizer(product)
    with pytest.raises(InputError, match="with a radius"):
        nn.PolarVQ.from_quantizer(product)
    with pytest.raises(InputError, match="one stage"):
        nn.VectorQuantizer.from_quantizer(nn.ResidualVQ(DIM, 16, 2).to_quantizer())


# ------------------------------------------------------------------ the codebook against a twin


def test_running_means_against_a_plain_loop():
    vq = nn.VectorQuantizer(8, 3, decay=0.9, epsilon=1e-5, initialisation="uniform")
    words = vq.embedding.numpy().astype(np.float64)
    n, m = np.ones(8), words.copy()
    for step in range(4):
        x = rows(2, 20, 3, seed=step)
        flat = x.reshape(-1, 3).numpy().astype(np.float64)
        nearest = ((flat[:, None] - words) ** 2).sum(-1).argmin(1)
        quantized, loss, perplexity = vq(x)
        expected = words[nearest]
        assert np.allclose(quantized.reshape(-1, 3).numpy(), expected, atol=1e-6)
        assert np.isclose(loss.item(), 0.25 * ((flat - expected) ** 2).mean(), rtol=1e-5)
        p = np.bincount(nearest, minlength=8) / len(flat)
        assert np.isclose(perplexity.item(), np.exp(-sum(q * np.log(q) for q in p if q)), rtol=1e-5)
        for k in range(8):
            n[k] = 0.9 * n[k] + 0.1 * (nearest == k).sum()
            m[k] = 0.9 * m[k] + 0.1 * flat[nearest == k].sum(0)
        smoothed = (n + 1e-5) / (n.sum() + 8e-5) * n.sum()
        words = m / smoothed[:, None]
        assert np.allclose(vq.embedding.numpy(), words, atol=1e-5)


def test_gradient_codebook_learns_the_mean():
    torch.manual_seed(0)
    vq = nn.VectorQuantizer(1, 4, learning="gradient")
    x = rows(100, 4) + 3
    optimizer = torch.optim.SGD(vq.parameters(), lr=1.0)
    for _ in range(40):
        optimizer.zero_grad()
        vq(x)[1].backward()
        optimizer.step()
    torch.testing.assert_close(vq.embedding[0], x.mean(0), rtol=1e-3, atol=1e-3)


def test_distance_matrix():
    vq, x = nn.VectorQuantizer(16, 5), rows(3, 4, 5)
    expected = torch.cdist(x.view(-1, 5), vq.embedding).square()
    torch.testing.assert_close(vq.get_distance_matrix(x), expected, rtol=1e-4, atol=1e-5)


def test_rotation_trick_turns_the_gradient():
    """The gradient at x is that of q, turned back by the rotation from x to q and scaled."""
    x, q, g = (rows(50, 6, seed=s) for s in (1, 2, 3))
    x.requires_grad_()
    out = nn.rotate_to(x, q)
    assert torch.equal(out, q)
    out.backward(g)
    scale = (q.norm(dim=1) / x.norm(dim=1)).detach()
    torch.testing.assert_close(x.grad.norm(dim=1), scale * g.norm(dim=1))
    e, f = (torch.nn.functional.normalize(v.detach(), dim=1) for v in (x, q))
    cosine = (e * x.grad).sum(1) / scale  # R e = f, so e . R^T g = f . g
    torch.testing.assert_close(cosine, (f * g).sum(1), rtol=1e-4, atol=1e-5)


def test_large_searches_go_in_parts(monkeypatch):
    from polarpack.nn import codebook

    vq, x = nn.VectorQuantizer(16, 4).eval(), rows(300, 4)
    whole = vq.quantize(x).codes
    monkeypatch.setattr(codebook, "MAX_SCORES", 16 * 7)
    assert torch.equal(vq.quantize(x).codes, whole)


def test_mask():
    """Masked vectors are quantized, and count for nothing else."""
    x = rows(2, 60, DIM)
    mask = torch.arange(120).view(2, 60) % 3 > 0
    for name in ("vq", "vq-gradient", "residual", "product", "polar", "polar-depth"):
        one, other = make(name), make(name)
        torch.manual_seed(1)  # for first codewords
        with_mask = run(one, x, mask)
        torch.manual_seed(1)
        without = run(other, x[mask])
        assert torch.equal(with_mask[1][mask], without[1])
        torch.testing.assert_close(with_mask[2], without[2])
        for key, value in one.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key])
        run(one, x, torch.zeros_like(mask))[2].isfinite()
    with pytest.raises(InputError, match=r"bool mask of shape \(2, 60\)"):
        make("vq")(x, mask[0])


def test_channels_first_is_the_same():
    one, other = make("vq"), make("vq")
    other.layout = "channels_first"
    x = rows(2, 5, 6, DIM)
    torch.manual_seed(1)
    expected = one.quantize(x)
    torch.manual_seed(1)
    for a, b in zip(expected, other.quantize(x.movedim(-1, 1)), strict=True):
        torch.testing.assert_close(a, b.movedim(1, -1) if b.ndim == 4 else b)
    codes = other.encode(x.movedim(-1, 1))
    assert codes.shape == (2, 5, 6)
    assert torch.equal(other.get_codebook_entry(codes).movedim(1, -1), one.decode(codes))


def test_initialisations():
    x = rows(600, DIM) * 3 + 1
    for how in ("uniform", "normal", "orthogonal", "data", "kmeans"):
        torch.manual_seed(0)
        vq = nn.VectorQuantizer(32, DIM, initialisation=how)
        if how in ("data", "kmeans"):
            with pytest.raises(NotFittedError, match="first batch in training mode"):
                vq.eval()(x)
        quantized, _, perplexity = vq.train()(x)
        if how == "data":
            assert perplexity > 16
        if how == "kmeans":
            _, assignment = pp.kmeans(x.numpy(), 32)
            best = sum(
                np.var(x.numpy()[assignment == k], axis=0).sum() * (assignment == k).sum()
                for k in range(32)
            )
            assert (quantized - x).square().sum().item() < 1.1 * best
        if how == "orthogonal":
            words = nn.VectorQuantizer(4, DIM, initialisation=how).embedding
            torch.testing.assert_close(words @ words.T, torch.eye(4), rtol=0, atol=1e-5)


def test_auto_takes_k_means_where_the_first_batch_allows():
    """Usable at once; a small first batch keeps the uniform start, and an empty one waits."""
    torch.manual_seed(0)
    large, small = nn.VectorQuantizer(64, 4), nn.VectorQuantizer(64, 4)
    x = rows(512, 4) + 5
    assert large.eval()(x)[0].shape == x.shape
    quantized, _, perplexity = large.train()(x)
    assert perplexity > 45 and (quantized - x).square().mean() < 0.2
    before = small.embedding.clone()
    small(x[:0])
    assert not small.codebook.ready
    small(x[:20])
    assert small.codebook.ready and torch.equal(small.embedding[1:].sign(), before[1:].sign())


def test_dead_codewords_are_revived():
    torch.manual_seed(0)
    far = {"uniform": 0.0, "revived": 0.5}
    dead = {}
    for name, below in far.items():
        vq = nn.VectorQuantizer(64, 4, decay=0.8, revive_below=below, initialisation="uniform")
        for step in range(30):
            vq(rows(512, 4, seed=step) + 5)
        nn.reset_usage(vq)
        vq(rows(512, 4, seed=99) + 5)
        dead[name] = nn.usage(vq).n_dead
    assert dead["uniform"] > 40 and dead["revived"] < 10


def test_shared_codebook_learns_from_all_stages():
    vq = make("residual-shared")
    vq(rows(100, DIM))
    assert len(vq.codebooks) == 1 and vq.codebooks[0].hits.sum() == 300


def test_stage_dropout_leaves_prefixes():
    torch.manual_seed(0)
    vq = nn.ResidualVQ(DIM, 16, 4, stage_dropout=0.9, initialisation="normal")
    seen = set()
    for step in range(30):
        _, codes, _ = vq(rows(20, DIM, seed=step))
        used = (codes[0] >= 0).sum().item()
        assert (codes[:, :used] >= 0).all() and (codes[:, used:] == -1).all()
        seen.add(used)
    assert seen == {1, 2, 3, 4}
    codes = vq.eval()(rows(20, DIM))[1]
    assert (codes >= 0).all()
    codes[:, 2:] = -1
    torch.testing.assert_close(vq.decode(codes), vq.decode_stages(codes)[:2].sum(0))


def test_each_stage_lowers_the_error():
    torch.manual_seed(0)
    vq = nn.ResidualVQ(4, 32, 4, initialisation="kmeans", decay=0.8)
    for step in range(10):
        vq(rows(1024, 4, seed=step))
    x = rows(1000, 4, seed=77)
    parts = vq.eval().decode_stages(vq.encode(x)).cumsum(0)
    errors = (parts - x).square().mean(dim=(1, 2))
    assert (errors.diff() < 0).all() and errors[-1] < 0.2 * errors[0]


def test_polar_depth_follows_the_radius():
    torch.manual_seed(0)
    vq = nn.PolarVQ(DIM, 16, 2, 4, depth_unit=0.2, initialisation="kmeans")
    x = torch.nn.functional.normalize(rows(2000, DIM), dim=1)
    x = x * torch.logspace(-2, 1, 2000)[:, None]
    for _ in range(5):
        vq(x)
    codes = vq.eval()(x)[1]
    depth = vq.depth(vq.radius.decode(codes[:, 0]))
    assert set(depth.tolist()) >= {1, 2, 3, 4} and (depth.diff() >= 0).all()
    for stage in range(4):
        fields = codes[:, 1 + 2 * stage : 3 + 2 * stage]
        assert (fields[depth <= stage] == 0).all()
    # the absolute error is bounded alike for large and small rows, unlike with one fixed depth
    for radius, stages in ((0.1, 1), (0.5, 1), (0.51, 2), (0.94, 2), (0.96, 3), (9.0, 4)):
        assert vq.depth(torch.tensor(radius)).item() == stages
    assert vq.depth(torch.tensor(0.0)).item() == 0
    zero, _, _ = vq(torch.zeros(1, DIM))
    assert zero.abs().sum() == 0


def test_polar_radius_levels_are_nearest_by_ratio():
    vq = make("polar")
    for step in range(20):
        vq(rows(500, DIM, seed=step) * torch.rand(500, 1) * 10)
    levels = vq.radius.levels()
    assert levels[0] == 0 and (levels.diff() > 0).all()
    r = torch.logspace(-1, 2, 500)
    plain = (r[:, None].log() - levels[1:].log()).abs().argmin(1) + 1
    assert torch.equal(vq.radius.assign(r)[r > levels[1]], plain[r > levels[1]])


# --------------------------------------------------------------------------------------- FSQ


def test_fsq_against_the_paper():
    """Appendix A.1 of arXiv 2309.15505, number by number."""
    levels = [8, 5, 4, 3]
    fsq, x = nn.FSQ(levels), rows(200, 4) * 2
    quantized, codes, loss = fsq(x)
    for i, n in enumerate(levels):
        half = (n - 1) * (1 + 1e-3) / 2
        offset = 0.0 if n % 2 else 0.5
        bounded = np.tanh(x[:, i].double().numpy() + np.arctanh(offset / half)) * half - offset
        assert np.array_equal(np.round(bounded) + n // 2, codes[:, i].numpy())
        assert np.allclose(np.round(bounded) / (n // 2), quantized[:, i].numpy())
        assert set(codes[:, i].tolist()) == set(range(n))
    assert loss == 0 and fsq.codebook_size == 480
    index = fsq.index(codes)
    assert index.min() >= 0 and index.max() < 480
    assert torch.equal(index, codes @ torch.tensor([1, 8, 40, 160]))


def test_annealing_makes_levels_finer():
    fsq, x = nn.AnnealedFSQ(5, 6), rows(400, 6)
    errors, sizes = [], []
    for progress in (0.0, 0.5, 1.0):
        fsq.set_progress(progress)
        quantized, codes, loss = fsq(x)
        t = float(fsq.temperature)
        assert np.isclose(t, 0.1**progress, rtol=1e-5)
        bounded = 2 * torch.tanh(x / t)
        torch.testing.assert_close(quantized, (bounded / t).round() * t)
        errors.append((quantized - bounded).square().mean().item())
        sizes.append(fsq.alphabet_sizes[0])
        assert codes.max() < sizes[-1] and loss.isfinite()
        assert (fsq.hits.sum(1) == 400).all()
    assert sizes == [5, 13, 41] and errors[0] > 4 * errors[1] > 16 * errors[2]
    taken = fsq.counts > 0
    assert ((fsq.means - (torch.arange(41) - 20) * 0.1).abs()[taken] <= 0.0501).all()


def test_entropy_term_spreads_levels():
    bits = {}
    for weight in (0.0, 3.0):
        fsq = nn.AnnealedFSQ(9, 2, final_temperature=1.0, entropy_weight=weight)
        z = torch.nn.Parameter(rows(300, 2) * 0.3)
        optimizer = torch.optim.Adam([z], lr=0.02)
        for _ in range(100):
            optimizer.zero_grad()
            fsq(z)[2].backward()
            optimizer.step()
        nn.reset_usage(fsq)
        fsq(z)
        bits[weight] = nn.usage(fsq).bits
    assert bits[3.0] > bits[0.0] + 1


def test_adaptive_levels_follow_complexity():
    torch.manual_seed(0)
    fsq = nn.AdaptiveFSQ((3, 11), 16)
    x = rows(600, 16) * torch.logspace(-2, 1, 600)[:, None]
    for _ in range(50):
        fsq(x)
    codes = fsq(x)[1]
    levels = codes[:, 0] + 3
    assert levels[:100].float().mean() + 3 < levels[-100:].float().mean()
    assert (codes[:, 1:] < levels[:, None]).all() and codes.min() >= 0
    (group,) = fsq.parameter_groups(1e-3)
    assert group["lr"] == 1e-4 and len(group["params"]) == 2
    fsq(x)[2].backward()
    assert fsq.bias.grad.abs() > 0


def test_hierarchy_refines():
    x = rows(300, 4)
    errors = []
    for n in (1, 2, 3):
        quantized, codes, _ = nn.HierarchicalFSQ(5, 4, n)(x)
        errors.append((quantized - torch.tanh(x)).square().mean().item())
        assert codes.shape == (300, 4 * n)
    assert errors[0] > 8 * errors[1] > 64 * errors[2]


def test_lfq_entropies():
    lfq, x = nn.LFQ(3, entropy_weight=1.0, commitment_cost=0.0), rows(500, 3)
    quantized, codes, loss = lfq(x)
    assert torch.equal(quantized, torch.where(x > 0, 1.0, -1.0))
    p = 1 / (1 + np.exp(-2 * x.double().numpy()))

    def entropy(q):
        return -(q * np.log(q) + (1 - q) * np.log(1 - q))

    expected = entropy(p).mean(0).sum() - entropy(p.mean(0)).sum()
    assert np.isclose(loss.item(), expected, rtol=1e-4)
    assert torch.equal(lfq.index(codes), codes @ torch.tensor([1, 2, 4]))


# -------------------------------------------------------------------------- SimVQ, orthogonal


def test_simvq_moves_all_codewords_by_one_map():
    torch.manual_seed(0)
    vq = make("vq-simvq")
    first = vq.embedding.detach().clone()
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        vq(rows(50, DIM, seed=step))[1].backward()
        optimizer.step()
    assert vq.codebook.embedding.requires_grad is False
    moved = (vq.embedding - first).norm(dim=1)
    assert (moved > 0).all()
    with pytest.raises(InputError, match="linear transform"):
        vq.to_quantizer()


def test_orthogonal_loss():
    options = {"learning": "gradient", "initialisation": "normal"}
    vq = nn.VectorQuantizer(4, DIM, orthogonal_weight=2.0, **options)
    words = vq.embedding.detach()
    cosines = torch.nn.functional.normalize(words, dim=1)
    cosines = cosines @ cosines.T - torch.eye(4)
    torch.testing.assert_close(vq.codebook.orthogonal_loss(), 2 * cosines.square().sum() / 16)
    plain = nn.VectorQuantizer(4, DIM, **options)
    plain.codebook.set_codewords(words[None])
    x = rows(20, DIM)
    difference = vq(x)[1] - plain(x)[1]
    torch.testing.assert_close(difference, vq.codebook.orthogonal_loss())


# ------------------------------------------------------------------------------------- usage


def test_usage_report(tmp_path):
    pytest.importorskip("matplotlib")
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), make("product"))
    model(rows(10, 7, DIM))
    report = nn.usage(model)
    codebook = model[1].codebook
    assert [c.name for c in report.codebooks] == [f"1.codebook head {h}" for h in range(4)]
    for head, c in enumerate(report.codebooks):
        assert c.n_vectors == 70 and c.histogram == codebook.hits[head].tolist()
        p = np.array(c.histogram) / 70
        assert np.isclose(c.bits, -sum(q * np.log2(q) for q in p if q))
        assert np.isclose(c.perplexity, 2**c.bits) and c.n_dead == (p == 0).sum()
    assert report.to_dict()["codebooks"][0]["size"] == 16
    assert str(report).count("\n") == 4
    report.plot(tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes()[:4] == b"\x89PNG"
    nn.reset_usage(model)
    assert nn.usage(model).codebooks[0].perplexity == 0
    with pytest.raises(InputError, match="Linear holds no quantizer"):
        nn.usage(torch.nn.Linear(2, 2))


# --------------------------------------------------------------- compilation, two processes


@pytest.mark.parametrize("name", ["vq", "residual", "polar", "fsq", "fsq-annealed"])
def test_compiled_is_the_same(name):
    """One graph, without a break, and the same numbers and statistics."""
    x = rows(64, DIM)
    plain, module = make(name), make(name)
    for m in (plain, module):
        torch.manual_seed(1)
        run(m, x)  # first values, where they come from data
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [plain(inputs[0]), compiled(inputs[1])]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    for x_in, (quantized, *_) in zip(inputs, outputs, strict=True):
        quantized.square().sum().backward()
        assert x_in.grad.isfinite().all()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value)


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from polarpack import nn

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(8, 8),
    nn.ResidualVQ(8, 16, 3, initialisation="kmeans", revive_below=0.3, stage_dropout=0.5),
)
other = nn.PolarVQ(8, 16, 2, 2, learning="gradient")
data = torch.randn(6, 200, 8, generator=torch.Generator().manual_seed(1))
torch.manual_seed(100 + rank)  # draws must not depend on a process's own seed
models = [DDP(model), DDP(other)]
optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
for batch in data:
    mine = batch[rank::2]
    optimizer.zero_grad()
    for m in models:
        quantized, _, loss = m(mine)
        (loss + (quantized - mine).square().mean()).backward()
    optimizer.step()
fsq = nn.AnnealedFSQ(5, 8)
fsq(data[0, rank::2])
state = {**model.state_dict(), **{"p" + k: v for k, v in other.state_dict().items()}}
state |= {"f" + k: v for k, v in fsq.state_dict().items()}
torch.save(state, f"{path}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_keep_one_codebook(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":  # a machine's own name need not resolve
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    script = textwrap.dedent(WORKER)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6, msg=key)
    assert one["fhits"].sum() == 8 * 200  # both halves of the batch counted


def test_statistics_of_two_halves_add_up():
    """What two processes sum is what one would have had: the counts are linear in the vectors."""
    book = nn.VectorQuantizer(16, DIM).codebook
    x = rows(100, DIM)[None]
    codes = book.assign(x)
    whole = book._sums(codes, x, None)
    halves = [book._sums(codes[:, s], x[:, s], None) for s in (slice(0, 50), slice(50, 100))]
    for a, b, c in zip(whole, *halves, strict=True):
        torch.testing.assert_close(a, b + c)


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", MAKERS)
def test_wrong_inputs(name):
    module = make(name)
    with pytest.raises(InputError, match=r"shape \(\.\.\., 8\), got \(3, 7\)"):
        module(torch.zeros(3, 7))
    with pytest.raises(InputError, match=r"float dtype, got torch.int64"):
        module(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(InputError, match=r"torch tensor, got ndarray"):
        module(np.zeros((3, 8)))
    sizes = module._sizes() if name.startswith("vq") else module.alphabet_sizes
    codes = torch.zeros(4, *([len(sizes)] if not name.startswith("vq") else []), dtype=torch.int64)
    module.decode(codes)
    with pytest.raises(InputError, match=r"codes of field 0 in -?\d..\d+, got"):
        module.decode(codes + sizes[0])
    with pytest.raises(InputError, match=r"codes of field 0 in"):
        module.decode(codes - 2)
    with pytest.raises(InputError, match="integer tensor"):
        module.decode(codes.float())


@pytest.mark.parametrize(
    "name", ["vq", "vq-gradient", "residual", "product", "polar", "fsq", "lfq"]
)
def test_nan_activations(name):
    """Named on request; else they show in the loss or output and never enter the statistics."""
    module = make(name)
    x = rows(50, DIM)
    x[7, 3] = float("nan")
    module.nonfinite = "raise"
    with pytest.raises(InputError, match=r"finite, got nan first at \(7, 3\)"):
        module(x)
    module.nonfinite = "ignore"
    quantized, codes, _ = run(module, x)
    assert quantized[7].isnan().any() and codes.min() >= 0
    assert all(v.isfinite().all() for k, v in module.state_dict().items() if v.is_floating_point())


def test_too_few_vectors_for_the_codebook():
    with pytest.raises(InputError, match="64 codewords needs at least .* got 10"):
        nn.VectorQuantizer(64, 4, initialisation="kmeans")(rows(10, 4))


def test_unknown_settings():
    with pytest.raises(InputError, match="initialisation"):
        nn.VectorQuantizer(8, 4, initialisation="zeros")
    with pytest.raises(InputError, match="unknown options"):
        nn.ResidualVQ(8, 4, 2, codebok_size=3)
    with pytest.raises(InputError, match="multiple of heads"):
        nn.ProductVQ(9, 16, 4)
    with pytest.raises(InputError, match="gradient"):
        nn.VectorQuantizer(8, 4, gradient="none")
    with pytest.raises(InputError, match="need learning='gradient'"):
        nn.VectorQuantizer(8, 4, transform="linear")
    for bad in ([], [1, 5], [8, 5.5], "8", [5000]):
        with pytest.raises(InputError, match="levels"):
            nn.FSQ(bad)
    with pytest.raises(InputError, match="least < most"):
        nn.AdaptiveFSQ((5, 5), 8)


@pytest.mark.parametrize("name", MAKERS)
def test_checkpoint_of_another_configuration(name):
    module = make(name)
    others = {
        "vq": nn.VectorQuantizer(32, DIM),
        "fsq": nn.FSQ([4, 4, 4], DIM),
        "lfq": nn.LFQ(5, DIM),
        "residual": nn.ResidualVQ(DIM, 32, 3),
        "product": nn.ProductVQ(DIM, 8, 4),
        "polar": nn.PolarVQ(DIM, 8, 2, 3),
    }
    with pytest.raises(InputError, match="checkpoint of another"):
        module.load_state_dict(others[name.split("-")[0]].state_dict())
