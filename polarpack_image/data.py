"""Training pictures: tiles decoded once into one flat array of bytes, crops drawn from it.

A collection of photographs is given as tar files or folders of picture files. All of them are
decoded once into ``Pictures``: the RGB bytes of every tile one behind the other in one uint8 array,
which fits the memory of a GPU whole (1.4 GB for 480 megapixels) or is mapped from disk. A crop is
then a gather at computed addresses, so drawing a batch costs no decoding, no workers and no queue.

Tiles are drawn in proportion to the bytes of their *files*: a third of any photograph collection
is smooth sky, of which a codec sees enough. One tile in twenty is held out, chosen by a hash of the
photograph's name, so that tiles of one photograph never stand on both sides.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polarpack.errors import FormatError, InputError

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

HELD_OUT = 20  # one photograph in so many is held out
SUFFIXES = {".avif", ".bmp", ".jpeg", ".jpg", ".jxl", ".png", ".ppm", ".tif", ".tiff", ".webp"}
PIXELS, INDEX = "pixels.npy", "index.json"  # the files of a saved collection


@dataclass(frozen=True)
class Pictures:
    """RGB pictures in one flat array.

    Attributes
    ----------
    pixels : (n_bytes,) uint8, or a memory map of it. Picture i is
        ``pixels[offsets[i] : offsets[i] + 3 * heights[i] * widths[i]]``, rows, columns, RGB.
    offsets, heights, widths : (n,) int64.
    file_bytes : (n,) int64, size of each picture's file: how much there is to see in it.
    names : n file names.
    """

    pixels: Bytes
    offsets: Int64
    heights: Int64
    widths: Int64
    file_bytes: Int64
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Bytes:
        """Picture i, (H, W, 3) uint8."""
        height, width = int(self.heights[i]), int(self.widths[i])
        start = int(self.offsets[i])
        return self.pixels[start : start + 3 * height * width].reshape(height, width, 3)

    def select(self, chosen: Sequence[int] | Int64) -> Pictures:
        """Some of the pictures; their bytes are shared, not copied."""
        which = np.asarray(chosen, np.int64)
        return Pictures(
            self.pixels,
            self.offsets[which],
            self.heights[which],
            self.widths[which],
            self.file_bytes[which],
            tuple(self.names[i] for i in which),
        )

    def split(self) -> tuple[Pictures, Pictures]:
        """Training and held-out pictures."""
        held = np.array([is_held_out(name) for name in self.names], bool)
        return self.select(np.flatnonzero(~held)), self.select(np.flatnonzero(held))

    def save(self, folder: Path) -> None:
        """Write the collection as ``pixels.npy`` and ``index.json`` (needs no Pillow to read)."""
        folder.mkdir(parents=True, exist_ok=True)
        sizes = 3 * self.heights * self.widths
        out = np.lib.format.open_memmap(
            folder / PIXELS, mode="w+", dtype=np.uint8, shape=(int(sizes.sum()),)
        )
        offsets = np.cumsum(sizes) - sizes
        for i, start in enumerate(offsets):
            out[start : start + sizes[i]] = self[i].reshape(-1)
        out.flush()
        columns = (offsets, self.heights, self.widths, self.file_bytes)
        rows = [[name, *map(int, row)] for name, *row in zip(self.names, *columns, strict=True)]
        (folder / INDEX).write_text(json.dumps(rows), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Pictures:
        """Map a saved collection. Raises FormatError where its index does not fit its pixels."""
        pixels = np.load(folder / PIXELS, mmap_mode="r")
        rows = json.loads((folder / INDEX).read_text("utf-8"))
        table = np.array([row[1:] for row in rows], np.int64).reshape(len(rows), 4)
        offsets, heights, widths, file_bytes = np.ascontiguousarray(table.T)
        if pixels.dtype != np.uint8 or pixels.ndim != 1:
            raise FormatError(
                f"{folder / PIXELS}: expected one axis of uint8, got {pixels.dtype} of shape "
                f"{pixels.shape}"
            )
        if len(rows) and (table.min() < 0 or (offsets + 3 * heights * widths).max() > len(pixels)):
            raise FormatError(f"{folder / INDEX}: a picture lies outside of {PIXELS}")
        return cls(pixels, offsets, heights, widths, file_bytes, tuple(row[0] for row in rows))


def is_held_out(name: str) -> bool:
    """Whether a tile belongs to the validation set: by the photograph's name, that is the file name
    without its suffix and without the number of the tile (``source__photograph__3.avif``)."""
    stem = Path(name).stem
    photograph, _, tile = stem.rpartition("__")
    name = photograph if photograph and tile.isdigit() else stem
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def picture_files(sources: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every picture file in the given tar files, folders and files."""
    for source in sources:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.suffix.lower() in SUFFIXES:
                    yield path.name, path.read_bytes()
        elif source.suffix == ".tar":
            with tarfile.open(source) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.isfile() else None
                    if file is not None and Path(member.name).suffix.lower() in SUFFIXES:
                        yield Path(member.name).name, file.read()
        elif source.is_file():
            yield source.name, source.read_bytes()
        else:
            raise InputError(f"no such tar file, folder or picture: {source}")


