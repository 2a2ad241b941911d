"""Fit the latent coder to a trained ``networks.Codec``, as ``fitting`` does to a linear transform.

The networks' latent depends on the step, and its laws on the hyper-latent, so the photographs are
coded once for each round at steps of their own. The taps of the means come from training: the
networks' means count on just these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._coder_kernels import Shape
from .coder import COUNT_SHIPPED, LatentCoder, blank
from .fitting import Arrays, fit_head_taps, fit_magnitude_taps
from .learned import LearnedCodec
from .transform import STEP_BITS

log = logging.getLogger(__name__)

Photographs = Sequence[npt.NDArray[np.uint8]]
RATE_WEIGHT = 0.4  # lambda in step^2 a bit
LEAST_STEP, MOST_STEP = 3.0, 130.0  # grey levels
STATES = ("probabilities", "counts", "weights")


class Fit:
    """A coder under construction. crops: (H, W, 3) uint8 of training photographs."""

    def __init__(self, arrays: Arrays, crops: Photographs, seed: int = 0):
        self.codec, self.crops = LearnedCodec(arrays), crops
        self.rng = np.random.default_rng(seed)
        self.blank = blank(self.codec.n_channels)
        self.arrays = self.blank | {"mean_taps": arrays["coder.mean_taps"]}

    def run(self) -> Arrays:
        """All arrays of the coder. Some two seconds a megapixel, and a minute for the taps."""
        for round_ in range(2):
            if round_:  # what a coder that knows something decides differs from the first one
                self.learn_states()
            magnitudes = self.magnitudes()
            self.arrays |= fit_magnitude_taps(magnitudes) | fit_head_taps(magnitudes)
            self.arrays |= {name: self.blank[name] for name in STATES}
            log.info("%d taps of the magnitudes", len(self.arrays["magnitude_taps"]))
        log.info("%.3f bits a pixel, without the hyper-latent", self.learn_states())
        return self.arrays

    def _cases(self) -> Iterator[tuple[Any, Any, float]]:
        """Latent in steps, predictor and number of pixels of each crop, at steps spread evenly over
        their logarithms."""
        n = len(self.crops)
        places = (np.arange(n) + self.rng.random(n)) / n
        self.rng.shuffle(places)
        for crop, place in zip(self.crops, places, strict=True):
            step = LEAST_STEP * (MOST_STEP / LEAST_STEP) ** place
            fixed = round(step * (1 << STEP_BITS))
            y, _, z = self.codec.latents(crop)(fixed)
            predictor = self.codec.predictor(fixed, (y.shape[0], y.shape[1]), z)
            yield y, predictor, crop.shape[0] * crop.shape[1]

    def magnitudes(self) -> list[npt.NDArray[np.uint8]]:
        """(h, w, C) that coding the crops leaves."""
        coder = LatentCoder(self.arrays)
        out = []
        for y, predictor, _ in self._cases():
            planes = coder.encode_from(
                coder.start, y, [coder.n_heads], rate_weight=RATE_WEIGHT, predictor=predictor
            )[1]
            out.append(coder.channels_last(planes.magnitude, Shape(*y.shape[:2])))
        return out

    def learn_states(self) -> float:
        """Set the first states of counters and weights to those after coding all crops; returns
        bits a pixel."""
        coder = LatentCoder(self.arrays)
        state = coder.start
        n_bits = n_pixels = 0.0
        for y, predictor, n in self._cases():
            messages, _, state = coder.encode_from(
                state, y, [coder.n_heads], rate_weight=RATE_WEIGHT, predictor=predictor,
                count_limit=1000,
            )  # fmt: skip
            n_bits += 8 * len(messages[0][0])
            n_pixels += n
        self.arrays |= {
            "probabilities": np.clip(state.counters >> np.uint32(16), 1, 65535).astype(np.uint16),
            "counts": np.minimum(state.counters & np.uint32(1023), COUNT_SHIPPED).astype(np.uint8),
            "weights": state.weights.copy(),
        }
        return n_bits / n_pixels


def build(arrays: Arrays, crops: Photographs) -> Arrays:
    """All arrays of a weights file from the ``arrays.npz`` of a run of ``small``, ``full`` or
    ``tiny`` and training crops."""
    coder = Fit(arrays, crops).run()
    return dict(arrays) | {f"coder.{name}": array for name, array in coder.items()}
