"""What a weights file must be able to do to code pictures, and how the package's own does it.

A codec transforms pixels to a latent and back, says what is likely in it, and has the coder of its
tiles. ``LappedCodec`` is the package's: a lapped transform, exact in integers. ``learned`` has
trained networks in its place, ``prototype`` the first system's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ._coder_kernels import HEAD
from .bitstream import TILE, Coding, Message, Quantizer
from .coder import Importance, LatentCoder, Predictor
from .exact import ContextNetwork, HeadPredictor
from .transform import BLOCK, STEP_BITS, LinearTransform, mirrored

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Tune = Literal["psnr", "msssim"]

# How much errors of the first heads count (of the others: 1), found on training photographs.
HEADS_COUNT = {
    "psnr": (1.5, 1.2),
    "msssim": (2.1, 2.4, 0.9, 0.6, 0.7, 0.75, 0.95, 0.7),
}
FLAT = 60.0  # variance in grey levels^2 below which texture hides no more
TYPICAL_TEXTURE = 240.0  # in the geometric mean of training photographs, with FLAT


class Latent(NamedTuple):
    """What is coded of a picture: y (h, w, C) float32, which times ``scale`` is in steps, and the
    hyper-latent z (ceil(h / 4), ceil(w / 4), n) int32 of a learned coding."""

    y: Float32
    scale: np.float32
    z: Int32 | None = None


class TileCoder(Protocol):
    """What turns tiles of coefficients into messages; ``LatentCoder`` but for the prototype."""

    n_heads: int
    n_channels: int

    def encode(
        self,
        target: Float32,
        layers: Sequence[int],
        *,
        rate_weight: float,
        effort: int = 1,
        predictor: Predictor | None = None,
        importance: Importance | None = None,
    ) -> tuple[list[Message], Int32]:
        """See ``LatentCoder``."""

    def decode(
        self,
        messages: Sequence[Message],
        layers: Sequence[int],
        rows: int,
        columns: int,
        predictor: Predictor | None = None,
    ) -> Int32:
        """See ``LatentCoder``."""


class PictureCodec(Protocol):
    """What a weights file must be able to do. Holds no state between pictures.

    halo: positions around a pixel's own that it depends on.
    """

    weights_hash: bytes

    @property
    def coding(self) -> Coding:
        """What headers say."""

    @property
    def halo(self) -> int:
        """See above."""

    def coder(self, quantizer: Quantizer = Quantizer.DQ8) -> TileCoder:
        """The latent coder with one of the quantizers."""

    def latents(self, rgb: npt.NDArray[Any]) -> Callable[[int], Latent]:
        """(H, W, 3) pixels to the latent at any step in 1/256."""

    def importance(self, y: Float32, tune: Tune) -> Importance | None:
        """How much errors of a tile's latent y (h, w, C), in grey levels, count; None: all alike.
        InputError for a ``tune`` that there is no rule for."""

    def encode_hyper(self, z: Int32) -> Message:
        """A tile's hyper-latent as a message and the checksum of its integers."""

    def decode_hyper(self, message: Message | None, rows: int, columns: int) -> Int32:
        """The inverse, for a tile of so many positions of y; without a message what is likeliest.
        CorruptDataError where the message says something else than it did to its encoder."""

    def predictor(self, step: int, shape: tuple[int, int], z: Int32 | None) -> Predictor | None:
        """What the entropy network, if there is one, says about a tile of so many positions."""

    def values(self, recon: Int32, margins: tuple[int, int, int, int], step: int) -> Int32:
        """Pixels in 1/64, not clipped, of the inner positions of ``recon``, around which it has
        ``margins`` (top, bottom, left, right): ``halo``, or less where the picture ends."""


