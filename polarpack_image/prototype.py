"""The first prototype, and the other baselines, behind the interface of the codec's weights.

A checkpoint of ``baselines`` codes patches of pixels by itself, in an order and under probabilities
of its own. Here a tile of the .pvq file is a picture to it: pixels go in and out as coefficients
(8 x 8 blocks of RGB), so that tiles, regions and partial reading are those of every other file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from polarpack.errors import FormatError, InputError

from .baselines.base import HEADER, KINDS, MAGIC, VERSION, Baseline
from .baselines.training import load
from .bitstream import Coding, Message, Quantizer
from .coder import Importance, Predictor
from .picture_codec import Latent, Tune, whole_blocks
from .transform import BLOCK, PIXEL_BITS, from_blocks, to_blocks

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


class PrototypeCodec:
    """A ``PictureCodec`` of a trained baseline, which has one operating point: the step means
    nothing to it."""

    coding = Coding.ORIGINAL
    halo = 0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._coder = PrototypeCoder(load(os.fspath(path)))
        self.weights_hash = self._coder.model.weights_crc.to_bytes(4, "little")

    def coder(self, quantizer: Quantizer = Quantizer.DQ8) -> PrototypeCoder:
        """The model; its quantizer is its own."""
        return self._coder

    def latents(self, rgb: npt.NDArray[Any]) -> Callable[[int], Latent]:
        """The pixels in blocks."""
        y = to_blocks(whole_blocks(rgb, BLOCK).astype(np.float32))
        return lambda step: Latent(y, np.float32(1))

    def importance(self, y: Float32, tune: Tune) -> None:
        """See ``PictureCodec``: errors count alike."""
        if tune != "psnr":
            raise InputError(f"expected tune='psnr' with these weights, got {tune!r}")

    def encode_hyper(self, z: Int32) -> Message:
        """There is no hyper-latent."""
        raise NotImplementedError

    def decode_hyper(self, message: Message | None, rows: int, columns: int) -> Int32:
        """There is no hyper-latent."""
        raise NotImplementedError

    def predictor(self, step: int, shape: tuple[int, int], z: Int32 | None) -> None:
        """The model has its own."""

    def values(self, recon: Int32, margins: tuple[int, int, int, int], step: int) -> Int32:
        """See ``PictureCodec``."""
        pixels: Int32 = from_blocks(recon) << PIXEL_BITS
        return pixels


class PrototypeCoder:
    """A ``picture_codec.TileCoder`` whose coefficients are bytes of pixels."""

    n_heads = 1
    n_channels = 3 * BLOCK * BLOCK

    def __init__(self, model: Baseline) -> None:
        self.model = model
        self._alone = Lock()  # torch's number of threads is everybody's

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
        """The message of a tile of pixels, and no reconstruction: nobody asks."""
        with self._alone:
            data = self.model.compress(from_blocks(target).astype(np.uint8))
        return [(data[HEADER.size :], HEADER.unpack_from(data)[-1])], np.empty(0, np.int32)

    def decode(
        self,
        messages: Sequence[Message],
        layers: Sequence[int],
        rows: int,
        columns: int,
        predictor: Predictor | None = None,
    ) -> Int32:
        """(rows, columns, 192) int32; grey without a message."""
        if not messages:
            return np.full((rows, columns, self.n_channels), 128, np.int32)
        (payload, checksum), *more = messages
        if more:
            raise FormatError(f"expected one layer, got {1 + len(more)}")
        head = HEADER.pack(
            MAGIC, VERSION, KINDS[self.model.kind], self.model.weights_crc,
            BLOCK * rows, BLOCK * columns, checksum,
        )  # fmt: skip
        with self._alone:
            pixels = self.model.decompress(head + payload)
        blocks: Int32 = to_blocks(pixels).astype(np.int32)
        return blocks
