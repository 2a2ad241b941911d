"""Pictures to .pvq bytes and back.

    image ─ RGB bytes ─ transform ─ coefficients / step ─ latent coder ─ sections ─ file
            pixels      transform   (h, w, C)             coder          bitstream

Everything goes by tiles of 128 x 128 positions (1024 x 1024 pixels): each is coded on its own, so
memory is bounded, threads share nothing and a region needs the tiles around it only. The transform
does not see tiles: positions beyond a tile's edge come from its neighbour, so there are no seams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from polarpack._threads import in_threads
from polarpack.errors import CorruptDataError, InputError, UnsupportedVersionError

from . import bitstream, pixels, weights
from .bitstream import TILE, Header, Mode, Quantizer, Sections
from .coder import LatentCoder, Predictor
from .exact import ContextNetwork, HeadPredictor
from .pixels import ImageLike, Picture
from .transform import (
    BLOCK,
    PIXEL_BITS,
    RECON_BITS,
    STEP_BITS,
    LinearTransform,
    mirrored,
    to_pixels,
)

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

COARSEST_STEP, FINEST_STEP = 120.0, 3.0  # of quality 0 and 100, in grey levels
MAX_STEP = 65535  # in 1 / 2**STEP_BITS
RATE_WEIGHT = 0.4  # lambda in step^2 a bit; 0.35 to 0.5 cost the same to 0.1%
SCALAR_WEIGHT = 0.5  # with one state, whose lattice has twice the distance
# Steps below this have layers: at coarser ones a second message costs more than 0.5% of the file.
LAYERED_STEP = 24.0
N_EFFORTS = 3
QUANTIZERS = {"dq8": Quantizer.DQ8, "dq4": Quantizer.DQ4, "scalar": Quantizer.SCALAR}


class Codec:
    """One weights file, ready to code. Holds no state between pictures.

    path: of the weights; the package's by default.
    """

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], weights_hash: bytes) -> None:
        self.weights_hash = weights_hash
        self.transform = LinearTransform(_part(arrays, "transform."))
        self._coder_arrays = _part(arrays, "coder.")
        self._coders: dict[Quantizer, LatentCoder] = {}
        self._network = ContextNetwork(arrays) if "net.starts" in arrays else None

    def coder(self, quantizer: Quantizer = Quantizer.DQ8) -> LatentCoder:
        """The latent coder with one of the quantizers."""
        if quantizer not in self._coders:
            self._coders[quantizer] = LatentCoder(self._coder_arrays, n_states=quantizer.n_states)
        return self._coders[quantizer]

    def predictor(self, step: int) -> Predictor | None:
        """What the entropy network, if there is one, says about a tile coded with this step."""
        return None if self._network is None else HeadPredictor(self._network, step)

    # -- encoding ---------------------------------------------------------------------------------
    def coefficients(self, rgb: Bytes) -> Float32:
        """(h, w, C) of (H, W, 3) uint8, continued by its mirror image to whole blocks."""
        height, width = (-(-n // BLOCK) * BLOCK for n in rgb.shape[:2])
        if rgb.shape[:2] != (height, width):
            rows, columns = np.arange(height), np.arange(width)
            rgb = rgb[mirrored(rows, rgb.shape[0])][:, mirrored(columns, rgb.shape[1])]
        y = self.transform.analysis(rgb)
        return self._refined(rgb, y)

    def _refined(self, rgb: Bytes, y: Float32) -> Float32:
        """Coefficients that give the pixels back to 0.01 grey levels, where a learned analysis is
        the synthesis's inverse only nearly: one step of y + analysis(x - synthesis(y))."""
        recon = np.rint(y * (1 << RECON_BITS)).astype(np.int32)
        rows, halo = y.shape[0], self.transform.halo
        left = np.empty(rgb.shape, np.float32)
        for first in range(0, rows, TILE // 2):
            last = min(first + TILE // 2, rows)
            sides = (first - halo < 0, last + halo > rows, True, True)
            ringed = self.transform.surrounded(
                recon[max(first - halo, 0) : min(last + halo, rows)], sides
            )
            values = self.transform.synthesis(ringed, 1 << STEP_BITS)
            part = np.s_[first * BLOCK : last * BLOCK]
            left[part] = rgb[part] - values * np.float32(2.0**-PIXEL_BITS)
        y = recon * np.float32(2.0**-RECON_BITS) + self.transform.analysis(left, centre=0)
        return y

    def encode(
        self,
        picture: Picture,
        y: Float32,
        step: int,
        quality: int,
        effort: int,
        quantizer: Quantizer = Quantizer.DQ8,
    ) -> bytes:
        """The file of a picture whose coefficients are ``y``, with this step (in 1/256)."""
        height, width = picture.rgb.shape[:2]
        coder = self.coder(quantizer)
        layers = _layers(step, coder.n_heads)
        header = Header(
            width, height, picture.mode, quality, step, quantizer, layers, self.weights_hash
        )
        scale = np.float32((1 << STEP_BITS) / step)

        def encode_tile(at: tuple[int, int]) -> list[tuple[bytes, int]]:
            rows, columns = header.tile_shape(*at)
            top, left = at[0] * TILE, at[1] * TILE
            target = y[top : top + rows, left : left + columns] * scale
            weight = SCALAR_WEIGHT if quantizer == Quantizer.SCALAR else RATE_WEIGHT
            return coder.encode(
                target, layers, rate_weight=weight, rounds=effort, predictor=self.predictor(step)
            )[0]

        places = [(row, column) for row in range(header.tiles[0])
                  for column in range(header.tiles[1])]  # fmt: skip
        coded = in_threads(encode_tile, places)
        sections = Sections(
            icc=pixels.pack_metadata(picture.icc),
            exif=pixels.pack_metadata(picture.exif),
            alpha=b"" if picture.alpha is None else pixels.pack_alpha(picture.alpha),
            tiles=[[tile[i] for tile in coded] for i in range(len(layers))],
        )
        return bitstream.write(header, sections)


class Reader:
    """A .pvq file opened for decoding; tiles are decoded when a region needs them.

    data: the file. partial: also read a file that is cut short or damaged, as far as it goes;
    layers: coarse layers to decode, None for all.
    """

    def __init__(
        self, data: bytes | memoryview, *, partial: bool = False, layers: int | None = None
    ) -> None:
        self.header, position = bitstream.read_header(data)
        self.codec = codec_of(self.header.weights)
        transform = self.codec.transform
        self._coder = self.codec.coder(self.header.quantizer)
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
        self._halo = transform.halo
        self._tiles: dict[tuple[int, int], Int32] = {}

    def _decode_tile(self, at: tuple[int, int]) -> Int32:
        header = self.header
        messages = []
        for layer in self.sections.tiles[: self._n_layers]:
            message = layer[at[0] * header.tiles[1] + at[1]]
            if message is None:
                break
            messages.append(message)
        try:
            return self._coder.decode(
                messages, header.layers, *header.tile_shape(*at), self.codec.predictor(header.step)
            )
        except CorruptDataError as error:
            raise CorruptDataError(f"tile {at}: {error}") from error

    def _latent(self, top: int, bottom: int, left: int, right: int) -> Int32:
        """Positions top..bottom-1 x left..right-1, all inside of the picture."""
        tiles = [
            (row, column)
            for row in range(top // TILE, (bottom - 1) // TILE + 1)
            for column in range(left // TILE, (right - 1) // TILE + 1)
        ]
        missing = [at for at in tiles if at not in self._tiles]
        for at, tile in zip(missing, in_threads(self._decode_tile, missing), strict=True):
            self._tiles[at] = tile
        out = np.empty((bottom - top, right - left, self._coder.n_channels), np.int32)
        for at in tiles:
            tile = self._tiles[at]
            first_row, first_column = at[0] * TILE, at[1] * TILE
            y0, y1 = max(top, first_row), min(bottom, first_row + tile.shape[0])
            x0, x1 = max(left, first_column), min(right, first_column + tile.shape[1])
            out[y0 - top : y1 - top, x0 - left : x1 - left] = tile[
                y0 - first_row : y1 - first_row, x0 - first_column : x1 - first_column
            ]
        return out

    def _forget(self, above: int) -> None:
        """Drop tiles that end above this row of positions."""
        for at in [at for at in self._tiles if (at[0] + 1) * TILE <= above]:
            del self._tiles[at]

    def region(self, left: int, top: int, right: int, bottom: int) -> Bytes:
        """RGB bytes (bottom - top, right - left, 3) of a part of the picture."""
        height, width = self.header.height, self.header.width
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"expected a region within {width} x {height} pixels, got "
                f"({left}, {top}, {right}, {bottom})"
            )
        out = np.empty((bottom - top, right - left, 3), np.uint8)
        columns = left // BLOCK, -(-right // BLOCK)
        rows, all_columns = self.header.positions
        halo = self._halo
        for first, last in self._bands(top // BLOCK, -(-bottom // BLOCK)):
            sides = (
                first - halo < 0, last + halo > rows,
                columns[0] - halo < 0, columns[1] + halo > all_columns,
            )  # fmt: skip
            recon = self._latent(
                max(first - halo, 0), min(last + halo, rows),
                max(columns[0] - halo, 0), min(columns[1] + halo, all_columns),
            )  # fmt: skip
            ringed = self.codec.transform.surrounded(recon, sides)
            values = to_pixels(self.codec.transform.synthesis(ringed, self.header.step))
            y0, y1 = max(top, first * BLOCK), min(bottom, last * BLOCK)
            out[y0 - top : y1 - top] = values[
                y0 - first * BLOCK : y1 - first * BLOCK,
                left - columns[0] * BLOCK : right - columns[0] * BLOCK,
            ]
            self._forget(last - halo)
        return out

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


def _part(arrays: dict[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@lru_cache(maxsize=1)
def _loaded(weights_hash: bytes) -> Codec:
    return Codec(*weights.load())


def default_codec() -> Codec:
    """The codec with the package's weights."""
    return _loaded(weights.load()[1])


def codec_of(weights_hash: bytes) -> Codec:
    """The codec whose weights a file names."""
    codec = default_codec()
    if codec.weights_hash != weights_hash:
        raise UnsupportedVersionError(
            f"the file was written with weights {weights_hash.hex()}, this package has "
            f"{codec.weights_hash.hex()}: use the version of polarpack_image that wrote it"
        )
    return codec


def _layers(step: int, n_heads: int) -> tuple[int, ...]:
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
    effort: int = 2,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    quantizer: str = "dq8",
) -> bytes:
    """A picture as the bytes of a .pvq file.

    image: Pillow image, array (H, W) or (H, W, 1..4) of uint8 or uint16, or a path. At most one of
    quality (0..100, 50 if nothing is given), bpp (bits of the whole file for each pixel, not
    exceeded) and psnr (of the RGB bytes, in dB, reached at the fewest bytes found). effort: 1..3,
    rounds of the search: each takes a third more time, the second saves 1.1% of bytes, the third
    little. icc_profile, exif:
    instead of the image's own. quantizer: "dq8", which is best, or "dq4" or "scalar" to compare.

    InputError if an argument is wrong, or if a target cannot be reached. About a second for a
    768 x 512 picture on one core.
    """
    picture = pixels.from_image(image)
    if icc_profile is not None:
        picture.icc = pixels.checked(icc_profile, "icc_profile")
    if exif is not None:
        picture.exif = pixels.checked(exif, "exif")
    if sum(target is not None for target in (quality, bpp, psnr)) > 1:
        raise InputError("expected at most one of quality, bpp and psnr")
    if not (isinstance(effort, int) and 1 <= effort <= N_EFFORTS):
        raise InputError(f"expected effort in 1..{N_EFFORTS}, got {effort!r}")
    if quantizer not in QUANTIZERS:
        raise InputError(f"expected quantizer in {list(QUANTIZERS)}, got {quantizer!r}")
    kind = QUANTIZERS[quantizer]
    codec = default_codec()
    y = codec.coefficients(picture.rgb)
    if bpp is not None or psnr is not None:
        return _to_target(codec, picture, y, bpp, psnr, effort, kind)
    quality = 50 if quality is None else quality
    if not 0 <= quality <= 100:
        raise InputError(f"expected quality in 0..100, got {quality}")
    step = step_of(quality)
    return codec.encode(picture, y, step, quality_of(step), effort, kind)


def _to_target(
    codec: Codec, picture: Picture, y: Float32, bpp: float | None, psnr: float | None,
    effort: int, quantizer: Quantizer,
) -> bytes:  # fmt: skip
    """The finest step whose file has at most ``bpp``, or the coarsest that reaches ``psnr``:
    bisection of its logarithm, some ten encodings."""
    n_pixels = picture.rgb.shape[0] * picture.rgb.shape[1]
    target = bpp if bpp is not None else psnr
    if target is None or not 0 < target < math.inf:
        raise InputError(f"expected a target above 0, got {target}")

    def attempt(step: int) -> tuple[bytes, bool]:
        """The file, and whether it is fine enough (psnr) or too fine (bpp)."""
        data = codec.encode(picture, y, step, quality_of(step), effort, quantizer)
        if bpp is not None:
            return data, 8 * len(data) > bpp * n_pixels
        error = Reader(data).region(0, 0, picture.rgb.shape[1], picture.rgb.shape[0])
        difference = error.astype(np.float64) - picture.rgb
        mse = float(np.mean(difference * difference))
        return data, mse <= 255.0**2 * 10 ** (-target / 10)

    finest, coarsest = 32, MAX_STEP
    best: bytes | None = None
    while True:
        step = round(math.sqrt(finest * coarsest))
        data, fine = attempt(step)
        if fine:
            finest = step
        else:
            coarsest = step
        if fine == (psnr is not None):
            best = data
        if coarsest / finest < 1.002 or coarsest - finest <= 1:
            break
    if best is None:
        what = f"bpp {bpp}" if bpp is not None else f"psnr {psnr}"
        raise InputError(f"{what} cannot be reached: {len(data)} bytes at the last step tried")
    return best


def decompress(
    data: bytes | bytearray | memoryview,
    *,
    region: tuple[int, int, int, int] | None = None,
    partial: bool = False,
    layers: int | None = None,
) -> Image.Image:
    """The picture in a .pvq file, as a Pillow image with its ICC profile and EXIF in ``info``.

    region: (left, top, right, bottom) in pixels, decoded from the tiles around it only. partial:
    also take a file that is cut short, as far as it goes (what is missing comes out coarse).
    layers: decode only so many coarse layers. FormatError if the bytes are not a whole, undamaged
    file that this version can read.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"expected the bytes of a file, got {type(data).__name__}")
    reader = Reader(bytes(data), partial=partial, layers=layers)
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
