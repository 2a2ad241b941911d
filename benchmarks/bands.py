"""How many bits does a number of a picture of many bands cost at a given PSNR?

    python benchmarks/bands.py [CUBE.npy ...]

compares .pvq files of arrays (H, W, C) with JPEG 2000 (OpenJPEG by imagecodecs, irreversible), each
band by itself and the same principal axes that our files use (every byte of the basis counted),
and, without loss, with PNG of each band and zlib. PSNR is relative to the range of the numbers,
over all of them. Without arguments it makes its pictures: six materials with smooth spectra, mixed
by 1/f fields, lit unevenly, with sensor noise, at 12 bits. Writes ``results/bands.json``.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import sys
import zlib
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image

import polarpack
import polarpack_image as pvq
from polarpack_image import bands

RESULTS = Path(__file__).parent / "results"
TARGETS = (40.0, 50.0)  # dB below the range
SIDE, BANDS, SEED = 256, (8, 32), 7
MATERIALS, NOISE = 6, 3.0  # in steps of 12 bits
PLANE_BITS = 15  # of a principal plane as JPEG 2000 is given it
Array = npt.NDArray[Any]


def made(n_bands: int) -> npt.NDArray[np.uint16]:
    """(256, 256, n) uint16 below 4096."""
    rng = np.random.default_rng(SEED)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    shape = 1 / np.maximum(frequency, 1 / SIDE) ** 1.4

    def field() -> Array:
        plane = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) * shape).real
        return plane / plane.std()

    share = np.exp(2.5 * np.stack([field() for _ in range(MATERIALS)], axis=2))
    share /= share.sum(axis=2, keepdims=True)
    at = np.linspace(0, 1, n_bands)[:, None]
    places, widths = rng.uniform(0, 1, (2, MATERIALS, 4))
    bumps = np.exp(-(((at[:, :, None] - places) / (0.08 + 0.3 * widths)) ** 2))
    spectra = 0.2 + bumps @ rng.uniform(0, 0.5, 4)
    light = 1 + 0.15 * field()[:, :, None]
    cube = 1500 * light * (share @ spectra.T) + rng.normal(0, NOISE, (SIDE, SIDE, n_bands))
    return np.clip(np.rint(cube), 0, 4095).astype(np.uint16)


def psnr(a: Array, b: Array) -> float:
    """Relative to the range of ``b``."""
    mse = np.mean((np.asarray(a, np.float64) - b) ** 2)
    return float(10 * np.log10(np.ptp(b.astype(np.float64)) ** 2 / max(mse, 1e-12)))


def jpeg2000(plane: Array, level: float) -> tuple[int, Array]:
    """Bytes and decoded numbers of one plane; ``level`` is its PSNR in dB at 16 bits."""
    data = imagecodecs.jpeg2k_encode(plane, level=level, reversible=False, codecformat="j2k")
    return len(data), imagecodecs.jpeg2k_decode(data)


def each_band(cube: Array, level: float) -> tuple[int, Array]:
    """All bands at one level, so at one error."""
    coded = [jpeg2000(np.ascontiguousarray(cube[:, :, i]), level) for i in range(cube.shape[2])]
    return sum(size for size, _ in coded), np.stack([plane for _, plane in coded], axis=2)


def principal_planes(cube: Array, spectra: bands.Spectra, level: float) -> tuple[int, Array]:
    """The planes of ``spectra`` likewise."""
    pictures = np.concatenate(list(spectra.pictures(cube)), axis=2) - 128
    scale = ((1 << PLANE_BITS) - 1) / np.abs(pictures).max()
    planes = np.rint(pictures * scale + (1 << PLANE_BITS)).astype(np.uint16)
    size, decoded = each_band(planes, level)
    values = np.rint((decoded.astype(np.float64) - (1 << PLANE_BITS)) / scale * 64)
    samples = spectra.samples(values.astype(np.int32), cube.dtype)
    return size + len(spectra.to_bytes()), samples


def at_psnr(code: Any, target: float, cube: Array) -> tuple[int, float]:
    """Bytes and PSNR at a level that reaches the target, within some hundredths of a decibel."""
    level, best = target + 10, None
    for _ in range(8):
        size, decoded = code(level)
        reached = psnr(decoded, cube)
        if reached >= target and (best is None or size < best[0]):
            best = size, reached
        if best is not None and best[1] - target < 0.05:
            return best
        level += target - reached + 0.02  # both are decibels: nearly a line of slope 1
    if best is None:
        raise SystemExit(f"{target} dB cannot be reached")
    return best


def lossless(cube: Array) -> dict[str, int]:
    """Bytes of the ways without loss."""
    png = 0
    for i in range(cube.shape[2]):
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(cube[:, :, i])).save(out, "PNG", optimize=True)
        png += out.tell()
    return {"png": png, "zlib": len(zlib.compress(cube.tobytes(), 9))}


def measure(name: str, cube: Array) -> list[dict[str, Any]]:
    """One row for each codec and target."""
    rows = []

    def add(codec: str, size: int, target: float | None, reached: float | None) -> None:
        bits = 8 * size / cube.size
        rows.append({"data": name, "codec": codec, "target": target, "bits": bits, "psnr": reached})
        print(f"{name:12} {codec:28} {target or 'lossless'!s:>9} {bits:8.4f} {reached or ''!s:.6}")

    for target in TARGETS:
        data = pvq.compress(cube, psnr=target, bands=True)
        add("polarpack", len(data), target, psnr(pvq.decompress(data), cube))
        spectra = bands.Spectra.of(
            bands.statistics(cube), 255 * 12**0.5 * 10 ** (-target / 20)
        )  # the step whose uniform error has this PSNR
        ways = {
            "jpeg 2000, principal axes": partial(principal_planes, cube, spectra),
            "jpeg 2000, each band": partial(each_band, cube),
        }
        for codec, code in ways.items():
            size, reached = at_psnr(code, target, cube)
            add(codec, size, target, reached)
    for codec, size in lossless(cube).items():
        add(codec, size, None, None)
    return rows


def main() -> None:
    """Measure and write."""
    cubes = {Path(path).stem: np.load(path) for path in sys.argv[1:]}
    cubes = cubes or {f"{n} bands": made(n) for n in BANDS}
    rows = [row for name, cube in cubes.items() for row in measure(name, cube)]
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "threads": 1,
        "cpu": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "polarpack": polarpack.__version__}
        | {n: version(n) for n in ("numpy", "numba", "imagecodecs", "pillow")},
        "data": [{"name": n, "shape": list(c.shape), "dtype": str(c.dtype)}
                 for n, c in cubes.items()],
        "rows": rows,
    }  # fmt: skip
    (RESULTS / "bands.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
