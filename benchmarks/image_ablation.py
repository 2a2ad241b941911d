"""What is each part of the image codec's coder worth, on the same transform and weights?

    python benchmarks/image_ablation.py FOLDER --crops TILES [--every 3] [--middle 384 256]
        [--only NAME ..] [--resume]

codes every so many pictures of a folder (such as Kodak's), or their middles, with one part changed
at a time, and writes ``results/image_ablation.json`` and a plot: BD-rate of PSNR against the
default, in percent (more is worse), of whole files that the public functions wrote and read again.
The transform, the network and the taps are the shipped ones; counters and weights of every variant,
the default too, learn from nothing what the same crops of the training tiles (a folder written by
``data.Pictures.save``) teach them, so none is at home in another's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import polarpack_image as pvq
from polarpack_image import fitting, weights
from polarpack_image.benchmark import bd_rate, psnr
from polarpack_image.bitstream import Quantizer
from polarpack_image.codec import QUANTIZERS
from polarpack_image.coder import blank, blank_polar, polar_prefix
from polarpack_image.data import Pictures
from polarpack_image.exact import ContextNetwork, HeadPredictor
from polarpack_image.report import load_folder
from polarpack_image.transform import LinearTransform

RESULTS = Path(__file__).parent / "results"
QUALITIES = (5, 18, 31, 44, 57, 70, 83, 96)
SEED = 0
Arrays = dict[str, Any]


def same(arrays: Arrays) -> Arrays:
    """Nothing changed."""
    return arrays


def without(*names: str) -> Callable[[Arrays], Arrays]:
    """A change that empties these arrays of taps."""

    def change(arrays: Arrays) -> Arrays:
        return arrays | {name: arrays[name][:0] for name in names}

    return change


def without_parents(arrays: Arrays) -> Arrays:
    """All parents at an empty channel, whose magnitudes are 0."""
    parents = np.zeros_like(arrays["parents"])
    parents[:] = (7, 0, -1)
    return arrays | {"parents": parents}


def one_class(arrays: Arrays) -> Arrays:
    """All channels share their counters."""
    return arrays | {"channel_class": np.zeros_like(arrays["channel_class"])}


@dataclass(frozen=True)
class Variant:
    """What differs from the default."""

    quantizer: str = "dq8"
    change: Callable[[Arrays], Arrays] = same
    network: bool = True
    learned: bool = True
    effort: int = 1


VARIANTS = {
    "default": Variant(),
    "polar+dq8": Variant("polar+dq8"),
    "dq4": Variant("dq4"),
    "scalar": Variant("scalar"),
    "polar": Variant("polar"),
    "no network": Variant(network=False),
    "no magnitude taps": Variant(change=without("magnitude_taps", "head_taps")),
    "no mean taps": Variant(change=without("mean_taps")),
    "no parents": Variant(change=without_parents),
    "one class of channels": Variant(change=one_class),
    "nothing learned": Variant(learned=False),
    "effort 2": Variant(effort=2),
    "effort 3": Variant(effort=3),
}


def middle(rgb: Any, width: int, height: int) -> Any:
    """The middle of a picture, turned as it is: width is that of the longer side."""
    size = (height, width) if rgb.shape[1] >= rgb.shape[0] else (width, height)
    top, left = (max(0, (have - want) // 2) for have, want in zip(rgb.shape, size, strict=False))
    return np.ascontiguousarray(rgb[top : top + size[0], left : left + size[1]])


def prepared(variant: Variant, crops: list[Any]) -> Arrays:
    """The weights of a variant, all arrays of the file."""
    shipped, _ = weights.load()
    if not variant.network:
        shipped = {k: v for k, v in shipped.items() if not k.startswith("net.")}
    own = {k.removeprefix("coder."): v for k, v in shipped.items() if k.startswith("coder.")}
    own = variant.change(own)
    n_classes = int(own["channel_class"].max()) + 1
    empty = blank(len(own["magnitude_bias"]), n_classes)
    own |= {name: empty[name] for name in fitting.STATES}
    quantizer = QUANTIZERS[variant.quantizer]
    if quantizer.is_polar:
        prefix = polar_prefix(quantizer)
        book, depth, spacing = (own[prefix + n] for n in ("codebook", "depth", "spacing"))
        own |= blank_polar(own, book, depth, int(spacing[0]), quantizer)
    if variant.learned:
        transform = LinearTransform(
            {k.removeprefix("transform."): v for k, v in shipped.items() if "transform." in k}
        )
        latents = [transform.analysis(crop) for crop in crops]
        network = ContextNetwork(shipped) if variant.network else None

        def predictor_of(step: float) -> HeadPredictor | None:
            return None if network is None else HeadPredictor(network, round(256 * step))

        own = fitting.relearn(own, latents, quantizer, predictor_of=predictor_of, seed=SEED)
    others = {k: v for k, v in shipped.items() if not k.startswith("coder.")}
    # the polar quantizers' own arrays fit one coder only
    used = [polar_prefix(q) for q in (Quantizer.POLAR, Quantizer.POLAR_DQ8) if q != quantizer]
    kept = {k: v for k, v in own.items() if not k.startswith(tuple(used))}
    return others | {f"coder.{k}": v for k, v in kept.items()}


def curve(variant: Variant, crops: list[Any], pictures: list[Any]) -> list[Any]:
    """(bpp, PSNR) at each quality, mean over the pictures."""
    points = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variant.safetensors"
        weights.save(path, prepared(variant, crops))
        for quality in QUALITIES:
            rows = []
            for rgb in pictures:
                data = pvq.compress(
                    rgb, quality, quantizer=variant.quantizer, effort=variant.effort, weights=path
                )
                decoded = np.asarray(pvq.decompress(data, weights=path))
                rows.append((8 * len(data) / rgb[..., 0].size, psnr(rgb, decoded)))
            points.append(tuple(np.mean(rows, axis=0).tolist()))
    return points


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Rate over the default's rate at the same PSNR."""
    import matplotlib.pyplot as plt

    base = np.array(rows[0]["points"])
    figure, axes = plt.subplots(figsize=(7, 4))
    for i, row in enumerate(rows):
        points = np.array(row["points"])
        inside = (points[:, 1] > base[0, 1]) & (points[:, 1] < base[-1, 1])
        rate = np.exp(np.interp(points[inside, 1], base[:, 1], np.log(base[:, 0])))
        over = 100 * (points[inside, 0] / rate - 1)
        # ten colours, then the same with dashes
        axes.plot(points[inside, 1], over, "--" if i > 9 else "-", label=row["variant"])
    axes.set(xlabel="PSNR, dB", ylabel="bytes more than the default, %", ylim=(-3, 30))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crops", type=Path, required=True, help="training tiles")
    parser.add_argument("--n-crops", type=int, default=100)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--middle", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--resume", action="store_true", help="keep what is measured already")
    parser.add_argument("--out", type=Path, default=RESULTS / "image_ablation.json")
    options = parser.parse_args()
    named = dict(list(load_folder(options.folder).items())[:: options.every])
    if options.middle:
        named = {name: middle(rgb, *options.middle) for name, rgb in named.items()}
    tiles, _ = Pictures.load(options.crops).split()
    crops = fitting.training_crops(tiles, options.n_crops, 256, seed=SEED)
    data = [{"name": k, "shape": list(v.shape), "dtype": "uint8"} for k, v in named.items()]
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "seed": SEED,
        "threads": 1,
        "n_crops": options.n_crops,
        "weights": weights.load()[1].hex(),
        "data": data,
    }
    found: dict[str, list[Any]] = {}
    if options.resume and options.out.is_file():
        earlier = json.loads(options.out.read_text("utf-8"))
        if all(earlier[name] == value for name, value in head.items()):
            found = {row["variant"]: row["points"] for row in earlier["rows"]}
    for name, variant in VARIANTS.items():
        if name in options.only and name not in found:
            found[name] = curve(variant, crops, list(named.values()))
        if name not in found:
            continue
        rows = [
            {"variant": n, "bd_rate": round(bd_rate(found["default"], points), 2), "points": points}
            for n, points in sorted(found.items(), key=lambda item: [*VARIANTS].index(item[0]))
        ]
        result = head | {
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "cpu": platform.processor() or platform.machine(),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        plot(rows, options.out.with_suffix(".png"))
        print(f"{name:22} {bd_rate(found['default'], found[name]):+6.2f}%", flush=True)


if __name__ == "__main__":
    main()
