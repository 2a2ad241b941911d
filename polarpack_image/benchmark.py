"""Rate and distortion of this codec and of others on a set of photographs: figures, plots, a page.

Every codec gives whole files; sizes are their bytes, PSNR and MS-SSIM are taken over RGB bytes for
each picture and then averaged, and BD-rates are means over the range of quality that two mean
curves share.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from polarpack.entropy.range_coder import kernel as kernel_function
from polarpack.errors import InputError, MissingDependencyError

from .codec import compress, decompress
from .picture_codec import Tune

Bytes = npt.NDArray[np.uint8]
Float64 = npt.NDArray[np.float64]
Coder = Callable[[Bytes, float], tuple[bytes, Callable[[bytes], Bytes]]]

OURS = "polarpack"
OURS_MSSSIM = "polarpack, tune=msssim"
BASE = "jpeg"
QUALITIES = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
MSSSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


@dataclass
class Point:
    """A codec at one setting, mean over all pictures. Seconds are of CPU, one picture."""

    codec: str
    setting: float
    bpp: float
    psnr: float
    msssim: float
    encode_seconds: float
    decode_seconds: float


# -- measures --------------------------------------------------------------------------------------
def psnr(a: Bytes, b: Bytes) -> float:
    """In dB, over all bytes; 100 for equal pictures."""
    mse = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 100.0 if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def msssim(a: Bytes, b: Bytes) -> float:
    """Multi-scale structural similarity, mean over the channels; 1 for equal pictures.

    Five scales, Gaussian windows of 11 pixels (sigma 1.5), only windows inside of the picture;
    fewer scales where the picture is too small. Source: Wang, Simoncelli and Bovik, "Multiscale
    structural similarity for image quality assessment", Asilomar 2003.
    """
    x, y = (np.atleast_3d(image).astype(np.float32).transpose(2, 0, 1) for image in (a, b))
    kernel = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    if min(x.shape[1:]) < len(kernel):
        raise InputError(f"expected at least 11 x 11 pixels, got {x.shape[1:]}")

    def blur(image: Any) -> Any:
        return _blurred(np.ascontiguousarray(image), kernel)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    result = np.ones(len(x))
    for scale, weight in enumerate(MSSSIM_WEIGHTS):
        mx, my = blur(x), blur(y)
        vx, vy = blur(x * x) - mx * mx, blur(y * y) - my * my
        contrast = (2 * (blur(x * y) - mx * my) + c2) / (vx + vy + c2)
        last = scale == len(MSSSIM_WEIGHTS) - 1 or min(x.shape[1:]) < 22
        if last:
            contrast = contrast * (2 * mx * my + c1) / (mx * mx + my * my + c1)
        result *= np.maximum(contrast.mean(axis=(1, 2)), 1e-6) ** weight
        if last:
            break
        x, y = (_halved(image) for image in (x, y))
    return float(result.mean())


@kernel_function
def _blurred(image: Any, kernel: Any) -> Any:
    """Separable convolution of the planes (n, H, W) float32, only where the kernel fits."""
    n, height, width = image.shape
    size = kernel.size
    rows = np.zeros((height - size + 1, width), np.float32)
    out = np.zeros((n, height - size + 1, width - size + 1), np.float32)
    for plane in range(n):
        rows[:] = np.float32(0)
        for y in range(rows.shape[0]):
            for i in range(size):
                for x in range(width):
                    rows[y, x] += kernel[i] * image[plane, y + i, x]
            for i in range(size):
                for x in range(out.shape[2]):
                    out[plane, y, x] += kernel[i] * rows[y, x + i]
    return out


def _halved(image: Any) -> Any:
    """Means of 2 x 2 pixels; odd sides lose their last row or column."""
    height, width = (n // 2 * 2 for n in image.shape[1:])
    even = image[:, :height, :width]
    return (even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4


def interpolate(x: Float64, y: Float64, at: Float64) -> Float64:
    """Monotone piecewise cubic through (x, y), x increasing.
    Source: Fritsch and Butland, "A method for constructing local monotone piecewise cubic
    interpolants", 1984."""
    h, slope = np.diff(x), np.diff(y) / np.diff(x)
    d = np.empty(len(x))
    d[0], d[-1] = slope[0], slope[-1]
    for j in range(1, len(x) - 1):
        a, b = slope[j - 1], slope[j]
        w0, w1 = 2 * h[j] + h[j - 1], h[j] + 2 * h[j - 1]
        d[j] = 0 if a * b <= 0 else (w0 + w1) / (w0 / a + w1 / b)
    i: Any = np.clip(np.searchsorted(x, at, "right") - 1, 0, len(h) - 1)
    t: Any = (at - x[i]) / h[i]
    result: Float64 = (
        y[i] * (1 + 2 * t) * (1 - t) ** 2
        + h[i] * d[i] * t * (1 - t) ** 2
        + y[i + 1] * t * t * (3 - 2 * t)
        + h[i] * d[i + 1] * t * t * (t - 1)
    )
    return result


