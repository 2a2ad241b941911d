"""What every baseline can do: be saved and loaded, and turn pictures into bytes and back.

::

    picture ── patches (n, 3, p, p) ── symbols: a list of integer arrays ── coder ── bytes
                                       └────────────────── image ── patches ── picture

A subclass says how patches become symbols (``symbols``), how these become patches again (``image``)
and in which order and under which probabilities they are coded (``run``); this class does the rest.
"""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polarpack.errors import (
    CorruptDataError,
    FormatError,
    InputError,
    LimitError,
    UnsupportedVersionError,
)

from .coding import Coder, Reader, Writer
from .layers import to_pixels, to_unit
from .priors import HistogramPrior

if TYPE_CHECKING:
    from PIL import Image

Bytes = npt.NDArray[np.uint8]
Symbols = list[Tensor]

# magic, version, kind, CRC-32 of the model's weights, height, width, CRC-32 of the symbols
HEADER = struct.Struct("<4sBBIHHI")
MAGIC, VERSION = b"PVQB", 0
KINDS = {"vqvae": 1, "rqvae": 2, "fsqvae": 3, "vqvae2": 4, "hyperprior": 5, "original": 6}
MAX_PIXELS = 1 << 25  # of a picture, so that a header cannot ask for hours of decoding


class Baseline(nn.Module):
    """Base of the baseline codecs.

    Attributes
    ----------
    kind : its name on the command line and in files. patch : side of the square patches in pixels.
    """

    kind: ClassVar[str]
    patch: int
    _config: dict[str, Any]  # the constructor's arguments

    # ------------------------------------------------------------------- what a subclass says

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of the transform on x (B, 3, p, p) in -0.5..0.5, and figures to log."""
        raise NotImplementedError

    def symbols(self, x: Tensor) -> Symbols:
        """What is coded of patches (B, 3, p, p): integer tensors with B first."""
        raise NotImplementedError

    def image(self, symbols: Symbols) -> Tensor:
        """Patches (B, 3, p, p) in -0.5..0.5 of symbols."""
        raise NotImplementedError

    def run(self, coder: Coder, n: int, symbols: Symbols | None) -> Symbols:
        """Code the symbols of n patches: given them (to write) or finding them (to read)."""
        raise NotImplementedError

    def set_progress(self, fraction: float) -> None:
        """Told before each training step how far training is, 0..1, for what follows a schedule."""

    def start_prior(self) -> None:
        """Called once, between training the transform and training the entropy model."""

    def learn_counts(self, symbols: Symbols) -> None:
        """Take in the statistics of symbols, for the parts of the model that merely count."""

    def prior_parameters(self) -> list[nn.Parameter]:
        """What is trained after the transform; [] where nothing but counts is."""
        return []

    def prior_loss(self, symbols: Symbols, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the entropy model on symbols of the patches x."""
        raise NotImplementedError

    # ------------------------------------------------------------------------ pictures and bytes

    def compress(self, image: Image.Image | Bytes | str | Path) -> bytes:
        """A picture (PIL image, (H, W, 3) uint8, or a path) as bytes.

        InputError for another shape or dtype, or more than 2^25 pixels.
        """
        return self._compress(as_pixels(image))[0]

    @torch.inference_mode()
    def _compress(self, pixels: Bytes) -> tuple[bytes, Symbols, float]:
        was_training = self.training
        self.eval()
        try:
            patches = cut(pixels, self.patch)
            symbols = self.symbols(to_unit(patches.float()))
            writer = Writer()
            with one_thread():
                self.run(writer, len(patches), symbols)
            payload = writer.finish()
        finally:
            self.train(was_training)
        h, w = pixels.shape[:2]
        head = HEADER.pack(MAGIC, VERSION, KINDS[self.kind], self.weights_crc, h, w, writer.crc)
        return head + payload, symbols, writer.bits

    @torch.inference_mode()
    def decompress(self, data: bytes) -> Bytes:
        """(H, W, 3) uint8 of ``compress``'s bytes.

        FormatError (its subclasses) for bytes of another kind, another model, or damaged ones: the
        CRC of the symbols is checked before anything is drawn.
        """
        if len(data) < HEADER.size or data[:4] != MAGIC:
            raise CorruptDataError("not the bytes of a baseline codec")
        _, version, kind, weights, h, w, crc = HEADER.unpack_from(data)
        if version > VERSION:
            raise UnsupportedVersionError(f"version {version}, this reader knows {VERSION}")
        if kind != KINDS[self.kind]:
            names = {number: name for name, number in KINDS.items()}
            raise FormatError(f"bytes of a {names.get(kind, kind)!r} model, this is {self.kind!r}")
        if weights != self.weights_crc:
            raise FormatError(
                f"written with weights {weights:08x}, these are {self.weights_crc:08x}"
            )
        if not h or not w:
            raise CorruptDataError(f"a picture of {w} x {h} pixels")
        if h * w > MAX_PIXELS:
            raise LimitError(f"{w} x {h} pixels exceed the limit of {MAX_PIXELS}")
        was_training = self.training
        self.eval()
        try:
            reader = Reader(data[HEADER.size :])
            n = -(-h // self.patch) * -(-w // self.patch)
            with one_thread():
                symbols = self.run(reader, n, None)
            reader.check(crc)
            patches = to_pixels(self.image(symbols))
        finally:
            self.train(was_training)
        return join(patches, h, w)

    def measure(self, image: Image.Image | Bytes | str | Path) -> dict[str, float]:
        """Compress, decompress and compare.

        Returns ``bpp`` of the whole file, ``payload_bpp``, ``entropy_bpp`` (cross-entropy under the
        model), ``zlib_bpp`` (the symbols as 16-bit integers under zlib level 9, the naive way) and
        ``psnr`` in dB over RGB. Raises CorruptDataError if decoding gave another picture.
        """
        pixels = as_pixels(image)
        data, symbols, bits = self._compress(pixels)
        decoded = self.decompress(data)
        with torch.inference_mode():
            was_training = self.training
            self.eval()
            expected = join(to_pixels(self.image(symbols)), *pixels.shape[:2])
            self.train(was_training)
        if not np.array_equal(expected, decoded):
            raise CorruptDataError("decoding gave another picture")
        n = pixels.shape[0] * pixels.shape[1]
        raw = b"".join(s.numpy().astype("<i2").tobytes() for s in symbols)
        error = float(np.mean((decoded.astype(np.float64) - pixels) ** 2))
        return {
            "bpp": 8 * len(data) / n,
            "payload_bpp": 8 * (len(data) - HEADER.size) / n,
            "entropy_bpp": bits / n,
            "zlib_bpp": 8 * len(zlib.compress(raw, 9)) / n,
            "psnr": 10 * float(np.log10(255**2 / max(error, 1e-10))),
        }

    # --------------------------------------------------------------------------------- checkpoints

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON values."""
        return dict(self._config)

    @property
    def weights_crc(self) -> int:
        """CRC-32 over all weights and tables: names the model in its files."""
        value = 0
        for name, tensor in sorted(self.state_dict().items()):
            value = zlib.crc32(name.encode(), value)
            value = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), value)
        return value

    def save(self, path: str | Path) -> None:
        """Write kind, configuration and weights."""
        config = json.dumps({"kind": self.kind, **self.get_config()})
        torch.save({"config": config, "state": self.state_dict()}, path)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Inverse of ``get_config``."""
        return cls(**config)

    def clone(self) -> Self:
        """A copy that shares nothing."""
        return copy.deepcopy(self)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: how a sum is split over threads changes its last bits, and with them
    perhaps a rounded logit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_pixels(image: Image.Image | Bytes | str | Path) -> Bytes:
    """Any picture as (H, W, 3) uint8; InputError for what is none."""
    if isinstance(image, str | Path):
        from PIL import Image

        with Image.open(image) as opened:
            image = opened.convert("RGB")
    if not isinstance(image, np.ndarray) and hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"), np.uint8)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"expected a picture: a path, a PIL image or uint8 pixels, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"expected pixels of shape (H, W, 3), got {image.shape}")
    if max(image.shape[:2]) > 65535 or image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise InputError(f"expected at most {MAX_PIXELS} pixels, got {image.shape}")
    return image


