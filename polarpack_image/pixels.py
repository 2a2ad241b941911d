"""Pillow images and arrays to the codec's pixels and back; alpha; metadata.

The codec itself knows RGB bytes only. Gray is coded as three equal channels, which its transform
makes one; palettes, CMYK and others are converted by Pillow; 16 bits are rounded to 8 with a
warning. Alpha is kept exactly: rows filtered as in PNG (W3C, "Portable network graphics", section
9), then zlib.
"""

from __future__ import annotations

import os
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from polarpack.errors import CorruptDataError, InputError, LimitError

from .bitstream import MAX_METADATA_BYTES, MAX_PIXELS, MAX_SIDE, Mode

Bytes = npt.NDArray[np.uint8]
ImageLike = Image.Image | npt.NDArray[Any] | str | os.PathLike[str]


@dataclass
class Picture:
    """RGB bytes (H, W, 3), alpha (H, W) or None, what to hand back, and metadata as bytes."""

    rgb: Bytes
    alpha: Bytes | None
    mode: Mode
    icc: bytes = b""
    exif: bytes = b""


def from_image(image: ImageLike) -> Picture:
    """Take in a Pillow image, an array (H, W) or (H, W, 1..4) of uint8 or uint16, or a path."""
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as opened:
            opened.load()
            return from_image(opened)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, Image.Image):
        raise InputError(f"expected a Pillow image, an array or a path, got {type(image).__name__}")
    icc = image.info.get("icc_profile") or b""
    exif = image.info.get("exif") or b""
    if not exif and len(image.getexif()):
        exif = image.getexif().tobytes()
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        picture = _from_array(_sixteen_bits(image))
    elif image.mode == "F":
        raise InputError("expected an image of integers, got mode F: scale it to 0..255 first")
    else:
        transparent = "transparency" in image.info or image.mode in (
            "LA",
            "La",
            "PA",
            "RGBA",
            "RGBa",
        )
        if image.mode in ("L", "1", "LA", "La"):
            wanted = "LA" if transparent else "L"
        else:
            wanted = "RGBA" if transparent else "RGB"
        if image.mode == "CMYK":
            warnings.warn(
                "CMYK is converted to RGB; its ICC profile is left out", UserWarning, stacklevel=3
            )
            icc = b""
        converted = image if image.mode == wanted else image.convert(wanted)
        picture = _from_array(np.asarray(converted))
    picture.icc, picture.exif = checked(icc, "icc_profile"), checked(exif, "exif")
    return picture


def is_no_picture(array: npt.NDArray[Any]) -> bool:
    """Whether an array has more bands than a picture, or numbers of another kind."""
    return (array.ndim == 3 and array.shape[2] > 4) or array.dtype not in (np.uint8, np.uint16)


def _sixteen_bits(image: Image.Image) -> npt.NDArray[np.uint16]:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise InputError("expected integers in 0..65535 in an image of mode I")
    return values.astype(np.uint16)


def checked(data: Any, name: str) -> bytes:
    """Metadata as bytes within the limit, or InputError."""
    if isinstance(data, Image.Exif):
        data = data.tobytes()
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"{name}: expected bytes, got {type(data).__name__}")
    if len(data) > MAX_METADATA_BYTES:
        raise InputError(f"{name}: {len(data)} bytes, limit {MAX_METADATA_BYTES}")
    return bytes(data)


def _from_array(array: npt.NDArray[Any]) -> Picture:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise InputError(f"expected (H, W) or (H, W, 1..4), got {array.shape}")
    height, width, n = array.shape
    if min(height, width) < 1 or max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise InputError(
            f"expected 1..{MAX_SIDE} pixels a side, {MAX_PIXELS} in all, got {width} x {height}"
        )
    if array.dtype == np.uint16:
        warnings.warn("16-bit samples are rounded to 8 bits", UserWarning, stacklevel=3)
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"expected uint8 or uint16, got {array.dtype}")
    colour = array[:, :, : 3 if n >= 3 else 1]
    rgb = np.ascontiguousarray(np.broadcast_to(colour, (height, width, 3)))
    alpha = np.ascontiguousarray(array[:, :, -1]) if n in (2, 4) else None
    return Picture(rgb, alpha, {1: Mode.L, 2: Mode.LA, 3: Mode.RGB, 4: Mode.RGBA}[n])


def to_image(picture: Picture) -> Image.Image:
    """Inverse of ``from_image``, with metadata in ``info``."""
    image = Image.fromarray(to_array(picture))
    if picture.icc:
        image.info["icc_profile"] = picture.icc
    if picture.exif:
        image.info["exif"] = picture.exif
    return image


def to_array(picture: Picture) -> Bytes:
    """(H, W) or (H, W, 2 | 3 | 4) uint8. Gray is the rounded mean of the three channels."""
    colour = picture.rgb
    if picture.mode in (Mode.L, Mode.LA):
        total = picture.rgb.astype(np.uint16).sum(axis=2)
        colour = ((total + 1) // 3).astype(np.uint8)
    if picture.alpha is None:
        return colour
    return np.dstack([colour, picture.alpha])


def oriented(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says, for showing."""
    return ImageOps.exif_transpose(image)


def pack_alpha(alpha: Bytes) -> bytes:
    """(H, W) uint8, exactly: the better of no filter and differences to the row above, by zlib."""
    plain = b"\0" + zlib.compress(alpha.tobytes(), 9)
    above = np.diff(alpha, axis=0, prepend=np.zeros((1, alpha.shape[1]), np.uint8))
    up = b"\1" + zlib.compress(above.tobytes(), 9)
    left = np.diff(above, axis=1, prepend=np.zeros((alpha.shape[0], 1), np.uint8))
    both = b"\2" + zlib.compress(left.tobytes(), 9)
    return min(plain, up, both, key=len)


def unpack_alpha(data: bytes, height: int, width: int) -> Bytes:
    """Inverse of ``pack_alpha``; inflates no more than height * width bytes."""
    raw = inflate(data[1:], height * width, "alpha")
    if len(raw) != height * width:
        raise CorruptDataError(f"alpha: expected {height * width} bytes, got {len(raw)}")
    values = np.frombuffer(raw, np.uint8).reshape(height, width)
    if data[:1] == b"\0":
        return values.copy()
    if data[:1] == b"\2":
        values = np.cumsum(values, axis=1, dtype=np.uint8)
    elif data[:1] != b"\1":
        raise CorruptDataError(f"alpha: unknown filter {data[:1]!r}")
    return np.cumsum(values, axis=0, dtype=np.uint8)


def pack_metadata(data: bytes) -> bytes:
    """A length-limited zlib stream, or nothing for nothing."""
    return zlib.compress(data, 9) if data else b""


def unpack_metadata(data: bytes, name: str) -> bytes:
    """Inverse of ``pack_metadata``."""
    return inflate(data, MAX_METADATA_BYTES, name) if data else b""


def inflate(data: bytes, limit: int, name: str) -> bytes:
    """Decompress at most ``limit`` bytes. LimitError beyond; CorruptDataError if damaged."""
    engine = zlib.decompressobj()
    try:
        out = engine.decompress(data, limit + 1)
    except zlib.error as error:
        raise CorruptDataError(f"{name}: {error}") from error
    if len(out) > limit:
        raise LimitError(f"{name}: inflates to more than {limit} bytes")
    if not engine.eof or engine.unused_data:
        raise CorruptDataError(f"{name}: its compressed bytes do not end where they should")
    return out
