"""Files written once decode to the same pixels ever after, on every machine.

``golden/<name>-v0/`` holds ``file.pvq`` and ``decoded.png``. ``POLARPACK_WRITE_GOLDEN=1 pytest
tests/image/test_image_golden.py`` writes them all anew, which is right only while the version is
not frozen (new weights make old files unreadable); a missing one is a failure.
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
    "one-pixel": lambda: pvq.compress(RGB[:1, :1], 50),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    folder = GOLDEN / f"{name}-v0"
    if WRITE:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file.pvq").write_bytes(CASES[name]())
        pvq.decompress((folder / "file.pvq").read_bytes()).save(folder / "decoded.png")
    decoded = pvq.decompress((folder / "file.pvq").read_bytes())
    expected = Image.open(folder / "decoded.png")
    assert decoded.mode == expected.mode
    assert (np.asarray(decoded) == np.asarray(expected)).all()


def test_every_folder_is_tested():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}-v0" for name in CASES}