def cut(pixels: Bytes, patch: int) -> Tensor:
    """(H, W, 3) -> (n, 3, patch, patch) uint8, rows of patches; edges are repeated to fill up."""
    h, w = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -h % patch), (0, -w % patch), (0, 0)), mode="edge")
    rows, columns = padded.shape[0] // patch, padded.shape[1] // patch
    blocks = padded.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(blocks).reshape(-1, 3, patch, patch))


def join(patches: Tensor, h: int, w: int) -> Bytes:
    """Inverse of ``cut`` for a picture of h x w pixels."""
    patch = patches.shape[-1]
    columns = -(-w // patch)
    blocks = patches.cpu().numpy().reshape(-1, columns, 3, patch, patch)
    whole = blocks.transpose(0, 3, 1, 4, 2).reshape(-1, columns * patch, 3)
    return np.ascontiguousarray(whole[:h, :w])


class CountedBaseline(Baseline):
    """A baseline whose symbols are vectors of fields, coded by how often each code came."""

    prior: HistogramPrior

    def learn_counts(self, symbols: Symbols) -> None:
        """Count them."""
        self.prior.learn(symbols[0])

    def _fields_shape(self) -> tuple[int, ...]:
        """Shape of one patch's symbols; the last axis are the fields."""
        raise NotImplementedError

    def run(self, coder: Coder, n: int, symbols: Symbols | None) -> Symbols:
        """See ``Baseline``."""
        shape = (n, *self._fields_shape())
        n_vectors = int(np.prod(shape[:-1]))
        given = None if symbols is None else symbols[0]
        return [self.prior.run(coder, n_vectors, given).view(shape)]
