"""A trained ``networks.Codec`` at work: pixels to latents and back, and what the coder asks for.

Reads what ``training_codec`` exports. Latents are decided in integers (``exact``), so that they
decode alike on every machine; the convolutional synthesis runs in floating point, and pixels may
differ by one level between machines.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polarpack.entropy import StaticModel
from polarpack.errors import CorruptDataError, FormatError, InputError

from .bitstream import HASH_BYTES, Coding, Message, Quantizer
from .coder import LatentCoder
from .exact import STEP_BITS, ContextNetwork, HeadPredictor
from .lapped import LappedKernels
from .networks import Codec, CodecConfig
from .picture_codec import Latent, Tune, whole_blocks
from .transform import PIXEL_BITS

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Arrays = Mapping[str, npt.NDArray[Any]]

BOUND = 127  # of |z|
Z_RESOLUTION = 8  # of the tables that code z
WINDOW = 64  # positions that the networks see at a time, in each direction; a multiple of 4
LIMIT = 1 << 20  # of pixels in 1/64
PREFIX = "codec."


def codec_arrays(codec: Codec) -> dict[str, npt.NDArray[Any]]:
    """A codec for the weights file: its sizes as JSON, the entropy network in integers under
    ``net``, everything else in float16, but for the encoder's own convolutions, which are int8
    with a float16 scale for each output channel (they can only cost a little rate)."""
    arrays = codec.context.export()
    text = json.dumps(asdict(codec.config)).encode()
    arrays[f"{PREFIX}config"] = np.frombuffer(text, np.uint8)
    for name, value in codec.state_dict().items():
        if name.startswith("context."):
            continue
        array = value.detach().float().cpu().numpy()
        if name.startswith(("g_a.", "h_a.")) and array.ndim == 4:
            scale = np.abs(array).max((1, 2, 3)) / 127
            scale = np.maximum(scale, 1e-6).astype(np.float16)
            wide = scale.astype(np.float32)[:, None, None, None]
            arrays[PREFIX + name] = np.clip(np.rint(array / wide), -127, 127).astype(np.int8)
            arrays[f"{PREFIX}{name}.scale"] = scale
        else:
            arrays[PREFIX + name] = array.astype(np.float16)
    return arrays


def codec_from_arrays(arrays: Arrays) -> Codec:
    """The inverse of ``codec_arrays``, but for the entropy network, which stays in integers (see
    ``LearnedCodec``). Raises FormatError where arrays do not fit the sizes."""
    try:
        sizes = json.loads(bytes(arrays[f"{PREFIX}config"]))
        config = CodecConfig(**{**sizes, "starts": tuple(sizes["starts"])})
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"weights: no sizes of a learned codec ({error})") from error
    blank = LappedKernels(
        np.zeros((16, 16, 3, 192), np.float32),
        np.zeros((16, 16, 3, 192), np.float32),
        np.ones((192, 2), np.int8),
    )
    codec = Codec(config, blank)
    state = codec.state_dict()
    for name, value in state.items():
        if name.startswith("context."):
            continue
        array = arrays.get(PREFIX + name)
        if array is None or array.shape != tuple(value.shape):
            found = None if array is None else array.shape
            raise FormatError(f"weights: {name} has shape {found}, expected {tuple(value.shape)}")
        whole = array.astype(np.float32)
        if array.dtype == np.int8:
            scale = arrays[f"{PREFIX}{name}.scale"].astype(np.float32)
            whole *= scale.reshape(-1, *[1] * (array.ndim - 1))
        state[name] = torch.from_numpy(whole)
    codec.load_state_dict(state)
    return codec.eval().requires_grad_(False)


class LearnedCodec:
    """A ``picture_codec.PictureCodec``: latents of pictures, their laws, and pictures of latents.

    arrays: of ``codec_arrays``, ``z_levels`` and a fitted coder. Networks see windows of the
    picture with as much around them as they depend on: memory is bounded, and there are no seams.

    Attributes
    ----------
    stride, n_channels, n_hyper : of the latent; channels of the hyper-latent z, 0 where there is
        none. z has a quarter of the latent's rows and columns, rounded up.
    halo : positions that a pixel depends on around its own.
    """

    def __init__(self, arrays: Arrays, weights_hash: bytes = bytes(HASH_BYTES)):
        self.weights_hash = weights_hash
        self.codec = codec_from_arrays(arrays)
        self.network = ContextNetwork(arrays)
        config = self.codec.config
        self.stride, self.n_channels, self.n_hyper = config.stride, config.channels, config.hyper
        self.coding = Coding.LEARNED_16 if self.stride == 16 else Coding.LEARNED_8
        # a trunk has two convolutions in each block, and two around them; the linear part reaches
        # half a block further than its own
        reach = (2 * config.synthesis_blocks + 2) if config.synthesis_blocks else 1
        self.halo = -(-reach // self.codec.factor)
        reach = (2 * config.analysis_blocks + 2) if config.analysis_blocks else 1
        self._margin = -(-reach // self.codec.factor)
        self._z_model = self._model_of(arrays)
        self._coder_arrays = {
            k.removeprefix("coder."): v for k, v in arrays.items() if k.startswith("coder.")
        }
        self._coder: LatentCoder | None = None

    def _model_of(self, arrays: Arrays) -> StaticModel:
        levels = arrays.get(f"{PREFIX}z_levels")
        if levels is None or levels.shape != (self.n_hyper, 2 * BOUND + 1):
            found = None if levels is None else levels.shape
            raise FormatError(
                f"weights: z_levels has shape {found}, expected {(self.n_hyper, 2 * BOUND + 1)}"
            )
        sizes = [2 * BOUND + 1] * self.n_hyper
        return StaticModel(sizes, list(levels), np.arange(self.n_hyper), resolution=Z_RESOLUTION)

    def coder(self, quantizer: Quantizer = Quantizer.DQ8) -> LatentCoder:
        """The latent coder; there is one for eight states alone."""
        if quantizer != Quantizer.DQ8:
            raise InputError(f"weights of {self.coding.name} know no quantizer {quantizer.name}")
        if "mean_taps" not in self._coder_arrays:
            raise FormatError("weights: no coder has been fitted to the networks (see train, fit)")
        if self._coder is None:
            self._coder = LatentCoder(self._coder_arrays)
        return self._coder

    @staticmethod
    def _log_step(step: int) -> Tensor:
        return torch.tensor([float(np.log2(step)) - STEP_BITS])

    # -- encoding --------------------------------------------------------------------------------
    def latents(self, rgb: npt.NDArray[Any]) -> Callable[[int], Latent]:
        """See ``PictureCodec``: the networks look at the step too, so each step has a latent."""
        whole = whole_blocks(rgb, self.stride)

        def latent(step: int) -> Latent:
            y, z = self.analysis(whole, step)
            return Latent(y, np.float32(1), z)

        return latent

    def analysis(self, pixels: npt.NDArray[Any], step: int) -> tuple[Float32, Int32]:
        """(H, W, 3) around 128, sides multiples of the stride, to y in steps (h, w, C) float32 and
        z (ceil(h / 4), ceil(w / 4), n_hyper) int32, rounded. ``step`` in 1/256 grey level."""
        at, stride = self._log_step(step), self.stride
        rows, columns = pixels.shape[0] // stride, pixels.shape[1] // stride
        y = np.empty((rows, columns, self.n_channels), np.float32)
        z = np.zeros((-(-rows // 4), -(-columns // 4), self.n_hyper), np.int32)
        with torch.no_grad():
            scale = self.codec.gain(at) / at.exp2()
            for inner, seen, offset in windows(rows, columns, self._margin):
                part = pixels[_pixels(seen[0], stride), _pixels(seen[1], stride)]
                x = _to_tensor(part.astype(np.float32))
                found = _to_array(self.codec.analysis(x, at) * scale)
                y[inner] = found[_cut_out(offset, inner)]
            if self.n_hyper:
                for inner, seen, offset in windows(rows, columns, 4):
                    found = _to_array(self.codec.hyper(_to_tensor(y[seen])).round())
                    quarter = _quartered(inner)
                    offset = offset[0] // 4, offset[1] // 4
                    part = found[_cut_out(offset, quarter)]
                    z[quarter] = np.clip(part, -BOUND, BOUND)
        return y, z

    def importance(self, y: Float32, tune: Tune) -> None:
        """See ``PictureCodec``: errors count alike."""
        if tune != "psnr":
            raise InputError(f"expected tune='psnr' with these weights, got {tune!r}")

    def encode_hyper(self, z: Int32) -> Message:
        """See ``PictureCodec``."""
        symbols = (z + BOUND).reshape(-1, self.n_hyper)
        return self._z_model.encode(symbols), _checksum(symbols)

    # -- decoding --------------------------------------------------------------------------------
    def decode_hyper(self, message: Message | None, rows: int, columns: int) -> Int32:
        """See ``PictureCodec``."""
        shape = -(-rows // 4), -(-columns // 4), self.n_hyper
        if message is None:
            likeliest = [int(levels.argmin()) for levels in self._z_model.levels]
            return np.broadcast_to(np.array(likeliest, np.int32) - BOUND, shape)
        symbols = self._z_model.decode(message[0], shape[0] * shape[1])
        if _checksum(symbols) != message[1]:
            raise CorruptDataError("hyper-latent: its checksum does not match its integers")
        return symbols.astype(np.int32).reshape(shape) - BOUND

    def predictor(self, step: int, shape: tuple[int, int], z: Int32 | None) -> HeadPredictor:
        """See ``PictureCodec``."""
        if z is None or not self.n_hyper:
            return HeadPredictor(self.network, step)
        wanted = (-(-shape[0] // 4), -(-shape[1] // 4), self.n_hyper)
        if z.shape != wanted:
            raise FormatError(f"hyper-latent has shape {z.shape}, expected {wanted}")
        hyper = self.network.hyper_features(z)[: shape[0], : shape[1]]
        return HeadPredictor(self.network, step, hyper)

    def values(self, recon: Int32, margins: tuple[int, int, int, int], step: int) -> Int32:
        """See ``PictureCodec``; in floating point, so that another machine's pixels may differ by
        one."""
        top, bottom, left, right = margins
        rows, columns = recon.shape[0] - top - bottom, recon.shape[1] - left - right
        out = np.empty((rows * self.stride, columns * self.stride, 3), np.int32)
        for inner, seen, offset in windows(rows, columns, self.halo, margins):
            part = recon[
                seen[0].start + top : seen[0].stop + top, seen[1].start + left : seen[1].stop + left
            ]
            x = self.synthesis(part, step)
            cut = _cut_out((offset[0], offset[1]), inner)
            x = x[_pixels(cut[0], self.stride), _pixels(cut[1], self.stride)]
            fixed = np.clip(np.rint(x * (1 << PIXEL_BITS)), -LIMIT, LIMIT)
            out[_pixels(inner[0], self.stride), _pixels(inner[1], self.stride)] = fixed
        return out

    def synthesis(self, recon: Int32, step: int) -> Float32:
        """y_hat (h, w, C) int32 in 1/16 step to pixels (H, W, 3) float32, not clipped."""
        at = self._log_step(step)
        with torch.no_grad():
            y = _to_tensor(recon.astype(np.float32) * np.float32(1 / 16))
            return _to_array(self.codec.synthesis(y * (at.exp2() / self.codec.gain(at)), at))


Slices = tuple[slice, slice]


def windows(
    rows: int, columns: int, margin: int, around: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Iterator[tuple[Slices, Slices, tuple[int, int]]]:
    """Windows of a plane of positions: the inner part, what is to be seen (``margin`` more on each
    side, as far as the plane and what is ``around`` it, top, bottom, left, right, reach; may start
    below 0), and where the inner part starts in that."""
    top, bottom, left, right = around
    for y in range(0, rows, WINDOW):
        for x in range(0, columns, WINDOW):
            y1, x1 = min(y + WINDOW, rows), min(x + WINDOW, columns)
            y0, x0 = max(y - margin, -top), max(x - margin, -left)
            seen = (
                slice(y0, min(y1 + margin, rows + bottom)),
                slice(x0, min(x1 + margin, columns + right)),
            )
            yield (slice(y, y1), slice(x, x1)), seen, (y - y0, x - x0)


def _pixels(positions: slice, stride: int) -> slice:
    return slice(positions.start * stride, positions.stop * stride)


def _quartered(inner: Slices) -> Slices:
    rows, columns = (slice(s.start // 4, -(-s.stop // 4)) for s in inner)
    return rows, columns


def _cut_out(offset: tuple[int, int], inner: Slices) -> Slices:
    """Where an inner part stands in what was seen around it."""
    y, x = offset
    return (
        slice(y, y + inner[0].stop - inner[0].start),
        slice(x, x + inner[1].stop - inner[1].start),
    )


def _to_tensor(x: Float32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None]


def _to_array(x: Tensor) -> Float32:
    return x[0].permute(1, 2, 0).contiguous().numpy()


def _checksum(symbols: npt.NDArray[Any]) -> int:
    """CRC-32 of the integers + 127 as bytes, channels fastest."""
    return zlib.crc32(symbols.astype(np.uint8).tobytes())


def z_levels(mean: Tensor, log_scale: Tensor) -> npt.NDArray[np.uint8]:
    """(n_hyper, 255) levels of a ``StaticModel``: how rare each value of each channel of z is under
    its logistic law; means (n_hyper,) and log2 scales."""
    edges = torch.arange(-BOUND, BOUND + 2, dtype=torch.float64) - 0.5
    at = (edges - mean.detach().double()[:, None]) / log_scale.detach().double().exp2()[:, None]
    # differences of the smaller tails, which do not cancel
    tail = torch.sigmoid(-at.abs())
    p = torch.where(
        at[:, 1:] <= 0,
        tail[:, 1:] - tail[:, :-1],
        torch.where(at[:, :-1] >= 0, tail[:, :-1] - tail[:, 1:], 1 - tail[:, 1:] - tail[:, :-1]),
    ).clamp_min(1e-12)
    rarity = Z_RESOLUTION * (p.amax(1, keepdim=True) / p).log2()
    return (1 + rarity.round()).clamp(1, 255).numpy().astype(np.uint8)
