"""``polarpack-image demo``: a shipped photograph as .pvq and as JPEG of as many bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .codec import compress, decompress

PHOTOGRAPH = Path(__file__).parent / "photograph" / "chelsea.webp"
FILE_NAME, PICTURE_NAME = "polarpack-demo.pvq", "polarpack-demo-photograph.png"
JPEG_QUALITY = 10
CROP = (128, 78, 278, 178)  # left, top, right, bottom: an eye and fur
ENLARGED = 3
MARGIN, LINE = 12, 22  # of the drawing, in pixels
BACKGROUND, INK, GREY = (255, 255, 255), (20, 20, 20), (110, 110, 110)

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shown:
    """One column of the drawing."""

    title: str
    note: str
    pixels: Bytes


def run(folder: Path) -> str:
    """Leave the .pvq file and a drawing in ``folder``; returns what to say about them. A few
    seconds, and some more for compiling the first time."""
    original = np.asarray(Image.open(PHOTOGRAPH).convert("RGB"))
    out = io.BytesIO()
    Image.fromarray(original).save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    jpeg = out.getvalue()
    data = compress(original, bpp=8 * len(jpeg) / (original.shape[0] * original.shape[1]))
    (folder / FILE_NAME).write_bytes(data)
    columns = [
        Shown("original", f"{original.nbytes:,} bytes of pixels", original),
        _column("polarpack .pvq", original, data, np.asarray(decompress(data))),
        _column("JPEG", original, jpeg, np.asarray(Image.open(io.BytesIO(jpeg)))),
    ]
    draw(columns).save(folder / PICTURE_NAME, optimize=True)
    lines = [
        f"a photograph of {original.shape[1]} x {original.shape[0]} pixels "
        "(Chelsea the cat, CC0, by Stéfan van der Walt)",
        *(f"  {c.title:16} {c.note}" for c in columns[1:]),
        f"{folder / PICTURE_NAME}: both beside the original, and a part of them enlarged",
    ]
    return "\n".join(lines)


def _column(title: str, original: Bytes, data: bytes, decoded: Bytes) -> Shown:
    mse = float(np.mean((decoded.astype(np.float64) - original) ** 2))
    psnr = 10 * np.log10(255**2 / max(mse, 1e-9))
    bpp = 8 * len(data) / (original.shape[0] * original.shape[1])
    return Shown(title, f"{len(data):,} bytes, {bpp:.2f} bits a pixel, {psnr:.2f} dB", decoded)


def draw(columns: list[Shown]) -> Image.Image:
    """The pictures side by side under their titles, and below each its enlarged crop."""
    height, width = columns[0].pixels.shape[:2]
    left, top, right, bottom = CROP
    size = (right - left) * ENLARGED, (bottom - top) * ENLARGED
    pitch = max(width, size[0]) + MARGIN
    below = MARGIN + 2 * LINE + height + MARGIN
    canvas = Image.new("RGB", (len(columns) * pitch + MARGIN, below + size[1] + MARGIN), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for i, column in enumerate(columns):
        x = MARGIN + i * pitch
        pen.text((x, MARGIN - 4), column.title, INK, font=_font(16))
        pen.text((x, MARGIN - 4 + LINE), column.note, GREY, font=_font(13))
        canvas.paste(Image.fromarray(column.pixels), (x, MARGIN + 2 * LINE))
        crop = Image.fromarray(np.ascontiguousarray(column.pixels[top:bottom, left:right]))
        canvas.paste(crop.resize(size, Image.Resampling.NEAREST), (x, below))
    return canvas


def _font(size: int) -> Any:
    """Pillow's own; a small one of fixed size where it was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except ImportError:
        return ImageFont.load_default()
