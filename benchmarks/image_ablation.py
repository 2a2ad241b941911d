"""What is each part of the image codec's coder worth, on the same transform and weights?

    python benchmarks/image_ablation.py FOLDER [--every 4]

codes every so many pictures of a folder (such as Kodak's) with one part changed at a time, and
writes ``results/image_ablation.json``: BD-rate of PSNR against the default, in percent (more is
worse). Sizes are whole files. The shipped counters learned from eight states, so other trellises
start a little off; they adapt within a picture, and what is left of that is part of the figure.

| variant | what differs |
|---|---|
| default | 8 states, 2 rounds of search |
| 1 round, 3 rounds | of the search in each row |
| 4 states | the trellis |
| scalar | one state: uniform quantizer with rate-distortion optimised indices |
| no mean taps | nothing predicts a coefficient |
| no magnitude taps | levels of magnitudes are all zero |
| blank counters | counters and weights start as if nothing had been learned |
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from polarpack_image import weights
from polarpack_image.benchmark import bd_rate, psnr
from polarpack_image.codec import Codec, step_of
from polarpack_image.coder import LatentCoder, blank
from polarpack_image.report import load_folder
from polarpack_image.transform import to_pixels

RESULTS = Path(__file__).parent / "results"
QUALITIES = (5, 18, 31, 44, 57, 70, 83, 96)
HEADER_BYTES = 36  # of a file with one message
SCALAR_STEP = 0.75  # a scalar quantizer's lattice for about the same rate


def curve(codec: Codec, coder: LatentCoder, pictures: list[Any], rounds: int) -> list[Any]:
    """(bpp, PSNR) at each quality, mean over the pictures."""
    points = []
    for quality in QUALITIES:
        scale = SCALAR_STEP if coder.n_states == 1 else 1.0
        step = max(1, round(step_of(quality) * scale))
        rows = []
        for rgb in pictures:
            target = codec.coefficients(rgb) * np.float32(256 / step)
            messages, recon = coder.encode(
                target, [coder.n_heads], rate_weight=0.5 if coder.n_states == 1 else 0.4,
                rounds=rounds,
            )  # fmt: skip
            ringed = codec.transform.surrounded(recon, (True,) * 4)
            decoded = to_pixels(codec.transform.synthesis(ringed, step))
            decoded = decoded[: rgb.shape[0], : rgb.shape[1]]
            bits = 8 * (len(messages[0][0]) + HEADER_BYTES)
            rows.append((bits / rgb.shape[0] / rgb.shape[1], psnr(rgb, decoded)))
        points.append(tuple(np.mean(rows, axis=0).tolist()))
    return points


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    named = dict(list(load_folder(options.folder).items())[:: options.every])
    arrays, name = weights.load()
    codec = Codec(arrays, name)
    own = {k.removeprefix("coder."): v for k, v in arrays.items() if k.startswith("coder.")}
    empty = blank(codec.transform.n_channels)
    bare = {k: empty[k] for k in ("probabilities", "counts", "weights")}
    no_taps = {"magnitude_taps": empty["magnitude_taps"], "head_taps": empty["head_taps"]}
    variants = {
        "default": (own, 8, 2),
        "1 round": (own, 8, 1),
        "3 rounds": (own, 8, 3),
        "4 states": (own, 4, 2),
        "scalar": (own, 1, 2),
        "no mean taps": (own | {"mean_taps": empty["mean_taps"]}, 8, 2),
        "no magnitude taps": (own | no_taps, 8, 2),
        "blank counters": (own | bare, 8, 2),
    }
    rows: list[dict[str, Any]] = []
    base: list[Any] = []
    for variant, (part, n_states, rounds) in variants.items():
        coder = LatentCoder(part, n_states=n_states)
        points = curve(codec, coder, list(named.values()), rounds)
        base = base or points
        rows.append({"variant": variant, "bd_rate": round(bd_rate(base, points), 2),
                     "points": points})  # fmt: skip
        print(f"{variant:20} {rows[-1]['bd_rate']:+6.2f}%", flush=True)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "threads": 1,
        "cpu": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "data": [{"name": k, "shape": list(v.shape), "dtype": "uint8"} for k, v in named.items()],
        "rows": rows,
    }
    path = RESULTS / "image_ablation.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