def decode_pictures(sources: Sequence[Path], limit: int | None = None) -> Pictures:
    """Decode picture files (tar files, folders or files; at most ``limit`` pictures) to RGB.

    0.03 CPU seconds a megapixel for AVIF. Raises InputError where nothing is found.
    """
    from PIL import Image

    parts: list[Bytes] = []
    rows: list[tuple[str, int, int, int]] = []
    for name, data in picture_files(sources):
        if limit is not None and len(rows) >= limit:
            break
        with Image.open(io.BytesIO(data)) as image:
            rgb = np.asarray(image.convert("RGB"), np.uint8)
        rows.append((name, *rgb.shape[:2], len(data)))
        parts.append(rgb.reshape(-1))
    if not rows:
        raise InputError(f"no picture files in {', '.join(map(str, sources))}")
    heights, widths, file_bytes = np.array([row[1:] for row in rows], np.int64).T.copy()
    sizes = 3 * heights * widths
    return Pictures(
        np.concatenate(parts),
        np.cumsum(sizes) - sizes,
        heights,
        widths,
        file_bytes,
        tuple(row[0] for row in rows),
    )


def load_pictures(sources: Sequence[Path], cache: Path | None = None) -> Pictures:
    """Pictures of ``sources``: a folder written by ``Pictures.save`` is mapped, anything else is
    decoded, and saved to ``cache`` if one is given (and mapped from there the next time)."""
    if cache is not None and (cache / INDEX).is_file():
        return Pictures.load(cache)
    if len(sources) == 1 and (sources[0] / INDEX).is_file():
        return Pictures.load(sources[0])
    pictures = decode_pictures(sources)
    if cache is None:
        return pictures
    pictures.save(cache)
    return Pictures.load(cache)


class CropSampler:
    """Draws batches of square crops from pictures held on one device.

    Parameters
    ----------
    pictures : pictures of at least ``size`` pixels a side are used, smaller ones left out.
    size : side of a crop in pixels.
    device : where the pixels are kept; on "cpu" a memory map stays one.
    min_scale : crops of up to ``size / min_scale`` are drawn and reduced to ``size``, one scale a
        batch: photographs at half their size have finer detail per pixel, and no noise.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: int,
        device: str | torch.device = "cpu",
        min_scale: float = 1.0,
    ):
        import torch

        fits = np.flatnonzero(np.minimum(pictures.heights, pictures.widths) >= size)
        if not len(fits):
            raise InputError(f"no picture of at least {size} x {size} pixels among {len(pictures)}")
        if not 0.25 <= min_scale <= 1.0:
            raise InputError(f"expected min_scale in 0.25..1, got {min_scale}")
        self.pictures, self.size, self.min_scale = pictures.select(fits), size, min_scale
        self.device = torch.device(device)
        weight = self.pictures.file_bytes.astype(np.float64)
        self._cumulative = np.cumsum(weight) / weight.sum()
        self._pixels: torch.Tensor | None = None
        if self.device.type != "cpu":
            self._pixels = torch.from_numpy(np.asarray(pictures.pixels)).to(self.device)

    def draw(self, batch: int, rng: np.random.Generator) -> torch.Tensor:
        """(batch, 3, size, size) float32 in 0..255, flipped and turned at random."""
        import torch

        scale = rng.uniform(self.min_scale, 1.0) if rng.random() < 0.5 else 1.0
        side = round(self.size / scale)
        which = np.searchsorted(self._cumulative, rng.random(batch), side="right")
        which = np.minimum(which, len(self.pictures) - 1)
        heights, widths = self.pictures.heights[which], self.pictures.widths[which]
        if min(heights.min(), widths.min()) < side:
            side = self.size
        top = (rng.random(batch) * (heights - side + 1)).astype(np.int64)
        left = (rng.random(batch) * (widths - side + 1)).astype(np.int64)
        start = self.pictures.offsets[which] + 3 * (top * widths + left)
        crops = self._gather(start, 3 * widths, side)
        x = crops.permute(0, 3, 1, 2).float()
        if side != self.size:
            x = torch.nn.functional.interpolate(
                x, size=(self.size, self.size), mode="bilinear", antialias=True
            )
        if rng.random() < 0.5:
            x = x.flip(3)
        return torch.rot90(x, int(rng.integers(4)), (2, 3)).contiguous()

    def _gather(self, start: Int64, stride: Int64, side: int) -> Any:
        """(batch, side, side, 3) uint8 from the flat pixels."""
        import torch

        if self._pixels is None:
            rows = np.empty((len(start), side, 3 * side), np.uint8)
            for crop, (begin, step) in enumerate(zip(start, stride, strict=True)):
                for row in range(side):
                    at = begin + row * step
                    rows[crop, row] = self.pictures.pixels[at : at + 3 * side]
            return torch.from_numpy(rows).reshape(len(start), side, side, 3)
        begin = torch.from_numpy(start).to(self.device)
        steps = torch.from_numpy(stride).to(self.device)
        down = torch.arange(side, device=self.device)
        across = torch.arange(3 * side, device=self.device)
        at = (begin[:, None] + down * steps[:, None])[:, :, None] + across
        return self._pixels[at].reshape(len(start), side, side, 3)


def validation_crops(pictures: Pictures, n: int, size: int, seed: int = 0) -> Bytes:
    """(n, size, size, 3) fixed crops of held-out pictures, drawn like training crops but neither
    scaled nor turned."""
    rng = np.random.default_rng(seed)
    sampler = CropSampler(pictures, size)
    chosen = sampler.pictures
    which = np.searchsorted(sampler._cumulative, rng.random(n), side="right")
    crops = np.empty((n, size, size, 3), np.uint8)
    for crop, i in enumerate(np.minimum(which, len(chosen) - 1)):
        top = rng.integers(chosen.heights[i] - size + 1)
        left = rng.integers(chosen.widths[i] - size + 1)
        crops[crop] = chosen[int(i)][top : top + size, left : left + size]
    return crops
