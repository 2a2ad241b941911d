"""Small tables with the structure of real ones, and quantizers fitted on them, for many tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import polarpack as pp


def correlated(n: int, d: int, seed: int = 0) -> np.ndarray:
    """(n, d) float32 rows of a mixture of three correlated Gaussians around means of their own, as
    embeddings are: a falling spectrum, clusters, and rows of different length."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(d)  # the same distribution for every seed
    spectrum = np.arange(1, d + 1) ** -0.7
    axes = [np.linalg.qr(shared.standard_normal((d, d)))[0] for _ in range(3)]
    means = shared.standard_normal((3, d)) * 0.7
    group = rng.integers(0, 3, n)
    x = rng.standard_normal((n, d)) * spectrum
    x = np.stack([axes[g] @ row for g, row in zip(group, x, strict=True)]) if n else x
    return ((x + means[group]) * np.exp(0.3 * rng.standard_normal((n, 1)))).astype(np.float32)


D = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "trellis": {"fine": "trellis", "rotation": "klt", "bits": 3.0, "radius_bits": 0},
    "polar trellis": {"fine": "trellis", "rotation": "klt", "bits": 3.0, "radius_bits": 6},
    "classes": {
        "fine": "trellis",
        "rotation": "klt",
        "bits": 3.0,
        "radius_bits": 0,
        "n_classes": 4,
        "n_leading": 8,
    },
    "leading axes": {
        "fine": "trellis",
        "rotation": "klt",
        "bits": 2.0,
        "radius_bits": 0,
        "n_components": 5,
    },
    "native trellis": {"fine": "trellis", "step": 0.25, "radius_bits": 0, "center": True},
    "bitshift": {"fine": "bitshift", "rotation": "klt", "bits": 2.1, "radius_bits": 3,
                 "state_bits": 6, "layout": "rows"},
    "bitshift classes": {"fine": "bitshift", "rotation": "klt", "bits": 1.4, "radius_bits": 0,
                         "n_classes": 3, "n_leading": 4, "layout": "rows"},
    "polar-vq": {"heads": 3, "stages": 2, "n_codewords": 16},
    "pq": {"heads": 4, "stages": 1, "n_codewords": 16, "radius_bits": 0, "spherical": False,
           "layout": "rows"},
    "allocated": {"bits": 2.0, "rotation": "klt", "n_codewords": 64, "radius_bits": 3},
    "random lloyd": {"fine": "lloyd", "scalar_bits": 3, "rotation": "random", "radius_bits": 8},
    "hadamard grid": {"fine": "grid", "scalar_bits": 5, "rotation": "hadamard", "radius_bits": 0,
                      "layout": "rows"},
    "int8 rows": {"fine": "grid", "scalar_bits": 8, "radius_bits": 10, "radius_norm": "max"},
    "float16": {"fine": "float16", "radius_bits": 0},
}  # fmt: skip
TRELLISES = [name for name, s in SETTINGS.items() if s.get("fine") == "trellis"]
FIXED_RATE = [name for name in SETTINGS if name not in TRELLISES]


@cache
def fitted(name: str, d: int = D) -> pp.PolarQuantizer:
    """The quantizer of these settings, fitted on 500 correlated rows. Not to be changed."""
    return pp.PolarQuantizer(**SETTINGS[name]).fit(correlated(500, d))


def plain_relative_error(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y| / |x| row by row, (n,): what ``max_error`` promises. Each row is divided by a power of
    two of its own first, so that neither 1e300 nor a denormal is lost in the squares."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    e = np.frexp(np.abs(a).max(axis=-1, initial=0.0))[1][..., None]
    # twice half the exponent: 2**1074 is beyond float64
    a, b = (np.ldexp(np.ldexp(v, -(e // 2)), -(e - e // 2)) for v in (a, b))
    error, norm = np.sqrt(((a - b) ** 2).sum(axis=-1)), np.sqrt((a**2).sum(axis=-1))
    return np.where(
        error == 0, 0.0, np.divide(error, norm, out=np.full_like(norm, np.inf), where=norm > 0)
    )
