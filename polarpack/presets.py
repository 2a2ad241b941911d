"""Named settings of the chain: what others use, and our own, in one harness.

| name | radius | rotation | fine stage | source |
|---|---|---|---|---|
| trellis | - | KLT | dependent quantization, entropy coded | Schwarz et al., DCC 2019 |
| polar_trellis | 6 bits | KLT | the same, of the direction | |
| polar_vq | as earned | KLT or none | heads x residual stages, 1st spherical | ORIGINS: Polar-VQ |
| bitshift | - | KLT | bitshift trellis codes of fixed rate | Tseng et al., NeurIPS 2024 |
| pq | - | - | heads of 8 bits | Jegou et al., TPAMI 2011 |
| opq | - | learned with the heads | heads of 8 bits | Ge et al., CVPR 2013 |
| rq | - | - | whole-vector stages of 8 bits | Chen et al., Sensors 2010 |
| prq | - | - | heads x residual stages of 8 bits | |
| turboquant | 10 bits | random | Lloyd-Max levels shared by all components | Zandieh et al., 2025 |
| sq8 | - | - | 256 uniform levels a column | |
| int8_rows | 10 bits, largest magnitude | - | 8-bit integers | |
| float16 | - | - | half precision | |
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._arrays import Float32, as_float32, as_matrix
from .errors import InputError
from .polar import PolarQuantizer
from .product import ProductQuantizer
from .rotation import covariance, principal_axes

FIXED_RATE = {"sq8": 8.0, "int8_rows": 8.0, "float16": 16.0}
NAMES: tuple[str, ...] = (
    "trellis",
    "polar_trellis",
    "polar_vq",
    "bitshift",
    "pq",
    "opq",
    "rq",
    "prq",
    "turboquant",
    *FIXED_RATE,
)
DEFAULT_BITS = 2.0
CODEWORD_BITS = 8
OPQ_ROUNDS = 8
OPQ_ROWS = 1 << 15


class Preset:
    """A named configuration that still needs data: ``fit`` returns a fitted ``PolarQuantizer``."""

    def __init__(
        self, name: str, bits: float | None = None, *, layout: str | None = None, seed: int = 0
    ) -> None:
        if name not in NAMES:
            raise InputError(f"expected a preset of {', '.join(NAMES)}, got {name!r}")
        if bits is not None and not isinstance(bits, int | float | np.number):
            raise InputError(f"expected bits to be a number, got {bits!r}")
        if name in FIXED_RATE and bits is not None and abs(bits - FIXED_RATE[name]) > 0.5:
            raise InputError(
                f"preset {name!r} has a fixed rate of {FIXED_RATE[name]} bits, got {bits}"
            )
        if bits is not None and not 0 < bits <= 32:
            raise InputError(f"expected bits in (0, 32], got {bits}")
        self.name, self.seed = name, seed
        self.bits = float(bits if bits is not None else FIXED_RATE.get(name, DEFAULT_BITS))
        self.layout: Any = layout or ("archive" if "trellis" in name else "rows")

    def __repr__(self) -> str:
        return f"preset({self.name!r}, bits={self.bits})"

    def settings(self) -> dict[str, Any]:
        """Arguments of ``PolarQuantizer`` (all but what is learned: OPQ's rotation)."""
        common: dict[str, Any] = {"radius_bits": 0, "layout": self.layout, "seed": self.seed}
        codebooks = common | {
            "bits": self.bits,
            "n_codewords": 1 << CODEWORD_BITS,
            "spherical": False,
        }
        match self.name:
            case "trellis":
                return common | {"fine": "trellis", "rotation": "klt", "bits": self.bits}
            case "polar_trellis":
                return common | {
                    "fine": "trellis",
                    "rotation": "klt",
                    "bits": self.bits,
                    "radius_bits": 6,
                }
            case "bitshift":
                return common | {"fine": "bitshift", "rotation": "klt", "bits": self.bits}
            case "pq" | "opq":
                return codebooks | {"stages": 1}
            case "rq":
                return codebooks | {"heads": 1, "stages": 64, "beam": 5}
            case "prq":
                return codebooks | {"stages": 4, "beam": 5}
            case "turboquant":
                return common | {
                    "fine": "lloyd",
                    "scalar_bits": max(1, round(self.bits)),
                    "rotation": "random",
                    "radius_bits": 10,
                    "center": False,
                }
            case "sq8":
                return common | {"fine": "grid", "scalar_bits": 8}
            case "int8_rows":
                return common | {
                    "fine": "grid",
                    "scalar_bits": 8,
                    "radius_bits": 10,
                    "radius_norm": "max",
                }
            case "float16":
                return common | {"fine": "float16"}
        raise AssertionError(self.name)

    def fit(self, x: Any) -> PolarQuantizer:
        """Learn from training rows (n, d), n >= 1, of any float dtype."""
        if as_matrix(x).shape[0] == 0:
            raise InputError("expected at least one row to fit on")
        if self.name == "polar_vq":
            return self._fit_polar_vq(x)
        if self.name == "opq":
            rows = as_float32(x)
            rotation = opq_rotation(rows, self.settings(), self.seed)
            return PolarQuantizer(**(self.settings() | {"rotation": rotation})).fit(x)
        return PolarQuantizer(**self.settings()).fit(x)

    def _fit_polar_vq(self, x: Any) -> PolarQuantizer:
        """Polar-VQ at a given rate: the radius gets the bits it earns, the frame (native order or
        KLT with allocated heads) and the number of stages are chosen on held-out rows."""
        rows = as_float32(x)
        common: dict[str, Any] = {
            "bits": self.bits,
            "radius_bits": radius_bits_for(rows, self.bits),
            "layout": self.layout,
            "seed": self.seed,
        }
        options: list[dict[str, Any]] = [
            common | {"n_codewords": 1024, "rotation": "klt", "spherical": False},
            common | {"n_codewords": 256, "stages": 1},
        ]
        if self.bits >= 1.5:
            options.append(common | {"n_codewords": 256, "stages": 2})
        held_out = min(len(rows) // 5, 2048)
        if held_out < 64:
            return PolarQuantizer(**options[1]).fit(x)
        order = np.random.default_rng(self.seed).permutation(len(rows))
        few, judge = rows[order[held_out:][:TRIAL_ROWS]], rows[order[:held_out]]
        trials = [PolarQuantizer(**option).fit(few) for option in options]
        errors = [float(np.mean((q.decode(q.encode(judge)) - judge) ** 2)) for q in trials]
        return PolarQuantizer(**options[int(np.argmin(errors))]).fit(x)


TRIAL_ROWS = 1 << 14


def preset(
    name: str, bits: float | None = None, *, layout: str | None = None, seed: int = 0
) -> Preset:
    """A named configuration, to be fitted: ``pp.preset("pq", bits=2.0).fit(train)``.

    name: see the module's table. bits: code bits per float (2 by default, fixed for sq8, int8_rows
    and float16); turboquant rounds to whole bits. layout: "rows" (fixed width; the default of all
    but the trellis) or "archive". Raises InputError for an unknown name or an impossible rate.
    """
    return Preset(name, bits, layout=layout, seed=seed)


def radius_bits_for(rows: Float32, bits: float) -> int:
    """Bits (1..8) at which the radius's error is a twentieth of the direction's, which at ``bits``
    per float is taken to be 4^-bits of the energy."""
    radius = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    mean = radius.mean()
    spread = float(radius.std() / mean) if mean > 0 else 0.0
    wanted = 0.05 * 4.0**-bits
    return int(np.clip(np.ceil(0.5 * np.log2(max(spread**2, 1e-12) / wanted)), 1, 8))


def opq_rotation(rows: Float32, settings: dict[str, Any], seed: int = 0) -> np.ndarray[Any, Any]:
    """Orthogonal axes (d, d) in which product quantization of these rows errs least.

    Starts from principal axes dealt to the heads so that their variances multiply to the same, then
    alternates: fit the heads, turn the rows towards their decoded selves (orthogonal Procrustes).
    O(rounds (k-means + n d^2 + d^3)).
    Source: Ge, He, Ke and Sun, "Optimized product quantization", CVPR 2013.
    """
    d = rows.shape[1]
    rows = rows[:: max(1, -(-len(rows) // OPQ_ROWS))]
    scale = float(np.sqrt(np.mean(rows.astype(np.float64) ** 2))) or 1.0
    x = rows / np.float32(scale)
    values, axes = principal_axes(covariance(x)[1])
    total = max(1, int(settings["bits"] * d + 1e-9))
    n_heads = max(1, min(d, -(-total // CODEWORD_BITS)))
    share = [total * (i + 1) // n_heads - total * i // n_heads for i in range(n_heads)]
    edges = [d * i // n_heads for i in range(n_heads + 1)]
    room, load = np.diff(edges), np.zeros(n_heads)
    heads: list[list[int]] = [[] for _ in range(n_heads)]
    for axis, value in enumerate(values):
        open_heads = [h for h in range(n_heads) if len(heads[h]) < room[h]]
        h = min(open_heads, key=lambda i: load[i])
        heads[h].append(axis)
        load[h] += np.log2(max(value, 1e-12)) + 40  # all terms positive: fewest axes, least product
    rotation = axes[:, [axis for head in heads for axis in head]].astype(np.float32)
    for _ in range(OPQ_ROUNDS):
        y = np.ascontiguousarray(x @ rotation)
        pq = ProductQuantizer(n_heads, n_bits=share, seed=seed).fit(y)
        u, _, vt = np.linalg.svd((x.T @ pq.decode(pq.encode(y))).astype(np.float64))
        rotation = (u @ vt).astype(np.float32)
    return rotation