def bd_rate(base: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Mean change of rate of ``other`` against ``base`` at equal quality, in percent, from (rate,
    quality) points; NaN where the qualities do not overlap.
    Source: Bjontegaard, VCEG-M33, 2001, with monotone cubics in place of one cubic."""
    curves = []
    for points in (base, other):
        table = np.array(sorted(points, key=lambda p: p[1]), np.float64)
        keep = np.append(True, np.diff(table[:, 1]) > 1e-9)
        curves.append(table[keep])
    low = max(c[0, 1] for c in curves)
    high = min(c[-1, 1] for c in curves)
    if low >= high or min(len(c) for c in curves) < 2:
        return float("nan")
    at = np.linspace(low, high, 400)
    logs = [interpolate(c[:, 1], np.log(c[:, 0]), at) for c in curves]
    return float(100 * (np.exp(np.trapezoid(logs[1] - logs[0], at) / (high - low)) - 1))


# -- codecs ----------------------------------------------------------------------------------------
def _pillow(kind: str, **options: Any) -> Coder:
    def code(rgb: Bytes, setting: float) -> tuple[bytes, Callable[[bytes], Bytes]]:
        out = io.BytesIO()
        Image.fromarray(rgb).save(out, kind, quality=int(setting), **options)
        return out.getvalue(), lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    return code


def _jpeg2000(rgb: Bytes, setting: float) -> tuple[bytes, Callable[[bytes], Bytes]]:
    out = io.BytesIO()
    Image.fromarray(rgb).save(
        out, "JPEG2000", quality_mode="rates", quality_layers=[setting], irreversible=True, mct=1
    )
    return out.getvalue(), lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _jpegxl(rgb: Bytes, setting: float) -> tuple[bytes, Callable[[bytes], Bytes]]:
    try:
        import imagecodecs
    except ImportError as error:
        raise MissingDependencyError(
            "JPEG XL needs imagecodecs: pip install imagecodecs"
        ) from error
    data = bytes(imagecodecs.jpegxl_encode(rgb, distance=setting, effort=7))
    return data, lambda data: np.asarray(imagecodecs.jpegxl_decode(data))


def _ours(tune: Tune) -> Coder:
    def code(rgb: Bytes, setting: float) -> tuple[bytes, Callable[[bytes], Bytes]]:
        return compress(rgb, setting, tune=tune), lambda data: np.asarray(decompress(data))

    return code


def _png(rgb: Bytes, setting: float) -> tuple[bytes, Callable[[bytes], Bytes]]:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG", optimize=True)
    return out.getvalue(), lambda data: np.asarray(Image.open(io.BytesIO(data)))


def codecs() -> dict[str, tuple[Coder, tuple[float, ...]]]:
    """Codecs at hand, each with the settings to measure, coarse to fine."""
    found: dict[str, tuple[Coder, tuple[float, ...]]] = {
        OURS: (_ours("psnr"), QUALITIES),
        OURS_MSSSIM: (_ours("msssim"), QUALITIES),
        BASE: (_pillow("JPEG", optimize=True), (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)),
        "jpeg 4:4:4": (
            _pillow("JPEG", optimize=True, subsampling=0),
            (5, 10, 20, 35, 55, 75, 88, 95),
        ),
        "jpeg 2000": (_jpeg2000, (200, 120, 70, 40, 24, 15, 10, 7)),
    }
    if features.check("webp"):
        settings = (0, 10, 25, 45, 65, 80, 90, 96)
        found["webp"] = (_pillow("WEBP", method=6), settings)
    if features.check("avif"):
        settings = (15, 27, 39, 51, 63, 74, 84, 92)
        found["avif"] = (_pillow("AVIF", subsampling="4:4:4", speed=6), settings)
    try:
        import imagecodecs  # noqa: F401

        found["jpeg xl"] = (_jpegxl, (14, 9, 6, 4, 2.6, 1.7, 1.0, 0.5))
    except ImportError:
        pass
    found["png"] = (_png, (0,))
    return found


def measure(
    name: str,
    coder: Coder,
    settings: Iterable[float],
    pictures: Sequence[Bytes],
    doing: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """One point for each setting, mean over the pictures."""
    points = []
    settings = list(settings)
    coder(pictures[0], settings[0])[1](coder(pictures[0], settings[0])[0])  # compiles kernels
    for setting in settings:
        doing(f"{name} {setting:g}")
        rows = []
        for rgb in pictures:
            started = time.process_time()
            data, decode = coder(rgb, setting)
            between = time.process_time()
            decoded = decode(data)
            ended = time.process_time()
            if decoded.shape != rgb.shape:
                raise InputError(f"{name} gave {decoded.shape} back for {rgb.shape}")
            bpp = 8 * len(data) / (rgb.shape[0] * rgb.shape[1])
            rows.append(
                (bpp, psnr(rgb, decoded), msssim(rgb, decoded), between - started, ended - between)
            )
        points.append(Point(name, float(setting), *np.mean(rows, axis=0).tolist()))
    return points


def published(path: Path) -> list[dict[str, Any]]:
    """Points of other codecs from papers' and projects' own tables, with their sources."""
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return rows


def bd_table(points: Sequence[Point], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """BD-rate of every curve against the base, in PSNR and MS-SSIM; ours first, then by PSNR."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        curves.setdefault((point.codec, "measured"), []).append(asdict(point))
    for row in others:
        curves.setdefault((row["codec"], row["source"]), []).append(row)
    base = curves[BASE, "measured"]
    table = []
    for (codec, source), rows in curves.items():
        if len(rows) < 3:
            continue
        entry: dict[str, Any] = {"codec": codec, "source": source}
        for quality in ("psnr", "msssim"):
            pairs = [[(r["bpp"], float(r[quality])) for r in part if r.get(quality) is not None]
                     for part in (base, rows)]  # fmt: skip
            entry[f"bd_{quality}"] = bd_rate(*pairs) if len(pairs[1]) >= 3 else float("nan")
        table.append(entry)
    return sorted(table, key=lambda e: (e["codec"] != OURS, np.nan_to_num(e["bd_psnr"], nan=999.0)))
