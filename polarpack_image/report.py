"""What ``polarpack-image benchmark`` leaves: a table, JSON, plots, and one page that needs no
network, with curves to zoom and crops to compare under a slider."""

from __future__ import annotations

import base64
import datetime
import io
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from polarpack.errors import InputError, MissingDependencyError

from .benchmark import (
    BASE,
    OURS,
    OURS_MSSSIM,
    Bytes,
    Point,
    bd_table,
    codecs,
    measure,
    psnr,
    published,
)
from .comparison import fit_bytes

QUESTION = "What PSNR and MS-SSIM does each codec reach at equal bytes on photographs?"
PUBLISHED = Path(__file__).parent / "published.json"
CROP = 256
CROP_BPP = (0.25, 0.5)
SHOWN = (OURS_MSSSIM, "jpeg", "webp", "avif")
SLOW = ("avif", "jpeg xl", "png", "jpeg 4:4:4")
# curves of others that the plots show; the table has them all
DRAWN = ("mbt2018-mean-vbr-ans", "VTM18.0(lossy-vae)", "cai_bmshj2018-hyperprior_mse")


def load_folder(folder: Path) -> dict[str, Bytes]:
    """The pictures of a folder by name, RGB."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".ppm", ".bmp"}
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
    if not paths:
        raise InputError(f"{folder}: no pictures")
    return {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in paths}


def run(
    folder: Path,
    out: Path,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    doing: Callable[[str], None] = lambda _: None,
) -> str:
    """Measure all codecs on the pictures of a folder and write ``kodak.json``, ``kodak_psnr.png``,
    ``kodak_msssim.png`` and ``kodak.html`` into ``out``. Returns the table as text.

    only: codecs to measure; the others' points stay as an earlier run left them in ``kodak.json``,
    if that was of the same pictures. quick: three pictures, without the slow codecs.
    """
    pictures = load_folder(folder)
    if quick:
        pictures = dict(list(pictures.items())[:3])
    out.mkdir(parents=True, exist_ok=True)
    data = [{"name": k, "shape": list(v.shape), "dtype": "uint8"} for k, v in pictures.items()]
    earlier = _earlier(out / "kodak.json", data) if only else []
    points: list[Point] = []
    for name, (coder, settings) in codecs().items():
        kept = [point for point in earlier if point.codec == name]
        if only and name not in only:
            points += kept
        elif not (quick and name in SLOW):
            points += measure(name, coder, settings, list(pictures.values()), doing)
    doing("yardstick")
    yardstick = _yardstick(list(pictures.values()), [p for p in points if p.codec == OURS], doing)
    is_kodak = len(pictures) == 24 and "kodim01" in pictures
    others = published(PUBLISHED) if is_kodak else []
    table = bd_table(points, others)
    result: dict[str, Any] = {
        "question": QUESTION,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "threads": 1,
        "cpu": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version()} | _versions(),
        "data": data,
        "rows": [asdict(point) for point in points],
        "bd_rates": [_without_nan(entry) for entry in table],
        "yardstick": yardstick,
    }
    (out / "kodak.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    curves = _curves(result["rows"], others)
    for quality in ("psnr", "msssim"):
        try:
            plot(curves, quality, out / f"kodak_{quality}.png")
        except MissingDependencyError as error:
            doing(str(error))
    doing("page")
    crops = _crops(pictures, doing)
    (out / "kodak.html").write_text(page(curves, result["bd_rates"], crops), "utf-8")
    return _text(table, result["rows"], yardstick)


def _yardstick(
    pictures: Sequence[Bytes], ours: Sequence[Point], doing: Callable[[str], None]
) -> dict[str, float] | None:
    """CPU seconds of a learned codec's layers for a picture of this size, and ours as multiples of
    them, mean over all qualities; None without torch."""
    try:
        from . import standin
    except ImportError as error:
        doing(f"no yardstick: {error}")
        return None
    height, width = (max(64, round(n / 64) * 64) for n in pictures[0].shape[:2])
    timing = standin.measure(height, width)
    area = pictures[0].shape[0] * pictures[0].shape[1] / (height * width)
    seconds = [(p.encode_seconds / area, p.decode_seconds / area) for p in ours]
    factors = standin.ratio(seconds, timing)
    found = timing._asdict() | {f"our_{name}": value for name, value in factors.items()}
    return {name: round(value, 4) for name, value in found.items()}


def _earlier(path: Path, data: list[dict[str, Any]]) -> list[Point]:
    """Points of an earlier run on the same pictures."""
    if not path.exists():
        return []
    result = json.loads(path.read_text("utf-8"))
    return [Point(**row) for row in result["rows"]] if result["data"] == data else []


def _versions() -> dict[str, str]:
    found = {}
    for name in ("polarpack", "numpy", "numba", "pillow", "imagecodecs"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _without_nan(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else
            round(v, 3) if isinstance(v, float) else v for k, v in entry.items()}  # fmt: skip


def _curves(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Points by the name a plot shows."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["codec"] != "png":
            curves.setdefault(row["codec"], []).append(row)
    for row in others:
        if row["codec"] in DRAWN:
            curves.setdefault(f"{row['codec']} (published)", []).append(row)
    return curves


def _text(
    table: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    yardstick: dict[str, float] | None,
) -> str:
    """BD-rates of all curves, and seconds of the measured ones."""
    lines = [
        f"BD-rate against {BASE} (Pillow, 4:2:0, optimize), %",
        f"{'codec':32} {'PSNR':>8} {'MS-SSIM':>8} {'encode s':>9} {'decode s':>9}",
    ]
    for entry in table:
        own = [r for r in rows if r["codec"] == entry["codec"] and entry["source"] == "measured"
               and "encode_seconds" in r]  # fmt: skip
        name = entry["codec"] + ("" if own else f" ({entry['source']})")
        seconds = [np.mean([r[k] for r in own]) for k in ("encode_seconds", "decode_seconds")
                   if own]  # fmt: skip
        lines.append(
            f"{name:32.32} {entry['bd_psnr']:8.1f} {entry['bd_msssim']:8.1f}"
            + "".join(f" {s:9.3f}" for s in seconds)
        )
    for row in rows:
        if row["codec"] == "png":
            seconds = [row["encode_seconds"], row["decode_seconds"]]
            lossless = f"{row['bpp']:.2f} bits, lossless"
            lines.append(f"{'png':32} {lossless:>17}" + "".join(f" {s:9.3f}" for s in seconds))
    if yardstick is not None:
        lines.append(
            f"layers of mbt2018-mean, N = 128 ({yardstick['kmac_per_pixel']:.0f} kMAC a pixel): "
            f"{yardstick['encode_seconds']:.3f} and {yardstick['decode_seconds']:.3f} s; ours "
            f"{yardstick['our_encode']:.2f} and {yardstick['our_decode']:.2f} times that"
        )
    return "\n".join(lines)


def plot(curves: dict[str, Any], quality: str, path: Path) -> None:
    """Mean curves, bits a pixel (log) against PSNR, or MS-SSIM in -10 log10(1 - MS-SSIM)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib: pip install 'polarpack[bench]'"
        ) from error
    figure = Figure(figsize=(8, 5.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, rows in curves.items():
        pairs = sorted((r["bpp"], r[quality]) for r in rows if r.get(quality) is not None)
        x = [p[0] for p in pairs]
        y = [p[1] if quality == "psnr" else -10 * math.log10(1 - p[1]) for p in pairs]
        ours = name == OURS
        style: dict[str, Any] = {"linewidth": 1.2}
        if ours:
            style = {"linewidth": 2.6, "color": "black", "marker": "o", "markersize": 4}
        elif name == OURS_MSSSIM:
            style = {"linewidth": 1.6, "color": "gray", "marker": ".", "markersize": 4}
        axes.plot(x, y, label=name, linestyle="--" if "published" in name else "-", **style)
    axes.set_xscale("log")
    axes.set_xlim(0.04, 4)
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 4)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("bits a pixel, whole files (log)")
    axes.set_ylabel("PSNR, dB" if quality == "psnr" else "MS-SSIM, -10 log10(1 - x)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _data_url(image: Bytes) -> str:
    out = io.BytesIO()
    kind = "webp" if features.check("webp") else "png"  # the former is a quarter smaller
    Image.fromarray(image).save(out, kind, lossless=True)
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()


def _crops(pictures: dict[str, Bytes], doing: Callable[[str], None]) -> list[dict[str, Any]]:
    """The busiest crop of up to three pictures, by every shown codec at equal bytes of the whole
    picture."""
    known = codecs()
    names = [OURS, *(n for n in SHOWN if n in known)]
    step = max(1, len(pictures) // 3)
    crops = []
    for name, rgb in list(pictures.items())[::step][:3]:
        top, left = _busiest(rgb)
        window = np.s_[top : top + CROP, left : left + CROP]
        for bpp in CROP_BPP:
            doing(f"crops of {name} at {bpp} bpp")
            shown = {"original": _data_url(rgb[window])}
            for codec in names:
                data, decoded = fit_bytes(codec, known[codec][0], rgb, bpp)
                crop = np.ascontiguousarray(decoded[window])
                label = f"{codec}, {len(data):,} bytes, {psnr(rgb[window], crop):.1f} dB"
                shown[label] = _data_url(crop)
            crops.append({"picture": name, "bpp": bpp, "images": shown})
    return crops


def _busiest(rgb: Bytes) -> tuple[int, int]:
    """Corner of the crop whose brightness changes most."""
    gray = rgb.astype(np.float32).mean(axis=2)
    busy = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    places = [(y, x) for y in range(0, max(1, rgb.shape[0] - CROP), 32)
              for x in range(0, max(1, rgb.shape[1] - CROP), 32)]  # fmt: skip
    return max(places, key=lambda p: float(np.median(busy[p[0] : p[0] + CROP, p[1] : p[1] + CROP])))


def page(curves: dict[str, Any], table: Sequence[dict[str, Any]],
         crops: Sequence[dict[str, Any]]) -> str:  # fmt: skip
    """One HTML file with everything in it."""
    small = {
        name: [[r["bpp"], r["psnr"], r.get("msssim")] for r in sorted(rows, key=lambda r: r["bpp"])]
        for name, rows in curves.items()
    }
    template = (Path(__file__).parent / "report.html").read_text("utf-8")
    rows = "".join(
        f"<tr{' class=ours' * (e['codec'] == OURS)}><td>{e['codec']}</td><td>{e['source']}</td>"
        + "".join(
            f"<td>{'' if e[k] is None else format(e[k], '.1f')}</td>"
            for k in ("bd_psnr", "bd_msssim")
        )
        + "</tr>"
        for e in table
    )
    return (
        template.replace("@CURVES@", json.dumps(small))
        .replace("@CROPS@", json.dumps(list(crops)))
        .replace("@ROWS@", rows)
    )
