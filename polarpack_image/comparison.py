"""One picture through every codec at hand, at equal bytes."""

from __future__ import annotations

from typing import Any

from .benchmark import Bytes, Coder, codecs, msssim, psnr

FEWER_IS_FINER = ("jpeg 2000", "jpeg xl")
RANGES = {"jpeg 2000": (2.0, 400.0), "jpeg xl": (0.1, 25.0)}
WHOLE = ("jpeg", "jpeg 4:4:4", "webp", "avif")  # settings are whole numbers
N_TRIES = 9


def at_equal_bytes(rgb: Bytes, bpp: float, names: tuple[str, ...] | None = None) -> list[Any]:
    """Rows {codec, bytes, bpp, psnr, msssim, data, decoded...} of each codec at the finest setting
    that stays within ``bpp`` (at its coarsest, where even that is above)."""
    rows = []
    for name, (coder, _) in codecs().items():
        if name == "png" or (names is not None and name not in names):
            continue
        data, decoded = fit_bytes(name, coder, rgb, bpp)
        rows.append(
            {
                "codec": name,
                "bytes": len(data),
                "bpp": 8 * len(data) / (rgb.shape[0] * rgb.shape[1]),
                "psnr": psnr(rgb, decoded),
                "msssim": msssim(rgb, decoded),
            }
        )
    return rows


def fit_bytes(name: str, coder: Coder, rgb: Bytes, bpp: float) -> tuple[bytes, Bytes]:
    """File and decoded picture of one codec, by bisection of its setting."""
    low, high = RANGES.get(name, (0.0, 100.0))  # from coarse to fine, once turned around
    if name in FEWER_IS_FINER:
        low, high = high, low
    budget = bpp * rgb.shape[0] * rgb.shape[1] / 8
    best = None
    for _ in range(N_TRIES):
        middle = (low + high) / 2
        if name in WHOLE:
            middle = round(middle)
        data, decode = coder(rgb, middle)
        if len(data) <= budget:
            best, low = (data, decode), middle
        else:
            high = middle
    if best is None:
        best = coder(rgb, low)
    return best[0], best[1](best[0])
