"""What the tutorials share: small pictures to train on, made by a formula, and their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

FIGURES = Path(__file__).parent / "figures"


def arguments(description: str | None) -> argparse.Namespace:
    """--fast: seconds instead of a minute, worse results; --out: folder of the figures."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fast", action="store_true", help="a few steps only, as CI runs it")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return args


def pictures(n: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    """(n, 3, side, side) in -0.5..0.5: a slope of colour, stripes, and discs with soft edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    out = np.empty((n, 3, side, side), np.float32)
    for picture in out:
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 6)
        along = x * np.cos(angle) + y * np.sin(angle)
        colours = rng.uniform(-0.4, 0.4, (4, 3, 1, 1))
        picture[:] = colours[0] * (0.5 - along) + colours[1] * (0.5 + along)
        stripes = np.sin(2 * np.pi * rng.uniform(2, 5) * along + phase)
        picture += 0.12 * rng.integers(2) * stripes
        for colour in colours[2:]:
            cx, cy, r = rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), rng.uniform(0.1, 0.25)
            inside = 1 / (1 + np.exp((np.hypot(x - cx, y - cy) - r) * 60))
            picture += inside * (colour - picture)
    return torch.from_numpy(out.clip(-0.5, 0.5))


def shown(x: torch.Tensor) -> np.ndarray:
    """(3, H, W) in -0.5..0.5 -> (H, W, 3) in 0..1, for imshow."""
    return (x.detach() + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def psnr(mse: float) -> float:
    """dB of a range of 1."""
    return float(-10 * np.log10(mse))
