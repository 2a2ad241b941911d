"""A trained ``networks.Codec`` at work: pixels to latents and back, and what the coder asks for.

Reads what ``training_codec`` exports. Latents are decided in integers (``exact``), so that they
decode alike on every machine; the convolutional synthesis runs in floating point, and pixels may
differ by one level between machines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polarpack.errors import FormatError

from .exact import STEP_BITS, ContextNetwork, HeadPredictor
from .lapped import LappedKernels
from .networks import Codec, CodecConfig

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Arrays = Mapping[str, npt.NDArray[Any]]

BOUND = 127  # of |z|
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
    """Latents of pictures and pictures of latents, position-major as the coder wants them.

    Attributes
    ----------
    stride, n_channels, n_hyper : of the latent; channels of the hyper-latent z, 0 where there is
        none. z has a quarter of the latent's rows and columns, rounded up.
    """

    def __init__(self, arrays: Arrays):
        self.codec = codec_from_arrays(arrays)
        self.network = ContextNetwork(arrays)
        config = self.codec.config
        self.stride, self.n_channels, self.n_hyper = config.stride, config.channels, config.hyper

    @staticmethod
    def _log_step(step: int) -> Tensor:
        return torch.tensor([float(np.log2(step)) - STEP_BITS])

    def analysis(self, pixels: npt.NDArray[np.uint8], step: int) -> tuple[Float32, Int32 | None]:
        """(H, W, 3) uint8, sides multiples of the stride, to y in steps (h, w, C) float32 and z
        (ceil(h / 4), ceil(w / 4), n_hyper) int32, rounded. ``step`` in 1/256 grey level."""
        at = self._log_step(step)
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            y = self.codec.analysis(x, at) * (self.codec.gain(at) / at.exp2())
            z = self.codec.hyper(y).round().clamp(-BOUND, BOUND) if self.n_hyper else None
        latent = y[0].permute(1, 2, 0).contiguous().numpy()
        return latent, None if z is None else z[0].permute(1, 2, 0).int().contiguous().numpy()

    def predictor(self, shape: tuple[int, int], z: Int32 | None, step: int) -> HeadPredictor:
        """What the coder asks for means and levels of a latent of (h, w) positions."""
        if z is None:
            return HeadPredictor(self.network, step)
        wanted = (-(-shape[0] // 4), -(-shape[1] // 4), self.n_hyper)
        if z.shape != wanted:
            raise FormatError(f"hyper-latent has shape {z.shape}, expected {wanted}")
        hyper = self.network.hyper_features(z)[: shape[0], : shape[1]]
        return HeadPredictor(self.network, step, hyper)

    def synthesis(self, recon: Int32, step: int) -> Float32:
        """y_hat (h, w, C) int32 in 1/16 step to pixels (H, W, 3) float32, not clipped."""
        at = self._log_step(step)
        y = torch.from_numpy(recon.astype(np.float32) / 16).permute(2, 0, 1)[None]
        with torch.no_grad():
            x = self.codec.synthesis(y * (at.exp2() / self.codec.gain(at)), at)
        return x[0].permute(1, 2, 0).contiguous().numpy()
