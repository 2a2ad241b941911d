"""Are polarpack.nn's quantizers as fast and as healthy as those of vector-quantize-pytorch?

Both get equal settings: sizes, decay, commitment, k-means initialisation, revival. Speed: a forward
and a backward in training, the two alternating, medians of paired ratios. Health: codebooks trained
on 4 x 4 RGB patches of photographs for 500 steps; perplexity and error on patches of other
photographs. The peer is needed for this script only: pip install vector-quantize-pytorch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import vector_quantize_pytorch as peer
from entropy_speed import cpu_name

import polarpack
from polarpack import nn

SEED = 0
RESULTS = Path(__file__).parent / "results" / "nn_quantizers.json"
STEPS, BATCH, PATCH = 500, 4096, 4
COMMITMENT, DECAY = 0.25, 0.99
REVIVE = 1.0  # vectors a step below which a codeword restarts, in both

Module = Callable[[torch.Tensor], Any]


def contestants() -> dict[str, tuple[tuple[int, ...], Module, Module]]:
    """Input shape, ours, theirs: by what is compared."""

    def vq(dim: int, size: int, **settings: Any) -> Any:
        return peer.VectorQuantize(
            dim=dim, codebook_size=size, decay=DECAY, commitment_weight=COMMITMENT, **settings
        )

    shape = (4, 1024, 64)
    return {
        "VQ, 512 x 64": (shape, nn.VectorQuantizer(512, 64), vq(64, 512)),
        "VQ, 1024 x 32": ((4, 1024, 32), nn.VectorQuantizer(1024, 32), vq(32, 1024)),
        "VQ, 64 x 8": ((4, 1024, 8), nn.VectorQuantizer(64, 8), vq(8, 64)),
        "VQ, 512 x 64, revival": (
            shape,
            nn.VectorQuantizer(512, 64, revive_below=REVIVE),
            vq(64, 512, threshold_ema_dead_code=REVIVE),
        ),
        "VQ, 512 x 64, cosine": (
            shape,
            nn.VectorQuantizer(512, 64, cosine=True),
            vq(64, 512, use_cosine_sim=True),
        ),
        "VQ, 512 x 64, rotation trick": (
            shape,
            nn.VectorQuantizer(512, 64, gradient="rotation"),
            vq(64, 512, rotation_trick=True),
        ),
        "VQ, 512 x 64, gradient codebook": (
            shape,
            nn.VectorQuantizer(512, 64, learning="gradient"),
            peer.VectorQuantize(
                dim=64,
                codebook_size=512,
                learnable_codebook=True,
                ema_update=False,
                commitment_weight=COMMITMENT,
            ),
        ),
        "residual, 4 x 256 x 64": (
            shape,
            nn.ResidualVQ(64, 256, 4),
            peer.ResidualVQ(
                dim=64,
                codebook_size=256,
                num_quantizers=4,
                decay=DECAY,
                commitment_weight=COMMITMENT,
            ),
        ),
        "product, 8 heads of 256 x 8": (
            shape,
            nn.ProductVQ(64, 256, 8),
            vq(64, 256, codebook_dim=8, heads=8, separate_codebook_per_head=True),
        ),
        "FSQ 8 5 5 5, 64 wide": (shape, nn.FSQ([8, 5, 5, 5], 64), peer.FSQ([8, 5, 5, 5], dim=64)),
    }


def one_step(module: Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    outputs = module(x)
    losses = [t for t in outputs[1:] if t.dtype.is_floating_point and t.requires_grad]
    torch.autograd.backward([outputs[0].sum(), *(t.sum() for t in losses)])


def speed(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of both, and the median of ours / theirs over pairs of runs."""
    rows = []
    for what, (shape, ours, theirs) in contestants().items():
        times: list[list[float]] = [[], []]
        for repeat in range(repeats + 2):
            for place, module in enumerate((ours, theirs)):
                x = torch.randn(shape, requires_grad=True)
                start = time.process_time()
                one_step(module, x)
                if repeat > 1:
                    times[place].append(time.process_time() - start)
        ratios = [a / b for a, b in zip(*times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "what": what,
                "ms_ours": round(1e3 * statistics.median(times[0]), 2),
                "ms_theirs": round(1e3 * statistics.median(times[1]), 2),
                "ratio": round(middle, 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
            }
        )
    return rows


def patches(crops: np.ndarray[Any, Any]) -> torch.Tensor:
    """(n, side, side, 3) uint8 -> (patches, 48) float32 in -0.5..0.5."""
    n, side = crops.shape[:2]
    x = torch.from_numpy(crops).float().div(255).sub(0.5)
    x = x.view(n, side // PATCH, PATCH, side // PATCH, PATCH, 3).transpose(2, 3)
    return x.reshape(-1, PATCH * PATCH * 3)


def photograph_patches(data: list[Path]) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Training and held-out patches: of photographs, or of smooth noise where none are given."""
    if data:
        from polarpack_image.data import decode_pictures, validation_crops

        train, held = decode_pictures(data, limit=200).split()
        crops = [validation_crops(p, n, 128, SEED) for p, n in ((train, 600), (held, 64))]
        return patches(crops[0]), patches(crops[1]), "photographs"
    rng = np.random.default_rng(SEED)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128))) + 1e-2
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((96, 3, 128, 128))) / frequency).real
    noise = noise / noise.std() * 50 + 128
    crops_of = noise.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return patches(crops_of[:64]), patches(crops_of[64:]), "noise of a 1/f spectrum"


def health(train: torch.Tensor, held: torch.Tensor, seeds: int) -> list[dict[str, Any]]:
    """Perplexity and error on held-out patches after 500 steps, for several seeds."""
    dim = train.shape[1]
    shared: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "VQ 512, k-means, revival": (
            lambda: nn.VectorQuantizer(512, dim, initialisation="kmeans", revive_below=REVIVE),
            lambda: peer.VectorQuantize(
                dim=dim,
                codebook_size=512,
                decay=DECAY,
                kmeans_init=True,
                threshold_ema_dead_code=REVIVE,
            ),
        ),
        "VQ 512, k-means": (
            lambda: nn.VectorQuantizer(512, dim, initialisation="kmeans"),
            lambda: peer.VectorQuantize(dim=dim, codebook_size=512, decay=DECAY, kmeans_init=True),
        ),
        "VQ 512, cosine, k-means, revival": (
            lambda: nn.VectorQuantizer(
                512, dim, cosine=True, initialisation="kmeans", revive_below=REVIVE
            ),
            lambda: peer.VectorQuantize(
                dim=dim,
                codebook_size=512,
                decay=DECAY,
                use_cosine_sim=True,
                kmeans_init=True,
                threshold_ema_dead_code=REVIVE,
            ),
        ),
    }
    rows = []
    for what, makers in shared.items():
        found: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
        for seed in range(seeds):
            for name, make in zip(found, makers, strict=True):
                torch.manual_seed(seed)
                module = make()
                draw = torch.Generator().manual_seed(seed)
                for _ in range(STEPS):
                    at = torch.randint(len(train), (BATCH,), generator=draw)
                    module(train[at][None])
                module.eval()
                quantized, *rest = module(held[None])
                codes = module.encode(held) if name == "ours" else rest[0][0]
                p = torch.bincount(codes.flatten(), minlength=512).double() / codes.numel()
                target = held
                if "cosine" in what:
                    target = torch.nn.functional.normalize(held, dim=-1)
                    quantized = torch.nn.functional.normalize(quantized, dim=-1)
                error = (quantized[0] - target).square().mean()
                perplexity = torch.exp(-torch.special.xlogy(p, p).sum())
                found[name].append([float(perplexity), float(error), int((p == 0).sum())])
        row: dict[str, Any] = {"what": what}
        for name, values in found.items():
            perplexity, error, dead = np.mean(values, axis=0)
            row[name] = {
                "perplexity": round(float(perplexity), 1),
                "mse": float(f"{error:.4g}"),
                "unused": round(float(dead), 1),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", default=[], help="tar or folder")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    speeds = speed(args.repeats)
    for row in speeds:
        print("{what:34s}{ms_ours:8.2f} ms{ms_theirs:9.2f} ms   ratio {ratio:.3f}".format(**row))
    train, held, source = photograph_patches(args.data)
    codebooks = health(train, held, args.seeds)
    for row in codebooks:
        print(f"{row['what']:34s}", row["ours"], row["theirs"])
    versions = {"python": platform.python_version(), "polarpack": polarpack.__version__}
    versions |= {name: version(name) for name in ("torch", "vector-quantize-pytorch")}
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "threads": 1,
        "clock": "CPU time of the process",
        "cpu": cpu_name(),
        "versions": versions,
        "data": [
            {"name": f"4 x 4 patches of {source}", "shape": list(t.shape), "dtype": "float32"}
            for t in (train, held)
        ],
        "speed": speeds,
        "codebooks": codebooks,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
