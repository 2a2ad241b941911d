"""Pictures to .pvq bytes and back.

    image ─ RGB bytes ─ transform ─ coefficients / step ─ latent coder ─ sections ─ file
            pixels      transform   (h, w, C)             coder          bitstream

Everything goes by tiles of 128 x 128 positions (1024 x 1024 pixels): each is coded on its own, so
memory is bounded, threads share nothing and a region needs the tiles around it only. The transform
does not see tiles: positions beyond a tile's edge come from its neighbour, so there are no seams.

What transforms and predicts depends on the weights (``picture_codec``): the package's, those of a
trained network (``learned``), or the first prototype's (``prototype``).
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from polarpack._threads import in_threads
from polarpack.errors import (
    CorruptDataError,
    InputError,
    MissingDependencyError,
    UnsupportedVersionError,
)

from . import bitstream, pixels, weights
from ._coder_kernels import HEAD
from .bands import Spectra, Statistics, checked, sample_dtype, sample_number, statistics
from .bitstream import TILE, Coding, Header, Message, Mode, Quantizer, Sections
from .coder import RATE_WEIGHTS
from .picture_codec import HEADS_COUNT, LappedCodec, Latent, PictureCodec, Tune
from .pixels import ImageLike, Picture
from .transform import (
    PIXEL_BITS,
    STEP_BITS,
    to_pixels,
)

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

COARSEST_STEP, FINEST_STEP = 120.0, 3.0  # of quality 0 and 100, in grey levels
MAX_STEP = 65535  # in 1 / 2**STEP_BITS
FINEST = 32  # of the steps that are tried for a target, likewise
# Steps below this have layers: at coarser ones a second message costs more than 0.5% of the file.
LAYERED_STEP = 24.0
N_EFFORTS = 3
QUANTIZERS = {
    "dq8": Quantizer.DQ8,
    "dq4": Quantizer.DQ4,
    "scalar": Quantizer.SCALAR,
    "polar+dq8": Quantizer.POLAR_DQ8,
    "polar": Quantizer.POLAR,
}


def encode_tiles(
    codec: PictureCodec, header: Header, latent: Latent, effort: int, tune: Tune | None = None
) -> tuple[list[Message | None], list[list[Message | None]]]:
    """``Sections.hyper`` and, of one picture, ``Sections.tiles``. tune: None where errors count
    alike."""
    coder = codec.coder(header.quantizer)
    weight = RATE_WEIGHTS[header.quantizer]

    def encode_tile(at: tuple[int, int]) -> tuple[Message | None, list[Message]]:
        rows, columns = header.tile_shape(*at)
        top, left = at[0] * TILE, at[1] * TILE
        y = latent.y[top : top + rows, left : left + columns]
        z, hyper = None, None
        if latent.z is not None:
            top, left = top // 4, left // 4
            z = latent.z[top : top - (-rows // 4), left : left - (-columns // 4)]
            hyper = codec.encode_hyper(z)
        predictor = codec.predictor(header.step, (rows, columns), z)
        return hyper, coder.encode(
            y * latent.scale, header.layers, rate_weight=weight, effort=effort,
            predictor=predictor, importance=None if tune is None else codec.importance(y, tune),
        )[0]  # fmt: skip

    places = [(row, column) for row in range(header.tiles[0])
              for column in range(header.tiles[1])]  # fmt: skip
    coded = in_threads(encode_tile, places)
    hyper = [] if latent.z is None else [tile[0] for tile in coded]
    return hyper, [[tile[1][i] for tile in coded] for i in range(len(header.layers))]


def encode_picture(
    codec: PictureCodec,
    picture: Picture,
    latent: Latent,
    step: int,
    effort: int,
    quantizer: Quantizer = Quantizer.DQ8,
    tune: Tune = "psnr",
) -> bytes:
    """The file of a picture with this latent at this step (in 1/256)."""
    height, width = picture.rgb.shape[:2]
    layers = layers_of(step, codec.coder(quantizer).n_heads)
    header = Header(
        width, height, picture.mode, quality_of(step), step, quantizer, layers,
        codec.weights_hash, codec.coding,
    )  # fmt: skip
    hyper, tiles = encode_tiles(codec, header, latent, effort, tune)
    sections = Sections(
        icc=pixels.pack_metadata(picture.icc),
        exif=pixels.pack_metadata(picture.exif),
        alpha=b"" if picture.alpha is None else pixels.pack_alpha(picture.alpha),
        hyper=hyper,
        tiles=tiles,
    )
    return bitstream.write(header, sections)


class Reader:
    """A .pvq file opened for decoding; tiles are decoded when a region needs them.

    data: the file. partial: also read a file that is cut short or damaged, as far as it goes;
    layers: coarse layers to decode, None for all. weights: a weights file, where it is not the
    package's.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        *,
        partial: bool = False,
        layers: int | None = None,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        self.header, position = bitstream.read_header(data)
        self.codec = codec_of(self.header.weights, weights)
        if self.codec.coding != self.header.coding:
            raise CorruptDataError(
                f"header: coding {self.header.coding.name}, its weights are of "
                f"{self.codec.coding.name}"
            )
        try:
            self._coder = self.codec.coder(self.header.quantizer)
        except InputError as error:  # weights without what this quantizer needs
            raise CorruptDataError(f"header: {error}") from error
        if self.header.layers[-1] != self._coder.n_heads:
            raise CorruptDataError(
                f"header: layers end at head {self.header.layers[-1]}, the weights have "
                f"{self._coder.n_heads}"
            )
        if layers is not None and not 1 <= layers <= len(self.header.layers):
            raise InputError(f"expected layers in 1..{len(self.header.layers)}, got {layers}")
        self.partial = partial
        self.sections = bitstream.read_sections(data, self.header, position, partial=partial)
        self._n_layers = layers or len(self.header.layers)
        self._tiles: dict[tuple[int, int, int], Int32] = {}

    def _decode_tile(self, at: tuple[int, int, int]) -> Int32:
        header = self.header
        group, row, column = at
        shape, tile = header.tile_shape(row, column), row * header.tiles[1] + column
        messages: list[Message] = []
        first = group * len(header.layers)
        for layer in self.sections.tiles[first : first + self._n_layers]:
            message = layer[tile]
            if message is None:
                break
            messages.append(message)
        try:
            z = None
            if self.sections.hyper:
                hyper = self.sections.hyper[tile]
                if hyper is None:  # only in partial reading: the networks know nothing then
                    messages = []
                z = self.codec.decode_hyper(hyper, *shape)
            predictor = self.codec.predictor(header.step, shape, z)
            return self._coder.decode(messages, header.layers, *shape, predictor)
        except CorruptDataError as error:
            raise CorruptDataError(f"tile {(row, column)}: {error}") from error

    def _latent(self, top: int, bottom: int, left: int, right: int, group: int) -> Int32:
        """Positions top..bottom-1 x left..right-1, all inside of the picture."""
        tiles = [
            (group, row, column)
            for row in range(top // TILE, (bottom - 1) // TILE + 1)
            for column in range(left // TILE, (right - 1) // TILE + 1)
        ]
        missing = [at for at in tiles if at not in self._tiles]
        for at, tile in zip(missing, in_threads(self._decode_tile, missing), strict=True):
            self._tiles[at] = tile
        out = np.empty((bottom - top, right - left, self._coder.n_channels), np.int32)
        for at in tiles:
            tile = self._tiles[at]
            first_row, first_column = at[1] * TILE, at[2] * TILE
            y0, y1 = max(top, first_row), min(bottom, first_row + tile.shape[0])
            x0, x1 = max(left, first_column), min(right, first_column + tile.shape[1])
            out[y0 - top : y1 - top, x0 - left : x1 - left] = tile[
                y0 - first_row : y1 - first_row, x0 - first_column : x1 - first_column
            ]
        return out

    def _forget(self, above: int) -> None:
        """Drop tiles that end above this row of positions."""
        for at in [at for at in self._tiles if (at[1] + 1) * TILE <= above]:
            del self._tiles[at]

    def region(self, left: int, top: int, right: int, bottom: int) -> Bytes:
        """RGB bytes (bottom - top, right - left, 3) of a part of the picture."""
        self._check(left, top, right, bottom)
        out = np.empty((bottom - top, right - left, 3), np.uint8)
        for at, values in self.strips(left, top, right, bottom):
            out[at : at + len(values)] = to_pixels(values)
        return out

    def array(self, region: tuple[int, int, int, int] | None = None) -> npt.NDArray[Any]:
        """The array of bands, or a part of it: (bottom - top, right - left, C)."""
        header = self.header
        left, top, right, bottom = region or (0, 0, header.width, header.height)
        dtype = sample_dtype(header.dtype)
        if not self.sections.bands:  # only in partial reading
            raise CorruptDataError("the file ends before the section BANDS")
        spectra = Spectra.from_bytes(self.sections.bands, header.n_bands, header.n_groups, dtype)
        self._check(left, top, right, bottom)
        values = np.empty((bottom - top, right - left, 3 * header.n_groups), np.int32)
        for group in range(header.n_groups):
            channels = values[:, :, 3 * group : 3 * group + 3]
            for at, strip in self.strips(left, top, right, bottom, group):
                channels[at : at + len(strip)] = strip - (128 << PIXEL_BITS)
            self._tiles.clear()
        return spectra.samples(values, dtype)

    def _check(self, left: int, top: int, right: int, bottom: int) -> None:
        height, width = self.header.height, self.header.width
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"expected a region within {width} x {height} pixels, got "
                f"({left}, {top}, {right}, {bottom})"
            )

    def strips(
        self, left: int, top: int, right: int, bottom: int, group: int = 0
    ) -> Iterator[tuple[int, Int32]]:
        """A part of the picture, or of one group of an array of bands, by strips of full width:
        first row within the part, (rows, right - left, 3) int32 in 1/64, not clipped."""
        header, halo, block = self.header, self.codec.halo, self.header.block
        rows, all_columns = header.positions
        first_column, last_column = left // block, -(-right // block)
        left_end, right_end = max(first_column - halo, 0), min(last_column + halo, all_columns)
        for first, last in self._bands(top // block, -(-bottom // block)):
            above, below = max(first - halo, 0), min(last + halo, rows)
            recon = self._latent(above, below, left_end, right_end, group)
            margins = first - above, below - last, first_column - left_end, right_end - last_column
            values = self.codec.values(recon, margins, header.step)
            y0, y1 = max(top, first * block), min(bottom, last * block)
            yield (
                y0 - top,
                values[
                    y0 - first * block : y1 - first * block,
                    left - first_column * block : right - first_column * block,
                ],
            )
            self._forget(last - halo)

    @staticmethod
    def _bands(first: int, last: int) -> Iterator[tuple[int, int]]:
        """Rows of positions to synthesize at a time: half a row of tiles each."""
        band = TILE // 2
        for start in range(first // band * band, last, band):
            yield max(start, first), min(start + band, last)

    def picture(self) -> Picture:
        """All of it, with alpha and metadata."""
        header, sections = self.header, self.sections
        alpha = None
        if header.mode in (Mode.LA, Mode.RGBA):
            if sections.alpha:
                alpha = pixels.unpack_alpha(sections.alpha, header.height, header.width)
            else:  # only in partial reading
                alpha = np.full((header.height, header.width), 255, np.uint8)
        return Picture(
            self.region(0, 0, header.width, header.height),
            alpha,
            header.mode,
            pixels.unpack_metadata(sections.icc, "ICC profile"),
            pixels.unpack_metadata(sections.exif, "EXIF"),
        )


@lru_cache(maxsize=1)
def _loaded(weights_hash: bytes) -> LappedCodec:
    return LappedCodec(*weights.load())


def default_codec() -> LappedCodec:
    """The codec with the package's weights."""
    return _loaded(weights.load()[1])


def codec_from(path: str | os.PathLike[str]) -> PictureCodec:
    """The codec of a weights file. FormatError if it is none."""
    path = Path(path)
    return _codec_from(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _codec_from(path: Path, _changed: int) -> PictureCodec:
    with path.open("rb") as file:
        is_checkpoint = file.read(4) == b"PK\3\4"  # what torch.save writes is a zip archive
    try:
        if is_checkpoint:
            from .prototype import PrototypeCodec

            return PrototypeCodec(path)
        arrays, name = weights.load(path)
        if "codec.config" not in arrays:
            return LappedCodec(arrays, name)
        from .learned import LearnedCodec

        return LearnedCodec(arrays, name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} holds networks that need torch: pip install 'polarpack[image]'"
        ) from error


def codec_of(weights_hash: bytes, path: str | os.PathLike[str] | None = None) -> PictureCodec:
    """The codec whose weights a file names: the package's, or those in another weights file."""
    codec: PictureCodec = default_codec()
    if codec.weights_hash == weights_hash:
        return codec
    found = f"this package has {codec.weights_hash.hex()}"
    if path is not None:
        codec = codec_from(path)
        found = f"{path} has {codec.weights_hash.hex()}"
    if codec.weights_hash != weights_hash:
        raise UnsupportedVersionError(
            f"the file was written with weights {weights_hash.hex()}, {found}: name the weights "
            "file (weights=, --weights), or use the version of polarpack_image that wrote it"
        )
    return codec


def layers_of(step: int, n_heads: int) -> tuple[int, ...]:
    """The heads at which layers end."""
    if step > LAYERED_STEP * (1 << STEP_BITS) or n_heads < 12:
        return (n_heads,)
    return (1, n_heads // 4, n_heads)


def step_of(quality: float) -> int:
    """Step in 1/256 of a quality in 0..100: log-uniform."""
    ratio = FINEST_STEP / COARSEST_STEP
    return round(COARSEST_STEP * float(ratio ** (quality / 100)) * (1 << STEP_BITS))


def quality_of(step: int) -> int:
    """The quality nearest to a step in 1/256."""
    ratio = math.log(FINEST_STEP / COARSEST_STEP)
    return round(min(max(100 * math.log(step / 256 / COARSEST_STEP) / ratio, 0), 100))


def compress(
    image: ImageLike,
    quality: float | None = None,
    *,
    bpp: float | None = None,
    psnr: float | None = None,
    effort: int = 1,
    tune: Tune = "psnr",
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    quantizer: str = "dq8",
    bands: bool | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> bytes:
    """A picture, or an array of bands, as the bytes of a .pvq file.

    image: Pillow image, array (H, W) or (H, W, 1..4) of uint8 or uint16, or a path. At most one of
    quality (0..100, 50 if nothing is given), bpp (bits of the whole file for each pixel, not
    exceeded) and psnr (of the RGB bytes, in dB, reached at the fewest bytes found). effort: 1..3,
    how much of the search looks at each path's own contexts: more takes longer and saves less
    than 1% of bytes. tune: what to spend bytes on: "psnr", squared errors, or "msssim",
    structural similarity: keeps more of faint and coarse structure, less of texture. icc_profile,
    exif: instead of the image's own. quantizer: of the coefficients: "dq8" (a trellis of 8 states)
    is the best; to compare "dq4", "scalar", "polar+dq8" (each eight coefficients a radius and a
    direction, or a trellis, or both) and "polar" (radius and a direction in stages alone).
    weights: a weights file to use instead of the package's; decompressing needs it too.

    bands: True takes an array (H, W, C) of uint8, uint16, int16 or floats as C equal bands without
    rounding it to bytes, False as a picture; None does the former where C > 4 or the dtype is that
    of no picture. PSNR is then relative to the range of the numbers, bpp counts all bands.

    InputError if an argument is wrong, or if a target cannot be reached. A third of a second for a
    768 x 512 picture on one core.
    """
    if sum(target is not None for target in (quality, bpp, psnr)) > 1:
        raise InputError("expected at most one of quality, bpp and psnr")
    if quality is not None and not 0 <= quality <= 100:
        raise InputError(f"expected quality in 0..100, got {quality}")
    if not (isinstance(effort, int) and 1 <= effort <= N_EFFORTS):
        raise InputError(f"expected effort in 1..{N_EFFORTS}, got {effort!r}")
    if quantizer not in tuple(QUANTIZERS):  # in the dict, what has no hash would be a TypeError
        raise InputError(f"expected quantizer in {list(QUANTIZERS)}, got {quantizer!r}")
    if tune not in tuple(HEADS_COUNT):
        raise InputError(f"expected tune in {list(HEADS_COUNT)}, got {tune!r}")
    kind = QUANTIZERS[quantizer]
    codec: PictureCodec = default_codec() if weights is None else codec_from(weights)
    if codec.coding == Coding.ORIGINAL and (quality, bpp, psnr) != (None, None, None):
        raise InputError(f"{weights}: a prototype has one operating point, no quality, bpp or psnr")
    if bands is None:
        bands = isinstance(image, np.ndarray) and pixels.is_no_picture(image)
    if bands:
        if not isinstance(image, np.ndarray):
            raise InputError(f"expected an array of bands, got {type(image).__name__}")
        if icc_profile is not None or exif is not None:
            raise InputError("an array of bands has neither ICC profile nor EXIF")
        if tune != "psnr":
            raise InputError(f"expected tune='psnr' for an array of bands, got {tune!r}")
        if not isinstance(codec, LappedCodec):
            raise InputError(f"{weights}: weights of {codec.coding.name} do not code bands")
        array = checked(image)
        stats = statistics(array)
        finest = max(FINEST, math.ceil(stats.finest_step * (1 << STEP_BITS)))
        n_pixels = array.shape[0] * array.shape[1]

        def encode(step: int) -> bytes:
            return _encode_bands(codec, array, stats, step, effort, kind)

        def psnr_of(data: bytes) -> float:
            decoded = Reader(data, weights=weights).array().astype(np.float64)
            return _psnr(decoded, array, stats.high - stats.low)
    else:
        picture = pixels.from_image(image)
        if icc_profile is not None:
            picture.icc = pixels.checked(icc_profile, "icc_profile")
        if exif is not None:
            picture.exif = pixels.checked(exif, "exif")
        latents = codec.latents(picture.rgb)
        finest, n_pixels = FINEST, picture.rgb.shape[0] * picture.rgb.shape[1]

        def encode(step: int) -> bytes:
            return encode_picture(codec, picture, latents(step), step, effort, kind, tune)

        def psnr_of(data: bytes) -> float:
            height, width = picture.rgb.shape[:2]
            decoded = Reader(data, weights=weights).region(0, 0, width, height)
            return _psnr(decoded.astype(np.float64), picture.rgb, 255)

    if bpp is not None:
        return _to_target("bpp", bpp, finest, encode, lambda data: 8 * len(data) / n_pixels)
    if psnr is not None:
        return _to_target("psnr", psnr, finest, encode, psnr_of)
    return encode(step_of(50 if quality is None else quality))


def _psnr(decoded: npt.NDArray[np.float64], array: npt.NDArray[Any], peak: float) -> float:
    """In dB; ``decoded`` is overwritten."""
    decoded -= array
    mse = float(np.mean(np.square(decoded, out=decoded)))
    return math.inf if mse == 0 else 10 * math.log10(peak * peak / mse)


def _to_target(
    name: str,
    target: float,
    finest: int,
    encode: Callable[[int], bytes],
    measure: Callable[[bytes], float],
) -> bytes:
    """The finest step whose file measures at most ``target`` bpp, or the coarsest that reaches
    ``target`` psnr: bisection of its logarithm, some ten encodings."""
    if not 0 < target < math.inf:
        raise InputError(f"expected a target above 0, got {target}")
    coarsest = MAX_STEP
    best: bytes | None = None
    while True:
        step = round(math.sqrt(finest * coarsest))
        data = encode(step)
        measured = measure(data)
        if measured >= target if name == "psnr" else measured > target:
            finest = step
        else:
            coarsest = step
        if measured >= target if name == "psnr" else measured <= target:
            best = data
        if coarsest / finest < 1.002 or coarsest - finest <= 1:
            break
    if best is None:
        raise InputError(
            f"{name} {target} cannot be reached: {len(data)} bytes at the last step tried"
        )
    return best


def _encode_bands(
    codec: LappedCodec, array: npt.NDArray[Any], stats: Statistics, step: int, effort: int,
    quantizer: Quantizer,
) -> bytes:  # fmt: skip
    """The file of an array of bands: pictures of three principal axes each, the weakest left out
    where nothing of them is left."""
    spectra = Spectra.of(stats, step / (1 << STEP_BITS))
    height, width, n_bands = array.shape
    layers = layers_of(step, codec.coder(quantizer).n_heads)
    header = Header(
        width, height, Mode.BANDS, quality_of(step), step, quantizer, layers, codec.weights_hash,
        Coding.LAPPED, sample_number(array.dtype), n_bands, spectra.n_groups,
    )  # fmt: skip
    tiles: list[list[Message | None]] = []
    n_used = 0
    for group, picture in enumerate(spectra.pictures(array)):
        latent = codec.latents(picture)(step)
        tiles += encode_tiles(codec, header, latent, effort)[1]
        if not _is_zero(header, tiles[-len(layers) :]):
            n_used = group + 1
    sections = Sections(bands=spectra.first(n_used).to_bytes(), tiles=tiles[: n_used * len(layers)])
    return bitstream.write(replace(header, n_groups=n_used), sections)


def _is_zero(header: Header, tiles: list[list[Message | None]]) -> bool:
    """Whether all indices of a picture are 0, by their checksums."""
    rows, columns = header.tiles
    shapes = [header.tile_shape(row, column) for row in range(rows) for column in range(columns)]
    for first, end, layer in zip((0, *header.layers), header.layers, tiles, strict=False):
        for (h, w), message in zip(shapes, layer, strict=True):
            if message is None or message[1] != zlib.crc32(bytes(2 * HEAD * (end - first) * h * w)):
                return False
    return True


def decompress(
    data: bytes | bytearray | memoryview,
    *,
    region: tuple[int, int, int, int] | None = None,
    partial: bool = False,
    layers: int | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Image.Image | npt.NDArray[Any]:
    """The picture in a .pvq file, as a Pillow image with its ICC profile and EXIF in ``info``; of a
    file of bands the array (H, W, C) in the dtype it had.

    region: (left, top, right, bottom) in pixels, decoded from the tiles around it only. partial:
    also take a file that is cut short, as far as it goes (what is missing comes out coarse).
    layers: decode only so many coarse layers. weights: the weights file that the file names, where
    it is not the package's. FormatError if the bytes are not a whole, undamaged file that this
    version can read.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"expected the bytes of a file, got {type(data).__name__}")
    reader = Reader(bytes(data), partial=partial, layers=layers, weights=weights)
    if reader.header.mode == Mode.BANDS:
        return reader.array(region)
    picture = reader.picture() if region is None else _cut(reader, region)
    return pixels.to_image(picture)


def _cut(reader: Reader, region: tuple[int, int, int, int]) -> Picture:
    left, top, right, bottom = region
    rgb = reader.region(left, top, right, bottom)
    alpha = None
    if reader.sections.alpha:
        header = reader.header
        alpha = pixels.unpack_alpha(reader.sections.alpha, header.height, header.width)
        alpha = np.ascontiguousarray(alpha[top:bottom, left:right])
    return Picture(
        rgb, alpha, reader.header.mode,
        pixels.unpack_metadata(reader.sections.icc, "ICC profile"),
        pixels.unpack_metadata(reader.sections.exif, "EXIF"),
    )  # fmt: skip
