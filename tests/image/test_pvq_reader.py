"""docs/pvq.md suffices: a reader written from it alone finds the same pixels.

It imports nothing of ours, so what it reads it reads from the page and the weights file.
"""

import numpy as np
import pvq_reader
import pytest
from test_pvq import photograph

import polarpack_image as pvq
from polarpack_image import bitstream, codec, weights


@pytest.fixture(scope="module")
def arrays():
    return pvq_reader.weights_arrays(weights.DEFAULT.read_bytes())


@pytest.mark.parametrize(
    ("shape", "quality", "quantizer"),
    [
        ((33, 30), 85, "dq8"),  # three layers
        ((8, 24), 0, "dq8"),
        ((26, 7), 100, "dq4"),
        ((16, 16), 60, "scalar"),
        ((1, 1), 50, "dq8"),
        ((20, 30), 90, "polar"),
        ((20, 30), 90, "polar+dq8"),
    ],
)
def test_same_pixels(arrays, shape, quality, quantizer):
    data = pvq.compress(photograph(*shape, seed=3), quality, quantizer=quantizer)
    assert (pvq_reader.read(data, arrays) == np.asarray(pvq.decompress(data))).all()


def test_same_pixels_of_large_coefficients_and_tiles(arrays, monkeypatch):
    """Noise has indices beyond the unary bits; tiles of 2 x 2 positions meet at edges."""
    noise = np.random.default_rng(0).integers(0, 2, (24, 17, 3)).astype(np.uint8) * 255
    data = pvq.compress(noise, 100)
    assert (pvq_reader.read(data, arrays) == np.asarray(pvq.decompress(data))).all()
    for module in (bitstream, codec):
        monkeypatch.setattr(module, "TILE", 2)
    monkeypatch.setattr(pvq_reader, "TILE", 2)
    gray = noise[:, :, 0]
    data = pvq.compress(gray, 60)
    assert (pvq_reader.read(data, arrays) == np.asarray(pvq.decompress(data))).all()