class LappedCodec:
    """The package's weights, and others of the same kind, ready to code.

    arrays, weights_hash: of ``weights.load``.
    """

    coding = Coding.LAPPED

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], weights_hash: bytes) -> None:
        self.weights_hash = weights_hash
        self.transform = LinearTransform(_part(arrays, "transform."))
        self._coder_arrays = _part(arrays, "coder.")
        self._coders: dict[Quantizer, LatentCoder] = {}
        self._network = ContextNetwork(arrays) if "net.starts" in arrays else None
        self.halo = self.transform.halo

    def coder(self, quantizer: Quantizer = Quantizer.DQ8) -> LatentCoder:
        """The latent coder with one of the quantizers."""
        if quantizer not in self._coders:
            self._coders[quantizer] = LatentCoder(self._coder_arrays, quantizer=quantizer)
        return self._coders[quantizer]

    def predictor(
        self, step: int, shape: tuple[int, int] = (0, 0), z: Int32 | None = None
    ) -> Predictor | None:
        """See ``PictureCodec``; it needs no more than the step."""
        return None if self._network is None else HeadPredictor(self._network, step)

    def importance(self, y: Float32, tune: Tune) -> Importance:
        """See ``PictureCodec``. For "psnr" by heads alone: what is coded early predicts the rest,
        and pays twice. For "msssim" more so, and less where there is texture, which hides errors:
        by activity^-0.25, where structural similarity divides errors by it."""
        heads = np.ones(y.shape[2] // HEAD, np.float32)
        heads[: len(HEADS_COUNT[tune])] = HEADS_COUNT[tune]
        if tune == "psnr":
            return Importance(heads, np.ones(y.shape[:2], np.float32))
        texture = np.square(y[..., HEAD:]).sum(axis=2) / BLOCK**2  # without the mean colours
        places = ((texture + FLAT) / TYPICAL_TEXTURE) ** np.float32(-0.25)
        return Importance(heads, np.clip(places, 0.25, 4).astype(np.float32))

    def encode_hyper(self, z: Int32) -> Message:
        """There is no hyper-latent."""
        raise NotImplementedError

    def decode_hyper(self, message: Message | None, rows: int, columns: int) -> Int32:
        """There is no hyper-latent."""
        raise NotImplementedError

    def values(self, recon: Int32, margins: tuple[int, int, int, int], step: int) -> Int32:
        """See ``PictureCodec``; exact."""
        top, bottom, left, right = (margin < self.halo for margin in margins)
        ringed = self.transform.surrounded(recon, (top, bottom, left, right))
        return self.transform.synthesis(ringed, step)

    def latents(self, rgb: npt.NDArray[Any]) -> Callable[[int], Latent]:
        """See ``PictureCodec``."""
        y = self.coefficients(rgb)
        return lambda step: Latent(y, np.float32((1 << STEP_BITS) / step))

    def coefficients(self, rgb: npt.NDArray[Any]) -> Float32:
        """(h, w, C) of (H, W, 3) pixels around 128, continued by their mirror image to whole
        blocks."""
        rgb = whole_blocks(rgb, BLOCK)
        y = self.transform.analysis(rgb)
        return self._refined(rgb, y)

    def _refined(self, rgb: npt.NDArray[Any], y: Float32) -> Float32:
        """Coefficients that give the pixels back to 0.01 grey levels, where a learned analysis is
        the synthesis's inverse only nearly: one step of y + analysis(x - synthesis(y))."""
        rows, halo = y.shape[0], self.transform.halo
        left = np.empty(rgb.shape, np.float32)
        for first in range(0, rows, TILE // 2):
            last = min(first + TILE // 2, rows)
            sides = (first - halo < 0, last + halo > rows, True, True)
            ringed = self.transform.surrounded(
                y[max(first - halo, 0) : min(last + halo, rows)], sides
            )
            part = np.s_[first * BLOCK : last * BLOCK]
            left[part] = rgb[part] - np.float32(128) - self.transform.nearly(ringed)
        return y + self.transform.analysis(left, centre=0)


def whole_blocks(rgb: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """(H, W, 3) continued by its mirror image to multiples of a block's side."""
    height, width = (-(-n // block) * block for n in rgb.shape[:2])
    if rgb.shape[:2] == (height, width):
        return rgb
    rows, columns = mirrored(np.arange(height), rgb.shape[0]), np.arange(width)
    return rgb[rows][:, mirrored(columns, rgb.shape[1])]


def _part(arrays: dict[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
