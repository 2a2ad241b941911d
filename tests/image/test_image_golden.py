"""Files written once decode to the same pixels ever after, on every machine.

``golden/<name>-v1/`` holds ``file.pvq`` and ``decoded.png`` (or ``decoded.npy``, of an array). A new
version adds folders, with ``POLARPACK_WRITE_GOLDEN=1 pytest tests/image/test_image_golden.py``; those
that are there are never written again, and a missing one is a failure.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pvq import photograph

import polarpack_image as pvq

GOLDEN = Path(__file__).resolve().parent / "golden"
WRITE = os.environ.get("POLARPACK_WRITE_GOLDEN") == "1"
RGB = photograph(50, 70, seed=5)
CUBE = np.round(np.linspace(0, 500, 9 * 14 * 5) ** 1.2).astype(np.uint16).reshape(9, 14, 5)

CASES = {
    "rgb-low": lambda: pvq.compress(RGB, 10),
    "rgb-high": lambda: pvq.compress(RGB, 90, icc_profile=b"profile", exif=b"Exif\0\0x"),
    "gray": lambda: pvq.compress(RGB[:, :, 0], 60),
    "rgba": lambda: pvq.compress(np.dstack([RGB, RGB[:, :, 1]]), 40),
    "gray-alpha": lambda: pvq.compress(RGB[:9, :5, :2], 60),
    "scalar": lambda: pvq.compress(RGB, 70, quantizer="scalar"),
    "four-states": lambda: pvq.compress(RGB, 70, quantizer="dq4"),
    "polar": lambda: pvq.compress(RGB, 70, quantizer="polar"),
    "polar-or-indices": lambda: pvq.compress(RGB, 70, quantizer="polar+dq8"),
    "bands": lambda: pvq.compress(CUBE, psnr=40),
    "one-pixel": lambda: pvq.compress(RGB[:1, :1], 50),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    folder = GOLDEN / f"{name}-v1"
    if WRITE and not folder.exists():
        folder.mkdir(parents=True)
        data = CASES[name]()
        (folder / "file.pvq").write_bytes(data)
        decoded = pvq.decompress(data)
        if isinstance(decoded, np.ndarray):
            np.save(folder / "decoded.npy", decoded)
        else:
            decoded.save(folder / "decoded.png")
    decoded = pvq.decompress((folder / "file.pvq").read_bytes())
    if isinstance(decoded, np.ndarray):
        expected = np.load(folder / "decoded.npy")
        assert decoded.dtype == expected.dtype and (decoded == expected).all()
        return
    expected = Image.open(folder / "decoded.png")
    assert decoded.mode == expected.mode
    assert (np.asarray(decoded) == np.asarray(expected)).all()


def test_every_folder_is_tested():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}-v1" for name in CASES}
